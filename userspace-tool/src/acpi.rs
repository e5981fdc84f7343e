// SPDX-License-Identifier: GPL-2.0

//! ACPI tables (ACPI specification 6.5): enough for an operating system to find the CPUs, the IOAPIC, the
//! serial port and the virtio devices, to switch the machine off and to reset it.
//!
//! Software that starts as a kernel finds them below 1 MiB. Firmware gets them where it has no other use for the
//! memory, and the RSDP in a file ([`crate::devices::fwcfg`]), which it puts where its operating system looks.

use acpi_tables::aml::{
    Device, Interrupt, Memory32Fixed, Name, Package, ResourceTemplate, Scope, IO, ZERO,
};
use acpi_tables::facs::FACS;
use acpi_tables::fadt::{FADTBuilder, Flags, FADT};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, ProcessorLocalApic};
use acpi_tables::sdt::Sdt;
use acpi_tables::Aml;

use crate::devices::power::{self, SCI};
use crate::devices::serial;
use crate::error::Result;
use crate::layout;
use crate::memory::Memory;

const OEM_ID: [u8; 6] = *b"RVISOR";
const OEM_TABLE_ID: [u8; 8] = *b"RVISORPC";
const REVISION: u32 = 1;

/// The byte of the CMOS clock that holds the century.
pub const CMOS_CENTURY: u8 = 0x32;

/// Where the RSDT lies behind the RSDP, and the tables that it names.
const RSDT_OFFSET: usize = 64;
const FIRST_TABLE: usize = 128;

/// A table of that signature and revision, with so many bytes of zeroes behind its header of 36 (5.2.6).
fn table(signature: &[u8; 4], body: u32, revision: u8) -> Sdt {
    let length = 36 + body;
    Sdt::new(*signature, length, revision, OEM_ID, OEM_TABLE_ID, REVISION)
}

/// The fixed ACPI description table (5.2.9), revision 6.5. Its 64-bit fields stay 0: those of 32 bits count then.
fn fadt(facs: u32, dsdt: u32) -> FADT {
    // Table 5.9: there are legacy devices, and no VGA. The bit for a keyboard controller stays 0: what is
    // at its ports takes a reset only.
    const BOOT_ARCHITECTURE: u16 = (1 << 0) | (1 << 2);
    // The power button is a fixed one. There is no sleep button, and the clock wakes nothing.
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, REVISION)
        .firmware_ctrl_32(facs)
        .dsdt_32(dsdt)
        .flag(Flags::Wbinvd)
        .flag(Flags::SlpButton)
        .flag(Flags::FixRtc)
        .flag(Flags::TmrValExt)
        .flag(Flags::ResetRegSup);
    fadt.sci_int = u16::from(SCI).into();
    fadt.pm1a_evt_blk = u32::from(power::PM1A_EVENT).into();
    fadt.pm1a_cnt_blk = u32::from(power::PM1A_CONTROL).into();
    fadt.pm_tmr_blk = u32::from(power::PM_TIMER).into();
    fadt.pm1_evt_len = power::PM1A_EVENT_SIZE;
    fadt.pm1_cnt_len = power::PM1A_CONTROL_SIZE;
    fadt.pm_tmr_len = power::PM_TIMER_SIZE;
    // C2 and C3 take longer than any threshold: there are none.
    fadt.p_lvl2_lat = u16::MAX.into();
    fadt.p_lvl3_lat = u16::MAX.into();
    fadt.century = CMOS_CENTURY;
    fadt.iapc_boot_arch = BOOT_ARCHITECTURE.into();
    let (space, access) = (AddressSpace::SystemIo, AccessSize::ByteAccess);
    fadt.reset_reg = GAS::new(space, 8, 0, access, power::RESET.into());
    fadt.reset_value = power::RESET_VALUE;
    fadt.finalize()
}

/// The multiple APIC description table (5.2.12) for `cpus` CPUs whose APIC IDs are 0, 1, 2, …
///
/// The library's own has neither the flag for the 8259s nor the last two entries.
fn madt(cpus: u8) -> Sdt {
    const PCAT_COMPAT: u32 = 1;
    // Table 5.26: active high, level-triggered.
    const FLAGS: u8 = 0b1101;
    let mut madt = table(b"APIC", 8, 5);
    madt.write_u32(36, layout::LOCAL_APIC);
    madt.write_u32(40, PCAT_COMPAT);
    for id in 0..cpus {
        ProcessorLocalApic::new(id, id, EnabledStatus::Enabled).to_aml_bytes(&mut madt);
    }
    IoApic::new(0, layout::IOAPIC, 0).to_aml_bytes(&mut madt);
    // Interrupt source override of the SCI: type, length, ISA, source; GSI; flags. All others, the timer's
    // too, are the GSIs of the same number: so has KVM's default routing them.
    madt.append_slice(&[2, 10, 0, SCI, SCI, 0, 0, 0, FLAGS, 0]);
    // Local APIC NMI: type, length, all processors; flags; LINT1.
    madt.append_slice(&[4, 6, 0xff, 0, 0, 1]);
    madt
}

