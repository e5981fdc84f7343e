// SPDX-License-Identifier: GPL-2.0

//! Which controller pins and messages a global system interrupt goes to
//! (Documentation/virt/kvm/api.rst, KVM_SET_GSI_ROUTING).
//!
//! The routes themselves are kept by the owner, in a slice of its own; a [`RoutingIndex`] beside it
//! finds those of a GSI and the GSI of a pin in a few steps.

use super::{ioapic, Invalid};
use crate::x86::vector::Gsi;

/// The number of GSIs, and the most routes that a table may have (KVM_MAX_IRQ_ROUTES).
pub const MAX_ROUTES: usize = 4096;
/// The number of chains that an index keeps routes in. A machine has seldom more GSIs than that.
const CHAINS: usize = 256;
/// The most routes in a chain: 16 GSIs, each with one to each of three controllers.
const MAX_CHAIN: usize = MAX_ROUTES / CHAINS * 3;

/// KVM_IRQ_ROUTING_IRQCHIP.
const KIND_IRQCHIP: u32 = 1;
/// KVM_IRQ_ROUTING_MSI.
const KIND_MSI: u32 = 2;
/// KVM_MSI_VALID_DEVID, the one flag that a route may have. A PC has no use for it.
const FLAG_DEVICE_ID: u32 = 1;
/// KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE and KVM_IRQCHIP_IOAPIC.
const CHIP_MASTER: u32 = 0;
const CHIP_SLAVE: u32 = 1;
const CHIP_IOAPIC: u32 = 2;

/// One entry of a table as userspace gives it, `struct kvm_irq_routing_entry`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RawRoute {
    /// The GSI.
    pub gsi: u32,
    /// The kind: 1 a controller's pin, 2 an MSI.
    pub kind: u32,
    /// Flags.
    pub flags: u32,
    /// The first words of the union: the controller and its pin, or the MSI's lower and upper
    /// address half and its data.
    pub words: [u32; 3],
}

/// Where a GSI goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// A line of the 8259s, 0 to 15.
    Pic(u8),
    /// A pin of the IOAPIC, 0 to 23.
    IoApic(u8),
    /// A message-signalled interrupt.
    Msi {
        /// The address that is written.
        address: u64,
        /// The data that is written.
        data: u32,
    },
}

impl Target {
    /// Whether a GSI may have both routes: only those to different controllers go together. The two
    /// 8259s count as two.
    const fn goes_with(self, other: Self) -> bool {
        match (self, other) {
            (Self::Pic(a), Self::Pic(b)) => a >> 3 != b >> 3,
            (Self::Pic(_), Self::IoApic(_)) | (Self::IoApic(_), Self::Pic(_)) => true,
            _ => false,
        }
    }
}

/// What a machine lets its routes be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RoutingRules {
    /// The 8259s and the IOAPIC are the module's (KVM_CREATE_IRQCHIP, not KVM_CAP_SPLIT_IRQCHIP).
    pub controllers: bool,
    /// MSIs have 32-bit destinations (KVM_X2APIC_API_USE_32BIT_IDS).
    pub extended_msi: bool,
}

/// A route in a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Route {
    /// The GSI.
    pub gsi: Gsi,
    /// Where it goes.
    pub target: Target,
    /// The place of the next route in its chain plus 1; 0 is none.
    next: u16,
}

impl Route {
    /// Checks an entry that userspace gives.
    pub fn parse(raw: &RawRoute, rules: RoutingRules) -> Result<Self, Invalid> {
        let allowed_flags = if raw.kind == KIND_MSI {
            FLAG_DEVICE_ID
        } else {
            0
        };
        if !is_gsi(raw.gsi) || raw.flags & !allowed_flags != 0 {
            return Err(Invalid);
        }
        let [first, second, third] = raw.words;
        let target = match raw.kind {
            KIND_IRQCHIP if rules.controllers => pin_target(first, second)?,
            KIND_MSI if rules.extended_msi && second & 0xff != 0 => return Err(Invalid),
            KIND_MSI => Target::Msi {
                address: (u64::from(second) << 32) | u64::from(first),
                data: third,
            },
            _ => return Err(Invalid),
        };
        Ok(Self::new(Gsi(raw.gsi), target))
    }

    /// A route from `gsi` to `target`.
    pub const fn new(gsi: Gsi, target: Target) -> Self {
        Self {
            gsi,
            target,
            next: 0,
        }
    }
}

fn pin_target(chip: u32, pin: u32) -> Result<Target, Invalid> {
    let pin = u8::try_from(pin).map_err(|_| Invalid)?;
    match chip {
        CHIP_MASTER if pin < 8 => Ok(Target::Pic(pin)),
        CHIP_SLAVE if pin < 8 => Ok(Target::Pic(pin | 8)),
        CHIP_IOAPIC if usize::from(pin) < ioapic::PINS => Ok(Target::IoApic(pin)),
        _ => Err(Invalid),
    }
}

/// Whether there is such a GSI.
fn is_gsi(gsi: u32) -> bool {
    usize::try_from(gsi).is_ok_and(|gsi| gsi < MAX_ROUTES)
}

