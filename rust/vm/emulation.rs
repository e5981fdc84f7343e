// SPDX-License-Identifier: GPL-2.0

//! Instructions that touch device memory: the pure emulator's view of a virtual CPU.

use super::{
    emulated::Emulated,
    memory::{Fault, GuestMemory},
    mmio::Replay,
    run_page::UserExit,
    vcpu::{Core, State},
};
use crate::host::memory;
use kernel::prelude::*;
use rvisor_core::{
    emulate::{
        decode, execute, CodeSize, DecodeError, Instruction, Mode, Progress, Protection, Stop,
        MAX_LENGTH,
    },
    mmu::{
        slot::Slot,
        walk::{
            probe, walk, Access, AccessKind, GuestPhysicalMemory, Paging, Privilege, WalkError,
        },
    },
    stats::Event,
    x86::{
        address::{Gfn, Gpa, Gva, Hva, PAGE_SIZE},
        control::{Cr0, Cr3, Cr4, Efer, Rflags},
        exit::{EptViolation, ExitReason},
        segment::Segment,
        vector::Exception,
        vmcs::{Field64, FieldNatural, VmcsSegment},
    },
};

/// Why an access can't be done now.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Halt {
    /// The guest gets a page fault.
    Fault(Exception),
    /// Userspace has to read device memory first.
    UserRead,
    /// Page tables, or a string's element, in device memory: not emulated.
    Unsupported,
    /// The guest runs on and does it again.
    Retry,
    /// The process has nothing behind a slot, or no memory is left.
    Error(Error),
}

/// Guest memory for the page walk. The slot of the last table is kept, since a walk's tables mostly lie
/// in one; should it go meanwhile, the process's own memory is still all that can be reached.
struct Tables<'a> {
    memory: &'a GuestMemory,
    last: Option<Slot>,
}

/// No memory is there, or the process has nothing behind it.
struct Unreachable(Option<Error>);

impl Tables<'_> {
    /// Where in the process the memory at `gpa` is.
    #[inline]
    fn hva(&mut self, gpa: Gpa) -> core::result::Result<Hva, Unreachable> {
        let gfn = gpa.frame();
        let page = match self.last.as_ref().and_then(|slot| slot.hva_of(gfn)) {
            Some(hva) => hva,
            None => self.look_up(gfn)?,
        };
        Ok(page.wrapping_add(gpa.page_offset()))
    }

    #[inline(never)]
    fn look_up(&mut self, gfn: Gfn) -> core::result::Result<Hva, Unreachable> {
        self.last = self.memory.slot(gfn);
        let slot = self.last.as_ref();
        slot.and_then(|slot| slot.hva_of(gfn))
            .ok_or(Unreachable(None))
    }

    /// Reads an instruction's bytes inside one page.
    #[inline]
    fn read_code(&mut self, gpa: Gpa, data: &mut [u8]) -> core::result::Result<(), Unreachable> {
        let hva = self.hva(gpa)?;
        memory::read_bytes(hva, data).map_err(|error| Unreachable(Some(error)))
    }

    fn exchange(
        &self,
        gpa: Gpa,
        size: u32,
        old: u64,
        new: u64,
    ) -> core::result::Result<bool, Unreachable> {
        match self.memory.compare_exchange(gpa, size, old, new) {
            Ok(Some(done)) => Ok(done),
            // Read-only tables keep their flags.
            Ok(None) => Ok(true),
            Err(error) => Err(Unreachable(Some(error))),
        }
    }
}

impl From<Unreachable> for Halt {
    fn from(Unreachable(error): Unreachable) -> Self {
        error.map_or(Self::Unsupported, Self::Error)
    }
}

impl From<WalkError<Unreachable>> for Halt {
    fn from(error: WalkError<Unreachable>) -> Self {
        match error {
            WalkError::Fault(exception) => Self::Fault(exception),
            WalkError::Contended => Self::Retry,
            WalkError::Memory(_, unreachable) => unreachable.into(),
        }
    }
}

