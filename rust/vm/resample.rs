// SPDX-License-Identifier: GPL-2.0

//! Resamplers of irqfds: what the end of an interrupt means for a line that an irqfd holds high.

use super::{
    irqchip::{Chips, IrqChip, Messages},
    irqfd::Resampler,
    machine::Vm,
};
use kernel::prelude::*;
use rvisor_core::{
    irqchip::{ioapic, pic, LineSource},
    x86::vector::Gsi,
};

/// The most resamplers of one machine that differ in GSI or eventfd.
pub(super) const MAX_RESAMPLERS: usize = 256;
/// All resamplers of one machine, none twice.
pub(super) type ResamplerTable = KBox<KVVec<Resampler>>;
/// The most GSIs whose interrupt can end at once: one for each pin and line.
const MAX_ENDED: usize = ioapic::PINS + pic::LINES;

/// The pins and lines that a GSI with a resampler goes to; bit n is the one with that number.
#[derive(Clone, Copy, Default)]
pub(super) struct Resampled {
    pins: u32,
    lines: u16,
}

/// GSIs whose resamplers are to be told.
pub(super) struct Ended {
    list: [Gsi; MAX_ENDED],
    count: usize,
}

impl Ended {
    pub(super) fn none() -> Self {
        Self {
            list: [Gsi(0); MAX_ENDED],
            count: 0,
        }
    }

    fn gsis(&self) -> &[Gsi] {
        self.list.get(..self.count).unwrap_or_default()
    }

    fn push(&mut self, gsi: Gsi) {
        if self.gsis().contains(&gsi) {
            return;
        }
        if let Some(place) = self.list.get_mut(self.count) {
            *place = gsi;
            self.count += 1;
        }
    }
}

impl Chips {
    /// Whether any line has a resampler.
    #[inline]
    pub(super) fn has_resamplers(&self) -> bool {
        self.resampled.pins != 0 || self.resampled.lines != 0
    }

    /// The lines of the 8259s that have a resampler, bit n for line n.
    #[inline]
    pub(super) fn resampled_lines(&self) -> u16 {
        self.resampled.lines
    }

    /// Finds the pins and lines of these resamplers.
    pub(super) fn find_resampled(&mut self, resamplers: &[Resampler]) {
        let has = |gsi: Option<Gsi>| {
            gsi.is_some_and(|gsi| resamplers.iter().any(|resampler| resampler.gsi == gsi))
        };
        let mut found = Resampled::default();
        for pin in 0..ioapic::PINS as u8 {
            if has(self.index.gsi_of_ioapic_pin(pin)) {
                found.pins |= 1 << pin;
            }
        }
        for line in 0..pic::LINES as u8 {
            if has(self.index.gsi_of_pic_line(line)) {
                found.lines |= 1 << line;
            }
        }
        // What happened before is not theirs.
        self.pic.take_events();
        self.ioapic.set_resampled(found.pins);
        self.resampled = found;
    }

    /// Lowers what resamplers hold high of the IOAPIC's pins in `pins`, whose interrupts end.
    pub(super) fn lower_pins(&mut self, pins: u32, ended: &mut Ended, messages: &mut Messages) {
        let pins = pins & self.resampled.pins;
        for pin in (0..ioapic::PINS as u8).filter(|pin| pins & (1 << pin) != 0) {
            if let Some(gsi) = self.index.gsi_of_ioapic_pin(pin) {
                self.drive(gsi, LineSource::RESAMPLER, false, messages);
                ended.push(gsi);
            }
        }
    }

    /// The same for the 8259s' lines in `lines`.
    fn lower_lines(&mut self, lines: u16, ended: &mut Ended, messages: &mut Messages) {
        let lines = lines & self.resampled.lines;
        for line in (0..pic::LINES as u8).filter(|line| lines & (1 << line) != 0) {
            if let Some(gsi) = self.index.gsi_of_pic_line(line) {
                self.drive(gsi, LineSource::RESAMPLER, false, messages);
                ended.push(gsi);
            }
        }
    }

    /// The GSI of a pin that was unmasked and whose level only its resamplers know.
    pub(super) fn ask_pin(&self, pin: u8, ended: &mut Ended) {
        if let Some(gsi) = self.index.gsi_of_ioapic_pin(pin) {
            ended.push(gsi);
        }
    }
}

impl IrqChip {
    /// Sets the resamplers. Gives the table that was there before, which nobody reads any more.
    pub(super) fn set_resamplers(&self, table: Option<ResamplerTable>) -> Option<ResamplerTable> {
        let old = self.resamplers.swap(table);
        self.refresh_resampled(&mut self.chips.lock());
        old
    }

    /// Finds the pins of the resamplers anew, where there are any or were.
    pub(super) fn refresh_resampled(&self, chips: &mut Chips) {
        if self
            .resamplers
            .read(|table| chips.find_resampled(table))
            .is_none()
        {
            chips.find_resampled(&[]);
        }
    }

    /// The interrupts of the 8259s' lines in `lines` have ended.
    pub(super) fn end_lines(&self, vm: &Vm, lines: u16) {
        let mut ended = Ended::none();
        // A line that falls sends no message.
        let mut none = Messages::new();
        {
            let mut chips = self.chips.lock();
            chips.lower_lines(lines, &mut ended, &mut none);
            self.publish(vm, &chips);
        }
        self.tell_resamplers(&ended);
    }

    /// Signals the resamplers of these GSIs. The controllers' lock is not held.
    pub(super) fn tell_resamplers(&self, ended: &Ended) {
        if ended.count == 0 {
            return;
        }
        self.resamplers.read(|table| {
            for resampler in table {
                if ended.gsis().contains(&resampler.gsi) {
                    resampler.eventfd.signal();
                }
            }
        });
    }
}
