// SPDX-License-Identifier: GPL-2.0

//! The decoder against `iced-x86`.
//!
//! What ours accepts, iced must decode to the same instruction, operand by operand. What ours
//! refuses must be invalid to iced or outside the list that ours has.

mod names;

use self::names::operation_of;
use crate::random::{from_environment, Random};
use iced_x86::{Code, Decoder, DecoderOptions, Mnemonic, OpKind, Register};
use rvisor_core::{
    emulate::{
        decode, Base, CodeSize, DecodeError, Encoding, Gpr, Instruction, Memory, Operand,
        Operation, Repeat, Size, StringOperation, VectorMove, MAX_LENGTH,
    },
    x86::segment::SegmentRegister,
};

const MODES: [CodeSize; 3] = [CodeSize::Bits16, CodeSize::Bits32, CodeSize::Bits64];

/// The opcodes of which the decoder knows some form, as maps 0 (one byte), 1 (0F), 2 (0F 38).
const KNOWN: [&[u8]; 3] = [
    &[
        0x00, 0x01, 0x02, 0x03, 0x04, 0x05, 0x08, 0x09, 0x0a, 0x0b, 0x0c, 0x0d, 0x10, 0x11, 0x12,
        0x13, 0x18, 0x19, 0x1a, 0x1b, 0x20, 0x21, 0x22, 0x23, 0x24, 0x25, 0x28, 0x29, 0x2a, 0x2b,
        0x30, 0x31, 0x32, 0x33, 0x38, 0x39, 0x3a, 0x3b, 0x3c, 0x3d, 0x40, 0x48, 0x63, 0x6c, 0x6d,
        0x6e, 0x6f, 0x50, 0x55, 0x58, 0x5c, 0x68, 0x6a, 0x8f, 0xc4, 0xc5, 0x80, 0x81, 0x82, 0x83,
        0x84, 0x85, 0x86, 0x87, 0x88, 0x89, 0x8a, 0x8b, 0xa0, 0xa1, 0xa2, 0xa3, 0xa4, 0xa5, 0xa6,
        0xa7, 0xae, 0xaf, 0xa8, 0xa9, 0xaa, 0xab, 0xac, 0xad, 0xb0, 0xb4, 0xb8, 0xbf, 0xc6, 0xc7,
        0xe8, 0xf6, 0xf7, 0xfe, 0xff,
    ],
    &[
        0x10, 0x11, 0x12, 0x13, 0x16, 0x17, 0xf0, 0xc7, 0x28, 0x29, 0x2b, 0x6e, 0x6f, 0x7e, 0x7f,
        0xd6, 0xe7, 0xa3, 0xab, 0xb0, 0xb1, 0xb3, 0xb6, 0xb7, 0xba, 0xbb, 0xbe, 0xbf, 0xc0, 0xc1,
        0xc3,
    ],
    &[0x2a, 0xf0, 0xf1, 0xf9],
];

/// Those of map 1 that move vectors.
const VECTOR: &[u8] = &[
    0x10, 0x11, 0x12, 0x13, 0x16, 0x17, 0x28, 0x29, 0x2b, 0x6e, 0x6f, 0x7e, 0x7f, 0xd6, 0xe7, 0xf0,
];

/// The prefixes that may come before an opcode, REX aside.
const PREFIXES: [u8; 11] = [
    0x26, 0x2e, 0x36, 0x3e, 0x64, 0x65, 0x66, 0x67, 0xf0, 0xf2, 0xf3,
];

fn size_of(bytes: usize) -> Option<Size> {
    [
        Size::Byte,
        Size::Word,
        Size::Dword,
        Size::Qword,
        Size::Oword,
        Size::Yword,
    ]
    .into_iter()
    .find(|size| size.bytes() == bytes)
}

fn segment_of(register: Register) -> SegmentRegister {
    match register {
        Register::ES => SegmentRegister::Es,
        Register::CS => SegmentRegister::Cs,
        Register::SS => SegmentRegister::Ss,
        Register::DS => SegmentRegister::Ds,
        Register::FS => SegmentRegister::Fs,
        Register::GS => SegmentRegister::Gs,
        other => panic!("{other:?} is no segment register"),
    }
}

