// SPDX-License-Identifier: GPL-2.0

//! A value that is read often, without a lock, and replaced seldom.

use crate::bindings;
use core::{
    marker::PhantomData,
    ptr,
    sync::atomic::{AtomicPtr, Ordering},
};
use kernel::{prelude::*, sync::rcu};

/// None at first.
///
/// # Invariants
///
/// `current` is null, or came out of a `KBox` that this owns and frees a grace period after it was replaced.
pub(crate) struct RcuCell<T: Send + Sync> {
    current: AtomicPtr<T>,
    _owned: PhantomData<KBox<T>>,
}

impl<T: Send + Sync> RcuCell<T> {
    /// A cell without a value.
    pub(crate) const fn new() -> Self {
        // INVARIANT: Null.
        Self {
            current: AtomicPtr::new(ptr::null_mut()),
            _owned: PhantomData,
        }
    }

    /// Whether there is no value.
    #[inline]
    pub(crate) fn is_empty(&self) -> bool {
        self.current.load(Ordering::Relaxed).is_null()
    }

    /// Runs `f` with the value, where there is one. `f` must not sleep. In any context but NMI.
    #[inline]
    pub(crate) fn read<R>(&self, f: impl FnOnce(&T) -> R) -> Option<R> {
        if self.is_empty() {
            return None;
        }
        let _guard = rcu::read_lock();
        // SAFETY: Null or valid by the invariant, and not freed before the guard is dropped.
        unsafe { self.current.load(Ordering::Acquire).as_ref() }.map(f)
    }

    /// Replaces the value. Gives the old one when nobody reads it any more. May sleep.
    pub(crate) fn swap(&self, new: Option<KBox<T>>) -> Option<KBox<T>> {
        let new = new.map_or(ptr::null_mut(), KBox::into_raw);
        // INVARIANT: `new` came out of a box, and the old one goes back into its own below.
        let old = self.current.swap(new, Ordering::AcqRel);
        if old.is_null() {
            return None;
        }
        // SAFETY: Task context. After it no reader has the old value, which was ours by the invariant.
        unsafe {
            bindings::synchronize_rcu_expedited();
            Some(KBox::from_raw(old))
        }
    }

    /// Replaces the value, and returns when nobody reads the old one. May sleep.
    pub(crate) fn replace(&self, new: Option<KBox<T>>) {
        drop(self.swap(new));
    }
}

impl<T: Send + Sync> Drop for RcuCell<T> {
    fn drop(&mut self) {
        let last = *self.current.get_mut();
        if !last.is_null() {
            // SAFETY: Ours by the invariant, and nobody can read it any more.
            drop(unsafe { KBox::from_raw(last) });
        }
    }
}
