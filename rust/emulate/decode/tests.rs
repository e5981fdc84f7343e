// SPDX-License-Identifier: GPL-2.0

//! Encodings by hand, from the SDM's tables; what a decoder checks against is in `tests/host`.

use super::*;
use crate::emulate::instruction::{Arithmetic, Base, Index, Memory, StringOperation};

fn register(register: Gpr) -> Operand {
    Operand::Register(register)
}

#[test]
fn a_32bit_store_with_base_index_and_displacement() {
    // mov [rax + rcx*4 + 0x10], edx
    let instruction = decode(&[0x89, 0x54, 0x88, 0x10], CodeSize::Bits64).unwrap();
    assert_eq!(
        instruction,
        Instruction {
            length: 4,
            operation: Operation::Mov,
            size: Size::Dword,
            source_size: Size::Dword,
            address_size: Size::Qword,
            destination: Operand::Memory(Memory {
                segment: SegmentRegister::Ds,
                base: Some(Base::Register(Gpr::Rax)),
                index: Some(Index {
                    register: Gpr::Rcx,
                    shift: 2
                }),
                displacement: 0x10,
            }),
            source: register(Gpr::Rdx),
            repeat: Repeat::Once,
            lock: false,
        }
    );
}

#[test]
fn the_same_bytes_in_three_modes() {
    // 8b 06: mov eax, [rsi]; mov eax, [esi]; mov ax, [0x3412] with its displacement.
    let bytes = [0x8b, 0x06, 0x12, 0x34];
    let long = decode(&bytes, CodeSize::Bits64).unwrap();
    assert_eq!(
        (long.length, long.size, long.address_size),
        (2, Size::Dword, Size::Qword)
    );
    let wide = decode(&bytes, CodeSize::Bits32).unwrap();
    assert_eq!(
        (wide.length, wide.size, wide.address_size),
        (2, Size::Dword, Size::Dword)
    );
    let narrow = decode(&bytes, CodeSize::Bits16).unwrap();
    assert_eq!(
        (narrow.length, narrow.size, narrow.address_size),
        (4, Size::Word, Size::Word)
    );
    let Operand::Memory(memory) = narrow.source else {
        panic!("{narrow:?}");
    };
    assert_eq!((memory.base, memory.displacement), (None, 0x3412));
}

#[test]
fn byte_registers_4_to_7_depend_on_the_mere_presence_of_rex() {
    // mov [rax], ah and mov [rax], spl
    let high = decode(&[0x88, 0x20], CodeSize::Bits64).unwrap();
    assert_eq!(high.source, Operand::HighByte(Gpr::Rax));
    let low = decode(&[0x40, 0x88, 0x20], CodeSize::Bits64).unwrap();
    assert_eq!(low.source, register(Gpr::Rsp));
}

#[test]
fn rex_counts_only_right_before_the_opcode() {
    let lost = decode(&[0x48, 0x66, 0x89, 0x00], CodeSize::Bits64).unwrap();
    assert_eq!((lost.size, lost.length), (Size::Word, 4));
    let kept = decode(&[0x66, 0x48, 0x89, 0x00], CodeSize::Bits64).unwrap();
    assert_eq!((kept.size, kept.length), (Size::Qword, 4));
}

#[test]
fn a_string_instruction_has_its_operands_spelt_out() {
    // rep movsw with FS for the source, in 16-bit code
    let instruction = decode(&[0x64, 0xf3, 0xa5], CodeSize::Bits16).unwrap();
    assert_eq!(
        instruction.operation,
        Operation::String(StringOperation::Movs)
    );
    assert_eq!(instruction.repeat, Repeat::Count);
    let segments = [instruction.destination, instruction.source].map(|operand| match operand {
        Operand::Memory(memory) => Some(memory.segment),
        _ => None,
    });
    assert_eq!(
        segments,
        [Some(SegmentRegister::Es), Some(SegmentRegister::Fs)]
    );
}

#[test]
fn truncated_bytes_say_how_many_are_needed() {
    // add dword ptr [rip + disp32], imm32: 10 bytes
    let bytes = [0x81, 0x05, 1, 2, 3, 4, 5, 6, 7, 8];
    let needed = [1, 2, 6, 6, 6, 6, 10, 10, 10, 10];
    for (length, needed) in needed.into_iter().enumerate() {
        assert_eq!(
            decode(&bytes[..length], CodeSize::Bits64),
            Err(DecodeError::Truncated { needed })
        );
    }
    let whole = decode(&bytes, CodeSize::Bits64).unwrap();
    assert_eq!(whole.length, 10);
    assert_eq!(whole.operation, Operation::Arithmetic(Arithmetic::Add));
    assert_eq!(whole.source, Operand::Immediate(0x0807_0605));
}

