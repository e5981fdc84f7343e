// SPDX-License-Identifier: GPL-2.0

//! Zones whose writes wait in a ring until userspace looks there
//! (Documentation/virt/kvm/api.rst, KVM_REGISTER_COALESCED_MMIO).

use super::{Bus, Invalid};

/// The most zones of one machine on each bus (KVM's NR_IOBUS_DEVS).
pub const MAX_ZONES: usize = 1000;

/// A range of addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Zone {
    bus: Bus,
    address: u64,
    size: u32,
}

impl Zone {
    /// The zone that userspace names; `is_port` is the structure's `pio` field.
    ///
    /// # Errors
    ///
    /// [`Invalid`] where that field is neither 0 nor 1.
    pub fn parse(address: u64, size: u32, is_port: u32) -> Result<Self, Invalid> {
        let bus = match is_port {
            0 => Bus::Memory,
            1 => Bus::Port,
            _ => return Err(Invalid),
        };
        Ok(Self { bus, address, size })
    }

    /// The zone's bus.
    pub const fn bus(&self) -> Bus {
        self.bus
    }

    /// Whether an access lies whole inside.
    #[inline]
    pub fn holds(&self, bus: Bus, address: u64, length: u64) -> bool {
        let Some(inside) = address.checked_sub(self.address) else {
            return false;
        };
        bus == self.bus
            && address.checked_add(length).is_some()
            && inside
                .checked_add(length)
                .is_some_and(|end| end <= u64::from(self.size))
    }

    /// Whether removing `other` removes this one: it holds all of it.
    pub fn is_removed_by(&self, other: &Self) -> bool {
        self.holds(other.bus, other.address, other.size.into())
    }
}

/// The place in a ring of `places` that the next entry takes, and what `last` becomes; none where the ring
/// is full, one place always being free, or userspace has spoilt it. `first` and `last` are userspace's.
#[inline]
pub fn next_place(first: u32, last: u32, places: u32) -> Option<(u32, u32)> {
    if last >= places {
        return None;
    }
    // `last` is below `places`, so that this does not wrap.
    let next = last.wrapping_add(1);
    let next = if next == places { 0 } else { next };
    (next != first).then_some((last, next))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_zone_holds() {
        let zone = Zone::parse(0x1000, 0x10, 0).unwrap();
        assert!(zone.holds(Bus::Memory, 0x1000, 4));
        assert!(zone.holds(Bus::Memory, 0x100c, 4));
        assert!(!zone.holds(Bus::Memory, 0x100d, 4));
        assert!(!zone.holds(Bus::Memory, 0xfff, 1));
        assert!(!zone.holds(Bus::Port, 0x1000, 4));
        assert!(!zone.holds(Bus::Memory, u64::MAX, 8));
        let top = Zone::parse(u64::MAX - 7, 8, 0).unwrap();
        assert!(!top.holds(Bus::Memory, u64::MAX - 7, 8));
        assert!(top.holds(Bus::Memory, u64::MAX - 7, 4));
        assert_eq!(Zone::parse(0, 1, 2), Err(Invalid));
    }

    #[test]
    fn removal_names_a_part() {
        let zone = Zone::parse(0x1000, 0x10, 1).unwrap();
        assert!(zone.is_removed_by(&zone));
        assert!(zone.is_removed_by(&Zone::parse(0x1004, 4, 1).unwrap()));
        assert!(!zone.is_removed_by(&Zone::parse(0x1000, 0x11, 1).unwrap()));
        assert!(!zone.is_removed_by(&Zone::parse(0x1000, 0x10, 0).unwrap()));
    }

    #[test]
    fn a_ring_keeps_one_place_free() {
        assert_eq!(next_place(0, 0, 4), Some((0, 1)));
        assert_eq!(next_place(0, 2, 4), Some((2, 3)));
        assert_eq!(next_place(0, 3, 4), None);
        assert_eq!(next_place(1, 3, 4), Some((3, 0)));
        assert_eq!(next_place(1, 0, 4), None);
    }

    #[test]
    fn a_spoilt_ring_takes_nothing_outside() {
        for first in [0, 3, 4, u32::MAX] {
            for last in [4, 5, u32::MAX] {
                assert_eq!(next_place(first, last, 4), None);
            }
            for last in 0..4 {
                if let Some((place, next)) = next_place(first, last, 4) {
                    assert!(place < 4 && next < 4);
                }
            }
        }
    }
}
