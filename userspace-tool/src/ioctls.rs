// SPDX-License-Identifier: GPL-2.0

//! The ioctls that `kvm-ioctls` lacks.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};

use vmm_sys_util::ioctl::ioctl;

const KVM_GET_STATS_FD: libc::c_ulong = without_argument(0xae, 0xce);
/// Of include/uapi/rvisor.h.
const RVISOR_TRACE_OPEN: libc::c_ulong = without_argument(0xbd, 0x00);

/// The kernel's `_IO`.
const fn without_argument(kind: u8, number: u8) -> libc::c_ulong {
    ((kind as libc::c_ulong) << 8) | number as libc::c_ulong
}

/// The binary statistics of a VM or virtual CPU (Documentation/virt/kvm/api.rst, 4.134).
///
/// # Errors
///
/// What the hypervisor answers: `ENOTTY` where it has none.
pub fn statistics(of: &impl AsRawFd) -> io::Result<File> {
    open(of, KVM_GET_STATS_FD)
}

/// The stream of a virtual CPU's exits.
///
/// # Errors
///
/// `ENOTTY` where the hypervisor has none, `EBUSY` where somebody else has it.
pub fn trace(of: &impl AsRawFd) -> io::Result<File> {
    open(of, RVISOR_TRACE_OPEN)
}

fn open(of: &impl AsRawFd, request: libc::c_ulong) -> io::Result<File> {
    // SAFETY: Both requests take no argument, and touch no memory of this process.
    let descriptor = unsafe { ioctl(of, request) };
    if descriptor < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: Both give a new descriptor, which nobody else knows of.
    Ok(unsafe { File::from_raw_fd(descriptor) })
}
