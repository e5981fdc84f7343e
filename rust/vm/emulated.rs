// SPDX-License-Identifier: GPL-2.0

//! A virtual CPU and its memory as the pure emulator sees them.

use super::{
    emulation::{split, split_mut, Halt, Snapshot},
    mmio::MAX_BYTES,
    shared::Request,
    vcpu::{Core, State},
};
use crate::host::irq::IrqsOff;
use rvisor_core::{
    bus::Bus,
    emulate::{Encoding, Gpr, Machine, Mode, Vector},
    mmu::walk::AccessKind,
    x86::{
        address::{Gpa, Gva, PAGE_SIZE},
        control::Xcr0,
        segment::{Segment, SegmentRegister},
    },
};

/// A virtual CPU as the emulator sees it.
pub(super) struct Emulated<'a> {
    pub(super) state: &'a mut State,
    pub(super) snapshot: &'a Snapshot,
    pub(super) mode: Mode,
    pub(super) segments: [Option<Segment>; 6],
    pub(super) rip: u64,
    pub(super) rflags: u64,
    pub(super) rsp: u64,
}

impl Emulated<'_> {
    fn access(
        &mut self,
        linear: Gva,
        data: &mut [u8],
        kind: AccessKind,
    ) -> core::result::Result<(), Halt> {
        let length = data.len();
        if is_one_piece(linear, length) {
            let gpa = self.translate(linear, kind)?;
            self.check_alignment(linear, length)?;
            return self.core().read_piece(gpa, data);
        }
        for (address, part) in split_mut(linear, data) {
            let mut gpa = self.translate(address, kind)?;
            self.check_alignment(linear, length)?;
            for piece in part.chunks_mut(MAX_BYTES) {
                self.core().read_piece(gpa, piece)?;
                gpa = gpa.wrapping_add(piece.len() as u64);
            }
        }
        Ok(())
    }

    /// #AC, which comes after page faults (SDM vol. 3, table 7-2).
    fn check_alignment(&self, linear: Gva, length: usize) -> core::result::Result<(), Halt> {
        match self.mode.alignment_fault(linear, length) {
            Some(exception) => Err(Halt::Fault(exception)),
            None => Ok(()),
        }
    }

    /// Replaces aligned memory where it still is `old`. `None` where the address is a device's, or
    /// not aligned.
    fn exchange_memory(
        &mut self,
        linear: Gva,
        old: &[u8],
        new: &[u8],
    ) -> core::result::Result<Option<bool>, Halt> {
        let size = new.len();
        if !matches!(size, 1 | 2 | 4 | 8 | 16) || linear.raw() % size as u64 != 0 {
            return Ok(None);
        }
        let gpa = self.translate(linear, AccessKind::Write)?;
        if self.core().is_lapic(gpa) {
            return Ok(None);
        }
        let memory = &self.state.core.vm.memory;
        let ([old, old_high], [new, new_high]) = (words(old), words(new));
        if size == 16 {
            memory.compare_exchange_16(gpa, &[old, old_high], &[new, new_high])
        } else {
            memory.compare_exchange(gpa, size as u32, old, new)
        }
        .map_err(Halt::Error)
    }

    #[inline]
    fn core(&mut self) -> &mut Core {
        &mut self.state.core
    }

    /// Where a linear address leads; without a walk where the CPU has just made it.
    #[inline]
    fn translate(&mut self, linear: Gva, kind: AccessKind) -> core::result::Result<Gpa, Halt> {
        if let Some(gpa) = self.state.core.hint.translate(linear, kind) {
            return Ok(gpa);
        }
        self.state.translate(self.snapshot, linear, kind, true)
    }
}

impl Core {
    /// Reads at most [`MAX_BYTES`] bytes inside one page: of a device in the kernel, of memory, or of a
    /// device of userspace's.
    pub(super) fn read_piece(
        &mut self,
        gpa: Gpa,
        data: &mut [u8],
    ) -> core::result::Result<(), Halt> {
        let done = self.read_device(gpa, data)
            || self
                .vm
                .memory
                .read(gpa, data)
                .map_err(Halt::Error)?
                .is_some()
            || self.replay.read(gpa, data);
        done.then_some(()).ok_or(Halt::UserRead)
    }

    /// Writes at most [`MAX_BYTES`] bytes inside one page, likewise; for userspace they are kept.
    pub(super) fn write_piece(&mut self, gpa: Gpa, data: &[u8]) -> core::result::Result<(), Halt> {
        let done = self.write_device(gpa, data)
            || self
                .vm
                .memory
                .write(gpa, data)
                .map_err(Halt::Error)?
                .is_some()
            || self.vm.registrations.write(Bus::Memory, gpa.raw(), data)
            || self.replay.write(gpa, data);
        done.then_some(()).ok_or(Halt::Unsupported)
    }
}

