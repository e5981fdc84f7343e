// SPDX-License-Identifier: GPL-2.0

//! Memory-type range registers (SDM vol. 3, 13.11): kept for the guest, without an effect, since
//! EPT alone decides the memory type.

use super::guest::GuestCpu;
use crate::x86::msr::{is_valid_fixed_mtrr, is_valid_mtrr_type, MsrIndex};

/// The number of variable ranges.
const VARIABLE: u64 = 8;
/// The number of MSRs of the variable ranges: a base and a mask each.
const VARIABLE_MSRS: usize = 16;
/// IA32_MTRRCAP: the ranges, the fixed ones (bit 8), and write combining (bit 10).
pub(crate) const CAPABILITIES: u64 = VARIABLE | (1 << 8) | (1 << 10);

/// The state of the MTRRs; zero after reset.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Mtrrs {
    variable: [u64; VARIABLE_MSRS],
    fixed: [u64; 11],
    default_type: u64,
}

/// What an MTRR is.
#[derive(Clone, Copy)]
enum Place {
    /// A variable range, by its offset from the first base.
    Variable(usize),
    /// A fixed range.
    Fixed(usize),
    /// The default type.
    Default,
}

/// The place of an MSR, if it is an MTRR.
fn place(index: MsrIndex) -> Option<Place> {
    let offset_from = |first: MsrIndex| index.0.wrapping_sub(first.0) as usize;
    match index.0 {
        0x200..=0x20f => Some(Place::Variable(offset_from(MsrIndex::MTRR_PHYS_BASE0))),
        0x250 => Some(Place::Fixed(0)),
        0x258..=0x259 => {
            let offset = offset_from(MsrIndex::MTRR_FIX_16K_80000);
            Some(Place::Fixed(offset.wrapping_add(1)))
        }
        0x268..=0x26f => {
            let offset = offset_from(MsrIndex::MTRR_FIX_4K_C0000);
            Some(Place::Fixed(offset.wrapping_add(3)))
        }
        0x2ff => Some(Place::Default),
        _ => None,
    }
}

/// Whether a value may be written.
fn is_valid(place: Place, value: u64, cpu: &GuestCpu) -> bool {
    match place {
        Place::Default => value & !0xcff == 0 && is_valid_mtrr_type(value & 0xff),
        Place::Fixed(_) => is_valid_fixed_mtrr(value),
        Place::Variable(at) if at & 1 == 0 => {
            let reserved = cpu.reserved_physical() | 0xf00;
            value & reserved == 0 && is_valid_mtrr_type(value & 0xff)
        }
        Place::Variable(_) => value & (cpu.reserved_physical() | 0x7ff) == 0,
    }
}

impl Mtrrs {
    /// Reads an MTRR; `None` for what is none.
    pub(crate) fn read(&self, index: MsrIndex) -> Option<u64> {
        match place(index)? {
            Place::Variable(at) => self.variable.get(at).copied(),
            Place::Fixed(at) => self.fixed.get(at).copied(),
            Place::Default => Some(self.default_type),
        }
    }

    /// Writes an MTRR; `None` for what is none, and for a value that can't be.
    pub(crate) fn write(&mut self, index: MsrIndex, value: u64, cpu: &GuestCpu) -> Option<()> {
        let place = place(index)?;
        if !is_valid(place, value, cpu) {
            return None;
        }
        let register = match place {
            Place::Variable(at) => self.variable.get_mut(at)?,
            Place::Fixed(at) => self.fixed.get_mut(at)?,
            Place::Default => &mut self.default_type,
        };
        *register = value;
        Some(())
    }
}
