// SPDX-License-Identifier: GPL-2.0

//! The tables, read as an operating system reads them.

use std::collections::BTreeMap;

use super::*;

const START: u64 = layout::ACPI_TABLES;
const MOST_DEVICES: usize = layout::VIRTIO_GSIS.len();

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(bytes[at..at + 2].try_into().unwrap())
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
}

/// Follows RSDP and RSDT to the tables, checking every signature, length and checksum on the way.
fn found(cpus: u8) -> BTreeMap<String, Vec<u8>> {
    let memory = tables(START, cpus, MOST_DEVICES);
    assert!(memory.len() as u64 <= layout::ACPI_SIZE);
    let rsdp = &memory[..20];
    assert_eq!((&rsdp[..8], rsdp[15]), (b"RSD PTR ".as_slice(), 0));
    assert_eq!((sum(rsdp), rsdp), (0, super::rsdp(START).as_slice()));

    let at = |address: u32| &memory[address as usize - START as usize..];
    let read = |address: u32| {
        let table = &at(address)[..u32_at(at(address), 4) as usize];
        assert_eq!(sum(table), 0);
        (
            String::from_utf8(table[..4].to_vec()).unwrap(),
            table.to_vec(),
        )
    };
    let (signature, rsdt) = read(u32_at(rsdp, 16));
    assert_eq!(signature, "RSDT");
    let mut found: BTreeMap<_, _> = rsdt[36..]
        .chunks(4)
        .map(|entry| read(u32_at(entry, 0)))
        .collect();
    let fadt = &found["FACP"];
    let facs = u32_at(fadt, 36);
    assert_eq!((&at(facs)[..4], facs % 64), (b"FACS".as_slice(), 0));
    assert_eq!(u32_at(at(facs), 4), 64);
    let (signature, dsdt) = read(u32_at(fadt, 40));
    found.insert(signature, dsdt);
    found
}

#[test]
fn tables_are_found_from_the_rsdp() {
    let found = found(254);
    let names: Vec<_> = found.keys().map(String::as_str).collect();
    assert_eq!(names, ["APIC", "DSDT", "FACP"]);
}

#[test]
fn the_madt_lists_each_cpu_once_and_the_ioapic() {
    for cpus in [1, 2, 254] {
        let madt = &found(cpus)["APIC"];
        assert_eq!((u32_at(madt, 36), u32_at(madt, 40)), (0xfee0_0000, 1));
        let (mut ids, mut ioapics) = (Vec::new(), Vec::new());
        let mut rest = &madt[44..];
        while let [kind, length, ..] = *rest {
            let (entry, behind) = rest.split_at(usize::from(length));
            match (kind, length) {
                (0, 8) => {
                    assert_eq!((entry[2], u32_at(entry, 4)), (entry[3], 1));
                    ids.push(entry[3]);
                }
                (1, 12) => ioapics.push((u32_at(entry, 4), u32_at(entry, 8))),
                (2, 10) => assert_eq!((entry[2], entry[3], u32_at(entry, 4)), (0, 9, 9)),
                (4, 6) => assert_eq!((entry[2], entry[5]), (0xff, 1)),
                other => panic!("an entry of type and length {other:?}"),
            }
            rest = behind;
        }
        assert!(rest.is_empty());
        assert_eq!(ids, (0..cpus).collect::<Vec<u8>>());
        assert_eq!(ioapics, [(0xfec0_0000, 0)]);
    }
}

#[test]
fn the_fadt_names_the_registers() {
    let fadt = &found(1)["FACP"];
    // Length and revision of ACPI 6.5, table 5.9.
    assert_eq!((fadt.len(), fadt[8], fadt[131]), (276, 6, 5));
    let registers = [56, 64, 76].map(|at| u32_at(fadt, at));
    assert_eq!(registers, [0x600, 0x604, 0x608]);
    assert_eq!((fadt[88], fadt[89], fadt[91]), (4, 2, 4));
    // No SMI command port: ACPI is on from the start.
    assert_eq!((u32_at(fadt, 48), u16_at(fadt, 46)), (0, 9));
    // A reset register of one byte in I/O space, and the flag that says so.
    assert_eq!(fadt[116..120], [1, 8, 0, 1]);
    assert_eq!((u32_at(fadt, 120), fadt[128]), (0xcf9, 6));
    assert_ne!(u32_at(fadt, 112) & (1 << 10), 0);
    // What has 64 bits is left to the fields of 32.
    assert!(fadt[132..].iter().all(|byte| *byte == 0));
}

#[test]
fn the_serial_port_is_as_a_disassembler_has_it() {
    // Device (COM1) { _HID "PNP0501", _UID 1, _CRS { IO (Decode16, 0x3f8, 0x3f8, 1, 8)
    // Interrupt (ResourceConsumer, Edge, ActiveHigh, Exclusive) {4} } }.
    let expected = [
        &[0x5b, 0x82, 0x35],
        b"COM1\x08_HID\x0dPNP0501\0\x08_UID\x01\x08_CRS".as_slice(),
        &[0x11, 0x16, 0x0a, 19],
        &[0x47, 1, 0xf8, 3, 0xf8, 3, 1, 8],
        &[0x89, 6, 0, 0b0011, 1, 4, 0, 0, 0, 0x79, 0],
    ];
    assert_eq!(serial_port(), expected.concat());
}

#[test]
fn the_dsdt_names_switching_off_and_each_device() {
    let dsdt = &found(1)["DSDT"];
    let expected = [
        b"\x08_S5_".as_slice(),
        &[0x12, 8, 4, 0x0a, 5, 0x0a, 5, 0, 0],
    ]
    .concat();
    assert_eq!(dsdt[36..][..expected.len()], expected);
    // All the rest is the scope, whose length has two bytes.
    let scope = &dsdt[36 + expected.len()..];
    assert_eq!((scope[0], &scope[3..8]), (0x10, b"\\_SB_".as_slice()));
    let length = usize::from(scope[1] & 0xf) | usize::from(scope[2]) << 4;
    assert_eq!((scope[1] >> 6, length), (1, scope.len() - 1));
    let devices: Vec<u8> = (0..MOST_DEVICES).flat_map(virtio).collect();
    assert_eq!(scope[8..], [serial_port(), devices].concat());
}
