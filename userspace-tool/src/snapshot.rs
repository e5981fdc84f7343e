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
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use vm_memory::{Address, Bytes, GuestAddress, GuestMemory, GuestMemoryRegion};

use crate::arguments::Origin;
use crate::control::{Client, Nothing, Request};
use crate::devices::{self, virtio};
use crate::error::{failed, Error, Result};
use crate::layout::PAGE_SIZE;
use crate::machine::saved;
use crate::memory::Memory;
use crate::registry::{self, Name};

const MAGIC: [u8; 8] = *b"rvisorVM";
/// Counted up with each change of the format or of what is in the state.
const VERSION: u32 = 1;
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
    out.write_all(&MAGIC)?;
    out.write_all(&VERSION.to_le_bytes())?;
    out.write_all(&length.to_le_bytes())?;
    let sum = checksum([VERSION.into(), length.into()], &json);
    out.write_all(&sum.to_le_bytes())?;
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
    out.write_all(&address.to_le_bytes())?;
    out.write_all(&length.to_le_bytes())?;
    out.write_all(&checksum([address, length], bytes).to_le_bytes())?;
    out.write_all(bytes)
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

/// A snapshot that is read.
pub struct Snapshot<R> {
    input: R,
}

/// Why a snapshot can't be read: wrong in itself, or by the host.
type Read1<T> = std::result::Result<T, Wrong>;

/// What is wrong with a snapshot.
#[derive(Debug)]
pub enum Wrong {
    /// It is none.
    Foreign,
    /// Another version of the format.
    Version(u32),
    /// It is not as it was written; where.
    Damaged(String),
    /// It can't be read, or what it is read into can't be written.
    Host(io::Error),
}

impl From<io::Error> for Wrong {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::UnexpectedEof => Self::Damaged("it ends too early".to_owned()),
            _ => Self::Host(error),
        }
    }
}

impl Wrong {
    /// The error for people, about the file of that name.
    #[must_use]
    pub fn of(self, name: &str) -> Error {
        let next = "give a file that 'rvisor snapshot' has made";
        match self {
            Self::Foreign => Error::input(format!("{name} is no snapshot of a machine"), next),
            Self::Version(version) => Error::input(
                format!(
                    "{name} has version {version} of the format, and this rvisor reads {VERSION}"
                ),
                "restore it with the rvisor that made it",
            ),
            Self::Damaged(what) => Error::input(format!("{name} is damaged: {what}"), next),
            Self::Host(error) => Error::call(format!("reading {name}"), error),
        }
    }
}

impl<R: Read> Snapshot<R> {
    /// Reads the state.
    ///
    /// # Errors
    ///
    /// What is wrong with it.
    pub fn open(mut input: R) -> Read1<(Self, State)> {
        let mut magic = [0; 8];
        match input.read_exact(&mut magic) {
            Ok(()) if magic == MAGIC => {}
            Err(error) if error.kind() != io::ErrorKind::UnexpectedEof => return Err(error.into()),
            _ => return Err(Wrong::Foreign),
        }
        let version = read_u32(&mut input)?;
        if version != VERSION {
            return Err(Wrong::Version(version));
        }
        let length = read_u32(&mut input)?;
        if length > LARGEST {
            return Err(Wrong::Damaged(format!("its state has {length} bytes")));
        }
        let sum = read_u64(&mut input)?;
        let mut json = Vec::new();
        (&mut input).take(length.into()).read_to_end(&mut json)?;
        if checksum([version.into(), length.into()], &json) != sum {
            return Err(Wrong::Damaged("the checksum of its state".to_owned()));
        }
        let state = serde_json::from_slice(&json)
            .map_err(|error| Wrong::Damaged(format!("its state: {error}")))?;
        Ok((Self { input }, state))
    }

