// SPDX-License-Identifier: GPL-2.0

//! File descriptors for VMs, vCPUs and what is read of them: anonymous files whose private data is an `Arc<T>`.

use super::wait::WaitQueue;
use crate::bindings;
use core::marker::PhantomData;
use kernel::{
    bindings as kb,
    error::{from_err_ptr, from_result},
    ffi::{c_char, c_int, c_long, c_uint, c_ulong, c_void},
    fs::file::FileDescriptorReservation,
    fs::File,
    mm::virt::VmaNew,
    module::{this_module, ModuleMetadata},
    prelude::*,
    sync::{aref::ARef, Arc, ArcBorrow},
    types::ForeignOwnable,
    uaccess::{UserPtr, UserSlice, UserSliceWriter},
};

/// How such a file is used.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Access {
    /// By ioctls and mappings.
    Control,
    /// It is read, at any place.
    Read,
    /// What comes is read in its order.
    Stream,
}

/// What a read is given.
pub(crate) struct Reading {
    /// Where the bytes go.
    pub(crate) to: UserSliceWriter,
    /// The place in the file.
    pub(crate) position: u64,
    /// It is to wait for nothing (O_NONBLOCK).
    pub(crate) at_once: bool,
}

/// What such a file does.
pub(crate) trait AnonFile: Send + Sync + Sized + 'static {
    /// The name in /proc/PID/fd.
    const NAME: &'static CStr;
    /// The module, which the file keeps loaded.
    type OwnerModule: ModuleMetadata;
    /// How it is used.
    const ACCESS: Access = Access::Control;
    /// An ioctl.
    fn ioctl(_this: ArcBorrow<'_, Self>, _command: u32, _argument: usize) -> Result<isize> {
        Err(ENOTTY)
    }
    /// A read; says how many bytes were written.
    fn read(_this: ArcBorrow<'_, Self>, _reading: Reading) -> Result<usize> {
        Err(EINVAL)
    }
    /// What is woken when there is something to read, and whether there is.
    fn readiness(&self) -> Option<(&WaitQueue, bool)> {
        None
    }
    /// An mmap.
    fn mmap(_this: ArcBorrow<'_, Self>, _vma: &VmaNew) -> Result {
        Err(ENODEV)
    }
    /// The last descriptor was closed.
    fn released(_this: &Arc<Self>) {}
}

struct Operations<T>(PhantomData<T>);

impl<T: AnonFile> Operations<T> {
    const TABLE: kb::file_operations = kb::file_operations {
        owner: this_module::<T::OwnerModule>().as_ptr(),
        unlocked_ioctl: Some(Self::ioctl),
        compat_ioctl: Some(Self::ioctl),
        mmap: Some(Self::mmap),
        read: match T::ACCESS {
            Access::Control => None,
            Access::Read | Access::Stream => Some(Self::read),
        },
        poll: match T::ACCESS {
            Access::Control | Access::Read => None,
            Access::Stream => Some(Self::poll),
        },
        release: Some(Self::release),
        llseek: Some(kb::noop_llseek),
        ..pin_init::zeroed()
    };

    /// # Safety
    ///
    /// `file` was opened by [`open`] for a `T`.
    unsafe extern "C" fn ioctl(file: *mut kb::file, command: c_uint, argument: c_ulong) -> c_long {
        // SAFETY: The file was made by `open` with an `Arc<T>`, which lives until `release`.
        let this = unsafe { Arc::<T>::borrow((*file).private_data) };
        match T::ioctl(this, command, argument) {
            Ok(value) => value,
            Err(error) => error.to_errno() as c_long,
        }
    }

