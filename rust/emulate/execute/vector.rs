// SPDX-License-Identifier: GPL-2.0

//! Moves from and to vector registers.

use super::{
    address::{general_protection, linear_address},
    operand::{set_register, Intent, Place},
    retire, Outcome,
};
use crate::{
    emulate::{
        instruction::{Instruction, Memory, Operand, VectorMove},
        machine::{Machine, Stop},
    },
    x86::address::Gva,
};

/// The move. Where a size is less than 16 bytes, the bytes above it are 0.
pub(super) fn vector<M: Machine>(
    instruction: &Instruction,
    machine: &mut M,
    kind: VectorMove,
) -> Outcome<M> {
    let size = instruction.size;
    if let Operand::Vector(number) = instruction.destination {
        // Whether there are vector registers is told by reading one, and must be known before a
        // device is read.
        machine.vector(number).ok_or(Stop::Unsupported)?;
    }
    let value = source(instruction, machine, kind)?;
    match instruction.destination {
        Operand::Vector(number) => machine.set_vector(number, value),
        Operand::Register(register) => {
            set_register(machine, Place::Register(register), size, low_half(value));
        }
        Operand::Memory(memory) => {
            let linear = address(instruction, machine, &memory, kind, Intent::Write)?;
            let data = value.get(..size.bytes()).ok_or(Stop::Unsupported)?;
            machine.write(linear, data).map_err(Stop::Machine)?;
        }
        _ => return Err(Stop::Unsupported),
    }
    retire(instruction, machine)
}

/// The source's bytes.
fn source<M: Machine>(
    instruction: &Instruction,
    machine: &mut M,
    kind: VectorMove,
) -> Result<[u8; 16], Stop<M::Stop>> {
    let mut value = [0; 16];
    match instruction.source {
        Operand::Vector(number) => value = machine.vector(number).ok_or(Stop::Unsupported)?,
        Operand::Register(register) => {
            let bytes = machine.gpr(register).to_le_bytes();
            for (to, from) in value.iter_mut().zip(bytes) {
                *to = from;
            }
        }
        Operand::Memory(memory) => {
            let linear = address(instruction, machine, &memory, kind, Intent::Read)?;
            let data = value.get_mut(..instruction.size.bytes());
            machine
                .read(linear, data.ok_or(Stop::Unsupported)?)
                .map_err(Stop::Machine)?;
        }
        _ => return Err(Stop::Unsupported),
    }
    for byte in value.iter_mut().skip(instruction.size.bytes()) {
        *byte = 0;
    }
    Ok(value)
}

/// The memory operand's address, checked for its alignment too.
fn address<M: Machine>(
    instruction: &Instruction,
    machine: &mut M,
    memory: &Memory,
    kind: VectorMove,
    intent: Intent,
) -> Result<Gva, Stop<M::Stop>> {
    let linear = linear_address(instruction, machine, memory, instruction.size, intent)?;
    if kind == VectorMove::Aligned && linear.raw() & 0xf != 0 {
        return Err(Stop::Fault(general_protection(machine.mode())));
    }
    Ok(linear)
}

/// The lower half of a vector.
fn low_half(value: [u8; 16]) -> u64 {
    let [a, b, c, d, e, f, g, h, ..] = value;
    u64::from_le_bytes([a, b, c, d, e, f, g, h])
}