impl GuestPhysicalMemory for Tables<'_> {
    type Error = Unreachable;

    #[inline]
    fn read_u32(&mut self, gpa: Gpa) -> core::result::Result<u32, Unreachable> {
        let hva = self.hva(gpa)?;
        let value = memory::read_word(hva, 4).map_err(|error| Unreachable(Some(error)))?;
        Ok(value as u32)
    }

    #[inline]
    fn read_u64(&mut self, gpa: Gpa) -> core::result::Result<u64, Unreachable> {
        let hva = self.hva(gpa)?;
        memory::read_u64(hva).ok_or(Unreachable(Some(EFAULT)))
    }

    fn compare_exchange_u32(
        &mut self,
        gpa: Gpa,
        old: u32,
        new: u32,
    ) -> core::result::Result<bool, Unreachable> {
        self.exchange(gpa, 4, old.into(), new.into())
    }

    fn compare_exchange_u64(
        &mut self,
        gpa: Gpa,
        old: u64,
        new: u64,
    ) -> core::result::Result<bool, Unreachable> {
        self.exchange(gpa, 8, old, new)
    }
}

/// A decoded instruction with its bytes.
pub(super) type Kept = (Instruction, [u8; MAX_LENGTH]);

/// What the CPU's own walk before an EPT violation found: the page of one access that was allowed.
#[derive(Clone, Copy, Default)]
pub(crate) struct Hint {
    page: Option<(Gva, Gpa)>,
    writable: bool,
}

impl Hint {
    fn of(violation: &EptViolation) -> Self {
        Self {
            page: violation
                .gva
                .filter(|_| violation.is_translated)
                .map(|gva| (gva.page_start(), violation.gpa.page_start())),
            writable: violation.is_write,
        }
    }

    #[inline]
    pub(super) fn translate(&self, linear: Gva, kind: AccessKind) -> Option<Gpa> {
        let (gva, gpa) = self.page?;
        let known = gva == linear.page_start()
            && (kind == AccessKind::Read || (kind == AccessKind::Write && self.writable));
        known.then(|| gpa.wrapping_add(linear.page_offset()))
    }
}

/// The registers that an instruction depends on, as they were at the exit.
#[derive(Clone, Copy)]
pub(super) struct Snapshot {
    paging: Paging,
    privilege: Privilege,
    rip: u64,
    rflags: u64,
    pub(super) cs: Segment,
}

impl State {
    pub(super) fn snapshot(&mut self) -> Result<Snapshot> {
        self.with_vmcs(|core, vmcs| {
            core.sync_rsp(vmcs);
            let rflags = vmcs.read(FieldNatural::GUEST_RFLAGS);
            let mut pdptes = [0; 4];
            if core.uses_pdptes() {
                for (place, entry) in pdptes.iter_mut().enumerate() {
                    *entry = vmcs.read64(Field64::guest_pdpte(place as u32));
                }
            }
            Snapshot {
                paging: Paging {
                    cr0: core.cr0,
                    cr3: Cr3(vmcs.read(FieldNatural::GUEST_CR3)),
                    cr4: core.cr4,
                    efer: core.efer,
                    alignment_check: rflags & Rflags::AC != 0,
                    pkru: 0,
                    pdptes,
                    physical_bits: core.cpu.physical_bits,
                    gbpages: core.cpu.gbpages,
                },
                privilege: if core.cpl(vmcs) == 3 {
                    Privilege::User
                } else {
                    Privilege::Supervisor
                },
                rip: vmcs.read(FieldNatural::GUEST_RIP),
                rflags,
                cs: vmcs.segment(VmcsSegment::Cs),
            }
        })
    }

