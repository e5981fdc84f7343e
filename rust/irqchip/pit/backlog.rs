// SPDX-License-Identifier: GPL-2.0

//! The interval timer's interrupts that nobody has taken yet.
//!
//! A system that counts the timer's interrupts loses time where several of them become one because its
//! vCPU did not run. So those that come before the last one has ended are kept, and given one by one as
//! the system ends them (KVM_REINJECT_CONTROL).

/// What is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Backlog {
    kept: bool,
    /// Interrupts that have not ended, the one that has been given included.
    waiting: u32,
    /// The last one that was given has ended.
    ended: bool,
}

impl Backlog {
    pub(super) const fn new(kept: bool) -> Self {
        Self {
            kept,
            waiting: 0,
            ended: true,
        }
    }

    /// Forgets what waits.
    pub(super) fn reset(&mut self) {
        *self = Self::new(self.kept);
    }

    pub(super) const fn is_kept(&self) -> bool {
        self.kept
    }

    /// Takes new interrupts. Gives whether the line is to be pulsed.
    pub(super) fn add(&mut self, interrupts: u64) -> bool {
        if !self.kept {
            return interrupts > 0;
        }
        let interrupts = u32::try_from(interrupts).unwrap_or(u32::MAX);
        self.waiting = self.waiting.saturating_add(interrupts);
        self.give()
    }

    /// One has ended. Gives whether the line is to be pulsed for the next.
    pub(super) fn end(&mut self) -> bool {
        if !self.kept {
            return false;
        }
        self.ended = true;
        self.waiting = self.waiting.saturating_sub(1);
        self.give()
    }

    fn give(&mut self) -> bool {
        let gives = self.ended && self.waiting > 0;
        if gives {
            self.ended = false;
        }
        gives
    }
}
