// SPDX-License-Identifier: GPL-2.0

//! Exceptions, NMIs and interrupts on their way into the guest.

use super::vcpu::Core;
use crate::vmx::hardware::CurrentVmcs;
use rvisor_core::x86::{
    address::Gva,
    control::{Dr7, Rflags},
    controls::primary,
    vector::{Exception, ExceptionVector, Vector},
    vmcs::{interruptibility, Field32, FieldNatural, InterruptionInfo},
};

/// An event whose delivery an exit cut short: it is delivered again, as it was.
#[derive(Clone, Copy)]
pub(crate) struct Reinjection {
    pub(crate) info: InterruptionInfo,
    pub(crate) error_code: u32,
    pub(crate) instruction_length: u32,
}

/// What waits to be delivered.
#[derive(Default)]
pub(crate) struct Events {
    /// Cut short: first in line.
    pub(crate) reinjection: Option<Reinjection>,
    /// An exception that rvisor raises.
    pub(crate) exception: Option<Exception>,
    /// NMIs that were not injected yet, at most 2.
    pub(crate) nmis: u32,
    /// KVM_INTERRUPT's vector, for a VM without an interrupt controller in the kernel.
    pub(crate) interrupt: Option<Vector>,
    /// Something may be pending: look before the next entry.
    pub(crate) attention: bool,
    /// Two exceptions fell over each other in a way that ends in a triple fault.
    pub(crate) triple_fault: bool,
}

/// How an exception combines with the next (SDM vol. 3, table 7-4).
#[derive(PartialEq, Eq)]
enum Class {
    Benign,
    Contributory,
    PageFault,
    DoubleFault,
}

fn class_of(vector: u8) -> Class {
    match vector {
        0 | 10..=13 => Class::Contributory,
        14 => Class::PageFault,
        8 => Class::DoubleFault,
        _ => Class::Benign,
    }
}

impl Events {
    /// Raises an exception at the current instruction; combines it with one that was being delivered.
    pub(crate) fn raise(&mut self, exception: Exception) {
        self.attention = true;
        let earlier = match (&self.exception, &self.reinjection) {
            (Some(earlier), _) => Some(earlier.vector.number()),
            (None, Some(cut)) if cut.info.kind() == InterruptionInfo::HARDWARE_EXCEPTION => {
                Some(cut.info.vector())
            }
            _ => None,
        };
        let Some(earlier) = earlier else {
            self.exception = Some(exception);
            return;
        };
        let (first, second) = (class_of(earlier), class_of(exception.vector.number()));
        self.exception = match (first, second) {
            (Class::DoubleFault, Class::Contributory | Class::PageFault) => {
                self.triple_fault = true;
                None
            }
            (Class::Contributory, Class::Contributory)
            | (Class::PageFault, Class::Contributory | Class::PageFault) => {
                self.reinjection = None;
                Some(Exception::with_code(ExceptionVector::DoubleFault, 0))
            }
            // The second is handled first; the instruction will raise the first again.
            _ => {
                self.reinjection = None;
                Some(exception)
            }
        };
    }
}

impl Core {
    /// Takes note of an event whose delivery this exit cut short.
    pub(crate) fn save_interrupted_delivery(&mut self, vmcs: &CurrentVmcs<'_>) {
        let info = InterruptionInfo(vmcs.read32(Field32::IDT_VECTORING_INFO));
        if !info.is_valid() {
            return;
        }
        self.events.attention = true;
        if info.kind() == InterruptionInfo::NMI {
            // Delivered again as a new one; delivery blocks NMIs once more.
            self.events.nmis = (self.events.nmis + 1).min(2);
            self.unblock_nmi = true;
            return;
        }
        self.events.reinjection = Some(Reinjection {
            info: info.for_reinjection(),
            error_code: if info.has_error_code() {
                vmcs.read32(Field32::IDT_VECTORING_ERROR_CODE)
            } else {
                0
            },
            instruction_length: vmcs.read32(Field32::EXIT_INSTRUCTION_LENGTH),
        });
    }

