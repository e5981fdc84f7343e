// SPDX-License-Identifier: GPL-2.0

//! The emulator against this machine's CPU.
//!
//! Random instructions of every kind that the emulator knows are executed by it and by the CPU,
//! with the same registers, flags and memory. Registers, memory, RIP's advance and all flags that
//! the SDM defines must come out the same.

use crate::{
    native::{Native, State, ARENA, ARENA_LENGTH, FLAGS},
    random::{from_environment, Random},
};
use rvisor_core::{
    emulate::{
        decode, execute, Arithmetic, Base, CodeSize, Gpr, Instruction, Machine, Memory, Mode,
        Operand, Operation, Progress, Protection, Repeat, Size, Stop,
    },
    x86::{
        address::Gva,
        segment::{AccessRights, Segment, SegmentRegister},
    },
};

const CARRY: u64 = 1;
const ADJUST: u64 = 1 << 4;

/// An access outside of the arena.
#[derive(Debug)]
struct Outside;

/// The same for the emulator.
struct Emulated {
    state: State,
    rip: u64,
    code: CodeSize,
    /// Where the mapping begins: the base of all segments outside of 64-bit mode.
    base: u64,
    gs_base: u64,
}

impl Emulated {
    fn new(native: &Native, code: CodeSize, state: &State) -> Self {
        Self {
            state: state.clone(),
            rip: match code {
                CodeSize::Bits64 => native.instruction_at(),
                _ => 0x100,
            },
            code,
            base: native.address(),
            gs_base: native.gs_base(),
        }
    }

    fn bytes(&mut self, linear: Gva, length: usize) -> Result<&mut [u8], Outside> {
        let start = usize::try_from(linear.raw().wrapping_sub(self.base)).map_err(|_| Outside)?;
        let start = start.checked_sub(ARENA).ok_or(Outside)?;
        let end = start.checked_add(length).ok_or(Outside)?;
        self.state.arena.get_mut(start..end).ok_or(Outside)
    }
}

impl Machine for Emulated {
    type Stop = Outside;

    fn gpr(&mut self, register: Gpr) -> u64 {
        self.state.gprs[register.index()]
    }

    fn set_gpr(&mut self, register: Gpr, value: u64) {
        self.state.gprs[register.index()] = value;
    }

    fn rip(&mut self) -> u64 {
        self.rip
    }

    fn set_rip(&mut self, value: u64) {
        self.rip = value;
    }

    fn rflags(&mut self) -> u64 {
        self.state.flags
    }

    fn set_rflags(&mut self, value: u64) {
        self.state.flags = value;
    }

    fn segment(&mut self, register: SegmentRegister) -> Segment {
        match (self.code, register) {
            (CodeSize::Bits64, _) => Segment {
                base: match register {
                    SegmentRegister::Gs => self.gs_base,
                    _ => 0,
                },
                access: AccessRights(AccessRights::UNUSABLE),
                ..Segment::default()
            },
            // Readable code; writable data.
            (_, register) => Segment {
                selector: 7,
                base: self.base,
                limit: 0xffff,
                access: AccessRights(match register {
                    SegmentRegister::Cs => 0xfb,
                    _ => 0x40f3,
                }),
            },
        }
    }

    fn mode(&mut self) -> Mode {
        Mode {
            code: self.code,
            protection: Protection::Protected,
            linear_bits: 48,
        }
    }

    fn read(&mut self, linear: Gva, data: &mut [u8]) -> Result<(), Outside> {
        data.copy_from_slice(self.bytes(linear, data.len())?);
        Ok(())
    }

    fn prepare_write(&mut self, linear: Gva, length: usize) -> Result<(), Outside> {
        self.bytes(linear, length).map(|_| ())
    }

    fn vector(&mut self, number: u8) -> Option<[u8; 16]> {
        let vector = self.state.vectors[usize::from(number)];
        (self.code == CodeSize::Bits64).then_some(vector)
    }

    fn set_vector(&mut self, number: u8, value: [u8; 16]) {
        self.state.vectors[usize::from(number)] = value;
    }

    fn input(&mut self, _port: u16, _data: &mut [u8]) -> Result<(), Outside> {
        Err(Outside)
    }

