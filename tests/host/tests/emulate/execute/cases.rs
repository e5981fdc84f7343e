// SPDX-License-Identifier: GPL-2.0

//! Random instructions whose operands lie in the arena, mostly, and the state for them.

use crate::{
    native::{Data, Native, Setting, State, ALIGNMENT_CHECK, ARENA, ARENA_LENGTH, FLAGS},
    random::Random,
};
use rvisor_core::{
    emulate::{
        decode, Base, CodeSize, DecodeError, Gpr, Instruction, Memory, Operand, Operation, Repeat,
        Size, VectorMove,
    },
    x86::segment::SegmentRegister,
};

/// Opcodes with ModRM.
const ONE_BYTE: [u8; 57] = [
    0x00, 0x01, 0x02, 0x03, 0x08, 0x09, 0x0a, 0x0b, 0x10, 0x11, 0x12, 0x13, 0x18, 0x19, 0x1a, 0x1b,
    0x20, 0x21, 0x22, 0x23, 0x28, 0x29, 0x2a, 0x2b, 0x30, 0x31, 0x32, 0x33, 0x38, 0x39, 0x3a, 0x3b,
    0x63, 0x80, 0x81, 0x83, 0x84, 0x85, 0x86, 0x87, 0x88, 0x89, 0x8a, 0x8b, 0xc6, 0xc7, 0xf6, 0xf7,
    0xf6, 0xf7, 0xfe, 0xff, 0xfe, 0xff, 0x8f, 0x8f, 0xff,
];
/// The same after 0F.
const TWO_BYTES: [u8; 14] = [
    0xa3, 0xab, 0xb0, 0xb1, 0xb3, 0xb6, 0xb7, 0xba, 0xbb, 0xbe, 0xbf, 0xc0, 0xc1, 0xc3,
];
/// Those after 0F, or VEX, that move vectors.
const VECTOR: [u8; 16] = [
    0x10, 0x11, 0x12, 0x13, 0x16, 0x17, 0x28, 0x29, 0x2b, 0x6e, 0x6f, 0x7e, 0x7f, 0xd6, 0xe7, 0xf0,
];
/// Opcodes with neither ModRM nor an address in the instruction.
const WITHOUT_MODRM: [u8; 32] = [
    0x04, 0x05, 0x0c, 0x15, 0x1c, 0x25, 0x2c, 0x3d, 0xa4, 0xa5, 0xa6, 0xa7, 0xae, 0xaf, 0xaa, 0xab,
    0xac, 0xad, 0xa8, 0xa9, 0xb3, 0xb7, 0xb8, 0xbc, 0x50, 0x54, 0x57, 0x58, 0x5c, 0x5e, 0x68, 0x6a,
];

/// An instruction's bytes, decoded, and where in them ModRM or the address is.
pub(crate) struct Candidate {
    pub(crate) bytes: Vec<u8>,
    operands_at: usize,
    pub(crate) setting: Setting,
    pub(crate) instruction: Instruction,
}

/// What the decoder made of random bytes.
pub(crate) enum Decoded {
    Instruction(Candidate),
    /// #UD.
    Invalid(Setting, Vec<u8>),
    /// It does not say.
    Unknown,
}

/// The segments: each is mostly the plain one.
fn setting(random: &mut Random, code: CodeSize) -> Setting {
    let pick = |random: &mut Random, from: &[Data]| match random.chance(4) {
        true => random.pick(from),
        false => Data::Wide,
    };
    Setting {
        code,
        ds: pick(random, &Data::ALL),
        es: pick(random, &Data::ALL),
        ss: pick(random, &Data::STACKS),
    }
}

