// SPDX-License-Identifier: GPL-2.0

//! VM exits, by reason. What can be answered with interrupts off is answered here; the rest is named
//! and left to `State::handle_slow`.

use super::{
    run::current_cpu,
    run_page::UserExit,
    vcpu::{Core, MpState, State},
};
use crate::{host::cpu, vmx::hardware::CurrentVmcs};
use kernel::prelude::*;
use rvisor_core::{
    cpu::cpuid::{self, Runtime},
    x86::{
        address::{Gpa, Gva},
        control::{check_xcr0, Cr0, Dr6, Dr7, Efer, Rflags, Xcr0},
        exit::{CrAccess, DrAccess, EptViolation, ExitReason, ExitReasonField, IoAccess},
        segment::AccessRights,
        vector::{Exception, ExceptionVector},
        vmcs::{interruptibility, Field32, Field64, FieldNatural, InterruptionInfo, VmcsSegment},
    },
};

/// What follows an exit. The tag is a byte of its own: one hidden in a field takes a computation to read.
#[repr(u8)]
pub(crate) enum Next {
    /// Enter again at once.
    Enter,
    /// An interrupt of the host's waits: let it in.
    OpenInterrupts,
    /// More is to be done with interrupts on.
    Slow(Slow),
    /// Return to userspace.
    User(UserExit),
}

/// What needs guest memory, sleep or another CPU.
#[derive(Clone, Copy)]
pub(crate) enum Slow {
    /// An EPT violation.
    Ept(EptViolation),
    /// INS or OUTS.
    StringIo(IoAccess),
    /// An access to CR0, CR3 or CR4 whose consequences may reach into guest memory.
    Cr(CrAccess),
    /// #AC that the host's detection of split locks caused.
    SplitLock { rip: u64 },
    /// A switch to another task of a 32-bit guest.
    Task(super::task::Switch),
    /// HLT: the thread sleeps.
    Halt,
    /// PAUSE: let another thread run.
    Yield,
}

/// KVM's answer to a hypercall that it does not know (`-KVM_ENOSYS`).
const HYPERCALL_UNKNOWN: u64 = (-1000i64) as u64;
/// KVM's answer to a hypercall from user mode (`-KVM_EPERM`).
const HYPERCALL_NOT_PERMITTED: u64 = (-1i64) as u64;

impl Core {
    /// Handles an exit as far as it can be with interrupts off.
    #[inline]
    pub(crate) fn handle_exit(
        &mut self,
        vmcs: &mut CurrentVmcs<'_>,
        field: ExitReasonField,
    ) -> Next {
        if field.is_entry_failure() {
            return self.entry_failed(vmcs, field);
        }
        match field.basic() {
            ExitReason::CPUID => self.exit_cpuid(vmcs),
            ExitReason::RDMSR => self.exit_rdmsr(vmcs),
            ExitReason::WRMSR => self.exit_wrmsr(vmcs),
            ExitReason::IO_INSTRUCTION => self.exit_io(vmcs),
            ExitReason::VMCALL => self.exit_vmcall(vmcs),
            ExitReason::EXTERNAL_INTERRUPT => Next::OpenInterrupts,
            ExitReason::EPT_VIOLATION => {
                self.save_interrupted_delivery(vmcs);
                Next::Slow(Slow::Ept(self.ept_violation(vmcs)))
            }
            ExitReason::INTERRUPT_WINDOW => self.exit_interrupt_window(),
            reason => self.handle_rare_exit(vmcs, reason),
        }
    }

    #[cold]
    #[inline(never)]
    fn entry_failed(&mut self, vmcs: &mut CurrentVmcs<'_>, field: ExitReasonField) -> Next {
        if field.basic() == ExitReason::ENTRY_FAILURE_MACHINE_CHECK {
            cpu::machine_check(vmcs.irqs());
        }
        self.take_back_injection(vmcs);
        Next::User(UserExit::FailedEntry {
            reason: field.0.into(),
            cpu: current_cpu(vmcs),
        })
    }

