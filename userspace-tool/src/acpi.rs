// SPDX-License-Identifier: GPL-2.0

//! ACPI tables (ACPI specification 6.5): enough for an operating system to find the CPUs, the IOAPIC, the
//! serial port and the virtio devices, to switch the machine off and to reset it.
//!
//! They are built here and not by the `acpi_tables` crate because its releases need a newer compiler
//! than the kernel's and have neither a way to set the MADT's flags nor interrupt source overrides.
//!
//! Software that starts as a kernel finds them below 1 MiB. Firmware gets them where it has no other use for the
//! memory, and the RSDP in a file ([`crate::devices::fwcfg`]), which it puts where its operating system looks.

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
/// Where the RSDT lies behind the first byte of all, and the tables that it names.
const RSDT: u32 = 64;
const FIRST_TABLE: usize = 128;

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

/// The fixed ACPI description table (5.2.9), revision 6.5. Its 64-bit fields stay 0: those of 32 bits count then.
fn fadt(facs: u32, dsdt: u32) -> Vec<u8> {
    // Table 5.9: there are legacy devices, and no VGA. The bit for a keyboard controller stays 0: what is
    // at its ports takes a reset only.
    const BOOT_ARCHITECTURE: u16 = (1 << 0) | (1 << 2);
    // Table 5.10: WBINVD works, no sleep button, no wake by the clock, the timer has 32 bits, the reset
    // register works. The power button is a fixed one.
    const FLAGS: u32 = (1 << 0) | (1 << 5) | (1 << 6) | (1 << 8) | (1 << 10);
    // A generic address structure (5.2.3.2): I/O space, 8 bits from bit 0 on, accessed as a byte.
    const RESET_REGISTER: [u8; 4] = [1, 8, 0, 1];
    const LENGTH: usize = 276;

    let mut fadt = vec![0; LENGTH];
    let mut put = |offset: usize, bytes: &[u8]| {
        fadt[offset..offset + bytes.len()].copy_from_slice(bytes);
    };
    put(36, &facs.to_le_bytes());
    put(40, &dsdt.to_le_bytes());
    put(46, &u16::from(SCI).to_le_bytes());
    put(56, &u32::from(power::PM1A_EVENT).to_le_bytes());
    put(64, &u32::from(power::PM1A_CONTROL).to_le_bytes());
    put(76, &u32::from(power::PM_TIMER).to_le_bytes());
    put(88, &[power::PM1A_EVENT_SIZE, power::PM1A_CONTROL_SIZE]);
    put(91, &[power::PM_TIMER_SIZE]);
    // C2 and C3 take longer than any threshold: there are none.
    put(96, &[0xff; 4]);
    put(108, &[CMOS_CENTURY]);
    put(109, &BOOT_ARCHITECTURE.to_le_bytes());
    put(112, &FLAGS.to_le_bytes());
    put(116, &RESET_REGISTER);
    put(120, &power::RESET.to_le_bytes());
    put(128, &[power::RESET_VALUE]);
    put(131, &[5]);
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

/// The root system description pointer (5.2.5.3) as ACPI 1.0 has it, of tables that lie at `start`: all know it,
/// GRUB too, and no address here needs more than 32 bits.
#[must_use]
pub fn rsdp(start: u64) -> [u8; 20] {
    let mut rsdp = [0; 20];
    rsdp[..8].copy_from_slice(b"RSD PTR ");
    rsdp[9..15].copy_from_slice(OEM_ID);
    rsdp[16..].copy_from_slice(&(start as u32 + RSDT).to_le_bytes());
    rsdp[8] = checksum(&rsdp);
    rsdp
}

/// The tables for `cpus` CPUs and so many virtio devices, as they lie from the address `start` on, RSDP first.
fn tables(start: u64, cpus: u8, virtio_devices: usize) -> Vec<u8> {
    let mut all = rsdp(start).to_vec();
    all.resize(FIRST_TABLE, 0);
    let mut place = |table: Vec<u8>| {
        // The FACS must lie at a multiple of 64; the others are glad of it.
        all.resize(all.len().next_multiple_of(64), 0);
        let address = start as u32 + all.len() as u32;
        all.extend(table);
        address
    };
    let facs = place(facs());
    let dsdt = place(table(b"DSDT", 2, &aml::definition_block(virtio_devices)));
    let entries = [place(fadt(facs, dsdt)), place(madt(cpus))];
    let rsdt = table(b"RSDT", 1, &entries.map(u32::to_le_bytes).concat());
    all[RSDT as usize..][..rsdt.len()].copy_from_slice(&rsdt);
    all
}

/// Writes the tables for `cpus` CPUs and so many virtio devices into the guest's memory, from `start` on, where the
/// RSDP is.
///
/// # Errors
///
/// [`crate::error::Error::Call`] where the guest's memory is not there.
pub fn write(memory: &Memory, start: u64, cpus: u8, virtio_devices: usize) -> Result<()> {
    crate::boot::write(memory, start, &tables(start, cpus, virtio_devices))
}

#[cfg(test)]
mod tests;
