// SPDX-License-Identifier: GPL-2.0

//! Instructions that compute: each reads, writes memory at most once, and then commits.

use super::{
    flags::{self, Computed},
    operand::{place, read, set_register, write_memory, Intent, Place},
    retire, Outcome,
};
use crate::emulate::{
    instruction::{Arithmetic, BitOperation, Gpr, Instruction, Memory, Operand, Size, Unary},
    machine::{Machine, Progress, Stop},
};

/// The accumulator as an operand.
const ACCUMULATOR: Place = Place::Register(Gpr::Rax);

/// A destination with its value.
pub(super) struct Destination {
    place: Place,
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
fn commit<M: Machine>(
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

/// Commits an exchange: the source, a register, gets the destination's old value, and then the
/// destination its new one.
fn exchange_with<M: Machine>(
    instruction: &Instruction,
    machine: &mut M,
    destination: &Destination,
    computed: Computed,
    affected: u64,
) -> Outcome<M> {
    let size = instruction.size;
    let Destination {
        place: target,
        value,
    } = *destination;
    let source = place(
        instruction,
        machine,
        &instruction.source,
        size,
        Intent::Read,
    )?;
    if !write_memory(instruction, machine, target, Some(value), computed.value)? {
        return Ok(Progress::Again);
    }
    // The destination comes last: it wins where both are the same register.
    set_register(machine, source, size, value);
    set_register(machine, target, size, computed.value);
    set_flags(machine, affected, computed.flags);
    retire(instruction, machine)
}

/// XCHG.
pub(super) fn exchange<M: Machine>(instruction: &Instruction, machine: &mut M) -> Outcome<M> {
    let (destination, source) = operands(instruction, machine, Intent::Write)?;
    let computed = Computed {
        value: source,
        flags: 0,
    };
    exchange_with(instruction, machine, &destination, computed, 0)
}

/// XADD.
pub(super) fn exchange_add<M: Machine>(instruction: &Instruction, machine: &mut M) -> Outcome<M> {
    let (destination, source) = operands(instruction, machine, Intent::Write)?;
    let computed = flags::add(destination.value, source, false, instruction.size);
    exchange_with(instruction, machine, &destination, computed, flags::STATUS)
}

/// CMPXCHG. Memory is written in any case: with its own value if it was unequal. An unequal register
/// is left alone, so that of a 32-bit one the upper half is not cleared: CPUs do that, other than the
/// SDM's pseudocode.
pub(super) fn compare_exchange<M: Machine>(
    instruction: &Instruction,
    machine: &mut M,
) -> Outcome<M> {
    let size = instruction.size;
    let (destination, source) = operands(instruction, machine, Intent::Write)?;
    let Destination { place, value } = destination;
    let accumulator = read(machine, ACCUMULATOR, size, Intent::Read)?;
    let compared = flags::subtract(accumulator, value, false, size);
    let is_equal = accumulator == value;
    let new = if is_equal { source } else { value };
    if !write_memory(instruction, machine, place, Some(value), new)? {
        return Ok(Progress::Again);
    }
    match is_equal {
        true => set_register(machine, place, size, new),
        false => set_register(machine, ACCUMULATOR, size, value),
    }
    set_flags(machine, flags::STATUS, compared.flags);
    retire(instruction, machine)
}

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
        Size::Qword | Size::Oword => ((offset as i64) >> 6) << 3,
    };
    Memory {
        displacement: memory.displacement.wrapping_add(bytes as u64),
        ..memory
    }
}
