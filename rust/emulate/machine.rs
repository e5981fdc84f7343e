// SPDX-License-Identifier: GPL-2.0

//! The emulator's whole world: one vCPU and its memory.

use super::instruction::{CodeSize, Encoding, Gpr};
use crate::x86::{
    address::Gva,
    segment::{Segment, SegmentRegister},
    vector::{Exception, ExceptionVector},
};

/// How segments are checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protection {
    /// Real-address mode: CR0.PE = 0. Exceptions have no error code.
    Real,
    /// Virtual-8086 mode: RFLAGS.VM = 1.
    Virtual8086,
    /// Protected mode, or IA-32e mode.
    Protected,
}

/// The mode that the vCPU is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mode {
    /// The code size, the same that the instruction was decoded with.
    pub code: CodeSize,
    /// How segments are checked.
    pub protection: Protection,
    /// The width of a linear address in 64-bit mode: 57 if CR4.LA57 is set, else 48.
    pub linear_bits: u32,
    /// Whether accesses must be aligned: CPL 3, CR0.AM and RFLAGS.AC (SDM vol. 3, 7.15).
    pub checks_alignment: bool,
}

impl Mode {
    /// The #AC(0) that an access of `length` bytes, a power of two, raises, if it does. It is for the
    /// [`Machine`] to check, since page faults come before it. Of 32 bytes CPUs want 16 aligned.
    #[inline]
    pub const fn alignment_fault(&self, linear: Gva, length: usize) -> Option<Exception> {
        let unit = match length {
            32 => 16,
            length => length as u64,
        };
        let is_aligned = linear.raw() & unit.wrapping_sub(1) == 0;
        if is_aligned || !self.checks_alignment {
            return None;
        }
        Some(Exception::with_code(ExceptionVector::AlignmentCheck, 0))
    }
}

/// Why an instruction was not carried out, or a string instruction not further.
///
/// Of the iteration that was stopped nothing has been committed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop<S> {
    /// An exception to be raised in the guest at this instruction.
    Fault(Exception),
    /// An access wraps around the end of the linear address space, where CPUs differ, or the machine
    /// has no [`Machine::vector`].
    Unsupported,
    /// What [`Machine::read`], [`Machine::write`] or [`Machine::compare_exchange`] answered.
    Machine(S),
}

/// How far the instruction came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// It is done and RIP stands behind it.
    Retired,
    /// RIP still stands on it: iterations of a repeated string instruction are left, or a locked
    /// operation met another CPU's write. It is right to run the guest, or to execute it again.
    Again,
}

/// The lower 256 bits of a vector register, from the lowest 64 on.
pub type Vector = [u64; 4];

/// A vCPU and its memory.
///
/// The register methods take `&mut self` so that an implementor can fetch registers when they are
/// first asked for. They can't fail. Interrupt shadow, RFLAGS.RF, single-stepping and alignment
/// checks (#AC) are the implementor's.
pub trait Machine {
    /// Why an access can't be done now: a page fault, an exit to userspace, a dead VM.
    type Stop;

    /// The whole register.
    fn gpr(&mut self, register: Gpr) -> u64;

    /// Sets the whole register.
    fn set_gpr(&mut self, register: Gpr, value: u64);

    /// RIP: the address of the instruction being executed, relative to CS.
    fn rip(&mut self) -> u64;

    /// Sets RIP. It is called last of all and marks an instruction as done.
    fn set_rip(&mut self, value: u64);

    /// RFLAGS.
    fn rflags(&mut self) -> u64;

    /// Sets RFLAGS. Only CF, PF, AF, ZF, SF and OF ever differ from what [`Machine::rflags`] gave.
    fn set_rflags(&mut self, value: u64);

    /// A segment register with its hidden part.
    fn segment(&mut self, register: SegmentRegister) -> Segment;

    /// The mode.
    fn mode(&mut self) -> Mode;

