// SPDX-License-Identifier: GPL-2.0

//! Opcodes of one byte (SDM vol. 2, table A-2).

use super::{DecodeError, Decoder, Form, RepeatPrefix};
use crate::{
    emulate::instruction::{
        Arithmetic, Base, Gpr, Memory, Operand, Operation, Repeat, Size, StringOperation, Unary,
    },
    x86::segment::SegmentRegister,
};

const ACCUMULATOR: Operand = Operand::Register(Gpr::Rax);

impl Decoder<'_> {
    pub(super) fn one_byte(&mut self, opcode: u8) -> Result<Form, DecodeError> {
        match opcode {
            0x00..=0x3f if opcode & 7 < 6 => self.arithmetic(opcode),
            // In 64-bit mode these are REX prefixes and do not come here.
            0x40..=0x4f => {
                let (operation, size) = (inc_or_dec(opcode >> 3), self.operand_size());
                let register = self.register(opcode & 7, size);
                Ok(Form::new(operation, size, register, Operand::None))
            }
            0x50..=0x5f => self.push_pop_register(opcode),
            0x63 if self.is_64bit() => self.movsxd(),
            0x68 | 0x6a => self.push_immediate(opcode),
            0x80..=0x83 => self.arithmetic_immediate(opcode),
            0x84 | 0x85 => self.rm_reg(Operation::Test, opcode),
            0x86 | 0x87 => self.rm_reg(Operation::Exchange, opcode),
            0x88 | 0x89 => self.rm_reg(Operation::Mov, opcode),
            0x8a | 0x8b => self.reg_rm(Operation::Mov, opcode),
            0x8f => self.pop_rm(),
            0xa0..=0xa3 => self.mov_offset(opcode),
            0xa8 | 0xa9 => self.accumulator_immediate(Operation::Test, opcode),
            0x6c | 0x6d => self.string(StringOperation::Ins, opcode),
            0x6e | 0x6f => self.string(StringOperation::Outs, opcode),
            0xa4 | 0xa5 => self.string(StringOperation::Movs, opcode),
            0xa6 | 0xa7 => self.string(StringOperation::Cmps, opcode),
            0xaa | 0xab => self.string(StringOperation::Stos, opcode),
            0xac | 0xad => self.string(StringOperation::Lods, opcode),
            0xae | 0xaf => self.string(StringOperation::Scas, opcode),
            0xb0..=0xbf => self.mov_register_immediate(opcode),
            0xc6 | 0xc7 => self.mov_immediate(opcode),
            0xe8 => self.call_relative(),
            0xf6 | 0xf7 => self.group_3(opcode),
            0xfe | 0xff => self.group_4_and_5(opcode),
            _ => Err(DecodeError::Unsupported),
        }
    }

    /// ModRM's two operands, register and memory first.
    #[inline]
    fn rm_and_reg(&mut self, size: Size) -> Result<(Operand, Operand), DecodeError> {
        let modrm = self.modrm()?;
        Ok((self.rm(&modrm, size), self.reg(&modrm, size)))
    }

    /// `operation rm, reg`.
    pub(super) fn rm_reg(&mut self, operation: Operation, opcode: u8) -> Result<Form, DecodeError> {
        let size = self.size_by_bit(opcode);
        let (rm, reg) = self.rm_and_reg(size)?;
        Ok(Form::new(operation, size, rm, reg))
    }

    /// `operation reg, rm`.
    fn reg_rm(&mut self, operation: Operation, opcode: u8) -> Result<Form, DecodeError> {
        let size = self.size_by_bit(opcode);
        let (rm, reg) = self.rm_and_reg(size)?;
        Ok(Form::new(operation, size, reg, rm))
    }

    /// `operation rAX, immediate`.
    fn accumulator_immediate(
        &mut self,
        operation: Operation,
        opcode: u8,
    ) -> Result<Form, DecodeError> {
        let size = self.size_by_bit(opcode);
        let immediate = self.immediate(size)?;
        Ok(Form::new(operation, size, ACCUMULATOR, immediate))
    }

    /// 00 to 3F: the operation is in bits 5:3, the operands' form in bits 2:0.
    fn arithmetic(&mut self, opcode: u8) -> Result<Form, DecodeError> {
        let operation = Operation::Arithmetic(Arithmetic::from_low_bits(opcode >> 3));
        match opcode & 7 {
            0 | 1 => self.rm_reg(operation, opcode),
            2 | 3 => self.reg_rm(operation, opcode),
            4 | 5 => self.accumulator_immediate(operation, opcode),
            _ => Err(DecodeError::Unsupported),
        }
    }

    /// 80 to 83: the operation is in ModRM.reg.
    fn arithmetic_immediate(&mut self, opcode: u8) -> Result<Form, DecodeError> {
        // 82 is 80 again, except in 64-bit mode.
        if opcode == 0x82 && self.is_64bit() {
            return Err(DecodeError::InvalidOpcode);
        }
        let size = self.size_by_bit(opcode);
        let modrm = self.modrm()?;
        let immediate = self.immediate(if opcode == 0x83 { Size::Byte } else { size })?;
        let operation = Operation::Arithmetic(Arithmetic::from_low_bits(modrm.extension()));
        let rm = self.rm(&modrm, size);
        Ok(Form::new(operation, size, rm, immediate))
    }

    fn movsxd(&mut self) -> Result<Form, DecodeError> {
        let size = self.operand_size();
        let source_size = match size {
            Size::Qword => Size::Dword,
            narrower => narrower,
        };
        let modrm = self.modrm()?;
        Ok(Form::extending(
            Operation::MovSignExtend,
            size,
            self.reg(&modrm, size),
            source_size,
            self.rm(&modrm, source_size),
        ))
    }

    /// A0 to A3: the address is an immediate as wide as addresses are.
    fn mov_offset(&mut self, opcode: u8) -> Result<Form, DecodeError> {
        let size = self.size_by_bit(opcode);
        let displacement = self.cursor.unsigned(self.address_size())?;
        let memory = Operand::Memory(Memory {
            segment: self.prefixes.segment.unwrap_or(SegmentRegister::Ds),
            base: None,
            index: None,
            displacement,
        });
        let (destination, source) = match opcode & 2 {
            0 => (ACCUMULATOR, memory),
            _ => (memory, ACCUMULATOR),
        };
        Ok(Form::new(Operation::Mov, size, destination, source))
    }

    /// B0 to BF: the only immediate that can have 64 bits.
    fn mov_register_immediate(&mut self, opcode: u8) -> Result<Form, DecodeError> {
        let size = match opcode & 8 {
            0 => Size::Byte,
            _ => self.operand_size(),
        };
        let register = self.register((opcode & 7) | self.prefixes.rex_b(), size);
        let immediate = Operand::Immediate(self.cursor.signed(size)?);
        Ok(Form::new(Operation::Mov, size, register, immediate))
    }

    /// C6 and C7: group 11.
    fn mov_immediate(&mut self, opcode: u8) -> Result<Form, DecodeError> {
        let size = self.size_by_bit(opcode);
        let modrm = self.modrm()?;
        // The CPU finds #GP for the length before #UD.
        let immediate = self.immediate(size)?;
        match modrm.extension() {
            0 => {
                let rm = self.rm(&modrm, size);
                Ok(Form::new(Operation::Mov, size, rm, immediate))
            }
            // With rm = 0 these are XABORT and XBEGIN.
            7 if modrm.is_register() => Err(DecodeError::Unsupported),
            _ => Err(DecodeError::InvalidOpcode),
        }
    }

    /// F6 and F7.
    fn group_3(&mut self, opcode: u8) -> Result<Form, DecodeError> {
        let size = self.size_by_bit(opcode);
        let modrm = self.modrm()?;
        let (operation, source) = match modrm.extension() {
            // 1 is 0 again: SDM vol. 2, table A-6 leaves it out, all CPUs have it.
            0 | 1 => (Operation::Test, self.immediate(size)?),
            2 => (Operation::Unary(Unary::Not), Operand::None),
            3 => (Operation::Unary(Unary::Neg), Operand::None),
            _ => return Err(DecodeError::Unsupported),
        };
        let rm = self.rm(&modrm, size);
        Ok(Form::new(operation, size, rm, source))
    }

    /// FE and FF.
    fn group_4_and_5(&mut self, opcode: u8) -> Result<Form, DecodeError> {
        let size = self.size_by_bit(opcode);
        let modrm = self.modrm()?;
        match (modrm.extension(), opcode) {
            (extension @ (0 | 1), _) => {
                let rm = self.rm(&modrm, size);
                Ok(Form::new(inc_or_dec(extension), size, rm, Operand::None))
            }
            (_, 0xfe) | (7, _) => Err(DecodeError::InvalidOpcode),
            (2, _) => {
                let size = self.near_branch_size();
                let rm = self.rm(&modrm, size);
                Ok(Form::new(Operation::Call, size, Operand::None, rm))
            }
            (6, _) => {
                let size = self.stack_size();
                let rm = self.rm(&modrm, size);
                Ok(Form::new(Operation::Push, size, Operand::None, rm))
            }
            _ => Err(DecodeError::Unsupported),
        }
    }

    /// 50 to 5F: PUSH, then POP.
    fn push_pop_register(&mut self, opcode: u8) -> Result<Form, DecodeError> {
        let size = self.stack_size();
        let register = self.register((opcode & 7) | self.prefixes.rex_b(), size);
        Ok(match opcode & 8 {
            0 => Form::new(Operation::Push, size, Operand::None, register),
            _ => Form::new(Operation::Pop, size, register, Operand::None),
        })
    }

    /// 68 and 6A, which has a byte.
    fn push_immediate(&mut self, opcode: u8) -> Result<Form, DecodeError> {
        let size = self.stack_size();
        let immediate = self.immediate(if opcode == 0x6a { Size::Byte } else { size })?;
        Ok(Form::new(Operation::Push, size, Operand::None, immediate))
    }

    fn call_relative(&mut self) -> Result<Form, DecodeError> {
        let size = self.near_branch_size();
        let distance = self.immediate(size)?;
        Ok(Form::new(Operation::Call, size, Operand::None, distance))
    }

    /// 8F: group 1A. Its other forms are AMD's XOP.
    fn pop_rm(&mut self) -> Result<Form, DecodeError> {
        let size = self.stack_size();
        let modrm = self.modrm()?;
        match modrm.extension() {
            0 => {
                let rm = self.rm(&modrm, size);
                Ok(Form::new(Operation::Pop, size, rm, Operand::None))
            }
            _ => Err(DecodeError::Unsupported),
        }
    }

    fn string(&mut self, operation: StringOperation, opcode: u8) -> Result<Form, DecodeError> {
        let source = self.prefixes.segment.unwrap_or(SegmentRegister::Ds);
        let source = string_memory(source, Gpr::Rsi);
        // No prefix overrides ES.
        let destination = string_memory(SegmentRegister::Es, Gpr::Rdi);
        let (destination, source) = match operation {
            StringOperation::Movs => (destination, source),
            StringOperation::Stos => (destination, ACCUMULATOR),
            StringOperation::Lods => (ACCUMULATOR, source),
            StringOperation::Cmps => (source, destination),
            StringOperation::Scas => (ACCUMULATOR, destination),
            StringOperation::Ins => (destination, Operand::Port),
            StringOperation::Outs => (Operand::Port, source),
        };
        let size = match (operation, self.size_by_bit(opcode)) {
            // Ports have no more: REX.W does not count.
            (StringOperation::Ins | StringOperation::Outs, Size::Qword) => Size::Dword,
            (_, size) => size,
        };
        let repeat = self.repeat(operation)?;
        let operation = Operation::String(operation);
        Ok(Form {
            repeat,
            ..Form::new(operation, size, destination, source)
        })
    }

    fn repeat(&self, operation: StringOperation) -> Result<Repeat, DecodeError> {
        let compares = matches!(operation, StringOperation::Cmps | StringOperation::Scas);
        match self.prefixes.repeat {
            None => Ok(Repeat::Once),
            Some(RepeatPrefix::Rep) if compares => Ok(Repeat::WhileEqual),
            Some(RepeatPrefix::Rep) => Ok(Repeat::Count),
            Some(RepeatPrefix::Repne) if compares => Ok(Repeat::WhileUnequal),
            // SDM vol. 2, REP: reserved with the others.
            Some(RepeatPrefix::Repne) => Err(DecodeError::Unsupported),
        }
    }
}

/// INC or DEC by the lowest bit.
fn inc_or_dec(number: u8) -> Operation {
    Operation::Unary(match number & 1 {
        0 => Unary::Inc,
        _ => Unary::Dec,
    })
}

fn string_memory(segment: SegmentRegister, register: Gpr) -> Operand {
    Operand::Memory(Memory {
        segment,
        base: Some(Base::Register(register)),
        index: None,
        displacement: 0,
    })
}
