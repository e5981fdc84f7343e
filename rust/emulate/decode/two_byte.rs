// SPDX-License-Identifier: GPL-2.0

//! Opcodes that begin with 0F (SDM vol. 2, tables ).

use super::{DecodeError, Decoder, Form};
use crate::emulate::instruction::{BitOperation, Operand, Operation, Size};

impl Decoder<'_> {
    /// What follows 0F.
    pub(super) fn two_byte(&mut self) -> Result<Form, DecodeError> {
        let opcode = self.cursor.byte()?;
        match opcode {
            0x10..=0x13
            | 0x16
            | 0x17
            | 0x28
            | 0x29
            | 0x2b
            | 0x6e
            | 0x6f
            | 0x7e
            | 0x7f
            | 0xd6
            | 0xe7
            | 0xf0 => self.vector(opcode),
            0x38 => self.three_byte(),
            0xa3 | 0xab | 0xb3 | 0xbb => {
                let operation = BitOperation::from_low_bits(opcode >> 3);
                // The byte form's bit is not there: all four are odd.
                self.rm_reg(Operation::Bit(operation), opcode)
            }
            0xb0 | 0xb1 => self.rm_reg(Operation::CompareExchange, opcode),
            0xb6 | 0xb7 => self.mov_extend(Operation::MovZeroExtend, opcode),
            0xba => self.bit_immediate(),
            0xbe | 0xbf => self.mov_extend(Operation::MovSignExtend, opcode),
            0xc0 | 0xc1 => self.rm_reg(Operation::ExchangeAdd, opcode),
            0xc3 => self.movnti(),
            0xc7 => self.group_9(),
            _ => Err(DecodeError::Unsupported),
        }
    }

    /// What follows 0F 38.
    fn three_byte(&mut self) -> Result<Form, DecodeError> {
        let opcode = self.cursor.byte()?;
        if opcode == 0x2a {
            return self.vector_nontemporal_load();
        }
        if opcode == 0xf9 {
            return self.movdiri();
        }
        // With F2 these are CRC32.
        if !matches!(opcode, 0xf0 | 0xf1) || self.prefixes.repeat.is_some() {
            return Err(DecodeError::Unsupported);
        }
        let size = self.operand_size();
        let modrm = self.modrm()?;
        if modrm.is_register() {
            return Err(DecodeError::InvalidOpcode);
        }
        let (reg, rm) = (self.reg(&modrm, size), self.rm(&modrm, size));
        Ok(match opcode {
            0xf0 => Form::new(Operation::MovSwap, size, reg, rm),
            _ => Form::new(Operation::MovSwap, size, rm, reg),
        })
    }

    /// MOVZX and MOVSX: the opcode's lowest bit is the source's size.
    fn mov_extend(&mut self, operation: Operation, opcode: u8) -> Result<Form, DecodeError> {
        let size = self.operand_size();
        let source_size = match opcode & 1 {
            0 => Size::Byte,
            _ => Size::Word,
        };
        let modrm = self.modrm()?;
        Ok(Form::extending(
            operation,
            size,
            self.reg(&modrm, size),
            source_size,
            self.rm(&modrm, source_size),
        ))
    }

    /// 0F BA: group 8.
    fn bit_immediate(&mut self) -> Result<Form, DecodeError> {
        let size = self.operand_size();
        let modrm = self.modrm()?;
        let extension = modrm.extension();
        // The CPU finds #GP for the length before #UD.
        let offset = Operand::Immediate(self.cursor.signed(Size::Byte)?);
        if extension < 4 {
            return Err(DecodeError::InvalidOpcode);
        }
        let operation = Operation::Bit(BitOperation::from_low_bits(extension));
        let rm = self.rm(&modrm, size);
        Ok(Form::new(operation, size, rm, offset))
    }

    /// MOVNTI: to memory only, 32 or 64 bits whatever the mode.
    fn movnti(&mut self) -> Result<Form, DecodeError> {
        if self.prefixes.operand_size || self.prefixes.repeat.is_some() {
            return Err(DecodeError::InvalidOpcode);
        }
        self.direct_store()
    }

    /// MOVDIRI: likewise.
    fn movdiri(&mut self) -> Result<Form, DecodeError> {
        match self.prefixes.operand_size || self.prefixes.repeat.is_some() {
            true => Err(DecodeError::Unsupported),
            false => self.direct_store(),
        }
    }

    fn direct_store(&mut self) -> Result<Form, DecodeError> {
        let size = match self.prefixes.rex_w() {
            true => Size::Qword,
            false => Size::Dword,
        };
        let modrm = self.modrm()?;
        if modrm.is_register() {
            return Err(DecodeError::InvalidOpcode);
        }
        let (rm, reg) = (self.rm(&modrm, size), self.reg(&modrm, size));
        Ok(Form::new(Operation::Mov, size, rm, reg))
    }

    /// 0F C7: group 9, of which CMPXCHG8B and CMPXCHG16B are known.
    fn group_9(&mut self) -> Result<Form, DecodeError> {
        let size = match self.prefixes.rex_w() {
            true => Size::Oword,
            false => Size::Qword,
        };
        let modrm = self.modrm()?;
        match (modrm.extension(), modrm.is_register()) {
            (1, false) => {
                let rm = self.rm(&modrm, size);
                Ok(Form::new(
                    Operation::CompareExchangePair,
                    size,
                    rm,
                    Operand::None,
                ))
            }
            (1, true) => Err(DecodeError::InvalidOpcode),
            _ => Err(DecodeError::Unsupported),
        }
    }
}
