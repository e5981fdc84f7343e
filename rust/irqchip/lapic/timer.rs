// SPDX-License-Identifier: GPL-2.0

//! A local APIC's timer (SDM vol. 3, 12.5.4).

use super::BusCycle;
use crate::irqchip::{Nanoseconds, Now};

/// The shortest period, in nanoseconds: a guest that asks for a shorter one gets this, so that it
/// can't keep the host busy with timer interrupts. KVM's min_timer_period_us is the same.
const MIN_PERIOD: u64 = 200_000;

/// When a timer fires.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Deadline {
    /// At a moment of the monotonic clock.
    At(Nanoseconds),
    /// When the guest's TSC has reached this value.
    Tsc(u64),
}

/// The timer's mode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mode {
    OneShot,
    Periodic,
    TscDeadline,
    /// The reserved encoding: the timer does not run.
    Reserved,
}

impl Mode {
    pub(super) const fn from_bits(bits: u8) -> Self {
        match bits & 3 {
            0 => Self::OneShot,
            1 => Self::Periodic,
            2 => Self::TscDeadline,
            _ => Self::Reserved,
        }
    }
}

/// The timer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Timer {
    cycle: BusCycle,
    mode: Mode,
    /// The initial-count register.
    initial: u32,
    /// The divide-configuration register: bits 0, 1 and 3.
    divide: u8,
    /// Nanoseconds from the initial count to 0; 0 where the timer never was started.
    period: u64,
    /// When the count reaches 0, while the timer runs in the first two modes.
    target: Option<Nanoseconds>,
    /// What IA32_TSC_DEADLINE holds; 0 is disarmed.
    tsc_deadline: u64,
}

impl Timer {
    pub(super) const fn new(cycle: BusCycle) -> Self {
        Self {
            cycle,
            mode: Mode::OneShot,
            initial: 0,
            divide: 0,
            period: 0,
            target: None,
            tsc_deadline: 0,
        }
    }

    pub(super) fn reset(&mut self) {
        *self = Self::new(self.cycle);
    }

    /// The initial-count register.
    pub(super) const fn initial(&self) -> u32 {
        self.initial
    }

    /// The divide-configuration register.
    pub(super) const fn divide(&self) -> u8 {
        self.divide
    }

    /// The power of two that the bus clock is divided by: 000b is 2, 110b is 128, 111b is 1.
    const fn shift(&self) -> u32 {
        let encoded = (self.divide & 3) | ((self.divide & 8) >> 1);
        (encoded.wrapping_add(1) & 7) as u32
    }

    /// At most 2^32 counts of 2^7 cycles, which [`BusCycle::new`] lets fit.
    const fn counts_to_nanoseconds(&self, counts: u32) -> u64 {
        (counts as u64)
            .wrapping_shl(self.shift())
            .wrapping_mul(self.cycle.nanoseconds())
    }

    fn set_period(&mut self) {
        self.period = self.counts_to_nanoseconds(self.initial);
        self.limit_period();
    }

    fn limit_period(&mut self) {
        if self.mode == Mode::Periodic && self.period != 0 {
            self.period = self.period.max(MIN_PERIOD);
        }
    }

    #[inline]
    pub(super) const fn deadline(&self) -> Option<Deadline> {
        match (self.mode, self.target) {
            (Mode::OneShot | Mode::Periodic, Some(target)) => Some(Deadline::At(target)),
            (Mode::TscDeadline, _) if self.tsc_deadline != 0 => {
                Some(Deadline::Tsc(self.tsc_deadline))
            }
            _ => None,
        }
    }

    /// If the timer's moment has come, disarms it or sets the next one, and gives true.
    pub(super) fn fire(&mut self, now: Now) -> bool {
        match self.deadline() {
            Some(Deadline::Tsc(deadline)) if deadline <= now.tsc => {
                self.tsc_deadline = 0;
                true
            }
            Some(Deadline::At(target)) if target <= now.nanoseconds => {
                self.target = if self.mode == Mode::Periodic {
                    Some(self.next_after(target, now.nanoseconds))
                } else {
                    None
                };
                true
            }
            _ => false,
        }
    }