fn gpr_of(register: Register) -> Gpr {
    assert!(register.is_gpr(), "{register:?}");
    Gpr::from_low_bits(u8::try_from(register.full_register().number()).unwrap())
}

/// Whether the decoder is meant to know this valid instruction.
fn is_in_list(iced: &iced_x86::Instruction) -> bool {
    let Some(operation) = operation_of(iced) else {
        return false;
    };
    // Moves, and PUSH and POP, of segment, control, debug and MMX registers.
    let is_special = |operand: u32| {
        let register = iced.op_register(operand);
        let is_vector = register.is_xmm() || register.is_ymm();
        iced.op_kind(operand) == OpKind::Register && !register.is_gpr() && !is_vector
    };
    // Between registers these keep the destination's upper part.
    let is_scalar = matches!(
        iced.mnemonic(),
        Mnemonic::Movss | Mnemonic::Movsd | Mnemonic::Vmovss | Mnemonic::Vmovsd
    );
    let is_merge =
        is_scalar && iced.op_kind(0) == OpKind::Register && iced.op_kind(1) == OpKind::Register;
    // REPNE is reserved with these string instructions; 90 to 97 have no operand in memory.
    let is_reserved = match operation {
        Operation::String(StringOperation::Cmps | StringOperation::Scas) => false,
        Operation::String(_) => iced.has_repne_prefix(),
        _ => false,
    };
    let is_short_exchange = matches!(
        iced.code(),
        Code::Xchg_r16_AX | Code::Xchg_r32_EAX | Code::Xchg_r64_RAX
    );
    !(0..iced.op_count()).any(is_special) && !is_merge && !is_reserved && !is_short_exchange
}

/// The segment by which iced addresses memory.
///
/// In 64-bit mode iced reports overrides of ES, CS, SS and DS. The CPU ignores them, which shows in
/// whether an address that is not canonical raises #SS or #GP.
fn segment_by(iced: &iced_x86::Instruction, operand: u32) -> SegmentRegister {
    let segment = match iced.op_kind(operand) {
        OpKind::MemoryESDI | OpKind::MemoryESEDI | OpKind::MemoryESRDI => {
            return SegmentRegister::Es
        }
        _ => segment_of(iced.memory_segment()),
    };
    let is_ignored = !matches!(segment, SegmentRegister::Fs | SegmentRegister::Gs);
    if iced.code_size() != iced_x86::CodeSize::Code64 || !is_ignored {
        return segment;
    }
    match iced.memory_base() {
        Register::RSP | Register::RBP | Register::ESP | Register::EBP => SegmentRegister::Ss,
        _ => SegmentRegister::Ds,
    }
}

/// Compares a memory operand with iced's idea of it.
fn same_memory(ours: &Instruction, memory: &Memory, iced: &iced_x86::Instruction, operand: u32) {
    assert_eq!(memory.segment, segment_by(iced, operand));
    let string_base = match iced.op_kind(operand) {
        OpKind::MemorySegSI => Some(Register::SI),
        OpKind::MemorySegESI => Some(Register::ESI),
        OpKind::MemorySegRSI => Some(Register::RSI),
        OpKind::MemoryESDI => Some(Register::DI),
        OpKind::MemoryESEDI => Some(Register::EDI),
        OpKind::MemoryESRDI => Some(Register::RDI),
        OpKind::Memory => None,
        other => panic!("{other:?} is no memory"),
    };
    let same_width = |register: Register| {
        assert_eq!(
            size_of(register.size()),
            Some(ours.address_size),
            "{register:?}"
        );
    };
    if let Some(base) = string_base {
        same_width(base);
        assert_eq!(memory.base, Some(Base::Register(gpr_of(base))));
        assert_eq!((memory.index, memory.displacement), (None, 0));
        return;
    }
    let mut displacement = iced.memory_displacement64();
    match iced.memory_base() {
        Register::None => assert_eq!(memory.base, None),
        base @ (Register::RIP | Register::EIP) => {
            same_width(base);
            assert_eq!(memory.base, Some(Base::NextInstruction));
            // iced adds the next instruction's address, which is the length as it began at 0.
            displacement = displacement.wrapping_sub(iced.len() as u64);
        }
        base => {
            same_width(base);
            assert_eq!(memory.base, Some(Base::Register(gpr_of(base))));
        }
    }
    match (iced.memory_index(), memory.index) {
        (Register::None, index) => assert_eq!(index, None),
        (register, index) => {
            same_width(register);
            let index = index.expect("an index");
            assert_eq!(index.register, gpr_of(register));
            assert_eq!(1 << index.shift, iced.memory_index_scale());
        }
    }
    let mask = ours.address_size.mask();
    assert_eq!(memory.displacement & mask, displacement & mask);
}

