// SPDX-License-Identifier: GPL-2.0

//! Regions with interrupts off, as a value.
//!
//! The kernel crate's own witness promises nothing on a kernel without preemption, and VM entry needs
//! the promise on every kernel.

use crate::bindings;
use kernel::{prelude::*, types::NotThreadSafe};

/// Interrupts are off on this CPU for as long as this lives, and so is preemption.
pub(crate) struct IrqsOff {
    flags: usize,
    _not_send: NotThreadSafe,
}

impl IrqsOff {
    /// Turns interrupts off; what they were before comes back on drop.
    #[inline]
    pub(crate) fn new() -> Self {
        // SAFETY: May be called in any context.
        let flags = unsafe { bindings::rvisor_irq_save() };
        Self {
            flags,
            _not_send: NotThreadSafe,
        }
    }

    /// Turns interrupts off on a CPU whose VMX is on.
    ///
    /// # Errors
    ///
    /// `EIO` where VMX was switched off under us. May sleep before.
    #[inline]
    pub(crate) fn with_vmx() -> Result<Self> {
        // SAFETY: Called in task context with interrupts on.
        let flags = unsafe { bindings::rvisor_irq_save_vmx() };
        // Bit 1 of the flags is always set.
        if flags == 0 {
            return Err(EIO);
        }
        Ok(Self {
            flags,
            _not_send: NotThreadSafe,
        })
    }

    /// The CPU this runs on; it stays so while `self` lives.
    #[inline]
    pub(crate) fn cpu(&self) -> u32 {
        cpu_id()
    }
}

impl Drop for IrqsOff {
    #[inline]
    fn drop(&mut self) {
        // SAFETY: The flags come from the matching save, on the same CPU, since a task can't move
        // while interrupts are off.
        unsafe { bindings::rvisor_irq_restore(self.flags) };
    }
}

/// The CPU this runs on, which is only a hint where preemption is on.
#[inline]
pub(crate) fn cpu_id() -> u32 {
    // SAFETY: May be called in any context.
    unsafe { bindings::rvisor_cpu_id() }
}

/// Makes `cpu` leave the guest that it may be running: a reschedule interrupt, whose handler does nothing else.
#[inline]
pub(crate) fn kick(cpu: u32) {
    // SAFETY: `cpu` was a CPU that a task of ours ran on; where it is offline now nothing happens.
    unsafe { bindings::rvisor_kick_cpu(cpu) };
}
