// SPDX-License-Identifier: GPL-2.0

//! The file of a disk, raw or qcow2.

use std::fmt::Display;
use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::path::{Path, PathBuf};

use imago::qcow2::Qcow2;
use imago::{FormatAccess, Mapping};
use rustix::fs::{fallocate, flock, seek, FallocateFlags, FlockOperation, SeekFrom};
use rustix::io::Errno;

use super::{halted, Halt, BUFFER, DISCARDS, SECTOR};
use crate::arguments::Disk;
use crate::error::{Error, Result};

/// With these bytes a qcow2 file begins.
const QCOW2_MAGIC: &[u8; 4] = b"QFI\xfb";

/// The largest sectors of a host's disk that are cared for; it makes holes of whole ones alone.
const SECTOR_MOST: u64 = 4096;

/// How a file holds a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// Byte for byte.
    Raw,
    /// QEMU's format.
    Qcow2,
}

enum Access {
    Raw(File),
    /// By the library, and its file.
    Qcow2(Box<FormatAccess<imago::file::File>>, File),
}

/// A disk's file, open and locked.
pub(super) struct Image {
    pub(super) path: PathBuf,
    access: Access,
    /// The disk's size in bytes.
    pub(super) size: u64,
    pub(super) readonly: bool,
    /// The format was not named but guessed to be raw: then the guest must not make the file look like
    /// another one, which the next start would read otherwise.
    guessed_raw: bool,
    /// A flush failed: what was written before may be lost, and no later flush can say otherwise.
    broken: bool,
}

impl Image {
    /// Opens and locks the file.
    pub(super) fn open(disk: &Disk) -> Result<Self> {
        let path = &disk.path;
        let file = open_file(path, disk.readonly)?;
        lock(&file, path, disk.readonly)?;
        let broken = |error: io::Error| {
            let what = format!("can't be read: {error}");
            refused(path, what, "check the file")
        };
        let mut magic = [0; 4];
        let qcow2 = match file.read_exact_at(&mut magic, 0) {
            Ok(()) => &magic == QCOW2_MAGIC,
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => false,
            Err(error) => return Err(broken(error)),
        };
        let found = if qcow2 { Format::Qcow2 } else { Format::Raw };
        let (access, size) = match disk.format.unwrap_or(found) {
            Format::Qcow2 if !qcow2 => {
                let next = "leave format=qcow2 out, or name another file";
                return Err(refused(path, "is no qcow2 image", next));
            }
            Format::Qcow2 => open_qcow2(file, path, disk.readonly)?,
            Format::Raw => {
                let size = raw_size(&file).map_err(broken)?;
                check_size(path, size, "truncate -s 1G FILE")?;
                (Access::Raw(file), size)
            }
        };
        Ok(Self {
            path: path.clone(),
            guessed_raw: disk.format.is_none() && matches!(access, Access::Raw(_)),
            access,
            size,
            readonly: disk.readonly,
            broken: false,
        })
    }

    /// Reads from `offset` on; the caller has checked that all lies inside the disk, here and below.
    pub(super) fn read(&self, bytes: &mut [u8], offset: u64) -> io::Result<()> {
        match &self.access {
            Access::Raw(file) => file.read_exact_at(bytes, offset),
            Access::Qcow2(image, _) => guarded(|| image.read(bytes, offset)),
        }
    }

    pub(super) fn write(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        if self.guessed_raw && offset == 0 && bytes.starts_with(QCOW2_MAGIC) {
            return Err(io::Error::other(
                "the guest wants to make a qcow2 image of it; format=raw lets it",
            ));
        }
        #[cfg(test)]
        if FULL.get() {
            return Err(Errno::NOSPC.into());
        }
        match &self.access {
            Access::Raw(file) => file.write_all_at(bytes, offset),
            Access::Qcow2(image, _) => guarded(|| image.write(bytes, offset)),
        }
    }