    #[inline(never)]
    fn handle_rare_exit(&mut self, vmcs: &mut CurrentVmcs<'_>, reason: ExitReason) -> Next {
        match reason {
            ExitReason::EXCEPTION_OR_NMI => self.exit_exception(vmcs),
            ExitReason::NMI_WINDOW | ExitReason::TPR_BELOW_THRESHOLD => {
                self.events.attention = true;
                Next::Enter
            }
            ExitReason::HLT => {
                self.skip_instruction(vmcs);
                if self.lapic.is_none() {
                    return Next::User(UserExit::Halt);
                }
                self.mp_state = MpState::Halted;
                Next::Slow(Slow::Halt)
            }
            ExitReason::CR_ACCESS => self.exit_cr(vmcs),
            ExitReason::TASK_SWITCH => Next::Slow(Slow::Task(self.task_switch(vmcs))),
            ExitReason::DR_ACCESS => self.exit_dr(vmcs),
            ExitReason::TRIPLE_FAULT => Next::User(UserExit::Shutdown),
            ExitReason::XSETBV => self.exit_xsetbv(vmcs),
            // No device of a guest bypasses the CPU's caches.
            ExitReason::INVD | ExitReason::WBINVD => self.skip(vmcs),
            ExitReason::PAUSE => {
                self.skip_instruction(vmcs);
                Next::Slow(Slow::Yield)
            }
            ExitReason::RDPMC => self.raise(Exception::GENERAL_PROTECTION),
            reason if reason.is_never_offered() => self.raise(Exception::INVALID_OPCODE),
            // INIT is blocked by the host while VMX is on, and an EPT misconfiguration is never meant.
            _ => Next::User(UserExit::UnexpectedExit {
                reason: reason.0,
                cpu: current_cpu(vmcs),
            }),
        }
    }

    /// Raises an exception at the current instruction.
    pub(super) fn raise(&mut self, exception: Exception) -> Next {
        self.events.raise(exception);
        Next::Enter
    }

    #[inline]
    pub(super) fn skip(&mut self, vmcs: &mut CurrentVmcs<'_>) -> Next {
        self.skip_instruction(vmcs);
        Next::Enter
    }

    /// Moves RIP behind the instruction that exited.
    #[inline]
    pub(super) fn skip_instruction(&mut self, vmcs: &mut CurrentVmcs<'_>) {
        let length = vmcs.read32(Field32::EXIT_INSTRUCTION_LENGTH);
        let rip = vmcs.read(FieldNatural::GUEST_RIP);
        self.retire_over(vmcs, rip, length);
    }

    /// Ends the instruction of `length` bytes at `rip`.
    #[inline]
    pub(super) fn retire_over(&mut self, vmcs: &mut CurrentVmcs<'_>, rip: u64, length: u32) {
        let mut next = rip.wrapping_add(u64::from(length));
        // EIP wraps: outside 64-bit code only the end of the address space leads past 32 bits.
        if (next as u32) < length && !self.is_64_bit(vmcs) {
            next &= 0xffff_ffff;
        }
        self.retire_at(vmcs, next);
    }

    /// Ends an instruction that leads to `rip`, which may lie behind the end of the address space.
    pub(super) fn retire(&mut self, vmcs: &mut CurrentVmcs<'_>, mut rip: u64) {
        if rip >> 32 == 1 && !self.is_64_bit(vmcs) {
            rip &= 0xffff_ffff;
        }
        self.retire_at(vmcs, rip);
    }

    /// RIP, the shadow of STI and MOV SS, and the trap flag.
    #[inline]
    fn retire_at(&mut self, vmcs: &mut CurrentVmcs<'_>, rip: u64) {
        vmcs.write(FieldNatural::GUEST_RIP, rip);
        let state = vmcs.read32(Field32::GUEST_INTERRUPTIBILITY);
        let shadow = interruptibility::STI | interruptibility::MOV_SS;
        if state & shadow != 0 {
            vmcs.write32(Field32::GUEST_INTERRUPTIBILITY, state & !shadow);
        }
        if vmcs.read(FieldNatural::GUEST_RFLAGS) & Rflags::TF != 0 {
            self.dr6 |= Dr6::BS;
            self.events.raise(Exception::plain(ExceptionVector::Debug));
        }
    }

