// SPDX-License-Identifier: GPL-2.0

//! A PC's two 8259A interrupt controllers, the second cascaded at line 2 of the first, with the
//! edge/level control registers of a PCI chipset.

mod chip;

pub use chip::PicState;

use super::{LineOutcome, LineSource};
use crate::x86::vector::Vector;
use chip::Chip;

/// The number of lines: 0 to 7 at the first controller, 8 to 15 at the second.
pub const LINES: usize = 16;

const CASCADE: u8 = 2;

/// One of the two controllers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PicChip {
    /// The first, whose output goes to the CPU.
    Master,
    /// The second, whose output goes to the first.
    Slave,
}

/// What has happened to lines since it was last asked: bit n is line n.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PicEvents {
    /// An interrupt in service has ended, by an EOI or by itself.
    pub ended: u16,
    /// A masked line has been unmasked.
    pub unmasked: u16,
}

/// The pair of controllers.
#[derive(Clone, Debug)]
pub struct DualPic {
    master: Chip,
    slave: Chip,
    /// The sources that hold each line high.
    lines: [u32; LINES],
    output: bool,
}

impl Default for DualPic {
    fn default() -> Self {
        Self::new()
    }
}

impl DualPic {
    /// The controllers after power-up.
    pub const fn new() -> Self {
        Self {
            master: Chip::new(true),
            slave: Chip::new(false),
            lines: [0; LINES],
            output: false,
        }
    }

    /// The INTR signal to the CPU: an interrupt waits to be acknowledged.
    #[inline]
    pub const fn output(&self) -> bool {
        self.output
    }

    /// Drives the line `line` from `source`. The line is high while any source holds it so.
    pub fn set_line(&mut self, line: u8, source: LineSource, level: bool) -> LineOutcome {
        let Some(drivers) = self.lines.get_mut(usize::from(line)) else {
            return LineOutcome::Ignored;
        };
        if level {
            *drivers |= source.bit();
        } else {
            *drivers &= !source.bit();
        }
        let level = *drivers != 0;
        let chip = if line < 8 {
            &mut self.master
        } else {
            &mut self.slave
        };
        let new_request = chip.set_line(line & 7, level);
        let masked = chip.is_masked(line & 7);
        self.update();
        match (masked, new_request) {
            (true, _) => LineOutcome::Ignored,
            (false, true) => LineOutcome::Taken,
            (false, false) => LineOutcome::Coalesced,
        }
    }

    /// Gives the CPU the vector of the interrupt that it acknowledges: the highest request's, or a
    /// spurious line 7's where the request is gone (8259A, "Interrupt sequence").
    pub fn acknowledge(&mut self) -> Vector {
        let vector = match self.master.pending() {
            Some(CASCADE) => {
                self.master.acknowledge(CASCADE);
                let line = self.slave.pending();
                if let Some(line) = line {
                    self.slave.acknowledge(line);
                }
                self.slave.vector(line.unwrap_or(7))
            }
            Some(line) => {
                self.master.acknowledge(line);
                self.master.vector(line)
            }
            None => self.master.vector(7),
        };
        self.update();
        vector
    }

    /// Carries the second controller's output to the first, and the first's to the CPU.
    fn update(&mut self) {
        if self.slave.pending().is_some() {
            self.master.request(CASCADE);
        }
        self.output = self.master.pending().is_some();
    }

    /// Reads one byte from `port`; `None` where it is not one of the controllers'. Only a poll changes
    /// anything.
    #[inline]
    pub fn read_port(&mut self, port: u16) -> Option<u8> {
        let chip = match port {
            0x20 | 0x21 => &self.master,
            0xa0 | 0xa1 => &self.slave,
            0x4d0 => return Some(self.master.elcr()),
            0x4d1 => return Some(self.slave.elcr()),
            _ => return None,
        };
        if chip.is_polled() {
            return Some(self.poll(port & 0x80 != 0));
        }
        Some(chip.register(port & 1 != 0))
    }

    fn poll(&mut self, slave: bool) -> u8 {
        let value = if slave {
            let value = self.slave.poll();
            // What the first controller was told of may have been taken.
            if self.slave.pending().is_none() {
                self.master.cancel(CASCADE);
            }
            value
        } else {
            self.master.poll()
        };
        self.update();
        value
    }

    /// Writes one byte to `port`. Gives whether it is one of the controllers'.
    pub fn write_port(&mut self, port: u16, value: u8) -> bool {
        match port {
            0x20 => self.master.write_command(value),
            0x21 => self.master.write_data(value),
            0xa0 => self.slave.write_command(value),
            0xa1 => self.slave.write_data(value),
            0x4d0 => self.master.set_elcr(value),
            0x4d1 => self.slave.set_elcr(value),
            _ => return false,
        }
        self.update();
        true
    }

    /// What has happened to lines since the last call.
    pub fn take_events(&mut self) -> PicEvents {
        let (master_ended, master_unmasked) = self.master.take_events();
        let (slave_ended, slave_unmasked) = self.slave.take_events();
        PicEvents {
            ended: u16::from_le_bytes([master_ended, slave_ended]),
            unmasked: u16::from_le_bytes([master_unmasked, slave_unmasked]),
        }
    }

    /// The state of one controller.
    pub fn state(&self, chip: PicChip) -> PicState {
        match chip {
            PicChip::Master => self.master.state(),
            PicChip::Slave => self.slave.state(),
        }
    }

    /// Sets the state of one controller. What drives the lines stays.
    pub fn set_state(&mut self, chip: PicChip, state: &PicState) {
        match chip {
            PicChip::Master => self.master.set_state(state),
            PicChip::Slave => self.slave.set_state(state),
        }
        self.update();
    }
}

#[cfg(test)]
mod tests;
