// SPDX-License-Identifier: GPL-2.0

//! This host's end of a network card, whatever it is joined to.

use std::fmt::Display;
use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::fs::{flock, open, FlockOperation, Mode, OFlags};
use rustix::io::Errno;
use rustix::net::sockopt::socket_peercred;
use rustix::net::{
    accept_with, connect, socket_with, AddressFamily, SocketAddrUnix, SocketFlags, SocketType,
};
use rustix::process::geteuid;

use super::stream::Stream;
use super::{tap, user, Joined, Mac, NetOptions, HEADER};
use crate::error::{failed, say, Error, Result};

/// How many of those who come are looked at in a row.
const COMERS: usize = 16;
/// How long to wait for others that look who is at a path, which takes each of them a moment; and until the next try.
const TURN: Duration = Duration::from_secs(2);
const TRY_AGAIN: Duration = Duration::from_millis(5);
/// Those of all sockets here.
const FLAGS: SocketFlags = SocketFlags::CLOEXEC.union(SocketFlags::NONBLOCK);

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

    /// What the other side can do with a frame beside passing it on, as features of a network card.
    fn features(&self) -> u64 {
        0
    }

    /// Says which features of a card the driver has accepted: what work is left to it in frames that come.
    fn accept_features(&self, _features: u64) {}
}

/// A socket's path, and which file it is, by its file system and its number there.
struct Place {
    path: PathBuf,
    file: (u64, u64),
}

impl Place {
    fn of(path: &Path) -> io::Result<Self> {
        let file = fs::symlink_metadata(path)?;
        Ok(Self {
            path: path.to_owned(),
            file: (file.dev(), file.ino()),
        })
    }
}