/// Prefixes and an opcode, without ModRM.
fn opcode(random: &mut Random, code: CodeSize, has_avx: bool) -> Vec<u8> {
    let mut bytes = Vec::new();
    let segment = match code {
        CodeSize::Bits64 => 0x65,
        _ => random.pick(&[0x26, 0x2e, 0x36, 0x3e]),
    };
    let is_vex = has_avx && random.chance(8);
    for (prefix, one_in) in [
        (0x67, 6),
        (segment, 6),
        (0x66, if is_vex { 100 } else { 4 }),
        (0xf0, if is_vex { 100 } else { 8 }),
        (0xf3, if is_vex { 100 } else { 4 }),
        (0xf2, if is_vex { 100 } else { 8 }),
    ] {
        if random.chance(one_in) {
            bytes.push(prefix);
        }
    }
    if is_vex {
        add_vex(random, &mut bytes);
        return bytes;
    }
    // REX; INC and DEC outside of 64-bit mode.
    if random.chance(if code == CodeSize::Bits64 { 2 } else { 16 }) {
        bytes.push(0x40 | (random.byte() & 0xf));
    }
    match random.below(8) {
        0 => bytes.push(random.pick(&WITHOUT_MODRM)),
        1 => bytes.push(random.pick(&[0xa0, 0xa1, 0xa2, 0xa3])),
        2 => bytes.extend_from_slice(&[0x0f, 0x38, random.pick(&[0x2a, 0xf0, 0xf1])]),
        3 => bytes.extend_from_slice(&[0x0f, random.pick(&VECTOR)]),
        4 => bytes.extend_from_slice(&[0x0f, random.pick(&TWO_BYTES)]),
        5 if random.chance(2) => bytes.extend_from_slice(&[0x0f, 0xc7]),
        _ => bytes.push(random.pick(&ONE_BYTE)),
    }
    bytes
}

/// VEX, mostly with vvvv = 1111, and an opcode.
fn add_vex(random: &mut Random, bytes: &mut Vec<u8>) {
    let mut last = random.byte();
    if !random.chance(3) {
        last |= 0x78;
    }
    if random.chance(2) {
        bytes.extend_from_slice(&[0xc5, last | 0x80, random.pick(&VECTOR)]);
        return;
    }
    let inverted = 0xc0 | (random.byte() & 0xe0);
    match random.chance(8) {
        true => bytes.extend_from_slice(&[0xc4, inverted | 2, last, 0x2a]),
        false => bytes.extend_from_slice(&[0xc4, inverted | 1, last, random.pick(&VECTOR)]),
    }
}

/// A random instruction.
pub(crate) fn candidate(random: &mut Random, native: &Native, code: CodeSize) -> Decoded {
    let setting = setting(random, code);
    let mut bytes = opcode(random, code, native.has_avx);
    let operands_at = bytes.len();
    bytes.resize_with(20, || random.byte());
    // ModRM.reg of CMPXCHG8B, POP and PUSH.
    let extension = match &bytes[..operands_at] {
        [.., 0x0f, 0xc7] => Some(1),
        [.., 0x8f] => Some(0),
        [.., 0xff] if random.chance(4) => Some(6),
        _ => None,
    };
    if let Some(extension) = extension {
        bytes[operands_at] = (bytes[operands_at] & 0xc7) | (extension << 3);
    }
    match decode(&bytes, code) {
        // It would not come back.
        Ok(instruction) if instruction.operation == Operation::Call => Decoded::Unknown,
        Ok(instruction) => {
            bytes.truncate(usize::from(instruction.length));
            Decoded::Instruction(Candidate {
                bytes,
                operands_at,
                setting,
                instruction,
            })
        }
        Err(DecodeError::InvalidOpcode) => Decoded::Invalid(setting, bytes),
        Err(_) => Decoded::Unknown,
    }
}

/// An address that is not canonical.
fn nowhere(random: &mut Random) -> u64 {
    (random.next() & !(1 << 62)) | (1 << 63)
}

