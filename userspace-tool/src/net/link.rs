// SPDX-License-Identifier: GPL-2.0

//! This host's end of a network card, whatever it is joined to.

use std::fs::{self, File};
use std::io::{self, Read, Write};
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

use super::stream::{Gone, Stream};
use super::{tap, user, Joined, Mac, NetOptions, HEADER, LONGEST_FRAME, SHORTEST_FRAME};
use crate::error::{say, Error, Result};

/// How long another machine may take to look who is at a path, and how often that is looked at.
const PATIENCE: Duration = Duration::from_secs(5);
const TRY_AGAIN: Duration = Duration::from_millis(10);

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

/// What frames go to and come from.
enum End {
    Tap {
        file: File,
        /// The frame that was read, behind its header, and the length of both; 0 where there is none.
        packet: Box<[u8]>,
        length: usize,
    },
    Stream(Stream),
    /// Nobody is there: frames are lost.
    Nobody,
}

/// One end of a network.
///
/// It is a file descriptor to poll: readable when frames have come, or when there is room for one that had none.
pub struct Link {
    epoll: OwnedFd,
    end: End,
    /// Where another machine may come, while none is there; and the path.
    listener: Option<(UnixListener, PathBuf)>,
    watched: EventFlags,
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
        let mut role = "";
        let mut listener = None;
        let end = match &options.joined {
            Joined::Tap(name) => {
                role = name;
                End::Tap {
                    file: tap::open(name)?,
                    packet: vec![0; HEADER + LONGEST_FRAME].into_boxed_slice(),
                    length: 0,
                }
            }
            Joined::User(forward) => End::Stream(Stream::new(user::start(forward)?)),
            Joined::Socket(path) => match meet(path)? {
                Met::Other(socket) => {
                    role = "second";
                    End::Stream(Stream::new(socket.into()))
                }
                Met::Nobody(socket) => {
                    role = "first";
                    listener = Some((socket, path.clone()));
                    End::Nobody
                }
            },
        };
        let epoll = epoll::create(CreateFlags::CLOEXEC)
            .map_err(|error| Error::call("making an epoll instance", io::Error::from(error)))?;
        let mut link = Self {
            epoll,
            end,
            listener,
            watched: EventFlags::empty(),
            name: options.joined.to_string(),
        };
        link.watch(EventFlags::IN);
        let mac = options.mac.unwrap_or_else(|| {
            let host = fs::read_to_string("/etc/machine-id").unwrap_or_default();
            Mac::derived(&[host.trim(), machine, role, &number.to_string()])
        });
        Ok((link, mac))
    }

    /// Whether the other side can do more with a frame than pass it on.
    #[must_use]
    pub fn has_offloads(&self) -> bool {
        matches!(self.end, End::Tap { .. })
    }

    /// Says which work is left to the guest in frames that come. Without offloads it does nothing.
    pub fn set_offloads(&mut self, offloads: Offloads) {
        if let End::Tap { file, .. } = &self.end {
            // A TAP that does not know one of them goes on doing the work itself.
            let _ = tap::set_offloads(file, offloads);
        }
    }

    /// The next frame that has come, with its virtio header; it stays the next until [`Self::take`].
    pub fn front(&mut self) -> Option<([u8; HEADER], &[u8])> {
        self.accept();
        let gone = match &mut self.end {
            End::Tap {
                file,
                packet,
                length,
            } => {
                *length == 0
                    && match read_packet(file, packet) {
                        Ok(count) => {
                            *length = count;
                            false
                        }
                        Err(error) => error.kind() != io::ErrorKind::WouldBlock,
                    }
            }
            End::Stream(stream) => stream.front() == Err(Gone),
            End::Nobody => false,
        };
        if gone {
            self.lose();
        }
        match &mut self.end {
            End::Tap { packet, length, .. } => {
                let (header, frame) = packet.get(..*length)?.split_first_chunk()?;
                Some((*header, frame))
            }
            End::Stream(stream) => Some(([0; HEADER], stream.front().ok()??)),
            End::Nobody => None,
        }
    }

    /// The next frame is done with.
    pub fn take(&mut self) {
        match &mut self.end {
            End::Tap { length, .. } => *length = 0,
            End::Stream(stream) => stream.take(),
            End::Nobody => {}
        }
    }

    /// Sends a frame behind its virtio header. Says whether it was taken; one that was not can be sent again
    /// when there is room. What can't be sent at all is lost, as on a wire. The header may be overwritten.
    pub fn send(&mut self, packet: &mut [u8]) -> bool {
        self.accept();
        match &mut self.end {
            End::Tap { file, .. } => {
                // Refused is what the interface does not take while it is down, or what is no frame.
                let _ = file.write(packet);
                true
            }
            End::Stream(stream) => match stream.send(packet) {
                Ok(taken) => {
                    let more = !taken || stream.has_rest();
                    self.watch(EventFlags::IN | room(more));
                    taken
                }
                Err(Gone) => {
                    self.lose();
                    true
                }
            },
            End::Nobody => true,
        }
    }

    /// Sends what is left of a frame that was sent in part.
    pub fn flush(&mut self) {
        if let End::Stream(stream) = &mut self.end {
            match stream.flush() {
                Ok(done) => self.watch(EventFlags::IN | room(!done)),
                Err(Gone) => self.lose(),
            }
        }
    }

    fn watch(&mut self, wanted: EventFlags) {
        let file = match &self.end {
            End::Tap { file, .. } => file.as_fd(),
            End::Stream(stream) => stream.as_fd(),
            End::Nobody => match &self.listener {
                Some((listener, _)) => listener.as_fd(),
                None => return,
            },
        };
        if self.watched == wanted {
            return;
        }
        // It fails only where the kernel has no memory for it; then the next change is the next try.
        let watched = if self.watched.is_empty() {
            epoll::add(&self.epoll, file, EventData::new_u64(0), wanted)
        } else if wanted.is_empty() {
            // Not merely no events: the other side's end would still be one.
            epoll::delete(&self.epoll, file)
        } else {
            epoll::modify(&self.epoll, file, EventData::new_u64(0), wanted)
        };
        if watched.is_ok() {
            self.watched = wanted;
        }
    }

    /// Lets another machine in where one has come.
    fn accept(&mut self) {
        if !matches!(self.end, End::Nobody) {
            return;
        }
        let Some((listener, _)) = &self.listener else {
            return;
        };
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        if let Some(socket) = accept_with(listener, flags)
            .ok()
            .filter(|socket| is_trusted(socket))
        {
            self.watch(EventFlags::empty());
            self.end = End::Stream(Stream::new(socket));
            self.watch(EventFlags::IN);
        }
    }

    /// The other side is gone: whoever waits for a place takes it.
    fn lose(&mut self) {
        if self.listener.is_none() {
            say(format_args!(
                "warning: the other end of --net {} is gone",
                self.name
            ));
        }
        self.watch(EventFlags::empty());
        self.end = End::Nobody;
        self.watched = EventFlags::empty();
        self.watch(EventFlags::IN);
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

fn room(wanted: bool) -> EventFlags {
    if wanted {
        EventFlags::OUT
    } else {
        EventFlags::empty()
    }
}

/// Reads a frame with its header.
fn read_packet(file: &mut File, packet: &mut [u8]) -> io::Result<usize> {
    loop {
        match file.read(packet) {
            Ok(count) if count < HEADER + SHORTEST_FRAME => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => return result,
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
