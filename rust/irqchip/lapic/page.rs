// SPDX-License-Identifier: GPL-2.0

//! A local APIC's state as a register page: what KVM_GET_LAPIC and KVM_SET_LAPIC carry
//! (Documentation/virt/kvm/api.rst, 4.57 and 4.58).

use super::lvt::{self, Entry};
use super::registers::offset;
use super::timer::Mode;
use super::{spurious, ApicMode, Invalid, LocalApic};
use crate::irqchip::{high_half, Now};

/// The size of the page's part that holds registers, in bytes (KVM_APIC_REG_SIZE).
pub const REGISTERS_SIZE: usize = 0x400;

/// What the identifier register of an APIC in x2APIC mode holds in the page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageFormat {
    /// The identifier's low byte in the topmost byte, as in xAPIC mode. What is set is ignored.
    Legacy,
    /// All 32 bits (KVM_X2APIC_API_USE_32BIT_IDS). What is set must be the APIC's own.
    X2Apic,
}

impl LocalApic {
    /// The registers, little-endian, each at its offset.
    pub fn registers(&self, format: PageFormat, now: Now) -> [u8; REGISTERS_SIZE] {
        let mut page = [0; REGISTERS_SIZE];
        for (offset, slot) in (0u16..).step_by(16).zip(page.chunks_exact_mut(16)) {
            let value = match offset {
                offset::ID if self.mode() == ApicMode::X2Apic && format == PageFormat::Legacy => {
                    self.id.0 << 24
                }
                offset::ICR_HIGH => high_half(self.icr),
                // There is no DFR in x2APIC mode, but its value outlives the mode.
                offset::DFR => self.dfr,
                _ => self.register(offset, now).unwrap_or(0),
            };
            if let Some(bytes) = slot.first_chunk_mut() {
                *bytes = value.to_le_bytes();
            }
        }
        page
    }

    /// Sets all registers. Bits that a guest could not have set are dropped. The identity and the
    /// deadline may have changed after that. IA32_APIC_BASE, which decides how the page is
    /// understood, must have been set before, and IA32_TSC_DEADLINE be set afterwards.
    pub fn set_registers(
        &mut self,
        page: &[u8; REGISTERS_SIZE],
        format: PageFormat,
        now: Now,
    ) -> Result<(), Invalid> {
        let read = |offset: u16| {
            page.get(usize::from(offset)..)
                .and_then(|bytes| bytes.first_chunk())
                .map_or(0, |bytes| u32::from_le_bytes(*bytes))
        };
        if self.mode() == ApicMode::X2Apic {
            if format == PageFormat::X2Apic && read(offset::ID) != self.id.0 {
                return Err(Invalid);
            }
        } else {
            self.xapic_id = (read(offset::ID) >> 24) as u8;
            self.logical_id = (read(offset::LDR) >> 24) as u8;
        }
        self.dfr = read(offset::DFR) | 0x0fff_ffff;
        self.tpr = (read(offset::TPR) & 0xff) as u8;
        self.spurious =
            read(offset::SPURIOUS) & (spurious::WRITABLE | spurious::SUPPRESS_EOI_BROADCAST);
        self.esr = (read(offset::ESR) & 0xff) as u8;
        self.detected = 0;
        self.icr = (u64::from(read(offset::ICR_HIGH)) << 32) | u64::from(read(offset::ICR));
        for (index, step) in (0u8..8).zip((0u16..).step_by(16)) {
            self.isr.set_register(index, read(offset::ISR | step));
            self.tmr
                .set_register(index, read(offset::TMR.wrapping_add(step)));
            self.irr.set_register(index, read(offset::IRR | step));
        }
        for entry in Entry::ALL {
            let value = read(entry.offset()) & entry.writable(&self.features);
            self.lvt.set(entry, value);
        }
        if !self.features.cmci {
            self.lvt.set(Entry::CorrectedMachineCheck, lvt::MASKED);
        }
        self.timer.restore(
            Mode::from_bits(lvt::timer_mode_bits(self.lvt.get(Entry::Timer))),
            (read(offset::DIVIDE) & 0xff) as u8,
            read(offset::INITIAL_COUNT),
            read(offset::CURRENT_COUNT),
            now,
        );
        self.update_ppr();
        Ok(())
    }
}