#[test]
fn fifteen_bytes_are_allowed_and_sixteen_are_not() {
    let mut bytes = [0x2e; 16];
    bytes[13..15].copy_from_slice(&[0x89, 0x00]);
    assert_eq!(decode(&bytes, CodeSize::Bits32).unwrap().length, 15);
    bytes[13..].copy_from_slice(&[0x2e, 0x89, 0x00]);
    let error = decode(&bytes, CodeSize::Bits32).unwrap_err();
    assert_eq!(error, DecodeError::TooLong);
    assert_eq!(
        error.exception(Protection::Protected),
        Some(Exception::GENERAL_PROTECTION)
    );
    assert_eq!(
        error.exception(Protection::Real),
        Some(Exception::plain(ExceptionVector::GeneralProtection))
    );
    // That it is too long is known before the sixteenth byte could be fetched.
    assert_eq!(
        decode(&[0x2e; 15], CodeSize::Bits32),
        Err(DecodeError::TooLong)
    );
}

#[test]
fn lock_needs_a_destination_in_memory_that_is_changed() {
    let lock = |bytes: &[u8]| decode(bytes, CodeSize::Bits64).map(|done| done.lock);
    // lock add [rax], eax; lock xchg [rax], eax
    assert_eq!(lock(&[0xf0, 0x01, 0x00]), Ok(true));
    assert_eq!(lock(&[0xf0, 0x87, 0x00]), Ok(true));
    // to a register; from memory; CMP, TEST, MOV, BT and a string instruction
    for bytes in [
        &[0xf0, 0x01, 0xc0][..],
        &[0xf0, 0x03, 0x00],
        &[0xf0, 0x39, 0x00],
        &[0xf0, 0x85, 0x00],
        &[0xf0, 0x89, 0x00],
        &[0xf0, 0x0f, 0xa3, 0x00],
        &[0xf0, 0xa4],
    ] {
        assert_eq!(lock(bytes), Err(DecodeError::InvalidOpcode), "{bytes:02x?}");
    }
}

#[test]
fn what_is_not_known_is_refused() {
    // hlt, div, jmp, popcnt, an AVX form that computes, crc32, rdmsr, the MMX and EVEX forms of a move
    for bytes in [
        &[0xf4][..],
        &[0xf7, 0x30],
        &[0xff, 0x20],
        &[0xf3, 0x0f, 0xb8, 0x00],
        &[0xc5, 0xf8, 0x58, 0x00],
        &[0xf2, 0x0f, 0x38, 0xf0, 0x00],
        &[0x0f, 0x32],
        &[0x0f, 0x6f, 0x00],
        &[0x62, 0xf1, 0x7c, 0x48, 0x28, 0x00],
    ] {
        assert_eq!(
            decode(bytes, CodeSize::Bits64),
            Err(DecodeError::Unsupported),
            "{bytes:02x?}"
        );
    }
}

#[test]
fn a_vex_prefix_is_one_outside_of_64bit_mode_where_lds_has_no_memory() {
    // vmovups xmm1, [..]: C5's second byte has its upper two bits set; else it is LDS.
    for code in [CodeSize::Bits16, CodeSize::Bits32] {
        let instruction = decode(&[0xc5, 0xf8, 0x10, 0x08], code).unwrap();
        assert_eq!(instruction.destination, Operand::Vector(1));
        assert_eq!(
            decode(&[0xc5, 0x78, 0x10, 0x08], code),
            Err(DecodeError::Unsupported)
        );
    }
    // In 64-bit mode that bit is R: xmm9.
    let instruction = decode(&[0xc5, 0x78, 0x10, 0x08], CodeSize::Bits64).unwrap();
    assert_eq!(instruction.destination, Operand::Vector(9));
}

#[test]
fn what_vex_excludes_raises_ud() {
    // LOCK, 66, F3 and REX before it; vvvv in use; VEX.L with MOVQ; vmovntps between registers
    for bytes in [
        &[0xf0, 0xc5, 0xf8, 0x10, 0x08][..],
        &[0x66, 0xc5, 0xf8, 0x10, 0x08],
        &[0xf3, 0xc5, 0xf8, 0x10, 0x08],
        &[0x48, 0xc5, 0xf8, 0x10, 0x08],
        &[0xc5, 0xe8, 0x10, 0x08],
        &[0xc5, 0xfe, 0x7e, 0x08],
        &[0xc5, 0xf8, 0x2b, 0xc8],
    ] {
        assert_eq!(
            decode(bytes, CodeSize::Bits64),
            Err(DecodeError::InvalidOpcode),
            "{bytes:02x?}"
        );
    }
}

#[test]
fn stack_operands_have_no_32_bits_in_64bit_mode() {
    // push rax; push ax; push dword -1 as a qword
    for (bytes, size) in [
        (&[0x50][..], Size::Qword),
        (&[0x66, 0x50], Size::Word),
        (&[0x6a, 0xff], Size::Qword),
        (&[0x8f, 0x00], Size::Qword),
    ] {
        assert_eq!(decode(bytes, CodeSize::Bits64).unwrap().size, size);
    }
    assert_eq!(decode(&[0x50], CodeSize::Bits32).unwrap().size, Size::Dword);
}
