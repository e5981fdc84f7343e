// SPDX-License-Identifier: GPL-2.0

//! Task switches, which a CPU in VMX non-root operation leaves to the hypervisor (SDM vol. 3, 27.2).

use super::{
    emulation::{split, split_mut, Halt, Snapshot},
    run_page::UserExit,
    vcpu::{Core, State},
};
use crate::vmx::hardware::CurrentVmcs;
use kernel::prelude::*;
use rvisor_core::{
    emulate::{switch_task, TaskMachine, TaskSegment, TaskStop, TaskSwitch, TaskSwitchSource},
    mmu::walk::AccessKind,
    x86::{
        address::Gva,
        control::{Cr0, Dr6, Dr7},
        segment::{Segment, SegmentRegister},
        vector::{Exception, ExceptionVector},
        vmcs::{interruptibility, Field32, FieldNatural, InterruptionInfo, VmcsSegment},
    },
};

/// A task switch as the exit describes it.
#[derive(Clone, Copy)]
pub(crate) struct Switch {
    task: TaskSwitch,
    /// An NMI came through a task gate.
    is_nmi: bool,
}

impl Core {
    /// What an exit for a task switch asks for. The event that caused it waits as if it were to be
    /// delivered again, so that a fault on the way combines with it.
    pub(super) fn task_switch(&mut self, vmcs: &mut CurrentVmcs<'_>) -> Switch {
        let mut task = TaskSwitch::from_qualification(vmcs.read(FieldNatural::EXIT_QUALIFICATION));
        let event = InterruptionInfo(vmcs.read32(Field32::IDT_VECTORING_INFO));
        let rip = vmcs.read(FieldNatural::GUEST_RIP);
        let mut is_behind = true;
        let mut is_nmi = false;
        if task.source == TaskSwitchSource::Gate && event.is_valid() {
            is_behind = event.needs_instruction_length();
            is_nmi = event.kind() == InterruptionInfo::NMI;
            if event.has_error_code() {
                task.error_code = Some(vmcs.read32(Field32::IDT_VECTORING_ERROR_CODE));
            }
            self.save_interrupted_delivery(vmcs);
        }
        let length = if is_behind {
            vmcs.read32(Field32::EXIT_INSTRUCTION_LENGTH)
        } else {
            0
        };
        task.return_address = (rip as u32).wrapping_add(length);
        Switch { task, is_nmi }
    }
}

impl State {
    /// Makes a task switch.
    ///
    /// # Errors
    ///
    /// `EFAULT` where guest memory is backed by nothing.
    pub(super) fn handle_task_switch(&mut self, switch: &Switch) -> Result<Option<UserExit>> {
        let result = switch_task(&mut Switching(self), &switch.task);
        match result {
            Ok(trap) => {
                self.with_vmcs(|core, vmcs| core.finish_switch(vmcs, switch, trap))?;
                Ok(None)
            }
            Err(TaskStop::Fault(exception)) => {
                self.core.events.raise(exception);
                Ok(None)
            }
            Err(TaskStop::Machine(halt)) => self.stop_to_exit(halt),
        }
    }
}

impl Core {
    /// The event was delivered with the switch.
    fn finish_switch(&mut self, vmcs: &mut CurrentVmcs<'_>, switch: &Switch, trap: bool) {
        let mut state = vmcs.read32(Field32::GUEST_INTERRUPTIBILITY);
        state &= !(interruptibility::STI | interruptibility::MOV_SS);
        if switch.is_nmi {
            state |= interruptibility::NMI;
        }
        vmcs.write32(Field32::GUEST_INTERRUPTIBILITY, state);
        self.events.reinjection = None;
        self.events.attention = true;
        if trap {
            self.dr6 |= Dr6::BT;
            self.events.raise(Exception::plain(ExceptionVector::Debug));
        }
    }
}

/// The virtual CPU under a task switch.
struct Switching<'a>(&'a mut State);

/// The VMCS's name of a segment register.
fn vmcs_segment(register: TaskSegment) -> VmcsSegment {
    match register {
        TaskSegment::Code(SegmentRegister::Es) => VmcsSegment::Es,
        TaskSegment::Code(SegmentRegister::Cs) => VmcsSegment::Cs,
        TaskSegment::Code(SegmentRegister::Ss) => VmcsSegment::Ss,
        TaskSegment::Code(SegmentRegister::Ds) => VmcsSegment::Ds,
        TaskSegment::Code(SegmentRegister::Fs) => VmcsSegment::Fs,
        TaskSegment::Code(SegmentRegister::Gs) => VmcsSegment::Gs,
        TaskSegment::LocalTable => VmcsSegment::Ldtr,
        TaskSegment::Task => VmcsSegment::Tr,
    }
}

