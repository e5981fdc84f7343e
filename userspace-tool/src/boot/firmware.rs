// SPDX-License-Identifier: GPL-2.0

//! Firmware of the user's: a ROM image that the first CPU enters at its reset vector.

use std::io::Read;
use std::path::Path;

use super::image::Image;
use super::write;
use crate::error::{Error, Result};
use crate::layout::{FIRMWARE_END, FIRMWARE_SHADOW, FIRMWARE_SIZE, HIGH_MEMORY, PAGE_SIZE};
use crate::memory::Memory;
use crate::size;

/// How far below its end the CPU enters it (SDM volume 3, 10.1.4).
const RESET_VECTOR: usize = 16;

/// The image, read and looked at.
#[derive(Debug)]
pub struct Firmware {
    bytes: Vec<u8>,
}

impl Firmware {
    /// Reads the file.
    ///
    /// # Errors
    ///
    /// [`Error::Input`] where it can't be read or is no firmware of a PC.
    pub fn open(path: &Path) -> Result<Self> {
        let image = Image::open(path, "--firmware")?;
        let name = image.path.display();
        let give = "give a PC's firmware, such as /usr/share/seabios/bios-256k.bin";
        if !FIRMWARE_SIZE.contains(&image.size) || image.size % PAGE_SIZE != 0 {
            return Err(Error::input(
                format!(
                    "{name} has {}, and firmware has {} to {} in pages of 4 KiB",
                    size::text(image.size),
                    size::text(*FIRMWARE_SIZE.start()),
                    size::text(*FIRMWARE_SIZE.end())
                ),
                give,
            ));
        }
        let mut bytes = Vec::new();
        // As much as it had when it was looked at, should it grow meanwhile.
        let read = (&image.file).take(image.size).read_to_end(&mut bytes);
        read.map_err(|e| image.unreadable(&e))?;
        let entry = bytes.len().checked_sub(RESET_VECTOR).map(|at| bytes[at]);
        // Neither what an empty flash chip holds nor zeros are a jump.
        if bytes.len() as u64 != image.size || matches!(entry, None | Some(0 | 0xff)) {
            return Err(Error::input(
                format!("{name} has no code at the reset vector, 16 bytes before its end"),
                give,
            ));
        }
        Ok(Self { bytes })
    }

    /// Its length in bytes, whole pages.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.bytes.len() as u64
    }

    /// Writes it to its place below 4 GiB, and its end to the end of the first MiB.
    pub(super) fn load(&self, memory: &Memory) -> Result<()> {
        let shadow = self.size().min(FIRMWARE_SHADOW);
        let end = &self.bytes[(self.size() - shadow) as usize..];
        write(memory, FIRMWARE_END - self.size(), &self.bytes)?;
        write(memory, HIGH_MEMORY - shadow, end)
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::memory;

    fn image(size: usize) -> Vec<u8> {
        let mut bytes = vec![0; size];
        for (page, bytes) in bytes.chunks_mut(PAGE_SIZE as usize).enumerate() {
            bytes[..2].copy_from_slice(&(page as u16).to_le_bytes());
        }
        bytes
    }

    #[test]
    fn it_ends_below_4_gib_and_below_1_mib() -> Result<()> {
        for pages in [16_u64, 32, 64, 128] {
            let firmware = Firmware {
                bytes: image((pages * PAGE_SIZE) as usize),
            };
            let memory = memory::allocate(4 << 20, firmware.size())?;
            firmware.load(&memory)?;
            let page_at = |address: u64| -> u16 {
                memory
                    .read_obj(GuestAddress(address))
                    .expect("there is memory")
            };
            let last = pages as u16 - 1;
            assert_eq!(page_at(0x1_0000_0000 - pages * PAGE_SIZE), 0);
            assert_eq!((page_at(0xffff_f000), page_at(0xf_f000)), (last, last));
            assert_eq!(page_at(0xf_0000), last - 15);
            // More segments where the image has them.
            let before = |count| pages.saturating_sub(count);
            assert_eq!(u64::from(page_at(0xe_0000)), before(32));
            assert_eq!(u64::from(page_at(0xc_0000)), before(64));
        }
        Ok(())
    }
}
