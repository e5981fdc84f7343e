// SPDX-License-Identifier: GPL-2.0

//! Operands' values: where they are, reading and writing them.

use super::address::linear_address;
use crate::{
    emulate::{
        instruction::{Gpr, Instruction, Operand, Operation, Size},
        machine::{Machine, Stop},
    },
    x86::address::Gva,
};

/// What an access is for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Intent {
    /// Read only.
    Read,
    /// Write, perhaps after reading it.
    Write,
}

/// Where an operand is, its address and segment checked.
#[derive(Clone, Copy)]
pub(super) enum Place {
    /// The low bits of a register.
    Register(Gpr),
    /// Bits 15:8 of a register.
    HighByte(Gpr),
    /// A value in the instruction.
    Immediate(u64),
    /// Memory.
    Memory(Gva),
}

/// Finds an operand of `size`.
pub(super) fn place<M: Machine>(
    instruction: &Instruction,
    machine: &mut M,
    operand: &Operand,
    size: Size,
    intent: Intent,
) -> Result<Place, Stop<M::Stop>> {
    match *operand {
        Operand::Register(register) => Ok(Place::Register(register)),
        Operand::HighByte(register) => Ok(Place::HighByte(register)),
        Operand::Immediate(value) => Ok(Place::Immediate(value)),
        Operand::Memory(memory) => {
            linear_address(instruction, machine, &memory, size, intent).map(Place::Memory)
        }
        // The decoder leaves out no operand that an operation uses; ports and vectors are used by
        // operations of their own.
        Operand::None | Operand::Port | Operand::Vector(_) => Err(Stop::Unsupported),
    }
}

/// The value at a place, zero-extended from `size`.
pub(super) fn read<M: Machine>(
    machine: &mut M,
    place: Place,
    size: Size,
    intent: Intent,
) -> Result<u64, Stop<M::Stop>> {
    let value = match place {
        Place::Register(register) => machine.gpr(register),
        Place::HighByte(register) => machine.gpr(register) >> 8,
        Place::Immediate(value) => value,
        Place::Memory(linear) => {
            let mut bytes = [0; 8];
            // Only vectors have more than 8 bytes.
            let data = bytes.get_mut(..size.bytes()).ok_or(Stop::Unsupported)?;
            match intent {
                Intent::Read => machine.read(linear, data),
                Intent::Write => machine.read_for_write(linear, data),
            }
            .map_err(Stop::Machine)?;
            u64::from_le_bytes(bytes)
        }
    };
    Ok(value & size.mask())
}

/// Writes the destination if it is in memory. `false` if another CPU was faster and nothing is to
/// be committed.
///
/// `old` is the value that an instruction which reads its destination found there.
pub(super) fn write_memory<M: Machine>(
    instruction: &Instruction,
    machine: &mut M,
    place: Place,
    old: Option<u64>,
    new: u64,
) -> Result<bool, Stop<M::Stop>> {
    let Place::Memory(linear) = place else {
        return Ok(true);
    };
    let (new, length) = (new.to_le_bytes(), instruction.size.bytes());
    let new = new.get(..length).ok_or(Stop::Unsupported)?;
    // XCHG with memory is locked with or without the prefix (SDM vol. 3, 10.1.2.1).
    let is_locked = instruction.lock || instruction.operation == Operation::Exchange;
    match old {
        Some(old) if is_locked => {
            let old = old.to_le_bytes();
            let old = old.get(..length).ok_or(Stop::Unsupported)?;
            machine.compare_exchange(linear, old, new)
        }
        _ => machine.write(linear, new).map(|()| true),
    }
    .map_err(Stop::Machine)
}

/// Writes a place that is a register: 32 bits zero-extend, 8 and 16 leave the rest as it was.
pub(super) fn set_register<M: Machine>(machine: &mut M, place: Place, size: Size, value: u64) {
    match place {
        Place::Register(register) => {
            let kept = match size {
                Size::Byte | Size::Word => machine.gpr(register) & !size.mask(),
                Size::Dword | Size::Qword | Size::Oword | Size::Yword => 0,
            };
            machine.set_gpr(register, kept | (value & size.mask()));
        }
        Place::HighByte(register) => {
            let kept = machine.gpr(register) & !0xff00;
            machine.set_gpr(register, kept | ((value & 0xff) << 8));
        }
        Place::Immediate(_) | Place::Memory(_) => {}
    }
}
