// SPDX-License-Identifier: GPL-2.0

//! Snapshots: a machine that stands still, as a file.
//!
//! All numbers are little-endian. The file begins with [`MAGIC`], the format's [`VERSION`] (4 bytes), the length of
//! the state (4) and a checksum of these and the state (8), followed by the state, JSON (see [`State`]). Records
//! of memory follow: guest-physical address (8), length (8), checksum of these and the bytes (8), and the bytes,
//! whole pages. Pages of zeros are left out. The last record has the length 0 and the number of the others in
//! place of an address.
//!
//! The machine writes this into its control socket, and the command `rvisor snapshot` checks it on the way into
//! the file: so the machine's process needs no right to files, and a file that is there is whole. `rvisor restore` runs
//! a snapshot's words with the rights of its user. They are not taken from the machine, which may be its guest's by
//! then, but from what it wrote down in the beginning (see [`crate::registry`]).

use std::fs::{self, File};
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use vm_memory::{Address, Bytes, GuestAddress, GuestMemory, GuestMemoryRegion};

use crate::arguments::{self, Origin};
use crate::control::{Client, Nothing, Request};
use crate::devices::{self, virtio};
use crate::error::{failed, Error, Result};
use crate::layout::{self, PAGE_SIZE};
use crate::machine::saved;
use crate::memory::Memory;
use crate::registry::{self, Name};

const MAGIC: [u8; 8] = *b"rvisorVM";
/// Counted up with each change of the format or of what is in the state.
const VERSION: u32 = 3;
/// The most that the state of a machine has, in bytes.
const LARGEST: u32 = 64 << 20;
/// The most bytes of one record.
const RECORD: usize = 256 << 10;
const PAGE: usize = PAGE_SIZE as usize;
const ZEROS: [u8; PAGE] = [0; PAGE];

/// What a machine is, beside its memory.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    /// The words behind `rvisor run` that it was made by.
    pub words: Vec<String>,
    /// The folder in which they were given.
    pub folder: PathBuf,
    /// Its name at that time.
    pub name: Name,
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

/// A checksum that finds damage, and no more: nobody is kept from making a file that is wrong on purpose.
fn checksum(seed: [u64; 2], bytes: &[u8]) -> u64 {
    const FACTOR: u64 = 0x9e37_79b9_7f4a_7c15;
    let step = |sum: u64, word: u64| (sum ^ word).wrapping_mul(FACTOR).rotate_left(29);
    let start = seed.into_iter().fold(bytes.len() as u64, step);
    let words = bytes.chunks_exact(8);
    let mut rest = [0; 8];
    rest[..words.remainder().len()].copy_from_slice(words.remainder());
    let words = words.filter_map(|word| word.try_into().ok()).chain([rest]);
    words.map(u64::from_le_bytes).fold(start, step)
}

/// Writes a snapshot.
///
/// # Errors
///
/// What `out` answers.
pub fn write(out: impl Write, state: &State, memory: &Memory) -> io::Result<()> {
    let mut out = BufWriter::with_capacity(RECORD, out);
    write_head(&mut out, state)?;
    write_memory(&mut out, memory)?;
    out.flush()
}

fn write_head(out: &mut impl Write, state: &State) -> io::Result<()> {
    let json = serde_json::to_vec(state)?;
    let length = u32::try_from(json.len()).map_err(io::Error::other)?;
    let sum = checksum([VERSION.into(), length.into()], &json);
    out.write_all(&MAGIC)?;
    write_words(out, [(u64::from(length) << 32) | u64::from(VERSION), sum])?;
    out.write_all(&json)
}

fn write_memory(out: &mut impl Write, memory: &Memory) -> io::Result<()> {
    let mut records = 0_u64;
    let mut bytes = vec![0; RECORD];
    for region in memory.iter() {
        let mut at = 0;
        while at < region.len() {
            let count = (region.len() - at).min(RECORD as u64) as usize;
            let address = GuestAddress(region.start_addr().raw_value() + at);
            let bytes = &mut bytes[..count];
            memory
                .read_slice(bytes, address)
                .map_err(io::Error::other)?;
            for (start, run) in runs(bytes) {
                write_record(out, address.raw_value() + start as u64, run)?;
                records += 1;
            }
            at += count as u64;
        }
    }
    write_record(out, records, &[])
}

