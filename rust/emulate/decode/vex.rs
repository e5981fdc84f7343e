// SPDX-License-Identifier: GPL-2.0

//! The VEX prefix (SDM vol. 2, 2.3): AVX's forms of what SSE's encodings have.

use super::{DecodeError, Decoder, Form, RepeatPrefix};

/// What VEX holds besides that which it has in common with REX and the mandatory prefixes.
#[derive(Clone, Copy)]
pub(super) struct Vex {
    /// VEX.vvvv, not inverted: a register's number, of which the topmost bit counts in 64-bit mode
    /// only; 0 where there is none.
    pub(super) register: u8,
    /// VEX.L: 256 bits.
    pub(super) is_wide: bool,
}

impl Decoder<'_> {
    /// What follows C5, or C4.
    pub(super) fn vex(&mut self, opcode: u8) -> Result<Form, DecodeError> {
        let second = self.cursor.byte()?;
        // Outside of 64-bit mode these are LDS and LES, but for what would be their register forms.
        if !self.is_64bit() && second & 0xc0 != 0xc0 {
            return Err(DecodeError::Unsupported);
        }
        let prefixes = &self.prefixes;
        if prefixes.lock
            || prefixes.operand_size
            || prefixes.repeat.is_some()
            || prefixes.rex.is_some()
        {
            return Err(DecodeError::InvalidOpcode);
        }
        // The short form has R where the long one has R, X, B and the map, and W is 0 in it.
        let (second, third) = match opcode {
            0xc5 => (second & 0x80 | 0x61, second & 0x7f),
            _ => (second, self.cursor.byte()?),
        };
        // R, X, B and vvvv are inverted. Outside of 64-bit mode the first three are not there.
        let rxb = match self.is_64bit() {
            true => (!second >> 5) & 7,
            false => 0,
        };
        self.prefixes.rex = Some(0x40 | ((third & 0x80) >> 4) | rxb);
        match third & 3 {
            0 => {}
            1 => self.prefixes.operand_size = true,
            2 => self.prefixes.repeat = Some(RepeatPrefix::Rep),
            _ => self.prefixes.repeat = Some(RepeatPrefix::Repne),
        }
        self.prefixes.vex = Some(Vex {
            register: (!third >> 3) & 0xf,
            is_wide: third & 4 != 0,
        });
        let map = second & 0x1f;
        match (map, self.cursor.byte()?) {
            (1, opcode) => self.vector(opcode),
            (2, 0x2a) => self.vector_nontemporal_load(),
            _ => Err(DecodeError::Unsupported),
        }
    }
}