    /// The first of `target`, `target + period`, and so on that lies after `now`.
    fn next_after(&self, target: Nanoseconds, now: Nanoseconds) -> Nanoseconds {
        let into_period = now.since(target).checked_rem(self.period).unwrap_or(0);
        now.after(self.period.saturating_sub(into_period))
    }

    /// Sets the mode from the LVT. Going to or from TSC-deadline mode disarms the timer. Gives
    /// whether the deadline may have changed.
    pub(super) fn set_mode(&mut self, mode: Mode) -> bool {
        if mode == self.mode {
            return false;
        }
        if (mode == Mode::TscDeadline) != (self.mode == Mode::TscDeadline) {
            *self = Self {
                divide: self.divide,
                ..Self::new(self.cycle)
            };
        }
        self.mode = mode;
        self.limit_period();
        true
    }

    /// Writes the initial count, which starts the timer; 0 stops it. Gives whether the write counts.
    pub(super) fn set_initial(&mut self, initial: u32, now: Now) -> bool {
        if self.mode == Mode::TscDeadline {
            return false;
        }
        self.initial = initial;
        self.set_period();
        self.target = (self.period != 0).then(|| now.nanoseconds.after(self.period));
        true
    }

    /// Restores the counts. `current` is where the timer stood; a periodic one that stood at 0
    /// begins anew, a one-shot one has fired.
    pub(super) fn restore(&mut self, mode: Mode, divide: u8, initial: u32, current: u32, now: Now) {
        let tsc_deadline = if mode == Mode::TscDeadline && self.mode == Mode::TscDeadline {
            self.tsc_deadline
        } else {
            0
        };
        *self = Self {
            cycle: self.cycle,
            mode,
            initial,
            divide: divide & 0xb,
            period: 0,
            target: None,
            tsc_deadline,
        };
        if mode == Mode::TscDeadline {
            return;
        }
        self.set_period();
        let left = match self.counts_to_nanoseconds(current) {
            0 if mode == Mode::Periodic => self.period,
            left => left.min(self.period),
        };
        self.target = (left != 0).then(|| now.nanoseconds.after(left));
    }

    /// Writes the divide configuration. What is left of a running count is counted at the new rate.
    /// Gives whether the deadline may have changed.
    pub(super) fn set_divide(&mut self, divide: u8, now: Now) -> bool {
        let before = self.shift();
        self.divide = divide & 0xb;
        let after = self.shift();
        if before == after || self.period == 0 {
            return false;
        }
        self.set_period();
        if let Some(target) = self.target {
            // What is left is at most a count at the old rate, which fits at the new one too.
            let left = target.since(now.nanoseconds).wrapping_shr(before);
            self.target = Some(now.nanoseconds.after(left.wrapping_shl(after)));
        }
        true
    }

    /// The current-count register.
    pub(super) fn current(&self, now: Now) -> u32 {
        let Some(target) = self.target else {
            return 0;
        };
        let left = if self.mode == Mode::Periodic && target <= now.nanoseconds {
            self.next_after(target, now.nanoseconds)
                .since(now.nanoseconds)
        } else {
            target.since(now.nanoseconds)
        };
        let counts = left
            .wrapping_shr(self.shift())
            .checked_div(self.cycle.nanoseconds());
        counts.map_or(0, |counts| u32::try_from(counts).unwrap_or(u32::MAX))
    }

    #[inline]
    pub(super) const fn tsc_deadline(&self) -> u64 {
        match self.mode {
            Mode::TscDeadline => self.tsc_deadline,
            _ => 0,
        }
    }

    /// Gives whether the write counts: only in TSC-deadline mode.
    #[inline]
    pub(super) fn set_tsc_deadline(&mut self, tsc: u64) -> bool {
        if self.mode != Mode::TscDeadline {
            return false;
        }
        self.tsc_deadline = tsc;
        true
    }
}
