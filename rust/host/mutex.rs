// SPDX-License-Identifier: GPL-2.0

//! Waiting for a mutex whose holder may keep it for as long as a guest runs.

use crate::bindings;
use kernel::{
    bindings as kb,
    prelude::*,
    sync::{Mutex, MutexGuard},
};

/// Locks `mutex`.
///
/// # Errors
///
/// `EINTR` where the thread is killed while it waits.
pub(crate) fn lock_killable<T>(mutex: &Mutex<T>) -> Result<MutexGuard<'_, T>> {
    // A `Lock` is `repr(C)`, and the kernel's mutex its first field, inside an `Opaque`.
    let raw = core::ptr::from_ref(mutex).cast_mut().cast::<kb::mutex>();
    // SAFETY: The mutex is initialised, as is every `Lock`. Task context.
    if unsafe { bindings::rvisor_mutex_lock_killable(raw) } != 0 {
        return Err(EINTR);
    }
    // SAFETY: It was locked just now, by this thread, and nothing else unlocks it.
    Ok(unsafe { MutexGuard::new(mutex, ()) })
}