    pub(super) fn translate(
        &self,
        snapshot: &Snapshot,
        linear: Gva,
        kind: AccessKind,
        mark: bool,
    ) -> core::result::Result<Gpa, Halt> {
        let access = Access {
            kind,
            privilege: snapshot.privilege,
        };
        let mut tables = Tables {
            memory: &self.core.vm.memory,
            last: None,
        };
        let mapping = if mark {
            walk(&mut tables, &snapshot.paging, linear, access)
        } else {
            probe(&mut tables, &snapshot.paging, linear, access)
        };
        match mapping {
            Ok(mapping) => Ok(mapping.gpa),
            Err(error) => Err(error.into()),
        }
    }

    /// Reads at most 8 bytes at a linear address, for OUTS.
    pub(super) fn read_linear(
        &mut self,
        linear: Gva,
        data: &mut [u8],
    ) -> core::result::Result<(), Halt> {
        let snapshot = self.snapshot().map_err(Halt::Error)?;
        self.core.replay.restart(snapshot.rip);
        for (address, part) in split_mut(linear, data) {
            let gpa = self.translate(&snapshot, address, AccessKind::Read, true)?;
            self.core.read_piece(gpa, part)?;
        }
        Ok(())
    }

    /// Checks that so many bytes at a linear address can be written, for INS.
    pub(super) fn probe_linear(&mut self, linear: Gva, size: u8) -> core::result::Result<(), Halt> {
        let snapshot = self.snapshot().map_err(Halt::Error)?;
        let bytes = [0u8; 8];
        for (address, _) in split(linear, bytes.get(..usize::from(size)).unwrap_or(&bytes)) {
            self.translate(&snapshot, address, AccessKind::Write, false)?;
        }
        Ok(())
    }

    /// Writes at most 8 bytes at a linear address, for INS.
    pub(super) fn write_linear(
        &mut self,
        linear: Gva,
        data: &[u8],
    ) -> core::result::Result<(), Halt> {
        let snapshot = self.snapshot().map_err(Halt::Error)?;
        self.core.replay.restart(snapshot.rip);
        for (address, part) in split(linear, data) {
            let gpa = self.translate(&snapshot, address, AccessKind::Write, true)?;
            self.core.write_piece(gpa, part)?;
        }
        Ok(())
    }

    /// What follows an access that can't be done.
    ///
    /// # Errors
    ///
    /// The error that [`Halt::Error`] holds.
    pub(super) fn stop_to_exit(&mut self, halt: Halt) -> Result<Option<UserExit>> {
        match halt {
            Halt::Fault(exception) => {
                self.core.replay.forget();
                self.core.events.raise(exception);
                Ok(None)
            }
            Halt::Retry => Ok(None),
            Halt::UserRead => Ok(self.mmio_read_exit()),
            Halt::Unsupported => Ok(Some(UserExit::Emulation {
                bytes: [0; MAX_LENGTH],
                length: 0,
            })),
            Halt::Error(error) => Err(error),
        }
    }

    /// An EPT violation: memory that is not mapped yet, or a device.
    ///
    /// # Errors
    ///
    /// `EFAULT` where the process has nothing behind a slot, `ENOMEM`, `EINTR`.
    pub(super) fn handle_ept_violation(
        &mut self,
        violation: &EptViolation,
    ) -> Result<Option<UserExit>> {
        // The local APIC's registers cover whatever memory is below them.
        if !self.core.is_lapic(violation.gpa) {
            let access = if violation.is_write {
                AccessKind::Write
            } else if violation.is_fetch {
                AccessKind::Execute
            } else {
                AccessKind::Read
            };
            match self.core.vm.memory.fault(violation.gpa, access)? {
                Fault::Resolved => {
                    self.core.shared.counters.count(Event::FaultFixed);
                    return Ok(None);
                }
                Fault::Device => {}
            }
        }
        self.core.shared.counters.count(Event::FaultEmulated);
        if let Some(cut) = self.core.events.reinjection {
            // Delivering an event touched a device: nothing that can be emulated. Userspace may make
            // memory of it, or put the stack elsewhere.
            return self.with_vmcs(|_, vmcs| {
                Some(UserExit::Delivery {
                    data: [
                        u64::from(cut.info.0),
                        ExitReason::EPT_VIOLATION.0.into(),
                        vmcs.read(FieldNatural::EXIT_QUALIFICATION),
                        violation.gpa.raw(),
                        vmcs.irqs().cpu().into(),
                    ],
                })
            });
        }
        self.core.hint = Hint::of(violation);
        self.emulate()
    }

