// SPDX-License-Identifier: GPL-2.0

//! The signals that a thread blocks while it runs a guest.

use kernel::{bindings as kb, types::NotThreadSafe};

/// A set of signals, without SIGKILL and SIGSTOP, which can't be blocked.
pub(crate) struct SignalMask {
    set: kb::sigset_t,
}

/// The thread's own mask comes back when this is dropped.
pub(crate) struct Blocked {
    old: kb::sigset_t,
    _not_send: NotThreadSafe,
}

impl SignalMask {
    /// The set whose bit n is signal n + 1.
    pub(crate) fn new(bits: u64) -> Self {
        let unblockable = 1 << (kb::SIGKILL - 1) | 1 << (kb::SIGSTOP - 1);
        Self {
            set: kb::sigset_t {
                sig: [(bits & !unblockable) as usize],
            },
        }
    }

    /// Blocks these signals, and no others, for the current thread.
    pub(crate) fn block(&self) -> Blocked {
        Blocked {
            old: exchange(&self.set),
            _not_send: NotThreadSafe,
        }
    }
}

impl Drop for Blocked {
    fn drop(&mut self) {
        exchange(&self.old);
    }
}

/// Sets the current thread's mask and gives the old one.
fn exchange(new: &kb::sigset_t) -> kb::sigset_t {
    let mut new = *new;
    let mut old = kb::sigset_t::default();
    // SAFETY: Both sets are valid for the call, in task context.
    unsafe { kb::sigprocmask(kb::SIG_SETMASK as i32, &mut new, &mut old) };
    old
}
