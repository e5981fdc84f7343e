// SPDX-License-Identifier: GPL-2.0

//! The guest's output on its way to standard output.
//!
//! A guest writes byte for byte, each an exit; a system call for each would double its cost. So bytes are
//! collected and written a line at a time; what has no end of line yet, a prompt, follows within
//! [`DELAY`], by the console's thread.
//!
//! Standard output may take nothing for as long as it likes: a pipe that nobody reads. Then the guest waits where it
//! writes, but the console's thread does not, no lock is held, and neither pausing nor ending the machine has to wait.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustix::event::{poll, PollFd, PollFlags, Timespec};
use rustix::io::Errno;

use super::{Filter, Hub, Wake};
use crate::devices::lock;
use crate::machine::Control;

/// How long a byte may wait.
pub(super) const DELAY: Duration = Duration::from_millis(10);
/// How many bytes may wait.
const MOST: usize = 4096;
/// A pipe that can be written takes as many bytes at once (`PIPE_BUF`, pipe(7)).
const PIECE: usize = 4096;
/// How often who waits for standard output looks whether it still has to.
const LOOK: Duration = Duration::from_millis(50);
/// How long standard output may take for the rest when the guest has ended.
const REST: Duration = Duration::from_secs(2);

/// What is on its way.
#[derive(Default)]
struct Waiting {
    /// As the guest wrote it; nobody has it yet.
    new: Vec<u8>,
    /// What the clients have already, for standard output, through the filter.
    passed: Vec<u8>,
}

impl Waiting {
    fn is_empty(&self) -> bool {
        self.new.is_empty() && self.passed.is_empty()
    }
}

struct Shared {
    waiting: Mutex<Waiting>,
    control: Control,
    /// The console's thread sleeps and must be woken for output.
    asleep: AtomicBool,
    wake: Wake,
    hub: Hub,
    /// Standard output; none where the machine runs detached.
    file: Option<File>,
    /// What may pass to the terminal, where the file is one.
    filter: Option<Mutex<Filter>>,
}

/// A handle of the output.
#[derive(Clone)]
pub struct Output(Arc<Shared>);

impl Output {
    /// Writes to the clients of `hub`, and to standard output where `here`, through a [`Filter`] where that is a
    /// terminal, unless it is `raw`; `wake` wakes the console's thread. Nothing waits for standard output while
    /// `control` has the guest paused or ended.
    ///
    /// # Errors
    ///
    /// No more file descriptors can be had.
    pub fn new(wake: Wake, hub: Hub, here: bool, raw: bool, control: Control) -> io::Result<Self> {
        // A duplicate of our own: the standard library's handle would look for lines once more.
        let own = || io::stdout().as_fd().try_clone_to_owned().map(File::from);
        let file = here.then(own).transpose()?;
        Ok(Self::with(wake, hub, file, raw, control))
    }

    /// The same for any file.
    pub(crate) fn with(
        wake: Wake,
        hub: Hub,
        file: Option<File>,
        raw: bool,
        control: Control,
    ) -> Self {
        let filter = file
            .as_ref()
            .and_then(|file| Filter::for_output(file, raw))
            .map(Mutex::new);
        Self(Arc::new(Shared {
            waiting: Mutex::default(),
            control,
            asleep: AtomicBool::new(false),
            wake,
            hub,
            file,
            filter,
        }))
    }

    /// Writes what waits, as far as standard output takes it at once. Says whether there was anything.
    ///
    /// # Errors
    ///
    /// What standard output answers, a closed pipe for one; then what waited is lost.
    pub fn write_waiting(&self) -> io::Result<bool> {
        let mut waiting = lock(&self.0.waiting);
        let any = !waiting.is_empty();
        self.push(&mut waiting).map(|()| any)
    }

    /// Writes the rest when the guest has ended. What standard output does not take for [`REST`] is dropped.
    ///
    /// # Errors
    ///
    /// As [`Self::write_waiting`].
    pub fn finish(&self) -> io::Result<()> {
        let until = Instant::now() + REST;
        while self.write_waiting()? && self.is_waiting() && Instant::now() < until {
            self.is_ready(LOOK)?;
        }
        Ok(())
    }

    /// Whether anything waits.
    #[must_use]
    pub fn is_waiting(&self) -> bool {
        !lock(&self.0.waiting).is_empty()
    }

    /// Writes words of our own, which pass as they are.
    ///
    /// # Errors
    ///
    /// As [`Self::write_waiting`].
    pub fn say(&self, words: &[u8]) -> io::Result<()> {
        let mut waiting = lock(&self.0.waiting);
        self.push(&mut waiting)?;
        if self.0.file.is_some() {
            waiting.passed.extend_from_slice(words);
        }
        self.push(&mut waiting)
    }

