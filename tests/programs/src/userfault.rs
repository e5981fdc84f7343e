// SPDX-License-Identifier: GPL-2.0
//! Memory whose missing pages userspace supplies (userfaultfd(2)).

use crate::ktap::Fail;
use crate::mapping::Mapping;
use crate::raw::{ioctl_with, owned, Errno};
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Duration;

/// The type byte of these ioctls (include/uapi/linux/userfaultfd.h).
const UFFDIO: u64 = 0xaa;
const fn iowr(nr: u64, words: u64) -> u64 {
    (3 << 30) | ((8 * words) << 16) | (UFFDIO << 8) | nr
}
const UFFDIO_API: u64 = iowr(0x3f, 3);
const UFFDIO_REGISTER: u64 = iowr(0x00, 4);
const UFFDIO_COPY: u64 = iowr(0x03, 5);
const UFFD_API: u64 = 0xaa;
const MODE_MISSING: u64 = 1;
/// `struct uffd_msg`.
const MESSAGE: usize = 32;
const EVENT_PAGEFAULT: u8 = 0x12;

/// A userfaultfd for the missing pages of one mapping.
#[derive(Debug)]
pub struct Userfault(OwnedFd);

impl Userfault {
    /// Takes the missing pages of `memory` over.
    ///
    /// # Errors
    ///
    /// A skip where the kernel has no userfaultfd; else the errno.
    pub fn new(memory: &Mapping) -> Result<Self, Fail> {
        // SAFETY: Takes flags only and gives a new descriptor.
        let made = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC) };
        if made < 0 {
            let error = std::io::Error::last_os_error();
            return Err(Fail::skip(format!("no userfaultfd: {error}")));
        }
        let made = i32::try_from(made).map_err(|error| Fail::new(error.to_string()))?;
        let fd = owned(Ok(made))?;
        ioctl_with(&fd, UFFDIO_API, &mut [UFFD_API, 0, 0])?;
        let mut range = [memory.start(), memory.len() as u64, MODE_MISSING, 0];
        ioctl_with(&fd, UFFDIO_REGISTER, &mut range)?;
        Ok(Self(fd))
    }

    /// Waits for a thread that has met a missing page: its address, or `None` where none came in time.
    ///
    /// # Errors
    ///
    /// What poll(2) and read(2) give.
    pub fn wait(&self, limit: Duration) -> Result<Option<u64>, Fail> {
        let mut entry = libc::pollfd {
            fd: self.0.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        let limit = i32::try_from(limit.as_millis()).unwrap_or(i32::MAX);
        // SAFETY: `entry` is one valid pollfd.
        match unsafe { libc::poll(&raw mut entry, 1, limit) } {
            0 => return Ok(None),
            1.. => {}
            _ => return Err(std::io::Error::last_os_error().into()),
        }
        let mut message = [0_u8; MESSAGE];
        // SAFETY: There is room for one message.
        let got = unsafe { libc::read(self.0.as_raw_fd(), message.as_mut_ptr().cast(), MESSAGE) };
        if got != MESSAGE as isize || message[0] != EVENT_PAGEFAULT {
            return Err(Fail::new(format!("{got} bytes, event {:#x}", message[0])));
        }
        let address = message[16..24].iter().rev();
        Ok(Some(
            address.fold(0, |word, byte| (word << 8) | u64::from(*byte)),
        ))
    }

    /// Supplies the page at `address`, filled with `word`, and wakes who waits for it.
    ///
    /// # Errors
    ///
    /// The errno.
    pub fn supply(&self, address: u64, word: u64) -> Result<(), Errno> {
        #[repr(align(4096))]
        struct Page([u64; 512]);
        let page = Page([word; 512]);
        let source = page.0.as_ptr() as u64;
        let mut copy = [address & !4095, source, 4096, 0, 0];
        ioctl_with(&self.0, UFFDIO_COPY, &mut copy).map(|_| ())
    }
}