/// The chain that the routes of a GSI are in.
#[inline]
const fn chain_of(gsi: Gsi) -> usize {
    (gsi.0 & 0xff) as usize
}

/// The routes of a machine that has set none: each GSI goes to the IOAPIC's pin of the same number,
/// and the first 16 to the 8259s' lines too. KVM does the same; that a PC's interval timer is at pin 2
/// is for whoever describes the machine to say in a table of its own.
pub const DEFAULT_ROUTES: [Route; 40] = {
    let mut routes = [Route::new(Gsi(0), Target::IoApic(0)); 40];
    let (ioapic_half, pic_half) = routes.split_at_mut(ioapic::PINS);
    fill(ioapic_half, false);
    fill(pic_half, true);
    routes
};

/// Fills in the routes of GSI 0 and up.
const fn fill(mut routes: &mut [Route], to_pic: bool) {
    let mut number = 0u8;
    while let [route, rest @ ..] = routes {
        let target = if to_pic {
            Target::Pic(number)
        } else {
            Target::IoApic(number)
        };
        *route = Route::new(Gsi(number as u32), target);
        number = number.wrapping_add(1);
        routes = rest;
    }
}

/// Finds routes by GSI and GSIs by pin. All zeros is the index of an empty table.
#[derive(Clone, Debug)]
pub struct RoutingIndex {
    /// For each chain the place of its first route plus 1; 0 is none.
    heads: [u16; CHAINS],
    /// For each line of the 8259s and each pin of the IOAPIC its GSI plus 1; 0 is none.
    pic: [u16; 16],
    ioapic: [u16; ioapic::PINS],
}

impl Default for RoutingIndex {
    fn default() -> Self {
        Self::new()
    }
}

impl RoutingIndex {
    /// The index of an empty table.
    pub const fn new() -> Self {
        Self {
            heads: [0; CHAINS],
            pic: [0; 16],
            ioapic: [0; ioapic::PINS],
        }
    }

    /// Builds the index of `routes` anew, linking those of a chain. Invalid are more than
    /// [`MAX_ROUTES`], a GSI beyond them, and a GSI with two routes to the same controller or with an
    /// MSI and another one.
    pub fn build(&mut self, routes: &mut [Route]) -> Result<(), Invalid> {
        *self = Self::new();
        if routes.len() > MAX_ROUTES {
            return Err(Invalid);
        }
        let mut place = 0u16;
        while let Some(route) = routes.get(usize::from(place)).copied() {
            if !is_gsi(route.gsi.0)
                || self
                    .targets(routes, route.gsi)
                    .any(|other| !route.target.goes_with(other))
            {
                return Err(Invalid);
            }
            let number = place.wrapping_add(1);
            if let (Some(head), Some(entry)) = (
                self.heads.get_mut(chain_of(route.gsi)),
                routes.get_mut(usize::from(place)),
            ) {
                entry.next = *head;
                *head = number;
            }
            self.enter_pin(route);
            place = number;
        }
        Ok(())
    }

    fn enter_pin(&mut self, route: Route) {
        let slot = match route.target {
            Target::Pic(line) => self.pic.get_mut(usize::from(line)),
            Target::IoApic(pin) => self.ioapic.get_mut(usize::from(pin)),
            Target::Msi { .. } => None,
        };
        if let (Some(slot), Ok(gsi)) = (slot, u16::try_from(route.gsi.0)) {
            *slot = gsi.wrapping_add(1);
        }
    }

    /// The targets of `gsi` in `routes`, the table that this index was built of: at most three.
    #[inline]
    pub fn targets<'a>(&self, routes: &'a [Route], gsi: Gsi) -> impl Iterator<Item = Target> + 'a {
        let next = self.heads.get(chain_of(gsi)).copied().unwrap_or(0);
        // The bounds hold too where the slice is not the one that the index was built of.
        Chain { routes, next }
            .take(MAX_CHAIN)
            .filter(move |route| route.gsi == gsi)
            .map(|route| route.target)
            .take(3)
    }

    /// The GSI whose route goes to the line `line` of the 8259s; the last one of several.
    pub fn gsi_of_pic_line(&self, line: u8) -> Option<Gsi> {
        gsi_of(self.pic.get(usize::from(line)))
    }

    /// The GSI whose route goes to the pin `pin` of the IOAPIC; the last one of several.
    pub fn gsi_of_ioapic_pin(&self, pin: u8) -> Option<Gsi> {
        gsi_of(self.ioapic.get(usize::from(pin)))
    }
}

fn gsi_of(slot: Option<&u16>) -> Option<Gsi> {
    slot?.checked_sub(1).map(|gsi| Gsi(u32::from(gsi)))
}

/// The routes from `next` on.
struct Chain<'a> {
    routes: &'a [Route],
    next: u16,
}

impl Iterator for Chain<'_> {
    type Item = Route;

    #[inline]
    fn next(&mut self) -> Option<Route> {
        let route = *self.routes.get(usize::from(self.next.checked_sub(1)?))?;
        self.next = route.next;
        Some(route)
    }
}

#[cfg(test)]
mod tests;
