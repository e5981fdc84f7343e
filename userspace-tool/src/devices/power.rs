// SPDX-License-Identifier: GPL-2.0

//! ACPI's fixed registers (ACPI 6.5, 4.8.3) and the reset register (4.8.3.6): switching off and resetting.

use std::io::Read;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::outcome::Outcome;

/// PM1a event block: status, then enable, 2 bytes each. The power button is the only event that comes.
pub const PM1A_EVENT: u16 = 0x600;
/// Its size.
pub const PM1A_EVENT_SIZE: u8 = 4;
/// PM1a control block.
pub const PM1A_CONTROL: u16 = 0x604;
/// Its size.
pub const PM1A_CONTROL_SIZE: u8 = 2;
/// The power management timer (4.8.3.3): 32 bits that count at [`PM_TIMER_HZ`].
pub const PM_TIMER: u16 = 0x608;
/// Its size.
pub const PM_TIMER_SIZE: u8 = 4;
/// Its frequency in Hz, the same in every PC.
pub const PM_TIMER_HZ: u64 = 3_579_545;
/// The sleep type that means "off", as the DSDT's `_S5` says.
pub const SLEEP_TYPE_OFF: u8 = 5;
/// The reset control register of a PC's chipset.
pub const RESET: u16 = 0xcf9;
/// What resets the machine when written there: a full reset of the CPU.
pub const RESET_VALUE: u8 = 0x06;

/// The interrupt of ACPI events, level-triggered.
pub const SCI: u8 = 9;

/// The bytes of the registers, counted from the status: the upper ones of status and enable, with the bit of the power
/// button; those of control, with SCI_EN (ACPI is on) in one and the sleep type and the bit that enters it in the other.
const STATUS: usize = 1;
const ENABLE: usize = 3;
const POWER_BUTTON: u8 = 1 << 0;
const CONTROL_LOW: usize = 4;
const SCI_ENABLE: u8 = 1 << 0;
const CONTROL: usize = 5;
const SLEEP_TYPE: u8 = 7 << 2;
const SLEEP_ENABLE: u8 = 1 << 5;
/// Reset control: pull the reset line.
const RESET_CPU: u8 = 1 << 2;

/// The registers.
#[derive(Debug, Serialize, Deserialize)]
pub struct Power {
    #[serde(skip, default = "Instant::now")]
    started: Instant,
    /// How long the timer had counted before.
    before: Duration,
    /// Status, enable and control.
    registers: [u8; 6],
    reset: u8,
}

impl Default for Power {
    fn default() -> Self {
        Self {
            started: Instant::now(),
            before: Duration::ZERO,
            registers: [0; 6],
            reset: 0,
        }
    }
}

/// The timer's count after `elapsed`.
fn pm_timer(elapsed: Duration) -> u32 {
    let ticks = elapsed.as_nanos() * u128::from(PM_TIMER_HZ) / 1_000_000_000;
    // It wraps around.
    ticks as u32
}

impl Power {
    /// Somebody presses the power button.
    pub fn press_button(&mut self) {
        self.registers[STATUS] |= POWER_BUTTON;
    }

    /// For how long the timer has counted.
    fn running(&self) -> Duration {
        self.before.saturating_add(self.started.elapsed())
    }

    /// The registers as they are, to be kept outside: there the timer stands still.
    #[must_use]
    pub fn save(&self) -> Self {
        Self {
            started: Instant::now(),
            before: self.running(),
            ..*self
        }
    }

    /// Whether the guest is to be interrupted, as long as it is.
    #[must_use]
    pub fn interrupts(&self) -> bool {
        self.registers[STATUS] & self.registers[ENABLE] != 0
    }

    /// A write; says where it ends the guest. Ports that are not here take it and forget it.
    pub fn write(&mut self, port: u16, data: &[u8]) -> Option<Outcome> {
        // A wider access reaches the registers behind the first one byte for byte, as far as there are ports.
        let mut event = None;
        for (port, byte) in (port..=u16::MAX).zip(data) {
            event = event.or(self.write_byte(port, *byte));
        }
        event
    }

    fn write_byte(&mut self, port: u16, byte: u8) -> Option<Outcome> {
        if port == RESET {
            self.reset = byte & !RESET_CPU;
            return (byte & RESET_CPU != 0).then_some(Outcome::Rebooted);
        }
        let index = usize::from(port.checked_sub(PM1A_EVENT)?);
        let register = self.registers.get_mut(index)?;
        match index {
            // A bit is cleared by writing it.
            0 | STATUS => *register &= !byte,
            CONTROL => {
                // The bit that enters a sleep state always reads as 0.
                *register = byte & !SLEEP_ENABLE;
                let off = SLEEP_ENABLE | (SLEEP_TYPE_OFF << SLEEP_TYPE.trailing_zeros());
                if byte & (SLEEP_ENABLE | SLEEP_TYPE) == off {
                    return Some(Outcome::PoweredOff);
                }
            }
            _ => *register = byte,
        }
        None
    }