    /// Tells whether the console's thread sleeps.
    pub fn set_asleep(&self, asleep: bool) {
        self.0.asleep.store(asleep, Ordering::SeqCst);
    }

    /// Hands on what is new, and gives standard output what it takes without waiting.
    fn push(&self, waiting: &mut Waiting) -> io::Result<()> {
        let Waiting { new, passed } = waiting;
        if !new.is_empty() {
            self.0.hub.write(new);
            match (&self.0.file, &self.0.filter) {
                (None, _) => {}
                (Some(_), None) => passed.extend_from_slice(new),
                (Some(_), Some(filter)) => lock(filter).pass(new, passed),
            }
            new.clear();
        }
        let Some(mut file) = self.0.file.as_ref() else {
            return Ok(());
        };
        while !passed.is_empty() && self.is_ready(Duration::ZERO)? {
            let result = match file.write(&passed[..passed.len().min(PIECE)]) {
                Ok(0) => Err(io::ErrorKind::WriteZero.into()),
                result => result,
            };
            match result {
                Ok(count) => drop(passed.drain(..count)),
                // Whoever waits looks at the machine before the next try.
                Err(error) if error.kind() == io::ErrorKind::Interrupted => break,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => {
                    passed.clear();
                    return Err(error);
                }
            }
        }
        Ok(())
    }

    /// Whether standard output takes something, or will say what is wrong; waits for it no longer than `timeout`.
    fn is_ready(&self, timeout: Duration) -> io::Result<bool> {
        let Some(file) = &self.0.file else {
            return Ok(true);
        };
        let timeout = Timespec {
            tv_sec: timeout.as_secs() as i64,
            tv_nsec: i64::from(timeout.subsec_nanos()),
        };
        match poll(&mut [PollFd::new(file, PollFlags::OUT)], Some(&timeout)) {
            Ok(ready) => Ok(ready > 0),
            Err(Errno::INTR) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// Holds the guest up until no more waits than may, or the machine is to pause or to end.
    fn await_room(&self) -> io::Result<()> {
        while !self.0.control.ended() && !self.0.control.paused() {
            self.is_ready(LOOK)?;
            let mut waiting = lock(&self.0.waiting);
            self.push(&mut waiting)?;
            if waiting.passed.len() <= MOST {
                break;
            }
        }
        Ok(())
    }
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut waiting = lock(&self.0.waiting);
        waiting.new.extend_from_slice(bytes);
        if bytes.contains(&b'\n') || waiting.new.len() >= MOST {
            self.push(&mut waiting)?;
        }
        let (any, full) = (!waiting.is_empty(), waiting.passed.len() > MOST);
        drop(waiting);
        if any && self.0.asleep.swap(false, Ordering::SeqCst) {
            self.0.wake.wake();
        }
        if full {
            self.await_room()?;
        }
        Ok(bytes.len())
    }

    /// Does nothing: the serial port asks for it behind each byte.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::outcome::Outcome;
    use rustix::pipe::pipe;
    use std::thread;

    /// A pipe that nobody reads holds the guest up, but neither its pausing nor its end; nor are others held up.
    #[test]
    fn output_that_nobody_reads_holds_nothing_up() {
        for end in [false, true] {
            let (reader, writer) = pipe().expect("a pipe");
            let wake = Wake::new().expect("an eventfd");
            let hub = Hub::new(wake.clone());
            let (control, _outcomes) = Control::new();
            let file = Some(File::from(writer));
            let output = Output::with(wake, hub, file, false, control.clone());
            let guest = thread::spawn({
                let (mut output, control) = (output.clone(), control.clone());
                move || {
                    let mut written = 0;
                    while !control.ended() && !control.paused() {
                        output.write_all(&[b'x'; 1023]).expect("it waits");
                        output.write_all(b"\n").expect("it waits");
                        written += 1024;
                    }
                    written
                }
            });
            thread::sleep(LOOK * 4);
            assert!(!guest.is_finished(), "it is held up");
            // The console's thread goes on.
            assert!(output.write_waiting().expect("it does not wait"));
            output.say(b"help").expect("it does not wait");
            if end {
                control.end(Outcome::Quit);
            } else {
                control.set_paused("a test");
            }
            let written = guest.join().expect("it goes on");
            assert!(written < 128 << 10, "{written} bytes");
            let start = Instant::now();
            output.finish().expect("it gives up");
            assert!((REST..REST * 4).contains(&start.elapsed()));
            // All is there for a reader that comes after all.
            let reader = thread::spawn(move || {
                let mut bytes = Vec::new();
                io::Read::read_to_end(&mut File::from(reader), &mut bytes).expect("a pipe");
                bytes.len()
            });
            output.finish().expect("it is read");
            drop(output);
            assert_eq!(reader.join().expect("it reads"), written + 4);
        }
    }
}
