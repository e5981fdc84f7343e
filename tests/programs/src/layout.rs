// SPDX-License-Identifier: GPL-2.0
//! Where things are in the guest's physical memory; guests map it one to one.

/// Bytes of memory of the default guest.
pub const MEMORY: usize = 4 << 20;
/// The global descriptor table.
pub const GDT: u64 = 0x1000;
/// The task state segment.
pub const TSS: u64 = 0x1800;
/// The interrupt descriptor table.
pub const IDT: u64 = 0x2000;
/// The top of the page tables, then the tables below it.
pub const PAGE_TABLES: u64 = 0x3000;
/// The guest's code.
pub const CODE: u64 = 0x7000;
/// Code of the second processor: startup vector 8.
pub const AP_CODE: u64 = 0x8000;
/// 256 interrupt stubs of 16 bytes.
pub const STUBS: u64 = 0x9000;
/// What all stubs jump to.
pub const COMMON: u64 = 0xa000;
/// What the handlers write down, see [`crate::handlers`].
pub const RECORD: u64 = 0xb000;
/// One 8-byte count for each vector.
pub const COUNTS: u64 = 0xc000;
/// The end of the second processor's stack.
pub const AP_STACK: u64 = 0xe000;
/// The end of the stack.
pub const STACK: u64 = 0xf000;
/// The first byte that is free for a test.
pub const DATA: u64 = 0x1_0000;
/// An address without memory, mapped by long mode's page tables.
pub const HOLE: u64 = 0x0d00_0000;
/// The local APIC's registers.
pub const LAPIC: u64 = 0xfee0_0000;
/// The IOAPIC's registers.
pub const IOAPIC: u64 = 0xfec0_0000;

/// A guest writes here when it has done what it was for.
pub const DONE_PORT: u16 = 0xf4;
/// A handler writes here when an exception came that nobody expects.
pub const UNEXPECTED_PORT: u16 = 0xf5;
/// A port without device.
pub const FREE_PORT: u16 = 0x5d0;

/// The selector of the code segment, in all modes with descriptors.
pub const CODE_SELECTOR: u16 = 0x08;
/// The selector of the data segments.
pub const DATA_SELECTOR: u16 = 0x10;
/// The selector of the task state segment.
pub const TSS_SELECTOR: u16 = 0x18;
/// The selector of a 32-bit code segment, in long mode too.
pub const CODE32_SELECTOR: u16 = 0x28;
