// SPDX-License-Identifier: GPL-2.0

//! A virtual CPU's events for userspace: KVM_GET/SET_VCPU_EVENTS and KVM_INTERRUPT.

use super::{
    events::Reinjection,
    vcpu::{Core, State},
};
use crate::{bindings as uapi, vmx::hardware::CurrentVmcs};
use kernel::prelude::*;
use rvisor_core::x86::{
    vector::{ExceptionVector, Vector},
    vmcs::{interruptibility, Field32, InterruptionInfo},
};

impl State {
    /// Carries out KVM_GET_VCPU_EVENTS.
    pub(crate) fn events(&mut self) -> Result<uapi::kvm_vcpu_events> {
        self.with_vmcs(|core, vmcs| {
            core.take_posted();
            core.settle_exception(vmcs);
            let mut events = uapi::kvm_vcpu_events::default();
            let state = vmcs.read32(Field32::GUEST_INTERRUPTIBILITY);
            let cut = core.events.reinjection.as_ref();
            let cut_exception = cut.and_then(|cut| {
                let vector = cut.vector_of(InterruptionInfo::HARDWARE_EXCEPTION)?;
                let code = cut.info.has_error_code().then_some(cut.error_code);
                Some((vector, code))
            });
            let exception = match &core.events.exception {
                Some(exception) => Some((exception.vector.number(), exception.error_code)),
                None => cut_exception,
            };
            if let Some((vector, code)) = exception {
                events.exception.injected = (!is_software_exception(vector)).into();
                events.exception.nr = vector;
                events.exception.has_error_code = code.is_some().into();
                events.exception.error_code = code.unwrap_or(0);
            }
            // INT n, INT3 and INTO that were cut short are not told: RIP stands on them still, and there
            // is no place for their length.
            if let Some(vector) = core.given_interrupt() {
                events.interrupt.injected = 1;
                events.interrupt.nr = vector.0;
            }
            events.nmi.injected = cut
                .is_some_and(|cut| cut.info.kind() == InterruptionInfo::NMI)
                .into();
            if state & interruptibility::STI != 0 {
                events.interrupt.shadow |= uapi::KVM_X86_SHADOW_INT_STI as u8;
            }
            if state & interruptibility::MOV_SS != 0 {
                events.interrupt.shadow |= uapi::KVM_X86_SHADOW_INT_MOV_SS as u8;
            }
            events.nmi.pending = core.events.nmis as u8;
            events.nmi.masked = (state & interruptibility::NMI != 0).into();
            events.flags = uapi::KVM_VCPUEVENT_VALID_NMI_PENDING | uapi::KVM_VCPUEVENT_VALID_SHADOW;
            events
        })
    }

    /// Carries out KVM_SET_VCPU_EVENTS.
    ///
    /// # Errors
    ///
    /// `EINVAL` for flags that are not offered and for vectors that are no exception's.
    pub(crate) fn set_events(&mut self, events: &uapi::kvm_vcpu_events) -> Result {
        const KNOWN: u32 = uapi::KVM_VCPUEVENT_VALID_NMI_PENDING
            | uapi::KVM_VCPUEVENT_VALID_SIPI_VECTOR
            | uapi::KVM_VCPUEVENT_VALID_SHADOW
            | uapi::KVM_VCPUEVENT_VALID_SMM;
        if events.flags & !KNOWN != 0 {
            return Err(EINVAL);
        }
        // KVM tells of system-management mode always; there is none here to be in.
        let smi = &events.smi;
        if events.flags & uapi::KVM_VCPUEVENT_VALID_SMM != 0
            && (smi.smm | smi.pending | smi.smm_inside_nmi | smi.latched_init) != 0
        {
            return Err(EINVAL);
        }
        let exception = (events.exception.injected != 0).then(|| {
            let code =
                (events.exception.has_error_code != 0).then_some(events.exception.error_code);
            Reinjection::new(
                InterruptionInfo::HARDWARE_EXCEPTION,
                events.exception.nr,
                code,
            )
        });
        if exception.is_some_and(|exception| !exception.is_exception()) {
            return Err(EINVAL);
        }
        self.with_vmcs(|core, vmcs| {
            // What others have posted is part of what is replaced.
            core.take_posted();
            core.events.exception = None;
            // As on KVM an exception goes before an NMI, and that before an interrupt.
            core.events.reinjection = exception.or_else(|| {
                (events.nmi.injected != 0).then(|| Reinjection::new(InterruptionInfo::NMI, 2, None))
            });
            if core.lapic.is_none() {
                core.events.interrupt = None;
            }
            if events.interrupt.injected != 0 {
                if events.interrupt.soft == 0 {
                    core.give_interrupt(Vector(events.interrupt.nr));
                } else if core.events.reinjection.is_none() {
                    core.events.reinjection = Some(Reinjection::new(
                        InterruptionInfo::SOFTWARE_INTERRUPT,
                        events.interrupt.nr,
                        None,
                    ));
                }
            }
            let mut state = vmcs.read32(Field32::GUEST_INTERRUPTIBILITY);
            let mut put = |bit: u32, on: bool| {
                state = if on { state | bit } else { state & !bit };
            };
            if events.flags & uapi::KVM_VCPUEVENT_VALID_SHADOW != 0 {
                let shadow = u32::from(events.interrupt.shadow);
                // No CPU has both (SDM vol. 3, 28.3.1.5).
                let mov_ss = shadow & uapi::KVM_X86_SHADOW_INT_MOV_SS != 0;
                let sti = shadow & uapi::KVM_X86_SHADOW_INT_STI != 0;
                put(interruptibility::STI, sti && !mov_ss);
                put(interruptibility::MOV_SS, mov_ss);
            }
            put(interruptibility::NMI, events.nmi.masked != 0);
            vmcs.write32(Field32::GUEST_INTERRUPTIBILITY, state);
            if events.flags & uapi::KVM_VCPUEVENT_VALID_NMI_PENDING != 0 {
                core.events.nmis = events.nmi.pending.min(2).into();
            }
            if events.flags & uapi::KVM_VCPUEVENT_VALID_SIPI_VECTOR != 0 && core.lapic.is_some() {
                core.sipi_vector = Vector(events.sipi_vector as u8);
            }
            core.events.attention = true;
        })
    }

