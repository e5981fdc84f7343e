// SPDX-License-Identifier: GPL-2.0

//! The emulator against this machine's CPU.
//!
//! Random instructions of every kind that the emulator knows are executed by it and by the CPU,
//! with the same registers, flags, segments and memory. Registers, memory, RIP's advance and all
//! flags that the SDM defines must come out the same, or the same exception with the same error code.

mod cases;
mod machine;

use self::{
    cases::{any_state, candidate, name, state_for, Candidate, Decoded},
    machine::{Emulated, Why},
};
use crate::{
    native::{Data, Fault, Native, Setting, State, ARENA_LENGTH, FLAGS},
    random::{from_environment, Random},
};
use rvisor_core::{
    emulate::{
        decode, execute, Arithmetic, CodeSize, Operand, Operation, Progress, Size, Stop,
        StringOperation, VectorMove,
    },
    x86::vector::Exception,
};
use std::collections::BTreeMap;

const CARRY: u64 = 1;
const ADJUST: u64 = 1 << 4;

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

/// What was compared.
#[derive(Default)]
struct Tally {
    /// By operation: with an operand in memory, in registers only, and ended by an exception.
    kinds: BTreeMap<String, [u64; 3]>,
    /// By exception.
    faults: BTreeMap<u8, u64>,
}

impl Tally {
    fn fault(&mut self, fault: Option<Fault>) {
        if let Some(fault) = fault {
            *self.faults.entry(fault.vector).or_default() += 1;
        }
    }
}

/// The same exception as the CPU tells of it.
fn fault_of(exception: Exception) -> Fault {
    Fault {
        vector: exception.vector.number(),
        code: exception.error_code.unwrap_or(0),
    }
}

/// Whether two reasons for an exception may be met in either order.
fn may_differ(operation: Operation, ours: Fault, real: Fault) -> bool {
    match operation {
        // Two operands in memory.
        Operation::Push
        | Operation::Pop
        | Operation::String(StringOperation::Movs | StringOperation::Cmps) => true,
        // #SS, and #GP because it is not aligned.
        Operation::Vector(VectorMove::Aligned, _) | Operation::CompareExchangePair => {
            (ours.vector, real.vector) == (12, 13)
        }
        _ => false,
    }
}

/// Executes one random instruction on both. `false` if there was nothing to compare.
fn compare(random: &mut Random, native: &Native, code: CodeSize, tally: &mut Tally) -> bool {
    match candidate(random, native, code) {
        Decoded::Instruction(candidate) => {
            compare_execution(random, native, candidate, tally).is_some()
        }
        Decoded::Invalid(setting, bytes) => {
            let state = any_state(random, code);
            let (after, fault) = native.run(&setting, &bytes[..15], &state);
            let undefined = Fault { vector: 6, code: 0 };
            assert_eq!(fault, Some(undefined), "{bytes:02x?} in {code:?}");
            assert_eq!(after.gprs, state.gprs, "{bytes:02x?}");
            tally.fault(fault);
            true
        }
        Decoded::Unknown => false,
    }
}

