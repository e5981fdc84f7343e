// SPDX-License-Identifier: GPL-2.0

//! Regions with interrupts off, as a value.
//!
//! The kernel crate's own witness promises nothing on a kernel without preemption, and VM entry needs
//! the promise on every kernel.

use crate::bindings;
use kernel::{bindings as kb, prelude::*, types::NotThreadSafe};

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

/// The current thread runs a guest for as long as this lives: the kernel counts its time as a guest's
/// (`guest_time` in `/proc/PID/stat`, proc_pid_stat(5)).
///
/// It counts by ticks, and a tick that makes a guest exit is taken when interrupts come on again: this is
/// to outlive the region where they are off.
pub(crate) struct GuestTime(NotThreadSafe);

impl GuestTime {
    /// Begins it.
    #[inline]
    pub(crate) fn begin() -> Self {
        // SAFETY: Task context, interrupts on; `drop` ends it on the same thread.
        unsafe { bindings::rvisor_guest_time_begin() };
        Self(NotThreadSafe)
    }
}

impl Drop for GuestTime {
    #[inline]
    fn drop(&mut self) {
        // SAFETY: Task context, interrupts on; `begin` was on the same thread.
        unsafe { bindings::rvisor_guest_time_end() };
    }
}

/// What the kernel wants of the current thread, as it was when it was read.
#[derive(Clone, Copy)]
pub(crate) struct ThreadFlags(usize);

impl ThreadFlags {
    /// Reads them.
    #[inline]
    pub(crate) fn read() -> Self {
        // SAFETY: Reads the flags of the current thread, in any context.
        Self(unsafe { bindings::rvisor_thread_flags() })
    }

    /// Whether there is something to do before the thread runs a guest: a signal, another thread's turn.
    #[inline]
    pub(crate) fn has_work(self) -> bool {
        self.0 & bindings::RVISOR_GUEST_MODE_WORK != 0
    }

    /// Whether the thread's FPU registers are in memory.
    #[inline]
    pub(crate) fn needs_fpu_load(self) -> bool {
        self.0 & (1 << kb::TIF_NEED_FPU_LOAD) != 0
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
