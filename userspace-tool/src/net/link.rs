// SPDX-License-Identifier: GPL-2.0

//! This host's end of a network card, whatever it is joined to.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::fs::{flock, FlockOperation};
use rustix::io::Errno;
use rustix::net::sockopt::socket_peercred;
use rustix::net::{accept_with, SocketFlags};
use rustix::process::geteuid;

use super::stream::Stream;
use super::{tap, user, Joined, Mac, NetOptions, HEADER};
use crate::error::{failed, say, Error, Result};

/// How long another machine may take to look who is at a path, and how often that is looked at.
const PATIENCE: Duration = Duration::from_secs(5);
const TRY_AGAIN: Duration = Duration::from_millis(10);
/// How many of those who come are looked at in a row.
const COMERS: usize = 16;

/// What of a frame the one who gets it does, so that it need not be done before.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offloads {
    /// The checksums of TCP and UDP.
    pub checksum: bool,
    /// Cutting TCP over IPv4 into segments.
    pub segments4: bool,
    /// The same over IPv6.
    pub segments6: bool,
}

/// The other side is gone, or what it sends is no frame.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Gone;

/// What frames go to and come from. Nothing here blocks.
pub(super) trait Wire: AsFd + Send {
    /// Reads until there is a whole frame. Says whether there is one.
    fn fill(&mut self) -> std::result::Result<bool, Gone>;

    /// That frame, with its virtio header; it stays until [`Self::take`].
    fn frame(&self) -> Option<([u8; HEADER], &[u8])>;

    /// That frame is done with.
    fn take(&mut self);

    /// Sends the frame behind the virtio header that `packet` begins with, which may be overwritten. Says whether it
    /// was taken: one that was not can be sent again when there is room.
    fn send(&mut self, packet: &mut [u8]) -> std::result::Result<bool, Gone>;

    /// Sends what is left of a frame that was sent in part. Says whether nothing is left.
    fn flush(&mut self) -> std::result::Result<bool, Gone> {
        Ok(true)
    }

    /// Whether something is left.
    fn has_rest(&self) -> bool {
        false
    }

    /// Whether the other side can do more with a frame than pass it on.
    fn has_offloads(&self) -> bool {
        false
    }

    /// Says which work is left to the guest in frames that come.
    fn set_offloads(&self, _offloads: Offloads) {}
}

/// One end of a network.
///
/// It is a file descriptor to poll: readable when frames have come, or when there is room for one that had none.
pub struct Link {
    epoll: OwnedFd,
    /// None while nobody is there: then frames are lost.
    wire: Option<Box<dyn Wire>>,
    /// Where another machine may come, and the path.
    listener: Option<(UnixListener, PathBuf)>,
    /// Room is waited for.
    awaits_room: bool,
    /// What messages call it.
    name: String,
}

impl Link {
    /// Opens what the card is joined to, and gives it with an address for the card: the one of `options`, or
    /// one made of `machine`, which tells this machine from the others of this host, and of `options`.
    ///
    /// # Errors
    ///
    /// [`Error::Input`] where that is not there or may not be used; then nothing is left behind.
    pub fn open(options: &NetOptions, machine: &str, number: usize) -> Result<(Self, Mac)> {
        let mut link = Self {
            epoll: epoll::create(CreateFlags::CLOEXEC)
                .map_err(failed("making an epoll instance"))?,
            wire: None,
            listener: None,
            awaits_room: false,
            name: options.joined.to_string(),
        };
        let mut role = "";
        match &options.joined {
            Joined::Tap(name) => {
                role = name;
                link.join(Box::new(tap::open(name)?));
            }
            Joined::User(forward) => link.join(Box::new(Stream::new(user::start(forward)?))),
            Joined::Socket(path) => match meet(path)? {
                Met::Other(socket) => {
                    role = "second";
                    link.join(Box::new(Stream::new(socket.into())));
                }
                Met::Nobody(socket) => {
                    role = "first";
                    link.watch(&socket);
                    link.listener = Some((socket, path.clone()));
                }
            },
        }
        let mac = options.mac.unwrap_or_else(|| {
            let host = fs::read_to_string("/etc/machine-id").unwrap_or_default();
            Mac::derived(&[host.trim(), machine, role, &number.to_string()])
        });
        Ok((link, mac))
    }

    /// Whether the other side can do more with a frame than pass it on.
    #[must_use]
    pub fn has_offloads(&self) -> bool {
        self.wire.as_ref().is_some_and(|wire| wire.has_offloads())
    }

    /// Says which work is left to the guest in frames that come. Without offloads it does nothing.
    pub fn set_offloads(&mut self, offloads: Offloads) {
        if let Some(wire) = &self.wire {
            wire.set_offloads(offloads);
        }
    }

    /// The next frame that has come, with its virtio header; it stays the next until [`Self::take`].
    pub fn front(&mut self) -> Option<([u8; HEADER], &[u8])> {
        self.accept();
        match self.wire.as_mut()?.fill() {
            Ok(true) => self.wire.as_ref()?.frame(),
            Ok(false) => None,
            Err(Gone) => {
                self.lose();
                None
            }
        }
    }

    /// The next frame is done with.
    pub fn take(&mut self) {
        if let Some(wire) = &mut self.wire {
            wire.take();
        }
    }

