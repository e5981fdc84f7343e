// SPDX-License-Identifier: GPL-2.0

//! ModRM, SIB and displacement (SDM vol. 2, 2.1.3 to 2.1.5 and 2.2.1).

use super::{DecodeError, Decoder};
use crate::{
    emulate::instruction::{Base, Gpr, Index, Memory, Size},
    x86::segment::SegmentRegister,
};

/// ModRM.rm, resolved.
pub(super) enum Rm {
    /// A register's number, 0 to 15.
    Register(u8),
    /// Memory.
    Memory(Memory),
}

/// A ModRM byte with all that belongs to it.
pub(super) struct ModRm {
    /// ModRM.reg as a register's number, 0 to 15.
    pub(super) reg: u8,
    /// ModRM.rm.
    pub(super) rm: Rm,
}

impl ModRm {
    /// ModRM.reg as an extension of the opcode, 0 to 7: REX.R does not take part.
    pub(super) fn extension(&self) -> u8 {
        self.reg & 7
    }

    /// The register's number, if ModRM.rm is one.
    pub(super) fn register(&self) -> Option<u8> {
        match self.rm {
            Rm::Register(number) => Some(number),
            Rm::Memory(_) => None,
        }
    }

    pub(super) fn is_register(&self) -> bool {
        self.register().is_some()
    }
}

/// An address before the segment is known.
struct Parts {
    base: Option<Base>,
    index: Option<Index>,
    /// The displacement's encoded size.
    displacement: Option<Size>,
}

impl Decoder<'_> {
    /// Reads ModRM and, by it, SIB and displacement.
    pub(super) fn modrm(&mut self) -> Result<ModRm, DecodeError> {
        let byte = self.cursor.byte()?;
        let (mode, rm) = (byte >> 6, byte & 7);
        let reg = ((byte >> 3) & 7) | self.prefixes.rex_r();
        if mode == 3 {
            let rm = Rm::Register(rm | self.prefixes.rex_b());
            return Ok(ModRm { reg, rm });
        }
        let parts = match self.address_size() {
            Size::Word => parts_16bit(mode, rm),
            _ => self.parts_wide(mode, rm)?,
        };
        let displacement = match parts.displacement {
            Some(size) => self.cursor.signed(size)?,
            None => 0,
        };
        let memory = Memory {
            segment: self.segment_for(parts.base),
            base: parts.base,
            index: parts.index,
            displacement,
        };
        Ok(ModRm {
            reg,
            rm: Rm::Memory(memory),
        })
    }

    /// The segment of an address with this base: SS for the stack's registers, else DS.
    fn segment_for(&self, base: Option<Base>) -> SegmentRegister {
        let default = match base {
            Some(Base::Register(Gpr::Rsp | Gpr::Rbp)) => SegmentRegister::Ss,
            _ => SegmentRegister::Ds,
        };
        self.prefixes.segment.unwrap_or(default)
    }

    /// 32-bit and 64-bit addressing.
    fn parts_wide(&mut self, mode: u8, rm: u8) -> Result<Parts, DecodeError> {
        let displacement = match mode {
            1 => Some(Size::Byte),
            2 => Some(Size::Dword),
            _ => None,
        };
        match (mode, rm) {
            (_, 4) => self.parts_sib(mode, displacement),
            // No base: in 64-bit mode this place is taken by RIP-relative addressing.
            (0, 5) => Ok(Parts {
                base: self.is_64bit().then_some(Base::NextInstruction),
                index: None,
                displacement: Some(Size::Dword),
            }),
            _ => Ok(Parts {
                base: Some(register(rm | self.prefixes.rex_b())),
                index: None,
                displacement,
            }),
        }
    }

    /// With a SIB byte.
    fn parts_sib(&mut self, mode: u8, displacement: Option<Size>) -> Result<Parts, DecodeError> {
        let sib = self.cursor.byte()?;
        let index = ((sib >> 3) & 7) | self.prefixes.rex_x();
        // Number 4 means none; R12, which differs by REX.X, can be an index.
        let index = (index != 4).then_some(Index {
            register: Gpr::from_low_bits(index),
            shift: sib >> 6,
        });
        let base = sib & 7;
        // "No base" is by the three bits alone: it takes R13's place too.
        if (mode, base) == (0, 5) {
            return Ok(Parts {
                base: None,
                index,
                displacement: Some(Size::Dword),
            });
        }
        Ok(Parts {
            base: Some(register(base | self.prefixes.rex_b())),
            index,
            displacement,
        })
    }
}

fn register(number: u8) -> Base {
    Base::Register(Gpr::from_low_bits(number))
}

/// 16-bit addressing (SDM vol. 2, table 2-1).
fn parts_16bit(mode: u8, rm: u8) -> Parts {
    let displacement = match mode {
        1 => Some(Size::Byte),
        2 => Some(Size::Word),
        _ => None,
    };
    let (base, index) = match rm {
        0 => (Gpr::Rbx, Some(Gpr::Rsi)),
        1 => (Gpr::Rbx, Some(Gpr::Rdi)),
        2 => (Gpr::Rbp, Some(Gpr::Rsi)),
        3 => (Gpr::Rbp, Some(Gpr::Rdi)),
        4 => (Gpr::Rsi, None),
        5 => (Gpr::Rdi, None),
        6 if mode == 0 => {
            return Parts {
                base: None,
                index: None,
                displacement: Some(Size::Word),
            }
        }
        6 => (Gpr::Rbp, None),
        _ => (Gpr::Rbx, None),
    };
    Parts {
        base: Some(Base::Register(base)),
        index: index.map(|register| Index { register, shift: 0 }),
        displacement,
    }
}
