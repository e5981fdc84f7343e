// SPDX-License-Identifier: GPL-2.0

//! QEMU's firmware configuration device (docs/specs/fw_cfg.rst of QEMU), by its I/O ports without DMA: what
//! firmware wants to know of its machine, as files.

use std::io::Read;

use crate::acpi;
use crate::devices::serial;
use crate::layout;

/// The port of 16 bits that selects an item; the port that reads it byte for byte lies behind.
pub const SELECTOR: u16 = 0x510;
/// Reads the selected item.
pub const DATA: u16 = 0x511;

/// Items: the signature, and the list of the files. The files are those from `FIRST_FILE` on.
const SIGNATURE: u16 = 0;
const DIRECTORY: u16 = 0x19;
const FIRST_FILE: u16 = 0x20;
/// The file with the RSDP.
const RSDP: &str = "etc/acpi/rsdp";
/// The length of a file's name, with its closing NUL.
const NAME: usize = 56;

/// The device.
#[derive(Default)]
pub struct FwCfg {
    /// Names and contents.
    files: Vec<(&'static str, Vec<u8>)>,
    directory: Vec<u8>,
    selected: u16,
    position: usize,
}

impl FwCfg {
    /// What firmware is to know of a machine of `memory` bytes, and whether the serial port is its screen.
    #[must_use]
    pub fn new(memory: u64, screen: bool) -> Self {
        let acpi = layout::acpi_tables_of_firmware(memory);
        let mut map = Vec::new();
        for range in layout::ram(memory) {
            let end = if range.start < acpi { acpi } else { range.end };
            map.extend(e820(range.start, end, layout::Kind::Ram));
        }
        map.extend(e820(acpi, acpi + layout::ACPI_SIZE, layout::Kind::Reserved));
        let mut files = vec![
            ("etc/e820", map),
            (RSDP, acpi::rsdp(acpi).to_vec()),
            ("etc/table-loader", place_rsdp()),
        ];
        if screen {
            files.push(("etc/sercon-port", serial::BASE.to_le_bytes().to_vec()));
        }
        Self::with_files(files)
    }

    fn with_files(files: Vec<(&'static str, Vec<u8>)>) -> Self {
        let mut directory = (files.len() as u32).to_be_bytes().to_vec();
        for (select, (name, content)) in (FIRST_FILE..).zip(&files) {
            directory.extend_from_slice(&(content.len() as u32).to_be_bytes());
            directory.extend_from_slice(&select.to_be_bytes());
            directory.extend_from_slice(&[0, 0]);
            let mut padded = [0; NAME];
            padded[..name.len()].copy_from_slice(name.as_bytes());
            directory.extend_from_slice(&padded);
        }
        Self {
            files,
            directory,
            ..Self::default()
        }
    }

    /// Which item is selected, and how far it was read.
    #[must_use]
    pub fn place(&self) -> (u16, usize) {
        (self.selected, self.position)
    }

    /// Goes back to such a place.
    pub fn go_to(&mut self, place: (u16, usize)) {
        (self.selected, self.position) = place;
    }

    /// The guest selects an item.
    pub fn select(&mut self, data: &[u8]) {
        if let Ok(bytes) = data.try_into() {
            self.selected = u16::from_le_bytes(bytes);
            self.position = 0;
        }
    }

    /// The guest reads the selected item on. Behind its end, and in one that is not there, are zeroes.
    pub fn read(&mut self, data: &mut [u8]) {
        let item: &[u8] = match self.selected {
            SIGNATURE => b"QEMU",
            DIRECTORY => &self.directory,
            file => {
                let index = file.checked_sub(FIRST_FILE).map(usize::from);
                let file = index.and_then(|index| self.files.get(index));
                file.map_or(&[], |(_, content)| content)
            }
        };
        data.fill(0);
        let _ = item.get(self.position..).unwrap_or_default().read(data);
        self.position = self.position.saturating_add(data.len());
    }
}

/// An entry of the memory map.
fn e820(start: u64, end: u64, kind: layout::Kind) -> Vec<u8> {
    let numbers = [start, end - start].map(u64::to_le_bytes).concat();
    [numbers.as_slice(), &(kind as u32).to_le_bytes()].concat()
}

/// Has firmware put the RSDP to where an operating system looks for it, at a multiple of 16 (struct
/// `BiosLinkerLoaderEntry` in hw/acpi/bios-linker-loader.c of QEMU). The tables are in memory already.
fn place_rsdp() -> Vec<u8> {
    const ALLOCATE: u32 = 1;
    const ALIGNMENT: u32 = 16;
    const BELOW_1M: u8 = 2;
    let mut command = ALLOCATE.to_le_bytes().to_vec();
    command.extend_from_slice(RSDP.as_bytes());
    command.resize(4 + NAME, 0);
    command.extend_from_slice(&ALIGNMENT.to_le_bytes());
    command.push(BELOW_1M);
    command.resize(128, 0);
    command
}

#[cfg(test)]
mod tests {
    use super::*;

    fn item(device: &mut FwCfg, select: u16, length: usize) -> Vec<u8> {
        device.select(&select.to_le_bytes());
        let mut bytes = vec![0xff; length];
        bytes.chunks_mut(3).for_each(|part| device.read(part));
        bytes
    }

    #[test]
    fn files_are_found_by_the_directory() {
        let mut device = FwCfg::with_files(vec![("one", vec![1; 5]), ("two", vec![2, 3])]);
        assert_eq!(item(&mut device, SIGNATURE, 5), b"QEMU\0");
        let directory = item(&mut device, DIRECTORY, 4 + 2 * 64);
        assert_eq!(directory[..4], [0, 0, 0, 2]);
        assert_eq!(directory[68..80], *b"\0\0\0\x02\0\x21\0\0two\0");
        assert_eq!(item(&mut device, 0x21, 4), [2, 3, 0, 0]);
        assert_eq!(item(&mut device, 0x22, 2), [0, 0]);
        assert_eq!(item(&mut device, 0xffff, 2), [0, 0]);
    }

    #[test]
    fn the_memory_map_has_all_memory_but_the_tables() {
        let device = FwCfg::new(4 << 30, true);
        let (name, map) = &device.files[0];
        assert_eq!((*name, map.len()), ("etc/e820", 60));
        let field = |at: usize| u64::from_le_bytes(map[at..at + 8].try_into().unwrap());
        let tables = layout::HOLE - layout::ACPI_SIZE;
        assert_eq!((field(0), field(8), map[16]), (0, tables, 1));
        assert_eq!((field(20), field(28)), (layout::ABOVE_4G, 1 << 30));
        assert_eq!((field(40), field(48), map[56]), (tables, 0x1_0000, 2));
    }
}
