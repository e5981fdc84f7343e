// SPDX-License-Identifier: GPL-2.0

//! Registers of the CPU that the host runs on.

use super::irq::IrqsOff;
use crate::bindings;
use core::arch::asm;
use rvisor_core::x86::address::Gva;
use rvisor_core::x86::msr::MsrIndex;

/// Reads an MSR that is known to exist.
///
/// # Safety
///
/// The CPU has the MSR, else this faults.
#[inline]
pub(crate) unsafe fn rdmsr(index: MsrIndex) -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: By the caller's promise.
    unsafe {
        asm!("rdmsr", in("ecx") index.0, out("eax") low, out("edx") high, options(nomem, nostack, preserves_flags))
    };
    u64::from(high) << 32 | u64::from(low)
}

/// Writes an MSR.
///
/// # Safety
///
/// The CPU has the MSR and takes the value, and the host can bear it until it is written back.
#[inline]
pub(crate) unsafe fn wrmsr(index: MsrIndex, value: u64) {
    // SAFETY: By the caller's promise.
    unsafe {
        asm!("wrmsr", in("ecx") index.0, in("eax") value as u32, in("edx") (value >> 32) as u32, options(nostack, preserves_flags))
    };
}

/// Reads an MSR that may be missing.
pub(crate) fn rdmsr_safe(index: MsrIndex) -> Option<u64> {
    let mut error = 0;
    // SAFETY: A fault is caught; reading has no effect on the MSRs that rvisor asks for.
    let value = unsafe { bindings::rvisor_rdmsr_safe(index.0, &mut error) };
    (error == 0).then_some(value)
}

/// CPUID on this CPU: EAX, EBX, ECX, EDX.
#[inline]
pub(crate) fn cpuid(leaf: u32, subleaf: u32) -> [u32; 4] {
    // SAFETY: Every 64-bit CPU has CPUID.
    let result = unsafe { core::arch::x86_64::__cpuid_count(leaf, subleaf) };
    [result.eax, result.ebx, result.ecx, result.edx]
}

/// The bits of EBX of CPUID leaf 7 that the kernel uses.
pub(crate) fn leaf_7_ebx() -> u32 {
    // SAFETY: Reads the kernel's own table.
    unsafe { bindings::rvisor_host_leaf_7_ebx() }
}

/// The time-stamp counter.
#[inline]
pub(crate) fn rdtsc() -> u64 {
    // SAFETY: Every CPU with VMX has a TSC, and the kernel may read it.
    unsafe { core::arch::x86_64::_rdtsc() }
}

macro_rules! control_register {
    ($(#[$doc:meta])* $name:ident, $register:literal) => {
        $(#[$doc])*
        #[inline]
        pub(crate) fn $name() -> u64 {
            let value: u64;
            // SAFETY: Reading a control register at CPL 0 has no effect.
            unsafe { asm!(concat!("mov {}, ", $register), out(reg) value, options(nomem, nostack, preserves_flags)) };
            value
        }
    };
}

control_register!(
    /// CR0.
    cr0, "cr0");
control_register!(
    /// CR2.
    cr2, "cr2");
control_register!(
    /// CR3, PCID included.
    cr3, "cr3");
control_register!(
    /// CR4.
    cr4, "cr4");

/// Sets CR2.
#[inline]
pub(crate) fn set_cr2(address: Gva, _irqs: &IrqsOff) {
    // SAFETY: The host reads CR2 only in its page-fault handler, which finds its own value there.
    unsafe { asm!("mov cr2, {}", in(reg) address.raw(), options(nomem, nostack, preserves_flags)) };
}

macro_rules! selector {
    ($(#[$doc:meta])* $name:ident, $instruction:literal) => {
        $(#[$doc])*
        #[inline]
        pub(crate) fn $name() -> u16 {
            let value: u16;
            // SAFETY: Reading a selector has no effect.
            unsafe { asm!($instruction, out(reg) value, options(nomem, nostack, preserves_flags)) };
            value
        }
    };
}

selector!(
    /// The ES selector.
    es, "mov {0:x}, es");
selector!(
    /// The DS selector.
    ds, "mov {0:x}, ds");
selector!(
    /// The FS selector.
    fs, "mov {0:x}, fs");
selector!(
    /// The GS selector.
    gs, "mov {0:x}, gs");
selector!(
    /// The LDTR selector.
    ldtr, "sldt {0:x}");
selector!(
    /// The TR selector.
    tr, "str {0:x}");

/// Loads the data-segment selectors and LDTR that the current thread has in userspace.
///
/// # Safety
///
/// FS's base, and then GS's inactive one, are written afterwards.
pub(crate) unsafe fn load_selectors(es: u16, ds: u16, fs: u16, gs: u16, ldtr: u16) {
    // SAFETY: A selector that has become invalid is caught and replaced by the null one.
    unsafe { bindings::rvisor_load_selectors(es, ds, fs, gs, ldtr) };
}

/// Sets XCR0.
///
/// # Safety
///
/// `value` is legal on this CPU, and the host's own is put back before the host uses XSAVE.
#[inline]
pub(crate) unsafe fn xsetbv(value: u64) {
    // SAFETY: By the caller's promise.
    unsafe {
        asm!("xsetbv", in("ecx") 0, in("eax") value as u32, in("edx") (value >> 32) as u32, options(nostack, preserves_flags))
    };
}

/// The debug registers DR0 to DR3.
#[derive(Clone, Copy, Default)]
pub(crate) struct DebugRegisters {
    /// DR0 to DR3.
    pub(crate) address: [u64; 4],
}

impl DebugRegisters {
    /// Loads them.
    ///
    /// # Safety
    ///
    /// DR7 is loaded by VM entry, and the host's registers are put back afterwards.
    pub(crate) unsafe fn load(&self) {
        // SAFETY: Any address may stand in DR0 to DR3 while DR7 arms none.
        unsafe {
            asm!("mov dr7, {}", in(reg) 0x400u64, options(nomem, nostack, preserves_flags));
            asm!("mov dr0, {}", in(reg) self.address[0], options(nomem, nostack, preserves_flags));
            asm!("mov dr1, {}", in(reg) self.address[1], options(nomem, nostack, preserves_flags));
            asm!("mov dr2, {}", in(reg) self.address[2], options(nomem, nostack, preserves_flags));
            asm!("mov dr3, {}", in(reg) self.address[3], options(nomem, nostack, preserves_flags));
        }
    }
}

/// Delivers the NMI that made the guest exit to the host's handler.
pub(crate) fn nmi(_irqs: &IrqsOff) {
    // SAFETY: NMIs are blocked since the exit, as they are when the CPU delivers one; the handler's
    // IRET unblocks them. rvisor does not load on a host that takes events by FRED, where a software
    // interrupt is another thing than an NMI.
    unsafe { asm!("int 2") };
}

/// Hands the machine check that made the guest exit, or that came while it was entered, to the host.
pub(crate) fn machine_check(_irqs: &IrqsOff) {
    // SAFETY: Interrupts are off, on the stack of a thread that goes back to userspace.
    unsafe { bindings::rvisor_machine_check() };
}
