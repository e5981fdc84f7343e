// SPDX-License-Identifier: GPL-2.0

//! The little ACPI machine language (ACPI 6.5, chapter 20) that the machine needs.

use crate::devices::{power, serial};
use crate::layout;

const ZERO: u8 = 0x00;
const NAME: u8 = 0x08;
const BYTE: u8 = 0x0a;
const STRING: u8 = 0x0d;
const SCOPE: u8 = 0x10;
const BUFFER: u8 = 0x11;
const PACKAGE: u8 = 0x12;
const EXTENDED: u8 = 0x5b;
const DEVICE: u8 = 0x82;
/// The tag behind the last resource (6.4.2.9), and a checksum that is not looked at.
const END: [u8; 2] = [0x79, 0];

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

/// A device with its ID, which of that ID it is, and its resources.
fn device(name: &str, id: &str, number: u8, resources: &[&[u8]]) -> Vec<u8> {
    let resources = [resources.concat(), END.to_vec()].concat();
    op(
        &[EXTENDED, DEVICE],
        &[
            name.as_bytes(),
            &[NAME],
            b"_HID",
            &[STRING],
            id.as_bytes(),
            &[0, NAME],
            b"_UID",
            &[BYTE, number, NAME],
            b"_CRS",
            &op(&[BUFFER], &[&[BYTE, resources.len() as u8], &resources]),
        ],
    )
}

fn serial_port() -> Vec<u8> {
    let base = serial::BASE.to_le_bytes();
    // Ports, decoded in 16 bits, from the least base to the highest one in steps of 1 (6.4.2.5), and an
    // interrupt (6.4.2.1).
    let ports = [&[0x47, 1], &base[..], &base, &[1, serial::PORTS]].concat();
    let [low, high] = (1_u16 << serial::IRQ).to_le_bytes();
    device("COM1", "PNP0501", 1, &[&ports, &[0x22, low, high]])
}

/// The virtio device with that number on the MMIO transport, by the ID that Linux looks for.
fn virtio(index: usize) -> Vec<u8> {
    let [page, size] =
        [layout::virtio_page(index), layout::PAGE_SIZE].map(|value| (value as u32).to_le_bytes());
    let gsi = layout::VIRTIO_GSIS[index].to_le_bytes();
    // A fixed memory range that can be written (6.4.3.4), and an extended interrupt, edge-triggered and active
    // high (6.4.3.6).
    let memory = [&[0x86, 9, 0, 1], &page[..], &size].concat();
    let interrupt = [&[0x89, 6, 0, 0b0011, 1], &gsi[..]].concat();
    let name = format!("VR{index:02}");
    device(&name, "LNRO0005", index as u8, &[&memory, &interrupt])
}

/// The body of the DSDT: how to switch off, the serial port, and so many virtio devices.
pub(super) fn definition_block(virtio_devices: usize) -> Vec<u8> {
    let off = power::SLEEP_TYPE_OFF;
    let virtio_devices: Vec<u8> = (0..virtio_devices).flat_map(virtio).collect();
    [
        vec![NAME],
        b"_S5_".to_vec(),
        op(&[PACKAGE], &[&[4, BYTE, off, BYTE, off, ZERO, ZERO]]),
        op(&[SCOPE], &[b"\\_SB_", &serial_port(), &virtio_devices]),
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
    fn the_serial_port_is_as_a_disassembler_has_it() {
        // Device (COM1) { _HID "PNP0501", _UID 1, _CRS { IO (Decode16, 0x3f8, 0x3f8, 1, 8) IRQNoFlags () {4} } }.
        let expected = [
            &[0x5b, 0x82, 0x30],
            b"COM1\x08_HID\x0dPNP0501\0\x08_UID\x0a\x01\x08_CRS".as_slice(),
            &[0x11, 0x10, 0x0a, 13],
            &[0x47, 1, 0xf8, 3, 0xf8, 3, 1, 8, 0x22, 0x10, 0, 0x79, 0],
        ];
        assert_eq!(serial_port(), expected.concat());
    }

    #[test]
    fn switching_off_is_named_first() {
        let expected = [
            &[NAME],
            b"_S5_".as_slice(),
            &[PACKAGE, 8, 4, BYTE, 5, BYTE, 5, ZERO, ZERO],
        ];
        assert!(definition_block(0).starts_with(&expected.concat()));
    }
}
