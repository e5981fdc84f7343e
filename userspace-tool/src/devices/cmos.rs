// SPDX-License-Identifier: GPL-2.0

//! The battery-backed clock and memory of a PC, an MC146818. Guests read the time of day here; it is the
//! host's, in UTC. Alarms and periodic interrupts never come. Firmware learns from its memory what the
//! machine has. vm-superio has only Arm's PL031 clock.

use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use crate::acpi::CMOS_CENTURY;
use crate::layout;
use crate::size::{KIB, MIB};

/// Selects a byte.
pub const INDEX: u16 = 0x70;
/// Reads or writes the selected byte.
pub const DATA: u16 = 0x71;

const STATUS_A: u8 = 0x0a;
const STATUS_B: u8 = 0x0b;
const STATUS_C: u8 = 0x0c;
const STATUS_D: u8 = 0x0d;
/// The oscillator runs, at the usual rate; no update is in progress.
const RUNNING: u8 = 0x26;
/// 24 hours a day; numbers are BCD.
const HOURS_24: u8 = 0x02;
/// The battery is good.
const VALID: u8 = 0x80;
const BYTES: usize = 128;

/// Where firmware looks for the size of memory, low byte first: below 640 KiB and above 1 MiB in KiB, the
/// latter twice; above 16 MiB and, in 3 bytes, above 4 GiB in units of 64 KiB. The last two and the number
/// of CPUs, less 1, are where emulated PCs have them. Below 4 GiB memory ends where the ACPI tables begin.
const BASE_MEMORY: usize = 0x15;
const EXTENDED_MEMORY: [usize; 2] = [0x17, 0x30];
const MEMORY_ABOVE_16M: usize = 0x34;
const MEMORY_ABOVE_4G: usize = 0x5b;
const MORE_CPUS: usize = 0x5f;

/// The device.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cmos {
    index: u8,
    bytes: Vec<u8>,
}

impl Default for Cmos {
    fn default() -> Self {
        Self {
            index: 0,
            bytes: vec![0; BYTES],
        }
    }
}

impl Cmos {
    /// The one of a machine with `memory` bytes and that number of CPUs.
    #[must_use]
    pub fn new(memory: u64, cpus: u32) -> Self {
        let mut cmos = Self::default();
        let mut put = |at: usize, value: u64, length: usize| {
            // A field says as much as it can.
            let most = (1 << (8 * length)) - 1;
            let value = value.min(most).to_le_bytes();
            cmos.bytes[at..at + length].copy_from_slice(&value[..length]);
        };
        let low = layout::acpi_tables_of_firmware(memory);
        put(BASE_MEMORY, 640, 2);
        for at in EXTENDED_MEMORY {
            put(at, low.saturating_sub(MIB) / KIB, 2);
        }
        put(
            MEMORY_ABOVE_16M,
            low.saturating_sub(16 * MIB) / (64 * KIB),
            2,
        );
        put(
            MEMORY_ABOVE_4G,
            memory.saturating_sub(layout::HOLE) / (64 * KIB),
            3,
        );
        put(MORE_CPUS, u64::from(cpus.saturating_sub(1)), 1);
        cmos
    }

    /// Whether it is as this program could have left it.
    #[must_use]
    pub fn is_whole(&self) -> bool {
        usize::from(self.index) < BYTES && self.bytes.len() == BYTES
    }

    /// The guest writes a byte. The clock can't be set: what is written to it is forgotten.
    pub fn write(&mut self, port: u16, byte: u8) {
        match port {
            // The upper bit masks NMIs, of which this machine has none.
            INDEX => self.index = byte & 0x7f,
            _ => self.bytes[usize::from(self.index)] = byte,
        }
    }

    /// The guest reads a byte.
    #[must_use]
    pub fn read(&self, port: u16) -> u8 {
        match port {
            INDEX => self.index,
            _ => {
                let now = SystemTime::now()
                    .duration_since(UNIX_EPOCH)
                    .unwrap_or_default();
                self.byte(now.as_secs())
            }
        }
    }

    /// The selected byte, `now` seconds after the beginning of 1970.
    fn byte(&self, now: u64) -> u8 {
        let (days, seconds) = (now / 86_400, now % 86_400);
        match self.index {
            0x00 => bcd(seconds % 60),
            0x02 => bcd(seconds / 60 % 60),
            0x04 => bcd(seconds / 3600),
            // Sunday is 1; the first day of 1970 was a Thursday.
            0x06 => bcd((days + 4) % 7 + 1),
            0x07 => bcd(date(days).2),
            0x08 => bcd(date(days).1),
            0x09 => bcd(date(days).0 % 100),
            CMOS_CENTURY => bcd(date(days).0 / 100),
            STATUS_A => RUNNING,
            STATUS_B => HOURS_24,
            STATUS_C => 0,
            STATUS_D => VALID,
            index => self.bytes[usize::from(index)],
        }
    }
}