    /// # Safety
    ///
    /// As for `ioctl`; `position` is the caller's own.
    unsafe extern "C" fn read(
        file: *mut kb::file,
        buffer: *mut c_char,
        length: usize,
        position: *mut kb::loff_t,
    ) -> isize {
        // SAFETY: As for `ioctl`; the position is the caller's.
        let (this, position, flags) = unsafe {
            (
                Arc::<T>::borrow((*file).private_data),
                &mut *position,
                (*file).f_flags,
            )
        };
        let result = u64::try_from(*position)
            .map_err(|_| EINVAL)
            .and_then(|position| {
                let reading = Reading {
                    to: UserSlice::new(UserPtr::from_addr(buffer as usize), length).writer(),
                    position,
                    at_once: flags & kb::O_NONBLOCK != 0,
                };
                T::read(this, reading)
            });
        match result {
            Ok(count) => {
                *position = position.saturating_add(count as kb::loff_t);
                count as isize
            }
            Err(error) => error.to_errno() as isize,
        }
    }

    /// # Safety
    ///
    /// As for `ioctl`; `table` is null or the caller's.
    unsafe extern "C" fn poll(file: *mut kb::file, table: *mut kb::poll_table) -> kb::__poll_t {
        // SAFETY: As for `ioctl`.
        let this = unsafe { Arc::<T>::borrow((*file).private_data) };
        if let Some((queue, _)) = this.readiness() {
            // SAFETY: The caller's file and table; the queue is part of what the file owns.
            unsafe { queue.register(file, table) };
        }
        // After the registration, so that nothing is missed.
        match this.readiness() {
            Some((_, true)) => kb::POLLIN | kb::POLLRDNORM,
            _ => 0,
        }
    }

    /// # Safety
    ///
    /// As for `ioctl`; `vma` is being set up.
    unsafe extern "C" fn mmap(file: *mut kb::file, vma: *mut kb::vm_area_struct) -> c_int {
        // SAFETY: As for `ioctl`; the VMA is being set up.
        let (this, vma) = unsafe {
            (
                Arc::<T>::borrow((*file).private_data),
                VmaNew::from_raw(vma),
            )
        };
        from_result(|| T::mmap(this, vma).map(|()| 0))
    }

    /// # Safety
    ///
    /// As for `ioctl`; called once, last.
    unsafe extern "C" fn release(_inode: *mut kb::inode, file: *mut kb::file) -> c_int {
        // SAFETY: As for `ioctl`; the kernel calls this once, last.
        let this = unsafe { Arc::<T>::from_foreign((*file).private_data) };
        T::released(&this);
        0
    }
}

/// A descriptor for a file that is not made yet.
pub(crate) struct Reservation(FileDescriptorReservation);

impl Reservation {
    /// Takes a free descriptor of the current process.
    ///
    /// # Errors
    ///
    /// `EMFILE`, `ENOMEM`.
    pub(crate) fn new() -> Result<Self> {
        FileDescriptorReservation::get_unused_fd_flags(kb::O_CLOEXEC).map(Self)
    }
}

/// Opens a file for `data` and gives its descriptor.
///
/// # Errors
///
/// `ENFILE`, `ENOMEM`.
pub(crate) fn open<T: AnonFile>(
    Reservation(reservation): Reservation,
    data: Arc<T>,
) -> Result<isize> {
    let data: *mut c_void = data.into_foreign();
    // SAFETY: The name and the table live for ever; the table is that of `data`'s type.
    let file = from_err_ptr(unsafe {
        bindings::rvisor_anon_file(
            T::NAME.as_char_ptr(),
            &Operations::<T>::TABLE,
            data,
            T::ACCESS != Access::Control,
            T::ACCESS == Access::Read,
        )
    });
    let file = match file {
        Ok(file) => file,
        Err(error) => {
            // SAFETY: No file took the pointer.
            drop(unsafe { Arc::<T>::from_foreign(data) });
            return Err(error);
        }
    };
    // SAFETY: `rvisor_anon_file` gives a reference to a new file; nobody holds its position.
    let file = unsafe { ARef::from_raw(core::ptr::NonNull::new_unchecked(file.cast::<File>())) };
    let descriptor = reservation.reserved_fd();
    reservation.fd_install(file);
    Ok(descriptor as isize)
}
