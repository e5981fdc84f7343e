// SPDX-License-Identifier: GPL-2.0

//! A local APIC's registers, by memory access and as MSRs (SDM vol. 3, tables 12-1 and 12-6).

use super::lvt::{self, Entry};
use super::timer::Mode;
use super::{
    error, spurious, ApicMode, Features, Invalid, LapicEffect, LocalApic, FIRST_LEGAL_VECTOR,
};
use crate::irqchip::destination::{x2apic_logical_id, InterruptMessage, Shorthand};
use crate::irqchip::{high_half, low_half, Clock, Now};
use crate::x86::msr::MsrIndex;
use crate::x86::vector::Vector;

/// The registers' offsets in the page. Their MSRs are 0x800 and the offset's sixteenth.
pub(super) mod offset {
    pub(in super::super) const ID: u16 = 0x20;
    pub(in super::super) const VERSION: u16 = 0x30;
    pub(in super::super) const TPR: u16 = 0x80;
    pub(in super::super) const APR: u16 = 0x90;
    pub(in super::super) const PPR: u16 = 0xa0;
    pub(in super::super) const EOI: u16 = 0xb0;
    pub(in super::super) const REMOTE_READ: u16 = 0xc0;
    pub(in super::super) const LDR: u16 = 0xd0;
    pub(in super::super) const DFR: u16 = 0xe0;
    pub(in super::super) const SPURIOUS: u16 = 0xf0;
    pub(in super::super) const ISR: u16 = 0x100;
    pub(in super::super) const ISR_LAST: u16 = 0x170;
    pub(in super::super) const TMR: u16 = 0x180;
    pub(in super::super) const TMR_LAST: u16 = 0x1f0;
    pub(in super::super) const IRR: u16 = 0x200;
    pub(in super::super) const IRR_LAST: u16 = 0x270;
    pub(in super::super) const ESR: u16 = 0x280;
    pub(in super::super) const ICR: u16 = 0x300;
    pub(in super::super) const ICR_HIGH: u16 = 0x310;
    pub(in super::super) const INITIAL_COUNT: u16 = 0x380;
    pub(in super::super) const CURRENT_COUNT: u16 = 0x390;
    pub(in super::super) const DIVIDE: u16 = 0x3e0;
    pub(in super::super) const SELF_IPI: u16 = 0x3f0;
}

/// An integrated APIC's version number. KVM gives the same.
const VERSION: u32 = 0x14;
/// The version register's bit that says that the broadcast of EOIs can be suppressed.
const VERSION_SUPPRESSES_EOI: u32 = 1 << 24;
/// The ICR's delivery status. Nothing here is ever on its way.
const ICR_BUSY: u64 = 1 << 12;
/// The ICR's bits that an x2APIC does not take: 31:20, 17:16 and 13.
const ICR_RESERVED: u64 = 0xfff3_2000;

/// What came of a write in xAPIC or x2APIC mode.
enum Written {
    Done(LapicEffect),
    /// The register is read-only.
    ReadOnly,
    /// There is no such register.
    Reserved,
}

impl LocalApic {
    /// Reads the register page in xAPIC mode. `offset` counts in bytes from the page's start; of a
    /// register's 16 bytes the first four hold it, and where `offset` points into them its upper
    /// bytes come first, so an access of 1 or 2 bytes takes the low ones of the result. All ones in
    /// the other modes, where there is no register page.
    pub fn read(&mut self, offset: u16, clock: impl Clock) -> u32 {
        if self.mode() != ApicMode::XApic {
            return 0xffff_ffff;
        }
        let register = offset & !0xf;
        let Some(value) = self.register(register, clock) else {
            if !matches!(register, offset::EOI | offset::REMOTE_READ) {
                self.detect(error::ILLEGAL_REGISTER);
            }
            return 0;
        };
        match offset & 0xf {
            byte @ 0..=3 => value.wrapping_shr(u32::from(byte) << 3),
            _ => 0,
        }
    }

    /// Writes the register page in xAPIC mode, four bytes at `offset`. Ignored in the other modes
    /// and where `offset` is not a multiple of 16; what is not four bytes long is the caller's to
    /// ignore (SDM vol. 3, 12.4.1).
    pub fn write(&mut self, offset: u16, value: u32, clock: impl Clock) -> LapicEffect {
        if self.mode() != ApicMode::XApic || offset & 0xf != 0 {
            return LapicEffect::None;
        }
        match self.write_register(offset, value, clock) {
            Written::Done(effect) => effect,
            Written::ReadOnly => LapicEffect::None,
            Written::Reserved => {
                self.detect(error::ILLEGAL_REGISTER);
                LapicEffect::None
            }
        }
    }

