// SPDX-License-Identifier: GPL-2.0

//! The guest's console: standard input to its serial port, its output to standard output, and the keys and
//! signals that end it. Clients that are attached over the machine's socket share it.

mod attach;
mod filter;
mod keys;
mod output;
mod terminal;
mod wake;

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, TryLockError};
use std::time::Duration;

use rustix::pipe::{pipe_with, PipeFlags};
use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGXFSZ};

use crate::arguments::{ConsoleKind, RunOptions};
use crate::devices::virtio::{self, console::Keyboard};
use crate::devices::Ports;
use crate::error::{failed, Result};
use crate::machine::Control;
use crate::outcome::Outcome;
pub use attach::attach;
pub use filter::Filter;
use keys::{Key, Keys};
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
        let (pipe, writer) =
            pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK).map_err(failed(what))?;
        let last = Arc::new(AtomicUsize::new(0));
        for signal in [SIGHUP, SIGINT, SIGQUIT, SIGTERM] {
            // Actions run in the order in which they were registered: the number is there before the byte.
            signal_hook::flag::register_usize(signal, Arc::clone(&last), signal as usize)
                .map_err(failed(what))?;
            let writer = writer.try_clone().map_err(failed(what))?;
            signal_hook::low_level::pipe::register(signal, writer).map_err(failed(what))?;
        }
        // That a file is larger than it may be is what the write answers, and no end.
        signal_hook::flag::register(SIGXFSZ, Arc::default()).map_err(failed(what))?;
        Ok(Self { last, pipe })
    }

    /// Can be read no more until the next signal; the last one can be taken all the same.
    pub fn await_next(&self) {
        // The pipe says no more than that there is one: what is written later is about a later one.
        let _ = rustix::io::read(&self.pipe, &mut [0_u8; 64]);
    }

    /// The last signal that came since the last look.
    #[must_use]
    pub fn take(&self) -> Option<u8> {
        self.await_next();
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

/// The guest's console.
pub struct Console {
    /// The guest's output, and what its clients type.
    pub output: Output,
    /// Wakes the console's thread: input has come or is wanted, or the guest has ended.
    pub wake: Wake,
    /// Where what is typed goes instead of to the serial port.
    keyboard: Option<Keyboard>,
    control: Control,
}

impl Console {
    /// That of a machine with these options, which `control` ends.
    ///
    /// # Errors
    ///
    /// No more file descriptors can be had.
    pub fn new(options: &RunOptions, control: &Control) -> io::Result<Self> {
        let wake = Wake::new()?;
        // A duplicate of our own: the standard library's handle would look for lines once more.
        let here = || io::stdout().as_fd().try_clone_to_owned().map(File::from);
        let here = (!options.detached).then(here).transpose()?;
        Ok(Self {
            output: Output::new(wake.clone(), here, options.raw_console, control.clone()),
            keyboard: match options.console {
                ConsoleKind::Serial => None,
                ConsoleKind::Virtio => Some(Keyboard::new(wake.clone())?),
            },
            wake,
            control: control.clone(),
        })
    }

    /// The guest's virtio console, where it has one.
    #[must_use]
    pub fn device(&self) -> Option<virtio::console::Console> {
        let keyboard = self.keyboard.clone()?;
        Some(virtio::console::Console::new(keyboard, self.output.clone()))
    }

    /// The console's thread: runs until the guest has ended, be it by one of `signals`.
    ///
    /// # Errors
    ///
    /// [`Error::Call`](crate::error::Error::Call) where the terminal or the serial port fails.
    pub fn run(&self, signals: &Signals, ports: &Ports) -> Result<()> {
        self.output.start()?;
        let mut keys = Keys::default();
        // What was typed and is not the guest's yet.
        let mut waiting = VecDeque::new();
        loop {
            let retry = (!waiting.is_empty()).then_some(RETRY);
            let room = waiting.len() < TYPED;
            let (woken, typed) = keys.wait(&self.wake, signals, room, retry)?;
            if woken {
                self.wake.clear();
            }
            if let Some(signal) = signals.take() {
                self.control.end(Outcome::Signal(signal));
            }
            if self.control.ended() {
                return Ok(());
            }
            for key in typed {
                match key {
                    Key::Guest(byte) => waiting.push_back(byte),
                    Key::Quit => self.control.end(Outcome::Quit),
                    Key::Help => self.output.say(KEYS),
                    Key::Detach => {}
                }
            }
            if waiting.is_empty() {
                self.output.take_typed(&mut waiting);
            }
            match &self.keyboard {
                Some(keyboard) => keyboard.take(&mut waiting),
                None => hand_over(&mut waiting, ports)?,
            }
        }
    }
}

/// Gives the serial port as much as it takes.
fn hand_over(waiting: &mut VecDeque<u8>, ports: &Ports) -> Result<()> {
    // A CPU keeps it while its output waits to be read.
    let mut serial = match ports.serial.try_lock() {
        Ok(serial) => serial,
        Err(TryLockError::Poisoned(error)) => error.into_inner(),
        Err(TryLockError::WouldBlock) => return Ok(()),
    };
    let room = serial.fifo_capacity().min(waiting.len());
    if room > 0 {
        let bytes = &waiting.make_contiguous()[..room];
        let taken = serial.enqueue_raw_bytes(bytes);
        let taken = taken.map_err(failed("the serial port"))?;
        waiting.drain(..taken);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread;
    use vmm_sys_util::signal::Killable;

    /// Unless it is caught, it ends this process.
    #[test]
    fn a_file_that_is_too_large_ends_nothing() {
        let signals = Signals::catch().expect("it can be caught");
        let thread = thread::spawn(thread::park);
        thread.kill(SIGXFSZ).expect("it runs");
        thread.thread().unpark();
        thread.join().expect("it ends well");
        assert_eq!(signals.take(), None);
    }
}
