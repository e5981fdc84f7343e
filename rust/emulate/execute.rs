// SPDX-License-Identifier: GPL-2.0

//! Carries out an [`Instruction`].

mod address;
mod arithmetic;
mod bit;
mod exchange;
mod flags;
mod operand;
mod stack;
mod string;
mod vector;

#[cfg(test)]
mod tests;

use super::{
    instruction::{CodeSize, Instruction, Operation, Size},
    machine::{Machine, Progress, Stop},
};
use operand::{place, read, set_register, write_memory, Intent};

/// The end of an execution.
type Outcome<M> = Result<Progress, Stop<<M as Machine>::Stop>>;

/// Executes `instruction`, at which `machine`'s RIP must stand, or iterations of a repeated string
/// instruction: one, and more while [`Machine::may_continue`] allows, up to 4 KiB.
///
/// # Errors
///
/// See [`Stop`]. Nothing of the instruction, or of the string instruction's iteration that was
/// stopped, has been committed: it can be executed again.
pub fn execute<M: Machine>(
    instruction: &Instruction,
    machine: &mut M,
) -> Result<Progress, Stop<M::Stop>> {
    match instruction.operation {
        Operation::Mov
        | Operation::MovZeroExtend
        | Operation::MovSignExtend
        | Operation::MovSwap => mov(instruction, machine),
        Operation::Arithmetic(operation) => arithmetic::arithmetic(instruction, machine, operation),
        Operation::Test => arithmetic::test(instruction, machine),
        Operation::Unary(operation) => arithmetic::unary(instruction, machine, operation),
        Operation::Exchange => exchange::exchange(instruction, machine),
        Operation::ExchangeAdd => exchange::exchange_add(instruction, machine),
        Operation::CompareExchange => exchange::compare_exchange(instruction, machine),
        Operation::CompareExchangePair => exchange::compare_exchange_pair(instruction, machine),
        Operation::Bit(operation) => bit::bit(instruction, machine, operation),
        Operation::Push => stack::push(instruction, machine),
        Operation::Pop => stack::pop(instruction, machine),
        Operation::Call => stack::call(instruction, machine),
        Operation::Vector(kind, encoding) => vector::vector(instruction, machine, kind, encoding),
        Operation::String(operation) => string::string(instruction, machine, operation),
    }
}

/// The MOV family.
fn mov<M: Machine>(instruction: &Instruction, machine: &mut M) -> Outcome<M> {
    let Instruction {
        size, source_size, ..
    } = *instruction;
    let target = place(
        instruction,
        machine,
        &instruction.destination,
        size,
        Intent::Write,
    )?;
    let source = place(
        instruction,
        machine,
        &instruction.source,
        source_size,
        Intent::Read,
    )?;
    let value = read(machine, source, source_size, Intent::Read)?;
    let value = match instruction.operation {
        Operation::MovSignExtend => source_size.sign_extend(value),
        Operation::MovSwap => swap_bytes(value, size),
        _ => value,
    };
    if !write_memory(instruction, machine, target, None, value)? {
        return Ok(Progress::Again);
    }
    set_register(machine, target, size, value);
    retire(instruction, machine)
}

/// The low bytes of `value` in reverse order.
fn swap_bytes(value: u64, size: Size) -> u64 {
    // The bytes that are not part of the value come out at the bottom.
    value
        .swap_bytes()
        .wrapping_shr(64u32.saturating_sub(size.bits()))
}

/// Moves RIP to the next instruction: the last thing that an instruction does.
fn retire<M: Machine>(instruction: &Instruction, machine: &mut M) -> Outcome<M> {
    let next = next_instruction(instruction, machine);
    machine.set_rip(next);
    Ok(Progress::Retired)
}

/// The next instruction's address, which wraps as wide as the code is.
fn next_instruction<M: Machine>(instruction: &Instruction, machine: &mut M) -> u64 {
    let next = machine.rip().wrapping_add(u64::from(instruction.length));
    match machine.mode().code {
        CodeSize::Bits16 => next & Size::Word.mask(),
        CodeSize::Bits32 => next & Size::Dword.mask(),
        CodeSize::Bits64 => next,
    }
}