    /// Reads the memory, and gives each piece with its guest-physical address to `take`.
    ///
    /// # Errors
    ///
    /// What is wrong with it; where `take` says no, that the piece has no place.
    pub fn read_memory(mut self, mut take: impl FnMut(u64, &[u8]) -> bool) -> Read1<()> {
        let mut buffer = vec![0; RECORD];
        for records in 0_u64.. {
            let address = read_u64(&mut self.input)?;
            let length = read_u64(&mut self.input)?;
            let sum = read_u64(&mut self.input)?;
            let bytes = usize::try_from(length)
                .ok()
                .and_then(|length| buffer.get_mut(..length));
            let bytes =
                bytes.ok_or_else(|| Wrong::Damaged(format!("a record of {length} bytes")))?;
            self.input.read_exact(bytes)?;
            if checksum([address, length], bytes) != sum {
                return Err(Wrong::Damaged(format!(
                    "the checksum of memory at {address:#x}"
                )));
            }
            if length == 0 {
                let all = address == records;
                return all
                    .then_some(())
                    .ok_or_else(|| Wrong::Damaged("memory is missing".to_owned()));
            }
            if !take(address, bytes) {
                return Err(Wrong::Damaged(format!("it has memory at {address:#x}")));
            }
        }
        Ok(())
    }
}

fn read_u32(input: &mut impl Read) -> io::Result<u32> {
    let mut bytes = [0; 4];
    input.read_exact(&mut bytes)?;
    Ok(u32::from_le_bytes(bytes))
}

fn read_u64(input: &mut impl Read) -> io::Result<u64> {
    let mut bytes = [0; 8];
    input.read_exact(&mut bytes)?;
    Ok(u64::from_le_bytes(bytes))
}

/// Reads, and writes what it has read to a file.
struct Copy<R> {
    from: R,
    to: BufWriter<File>,
    failed: Option<io::Error>,
}

impl<R: Read> Read for Copy<R> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let count = self.from.read(bytes)?;
        if let Err(error) = self.to.write_all(&bytes[..count]) {
            self.failed = Some(error);
            return Err(io::ErrorKind::Other.into());
        }
        Ok(count)
    }
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
    let new = path.with_file_name(format!(
        ".{}.{}",
        path.file_name().unwrap_or_default().to_string_lossy(),
        std::process::id()
    ));
    let file = File::options()
        .write(true)
        .create_new(true)
        .open(&new)
        .map_err(|error| {
            Error::input(
                format!("{} can't be made: {error}", new.display()),
                "give a file in a folder that this user may write to",
            )
        })?;
    let stored = client.call(&Request::Snapshot {}).and_then(|Nothing {}| {
        store(client.stream(), (name, origin), file, path)?;
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

/// Stores what a machine writes, with the name and origin that are known of it in place of those that it says.
fn store(
    mut from: impl Read,
    (name, origin): (&Name, Origin),
    file: File,
    path: &Path,
) -> Result<()> {
    let mut to = BufWriter::with_capacity(RECORD, file);
    let head = Snapshot::open(&mut from).and_then(|(_, state)| {
        let state = State {
            words: origin.words,
            folder: origin.folder,
            name: name.clone(),
            ..state
        };
        Ok(write_head(&mut to, &state)?)
    });
    let mut copy = Copy {
        from,
        to,
        failed: None,
    };
    let read = head.and_then(|()| Snapshot { input: &mut copy }.read_memory(|_, _| true));
    let written = match (read, copy.failed.take()) {
        (_, Some(error)) => Err(error),
        (Err(Wrong::Host(error)), None) => Err(error),
        (Err(wrong), None) => {
            return Err(Error::call(
                "the machine did not write all of it; what it said on standard error tells why",
                io::Error::other(format!("{wrong:?}")),
            ))
        }
        (Ok(()), None) => copy.to.flush().and_then(|()| copy.to.get_ref().sync_all()),
    };
    written.map_err(|error| Error::call(format!("writing {}", path.display()), error))
}

/// Opens a snapshot.
///
/// # Errors
///
/// [`Error::Input`] where it can't be read or is none.
pub fn open(path: &Path) -> Result<(Snapshot<BufReader<File>>, State)> {
    let name = path.display().to_string();
    let file = File::open(path).map_err(|error| {
        Error::input(format!("{name} can't be read: {error}"), "check the file")
    })?;
    Snapshot::open(BufReader::with_capacity(RECORD, file)).map_err(|wrong| wrong.of(&name))
}

#[cfg(test)]
mod tests;
