// SPDX-License-Identifier: GPL-2.0

//! Interrupt messages and the local APICs they are meant for (SDM vol. 3, 12.6.2 and 12.11).

use super::{Invalid, TriggerMode};
use crate::x86::vector::{ApicId, Vector};

/// What an interrupt message asks of its destination (SDM vol. 3, 12.6.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeliveryMode {
    /// The vector, at each destination.
    Fixed,
    /// The vector, at one of the destinations.
    LowestPriority,
    /// A system-management interrupt.
    Smi,
    /// Reserved in the architecture; KVM guests kick a halted vCPU with it (KVM_HC_KICK_CPU).
    RemoteRead,
    /// A non-maskable interrupt.
    Nmi,
    /// INIT.
    Init,
    /// Start-up, with the vector as the page where execution begins.
    Startup,
    /// An interrupt whose vector comes from the 8259.
    ExtInt,
}

impl DeliveryMode {
    /// The mode that the low three bits of `bits` encode.
    #[inline]
    pub const fn from_bits(bits: u8) -> Self {
        match bits & 7 {
            0 => Self::Fixed,
            1 => Self::LowestPriority,
            2 => Self::Smi,
            3 => Self::RemoteRead,
            4 => Self::Nmi,
            5 => Self::Init,
            6 => Self::Startup,
            _ => Self::ExtInt,
        }
    }

    /// Whether the vector goes into the IRR.
    #[inline]
    pub const fn is_vectored(self) -> bool {
        matches!(self, Self::Fixed | Self::LowestPriority)
    }
}

/// The ICR's shorthand for a destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shorthand {
    /// None: the destination field counts.
    None,
    /// The sender.
    Itself,
    /// All, the sender too.
    All,
    /// All but the sender.
    Others,
}

impl Shorthand {
    /// The shorthand that the low two bits of `bits` encode.
    #[inline]
    pub const fn from_bits(bits: u8) -> Self {
        match bits & 3 {
            0 => Self::None,
            1 => Self::Itself,
            2 => Self::All,
            _ => Self::Others,
        }
    }
}

/// An interrupt on its way to local APICs: an IPI, an IOAPIC's message or an MSI.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InterruptMessage {
    /// The destination field: 8 bits from an xAPIC, an IOAPIC or a plain MSI, else 32.
    pub destination: u32,
    /// Whether `destination` is a logical one.
    pub logical: bool,
    /// What is asked.
    pub delivery_mode: DeliveryMode,
    /// The vector.
    pub vector: Vector,
    /// Whether the level is asserted. De-assertion does nothing.
    pub level: bool,
    /// Edge or level, which goes to the TMR.
    pub trigger: TriggerMode,
    /// The destination's shorthand, [`Shorthand::None`] for all but IPIs.
    pub shorthand: Shorthand,
    /// An MSI's redirection hint: one of the destinations is to be chosen.
    pub redirection_hint: bool,
}

/// An IPI is an interrupt message that a local APIC sends.
pub type Ipi = InterruptMessage;

impl InterruptMessage {
    /// Decodes what a device writes to signal an interrupt (SDM vol. 3, 12.11). With `extended`
    /// bits 63:40 of the address are bits 31:8 of the destination, as KVM_X2APIC_API_USE_32BIT_IDS
    /// lays down; the bits 39:32 then must be 0.
    pub const fn from_msi(address: u64, data: u32, extended: bool) -> Result<Self, Invalid> {
        let mut destination = ((address >> 12) & 0xff) as u32;
        if extended {
            let high = super::high_half(address);
            if high & 0xff != 0 {
                return Err(Invalid);
            }
            destination |= high;
        }
        Ok(Self {
            destination,
            logical: address & 4 != 0,
            delivery_mode: DeliveryMode::from_bits(((data >> 8) & 7) as u8),
            vector: Vector((data & 0xff) as u8),
            level: true,
            trigger: TriggerMode::from_bit(data & 0x8000 != 0),
            shorthand: Shorthand::None,
            redirection_hint: address & 8 != 0,
        })
    }

