// SPDX-License-Identifier: GPL-2.0

//! The interrupt controllers and the interval timer of a PC, as state machines.
//!
//! Each is a fixed-size value with methods that take an event and, where time matters, the present
//! moment, and return what has to happen outside: a message to be delivered, a timer to be set. No
//! method reads a clock but the one it is given, takes a lock or calls back into the machine, so the owner decides who may
//! touch what and when.

pub mod destination;
pub mod ioapic;
pub mod lapic;
pub mod mailbox;
pub mod pic;
pub mod pit;
pub mod routing;
pub mod vector_set;

/// A moment on a clock that never runs backwards, in nanoseconds since an arbitrary origin.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
#[repr(transparent)]
pub struct Nanoseconds(pub u64);

impl Nanoseconds {
    /// The time from `earlier` until this moment, in nanoseconds; 0 where `earlier` lies later.
    #[inline]
    pub const fn since(self, earlier: Self) -> u64 {
        self.0.saturating_sub(earlier.0)
    }

    /// The moment `nanoseconds` later; the last representable one where that is beyond the range.
    #[inline]
    pub const fn after(self, nanoseconds: u64) -> Self {
        Self(self.0.saturating_add(nanoseconds))
    }
}

/// The present moment, on both clocks that a local APIC's timer knows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Now {
    /// The monotonic clock, for the one-shot and periodic modes.
    pub nanoseconds: Nanoseconds,
    /// The guest's time-stamp counter, for the TSC-deadline mode.
    pub tsc: u64,
}

/// What tells the present moment. It is asked only where the moment matters, since reading the host's
/// clocks takes longer than most accesses of a register.
pub trait Clock {
    /// The present moment.
    fn now(&self) -> Now;
}

impl Clock for Now {
    #[inline]
    fn now(&self) -> Now {
        *self
    }
}

/// How an interrupt is recognised: by its rising edge, or while it is held (SDM vol. 3, 12.6.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TriggerMode {
    /// A change to the active level requests one interrupt.
    Edge,
    /// The active level requests interrupts until it ends.
    Level,
}

impl TriggerMode {
    /// The mode that a trigger-mode bit stands for: set is level.
    #[inline]
    pub const fn from_bit(level: bool) -> Self {
        if level {
            Self::Level
        } else {
            Self::Edge
        }
    }

    /// Whether this is [`TriggerMode::Level`].
    #[inline]
    pub const fn is_level(self) -> bool {
        matches!(self, Self::Level)
    }
}

/// A value that the hardware does not take: #GP for a guest, EINVAL for an ioctl.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Invalid;

/// One of the drivers of an interrupt line, 0 to 31. A line is active while any of them holds it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LineSource(u8);

impl LineSource {
    /// What userspace drives with KVM_IRQ_LINE and by irqfd.
    pub const USERSPACE: Self = Self(0);
    /// What userspace drives by an irqfd with a resampler, which the module lowers at the EOI.
    pub const RESAMPLER: Self = Self(1);
    /// The interval timer.
    pub const PIT: Self = Self(2);

    /// The source with the number `number`, if there is one.
    #[inline]
    pub const fn new(number: u8) -> Option<Self> {
        if number < 32 {
            Some(Self(number))
        } else {
            None
        }
    }

    /// The bit that stands for this source among a line's drivers.
    #[inline]
    const fn bit(self) -> u32 {
        1u32.wrapping_shl(self.0 as u32)
    }
}

/// What came of driving an interrupt line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LineOutcome {
    /// The line is masked, or there is none of that number.
    Ignored,
    /// An earlier request of this line still waits, and this one is one with it.
    Coalesced,
    /// The controller took the change, and nothing is to be sent.
    Taken,
    /// This message is to be delivered to the local APICs.
    Send(destination::InterruptMessage),
}

impl LineOutcome {
    /// The message to be delivered, if there is one.
    #[inline]
    pub const fn message(self) -> Option<destination::InterruptMessage> {
        match self {
            Self::Send(message) => Some(message),
            Self::Ignored | Self::Coalesced | Self::Taken => None,
        }
    }
}

/// The low half of a 64-bit register.
#[inline]
const fn low_half(value: u64) -> u32 {
    (value & 0xffff_ffff) as u32
}

/// The high half of a 64-bit register.
#[inline]
const fn high_half(value: u64) -> u32 {
    (value >> 32) as u32
}
