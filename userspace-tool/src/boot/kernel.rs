// SPDX-License-Identifier: GPL-2.0

//! A Linux kernel, as a bzImage or in ELF form, with what it finds in memory (Documentation/arch/x86/boot.rst).

use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use libc::{EI_CLASS, ELFCLASS64, EM_X86_64, PT_INTERP, PT_TLS};
use linux_loader::bootparam::{boot_e820_entry, boot_params, setup_header, XLF_KERNEL_64};
use linux_loader::elf::{Elf64_Ehdr, Elf64_Phdr};
use linux_loader::loader::elf::Error as ElfError;
use linux_loader::loader::{BzImage, Elf, Error as LoaderError, KernelLoader};
use vm_memory::{ByteValued, Bytes, GuestAddress, GuestMemory, ReadVolatile};

use super::entry::{Entry, Mode};
use super::image::Image;
use super::write;
use crate::error::{failed, Error, Result};
use crate::layout::{self, HIGH_MEMORY};
use crate::memory::Memory;
use crate::size::{self, MIB};

/// Where a bzImage has its setup header, and what that begins with: `boot_flag` and `header`.
const SETUP_HEADER: u64 = 0x1f1;
const BOOT_FLAG: u16 = 0xaa55;
const MAGIC: u32 = u32::from_le_bytes(*b"HdrS");
/// The oldest version that tells how much memory the kernel needs: 2.10 brought `init_size`.
const VERSION_LEAST: u16 = 0x020a;
/// Version 2.12 brought `xloadflags`.
const VERSION_XLOADFLAGS: u16 = 0x020c;
/// Where the 64-bit entry lies in the loaded kernel.
const ENTRY_64: u64 = 0x200;
/// `type_of_loader` of a boot loader without a number of its own.
const LOADER_UNDEFINED: u8 = 0xff;
/// The highest address of an initial RAM disk, and the longest command line, of a kernel that does not say (one in ELF
/// form): those of every x86-64 Linux.
const INITRD_MOST: u32 = 0x7fff_ffff;
const COMMAND_LINE_MOST: u32 = 2047;

const NOT_A_KERNEL: &str = "give a bzImage, or an ELF vmlinux for x86-64";

/// A kernel and its initial RAM disk, opened.
#[derive(Debug)]
pub struct Kernel {
    image: Image,
    form: Form,
    /// What the kernel says of itself.
    header: setup_header,
    initrd: Option<Image>,
}

/// The form of a kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    BzImage,
    Elf,
}

impl Kernel {
    /// Opens the files and looks whether the first is a kernel.
    pub(super) fn open(path: &Path, initrd: Option<&Path>) -> Result<Self> {
        let image = Image::open(path, "--kernel")?;
        let (form, header) = image.form()?;
        let initrd = initrd.map(|path| Image::open(path, "--initrd"));
        Ok(Self {
            image,
            form,
            header,
            initrd: initrd.transpose()?,
        })
    }

    /// Loads the kernel, the initial RAM disk, the command line and the zero page into `memory`, of `memory_size` bytes.
    ///
    /// # Errors
    ///
    /// [`Error::Input`] where the images do not fit, or are no images.
    pub(super) fn load(
        &mut self,
        memory: &Memory,
        memory_size: u64,
        command_line: &str,
    ) -> Result<Entry> {
        let (entry, end) = match self.form {
            Form::BzImage => self.load_bzimage(memory, memory_size)?,
            Form::Elf => self.load_elf(memory, memory_size)?,
        };
        let mut parameters = boot_params {
            hdr: self.header,
            acpi_rsdp_addr: layout::ACPI_TABLES,
            ..Default::default()
        };
        parameters.hdr.type_of_loader = LOADER_UNDEFINED;
        parameters.hdr.cmd_line_ptr = low(layout::COMMAND_LINE);
        self.write_command_line(memory, command_line)?;
        if let Some((address, length)) = self.load_initrd(memory, memory_size, end)? {
            parameters.hdr.ramdisk_image = low(address);
            parameters.hdr.ramdisk_size = low(length);
        }
        let map = layout::e820(memory_size);
        debug_assert!(map.len() <= parameters.e820_table.len());
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
            .map_err(failed("writing the zero page"))?;
        Ok(entry)
    }