    /// Decodes an interrupt command register (SDM vol. 3, 12.6.1). In x2APIC mode the destination
    /// is the whole upper half, else its topmost byte.
    pub const fn from_icr(icr: u64, x2apic: bool) -> Self {
        let low = super::low_half(icr);
        let high = super::high_half(icr);
        Self {
            destination: if x2apic { high } else { high >> 24 },
            logical: low & 0x800 != 0,
            delivery_mode: DeliveryMode::from_bits(((low >> 8) & 7) as u8),
            vector: Vector((low & 0xff) as u8),
            level: low & 0x4000 != 0,
            trigger: TriggerMode::from_bit(low & 0x8000 != 0),
            shorthand: Shorthand::from_bits(((low >> 18) & 3) as u8),
            redirection_hint: false,
        }
    }

    /// Whether a local APIC would act on this at all: de-assertions and the reserved uses of ExtINT
    /// are for none.
    #[inline]
    pub const fn has_effect(&self) -> bool {
        match self.delivery_mode {
            DeliveryMode::ExtInt => false,
            DeliveryMode::Fixed | DeliveryMode::LowestPriority | DeliveryMode::Init => {
                self.level || !self.trigger.is_level()
            }
            DeliveryMode::Smi
            | DeliveryMode::RemoteRead
            | DeliveryMode::Nmi
            | DeliveryMode::Startup => true,
        }
    }

    /// Whether one of the matching APICs is to be chosen, see [`lowest_priority`]. A physical
    /// broadcast goes to all, whatever it asks for.
    #[inline]
    pub const fn is_arbitrated(&self) -> bool {
        (matches!(self.delivery_mode, DeliveryMode::LowestPriority) || self.redirection_hint)
            && (self.logical || self.destination != XAPIC_BROADCAST)
    }
}

/// The destination that means all xAPICs.
pub const XAPIC_BROADCAST: u32 = 0xff;
/// The destination that means all x2APICs.
pub const X2APIC_BROADCAST: u32 = 0xffff_ffff;

/// A local APIC's mode (SDM vol. 3, 12.12.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ApicMode {
    /// Switched off by IA32_APIC_BASE: it takes no message.
    Disabled,
    /// Registers in memory, 8-bit identifiers.
    XApic,
    /// Registers as MSRs, 32-bit identifiers.
    X2Apic,
}

/// How an xAPIC compares logical destinations: the DFR's top four bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogicalModel {
    /// 1111b: eight APICs, one bit each.
    Flat,
    /// 0000b: clusters of four.
    Cluster,
    /// Reserved: no logical destination matches.
    Reserved,
}

/// What decides whether a message is for a local APIC. Small enough to be published to the threads
/// that send, see [`ApicIdentity::packed`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ApicIdentity {
    /// The identifier in x2APIC mode, which never changes.
    pub id: ApicId,
    /// The identifier in xAPIC mode, which the guest may change.
    pub xapic_id: u8,
    /// The logical identifier in xAPIC mode: the LDR's top byte.
    pub logical_id: u8,
    /// The model of the logical identifier in xAPIC mode.
    pub model: LogicalModel,
    /// The mode.
    pub mode: ApicMode,
    /// Whether the spurious-interrupt vector register enables the APIC. While it does not, the APIC
    /// still takes INIT, NMI, SMI and start-up (SDM vol. 3, 12.4.7.2).
    pub software_enabled: bool,
    /// The 8259's interrupts are for this processor: through LINT0, or past an APIC that is off.
    pub takes_pic: bool,
    /// LINT0 gives an NMI for each tick of the interval timer.
    pub is_watchdog: bool,
}

impl ApicIdentity {
    /// All but the identifier, in a word that can be published by one atomic store.
    #[inline]
    pub const fn packed(&self) -> u32 {
        let model = match self.model {
            LogicalModel::Flat => 0,
            LogicalModel::Cluster => 1 << 16,
            LogicalModel::Reserved => 2 << 16,
        };
        let mode = match self.mode {
            ApicMode::Disabled => 0,
            ApicMode::XApic => 1 << 18,
            ApicMode::X2Apic => 2 << 18,
        };
        self.xapic_id as u32
            | ((self.logical_id as u32) << 8)
            | model
            | mode
            | ((self.software_enabled as u32) << 20)
            | ((self.takes_pic as u32) << 21)
            | ((self.is_watchdog as u32) << 22)
    }