fn compare_execution(
    random: &mut Random,
    native: &Native,
    mut candidate: Candidate,
    tally: &mut Tally,
) -> Option<()> {
    let state = state_for(random, native, &mut candidate)?;
    let Candidate {
        bytes,
        instruction,
        setting,
        ..
    } = &candidate;
    let mut emulated = Emulated::new(native, setting, &state);
    let start = emulated.rip;
    let ours = match execute(instruction, &mut emulated) {
        Ok(progress) => {
            assert_eq!(progress, Progress::Retired);
            None
        }
        // A bit offset or an index led out of the arena: nothing for the CPU to try.
        Err(Stop::Machine(Why::Outside)) => return None,
        Err(Stop::Fault(exception) | Stop::Machine(Why::Fault(exception))) => {
            Some(fault_of(exception))
        }
        // Around the end of the address space.
        Err(Stop::Unsupported) => return None,
    };
    let (mut real, fault) = native.run(setting, bytes, &state);
    let undefined = undefined_flags(instruction.operation);
    let length = emulated.rip.wrapping_sub(start);
    let mut after = emulated.state;
    after.flags = after.flags & FLAGS & !undefined;
    real.flags &= !undefined;
    let case = || {
        format!(
            "{bytes:02x?} in {setting:?}: {instruction:x?}\nfrom {:x?}, {:x}",
            state.gprs, state.flags
        )
    };
    match (ours, fault) {
        (Some(ours), Some(fault)) if may_differ(instruction.operation, ours, fault) => {}
        _ => assert_eq!(ours, fault, "ours and the CPU's exception: {}", case()),
    }
    assert_eq!(after.gprs, real.gprs, "{}", case());
    assert_eq!(after.flags, real.flags, "{}", case());
    assert_eq!(after.vectors, real.vectors, "{}", case());
    assert!(after.arena == real.arena, "memory differs: {}", case());
    let expected = if fault.is_some() { 0 } else { bytes.len() };
    assert_eq!(length, expected as u64, "{}", case());
    let in_memory = [instruction.destination, instruction.source]
        .iter()
        .any(|operand| matches!(operand, Operand::Memory(_)));
    let kind = match (fault.is_some(), in_memory) {
        (true, _) => 2,
        (false, true) => 0,
        (false, false) => 1,
    };
    tally.fault(ours);
    tally.kinds.entry(name(instruction.operation)).or_default()[kind] += 1;
    Some(())
}

#[test]
fn the_cpu_comes_to_the_same() {
    // The segments are the process's: one test after the other.
    let native = Native::new();
    let cases = from_environment("RVISOR_CASES", 180_000).div_ceil(3);
    for (seed, code) in [
        (4, CodeSize::Bits64),
        (5, CodeSize::Bits32),
        (6, CodeSize::Bits16),
    ] {
        let seed = from_environment("RVISOR_SEED", seed);
        println!("{code:?}: {cases} cases from RVISOR_SEED={seed}");
        let mut random = Random(seed);
        let mut tally = Tally::default();
        let (mut compared, mut tried) = (0, 0u64);
        while compared < cases {
            compared += u64::from(compare(&mut random, &native, code, &mut tally));
            tried += 1;
        }
        println!(
            "{compared} of {tried} compared; in memory, in registers, exceptions: {:?}; exceptions: {:?}",
            tally.kinds, tally.faults
        );
        check_tally(&native, code, &tally);
        every_pair_of_bytes(&native, code);
    }
}

/// Every kind was met, and every exception that there is.
fn check_tally(native: &Native, code: CodeSize, tally: &Tally) {
    // 8 of arithmetic, 4 of bits, 4 of one operand, 4 kinds of MOV, TEST, 4 exchanges, PUSH, POP, 5 of
    // strings, and 6 of vectors with SSE's encodings, 6 with VEX.
    let expected = if native.has_avx { 44 } else { 38 };
    assert_eq!(tally.kinds.len(), expected, "{:?}", tally.kinds);
    for (kind, [in_memory, _, faults]) in &tally.kinds {
        assert!(*in_memory > 20 && *faults > 0, "{kind}: {:?}", tally.kinds);
    }
    // #UD, #SS, #GP, #AC.
    let vectors: Vec<u8> = tally.faults.keys().copied().collect();
    assert_eq!(vectors, [6, 12, 13, 17], "{code:?}");
}

/// One instruction on bytes in registers, op cl, dl: the CPU's answers for all pairs.
fn every_pair_of_bytes(native: &Native, code: CodeSize) {
    let setting = Setting {
        code,
        ds: Data::Wide,
        es: Data::Wide,
        ss: Data::Wide,
    };
    let mut state = State {
        gprs: [0; 16],
        flags: 2,
        vectors: [[0; 4]; 16],
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
            let mut emulated = Emulated::new(native, &setting, &state);
            assert!(execute(&instruction, &mut emulated).is_ok());
            let (real, fault) = native.run(&setting, &bytes, &state);
            assert_eq!(fault, None, "{bytes:02x?} {a} {b}");
            assert_eq!(emulated.state.gprs, real.gprs, "{bytes:02x?} {a} {b}");
            assert_eq!(
                emulated.state.flags & FLAGS & !undefined,
                real.flags & !undefined,
                "{bytes:02x?} {a} {b}"
            );
        }
    }
}
