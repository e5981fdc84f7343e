// SPDX-License-Identifier: GPL-2.0

//! One 8259A.

use crate::x86::vector::Vector;

/// The state that KVM_GET_IRQCHIP and KVM_SET_IRQCHIP carry, field by field `struct
/// kvm_pic_state`. In the bitmaps bit n is line n; the others are 0 or 1 unless they say more.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PicState {
    /// The lines' levels, for the detection of edges.
    pub last_irr: u8,
    /// The interrupt request register.
    pub irr: u8,
    /// The interrupt mask register.
    pub imr: u8,
    /// The in-service register.
    pub isr: u8,
    /// The line of highest priority, 0 to 7.
    pub priority_add: u8,
    /// The vector of line 0, a multiple of 8.
    pub irq_base: u8,
    /// A read gives the ISR, not the IRR.
    pub read_reg_select: u8,
    /// The next read polls.
    pub poll: u8,
    /// Special mask mode.
    pub special_mask: u8,
    /// The next initialisation word: 0 none, 1 to 3 ICW2 to ICW4.
    pub init_state: u8,
    /// Interrupts end when they are acknowledged.
    pub auto_eoi: u8,
    /// Priorities rotate at that.
    pub rotate_on_auto_eoi: u8,
    /// Special fully nested mode.
    pub special_fully_nested_mode: u8,
    /// ICW4 is expected.
    pub init4: u8,
    /// The level-triggered lines.
    pub elcr: u8,
    /// The lines that may be level-triggered.
    pub elcr_mask: u8,
}

/// What a write to the data port is taken as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Expect {
    Mask,
    Icw2,
    Icw3,
    Icw4,
}

#[derive(Clone, Debug)]
pub(super) struct Chip {
    /// The levels as last driven.
    levels: u8,
    irr: u8,
    imr: u8,
    isr: u8,
    /// The line of highest priority.
    top: u8,
    base: u8,
    read_isr: bool,
    poll: bool,
    special_mask: bool,
    expect: Expect,
    auto_eoi: bool,
    rotate_on_auto_eoi: bool,
    special_fully_nested: bool,
    icw4_needed: bool,
    elcr: u8,
    /// The lines that may be level-triggered.
    elcr_mask: u8,
    /// Whether the line 2 is the cascade.
    is_master: bool,
    ended: u8,
    unmasked: u8,
}

impl Chip {
    pub(super) const fn new(is_master: bool) -> Self {
        Self {
            levels: 0,
            irr: 0,
            imr: 0,
            isr: 0,
            top: 0,
            base: 0,
            read_isr: false,
            poll: false,
            special_mask: false,
            expect: Expect::Mask,
            auto_eoi: false,
            rotate_on_auto_eoi: false,
            special_fully_nested: false,
            icw4_needed: false,
            elcr: 0,
            // Lines 0, 1, 2, 8 and 13 are wired to what is edge-triggered.
            elcr_mask: if is_master { 0xf8 } else { 0xde },
            is_master,
            ended: 0,
            unmasked: 0,
        }
    }

    /// Drives a line, 0 to 7. Gives whether that is new: neither a level nor an edge that a waiting
    /// request already stands for.
    pub(super) fn set_line(&mut self, line: u8, level: bool) -> bool {
        let bit = bit_of(line);
        let waiting = self.irr & bit != 0;
        let was_high = self.levels & bit != 0;
        if !level {
            self.levels &= !bit;
            if self.elcr & bit != 0 {
                self.irr &= !bit;
            }
            return true;
        }
        self.levels |= bit;
        let requests = self.elcr & bit != 0 || !was_high;
        if requests {
            self.irr |= bit;
        }
        !(requests && waiting)
    }

    /// Requests a line, whatever its level.
    pub(super) fn request(&mut self, line: u8) {
        self.irr |= bit_of(line);
    }

    /// Forgets the request of a line.
    pub(super) fn cancel(&mut self, line: u8) {
        self.irr &= !bit_of(line);
    }

    pub(super) const fn is_masked(&self, line: u8) -> bool {
        self.imr & bit_of(line) != 0
    }

