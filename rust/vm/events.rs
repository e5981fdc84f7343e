// SPDX-License-Identifier: GPL-2.0

//! Exceptions, NMIs and interrupts on their way into the guest.

use super::vcpu::Core;
use crate::vmx::hardware::CurrentVmcs;
use rvisor_core::{
    stats::Event,
    x86::{
        control::{Dr7, Rflags},
        controls::primary,
        vector::{Exception, ExceptionVector, Vector},
        vmcs::{interruptibility, Field32, FieldNatural, InterruptionInfo},
    },
};

/// An event whose delivery an exit cut short: it is delivered again, as it was.
#[derive(Clone, Copy)]
pub(crate) struct Reinjection {
    pub(crate) info: InterruptionInfo,
    pub(crate) error_code: u32,
    pub(crate) instruction_length: u32,
}

impl Reinjection {
    /// An event without an instruction of its own, as userspace gives it.
    pub(crate) fn new(kind: u32, vector: u8, error_code: Option<u32>) -> Self {
        Self {
            info: InterruptionInfo::new(kind, vector, error_code.is_some()),
            error_code: error_code.unwrap_or(0),
            instruction_length: 0,
        }
    }

    /// Whether an exception can have the vector: 0 to 31, but for the NMI's.
    pub(crate) fn is_exception(&self) -> bool {
        self.info.vector() < 32 && self.info.vector() != 2
    }

    /// The vector, where it is an event of this kind.
    pub(crate) fn vector_of(&self, kind: u32) -> Option<u8> {
        (self.info.kind() == kind).then(|| self.info.vector())
    }
}

/// What waits to be delivered.
#[derive(Default)]
pub(crate) struct Events {
    /// Cut short: first in line but for `exception`.
    pub(crate) reinjection: Option<Reinjection>,
    /// An exception that rvisor raises: of the instruction, or of the delivery that was cut short.
    pub(crate) exception: Option<Exception>,
    /// NMIs that were not injected yet, at most 2.
    pub(crate) nmis: u32,
    /// KVM_INTERRUPT's vector, for a VM without an interrupt controller in the kernel.
    pub(crate) interrupt: Option<Vector>,
    /// Something may be pending: look before the next entry.
    pub(crate) attention: bool,
    /// Two exceptions fell over each other in a way that ends in a triple fault. `attention` is set too.
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
    pub(crate) fn save_interrupted_delivery(&mut self, vmcs: &mut CurrentVmcs<'_>) {
        let info = InterruptionInfo(vmcs.read32(Field32::IDT_VECTORING_INFO));
        if !info.is_valid() {
            return;
        }
        self.events.attention = true;
        if info.kind() == InterruptionInfo::NMI {
            // Its delivery has blocked NMIs, and will once more.
            let state = vmcs.read32(Field32::GUEST_INTERRUPTIBILITY);
            vmcs.write32(
                Field32::GUEST_INTERRUPTIBILITY,
                state & !interruptibility::NMI,
            );
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

    /// Takes the event back that a VM entry was to deliver which failed, or which something to do first has put off:
    /// it is left in the VMCS, where neither userspace nor the next event would find it.
    #[cold]
    pub(crate) fn take_back_injection(&mut self, vmcs: &mut CurrentVmcs<'_>) {
        let info = InterruptionInfo(vmcs.read32(Field32::ENTRY_INTERRUPTION_INFO));
        if !info.is_valid() {
            return;
        }
        vmcs.write32(Field32::ENTRY_INTERRUPTION_INFO, 0);
        self.events.attention = true;
        self.events.reinjection = Some(Reinjection {
            info,
            error_code: vmcs.read32(Field32::ENTRY_EXCEPTION_ERROR_CODE),
            instruction_length: vmcs.read32(Field32::ENTRY_INSTRUCTION_LENGTH),
        });
    }

    /// Puts the first event in line into the VMCS, and asks for an exit when the next can go.
    pub(crate) fn inject_events(&mut self, vmcs: &mut CurrentVmcs<'_>) {
        let mut injected = true;
        if let Some(exception) = self.events.exception.take() {
            // Behind the event that was cut short it would come at a RIP that is not its own. That event
            // goes, as it does on KVM: a later moment need not be one that allows it.
            self.events.reinjection = None;
            self.inject_exception(vmcs, &exception);
        } else if let Some(cut) = self.events.reinjection.take() {
            let info = if self.is_protected() {
                cut.info
            } else {
                // In real mode no exception pushes an error code.
                cut.info.without_error_code()
            };
            inject(vmcs, info, cut.error_code, cut.instruction_length);
        } else {
            injected = false;
        }
        let mut window = 0;
        if self.events.nmis > 0 {
            let blocked = interruptibility::NMI | interruptibility::STI | interruptibility::MOV_SS;
            let state = vmcs.read32(Field32::GUEST_INTERRUPTIBILITY);
            if !injected && state & blocked == 0 {
                self.events.nmis -= 1;
                self.shared.counters.count(Event::NmiInjection);
                inject(
                    vmcs,
                    InterruptionInfo::new(InterruptionInfo::NMI, 2, false),
                    0,
                    0,
                );
                injected = true;
            }
            if self.events.nmis > 0 {
                // STI's shadow does not keep every CPU from an NMI-window exit, which would come again
                // and again before any instruction (SDM vol. 3, 28.7.6). Interrupts are on under it, so
                // an interrupt window opens right behind it. Delivery of an event ends the shadow.
                window |= if !injected && state & interruptibility::STI != 0 {
                    primary::INTERRUPT_WINDOW_EXITING
                } else {
                    primary::NMI_WINDOW_EXITING
                };
            }
        }
        if self.has_interrupt() {
            if !injected && is_interruptible(vmcs) {
                if let Some(vector) = self.take_interrupt() {
                    self.shared.counters.count(Event::IrqInjection);
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
        }
        // A window that userspace could put nothing through would open again and again.
        if self.has_interrupt() || (self.wants_window && self.takes_external_interrupt()) {
            window |= primary::INTERRUPT_WINDOW_EXITING;
        }
        self.set_windows(vmcs, window);
        self.share_task_priority(vmcs);
        self.events.attention = false;
    }

    fn inject_exception(&mut self, vmcs: &mut CurrentVmcs<'_>, exception: &Exception) {
        if let Some(address) = exception.address {
            vmcs.hardware.cr2 = address;
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
