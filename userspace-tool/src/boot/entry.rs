// SPDX-License-Identifier: GPL-2.0

//! The state in which the first CPU enters the kernel, with flat segments: long mode with memory mapped one
//! to one, or protected mode without paging (Documentation/arch/x86/boot.rst, "64-bit Boot Protocol" and
//! "32-bit Boot Protocol"). The other CPUs wait for it as the in-kernel local APIC has them.

use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};
use kvm_ioctls::VcpuFd;

use crate::error::{failed, Result};
use crate::layout;
use crate::memory::Memory;

/// CR0 (SDM volume 3, 2.5): PE, ET, NE.
const CR0: u64 = 1 | (1 << 4) | (1 << 5);
/// CR0.PG.
const CR0_PAGING: u64 = 1 << 31;
/// CR4.PAE.
const CR4_PAE: u64 = 1 << 5;
/// IA32_EFER: LME and LMA.
const EFER_LONG_MODE: u64 = (1 << 8) | (1 << 10);
/// RFLAGS: the bit that is always 1; interrupts are off.
const RFLAGS: u64 = 1 << 1;

/// Page-table entries (SDM volume 3, 4.5): present, writable; a directory entry that maps 2 MiB.
const ENTRY_TABLE: u64 = 0b11;
const ENTRY_LARGE: u64 = 0b11 | (1 << 7);
const LARGE_PAGE: u64 = 2 << 20;
/// Page directories: four of them map the first 4 GiB.
const DIRECTORIES: u64 = 4;
const ENTRIES: u64 = layout::PAGE_SIZE / 8;

const BOOT_CS: u16 = 0x10;
const BOOT_DS: u16 = 0x18;

/// The mode in which a kernel is entered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// 64 bits, with paging.
    Long,
    /// 32 bits, without paging.
    Protected,
}

/// Where and how the first CPU enters the kernel.
#[derive(Clone, Copy, Debug)]
pub struct Entry {
    /// The mode.
    pub mode: Mode,
    /// The instruction's address.
    pub address: u64,
}

/// Descriptors of the GDT: none, none, `__BOOT_CS` (0x10), `__BOOT_DS` (0x18).
const fn descriptors(mode: Mode) -> [u64; 4] {
    let code = match mode {
        Mode::Long => 0x00af_9b00_0000_ffff,
        Mode::Protected => 0x00cf_9b00_0000_ffff,
    };
    [0, 0, code, 0x00cf_9300_0000_ffff]
}

/// The page tables as they lie from [`layout::PAGE_TABLES`] on: PML4, PDPT, page directories.
fn page_tables() -> Vec<u64> {
    let table = |index: u64| (layout::PAGE_TABLES + index * layout::PAGE_SIZE) | ENTRY_TABLE;
    let mut entries = vec![table(1)];
    entries.resize(ENTRIES as usize, 0);
    entries.extend((0..DIRECTORIES).map(|directory| table(2 + directory)));
    entries.resize(2 * ENTRIES as usize, 0);
    entries.extend((0..DIRECTORIES * ENTRIES).map(|page| (page * LARGE_PAGE) | ENTRY_LARGE));
    entries
}

/// Writes the GDT and the page tables that the mode needs.
///
/// # Errors
///
/// [`crate::error::Error::Call`] where the guest's memory is not there.
pub fn write_tables(memory: &Memory, mode: Mode) -> Result<()> {
    let descriptors = descriptors(mode).map(u64::to_le_bytes).concat();
    super::write(memory, layout::GDT, &descriptors)?;
    if mode == Mode::Long {
        let tables: Vec<u8> = page_tables()
            .into_iter()
            .flat_map(u64::to_le_bytes)
            .collect();
        super::write(memory, layout::PAGE_TABLES, &tables)?;
    }
    Ok(())
}

/// What a CPU has of a flat segment that is described so at `selector` (SDM volume 3, figure 3-8).
fn segment(selector: u16, descriptors: &[u64]) -> kvm_segment {
    let descriptor = descriptors[usize::from(selector) / size_of::<u64>()];
    let bits = |at: u32, count: u32| ((descriptor >> at) & ((1 << count) - 1)) as u8;
    kvm_segment {
        limit: u32::MAX,
        selector,
        type_: bits(40, 4),
        s: bits(44, 1),
        dpl: bits(45, 2),
        present: bits(47, 1),
        l: bits(53, 1),
        db: bits(54, 1),
        g: bits(55, 1),
        ..Default::default()
    }
}