    pub(super) const fn vector(&self, line: u8) -> Vector {
        Vector(self.base | (line & 7))
    }

    /// How far the highest of `lines` lies behind the line of highest priority; 8 where there is none.
    const fn distance(&self, lines: u8) -> u8 {
        (lines.rotate_right(self.top as u32).trailing_zeros() & 0xf) as u8
    }

    /// The line at `distance` behind the line of highest priority.
    const fn line_at(&self, distance: u8) -> u8 {
        distance.wrapping_add(self.top) & 7
    }

    /// The line to be acknowledged next, if its priority is above those in service.
    pub(super) fn pending(&self) -> Option<u8> {
        let request = self.distance(self.irr & !self.imr);
        let mut in_service = self.isr;
        // Requests of the second controller's higher lines are to nest.
        if self.special_fully_nested && self.is_master {
            in_service &= !bit_of(super::CASCADE);
        }
        // The special mask lets through what lies below a masked line in service.
        if self.special_mask {
            in_service &= !self.imr;
        }
        (request < self.distance(in_service)).then(|| self.line_at(request))
    }

    pub(super) fn acknowledge(&mut self, line: u8) {
        let bit = bit_of(line);
        if self.elcr & bit == 0 {
            self.irr &= !bit;
        }
        self.isr |= bit;
        if self.auto_eoi {
            self.end(line);
            if self.rotate_on_auto_eoi {
                self.top = line.wrapping_add(1) & 7;
            }
        }
    }

    fn end(&mut self, line: u8) {
        self.isr &= !bit_of(line);
        self.ended |= bit_of(line);
    }

    /// What a read gives that is no poll.
    #[inline]
    pub(super) const fn register(&self, data: bool) -> u8 {
        match (data, self.read_isr) {
            (true, _) => self.imr,
            (false, true) => self.isr,
            (false, false) => self.irr,
        }
    }

    /// Whether the next read polls.
    #[inline]
    pub(super) const fn is_polled(&self) -> bool {
        self.poll
    }

    /// A poll acknowledges the interrupt and gives its line with bit 7 set. Without one the line is 7,
    /// as of a spurious interrupt.
    pub(super) fn poll(&mut self) -> u8 {
        self.poll = false;
        match self.pending() {
            Some(line) => {
                self.acknowledge(line);
                0x80 | line
            }
            None => 7,
        }
    }

    pub(super) fn write_command(&mut self, value: u8) {
        if value & 0x10 != 0 {
            self.initialise(value);
        } else if value & 0x08 != 0 {
            self.write_ocw3(value);
        } else {
            self.write_ocw2(value);
        }
    }

    /// ICW1. Requests by edge are forgotten; what is in service stays so (8259A, "Initialization
    /// command words").
    fn initialise(&mut self, value: u8) {
        // Whoever waits for the end of a request that is forgotten would wait for ever.
        self.ended |= self.irr & !self.elcr;
        self.icw4_needed = value & 1 != 0;
        self.levels = 0;
        self.irr &= self.elcr;
        self.imr = 0;
        self.top = 0;
        self.special_mask = false;
        self.read_isr = false;
        if !self.icw4_needed {
            self.special_fully_nested = false;
            self.auto_eoi = false;
        }
        self.expect = Expect::Icw2;
    }

    fn write_ocw2(&mut self, value: u8) {
        let line = value & 7;
        match value >> 5 {
            // Rotation in automatic EOI mode: clear, set.
            0 => self.rotate_on_auto_eoi = false,
            4 => self.rotate_on_auto_eoi = true,
            // Non-specific EOI, without rotation and with.
            command @ (1 | 5) => {
                let distance = self.distance(self.ending());
                if distance < 8 {
                    let line = self.line_at(distance);
                    self.end(line);
                    if command == 5 {
                        self.top = line.wrapping_add(1) & 7;
                    }
                }
            }
            // Specific EOI.
            3 => self.end(line),
            // Set priority.
            6 => self.top = line.wrapping_add(1) & 7,
            // Specific EOI with rotation.
            7 => {
                self.end(line);
                self.top = line.wrapping_add(1) & 7;
            }
            // 2: no operation.
            _ => {}
        }
    }