    /// Whether the guest executes 64-bit code.
    #[inline]
    pub(super) fn is_64_bit(&self, vmcs: &CurrentVmcs<'_>) -> bool {
        self.efer.has(Efer::LMA)
            && AccessRights(vmcs.read32(VmcsSegment::Cs.access_rights())).is_long()
    }

    /// A general register as an operand of the mode's own width: 64 bits or 32.
    #[inline]
    pub(super) fn operand(&self, vmcs: &CurrentVmcs<'_>, number: u8) -> u64 {
        let value = self.gpr(vmcs, number);
        if self.is_64_bit(vmcs) {
            value
        } else {
            value & 0xffff_ffff
        }
    }

    /// The current privilege level.
    #[inline]
    pub(super) fn cpl(&self, vmcs: &CurrentVmcs<'_>) -> u8 {
        if !self.is_protected() {
            return 0;
        }
        AccessRights(vmcs.read32(VmcsSegment::Ss.access_rights())).privilege()
    }

    fn exit_cpuid(&mut self, vmcs: &mut CurrentVmcs<'_>) -> Next {
        if self.msrs.faults_cpuid() && self.cpl(vmcs) != 0 {
            return self.raise(Exception::GENERAL_PROTECTION);
        }
        let runtime = || Runtime {
            cr4: self.cr4,
            apic_enabled: self.apic_enabled(),
            xcr0: vmcs.hardware.xcr0,
            xss: 0,
            layout: &self.vm.host.xsave,
        };
        let [eax, ebx, ecx, edx] = cpuid::execute(
            &self.cpuid,
            &self.cpuid_index,
            runtime,
            self.registers[0] as u32,
            self.registers[1] as u32,
        );
        self.registers[0] = eax.into();
        self.registers[1] = ecx.into();
        self.registers[2] = edx.into();
        self.registers[3] = ebx.into();
        self.skip(vmcs)
    }

    /// Hypercalls: none is offered, each is answered as KVM answers an unknown one.
    fn exit_vmcall(&mut self, vmcs: &mut CurrentVmcs<'_>) -> Next {
        let answer = if self.cpl(vmcs) == 0 {
            HYPERCALL_UNKNOWN
        } else {
            HYPERCALL_NOT_PERMITTED
        };
        self.registers[0] = if self.is_64_bit(vmcs) {
            answer
        } else {
            answer & 0xffff_ffff
        };
        self.skip(vmcs)
    }

    fn exit_interrupt_window(&mut self) -> Next {
        self.events.attention = true;
        if self.wants_window && self.takes_external_interrupt() {
            return Next::User(UserExit::InterruptWindow);
        }
        Next::Enter
    }

    fn ept_violation(&mut self, vmcs: &mut CurrentVmcs<'_>) -> EptViolation {
        let violation = EptViolation::from_qualification(
            vmcs.read(FieldNatural::EXIT_QUALIFICATION),
            Gpa::new(vmcs.read64(Field64::GUEST_PHYSICAL_ADDRESS)),
            Gva::new(vmcs.read(FieldNatural::GUEST_LINEAR_ADDRESS)),
        );
        // An IRET that faulted had already unblocked NMIs (SDM vol. 3, 29.2.3).
        if violation.nmi_unblocking
            && !InterruptionInfo(vmcs.read32(Field32::IDT_VECTORING_INFO)).is_valid()
        {
            let state = vmcs.read32(Field32::GUEST_INTERRUPTIBILITY);
            vmcs.write32(
                Field32::GUEST_INTERRUPTIBILITY,
                state | interruptibility::NMI,
            );
        }
        violation
    }

