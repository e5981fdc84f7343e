// SPDX-License-Identifier: GPL-2.0

//! The local vector table: what an APIC does with its CPU's own interrupts (SDM vol. 3, 12.5.1).

use super::{ApicMode, Features, LocalApic};
use crate::irqchip::destination::DeliveryMode;
use crate::irqchip::TriggerMode;
use crate::x86::vector::Vector;

/// The mask bit of an entry.
pub(super) const MASKED: u32 = 1 << 16;
/// The delivery status, read-only: nothing here is ever between two states.
const DELIVERY_STATUS: u32 = 1 << 12;
/// LINT0 and LINT1: the level-triggered interrupt waits for its EOI, read-only.
const REMOTE_IRR: u32 = 1 << 14;
const VECTOR: u32 = 0xff;
const DELIVERY_MODE: u32 = 7 << 8;
const LEVEL_TRIGGERED: u32 = 1 << 15;
const ACTIVE_LOW: u32 = 1 << 13;
const TIMER_PERIODIC: u32 = 1 << 17;
const TIMER_TSC_DEADLINE: u32 = 1 << 18;

/// The interrupts that a CPU raises at its own local APIC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LocalInput {
    /// The APIC's timer.
    Timer,
    /// The thermal monitor.
    Thermal,
    /// The performance counters.
    Performance,
    /// The pin LINT0, to which a PC's 8259 is wired.
    Lint0,
    /// The pin LINT1, to which a PC's NMI is wired.
    Lint1,
    /// Corrected machine checks.
    CorrectedMachineCheck,
}

impl LocalInput {
    const fn entry(self) -> Entry {
        match self {
            Self::Timer => Entry::Timer,
            Self::Thermal => Entry::Thermal,
            Self::Performance => Entry::Performance,
            Self::Lint0 => Entry::Lint0,
            Self::Lint1 => Entry::Lint1,
            Self::CorrectedMachineCheck => Entry::CorrectedMachineCheck,
        }
    }
}

/// What a local interrupt turned into.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum LocalDelivery {
    /// Nothing: it is masked, its APIC is off, or its entry asks for nothing.
    None,
    /// Its vector is in the IRR.
    Pending,
    /// An NMI is to be raised on this vCPU.
    Nmi,
    /// An SMI is to be raised on this vCPU.
    Smi,
    /// This vCPU is to be given an INIT.
    Init,
    /// An interrupt of the 8259 is to be acknowledged there.
    ExtInt,
}

/// The table's entries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Entry {
    Timer,
    Thermal,
    Performance,
    Lint0,
    Lint1,
    Error,
    CorrectedMachineCheck,
}

impl Entry {
    pub(super) const ALL: [Self; 7] = [
        Self::Timer,
        Self::Thermal,
        Self::Performance,
        Self::Lint0,
        Self::Lint1,
        Self::Error,
        Self::CorrectedMachineCheck,
    ];

    /// The entry whose register is at `offset`, among those that an APIC with `features` has.
    pub(super) const fn at(offset: u16, features: &Features) -> Option<Self> {
        match offset {
            0x2f0 if features.cmci => Some(Self::CorrectedMachineCheck),
            0x320 => Some(Self::Timer),
            0x330 => Some(Self::Thermal),
            0x340 => Some(Self::Performance),
            0x350 => Some(Self::Lint0),
            0x360 => Some(Self::Lint1),
            0x370 => Some(Self::Error),
            _ => None,
        }
    }

    /// The offset of the entry's register.
    pub(super) const fn offset(self) -> u16 {
        match self {
            Self::CorrectedMachineCheck => 0x2f0,
            Self::Timer => 0x320,
            Self::Thermal => 0x330,
            Self::Performance => 0x340,
            Self::Lint0 => 0x350,
            Self::Lint1 => 0x360,
            Self::Error => 0x370,
        }
    }

    /// The bits that software may set.
    pub(super) const fn writable(self, features: &Features) -> u32 {
        match self {
            Self::Timer if features.tsc_deadline => {
                VECTOR | MASKED | TIMER_PERIODIC | TIMER_TSC_DEADLINE
            }
            Self::Timer => VECTOR | MASKED | TIMER_PERIODIC,
            Self::Thermal | Self::Performance | Self::CorrectedMachineCheck => {
                VECTOR | DELIVERY_MODE | MASKED
            }
            Self::Lint0 | Self::Lint1 => {
                VECTOR | DELIVERY_MODE | MASKED | ACTIVE_LOW | LEVEL_TRIGGERED
            }
            Self::Error => VECTOR | MASKED,
        }
    }