    /// Reads a register as an MSR, 0x800 to 0x8ff. Invalid outside x2APIC mode, for a reserved MSR
    /// and for one that can only be written.
    #[inline]
    pub fn read_msr(&mut self, index: MsrIndex, clock: impl Clock) -> Result<u64, Invalid> {
        let register = self.msr_offset(index)?;
        if register == offset::ICR {
            return Ok(self.icr);
        }
        self.register(register, clock).map(u64::from).ok_or(Invalid)
    }

    /// Writes a register as an MSR. Invalid outside x2APIC mode, for an MSR that is reserved or can
    /// only be read, and where a reserved bit is set (SDM vol. 3, 12.12.1.3).
    #[inline]
    pub fn write_msr(
        &mut self,
        index: MsrIndex,
        value: u64,
        clock: impl Clock,
    ) -> Result<LapicEffect, Invalid> {
        let register = self.msr_offset(index)?;
        // What a guest writes at each interrupt.
        if register == offset::EOI && value == 0 {
            return Ok(self.eoi().map_or(LapicEffect::None, LapicEffect::Eoi));
        }
        if register == offset::ICR {
            if value & ICR_RESERVED != 0 {
                return Err(Invalid);
            }
            self.icr = value & !ICR_BUSY;
            return Ok(self.send(InterruptMessage::from_icr(self.icr, true)));
        }
        let low = u32::try_from(value).map_err(|_| Invalid)?;
        if low & x2apic_reserved(register, &self.features) != 0 {
            return Err(Invalid);
        }
        match self.write_register(register, low, clock) {
            Written::Done(effect) => Ok(effect),
            Written::ReadOnly | Written::Reserved => Err(Invalid),
        }
    }

    /// The offset of an x2APIC register; whether there is one is another question.
    #[inline]
    fn msr_offset(&self, index: MsrIndex) -> Result<u16, Invalid> {
        if self.mode() != ApicMode::X2Apic || !index.is_x2apic() {
            return Err(Invalid);
        }
        Ok(((index.0 & 0xff) as u16) << 4)
    }

    /// The register at `register`, a multiple of 16, as it reads in the present mode.
    pub(super) fn register(&self, register: u16, clock: impl Clock) -> Option<u32> {
        let x2apic = self.mode() == ApicMode::X2Apic;
        let index = ((register >> 4) & 7) as u8;
        let value = match register {
            offset::ID if x2apic => self.id.0,
            offset::ID => u32::from(self.xapic_id) << 24,
            offset::VERSION => self.version(),
            offset::TPR => u32::from(self.tpr),
            offset::APR if !x2apic => 0,
            offset::PPR => u32::from(self.ppr),
            offset::LDR if x2apic => x2apic_logical_id(self.id),
            offset::LDR => u32::from(self.logical_id) << 24,
            offset::DFR if !x2apic => self.dfr,
            offset::SPURIOUS => self.spurious,
            offset::ISR..=offset::ISR_LAST => self.isr.register(index),
            offset::TMR..=offset::TMR_LAST => self.tmr.register(index),
            offset::IRR..=offset::IRR_LAST => self.irr.register(index),
            offset::ESR => u32::from(self.esr),
            offset::ICR => low_half(self.icr),
            offset::ICR_HIGH if !x2apic => high_half(self.icr),
            offset::INITIAL_COUNT => self.timer.initial(),
            offset::CURRENT_COUNT => self.timer.current(clock.now()),
            offset::DIVIDE => u32::from(self.timer.divide()),
            _ => self.lvt.get(Entry::at(register, &self.features)?),
        };
        Some(value)
    }

    /// The version register: the version, the LVT's highest entry and what can be suppressed.
    pub(super) fn version(&self) -> u32 {
        let highest_entry = if self.features.cmci { 6 } else { 5 };
        let mut version = VERSION | (highest_entry << 16);
        if self.features.suppress_eoi_broadcast {
            version |= VERSION_SUPPRESSES_EOI;
        }
        version
    }

