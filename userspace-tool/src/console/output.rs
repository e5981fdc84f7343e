// SPDX-License-Identifier: GPL-2.0

//! The guest's output on its way to who sees it: standard output, and clients that are attached to the console over the
//! machine's socket. Each has a thread of its own.
//!
//! A guest writes byte for byte, each an exit; to show each at once would double its cost. So bytes are shown a line at
//! a time; what has no end of line yet, a prompt, follows within [`DELAY`].
//!
//! Standard output may take nothing for as long as it likes: a pipe that nobody reads. Then the guest waits where it
//! writes, but neither pausing nor ending the machine has to. A client sees the last [`SCROLLBACK`] bytes first and then
//! all that follows, and may type. One that takes output more slowly than the guest writes it misses what lies longer
//! back than that; it holds up neither the guest nor others.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use super::{Filter, Wake};
use crate::control::gone;
use crate::devices::lock;
use crate::error::{failed, Error, Result};
use crate::machine::Control;
use crate::outcome::Outcome;
use crate::ready::{self, PollFlags};

/// How long a byte may wait for the end of its line.
const DELAY: Duration = Duration::from_millis(10);
/// How many bytes may wait.
const MOST: u64 = 4096;
/// How many bytes of output are kept.
const SCROLLBACK: usize = 64 << 10;
/// How many are kept that standard output lacks, where a pause keeps the guest from waiting: it writes no more than
/// it has begun with, a buffer of the virtio console at most.
const KEPT: usize = 4 << 20;
/// How many typed bytes wait for the guest.
const TYPED: usize = 1024;
/// How often who waits looks whether it still has to.
const LOOK: Duration = Duration::from_millis(50);
/// How long standard output may take for the rest when the guest has ended.
const REST: Duration = Duration::from_secs(2);

/// A handle of the output.
#[derive(Clone)]
pub struct Output(Arc<Shared>);

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    control: Control,
    wake: Wake,
    /// Standard output until it is shown there, and what may pass to it, where it is a terminal. That is asked before
    /// the process gives such questions up.
    here: Mutex<Option<(File, Option<Filter>)>>,
}

#[derive(Default)]
struct State {
    recent: VecDeque<u8>,
    /// How many bytes were ever written.
    written: u64,
    /// How many of them standard output has; all that may ever come where there is none.
    shown: u64,
    /// Words of our own for standard output.
    words: Vec<u8>,
    /// A thread waits for the next byte, whatever it is.
    idle: bool,
    typed: VecDeque<u8>,
}

impl State {
    /// How many bytes standard output lacks.
    fn behind(&self) -> u64 {
        self.written.saturating_sub(self.shown)
    }
}

impl Output {
    /// The output of a machine that `control` pauses and ends, to the file `here` too where there is one, through a
    /// [`Filter`] where that is a terminal, unless it is `raw`; `wake` wakes the console's thread for what is typed.
    #[must_use]
    pub fn new(wake: Wake, here: Option<File>, raw: bool, control: Control) -> Self {
        let state = State {
            shown: if here.is_some() { 0 } else { u64::MAX },
            ..State::default()
        };
        Self(Arc::new(Shared {
            state: Mutex::new(state),
            changed: Condvar::new(),
            control,
            wake,
            here: Mutex::new(here.map(|file| {
                let filter = Filter::for_output(&file, raw);
                (file, filter)
            })),
        }))
    }

    /// Begins to show it on standard output, where the machine does not run detached. The guest ends where that fails.
    ///
    /// # Errors
    ///
    /// [`Error::Call`] where there can be no thread for it.
    pub fn start(&self) -> Result<()> {
        let Some((file, filter)) = lock(&self.0.here).take() else {
            return Ok(());
        };
        let output = self.clone();
        let work = move || output.see_to(|| output.show_on(&file, filter));
        let thread = thread::Builder::new().name("screen".to_owned()).spawn(work);
        thread.map(drop).map_err(failed("starting a thread"))
    }

    /// Has `show` show the output. Where it fails or panics, nobody waits for it any more and the guest ends.
    fn see_to(&self, show: impl FnOnce() -> io::Result<()>) {
        // What it leaves behind is the state, which is whole whenever its lock is free.
        let shown = catch_unwind(AssertUnwindSafe(show));
        let panicked = |_| Err(io::Error::other("its thread panicked"));
        if let Err(error) = shown.unwrap_or_else(panicked) {
            let error = Error::call("writing the console", error);
            self.0.control.end(Outcome::OutputLost(error));
            lock(&self.0.state).shown = u64::MAX;
            self.0.changed.notify_all();
        }
    }

