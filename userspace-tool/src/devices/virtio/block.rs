// SPDX-License-Identifier: GPL-2.0

//! The block device (virtio 1.3, 5.2): a disk of the guest's in a file of the host's.

mod image;

use std::io::{self, Read, Write};
use std::time::Duration;

use virtio_bindings::virtio_blk as blk;
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use virtio_queue::{Reader, Writer};
use vm_memory::{ByteValued, Le32, Le64};

use super::rings::Halt;
use super::{bit, Counter, Device, Fault, Rings};
use crate::arguments::Disk;
use crate::error::{say, Error, Result};
pub use image::Format;
use image::Image;

/// The unit of the protocol, in bytes.
pub const SECTOR: u64 = 512;
/// The most segments of a request, and the most bytes of each.
const SEGMENTS: u32 = 126;
const SEGMENT_SIZE: u32 = 512 << 10;
/// The most bytes of a request.
const MOST: usize = SEGMENTS as usize * SEGMENT_SIZE as usize;
/// The most ranges of a request that discards or zeroes, and the most sectors of one that is zeroed.
const RANGES: u32 = 16;
const ZEROES: u32 = 32 << 11;
/// The most sectors of a request that discards, as a driver is told: each cluster of a qcow2 image may take a look at its
/// tables and a call of the host's, and the device does nothing else meanwhile. More is done all the same, so much at
/// once: a driver in a snapshot may have been told so.
const DISCARDS: u32 = 128 << 11;
/// How much is on its way between the file and the guest's memory at once.
const BUFFER: usize = 64 << 10;
/// How long to wait before a write to a full disk is tried again.
const RETRY: Duration = Duration::from_secs(1);

/// Bytes of a range to discard or to fill with zeroes (5.2.6).
const RANGE: usize = 16;

/// A disk.
pub struct Block {
    image: Image,
    serial: String,
    buffer: Vec<u8>,
    /// The driver does not flush: each write is made durable at once.
    write_through: bool,
    /// The host's error was said once.
    told: bool,
    counters: Counters,
}

/// What a disk counts: requests that the driver was answered, and what those have done that went well.
#[derive(Default)]
struct Counters {
    requests: Counter,
    read: Counter,
    written: Counter,
    flushes: Counter,
}

/// Why a request was not done.
enum Failure {
    /// The driver is told this status.
    Status(u32),
    /// There is no room: it is tried again, and the driver is told nothing.
    Full,
    /// The machine is to pause, or has ended: it is done from its beginning when the machine goes on.
    Halted,
    /// The host's error: the driver is told of an I/O error, and the user.
    Host(io::Error),
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::Interrupted => Self::Halted,
            _ if image::is_full(&error) => Self::Full,
            _ => Self::Host(error),
        }
    }
}

/// What a request should have and has not.
const BROKEN: Failure = Failure::Status(blk::VIRTIO_BLK_S_IOERR);
const UNSUPPORTED: Failure = Failure::Status(blk::VIRTIO_BLK_S_UNSUPP);

type Done<T> = std::result::Result<T, Failure>;

impl Block {
    /// Opens the disk that the user named.
    ///
    /// # Errors
    ///
    /// [`Error::Input`] where it can't be opened, is in use or is damaged.
    pub fn open(disk: &Disk) -> Result<Self> {
        Ok(Self {
            image: Image::open(disk)?,
            serial: disk.serial.clone().unwrap_or_default(),
            buffer: Vec::new(),
            write_through: false,
            told: false,
            counters: Counters::default(),
        })
    }