/// Compares one operand of `size` with iced's.
fn same_operand(
    ours: &Instruction,
    operand: &Operand,
    size: Size,
    iced: &iced_x86::Instruction,
    number: u32,
) {
    if *operand == Operand::None {
        assert!(number >= iced.op_count());
        return;
    }
    assert!(number < iced.op_count());
    match *operand {
        Operand::None => unreachable!(),
        Operand::Register(gpr) => {
            assert_eq!(iced.op_kind(number), OpKind::Register);
            let register = iced.op_register(number);
            assert!(!is_high_byte(register), "{register:?}");
            assert_eq!(
                (gpr_of(register), size_of(register.size())),
                (gpr, Some(size))
            );
        }
        Operand::HighByte(gpr) => {
            let register = iced.op_register(number);
            assert!(is_high_byte(register), "{register:?}");
            assert_eq!((gpr_of(register), size), (gpr, Size::Byte));
        }
        Operand::Immediate(value) if ours.operation == Operation::Call => {
            let target = value.wrapping_add(ours.length.into()) & size.mask();
            assert_eq!(target, iced.near_branch_target());
        }
        Operand::Immediate(value) => {
            assert_eq!(
                (value ^ iced.immediate(number)) & immediate_mask(ours, size),
                0
            );
        }
        Operand::Vector(vector) => {
            let register = iced.op_register(number);
            let is_wide = ours.size == Size::Yword;
            assert!(
                if is_wide {
                    register.is_ymm()
                } else {
                    register.is_xmm()
                },
                "{register:?}"
            );
            assert_eq!(register.number(), usize::from(vector));
        }
        Operand::Port => assert_eq!(iced.op_register(number), Register::DX),
        Operand::Memory(memory) => {
            assert_eq!(size_of(iced.memory_size().size()), Some(size));
            same_memory(ours, &memory, iced, number);
        }
    }
}

/// The bits that count of an immediate: a bit offset has eight.
fn immediate_mask(ours: &Instruction, size: Size) -> u64 {
    match ours.operation {
        Operation::Bit(_) => Size::Byte.mask(),
        _ => size.mask(),
    }
}

fn is_high_byte(register: Register) -> bool {
    matches!(
        register,
        Register::AH | Register::CH | Register::DH | Register::BH
    )
}

/// How many cases ended how.
#[derive(Debug, Default)]
struct Tally {
    accepted: u64,
    refused: u64,
    /// Of those accepted, how many were of each kind; vector moves by size too.
    kinds: std::collections::BTreeMap<String, u64>,
}

impl Tally {
    fn accept(&mut self, ours: &Instruction) {
        self.accepted += 1;
        let kind = match ours.operation {
            Operation::Vector(VectorMove::LoadLow { .. }, encoding) => {
                format!("LoadLow {encoding:?}")
            }
            Operation::Vector(VectorMove::LoadHigh { .. }, encoding) => {
                format!("LoadHigh {encoding:?}")
            }
            Operation::Vector(kind, encoding) => format!("{kind:?} {encoding:?} {:?}", ours.size),
            other => format!("{other:?}"),
        };
        *self.kinds.entry(kind).or_default() += 1;
    }
}

