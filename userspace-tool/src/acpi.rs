// SPDX-License-Identifier: GPL-2.0

//! ACPI tables (ACPI specification 6.5): enough for an operating system to find the CPUs, the IOAPIC, the
//! serial port and the virtio devices, to switch the machine off and to reset it.
//!
//! They are built here and not by the `acpi_tables` crate because its releases need a newer compiler
//! than the kernel's and have neither a way to set the MADT's flags nor interrupt source overrides.

mod aml;

use crate::devices::power::{self, SCI};
use crate::error::Result;
use crate::layout;
use crate::memory::Memory;

const OEM_ID: &[u8; 6] = b"RVISOR";
const OEM_TABLE_ID: &[u8; 8] = b"RVISORPC";
const REVISION: u32 = 1;

/// Interrupt flags of the MADT (table 5.26): active high, level-triggered.
const ACTIVE_HIGH_LEVEL: u16 = 0b1101;
/// The byte of the CMOS clock that holds the century.
pub const CMOS_CENTURY: u8 = 0x32;

/// Length of the header that every table but the FACS and the RSDP has (5.2.6).
const HEADER: usize = 36;
/// Where the checksum lies in it.
const CHECKSUM: usize = 9;

/// The byte that makes `bytes` sum up to 0, where its own place holds 0.
fn checksum(bytes: &[u8]) -> u8 {
    bytes
        .iter()
        .fold(0u8, |sum, byte| sum.wrapping_add(*byte))
        .wrapping_neg()
}

/// A table of that signature and revision with `body` behind its header.
fn table(signature: &[u8; 4], revision: u8, body: &[u8]) -> Vec<u8> {
    let length = (HEADER + body.len()) as u32;
    let mut table = Vec::with_capacity(HEADER + body.len());
    table.extend_from_slice(signature);
    table.extend_from_slice(&length.to_le_bytes());
    table.extend_from_slice(&[revision, 0]);
    table.extend_from_slice(OEM_ID);
    table.extend_from_slice(OEM_TABLE_ID);
    table.extend_from_slice(&REVISION.to_le_bytes());
    table.extend_from_slice(b"RVSR");
    table.extend_from_slice(&REVISION.to_le_bytes());
    table.extend_from_slice(body);
    table[CHECKSUM] = checksum(&table);
    table
}

/// A generic address structure (5.2.3.2) of an I/O port of `bytes` bytes.
fn port(address: u16, bytes: u8) -> [u8; 12] {
    let mut gas = [0; 12];
    // System I/O space; width in bits; access size 1 for a byte, 2 for a word, 3 for a double word.
    gas[0] = 1;
    gas[1] = bytes * 8;
    gas[3] = bytes.trailing_zeros() as u8 + 1;
    gas[4..6].copy_from_slice(&address.to_le_bytes());
    gas
}

/// The fixed ACPI description table (5.2.9), revision 6.5.
fn fadt(facs: u64, dsdt: u64) -> Vec<u8> {
    // Table 5.9: there are legacy devices, and no VGA. The bit for a keyboard controller stays 0: what is
    // at its ports takes a reset only.
    const BOOT_ARCHITECTURE: u16 = (1 << 0) | (1 << 2);
    // Table 5.10: WBINVD works, no sleep button, no wake by the clock, the timer has 32 bits, the reset
    // register works. The power button is a fixed one.
    const FLAGS: u32 = (1 << 0) | (1 << 5) | (1 << 6) | (1 << 8) | (1 << 10);
    const LENGTH: usize = 276;

    let mut fadt = vec![0; LENGTH];
    let mut put = |offset: usize, bytes: &[u8]| {
        fadt[offset..offset + bytes.len()].copy_from_slice(bytes);
    };
    put(36, &(facs as u32).to_le_bytes());
    put(40, &(dsdt as u32).to_le_bytes());
    put(46, &u16::from(SCI).to_le_bytes());
    put(56, &u32::from(power::PM1A_EVENT).to_le_bytes());
    put(64, &u32::from(power::PM1A_CONTROL).to_le_bytes());
    put(76, &u32::from(power::PM_TIMER).to_le_bytes());
    put(91, &[power::PM_TIMER_SIZE as u8]);
    put(
        88,
        &[power::PM1A_EVENT_SIZE as u8, power::PM1A_CONTROL_SIZE as u8],
    );
    // C2 and C3 take longer than any threshold: there are none.
    put(96, &0xffff_u16.to_le_bytes());
    put(98, &0xffff_u16.to_le_bytes());
    put(108, &[CMOS_CENTURY]);
    put(109, &BOOT_ARCHITECTURE.to_le_bytes());
    put(112, &FLAGS.to_le_bytes());
    put(116, &port(power::RESET, 1));
    put(128, &[power::RESET_VALUE]);
    put(131, &[5]);
    put(140, &dsdt.to_le_bytes());
    put(148, &port(power::PM1A_EVENT, power::PM1A_EVENT_SIZE as u8));
    put(
        172,
        &port(power::PM1A_CONTROL, power::PM1A_CONTROL_SIZE as u8),
    );
    put(208, &port(power::PM_TIMER, power::PM_TIMER_SIZE as u8));
    table(b"FACP", 6, &fadt[HEADER..])
}

