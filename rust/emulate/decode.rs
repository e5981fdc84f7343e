// SPDX-License-Identifier: GPL-2.0

//! From bytes to an [`Instruction`] (SDM vol. 2, chapter 2 and appendix A).

mod modrm;
mod one_byte;
mod two_byte;
mod vector;
mod vex;

#[cfg(test)]
mod tests;

use self::{
    modrm::{ModRm, Rm},
    vex::Vex,
};
use super::{
    instruction::{CodeSize, Gpr, Instruction, Operand, Operation, Repeat, Size},
    machine::Protection,
};
use crate::x86::{
    segment::SegmentRegister,
    vector::{Exception, ExceptionVector},
};

/// The most bytes that an instruction may have (SDM vol. 2, 2.3.11).
pub const MAX_LENGTH: usize = 15;

/// Why bytes were not decoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DecodeError {
    /// The bytes end inside the instruction, which has at least `needed` of them. If no more can be
    /// fetched, then the reason for that (a page fault, the segment's limit) is the guest's fault.
    Truncated {
        /// The bytes that are needed to go on: more than were given, and at most [`MAX_LENGTH`].
        needed: usize,
    },
    /// The instruction is longer than [`MAX_LENGTH`]: #GP(0).
    TooLong,
    /// The architecture defines that these bytes raise #UD.
    InvalidOpcode,
    /// Nothing that this emulator knows. Whether it is valid was not found out.
    Unsupported,
}

impl DecodeError {
    /// The exception that the CPU raises for such bytes, if that is what they mean.
    #[inline]
    pub const fn exception(self, protection: Protection) -> Option<Exception> {
        match self {
            Self::TooLong => Some(match protection {
                Protection::Real => Exception::plain(ExceptionVector::GeneralProtection),
                Protection::Virtual8086 | Protection::Protected => Exception::GENERAL_PROTECTION,
            }),
            Self::InvalidOpcode => Some(Exception::INVALID_OPCODE),
            Self::Truncated { .. } | Self::Unsupported => None,
        }
    }
}

/// Decodes the instruction that `bytes` begin with; what follows it is not looked at.
///
/// # Errors
///
/// See [`DecodeError`]. With [`MAX_LENGTH`] or more bytes it is never `Truncated`.
pub fn decode(bytes: &[u8], code: CodeSize) -> Result<Instruction, DecodeError> {
    let mut cursor = Cursor::new(bytes);
    let (prefixes, opcode) = Prefixes::read(&mut cursor, code)?;
    let mut decoder = Decoder {
        cursor,
        prefixes,
        code,
    };
    let form = match opcode {
        0x0f => decoder.two_byte()?,
        0xc4 | 0xc5 => decoder.vex(opcode)?,
        _ => decoder.one_byte(opcode)?,
    };
    decoder.finish(form)
}

/// The bytes not yet consumed.
struct Cursor<'a> {
    /// At most [`MAX_LENGTH`].
    bytes: &'a [u8],
    position: usize,
}

impl<'a> Cursor<'a> {
    /// At the start of `bytes`.
    fn new(bytes: &'a [u8]) -> Self {
        Self {
            bytes: bytes.get(..MAX_LENGTH).unwrap_or(bytes),
            position: 0,
        }
    }

    #[inline]
    fn take<const N: usize>(&mut self) -> Result<[u8; N], DecodeError> {
        let rest = self.bytes.get(self.position..).unwrap_or_default();
        match rest.first_chunk() {
            Some(taken) => {
                self.position = self.position.saturating_add(N);
                Ok(*taken)
            }
            None => Err(self.end(N)),
        }
    }

    /// Why so many more bytes can't be had.
    #[cold]
    fn end(&self, more: usize) -> DecodeError {
        match self.position.saturating_add(more) {
            needed if needed > MAX_LENGTH => DecodeError::TooLong,
            needed => DecodeError::Truncated { needed },
        }
    }

    #[inline]
    fn byte(&mut self) -> Result<u8, DecodeError> {
        let [byte] = self.take()?;
        Ok(byte)
    }

