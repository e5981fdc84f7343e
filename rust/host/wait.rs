// SPDX-License-Identifier: GPL-2.0

//! A place where a vCPU's thread sleeps until it is woken or a signal comes.

use kernel::{bindings as kb, prelude::*, sync::LockClassKey, types::Opaque};
use pin_init::PinInit;

/// A wait queue that can be woken from any context, hard interrupts included.
#[pin_data]
pub(crate) struct WaitQueue {
    #[pin]
    head: Opaque<kb::wait_queue_head>,
}

// SAFETY: A wait queue has its own lock.
unsafe impl Send for WaitQueue {}
// SAFETY: As above.
unsafe impl Sync for WaitQueue {}

const TASK_INTERRUPTIBLE: i32 = kb::TASK_INTERRUPTIBLE as i32;
/// Not woken by signals, and not taken for a thread that hangs.
const TASK_IDLE: i32 = (kb::TASK_UNINTERRUPTIBLE | kb::TASK_NOLOAD) as i32;

impl WaitQueue {
    /// An empty queue.
    pub(crate) fn new(key: Pin<&'static LockClassKey>) -> impl PinInit<Self> {
        pin_init!(Self {
            head <- Opaque::ffi_init(|slot: *mut kb::wait_queue_head| {
                // SAFETY: `slot` is memory for the head; the name and the key live for ever.
                unsafe {
                    kb::__init_waitqueue_head(slot, c"rvisor".as_char_ptr(), key.as_ptr())
                }
            }),
        })
    }

    /// Sleeps until `ready` holds or a signal is pending. `ready` is asked after the thread is on the
    /// queue, so that a wake-up between the question and the sleep is not lost.
    pub(crate) fn wait_until(&self, ready: impl FnMut() -> bool) {
        self.wait(TASK_INTERRUPTIBLE, ready);
    }

    /// Likewise, whatever signal comes: for what does not take long, or is ended by its own signals.
    pub(crate) fn wait_through(&self, ready: impl FnMut() -> bool) {
        self.wait(TASK_IDLE, ready);
    }

    fn wait(&self, state: i32, mut ready: impl FnMut() -> bool) {
        let mut entry = kb::wait_queue_entry::default();
        // SAFETY: `entry` outlives its time on the queue, which `finish_wait` below ends.
        unsafe { kb::init_wait_entry(&mut entry, 0) };
        loop {
            // SAFETY: The head is initialised and the entry is ours.
            let signal = unsafe { kb::prepare_to_wait_event(self.head.get(), &mut entry, state) };
            if ready() || signal != 0 {
                break;
            }
            // SAFETY: Task context, no lock held.
            unsafe { kb::schedule() };
        }
        // SAFETY: As for `prepare_to_wait_event`.
        unsafe { kb::finish_wait(self.head.get(), &mut entry) };
    }

    /// Lets a poll(2) of `file` know when the queue is woken.
    ///
    /// # Safety
    ///
    /// `file` and `table` are those of a call of the file's `poll`, and the queue lives for as long as the file.
    pub(crate) unsafe fn register(&self, file: *mut kb::file, table: *mut kb::poll_table) {
        // SAFETY: The head is initialised, the rest is the caller's to know. Who polls is off the queue before
        // the file is released.
        unsafe { kb::poll_wait(file, self.head.get(), table) };
    }

    /// Wakes the sleeper, if there is one. What it waits for must be visible before the call.
    pub(crate) fn wake(&self) {
        // SAFETY: The head is initialised.
        unsafe { kb::__wake_up(self.head.get(), kb::TASK_NORMAL, 1, core::ptr::null_mut()) };
    }
}