impl Machine for Emulated<'_> {
    type Stop = Halt;

    fn gpr(&mut self, register: Gpr) -> u64 {
        match register {
            Gpr::Rsp => self.rsp,
            register => self.core().registers[register as usize & 15],
        }
    }

    fn set_gpr(&mut self, register: Gpr, value: u64) {
        match register {
            Gpr::Rsp => self.rsp = value,
            register => self.core().registers[register as usize & 15] = value,
        }
    }

    fn rip(&mut self) -> u64 {
        self.rip
    }

    fn set_rip(&mut self, value: u64) {
        self.rip = value;
    }

    fn rflags(&mut self) -> u64 {
        self.rflags
    }

    fn set_rflags(&mut self, value: u64) {
        self.rflags = value;
    }

    fn segment(&mut self, register: SegmentRegister) -> Segment {
        if register == SegmentRegister::Cs {
            return self.snapshot.cs;
        }
        let place = register as usize;
        if let Some(Some(segment)) = self.segments.get(place) {
            return *segment;
        }
        // The VMCS is lost only with VMX itself, and then the next entry fails.
        let segment = self
            .state
            .with_vmcs(|_, vmcs| vmcs.segment(register.into()))
            .unwrap_or_default();
        if let Some(slot) = self.segments.get_mut(place) {
            *slot = Some(segment);
        }
        segment
    }

    fn mode(&mut self) -> Mode {
        self.mode
    }

    fn read(&mut self, linear: Gva, data: &mut [u8]) -> core::result::Result<(), Halt> {
        self.access(linear, data, AccessKind::Read)
    }

    fn read_for_write(&mut self, linear: Gva, data: &mut [u8]) -> core::result::Result<(), Halt> {
        self.access(linear, data, AccessKind::Write)
    }

    fn prepare_write(&mut self, linear: Gva, length: usize) -> core::result::Result<(), Halt> {
        let bytes = [0u8; 32];
        for (address, _) in split(linear, bytes.get(..length).unwrap_or(&bytes)) {
            self.translate(address, AccessKind::Write)?;
        }
        self.check_alignment(linear, length)
    }

    fn vector(&mut self, number: u8, encoding: Encoding) -> Option<Vector> {
        let irqs = IrqsOff::new();
        let State { hardware, fpu, .. } = &mut *self.state;
        let xcr0 = Xcr0(hardware.get_mut(&irqs).xcr0);
        if encoding == Encoding::Vex && !xcr0.has(Xcr0::SSE | Xcr0::AVX) {
            return None;
        }
        fpu.vector(number, encoding, &irqs)
    }

    fn set_vector(&mut self, number: u8, value: Vector, encoding: Encoding) {
        let irqs = IrqsOff::new();
        self.state.fpu.set_vector(number, &value, encoding, &irqs);
    }

    // INS and OUTS exit as I/O instructions, before they touch memory.
    fn input(&mut self, _port: u16, _data: &mut [u8]) -> core::result::Result<(), Halt> {
        Err(Halt::Unsupported)
    }

    fn output(&mut self, _port: u16, _data: &[u8]) -> core::result::Result<(), Halt> {
        Err(Halt::Unsupported)
    }

    fn write(&mut self, linear: Gva, data: &[u8]) -> core::result::Result<(), Halt> {
        if is_one_piece(linear, data.len()) {
            let gpa = self.translate(linear, AccessKind::Write)?;
            self.check_alignment(linear, data.len())?;
            return self.core().write_piece(gpa, data);
        }
        // All pages are translated before the first is written.
        let mut targets = [Gpa::new(0); 2];
        for (target, (address, _)) in targets.iter_mut().zip(split(linear, data)) {
            *target = self.translate(address, AccessKind::Write)?;
        }
        self.check_alignment(linear, data.len())?;
        for (gpa, (_, part)) in targets.into_iter().zip(split(linear, data)) {
            let mut gpa = gpa;
            for piece in part.chunks(MAX_BYTES) {
                self.core().write_piece(gpa, piece)?;
                gpa = gpa.wrapping_add(piece.len() as u64);
            }
        }
        Ok(())
    }

    fn compare_exchange(
        &mut self,
        linear: Gva,
        old: &[u8],
        new: &[u8],
    ) -> core::result::Result<bool, Halt> {
        if let Some(done) = self.exchange_memory(linear, old, new)? {
            return Ok(done);
        }
        // A device, or a locked access across a boundary, which is not atomic here.
        self.write(linear, new)?;
        Ok(true)
    }

    fn may_continue(&mut self) -> bool {
        let core = self.core();
        // What was read for the element that is done now is void.
        core.replay.forget();
        // The record of this very exit can wait for its end.
        !core.replay.has_writes() && !core.shared.has_requests_beside(Request::TRACE)
    }
}

/// Whether an access lies in one page and has at most [`MAX_BYTES`].
#[inline]
fn is_one_piece(linear: Gva, length: usize) -> bool {
    length <= MAX_BYTES && linear.page_offset() <= PAGE_SIZE - length as u64
}

/// Up to 16 bytes, the lowest first, as two words.
fn words(bytes: &[u8]) -> [u64; 2] {
    let mut words = [0; 2];
    for (word, part) in words.iter_mut().zip(bytes.chunks(8)) {
        *word = part
            .iter()
            .rev()
            .fold(0, |word, byte| (word << 8) | u64::from(*byte));
    }
    words
}