    /// The identity of the APIC `id` that published `packed`.
    #[inline]
    pub const fn from_packed(id: ApicId, packed: u32) -> Self {
        Self {
            id,
            xapic_id: (packed & 0xff) as u8,
            logical_id: ((packed >> 8) & 0xff) as u8,
            model: match (packed >> 16) & 3 {
                0 => LogicalModel::Flat,
                1 => LogicalModel::Cluster,
                _ => LogicalModel::Reserved,
            },
            mode: match (packed >> 18) & 3 {
                0 => ApicMode::Disabled,
                1 => ApicMode::XApic,
                _ => ApicMode::X2Apic,
            },
            software_enabled: packed & (1 << 20) != 0,
            takes_pic: packed & (1 << 21) != 0,
            is_watchdog: packed & (1 << 22) != 0,
        }
    }

    /// Whether this APIC takes messages of that kind, wherever they are addressed to.
    #[inline]
    pub const fn accepts(&self, message: &InterruptMessage) -> bool {
        message.has_effect()
            && !matches!(self.mode, ApicMode::Disabled)
            && (self.software_enabled || !message.delivery_mode.is_vectored())
    }

    fn is_addressed(&self, message: &InterruptMessage, source: Source) -> bool {
        let x2apic = matches!(self.mode, ApicMode::X2Apic);
        let mut destination = message.destination;
        // An IOAPIC or a plain MSI has 8 bits for a destination, and can say "all" only so.
        if x2apic && destination == XAPIC_BROADCAST && source == Source::Device {
            destination = X2APIC_BROADCAST;
        }
        let broadcast = if x2apic {
            X2APIC_BROADCAST
        } else {
            XAPIC_BROADCAST
        };
        if destination == broadcast {
            return true;
        }
        match (message.logical, x2apic) {
            (false, true) => destination == self.id.0,
            // An APIC whose identifier does not fit into 8 bits can be reached before it enters
            // x2APIC mode only so.
            (false, false) if destination > 0xff => destination == self.id.0,
            (false, false) => destination == u32::from(self.xapic_id),
            (true, true) => {
                let logical = x2apic_logical_id(self.id);
                logical >> 16 == destination >> 16 && logical & destination & 0xffff != 0
            }
            (true, false) => {
                let logical = u32::from(self.logical_id);
                match self.model {
                    LogicalModel::Flat => logical & destination != 0,
                    LogicalModel::Cluster => {
                        logical >> 4 == destination >> 4 && logical & destination & 0xf != 0
                    }
                    LogicalModel::Reserved => false,
                }
            }
        }
    }
}

/// The logical identifier of an x2APIC: the cluster in the upper half, one bit of 16 in the lower
/// (SDM vol. 3, 12.12.10.2).
#[inline]
pub const fn x2apic_logical_id(id: ApicId) -> u32 {
    ((id.0 >> 4) << 16) | 1u32.wrapping_shl(id.0 & 0xf)
}

/// Who sends a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// The local APIC with this identifier.
    Apic(ApicId),
    /// A device or an IOAPIC. The destination 0xff means all, in x2APIC mode too, as in KVM before
    /// KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK.
    Device,
    /// A device or an IOAPIC, 0xff being as good an identifier as any to x2APICs.
    DeviceWithoutQuirk,
}

/// Whether the local APIC `identity` takes `message` from `source`. Where the message
/// [is arbitrated](InterruptMessage::is_arbitrated), one of those that do is to be chosen.
#[inline]
pub fn matches(identity: &ApicIdentity, message: &InterruptMessage, source: Source) -> bool {
    identity.accepts(message)
        && match message.shorthand {
            Shorthand::None => identity.is_addressed(message, source),
            Shorthand::Itself => source == Source::Apic(identity.id),
            Shorthand::All => true,
            Shorthand::Others => source != Source::Apic(identity.id),
        }
}

/// Chooses one of `candidates`, the APICs that match a message of lowest priority. With a `turn`
/// that counts up the choice goes round; with the vector as the `turn` each vector stays with its
/// own APIC, which is what KVM does and is kinder to caches.
#[inline]
pub fn lowest_priority<I: Iterator + Clone>(mut candidates: I, turn: usize) -> Option<I::Item> {
    let count = candidates.clone().count();
    candidates.nth(turn.checked_rem(count)?)
}

#[cfg(test)]
mod tests;
