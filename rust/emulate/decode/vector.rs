// SPDX-License-Identifier: GPL-2.0

//! Moves from and to vector registers (SDM vol. 2, tables ), with and without VEX.

use super::{DecodeError, Decoder, Form, ModRm, RepeatPrefix};
use crate::emulate::instruction::{Encoding, Operand, Operation, Size, VectorMove};

/// A prefix that selects among instructions of the same opcode (SDM vol. 2, 2.1.2).
#[derive(Clone, Copy)]
enum Mandatory {
    None,
    OperandSize,
    Repne,
    Rep,
}

/// Which operands a form has besides the vector register in ModRM.reg.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Other {
    /// A vector register or memory.
    Vector,
    /// Memory, else #UD.
    Memory,
    /// Memory; with a register there is an instruction that is not known here.
    MemoryOrUnknown,
    /// A general-purpose register or memory.
    General,
}

/// What an opcode with its prefixes means.
#[derive(Clone, Copy)]
struct Meaning {
    kind: Kind,
    other: Other,
    is_load: bool,
}

/// How much is moved.
#[derive(Clone, Copy)]
enum Kind {
    /// The whole register, 16 or, by VEX.L, 32 bytes.
    Whole(VectorMove),
    /// So much of the lower half. VEX.L does not matter for `Scalar`, and must be clear else.
    Low(Size),
    Scalar(Size),
    /// Bits 63:0 or 127:64 of the lower half.
    LowHalf,
    HighHalf,
}

impl Decoder<'_> {
    /// F2 and F3 go before 66.
    fn mandatory(&self) -> Mandatory {
        match (self.prefixes.repeat, self.prefixes.operand_size) {
            (Some(RepeatPrefix::Repne), _) => Mandatory::Repne,
            (Some(RepeatPrefix::Rep), _) => Mandatory::Rep,
            (None, true) => Mandatory::OperandSize,
            (None, false) => Mandatory::None,
        }
    }

    /// What follows 0F, for the opcodes that have a vector move among their forms.
    pub(super) fn vector(&mut self, opcode: u8) -> Result<Form, DecodeError> {
        use Mandatory::{None, OperandSize, Rep, Repne};
        use VectorMove::{Aligned, Whole};
        let general = match self.prefixes.rex_w() && self.is_64bit() {
            true => Size::Qword,
            false => Size::Dword,
        };
        let mandatory = self.mandatory();
        let (kind, other) = match (opcode, mandatory) {
            (0x10 | 0x11, None | OperandSize) | (0x6f | 0x7f, Rep) => {
                (Kind::Whole(Whole), Other::Vector)
            }
            (0x28 | 0x29, None | OperandSize) | (0x6f | 0x7f, OperandSize) => {
                (Kind::Whole(Aligned), Other::Vector)
            }
            (0x2b, None | OperandSize) | (0xe7, OperandSize) => {
                (Kind::Whole(Aligned), Other::Memory)
            }
            (0xf0, Repne) => (Kind::Whole(Whole), Other::Memory),
            (0x10 | 0x11, Rep) => (Kind::Scalar(Size::Dword), Other::MemoryOrUnknown),
            (0x10 | 0x11, Repne) => (Kind::Scalar(Size::Qword), Other::MemoryOrUnknown),
            (0x12 | 0x13, None | OperandSize) => (Kind::LowHalf, Other::MemoryOrUnknown),
            (0x16 | 0x17, None | OperandSize) => (Kind::HighHalf, Other::MemoryOrUnknown),
            (0x6e | 0x7e, OperandSize) => (Kind::Low(general), Other::General),
            (0x7e, Rep) | (0xd6, OperandSize) => (Kind::Low(Size::Qword), Other::Vector),
            // MMX among others.
            _ => return Err(DecodeError::Unsupported),
        };
        let is_load = match opcode {
            0x10 | 0x12 | 0x16 | 0x28 | 0x6e | 0x6f | 0xf0 => true,
            0x7e => matches!(mandatory, Rep),
            _ => false,
        };
        self.vector_form(Meaning {
            kind,
            other,
            is_load,
        })
    }

    /// MOVNTDQA, the only load of its kind: 0F 38 2A.
    pub(super) fn vector_nontemporal_load(&mut self) -> Result<Form, DecodeError> {
        match self.mandatory() {
            Mandatory::OperandSize => self.vector_form(Meaning {
                kind: Kind::Whole(VectorMove::Aligned),
                other: Other::Memory,
                is_load: true,
            }),
            _ => Err(DecodeError::Unsupported),
        }
    }

    fn vector_form(&mut self, meaning: Meaning) -> Result<Form, DecodeError> {
        let modrm = self.modrm()?;
        let Meaning { other, is_load, .. } = meaning;
        // Some of them are #UD; not all are told apart.
        if modrm.is_register() && other == Other::MemoryOrUnknown {
            return Err(DecodeError::Unsupported);
        }
        let (kind, size) = self.vector_move(meaning, &modrm)?;
        let vector = Operand::Vector(modrm.reg);
        let rm = match (self.rm(&modrm, size), modrm.register(), other) {
            (memory, None, _) => memory,
            (register, Some(_), Other::General) => register,
            (_, Some(number), Other::Vector) => Operand::Vector(number),
            (_, Some(_), Other::Memory | Other::MemoryOrUnknown) => {
                return Err(DecodeError::InvalidOpcode)
            }
        };
        let (destination, source) = if is_load { (vector, rm) } else { (rm, vector) };
        let encoding = match self.prefixes.vex {
            Some(_) => Encoding::Vex,
            None => Encoding::Legacy,
        };
        Ok(Form::new(
            Operation::Vector(kind, encoding),
            size,
            destination,
            source,
        ))
    }

    /// The move and its size, with what VEX.vvvv and VEX.L may be for it: else #UD.
    fn vector_move(
        &self,
        meaning: Meaning,
        modrm: &ModRm,
    ) -> Result<(VectorMove, Size), DecodeError> {
        let is_wide = self.prefixes.vex.is_some_and(|vex| vex.is_wide);
        let takes_wide = matches!(meaning.kind, Kind::Whole(_) | Kind::Scalar(_));
        let is_half_load =
            meaning.is_load && matches!(meaning.kind, Kind::LowHalf | Kind::HighHalf);
        // The register that the other half comes from. Where there is none, vvvv is to be 1111.
        let other = match self.prefixes.vex {
            Some(vex) => vex.register,
            None if is_half_load => modrm.reg,
            None => 0,
        };
        if (is_wide && !takes_wide) || (other != 0 && !is_half_load) {
            return Err(DecodeError::InvalidOpcode);
        }
        let other = match self.is_64bit() {
            true => other,
            false => other & 7,
        };
        Ok(match meaning.kind {
            Kind::Whole(kind) if is_wide => (kind, Size::Yword),
            Kind::Whole(kind) => (kind, Size::Oword),
            Kind::Low(size) | Kind::Scalar(size) => (VectorMove::Low, size),
            Kind::LowHalf if is_half_load => (VectorMove::LoadLow { other }, Size::Qword),
            Kind::HighHalf if is_half_load => (VectorMove::LoadHigh { other }, Size::Qword),
            Kind::LowHalf => (VectorMove::Low, Size::Qword),
            Kind::HighHalf => (VectorMove::StoreHigh, Size::Qword),
        })
    }
}