    /// A read; leaves the bytes of ports that are not here as they are.
    pub fn read(&self, port: u16, data: &mut [u8]) {
        if port == PM_TIMER {
            let count = pm_timer(self.running()).to_le_bytes();
            let _ = count.as_slice().read(data);
            return;
        }
        for (port, byte) in (port..=u16::MAX).zip(data) {
            let index = usize::from(port.wrapping_sub(PM1A_EVENT));
            match self.registers.get(index) {
                Some(register) if index == CONTROL_LOW => *byte = register | SCI_ENABLE,
                Some(register) => *byte = *register,
                None if port == RESET => *byte = self.reset,
                None => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_s5_with_sleep_enable_switches_off() {
        for kind in 0..8 {
            for enable in [0, SLEEP_ENABLE] {
                let value = [SCI_ENABLE, (kind << 2) | enable];
                let off = matches!(
                    Power::default().write(PM1A_CONTROL, &value),
                    Some(Outcome::PoweredOff)
                );
                assert_eq!(off, kind == 5 && enable != 0);
            }
        }
    }

    #[test]
    fn control_reads_back_with_acpi_on() {
        let mut power = Power::default();
        assert!(power
            .write(PM1A_CONTROL, &0x0400_u16.to_le_bytes())
            .is_none());
        let mut data = [0xff; 2];
        power.read(PM1A_CONTROL, &mut data);
        assert_eq!(u16::from_le_bytes(data), 0x0401);
    }

    #[test]
    fn the_timer_counts_and_wraps() {
        assert_eq!(pm_timer(Duration::ZERO), 0);
        assert_eq!(pm_timer(Duration::from_secs(1)), 3_579_545);
        // 1200 s are 4,295,454,000 ticks, 486,704 more than 32 bits hold.
        assert_eq!(pm_timer(Duration::from_secs(1200)), 486_704);
        let (power, mut first, mut second) = (Power::default(), [0; 4], [0; 4]);
        power.read(PM_TIMER, &mut first);
        std::thread::sleep(Duration::from_millis(2));
        power.read(PM_TIMER, &mut second);
        assert!(u32::from_le_bytes(second) - u32::from_le_bytes(first) >= 7159);
    }

    #[test]
    fn the_power_button_interrupts_until_it_is_acknowledged() {
        let mut power = Power::default();
        let event = |power: &Power| {
            let mut data = [0xff; 4];
            power.read(PM1A_EVENT, &mut data);
            u32::from_le_bytes(data)
        };
        assert!(power
            .write(PM1A_EVENT, &0x0120_ffff_u32.to_le_bytes())
            .is_none());
        assert_eq!((event(&power), power.interrupts()), (0x0120_0000, false));
        power.press_button();
        assert_eq!((event(&power), power.interrupts()), (0x0120_0100, true));
        // Other bits acknowledge nothing.
        power.write(PM1A_EVENT, &0xfeff_u16.to_le_bytes());
        assert!(power.interrupts());
        power.write(PM1A_EVENT + 2, &0_u16.to_le_bytes());
        assert_eq!((event(&power), power.interrupts()), (0x0000_0100, false));
        power.write(PM1A_EVENT + 2, &0x0100_u16.to_le_bytes());
        power.write(PM1A_EVENT, &0x0100_u16.to_le_bytes());
        assert_eq!((event(&power), power.interrupts()), (0x0100_0000, false));
    }

    #[test]
    fn reset_takes_the_bit_for_it() {
        let mut power = Power::default();
        assert!(power.write(RESET, &[0x02]).is_none());
        assert!(matches!(
            power.write(RESET, &[RESET_VALUE]),
            Some(Outcome::Rebooted)
        ));
    }

    #[test]
    fn a_pci_probe_resets_nothing() {
        // Linux looks for PCI by writing to 0xcfb and 0xcf8, the latter four bytes wide.
        let mut power = Power::default();
        assert!(power.write(0xcfb, &[1]).is_none());
        assert!(power.write(0xcf8, &0x8000_0000_u32.to_le_bytes()).is_none());
    }

    #[test]
    fn other_ports_are_left_alone() {
        let mut data = [0xff; 4];
        Power::default().read(0x606, &mut data);
        assert_eq!(data, [0xff; 4]);
    }

    #[test]
    fn an_access_may_reach_beyond_the_last_port() {
        let (mut power, mut data) = (Power::default(), [0xff; 4]);
        for port in 0xfffc..=0xffff {
            assert!(power.write(port, &data).is_none());
            power.read(port, &mut data);
            assert_eq!(data, [0xff; 4]);
        }
    }
}
