// SPDX-License-Identifier: GPL-2.0

//! PUSH, POP and near CALL (SDM vol. 1, 6.2 and 6.4).

use super::{
    address::{check_branch, linear, stack_size},
    next_instruction,
    operand::{place, read, set_register, write_memory, Intent, Place},
    retire, Outcome,
};
use crate::{
    emulate::{
        instruction::{Base, Gpr, Instruction, Memory, Operand},
        machine::{Machine, Progress, Stop},
    },
    x86::segment::SegmentRegister,
};

const POINTER: Place = Place::Register(Gpr::Rsp);

/// PUSH. What is pushed is found and read with the stack pointer as it was.
pub(super) fn push<M: Machine>(instruction: &Instruction, machine: &mut M) -> Outcome<M> {
    let (size, source) = (instruction.size, &instruction.source);
    let source = place(instruction, machine, source, size, Intent::Read)?;
    let width = stack_size(machine);
    let old = read(machine, POINTER, width, Intent::Read)?;
    let new = old.wrapping_sub(size.bytes() as u64) & width.mask();
    let top = linear(machine, SegmentRegister::Ss, new, size, Intent::Write)?;
    if let Place::Memory(_) = source {
        // A device that is read must not be read for a PUSH that then faults.
        machine
            .prepare_write(top, size.bytes())
            .map_err(Stop::Machine)?;
    }
    let value = read(machine, source, size, Intent::Read)?;
    if !write_memory(instruction, machine, Place::Memory(top), None, value)? {
        return Ok(Progress::Again);
    }
    set_register(machine, POINTER, width, new);
    retire(instruction, machine)
}

/// POP. A destination in memory is found with the stack pointer as it is after.
pub(super) fn pop<M: Machine>(instruction: &Instruction, machine: &mut M) -> Outcome<M> {
    let size = instruction.size;
    let width = stack_size(machine);
    let old = read(machine, POINTER, width, Intent::Read)?;
    let new = old.wrapping_add(size.bytes() as u64) & width.mask();
    let top = linear(machine, SegmentRegister::Ss, old, size, Intent::Read)?;
    let destination = match instruction.destination {
        Operand::Memory(memory) => Operand::Memory(Memory {
            displacement: match memory.base {
                Some(Base::Register(Gpr::Rsp)) => {
                    memory.displacement.wrapping_add(new.wrapping_sub(old))
                }
                _ => memory.displacement,
            },
            ..memory
        }),
        other => other,
    };
    let target = place(instruction, machine, &destination, size, Intent::Write)?;
    if let Place::Memory(linear) = target {
        machine
            .prepare_write(linear, size.bytes())
            .map_err(Stop::Machine)?;
    }
    let value = read(machine, Place::Memory(top), size, Intent::Read)?;
    if !write_memory(instruction, machine, target, None, value)? {
        return Ok(Progress::Again);
    }
    set_register(machine, POINTER, width, new);
    // The destination comes last: POP into the stack pointer is not moved on.
    set_register(machine, target, size, value);
    retire(instruction, machine)
}

/// Near CALL. The target is found with the stack pointer as it was, and checked before anything is pushed.
pub(super) fn call<M: Machine>(instruction: &Instruction, machine: &mut M) -> Outcome<M> {
    let (size, source) = (instruction.size, &instruction.source);
    let source = place(instruction, machine, source, size, Intent::Read)?;
    let next = next_instruction(instruction, machine);
    let width = stack_size(machine);
    let old = read(machine, POINTER, width, Intent::Read)?;
    let new = old.wrapping_sub(size.bytes() as u64) & width.mask();
    let top = linear(machine, SegmentRegister::Ss, new, size, Intent::Write)?;
    if let Place::Memory(_) = source {
        // As with PUSH.
        machine
            .prepare_write(top, size.bytes())
            .map_err(Stop::Machine)?;
    }
    let value = read(machine, source, size, Intent::Read)?;
    let target = match source {
        Place::Immediate(_) => next.wrapping_add(value) & size.mask(),
        _ => value,
    };
    check_branch(machine, target)?;
    let pushed = next & size.mask();
    if !write_memory(instruction, machine, Place::Memory(top), None, pushed)? {
        return Ok(Progress::Again);
    }
    set_register(machine, POINTER, width, new);
    machine.set_rip(target);
    Ok(Progress::Retired)
}