fn enter_mode(sregs: &mut kvm_sregs, mode: Mode) {
    let descriptors = descriptors(mode);
    sregs.cs = segment(BOOT_CS, &descriptors);
    let data = segment(BOOT_DS, &descriptors);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.gdt.base = layout::GDT;
    sregs.gdt.limit = size_of_val(&descriptors) as u16 - 1;
    sregs.cr0 = CR0;
    if mode == Mode::Long {
        sregs.cr0 |= CR0_PAGING;
        sregs.cr3 = layout::PAGE_TABLES;
        sregs.cr4 = CR4_PAE;
        sregs.efer = EFER_LONG_MODE;
    }
}

/// Sets the first CPU's registers so that it enters the kernel.
///
/// # Errors
///
/// [`crate::error::Error::Call`] where the hypervisor refuses them.
pub fn set_registers(vcpu: &VcpuFd, entry: Entry) -> Result<()> {
    // What is not about the mode stays as reset left it.
    let mut sregs = vcpu
        .get_sregs()
        .map_err(failed("reading a CPU's system registers"))?;
    enter_mode(&mut sregs, entry.mode);
    vcpu.set_sregs(&sregs)
        .map_err(failed("setting a CPU's system registers"))?;
    let regs = kvm_regs {
        rip: entry.address,
        rsi: layout::ZERO_PAGE,
        rflags: RFLAGS,
        ..Default::default()
    };
    vcpu.set_regs(&regs)
        .map_err(failed("setting a CPU's registers"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Walks the tables as the SDM has it (volume 3, 4.5.4), to the physical address.
    fn translate(tables: &[u64], address: u64) -> Option<u64> {
        let entry = |table: u64, index: u64| {
            let place = (table - layout::PAGE_TABLES) / 8 + index;
            tables
                .get(place as usize)
                .copied()
                .filter(|entry| entry & 1 != 0)
        };
        let next = |entry: u64| entry & 0x000f_ffff_ffff_f000;
        let pdpt = next(entry(layout::PAGE_TABLES, (address >> 39) & 511)?);
        let directory = next(entry(pdpt, (address >> 30) & 511)?);
        let large = entry(directory, (address >> 21) & 511)?;
        (large & 0x80 != 0).then_some(next(large) & !0x1f_ffff | address & 0x1f_ffff)
    }

    #[test]
    fn the_first_4_gib_are_mapped_one_to_one() {
        let tables = page_tables();
        for address in [
            0,
            0x7000,
            0x10_0200,
            0x1f_ffff,
            0x20_0000,
            0x4000_0000,
            0xffff_ffff,
        ] {
            assert_eq!(translate(&tables, address), Some(address), "{address:#x}");
        }
        for address in [1 << 32, 1 << 39, 0x7fff_ffff_f000] {
            assert_eq!(translate(&tables, address), None, "{address:#x}");
        }
    }

    #[test]
    fn protected_mode_has_no_paging() {
        let mut sregs = kvm_sregs::default();
        enter_mode(&mut sregs, Mode::Protected);
        assert_eq!((sregs.cr0 & (1 << 31), sregs.cr0 & 1), (0, 1));
        assert_eq!((sregs.cr4, sregs.efer), (0, 0));
        assert_eq!((sregs.cs.l, sregs.cs.db), (0, 1));
    }

    #[test]
    fn segments_are_flat_and_what_their_descriptors_say() {
        let fields = |selector, mode| {
            let segment = segment(selector, &descriptors(mode));
            assert_eq!((segment.base, segment.limit, segment.g), (0, u32::MAX, 1));
            assert_eq!((segment.s, segment.dpl, segment.present), (1, 0, 1));
            (segment.type_, segment.l, segment.db)
        };
        // Code that is executed and read, data that is read and written; accessed.
        assert_eq!(fields(BOOT_CS, Mode::Long), (0xb, 1, 0));
        assert_eq!(fields(BOOT_CS, Mode::Protected), (0xb, 0, 1));
        assert_eq!(fields(BOOT_DS, Mode::Long), (0x3, 0, 1));
        assert_eq!(fields(BOOT_DS, Mode::Protected), (0x3, 0, 1));
    }
}
