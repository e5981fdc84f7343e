// SPDX-License-Identifier: GPL-2.0
//! An eventfd.

use crate::ktap::Fail;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

/// An eventfd that never blocks.
#[derive(Debug)]
pub struct EventFd(OwnedFd);

impl EventFd {
    /// A new one, with the count 0.
    ///
    /// # Errors
    ///
    /// What eventfd(2) gives.
    pub fn new() -> Result<Self, Fail> {
        // SAFETY: Makes a descriptor.
        let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
        if fd < 0 {
            return Err(std::io::Error::last_os_error().into());
        }
        // SAFETY: The descriptor is new and nobody else's.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// Counts it up by one.
    ///
    /// # Errors
    ///
    /// What write(2) gives.
    pub fn signal(&self) -> Result<(), Fail> {
        let one = 1_u64.to_ne_bytes();
        // SAFETY: Reads 8 bytes of the array.
        if unsafe { libc::write(self.0.as_raw_fd(), one.as_ptr().cast(), 8) } != 8 {
            return Err(std::io::Error::last_os_error().into());
        }
        Ok(())
    }

    /// Its count, which becomes 0.
    pub fn take(&self) -> u64 {
        let mut bytes = [0; 8];
        // SAFETY: Writes 8 bytes of the array. A count of 0 is EAGAIN and leaves them.
        unsafe { libc::read(self.0.as_raw_fd(), bytes.as_mut_ptr().cast(), 8) };
        u64::from_ne_bytes(bytes)
    }

    /// Its count as soon as that is not 0, or 0 after a second of the machine's time.
    pub fn wait(&self) -> u64 {
        let mut poll = libc::pollfd {
            fd: self.0.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        // SAFETY: One structure, as the count says.
        unsafe { libc::poll(&raw mut poll, 1, 1000) };
        self.take()
    }
}

impl AsRawFd for EventFd {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}
