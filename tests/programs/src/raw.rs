// SPDX-License-Identifier: GPL-2.0
//! The device under test and ioctls made by hand, for arguments that no library would send.

use crate::ktap::Fail;
use crate::uapi;
use kvm_ioctls::Kvm;
use std::ffi::CString;
use std::mem::size_of;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

/// Where the hypervisor's device node is.
#[derive(Clone, Debug)]
pub struct Device(CString);

impl Device {
    /// The device and the words that are no option, of the command line.
    ///
    /// # Errors
    ///
    /// A text for the user where the arguments make no sense.
    pub fn from_arguments() -> Result<(Self, Vec<String>), String> {
        let mut path = String::from("/dev/rvisor");
        let mut names = Vec::new();
        let mut arguments = std::env::args().skip(1);
        while let Some(argument) = arguments.next() {
            if argument == "--device" {
                path = arguments.next().ok_or("--device needs a path")?;
            } else if argument.starts_with('-') {
                return Err(format!(
                    "{argument}: the options are --device PATH; then names of tests"
                ));
            } else {
                names.push(argument);
            }
        }
        let path = CString::new(path).map_err(|error| error.to_string())?;
        Ok((Self(path), names))
    }

    /// The path as text.
    pub fn path(&self) -> String {
        self.0.to_string_lossy().into_owned()
    }

    /// Opens the device through `kvm-ioctls`.
    ///
    /// # Errors
    ///
    /// What open(2) gives.
    pub fn kvm(&self) -> Result<Kvm, Fail> {
        Ok(Kvm::new_with_path(&self.0)?)
    }

    /// Opens the device.
    ///
    /// # Errors
    ///
    /// What open(2) gives.
    pub fn open(&self) -> Result<OwnedFd, std::io::Error> {
        // SAFETY: The path is a C string.
        let fd = unsafe { libc::open(self.0.as_ptr(), libc::O_RDWR | libc::O_CLOEXEC) };
        if fd < 0 {
            return Err(std::io::Error::last_os_error());
        }
        // SAFETY: The descriptor is new and nobody else's.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    }
}

/// An errno that prints as its name.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Errno(pub i32);

impl std::fmt::Debug for Errno {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", std::io::Error::from_raw_os_error(self.0))
    }
}

impl From<Errno> for Fail {
    fn from(error: Errno) -> Self {
        Self::new(format!("{error:?}"))
    }
}

fn answer(found: i32) -> Result<i32, Errno> {
    if found >= 0 {
        return Ok(found);
    }
    Err(Errno(
        std::io::Error::last_os_error().raw_os_error().unwrap_or(0),
    ))
}

/// An ioctl whose argument is a value, or an address where nothing is mapped.
///
/// # Errors
///
/// The errno.
pub fn ioctl(fd: &impl AsRawFd, request: u64, argument: u64) -> Result<i32, Errno> {
    assert!(
        uapi::size_of_request(request) == 0 || !(4096..1 << 47).contains(&argument),
        "{argument:#x} could be an address"
    );
    // SAFETY: The argument is no address of this process's memory.
    answer(unsafe { libc::ioctl(fd.as_raw_fd(), request, argument) })
}

/// An ioctl that reads or writes one structure.
///
/// # Errors
///
/// The errno.
pub fn ioctl_with<T>(fd: &impl AsRawFd, request: u64, argument: &mut T) -> Result<i32, Errno> {
    assert!(uapi::size_of_request(request) <= size_of::<T>());
    // SAFETY: The structure is at least as large as what the request says that it moves.
    answer(unsafe { libc::ioctl(fd.as_raw_fd(), request, std::ptr::from_mut(argument)) })
}

/// An ioctl whose structure ends in an array: `words` holds all of it.
///
/// # Errors
///
/// The errno.
pub fn ioctl_words(fd: &impl AsRawFd, request: u64, words: &mut [u32]) -> Result<i32, Errno> {
    // SAFETY: The header in front tells the kernel how long the array is, and each caller here makes
    // both together.
    answer(unsafe { libc::ioctl(fd.as_raw_fd(), request, words.as_mut_ptr()) })
}

/// A descriptor that an ioctl returned.
///
/// # Errors
///
/// The errno.
pub fn owned(result: Result<i32, Errno>) -> Result<OwnedFd, Errno> {
    // SAFETY: The kernel made the descriptor just now for this caller alone.
    result.map(|fd: RawFd| unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Fails where the result is not this errno.
///
/// # Errors
///
/// Says what came instead.
pub fn expect_errno<T: std::fmt::Debug>(
    result: Result<T, Errno>,
    errno: i32,
    what: &str,
) -> Result<(), Fail> {
    match result {
        Err(found) if found == Errno(errno) => Ok(()),
        other => Err(Fail::new(format!(
            "{what}: {other:?}, expected {:?}",
            Errno(errno)
        ))),
    }
}