    /// Emulates the instruction at RIP.
    ///
    /// # Errors
    ///
    /// `EFAULT` where the process has nothing behind a slot.
    pub(super) fn emulate(&mut self) -> Result<Option<UserExit>> {
        self.core.shared.counters.count(Event::Emulation);
        let snapshot = self.snapshot()?;
        let mode = snapshot.mode();
        if let Some((instruction, bytes)) = self.core.replay.instruction(snapshot.rip) {
            return self.execute_instruction(&snapshot, mode, &instruction, &bytes);
        }
        let mut bytes = [0u8; MAX_LENGTH];
        let mut fetched = 0;
        loop {
            let wanted = fetched;
            if let Err(halt) = self.fetch(&snapshot, mode.code, &mut bytes, &mut fetched) {
                return self.stop_to_exit(halt);
            }
            match decode(bytes.get(..fetched).unwrap_or(&bytes), mode.code) {
                Ok(instruction) => {
                    return self.execute_instruction(&snapshot, mode, &instruction, &bytes);
                }
                Err(DecodeError::Truncated { .. }) if fetched > wanted && fetched < MAX_LENGTH => {}
                Err(error) => return Ok(self.undecodable(error, &mode, bytes, fetched)),
            }
        }
    }

    fn execute_instruction(
        &mut self,
        snapshot: &Snapshot,
        mode: Mode,
        instruction: &Instruction,
        bytes: &[u8; MAX_LENGTH],
    ) -> Result<Option<UserExit>> {
        self.core.replay.restart(snapshot.rip);
        let mut emulated = Emulated {
            rsp: self.core.registers[4],
            state: self,
            segments: [None; 6],
            rip: snapshot.rip,
            rflags: snapshot.rflags,
            snapshot,
            mode,
        };
        let progress = execute(instruction, &mut emulated);
        let (rip, rflags, rsp) = (emulated.rip, emulated.rflags, emulated.rsp);
        if !matches!(progress, Err(Stop::Machine(Halt::UserRead))) {
            self.core.hint = Hint::default();
        }
        // A string instruction that was stopped has committed its earlier elements.
        self.with_vmcs(|core, vmcs| {
            if rflags != snapshot.rflags {
                vmcs.write(FieldNatural::GUEST_RFLAGS, rflags & !Rflags::RF);
            }
            if rsp != core.registers[4] {
                core.registers[4] = rsp;
                vmcs.write(FieldNatural::GUEST_RSP, rsp);
            }
            if progress == Ok(Progress::Retired) {
                core.retire(vmcs, rip);
            }
        })?;
        match progress {
            Ok(_) => {
                self.core.replay.forget();
                Ok(self
                    .core
                    .replay
                    .has_writes()
                    .then(|| self.next_mmio_write())
                    .flatten())
            }
            Err(Stop::Fault(exception)) => self.stop_to_exit(Halt::Fault(exception)),
            Err(Stop::Machine(Halt::Unsupported)) | Err(Stop::Unsupported) => {
                Ok(Some(UserExit::Emulation {
                    bytes: *bytes,
                    length: instruction.length,
                }))
            }
            Err(Stop::Machine(Halt::UserRead)) => {
                self.core.replay.keep(snapshot.rip, (*instruction, *bytes));
                Ok(self.mmio_read_exit())
            }
            Err(Stop::Machine(halt)) => self.stop_to_exit(halt),
        }
    }

