// SPDX-License-Identifier: GPL-2.0

//! What a decoded instruction is.

use crate::x86::segment::SegmentRegister;

/// The default operation size of the code being run: CS.L and CS.D (SDM vol. 3, 3.4.5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CodeSize {
    /// Real-address mode, virtual-8086 mode, and segments with CS.D = 0.
    Bits16,
    /// Segments with CS.D = 1, compatibility mode included.
    Bits32,
    /// 64-bit mode: IA-32e mode and CS.L = 1.
    Bits64,
}

/// The width of an operand, an address or a counter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Size {
    /// 8 bits.
    Byte,
    /// 16 bits.
    Word,
    /// 32 bits.
    Dword,
    /// 64 bits.
    Qword,
    /// 128 bits: an XMM register, or memory as wide; CMPXCHG16B's operand.
    Oword,
    /// 256 bits: a YMM register, or memory as wide. No other operand has it.
    Yword,
}

impl Size {
    /// The width in bytes: 1, 2, 4, 8, 16 or 32.
    #[inline]
    pub const fn bytes(self) -> usize {
        match self {
            Self::Byte => 1,
            Self::Word => 2,
            Self::Dword => 4,
            Self::Qword => 8,
            Self::Oword => 16,
            Self::Yword => 32,
        }
    }

    /// The width in bits: 8, 16, 32, 64, 128 or 256.
    #[inline]
    pub const fn bits(self) -> u32 {
        match self {
            Self::Byte => 8,
            Self::Word => 16,
            Self::Dword => 32,
            Self::Qword => 64,
            Self::Oword => 128,
            Self::Yword => 256,
        }
    }

    /// A mask of the bits that a value of this width has among its low 64.
    #[inline]
    pub const fn mask(self) -> u64 {
        match self {
            Self::Byte => 0xff,
            Self::Word => 0xffff,
            Self::Dword => 0xffff_ffff,
            Self::Qword | Self::Oword | Self::Yword => u64::MAX,
        }
    }

    /// The topmost bit of a value of this width among its low 64.
    #[inline]
    pub const fn sign(self) -> u64 {
        match self {
            Self::Byte => 1 << 7,
            Self::Word => 1 << 15,
            Self::Dword => 1 << 31,
            Self::Qword | Self::Oword | Self::Yword => 1 << 63,
        }
    }

    /// `value` of this width with its sign copied up to bit 63.
    #[inline]
    pub const fn sign_extend(self, value: u64) -> u64 {
        let value = value & self.mask();
        // Flipping the sign bit and taking its weight away again borrows through all upper bits.
        (value ^ self.sign()).wrapping_sub(self.sign())
    }
}

/// A general-purpose register, numbered as in instruction encodings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Gpr {
    /// RAX.
    Rax = 0,
    /// RCX.
    Rcx = 1,
    /// RDX.
    Rdx = 2,
    /// RBX.
    Rbx = 3,
    /// RSP.
    Rsp = 4,
    /// RBP.
    Rbp = 5,
    /// RSI.
    Rsi = 6,
    /// RDI.
    Rdi = 7,
    /// R8.
    R8 = 8,
    /// R9.
    R9 = 9,
    /// R10.
    R10 = 10,
    /// R11.
    R11 = 11,
    /// R12.
    R12 = 12,
    /// R13.
    R13 = 13,
    /// R14.
    R14 = 14,
    /// R15.
    R15 = 15,
}

impl Gpr {
    /// The register with the number in the low four bits of `number`.
    #[inline]
    pub const fn from_low_bits(number: u8) -> Self {
        match number & 0xf {
            0 => Self::Rax,
            1 => Self::Rcx,
            2 => Self::Rdx,
            3 => Self::Rbx,
            4 => Self::Rsp,
            5 => Self::Rbp,
            6 => Self::Rsi,
            7 => Self::Rdi,
            8 => Self::R8,
            9 => Self::R9,
            10 => Self::R10,
            11 => Self::R11,
            12 => Self::R12,
            13 => Self::R13,
            14 => Self::R14,
            _ => Self::R15,
        }
    }

    /// The register's number, 0 to 15.
    #[inline]
    pub const fn index(self) -> usize {
        self as usize
    }
}

