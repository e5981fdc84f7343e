// SPDX-License-Identifier: GPL-2.0

//! What this CPU's VMX can do, checked once when the module is loaded. What is needed, and what is made
//! of it, is the pure crate's to say.

use crate::{bindings, host::cpu};
use kernel::prelude::*;
pub(crate) use rvisor_core::x86::capability::Capabilities;
use rvisor_core::x86::capability::Missing;

/// Checks that this CPU and its firmware offer what rvisor needs.
///
/// # Errors
///
/// `ENODEV` or `EPERM`, after a message of its own for each cause.
pub(crate) fn detect() -> Result<Capabilities> {
    check_vmx()?;
    Capabilities::detect(cpu::rdmsr_safe).map_err(|missing| {
        // The kernel prints what implements its own trait alone.
        pr_err!("{}\n", format_args!("{missing}"));
        match missing {
            Missing::FirmwareOff(_) => EPERM,
            _ => ENODEV,
        }
    })
}

fn check_vmx() -> Result {
    // SAFETY: Reads the kernel's own table of features.
    if !unsafe { bindings::rvisor_cpu_has_vmx() } {
        // The kernel clears the feature where the firmware locked VMX off, so ask the CPU itself.
        if cpu::cpuid(1, 0)[2] & (1 << 5) == 0 {
            pr_err!("this CPU has no VMX (Intel VT-x): rvisor can't run here\n");
            return Err(ENODEV);
        }
        pr_err!("VMX is there but the firmware or the kernel has it switched off: switch on \"Intel Virtualization Technology\" in the firmware's set-up\n");
        return Err(EPERM);
    }
    // SAFETY: Reads the kernel's own table of features.
    if unsafe { bindings::rvisor_cpu_has_fred() } {
        pr_err!("this kernel takes events by FRED, which rvisor can't pass NMIs on to yet: boot with fred=off\n");
        return Err(ENODEV);
    }
    Ok(())
}
