// SPDX-License-Identifier: GPL-2.0

//! The machine's clock, as KVM_GET_CLOCK and KVM_SET_CLOCK know it: nanoseconds since its start. No guest
//! reads it, since no paravirtual clock is offered.

use crate::{
    bindings as uapi,
    host::{
        cpu,
        irq::IrqsOff,
        timer::{self, boot_time, real_time},
    },
};
use core::sync::atomic::{AtomicU64, Ordering};
use kernel::prelude::*;

/// The flags of `struct kvm_clock_data`, which KVM_CAP_ADJUST_CLOCK answers.
pub(crate) const VALID_FLAGS: u32 =
    uapi::KVM_CLOCK_TSC_STABLE | uapi::KVM_CLOCK_REALTIME | uapi::KVM_CLOCK_HOST_TSC;

/// What the clock is ahead of the host's, modulo 2^64.
pub(crate) struct Clock(AtomicU64);

impl Clock {
    /// A clock that starts now.
    pub(crate) fn new() -> Self {
        Self(AtomicU64::new(boot_time().wrapping_neg()))
    }

    /// Carries out KVM_GET_CLOCK.
    pub(crate) fn get(&self) -> uapi::kvm_clock_data {
        // One moment for all of them.
        let _irqs = IrqsOff::new();
        let mut data = uapi::kvm_clock_data {
            clock: boot_time().wrapping_add(self.0.load(Ordering::Relaxed)),
            ..Default::default()
        };
        if timer::is_tsc_stable() {
            data.flags = VALID_FLAGS;
            data.realtime = real_time();
            data.host_tsc = cpu::rdtsc();
        }
        data
    }

    /// Carries out KVM_SET_CLOCK.
    ///
    /// # Errors
    ///
    /// `EINVAL` for unknown flags.
    pub(crate) fn set(&self, data: &uapi::kvm_clock_data) -> Result {
        if data.flags & !VALID_FLAGS != 0 {
            return Err(EINVAL);
        }
        let mut clock = data.clock;
        if data.flags & uapi::KVM_CLOCK_REALTIME != 0 {
            // The time since it was read counts, but the clock never steps back.
            clock = clock.wrapping_add(real_time().saturating_sub(data.realtime));
        }
        self.0
            .store(clock.wrapping_sub(boot_time()), Ordering::Relaxed);
        Ok(())
    }
}