/// What a memory operand's address starts from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Base {
    /// A register.
    Register(Gpr),
    /// The address of the next instruction (RIP-relative, 64-bit mode only).
    NextInstruction,
}

/// A scaled index register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Index {
    /// The register.
    pub register: Gpr,
    /// How far it is shifted to the left, 0 to 3.
    pub shift: u8,
}

/// A memory operand: `segment:[base + index << shift + displacement]`, modulo the address size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memory {
    /// The segment, overrides applied.
    pub segment: SegmentRegister,
    /// The base.
    pub base: Option<Base>,
    /// The index.
    pub index: Option<Index>,
    /// The displacement, sign-extended to 64 bits; zero-extended where it is the whole address (the
    /// MOV forms A0 to A3).
    pub displacement: u64,
}

/// An instruction's operand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operand {
    /// There is none.
    None,
    /// The low bits of a register, as many as the operand's size says.
    Register(Gpr),
    /// Bits 15:8 of RAX, RCX, RDX or RBX: AH, CH, DH, BH.
    HighByte(Gpr),
    /// Memory.
    Memory(Memory),
    /// A vector register, XMM0 to XMM15 or YMM0 to YMM15, by number.
    Vector(u8),
    /// The I/O port whose number is in DX.
    Port,
    /// An immediate, sign-extended to 64 bits.
    Immediate(u64),
}

/// The eight operations that share an encoding (SDM vol. 2, opcodes 00 to 3F and 80 to 83).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arithmetic {
    /// ADD.
    Add,
    /// OR.
    Or,
    /// ADC.
    Adc,
    /// SBB.
    Sbb,
    /// AND.
    And,
    /// SUB.
    Sub,
    /// XOR.
    Xor,
    /// CMP: SUB without a result.
    Cmp,
}

impl Arithmetic {
    /// The operation with the number in the low three bits of `number`.
    #[inline]
    pub(super) const fn from_low_bits(number: u8) -> Self {
        match number & 7 {
            0 => Self::Add,
            1 => Self::Or,
            2 => Self::Adc,
            3 => Self::Sbb,
            4 => Self::And,
            5 => Self::Sub,
            6 => Self::Xor,
            _ => Self::Cmp,
        }
    }
}

/// An operation on one operand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unary {
    /// INC.
    Inc,
    /// DEC.
    Dec,
    /// NOT.
    Not,
    /// NEG.
    Neg,
}

/// What a bit-test instruction does with the bit after it was copied to CF.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BitOperation {
    /// BT: nothing.
    Test,
    /// BTS: set it.
    Set,
    /// BTR: clear it.
    Reset,
    /// BTC: invert it.
    Complement,
}

impl BitOperation {
    /// The operation with the number in the low two bits of `number` (opcode bits 4:3, ModRM.reg).
    #[inline]
    pub(super) const fn from_low_bits(number: u8) -> Self {
        match number & 3 {
            0 => Self::Test,
            1 => Self::Set,
            2 => Self::Reset,
            _ => Self::Complement,
        }
    }
}

/// A string instruction. Its operands stand in the instruction like those of any other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StringOperation {
    /// MOVS: memory at rSI to memory at ES:rDI.
    Movs,
    /// STOS: the accumulator to memory at ES:rDI.
    Stos,
    /// LODS: memory at rSI to the accumulator.
    Lods,
    /// CMPS: memory at rSI, the destination, is compared with memory at ES:rDI.
    Cmps,
    /// SCAS: the accumulator is compared with memory at ES:rDI.
    Scas,
    /// INS: a port to memory at ES:rDI.
    Ins,
    /// OUTS: memory at rSI to a port.
    Outs,
}

/// What a move from or to a vector register moves. AVX's forms are named as SSE's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VectorMove {
    /// MOVUPS, MOVUPD, MOVDQU, LDDQU: all of it.
    Whole,
    /// MOVAPS, MOVAPD, MOVDQA, MOVNTPS, MOVNTPD, MOVNTDQ, MOVNTDQA: all of it, aligned in memory.
    Aligned,
    /// MOVD, MOVQ, and MOVSS and MOVSD from or to memory, MOVLPS and MOVLPD to memory: the lowest 4
    /// or 8 bytes, zero-extended in a vector register.
    Low,
    /// MOVLPS and MOVLPD from memory: bits 63:0; bits 127:64 come from register `other`.
    LoadLow {
        /// The register that the other half comes from: the destination itself without VEX.
        other: u8,
    },
    /// MOVHPS and MOVHPD from memory: bits 127:64; bits 63:0 come from register `other`.
    LoadHigh {
        /// As with [`VectorMove::LoadLow`].
        other: u8,
    },
    /// MOVHPS and MOVHPD to memory: bits 127:64.
    StoreHigh,
}