    /// Makes all that was written durable.
    ///
    /// A file that is synchronized in vain is never said to be full, whatever the cause: the host has given up what
    /// was written, so that another try would succeed without it.
    pub(super) fn flush(&mut self) -> io::Result<()> {
        if self.broken {
            return Err(io::Error::other("an earlier flush failed"));
        }
        if let Access::Qcow2(image, _) = &self.access {
            let written = guarded(|| image.flush());
            self.broken = matches!(&written, Err(error) if !is_full(error));
            written?;
        }
        let synchronized = match &self.access {
            Access::Raw(file) => file.sync_data(),
            Access::Qcow2(image, _) => guarded(|| image.sync()),
        };
        #[cfg(test)]
        let synchronized = match SYNC_FULL.get() {
            true => Err(Errno::NOSPC.into()),
            false => synchronized,
        };
        self.broken = synchronized.is_err();
        synchronized.map_err(|error| io::Error::other(error.to_string()))
    }

    /// Gives the room of a range back, where that is possible. What is read there afterwards is anything. Stops at
    /// `halt`, with [`ErrorKind::Interrupted`].
    pub(super) fn discard(&self, offset: u64, length: u64, halt: Halt<'_>) -> io::Result<()> {
        self.release(offset, length, halt, |_, _| Ok(()))
    }

    /// Fills a range with zeroes, and with `unmap` gives its room back where that is possible. Stops as
    /// [`Self::discard`] does.
    pub(super) fn zero(
        &self,
        offset: u64,
        length: u64,
        unmap: bool,
        halt: Halt<'_>,
    ) -> io::Result<()> {
        let fill = |offset: u64, length: u64| {
            let zeroes = vec![0; BUFFER];
            let end = offset + length;
            let mut at = offset;
            while at < end {
                halted(halt)?;
                let count = (end - at).min(BUFFER as u64);
                self.write(&zeroes[..count as usize], at)?;
                at += count;
            }
            Ok(())
        };
        match unmap {
            true => self.release(offset, length, halt, fill),
            false => fill(offset, length),
        }
    }

    /// Makes holes of a range, which read as zeroes, and has `other` see to parts where that is not possible.
    ///
    /// A qcow2 image goes on mapping the range to the same room of its file, which the host has then. Nothing of its
    /// tables changes: the library would give the room to other sectors before the host's disk knows that it
    /// was free, and after a loss of power both had it.
    fn release(
        &self,
        offset: u64,
        length: u64,
        halt: Halt<'_>,
        other: impl Fn(u64, u64) -> io::Result<()>,
    ) -> io::Result<()> {
        let end = offset + length;
        let mut at = offset;
        while at < end {
            halted(halt)?;
            let left = (end - at).min(u64::from(DISCARDS) * SECTOR);
            let most = match at % SECTOR_MOST {
                0 if left > SECTOR_MOST => left - left % SECTOR_MOST,
                inside => left.min(SECTOR_MOST - inside),
            };
            let (hole, count) = match &self.access {
                Access::Raw(file) => (punch(file, at, most), most),
                Access::Qcow2(image, file) => {
                    let (mapping, count) = guarded(|| image.get_mapping(at, most))?;
                    let hole = match mapping {
                        Mapping::Zero { .. } => Ok(()),
                        Mapping::Raw {
                            offset,
                            writable: true,
                            ..
                        } => punch(file, offset, count),
                        Mapping::Eof { .. } => Err(ErrorKind::UnexpectedEof.into()),
                        // It is compressed, or a snapshot has it too.
                        _ => Err(ErrorKind::Unsupported.into()),
                    };
                    (hole, count)
                }
            };
            match hole {
                Err(error) if makes_no_hole(&error) => other(at, count)?,
                result => result?,
            }
            at += count;
        }
        Ok(())
    }

