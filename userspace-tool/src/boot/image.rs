// SPDX-License-Identifier: GPL-2.0

//! The files that a guest is made of, opened and looked at before anything is built for them.

use std::fs::File;
use std::io::{self, Read, Seek};
use std::path::{Path, PathBuf};

use linux_loader::bootparam::setup_header;
use linux_loader::loader::elf::Error as ElfError;
use linux_loader::loader::{BzImage, Elf, Error as LoaderError, KernelLoader};
use vm_memory::GuestAddress;

use super::entry::{Entry, Mode};
use super::too_small;
use crate::error::{Error, Result};
use crate::layout;
use crate::memory::Memory;
use crate::size::{self, MIB};

/// Offsets in the first sectors of a bzImage (boot.rst, "The Real-Mode Kernel Header").
const HEADER_MAGIC: usize = 0x202;
/// What has to be read of a file to know its form: the setup header ends below 0x270.
const HEAD_SIZE: usize = 0x280;
/// The oldest version that tells how much memory the kernel needs: 2.10 brought `init_size`.
const VERSION_LEAST: u16 = 0x020a;
/// Version 2.12 brought `xloadflags`.
const VERSION_XLOADFLAGS: u16 = 0x020c;
/// `xloadflags`: there is a 64-bit entry at offset 0x200.
const XLF_KERNEL_64: u16 = 1;
/// Where the 64-bit entry lies in the loaded kernel.
const ENTRY_64: u64 = 0x200;
/// The class and machine fields of an ELF header, and their values for x86-64.
const ELF_CLASS: usize = 4;
const ELF_CLASS_64: u8 = 2;
const ELF_MACHINE: usize = 18;
const ELF_MACHINE_X86_64: [u8; 2] = [62, 0];
/// Where an ELF header keeps the place and number of the program headers, and a program header's size.
const ELF_PHOFF: usize = 32;
const ELF_PHNUM: usize = 56;
const ELF_PHENTSIZE: usize = 56;
/// Program headers that only what runs under a kernel has: an interpreter, thread-local storage.
const ELF_OF_PROGRAMS: [u32; 2] = [3, 7];
/// The highest address of an initial RAM disk, less 1, and the longest command line of a kernel that
/// does not say (one in ELF form): those of every x86-64 Linux.
const INITRD_END: u64 = 0x8000_0000;
const COMMAND_LINE_MOST: u32 = 2047;

const NOT_A_KERNEL: &str = "give a bzImage, or an ELF vmlinux for x86-64";

/// A file of the user's.
#[derive(Debug)]
pub(super) struct Image {
    pub(super) path: PathBuf,
    pub(super) file: File,
    /// In bytes.
    pub(super) size: u64,
}

impl Image {
    pub(super) fn open(path: &Path, option: &str) -> Result<Self> {
        let give = format!("give the path of a file that can be read with {option}");
        let cannot = |error: io::Error| match error.kind() {
            io::ErrorKind::NotFound => {
                Error::input(format!("there is no file {}", path.display()), give.clone())
            }
            _ => Error::input(
                format!("{} can't be opened: {error}", path.display()),
                give.clone(),
            ),
        };
        // Not opened before it is known to be a file: a FIFO would block.
        let metadata = path.metadata().map_err(cannot)?;
        if !metadata.is_file() {
            return Err(Error::input(
                format!("{} is not a file", path.display()),
                give,
            ));
        }
        let file = File::open(path).map_err(cannot)?;
        Ok(Self {
            path: path.to_owned(),
            file,
            size: metadata.len(),
        })
    }
}

/// The form of a kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    BzImage,
    Elf,
}

/// Tells a kernel's form from its first bytes, or why it can't be booted.
fn form(head: &[u8]) -> std::result::Result<Form, &'static str> {
    if head.starts_with(b"\x7fELF") {
        let machine = head.get(ELF_MACHINE..ELF_MACHINE + 2);
        let x86_64 = head.get(ELF_CLASS) == Some(&ELF_CLASS_64)
            && machine == Some(ELF_MACHINE_X86_64.as_slice());
        return if !x86_64 {
            Err("is an ELF file, but none for x86-64")
        } else if is_program(head) {
            Err("is a program, not a kernel")
        } else {
            Ok(Form::Elf)
        };
    }
    if head.get(HEADER_MAGIC..HEADER_MAGIC + 4) == Some(b"HdrS") {
        return Ok(Form::BzImage);
    }
    Err("is not a kernel")
}

