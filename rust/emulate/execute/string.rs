// SPDX-License-Identifier: GPL-2.0

//! String instructions.

use super::{
    flags,
    operand::{place, read, set_register, write_memory, Intent, Place},
    retire, Outcome,
};
use crate::emulate::{
    instruction::{Gpr, Instruction, Operand, Repeat},
    machine::{Machine, Progress, Stop},
};

/// The most bytes that one call moves.
const MOST_BYTES: usize = 4096;

const COUNTER: Place = Place::Register(Gpr::Rcx);

/// MOVS, STOS and LODS: iterations until the count is used up, or [`Machine::may_continue`] or
/// [`MOST_BYTES`] ends them.
pub(super) fn string<M: Machine>(instruction: &Instruction, machine: &mut M) -> Outcome<M> {
    if instruction.repeat == Repeat::Once {
        if !iterate(instruction, machine)? {
            return Ok(Progress::Again);
        }
        return retire(instruction, machine);
    }
    let width = instruction.address_size;
    let most = MOST_BYTES.wrapping_shr(instruction.size.bytes().trailing_zeros());
    let mut count = read(machine, COUNTER, width, Intent::Read)?;
    for _ in 0..most {
        if count == 0 {
            return retire(instruction, machine);
        }
        if !iterate(instruction, machine)? {
            return Ok(Progress::Again);
        }
        count = count.wrapping_sub(1);
        set_register(machine, COUNTER, width, count);
        if count != 0 && !machine.may_continue() {
            return Ok(Progress::Again);
        }
    }
    match count {
        0 => retire(instruction, machine),
        _ => Ok(Progress::Again),
    }
}

/// One iteration: the counter is the caller's.
fn iterate<M: Machine>(instruction: &Instruction, machine: &mut M) -> Result<bool, Stop<M::Stop>> {
    let Instruction {
        size,
        destination,
        source,
        ..
    } = instruction;
    // Both addresses are checked before the first access.
    let to = place(instruction, machine, destination, *size, Intent::Write)?;
    let from = place(instruction, machine, source, *size, Intent::Read)?;
    let value = read(machine, from, *size, Intent::Read)?;
    if !write_memory(instruction, machine, to, None, value)? {
        return Ok(false);
    }
    set_register(machine, to, *size, value);
    step(instruction, machine, source, Gpr::Rsi);
    step(instruction, machine, destination, Gpr::Rdi);
    Ok(true)
}

/// Moves an operand's register on by DF, if the operand is in memory.
fn step<M: Machine>(instruction: &Instruction, machine: &mut M, operand: &Operand, register: Gpr) {
    if !matches!(operand, Operand::Memory(_)) {
        return;
    }
    let bytes = instruction.size.bytes() as u64;
    let old = machine.gpr(register);
    let new = match machine.rflags() & flags::DIRECTION {
        0 => old.wrapping_add(bytes),
        _ => old.wrapping_sub(bytes),
    };
    let register = Place::Register(register);
    set_register(machine, register, instruction.address_size, new);
}