    /// Writes what the library still holds. A raw file has nothing of that kind.
    pub(super) fn settle(&mut self) -> io::Result<()> {
        match &self.access {
            #[cfg(test)]
            Access::Qcow2(..) if FULL.get() => Err(Errno::NOSPC.into()),
            Access::Qcow2(image, _) if !self.readonly => guarded(|| image.flush()),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
thread_local! {
    /// The host's file system is full, for this thread's test.
    pub(super) static FULL: std::cell::Cell<bool> = const { std::cell::Cell::new(false) };
    /// It is found to be full when what was written is to be made durable.
    pub(super) static SYNC_FULL: std::cell::Cell<bool> = const { std::cell::Cell::new(false) };
    /// It makes no holes, and says why.
    pub(super) static NO_HOLES: std::cell::Cell<Option<Errno>> = const { std::cell::Cell::new(None) };
    /// Its sectors have 4 KiB, of which it makes holes whole.
    static WHOLE_HOLES: std::cell::Cell<bool> = const { std::cell::Cell::new(false) };
}

/// Whether the host has no room, and nothing is lost: it may be tried again.
pub(super) fn is_full(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded | ErrorKind::FileTooLarge
    )
}

/// Whether the host has done nothing, and what it was to do can be done otherwise: it can't make holes, it has sectors
/// that are larger than the range is aligned to, or it is too full for the hole itself.
fn makes_no_hole(error: &io::Error) -> bool {
    let kind = error.kind();
    matches!(kind, ErrorKind::Unsupported | ErrorKind::InvalidInput) || is_full(error)
}

/// The user's disk is not what it has to be.
fn refused(path: &Path, what: impl Display, next: &str) -> Error {
    Error::input(format!("--disk {} {what}", path.display()), next)
}

fn open_file(path: &Path, readonly: bool) -> Result<File> {
    let metadata = fs::metadata(path).map_err(|error| {
        let next = match error.kind() {
            ErrorKind::NotFound => "name another, or make one by 'truncate -s 1G FILE'",
            _ => "check the path",
        };
        refused(path, format_args!("can't be opened: {error}"), next)
    })?;
    let kind = metadata.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        let what = "is neither a file nor a block device";
        return Err(refused(path, what, "name another"));
    }
    // To a block device that is to say: nobody else may have it, no file system above all.
    let flags = if kind.is_block_device() && !readonly {
        libc::O_EXCL
    } else {
        0
    };
    let opened = OpenOptions::new()
        .read(true)
        .write(!readonly)
        .custom_flags(flags)
        .open(path);
    opened.map_err(|error| {
        let next = match error.kind() {
            ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem if !readonly => {
                "get the right to write it, or add ',readonly'"
            }
            ErrorKind::PermissionDenied => "get the right to read it",
            ErrorKind::ResourceBusy => "unmount it, or add ',readonly'",
            _ => "check the file",
        };
        refused(path, format_args!("can't be opened: {error}"), next)
    })
}

/// Locks the file, so that no two guests write to it, and none reads what another writes.
fn lock(file: &File, path: &Path, readonly: bool) -> Result<()> {
    let operation = if readonly {
        FlockOperation::NonBlockingLockShared
    } else {
        FlockOperation::NonBlockingLockExclusive
    };
    flock(file, operation).map_err(|error| match error {
        Errno::AGAIN => {
            let next = "end that one, or give both ',readonly'";
            refused(path, "is in use by another guest", next)
        }
        error => Error::call(format!("locking --disk {}", path.display()), error),
    })
}

/// Calls the library, which panics over some damaged tables. It keeps no lock over that, and what it has in
/// memory is no worse than the image.
fn guarded<T>(call: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    catch_unwind(AssertUnwindSafe(call)).unwrap_or_else(|_| {
        let text = "the image is damaged; 'qemu-img check' tells more";
        Err(io::Error::new(ErrorKind::InvalidData, text))
    })
}

fn check_size(path: &Path, size: u64, how: &str) -> Result<()> {
    if size == 0 || !size.is_multiple_of(SECTOR) {
        let what = format!("has {size} bytes, which are no disk of {SECTOR}-byte sectors");
        let next = format!("give it a size, for example by '{how}'");
        return Err(refused(path, what, &next));
    }
    Ok(())
}

fn open_qcow2(file: File, path: &Path, readonly: bool) -> Result<(Access, u64)> {
    let refuse = |what: &str, next| Err(refused(path, what, next));
    let damaged = |error: io::Error| {
        let next = "'qemu-img check' tells more";
        refused(path, format_args!("is damaged: {error}"), next)
    };
    const REPAIR: &str =
        "repair it by 'qemu-img check -r all'; nothing that the guest has flushed is lost";
    const NOT_CLOSED: &str = "was not closed, as its writer was killed";
    let mut tables = Tables::read(&file).map_err(damaged)?;
    if tables.encrypted {
        return refuse(
            "is encrypted",
            "decrypt it by 'qemu-img convert', and have the guest encrypt what it holds",
        );
    }
    match tables.features & !EXTERNAL_DATA {
        0 => {}
        DIRTY => return refuse(NOT_CLOSED, REPAIR),
        features if features & CORRUPT != 0 => return Err(damaged(invalid("it is marked so"))),
        features => {
            return refuse(
                &format!("has features that are not known here ({features:#x})"),
                "make one without by 'qemu-img convert -O qcow2'",
            )
        }
    }
    let open = |writable| -> Result<Qcow2<_>> {
        let storage = file.try_clone().and_then(imago::file::File::try_from);
        let storage = storage.map_err(damaged)?;
        guarded(|| Qcow2::open_image(storage, writable)).map_err(damaged)
    };
    // One that is opened for writing is changed by that: first all is looked at for which it may be refused.
    let mut image = open(false)?;
    let other = image.implicit_backing_file();
    let other = other.or(image.implicit_external_data_file());
    if other.is_some() || image.requires_external_data_file() {
        let other = other.map_or("unknown", String::as_str);
        return refuse(
            &format!("is only a part of a disk, the other being {other:?}"),
            "make one image of both by 'qemu-img convert -O qcow2'",
        );
    }
    let size = tables.disk;
    check_size(path, size, "qemu-img resize FILE 1G")?;
    if !readonly {
        if !tables.is_counted().map_err(damaged)? {
            return refuse(NOT_CLOSED, REPAIR);
        }
        image = open(true)?;
    }
    let image = Box::new(FormatAccess::new(image));
    Ok((Access::Qcow2(image, file), size))
}

/// What the library takes on trust of a qcow2 image (docs/interop/qcow2.rst of QEMU): where its tables lie, and that
/// nothing is encrypted. It also writes to images before it refuses them for their features.
struct Tables<'a> {
    file: &'a File,
    encrypted: bool,
    /// The features without which nobody may open it.
    features: u64,
    /// Size of a cluster, of the file and of the disk, in bytes.
    cluster: u64,
    size: u64,
    disk: u64,
    /// Bits of a refcount.
    width: u64,
    l1: Vec<u64>,
    refcounts: Vec<u64>,
    /// What was read last of a refcount block, and where it lies: little, as each entry of a table may ask for another.
    window: (u64, [u8; SECTOR as usize]),
}

