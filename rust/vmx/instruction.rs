// SPDX-License-Identifier: GPL-2.0

//! The VMX instructions (SDM vol. 3, chapter 32), each as thin as it can be.

use core::arch::asm;
use kernel::pr_err_once;
use rvisor_core::x86::address::Hpa;

/// A VMX instruction set CF or ZF.
#[derive(Clone, Copy, Debug)]
pub(super) struct VmFail;

/// VMCLEAR.
///
/// # Safety
///
/// VMX is on; `vmcs` is a VMCS region that no other CPU has active.
pub(super) unsafe fn vmclear(vmcs: Hpa) -> core::result::Result<(), VmFail> {
    let address = vmcs.raw();
    let failed: u8;
    // SAFETY: By the caller's promise.
    unsafe {
        asm!("vmclear [{0}]", "setbe {1}", in(reg) &address, out(reg_byte) failed, options(nostack))
    };
    if failed == 0 {
        Ok(())
    } else {
        Err(VmFail)
    }
}

/// VMPTRLD.
///
/// # Safety
///
/// VMX is on; `vmcs` is a VMCS region of this CPU's revision that no other CPU has active.
#[inline]
pub(super) unsafe fn vmptrld(vmcs: Hpa) -> core::result::Result<(), VmFail> {
    let address = vmcs.raw();
    let failed: u8;
    // SAFETY: By the caller's promise.
    unsafe {
        asm!("vmptrld [{0}]", "setbe {1}", in(reg) &address, out(reg_byte) failed, options(nostack))
    };
    if failed == 0 {
        Ok(())
    } else {
        Err(VmFail)
    }
}

/// VMPTRST: the current VMCS, or `None`.
///
/// # Safety
///
/// VMX is on.
#[inline]
pub(super) unsafe fn vmptrst() -> Option<Hpa> {
    let mut address = u64::MAX;
    // SAFETY: By the caller's promise; the operand is 8 bytes.
    unsafe { asm!("vmptrst [{0}]", in(reg) &mut address, options(nostack)) };
    (address != u64::MAX).then_some(Hpa::new(address))
}

/// VMREAD.
///
/// # Safety
///
/// A VMCS is current and has the field.
#[inline]
pub(super) unsafe fn vmread(field: u64) -> u64 {
    let value: u64;
    // SAFETY: By the caller's promise.
    unsafe { asm!("vmread {0}, {1}", out(reg) value, in(reg) field, options(nomem, nostack)) };
    value
}

/// VMWRITE.
///
/// # Safety
///
/// A VMCS is current and the field is one that its controls use as they should.
#[inline]
pub(super) unsafe fn vmwrite(field: u64, value: u64) {
    let failed: u8;
    // SAFETY: By the caller's promise.
    unsafe {
        asm!("vmwrite {1}, {2}", "setbe {0}", out(reg_byte) failed, in(reg) field, in(reg) value, options(nomem, nostack))
    };
    if failed != 0 {
        write_failed(field);
    }
}

#[cold]
fn write_failed(field: u64) {
    pr_err_once!("VMWRITE of field {field:#x} failed: this CPU lacks it\n");
}

/// INVEPT, all mappings of one EPT pointer (type 1).
///
/// # Safety
///
/// VMX is on, and the CPU has single-context INVEPT.
pub(super) unsafe fn invept(eptp: u64) {
    let descriptor = [eptp, 0];
    // SAFETY: By the caller's promise.
    unsafe { asm!("invept {0}, [{1}]", in(reg) 1u64, in(reg) &descriptor, options(nostack)) };
}

/// INVVPID, all mappings of one VPID (type 1).
///
/// # Safety
///
/// VMX is on, the CPU has single-context INVVPID, and `vpid` is not 0.
pub(super) unsafe fn invvpid(vpid: u16) {
    let descriptor = [u64::from(vpid), 0];
    // SAFETY: By the caller's promise.
    unsafe { asm!("invvpid {0}, [{1}]", in(reg) 1u64, in(reg) &descriptor, options(nostack)) };
}