/// The firmware ACPI control structure (5.2.10), with nothing in it but its length and version.
fn facs() -> Vec<u8> {
    let mut facs = vec![0; 64];
    facs[..4].copy_from_slice(b"FACS");
    facs[4] = 64;
    facs[32] = 2;
    facs
}

/// The multiple APIC description table (5.2.12) for `cpus` CPUs whose APIC IDs are 0, 1, 2, …
fn madt(cpus: u8) -> Vec<u8> {
    // There are two 8259 as well.
    const PCAT_COMPAT: u32 = 1;
    const ENABLED: u32 = 1;
    let mut body = Vec::new();
    body.extend_from_slice(&layout::LOCAL_APIC.to_le_bytes());
    body.extend_from_slice(&PCAT_COMPAT.to_le_bytes());
    for id in 0..cpus {
        // Processor local APIC: type, length, processor UID, APIC ID.
        body.extend_from_slice(&[0, 8, id, id]);
        body.extend_from_slice(&ENABLED.to_le_bytes());
    }
    // I/O APIC: type, length, ID, reserved; its address; its first GSI.
    body.extend_from_slice(&[1, 12, 0, 0]);
    body.extend_from_slice(&layout::IOAPIC.to_le_bytes());
    body.extend_from_slice(&0_u32.to_le_bytes());
    // Interrupt source override of the SCI: type, length, ISA, source; GSI; flags. All others, the timer's
    // too, are the GSIs of the same number: so has KVM's default routing them.
    body.extend_from_slice(&[2, 10, 0, SCI]);
    body.extend_from_slice(&u32::from(SCI).to_le_bytes());
    body.extend_from_slice(&ACTIVE_HIGH_LEVEL.to_le_bytes());
    // Local APIC NMI: type, length, all processors; flags; LINT1.
    body.extend_from_slice(&[4, 6, 0xff, 0, 0, 1]);
    table(b"APIC", 5, &body)
}

/// The tables in the order in which they lie, from the address `start` on, RSDP first.
fn tables(start: u64, cpus: u8, virtio_devices: usize) -> Vec<(u64, Vec<u8>)> {
    const RSDP_SIZE: u64 = 36;
    let mut tables: Vec<(u64, Vec<u8>)> = Vec::new();
    let mut next = start + RSDP_SIZE;
    let mut place = |bytes: Vec<u8>| {
        // The FACS must lie at a multiple of 64; the others are glad of it.
        let address = next.next_multiple_of(64);
        next = address + bytes.len() as u64;
        tables.push((address, bytes));
        address
    };
    let facs = place(facs());
    let dsdt = place(table(b"DSDT", 2, &aml::definition_block(virtio_devices)));
    let fadt = place(fadt(facs, dsdt));
    let madt = place(madt(cpus));
    let entries = [fadt, madt];
    let wide: Vec<u8> = entries
        .iter()
        .flat_map(|entry| entry.to_le_bytes())
        .collect();
    let xsdt = place(table(b"XSDT", 1, &wide));
    // The same for those who know ACPI 1.0 alone, GRUB for one.
    let narrow = entries
        .iter()
        .flat_map(|entry| (*entry as u32).to_le_bytes());
    let rsdt = place(table(b"RSDT", 1, &narrow.collect::<Vec<u8>>()));
    tables.insert(0, (start, rsdp(rsdt as u32, xsdt)));
    tables
}

/// The tables as firmware gets them, which places them itself: QEMU's files `etc/acpi/tables`, `etc/acpi/rsdp`
/// and `etc/table-loader` (hw/acpi/bios-linker-loader.c of QEMU tells the latter's form).
#[derive(Debug)]
pub struct ForFirmware {
    /// All tables but the RSDP. What they point to is counted from the first byte.
    pub tables: Vec<u8>,
    /// The RSDP, whose pointer is counted so too.
    pub rsdp: Vec<u8>,
    /// What firmware is to do with both.
    pub loader: Vec<u8>,
}

