// SPDX-License-Identifier: GPL-2.0

//! The emulator against this machine's CPU, in 64-bit mode.
//!
//! Random instructions of every kind that the emulator knows are executed by it and by the CPU,
//! with the same registers, flags and memory. Registers, memory, RIP's advance and all flags that
//! the SDM defines must come out the same.

use crate::{
    native::{Native, State, ARENA_LENGTH, FLAGS},
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
    arena: u64,
    gs_base: u64,
}

impl Emulated {
    fn bytes(&mut self, linear: Gva, length: usize) -> Result<&mut [u8], Outside> {
        let start = usize::try_from(linear.raw().wrapping_sub(self.arena)).map_err(|_| Outside)?;
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
        Segment {
            base: match register {
                SegmentRegister::Gs => self.gs_base,
                _ => 0,
            },
            access: AccessRights(AccessRights::UNUSABLE),
            ..Segment::default()
        }
    }

    fn mode(&mut self) -> Mode {
        Mode {
            code: CodeSize::Bits64,
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
/// Opcodes with neither ModRM nor an address in the instruction.
const WITHOUT_MODRM: [u8; 24] = [
    0x04, 0x05, 0x0c, 0x15, 0x1c, 0x25, 0x2c, 0x3d, 0xa4, 0xa5, 0xa6, 0xa7, 0xae, 0xaf, 0xaa, 0xab,
    0xac, 0xad, 0xa8, 0xa9, 0xb3, 0xb7, 0xb8, 0xbc,
];

/// An instruction's bytes, decoded, and where in them ModRM or the address is.
struct Candidate {
    bytes: Vec<u8>,
    operands_at: usize,
    instruction: Instruction,
}

fn candidate(random: &mut Random) -> Option<Candidate> {
    let mut bytes = Vec::new();
    for (prefix, one_in) in [
        (0x66, 4),
        (0x67, 6),
        (0x65, 6),
        (0xf0, 8),
        (0xf3, 4),
        (0xf2, 8),
    ] {
        if random.chance(one_in) {
            bytes.push(prefix);
        }
    }
    if random.chance(2) {
        bytes.push(0x40 | (random.byte() & 0xf));
    }
    match random.below(8) {
        0 => bytes.push(random.pick(&WITHOUT_MODRM)),
        1 => bytes.push(random.pick(&[0xa0, 0xa1, 0xa2, 0xa3])),
        2 => bytes.extend_from_slice(&[0x0f, 0x38, random.pick(&[0xf0, 0xf1])]),
        3 | 4 => bytes.extend_from_slice(&[0x0f, random.pick(&TWO_BYTES)]),
        _ => bytes.push(random.pick(&ONE_BYTE)),
    }
    let operands_at = bytes.len();
    bytes.resize_with(20, || random.byte());
    let instruction = decode(&bytes, CodeSize::Bits64).ok()?;
    bytes.truncate(usize::from(instruction.length));
    Some(Candidate {
        bytes,
        operands_at,
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
    let base = match memory.segment {
        SegmentRegister::Gs => native.gs_base(),
        _ => 0,
    };
    let middle = native.arena() + ARENA_LENGTH as u64 / 2 - 64 + random.below(128);
    let wanted = middle.wrapping_sub(base);
    let mask = candidate.instruction.address_size.mask();
    let index = |state: &State| match memory.index {
        Some(index) => state.gprs[index.register.index()] << index.shift,
        None => 0,
    };
    // A register that is base and index can't be aimed; small, the index does not matter.
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
    let opcode = candidate.bytes[candidate.operands_at - 1];
    let is_offset = matches!(opcode, 0xa0..=0xa3) && memory.base.is_none();
    let (at, length) = match (memory.base, is_offset && candidate.is_one_byte()) {
        (Some(_), _) => (candidate.operands_at + 1, 4),
        (None, true) => (
            candidate.operands_at,
            candidate.instruction.address_size.bytes(),
        ),
        // After ModRM and SIB.
        (None, false) => (candidate.operands_at + 2, 4),
    };
    candidate.bytes[at..at + length].copy_from_slice(&displacement.to_le_bytes()[..length]);
    candidate.instruction = decode(&candidate.bytes, CodeSize::Bits64).ok()?;
    Some(())
}

impl Candidate {
    /// Whether the opcode has one byte: none of the others' last bytes is a one-byte MOV's.
    fn is_one_byte(&self) -> bool {
        let before = self.operands_at.checked_sub(2).map(|at| self.bytes[at]);
        before != Some(0x0f)
    }
}

/// Registers, flags and memory for a candidate.
fn state_for(random: &mut Random, native: &Native, candidate: &mut Candidate) -> Option<State> {
    let mut state = State {
        gprs: [0; 16].map(|_| random.value()),
        flags: (random.next() & FLAGS) | 2,
        arena: [0; ARENA_LENGTH].map(|_| random.byte()),
    };
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
        make_equal(native, &candidate.instruction, &mut state);
    }
    Some(state)
}

/// Makes the accumulator equal to CMPXCHG's destination, where that is simple to find.
fn make_equal(native: &Native, instruction: &Instruction, state: &mut State) {
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
            let at = usize::try_from(linear - native.arena()).unwrap();
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

#[test]
fn the_cpu_comes_to_the_same() {
    let mut random = Random(from_environment("RVISOR_SEED", 4));
    let native = Native::new();
    let mut tally = std::collections::BTreeMap::<String, (u64, u64)>::new();
    let mut outside = 0;
    for _ in 0..from_environment("RVISOR_CASES", 60_000) {
        let Some(mut candidate) = candidate(&mut random) else {
            continue;
        };
        let Some(state) = state_for(&mut random, &native, &mut candidate) else {
            continue;
        };
        let Candidate {
            bytes, instruction, ..
        } = &candidate;
        let mut emulated = Emulated {
            state: state.clone(),
            rip: native.instruction_at(),
            arena: native.arena(),
            gs_base: native.gs_base(),
        };
        match execute(instruction, &mut emulated) {
            Ok(progress) => assert_eq!(progress, Progress::Retired),
            // A bit offset or an index led out of the arena: nothing for the CPU to try.
            Err(Stop::Machine(Outside) | Stop::Fault(_)) => {
                outside += 1;
                continue;
            }
            Err(Stop::Unsupported) => panic!("{bytes:02x?}: {instruction:x?}"),
        }
        let mut real = native.run(bytes, &state);
        let undefined = undefined_flags(instruction.operation);
        let mut ours = emulated.state;
        ours.flags = ours.flags & FLAGS & !undefined;
        real.flags &= !undefined;
        let case = format!("{bytes:02x?}: {instruction:x?}\nfrom {:x?}", state.gprs);
        assert_eq!(ours.gprs, real.gprs, "{case}");
        assert_eq!(ours.flags, real.flags, "{case}");
        assert!(ours.arena == real.arena, "{case}: memory differs");
        assert_eq!(emulated.rip, native.instruction_at() + bytes.len() as u64);
        let in_memory = [instruction.destination, instruction.source]
            .iter()
            .any(|operand| matches!(operand, Operand::Memory(_)));
        let count = tally
            .entry(format!("{:?}", instruction.operation))
            .or_default();
        match in_memory {
            true => count.0 += 1,
            false => count.1 += 1,
        }
    }
    println!("in memory and in registers: {tally:?}; {outside} led out of the arena");
    // 4 kinds of MOV, TEST, 3 exchanges, 8, 4, 4 and 5 of the others.
    assert_eq!(tally.len(), 29);
    assert!(tally.values().all(|count| count.0 > 50), "{tally:?}");
}

#[test]
fn every_pair_of_bytes_through_every_arithmetic() {
    let native = Native::new();
    let mut state = State {
        gprs: [0; 16],
        flags: 2,
        arena: [0; ARENA_LENGTH],
    };
    // One instruction on bytes in registers: op cl, dl. The CPU's answers for all pairs and CF.
    let opcodes = [0x00, 0x08, 0x10, 0x18, 0x20, 0x28, 0x30, 0x38, 0x84];
    for opcode in opcodes {
        let bytes = [opcode, 0xd1];
        let instruction = decode(&bytes, CodeSize::Bits64).unwrap();
        assert_eq!(instruction.size, Size::Byte);
        let undefined = undefined_flags(instruction.operation);
        for pair in (0..=u16::MAX).step_by(if cfg!(debug_assertions) { 7 } else { 1 }) {
            let [a, b] = pair.to_le_bytes();
            state.gprs[1] = u64::from(a);
            state.gprs[2] = u64::from(b);
            state.flags = 2 | ((u64::from(a ^ b) >> 3) & CARRY);
            let mut emulated = Emulated {
                state: state.clone(),
                rip: 0,
                arena: native.arena(),
                gs_base: 0,
            };
            assert!(execute(&instruction, &mut emulated).is_ok());
            let real = native.run(&bytes, &state);
            assert_eq!(emulated.state.gprs, real.gprs, "{bytes:02x?} {a} {b}");
            assert_eq!(
                emulated.state.flags & FLAGS & !undefined,
                real.flags & !undefined,
                "{bytes:02x?} {a} {b}"
            );
        }
    }
}
