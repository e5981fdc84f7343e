// SPDX-License-Identifier: GPL-2.0

//! A callback when the thread that runs a vCPU is about to leave its CPU.

use core::cell::UnsafeCell;
use kernel::{bindings as kb, types::Opaque};

/// What is done before another thread runs on this CPU.
pub(crate) trait SwitchOut {
    /// Called on the thread's own CPU with interrupts off and the run queue locked: no sleep, no lock,
    /// no log.
    fn switch_out(&mut self);
}

/// The callback for `T`, together with `T` itself, which both the thread and the callback use: never
/// at once, since the callback runs on the thread's own CPU while the thread does not.
///
/// While the thread holds `&mut` to this or to what it is part of, the callback makes a reference of its
/// own to `value`. Neither may be told to the compiler as the only way there: the type is not `Unpin`, by
/// its `Opaque`s, so that `&mut` to it promises nothing of the kind ([`assert_not_unpin`]).
///
/// # Invariants
///
/// `value` is reached only by the owning thread with interrupts off, or with the notifier not
/// registered, or by the callback.
#[repr(C)]
pub(crate) struct Preemptible<T: SwitchOut> {
    notifier: Opaque<kb::preempt_notifier>,
    ops: Opaque<kb::preempt_ops>,
    value: UnsafeCell<T>,
}

// SAFETY: The notifier is registered only while `Armed` lives, which borrows it on one thread.
unsafe impl<T: SwitchOut + Send> Send for Preemptible<T> {}

impl<T: SwitchOut> Preemptible<T> {
    /// Wraps `value`.
    pub(crate) fn new(value: T) -> Self {
        Self {
            notifier: Opaque::new(kb::preempt_notifier::default()),
            ops: Opaque::new(kb::preempt_ops {
                sched_in: Some(Self::sched_in),
                sched_out: Some(Self::sched_out),
            }),
            value: UnsafeCell::new(value),
        }
    }

    /// # Safety
    ///
    /// Called by the scheduler.
    unsafe extern "C" fn sched_in(_notifier: *mut kb::preempt_notifier, _cpu: i32) {}

    /// # Safety
    ///
    /// Called by the scheduler with a notifier that [`Self::arm`] registered.
    unsafe extern "C" fn sched_out(
        notifier: *mut kb::preempt_notifier,
        _next: *mut kb::task_struct,
    ) {
        // SAFETY: `arm` made `notifier` of a pointer to the whole `Self`, whose first field it is. Its
        // thread is being switched out, so that nothing else uses the value.
        let value = unsafe { &mut *(*notifier.cast::<Self>()).value.get() };
        value.switch_out();
    }

    /// Registers the callback for the current thread, after `prepare` has had the value.
    ///
    /// # Safety
    ///
    /// `self` must not move, and [`Self::disarm`] must be called on the same thread.
    pub(crate) unsafe fn arm(&mut self, prepare: impl FnOnce(&mut T)) {
        prepare(self.value.get_mut());
        // The callback finds all of `self` by this pointer, so it must be one to all of it.
        let this: *mut Self = self;
        let notifier: *mut kb::preempt_notifier = this.cast();
        // SAFETY: Both are ours and not registered: `disarm` has been called for each `arm`.
        unsafe {
            *notifier = kb::preempt_notifier::default();
            (*notifier).ops = (*this).ops.get();
            kb::preempt_notifier_register(notifier);
        }
    }

    /// Unregisters it; the thread has called [`Self::arm`].
    ///
    /// # Safety
    ///
    /// The callback is registered, by this thread.
    pub(crate) unsafe fn disarm(&mut self) {
        // SAFETY: By the caller's promise.
        unsafe { kb::preempt_notifier_unregister(self.notifier.get()) };
    }

    /// The value, with proof that the callback can't run.
    #[inline]
    pub(crate) fn get_mut<'a>(&'a mut self, _irqs: &'a super::irq::IrqsOff) -> &'a mut T {
        // SAFETY: Interrupts are off, so this thread is not switched out while the borrow lives.
        unsafe { &mut *self.value.get() }
    }
}

/// Fails to compile where `T` is `Unpin`: then both blanket implementations name the function.
macro_rules! assert_not_unpin {
    ($type:ty) => {
        const _: fn() = {
            trait Named<Way> {
                fn once() {}
            }
            struct Always;
            struct WhereUnpin;
            impl<T: ?Sized> Named<Always> for T {}
            impl<T: ?Sized + Unpin> Named<WhereUnpin> for T {}
            <$type as Named<_>>::once
        };
    };
}
pub(crate) use assert_not_unpin;

/// Keeps the scheduler's hook for such callbacks switched on.
pub(crate) struct NotifiersOn(());

impl NotifiersOn {
    /// Switches it on.
    pub(crate) fn new() -> Self {
        // SAFETY: Task context.
        unsafe { kb::preempt_notifier_inc() };
        Self(())
    }
}

impl Drop for NotifiersOn {
    fn drop(&mut self) {
        // SAFETY: Balances `new`.
        unsafe { kb::preempt_notifier_dec() };
    }
}