    /// The lines that a non-specific EOI may end: in special mask mode not the masked ones.
    const fn ending(&self) -> u8 {
        if self.special_mask {
            self.isr & !self.imr
        } else {
            self.isr
        }
    }

    fn write_ocw3(&mut self, value: u8) {
        if value & 0x04 != 0 {
            self.poll = true;
        }
        if value & 0x02 != 0 {
            self.read_isr = value & 1 != 0;
        }
        if value & 0x40 != 0 {
            self.special_mask = value & 0x20 != 0;
        }
    }

    pub(super) fn write_data(&mut self, value: u8) {
        self.expect = match self.expect {
            Expect::Mask => {
                self.unmasked |= self.imr & !value;
                self.imr = value;
                Expect::Mask
            }
            Expect::Icw2 => {
                self.base = value & 0xf8;
                Expect::Icw3
            }
            // How the two are wired is fixed.
            Expect::Icw3 if self.icw4_needed => Expect::Icw4,
            Expect::Icw3 => Expect::Mask,
            Expect::Icw4 => {
                self.special_fully_nested = value & 0x10 != 0;
                self.auto_eoi = value & 0x02 != 0;
                Expect::Mask
            }
        };
    }

    pub(super) const fn elcr(&self) -> u8 {
        self.elcr
    }

    /// Sets the edge/level control register. The request of a line that becomes level-triggered is its
    /// level; the edge that one has requested by stays with it.
    pub(super) fn set_elcr(&mut self, value: u8) {
        let before = self.elcr;
        self.elcr = value & self.elcr_mask;
        let became_level = self.elcr & !before;
        self.irr = (self.irr & !became_level) | (self.levels & became_level);
    }

    /// The lines that ended and those that were unmasked since the last call.
    pub(super) fn take_events(&mut self) -> (u8, u8) {
        let events = (self.ended, self.unmasked);
        self.ended = 0;
        self.unmasked = 0;
        events
    }

    pub(super) fn state(&self) -> PicState {
        PicState {
            last_irr: self.levels,
            irr: self.irr,
            imr: self.imr,
            isr: self.isr,
            priority_add: self.top,
            irq_base: self.base,
            read_reg_select: u8::from(self.read_isr),
            poll: u8::from(self.poll),
            special_mask: u8::from(self.special_mask),
            init_state: match self.expect {
                Expect::Mask => 0,
                Expect::Icw2 => 1,
                Expect::Icw3 => 2,
                Expect::Icw4 => 3,
            },
            auto_eoi: u8::from(self.auto_eoi),
            rotate_on_auto_eoi: u8::from(self.rotate_on_auto_eoi),
            special_fully_nested_mode: u8::from(self.special_fully_nested),
            init4: u8::from(self.icw4_needed),
            elcr: self.elcr,
            elcr_mask: self.elcr_mask,
        }
    }

    pub(super) fn set_state(&mut self, state: &PicState) {
        *self = Self {
            levels: state.last_irr,
            irr: state.irr,
            imr: state.imr,
            isr: state.isr,
            top: state.priority_add & 7,
            base: state.irq_base & 0xf8,
            read_isr: state.read_reg_select != 0,
            poll: state.poll != 0,
            special_mask: state.special_mask != 0,
            expect: match state.init_state {
                1 => Expect::Icw2,
                2 => Expect::Icw3,
                3 => Expect::Icw4,
                _ => Expect::Mask,
            },
            auto_eoi: state.auto_eoi != 0,
            rotate_on_auto_eoi: state.rotate_on_auto_eoi != 0,
            special_fully_nested: state.special_fully_nested_mode != 0,
            icw4_needed: state.init4 != 0,
            elcr: state.elcr & self.elcr_mask,
            elcr_mask: self.elcr_mask,
            is_master: self.is_master,
            ended: self.ended,
            unmasked: self.unmasked,
        };
    }
}

const fn bit_of(line: u8) -> u8 {
    1u8.wrapping_shl(line as u32)
}
