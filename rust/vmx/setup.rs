// SPDX-License-Identifier: GPL-2.0

//! The contents of a new VMCS: controls, host state, and the guest's registers as after reset.

use super::{capability::Capabilities, hardware::CurrentVmcs};
use crate::{bindings, host::cpu};
use rvisor_core::x86::{
    address::Hpa,
    capability::GuestFeatures,
    control::{Cr0, Cr4, Rflags},
    msr::{MsrIndex, PAT_RESET},
    segment::{AccessRights, Segment},
    vector::ExceptionVector,
    vmcs::{activity, Field16, Field32, Field64, FieldNatural, VmcsSegment},
};

/// Exceptions that exit: #MC is the host's; #DB and #AC could keep the CPU busy delivering them for
/// ever, which nothing but an exit would end.
const EXCEPTION_BITMAP: u32 = 1 << ExceptionVector::Debug as u32
    | 1 << ExceptionVector::AlignmentCheck as u32
    | 1 << ExceptionVector::MachineCheck as u32;

/// CR0 bits that the guest may change without an exit: only TS means nothing to rvisor.
pub(crate) const CR0_GUEST_OWNED: u64 = Cr0::TS;
/// CR4 bits that the guest may change without an exit: those that mean nothing to rvisor's own page
/// walk and mode tracking.
pub(crate) const CR4_GUEST_OWNED: u64 =
    Cr4::PVI | Cr4::DE | Cr4::PCE | Cr4::OSFXSR | Cr4::OSXMMEXCPT | Cr4::TSD;

/// Longer than any spin loop's body, shorter than what separates two uses of PAUSE.
const PLE_GAP: u32 = 128;
/// A lock's holder that runs gives it back within this; one that does not run should get this CPU.
const PLE_WINDOW: u32 = 4096;

/// What a virtual CPU's VMCS points at.
pub(crate) struct Pointers {
    /// The MSR bitmap.
    pub(crate) msr_bitmap: Hpa,
    /// The virtual-APIC page.
    pub(crate) virtual_apic: Hpa,
    /// The EPT pointer.
    pub(crate) eptp: u64,
    /// The virtual-processor identifier, not 0.
    pub(crate) vpid: u16,
}

/// Fills a new VMCS, the guest's registers aside. `primary` holds its primary controls.
pub(crate) fn initialise(
    vmcs: &mut CurrentVmcs<'_>,
    capabilities: &Capabilities,
    primary: u32,
    to: &Pointers,
) {
    let controls = &capabilities.controls;
    vmcs.write32(Field32::PIN_BASED_CONTROLS, controls.pin);
    vmcs.write32(Field32::PRIMARY_CONTROLS, primary);
    // A guest has no CPUID yet, so none of the instructions that hang on it.
    vmcs.write32(
        Field32::SECONDARY_CONTROLS,
        capabilities.guest_secondary(GuestFeatures::default()),
    );
    vmcs.write32(Field32::EXIT_CONTROLS, controls.exit);
    vmcs.write32(Field32::ENTRY_CONTROLS, controls.entry);
    vmcs.write32(Field32::EXCEPTION_BITMAP, EXCEPTION_BITMAP);
    vmcs.write32(Field32::PAGE_FAULT_ERROR_CODE_MASK, 0);
    vmcs.write32(Field32::PAGE_FAULT_ERROR_CODE_MATCH, 0);
    vmcs.write32(Field32::CR3_TARGET_COUNT, 0);
    vmcs.write32(Field32::EXIT_MSR_STORE_COUNT, 0);
    vmcs.write32(Field32::EXIT_MSR_LOAD_COUNT, 0);
    vmcs.write32(Field32::ENTRY_MSR_LOAD_COUNT, 0);
    if capabilities.has_pause_loop_exiting() {
        vmcs.write32(Field32::PLE_GAP, PLE_GAP);
        vmcs.write32(Field32::PLE_WINDOW, PLE_WINDOW);
    }
    if capabilities.has_encls_exiting() {
        vmcs.write64(Field64::ENCLS_EXITING_BITMAP, u64::MAX);
    }
    if capabilities.has_enclv_exiting() {
        vmcs.write64(Field64::ENCLV_EXITING_BITMAP, u64::MAX);
    }
    vmcs.write64(Field64::MSR_BITMAP, to.msr_bitmap.raw());
    if capabilities.has_tpr_shadow() {
        vmcs.write64(Field64::VIRTUAL_APIC_PAGE, to.virtual_apic.raw());
        vmcs.write32(Field32::TPR_THRESHOLD, 0);
    }
    vmcs.write64(Field64::EPT_POINTER, to.eptp);
    vmcs.write16(Field16::VPID, to.vpid);
    vmcs.write64(Field64::VMCS_LINK_POINTER, u64::MAX);
    vmcs.write(FieldNatural::CR0_MASK, !CR0_GUEST_OWNED);
    vmcs.write(FieldNatural::CR4_MASK, !CR4_GUEST_OWNED);
    write_host_state(vmcs);
}

