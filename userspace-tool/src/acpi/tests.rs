// SPDX-License-Identifier: GPL-2.0

//! The tables, read as an operating system reads them.

use std::collections::BTreeMap;

use super::*;
use crate::layout::Range;

const START: u64 = 0xe_0000;
const MOST_DEVICES: usize = layout::VIRTIO_GSIS.len();

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(bytes[at..at + 2].try_into().unwrap())
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
}

/// Follows RSDP and XSDT to the tables, checking every signature, length and checksum on the way.
fn found(cpus: u8) -> BTreeMap<String, Vec<u8>> {
    let memory: BTreeMap<u64, Vec<u8>> = tables(START, cpus, MOST_DEVICES).into_iter().collect();
    let rsdp = &memory[&START];
    assert_eq!(&rsdp[..8], b"RSD PTR ");
    assert_eq!((sum(&rsdp[..20]), sum(rsdp)), (0, 0));
    assert_eq!((rsdp[15], u32_at(rsdp, 20)), (2, 36));

    let mut found = BTreeMap::new();
    let mut read = |address: u64| {
        let table = &memory[&address];
        assert_eq!(u32_at(table, 4) as usize, table.len());
        assert_eq!(sum(table), 0);
        found.insert(
            String::from_utf8(table[..4].to_vec()).unwrap(),
            table.clone(),
        );
        table.clone()
    };
    let xsdt = read(u64_at(rsdp, 24));
    for entry in xsdt[36..].chunks(8) {
        read(u64_at(entry, 0));
    }
    let rsdt = &memory[&u64::from(u32_at(rsdp, 16))];
    assert_eq!((&rsdt[..4], sum(rsdt)), (b"RSDT".as_slice(), 0));
    let narrow = rsdt[36..]
        .chunks(4)
        .map(|entry| u64::from(u32_at(entry, 0)));
    assert!(narrow.eq(xsdt[36..].chunks(8).map(|entry| u64_at(entry, 0))));
    let fadt = found["FACP"].clone();
    let dsdt = &memory[&u64_at(&fadt, 140)];
    assert_eq!((&dsdt[..4], sum(dsdt)), (b"DSDT".as_slice(), 0));
    assert_eq!(u64::from(u32_at(&fadt, 40)), u64_at(&fadt, 140));
    let facs = &memory[&u64::from(u32_at(&fadt, 36))];
    assert_eq!((&facs[..4], u32_at(facs, 4)), (b"FACS".as_slice(), 64));
    assert_eq!(u32_at(&fadt, 36) % 64, 0);
    found
}

#[test]
fn tables_are_found_from_the_rsdp() {
    let found = found(1);
    assert_eq!(
        found.keys().map(String::as_str).collect::<Vec<_>>(),
        ["APIC", "FACP", "XSDT"]
    );
}

#[test]
fn tables_lie_apart_inside_their_range() {
    for cpus in [1, 254] {
        let ranges: Vec<Range> = tables(START, cpus, MOST_DEVICES)
            .iter()
            .map(|(start, bytes)| Range {
                start: *start,
                size: bytes.len() as u64,
            })
            .collect();
        assert!(ranges.windows(2).all(|pair| pair[0].end() <= pair[1].start));
        assert!(ranges
            .iter()
            .all(|range| range.end() <= layout::HIGH_MEMORY));
    }
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
fn the_fadt_names_the_registers_twice_alike() {
    let fadt = &found(1)["FACP"];
    // Length and revision of ACPI 6.5, table 5.9.
    assert_eq!((fadt.len(), fadt[8], fadt[131]), (276, 6, 5));
    for (old, new, old_length) in [(56, 148, 88), (64, 172, 89), (76, 208, 91)] {
        assert_eq!(u64::from(u32_at(fadt, old)), u64_at(fadt, new + 4));
        assert_eq!((fadt[new], fadt[new + 1]), (1, fadt[old_length] * 8));
    }
    assert_eq!((fadt[88], fadt[89], fadt[91]), (4, 2, 4));
    // No SMI command port: ACPI is on from the start.
    assert_eq!((u32_at(fadt, 48), u16_at(fadt, 46)), (0, 9));
    // A reset register of one byte in I/O space, and the flag that says so.
    assert_eq!((fadt[116], fadt[117], fadt[119]), (1, 8, 1));
    assert_ne!(u32_at(fadt, 112) & (1 << 10), 0);
}

/// What SeaBIOS does with the commands, and then the tables are found as in memory.
#[test]
fn firmware_places_the_tables_by_the_loader() {
    const BASE: u64 = 0x7ff_0000;
    let ForFirmware {
        mut tables,
        mut rsdp,
        loader,
    } = for_firmware(2, MOST_DEVICES);
    let name = |command: &[u8], at: usize| {
        let name = command[at..at + 56].split(|byte| *byte == 0).next();
        String::from_utf8(name.unwrap().to_vec()).unwrap()
    };
    for command in loader.chunks(128) {
        let file = name(command, 4);
        let bytes = match file.as_str() {
            "etc/acpi/tables" => &mut tables,
            "etc/acpi/rsdp" => &mut rsdp,
            _ => panic!("{file}"),
        };
        match u32_at(command, 0) {
            1 => assert_eq!(u32_at(command, 60), if command[64] == 1 { 64 } else { 16 }),
            2 => {
                assert_eq!(name(command, 60), "etc/acpi/tables");
                let at = u32_at(command, 116) as usize;
                let field = &mut bytes[at..at + usize::from(command[120])];
                let mut value = [0; 8];
                value[..field.len()].copy_from_slice(field);
                let value = (u64::from_le_bytes(value) + BASE).to_le_bytes();
                field.copy_from_slice(&value[..field.len()]);
            }
            3 => {
                let [at, start, length] = [60, 64, 68].map(|at| u32_at(command, at) as usize);
                bytes[at] = bytes[at].wrapping_sub(sum(&bytes[start..start + length]));
            }
            other => panic!("command {other}"),
        }
    }
    let table = |address: u64| {
        let at = (address - BASE) as usize;
        let length = u32_at(&tables, at + 4) as usize;
        &tables[at..at + length]
    };
    assert_eq!((sum(&rsdp[..20]), sum(&rsdp)), (0, 0));
    let xsdt = table(u64_at(&rsdp, 24));
    assert_eq!((&xsdt[..4], sum(xsdt)), (b"XSDT".as_slice(), 0));
    let rsdt = table(u64::from(u32_at(&rsdp, 16)));
    assert_eq!((&rsdt[..4], sum(rsdt)), (b"RSDT".as_slice(), 0));
    assert_eq!(u64::from(u32_at(rsdt, 36)), u64_at(xsdt, 36));
    let fadt = table(u64_at(xsdt, 36));
    assert_eq!((&fadt[..4], sum(fadt)), (b"FACP".as_slice(), 0));
    assert_eq!(&table(u64_at(xsdt, 44))[..4], b"APIC");
    assert_eq!(&table(u64::from(u32_at(fadt, 36)))[..4], b"FACS");
    assert_eq!(u64::from(u32_at(fadt, 40)), u64_at(fadt, 140));
    assert_eq!(sum(table(u64_at(fadt, 140))), 0);
}