/// Whether a 64-bit ELF file is a program for some system, by those of its program headers that are in `head`.
fn is_program(head: &[u8]) -> bool {
    let field = |at: usize, size: usize| -> Option<u64> {
        let bytes = head.get(at..at.checked_add(size)?)?;
        Some(
            bytes
                .iter()
                .rev()
                .fold(0, |value, byte| (value << 8) | u64::from(*byte)),
        )
    };
    let (Some(first), Some(count)) = (field(ELF_PHOFF, 8), field(ELF_PHNUM, 2)) else {
        return false;
    };
    (0..count as usize)
        .map_while(|number| {
            let at = usize::try_from(first).ok()?;
            field(at.checked_add(number * ELF_PHENTSIZE)?, 4)
        })
        .any(|kind| ELF_OF_PROGRAMS.map(u64::from).contains(&kind))
}

/// A kernel in the guest's memory.
#[derive(Debug)]
pub(super) struct Kernel {
    /// What the kernel says of itself; zeros for one in ELF form.
    pub header: setup_header,
    /// Where and how the CPU enters it.
    pub entry: Entry,
    /// The first address that it does not need before it has read its memory map.
    pub end: u64,
    /// The first address behind which an initial RAM disk must end.
    pub initrd_end: u64,
    /// The longest command line in bytes, without the NUL.
    pub command_line_most: u32,
}

/// The kernel and the initial RAM disk, opened.
#[derive(Debug)]
pub struct Images {
    kernel: Image,
    form: Form,
    pub(super) initrd: Option<Image>,
}

impl Images {
    /// Opens the files and looks whether the first is a kernel.
    ///
    /// # Errors
    ///
    /// [`Error::Input`] where one can't be read or is something else.
    pub fn open(kernel: &Path, initrd: Option<&Path>) -> Result<Self> {
        let mut kernel = Image::open(kernel, "--kernel")?;
        let mut head = Vec::with_capacity(HEAD_SIZE);
        (&mut kernel.file)
            .take(HEAD_SIZE as u64)
            .read_to_end(&mut head)
            .and_then(|_| kernel.file.rewind())
            .map_err(|e| unreadable(&kernel.path, &e))?;
        let form = form(&head).map_err(|what| {
            Error::input(format!("{} {what}", kernel.path.display()), NOT_A_KERNEL)
        })?;
        let initrd = initrd
            .map(|path| Image::open(path, "--initrd"))
            .transpose()?;
        Ok(Self {
            kernel,
            form,
            initrd,
        })
    }

    pub(super) fn load_kernel(&mut self, memory: &Memory, memory_size: u64) -> Result<Kernel> {
        let kernel = match self.form {
            Form::BzImage => load_bzimage(&mut self.kernel, memory, memory_size)?,
            Form::Elf => load_elf(&mut self.kernel, memory, memory_size)?,
        };
        let low_end = memory_size.min(layout::HOLE);
        if kernel.end > low_end {
            return Err(too_small(
                memory_size,
                kernel.end.next_multiple_of(MIB),
                "the kernel",
            ));
        }
        Ok(kernel)
    }
}

fn load_bzimage(image: &mut Image, memory: &Memory, memory_size: u64) -> Result<Kernel> {
    // The compressed kernel is smaller than its file; what it unpacks to is checked afterwards.
    let file_end = layout::HIGH_MEMORY.saturating_add(image.size);
    if file_end > memory_size.min(layout::HOLE) {
        return Err(too_small(
            memory_size,
            file_end.next_multiple_of(MIB),
            "the kernel",
        ));
    }
    let loaded = BzImage::load(
        memory,
        None,
        &mut image.file,
        Some(GuestAddress(layout::HIGH_MEMORY)),
    )
    .map_err(|error| broken(&image.path, &error))?;
    let header = loaded.setup_header.unwrap_or_default();
    let version = header.version;
    if version < VERSION_LEAST {
        return Err(Error::input(
            format!(
                "{} is a kernel of boot protocol {}.{}, older than 2.10",
                image.path.display(),
                version >> 8,
                version & 0xff
            ),
            "give a newer kernel",
        ));
    }
    let load = loaded.kernel_load.0;
    let long = version >= VERSION_XLOADFLAGS && header.xloadflags & XLF_KERNEL_64 != 0;
    let entry = if long {
        Entry {
            mode: Mode::Long,
            address: load + ENTRY_64,
        }
    } else {
        Entry {
            mode: Mode::Protected,
            address: load,
        }
    };
    let unpacked_end = run_address(&header, load).saturating_add(u64::from(header.init_size));
    Ok(Kernel {
        entry,
        end: loaded.kernel_end.max(unpacked_end),
        initrd_end: u64::from(header.initrd_addr_max) + 1,
        command_line_most: header
            .cmdline_size
            .min(layout::COMMAND_LINE_SIZE as u32 - 1),
        header,
    })
}