/// Host state that is the same on every CPU and never changes.
fn write_host_state(vmcs: &mut CurrentVmcs<'_>) {
    const KERNEL_CS: u16 = 0x10;
    const KERNEL_DS: u16 = 0x18;
    vmcs.write16(Field16::HOST_CS_SELECTOR, KERNEL_CS);
    vmcs.write16(Field16::HOST_SS_SELECTOR, KERNEL_DS);
    // The thread's own selectors come back when it leaves the CPU or the kernel.
    vmcs.write16(Field16::HOST_DS_SELECTOR, 0);
    vmcs.write16(Field16::HOST_ES_SELECTOR, 0);
    vmcs.write16(Field16::HOST_FS_SELECTOR, 0);
    vmcs.write16(Field16::HOST_GS_SELECTOR, 0);
    vmcs.write16(Field16::HOST_TR_SELECTOR, cpu::tr());
    vmcs.write(FieldNatural::HOST_CR0, cpu::cr0());
    // SAFETY: Every CPU with VMX has these MSRs.
    unsafe {
        vmcs.write64(Field64::HOST_EFER, cpu::rdmsr(MsrIndex(bindings::MSR_EFER)));
        vmcs.write64(
            Field64::HOST_PAT,
            cpu::rdmsr(MsrIndex(bindings::MSR_IA32_CR_PAT)),
        );
        vmcs.write32(
            Field32::HOST_SYSENTER_CS,
            cpu::rdmsr(MsrIndex(bindings::MSR_IA32_SYSENTER_CS)) as u32,
        );
        vmcs.write(
            FieldNatural::HOST_SYSENTER_EIP,
            cpu::rdmsr(MsrIndex(bindings::MSR_IA32_SYSENTER_EIP)),
        );
    }
}

/// Host state that differs from CPU to CPU.
pub(super) fn write_per_cpu_host_state(vmcs: &mut CurrentVmcs<'_>) {
    // SAFETY: Interrupts are off, so that this CPU's tables and MSRs are read on this CPU.
    unsafe {
        vmcs.write(
            FieldNatural::HOST_TR_BASE,
            bindings::rvisor_host_tss() as u64,
        );
        vmcs.write(
            FieldNatural::HOST_GDTR_BASE,
            bindings::rvisor_host_gdt() as u64,
        );
        vmcs.write(
            FieldNatural::HOST_IDTR_BASE,
            bindings::rvisor_host_idt() as u64,
        );
        vmcs.write(
            FieldNatural::HOST_GS_BASE,
            cpu::rdmsr(MsrIndex(bindings::MSR_GS_BASE)),
        );
        vmcs.write(
            FieldNatural::HOST_SYSENTER_ESP,
            cpu::rdmsr(MsrIndex(bindings::MSR_IA32_SYSENTER_ESP)),
        );
    }
}

/// The guest's registers after power-up (SDM vol. 3, table 11-1), but for the CRs and EFER, which go
/// through the virtual CPU's own bookkeeping.
pub(crate) fn reset_guest(vmcs: &mut CurrentVmcs<'_>) {
    const DATA: AccessRights = AccessRights(0x93);
    const CODE: AccessRights = AccessRights(0x9b);
    const LDT: AccessRights = AccessRights(0x82);
    const BUSY_TSS: AccessRights = AccessRights(0x8b);
    let segment = |selector, base, access| Segment {
        selector,
        base,
        limit: 0xffff,
        access,
    };
    for register in [
        VmcsSegment::Es,
        VmcsSegment::Ss,
        VmcsSegment::Ds,
        VmcsSegment::Fs,
        VmcsSegment::Gs,
    ] {
        vmcs.set_segment(register, &segment(0, 0, DATA));
    }
    vmcs.set_segment(VmcsSegment::Cs, &segment(0xf000, 0xffff_0000, CODE));
    vmcs.set_segment(VmcsSegment::Ldtr, &segment(0, 0, LDT));
    vmcs.set_segment(VmcsSegment::Tr, &segment(0, 0, BUSY_TSS));
    for (base, limit) in [
        (FieldNatural::GUEST_GDTR_BASE, Field32::GUEST_GDTR_LIMIT),
        (FieldNatural::GUEST_IDTR_BASE, Field32::GUEST_IDTR_LIMIT),
    ] {
        vmcs.write(base, 0);
        vmcs.write32(limit, 0xffff);
    }
    vmcs.write32(Field32::GUEST_SYSENTER_CS, 0);
    vmcs.write(FieldNatural::GUEST_SYSENTER_ESP, 0);
    vmcs.write(FieldNatural::GUEST_SYSENTER_EIP, 0);
    vmcs.write64(Field64::GUEST_DEBUGCTL, 0);
    vmcs.write64(Field64::GUEST_PAT, PAT_RESET);
    vmcs.write(FieldNatural::GUEST_DR7, 0x400);
    vmcs.write(FieldNatural::GUEST_RIP, 0xfff0);
    vmcs.write(FieldNatural::GUEST_RSP, 0);
    vmcs.write(FieldNatural::GUEST_RFLAGS, Rflags::FIXED);
    vmcs.write(FieldNatural::GUEST_CR3, 0);
    vmcs.write(FieldNatural::GUEST_PENDING_DEBUG, 0);
    vmcs.write32(Field32::GUEST_INTERRUPTIBILITY, 0);
    vmcs.write32(Field32::GUEST_ACTIVITY_STATE, activity::ACTIVE);
    vmcs.write32(Field32::ENTRY_INTERRUPTION_INFO, 0);
}
