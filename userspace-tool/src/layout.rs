// SPDX-License-Identifier: GPL-2.0

//! Where everything lies in the guest's physical address space: a PC's, with a hole for devices below
//! 4 GiB. All addresses are guest-physical, all sizes in bytes.

use std::ops::Range;

use crate::size::{GIB, KIB, MIB};

/// Granularity of guest memory.
pub const PAGE_SIZE: u64 = 4096;

/// The GDT that the 64-bit boot protocol wants (Documentation/arch/x86/boot.rst, "64-bit Boot Protocol").
pub const GDT: u64 = 0x500;
/// `struct boot_params`, the "zero page"; one page.
pub const ZERO_PAGE: u64 = 0x7000;
/// Page tables for the entry in long mode: PML4, PDPT and four page directories, a page each.
pub const PAGE_TABLES: u64 = 0x9000;
/// The command line, with its closing NUL.
pub const COMMAND_LINE: u64 = 0x2_0000;
/// Room for the command line.
pub const COMMAND_LINE_SIZE: u64 = 0x1_0000;
/// End of conventional memory: above lies the extended BIOS data area, which a PC reports as reserved.
pub const CONVENTIONAL_END: u64 = 0x9_fc00;
/// The ACPI tables, in the range where an operating system looks for the RSDP (ACPI 6.5, 5.2.5.1).
pub const ACPI_TABLES: u64 = 0xe_0000;
/// Room for them.
pub const ACPI_SIZE: u64 = 0x1_0000;
/// End of the BIOS range and begin of extended memory.
pub const HIGH_MEMORY: u64 = 0x10_0000;

/// Memory ends here and goes on at [`ABOVE_4G`]: between them are the devices' addresses.
pub const HOLE: u64 = 3 * GIB;
/// Where memory that does not fit below the hole lies.
pub const ABOVE_4G: u64 = 4 * GIB;

/// The register pages of the virtio devices, one behind the other.
pub const VIRTIO: u64 = 0xd000_0000;
/// Their interrupts, by GSI: first those that nothing has on a PC and that the 8259s have too, then those
/// that the IOAPIC has alone.
pub const VIRTIO_GSIS: [u32; 11] = [5, 10, 11, 16, 17, 18, 19, 20, 21, 22, 23];

/// The register page of the virtio device with that number, counted from 0.
#[must_use]
pub const fn virtio_page(index: usize) -> u64 {
    VIRTIO + index as u64 * PAGE_SIZE
}

/// Base address of the IOAPIC (the in-kernel irqchip's).
pub const IOAPIC: u32 = 0xfec0_0000;
/// Base address of each CPU's local APIC.
pub const LOCAL_APIC: u32 = 0xfee0_0000;
/// One page that Intel CPUs without unrestricted guest need for KVM's identity map, below the firmware.
pub const IDENTITY_MAP: u64 = 0xfeff_c000;
/// Three pages that Intel CPUs without unrestricted guest need for KVM's task state segment.
pub const TSS: usize = 0xfeff_d000;

/// Firmware ends with the address space of 32 bits: the reset vector is 16 bytes below.
pub const FIRMWARE_END: u64 = 4 * GIB;
/// The least and the most that a firmware image has: the segment of the reset vector, and what lies above
/// the other things here.
pub const FIRMWARE_SIZE: std::ops::RangeInclusive<u64> = 64 * KIB..=16 * MIB;
/// The end of the firmware also lies at the end of the first MiB, where real mode reaches it: that much. A
/// PC has 128 KiB of its ROM there, and firmware copies more into the RAM below once it has switched that on
/// in its chipset. Here the RAM is always on, with the copy in it.
pub const FIRMWARE_SHADOW: u64 = 256 * KIB;

/// Where the ACPI tables of a guest with firmware lie, which takes their place below 1 MiB: at the end of the low
/// part of its `memory` bytes.
#[must_use]
pub const fn acpi_tables_of_firmware(memory: u64) -> u64 {
    let low = if memory < HOLE { memory } else { HOLE };
    low - ACPI_SIZE
}

/// The ranges that `memory` bytes of RAM fill: one, or two around the hole.
#[must_use]
pub fn ram(memory: u64) -> Vec<Range<u64>> {
    let low = 0..memory.min(HOLE);
    let high = ABOVE_4G..ABOVE_4G.saturating_add(memory - low.end);
    let ranges = [low, high].into_iter();
    ranges.filter(|range| !range.is_empty()).collect()
}

