// SPDX-License-Identifier: GPL-2.0

//! Kernel functions that are exported for KVM's modules alone.
//!
//! Their addresses come from a kprobe's registration. All of them are looked up when the module is
//! loaded, and it refuses to load where one is missing.

use crate::bindings;
use core::{ffi::c_void, ptr::NonNull};
use kernel::{bindings as kb, prelude::*};

type GetRef = unsafe extern "C" fn(i32) -> i32;
type PutRef = unsafe extern "C" fn(i32);
type AllocFpu = unsafe extern "C" fn(*mut kb::fpu_guest) -> bool;
type FreeFpu = unsafe extern "C" fn(*mut kb::fpu_guest);
type SwapFpu = unsafe extern "C" fn(*mut kb::fpu_guest, bool) -> i32;
type FpuReturn = unsafe extern "C" fn();
type FpuToUser = unsafe extern "C" fn(*mut kb::fpu_guest, *mut u8, u32, u64, u32);
type FpuFromUser = unsafe extern "C" fn(*mut kb::fpu_guest, *const u8, u64, *mut u32) -> i32;
type SplitLock = unsafe extern "C" fn(usize) -> bool;
type RestoreBreakpoints = unsafe extern "C" fn();

/// The functions, each with its C prototype.
#[derive(Clone, Copy)]
pub(crate) struct Symbols {
    pub(super) x86_virt_get_ref: GetRef,
    pub(super) x86_virt_put_ref: PutRef,
    pub(super) fpu_alloc_guest_fpstate: AllocFpu,
    pub(super) fpu_free_guest_fpstate: FreeFpu,
    pub(super) fpu_swap_kvm_fpstate: SwapFpu,
    pub(super) switch_fpu_return: FpuReturn,
    pub(super) fpu_copy_guest_fpstate_to_uabi: FpuToUser,
    pub(super) fpu_copy_uabi_to_guest_fpstate: FpuFromUser,
    pub(super) handle_guest_split_lock: Option<SplitLock>,
    pub(super) hw_breakpoint_restore: RestoreBreakpoints,
}

/// The address of a kernel function, or `ENOENT` with a message.
fn find(name: &'static CStr) -> Result<usize> {
    // SAFETY: `name` is a NUL-terminated string that lives for ever.
    let address = unsafe { bindings::rvisor_kernel_symbol(name.as_char_ptr()) };
    if address == 0 {
        pr_err!(
            "this kernel has no function {}: it is older or newer than rvisor knows, or built without KVM or kprobes\n",
            name.to_str().unwrap_or("?")
        );
        return Err(ENOENT);
    }
    Ok(address as usize)
}

/// A variable of the kernel's that is exported for KVM's modules alone, or `None` where there is none.
pub(super) fn variable(name: &'static CStr) -> Option<NonNull<c_void>> {
    // SAFETY: `name` is a NUL-terminated string. The variables asked for are the kernel image's, which
    // takes no reference for them.
    NonNull::new(unsafe { kb::__symbol_get(name.as_char_ptr()) })
}

/// The host's handling of split locks, which kernels for CPUs without their detection lack.
fn find_split_lock() -> Option<SplitLock> {
    let name = c"handle_guest_split_lock";
    // SAFETY: The string lives for ever.
    let address = unsafe { bindings::rvisor_kernel_symbol(name.as_char_ptr()) };
    if address == 0 {
        return None;
    }
    // SAFETY: As in `lookup!`.
    Some(unsafe { core::mem::transmute::<usize, SplitLock>(address as usize) })
}

macro_rules! lookup {
    ($name:literal, $type:ty) => {{
        let address = find($name)?;
        // SAFETY: The kernel's function of that name has this prototype in the versions that rvisor
        // builds against, and core kernel text is never unloaded.
        unsafe { core::mem::transmute::<usize, $type>(address) }
    }};
}

impl Symbols {
    /// Looks all of them up.
    ///
    /// # Errors
    ///
    /// `ENOENT` for the first that is missing, which is named in the log.
    pub(crate) fn resolve() -> Result<Self> {
        Ok(Self {
            x86_virt_get_ref: lookup!(c"x86_virt_get_ref", GetRef),
            x86_virt_put_ref: lookup!(c"x86_virt_put_ref", PutRef),
            fpu_alloc_guest_fpstate: lookup!(c"fpu_alloc_guest_fpstate", AllocFpu),
            fpu_free_guest_fpstate: lookup!(c"fpu_free_guest_fpstate", FreeFpu),
            fpu_swap_kvm_fpstate: lookup!(c"fpu_swap_kvm_fpstate", SwapFpu),
            switch_fpu_return: lookup!(c"switch_fpu_return", FpuReturn),
            fpu_copy_guest_fpstate_to_uabi: lookup!(c"fpu_copy_guest_fpstate_to_uabi", FpuToUser),
            fpu_copy_uabi_to_guest_fpstate: lookup!(c"fpu_copy_uabi_to_guest_fpstate", FpuFromUser),
            handle_guest_split_lock: find_split_lock(),
            hw_breakpoint_restore: lookup!(c"hw_breakpoint_restore", RestoreBreakpoints),
        })
    }

    /// Lets the host deal with a split lock of the guest at `rip`. `false` where the guest is to get
    /// #AC: the host detects none, or does not allow them.
    pub(crate) fn handle_split_lock(&self, rip: u64) -> bool {
        match self.handle_guest_split_lock {
            // SAFETY: Task context, interrupts on, as KVM calls it.
            Some(handle) => unsafe { handle(rip as usize) },
            None => false,
        }
    }

    /// Whether the host has breakpoints on this CPU. That changes by its interrupts alone.
    #[inline]
    pub(crate) fn has_breakpoints(&self, _irqs: &super::irq::IrqsOff) -> bool {
        // SAFETY: Interrupts are off, so that this CPU's breakpoints are meant.
        unsafe { bindings::rvisor_hw_breakpoints_active() }
    }

    /// Arms the host's breakpoints again, which VM exit disarms.
    pub(crate) fn restore_breakpoints(&self, _irqs: &super::irq::IrqsOff) {
        // SAFETY: Interrupts are off, so that this CPU's breakpoints are meant.
        unsafe { (self.hw_breakpoint_restore)() };
    }
}
