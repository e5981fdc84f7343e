// SPDX-License-Identifier: GPL-2.0

//! A TAP interface of this host (Documentation/networking/tuntap.rst), with a virtio header before each frame.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;

use rustix::net::{socket, AddressFamily, SocketType};
use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_val};

use super::{Offloads, HEADER};
use crate::error::{failed, say, Error, Result};

const DEVICE: &str = "/dev/net/tun";
/// From linux/sockios.h: an interface's flags.
const SIOCGIFFLAGS: libc::Ioctl = 0x8913;
const SIOCSIFFLAGS: libc::Ioctl = 0x8914;

/// `struct ifreq`: an interface's name, and a union that begins with its flags.
#[repr(C)]
struct Interface {
    name: [u8; libc::IFNAMSIZ],
    flags: i16,
    rest: [u8; 22],
}

impl Interface {
    fn named(name: &str) -> Self {
        let mut bytes = [0; libc::IFNAMSIZ];
        // One byte at least stays zero: net::interface_name has seen to the length.
        for (to, from) in bytes[..libc::IFNAMSIZ - 1].iter_mut().zip(name.bytes()) {
            *to = from;
        }
        Self {
            name: bytes,
            flags: 0,
            rest: [0; 22],
        }
    }

    /// Makes one of the requests that take a `struct ifreq` and may write to it.
    fn request(&mut self, file: &impl AsRawFd, request: libc::Ioctl) -> io::Result<()> {
        debug_assert!([libc::TUNSETIFF, SIOCGIFFLAGS, SIOCSIFFLAGS].contains(&request));
        // There is no safe way: no crate here has these requests.
        #[allow(unsafe_code)]
        // SAFETY: The requests that this module makes read and write a `struct ifreq`, which is what `self` is
        // (40 bytes), and keep no address of it.
        let result = unsafe { ioctl_with_mut_ref(file, request, self) };
        done(result)
    }
}

const _: () = assert!(size_of::<Interface>() == 40);

/// Sets a number of a TAP's.
fn set(file: &File, request: libc::Ioctl, value: libc::c_int) -> io::Result<()> {
    #[allow(unsafe_code)]
    // SAFETY: TUNSETVNETHDRSZ reads an `int` through the pointer and keeps no address of it; TUNSETOFFLOAD takes
    // a number and no address. They are the only requests made here.
    let result = unsafe {
        match request {
            libc::TUNSETVNETHDRSZ => ioctl_with_mut_ref(file, request, &mut { value }),
            libc::TUNSETOFFLOAD => ioctl_with_val(file, request, value as libc::c_ulong),
            _ => return Err(io::ErrorKind::Unsupported.into()),
        }
    };
    done(result)
}

fn done(result: libc::c_int) -> io::Result<()> {
    match result {
        0.. => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Opens the TAP with that name. Where there is none it is made, and goes when it is closed.
///
/// # Errors
///
/// [`Error::Input`] where it is no TAP, is busy, or may not be used or made; [`Error::Call`] for the rest.
pub(super) fn open(name: &str) -> Result<File> {
    let what = "asking for an interface";
    let any = socket(AddressFamily::UNIX, SocketType::DGRAM, None)
        .map_err(|error| Error::call(what, io::Error::from(error)))?;
    let mut interface = Interface::named(name);
    let exists = interface.request(&any, SIOCGIFFLAGS).is_ok();
    let is_up = i32::from(interface.flags) & libc::IFF_UP != 0;

    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(DEVICE)
        .map_err(|error| refused_device(&error))?;
    let mut wanted = Interface::named(name);
    wanted.flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as i16;
    wanted
        .request(&file, libc::TUNSETIFF)
        .map_err(|error| refused(name, exists, error))?;
    set(&file, libc::TUNSETVNETHDRSZ, HEADER as libc::c_int).map_err(failed("setting up a TAP"))?;
    set(&file, libc::TUNSETOFFLOAD, 0).map_err(failed("setting up a TAP"))?;
    if !exists {
        interface.flags = libc::IFF_UP as i16;
        interface
            .request(&any, SIOCSIFFLAGS)
            .map_err(failed("switching a TAP on"))?;
    } else if !is_up {
        say(format_args!("warning: {name} is down, so nothing comes through; 'ip link set {name} up' changes that"));
    }
    Ok(file)
}

/// Lets frames come that the guest sums up or cuts to size itself.
pub(super) fn set_offloads(file: &File, offloads: Offloads) -> io::Result<()> {
    let flags = [
        (offloads.checksum, libc::TUN_F_CSUM),
        (offloads.segments4, libc::TUN_F_TSO4),
        (offloads.segments6, libc::TUN_F_TSO6),
    ];
    let wanted = flags.iter().filter(|(on, _)| *on);
    set(
        file,
        libc::TUNSETOFFLOAD,
        wanted.fold(0, |all, (_, flag)| all | *flag as libc::c_int),
    )
}

fn refused_device(error: &io::Error) -> Error {
    let next = match error.kind() {
        io::ErrorKind::PermissionDenied => "run as root, or let root give you the right to it",
        _ => "load its driver as root: 'modprobe tun'",
    };
    Error::input(format!("--net tap=... needs {DEVICE}: {error}"), next)
}

fn refused(name: &str, exists: bool, error: io::Error) -> Error {
    let add = format!("'ip tuntap add {name} mode tap user USER'");
    match error.raw_os_error() {
        Some(libc::EBUSY) => Error::input(
            format!("TAP {name} is in use by another program"),
            "end that one, or name another TAP",
        ),
        Some(libc::EPERM | libc::EACCES) if exists => Error::input(
            format!("TAP {name} is not yours"),
            format!("run as its owner or as root; root makes one for a user with {add}"),
        ),
        Some(libc::EPERM | libc::EACCES) => Error::input(
            format!("there is no TAP {name}, and you may not make one"),
            format!("let root make it: {add}, then 'ip link set {name} up'"),
        ),
        Some(libc::EINVAL) if exists => Error::input(
            format!("{name} is no TAP, or one of several queues"),
            format!("name another; root makes one with {add}"),
        ),
        _ => Error::call(format!("opening TAP {name}"), error),
    }
}