    /// Does the request of a chain. Returns how many bytes went to `writer`.
    fn serve(
        &mut self,
        reader: &mut Reader<'_>,
        writer: &mut Writer<'_>,
        halt: Halt<'_>,
    ) -> Done<u32> {
        // The head of a request (5.2.6).
        let kind: Le32 = next(reader)?;
        let _reserved: Le32 = next(reader)?;
        let sector = next::<Le64>(reader)?.to_native();
        match kind.to_native() {
            blk::VIRTIO_BLK_T_IN => {
                let length = writer.available_bytes();
                self.transfer(sector, length, halt, |image, piece, offset| {
                    image.read(piece, offset)?;
                    writer.write_all(piece).map_err(|_| BROKEN)
                })?;
                self.counters.read.add(length as u64);
            }
            blk::VIRTIO_BLK_T_OUT if self.image.readonly => return Err(BROKEN),
            blk::VIRTIO_BLK_T_OUT => {
                let length = reader.available_bytes();
                self.transfer(sector, length, halt, |image, piece, offset| {
                    reader.read_exact(piece).map_err(|_| BROKEN)?;
                    Ok(image.write(piece, offset)?)
                })?;
                self.write_through()?;
                self.counters.written.add(length as u64);
            }
            blk::VIRTIO_BLK_T_FLUSH => {
                self.image.flush()?;
                self.counters.flushes.add(1);
            }
            blk::VIRTIO_BLK_T_GET_ID => {
                let mut id = [0; blk::VIRTIO_BLK_ID_BYTES as usize];
                let length = self.serial.len().min(id.len());
                id[..length].copy_from_slice(&self.serial.as_bytes()[..length]);
                writer.write_all(&id).map_err(|_| BROKEN)?;
            }
            kind @ (blk::VIRTIO_BLK_T_DISCARD | blk::VIRTIO_BLK_T_WRITE_ZEROES) => {
                self.clear(kind == blk::VIRTIO_BLK_T_WRITE_ZEROES, reader, halt)?;
                self.write_through()?;
            }
            _ => return Err(UNSUPPORTED),
        }
        Ok(writer.bytes_written() as u32)
    }

    /// Makes what was written durable where the driver does not flush.
    fn write_through(&mut self) -> io::Result<()> {
        match self.write_through {
            true => self.image.flush(),
            false => Ok(()),
        }
    }

    /// Where the sectors from `sector` on lie whose data has `length` bytes.
    fn place(&self, sector: u64, length: u64) -> Done<u64> {
        let offset = sector.checked_mul(SECTOR).ok_or(BROKEN)?;
        let end = offset.checked_add(length).ok_or(BROKEN)?;
        if end > self.image.size || !length.is_multiple_of(SECTOR) {
            return Err(BROKEN);
        }
        Ok(offset)
    }

    /// Has `work` read or write `length` bytes from `sector` on, a piece after the other: where each lies on the disk, and
    /// room for its bytes.
    fn transfer(
        &mut self,
        sector: u64,
        length: usize,
        halt: Halt<'_>,
        mut work: impl FnMut(&Image, &mut [u8], u64) -> Done<()>,
    ) -> Done<()> {
        let mut offset = self.place(sector, length as u64)?;
        if length > MOST {
            return Err(BROKEN);
        }
        self.buffer.resize(BUFFER, 0);
        let mut left = length;
        while left > 0 {
            halted(halt)?;
            let piece = &mut self.buffer[..left.min(BUFFER)];
            work(&self.image, piece, offset)?;
            left -= piece.len();
            offset += piece.len() as u64;
        }
        Ok(())
    }

    /// Discards the ranges that `reader` has, or fills them with zeroes.
    fn clear(&mut self, zero: bool, reader: &mut Reader<'_>, halt: Halt<'_>) -> Done<()> {
        let length = reader.available_bytes();
        let count = length / RANGE;
        if !length.is_multiple_of(RANGE) || count > RANGES as usize || self.image.readonly {
            return Err(BROKEN);
        }
        for _ in 0..count {
            let sector = next::<Le64>(reader)?.to_native();
            let sectors = next::<Le32>(reader)?.to_native();
            let flags = next::<Le32>(reader)?.to_native();
            let unmap = match (zero, flags) {
                (_, 0) => false,
                (true, blk::VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP) => true,
                _ => return Err(UNSUPPORTED),
            };
            let length = u64::from(sectors) * SECTOR;
            let offset = self.place(sector, length)?;
            match zero {
                true if sectors > ZEROES => return Err(BROKEN),
                true => self.image.zero(offset, length, unmap, halt)?,
                false => self.image.discard(offset, length, halt)?,
            }
        }
        Ok(())
    }
}