/// A device with its ID, which of that ID it is, and its resources.
fn device(name: &str, id: &'static str, number: u8, resources: Vec<&dyn Aml>) -> Vec<u8> {
    let id = Name::new("_HID".into(), &id);
    let number = Name::new("_UID".into(), &number);
    let resources = Name::new("_CRS".into(), &ResourceTemplate::new(resources));
    let mut code = Vec::new();
    Device::new(name.into(), vec![&id, &number, &resources]).to_aml_bytes(&mut code);
    code
}

/// Its ports are decoded in 16 bits and have no other base.
fn serial_port() -> Vec<u8> {
    let ports = IO::new(serial::BASE, serial::BASE, 1, serial::PORTS);
    device("COM1", "PNP0501", 1, vec![&ports, &interrupt(serial::IRQ)])
}

/// Edge-triggered, active high, not shared.
fn interrupt(gsi: u32) -> Interrupt {
    Interrupt::new(true, true, false, false, gsi)
}

/// The virtio device with that number on the MMIO transport, by the ID that Linux looks for.
fn virtio(index: usize) -> Vec<u8> {
    let page = layout::virtio_page(index) as u32;
    let memory = Memory32Fixed::new(true, page, layout::PAGE_SIZE as u32);
    let interrupt = interrupt(layout::VIRTIO_GSIS[index]);
    let name = format!("VR{index:02}");
    device(&name, "LNRO0005", index as u8, vec![&memory, &interrupt])
}

/// The differentiated system description table (5.2.11.1): how to switch off, the serial port, and so many virtio
/// devices.
fn dsdt(virtio_devices: usize) -> Sdt {
    let off = power::SLEEP_TYPE_OFF;
    let mut dsdt = table(b"DSDT", 0, 2);
    Name::new("_S5_".into(), &Package::new(vec![&off, &off, &ZERO, &ZERO])).to_aml_bytes(&mut dsdt);
    let mut devices = serial_port();
    devices.extend((0..virtio_devices).flat_map(virtio));
    dsdt.append_slice(&Scope::raw("\\_SB_".into(), devices));
    dsdt
}

/// The root system description pointer (5.2.5.3) as ACPI 1.0 has it, of tables that lie at `start`: all know it, and no
/// address here needs more than 32 bits. GRUB switches off by an RSDT alone.
#[must_use]
pub fn rsdp(start: u64) -> [u8; 20] {
    let mut rsdp = [0; 20];
    rsdp[..8].copy_from_slice(b"RSD PTR ");
    rsdp[9..15].copy_from_slice(&OEM_ID);
    rsdp[16..].copy_from_slice(&(start as u32 + RSDT_OFFSET as u32).to_le_bytes());
    let sum = rsdp.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte));
    rsdp[8] = sum.wrapping_neg();
    rsdp
}

/// The tables for `cpus` CPUs and so many virtio devices, as they lie from the address `start` on, RSDP first.
fn tables(start: u64, cpus: u8, virtio_devices: usize) -> Vec<u8> {
    let mut all = rsdp(start).to_vec();
    all.resize(FIRST_TABLE, 0);
    let mut place = |table: &dyn Aml| {
        // The FACS must lie at a multiple of 64; the others are glad of it.
        all.resize(all.len().next_multiple_of(64), 0);
        let address = start as u32 + all.len() as u32;
        table.to_aml_bytes(&mut all);
        address
    };
    let (facs, dsdt) = (place(&FACS::new()), place(&dsdt(virtio_devices)));
    let entries = [place(&fadt(facs, dsdt)), place(&madt(cpus))];
    let mut rsdt = table(b"RSDT", 0, 1);
    rsdt.append_slice(&entries.map(u32::to_le_bytes).concat());
    all[RSDT_OFFSET..][..rsdt.len()].copy_from_slice(rsdt.as_slice());
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
