// SPDX-License-Identifier: GPL-2.0

//! BT, BTS, BTR, BTC.

use super::{
    arithmetic::{commit, set_flags, Destination},
    flags::{self, Computed},
    operand::{place, read, Intent, Place},
    retire, Outcome,
};
use crate::emulate::{
    instruction::{BitOperation, Instruction, Memory, Operand, Size},
    machine::Machine,
};

/// BT, BTS, BTR, BTC. Of the flags only CF is defined, and the others are left as they were.
pub(super) fn bit<M: Machine>(
    instruction: &Instruction,
    machine: &mut M,
    operation: BitOperation,
) -> Outcome<M> {
    let intent = match operation {
        BitOperation::Test => Intent::Read,
        _ => Intent::Write,
    };
    let size = instruction.size;
    let source = place(
        instruction,
        machine,
        &instruction.source,
        size,
        Intent::Read,
    )?;
    let offset = read(machine, source, size, Intent::Read)?;
    let operand = match (instruction.destination, source) {
        (Operand::Memory(memory), Place::Register(_)) => {
            Operand::Memory(with_bit_offset(memory, offset, size))
        }
        (operand, _) => operand,
    };
    let place = place(instruction, machine, &operand, size, intent)?;
    let value = read(machine, place, size, intent)?;
    let bit = 1u64.wrapping_shl(bit_number(offset, size));
    let new = match operation {
        BitOperation::Test => value,
        BitOperation::Set => value | bit,
        BitOperation::Reset => value & !bit,
        BitOperation::Complement => value ^ bit,
    };
    let carry = if value & bit != 0 { flags::CARRY } else { 0 };
    if operation == BitOperation::Test {
        set_flags(machine, flags::CARRY, carry);
        return retire(instruction, machine);
    }
    let computed = Computed {
        value: new,
        flags: carry,
    };
    let destination = Destination { place, value };
    commit(instruction, machine, &destination, computed, flags::CARRY)
}

/// The bit of the operand that a bit offset means.
fn bit_number(offset: u64, size: Size) -> u32 {
    let within = offset & u64::from(size.bits().saturating_sub(1));
    // At most 63.
    (within & 0x3f) as u32
}

/// A bit offset in a register is signed and reaches beyond the operand at the address, in steps of
/// the operand's size (SDM vol. 2, BT, and vol. 2, 3.1.1.9 "Bit(BitBase, BitOffset)").
fn with_bit_offset(memory: Memory, offset: u64, size: Size) -> Memory {
    let bytes = match size {
        Size::Byte => 0,
        Size::Word => ((size.sign_extend(offset) as i64) >> 4) << 1,
        Size::Dword => ((size.sign_extend(offset) as i64) >> 5) << 2,
        Size::Qword | Size::Oword | Size::Yword => ((offset as i64) >> 6) << 3,
    };
    Memory {
        displacement: memory.displacement.wrapping_add(bytes as u64),
        ..memory
    }
}
