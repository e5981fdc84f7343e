// SPDX-License-Identifier: GPL-2.0

//! The guest's console: standard input to its serial port, its output to standard output, and the keys and
//! signals that end it. One thread does it. Clients that are attached over the machine's socket share it.

mod attach;
mod escape;
mod filter;
mod hub;
mod output;
mod terminal;
mod wake;

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, TryLockError};
use std::time::Duration;

use rustix::event::{poll, PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::pipe::{pipe_with, PipeFlags};
use rustix::stdio::stdin;
use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM};

use crate::devices::virtio::console::Keyboard;
use crate::devices::{serial_failed, Ports};
use crate::error::{failed, Error, Result};
use crate::machine::Control;
use crate::outcome::Outcome;
pub use attach::attach;
use escape::{Escape, Key};
pub use filter::Filter;
pub use hub::{Hub, SCROLLBACK};
pub use output::Output;
pub use terminal::Raw;
pub use wake::Wake;

const KEYS: &[u8] = b"\r\nrvisor: Ctrl-A x ends the guest, Ctrl-A h shows this, \
Ctrl-A Ctrl-A sends Ctrl-A\r\n";
/// How many typed bytes may wait for the guest, the keys that end it behind them.
const TYPED: usize = 4096;
/// How long to wait before the guest is offered again what it would not take.
const RETRY: Duration = Duration::from_millis(50);

/// The signals that end the guest, as a pipe to poll.
pub struct Signals {
    last: Arc<AtomicUsize>,
    pipe: OwnedFd,
}

impl Signals {
    /// Catches the signals from now on.
    ///
    /// # Errors
    ///
    /// [`Error::Call`] where the host's kernel refuses.
    pub fn catch() -> Result<Self> {
        let what = "catching signals";
        let (pipe, writer) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)
            .map_err(|e| Error::call(what, io::Error::from(e)))?;
        let last = Arc::new(AtomicUsize::new(0));
        for signal in [SIGHUP, SIGINT, SIGQUIT, SIGTERM] {
            // Actions run in the order in which they were registered: the number is there before the byte.
            signal_hook::flag::register_usize(signal, Arc::clone(&last), signal as usize)
                .map_err(failed(what))?;
            let writer = writer.try_clone().map_err(failed(what))?;
            signal_hook::low_level::pipe::register(signal, writer).map_err(failed(what))?;
        }
        Ok(Self { last, pipe })
    }

    /// The last signal that came since the last look.
    #[must_use]
    pub fn take(&self) -> Option<u8> {
        // The pipe says no more than that there is one: what is written later is about a later one.
        let _ = rustix::io::read(&self.pipe, &mut [0_u8; 64]);
        u8::try_from(self.last.swap(0, Ordering::SeqCst))
            .ok()
            .filter(|signal| *signal != 0)
    }
}

impl AsFd for Signals {
    /// Can be read where there is a signal.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pipe.as_fd()
    }
}

/// The console's thread.
pub struct Console {
    /// Where output waits.
    pub output: Output,
    /// The clients that are attached.
    pub hub: Hub,
    /// Where what is typed goes instead of to the serial port.
    pub keyboard: Option<Keyboard>,
    /// Wakes the thread: output waits, input is wanted, or the guest has ended.
    pub wake: Wake,
    /// Signals that end the guest.
    pub signals: Signals,
    /// Ends the guest.
    pub control: Control,
}