    /// Sends a frame behind its virtio header. Says whether it was taken; one that was not can be sent again
    /// when there is room. What can't be sent at all is lost, as on a wire. The header may be overwritten.
    pub fn send(&mut self, packet: &mut [u8]) -> bool {
        self.accept();
        let Some(wire) = &mut self.wire else {
            return true;
        };
        match wire.send(packet) {
            Ok(taken) => {
                let room = taken && !wire.has_rest();
                self.await_room(!room);
                taken
            }
            Err(Gone) => {
                self.lose();
                true
            }
        }
    }

    /// Sends what is left of a frame that was sent in part.
    pub fn flush(&mut self) {
        match self.wire.as_mut().map(|wire| wire.flush()) {
            Some(Ok(done)) => self.await_room(!done),
            Some(Err(Gone)) => self.lose(),
            None => {}
        }
    }

    /// Has the link told of what comes. Closing `file` ends that.
    fn watch(&self, file: &impl AsFd) {
        // It fails only where the kernel has no memory for it.
        let _ = epoll::add(&self.epoll, file, EventData::new_u64(0), EventFlags::IN);
    }

    fn join(&mut self, wire: Box<dyn Wire>) {
        self.watch(&wire);
        self.wire = Some(wire);
        self.awaits_room = false;
    }

    /// Has the link told of room too, or no more.
    fn await_room(&mut self, wanted: bool) {
        let Some(wire) = self.wire.as_ref().filter(|_| self.awaits_room != wanted) else {
            return;
        };
        let mut events = EventFlags::IN;
        events.set(EventFlags::OUT, wanted);
        // Where it fails, the next change is the next try.
        if epoll::modify(&self.epoll, wire, EventData::new_u64(0), events).is_ok() {
            self.awaits_room = wanted;
        }
    }

    /// Lets another machine in where nobody is there and one has come.
    fn accept(&mut self) {
        let Some((listener, _)) = self.listener.as_ref().filter(|_| self.wire.is_none()) else {
            return;
        };
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        for _ in 0..COMERS {
            let Ok(socket) = accept_with(listener, flags) else {
                return;
            };
            if is_trusted(&socket) {
                self.join(Box::new(Stream::new(socket)));
                return;
            }
        }
        // Who has come before is told once more when it is watched anew.
        let _ = epoll::delete(&self.epoll, listener);
        self.watch(listener);
    }

    /// The other side is gone: whoever waits for a place takes it.
    fn lose(&mut self) {
        if self.listener.is_none() {
            say(format_args!(
                "warning: the other end of --net {} is gone",
                self.name
            ));
        }
        self.wire = None;
        // One that has come before is not told again.
        self.accept();
    }
}

impl AsFd for Link {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        if let Some((_, path)) = &self.listener {
            // A path that stays is taken over by the next machine.
            let _ = fs::remove_file(path);
        }
    }
}

/// Who was at a path.
enum Met {
    Other(UnixStream),
    Nobody(UnixListener),
}

/// Joins the machine that waits at `path`, or waits there.
fn meet(path: &Path) -> Result<Met> {
    let shown = path.display();
    let refused = |error: io::Error| {
        Error::input(
            format!("--net socket={shown}: {error}"),
            "give a path in a folder of yours, shorter than 108 bytes",
        )
    };
    let _turn = Turn::wait(path, PATIENCE).map_err(refused)?;
    match UnixStream::connect(path) {
        Ok(socket) => {
            if !is_trusted(&socket) {
                return Err(refused(io::Error::other("another user waits there")));
            }
            socket.set_nonblocking(true).map_err(refused)?;
            return Ok(Met::Other(socket));
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            let file = fs::symlink_metadata(path).map_err(refused)?;
            if !file.file_type().is_socket() {
                return Err(Error::input(
                    format!("--net socket={shown}: that file is no socket"),
                    "give a path where nothing is",
                ));
            }
            // Left behind by one that was killed.
            fs::remove_file(path).map_err(refused)?;
        }
        Err(error) => return Err(refused(error)),
    }
    let socket = UnixListener::bind(path).map_err(refused)?;
    socket.set_nonblocking(true).map_err(refused)?;
    Ok(Met::Nobody(socket))
}

/// Whether the other side is root's or this user's: whoever it is sees all that the guest sends.
fn is_trusted(socket: impl AsFd) -> bool {
    socket_peercred(socket).is_ok_and(|peer| peer.uid.is_root() || peer.uid == geteuid())
}

/// Held by one machine at a time that looks who is at a path: of two that start at once, the second meets the first.
struct Turn {
    path: PathBuf,
    _lock: File,
}

impl Turn {
    /// Others may hold it for ever where they may write to the folder, so it is waited for no longer than `patience`.
    fn wait(path: &Path, patience: Duration) -> io::Result<Self> {
        let mut path = path.as_os_str().to_owned();
        path.push(".lock");
        let path = PathBuf::from(path);
        let deadline = Instant::now() + patience;
        loop {
            let lock = File::options()
                .write(true)
                .create(true)
                .truncate(false)
                .mode(0o600)
                .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
                .open(&path)?;
            match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
                // Who held it before has removed it.
                Ok(()) => {
                    let locked = lock.metadata()?.ino();
                    if fs::symlink_metadata(&path).is_ok_and(|found| found.ino() == locked) {
                        return Ok(Self { path, _lock: lock });
                    }
                }
                Err(Errno::WOULDBLOCK) => {}
                Err(error) => return Err(error.into()),
            }
            if Instant::now() >= deadline {
                let why = format!("{} stays locked by another process", path.display());
                return Err(io::Error::other(why));
            }
            thread::sleep(TRY_AGAIN);
        }
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

#[cfg(test)]
mod tests;