/// Decodes with both and compares.
fn check(bytes: &[u8; 16], code: CodeSize, tally: &mut Tally) {
    let bits = match code {
        CodeSize::Bits16 => 16,
        CodeSize::Bits32 => 32,
        CodeSize::Bits64 => 64,
    };
    let mut decoder = Decoder::with_ip(bits, bytes, 0, DecoderOptions::NONE);
    let iced = decoder.decode();
    let context = Context { bytes, code, iced };
    match decode(bytes, code) {
        Ok(ours) => {
            tally.accept(&ours);
            assert!(!iced.is_invalid(), "ours accepts it");
            assert_eq!(Some(ours.operation), operation_of(&iced));
            assert_eq!(usize::from(ours.length), iced.len());
            assert_eq!(ours.lock, iced.has_lock_prefix());
            check_repeat(&ours, &iced);
            // PUSH and CALL have a source alone, and what is loaded into half of a vector with VEX comes third.
            let (destination, source) = match ours.operation {
                Operation::Push | Operation::Call => (1, 0),
                Operation::Vector(
                    VectorMove::LoadLow { .. } | VectorMove::LoadHigh { .. },
                    Encoding::Vex,
                ) => (0, 2),
                _ => (0, 1),
            };
            same_operand(&ours, &ours.destination, ours.size, &iced, destination);
            same_operand(&ours, &ours.source, ours.source_size, &iced, source);
            check_truncation(&bytes[..usize::from(ours.length)], code);
        }
        Err(error) => {
            tally.refused += 1;
            match error {
                DecodeError::Unsupported => assert!(iced.is_invalid() || !is_in_list(&iced)),
                DecodeError::InvalidOpcode | DecodeError::TooLong => assert!(iced.is_invalid()),
                DecodeError::Truncated { .. } => panic!("16 bytes are never too few"),
            }
        }
    }
    std::mem::forget(context);
}

/// Compares the repeat prefix of a string instruction; others have none that counts.
fn check_repeat(ours: &Instruction, iced: &iced_x86::Instruction) {
    let compares = match ours.operation {
        Operation::String(operation) => {
            matches!(operation, StringOperation::Cmps | StringOperation::Scas)
        }
        _ => {
            assert_eq!(ours.repeat, Repeat::Once);
            return;
        }
    };
    let expected = match (iced.has_rep_prefix(), iced.has_repne_prefix()) {
        (false, false) => Repeat::Once,
        (true, false) if compares => Repeat::WhileEqual,
        (true, false) => Repeat::Count,
        (false, true) => Repeat::WhileUnequal,
        (true, true) => panic!("iced takes the last prefix only"),
    };
    assert_eq!(ours.repeat, expected);
}

/// Every part of a valid instruction asks for more, and never for more than there is.
fn check_truncation(bytes: &[u8], code: CodeSize) {
    for length in 0..bytes.len() {
        match decode(&bytes[..length], code) {
            Err(DecodeError::Truncated { needed }) => {
                assert!(needed > length && needed <= bytes.len(), "{needed}");
            }
            other => panic!("the first {length} bytes: {other:?}"),
        }
    }
}

/// Says which case it was when an assertion fails.
struct Context<'a> {
    bytes: &'a [u8; 16],
    code: CodeSize,
    iced: iced_x86::Instruction,
}

impl Drop for Context<'_> {
    fn drop(&mut self) {
        eprintln!(
            "{:02x?} in {:?}: iced has {:?} of {} bytes, ours {:x?}",
            self.bytes,
            self.code,
            self.iced.code(),
            self.iced.len(),
            decode(self.bytes, self.code)
        );
    }
}