/// The most bytes of an L1 table or a refcount table, as QEMU and the library have it.
const TABLE: u64 = 32 << 20;
/// Bits of a table's entry: where what it names lies, and that it is compressed.
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
const COMPRESSED: u64 = 1 << 62;
/// Features: refcounts may be wrong, all may be, and the data are in another file.
const DIRTY: u64 = 1 << 0;
const CORRUPT: u64 = 1 << 1;
const EXTERNAL_DATA: u64 = 1 << 2;

impl<'a> Tables<'a> {
    fn read(file: &'a File) -> io::Result<Self> {
        let mut header = [0; 104];
        file.read_exact_at(&mut header, 0)?;
        // The header in words of 32 bits.
        let (words, _) = header.as_chunks();
        let word = |index: usize| u64::from(u32::from_be_bytes(words[index]));
        let long = |index| (word(index) << 32) | word(index + 1);
        let (features, order) = match word(1) {
            0..3 => (0, 4),
            _ => (long(18), word(24)),
        };
        if !(9..=21).contains(&word(5)) || order > 6 {
            return Err(invalid("clusters or refcounts have an unknown size"));
        }
        let mut tables = Self {
            file,
            encrypted: word(8) != 0,
            features,
            cluster: 1 << word(5),
            size: raw_size(file)?,
            disk: long(6),
            width: 1 << order,
            l1: Vec::new(),
            refcounts: Vec::new(),
            window: (0, [0; SECTOR as usize]),
        };
        // A disk of no size may have none.
        if word(9) != 0 {
            tables.l1 = tables.entries(long(10), word(9) * 8)?;
        }
        tables.refcounts = tables.entries(long(12), word(14) * tables.cluster)?;
        for block in tables.refcounts.iter().filter(|block| **block != 0) {
            tables.inside(*block, tables.cluster)?;
        }
        // As QEMU does. One that grows would take as much memory as the header says.
        if (tables.l1.len() as u64 * (tables.cluster / 8) * tables.cluster) < tables.disk {
            return Err(invalid("its table is too small for the disk"));
        }
        // All are looked through, which takes no longer than the file has room where no two lie in one place.
        let all = tables.l1.iter().chain(&tables.refcounts);
        let all = all.map(|entry| entry & OFFSET).filter(|at| *at != 0);
        let mut all: Vec<u64> = all.collect();
        all.sort_unstable();
        if all.windows(2).any(|pair| pair[0] == pair[1]) {
            return Err(invalid("two tables lie in the same place"));
        }
        Ok(tables)
    }