/// Where a kernel loaded at `load` unpacks itself to (boot.rst, fields `init_size` and `pref_address`).
fn run_address(header: &setup_header, load: u64) -> u64 {
    let preferred = header.pref_address;
    let alignment = u64::from(header.kernel_alignment);
    if header.relocatable_kernel == 0 || !alignment.is_power_of_two() {
        return preferred;
    }
    load.max(preferred).saturating_add(alignment - 1) & !(alignment - 1)
}

fn load_elf(image: &mut Image, memory: &Memory, memory_size: u64) -> Result<Kernel> {
    let loaded = Elf::load(
        memory,
        None,
        &mut image.file,
        Some(GuestAddress(layout::HIGH_MEMORY)),
    )
    .map_err(|error| match error {
        LoaderError::Elf(ElfError::ReadKernelImage) => Error::input(
            format!(
                "{} does not fit into --memory {}, or the file is cut short",
                image.path.display(),
                size::text(memory_size)
            ),
            "give a larger --memory, or check the file",
        ),
        error => broken(&image.path, &error),
    })?;
    Ok(Kernel {
        header: setup_header::default(),
        entry: Entry {
            mode: Mode::Long,
            address: loaded.kernel_load.0,
        },
        end: loaded.kernel_end,
        initrd_end: INITRD_END,
        command_line_most: COMMAND_LINE_MOST,
    })
}

fn broken(path: &Path, error: &LoaderError) -> Error {
    Error::input(
        format!("{} is broken: {error}", path.display()),
        NOT_A_KERNEL,
    )
}

pub(super) fn unreadable(path: &Path, error: &io::Error) -> Error {
    Error::input(
        format!("{} can't be read: {error}", path.display()),
        "check the file",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn elf(class: u8, machine: [u8; 2]) -> Vec<u8> {
        let mut head = vec![0; 64];
        head[..4].copy_from_slice(b"\x7fELF");
        head[ELF_CLASS] = class;
        head[ELF_MACHINE..ELF_MACHINE + 2].copy_from_slice(&machine);
        head
    }

    #[test]
    fn forms_are_told_apart() {
        assert_eq!(form(&elf(2, [0x3e, 0])), Ok(Form::Elf));
        let mut head = vec![0; HEAD_SIZE];
        assert!(form(&head).is_err());
        head[HEADER_MAGIC..HEADER_MAGIC + 4].copy_from_slice(b"HdrS");
        assert_eq!(form(&head), Ok(Form::BzImage));
    }

    #[test]
    fn other_machines_and_short_files_are_no_kernels() {
        assert!(form(&elf(1, [0x3e, 0])).is_err());
        assert!(form(&elf(2, [0xb7, 0])).is_err());
        for head in [b"".as_slice(), b"\x7fELF", b"#!/bin/sh\n"] {
            assert!(form(head).is_err());
        }
    }

    #[test]
    fn a_program_is_no_kernel() {
        // One program header behind the ELF header: PT_LOAD as a kernel has, then PT_INTERP, PT_TLS.
        let with = |kind: u8| {
            let mut head = elf(2, [0x3e, 0]);
            head[ELF_PHOFF] = 64;
            head[ELF_PHNUM] = 1;
            head.push(kind);
            head.extend([0; ELF_PHENTSIZE - 1]);
            form(&head)
        };
        assert_eq!(with(1), Ok(Form::Elf));
        assert!(with(3).is_err());
        assert!(with(7).is_err());
        let mut wild = elf(2, [0x3e, 0]);
        wild[ELF_PHOFF..ELF_PHOFF + 8].fill(0xff);
        wild[ELF_PHNUM..ELF_PHNUM + 2].fill(0xff);
        assert_eq!(form(&wild), Ok(Form::Elf));
    }

    #[test]
    fn a_relocatable_kernel_runs_at_its_preferred_address_or_above_it() {
        let mut header = setup_header {
            relocatable_kernel: 1,
            kernel_alignment: 0x20_0000,
            pref_address: 0x100_0000,
            ..Default::default()
        };
        assert_eq!(run_address(&header, 0x10_0000), 0x100_0000);
        assert_eq!(run_address(&header, 0x123_4567), 0x140_0000);
        header.relocatable_kernel = 0;
        assert_eq!(run_address(&header, 0x123_4567), 0x100_0000);
    }
}
