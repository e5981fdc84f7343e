// SPDX-License-Identifier: GPL-2.0

//! Instructions that compute: each reads, writes memory at most once, and then commits.

use super::{
    flags::{self, Computed},
    operand::{place, read, set_register, write_memory, Intent, Place},
    retire, Outcome,
};
use crate::emulate::{
    instruction::{Arithmetic, Instruction, Unary},
    machine::{Machine, Progress, Stop},
};

/// A destination with its value.
pub(super) struct Destination {
    pub(super) place: Place,
    pub(super) value: u64,
}

/// Finds the destination and the source, then reads them.
pub(super) fn operands<M: Machine>(
    instruction: &Instruction,
    machine: &mut M,
    intent: Intent,
) -> Result<(Destination, u64), Stop<M::Stop>> {
    let Instruction {
        size,
        destination,
        source,
        ..
    } = instruction;
    let target = place(instruction, machine, destination, *size, intent)?;
    let source = place(instruction, machine, source, *size, Intent::Read)?;
    let value = read(machine, target, *size, intent)?;
    let source = read(machine, source, *size, Intent::Read)?;
    let destination = Destination {
        place: target,
        value,
    };
    Ok((destination, source))
}

/// Replaces the flags in `affected` by those in `flags`.
pub(super) fn set_flags<M: Machine>(machine: &mut M, affected: u64, flags: u64) {
    let kept = machine.rflags() & !affected;
    machine.set_rflags(kept | (flags & affected));
}

/// Writes a destination that is changed, then its flags.
pub(super) fn commit<M: Machine>(
    instruction: &Instruction,
    machine: &mut M,
    destination: &Destination,
    computed: Computed,
    affected: u64,
) -> Outcome<M> {
    let Destination { place, value } = *destination;
    if !write_memory(instruction, machine, place, Some(value), computed.value)? {
        return Ok(Progress::Again);
    }
    set_register(machine, place, instruction.size, computed.value);
    set_flags(machine, affected, computed.flags);
    retire(instruction, machine)
}

/// ADD to CMP.
pub(super) fn arithmetic<M: Machine>(
    instruction: &Instruction,
    machine: &mut M,
    operation: Arithmetic,
) -> Outcome<M> {
    let intent = match operation {
        Arithmetic::Cmp => Intent::Read,
        _ => Intent::Write,
    };
    let size = instruction.size;
    let (destination, b) = operands(instruction, machine, intent)?;
    let a = destination.value;
    let carry = machine.rflags() & flags::CARRY != 0;
    let computed = match operation {
        Arithmetic::Add => flags::add(a, b, false, size),
        Arithmetic::Adc => flags::add(a, b, carry, size),
        Arithmetic::Sub | Arithmetic::Cmp => flags::subtract(a, b, false, size),
        Arithmetic::Sbb => flags::subtract(a, b, carry, size),
        Arithmetic::Or => flags::logic(a | b, size),
        Arithmetic::And => flags::logic(a & b, size),
        Arithmetic::Xor => flags::logic(a ^ b, size),
    };
    match operation {
        Arithmetic::Cmp => {
            set_flags(machine, flags::STATUS, computed.flags);
            retire(instruction, machine)
        }
        _ => commit(instruction, machine, &destination, computed, flags::STATUS),
    }
}

/// TEST.
pub(super) fn test<M: Machine>(instruction: &Instruction, machine: &mut M) -> Outcome<M> {
    let (destination, source) = operands(instruction, machine, Intent::Read)?;
    let computed = flags::logic(destination.value & source, instruction.size);
    set_flags(machine, flags::STATUS, computed.flags);
    retire(instruction, machine)
}

/// INC, DEC, NOT, NEG.
pub(super) fn unary<M: Machine>(
    instruction: &Instruction,
    machine: &mut M,
    operation: Unary,
) -> Outcome<M> {
    let size = instruction.size;
    let place = place(
        instruction,
        machine,
        &instruction.destination,
        size,
        Intent::Write,
    )?;
    let value = read(machine, place, size, Intent::Write)?;
    let (computed, affected) = match operation {
        Unary::Inc => (
            flags::add(value, 1, false, size),
            flags::STATUS & !flags::CARRY,
        ),
        Unary::Dec => (
            flags::subtract(value, 1, false, size),
            flags::STATUS & !flags::CARRY,
        ),
        Unary::Not => (flags::logic(!value, size), 0),
        Unary::Neg => (flags::subtract(0, value, false, size), flags::STATUS),
    };
    let destination = Destination { place, value };
    commit(instruction, machine, &destination, computed, affected)
}
