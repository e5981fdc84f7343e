// SPDX-License-Identifier: GPL-2.0

//! Loading what the guest starts with: a kernel by Linux's boot protocols for 64 and 32 bits
//! (Documentation/arch/x86/boot.rst), or firmware.

pub mod entry;
mod firmware;
mod image;
mod kernel;

use vm_memory::{Bytes, GuestAddress};

use crate::acpi;
use crate::arguments::RunOptions;
use crate::error::{failed, Error, Result};
use crate::layout;
use crate::memory::Memory;
use entry::Entry;
use firmware::Firmware;
use kernel::Kernel;

/// What the guest starts with, opened and looked at.
#[derive(Debug)]
pub enum Software {
    /// A kernel, and its initial RAM disk.
    Kernel(Box<Kernel>),
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
                let kernel = Kernel::open(kernel, options.initrd.as_deref())?;
                Ok(Self::Kernel(Box::new(kernel)))
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
        let (start, tables) = match self {
            Self::Firmware(firmware) => {
                firmware.load(memory)?;
                let tables = layout::acpi_tables_of_firmware(options.memory);
                (Start::Reset, tables)
            }
            Self::Kernel(kernel) => {
                let command_line = options.guest_command_line();
                let entry = kernel.load(memory, options.memory, &command_line)?;
                entry::write_tables(memory, entry.mode)?;
                (Start::Kernel(entry), layout::ACPI_TABLES)
            }
        };
        acpi::write(memory, tables, options.cpus as u8, virtio_devices)?;
        Ok(start)
    }
}

/// Writes `bytes` at a guest-physical address.
pub(crate) fn write(memory: &Memory, address: u64, bytes: &[u8]) -> Result<()> {
    memory
        .write_slice(bytes, GuestAddress(address))
        .map_err(failed("writing to the guest's memory"))
}