    /// Loads a bzImage. Returns its entry and the first address that the kernel does not need before it has read its
    /// memory map. Compressed it is smaller than its file; it unpacks itself behind or above that.
    fn load_bzimage(&mut self, memory: &Memory, memory_size: u64) -> Result<(Entry, u64)> {
        let file_end = HIGH_MEMORY.saturating_add(self.image.size);
        fits(memory_size, file_end)?;
        let start = Some(GuestAddress(HIGH_MEMORY));
        let loaded = BzImage::load(memory, None, &mut self.image.file, start)
            .map_err(|error| self.image.broken(&error))?;
        self.header = loaded.setup_header.unwrap_or_default();
        let load = loaded.kernel_load.0;
        let unpacked_end =
            run_address(&self.header, load).saturating_add(self.header.init_size.into());
        let end = loaded.kernel_end.max(unpacked_end);
        fits(memory_size, end)?;
        let (version, flags) = (self.header.version, u32::from(self.header.xloadflags));
        let (mode, address) = if version >= VERSION_XLOADFLAGS && flags & XLF_KERNEL_64 != 0 {
            (Mode::Long, load + ENTRY_64)
        } else {
            (Mode::Protected, load)
        };
        Ok((Entry { mode, address }, end))
    }

    /// The same for a kernel in ELF form.
    fn load_elf(&mut self, memory: &Memory, memory_size: u64) -> Result<(Entry, u64)> {
        let start = Some(GuestAddress(HIGH_MEMORY));
        let loaded = Elf::load(memory, None, &mut self.image.file, start);
        let loaded = loaded.map_err(|error| match error {
            LoaderError::Elf(ElfError::ReadKernelImage) => Error::input(
                format!(
                    "{} does not fit into --memory {}, or the file is cut short",
                    self.image.path.display(),
                    size::text(memory_size)
                ),
                "give a larger --memory, or check the file",
            ),
            error => self.image.broken(&error),
        })?;
        fits(memory_size, loaded.kernel_end)?;
        let entry = Entry {
            mode: Mode::Long,
            address: loaded.kernel_load.0,
        };
        Ok((entry, loaded.kernel_end))
    }

    fn write_command_line(&self, memory: &Memory, text: &str) -> Result<()> {
        let most = self
            .header
            .cmdline_size
            .min(low(layout::COMMAND_LINE_SIZE) - 1);
        if text.len() > most as usize {
            return Err(Error::input(
                format!(
                    "the command line has {} bytes and this kernel takes {most}",
                    text.len()
                ),
                "give a shorter --cmdline",
            ));
        }
        let bytes = [text.as_bytes(), &[0]].concat();
        write(memory, layout::COMMAND_LINE, &bytes)
    }

    /// Reads the initial RAM disk to the end of low memory, or as high as the kernel takes it, but behind `kernel_end`.
    /// Returns where it lies and its length, both below 4 GiB.
    fn load_initrd(
        &mut self,
        memory: &Memory,
        memory_size: u64,
        kernel_end: u64,
    ) -> Result<Option<(u64, u64)>> {
        let Some(initrd) = &mut self.initrd else {
            return Ok(None);
        };
        let highest = u64::from(self.header.initrd_addr_max) + 1;
        let end = memory_size.min(layout::HOLE).min(highest);
        let start = end
            .checked_sub(initrd.size)
            .map(|start| start & !(layout::PAGE_SIZE - 1));
        let Some(start) = start.filter(|start| *start >= kernel_end) else {
            let needed = kernel_end.saturating_add(initrd.size);
            return Err(too_small(memory_size, needed, "the kernel and the initrd"));
        };
        let length = usize::try_from(initrd.size).unwrap_or(usize::MAX);
        let mut target = memory
            .get_slice(GuestAddress(start), length)
            .map_err(failed("placing the initrd"))?;
        let read = initrd.file.read_exact_volatile(&mut target);
        read.map_err(|e| initrd.unreadable(&io::Error::other(e)))?;
        Ok(Some((start, initrd.size)))
    }
}

impl Image {
    /// Which form of a kernel it has, and its setup header.
    fn form(&self) -> Result<(Form, setup_header)> {
        let refused = |what: &str, next| {
            let name = self.path.display();
            Err(Error::input(format!("{name} {what}"), next))
        };
        let elf: Elf64_Ehdr = self.part(0)?;
        if elf.e_ident.starts_with(b"\x7fELF") {
            return match self.elf_fault(&elf) {
                Some(what) => refused(what, NOT_A_KERNEL),
                None => Ok((Form::Elf, header_of_elf())),
            };
        }
        let header: setup_header = self.part(SETUP_HEADER)?;
        let (magic, version) = (header.header, header.version);
        if magic != MAGIC {
            return refused("is not a kernel", NOT_A_KERNEL);
        }
        if version < VERSION_LEAST {
            let (major, minor) = (version >> 8, version & 0xff);
            let what = format!("is a kernel of boot protocol {major}.{minor}, older than 2.10");
            return refused(&what, "give a newer kernel");
        }
        Ok((Form::BzImage, header))
    }