impl Switching<'_> {
    /// Runs `f` on the VMCS. Where VMX is gone, which nothing but a dying host brings about, the next
    /// entry says so.
    fn with<R: Default>(&mut self, f: impl FnOnce(&mut Core, &mut CurrentVmcs<'_>) -> R) -> R {
        self.0.with_vmcs(f).unwrap_or_default()
    }

    /// The paging of the task that is current, for the CPU's own accesses.
    fn snapshot(&mut self) -> core::result::Result<Snapshot, Halt> {
        let snapshot = self.0.snapshot().map_err(Halt::Error)?;
        Ok(snapshot.as_supervisor())
    }
}

impl TaskMachine for Switching<'_> {
    type Stop = Halt;

    fn read(&mut self, linear: Gva, data: &mut [u8]) -> core::result::Result<(), Halt> {
        let snapshot = self.snapshot()?;
        for (address, part) in split_mut(linear, data) {
            let gpa = self
                .0
                .translate(&snapshot, address, AccessKind::Read, true)?;
            match self.0.core.vm.memory.read(gpa, part).map_err(Halt::Error)? {
                Some(()) => {}
                None => return Err(Halt::Unsupported),
            }
        }
        Ok(())
    }

    fn write(&mut self, linear: Gva, data: &[u8]) -> core::result::Result<(), Halt> {
        let snapshot = self.snapshot()?;
        for (address, part) in split(linear, data) {
            let gpa = self
                .0
                .translate(&snapshot, address, AccessKind::Write, true)?;
            match self
                .0
                .core
                .vm
                .memory
                .write(gpa, part)
                .map_err(Halt::Error)?
            {
                Some(()) => {}
                None => return Err(Halt::Unsupported),
            }
        }
        Ok(())
    }

    fn global_table(&mut self) -> (u64, u32) {
        self.with(|_, vmcs| {
            (
                vmcs.read(FieldNatural::GUEST_GDTR_BASE),
                vmcs.read32(Field32::GUEST_GDTR_LIMIT),
            )
        })
    }

    fn segment(&mut self, register: TaskSegment) -> Segment {
        self.with(|_, vmcs| vmcs.segment(vmcs_segment(register)))
    }

    fn set_segment(&mut self, register: TaskSegment, value: &Segment) {
        self.with(|_, vmcs| vmcs.set_segment(vmcs_segment(register), value));
    }

    fn registers(&mut self) -> ([u32; 8], u32, u32) {
        self.with(|core, vmcs| {
            let mut registers = [0; 8];
            for (number, register) in (0..).zip(&mut registers) {
                *register = core.gpr(vmcs, number) as u32;
            }
            (
                registers,
                vmcs.read(FieldNatural::GUEST_RIP) as u32,
                vmcs.read(FieldNatural::GUEST_RFLAGS) as u32,
            )
        })
    }

    fn set_registers(&mut self, registers: &[u32; 8], address: u32, flags: u32) {
        self.with(|core, vmcs| {
            for (number, register) in (0..).zip(registers) {
                core.set_gpr(vmcs, number, u64::from(*register));
            }
            vmcs.write(FieldNatural::GUEST_RIP, address.into());
            vmcs.write(FieldNatural::GUEST_RFLAGS, flags.into());
        });
    }

    fn load_cr3(&mut self, cr3: u32) -> core::result::Result<bool, Halt> {
        if !self.0.core.cr0.has(Cr0::PG) {
            return Ok(true);
        }
        self.0.write_cr3(cr3.into()).map_err(Halt::Error)
    }

    fn note_switch(&mut self) {
        self.with(|core, vmcs| {
            let cr0 = core.read_cr0(vmcs).with(Cr0::TS);
            core.set_cr0(vmcs, cr0);
            let dr7 = vmcs.read(FieldNatural::GUEST_DR7) & !Dr7::LOCAL;
            // Clearing bits of a legal value leaves a legal one.
            let _ = core.set_debug_register(vmcs, 7, dr7);
        });
    }
}
