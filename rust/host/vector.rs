// SPDX-License-Identifier: GPL-2.0

//! The vector registers of this CPU, which hold the guest's while they are loaded.

use super::irq::IrqsOff;
use core::arch::asm;

/// Bits 255:0 of a register, from the lowest 64 on.
pub(super) type Bits = [u64; 4];

/// One instruction that has the address of a [`Bits`] in `$address`, for the register `$number` of 16.
macro_rules! for_register {
    ($number:expr, $address:expr, $before:literal, $after:literal) => {
        for_register!(@ $number, $address, $before, $after,
            0 "0", 1 "1", 2 "2", 3 "3", 4 "4", 5 "5", 6 "6", 7 "7", 8 "8", 9 "9", 10 "10",
            11 "11", 12 "12", 13 "13", 14 "14")
    };
    (@ $number:expr, $address:expr, $before:literal, $after:literal, $($place:literal $name:literal),+) => {
        match $number & 15 {
            $($place => asm!(
                concat!($before, $name, $after),
                address = in(reg) $address,
                options(nostack, preserves_flags),
            ),)+
            _ => asm!(
                concat!($before, "15", $after),
                address = in(reg) $address,
                options(nostack, preserves_flags),
            ),
        }
    };
}

/// Reads XMM0 to XMM15; the bits above 127 come as 0.
pub(super) fn read_xmm(number: u8, _irqs: &IrqsOff) -> Bits {
    let mut bits: Bits = [0; 4];
    // SAFETY: Writes 16 bytes of `bits`. Every 64-bit CPU has SSE.
    unsafe { for_register!(number, bits.as_mut_ptr(), "movups [{address}], xmm", "") };
    bits
}

/// Sets bits 127:0; those above stay.
pub(super) fn write_xmm(number: u8, bits: &Bits, _irqs: &IrqsOff) {
    // SAFETY: Reads 16 bytes of `bits`. The compiler uses no vector register in the kernel.
    unsafe { for_register!(number, bits.as_ptr(), "movups xmm", ", [{address}]") };
}

/// Reads YMM0 to YMM15.
///
/// # Safety
///
/// The CPU's XCR0 has AVX.
pub(super) unsafe fn read_ymm(number: u8, _irqs: &IrqsOff) -> Bits {
    let mut bits: Bits = [0; 4];
    // SAFETY: Writes all of `bits`; the instruction is there as the caller says.
    unsafe { for_register!(number, bits.as_mut_ptr(), "vmovups [{address}], ymm", "") };
    bits
}

/// Sets bits 255:0 and clears those above.
///
/// # Safety
///
/// As for [`read_ymm`].
pub(super) unsafe fn write_ymm(number: u8, bits: &Bits, _irqs: &IrqsOff) {
    // SAFETY: Reads all of `bits`; the instruction is there as the caller says, and the compiler uses no
    // vector register in the kernel.
    unsafe { for_register!(number, bits.as_ptr(), "vmovups ymm", ", [{address}]") };
}
