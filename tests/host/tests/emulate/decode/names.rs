// SPDX-License-Identifier: GPL-2.0

//! What the emulator calls iced's instructions.

use iced_x86::{Mnemonic, OpKind};
use rvisor_core::emulate::{
    Arithmetic, BitOperation, Encoding, Operation, StringOperation, Unary, VectorMove,
};

/// Our name for iced's mnemonic, if it is in our list.
pub(super) fn operation_of(iced: &iced_x86::Instruction) -> Option<Operation> {
    let is_string = iced.is_string_instruction();
    Some(match iced.mnemonic() {
        Mnemonic::Mov | Mnemonic::Movnti | Mnemonic::Movdiri => Operation::Mov,
        Mnemonic::Movzx => Operation::MovZeroExtend,
        Mnemonic::Movsx | Mnemonic::Movsxd => Operation::MovSignExtend,
        Mnemonic::Movbe => Operation::MovSwap,
        Mnemonic::Add => Operation::Arithmetic(Arithmetic::Add),
        Mnemonic::Or => Operation::Arithmetic(Arithmetic::Or),
        Mnemonic::Adc => Operation::Arithmetic(Arithmetic::Adc),
        Mnemonic::Sbb => Operation::Arithmetic(Arithmetic::Sbb),
        Mnemonic::And => Operation::Arithmetic(Arithmetic::And),
        Mnemonic::Sub => Operation::Arithmetic(Arithmetic::Sub),
        Mnemonic::Xor => Operation::Arithmetic(Arithmetic::Xor),
        Mnemonic::Cmp => Operation::Arithmetic(Arithmetic::Cmp),
        Mnemonic::Test => Operation::Test,
        Mnemonic::Inc => Operation::Unary(Unary::Inc),
        Mnemonic::Dec => Operation::Unary(Unary::Dec),
        Mnemonic::Not => Operation::Unary(Unary::Not),
        Mnemonic::Neg => Operation::Unary(Unary::Neg),
        Mnemonic::Xchg => Operation::Exchange,
        Mnemonic::Xadd => Operation::ExchangeAdd,
        Mnemonic::Cmpxchg => Operation::CompareExchange,
        Mnemonic::Cmpxchg8b | Mnemonic::Cmpxchg16b => Operation::CompareExchangePair,
        Mnemonic::Push => Operation::Push,
        Mnemonic::Pop => Operation::Pop,
        Mnemonic::Call if iced.is_call_near() || iced.is_call_near_indirect() => Operation::Call,
        Mnemonic::Bt => Operation::Bit(BitOperation::Test),
        Mnemonic::Bts => Operation::Bit(BitOperation::Set),
        Mnemonic::Btr => Operation::Bit(BitOperation::Reset),
        Mnemonic::Btc => Operation::Bit(BitOperation::Complement),
        Mnemonic::Movsb | Mnemonic::Movsw | Mnemonic::Movsd | Mnemonic::Movsq if is_string => {
            Operation::String(StringOperation::Movs)
        }
        Mnemonic::Stosb | Mnemonic::Stosw | Mnemonic::Stosd | Mnemonic::Stosq => {
            Operation::String(StringOperation::Stos)
        }
        Mnemonic::Lodsb | Mnemonic::Lodsw | Mnemonic::Lodsd | Mnemonic::Lodsq => {
            Operation::String(StringOperation::Lods)
        }
        Mnemonic::Cmpsb | Mnemonic::Cmpsw | Mnemonic::Cmpsd | Mnemonic::Cmpsq if is_string => {
            Operation::String(StringOperation::Cmps)
        }
        Mnemonic::Scasb | Mnemonic::Scasw | Mnemonic::Scasd | Mnemonic::Scasq => {
            Operation::String(StringOperation::Scas)
        }
        Mnemonic::Insb | Mnemonic::Insw | Mnemonic::Insd => Operation::String(StringOperation::Ins),
        Mnemonic::Outsb | Mnemonic::Outsw | Mnemonic::Outsd => {
            Operation::String(StringOperation::Outs)
        }
        _ => return vector_operation_of(iced),
    })
}

/// Likewise for moves of vectors.
fn vector_operation_of(iced: &iced_x86::Instruction) -> Option<Operation> {
    let (encoding, last) = match iced.encoding() {
        iced_x86::EncodingKind::Legacy => (Encoding::Legacy, 0),
        iced_x86::EncodingKind::VEX => (Encoding::Vex, 1),
        _ => return None,
    };
    let is_store = iced.op_kind(0) == OpKind::Memory;
    // Of the half that is not loaded.
    let other = || u8::try_from(iced.op_register(last).number()).unwrap();
    let kind = match iced.mnemonic() {
        Mnemonic::Movups
        | Mnemonic::Movupd
        | Mnemonic::Movdqu
        | Mnemonic::Lddqu
        | Mnemonic::Vmovups
        | Mnemonic::Vmovupd
        | Mnemonic::Vmovdqu
        | Mnemonic::Vlddqu => VectorMove::Whole,
        Mnemonic::Movaps
        | Mnemonic::Movapd
        | Mnemonic::Movdqa
        | Mnemonic::Movntps
        | Mnemonic::Movntpd
        | Mnemonic::Movntdq
        | Mnemonic::Movntdqa
        | Mnemonic::Vmovaps
        | Mnemonic::Vmovapd
        | Mnemonic::Vmovdqa
        | Mnemonic::Vmovntps
        | Mnemonic::Vmovntpd
        | Mnemonic::Vmovntdq
        | Mnemonic::Vmovntdqa => VectorMove::Aligned,
        Mnemonic::Movd
        | Mnemonic::Movq
        | Mnemonic::Movss
        | Mnemonic::Movsd
        | Mnemonic::Vmovd
        | Mnemonic::Vmovq
        | Mnemonic::Vmovss
        | Mnemonic::Vmovsd => VectorMove::Low,
        Mnemonic::Movlps | Mnemonic::Movlpd | Mnemonic::Vmovlps | Mnemonic::Vmovlpd => {
            match is_store {
                true => VectorMove::Low,
                false => VectorMove::LoadLow { other: other() },
            }
        }
        Mnemonic::Movhps | Mnemonic::Movhpd | Mnemonic::Vmovhps | Mnemonic::Vmovhpd => {
            match is_store {
                true => VectorMove::StoreHigh,
                false => VectorMove::LoadHigh { other: other() },
            }
        }
        _ => return None,
    };
    Some(Operation::Vector(kind, encoding))
}