    /// Carries out KVM_INTERRUPT for a machine whose 8259s, or all of whose controllers, are userspace's.
    ///
    /// # Errors
    ///
    /// `EINVAL` past vector 255, `ENXIO` with 8259s in the kernel; `EEXIST` where the local APIC, which is in
    /// the kernel, has not let the last one through yet.
    pub(crate) fn queue_interrupt(&mut self, vector: u32) -> Result {
        let vector = u8::try_from(vector).map_err(|_| EINVAL)?;
        if self.core.vm.irqchip().is_some() {
            return Err(ENXIO);
        }
        if self.core.lapic.is_none() {
            // One that waits gives way, as on KVM.
            self.core.give_interrupt(Vector(vector));
            return Ok(());
        }
        let events = &mut self.core.events;
        if events.interrupt.is_some() {
            return Err(EEXIST);
        }
        events.interrupt = Some(Vector(vector));
        events.attention = true;
        Ok(())
    }
}

impl Core {
    /// The external interrupt that is on its way into the guest: cut short, or userspace's own.
    pub(super) fn given_interrupt(&self) -> Option<Vector> {
        let cut = self.events.reinjection.as_ref();
        cut.and_then(|cut| cut.vector_of(InterruptionInfo::EXTERNAL_INTERRUPT))
            .map(Vector)
            .or(self.events.interrupt.filter(|_| self.lapic.is_none()))
    }

    /// Takes an external interrupt of userspace's. With a local APIC in the kernel it was on its way into
    /// the guest when the state was saved, and the local APIC has it in service.
    pub(super) fn give_interrupt(&mut self, vector: Vector) {
        let events = &mut self.events;
        events.attention = true;
        if self.lapic.is_none() {
            events.interrupt = Some(vector);
        } else if events
            .reinjection
            .is_none_or(|cut| cut.info.kind() == InterruptionInfo::EXTERNAL_INTERRUPT)
        {
            let kind = InterruptionInfo::EXTERNAL_INTERRUPT;
            events.reinjection = Some(Reinjection::new(kind, vector.0, None));
        }
    }

    /// Puts the address of a page fault that waits into CR2, where userspace looks for it.
    pub(super) fn settle_exception(&mut self, vmcs: &mut CurrentVmcs<'_>) {
        let exception = self.events.exception.as_mut();
        if let Some(address) = exception.and_then(|exception| exception.address.take()) {
            vmcs.hardware.cr2 = address;
        }
    }
}

/// Whether an instruction of its own raises the exception: INT3 and INTO.
fn is_software_exception(vector: u8) -> bool {
    vector == ExceptionVector::Breakpoint.number() || vector == ExceptionVector::Overflow.number()
}