fn write_record(out: &mut impl Write, address: u64, bytes: &[u8]) -> io::Result<()> {
    let length = bytes.len() as u64;
    write_words(out, [address, length, checksum([address, length], bytes)])?;
    out.write_all(bytes)
}

fn write_words<const N: usize>(out: &mut impl Write, words: [u64; N]) -> io::Result<()> {
    out.write_all(words.map(u64::to_le_bytes).as_flattened())
}

fn read_words<const N: usize>(input: &mut impl Read) -> io::Result<[u64; N]> {
    let mut words = [[0; 8]; N];
    input.read_exact(words.as_flattened_mut())?;
    Ok(words.map(u64::from_le_bytes))
}

/// The runs of pages that are not all zeros, with their offsets.
fn runs(bytes: &[u8]) -> Vec<(usize, &[u8])> {
    let mut runs: Vec<(usize, usize)> = Vec::new();
    for (index, page) in bytes.chunks(PAGE).enumerate() {
        let (start, end) = (index * PAGE, index * PAGE + page.len());
        if *page == ZEROS[..page.len()] {
            continue;
        }
        match runs.last_mut() {
            Some(run) if run.1 == start => run.1 = end,
            _ => runs.push((start, end)),
        }
    }
    let with_bytes = |(start, end): (usize, usize)| (start, &bytes[start..end]);
    runs.into_iter().map(with_bytes).collect()
}

/// What is wrong with a snapshot.
#[derive(Debug, thiserror::Error)]
pub enum Wrong {
    /// It is none.
    #[error("is no snapshot of a machine")]
    Foreign,
    /// Another version of the format.
    #[error("has version {0} of the format, and this rvisor reads {VERSION}")]
    Version(u32),
    /// It is not as it was written; where.
    #[error("is damaged: {0}")]
    Damaged(String),
    /// It can't be read.
    #[error(transparent)]
    Host(io::Error),
    /// The file that it is stored as can't be written.
    #[error(transparent)]
    Write(io::Error),
}

/// Why a snapshot can't be read: wrong in itself, or by the host.
type Read1<T> = std::result::Result<T, Wrong>;

impl From<io::Error> for Wrong {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::UnexpectedEof => Self::Damaged("it ends too early".to_owned()),
            _ => Self::Host(error),
        }
    }
}

impl Wrong {
    /// The error for people, about that file.
    #[must_use]
    pub fn of(self, file: &Path) -> Error {
        let file = file.display();
        let next = match self {
            Self::Host(error) => return Error::call(format!("reading {file}"), error),
            Self::Version(_) => "restore it with the rvisor that made it",
            _ => "give a file that 'rvisor snapshot' has made",
        };
        Error::input(format!("{file} {self}"), next)
    }
}

fn damaged<T>(what: impl Into<String>) -> Read1<T> {
    Err(Wrong::Damaged(what.into()))
}

/// Reads the state.
fn read_head(input: &mut impl Read) -> Read1<State> {
    let mut magic = [0; 8];
    match input.read_exact(&mut magic) {
        Ok(()) if magic == MAGIC => {}
        Err(error) if error.kind() != io::ErrorKind::UnexpectedEof => return Err(error.into()),
        _ => return Err(Wrong::Foreign),
    }
    let [head, sum] = read_words(input)?;
    let (version, length) = (head as u32, (head >> 32) as u32);
    if version != VERSION {
        return Err(Wrong::Version(version));
    }
    if length > LARGEST {
        return damaged(format!("its state has {length} bytes"));
    }
    let mut json = Vec::new();
    input.take(length.into()).read_to_end(&mut json)?;
    if checksum([version.into(), length.into()], &json) != sum {
        return damaged("the checksum of its state");
    }
    serde_json::from_slice(&json).or_else(|error| damaged(format!("its state: {error}")))
}

/// Reads the memory, and gives each piece with its guest-physical address to `take`.
fn read_memory(input: &mut impl Read, mut take: impl FnMut(u64, &[u8]) -> Read1<()>) -> Read1<()> {
    let mut buffer = vec![0; RECORD];
    for records in 0_u64.. {
        let [address, length, sum] = read_words(input)?;
        let size = usize::try_from(length).ok();
        let size = size.filter(|size| size % PAGE == 0);
        let Some(bytes) = size.and_then(|size| buffer.get_mut(..size)) else {
            return damaged(format!("a record of {length} bytes"));
        };
        input.read_exact(bytes)?;
        if checksum([address, length], bytes) != sum {
            return damaged(format!("the checksum of memory at {address:#x}"));
        }
        if length == 0 {
            return match address == records {
                true => Ok(()),
                false => damaged("memory is missing"),
            };
        }
        take(address, bytes)?;
    }
    Ok(())
}