    fn exit_exception(&mut self, vmcs: &mut CurrentVmcs<'_>) -> Next {
        let info = InterruptionInfo(vmcs.read32(Field32::EXIT_INTERRUPTION_INFO));
        if info.kind() == InterruptionInfo::NMI {
            cpu::nmi(vmcs.irqs());
            return Next::Enter;
        }
        self.save_interrupted_delivery(vmcs);
        // An IRET that faulted had already unblocked NMIs (SDM vol. 3, 29.2.3).
        if info.0 & InterruptionInfo::NMI_UNBLOCKING != 0
            && !InterruptionInfo(vmcs.read32(Field32::IDT_VECTORING_INFO)).is_valid()
        {
            let state = vmcs.read32(Field32::GUEST_INTERRUPTIBILITY);
            vmcs.write32(
                Field32::GUEST_INTERRUPTIBILITY,
                state | interruptibility::NMI,
            );
        }
        match info.vector() {
            1 => {
                let qualification = vmcs.read(FieldNatural::EXIT_QUALIFICATION);
                self.dr6 = (self.dr6 & !0xf) | (qualification & (0xf | Dr6::BD | Dr6::BS));
                if info.kind() == InterruptionInfo::PRIVILEGED_SOFTWARE_EXCEPTION {
                    // INT1 is a trap: its handler returns behind it.
                    let length = vmcs.read32(Field32::EXIT_INSTRUCTION_LENGTH);
                    let rip = vmcs.read(FieldNatural::GUEST_RIP);
                    vmcs.write(FieldNatural::GUEST_RIP, rip.wrapping_add(length.into()));
                }
                // VM entry wants a pending single step where TF meets a shadow (SDM vol. 3, 28.3.1.5).
                let shadow = interruptibility::STI | interruptibility::MOV_SS;
                if vmcs.read(FieldNatural::GUEST_RFLAGS) & Rflags::TF != 0
                    && vmcs.read32(Field32::GUEST_INTERRUPTIBILITY) & shadow != 0
                {
                    let pending = vmcs.read(FieldNatural::GUEST_PENDING_DEBUG);
                    vmcs.write(FieldNatural::GUEST_PENDING_DEBUG, pending | Dr6::BS);
                }
                self.raise(Exception::plain(ExceptionVector::Debug))
            }
            17 if !self.may_raise_alignment_check(vmcs) => {
                // The host's detection of split locks: it warns, and lets the guest go on or not.
                let rip = vmcs.read(FieldNatural::GUEST_RIP);
                Next::Slow(Slow::SplitLock { rip })
            }
            17 => {
                let code = vmcs.read32(Field32::EXIT_INTERRUPTION_ERROR_CODE);
                self.raise(Exception::with_code(ExceptionVector::AlignmentCheck, code))
            }
            18 => {
                cpu::machine_check(vmcs.irqs());
                Next::Enter
            }
            _ => Next::User(UserExit::UnexpectedExit {
                reason: ExitReason::EXCEPTION_OR_NMI.0,
                cpu: current_cpu(vmcs),
            }),
        }
    }

    /// Whether #AC is the guest's own: alignment checks are on, at CPL 3 (SDM vol. 3, 7.15).
    fn may_raise_alignment_check(&self, vmcs: &CurrentVmcs<'_>) -> bool {
        self.cpl(vmcs) == 3
            && self.cr0.has(Cr0::AM)
            && vmcs.read(FieldNatural::GUEST_RFLAGS) & Rflags::AC != 0
    }

    fn exit_xsetbv(&mut self, vmcs: &mut CurrentVmcs<'_>) -> Next {
        let value = Xcr0((self.registers[2] << 32) | (self.registers[0] & 0xffff_ffff));
        if self.cpl(vmcs) != 0
            || self.registers[1] as u32 != 0
            || check_xcr0(value, self.cpu.xcr0).is_err()
        {
            return self.raise(Exception::GENERAL_PROTECTION);
        }
        vmcs.hardware.xcr0 = value.0;
        self.skip(vmcs)
    }