/// Makes an instruction's memory operand point into the arena, by its base or its displacement, or
/// now and then to where no address is. `None` if that is not possible.
fn aim(
    random: &mut Random,
    native: &Native,
    candidate: &mut Candidate,
    memory: &Memory,
    state: &mut State,
) -> Option<()> {
    let code = candidate.setting.code;
    let base = match (code, memory.segment) {
        (CodeSize::Bits64, SegmentRegister::Gs) => native.gs_base(),
        (CodeSize::Bits64, _) => 0,
        _ => native.address(),
    };
    let middle = native.arena() + ARENA_LENGTH as u64 / 2 - 64 + random.below(128);
    // Vector moves and CMPXCHG16B want their alignment mostly. Where both alignment and segment are
    // wrong, CPUs differ in what they find first.
    let unaligned = match candidate.instruction.operation {
        Operation::Vector(..) | Operation::CompareExchangePair => 0x1f,
        _ => 0,
    };
    let mut wanted = middle.wrapping_sub(base);
    if !random.chance(8) {
        wanted = (middle & !unaligned).wrapping_sub(base);
    }
    if candidate.instruction.address_size == Size::Qword && random.chance(32) {
        wanted = (nowhere(random) & !unaligned).wrapping_sub(base);
    }
    let mask = candidate.instruction.address_size.mask();
    let index = |state: &State| match memory.index {
        Some(index) => state.gprs[index.register.index()] << index.shift,
        None => 0,
    };
    let is_stack = matches!(
        candidate.instruction.operation,
        Operation::Push | Operation::Pop
    );
    match memory.base {
        // The stack is where it is.
        Some(Base::Register(Gpr::Rsp)) if is_stack => return Some(()),
        Some(Base::Register(register)) => {
            // A register that is base and index can't be aimed.
            if memory.index.is_some_and(|index| index.register == register) {
                return None;
            }
            let value = wanted
                .wrapping_sub(memory.displacement)
                .wrapping_sub(index(state));
            state.gprs[register.index()] = (value & mask) | (random.next() & !mask);
            return Some(());
        }
        Some(Base::NextInstruction) | None => {}
    }
    let from = match memory.base {
        Some(_) => native.instruction_at() + u64::from(candidate.instruction.length),
        None => index(state),
    };
    let displacement = wanted.wrapping_sub(from);
    let (at, length) = candidate.displacement_at()?;
    candidate.bytes[at..at + length].copy_from_slice(&displacement.to_le_bytes()[..length]);
    candidate.instruction = decode(&candidate.bytes, code).ok()?;
    Some(())
}

impl Candidate {
    /// Where the displacement of an operand without a base register is, and its length.
    fn displacement_at(&self) -> Option<(usize, usize)> {
        let opcode = self.bytes[..self.operands_at].iter().rev();
        let opcode: Vec<u8> = opcode.take(2).copied().collect();
        let address_size = self.instruction.address_size;
        if matches!(opcode[..], [0xa0..=0xa3, ref before @ ..] if *before != [0x0f]) {
            return Some((self.operands_at, address_size.bytes()));
        }
        let modrm = self.bytes.get(self.operands_at)?;
        match (address_size, modrm & 7) {
            (Size::Word, _) => Some((self.operands_at + 1, 2)),
            (_, 5) => Some((self.operands_at + 1, 4)),
            // After SIB.
            _ => Some((self.operands_at + 2, 4)),
        }
    }
}

/// Registers, flags and memory, for any instruction.
pub(crate) fn any_state(random: &mut Random, code: CodeSize) -> State {
    let mut state = State {
        gprs: [0; 16].map(|_| random.value()),
        flags: (random.next() & FLAGS) | 2,
        vectors: [[0; 4]; 16].map(|vector| vector.map(|_: u64| random.next())),
        arena: [0; ARENA_LENGTH].map(|_| random.byte()),
    };
    if random.chance(8) {
        state.flags |= ALIGNMENT_CHECK;
    }
    if code != CodeSize::Bits64 {
        narrow(&mut state);
    }
    state
}

/// Leaves of the registers what code outside of 64-bit mode has.
fn narrow(state: &mut State) {
    state.gprs = state.gprs.map(|gpr| gpr & Size::Dword.mask());
    state.gprs[8..].fill(0);
}