    /// Puts the first event in line into the VMCS, and asks for an exit when the next can go.
    pub(crate) fn inject_events(&mut self, vmcs: &mut CurrentVmcs<'_>) {
        if self.unblock_nmi {
            self.unblock_nmi = false;
            let state = vmcs.read32(Field32::GUEST_INTERRUPTIBILITY);
            vmcs.write32(
                Field32::GUEST_INTERRUPTIBILITY,
                state & !interruptibility::NMI,
            );
        }
        let mut injected = true;
        if let Some(cut) = self.events.reinjection.take() {
            inject(vmcs, cut.info, cut.error_code, cut.instruction_length);
        } else if let Some(exception) = self.events.exception.take() {
            self.inject_exception(vmcs, &exception);
        } else {
            injected = false;
        }
        let mut window = 0;
        if self.events.nmis > 0 {
            let blocked = interruptibility::NMI | interruptibility::STI | interruptibility::MOV_SS;
            if !injected && vmcs.read32(Field32::GUEST_INTERRUPTIBILITY) & blocked == 0 {
                self.events.nmis -= 1;
                inject(
                    vmcs,
                    InterruptionInfo::new(InterruptionInfo::NMI, 2, false),
                    0,
                    0,
                );
                injected = true;
            }
            if self.events.nmis > 0 {
                window |= primary::NMI_WINDOW_EXITING;
            }
        }
        if self.has_interrupt() {
            if !injected && is_interruptible(vmcs) {
                if let Some(vector) = self.take_interrupt() {
                    inject(
                        vmcs,
                        InterruptionInfo::new(
                            InterruptionInfo::EXTERNAL_INTERRUPT,
                            vector.0,
                            false,
                        ),
                        0,
                        0,
                    );
                }
            }
            if self.has_interrupt() {
                window |= primary::INTERRUPT_WINDOW_EXITING;
            }
        } else if self.wants_window {
            window |= primary::INTERRUPT_WINDOW_EXITING;
        }
        self.set_windows(vmcs, window);
        self.events.attention = self.events.exception.is_some();
    }

    fn inject_exception(&mut self, vmcs: &mut CurrentVmcs<'_>, exception: &Exception) {
        if let Some(address) = exception.address {
            vmcs.hardware.cr2 = Gva::new(address.raw());
        }
        if exception.vector == ExceptionVector::Debug {
            // Delivery switches general detect off (SDM vol. 3, 19.2.4).
            let dr7 = vmcs.read(FieldNatural::GUEST_DR7);
            vmcs.write(FieldNatural::GUEST_DR7, dr7 & !Dr7::GD);
        }
        // In real mode no exception pushes an error code.
        let code = exception.error_code.filter(|_| self.is_protected());
        // Faults are to find RF set, so that the instruction does not break again on its return.
        if !matches!(
            exception.vector,
            ExceptionVector::Debug | ExceptionVector::Breakpoint | ExceptionVector::Overflow
        ) {
            let flags = vmcs.read(FieldNatural::GUEST_RFLAGS);
            vmcs.write(FieldNatural::GUEST_RFLAGS, flags | Rflags::RF);
        }
        inject(
            vmcs,
            InterruptionInfo::new(
                InterruptionInfo::HARDWARE_EXCEPTION,
                exception.vector.number(),
                code.is_some(),
            ),
            code.unwrap_or(0),
            0,
        );
    }

    fn set_windows(&mut self, vmcs: &mut CurrentVmcs<'_>, window: u32) {
        const WINDOWS: u32 = primary::INTERRUPT_WINDOW_EXITING | primary::NMI_WINDOW_EXITING;
        let controls = (self.primary_controls & !WINDOWS) | window;
        if controls != self.primary_controls {
            self.primary_controls = controls;
            vmcs.write32(Field32::PRIMARY_CONTROLS, controls);
        }
    }
}

/// Whether the guest would take an external interrupt now.
pub(crate) fn is_interruptible(vmcs: &CurrentVmcs<'_>) -> bool {
    let blocked = interruptibility::STI | interruptibility::MOV_SS;
    vmcs.read(FieldNatural::GUEST_RFLAGS) & Rflags::IF != 0
        && vmcs.read32(Field32::GUEST_INTERRUPTIBILITY) & blocked == 0
}

fn inject(vmcs: &mut CurrentVmcs<'_>, info: InterruptionInfo, error_code: u32, length: u32) {
    if info.has_error_code() {
        vmcs.write32(Field32::ENTRY_EXCEPTION_ERROR_CODE, error_code);
    }
    if info.needs_instruction_length() {
        vmcs.write32(Field32::ENTRY_INSTRUCTION_LENGTH, length);
    }
    vmcs.write32(Field32::ENTRY_INTERRUPTION_INFO, info.0);
}