    fn write_register(&mut self, register: u16, value: u32, clock: impl Clock) -> Written {
        let x2apic = self.mode() == ApicMode::X2Apic;
        let effect = match register {
            offset::TPR => {
                self.set_tpr((value & 0xff) as u8);
                LapicEffect::PriorityChanged
            }
            offset::EOI => self.eoi().map_or(LapicEffect::None, LapicEffect::Eoi),
            offset::SPURIOUS => self.write_spurious(value),
            offset::ESR => {
                // The write is what makes the errors since the last one readable.
                self.esr = self.detected;
                self.detected = 0;
                LapicEffect::None
            }
            offset::SELF_IPI if x2apic => self.send(InterruptMessage {
                shorthand: Shorthand::Itself,
                ..InterruptMessage::from_icr(u64::from(value), true)
            }),
            offset::INITIAL_COUNT => timer_effect(self.timer.set_initial(value, clock.now())),
            offset::DIVIDE => {
                timer_effect(self.timer.set_divide((value & 0xff) as u8, clock.now()))
            }
            offset::ID if !x2apic => {
                self.xapic_id = (value >> 24) as u8;
                LapicEffect::IdentityChanged
            }
            offset::LDR if !x2apic => {
                self.logical_id = (value >> 24) as u8;
                LapicEffect::IdentityChanged
            }
            offset::DFR if !x2apic => {
                self.dfr = value | 0x0fff_ffff;
                LapicEffect::IdentityChanged
            }
            offset::ICR if !x2apic => {
                self.icr = (self.icr & !0xffff_ffff) | (u64::from(value) & !ICR_BUSY);
                self.send(InterruptMessage::from_icr(self.icr, false))
            }
            offset::ICR_HIGH if !x2apic => {
                self.icr = (self.icr & 0xffff_ffff) | (u64::from(value & 0xff00_0000) << 32);
                LapicEffect::None
            }
            _ => {
                let Some(entry) = Entry::at(register, &self.features) else {
                    return self.refuse(register);
                };
                self.write_entry(entry, value)
            }
        };
        Written::Done(effect)
    }

    fn refuse(&self, register: u16) -> Written {
        // Whether a register exists does not hang on the moment it is read at.
        if self.register(register, Now::default()).is_some() || register == offset::REMOTE_READ {
            Written::ReadOnly
        } else {
            Written::Reserved
        }
    }

    fn write_spurious(&mut self, value: u32) -> LapicEffect {
        let mut writable = spurious::WRITABLE;
        if self.features.suppress_eoi_broadcast {
            writable |= spurious::SUPPRESS_EOI_BROADCAST;
        }
        let was_enabled = self.is_software_enabled();
        self.spurious = value & writable;
        if !self.is_software_enabled() {
            // LINT0 too, where it was open.
            self.lvt.mask_all();
            return LapicEffect::IdentityChanged;
        }
        if was_enabled {
            LapicEffect::None
        } else {
            LapicEffect::IdentityChanged
        }
    }

    fn write_entry(&mut self, entry: Entry, value: u32) -> LapicEffect {
        let mut value = value & entry.writable(&self.features);
        // Entries cannot be unmasked while software has the APIC disabled (SDM vol. 3, 12.4.7.2).
        if !self.is_software_enabled() {
            value |= lvt::MASKED;
        }
        self.lvt.set(entry, value);
        match entry {
            Entry::Timer => {
                let mode = Mode::from_bits(lvt::timer_mode_bits(value));
                timer_effect(self.timer.set_mode(mode))
            }
            // What the 8259 and the interval timer are to this processor.
            Entry::Lint0 => LapicEffect::IdentityChanged,
            _ => LapicEffect::None,
        }
    }

    /// Sends an IPI. One to this APIC itself does not leave it.
    fn send(&mut self, message: InterruptMessage) -> LapicEffect {
        if message.delivery_mode.is_vectored() {
            if message.vector < Vector(FIRST_LEGAL_VECTOR) {
                self.detect(error::SEND_ILLEGAL_VECTOR);
                return LapicEffect::None;
            }
            if message.shorthand == Shorthand::Itself {
                if message.has_effect() {
                    self.set_irr(message.vector, message.trigger);
                }
                return LapicEffect::None;
            }
        }
        if message.has_effect() {
            LapicEffect::SendIpi(message)
        } else {
            LapicEffect::None
        }
    }
}

fn timer_effect(changed: bool) -> LapicEffect {
    if changed {
        LapicEffect::TimerChanged
    } else {
        LapicEffect::None
    }
}

/// The bits of a writable register that must be 0 in x2APIC mode.
fn x2apic_reserved(register: u16, features: &Features) -> u32 {
    match register {
        offset::TPR | offset::SELF_IPI => !0xff,
        offset::EOI | offset::ESR => !0,
        offset::SPURIOUS if features.suppress_eoi_broadcast => {
            !(spurious::WRITABLE | spurious::SUPPRESS_EOI_BROADCAST)
        }
        offset::SPURIOUS => !spurious::WRITABLE,
        offset::DIVIDE => !0xb,
        _ => Entry::at(register, features).map_or(0, |entry| entry.reserved(features)),
    }
}
