// SPDX-License-Identifier: GPL-2.0

//! A one-shot timer on the host's monotonic clock.

use crate::bindings;
use kernel::{bindings as kb, prelude::*, types::Opaque};
use pin_init::PinInit;

/// What runs in hard interrupt context when a timer is due.
pub(crate) trait Expire: Sync {
    /// Called with interrupts off; must not sleep.
    fn expire(&self);
}

/// A timer that calls [`Expire::expire`] on `T`, which owns it or outlives it.
#[pin_data(PinnedDrop)]
pub(crate) struct Timer<T: Expire> {
    #[pin]
    timer: Opaque<kb::hrtimer>,
    target: *const T,
}

// SAFETY: The kernel's timer has its own lock, and `target` is Sync.
unsafe impl<T: Expire> Send for Timer<T> {}
// SAFETY: As above.
unsafe impl<T: Expire> Sync for Timer<T> {}

impl<T: Expire> Timer<T> {
    const TIMER_OFFSET: usize = core::mem::offset_of!(Self, timer);

    /// A stopped timer.
    ///
    /// # Safety
    ///
    /// `target` must be valid until the timer is dropped.
    pub(crate) unsafe fn new(target: *const T) -> impl PinInit<Self> {
        pin_init!(Self {
            timer <- Opaque::ffi_init(|slot: *mut kb::hrtimer| {
                // SAFETY: `slot` is memory for the timer.
                unsafe {
                    kb::hrtimer_setup(
                        slot,
                        Some(Self::callback),
                        kb::CLOCK_MONOTONIC as i32,
                        kb::hrtimer_mode_HRTIMER_MODE_ABS,
                    )
                }
            }),
            target,
        })
    }

    /// # Safety
    ///
    /// Called by the kernel with a timer that [`Self::new`] set up.
    unsafe extern "C" fn callback(timer: *mut kb::hrtimer) -> kb::hrtimer_restart {
        // SAFETY: The kernel calls this with the timer that `new` set up, the `timer` field of a
        // `Self`. `target` is valid until the timer is cancelled, which drop does and waits for.
        let target = unsafe {
            let this = timer.byte_sub(Self::TIMER_OFFSET).cast::<Self>();
            &*(*this).target
        };
        target.expire();
        kb::hrtimer_restart::HRTIMER_NORESTART
    }

    /// Starts the timer, or moves it, to fire at `deadline` nanoseconds of the monotonic clock.
    pub(crate) fn start(&self, deadline: u64) {
        let deadline = i64::try_from(deadline).unwrap_or(i64::MAX);
        // SAFETY: The timer was set up.
        unsafe {
            kb::hrtimer_start_range_ns(
                self.timer.get(),
                deadline,
                0,
                kb::hrtimer_mode_HRTIMER_MODE_ABS,
            )
        };
    }

    /// Stops the timer and waits for a callback that is under way on another CPU.
    pub(crate) fn cancel(&self) {
        // SAFETY: The timer was set up; this is not its callback.
        unsafe { kb::hrtimer_cancel(self.timer.get()) };
    }
}

#[pinned_drop]
impl<T: Expire> PinnedDrop for Timer<T> {
    fn drop(self: Pin<&mut Self>) {
        self.cancel();
    }
}

/// The monotonic clock, in nanoseconds.
#[inline]
pub(crate) fn monotonic() -> u64 {
    // SAFETY: May be called in any context but NMI.
    unsafe { kb::ktime_get() as u64 }
}

/// The time since boot, suspension included, in nanoseconds.
pub(crate) fn boot_time() -> u64 {
    // SAFETY: As for `monotonic`.
    unsafe { kb::ktime_get_with_offset(kb::tk_offsets_TK_OFFS_BOOT) as u64 }
}

/// The time since 1970, in nanoseconds.
pub(crate) fn real_time() -> u64 {
    // SAFETY: As for `monotonic`.
    unsafe { kb::ktime_get_with_offset(kb::tk_offsets_TK_OFFS_REAL) as u64 }
}

/// Whether all CPUs' TSCs tell the same time.
pub(crate) fn is_tsc_stable() -> bool {
    // SAFETY: Reads a flag of the kernel's.
    unsafe { bindings::check_tsc_unstable() == 0 }
}