/// Reads the memory behind the state into that of a machine.
///
/// # Errors
///
/// What is wrong with it.
pub fn fill(input: &mut impl Read, memory: &Memory) -> Read1<()> {
    read_memory(input, |address, bytes| {
        let written = memory.write_slice(bytes, GuestAddress(address));
        written.or_else(|_| damaged(format!("it has memory at {address:#x}")))
    })
}

/// Has the machine write its snapshot, and stores it as `path`: whole, or not at all.
///
/// # Errors
///
/// [`Error::Input`] where no such machine runs or the file can't be made, [`Error::Call`] where the machine or
/// the file system fails.
pub fn take(name: &Name, path: &Path) -> Result<()> {
    let mut client = Client::connect(name)?;
    let origin = registry::origin(name)?;
    let file_name = path.file_name().unwrap_or_default().to_string_lossy();
    let new = path.with_file_name(format!(".{file_name}.{}", std::process::id()));
    let file = create(&new).map_err(|error| {
        Error::input(
            format!("{} can't be made: {error}", new.display()),
            "give a file in a folder that this user may write to",
        )
    })?;
    let stored = client.call(&Request::Snapshot {}).and_then(|Nothing {}| {
        store(client.stream()?, (name, origin), file, path)?;
        fs::rename(&new, path)
            .map_err(|error| Error::call(format!("naming {}", path.display()), error))
    });
    if stored.is_err() {
        let _ = fs::remove_file(&new);
        return stored;
    }
    let folder = path
        .parent()
        .filter(|folder| !folder.as_os_str().is_empty());
    File::open(folder.unwrap_or(Path::new(".")))
        .and_then(|folder| folder.sync_all())
        .map_err(failed("writing the folder to the disk"))
}

/// A new file for the guest's memory, which is nobody else's to read.
fn create(path: &Path) -> io::Result<File> {
    let mut new = File::options();
    new.write(true).create_new(true).mode(0o600).open(path)
}

/// Stores what a machine writes, with the name and origin that are known of it in place of those that it says.
fn store(
    mut from: impl Read,
    (name, origin): (&Name, Origin),
    file: File,
    path: &Path,
) -> Result<()> {
    let mut to = BufWriter::with_capacity(RECORD, file);
    let options = arguments::run_options(&origin.words, &origin.folder, None, false)?;
    let mut left = options.memory.saturating_add(*layout::FIRMWARE_SIZE.end());
    let mut records = 0;
    let copy = || -> Read1<()> {
        let state = State {
            words: origin.words,
            folder: origin.folder,
            name: name.clone(),
            ..read_head(&mut from)?
        };
        write_head(&mut to, &state).map_err(Wrong::Write)?;
        read_memory(&mut from, |address, bytes| {
            records += 1;
            match left.checked_sub(bytes.len() as u64) {
                Some(less) => left = less,
                None => return damaged("it has more memory than the machine"),
            }
            write_record(&mut to, address, bytes).map_err(Wrong::Write)
        })?;
        write_record(&mut to, records, &[])
            .and_then(|()| to.flush())
            .and_then(|()| to.get_ref().sync_all())
            .map_err(Wrong::Write)
    };
    copy().map_err(|wrong| match wrong {
        Wrong::Write(error) => Error::call(format!("writing {}", path.display()), error),
        Wrong::Host(error) => Error::call(format!("reading what machine {name} writes"), error),
        wrong => Error::call(
            "the machine did not write all of it; what it said on standard error tells why",
            io::Error::other(format!("{wrong:?}")),
        ),
    })
}

/// Opens a snapshot, whose memory [`fill`] reads then.
///
/// # Errors
///
/// [`Error::Input`] where it can't be read or is none.
pub fn open(path: &Path) -> Result<(BufReader<File>, State)> {
    let file = File::open(path).map_err(|error| {
        let cause = format!("{} can't be read: {error}", path.display());
        Error::input(cause, "check the file")
    })?;
    let mut input = BufReader::with_capacity(RECORD, file);
    let state = read_head(&mut input).map_err(|wrong| wrong.of(path))?;
    Ok((input, state))
}

#[cfg(test)]
mod tests;
