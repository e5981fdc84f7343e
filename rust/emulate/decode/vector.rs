// SPDX-License-Identifier: GPL-2.0

//! Moves from and to vector registers, in SSE's encodings (SDM vol. 2, tables ).

use super::{DecodeError, Decoder, Form, RepeatPrefix};
use crate::emulate::instruction::{Operand, Operation, Size, VectorMove};

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
        let general = match self.prefixes.rex_w() {
            true => Size::Qword,
            false => Size::Dword,
        };
        let (kind, size, other) = match (opcode, self.mandatory()) {
            (0x10 | 0x11, None | OperandSize) | (0x6f | 0x7f, Rep) => {
                (VectorMove::Whole, Size::Oword, Other::Vector)
            }
            (0x28 | 0x29, None | OperandSize) | (0x6f | 0x7f, OperandSize) => {
                (VectorMove::Aligned, Size::Oword, Other::Vector)
            }
            (0x2b, None | OperandSize) | (0xe7, OperandSize) => {
                (VectorMove::Aligned, Size::Oword, Other::Memory)
            }
            (0x10 | 0x11, Rep) => (VectorMove::Low, Size::Dword, Other::MemoryOrUnknown),
            (0x10 | 0x11, Repne) => (VectorMove::Low, Size::Qword, Other::MemoryOrUnknown),
            (0x6e | 0x7e, OperandSize) => (VectorMove::Low, general, Other::General),
            (0x7e, Rep) | (0xd6, OperandSize) => (VectorMove::Low, Size::Qword, Other::Vector),
            // MMX among others.
            _ => return Err(DecodeError::Unsupported),
        };
        let is_load = match opcode {
            0x10 | 0x28 | 0x6e | 0x6f => true,
            0x7e => matches!(self.mandatory(), Rep),
            _ => false,
        };
        self.vector_form(kind, size, other, is_load)
    }

    /// MOVNTDQA, the only load of its kind: 0F 38 2A.
    pub(super) fn vector_nontemporal_load(&mut self) -> Result<Form, DecodeError> {
        match self.mandatory() {
            Mandatory::OperandSize => {
                self.vector_form(VectorMove::Aligned, Size::Oword, Other::Memory, true)
            }
            _ => Err(DecodeError::Unsupported),
        }
    }

    fn vector_form(
        &mut self,
        kind: VectorMove,
        size: Size,
        other: Other,
        is_load: bool,
    ) -> Result<Form, DecodeError> {
        let modrm = self.modrm()?;
        let vector = Operand::Vector(modrm.reg);
        let rm = match (self.rm(&modrm, size), modrm.register(), other) {
            (memory, None, _) => memory,
            (register, Some(_), Other::General) => register,
            (_, Some(number), Other::Vector) => Operand::Vector(number),
            (_, Some(_), Other::Memory) => return Err(DecodeError::InvalidOpcode),
            (_, Some(_), Other::MemoryOrUnknown) => return Err(DecodeError::Unsupported),
        };
        let (destination, source) = if is_load { (vector, rm) } else { (rm, vector) };
        Ok(Form::new(
            Operation::Vector(kind),
            size,
            destination,
            source,
        ))
    }
}
