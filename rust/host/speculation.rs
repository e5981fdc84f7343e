// SPDX-License-Identifier: GPL-2.0

//! What the host's kernel has decided against speculative execution, and the commands that flush.

use super::{cpu, irq::IrqsOff, symbols};
use crate::bindings;
use core::{arch::asm, arch::x86_64::_mm_lfence, ptr::NonNull};
use kernel::prelude::*;
use rvisor_core::x86::{
    msr::MsrIndex,
    speculation::{HostState, L1tf, Plan},
};

/// IA32_PRED_CMD: the indirect-branch barrier.
const IBPB: u64 = 1 << 0;
/// IA32_FLUSH_CMD: the L1 data cache.
const L1D_FLUSH: u64 = 1 << 0;
/// IA32_ARCH_CAPABILITIES: no flush of the L1 data cache is needed at VM entry.
const SKIP_L1D_FLUSH: u64 = 1 << 3;

/// The plan for this host, and whether siblings of a core run at once in spite of a flaw that no flush
/// closes between them.
pub(crate) fn plan() -> (Plan, bool) {
    // SAFETY: Reads the kernel's own tables.
    let (found, capabilities) = unsafe {
        (
            bindings::rvisor_host_speculation(),
            bindings::rvisor_host_arch_capabilities(),
        )
    };
    let has = |bit: u32| found & bit != 0;
    let host = HostState {
        spec_ctrl: has(bindings::RVISOR_HOST_SPEC_CTRL),
        kernel_ibrs: has(bindings::RVISOR_HOST_KERNEL_IBRS),
        rsb_vmexit: has(bindings::RVISOR_HOST_RSB_VMEXIT),
        rsb_vmexit_lite: has(bindings::RVISOR_HOST_RSB_VMEXIT_LITE),
        clear_bhb_vmexit: has(bindings::RVISOR_HOST_CLEAR_BHB_VMEXIT),
        clear_cpu_buffers: has(bindings::RVISOR_HOST_CLEAR_CPU_BUFFERS),
        ibpb: has(bindings::RVISOR_HOST_IBPB),
        ibpb_between_vcpus: ibpb_between_vcpus(),
        ibpb_exit_to_user: has(bindings::RVISOR_HOST_IBPB_EXIT_TO_USER),
        l1tf: has(bindings::RVISOR_HOST_L1TF),
        skip_l1d_flush: capabilities & SKIP_L1D_FLUSH != 0,
        flush_l1d: has(bindings::RVISOR_HOST_FLUSH_L1D),
        itlb_multihit: has(bindings::RVISOR_HOST_ITLB_MULTIHIT),
        mitigations_off: has(bindings::RVISOR_HOST_MITIGATIONS_OFF),
    };
    let l1tf = l1tf();
    let is_shared = host.l1tf
        && has(bindings::RVISOR_HOST_SMT)
        && !matches!(l1tf, L1tf::Off | L1tf::FlushNoWarning);
    (Plan::new(&host, l1tf), is_shared)
}

/// Whether the kernel wants IBPB between virtual CPUs: its static key for KVM, and yes without one.
fn ibpb_between_vcpus() -> bool {
    symbols::variable(c"switch_vcpu_ibpb").is_none_or(|key| {
        // SAFETY: The kernel's static key of that name.
        unsafe { bindings::rvisor_static_key_enabled(key.as_ptr()) }
    })
}

/// The kernel's policy against L1TF, and its default without one.
fn l1tf() -> L1tf {
    symbols::variable(c"l1tf_mitigation").map_or(L1tf::Auto, |place| {
        // SAFETY: The kernel's variable of that name, an enumeration, which never changes after boot.
        L1tf::new(unsafe { place.cast::<u32>().read_volatile() })
    })
}

/// The indirect-branch barrier, where another guest than `guest` was entered last on this CPU, or where
/// `always` says so.
pub(crate) fn separate_guests(guest: u64, always: bool, _irqs: &IrqsOff) {
    // SAFETY: Interrupts are off.
    if unsafe { bindings::rvisor_is_other_guest(guest) } || always {
        barrier();
    }
}