    /// A little-endian number of `size`, zero-extended.
    fn unsigned(&mut self, size: Size) -> Result<u64, DecodeError> {
        Ok(match size {
            Size::Byte => u64::from(self.byte()?),
            Size::Word => u64::from(u16::from_le_bytes(self.take()?)),
            Size::Dword => u64::from(u32::from_le_bytes(self.take()?)),
            Size::Qword => u64::from_le_bytes(self.take()?),
            // No number is that wide.
            Size::Oword | Size::Yword => return Err(DecodeError::Unsupported),
        })
    }

    /// A little-endian number of `size`, sign-extended.
    fn signed(&mut self, size: Size) -> Result<u64, DecodeError> {
        Ok(size.sign_extend(self.unsigned(size)?))
    }
}

/// F2 or F3, whichever came last.
#[derive(Clone, Copy, PartialEq, Eq)]
enum RepeatPrefix {
    /// F2.
    Repne,
    /// F3.
    Rep,
}

/// What stood before the opcode (SDM vol. 2, 2.1.1 and 2.2.1).
#[derive(Clone, Copy, Default)]
struct Prefixes {
    operand_size: bool,
    address_size: bool,
    segment: Option<SegmentRegister>,
    repeat: Option<RepeatPrefix>,
    lock: bool,
    /// The REX prefix, which counts only right before the opcode; with VEX, what stands for it there.
    rex: Option<u8>,
    vex: Option<Vex>,
}

impl Prefixes {
    /// Reads all prefixes and the opcode's first byte.
    fn read(cursor: &mut Cursor<'_>, code: CodeSize) -> Result<(Self, u8), DecodeError> {
        let mut prefixes = Self::default();
        // It ends because the cursor refuses a sixteenth byte.
        loop {
            let byte = cursor.byte()?;
            if code == CodeSize::Bits64 && byte & 0xf0 == 0x40 {
                prefixes.rex = Some(byte);
                continue;
            }
            match byte {
                0x26 => prefixes.set_segment(SegmentRegister::Es, code),
                0x2e => prefixes.set_segment(SegmentRegister::Cs, code),
                0x36 => prefixes.set_segment(SegmentRegister::Ss, code),
                0x3e => prefixes.set_segment(SegmentRegister::Ds, code),
                0x64 => prefixes.set_segment(SegmentRegister::Fs, code),
                0x65 => prefixes.set_segment(SegmentRegister::Gs, code),
                0x66 => prefixes.operand_size = true,
                0x67 => prefixes.address_size = true,
                0xf0 => prefixes.lock = true,
                0xf2 => prefixes.repeat = Some(RepeatPrefix::Repne),
                0xf3 => prefixes.repeat = Some(RepeatPrefix::Rep),
                opcode => return Ok((prefixes, opcode)),
            }
            prefixes.rex = None;
        }
    }

    /// In 64-bit mode the overrides of ES, CS, SS and DS are as if they were not there.
    fn set_segment(&mut self, segment: SegmentRegister, code: CodeSize) {
        let counts = matches!(segment, SegmentRegister::Fs | SegmentRegister::Gs);
        if code != CodeSize::Bits64 || counts {
            self.segment = Some(segment);
        }
    }

    /// The REX bits W, R, X, B as a number, 0 without the prefix.
    fn rex_bits(&self) -> u8 {
        self.rex.unwrap_or(0) & 0xf
    }

    fn rex_w(&self) -> bool {
        self.rex_bits() & 8 != 0
    }

    /// Bit 3 of ModRM.reg.
    fn rex_r(&self) -> u8 {
        (self.rex_bits() & 4) << 1
    }

    /// Bit 3 of SIB.index.
    fn rex_x(&self) -> u8 {
        (self.rex_bits() & 2) << 2
    }

    /// Bit 3 of ModRM.rm, SIB.base or a register in the opcode.
    fn rex_b(&self) -> u8 {
        (self.rex_bits() & 1) << 3
    }
}

/// What an opcode's decoding gives.
struct Form {
    operation: Operation,
    size: Size,
    source_size: Size,
    destination: Operand,
    source: Operand,
    repeat: Repeat,
}

impl Form {
    /// A form with both operands of one size.
    fn new(operation: Operation, size: Size, destination: Operand, source: Operand) -> Self {
        Self {
            operation,
            size,
            source_size: size,
            destination,
            source,
            repeat: Repeat::Once,
        }
    }

