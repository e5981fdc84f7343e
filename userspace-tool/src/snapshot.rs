// SPDX-License-Identifier: GPL-2.0

//! Snapshots: a machine that stands still, as a file.
//!
//! The file begins with [`MAGIC`] and the format's [`VERSION`] (4 bytes, little-endian). Two frames of LZ4 follow:
//! [`Head`], a line of JSON, and what the machine writes: [`State`], a line of JSON too, and the pages of its memory, RAM
//! and firmware, that are not zeros, each behind its guest-physical address (8 bytes, little-endian), in their order. The
//! frames and their blocks have checksums.
//!
//! The machine writes its frame into its control socket. The command `rvisor snapshot` puts the head before it, and
//! reads all of it once before it gives the file its name: so the machine's process needs no right to files, and a file
//! that is there is whole. `rvisor restore` runs the words of the head with the rights of its user. They are not taken
//! from the machine, which may be its guest's by then, but from what it wrote down in the beginning (see
//! [`crate::registry`]).

use std::collections::hash_map::RandomState;
use std::fs::{self, File};
use std::hash::{BuildHasher, Hasher};
use std::io::{self, BufRead, BufReader, BufWriter, Read, Seek, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use lz4_flex::frame::{BlockSize, FrameDecoder, FrameEncoder, FrameInfo};
use rustix::fs::{linkat, open, AtFlags, Mode, OFlags, CWD};
use rustix::io::Errno;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use vm_memory::{
    Address, Bytes, GuestAddress, GuestMemory, GuestMemoryRegion, MemoryRegionAddress,
};

use crate::arguments::{self, Origin, RunOptions};
use crate::control::{Client, Nothing, Request};
use crate::devices::{self, virtio};
use crate::error::{Error, Result};
use crate::layout::{self, FIRMWARE_SIZE, PAGE_SIZE};
use crate::machine::saved;
use crate::memory::Memory;
use crate::registry::{self, Name};
use crate::stat::counters::number;

const MAGIC: [u8; 8] = *b"rvisorVM";
/// Counted up with each change of the format or of what is in the state.
const VERSION: u32 = 5;
/// The most that a line of JSON has, in bytes, and that a machine's frame has besides its memory.
const LARGEST: u64 = 64 << 20;
/// How many bytes of a file are read and written at once.
const BUFFER: usize = 256 << 10;
const PAGE: usize = PAGE_SIZE as usize;
const ZEROS: [u8; PAGE] = [0; PAGE];

/// What is known of a machine without asking it.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Head {
    /// Its name.
    pub name: Name,
    /// What it was made by.
    pub origin: Origin,
}

/// What a machine is, beside its memory.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    /// How much memory its firmware has for itself, in bytes.
    pub rom: u64,
    /// Its CPUs.
    pub cpus: Vec<saved::Cpu>,
    /// The rest of what the hypervisor has.
    pub vm: saved::Vm,
    /// Its devices on I/O ports.
    pub ports: devices::Saved,
    /// Its virtio devices, in their order.
    pub virtio: Vec<virtio::mmio::Saved>,
}

impl State {
    /// Whether it can be that of a machine with these options.
    #[must_use]
    pub fn fits(&self, options: &RunOptions) -> bool {
        let rom = self.rom == 0
            || FIRMWARE_SIZE.contains(&self.rom) && self.rom.is_multiple_of(PAGE_SIZE);
        rom && self.cpus.len() as u64 == u64::from(options.cpus)
    }
}

/// Writes a machine's frame.
///
/// # Errors
///
/// What `out` answers.
pub fn write(out: impl Write, state: &State, memory: &Memory) -> io::Result<()> {
    let mut frame = frame(BufWriter::new(out), state)?;
    let mut page = [0; PAGE];
    for region in memory.iter() {
        for at in (0..region.len()).step_by(PAGE) {
            let read = region.read_slice(&mut page, MemoryRegionAddress(at));
            read.map_err(io::Error::other)?;
            if page != ZEROS {
                let address = region.start_addr().raw_value() + at;
                frame.write_all(&address.to_le_bytes())?;
                frame.write_all(&page)?;
            }
        }
    }
    frame.finish()?.flush()
}