/// The indirect-branch barrier.
pub(crate) fn barrier() {
    // SAFETY: Called only where the kernel says that the CPU has the command.
    unsafe { cpu::wrmsr(MsrIndex::PRED_CMD, IBPB) };
}

/// Makes the kernel use the barrier before this CPU runs userspace.
pub(crate) fn barrier_before_user(_irqs: &IrqsOff) {
    // SAFETY: Interrupts are off, so that the CPU which ran the guest is marked.
    unsafe { bindings::rvisor_ibpb_before_user() };
}

/// What IA32_SPEC_CTRL holds for the current thread.
pub(crate) fn host_spec_ctrl(_irqs: &IrqsOff) -> u64 {
    // SAFETY: Interrupts are off, so that this CPU's value is meant.
    unsafe { bindings::rvisor_host_spec_ctrl() }
}

/// Flushes the L1 data cache by command.
pub(crate) fn flush_l1d_by_msr() {
    // SAFETY: Called only where the kernel says that the CPU has the MSR.
    unsafe { cpu::wrmsr(MsrIndex::FLUSH_CMD, L1D_FLUSH) };
}

/// Twice what the L1 data cache of the CPUs concerned holds (32 KiB): replacement is not exactly by age.
const DISPLACING: usize = 64 << 10;
const DISPLACING_ORDER: u32 = 4;
const LINE: usize = 64;
const PAGE: usize = 4096;

/// Memory that displaces everything else from the L1 data cache when it is read.
///
/// # Invariants
///
/// The allocation has [`DISPLACING`] bytes and is freed once.
pub(crate) struct Displacer(NonNull<u8>);

// SAFETY: Memory that nobody writes to after it was made.
unsafe impl Send for Displacer {}
// SAFETY: As above.
unsafe impl Sync for Displacer {}

impl Displacer {
    /// Allocates it.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(crate) fn new() -> Result<Self> {
        const { assert!(DISPLACING == PAGE << DISPLACING_ORDER) };
        // SAFETY: Any order may be asked for.
        let address = unsafe { bindings::rvisor_pages_alloc(DISPLACING_ORDER) };
        let memory = NonNull::new(address.cast::<u8>()).ok_or(ENOMEM)?;
        for place in (0..DISPLACING).step_by(PAGE) {
            // Pages that differ, or a hypervisor below could make one of them.
            // SAFETY: Inside the allocation.
            unsafe {
                memory
                    .add(place)
                    .write_bytes((place / PAGE + 1) as u8, PAGE)
            };
        }
        // INVARIANT: Just allocated.
        Ok(Self(memory))
    }

    /// Reads all of it.
    pub(crate) fn displace(&self) {
        // The translations first, so that no page walk comes between the lines.
        self.read(PAGE);
        serialise();
        self.read(LINE);
        // SAFETY: Every 64-bit CPU has LFENCE.
        unsafe { _mm_lfence() };
    }

    fn read(&self, step: usize) {
        for place in (0..DISPLACING).step_by(step) {
            // SAFETY: Inside the allocation by the invariant.
            unsafe { self.0.add(place).read_volatile() };
        }
    }
}

/// Waits until all reads before have been carried out.
fn serialise() {
    // SAFETY: CPUID has no effect but this one; RBX, which the compiler keeps, is put back.
    unsafe {
        asm!("mov {0}, rbx", "cpuid", "mov rbx, {0}", out(reg) _, inout("eax") 0u32 => _, out("ecx") _, out("edx") _, options(nostack))
    };
}

impl Drop for Displacer {
    fn drop(&mut self) {
        // SAFETY: Allocated with this order, by the invariant.
        unsafe { bindings::rvisor_pages_free(self.0.as_ptr().cast(), DISPLACING_ORDER) };
    }
}

/// The bits of EDX of CPUID leaf 7 that the kernel lets be used.
pub(crate) fn offered_cpuid() -> u32 {
    // SAFETY: Reads the kernel's own table.
    unsafe { bindings::rvisor_host_leaf_7_edx() }
}

/// IA32_ARCH_CAPABILITIES as the kernel understands it.
pub(crate) fn arch_capabilities() -> u64 {
    // SAFETY: Reads an MSR where the CPU has it, and the kernel's own tables.
    unsafe { bindings::rvisor_host_arch_capabilities() }
}