    /// Fetches instruction bytes up to the end of the page, from where the last fetch ended.
    fn fetch(
        &mut self,
        snapshot: &Snapshot,
        code: CodeSize,
        bytes: &mut [u8; MAX_LENGTH],
        fetched: &mut usize,
    ) -> core::result::Result<(), Halt> {
        let offset = snapshot.rip.wrapping_add(*fetched as u64);
        let linear = Gva::new(match code {
            CodeSize::Bits64 => offset,
            _ => snapshot.cs.base.wrapping_add(offset) & 0xffff_ffff,
        });
        let in_page = (PAGE_SIZE - linear.page_offset()) as usize;
        let count = in_page.min(MAX_LENGTH - *fetched);
        let part = bytes
            .get_mut(*fetched..*fetched + count)
            .ok_or(Halt::Unsupported)?;
        let access = Access {
            kind: AccessKind::Execute,
            privilege: snapshot.privilege,
        };
        // The code mostly lies in the tables' slot.
        let mut tables = Tables {
            memory: &self.core.vm.memory,
            last: None,
        };
        let mapping = walk(&mut tables, &snapshot.paging, linear, access)?;
        tables.read_code(mapping.gpa, part)?;
        *fetched += count;
        Ok(())
    }

    fn undecodable(
        &mut self,
        error: DecodeError,
        mode: &Mode,
        bytes: [u8; MAX_LENGTH],
        fetched: usize,
    ) -> Option<UserExit> {
        match error.exception(mode.protection) {
            Some(exception) => {
                self.core.events.raise(exception);
                None
            }
            None => Some(UserExit::Emulation {
                bytes,
                length: fetched as u8,
            }),
        }
    }
}

impl Core {
    /// Gives up the instruction that waits for userspace.
    pub(super) fn abandon_emulation(&mut self) {
        self.replay = Replay::default();
        self.hint = Hint::default();
    }
}

impl Snapshot {
    /// For accesses that the CPU makes by itself: privilege and RFLAGS.AC do not count.
    pub(super) fn as_supervisor(&self) -> Self {
        let mut snapshot = *self;
        snapshot.privilege = Privilege::Supervisor;
        snapshot.paging.alignment_check = false;
        snapshot
    }

    fn mode(&self) -> Mode {
        let access = self.cs.access;
        let protected = self.paging.cr0.has(Cr0::PE);
        let protection = if !protected {
            Protection::Real
        } else if self.rflags & Rflags::VM != 0 {
            Protection::Virtual8086
        } else {
            Protection::Protected
        };
        let code = if self.paging.efer.has(Efer::LMA) && access.is_long() {
            CodeSize::Bits64
        } else if protection == Protection::Protected && access.is_big() {
            CodeSize::Bits32
        } else {
            CodeSize::Bits16
        };
        Mode {
            code,
            protection,
            linear_bits: if self.paging.cr4.has(Cr4::LA57) {
                57
            } else {
                48
            },
            checks_alignment: self.paging.alignment_check
                && self.paging.cr0.has(Cr0::AM)
                && self.privilege == Privilege::User,
        }
    }
}

/// The bytes in the first page of an access of at most a page.
fn in_first_page(linear: Gva, length: usize) -> usize {
    length.min((PAGE_SIZE - linear.page_offset()) as usize)
}

/// An access, split where it crosses a page.
pub(super) fn split(linear: Gva, data: &[u8]) -> impl Iterator<Item = (Gva, &[u8])> {
    let (first, second) = data.split_at(in_first_page(linear, data.len()));
    let next = linear.wrapping_add(first.len() as u64);
    [(linear, first), (next, second)]
        .into_iter()
        .filter(|(_, part)| !part.is_empty())
}

/// Likewise, to be filled.
pub(super) fn split_mut(linear: Gva, data: &mut [u8]) -> impl Iterator<Item = (Gva, &mut [u8])> {
    let (first, second) = data.split_at_mut(in_first_page(linear, data.len()));
    let next = linear.wrapping_add(first.len() as u64);
    [(linear, first), (next, second)]
        .into_iter()
        .filter(|(_, part)| !part.is_empty())
}