    fn exit_dr(&mut self, vmcs: &mut CurrentVmcs<'_>) -> Next {
        let access = DrAccess::from_qualification(vmcs.read(FieldNatural::EXIT_QUALIFICATION));
        if self.cpl(vmcs) != 0 {
            return self.raise(Exception::GENERAL_PROTECTION);
        }
        let dr7 = Dr7(vmcs.read(FieldNatural::GUEST_DR7));
        if dr7.has(Dr7::GD) {
            // General detect (SDM vol. 3, 19.2.4).
            vmcs.write(FieldNatural::GUEST_DR7, dr7.without(Dr7::GD).0);
            self.dr6 |= Dr6::BD;
            return self.raise(Exception::plain(ExceptionVector::Debug));
        }
        let register = match access.register {
            4 | 5 if self.read_cr4(vmcs).has(rvisor_core::x86::control::Cr4::DE) => {
                return self.raise(Exception::INVALID_OPCODE);
            }
            4 => 6,
            5 => 7,
            register => register,
        };
        if access.is_read {
            let value = self.debug_register(vmcs, register);
            self.set_gpr(vmcs, access.general, value);
        } else {
            let value = self.operand(vmcs, access.general);
            if self.set_debug_register(vmcs, register, value).is_err() {
                return self.raise(Exception::GENERAL_PROTECTION);
            }
        }
        self.skip(vmcs)
    }

    fn exit_cr(&mut self, vmcs: &mut CurrentVmcs<'_>) -> Next {
        match CrAccess::from_qualification(vmcs.read(FieldNatural::EXIT_QUALIFICATION)) {
            CrAccess::MovFrom {
                register: 8,
                destination,
            } => {
                let value = match &self.lapic {
                    Some(lapic) => lapic.cr8().into(),
                    None => self.cr8,
                };
                self.set_gpr(vmcs, destination, value);
                self.skip(vmcs)
            }
            CrAccess::MovTo {
                register: 8,
                source,
            } => {
                let value = self.operand(vmcs, source);
                if value > 0xf {
                    return self.raise(Exception::GENERAL_PROTECTION);
                }
                self.skip_instruction(vmcs);
                match &mut self.lapic {
                    Some(lapic) => {
                        lapic.set_cr8(value as u8);
                        self.events.attention = true;
                        Next::Enter
                    }
                    None => {
                        let lowered = value < self.cr8;
                        self.cr8 = value;
                        // Interrupts that a lower priority lets through are userspace's to give.
                        if lowered {
                            Next::User(UserExit::SetTpr)
                        } else {
                            Next::Enter
                        }
                    }
                }
            }
            access => Next::Slow(Slow::Cr(access)),
        }
    }
}

impl State {
    /// Carries out what an exit left for interrupts on.
    ///
    /// # Errors
    ///
    /// `EFAULT` where guest memory is backed by nothing, `ENOMEM`, `EINTR`.
    pub(crate) fn handle_slow(&mut self, slow: Slow) -> Result<Option<UserExit>> {
        match slow {
            Slow::Ept(violation) => self.handle_ept_violation(&violation),
            Slow::StringIo(access) => self.handle_string_io(&access),
            Slow::Cr(access) => self.handle_cr(access),
            Slow::Task(switch) => self.handle_task_switch(&switch),
            Slow::SplitLock { rip } => {
                if !self.core.vm.host.symbols.handle_split_lock(rip) {
                    let exception = Exception::with_code(ExceptionVector::AlignmentCheck, 0);
                    self.core.events.raise(exception);
                }
                Ok(None)
            }
            Slow::Halt => Ok(None),
            Slow::Yield => {
                // SAFETY: Task context, no lock held but the vCPU's own.
                unsafe { kernel::bindings::yield_() };
                Ok(None)
            }
        }
    }
}
