// SPDX-License-Identifier: GPL-2.0

//! The console's other ends: clients that are attached to it over the machine's socket.
//!
//! Each sees the last [`SCROLLBACK`] bytes of output first and then all that follows, and each may type. One
//! that takes output more slowly than the guest writes it misses what lies longer back than that; it holds up
//! neither the guest nor others.

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use super::Wake;
use crate::control::gone;
use crate::devices::lock;
use crate::error::{failed, Result};

/// How many bytes of output are kept.
pub const SCROLLBACK: usize = 64 << 10;
/// How many typed bytes wait for the guest.
const TYPED: usize = 1024;
/// How often a client whose typing waits is looked at.
const LOOK: Duration = Duration::from_millis(200);

/// A handle of them.
#[derive(Clone)]
pub struct Hub(Arc<Shared>);

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    wake: Wake,
}

#[derive(Default)]
struct State {
    recent: VecDeque<u8>,
    /// How many bytes were ever written.
    written: u64,
    typed: VecDeque<u8>,
}

impl Hub {
    /// Nobody is attached yet; `wake` wakes the console's thread for what is typed.
    #[must_use]
    pub fn new(wake: Wake) -> Self {
        Self(Arc::new(Shared {
            state: Mutex::default(),
            changed: Condvar::new(),
            wake,
        }))
    }

    /// The guest has written `bytes`.
    pub fn write(&self, bytes: &[u8]) {
        let mut state = lock(&self.0.state);
        state.recent.extend(bytes);
        state.written += bytes.len() as u64;
        let over = state.recent.len().saturating_sub(SCROLLBACK);
        state.recent.drain(..over);
        self.0.changed.notify_all();
    }

    /// Moves what was typed behind `waiting`.
    pub(super) fn take_typed(&self, waiting: &mut VecDeque<u8>) {
        let mut state = lock(&self.0.state);
        if !state.typed.is_empty() {
            waiting.append(&mut state.typed);
            self.0.changed.notify_all();
        }
    }

    /// Joins `client` to the console until it goes or its connection is shut down.
    ///
    /// # Errors
    ///
    /// [`crate::error::Error::Call`] where its socket can't be set up.
    pub fn attach(&self, client: &UnixStream) -> Result<()> {
        // One that takes nothing for long goes on where it then is.
        client
            .set_read_timeout(None)
            .and_then(|()| client.set_write_timeout(None))
            .map_err(failed("setting a socket"))?;
        let gone = AtomicBool::new(false);
        thread::scope(|scope| {
            scope.spawn(|| self.show(client, &gone));
            self.read_typed(client);
            // Under the lock, so that no thread looks before and waits after.
            let _state = lock(&self.0.state);
            gone.store(true, Ordering::SeqCst);
            self.0.changed.notify_all();
        });
        Ok(())
    }

    /// Writes the output to a client, all of it also where its input has ended.
    fn show(&self, mut client: &UnixStream, gone: &AtomicBool) {
        let mut shown = 0;
        loop {
            let state = self.wait(|state| state.written == shown && !gone.load(Ordering::SeqCst));
            if state.written == shown {
                return;
            }
            let new = state.written - shown;
            let old = state.recent.len().saturating_sub(new as usize);
            let missed = new - (state.recent.len() - old) as u64;
            let mut bytes = Vec::new();
            if shown > 0 && missed > 0 {
                bytes =
                    format!("\r\nrvisor: {missed} bytes were too fast for this console\r\n").into();
            }
            bytes.extend(state.recent.iter().skip(old));
            shown = state.written;
            drop(state);
            if client.write_all(&bytes).is_err() {
                // Ends the thread that reads from it as well.
                let _ = client.shutdown(std::net::Shutdown::Both);
                return;
            }
        }
    }

    fn read_typed(&self, mut client: &UnixStream) {
        let mut bytes = [0; TYPED];
        while let Ok(count @ 1..) = client.read(&mut bytes) {
            let mut rest = &bytes[..count];
            while !rest.is_empty() {
                // Reading on only when the guest has taken it: the client waits meanwhile, and nobody else.
                let full = |state: &mut State| state.typed.len() >= TYPED;
                let waited = self
                    .0
                    .changed
                    .wait_timeout_while(lock(&self.0.state), LOOK, full);
                let (mut state, _) = waited.unwrap_or_else(PoisonError::into_inner);
                let room = TYPED.saturating_sub(state.typed.len()).min(rest.len());
                let (now, later) = rest.split_at(room);
                state.typed.extend(now);
                rest = later;
                drop(state);
                self.0.wake.wake();
                if !rest.is_empty() && gone(client) {
                    return;
                }
            }
        }
    }

