// SPDX-License-Identifier: GPL-2.0

//! Results and status flags of arithmetic (SDM vol. 1, 3.4.3.1).

use crate::emulate::instruction::Size;

/// CF, carry.
pub(super) const CARRY: u64 = 1 << 0;
/// PF, even parity of the lowest byte.
const PARITY: u64 = 1 << 2;
/// AF, carry out of bit 3.
const ADJUST: u64 = 1 << 4;
/// ZF, zero.
pub(super) const ZERO: u64 = 1 << 6;
/// SF, the topmost bit.
const SIGN: u64 = 1 << 7;
/// DF, string instructions go downwards.
pub(super) const DIRECTION: u64 = 1 << 10;
/// OF, signed overflow.
const OVERFLOW: u64 = 1 << 11;
/// All that arithmetic sets.
pub(super) const STATUS: u64 = CARRY | PARITY | ADJUST | ZERO | SIGN | OVERFLOW;

/// A result and its status flags; flags outside [`STATUS`] are clear.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Computed {
    pub(super) value: u64,
    pub(super) flags: u64,
}

/// `mask` if `condition`, else 0.
const fn flag(mask: u64, condition: bool) -> u64 {
    if condition {
        mask
    } else {
        0
    }
}

/// PF, ZF and SF of a value that has no bits beyond `size`.
const fn of_value(value: u64, size: Size) -> u64 {
    flag(PARITY, (value & 0xff).count_ones() & 1 == 0)
        | flag(ZERO, value == 0)
        | flag(SIGN, value & size.sign() != 0)
}

/// `a + b + carry`.
pub(super) const fn add(a: u64, b: u64, carry: bool, size: Size) -> Computed {
    let value = a.wrapping_add(b).wrapping_add(carry as u64) & size.mask();
    // A bit carries out if both operands have it, or one has it and the sum lost it.
    let carries = (a & b) | ((a | b) & !value);
    Computed {
        value,
        flags: of_value(value, size)
            | flag(CARRY, carries & size.sign() != 0)
            | flag(ADJUST, carries & 8 != 0)
            | flag(OVERFLOW, (a ^ value) & (b ^ value) & size.sign() != 0),
    }
}

/// `a - b - borrow`.
pub(super) const fn subtract(a: u64, b: u64, borrow: bool, size: Size) -> Computed {
    let value = a.wrapping_sub(b).wrapping_sub(borrow as u64) & size.mask();
    // A bit borrows if it is taken from nothing, or from an equal bit of which nothing was left.
    let borrows = (!a & b) | (!(a ^ b) & value);
    Computed {
        value,
        flags: of_value(value, size)
            | flag(CARRY, borrows & size.sign() != 0)
            | flag(ADJUST, borrows & 8 != 0)
            | flag(OVERFLOW, (a ^ b) & (a ^ value) & size.sign() != 0),
    }
}

/// A result of AND, OR or XOR: CF and OF are clear. AF, which the SDM leaves open, is clear as well.
pub(super) const fn logic(value: u64, size: Size) -> Computed {
    let value = value & size.mask();
    Computed {
        value,
        flags: of_value(value, size),
    }
}
