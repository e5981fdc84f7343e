// SPDX-License-Identifier: GPL-2.0

//! The little ACPI machine language (ACPI 6.5, chapter 20) that the machine needs.

use crate::devices::{power, serial};
use crate::layout;

const NAME: u8 = 0x08;
const BYTE: u8 = 0x0a;
const DWORD: u8 = 0x0c;
const STRING: u8 = 0x0d;
const SCOPE: u8 = 0x10;
const BUFFER: u8 = 0x11;
const PACKAGE: u8 = 0x12;
const EXTENDED: u8 = 0x5b;
const DEVICE: u8 = 0x82;

/// The encoded length (20.2.4) of `content` and of itself, with `content` behind it.
fn with_length(content: &[u8]) -> Vec<u8> {
    let length = content.len();
    let mut out = match length + 1 {
        // One byte holds up to 63; two hold 12 bits, four low ones first.
        all @ ..=0x3f => vec![all as u8],
        _ => {
            let all = length + 2;
            debug_assert!(all <= 0xfff);
            vec![0x40 | (all & 0xf) as u8, (all >> 4) as u8]
        }
    };
    out.extend_from_slice(content);
    out
}

fn op(code: &[u8], content: &[&[u8]]) -> Vec<u8> {
    [code, &with_length(&content.concat())].concat()
}

fn name(name: &[u8; 4], value: &[u8]) -> Vec<u8> {
    [&[NAME], name.as_slice(), value].concat()
}

/// A package of bytes.
fn package(elements: &[u8]) -> Vec<u8> {
    let values: Vec<u8> = elements
        .iter()
        .flat_map(|element| [BYTE, *element])
        .collect();
    op(&[PACKAGE], &[&[elements.len() as u8], &values])
}

fn buffer(bytes: &[u8]) -> Vec<u8> {
    op(&[BUFFER], &[&[BYTE, bytes.len() as u8], bytes])
}

/// The compressed ID of a device such as `PNP0501` (19.3.4): three letters of 5 bits, four digits.
fn eisa_id(id: &[u8; 7]) -> Vec<u8> {
    let letter = |at: usize| u32::from(id[at] - b'@');
    let digit = |at: usize| (id[at] as char).to_digit(16).unwrap_or_default();
    let letters = (letter(0) << 10) | (letter(1) << 5) | letter(2);
    let digits = (digit(3) << 12) | (digit(4) << 8) | (digit(5) << 4) | digit(6);
    // Most significant byte first, in an integer whose least significant byte comes first.
    let value = ((letters << 16) | digits).swap_bytes();
    [&[DWORD], value.to_le_bytes().as_slice()].concat()
}

/// The resources of a legacy device: `count` ports from `base` on and one interrupt (6.4.2.5, 6.4.2.1).
fn resources(base: u16, count: u8, irq: u8) -> Vec<u8> {
    let [low, high] = base.to_le_bytes();
    let [irqs_low, irqs_high] = (1_u16 << irq).to_le_bytes();
    // An I/O port descriptor that decodes 16 bits, an IRQ descriptor, and the end tag without checksum.
    buffer(&[
        0x47, 1, low, high, low, high, 1, count, 0x22, irqs_low, irqs_high, 0x79, 0,
    ])
}

/// The virtio device with that number on the MMIO transport, by the ID that Linux looks for.
fn virtio(index: usize) -> Vec<u8> {
    let [page, size] =
        [layout::virtio_page(index), layout::PAGE_SIZE].map(|value| (value as u32).to_le_bytes());
    let gsi = layout::VIRTIO_GSIS[index].to_le_bytes();
    // A fixed memory range that can be written (6.4.3.4), an extended interrupt, edge-triggered and active
    // high (6.4.3.6), and the end tag.
    let resources = [
        [0x86, 9, 0, 1].as_slice(),
        &page,
        &size,
        &[0x89, 6, 0, 0b0011, 1],
        &gsi,
        &[0x79, 0],
    ];
    let digits = [b'0' + (index / 10) as u8, b'0' + (index % 10) as u8];
    op(
        &[EXTENDED, DEVICE],
        &[
            b"VR",
            &digits,
            &name(b"_HID", &[&[STRING], b"LNRO0005\0".as_slice()].concat()),
            &name(b"_UID", &[BYTE, index as u8]),
            &name(b"_CRS", &buffer(&resources.concat())),
        ],
    )
}

/// The body of the DSDT: how to switch off, the serial port, and so many virtio devices.
pub(super) fn definition_block(virtio_devices: usize) -> Vec<u8> {
    let off = power::SLEEP_TYPE_OFF;
    let serial_port = op(
        &[EXTENDED, DEVICE],
        &[
            b"COM1",
            &name(b"_HID", &eisa_id(b"PNP0501")),
            &name(b"_UID", &[BYTE, 1]),
            &name(
                b"_CRS",
                &resources(serial::BASE, serial::PORTS as u8, serial::IRQ as u8),
            ),
        ],
    );
    let virtio_ports: Vec<u8> = (0..virtio_devices).flat_map(virtio).collect();
    [
        name(b"_S5_", &package(&[off, off, 0, 0])),
        op(&[SCOPE], &[b"\\_SB_", &serial_port, &virtio_ports]),
    ]
    .concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_are_encoded_as_the_specification_has_it() {
        assert_eq!(with_length(&[7; 62])[..2], [63, 7]);
        // 63 bytes of content and two of the length itself: 65 = 0x041.
        assert_eq!(with_length(&[7; 63])[..3], [0x41, 0x04, 7]);
    }

    #[test]
    fn ids_are_compressed_as_known_ones_are() {
        // EISAID("PNP0501") and EISAID("PNP0A03") are 0x0105d041 and 0x030ad041 everywhere.
        assert_eq!(eisa_id(b"PNP0501"), [DWORD, 0x41, 0xd0, 0x05, 0x01]);
        assert_eq!(eisa_id(b"PNP0A03"), [DWORD, 0x41, 0xd0, 0x0a, 0x03]);
    }

    #[test]
    fn switching_off_is_named_first() {
        let expected = [
            &[NAME],
            b"_S5_".as_slice(),
            &[PACKAGE, 10, 4, BYTE, 5, BYTE, 5, BYTE, 0, BYTE, 0],
        ];
        assert!(definition_block(0).starts_with(&expected.concat()));
    }
}
