// SPDX-License-Identifier: GPL-2.0
//! A pseudoterminal: the test is the user and the screen, the tool has the other side.

use crate::{check, check_eq, Fail, Outcome};
use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::process::Child;
use std::time::{Duration, Instant};

/// How long one wait for output may be.
const LOOK: Duration = Duration::from_millis(20);

/// The user's end.
pub struct Terminal {
    user: File,
    /// Held, so that the terminal outlives the tool's end and its mode can be read.
    other: File,
    screen: String,
}

impl Terminal {
    /// A new terminal in the mode that the kernel gives.
    pub fn new() -> Result<Self, Fail> {
        let open = |path: &str| {
            OpenOptions::new()
                .read(true)
                .write(true)
                .custom_flags(libc::O_NOCTTY)
                .open(path)
        };
        let user = open("/dev/ptmx")?;
        let (mut number, unlock) = (0_u32, 0_i32);
        // SAFETY: Both ioctls read or write one int at the address given.
        let failed = unsafe {
            libc::ioctl(user.as_raw_fd(), libc::TIOCSPTLCK, &raw const unlock) != 0
                || libc::ioctl(user.as_raw_fd(), libc::TIOCGPTN, &raw mut number) != 0
        };
        if failed {
            return Err(std::io::Error::last_os_error().into());
        }
        Ok(Self {
            user,
            other: open(&format!("/dev/pts/{number}"))?,
            screen: String::new(),
        })
    }

    /// One more descriptor of the tool's side.
    pub fn user_side(&self) -> Result<File, Fail> {
        Ok(self.other.try_clone()?)
    }

    /// Gives it a size.
    pub fn resize(&self, rows: u16, columns: u16) -> Outcome {
        let size = libc::winsize {
            ws_row: rows,
            ws_col: columns,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        // SAFETY: The ioctl reads one winsize.
        if unsafe { libc::ioctl(self.other.as_raw_fd(), libc::TIOCSWINSZ, &raw const size) } != 0 {
            return Err(std::io::Error::last_os_error().into());
        }
        Ok(())
    }

    /// The terminal's mode.
    pub fn mode(&self) -> Result<libc::termios, Fail> {
        let mut mode = MaybeUninit::uninit();
        // SAFETY: `mode` has room for one termios.
        if unsafe { libc::tcgetattr(self.other.as_raw_fd(), mode.as_mut_ptr()) } != 0 {
            return Err(std::io::Error::last_os_error().into());
        }
        // SAFETY: Filled in by the call that succeeded.
        Ok(unsafe { mode.assume_init() })
    }

    /// Types keys.
    pub fn type_keys(&mut self, keys: &[u8]) -> Outcome {
        Ok(self.user.write_all(keys)?)
    }

    /// Reads what comes within [`LOOK`]; says whether something did.
    fn look(&mut self) -> Result<bool, Fail> {
        let mut entry = libc::pollfd {
            fd: self.user.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        let wait = i32::try_from(LOOK.as_millis()).unwrap_or(i32::MAX);
        // SAFETY: `entry` is one valid pollfd.
        if unsafe { libc::poll(&raw mut entry, 1, wait) } <= 0 {
            return Ok(false);
        }
        let mut bytes = [0; 4096];
        let count = self.user.read(&mut bytes)?;
        self.screen
            .push_str(&String::from_utf8_lossy(&bytes[..count]));
        Ok(count > 0)
    }

    /// Reads what comes within [`LOOK`]; gives all that has come, and whether something did.
    pub fn read(&mut self) -> Result<(&str, bool), Fail> {
        let more = self.look()?;
        Ok((&self.screen, more))
    }

    /// Waits until `text` stands on the screen, and forgets all up to it.
    pub fn await_text(&mut self, text: &str, patience: Duration) -> Outcome {
        let end = Instant::now() + patience;
        while Instant::now() < end {
            if let Some(place) = self.screen.find(text) {
                self.screen.drain(..place + text.len());
                return Ok(());
            }
            self.look()?;
        }
        let tail: String = self.screen.lines().rev().take(3).collect();
        Err(Fail::new(format!("no {text:?} on the screen: {tail}")))
    }

    /// Reads until the child has ended and nothing more comes; gives what was read.
    pub fn read_until_idle(
        &mut self,
        child: &mut Child,
        patience: Duration,
    ) -> Result<String, Fail> {
        let end = Instant::now() + patience;
        loop {
            let ended = child.try_wait()?.is_some();
            if !self.look()? && ended {
                return Ok(std::mem::take(&mut self.screen));
            }
            check!(
                Instant::now() < end,
                "the tool does not end; the screen: {}",
                self.screen
            );
        }
    }
}

/// Fails where two modes differ.
pub fn check_same(before: &libc::termios, after: &libc::termios) -> Outcome {
    let parts = |mode: &libc::termios| {
        (
            [mode.c_iflag, mode.c_oflag, mode.c_cflag, mode.c_lflag],
            mode.c_cc,
        )
    };
    check_eq!(
        parts(after),
        parts(before),
        "the terminal's mode afterwards"
    );
    Ok(())
}