/// Two decimal digits, four bits each.
fn bcd(value: u64) -> u8 {
    (((value / 10 % 10) << 4) | (value % 10)) as u8
}

/// Year, month and day of the month (both from 1) of the day so many days after the first of 1970.
fn date(days: u64) -> (u64, u64, u64) {
    // 400 years of the Gregorian calendar always have the same number of days.
    const CYCLE: u64 = 146_097;
    // Counted from the first of March of the year 0: so the leap day is the last of its year, of its century where
    // that has one, and of the cycle.
    let days = days + 719_468;
    let day = days % CYCLE;
    let year = (day - day / 1_460 + day / 36_524 - day / (CYCLE - 1)) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    // From March on the months have 31, 30, 31, 30 and 31 days, 153 together, over and over.
    let month = (5 * day + 2) / 153;
    let day = day - (153 * month + 2) / 5 + 1;
    let (month, next) = if month < 10 {
        (month + 3, 0)
    } else {
        (month - 9, 1)
    };
    (days / CYCLE * 400 + year + next, month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_the_calendars() {
        // From date(1): date -u -d @$((days * 86400)) +%F.
        for (days, expected) in [
            (0, (1970, 1, 1)),
            (58, (1970, 2, 28)),
            (59, (1970, 3, 1)),
            (364, (1970, 12, 31)),
            (789, (1972, 2, 29)),
            (11_016, (2000, 2, 29)),
            (19_782, (2024, 2, 29)),
            (20_514, (2026, 3, 2)),
            (47_540, (2100, 2, 28)),
            (47_541, (2100, 3, 1)),
            (146_097, (2370, 1, 1)),
        ] {
            assert_eq!(date(days), expected, "{days}");
        }
    }

    #[test]
    fn the_clock_reads_in_bcd() {
        let mut cmos = Cmos::default();
        // 2024-02-29 23:59:58 UTC, a Thursday.
        let now = 1_709_251_198;
        for (index, expected) in [
            (0x00, 0x58),
            (0x02, 0x59),
            (0x04, 0x23),
            (0x06, 0x05),
            (0x07, 0x29),
            (0x08, 0x02),
            (0x09, 0x24),
            (0x32, 0x20),
        ] {
            cmos.write(INDEX, index);
            assert_eq!(cmos.byte(now), expected, "{index:#x}");
        }
    }

    #[test]
    fn no_update_is_ever_in_progress_and_the_battery_is_good() {
        let mut cmos = Cmos::default();
        cmos.write(INDEX, 0x80 | STATUS_A);
        assert_eq!(cmos.read(DATA) & 0x80, 0);
        cmos.write(INDEX, STATUS_D);
        assert_ne!(cmos.read(DATA) & 0x80, 0);
    }

    #[test]
    fn firmware_learns_of_memory_and_cpus() {
        for (memory, cpus, fields) in [
            (8 * MIB, 1, [640, 7104, 7104, 0, 0, 0]),
            (256 * MIB, 2, [640, 0xffff, 0xffff, 3839, 0, 1]),
            // 3 GiB below the hole, with the ACPI tables, 2 GiB above it.
            (5120 * MIB, 4, [640, 0xffff, 0xffff, 48895, 32768, 3]),
        ] {
            let mut cmos = Cmos::new(memory, cpus);
            let mut field = |at: u8, length: u8| {
                (0..length).rev().fold(0, |value, index| {
                    cmos.write(INDEX, at + index);
                    (value << 8) | u32::from(cmos.read(DATA))
                })
            };
            let read = [
                field(0x15, 2),
                field(0x17, 2),
                field(0x30, 2),
                field(0x34, 2),
                field(0x5b, 3),
                field(0x5f, 1),
            ];
            assert_eq!(read, fields, "{memory:#x}");
        }
    }

    #[test]
    fn other_bytes_are_memory() {
        let mut cmos = Cmos::default();
        cmos.write(INDEX, 0x7f);
        cmos.write(DATA, 0x5a);
        cmos.write(INDEX, 0x40);
        assert_eq!(cmos.read(DATA), 0);
        cmos.write(INDEX, 0x7f);
        assert_eq!(cmos.read(DATA), 0x5a);
    }
}
