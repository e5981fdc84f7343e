// SPDX-License-Identifier: GPL-2.0

//! Loading what the guest starts with: a kernel by Linux's boot protocols for 64 and 32 bits
//! (Documentation/arch/x86/boot.rst), or firmware.

pub mod entry;
mod firmware;
mod image;

use vm_memory::{Bytes, GuestAddress, GuestMemory, ReadVolatile};

use linux_loader::bootparam::{boot_e820_entry, boot_params};

use crate::error::{Error, Result};
use crate::layout;
use crate::memory::Memory;
use crate::size;

use crate::acpi;
use crate::arguments::RunOptions;
use entry::Entry;
use firmware::Firmware;
use image::{Images, Kernel};

/// `type_of_loader` of a boot loader without a number of its own.
const LOADER_UNDEFINED: u8 = 0xff;
/// `boot_flag` and `header` of the setup header, which a kernel in ELF form comes without.
const BOOT_FLAG: u16 = 0xaa55;
const HEADER_MAGIC: u32 = 0x5372_6448;
/// The memory map of the zero page has that many places.
const E820_PLACES: usize = 128;

/// What the guest starts with, opened and looked at.
#[derive(Debug)]
pub enum Software {
    /// A kernel, and its initial RAM disk.
    Kernel(Images),
    /// Firmware.
    Firmware(Firmware),
}

/// How the CPUs start.
#[derive(Clone, Copy, Debug)]
pub enum Start {
    /// As reset leaves them: the first one at the reset vector.
    Reset,
    /// As firmware leaves them for a kernel: the first one at its entry.
    Kernel(Entry),
}

impl Software {
    /// Opens the files that the options name.
    ///
    /// # Errors
    ///
    /// [`Error::Input`] where one can't be read or is something else.
    pub fn open(options: &RunOptions) -> Result<Self> {
        match (&options.kernel, &options.firmware) {
            (_, Some(firmware)) => Firmware::open(firmware).map(Self::Firmware),
            (Some(kernel), None) => {
                Images::open(kernel, options.initrd.as_deref()).map(Self::Kernel)
            }
            // The command line's rules do not let it through.
            (None, None) => Err(Error::input(
                "nothing to run",
                "give --kernel or --firmware",
            )),
        }
    }

    /// How much memory the firmware needs for itself, in bytes.
    #[must_use]
    pub fn rom_size(&self) -> u64 {
        match self {
            Self::Kernel(_) => 0,
            Self::Firmware(firmware) => firmware.size(),
        }
    }

    /// Writes it into `memory`, with all that it wants to find there: so many virtio devices too. Says how the CPUs start.
    ///
    /// # Errors
    ///
    /// [`Error::Input`] where it does not fit, or is not what it looked like.
    pub fn load(
        &mut self,
        memory: &Memory,
        options: &RunOptions,
        virtio_devices: usize,
    ) -> Result<Start> {
        match self {
            Self::Firmware(firmware) => {
                firmware.load(memory)?;
                let tables = layout::acpi_tables_of_firmware(options.memory);
                acpi::write(memory, tables, options.cpus as u8, virtio_devices)?;
                Ok(Start::Reset)
            }
            Self::Kernel(images) => {
                let command_line = options.guest_command_line();
                let size = options.memory;
                let entry = load_kernel(images, memory, size, &command_line)?;
                entry::write_tables(memory, entry.mode)?;
                let tables = layout::ACPI_TABLES;
                acpi::write(memory, tables, options.cpus as u8, virtio_devices)?;
                Ok(Start::Kernel(entry))
            }
        }
    }
}

