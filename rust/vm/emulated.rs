// SPDX-License-Identifier: GPL-2.0

//! A virtual CPU and its memory as the pure emulator sees them.

use super::{
    emulation::{split, split_mut, Halt, Snapshot},
    vcpu::{Core, State},
};
use rvisor_core::{
    bus::Bus,
    emulate::{Gpr, Machine, Mode},
    mmu::walk::AccessKind,
    x86::{
        address::{Gpa, Gva},
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
        for (address, part) in split_mut(linear, data) {
            let gpa = self.translate(address, kind)?;
            let core = &mut self.state.core;
            if core.read_device(gpa, part)
                || core
                    .vm
                    .memory
                    .read(gpa, part)
                    .map_err(Halt::Error)?
                    .is_some()
                || core.replay.read(gpa, part)
            {
                continue;
            }
            return Err(Halt::UserRead);
        }
        Ok(())
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
        let bytes = [0u8; 16];
        for (address, _) in split(linear, bytes.get(..length).unwrap_or(&bytes)) {
            self.translate(address, AccessKind::Write)?;
        }
        Ok(())
    }

    // INS and OUTS exit as I/O instructions, before they touch memory.
    fn input(&mut self, _port: u16, _data: &mut [u8]) -> core::result::Result<(), Halt> {
        Err(Halt::Unsupported)
    }

    fn output(&mut self, _port: u16, _data: &[u8]) -> core::result::Result<(), Halt> {
        Err(Halt::Unsupported)
    }

    fn write(&mut self, linear: Gva, data: &[u8]) -> core::result::Result<(), Halt> {
        // All pages are translated before the first is written.
        let mut targets = [Gpa::new(0); 2];
        for (target, (address, _)) in targets.iter_mut().zip(split(linear, data)) {
            *target = self.translate(address, AccessKind::Write)?;
        }
        for (gpa, (_, part)) in targets.into_iter().zip(split(linear, data)) {
            let core = &mut self.state.core;
            if core.write_device(gpa, part)
                || core
                    .vm
                    .memory
                    .write(gpa, part)
                    .map_err(Halt::Error)?
                    .is_some()
                || core.vm.registrations.write(Bus::Memory, gpa.raw(), part)
                || core.replay.write(gpa, part)
            {
                continue;
            }
            return Err(Halt::Unsupported);
        }
        Ok(())
    }

    fn compare_exchange(
        &mut self,
        linear: Gva,
        old: &[u8],
        new: &[u8],
    ) -> core::result::Result<bool, Halt> {
        let size = new.len();
        let is_word = matches!(size, 1 | 2 | 4 | 8) && linear.raw() % size as u64 == 0;
        if is_word {
            let gpa = self.translate(linear, AccessKind::Write)?;
            let done = self
                .core()
                .vm
                .memory
                .compare_exchange(gpa, size as u32, word(old), word(new))
                .map_err(Halt::Error)?;
            if let Some(done) = done {
                return Ok(done);
            }
        }
        // A device, or a locked access across a boundary, which is not atomic here.
        self.write(linear, new)?;
        Ok(true)
    }

    fn may_continue(&mut self) -> bool {
        let core = self.core();
        // What was read for the element that is done now is void.
        core.replay.forget();
        !core.replay.has_writes() && !core.shared.has_requests()
    }
}

/// Up to 8 bytes, the lowest first.
fn word(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .rev()
        .fold(0, |word, byte| (word << 8) | u64::from(*byte))
}