/// The tables for firmware with `cpus` CPUs and so many virtio devices.
#[must_use]
pub fn for_firmware(cpus: u8, virtio_devices: usize) -> ForFirmware {
    const TABLES: &str = "etc/acpi/tables";
    const RSDP: &str = "etc/acpi/rsdp";
    let mut all = tables(0, cpus, virtio_devices);
    let (_, rsdp) = all.remove(0);
    let mut loader = [allocate(TABLES, 64, 1), allocate(RSDP, 16, 2)].concat();
    let mut file = Vec::new();
    for (start, bytes) in &all {
        file.resize(*start as usize, 0);
        file.extend_from_slice(bytes);
        let pointers: Vec<(usize, u8)> = match &bytes[..4] {
            b"FACP" => vec![(36, 4), (40, 4), (140, 8)],
            b"XSDT" => (HEADER..bytes.len()).step_by(8).map(|at| (at, 8)).collect(),
            b"RSDT" => (HEADER..bytes.len()).step_by(4).map(|at| (at, 4)).collect(),
            _ => continue,
        };
        let start = *start as usize;
        for (at, size) in pointers {
            loader.extend(add_pointer(TABLES, TABLES, start + at, size));
        }
        loader.extend(add_checksum(TABLES, start + CHECKSUM, start, bytes.len()));
    }
    loader.extend(add_pointer(RSDP, TABLES, 16, 4));
    loader.extend(add_pointer(RSDP, TABLES, 24, 8));
    loader.extend(add_checksum(RSDP, 8, 0, 20));
    loader.extend(add_checksum(RSDP, 32, 0, rsdp.len()));
    ForFirmware {
        tables: file,
        rsdp,
        loader,
    }
}

/// A command of the loader, in its 128 bytes: a number, names of files, and then numbers.
fn command(number: u32, files: &[&str], rest: &[u8]) -> Vec<u8> {
    let mut command = number.to_le_bytes().to_vec();
    for file in files {
        let end = command.len() + 56;
        command.extend_from_slice(file.as_bytes());
        command.resize(end, 0);
    }
    command.extend_from_slice(rest);
    command.resize(128, 0);
    command
}

/// Has the file put into memory at a multiple of `align`: in zone 1, or 2 where the RSDP is looked for.
fn allocate(file: &str, align: u32, zone: u8) -> Vec<u8> {
    command(
        1,
        &[file],
        &[align.to_le_bytes().as_slice(), &[zone]].concat(),
    )
}

/// Adds the address of `target` to the `size` bytes at `offset` of `file`.
fn add_pointer(file: &str, target: &str, offset: usize, size: u8) -> Vec<u8> {
    let offset = (offset as u32).to_le_bytes();
    command(2, &[file, target], &[offset.as_slice(), &[size]].concat())
}

/// Sets the byte at `offset` of `file` so that the `length` bytes from `start` on sum up to 0.
fn add_checksum(file: &str, offset: usize, start: usize, length: usize) -> Vec<u8> {
    let numbers = [offset, start, length].map(|number| (number as u32).to_le_bytes());
    command(3, &[file], &numbers.concat())
}

/// The root system description pointer (5.2.5.3).
fn rsdp(rsdt: u32, xsdt: u64) -> Vec<u8> {
    let mut rsdp = vec![0; 36];
    rsdp[..8].copy_from_slice(b"RSD PTR ");
    rsdp[9..15].copy_from_slice(OEM_ID);
    rsdp[15] = 2;
    rsdp[16..20].copy_from_slice(&rsdt.to_le_bytes());
    rsdp[20] = 36;
    rsdp[24..32].copy_from_slice(&xsdt.to_le_bytes());
    // The first checksum is over the 20 bytes that ACPI 1.0 had, the second over all.
    rsdp[8] = checksum(&rsdp[..20]);
    rsdp[32] = checksum(&rsdp);
    rsdp
}

/// Writes the tables for `cpus` CPUs and so many virtio devices into the guest's memory. Returns the address of the RSDP.
///
/// # Errors
///
/// [`crate::error::Error::Call`] where the guest's memory is not there.
pub fn write(memory: &Memory, cpus: u8, virtio_devices: usize) -> Result<u64> {
    for (address, bytes) in tables(layout::ACPI_TABLES, cpus, virtio_devices) {
        crate::boot::write(memory, address, &bytes)?;
    }
    Ok(layout::ACPI_TABLES)
}

#[cfg(test)]
mod tests;
