// SPDX-License-Identifier: GPL-2.0

//! A TAP interface of this host (Documentation/networking/tuntap.rst), with a virtio header before each frame.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;

use rustix::net::{socket, AddressFamily, SocketType};
use virtio_bindings::virtio_net as card;
use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_val};

use super::link::{Gone, Wire};
use super::{HEADER, LONGEST_FRAME, SHORTEST_FRAME};
use crate::devices::virtio::bit;
use crate::error::{failed, say, Error, Result};

const DEVICE: &str = "/dev/net/tun";
/// From linux/sockios.h: an interface's flags.
const SIOCGIFFLAGS: libc::Ioctl = 0x8913;
const SIOCSIFFLAGS: libc::Ioctl = 0x8914;

/// The work that the guest and this host leave to one another: checksums, cutting TCP into segments.
const OFFLOADS: u64 = bit(card::VIRTIO_NET_F_CSUM)
    | bit(card::VIRTIO_NET_F_HOST_TSO4)
    | bit(card::VIRTIO_NET_F_HOST_TSO6)
    | bit(card::VIRTIO_NET_F_GUEST_CSUM)
    | bit(card::VIRTIO_NET_F_GUEST_TSO4)
    | bit(card::VIRTIO_NET_F_GUEST_TSO6);

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
pub(super) fn open(name: &str) -> Result<Tap> {
    let any = socket(AddressFamily::UNIX, SocketType::DGRAM, None)
        .map_err(failed("asking for an interface"))?;
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
    Ok(Tap {
        file,
        packet: vec![0; HEADER + LONGEST_FRAME].into_boxed_slice(),
        length: 0,
    })
}

/// A TAP that is open.
pub(super) struct Tap {
    file: File,
    /// The frame that was read, behind its header, and the length of both; 0 where there is none.
    packet: Box<[u8]>,
    length: usize,
}

impl Wire for Tap {
    fn fill(&mut self) -> std::result::Result<bool, Gone> {
        while self.length < HEADER + SHORTEST_FRAME {
            match self.file.read(&mut self.packet) {
                Ok(count) => self.length = count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(_) => return Err(Gone),
            }
        }
        Ok(true)
    }

    fn frame(&self) -> Option<([u8; HEADER], &[u8])> {
        let (header, frame) = self.packet.get(..self.length)?.split_first_chunk()?;
        Some((*header, frame))
    }

    fn take(&mut self) {
        self.length = 0;
    }

    fn send(&mut self, packet: &mut [u8]) -> std::result::Result<bool, Gone> {
        // Refused is what the interface does not take while it is down, or what is no frame.
        let _ = self.file.write(packet);
        Ok(true)
    }

    fn features(&self) -> u64 {
        OFFLOADS
    }

    fn accept_features(&self, features: u64) {
        let flags = [
            (card::VIRTIO_NET_F_GUEST_CSUM, libc::TUN_F_CSUM),
            (card::VIRTIO_NET_F_GUEST_TSO4, libc::TUN_F_TSO4),
            (card::VIRTIO_NET_F_GUEST_TSO6, libc::TUN_F_TSO6),
        ];
        let accepted = flags
            .iter()
            .filter(|(feature, _)| features & bit(*feature) != 0);
        let wanted = accepted.fold(0, |all, (_, flag)| all | *flag as libc::c_int);
        // A TAP that does not know one of them goes on doing the work itself.
        let _ = set(&self.file, libc::TUNSETOFFLOAD, wanted);
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
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