fn write_head(out: &mut impl Write, head: &Head) -> io::Result<()> {
    out.write_all(&MAGIC)?;
    out.write_all(&VERSION.to_le_bytes())?;
    frame(out, head)?.finish()?;
    Ok(())
}

/// Begins a frame with that as a line of JSON.
fn frame<W: Write>(out: W, line: &impl Serialize) -> io::Result<FrameEncoder<W>> {
    let info = FrameInfo::new().block_size(BlockSize::Max256KB);
    let info = info.block_checksums(true).content_checksum(true);
    let mut frame = FrameEncoder::with_frame_info(info, out);
    serde_json::to_writer(&mut frame, line)?;
    frame.write_all(b"\n")?;
    Ok(frame)
}

/// The frames of a snapshot. Reading gives nothing at the end of each.
type Frames<R> = FrameDecoder<Whole<R>>;

/// What is not to end while it is read: the decoder takes an end between two blocks for that of the frame.
struct Whole<R>(R);

impl<R: Read> Read for Whole<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self.0.read(buffer)? {
            0 if !buffer.is_empty() => Err(io::Error::other("it ends too early")),
            count => Ok(count),
        }
    }
}

/// Reads a snapshot as far as its memory. An error that is [`Unsupported`](io::ErrorKind::Unsupported) tells what it
/// is else; other errors are the file's own, or tell how it is damaged.
fn begin<R: Read>(mut input: R) -> io::Result<(Head, State, Frames<R>)> {
    let other = |what: String| io::Error::new(io::ErrorKind::Unsupported, what);
    let (mut magic, mut version) = (MAGIC.map(|_| 0), [0; 4]);
    match input.read_exact(&mut magic) {
        Ok(()) if magic == MAGIC => {}
        Err(error) if error.kind() != io::ErrorKind::UnexpectedEof => return Err(error),
        _ => return Err(other("is no snapshot of a machine".to_owned())),
    }
    input.read_exact(&mut version)?;
    let version = u32::from_le_bytes(version);
    if version != VERSION {
        return Err(other(format!(
            "has version {version} of the format, and this rvisor reads {VERSION}"
        )));
    }
    let mut frames = FrameDecoder::new(Whole(input));
    let head = read_line(&mut frames)?;
    end(&mut frames)?;
    Ok((head, read_line(&mut frames)?, frames))
}

fn read_line<T: DeserializeOwned>(input: impl BufRead) -> io::Result<T> {
    let mut line = Vec::new();
    input.take(LARGEST).read_until(b'\n', &mut line)?;
    Ok(serde_json::from_slice(&line)?)
}

fn end(input: &mut impl Read) -> io::Result<()> {
    match input.read(&mut [0])? {
        0 => Ok(()),
        _ => Err(more()),
    }
}

fn more() -> io::Error {
    io::Error::other("it has more than its machine")
}

/// Reads the pages of memory, to their end, and has `put` take each with its address.
fn pages(
    input: &mut impl Read,
    mut put: impl FnMut(u64, &[u8]) -> io::Result<()>,
) -> io::Result<()> {
    let (mut page, mut least) = ([0; 8 + PAGE], 0);
    while input.read(&mut page[..1])? > 0 {
        input.read_exact(&mut page[1..])?;
        let address = number(&page, 0, 8);
        // By their order there are no more than the machine has.
        if address < least || !address.is_multiple_of(PAGE_SIZE) {
            return Err(more());
        }
        least = address.saturating_add(1);
        put(address, &page[8..])?;
    }
    Ok(())
}

