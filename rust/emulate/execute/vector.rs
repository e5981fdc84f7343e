// SPDX-License-Identifier: GPL-2.0

//! Moves from and to vector registers.

use super::{
    address::{general_protection, linear_address},
    operand::{set_register, Intent, Place},
    retire, Outcome,
};
use crate::{
    emulate::{
        instruction::{Encoding, Instruction, Memory, Operand, Size, VectorMove},
        machine::{Machine, Stop, Vector},
    },
    x86::address::Gva,
};

/// The move. What is not moved of a vector register's lower 256 bits becomes 0; SSE's encodings
/// write the lower 128 only, of which a half load keeps the other half.
pub(super) fn vector<M: Machine>(
    instruction: &Instruction,
    machine: &mut M,
    kind: VectorMove,
    encoding: Encoding,
) -> Outcome<M> {
    let size = instruction.size;
    if let Operand::Vector(number) = instruction.destination {
        // Whether there are vector registers is told by reading one, and must be known before a
        // device is read.
        machine.vector(number, encoding).ok_or(Stop::Unsupported)?;
    }
    let value = source(instruction, machine, kind, encoding)?;
    match instruction.destination {
        Operand::Vector(number) => machine.set_vector(number, value, encoding),
        Operand::Register(register) => {
            let [low, ..] = value;
            set_register(machine, Place::Register(register), size, low);
        }
        Operand::Memory(memory) => {
            let linear = address(instruction, machine, &memory, kind, Intent::Write)?;
            let bytes = bytes_of(value);
            let data = bytes.get(..size.bytes()).ok_or(Stop::Unsupported)?;
            machine.write(linear, data).map_err(Stop::Machine)?;
        }
        _ => return Err(Stop::Unsupported),
    }
    retire(instruction, machine)
}

/// What is to be written.
fn source<M: Machine>(
    instruction: &Instruction,
    machine: &mut M,
    kind: VectorMove,
    encoding: Encoding,
) -> Result<Vector, Stop<M::Stop>> {
    let size = instruction.size;
    let value = match instruction.source {
        Operand::Vector(number) => machine.vector(number, encoding).ok_or(Stop::Unsupported)?,
        Operand::Register(register) => [machine.gpr(register), 0, 0, 0],
        Operand::Memory(memory) => {
            // As above: before a device is read.
            let [other_low, other_high, ..] = match kind {
                VectorMove::LoadLow { other } | VectorMove::LoadHigh { other } => {
                    machine.vector(other, encoding).ok_or(Stop::Unsupported)?
                }
                _ => [0; 4],
            };
            let linear = address(instruction, machine, &memory, kind, Intent::Read)?;
            let mut bytes = [0; 32];
            let data = bytes.get_mut(..size.bytes()).ok_or(Stop::Unsupported)?;
            machine.read(linear, data).map_err(Stop::Machine)?;
            let read = vector_of(&bytes);
            let [half, ..] = read;
            return Ok(match kind {
                VectorMove::LoadLow { .. } => [half, other_high, 0, 0],
                VectorMove::LoadHigh { .. } => [other_low, half, 0, 0],
                _ => read,
            });
        }
        _ => return Err(Stop::Unsupported),
    };
    let [low, high, ..] = value;
    Ok(match (kind, size) {
        (VectorMove::StoreHigh, _) => [high, 0, 0, 0],
        (_, Size::Yword) => value,
        (_, Size::Oword) => [low, high, 0, 0],
        _ => [low & size.mask(), 0, 0, 0],
    })
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
    let inside = match instruction.size {
        Size::Yword => 0x1f,
        _ => 0xf,
    };
    if kind == VectorMove::Aligned && linear.raw() & inside != 0 {
        return Err(Stop::Fault(general_protection(machine.mode())));
    }
    Ok(linear)
}

fn bytes_of(value: Vector) -> [u8; 32] {
    let mut bytes = [0; 32];
    let all = value.into_iter().flat_map(u64::to_le_bytes);
    for (to, from) in bytes.iter_mut().zip(all) {
        *to = from;
    }
    bytes
}

fn vector_of(bytes: &[u8; 32]) -> Vector {
    let mut value = [0; 4];
    for (part, bytes) in value.iter_mut().zip(bytes.chunks_exact(8)) {
        *part = bytes.try_into().map_or(0, u64::from_le_bytes);
    }
    value
}