/// The ranges of `ram` and one of `size` bytes for firmware, where that is not 0, in ascending order.
#[must_use]
pub fn with_rom(mut ram: Vec<Range<u64>>, size: u64) -> Vec<Range<u64>> {
    if size > 0 {
        ram.insert(1, FIRMWARE_END - size..FIRMWARE_END);
    }
    ram
}

/// Whether there is firmware, and no RAM, at `address`, which is one of the guest's memory.
#[must_use]
pub const fn is_rom(address: u64) -> bool {
    HOLE <= address && address < FIRMWARE_END
}

/// What a range of the memory map is for; the values are those of the e820 call (ACPI 6.5, table 15.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Kind {
    /// Free for the guest.
    Ram = 1,
    /// Not to be touched.
    Reserved = 2,
    /// ACPI tables; free once the guest has read them.
    Acpi = 3,
}

/// The memory map of a guest with `memory` bytes, in ascending order without overlaps.
#[must_use]
pub fn e820(memory: u64) -> Vec<(Range<u64>, Kind)> {
    let mut map = vec![
        (0..CONVENTIONAL_END, Kind::Ram),
        (CONVENTIONAL_END..0xa_0000, Kind::Reserved),
        (ACPI_TABLES..HIGH_MEMORY, Kind::Acpi),
    ];
    for range in ram(memory) {
        map.push((range.start.max(HIGH_MEMORY)..range.end, Kind::Ram));
    }
    map
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZES: [u64; 7] = [
        MIB + PAGE_SIZE,
        256 * MIB,
        HOLE - PAGE_SIZE,
        HOLE,
        HOLE + PAGE_SIZE,
        4 * GIB,
        100 * GIB,
    ];

    #[test]
    fn no_byte_of_memory_is_lost_or_doubled() {
        for size in SIZES {
            let ranges = ram(size);
            assert_eq!(
                ranges
                    .iter()
                    .map(|range| range.end - range.start)
                    .sum::<u64>(),
                size
            );
            assert!(ranges.windows(2).all(|pair| pair[0].end <= pair[1].start));
        }
    }

    #[test]
    fn the_hole_holds_no_memory() {
        for size in SIZES {
            for range in ram(size) {
                assert!(range.end <= HOLE || range.start >= ABOVE_4G);
            }
        }
        assert_eq!(ram(HOLE).len(), 1);
        assert_eq!(ram(HOLE + PAGE_SIZE)[1], ABOVE_4G..ABOVE_4G + PAGE_SIZE);
    }

    #[test]
    fn firmware_overlaps_nothing() {
        let lowest = FIRMWARE_END - FIRMWARE_SIZE.end();
        assert!(TSS as u64 + 3 * PAGE_SIZE <= lowest);
        assert!(IDENTITY_MAP + PAGE_SIZE <= TSS as u64);
        assert!(HOLE <= VIRTIO && virtio_page(VIRTIO_GSIS.len()) <= u64::from(IOAPIC));
        assert!(u64::from(LOCAL_APIC.max(IOAPIC)) + PAGE_SIZE <= IDENTITY_MAP);
        let ranges = with_rom(ram(4 * GIB), *FIRMWARE_SIZE.end());
        assert_eq!(ranges[1], lowest..FIRMWARE_END);
        assert!(ranges.windows(2).all(|pair| pair[0].end <= pair[1].start));
        assert!(is_rom(lowest) && !is_rom(HOLE - 1) && !is_rom(ABOVE_4G));
    }

    #[test]
    fn the_memory_map_is_sorted_and_inside_memory() {
        for size in SIZES {
            let map = e820(size);
            assert!(map.windows(2).all(|pair| pair[0].0.end <= pair[1].0.start));
            for (range, _) in &map {
                assert!(!range.is_empty());
                assert!(ram(size)
                    .iter()
                    .any(|ram| ram.start <= range.start && range.end <= ram.end));
            }
        }
    }

    #[test]
    fn boot_data_lies_in_usable_memory_apart_from_each_other() {
        let parts = [
            GDT..GDT + 32,
            ZERO_PAGE..ZERO_PAGE + PAGE_SIZE,
            PAGE_TABLES..PAGE_TABLES + 6 * PAGE_SIZE,
            COMMAND_LINE..COMMAND_LINE + COMMAND_LINE_SIZE,
        ];
        assert!(parts.windows(2).all(|pair| pair[0].end <= pair[1].start));
        assert!(parts.iter().all(|part| part.end <= CONVENTIONAL_END));
    }
}