/// The same for a candidate, whose operands are aimed.
pub(crate) fn state_for(
    random: &mut Random,
    native: &Native,
    candidate: &mut Candidate,
) -> Option<State> {
    let code = candidate.setting.code;
    let mut state = any_state(random, code);
    let Instruction {
        operation,
        source,
        size,
        ..
    } = candidate.instruction;
    if (operation, size, candidate.instruction.source_size)
        == (Operation::MovSignExtend, Size::Word, Size::Word)
    {
        // AMD's CPUs read 4 bytes for MOVSXD to 16 bits, of which the SDM says 2.
        state.flags &= !ALIGNMENT_CHECK;
    }
    if let (Operation::Bit(_), Operand::Register(register)) = (operation, source) {
        // A bit inside of the arena, mostly.
        let offset = random.below(2048).wrapping_sub(1024);
        state.gprs[register.index()] = offset & size.mask();
    }
    if matches!(operation, Operation::Push | Operation::Pop) {
        aim_stack(random, native, candidate, &mut state);
    }
    for operand in [candidate.instruction.destination, source] {
        if let Operand::Memory(memory) = operand {
            aim(random, native, candidate, &memory, &mut state)?;
        }
    }
    if candidate.instruction.repeat != Repeat::Once {
        let mask = candidate.instruction.address_size.mask();
        // With a count of 0 and 32-bit addresses CPUs differ in the registers' upper halves.
        let count = 1 + random.below(8);
        state.gprs[1] = count | (random.next() & !mask);
    }
    let compares = matches!(
        operation,
        Operation::CompareExchange | Operation::CompareExchangePair
    );
    if compares && random.chance(2) {
        make_equal(native, candidate, &mut state);
    }
    if code != CodeSize::Bits64 {
        narrow(&mut state);
    }
    Some(state)
}

/// The stack pointer somewhere in the arena; with 16 bits of it the others are anything.
fn aim_stack(random: &mut Random, native: &Native, candidate: &Candidate, state: &mut State) {
    let Setting { code, ss, .. } = candidate.setting;
    let place = ARENA_LENGTH as u64 / 2 - 16 + random.below(32);
    let place = match random.chance(2) {
        true => place & !7,
        false => place,
    };
    state.gprs[4] = match (code, ss) {
        (CodeSize::Bits64, _) if random.chance(32) => nowhere(random),
        (CodeSize::Bits64, _) => native.arena() + place,
        (_, Data::Narrow | Data::DownNarrow) => {
            ((ARENA as u64 + place) & 0xffff) | (random.next() & 0xffff_0000)
        }
        _ => ARENA as u64 + place,
    };
}

/// Makes the accumulator, or the pair, equal to the destination, where that is simple to find.
fn make_equal(native: &Native, candidate: &Candidate, state: &mut State) {
    let instruction = &candidate.instruction;
    let value = match instruction.destination {
        Operand::Register(register) => u128::from(state.gprs[register.index()]),
        Operand::Memory(Memory {
            base: Some(Base::Register(register)),
            index: None,
            displacement,
            segment,
        }) if segment != SegmentRegister::Gs && !matches!(register, Gpr::Rax | Gpr::Rdx) => {
            let linear = state.gprs[register.index()].wrapping_add(displacement);
            let linear = linear & instruction.address_size.mask();
            let arena = match candidate.setting.code {
                CodeSize::Bits64 => native.arena(),
                _ => ARENA as u64,
            };
            let at = usize::try_from(linear.wrapping_sub(arena)).unwrap_or(usize::MAX);
            let Some(bytes) = state.arena.get(at..at.saturating_add(16)) else {
                return;
            };
            u128::from_le_bytes(bytes.try_into().unwrap())
        }
        _ => return,
    };
    match (instruction.operation, instruction.size) {
        (Operation::CompareExchangePair, Size::Qword) => {
            state.gprs[0] = (value & 0xffff_ffff) as u64;
            state.gprs[2] = ((value >> 32) & 0xffff_ffff) as u64;
        }
        (Operation::CompareExchangePair, _) => {
            state.gprs[0] = value as u64;
            state.gprs[2] = (value >> 64) as u64;
        }
        _ => state.gprs[0] = value as u64,
    }
}

/// The operation's name, without the registers that take part.
pub(crate) fn name(operation: Operation) -> String {
    match operation {
        Operation::Vector(VectorMove::LoadLow { .. }, encoding) => format!("LoadLow {encoding:?}"),
        Operation::Vector(VectorMove::LoadHigh { .. }, encoding) => {
            format!("LoadHigh {encoding:?}")
        }
        Operation::Vector(kind, encoding) => format!("{kind:?} {encoding:?}"),
        other => format!("{other:?}"),
    }
}