    fn output(&mut self, _port: u16, _data: &[u8]) -> Result<(), Outside> {
        Err(Outside)
    }

    fn write(&mut self, linear: Gva, data: &[u8]) -> Result<(), Outside> {
        self.bytes(linear, data.len())?.copy_from_slice(data);
        Ok(())
    }

    fn compare_exchange(&mut self, linear: Gva, old: &[u8], new: &[u8]) -> Result<bool, Outside> {
        assert_eq!(self.bytes(linear, old.len())?, old);
        self.write(linear, new).map(|()| true)
    }

    fn may_continue(&mut self) -> bool {
        true
    }
}

/// Opcodes with ModRM.
const ONE_BYTE: [u8; 54] = [
    0x00, 0x01, 0x02, 0x03, 0x08, 0x09, 0x0a, 0x0b, 0x10, 0x11, 0x12, 0x13, 0x18, 0x19, 0x1a, 0x1b,
    0x20, 0x21, 0x22, 0x23, 0x28, 0x29, 0x2a, 0x2b, 0x30, 0x31, 0x32, 0x33, 0x38, 0x39, 0x3a, 0x3b,
    0x63, 0x80, 0x81, 0x83, 0x84, 0x85, 0x86, 0x87, 0x88, 0x89, 0x8a, 0x8b, 0xc6, 0xc7, 0xf6, 0xf7,
    0xf6, 0xf7, 0xfe, 0xff, 0xfe, 0xff,
];
/// The same after 0F.
const TWO_BYTES: [u8; 14] = [
    0xa3, 0xab, 0xb0, 0xb1, 0xb3, 0xb6, 0xb7, 0xba, 0xbb, 0xbe, 0xbf, 0xc0, 0xc1, 0xc3,
];
/// Those after 0F that move vectors.
const VECTOR: [u8; 11] = [
    0x10, 0x11, 0x28, 0x29, 0x2b, 0x6e, 0x6f, 0x7e, 0x7f, 0xd6, 0xe7,
];
/// Opcodes with neither ModRM nor an address in the instruction.
const WITHOUT_MODRM: [u8; 24] = [
    0x04, 0x05, 0x0c, 0x15, 0x1c, 0x25, 0x2c, 0x3d, 0xa4, 0xa5, 0xa6, 0xa7, 0xae, 0xaf, 0xaa, 0xab,
    0xac, 0xad, 0xa8, 0xa9, 0xb3, 0xb7, 0xb8, 0xbc,
];

/// An instruction's bytes, decoded, and where in them ModRM or the address is.
struct Candidate {
    bytes: Vec<u8>,
    operands_at: usize,
    code: CodeSize,
    instruction: Instruction,
}

fn candidate(random: &mut Random, code: CodeSize) -> Option<Candidate> {
    let mut bytes = Vec::new();
    let segment = match code {
        CodeSize::Bits64 => 0x65,
        _ => random.pick(&[0x26, 0x2e, 0x36, 0x3e]),
    };
    for (prefix, one_in) in [
        (0x66, 4),
        (0x67, 6),
        (segment, 6),
        (0xf0, 8),
        (0xf3, 4),
        (0xf2, 8),
    ] {
        if random.chance(one_in) {
            bytes.push(prefix);
        }
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
        _ => bytes.push(random.pick(&ONE_BYTE)),
    }
    let operands_at = bytes.len();
    bytes.resize_with(20, || random.byte());
    let instruction = decode(&bytes, code).ok()?;
    bytes.truncate(usize::from(instruction.length));
    Some(Candidate {
        bytes,
        operands_at,
        code,
        instruction,
    })
}