/// How a vector instruction is encoded, which tells what happens above the bits that it writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encoding {
    /// SSE's encodings: the bits above 127 stay as they were.
    Legacy,
    /// With a VEX prefix: the bits above are cleared.
    Vex,
}

/// What an instruction does: the complete list of what the emulator knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// MOV, MOVNTI and MOVDIRI: destination = source.
    Mov,
    /// MOVZX: the source is narrower and zero-extended.
    MovZeroExtend,
    /// MOVSX and MOVSXD: the source is narrower, or as wide, and sign-extended.
    MovSignExtend,
    /// MOVBE: bytes in reverse order.
    MovSwap,
    /// ADD, OR, ADC, SBB, AND, SUB, XOR, CMP.
    Arithmetic(Arithmetic),
    /// TEST: AND without a result.
    Test,
    /// INC, DEC, NOT, NEG of the destination.
    Unary(Unary),
    /// XCHG.
    Exchange,
    /// XADD.
    ExchangeAdd,
    /// CMPXCHG: the accumulator takes part.
    CompareExchange,
    /// CMPXCHG8B and CMPXCHG16B: the destination, in memory, is as wide as two registers; rDX:rAX and
    /// rCX:rBX take part.
    CompareExchangePair,
    /// BT, BTS, BTR, BTC: the source is the bit's offset.
    Bit(BitOperation),
    /// PUSH: the source, to the stack.
    Push,
    /// POP: from the stack to the destination.
    Pop,
    /// Near CALL: the next instruction's address to the stack, and on at the source; an immediate counts
    /// from the next instruction.
    Call,
    /// A move from or to a vector register.
    Vector(VectorMove, Encoding),
    /// MOVS, STOS, LODS, CMPS, SCAS, INS, OUTS.
    String(StringOperation),
}

impl Operation {
    /// Whether a LOCK prefix is allowed with a destination in memory (SDM vol. 2, LOCK).
    #[inline]
    pub const fn is_lockable(self) -> bool {
        match self {
            Self::Arithmetic(operation) => !matches!(operation, Arithmetic::Cmp),
            Self::Bit(operation) => !matches!(operation, BitOperation::Test),
            Self::Unary(_)
            | Self::Exchange
            | Self::ExchangeAdd
            | Self::CompareExchange
            | Self::CompareExchangePair => true,
            Self::Mov
            | Self::MovZeroExtend
            | Self::MovSignExtend
            | Self::MovSwap
            | Self::Test
            | Self::Push
            | Self::Pop
            | Self::Call
            | Self::Vector(..)
            | Self::String(_) => false,
        }
    }
}

/// A string instruction's repeat prefix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Repeat {
    /// None: one iteration.
    Once,
    /// REP: as many iterations as rCX says.
    Count,
    /// REPE, with CMPS and SCAS: as REP, until an iteration finds a difference.
    WhileEqual,
    /// REPNE, with CMPS and SCAS: as REP, until an iteration finds equality.
    WhileUnequal,
}

/// A decoded instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Instruction {
    /// The length in bytes, 1 to 15.
    pub length: u8,
    /// What it does.
    pub operation: Operation,
    /// The width of the destination.
    pub size: Size,
    /// The width of the source, which differs in MOVZX and MOVSX only.
    pub source_size: Size,
    /// The width of addresses and of a string instruction's registers: 16, 32 or 64 bits.
    pub address_size: Size,
    /// The first operand; of CMP, TEST, BT, CMPS and SCAS too, which do not write it.
    pub destination: Operand,
    /// The second operand.
    pub source: Operand,
    /// The repeat prefix; `Once` for all but string instructions.
    pub repeat: Repeat,
    /// Whether there is a LOCK prefix.
    pub lock: bool,
}