/// Checks that all of a snapshot is there and that it can be that of a machine with these options.
fn check(input: impl Read, options: &RunOptions) -> io::Result<()> {
    let (_, state, mut frames) = begin(input)?;
    if !state.fits(options) {
        return Err(io::Error::other("it has less than its machine"));
    }
    let memory = layout::with_rom(layout::ram(options.memory), state.rom);
    pages(&mut frames, |address, _| {
        let known = memory.iter().any(|range| range.contains(&address));
        known.then_some(()).ok_or_else(more)
    })?;
    end(&mut frames.get_mut().0)
}

/// Has the machine write its snapshot, and stores it as `path`: whole, or not at all.
///
/// # Errors
///
/// [`Error::Input`] where no such machine runs or the file can't be made, [`Error::Call`] where the machine or
/// the file system fails.
pub fn take(name: &Name, path: &Path) -> Result<()> {
    let mut client = Client::connect(name)?;
    let head = Head {
        name: name.clone(),
        origin: registry::origin(name)?,
    };
    let new = New::create(path)?;
    let Nothing {} = client.call(&Request::Snapshot {})?;
    store(client.into_stream()?, &head, &new.file, path)?;
    new.publish(path)
}

/// A new file for the guest's memory, which is nobody else's to read. It has no name, and so goes with this process, but
/// for file systems that have no such files: there it is `hidden`, until this is dropped.
struct New {
    file: File,
    /// The folder that it is in.
    folder: File,
    /// Its name before it is published: by its digits, no other file's.
    hidden: PathBuf,
}

impl New {
    /// Makes one that is to become `path`.
    ///
    /// # Errors
    ///
    /// [`Error::Input`] where it can't be made there.
    fn create(path: &Path) -> Result<Self> {
        // What gives it its name would replace a device as well.
        let taken = fs::metadata(path).is_ok_and(|found| !found.is_file());
        if taken || path.to_string_lossy().ends_with('/') {
            return Err(Error::input(
                format!("{} can't become a file", path.display()),
                "give the name of a file",
            ));
        }
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let random = RandomState::new().build_hasher().finish();
        // Within the 255 bytes that a name may have.
        let hidden = path.with_file_name(format!(".{name:.50}.{random:016x}"));
        let at = path.with_file_name(".");
        let flags = OFlags::RDWR | OFlags::CLOEXEC;
        let mode = Mode::RUSR | Mode::WUSR;
        let made = File::open(&at).and_then(|folder| {
            let file = match open(&at, flags | OFlags::TMPFILE, mode) {
                Err(Errno::OPNOTSUPP | Errno::ISDIR) => {
                    open(&hidden, flags | OFlags::CREATE | OFlags::EXCL, mode)
                }
                made => made,
            };
            Ok((folder, file?.into()))
        });
        let (folder, file) = made.map_err(|error| {
            let [path, hidden] = [path, &hidden].map(Path::display);
            Error::input(
                format!("{path} can't be made, at first as {hidden}: {error}"),
                "give a file in a folder that this user may read and write to",
            )
        })?;
        Ok(Self {
            file,
            folder,
            hidden,
        })
    }

    /// Gives it its name, once it is on the disk; what has that name is replaced.
    fn publish(self, path: &Path) -> Result<()> {
        let failed = |what: &str, file: &Path| {
            let what = format!("{what} {}", file.display());
            move |error| Error::call(what, error)
        };
        let stored = self.file.sync_all().and_then(|()| self.file.metadata());
        if stored.map_err(failed("storing", path))?.nlink() == 0 {
            let open = format!("/proc/self/fd/{}", self.file.as_raw_fd());
            let linked = linkat(CWD, open, CWD, &self.hidden, AtFlags::SYMLINK_FOLLOW);
            linked.map_err(|error| failed("naming", &self.hidden)(error.into()))?;
        }
        fs::rename(&self.hidden, path).map_err(failed("naming", path))?;
        let kept = self.folder.sync_all();
        kept.map_err(failed("storing the name of", path))
    }
}

