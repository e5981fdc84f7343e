// SPDX-License-Identifier: GPL-2.0

//! eventfds: signalled from the kernel, and listened to.

use crate::bindings;
use core::{mem::ManuallyDrop, ptr::NonNull};
use kernel::{error::from_err_ptr, ffi::c_void, prelude::*, sync::Arc};

/// An eventfd that is signalled from here. It outlives its descriptors.
///
/// # Invariants
///
/// `context` has a reference that this owns.
pub(crate) struct EventFd {
    context: NonNull<bindings::eventfd_ctx>,
}

// SAFETY: An eventfd has its own lock and its own count of references.
unsafe impl Send for EventFd {}
// SAFETY: As above.
unsafe impl Sync for EventFd {}

impl EventFd {
    /// The eventfd behind a descriptor of the current process.
    ///
    /// # Errors
    ///
    /// `EBADF`; `EINVAL` for another kind of file.
    pub(crate) fn from_descriptor(descriptor: u32) -> Result<Self> {
        // SAFETY: Any number may be given.
        let context = from_err_ptr(unsafe { bindings::eventfd_ctx_fdget(descriptor as i32) })?;
        // INVARIANT: `eventfd_ctx_fdget` gives a reference.
        Ok(Self {
            context: NonNull::new(context).ok_or(EINVAL)?,
        })
    }

    /// Counts it up by one. In any context, interrupts off included.
    #[inline]
    pub(crate) fn signal(&self) {
        // SAFETY: Held by the invariant.
        unsafe { bindings::eventfd_signal_mask(self.context.as_ptr(), 0) };
    }

    /// Whether both are the same eventfd.
    pub(crate) fn is_same(&self, other: &Self) -> bool {
        self.context == other.context
    }
}

impl Drop for EventFd {
    fn drop(&mut self) {
        // SAFETY: Releases the reference that this owns.
        unsafe { bindings::eventfd_ctx_put(self.context.as_ptr()) };
    }
}

/// The workers that are told of events. Flushed before what they call can go.
///
/// # Invariants
///
/// `queue` is a pair of workqueues that this owns.
pub(crate) struct EventQueue {
    queue: NonNull<bindings::rvisor_queues>,
}

// SAFETY: Workqueues may be used from any thread.
unsafe impl Send for EventQueue {}
// SAFETY: As above.
unsafe impl Sync for EventQueue {}

impl EventQueue {
    /// A queue without work.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(crate) fn new() -> Result<Self> {
        // SAFETY: Task context.
        let queue = unsafe { bindings::rvisor_queues_create() };
        // INVARIANT: Freshly made.
        Ok(Self {
            queue: NonNull::new(queue).ok_or(ENOMEM)?,
        })
    }

    /// Returns when every call that had begun or was due is over. Not for the workers themselves.
    pub(crate) fn flush(&self) {
        // SAFETY: The queue is ours.
        unsafe { bindings::rvisor_queues_flush_closed(self.queue.as_ptr()) };
    }
}

impl Drop for EventQueue {
    fn drop(&mut self) {
        // SAFETY: The queue is ours, and all hooks on it are gone: each keeps what owns this.
        unsafe { bindings::rvisor_queues_destroy(self.queue.as_ptr()) };
    }
}

/// What is told of an eventfd's events, in a worker, where it may sleep.
pub(crate) trait Listener: Send + Sync + Sized + 'static {
    /// It was signalled, just now. `false` leaves it to [`Self::signalled`]. Called in any context but NMI,
    /// interrupt handlers included, with interrupts off: must not sleep nor wait for a lock that is ever
    /// held with interrupts on.
    fn try_signalled(&self) -> bool;
    /// It was signalled, once or more often.
    fn signalled(&self);
    /// Its last descriptor was closed: the owner is to drop the listener. Comes once.
    fn closed(this: Arc<Self>);
}

/// A place on an eventfd's wait queue, and the listener that is told there. Dropped, it waits until no call
/// to the listener is under way.
///
/// # Invariants
///
/// `hook` is attached with the address of `listener`, and this owns it.
pub(crate) struct Hook<T: Listener> {
    hook: NonNull<bindings::rvisor_hook>,
    listener: Arc<T>,
    _queue: Arc<EventQueue>,
}

// SAFETY: The hook may be detached from any thread, and the listener is Send and Sync.
unsafe impl<T: Listener> Send for Hook<T> {}
// SAFETY: As above.
unsafe impl<T: Listener> Sync for Hook<T> {}

impl<T: Listener> Hook<T> {
    const CALLS: bindings::rvisor_hook_calls = bindings::rvisor_hook_calls {
        try_signalled: Some(Self::try_signalled),
        signalled: Some(Self::signalled),
        closed: Some(Self::closed),
    };

    /// Tells `listener` of the eventfd's events from now on, and of one that it already has.
    ///
    /// # Errors
    ///
    /// `EBADF`; `EINVAL` for another kind of file; `EBUSY` where another hook is there; `ENOMEM`.
    pub(crate) fn attach(
        descriptor: u32,
        queue: Arc<EventQueue>,
        listener: Arc<T>,
    ) -> Result<Self> {
        let owner = Arc::as_ptr(&listener).cast_mut().cast::<c_void>();
        // SAFETY: The table lives for ever; the hook is detached before listener and queue are dropped.
        let hook = from_err_ptr(unsafe {
            bindings::rvisor_hook_attach(
                descriptor as i32,
                queue.queue.as_ptr(),
                &Self::CALLS,
                owner,
            )
        })?;
        // INVARIANT: Just attached.
        Ok(Self {
            hook: NonNull::new(hook).ok_or(EINVAL)?,
            listener,
            _queue: queue,
        })
    }

    /// Who is told.
    pub(crate) fn listener(&self) -> &Arc<T> {
        &self.listener
    }

    /// Whether the hook is on this eventfd.
    pub(crate) fn is_on(&self, eventfd: &EventFd) -> bool {
        // SAFETY: The hook is attached by the invariant.
        let context = unsafe { bindings::rvisor_hook_eventfd(self.hook.as_ptr()) };
        context == eventfd.context.as_ptr()
    }

    /// # Safety
    ///
    /// Called with the listener of an attached hook, the wait queue's lock held.
    unsafe extern "C" fn try_signalled(owner: *mut c_void) -> bool {
        // SAFETY: The hook holds the listener, and leaves the wait queue before it goes.
        unsafe { &*owner.cast::<T>() }.try_signalled()
    }

    /// # Safety
    ///
    /// Called by a worker with the listener of an attached hook.
    unsafe extern "C" fn signalled(owner: *mut c_void) {
        // SAFETY: The hook holds the listener, and detaching waits for this call.
        unsafe { &*owner.cast::<T>() }.signalled();
    }

    /// # Safety
    ///
    /// As for `signalled`.
    unsafe extern "C" fn closed(owner: *mut c_void) {
        // SAFETY: The address is that of the hook's own `Arc`, which stays until the hook is detached. That
        // waits for this call, or comes from it, when `this` holds the listener too.
        let this = unsafe { ManuallyDrop::new(Arc::from_raw(owner.cast::<T>())) };
        T::closed(Arc::clone(&this));
    }
}

impl<T: Listener> Drop for Hook<T> {
    fn drop(&mut self) {
        // SAFETY: Attached by the invariant; task context.
        unsafe { bindings::rvisor_hook_detach(self.hook.as_ptr()) };
    }
}
