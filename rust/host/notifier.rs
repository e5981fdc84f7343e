// SPDX-License-Identifier: GPL-2.0

//! Word from the kernel that pages of the owning process are about to change.

use core::{mem::offset_of, ptr::NonNull};
use kernel::{bindings as kb, error::to_result, prelude::*, sync::Arc, types::Opaque};
use rvisor_core::x86::address::Hva;

/// What must forget translations.
pub(crate) trait Invalidate: Send + Sync + 'static {
    /// The pages of `start..end` change between this call and the matching [`Self::end`]: what is
    /// known of them is void from now on, and nothing new may be learnt until then. Must not sleep,
    /// but where `may_sleep` says so.
    fn start(&self, start: Hva, end: Hva, may_sleep: bool);
    /// The end of such a change.
    fn end(&self);
    /// The process is gone.
    fn release(&self);
    /// Whether a page of `start..end` was used by the guest; forgets that where `clear` says so.
    fn was_used(&self, start: Hva, end: Hva, clear: bool) -> bool;
}

#[repr(C)]
struct Inner<T: Invalidate> {
    notifier: Opaque<kb::mmu_notifier>,
    ops: kb::mmu_notifier_ops,
    target: Arc<T>,
}

/// A registration on the current process's address space.
///
/// # Invariants
///
/// `inner` is registered, and freed by the kernel's callback after `mmu_notifier_put`.
pub(crate) struct Notifier<T: Invalidate> {
    inner: NonNull<Inner<T>>,
}

// SAFETY: The target is Send and Sync; registration belongs to no thread.
unsafe impl<T: Invalidate> Send for Notifier<T> {}
// SAFETY: As above.
unsafe impl<T: Invalidate> Sync for Notifier<T> {}

impl<T: Invalidate> Notifier<T> {
    /// Registers `target` for the address space `mm`, which must be the current one.
    ///
    /// # Errors
    ///
    /// `ENOMEM`; `EINTR` where a signal came.
    ///
    /// # Safety
    ///
    /// `mm` is the current thread's.
    pub(crate) unsafe fn register(mm: NonNull<kb::mm_struct>, target: Arc<T>) -> Result<Self> {
        let inner = KBox::new(
            Inner {
                notifier: Opaque::new(kb::mmu_notifier::default()),
                ops: kb::mmu_notifier_ops {
                    release: Some(Self::release),
                    clear_flush_young: Some(Self::clear_flush_young),
                    clear_young: Some(Self::clear_flush_young),
                    test_young: Some(Self::test_young),
                    invalidate_range_start: Some(Self::start),
                    invalidate_range_end: Some(Self::end),
                    free_notifier: Some(Self::free),
                    ..kb::mmu_notifier_ops::default()
                },
                target,
            },
            GFP_KERNEL_ACCOUNT,
        )?;
        let raw = KBox::into_raw(inner);
        // SAFETY: `raw` is valid, stays where it is, and `mm` is alive as the current thread's.
        let result = unsafe {
            let notifier = (*raw).notifier.get();
            (*notifier).ops = &(*raw).ops;
            to_result(kb::mmu_notifier_register(notifier, mm.as_ptr()))
        };
        if let Err(error) = result {
            // SAFETY: Not registered, so still ours alone.
            drop(unsafe { KBox::from_raw(raw) });
            return Err(error);
        }
        // SAFETY: A box's address is not null.
        let inner = unsafe { NonNull::new_unchecked(raw) };
        // INVARIANT: Registered just above.
        Ok(Self { inner })
    }

    /// # Safety
    ///
    /// `notifier` is the first field of an `Inner<T>` that is registered, or was and is not freed yet.
    unsafe fn target<'a>(notifier: *mut kb::mmu_notifier) -> &'a T {
        const { assert!(offset_of!(Inner<T>, notifier) == 0) };
        // SAFETY: By the caller's promise.
        unsafe { &(*notifier.cast::<Inner<T>>()).target }
    }

    /// # Safety
    ///
    /// Called by the kernel with a notifier that [`Self::register`] registered.
    unsafe extern "C" fn release(notifier: *mut kb::mmu_notifier, _mm: *mut kb::mm_struct) {
        // SAFETY: Called by the kernel with our registered notifier.
        unsafe { Self::target(notifier) }.release();
    }

    /// # Safety
    ///
    /// Called by the kernel with a notifier that [`Self::register`] registered.
    unsafe extern "C" fn start(
        notifier: *mut kb::mmu_notifier,
        range: *const kb::mmu_notifier_range,
    ) -> i32 {
        // SAFETY: As for `release`; the kernel gives a valid range.
        let (target, range) = unsafe { (Self::target(notifier), &*range) };
        let may_sleep = range.flags & kb::MMU_NOTIFIER_RANGE_BLOCKABLE != 0;
        target.start(
            Hva::new(range.start as u64),
            Hva::new(range.end as u64),
            may_sleep,
        );
        0
    }

    /// # Safety
    ///
    /// Called by the kernel with a notifier that [`Self::register`] registered.
    unsafe extern "C" fn end(
        notifier: *mut kb::mmu_notifier,
        _range: *const kb::mmu_notifier_range,
    ) {
        // SAFETY: As for `release`.
        unsafe { Self::target(notifier) }.end();
    }

    /// # Safety
    ///
    /// Called by the kernel with a notifier that [`Self::register`] registered.
    unsafe extern "C" fn clear_flush_young(
        notifier: *mut kb::mmu_notifier,
        _mm: *mut kb::mm_struct,
        start: usize,
        end: usize,
    ) -> bool {
        // SAFETY: As for `release`.
        unsafe { Self::target(notifier) }.was_used(
            Hva::new(start as u64),
            Hva::new(end as u64),
            true,
        )
    }

    /// # Safety
    ///
    /// Called by the kernel with a notifier that [`Self::register`] registered.
    unsafe extern "C" fn test_young(
        notifier: *mut kb::mmu_notifier,
        _mm: *mut kb::mm_struct,
        address: usize,
    ) -> bool {
        let start = Hva::new(address as u64);
        // SAFETY: As for `release`.
        unsafe { Self::target(notifier) }.was_used(start, start.wrapping_add(1), false)
    }

    /// # Safety
    ///
    /// Called by the kernel once, after all other callbacks.
    unsafe extern "C" fn free(notifier: *mut kb::mmu_notifier) {
        // SAFETY: The kernel calls this once, when no callback can run any more; `notifier` is the
        // first field of the box that `register` gave up.
        drop(unsafe { KBox::from_raw(notifier.cast::<Inner<T>>()) });
    }
}

impl<T: Invalidate> Drop for Notifier<T> {
    fn drop(&mut self) {
        // SAFETY: Registered by the invariant. Callbacks may still run; `free` comes after them.
        unsafe { kb::mmu_notifier_put(self.inner.as_ref().notifier.get()) };
    }
}

/// Waits until every registration that was dropped has been freed. Called before the module goes.
pub(crate) fn synchronize() {
    // SAFETY: Task context, may sleep.
    unsafe { kb::mmu_notifier_synchronize() };
}