impl Console {
    /// Runs until the guest has ended.
    ///
    /// # Errors
    ///
    /// [`Error::Call`] where the terminal or the serial port fails.
    pub fn run(&self, ports: &Ports) -> Result<()> {
        let mut input = Input::default();
        // How long to sleep: until something happens, or until output has waited long enough.
        let mut sleep = None;
        loop {
            // Said before looking: what is written after the look wakes this thread.
            self.output.set_asleep(sleep.is_none());
            if self.output.is_waiting() {
                sleep = Some(output::DELAY);
            }
            let timeout = if input.waiting.is_empty() {
                sleep
            } else {
                sleep.or(Some(RETRY))
            };
            let stdin_ready = self.wait(input.wanted(), timeout)?;
            self.output.set_asleep(false);
            if let Some(signal) = self.signals.take() {
                self.control.end(Outcome::Signal(signal));
            }
            if self.control.ended() {
                return self.output.finish().map_err(failed("writing the console"));
            }
            if stdin_ready {
                self.read_keys(&mut input)?;
            }
            if input.waiting.is_empty() {
                self.hub.take_typed(&mut input.waiting);
            }
            match &self.keyboard {
                Some(keyboard) => keyboard.take(&mut input.waiting),
                None => input.hand_over(ports)?,
            }
            // Behind the byte that it was woken for more will follow: they get their time first.
            let active = sleep.is_none()
                || self
                    .output
                    .write_waiting()
                    .map_err(failed("writing the console"))?;
            sleep = active.then_some(output::DELAY);
        }
    }

    /// Sleeps. Says whether standard input can be read.
    fn wait(&self, read_stdin: bool, timeout: Option<Duration>) -> Result<bool> {
        let stdin = stdin();
        let mut fds = vec![
            PollFd::new(&self.wake, PollFlags::IN),
            PollFd::new(&self.signals, PollFlags::IN),
        ];
        if read_stdin {
            fds.push(PollFd::new(&stdin, PollFlags::IN));
        }
        let timeout = timeout.map(|timeout| Timespec {
            tv_sec: timeout.as_secs() as i64,
            tv_nsec: i64::from(timeout.subsec_nanos()),
        });
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => {
                return Err(Error::call(
                    "waiting for the console",
                    io::Error::from(error),
                ))
            }
        }
        if !fds[0].revents().is_empty() {
            self.wake.clear();
        }
        Ok(fds.get(2).is_some_and(|fd| !fd.revents().is_empty()))
    }

    fn read_keys(&self, input: &mut Input) -> Result<()> {
        let mut bytes = [0; 256];
        let count = match rustix::io::read(stdin(), &mut bytes) {
            Ok(0) => {
                input.ended = true;
                return Ok(());
            }
            Ok(count) => count,
            Err(Errno::INTR | Errno::AGAIN) => return Ok(()),
            // The terminal is gone, or it is not ours to read.
            Err(_) => {
                input.ended = true;
                return Ok(());
            }
        };
        for byte in &bytes[..count] {
            match input.escape.feed(*byte) {
                Key::Guest(byte) => input.waiting.push_back(byte),
                Key::Quit => self.control.end(Outcome::Quit),
                Key::Help => self
                    .output
                    .say(KEYS)
                    .map_err(failed("writing the console"))?,
                Key::Detach | Key::Nothing => {}
            }
        }
        Ok(())
    }
}

/// What was typed and is not the guest's yet.
#[derive(Default)]
struct Input {
    escape: Escape,
    waiting: VecDeque<u8>,
    ended: bool,
}

impl Input {
    /// Whether more can be taken.
    fn wanted(&self) -> bool {
        !self.ended && self.waiting.len() < TYPED
    }

    /// Gives the serial port as much as it takes.
    fn hand_over(&mut self, ports: &Ports) -> Result<()> {
        if self.waiting.is_empty() {
            return Ok(());
        }
        // A CPU keeps it while its output waits to be read.
        let mut serial = match ports.serial.try_lock() {
            Ok(serial) => serial,
            Err(TryLockError::Poisoned(error)) => error.into_inner(),
            Err(TryLockError::WouldBlock) => return Ok(()),
        };
        let room = serial.fifo_capacity().min(self.waiting.len());
        if room > 0 {
            let (bytes, _) = self.waiting.make_contiguous().split_at(room);
            let taken = serial.enqueue_raw_bytes(bytes).map_err(serial_failed)?;
            self.waiting.drain(..taken);
        }
        Ok(())
    }
}
