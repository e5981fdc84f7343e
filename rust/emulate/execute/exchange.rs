// SPDX-License-Identifier: GPL-2.0

//! XCHG, XADD and the CMPXCHG family.

use super::{
    address::general_protection,
    arithmetic::{operands, set_flags, Destination},
    flags::{self, Computed},
    operand::{place, read, set_register, write_memory, Intent, Place},
    retire, Outcome,
};
use crate::emulate::{
    instruction::{Gpr, Instruction, Size},
    machine::{Machine, Progress, Stop},
};

/// The accumulator as an operand.
const ACCUMULATOR: Place = Place::Register(Gpr::Rax);

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

/// CMPXCHG8B and CMPXCHG16B. Memory is written in any case, as by CMPXCHG. Of the flags only ZF
/// changes.
pub(super) fn compare_exchange_pair<M: Machine>(
    instruction: &Instruction,
    machine: &mut M,
) -> Outcome<M> {
    let size = instruction.size;
    let half = match size {
        Size::Oword => Size::Qword,
        _ => Size::Dword,
    };
    let target = place(
        instruction,
        machine,
        &instruction.destination,
        size,
        Intent::Write,
    )?;
    let Place::Memory(linear) = target else {
        return Err(Stop::Unsupported);
    };
    if size == Size::Oword && linear.raw() & 0xf != 0 {
        return Err(Stop::Fault(general_protection(machine.mode())));
    }
    let (length, part) = (size.bytes(), half.bytes());
    let mut old = [0; 16];
    let data = old.get_mut(..length).ok_or(Stop::Unsupported)?;
    machine
        .read_for_write(linear, data)
        .map_err(Stop::Machine)?;
    let found = numbers(&old, part);
    let is_equal = found == pair(machine, Gpr::Rax, Gpr::Rdx, half);
    let mut new = old;
    if is_equal {
        let values = pair(machine, Gpr::Rbx, Gpr::Rcx, half);
        for (bytes, value) in new.chunks_exact_mut(part.max(1)).zip(values) {
            for (to, from) in bytes.iter_mut().zip(value.to_le_bytes()) {
                *to = from;
            }
        }
    }
    let (Some(old), Some(new)) = (old.get(..length), new.get(..length)) else {
        return Err(Stop::Unsupported);
    };
    let is_written = match instruction.lock {
        true => machine.compare_exchange(linear, old, new),
        false => machine.write(linear, new).map(|()| true),
    }
    .map_err(Stop::Machine)?;
    if !is_written {
        return Ok(Progress::Again);
    }
    if !is_equal {
        for (register, value) in [Gpr::Rax, Gpr::Rdx].into_iter().zip(found) {
            set_register(machine, Place::Register(register), half, value);
        }
    }
    let zero = if is_equal { flags::ZERO } else { 0 };
    set_flags(machine, flags::ZERO, zero);
    retire(instruction, machine)
}

/// The low parts of two registers, as wide as `half`.
fn pair<M: Machine>(machine: &mut M, low: Gpr, high: Gpr, half: Size) -> [u64; 2] {
    [low, high].map(|register| machine.gpr(register) & half.mask())
}

/// The first two numbers of `part` bytes each.
fn numbers(bytes: &[u8; 16], part: usize) -> [u64; 2] {
    let mut numbers = [0; 2];
    for (number, bytes) in numbers.iter_mut().zip(bytes.chunks_exact(part.max(1))) {
        let highest_first = bytes.iter().rev();
        *number = highest_first.fold(0u64, |number, byte| {
            number.wrapping_shl(8) | u64::from(*byte)
        });
    }
    numbers
}
