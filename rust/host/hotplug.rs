// SPDX-License-Identifier: GPL-2.0

//! VMX on every CPU for as long as the module is loaded, shared with KVM.

use super::symbols::Symbols;
use kernel::{bindings as kb, error::to_result, prelude::*};

/// `X86_FEATURE_VMX`, word 4 bit 5 (arch/x86/include/asm/cpufeatures.h).
const X86_FEATURE_VMX: i32 = 4 * 32 + 5;

/// The functions for the CPU callbacks, which the kernel calls with nothing but a CPU number.
///
/// Written once before the callbacks are registered; the host's CPUs are no VM's property.
static CALLS: kernel::sync::SetOnce<Symbols> = kernel::sync::SetOnce::new();

/// # Safety
///
/// Called by the kernel on the CPU that has come up.
unsafe extern "C" fn cpu_up(_cpu: u32) -> i32 {
    match CALLS.as_ref() {
        // SAFETY: Called on the CPU concerned, in task context with preemption on, as KVM does.
        Some(symbols) => unsafe { (symbols.x86_virt_get_ref)(X86_FEATURE_VMX) },
        None => ENODEV.to_errno(),
    }
}

/// # Safety
///
/// Called by the kernel on the CPU that goes down, after `cpu_up`.
unsafe extern "C" fn cpu_down(_cpu: u32) -> i32 {
    if let Some(symbols) = CALLS.as_ref() {
        // SAFETY: Balances the reference that `cpu_up` took on this CPU. No VMCS of ours is active
        // here: each is cleared when its thread is switched out, and the hotplug thread runs now.
        unsafe { (symbols.x86_virt_put_ref)(X86_FEATURE_VMX) };
    }
    0
}

/// VMX is on on all CPUs, those that come online later included, while this lives.
///
/// # Invariants
///
/// `state` is a CPU hotplug state that this registered.
pub(crate) struct VmxOn {
    state: i32,
}

impl VmxOn {
    /// Takes a reference on VMX on each CPU.
    ///
    /// # Errors
    ///
    /// `EBUSY` where another hypervisor than KVM has VMX on, `EOPNOTSUPP` where the kernel can't.
    pub(crate) fn new(symbols: &Symbols) -> Result<Self> {
        CALLS.populate(*symbols);
        // SAFETY: The callbacks are functions of this module, which unregisters them before it goes.
        let state = unsafe {
            kb::__cpuhp_setup_state(
                kb::cpuhp_state_CPUHP_AP_ONLINE_DYN,
                c"virt/rvisor:online".as_char_ptr(),
                true,
                Some(cpu_up),
                Some(cpu_down),
                false,
            )
        };
        to_result(state)?;
        // INVARIANT: Registered just above.
        Ok(Self { state })
    }
}

impl Drop for VmxOn {
    fn drop(&mut self) {
        // SAFETY: The state is ours by the invariant; the teardown callback runs on each CPU.
        unsafe { kb::__cpuhp_remove_state(self.state as kb::cpuhp_state, true) };
    }
}