    /// The bits that are neither writable nor read-only: an x2APIC does not take them.
    pub(super) const fn reserved(self, features: &Features) -> u32 {
        let read_only = match self {
            Self::Lint0 | Self::Lint1 => DELIVERY_STATUS | REMOTE_IRR,
            _ => DELIVERY_STATUS,
        };
        !(self.writable(features) | read_only)
    }
}

/// The table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Lvt([u32; 7]);

impl Lvt {
    /// After a reset all entries are masked.
    pub(super) const RESET: Self = Self([MASKED; 7]);

    #[inline]
    pub(super) fn get(&self, entry: Entry) -> u32 {
        self.0.get(entry as usize).copied().unwrap_or(MASKED)
    }

    #[inline]
    pub(super) fn set(&mut self, entry: Entry, value: u32) {
        if let Some(slot) = self.0.get_mut(entry as usize) {
            *slot = value;
        }
    }

    /// Masks all entries, as happens when software disables the APIC.
    pub(super) fn mask_all(&mut self) {
        for entry in &mut self.0 {
            *entry |= MASKED;
        }
    }

    /// Sets LINT0 up for the 8259.
    pub(super) fn set_virtual_wire(&mut self) {
        self.set(Entry::Lint0, DELIVERY_MODE);
    }
}

/// The delivery mode of an entry.
fn delivery_mode(entry: u32) -> DeliveryMode {
    DeliveryMode::from_bits(((entry >> 8) & 7) as u8)
}

/// The timer's mode in its entry: 0 one-shot, 1 periodic, 2 TSC-deadline, 3 reserved.
pub(super) const fn timer_mode_bits(entry: u32) -> u8 {
    ((entry >> 17) & 3) as u8
}

impl LocalApic {
    /// Raises a local interrupt and gives what its entry makes of it.
    pub fn local_interrupt(&mut self, input: LocalInput) -> LocalDelivery {
        let entry = self.lvt.get(input.entry());
        if self.mode() == ApicMode::Disabled || entry & MASKED != 0 {
            return LocalDelivery::None;
        }
        let delivery = match delivery_mode(entry) {
            DeliveryMode::Fixed => {
                let trigger = TriggerMode::from_bit(entry & LEVEL_TRIGGERED != 0);
                if self.set_irr(Vector((entry & VECTOR) as u8), trigger) {
                    LocalDelivery::Pending
                } else {
                    LocalDelivery::None
                }
            }
            DeliveryMode::Nmi => LocalDelivery::Nmi,
            DeliveryMode::Smi => LocalDelivery::Smi,
            DeliveryMode::Init => LocalDelivery::Init,
            DeliveryMode::ExtInt => LocalDelivery::ExtInt,
            DeliveryMode::LowestPriority | DeliveryMode::RemoteRead | DeliveryMode::Startup => {
                LocalDelivery::None
            }
        };
        // The counters' entry masks itself, so that a handler sees one interrupt per overflow
        // (SDM vol. 3, 12.5.1).
        if input == LocalInput::Performance && delivery != LocalDelivery::None {
            self.lvt.set(Entry::Performance, entry | MASKED);
        }
        delivery
    }

    /// Whether this vCPU takes the 8259's interrupts: LINT0 is set up for them, or the APIC is off
    /// and the CPU's INTR pin is its own (SDM vol. 3, 12.4.3).
    #[inline]
    pub fn accepts_pic_interrupt(&self) -> bool {
        if self.mode() == ApicMode::Disabled {
            return true;
        }
        let entry = self.lvt.get(Entry::Lint0);
        entry & MASKED == 0 && delivery_mode(entry) == DeliveryMode::ExtInt
    }

    /// Whether LINT0 gives an NMI: then each tick of the interval timer is one, which is how the
    /// NMI watchdog of old systems works.
    #[inline]
    pub fn lint0_is_nmi(&self) -> bool {
        self.gives_nmi(Entry::Lint0)
    }

    /// Whether LINT1 gives an NMI.
    #[inline]
    pub fn lint1_is_nmi(&self) -> bool {
        self.gives_nmi(Entry::Lint1)
    }

    fn gives_nmi(&self, entry: Entry) -> bool {
        let entry = self.lvt.get(entry);
        self.mode() != ApicMode::Disabled
            && entry & MASKED == 0
            && delivery_mode(entry) == DeliveryMode::Nmi
    }
}
