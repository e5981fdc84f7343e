// SPDX-License-Identifier: GPL-2.0

//! The guest's output on its way to standard output.
//!
//! A guest writes byte for byte, each an exit; a system call for each would double its cost. So bytes are
//! collected and written a line at a time; what has no end of line yet, a prompt, follows within
//! [`DELAY`], by the console's thread.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::{Filter, Hub, Wake};
use crate::devices::lock;

/// How long a byte may wait.
pub(super) const DELAY: Duration = Duration::from_millis(10);
/// How many bytes may wait.
const MOST: usize = 4096;

struct Shared {
    waiting: Mutex<Vec<u8>>,
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
    /// terminal, unless it is `raw`; `wake` wakes the console's thread.
    ///
    /// # Errors
    ///
    /// No more file descriptors can be had.
    pub fn new(wake: Wake, hub: Hub, here: bool, raw: bool) -> io::Result<Self> {
        // A duplicate of our own: the standard library's handle would look for lines once more.
        let own = || io::stdout().as_fd().try_clone_to_owned().map(File::from);
        let file = here.then(own).transpose()?;
        Ok(Self::with(wake, hub, file, raw))
    }

    /// The same for any file.
    pub(crate) fn with(wake: Wake, hub: Hub, file: Option<File>, raw: bool) -> Self {
        let filter = file
            .as_ref()
            .and_then(|file| Filter::for_output(file, raw))
            .map(Mutex::new);
        Self(Arc::new(Shared {
            waiting: Mutex::new(Vec::with_capacity(MOST)),
            asleep: AtomicBool::new(false),
            wake,
            hub,
            file,
            filter,
        }))
    }

    /// Writes what waits. Says whether there was anything.
    ///
    /// # Errors
    ///
    /// What standard output answers, a closed pipe for one; then what waited is lost.
    pub fn write_waiting(&self) -> io::Result<bool> {
        self.write_locked(&mut lock(&self.0.waiting))
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
        self.write_locked(&mut waiting)?;
        let file = self.0.file.as_ref();
        file.map_or(Ok(()), |file| write_all(file, words))
    }

    /// Tells whether the console's thread sleeps.
    pub fn set_asleep(&self, asleep: bool) {
        self.0.asleep.store(asleep, Ordering::SeqCst);
    }

    fn write_locked(&self, waiting: &mut Vec<u8>) -> io::Result<bool> {
        if waiting.is_empty() {
            return Ok(false);
        }
        self.0.hub.write(waiting);
        if let Some(filter) = &self.0.filter {
            let mut passed = Vec::with_capacity(waiting.len());
            lock(filter).pass(waiting, &mut passed);
            *waiting = passed;
        }
        let result = self.0.file.as_ref().map(|file| write_all(file, waiting));
        waiting.clear();
        result.transpose().map(|_| true)
    }
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut waiting = lock(&self.0.waiting);
        waiting.extend_from_slice(bytes);
        if bytes.contains(&b'\n') || waiting.len() >= MOST {
            self.write_locked(&mut waiting)?;
        } else if self.0.asleep.swap(false, Ordering::SeqCst) {
            self.0.wake.wake();
        }
        Ok(bytes.len())
    }

    /// Does nothing: the serial port asks for it behind each byte.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Writes all, to a file that may be non-blocking because another process set it so.
fn write_all(mut file: &File, mut bytes: &[u8]) -> io::Result<()> {
    use rustix::event::{poll, PollFd, PollFlags};
    while !bytes.is_empty() {
        match file.write(bytes) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(count) => bytes = &bytes[count..],
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                match poll(&mut [PollFd::new(&file, PollFlags::OUT)], None) {
                    Ok(_) | Err(rustix::io::Errno::INTR) => {}
                    Err(error) => return Err(error.into()),
                }
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
