// SPDX-License-Identifier: GPL-2.0

//! Effective and linear addresses, with the checks of segmentation (SDM vol. 3, 3.4 and 6.3 to 6.5).

use super::{next_instruction, operand::Intent};
use crate::{
    emulate::{
        instruction::{Base, CodeSize, Instruction, Memory, Size},
        machine::{Machine, Mode, Protection, Stop},
    },
    x86::{
        address::Gva,
        segment::{Segment, SegmentRegister},
        vector::{Exception, ExceptionVector},
    },
};

/// Segment type, bit 3: code.
const CODE: u8 = 1 << 3;
/// Segment type of data, bit 2: expand-down.
const EXPAND_DOWN: u8 = 1 << 2;
/// Segment type, bit 1: writable data or readable code.
const WRITABLE_OR_READABLE: u8 = 1 << 1;

/// The linear address of a memory operand of `size`, checked for all of its bytes.
pub(super) fn linear_address<M: Machine>(
    instruction: &Instruction,
    machine: &mut M,
    memory: &Memory,
    size: Size,
    intent: Intent,
) -> Result<Gva, Stop<M::Stop>> {
    let offset = effective_address(instruction, machine, memory);
    linear(machine, memory.segment, offset, size, intent)
}

/// The linear address of `size` bytes at an offset into a segment, checked for all of them.
pub(super) fn linear<M: Machine>(
    machine: &mut M,
    register: SegmentRegister,
    offset: u64,
    size: Size,
    intent: Intent,
) -> Result<Gva, Stop<M::Stop>> {
    let mode = machine.mode();
    // The distance from the first byte to the last.
    let reach = size.bytes().saturating_sub(1) as u64;
    match mode.code {
        CodeSize::Bits64 => {
            // Only these two have a base.
            let base = match register {
                SegmentRegister::Fs | SegmentRegister::Gs => machine.segment(register).base,
                _ => 0,
            };
            linear_64bit(mode, register, base.wrapping_add(offset), reach)
        }
        CodeSize::Bits16 | CodeSize::Bits32 => {
            let segment = machine.segment(register);
            let refusal = refusal(mode, register);
            if !is_allowed(mode, segment, intent) || !is_within(segment, offset, reach) {
                return Err(Stop::Fault(refusal));
            }
            let linear = segment.base.wrapping_add(offset) & Size::Dword.mask();
            if linear.wrapping_add(reach) > Size::Dword.mask() {
                return Err(Stop::Unsupported);
            }
            Ok(Gva::new(linear))
        }
    }
}

/// Checks where a near branch leads (SDM vol. 2, CALL): a canonical address, or one inside CS.
pub(super) fn check_branch<M: Machine>(machine: &mut M, target: u64) -> Result<(), Stop<M::Stop>> {
    let mode = machine.mode();
    let is_legal = match mode.code {
        CodeSize::Bits64 => Gva::new(target).is_canonical(mode.linear_bits),
        CodeSize::Bits16 | CodeSize::Bits32 => {
            target <= u64::from(machine.segment(SegmentRegister::Cs).limit)
        }
    };
    if is_legal {
        Ok(())
    } else {
        Err(Stop::Fault(general_protection(mode)))
    }
}

/// The width of the stack pointer: 64 bits in 64-bit mode, else as SS.B says.
pub(super) fn stack_size<M: Machine>(machine: &mut M) -> Size {
    if machine.mode().code == CodeSize::Bits64 {
        return Size::Qword;
    }
    match machine.segment(SegmentRegister::Ss).access.is_big() {
        true => Size::Dword,
        false => Size::Word,
    }
}

/// The offset into the segment.
fn effective_address<M: Machine>(
    instruction: &Instruction,
    machine: &mut M,
    memory: &Memory,
) -> u64 {
    let base = match memory.base {
        None => 0,
        Some(Base::Register(register)) => machine.gpr(register),
        Some(Base::NextInstruction) => next_instruction(instruction, machine),
    };
    let index = match memory.index {
        None => 0,
        Some(index) => machine
            .gpr(index.register)
            .wrapping_shl(u32::from(index.shift)),
    };
    // The upper bits of wider registers fall away with the mask.
    base.wrapping_add(index).wrapping_add(memory.displacement) & instruction.address_size.mask()
}

/// 64-bit mode: both ends must be canonical.
fn linear_64bit<S>(
    mode: Mode,
    register: SegmentRegister,
    first: u64,
    reach: u64,
) -> Result<Gva, Stop<S>> {
    let first = Gva::new(first);
    let last = first.wrapping_add(reach);
    if !first.is_canonical(mode.linear_bits) || !last.is_canonical(mode.linear_bits) {
        return Err(Stop::Fault(refusal(mode, register)));
    }
    if last < first {
        return Err(Stop::Unsupported);
    }
    Ok(first)
}

/// #GP, with the error code 0 except in real-address mode.
pub(super) fn general_protection(mode: Mode) -> Exception {
    refusal(mode, SegmentRegister::Ds)
}

/// #SS for SS and #GP for the others; with the error code 0 except in real-address mode.
fn refusal(mode: Mode, register: SegmentRegister) -> Exception {
    let vector = match register {
        SegmentRegister::Ss => ExceptionVector::StackFault,
        _ => ExceptionVector::GeneralProtection,
    };
    match mode.protection {
        Protection::Real => Exception::plain(vector),
        Protection::Virtual8086 | Protection::Protected => Exception::with_code(vector, 0),
    }
}

/// Whether the segment is there and its type allows the access. Types count in protected mode only.
fn is_allowed(mode: Mode, segment: Segment, intent: Intent) -> bool {
    if segment.access.is_unusable() {
        return false;
    }
    let kind = segment.access.kind();
    let has_right = kind & WRITABLE_OR_READABLE != 0;
    match (mode.protection, intent, kind & CODE != 0) {
        (Protection::Real | Protection::Virtual8086, _, _) => true,
        // Data can always be read, code never be written.
        (Protection::Protected, Intent::Read, false) => true,
        (Protection::Protected, Intent::Write, true) => false,
        (Protection::Protected, Intent::Read, true)
        | (Protection::Protected, Intent::Write, false) => has_right,
    }
}

/// Whether the bytes from `offset` to `offset + reach` are inside the segment's limit.
fn is_within(segment: Segment, offset: u64, reach: u64) -> bool {
    let limit = u64::from(segment.limit);
    // An offset has at most 32 bits here, so this does not wrap.
    let last = offset.wrapping_add(reach);
    if segment.access.kind() & (CODE | EXPAND_DOWN) == EXPAND_DOWN {
        let top = match segment.access.is_big() {
            true => Size::Dword.mask(),
            false => Size::Word.mask(),
        };
        return offset > limit && last <= top;
    }
    last <= limit
}