    fn inside(&self, at: u64, length: u64) -> io::Result<()> {
        let end = at.checked_add(length).filter(|end| *end <= self.size);
        if end.is_none() || at < self.cluster || !at.is_multiple_of(self.cluster) || length > TABLE
        {
            return Err(invalid("a table lies outside the file or is too large"));
        }
        Ok(())
    }

    /// The entries of the table of `length` bytes at `at`.
    fn entries(&self, at: u64, length: u64) -> io::Result<Vec<u64>> {
        self.inside(at, length)?;
        let mut bytes = vec![0; length as usize];
        self.file.read_exact_at(&mut bytes, at)?;
        let (entries, _) = bytes.as_chunks();
        Ok(entries.iter().copied().map(u64::from_be_bytes).collect())
    }

    /// Whether all that is used is counted as used; the library would else use the same room twice. It is not where
    /// a writer was killed: the library names a new table before it writes that the table's room is used. Nor where
    /// the host lost power: between the two it does not wait for the disk.
    fn is_counted(&mut self) -> io::Result<bool> {
        for block in self.refcounts.clone() {
            if block != 0 && !self.has_count(block)? {
                return Ok(false);
            }
        }
        for l1_entry in std::mem::take(&mut self.l1) {
            let table = l1_entry & OFFSET;
            if table == 0 {
                continue;
            }
            if !self.has_count(table)? {
                return Ok(false);
            }
            self.inside(table, self.cluster)?;
            // What lies in a hole of the file names nothing.
            match seek(self.file, SeekFrom::Data(table)) {
                Ok(data) if data >= table + self.cluster => continue,
                Err(Errno::NXIO) => continue,
                _ => {}
            }
            for entry in self.entries(table, self.cluster)? {
                let cluster = entry & OFFSET;
                if cluster != 0 && entry & COMPRESSED == 0 && !self.has_count(cluster)? {
                    return Ok(false);
                }
            }
        }
        Ok(true)
    }

    /// Whether the cluster at `at` has a refcount that is not 0.
    fn has_count(&mut self, at: u64) -> io::Result<bool> {
        let (index, counts) = (at / self.cluster, self.cluster * 8 / self.width);
        let block = usize::try_from(index / counts).ok();
        let block = block.and_then(|block| self.refcounts.get(block));
        let Some(block) = block.filter(|block| **block != 0) else {
            return Ok(false);
        };
        let bit = index % counts * self.width;
        let at = block + bit / 8 / SECTOR * SECTOR;
        if at != self.window.0 {
            self.file.read_exact_at(&mut self.window.1, at)?;
            self.window.0 = at;
        }
        let bit = bit % (SECTOR * 8);
        let bytes = (bit / 8) as usize..(bit + self.width).div_ceil(8) as usize;
        let mask = (1_u64 << self.width.min(8)) - 1;
        let count = self.window.1.get(bytes).unwrap_or_default();
        Ok(count
            .iter()
            .any(|byte| u64::from(*byte) >> (bit % 8) & mask != 0))
    }
}

fn invalid(text: &'static str) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, text)
}

/// The size of a file or of a block device.
fn raw_size(mut file: &File) -> io::Result<u64> {
    io::Seek::seek(&mut file, io::SeekFrom::End(0))
}

/// Makes a hole, which reads as zeroes.
fn punch(file: &File, offset: u64, length: u64) -> io::Result<()> {
    if length == 0 {
        return Ok(());
    }
    #[cfg(test)]
    if let Some(error) = NO_HOLES.get() {
        return Err(error.into());
    }
    #[cfg(test)]
    if WHOLE_HOLES.get() && !(offset.is_multiple_of(4096) && length.is_multiple_of(4096)) {
        return Err(ErrorKind::InvalidInput.into());
    }
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    rustix::io::retry_on_intr(|| fallocate(file, flags, offset, length)).map_err(io::Error::from)
}

#[cfg(test)]
mod tests;
