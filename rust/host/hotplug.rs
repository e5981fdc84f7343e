// SPDX-License-Identifier: GPL-2.0

//! VMX on every CPU for as long as the module is loaded, shared with KVM: as CPUs come and go, and over a
//! suspend of the host, which takes the last CPU's away too. Off before the host ends.

use super::symbols::Symbols;
use crate::bindings;
use core::ptr;
use kernel::{bindings as kb, error::to_result, prelude::*, types::Opaque};

/// `X86_FEATURE_VMX`, word 4 bit 5 (arch/x86/include/asm/cpufeatures.h).
const X86_FEATURE_VMX: i32 = 4 * 32 + 5;

/// The functions for the CPU callbacks, which the kernel calls with nothing but a CPU number.
///
/// Written once before the callbacks are registered; the host's CPUs are no VM's property.
static CALLS: kernel::sync::SetOnce<Symbols> = kernel::sync::SetOnce::new();

/// Takes a reference on this CPU's VMX.
///
/// # Safety
///
/// The thread can't leave the CPU.
unsafe fn switch_on() -> i32 {
    let Some(symbols) = CALLS.as_ref() else {
        return ENODEV.to_errno();
    };
    // SAFETY: Called on the CPU concerned.
    let error = unsafe { (symbols.x86_virt_get_ref)(X86_FEATURE_VMX) };
    if error == 0 {
        // SAFETY: As above.
        unsafe { bindings::rvisor_set_vmx_on(true) };
    }
    error
}

/// Gives the reference back, where this CPU has one: [`switch_on`] may have failed, or this been called before.
///
/// # Safety
///
/// The thread can't leave the CPU.
unsafe fn switch_off() {
    // SAFETY: The thread can't leave the CPU.
    if !unsafe { bindings::rvisor_vmx_is_on() } {
        return;
    }
    if let Some(symbols) = CALLS.as_ref() {
        // SAFETY: Called on the CPU concerned, whose reference is ours. No VMCS of ours is in use: each is
        // cleared when its thread is switched out, and a thread that this interrupts at the host's end
        // finds VMX gone before it looks at its own again.
        unsafe {
            bindings::rvisor_set_vmx_on(false);
            (symbols.x86_virt_put_ref)(X86_FEATURE_VMX);
        }
    }
}

/// # Safety
///
/// Called by the kernel on the CPU that has come up.
unsafe extern "C" fn cpu_up(_cpu: u32) -> i32 {
    // SAFETY: The kernel's thread is bound to the CPU.
    unsafe { switch_on() }
}

/// # Safety
///
/// Called by the kernel on the CPU that goes down, after `cpu_up`.
unsafe extern "C" fn cpu_down(_cpu: u32) -> i32 {
    // SAFETY: The kernel's thread is bound to the CPU, whose `cpu_up` succeeded.
    unsafe { switch_off() };
    0
}

/// # Safety
///
/// Called by the kernel on the last CPU, with all threads frozen and interrupts off.
unsafe extern "C" fn suspend(_data: *mut kernel::ffi::c_void) -> i32 {
    // SAFETY: Interrupts are off; the CPU is online, so that its `cpu_up` succeeded.
    unsafe { switch_off() };
    0
}

/// # Safety
///
/// Called by the kernel on the CPU that suspended, with interrupts off.
unsafe extern "C" fn resume(_data: *mut kernel::ffi::c_void) {
    // SAFETY: Interrupts are off.
    let error = unsafe { switch_on() };
    if error != 0 {
        pr_err!("VMX can't be switched on again after the suspend (error {error}): guests on this CPU end with EIO\n");
    }
}

/// # Safety
///
/// Called on each CPU by [`shutdown`], with interrupts off.
unsafe extern "C" fn leave(_data: *mut kernel::ffi::c_void) {
    // SAFETY: Interrupts are off.
    unsafe { switch_off() };
}

/// The host reboots, powers off or starts another kernel. In VMX operation INIT is blocked and CR4.VMXE
/// can't be cleared, both of which the next kernel or the firmware may want to do (SDM vol. 3, 25.8).
///
/// # Safety
///
/// Called by the kernel in task context, with interrupts on. Threads may still run guests: they find VMX
/// gone and leave.
unsafe extern "C" fn shutdown(_data: *mut kernel::ffi::c_void) {
    // SAFETY: Interrupts are on; `leave` may be called on any CPU.
    unsafe { bindings::rvisor_on_each_cpu(Some(leave)) };
}

static SYSCORE_OPS: bindings::syscore_ops = bindings::syscore_ops {
    suspend: Some(suspend),
    resume: Some(resume),
    shutdown: Some(shutdown),
};

/// A registration of the calls at suspend, resume and the host's end.
///
/// # Invariants
///
/// Registered, and in its place until it is not.
struct Syscore(KBox<Opaque<bindings::syscore>>);

// SAFETY: The kernel's list, which has a lock of its own, is all that the memory is used for.
unsafe impl Send for Syscore {}
// SAFETY: As above.
unsafe impl Sync for Syscore {}

impl Syscore {
    fn new() -> Result<Self> {
        let entry = KBox::new(
            Opaque::new(bindings::syscore {
                node: kb::list_head::default(),
                ops: &SYSCORE_OPS,
                data: ptr::null_mut(),
            }),
            GFP_KERNEL,
        )?;
        // SAFETY: The memory stays where it is until it is unregistered.
        unsafe { bindings::register_syscore(entry.get()) };
        // INVARIANT: Registered just above.
        Ok(Self(entry))
    }
}

impl Drop for Syscore {
    fn drop(&mut self) {
        // SAFETY: Registered, by the invariant.
        unsafe { bindings::unregister_syscore(self.0.get()) };
    }
}

/// VMX is on on all CPUs, those that come online later included, while this lives.
///
/// # Invariants
///
/// `state` is a CPU hotplug state that this registered.
pub(crate) struct VmxOn {
    state: i32,
    /// Only missing where it could not be registered.
    syscore: Option<Syscore>,
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
        let mut on = Self {
            state,
            syscore: None,
        };
        on.syscore = Some(Syscore::new()?);
        Ok(on)
    }
}

impl Drop for VmxOn {
    fn drop(&mut self) {
        self.syscore = None;
        // SAFETY: The state is ours by the invariant; the teardown callback runs on each CPU.
        unsafe { kb::__cpuhp_remove_state(self.state as kb::cpuhp_state, true) };
    }
}