impl Drop for New {
    fn drop(&mut self) {
        // A file that has no name has not made the one that may be there.
        if self.file.metadata().is_ok_and(|file| file.nlink() > 0) {
            let _ = fs::remove_file(&self.hidden);
        }
    }
}

/// Stores what a machine writes behind that head, and checks it.
fn store(from: impl Read, head: &Head, mut file: &File, path: &Path) -> Result<()> {
    let options = arguments::run_options(&head.origin, None, false)?;
    // What a page's address takes is counted in.
    let beside = options.memory / 256 + FIRMWARE_SIZE.end() + LARGEST;
    let most = options.memory.saturating_add(beside);
    let mut to = BufWriter::with_capacity(BUFFER, file);
    write_head(&mut to, head)
        .and_then(|()| io::copy(&mut from.take(most), &mut to))
        .and_then(|_| to.flush())
        .and_then(|()| file.rewind())
        .map_err(|error| {
            let (name, path) = (&head.name, path.display());
            Error::call(format!("storing machine {name} as {path}"), error)
        })?;
    let what = "the machine did not write all of it, or is of another version; what it said on \
                standard error tells why";
    let checked = check(BufReader::with_capacity(BUFFER, file), &options);
    checked.map_err(|error| match error.raw_os_error() {
        Some(_) => Error::call(format!("reading {}", path.display()), error),
        None => Error::call(what, in_words(error)),
    })
}

/// A snapshot in a file, whose memory is still to be read.
pub struct Snapshot {
    /// What it is of.
    pub head: Head,
    /// What that was.
    pub state: State,
    frames: Frames<BufReader<File>>,
    path: PathBuf,
}

impl Snapshot {
    /// Opens the file.
    ///
    /// # Errors
    ///
    /// [`Error::Input`] where it can't be read or is none.
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(|error| {
            let cause = format!("{} can't be read: {error}", path.display());
            Error::input(cause, "check the file")
        })?;
        let begun = begin(BufReader::with_capacity(BUFFER, file));
        let (head, state, frames) = begun.map_err(|error| wrong(path, error))?;
        Ok(Self {
            head,
            state,
            frames,
            path: path.to_owned(),
        })
    }

    /// Reads the memory into that of a machine, which is new.
    ///
    /// # Errors
    ///
    /// [`Error::Input`] where the file is damaged.
    pub fn fill(&mut self, memory: &Memory) -> Result<()> {
        fill(&mut self.frames, memory).map_err(|error| wrong(&self.path, error))
    }
}

/// Reads the memory into that of a machine. A page of zeros, which it has already, is not there: it would be allocated.
fn fill(frames: &mut impl Read, memory: &Memory) -> io::Result<()> {
    pages(frames, |address, page| {
        let written = memory.write_slice(page, GuestAddress(address));
        written.map_err(|_| more())
    })
}

/// The same, where the decoder's own text is none for people.
fn in_words(error: io::Error) -> io::Error {
    match error.get_ref() {
        Some(inner) if inner.is::<lz4_flex::frame::Error>() => {
            io::Error::other("its checksums or blocks are wrong")
        }
        _ => error,
    }
}

/// The error for people, where reading that file gave this one.
fn wrong(file: &Path, error: io::Error) -> Error {
    let (file, error) = (file.display(), in_words(error));
    let cause = match error.kind() {
        io::ErrorKind::IsADirectory => format!("{file} is a folder"),
        _ if error.raw_os_error().is_some() => {
            return Error::call(format!("reading {file}"), error)
        }
        io::ErrorKind::Unsupported => format!("{file} {error}"),
        io::ErrorKind::UnexpectedEof => format!("{file} is damaged: it has less than its machine"),
        _ => format!("{file} is damaged: {error}"),
    };
    Error::input(
        cause,
        "give a file that 'rvisor snapshot' has made to the rvisor that made it",
    )
}

#[cfg(test)]
mod tests;