/// Loads the kernel, the initial RAM disk, the command line and the zero page into `memory`, of
/// `memory_size` bytes. Returns where the CPU enters the kernel.
///
/// # Errors
///
/// [`Error::Input`] where the images do not fit, or are no images.
fn load_kernel(
    images: &mut Images,
    memory: &Memory,
    memory_size: u64,
    command_line: &str,
) -> Result<Entry> {
    let kernel = images.load_kernel(memory, memory_size)?;
    let mut parameters = boot_params {
        hdr: kernel.header,
        ..Default::default()
    };
    let header = &mut parameters.hdr;
    header.boot_flag = BOOT_FLAG;
    header.header = HEADER_MAGIC;
    header.type_of_loader = LOADER_UNDEFINED;

    if command_line.len() as u64 > u64::from(kernel.command_line_most) {
        return Err(Error::input(
            format!(
                "the command line has {} bytes and this kernel takes {}",
                command_line.len(),
                kernel.command_line_most
            ),
            "give a shorter --cmdline",
        ));
    }
    write(memory, layout::COMMAND_LINE, command_line.as_bytes())?;
    write(
        memory,
        layout::COMMAND_LINE + command_line.len() as u64,
        &[0],
    )?;
    header.cmd_line_ptr = low(layout::COMMAND_LINE);

    if let Some((address, length)) = load_initrd(images, memory, memory_size, &kernel)? {
        header.ramdisk_image = low(address);
        header.ramdisk_size = low(length);
    }

    parameters.acpi_rsdp_addr = layout::ACPI_TABLES;
    let map = layout::e820(memory_size);
    debug_assert!(map.len() <= E820_PLACES);
    for (place, (range, kind)) in parameters.e820_table.iter_mut().zip(&map) {
        *place = boot_e820_entry {
            addr: range.start,
            size: range.end - range.start,
            type_: *kind as u32,
        };
        parameters.e820_entries += 1;
    }
    memory
        .write_obj(parameters, GuestAddress(layout::ZERO_PAGE))
        .map_err(|e| Error::call("writing the zero page", std::io::Error::other(e)))?;
    Ok(kernel.entry)
}

/// Reads the initial RAM disk to the end of low memory, or as high as the kernel takes it. Returns where
/// it lies and its length, both below 4 GiB.
fn load_initrd(
    images: &mut Images,
    memory: &Memory,
    memory_size: u64,
    kernel: &Kernel,
) -> Result<Option<(u64, u64)>> {
    let Some(initrd) = images.initrd.as_mut() else {
        return Ok(None);
    };
    let end = memory_size.min(layout::HOLE).min(kernel.initrd_end);
    let start = end
        .checked_sub(initrd.size)
        .map(|start| start & !(layout::PAGE_SIZE - 1));
    let Some(start) = start.filter(|start| *start >= kernel.end) else {
        let needed = kernel
            .end
            .saturating_add(initrd.size)
            .next_multiple_of(size::MIB);
        return Err(too_small(memory_size, needed, "the kernel and the initrd"));
    };
    let length = usize::try_from(initrd.size).unwrap_or(usize::MAX);
    let mut target = memory
        .get_slice(GuestAddress(start), length)
        .map_err(|e| Error::call("placing the initrd", std::io::Error::other(e)))?;
    initrd.file.read_exact_volatile(&mut target).map_err(|e| {
        Error::input(
            format!("{} can't be read: {e}", initrd.path.display()),
            "check the file",
        )
    })?;
    Ok(Some((start, initrd.size)))
}

/// The guest's memory is too small for `what`, which needs `needed` bytes.
fn too_small(memory_size: u64, needed: u64, what: &str) -> Error {
    if needed > layout::HOLE {
        return Error::input(
            format!(
                "{what} need {}, more than the 3 GiB below the device addresses",
                size::text(needed)
            ),
            "give smaller files",
        );
    }
    Error::input(
        format!(
            "--memory {} is too small for {what}",
            size::text(memory_size)
        ),
        format!("give {} or more", size::text(needed)),
    )
}

/// Writes `bytes` at a guest-physical address.
pub(crate) fn write(memory: &Memory, address: u64, bytes: &[u8]) -> Result<()> {
    memory
        .write_slice(bytes, GuestAddress(address))
        .map_err(|e| Error::call("writing to the guest's memory", std::io::Error::other(e)))
}

/// An address or a length that is below 4 GiB because the memory it is about is.
fn low(value: u64) -> u32 {
    debug_assert!(value <= u64::from(u32::MAX));
    value as u32
}