    fn wait(&self, unless: impl Fn(&mut State) -> bool) -> MutexGuard<'_, State> {
        self.0
            .changed
            .wait_while(lock(&self.0.state), unless)
            .unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attached(hub: &Hub) -> (UnixStream, thread::JoinHandle<Result<()>>) {
        let (ours, theirs) = UnixStream::pair().expect("sockets");
        let hub = hub.clone();
        (ours, thread::spawn(move || hub.attach(&theirs)))
    }

    fn hub() -> Hub {
        Hub::new(Wake::new().expect("an eventfd"))
    }

    fn read(client: &mut UnixStream, count: usize) -> Vec<u8> {
        let mut bytes = vec![0; count];
        client.read_exact(&mut bytes).expect("that many bytes");
        bytes
    }

    #[test]
    fn clients_see_what_was_and_what_comes() {
        let hub = hub();
        hub.write(b"before ");
        let (mut one, _) = attached(&hub);
        let (mut two, _) = attached(&hub);
        assert_eq!(read(&mut one, 7), b"before ");
        hub.write(b"after");
        assert_eq!(read(&mut one, 5), b"after");
        assert_eq!(read(&mut two, 12), b"before after");
    }

    #[test]
    fn scrollback_is_bounded() {
        let hub = hub();
        hub.write(b"lost");
        hub.write(&[b'x'; SCROLLBACK]);
        let (mut client, thread) = attached(&hub);
        assert_eq!(read(&mut client, SCROLLBACK), [b'x'; SCROLLBACK]);
        client.shutdown(std::net::Shutdown::Write).expect("open");
        thread.join().expect("no panic").expect("a good end");
        assert_eq!(client.read(&mut [0]).expect("the end"), 0);
    }

    #[test]
    fn a_client_that_takes_nothing_holds_up_nobody() {
        let hub = hub();
        let (_stuck, _) = attached(&hub);
        for _ in 0..64 {
            hub.write(&[b'x'; SCROLLBACK]);
        }
        let (mut client, _) = attached(&hub);
        assert_eq!(read(&mut client, SCROLLBACK), [b'x'; SCROLLBACK]);
    }

    #[test]
    fn a_client_that_stalls_goes_on_and_is_told_what_it_missed() {
        let hub = hub();
        let (mut client, theirs) = UnixStream::pair().expect("sockets");
        // As the server does for answers.
        let patience = Some(Duration::from_millis(20));
        theirs.set_write_timeout(patience).expect("a timeout");
        thread::spawn({
            let hub = hub.clone();
            move || hub.attach(&theirs)
        });
        hub.write(b"first");
        assert_eq!(read(&mut client, 5), b"first");
        for _ in 0..64 {
            hub.write(&[b'x'; SCROLLBACK]);
            thread::sleep(Duration::from_millis(5));
        }
        hub.write(b"last");
        let mut seen = Vec::new();
        while !seen.ends_with(b"last") {
            seen.extend(read(&mut client, 1));
        }
        let seen = String::from_utf8_lossy(&seen);
        let (_, note) = seen.split_once("rvisor: ").expect("a note");
        let (missed, _) = note.split_once(" bytes were too fast").expect("a number");
        let missed: usize = missed.parse().expect("a number");
        assert_eq!(missed + seen.matches('x').count(), 64 * SCROLLBACK);
    }

    #[test]
    fn what_is_typed_waits_for_the_guest_within_bounds() {
        let hub = hub();
        let (mut client, thread) = attached(&hub);
        client.write_all(&[b'k'; 5 * TYPED]).expect("taken");
        drop(client);
        thread.join().expect("no panic").expect("a good end");
        let mut waiting = VecDeque::new();
        hub.take_typed(&mut waiting);
        assert_eq!(waiting.len(), TYPED);
    }
}