/// A few prefixes, then an opcode that the decoder knows, then anything.
fn near_the_list(random: &mut Random, code: CodeSize) -> [u8; 16] {
    let mut bytes = random.bytes();
    let mut start = Vec::new();
    // Mostly few prefixes, now and then so many that the instruction gets too long.
    let prefixes = match random.below(32) {
        0 => random.below(14),
        other => other % 4,
    };
    for _ in 0..prefixes {
        start.push(random.pick(&PREFIXES));
    }
    if code == CodeSize::Bits64 && random.below(2) == 0 {
        start.push(0x40 | (random.byte() & 0xf));
    }
    let map = [0, 0, 0, 1, 1, 2, 3, 3][usize::try_from(random.below(8)).unwrap()];
    if map == 3 {
        if !random.chance(4) {
            start.clear();
        }
        add_vex(random, &mut start);
    } else {
        start.extend_from_slice([&[][..], &[0x0f], &[0x0f, 0x38]][map]);
        start.push(random.pick(KNOWN[map]));
    }
    start.truncate(16);
    bytes[..start.len()].copy_from_slice(&start);
    bytes
}

/// A VEX prefix, mostly a good one, and the opcode of a move behind it.
fn add_vex(random: &mut Random, start: &mut Vec<u8>) {
    let mut last = random.byte();
    if !random.chance(3) {
        last |= 0x78;
    }
    if random.chance(2) {
        start.extend_from_slice(&[0xc5, last | 0x80]);
    } else {
        let map = random.pick(&[1, 1, 1, 1, 2, 3]);
        let inverted = if random.chance(2) {
            0xe0
        } else {
            random.byte() & 0xe0
        };
        start.extend_from_slice(&[0xc4, inverted | map, last]);
        if map == 2 {
            start.push(0x2a);
            return;
        }
    }
    start.push(random.pick(VECTOR));
}

#[test]
fn random_bytes() {
    let seed = from_environment("RVISOR_SEED", 1);
    println!("RVISOR_SEED={seed}");
    let mut random = Random(seed);
    let mut tally = Tally::default();
    for number in 0..from_environment("RVISOR_CASES", 100_000) {
        let bytes = random.bytes();
        check(
            &bytes,
            MODES[usize::try_from(number % 3).unwrap()],
            &mut tally,
        );
    }
    println!("{tally:?}");
    assert!(tally.accepted > 0 && tally.refused > 0);
}

#[test]
fn random_forms_near_the_list() {
    let seed = from_environment("RVISOR_SEED", 2);
    println!("RVISOR_SEED={seed}");
    let mut random = Random(seed);
    let mut tally = Tally::default();
    for number in 0..from_environment("RVISOR_CASES", 200_000) {
        let code = MODES[usize::try_from(number % 3).unwrap()];
        let bytes = near_the_list(&mut random, code);
        check(&bytes, code, &mut tally);
    }
    println!("{tally:?}");
    assert!(tally.accepted > tally.refused);
    // 8 kinds of MOV, TEST, PUSH, POP, CALL and exchanges and CMPXCHG8B, 8, 4, 4 and 7 of the others, and
    // 16 of vector moves.
    assert_eq!(tally.kinds.len(), 51, "{:?}", tally.kinds);
}

/// All opcodes of all three maps with all ModRM bytes, in all modes, with no or one prefix.
#[test]
fn every_opcode_and_modrm() {
    let mut random = Random(3);
    let mut tally = Tally::default();
    let is_thorough = std::env::var_os("RVISOR_CASES").is_some();
    let prefixes: &[&[u8]] = &[
        &[],
        &[0x66],
        &[0x67],
        &[0xf0],
        &[0xf2],
        &[0xf3],
        &[0x64],
        &[0x4f],
    ];
    for code in MODES {
        for prefix in &prefixes[..if is_thorough { prefixes.len() } else { 1 }] {
            for map in [&[][..], &[0x0f], &[0x0f, 0x38]] {
                for opcode in 0..=255 {
                    for modrm in 0..=255 {
                        let mut bytes = random.bytes();
                        let start = [prefix, map, &[opcode, modrm]].concat();
                        bytes[..start.len()].copy_from_slice(&start);
                        check(&bytes, code, &mut tally);
                    }
                }
            }
        }
    }
    println!("{tally:?}");
    assert_eq!(MAX_LENGTH, 15);
}