    /// What lies at `offset`; all zeroes where the file ends before.
    fn part<T: ByteValued + Default>(&self, offset: u64) -> Result<T> {
        let mut part = T::default();
        match self.file.read_exact_at(part.as_mut_slice(), offset) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(T::default()),
            Err(error) => Err(self.unreadable(&error)),
            Ok(()) => Ok(part),
        }
    }

    /// Why an ELF file with that header is no kernel.
    fn elf_fault(&self, header: &Elf64_Ehdr) -> Option<&'static str> {
        if (header.e_ident[EI_CLASS], header.e_machine) != (ELFCLASS64, EM_X86_64) {
            return Some("is an ELF file, but none for x86-64");
        }
        let size = size_of::<Elf64_Phdr>() as u64;
        let mut parts = (0..u64::from(header.e_phnum)).map_while(|number| {
            let offset = header.e_phoff.checked_add(number * size)?;
            self.part::<Elf64_Phdr>(offset).ok()
        });
        // Only what runs under a kernel has an interpreter or thread-local storage.
        let is_program = parts.any(|part| [PT_INTERP, PT_TLS].contains(&part.p_type));
        is_program.then_some("is a program, not a kernel")
    }

    fn broken(&self, error: &LoaderError) -> Error {
        Error::input(
            format!("{} is broken: {error}", self.path.display()),
            NOT_A_KERNEL,
        )
    }
}

/// What a kernel in ELF form, which has no setup header, would say in one.
fn header_of_elf() -> setup_header {
    setup_header {
        boot_flag: BOOT_FLAG,
        header: MAGIC,
        initrd_addr_max: INITRD_MOST,
        cmdline_size: COMMAND_LINE_MOST,
        ..Default::default()
    }
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

/// Whether what ends at `end` fits below the devices' addresses.
fn fits(memory_size: u64, end: u64) -> Result<()> {
    if end > memory_size.min(layout::HOLE) {
        return Err(too_small(memory_size, end, "the kernel"));
    }
    Ok(())
}

/// The guest's memory is too small for `what`, which needs `needed` bytes.
fn too_small(memory_size: u64, needed: u64, what: &str) -> Error {
    let needed = needed.checked_next_multiple_of(MIB).unwrap_or(needed);
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

/// An address or a length that is below 4 GiB because the memory it is about is.
fn low(value: u64) -> u32 {
    debug_assert!(value <= u64::from(u32::MAX));
    value as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An ELF header of that class and machine, which tells of `count` program headers at `offset`.
    fn elf(class: u8, machine: u16, offset: u64, count: u16) -> Vec<u8> {
        let mut header = Elf64_Ehdr {
            e_machine: machine,
            e_phoff: offset,
            e_phnum: count,
            ..Default::default()
        };
        header.e_ident[..5].copy_from_slice(&[0x7f, b'E', b'L', b'F', class]);
        header.as_slice().to_vec()
    }

    /// The form of a file with that content.
    fn form(content: &[u8]) -> Result<Form> {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("kernel");
        std::fs::write(&path, content).expect("a file");
        Image::open(&path, "--kernel")?.form().map(|(form, _)| form)
    }

    #[test]
    fn forms_are_told_apart() {
        assert_eq!(form(&elf(2, 0x3e, 0, 0)).ok(), Some(Form::Elf));
        let mut head = vec![0; 1024];
        assert!(form(&head).is_err());
        head[0x202..0x206].copy_from_slice(b"HdrS");
        head[0x207] = 2;
        assert!(form(&head).is_err(), "it is too old");
        head[0x206] = 0x0a;
        assert_eq!(form(&head).ok(), Some(Form::BzImage));
    }

    #[test]
    fn other_machines_and_short_files_are_no_kernels() {
        assert!(form(&elf(1, 0x3e, 0, 0)).is_err());
        assert!(form(&elf(2, 0xb7, 0, 0)).is_err());
        for head in [b"".as_slice(), b"\x7fELF", b"#!/bin/sh\n"] {
            assert!(form(head).is_err());
        }
    }

    #[test]
    fn a_program_is_no_kernel() {
        // Program headers behind the ELF header: PT_LOAD as a kernel has, then PT_INTERP, PT_TLS.
        let with = |kinds: &[u32]| {
            let mut file = elf(2, 0x3e, 64, kinds.len() as u16);
            for kind in kinds {
                let header = Elf64_Phdr {
                    p_type: *kind,
                    ..Default::default()
                };
                file.extend_from_slice(header.as_slice());
            }
            form(&file).map_err(|error| error.to_string())
        };
        assert_eq!(with(&[1; 40]), Ok(Form::Elf));
        for kinds in [&[3][..], &[7], &[1, 1, 3], &[&[1; 40][..], &[7]].concat()] {
            let error = with(kinds).expect_err("a program");
            assert!(error.contains("is a program"), "{error}");
        }
        // Headers that are nowhere tell nothing.
        for offset in [64, 1 << 40, u64::MAX, u64::MAX - 0xffff] {
            assert_eq!(form(&elf(2, 0x3e, offset, 0xffff)).ok(), Some(Form::Elf));
        }
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