/// Makes an instruction's memory operand point into the arena, by its base or its displacement.
/// `None` if that is not possible.
fn aim(
    random: &mut Random,
    native: &Native,
    candidate: &mut Candidate,
    memory: &Memory,
    state: &mut State,
) -> Option<()> {
    let base = match (candidate.code, memory.segment) {
        (CodeSize::Bits64, SegmentRegister::Gs) => native.gs_base(),
        (CodeSize::Bits64, _) => 0,
        _ => native.address(),
    };
    let middle = native.arena() + ARENA_LENGTH as u64 / 2 - 64 + random.below(128);
    // Vector moves want their alignment mostly.
    let middle = match candidate.instruction.operation {
        Operation::Vector(_) if !random.chance(8) => middle & !0xf,
        _ => middle,
    };
    let wanted = middle.wrapping_sub(base);
    let mask = candidate.instruction.address_size.mask();
    let index = |state: &State| match memory.index {
        Some(index) => state.gprs[index.register.index()] << index.shift,
        None => 0,
    };
    // A register that is base and index can't be aimed.
    match memory.base {
        Some(Base::Register(register)) => {
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
    candidate.instruction = decode(&candidate.bytes, candidate.code).ok()?;
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

/// Registers, flags and memory for a candidate.
fn state_for(random: &mut Random, native: &Native, candidate: &mut Candidate) -> Option<State> {
    let mut state = State {
        gprs: [0; 16].map(|_| random.value()),
        flags: (random.next() & FLAGS) | 2,
        vectors: [[0; 16]; 16].map(|_| random.bytes()),
        arena: [0; ARENA_LENGTH].map(|_| random.byte()),
    };
    if candidate.code != CodeSize::Bits64 {
        state.gprs = state.gprs.map(|gpr| gpr & Size::Dword.mask());
        state.gprs[8..].fill(0);
    }
    let Instruction {
        operation,
        source,
        size,
        ..
    } = candidate.instruction;
    if let (Operation::Bit(_), Operand::Register(register)) = (operation, source) {
        // A bit inside of the arena, mostly.
        let offset = random.below(2048).wrapping_sub(1024);
        state.gprs[register.index()] = offset & size.mask();
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
    if operation == Operation::CompareExchange && random.chance(2) {
        make_equal(native, candidate, &mut state);
    }
    if candidate.code != CodeSize::Bits64 {
        state.gprs = state.gprs.map(|gpr| gpr & Size::Dword.mask());
    }
    Some(state)
}

/// Makes the accumulator equal to CMPXCHG's destination, where that is simple to find.
fn make_equal(native: &Native, candidate: &Candidate, state: &mut State) {
    let instruction = &candidate.instruction;
    let value = match instruction.destination {
        Operand::Register(register) => state.gprs[register.index()],
        Operand::Memory(Memory {
            base: Some(Base::Register(register)),
            index: None,
            displacement,
            segment,
        }) if segment != SegmentRegister::Gs && register != Gpr::Rax => {
            let linear = state.gprs[register.index()].wrapping_add(displacement);
            let linear = linear & instruction.address_size.mask();
            let arena = match candidate.code {
                CodeSize::Bits64 => native.arena(),
                _ => ARENA as u64,
            };
            let at = usize::try_from(linear - arena).unwrap();
            u64::from_le_bytes(state.arena[at..at + 8].try_into().unwrap())
        }
        _ => return,
    };
    state.gprs[0] = value;
}

/// The flags that the SDM leaves undefined after this.
fn undefined_flags(operation: Operation) -> u64 {
    match operation {
        Operation::Test
        | Operation::Arithmetic(Arithmetic::And | Arithmetic::Or | Arithmetic::Xor) => ADJUST,
        // PF, AF, SF, OF; SDM vol. 2: "ZF is unaffected".
        Operation::Bit(_) => 0x894,
        _ => 0,
    }
}

/// Executes one random instruction on both. `None` if there was nothing to compare, else what it
/// did and whether it had an operand in memory.
fn compare(random: &mut Random, native: &Native, code: CodeSize) -> Option<(Operation, bool)> {
    let mut candidate = candidate(random, code)?;
    let state = state_for(random, native, &mut candidate)?;
    let Candidate {
        bytes, instruction, ..
    } = &candidate;
    let mut emulated = Emulated::new(native, code, &state);
    let start = emulated.rip;
    match execute(instruction, &mut emulated) {
        Ok(progress) => assert_eq!(progress, Progress::Retired),
        // A bit offset or an index led out of the arena, or CS was to be written: nothing for the
        // CPU to try.
        Err(Stop::Machine(Outside) | Stop::Fault(_)) => return None,
        Err(Stop::Unsupported) => {
            let is_vector = matches!(instruction.operation, Operation::Vector(_));
            assert!(
                is_vector && code != CodeSize::Bits64,
                "{bytes:02x?}: {instruction:x?}"
            );
            return None;
        }
    }
    let mut real = native.run(code, bytes, &state);
    let undefined = undefined_flags(instruction.operation);
    let mut ours = emulated.state;
    ours.flags = ours.flags & FLAGS & !undefined;
    real.flags &= !undefined;
    let case = format!(
        "{bytes:02x?} in {code:?}: {instruction:x?}\nfrom {:x?}",
        state.gprs
    );
    assert_eq!(ours.gprs, real.gprs, "{case}");
    assert_eq!(ours.flags, real.flags, "{case}");
    assert_eq!(ours.vectors, real.vectors, "{case}");
    assert!(ours.arena == real.arena, "{case}: memory differs");
    assert_eq!(emulated.rip, start + bytes.len() as u64);
    let in_memory = [instruction.destination, instruction.source]
        .iter()
        .any(|operand| matches!(operand, Operand::Memory(_)));
    Some((instruction.operation, in_memory))
}

#[test]
fn the_cpu_comes_to_the_same() {
    // The segments are the process's: one test after the other.
    let native = Native::new();
    for (seed, code) in [
        (4, CodeSize::Bits64),
        (5, CodeSize::Bits32),
        (6, CodeSize::Bits16),
    ] {
        let mut random = Random(from_environment("RVISOR_SEED", seed));
        // In memory, and in registers only.
        let mut tally = std::collections::BTreeMap::<String, (u64, u64)>::new();
        let cases = from_environment("RVISOR_CASES", 60_000);
        for _ in 0..cases {
            let Some((operation, in_memory)) = compare(&mut random, &native, code) else {
                continue;
            };
            let count = tally.entry(format!("{operation:?}")).or_default();
            match in_memory {
                true => count.0 += 1,
                false => count.1 += 1,
            }
        }
        let compared: u64 = tally.values().map(|count| count.0 + count.1).sum();
        println!("{code:?}: {compared} of {cases} compared: {tally:?}");
        // 4 kinds of MOV, TEST, 3 exchanges, 8, 4, 4 and 5 of the others; 3 of vectors, which
        // outside of 64-bit mode can be stopped only.
        assert_eq!(tally.len(), if code == CodeSize::Bits64 { 32 } else { 29 });
        assert!(tally.values().all(|count| count.0 > 50), "{tally:?}");
        every_pair_of_bytes(&native, code);
    }
}

/// One instruction on bytes in registers, op cl, dl: the CPU's answers for all pairs.
fn every_pair_of_bytes(native: &Native, code: CodeSize) {
    let mut state = State {
        gprs: [0; 16],
        flags: 2,
        vectors: [[0; 16]; 16],
        arena: [0; ARENA_LENGTH],
    };
    // All of them where it is fast.
    let step = match (cfg!(debug_assertions), code) {
        (false, CodeSize::Bits64) => 1,
        _ => 61,
    };
    for opcode in [0x00, 0x08, 0x10, 0x18, 0x20, 0x28, 0x30, 0x38, 0x84] {
        let bytes = [opcode, 0xd1];
        let instruction = decode(&bytes, code).unwrap();
        assert_eq!(instruction.size, Size::Byte);
        let undefined = undefined_flags(instruction.operation);
        for pair in (0..=u16::MAX).step_by(step) {
            let [a, b] = pair.to_le_bytes();
            state.gprs[1] = u64::from(a);
            state.gprs[2] = u64::from(b);
            state.flags = 2 | ((u64::from(a ^ b) >> 3) & CARRY);
            let mut emulated = Emulated::new(native, code, &state);
            assert!(execute(&instruction, &mut emulated).is_ok());
            let real = native.run(code, &bytes, &state);
            assert_eq!(emulated.state.gprs, real.gprs, "{bytes:02x?} {a} {b}");
            assert_eq!(
                emulated.state.flags & FLAGS & !undefined,
                real.flags & !undefined,
                "{bytes:02x?} {a} {b}"
            );
        }
    }
}