    /// A form whose source is narrower than its destination.
    fn extending(
        operation: Operation,
        size: Size,
        destination: Operand,
        source_size: Size,
        source: Operand,
    ) -> Self {
        Self {
            source_size,
            ..Self::new(operation, size, destination, source)
        }
    }
}

/// The state of a decoding after the prefixes.
struct Decoder<'a> {
    cursor: Cursor<'a>,
    prefixes: Prefixes,
    code: CodeSize,
}

impl Decoder<'_> {
    fn is_64bit(&self) -> bool {
        self.code == CodeSize::Bits64
    }

    /// The effective operand size of an instruction that is not a byte one (SDM vol. 1, 3.6).
    fn operand_size(&self) -> Size {
        match (self.code, self.prefixes.operand_size) {
            (CodeSize::Bits64, _) if self.prefixes.rex_w() => Size::Qword,
            (CodeSize::Bits16, false) | (CodeSize::Bits32 | CodeSize::Bits64, true) => Size::Word,
            (CodeSize::Bits16, true) | (CodeSize::Bits32 | CodeSize::Bits64, false) => Size::Dword,
        }
    }

    /// The operand size of PUSH and POP: in 64-bit mode 32 bits can't be had (SDM vol. 2, PUSH).
    fn stack_size(&self) -> Size {
        match (self.code, self.operand_size()) {
            (CodeSize::Bits64, Size::Dword) => Size::Qword,
            (_, size) => size,
        }
    }

    /// The operand size of near branches, which no prefix changes in 64-bit mode (SDM vol. 2, CALL).
    fn near_branch_size(&self) -> Size {
        match self.code {
            CodeSize::Bits64 => Size::Qword,
            CodeSize::Bits16 | CodeSize::Bits32 => self.operand_size(),
        }
    }

    /// The operand size by the opcode's lowest bit: clear for bytes.
    fn size_by_bit(&self, opcode: u8) -> Size {
        match opcode & 1 {
            0 => Size::Byte,
            _ => self.operand_size(),
        }
    }

    /// The effective address size.
    fn address_size(&self) -> Size {
        match (self.code, self.prefixes.address_size) {
            (CodeSize::Bits64, false) => Size::Qword,
            (CodeSize::Bits64, true) | (CodeSize::Bits32, false) | (CodeSize::Bits16, true) => {
                Size::Dword
            }
            (CodeSize::Bits32, true) | (CodeSize::Bits16, false) => Size::Word,
        }
    }

    /// The general-purpose register with `number`. Without REX the byte registers 4 to 7 are AH,
    /// CH, DH and BH.
    fn register(&self, number: u8, size: Size) -> Operand {
        if size == Size::Byte && self.prefixes.rex.is_none() && matches!(number, 4..=7) {
            return Operand::HighByte(Gpr::from_low_bits(number & 3));
        }
        Operand::Register(Gpr::from_low_bits(number))
    }

    /// ModRM.reg as a register.
    fn reg(&self, modrm: &ModRm, size: Size) -> Operand {
        self.register(modrm.reg, size)
    }

    /// ModRM.rm as a register or memory.
    fn rm(&self, modrm: &ModRm, size: Size) -> Operand {
        match modrm.rm {
            Rm::Register(number) => self.register(number, size),
            Rm::Memory(memory) => Operand::Memory(memory),
        }
    }

    /// An immediate of at most 32 bits, sign-extended.
    fn immediate(&mut self, size: Size) -> Result<Operand, DecodeError> {
        let encoded = match size {
            Size::Qword => Size::Dword,
            narrower => narrower,
        };
        Ok(Operand::Immediate(self.cursor.signed(encoded)?))
    }

    /// Puts the instruction together; LOCK where it is not allowed is #UD.
    fn finish(self, form: Form) -> Result<Instruction, DecodeError> {
        let in_memory = matches!(form.destination, Operand::Memory(_));
        if self.prefixes.lock && !(in_memory && form.operation.is_lockable()) {
            return Err(DecodeError::InvalidOpcode);
        }
        Ok(Instruction {
            length: u8::try_from(self.cursor.position).map_err(|_| DecodeError::TooLong)?,
            operation: form.operation,
            size: form.size,
            source_size: form.source_size,
            address_size: self.address_size(),
            destination: form.destination,
            source: form.source,
            repeat: form.repeat,
            lock: self.prefixes.lock,
        })
    }
}
