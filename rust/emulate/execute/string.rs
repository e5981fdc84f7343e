// SPDX-License-Identifier: GPL-2.0

//! String instructions.

use super::{
    arithmetic::{operands, set_flags},
    flags,
    operand::{place, read, set_register, write_memory, Intent, Place},
    retire, Outcome,
};
use crate::emulate::{
    instruction::{Base, Gpr, Instruction, Memory, Operand, Repeat, StringOperation},
    machine::{Machine, Progress, Stop},
};

/// The most bytes that one call moves.
const MOST_BYTES: usize = 4096;

const COUNTER: Place = Place::Register(Gpr::Rcx);

/// How an iteration ended.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Iteration {
    /// It is committed, except for the counter.
    Done,
    /// It is committed, and what it compared was equal or not.
    Compared { is_equal: bool },
    /// Nothing is committed.
    Again,
}

impl Iteration {
    /// Whether no further one follows, whatever the count.
    fn is_last(self, repeat: Repeat) -> bool {
        matches!(
            (self, repeat),
            (Self::Compared { is_equal: false }, Repeat::WhileEqual)
                | (Self::Compared { is_equal: true }, Repeat::WhileUnequal)
        )
    }
}

/// String instructions: iterations until the count is used up or a comparison's result ends them,
/// or until [`Machine::may_continue`] or [`MOST_BYTES`] interrupts.
pub(super) fn string<M: Machine>(
    instruction: &Instruction,
    machine: &mut M,
    operation: StringOperation,
) -> Outcome<M> {
    let repeat = instruction.repeat;
    if repeat == Repeat::Once {
        return match iterate(instruction, machine, operation)? {
            Iteration::Again => Ok(Progress::Again),
            Iteration::Done | Iteration::Compared { .. } => retire(instruction, machine),
        };
    }
    let width = instruction.address_size;
    let most = MOST_BYTES.wrapping_shr(instruction.size.bytes().trailing_zeros());
    let mut count = read(machine, COUNTER, width, Intent::Read)?;
    for _ in 0..most {
        if count == 0 {
            return retire(instruction, machine);
        }
        let iteration = iterate(instruction, machine, operation)?;
        if iteration == Iteration::Again {
            return Ok(Progress::Again);
        }
        count = count.wrapping_sub(1);
        set_register(machine, COUNTER, width, count);
        if count == 0 || iteration.is_last(repeat) {
            return retire(instruction, machine);
        }
        if !machine.may_continue() {
            break;
        }
    }
    Ok(Progress::Again)
}

/// One iteration: the counter is the caller's.
fn iterate<M: Machine>(
    instruction: &Instruction,
    machine: &mut M,
    operation: StringOperation,
) -> Result<Iteration, Stop<M::Stop>> {
    let iteration = match operation {
        StringOperation::Movs | StringOperation::Stos | StringOperation::Lods => {
            transfer(instruction, machine)?
        }
        StringOperation::Cmps | StringOperation::Scas => compare(instruction, machine)?,
        StringOperation::Ins => input(instruction, machine)?,
        StringOperation::Outs => output(instruction, machine)?,
    };
    if iteration != Iteration::Again {
        step(instruction, machine, &instruction.source);
        step(instruction, machine, &instruction.destination);
    }
    Ok(iteration)
}

/// MOVS, STOS, LODS.
fn transfer<M: Machine>(
    instruction: &Instruction,
    machine: &mut M,
) -> Result<Iteration, Stop<M::Stop>> {
    let Instruction {
        size,
        destination,
        source,
        ..
    } = instruction;
    let to = place(instruction, machine, destination, *size, Intent::Write)?;
    let from = place(instruction, machine, source, *size, Intent::Read)?;
    if let (Place::Memory(_), Place::Memory(linear)) = (from, to) {
        // Reading a device may change it: that must not happen for an iteration that then faults.
        machine
            .prepare_write(linear, size.bytes())
            .map_err(Stop::Machine)?;
    }
    let value = read(machine, from, *size, Intent::Read)?;
    if !write_memory(instruction, machine, to, None, value)? {
        return Ok(Iteration::Again);
    }
    set_register(machine, to, *size, value);
    Ok(Iteration::Done)
}

/// CMPS, SCAS.
fn compare<M: Machine>(
    instruction: &Instruction,
    machine: &mut M,
) -> Result<Iteration, Stop<M::Stop>> {
    let size = instruction.size;
    let (a, b) = operands(instruction, machine, Intent::Read)?;
    let computed = flags::subtract(a.value, b, false, size);
    set_flags(machine, flags::STATUS, computed.flags);
    Ok(Iteration::Compared {
        is_equal: a.value == b,
    })
}

/// The port's number.
fn port<M: Machine>(machine: &mut M) -> u16 {
    let [low, high, ..] = machine.gpr(Gpr::Rdx).to_le_bytes();
    u16::from_le_bytes([low, high])
}

/// INS.
fn input<M: Machine>(
    instruction: &Instruction,
    machine: &mut M,
) -> Result<Iteration, Stop<M::Stop>> {
    let Instruction {
        size, destination, ..
    } = instruction;
    let to = place(instruction, machine, destination, *size, Intent::Write)?;
    let Place::Memory(linear) = to else {
        return Err(Stop::Unsupported);
    };
    machine
        .prepare_write(linear, size.bytes())
        .map_err(Stop::Machine)?;
    let mut bytes = [0; 8];
    let data = bytes.get_mut(..size.bytes()).ok_or(Stop::Unsupported)?;
    let port = port(machine);
    machine.input(port, data).map_err(Stop::Machine)?;
    let value = u64::from_le_bytes(bytes);
    match write_memory(instruction, machine, to, None, value)? {
        true => Ok(Iteration::Done),
        false => Ok(Iteration::Again),
    }
}

/// OUTS.
fn output<M: Machine>(
    instruction: &Instruction,
    machine: &mut M,
) -> Result<Iteration, Stop<M::Stop>> {
    let Instruction { size, source, .. } = instruction;
    let from = place(instruction, machine, source, *size, Intent::Read)?;
    let bytes = read(machine, from, *size, Intent::Read)?.to_le_bytes();
    let data = bytes.get(..size.bytes()).ok_or(Stop::Unsupported)?;
    let port = port(machine);
    machine.output(port, data).map_err(Stop::Machine)?;
    Ok(Iteration::Done)
}

/// Moves an operand's address register on by DF, if the operand is in memory.
fn step<M: Machine>(instruction: &Instruction, machine: &mut M, operand: &Operand) {
    let Operand::Memory(Memory {
        base: Some(Base::Register(register)),
        ..
    }) = *operand
    else {
        return;
    };
    let bytes = instruction.size.bytes() as u64;
    let old = machine.gpr(register);
    let new = match machine.rflags() & flags::DIRECTION {
        0 => old.wrapping_add(bytes),
        _ => old.wrapping_sub(bytes),
    };
    let register = Place::Register(register);
    set_register(machine, register, instruction.address_size, new);
}