/// One end of a network.
///
/// It is a file descriptor to poll: readable when frames have come, or when there is room for one that had none.
pub struct Link {
    epoll: OwnedFd,
    /// None while nobody is there: then frames are lost.
    wire: Option<Box<dyn Wire>>,
    /// Where another machine may come, and what it has in the file system.
    listener: Option<(UnixListener, Place)>,
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
            name: options.text.clone(),
        };
        let mut role = "";
        match &options.joined {
            Joined::Tap(name) => {
                role = name;
                link.join(Box::new(tap::open(name)?));
            }
            Joined::User(forward) => link.join(Box::new(Stream::new(user::start(forward)?))),
            Joined::Socket(path) => role = link.meet(path)?,
        }
        let mac = options.mac.unwrap_or_else(|| {
            let host = fs::read_to_string("/etc/machine-id").unwrap_or_default();
            Mac::derived(&[host.trim(), machine, role, &number.to_string()])
        });
        Ok((link, mac))
    }

    /// Joins the machine that waits at `path`, or waits there. Says which of the two it is. Nothing blocks in its
    /// turn, so the others that want theirs do not wait for long.
    fn meet(&mut self, path: &Path) -> Result<&'static str> {
        let cause = format!("--net socket={}", path.display());
        let refused = |error: &dyn Display| {
            Error::input(
                format!("{cause}: {error}"),
                "give a path in a folder of yours, shorter than 108 bytes",
            )
        };
        let _turn = take_turn(path).map_err(|error| match error {
            Errno::AGAIN => Error::input(
                format!("{cause}: its folder is locked by another process"),
                "give a path in a folder of yours that nothing else uses",
            ),
            error => refused(&error),
        })?;
        let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, FLAGS, None)
            .map_err(failed("making a socket"))?;
        match SocketAddrUnix::new(path).and_then(|address| connect(&socket, &address)) {
            Ok(()) if is_trusted(&socket) => {
                self.join(Box::new(Stream::new(socket)));
                return Ok("second");
            }
            Ok(()) => return Err(refused(&"another user waits there")),
            Err(Errno::AGAIN) => {
                return Err(Error::input(
                    format!("{cause}: others wait there already"),
                    "give another PATH",
                ))
            }
            Err(Errno::NOENT) => {}
            Err(Errno::CONNREFUSED) => {
                let file = fs::symlink_metadata(path).map_err(|e| refused(&e))?;
                if !file.file_type().is_socket() {
                    return Err(Error::input(
                        format!("{cause}: that file is no socket"),
                        "give a path where nothing is",
                    ));
                }
                // Left behind by one that was killed.
                fs::remove_file(path).map_err(|e| refused(&e))?;
            }
            Err(error) => return Err(refused(&error)),
        }
        let socket = UnixListener::bind(path).map_err(|e| refused(&e))?;
        socket.set_nonblocking(true).map_err(|e| refused(&e))?;
        let place = Place::of(path).map_err(|e| refused(&e))?;
        self.watch(&socket);
        self.listener = Some((socket, place));
        Ok("first")
    }

    /// What the other side can do with a frame beside passing it on, as features of a network card.
    #[must_use]
    pub fn features(&self) -> u64 {
        self.wire.as_ref().map_or(0, |wire| wire.features())
    }

    /// Says which features of a card the driver has accepted.
    pub fn accept_features(&self, features: u64) {
        if let Some(wire) = &self.wire {
            wire.accept_features(features);
        }
    }

    /// Whether somebody is at the other end.
    #[must_use]
    pub fn is_up(&self) -> bool {
        self.wire.is_some()
    }

    /// The next frame that has come, with its virtio header; it stays the next until [`Self::take`].
    pub fn front(&mut self) -> Option<([u8; HEADER], &[u8])> {
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
        let Some(wire) = &mut self.wire else {
            return true;
        };
        let sent = wire.send(packet);
        match sent.and_then(|taken| Ok((taken, wire.flush()?))) {
            Ok((taken, whole)) => {
                self.await_room(!taken || !whole);
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

    /// Has the link told once more of who has come before, where that is a path.
    pub fn look_again(&self) {
        if let Some((listener, _)) = &self.listener {
            let _ = epoll::delete(&self.epoll, listener);
            self.watch(listener);
        }
    }

    /// Lets another machine in where nobody is there and one has come.
    pub fn accept(&mut self) {
        let Some((listener, _)) = self.listener.as_ref().filter(|_| self.wire.is_none()) else {
            return;
        };
        for _ in 0..COMERS {
            let Ok(socket) = accept_with(listener, FLAGS) else {
                return;
            };
            if is_trusted(&socket) {
                self.join(Box::new(Stream::new(socket)));
                return;
            }
        }
        self.look_again();
    }

    /// The other side is gone: whoever waits for the place is told of.
    fn lose(&mut self) {
        if self.listener.is_none() {
            say(format_args!(
                "warning: the other end of --net {} is gone",
                self.name
            ));
        }
        self.wire = None;
        self.look_again();
    }
}

impl AsFd for Link {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        // Nobody takes the place while its socket is open, unless it was removed. One that stays is taken over by the next.
        if let Some((_, place)) = &self.listener
            && Place::of(&place.path).is_ok_and(|found| found.file == place.file)
        {
            let _ = fs::remove_file(&place.path);
        }
    }
}

/// Whether the other side is root's or this user's: whoever it is sees all that the guest sends.
fn is_trusted(socket: impl AsFd) -> bool {
    socket_peercred(socket).is_ok_and(|peer| peer.uid.is_root() || peer.uid == geteuid())
}

/// Waits until nobody else looks who is at that path, and lets none look before the file is dropped: of two that start
/// at once, the second meets the first. What is locked is the path's folder, which is the same for all who may meet
/// there, root and the user, and in which nothing is left behind. Fails with [`Errno::AGAIN`] after [`TURN`].
fn take_turn(path: &Path) -> rustix::io::Result<OwnedFd> {
    let folder = path.parent().filter(|folder| *folder != Path::new(""));
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let folder = open(folder.unwrap_or(Path::new(".")), flags, Mode::empty())?;
    let end = Instant::now() + TURN;
    loop {
        match flock(&folder, FlockOperation::NonBlockingLockExclusive) {
            Err(Errno::AGAIN) if Instant::now() < end => thread::sleep(TRY_AGAIN),
            locked => return locked.map(|()| folder),
        }
    }
}

#[cfg(test)]
mod tests;
