// SPDX-License-Identifier: GPL-2.0

//! Whether the guest runs, is paused or has ended: what all threads of the machine go by.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{mpsc, Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use crate::devices::lock;
use crate::outcome::Outcome;

/// Ends the guest and pauses it, from any thread. The first to end it decides how it ended, but that the loss of its
/// output may come to light behind its own end (see [`Outcome::OutputLost`]).
#[derive(Clone)]
pub struct Control(Arc<Shared>);

struct Shared {
    ended: AtomicBool,
    paused: AtomicBool,
    pause: Mutex<Pause>,
    changed: Condvar,
    outcomes: mpsc::Sender<Outcome>,
}

#[derive(Default)]
struct Pause {
    reason: Option<String>,
    parked: usize,
}

impl Control {
    /// A control, and where all outcomes come out that it is told.
    #[must_use]
    pub fn new() -> (Self, mpsc::Receiver<Outcome>) {
        let (sender, outcomes) = mpsc::channel();
        (
            Self(Arc::new(Shared {
                ended: AtomicBool::new(false),
                paused: AtomicBool::new(false),
                pause: Mutex::default(),
                changed: Condvar::new(),
                outcomes: sender,
            })),
            outcomes,
        )
    }

    /// Ends the guest.
    pub fn end(&self, outcome: Outcome) {
        self.change(|_| self.0.ended.store(true, Ordering::SeqCst));
        // Nobody listens any more once it has been said how it ended.
        let _ = self.0.outcomes.send(outcome);
    }

    /// Whether the guest has ended.
    #[must_use]
    pub fn ended(&self) -> bool {
        self.0.ended.load(Ordering::SeqCst)
    }

    /// Has CPUs park when they next leave the guest; `reason` is for people. [`crate::machine::Machine::pause`]
    /// sees to it that they leave it, and waits.
    pub fn set_paused(&self, reason: impl Into<String>) {
        self.change(|pause| {
            pause.reason = Some(reason.into());
            self.0.paused.store(true, Ordering::SeqCst);
        });
    }

    /// Has parked CPUs go on.
    pub fn resume(&self) {
        self.change(|pause| {
            pause.reason = None;
            self.0.paused.store(false, Ordering::SeqCst);
        });
    }

    /// Whether CPUs are to park.
    #[must_use]
    pub fn paused(&self) -> bool {
        self.0.paused.load(Ordering::SeqCst)
    }

    /// Why, where they are.
    #[must_use]
    pub fn pause_reason(&self) -> Option<String> {
        lock(&self.0.pause).reason.clone()
    }

    /// Parks a CPU's thread until it is to go on or to end.
    pub fn park(&self) {
        let mut pause = lock(&self.0.pause);
        pause.parked += 1;
        self.0.changed.notify_all();
        let parked = |_: &mut Pause| self.paused() && !self.ended();
        let waited = self.0.changed.wait_while(pause, parked);
        waited.unwrap_or_else(PoisonError::into_inner).parked -= 1;
    }

    /// Waits until `count` threads are parked, for no longer than `timeout`. Says whether they are.
    #[must_use]
    pub fn await_parked(&self, count: usize, timeout: Duration) -> bool {
        let pause = lock(&self.0.pause);
        let waited = self.0.changed.wait_timeout_while(pause, timeout, |pause| {
            pause.parked < count && !self.ended()
        });
        waited.unwrap_or_else(PoisonError::into_inner).0.parked >= count
    }

    /// Makes a change that no thread misses which looks before it waits.
    fn change(&self, change: impl FnOnce(&mut Pause)) {
        change(&mut lock(&self.0.pause));
        self.0.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread;

    #[test]
    fn parked_threads_go_on_by_resume_and_by_the_end() {
        for end in [false, true] {
            let (control, outcomes) = Control::new();
            control.set_paused("a test");
            assert!(!control.await_parked(1, Duration::from_millis(1)));
            let thread = thread::spawn({
                let control = control.clone();
                move || control.park()
            });
            assert!(control.await_parked(1, Duration::from_secs(9)));
            assert_eq!(control.pause_reason().as_deref(), Some("a test"));
            if end {
                control.end(Outcome::Quit);
            } else {
                control.resume();
            }
            thread.join().expect("it goes on");
            assert_eq!((control.ended(), outcomes.try_recv().is_ok()), (end, end));
            assert_eq!(control.pause_reason().is_some(), end);
        }
    }
}