impl Device for Block {
    fn id(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn name(&self) -> String {
        format!("disk {}", self.image.path.display())
    }

    fn features(&self) -> u64 {
        let mut features = bit(blk::VIRTIO_BLK_F_SIZE_MAX)
            | bit(blk::VIRTIO_BLK_F_SEG_MAX)
            | bit(blk::VIRTIO_BLK_F_BLK_SIZE)
            | bit(blk::VIRTIO_BLK_F_FLUSH);
        features |= if self.image.readonly {
            bit(blk::VIRTIO_BLK_F_RO)
        } else {
            bit(blk::VIRTIO_BLK_F_DISCARD) | bit(blk::VIRTIO_BLK_F_WRITE_ZEROES)
        };
        features
    }

    fn queue_sizes(&self) -> &[u16] {
        &[256]
    }

    /// `struct virtio_blk_config` (5.2.4) up to `write_zeroes_may_unmap`.
    fn config(&self) -> Vec<u8> {
        let mut config = vec![0; 60];
        let mut put =
            |at: usize, value: u32| config[at..at + 4].copy_from_slice(&value.to_le_bytes());
        let sectors = self.image.size / SECTOR;
        put(0, sectors as u32);
        put(4, (sectors >> 32) as u32);
        put(8, SEGMENT_SIZE);
        put(12, SEGMENTS);
        put(20, SECTOR as u32);
        // Discarding: the most sectors, the most ranges, the alignment. Zeroing: the same, and unmapping.
        put(36, DISCARDS);
        put(40, RANGES);
        put(44, 1);
        put(48, ZEROES);
        put(52, RANGES);
        put(56, 1);
        config
    }

    fn activate(&mut self, features: u64) {
        self.write_through = features & bit(blk::VIRTIO_BLK_F_FLUSH) == 0;
    }

    fn process(&mut self, queue: usize, rings: &mut Rings<'_>) -> std::result::Result<(), Fault> {
        while let Some(chain) = rings.pop(queue)? {
            let mut reader = chain.clone().reader(rings.memory())?;
            let mut writer = chain.clone().writer(rings.memory())?;
            // The status is the last byte.
            let end = writer.available_bytes().saturating_sub(1);
            let mut status_writer = writer.split_at(end)?;
            let (status, written) = match self.serve(&mut reader, &mut writer, rings.halt()) {
                Ok(written) => (blk::VIRTIO_BLK_S_OK, written),
                Err(Failure::Status(status)) => (status, 0),
                Err(Failure::Full) => {
                    rings.put_back(queue);
                    rings.stuck(
                        RETRY,
                        format!("there is no room for {}; make some", self.name()),
                    );
                    return Ok(());
                }
                Err(Failure::Halted) => {
                    rings.put_back(queue);
                    rings.again(queue);
                    return Ok(());
                }
                Err(Failure::Host(error)) => {
                    if !std::mem::replace(&mut self.told, true) {
                        say(format_args!("{}: {error}", self.name()));
                    }
                    (blk::VIRTIO_BLK_S_IOERR, 0)
                }
            };
            status_writer
                .write_all(&[status as u8])
                .map_err(|_| Fault::Guest("a request has no room for its status".into()))?;
            self.counters.requests.add(1);
            // The status counts where nothing in front of it is left as it was (2.7.8.2).
            let written = written + u32::from(written as usize == end);
            rings.push(queue, &chain, written)?;
        }
        Ok(())
    }

    fn counters(&self) -> Vec<(&'static str, Counter)> {
        let counters = &self.counters;
        vec![
            ("requests", counters.requests.clone()),
            ("read_bytes", counters.read.clone()),
            ("written_bytes", counters.written.clone()),
            ("flushes", counters.flushes.clone()),
        ]
    }

    fn settle(&mut self) -> Result<()> {
        let what = format!("writing the rest of {}", self.name());
        self.image
            .settle()
            .map_err(|error| Error::call(what, error))
    }
}

/// Fails where the machine is to halt.
fn halted(halt: Halt<'_>) -> io::Result<()> {
    if halt() {
        return Err(io::ErrorKind::Interrupted.into());
    }
    Ok(())
}

/// The next part of a request.
fn next<T: ByteValued>(reader: &mut Reader<'_>) -> Done<T> {
    reader.read_obj().map_err(|_| BROKEN)
}

#[cfg(test)]
mod tests;