    /// Reads 1 to 8 bytes, or 16 or 32 with vector moves, at a linear address whose segment was
    /// checked.
    ///
    /// The bytes may cross a page but never wrap around the end of the address space. Within one
    /// instruction (one iteration of a string instruction) the reads of a second try are the same
    /// as those of the first, in the same order.
    ///
    /// # Errors
    ///
    /// The implementor's reason, upon which the emulator gives up with nothing committed.
    fn read(&mut self, linear: Gva, data: &mut [u8]) -> Result<(), Self::Stop>;

    /// Like [`Machine::read`], of bytes that the same instruction then writes: 16 with CMPXCHG16B.
    ///
    /// A CPU checks such an access once, as a write. An implementor that wants the page fault's
    /// error code and the absence of side effects before it to be right overrides this.
    ///
    /// # Errors
    ///
    /// As with [`Machine::read`].
    #[inline]
    fn read_for_write(&mut self, linear: Gva, data: &mut [u8]) -> Result<(), Self::Stop> {
        self.read(linear, data)
    }

    /// Checks that [`Machine::write`] of `length` bytes would not raise an exception, before a read
    /// that can't be undone: the page walk of a write.
    ///
    /// # Errors
    ///
    /// As with [`Machine::write`].
    fn prepare_write(&mut self, linear: Gva, length: usize) -> Result<(), Self::Stop>;

    /// Writes 1 to 8 bytes, or 16 or 32 with vector moves, or 16 with CMPXCHG16B, under the same
    /// conditions as [`Machine::read`].
    ///
    /// It is an instruction's last step that can fail. A write to device memory which userspace
    /// must see is kept, and answered with `Ok`: the implementor leaves after the instruction.
    ///
    /// # Errors
    ///
    /// The implementor's reason; then nothing may have been written.
    fn write(&mut self, linear: Gva, data: &[u8]) -> Result<(), Self::Stop>;

    /// Writes `new` where `old` still stands, in one step as seen by other CPUs: the write of a
    /// locked instruction. Both have the same length. `false` if something else stood there, upon
    /// which nothing is committed and the instruction is to be executed again.
    ///
    /// Of device memory `old` is what [`Machine::read`] gave; there it is a plain write.
    ///
    /// # Errors
    ///
    /// As with [`Machine::write`].
    fn compare_exchange(&mut self, linear: Gva, old: &[u8], new: &[u8])
        -> Result<bool, Self::Stop>;

    /// The vector register 0 to 15 with this number, or `None` if such registers can't be had: then
    /// the instruction ends in [`Stop::Unsupported`]. Bits above 127 are asked for with
    /// [`Encoding::Vex`] only.
    ///
    /// Whether SSE is enabled (CR0.EM, CR0.TS, CR4.OSFXSR), and AVX (CR4.OSXSAVE, XCR0), has been
    /// checked by whoever comes here; the CPU does so before an exit.
    #[inline]
    fn vector(&mut self, _number: u8, _encoding: Encoding) -> Option<Vector> {
        None
    }

    /// Sets a vector register, of which [`Machine::vector`] just gave the old value: bits 127:0, and
    /// the bits above stay, or with [`Encoding::Vex`] bits 255:0, and the bits above are cleared.
    #[inline]
    fn set_vector(&mut self, _number: u8, _value: Vector, _encoding: Encoding) {}

    /// Reads 1, 2 or 4 bytes from an I/O port, for INS. Whether the guest may use the port has been
    /// checked by whoever comes here (the CPU does so before an exit).
    ///
    /// # Errors
    ///
    /// As with [`Machine::read`].
    fn input(&mut self, port: u16, data: &mut [u8]) -> Result<(), Self::Stop>;

    /// Writes 1, 2 or 4 bytes to an I/O port, for OUTS: the instruction's last step that can fail.
    /// Like a write to device memory it can be kept for userspace.
    ///
    /// # Errors
    ///
    /// As with [`Machine::write`].
    fn output(&mut self, port: u16, data: &[u8]) -> Result<(), Self::Stop>;

    /// Whether a repeated string instruction may go on, asked after each committed iteration.
    ///
    /// It must be `false` once a write was kept for userspace, and should be while an interrupt or
    /// another request waits. The emulator stops by itself after 4 KiB.
    #[inline]
    fn may_continue(&mut self) -> bool {
        false
    }
}