    fn show_on(&self, file: &File, mut filter: Option<Filter>) -> io::Result<()> {
        let mut shown = 0;
        loop {
            let new = self.next(&mut shown, |state| !state.words.is_empty());
            let mut passed = match &mut filter {
                Some(filter) => filter.passed(&new),
                None => new,
            };
            passed.append(&mut lock(&self.0.state).words);
            write_all(file, &passed)?;
            lock(&self.0.state).shown = shown;
            self.0.changed.notify_all();
        }
    }

    /// Waits for output behind the first `shown` bytes, until `stop`, and takes what of it is kept, behind a note where
    /// some is not.
    fn next(&self, shown: &mut u64, stop: impl Fn(&State) -> bool) -> Vec<u8> {
        let mut state = lock(&self.0.state);
        while state.written == *shown && !stop(&state) {
            state.idle = true;
            let waited = self.0.changed.wait(state);
            state = waited.unwrap_or_else(PoisonError::into_inner);
        }
        let incomplete = |state: &mut State| {
            let line = state.recent.back() == Some(&b'\n');
            !line && state.written - *shown < MOST && !stop(state)
        };
        let waited = self.0.changed.wait_timeout_while(state, DELAY, incomplete);
        let (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        let new = state.written - *shown;
        let missed = new.saturating_sub(state.recent.len() as u64);
        let old = state.recent.len() - (new - missed) as usize;
        let mut taken = Vec::new();
        // What was before a client came, it has not missed.
        if missed > 0 && *shown > 0 {
            let note = format!("\r\nrvisor: {missed} bytes were too fast for this console\r\n");
            taken.extend_from_slice(note.as_bytes());
        }
        *shown = state.written;
        taken.extend(state.recent.range(old..));
        taken
    }

    /// Waits until standard output has all when the guest has ended, or could not be written, which the control knows by
    /// then. What it does not take for [`REST`] is dropped.
    pub fn finish(&self) {
        let missing = |state: &mut State| state.behind() > 0;
        let state = lock(&self.0.state);
        drop(self.0.changed.wait_timeout_while(state, REST, missing));
    }

    /// Shows words of our own on standard output, which pass as they are.
    pub fn say(&self, words: &[u8]) {
        lock(&self.0.state).words.extend_from_slice(words);
        self.0.changed.notify_all();
    }

    /// Moves what clients have typed behind `waiting`.
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
    /// [`Error::Call`] where its socket can't be set up.
    pub fn attach(&self, client: &UnixStream) -> Result<()> {
        // One that takes nothing for long goes on where it then is.
        client
            .set_read_timeout(None)
            .and_then(|()| client.set_write_timeout(None))
            .map_err(failed("setting a socket"))?;
        let gone = AtomicBool::new(false);
        thread::scope(|scope| {
            scope.spawn(|| self.show_to(client, &gone));
            self.read_typed(client);
            // Under the lock, so that no thread looks before and waits after.
            let _state = lock(&self.0.state);
            gone.store(true, Ordering::SeqCst);
            self.0.changed.notify_all();
        });
        Ok(())
    }

    /// Writes the output to a client, all of it also where its input has ended.
    fn show_to(&self, mut client: &UnixStream, gone: &AtomicBool) {
        let mut shown = 0;
        loop {
            let new = self.next(&mut shown, |_| gone.load(Ordering::SeqCst));
            if new.is_empty() {
                return;
            }
            if client.write_all(&new).is_err() {
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
                let state = lock(&self.0.state);
                let waited = self.0.changed.wait_timeout_while(state, LOOK, full);
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
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut state = lock(&self.0.state);
        state.recent.extend(bytes);
        state.written += bytes.len() as u64;
        let lacks = usize::try_from(state.behind()).map_or(KEPT, |lacks| lacks.min(KEPT));
        let over = state.recent.len().saturating_sub(lacks.max(SCROLLBACK));
        state.recent.drain(..over);
        let idle = std::mem::take(&mut state.idle);
        // Clients have no bound of their own to be behind.
        let crossed = state.written / MOST != (state.written - bytes.len() as u64) / MOST;
        if idle || crossed || bytes.contains(&b'\n') || state.behind() >= MOST {
            self.0.changed.notify_all();
        }
        // The guest is held up until no more waits than may, or the machine is to pause or to end.
        while state.behind() > MOST && !self.0.control.ended() && !self.0.control.paused() {
            let waited = self.0.changed.wait_timeout(state, LOOK);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(bytes.len())
    }

    /// Does nothing: the serial port asks for it behind each byte.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Writes all of it, also to a file that does not block.
fn write_all(mut file: &File, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match file.write(bytes) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(count) => bytes = &bytes[count..],
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                // Whatever it says: writing says it better.
                let _ = ready::wait(&[(&file, PollFlags::OUT)], None);
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
