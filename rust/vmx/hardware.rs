// SPDX-License-Identifier: GPL-2.0

//! One virtual CPU's VMCS and what of the guest's state lives in the CPU's own registers.
//!
//! Fields can be reached only through [`CurrentVmcs`], which exists only with interrupts off while the
//! VMCS is current. KVM caches which VMCS is current on each CPU, so whatever was current before is so
//! again when interrupts come back on.

use super::{
    enter::{self, Outcome, Registers},
    guard::{Guard, Mitigations},
    instruction::{invept, invvpid, vmclear, vmptrld, vmptrst, vmread, vmwrite, VmFail},
    msr_bitmap::MsrBitmap,
    virtual_apic::VirtualApic,
};
use crate::{
    bindings,
    host::{
        cpu::{self, DebugRegisters},
        irq::IrqsOff,
        page::KernelPage,
        preempt::SwitchOut,
        symbols::Symbols,
    },
};
use kernel::{pr_err_once, prelude::*};
use rvisor_core::x86::{
    address::{Gva, Hpa},
    exit::ExitReasonField,
    msr::MsrIndex,
    segment::{AccessRights, Segment},
    vmcs::{Field16, Field32, Field64, FieldNatural, VmcsSegment},
};

/// MSRs that the CPU does not switch and the guest uses directly; the host needs them in userspace only.
pub(crate) const SWITCHED_MSRS: [MsrIndex; 4] = [
    MsrIndex(bindings::MSR_STAR),
    MsrIndex(bindings::MSR_LSTAR),
    MsrIndex(bindings::MSR_SYSCALL_MASK),
    MsrIndex(bindings::MSR_TSC_AUX),
];
/// How many of them every CPU has; the last comes with RDTSCP.
const ALWAYS_SWITCHED: usize = 3;
const DEBUGCTL: MsrIndex = MsrIndex(bindings::MSR_IA32_DEBUGCTLMSR);
const PEBS_ENABLE: MsrIndex = MsrIndex(bindings::MSR_IA32_PEBS_ENABLE);
const KERNEL_GS_BASE: MsrIndex = MsrIndex(bindings::MSR_KERNEL_GS_BASE);

/// What is done around an entry at certain times only, a set of bits, so that all of it costs one test.
mod seldom {
    /// The guest's DR7 arms a breakpoint: DR0 to DR3 are loaded.
    pub(super) const BREAKPOINTS: u8 = 1 << 0;
    /// The host's IA32_DEBUGCTL, which VM exit clears, is not 0.
    pub(super) const DEBUGCTL: u8 = 1 << 1;
    /// The host samples with PEBS, which writes records to linear addresses: in the guest to its memory.
    pub(super) const PEBS: u8 = 1 << 2;
}

/// The host's values of what the VMCS's host-state area holds and what can change under a thread.
#[derive(Default, PartialEq, Eq)]
struct HostFields {
    cr3: u64,
    cr4: u64,
    fs_base: u64,
    rsp: u64,
}

/// The host's user state that a running guest displaces.
#[derive(Default)]
struct Displaced {
    msrs: [u64; SWITCHED_MSRS.len()],
    kernel_gs_base: u64,
    fs_base: u64,
    es: u16,
    ds: u16,
    fs: u16,
    gs: u16,
    ldtr: u16,
}

/// The VMCS, and the guest's state in the CPU's own registers.
pub(crate) struct Hardware {
    symbols: Symbols,
    vmcs: KernelPage,
    /// The region was never cleared, so that its launch state is undefined.
    fresh: bool,
    /// The VMCS was loaded since it was last cleared, so that the CPU may hold parts of it.
    active: bool,
    launched: bool,
    /// A RUN is under way: the VMCS stays active between the regions with interrupts off.
    running: bool,
    /// Another hypervisor's VMCS was current on this CPU: a guest of its may run here in turns with this.
    beside: bool,
    /// The CPU that the VMCS's per-CPU host fields are for.
    cpu: Option<u32>,
    host: HostFields,
    /// The guest's MSRs are in the CPU, the host's in `displaced`.
    displacing: bool,
    displaced: Displaced,
    has_tsc_aux: bool,
    eptp: u64,
    vpid: u16,
    /// The guest's values of [`SWITCHED_MSRS`].
    pub(crate) msrs: [u64; SWITCHED_MSRS.len()],
    /// The guest's IA32_KERNEL_GS_BASE, valid while `displacing` is false.
    kernel_gs_base: u64,
    /// The guest's XCR0, in effect while it runs, and the host's.
    pub(crate) xcr0: u64,
    host_xcr0: u64,
    /// The host's IA32_DEBUGCTL, which VM exit clears.
    host_debugctl: u64,
    /// The host's IA32_PEBS_ENABLE while the guest runs.
    host_pebs: u64,
    has_pebs: bool,
    /// The guest's DR0 to DR3, loaded where its DR7 arms one.
    pub(crate) debug: DebugRegisters,
    /// Of [`seldom`].
    seldom: u8,
    /// The guest's CR2.
    pub(crate) cr2: Gva,
    /// Which MSRs the guest accesses by itself.
    pub(crate) msr_bitmap: MsrBitmap,
    /// The guest's task priority, as far as it has a TPR shadow.
    pub(crate) virtual_apic: VirtualApic,
    pub(crate) guard: Guard,
}

impl SwitchOut for Hardware {
    fn switch_out(&mut self) {
        self.restore_host();
        self.clear();
    }
}

impl Hardware {
    /// A cleared VMCS, not set up yet.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(crate) fn new(
        symbols: &Symbols,
        revision: u32,
        vpid: u16,
        eptp: u64,
        has_tsc_aux: bool,
        mitigations: &Mitigations,
    ) -> Result<Self> {
        let vmcs = KernelPage::new()?;
        // SAFETY: The page is ours, at least 4 bytes long and aligned.
        unsafe { vmcs.as_ptr().cast::<u32>().write(revision) };
        Ok(Self {
            symbols: *symbols,
            vmcs,
            fresh: true,
            active: false,
            launched: false,
            running: false,
            beside: false,
            cpu: None,
            host: HostFields::default(),
            displacing: false,
            displaced: Displaced::default(),
            has_tsc_aux,
            eptp,
            vpid,
            msrs: [0; SWITCHED_MSRS.len()],
            kernel_gs_base: 0,
            xcr0: 1,
            // SAFETY: Reads a register of the host's, where it has it.
            host_xcr0: unsafe { bindings::rvisor_host_xcr0() },
            host_debugctl: 0,
            host_pebs: 0,
            // SAFETY: Reads the kernel's own table of features.
            has_pebs: unsafe { bindings::rvisor_cpu_has_pebs() }
                && cpu::rdmsr_safe(PEBS_ENABLE).is_some(),
            debug: DebugRegisters::default(),
            seldom: 0,
            cr2: Gva::new(0),
            msr_bitmap: MsrBitmap::new()?,
            virtual_apic: VirtualApic::new()?,
            guard: Guard::new(mitigations),
        })
    }

    /// Says that a RUN begins.
    #[inline]
    pub(crate) fn start_running(&mut self) {
        self.running = true;
    }

    /// Says that a RUN has ended: the thread's own state is put back.
    pub(crate) fn stop_running(&mut self, _irqs: &IrqsOff) {
        self.running = false;
        self.restore_host();
        self.clear();
    }

    /// Says whether the guest's DR7 arms a breakpoint.
    pub(crate) fn arm_breakpoints(&mut self, armed: bool) {
        self.seldom &= !seldom::BREAKPOINTS;
        if armed {
            self.seldom |= seldom::BREAKPOINTS;
        }
    }

    /// Takes note of how the host traces itself, which interrupts may change: perf does so by IPI.
    pub(crate) fn note_host_tracing(&mut self, _irqs: &IrqsOff) {
        self.seldom &= seldom::BREAKPOINTS;
        // SAFETY: Every CPU with VMX has the MSR.
        self.host_debugctl = unsafe { cpu::rdmsr(DEBUGCTL) };
        if self.host_debugctl != 0 {
            self.seldom |= seldom::DEBUGCTL;
        }
        // SAFETY: The CPU has the MSR by `has_pebs`.
        if self.has_pebs && unsafe { cpu::rdmsr(PEBS_ENABLE) } != 0 {
            self.seldom |= seldom::PEBS;
        }
    }

    #[cold]
    fn prepare_seldom(&mut self) {
        if self.seldom & seldom::BREAKPOINTS != 0 {
            // SAFETY: VM entry loads the guest's DR7; the host's are put back after the exit.
            unsafe { self.debug.load() };
        }
        if self.seldom & seldom::PEBS != 0 {
            // Not by the VMCS's lists: records that are under way must be written before the guest's
            // page tables are in use. Read anew, since an NMI's handler may have changed it.
            // SAFETY: The CPU has the MSR by `has_pebs`; the host's value follows after the exit.
            unsafe {
                self.host_pebs = cpu::rdmsr(PEBS_ENABLE);
                cpu::wrmsr(PEBS_ENABLE, 0);
            }
        }
    }

    #[cold]
    fn restore_seldom(&mut self) {
        if self.seldom & seldom::DEBUGCTL != 0 {
            // SAFETY: The host's own value.
            unsafe { cpu::wrmsr(DEBUGCTL, self.host_debugctl) };
        }
        if self.seldom & seldom::PEBS != 0 {
            // SAFETY: The host's own value.
            unsafe { cpu::wrmsr(PEBS_ENABLE, self.host_pebs) };
        }
    }

    /// VMCLEAR: the VMCS's data goes to memory, and another CPU may load it.
    fn clear(&mut self) {
        if self.active {
            // SAFETY: VMX is on: interrupts are off since the look, and it goes by an interrupt. The
            // region is ours and active on this CPU alone, since it is cleared before its thread leaves
            // a CPU.
            let failed =
                unsafe { bindings::rvisor_vmx_is_on() && vmclear(self.vmcs.physical()).is_err() };
            if failed {
                pr_err_once!("VMCLEAR failed\n");
            }
            self.active = false;
            self.launched = false;
        }
    }

    /// The guest's IA32_KERNEL_GS_BASE.
    pub(crate) fn kernel_gs_base(&self, _irqs: &IrqsOff) -> u64 {
        if self.displacing {
            // SAFETY: Every 64-bit CPU has the MSR.
            unsafe { cpu::rdmsr(KERNEL_GS_BASE) }
        } else {
            self.kernel_gs_base
        }
    }

    /// Sets the guest's IA32_KERNEL_GS_BASE to a canonical address.
    pub(crate) fn set_kernel_gs_base(&mut self, value: u64, _irqs: &IrqsOff) {
        if self.displacing {
            // SAFETY: As above; the host's value is in `displaced`.
            unsafe { cpu::wrmsr(KERNEL_GS_BASE, value) };
        }
        self.kernel_gs_base = value;
    }

    /// Sets one of [`SWITCHED_MSRS`], by its place there, to a value that the CPU takes.
    pub(crate) fn set_switched_msr(&mut self, place: usize, value: u64, _irqs: &IrqsOff) {
        if let (Some(slot), Some(index)) = (self.msrs.get_mut(place), SWITCHED_MSRS.get(place)) {
            *slot = value;
            if self.displacing && (place < ALWAYS_SWITCHED || self.has_tsc_aux) {
                // SAFETY: The CPU has the MSR, the value was checked, the host's is in `displaced`.
                unsafe { cpu::wrmsr(*index, value) };
            }
        }
    }

    fn switched(&self) -> usize {
        if self.has_tsc_aux {
            SWITCHED_MSRS.len()
        } else {
            ALWAYS_SWITCHED
        }
    }

    /// Puts the guest's MSRs into the CPU in the place of the thread's.
    #[cold]
    fn displace_host(&mut self, irqs: &IrqsOff) {
        self.guard.take_cpu(self.beside, irqs);
        self.displaced.es = cpu::es();
        self.displaced.ds = cpu::ds();
        self.displaced.fs = cpu::fs();
        self.displaced.gs = cpu::gs();
        self.displaced.ldtr = cpu::ldtr();
        // SAFETY: Interrupts are off, and current's FS base is in the CPU.
        self.displaced.fs_base = unsafe { bindings::rvisor_user_fs_base() } as u64;
        let switched = self.switched();
        for ((index, guest), host) in SWITCHED_MSRS
            .iter()
            .zip(&self.msrs)
            .zip(&mut self.displaced.msrs)
            .take(switched)
        {
            // SAFETY: The CPU has the MSRs. The host uses them only on its way to and from userspace,
            // before which `restore_host` runs.
            unsafe {
                *host = cpu::rdmsr(*index);
                if *host != *guest {
                    cpu::wrmsr(*index, *guest);
                }
            }
        }
        // SAFETY: As above; the kernel itself never uses this MSR between `swapgs` pairs.
        unsafe {
            self.displaced.kernel_gs_base = cpu::rdmsr(KERNEL_GS_BASE);
            cpu::wrmsr(KERNEL_GS_BASE, self.kernel_gs_base);
        }
        self.displacing = true;
    }

    /// Gives the thread its own MSRs, selectors and descriptor limits back.
    fn restore_host(&mut self) {
        if !self.displacing {
            return;
        }
        self.displacing = false;
        self.guard.leave_cpu(core::mem::take(&mut self.beside));
        let switched = self.switched();
        for ((index, guest), host) in SWITCHED_MSRS
            .iter()
            .zip(&self.msrs)
            .zip(&self.displaced.msrs)
            .take(switched)
        {
            if *host != *guest {
                // SAFETY: The host's own value.
                unsafe { cpu::wrmsr(*index, *host) };
            }
        }
        let host = &self.displaced;
        // SAFETY: The thread's own values, read on this thread; FS's base follows its selector.
        unsafe {
            self.kernel_gs_base = cpu::rdmsr(KERNEL_GS_BASE);
            if host.es | host.ds | host.fs | host.gs | host.ldtr != 0 {
                cpu::load_selectors(host.es, host.ds, host.fs, host.gs, host.ldtr);
                cpu::wrmsr(MsrIndex(bindings::MSR_FS_BASE), host.fs_base);
            }
            // Last, since loading GS's selector goes through it.
            cpu::wrmsr(KERNEL_GS_BASE, host.kernel_gs_base);
            bindings::rvisor_restore_descriptor_limits();
        }
    }
}

/// The VMCS is current on this CPU and interrupts are off.
pub(crate) struct CurrentVmcs<'a> {
    /// What belongs to the guest beside the VMCS.
    pub(crate) hardware: &'a mut Hardware,
    irqs: &'a IrqsOff,
    /// What was current before, where it wasn't ours.
    previous: Option<Hpa>,
    /// The host ran with interrupts on since the guest's last exit.
    host_ran: bool,
}

impl<'a> CurrentVmcs<'a> {
    /// Makes the VMCS current.
    ///
    /// # Errors
    ///
    /// `EIO` where the CPU refuses it, which it does only where VMX was switched off under us.
    #[inline]
    pub(crate) fn new(hardware: &'a mut Hardware, irqs: &'a IrqsOff) -> Result<Self> {
        // SAFETY: VMX is on while the module is loaded.
        let current = unsafe { vmptrst() };
        let ours = hardware.vmcs.physical();
        let mut previous = None;
        if current != Some(ours) || !hardware.active {
            previous = current;
            hardware.beside |= current.is_some_and(|current| current != ours);
            hardware.activate(ours)?;
        }
        Ok(Self {
            hardware,
            irqs,
            previous,
            host_ran: true,
        })
    }

    /// The witness that interrupts are off.
    #[inline]
    pub(crate) fn irqs(&self) -> &'a IrqsOff {
        self.irqs
    }

    /// Reads a 16-bit field.
    #[inline]
    pub(crate) fn read16(&self, field: Field16) -> u16 {
        // SAFETY: The VMCS is current; the fields named are on every CPU that rvisor loads on.
        unsafe { vmread(field.encoding()) as u16 }
    }

    /// Reads a 32-bit field.
    #[inline]
    pub(crate) fn read32(&self, field: Field32) -> u32 {
        // SAFETY: As for `read16`.
        unsafe { vmread(field.encoding()) as u32 }
    }

    /// Reads a 64-bit field.
    #[inline]
    pub(crate) fn read64(&self, field: Field64) -> u64 {
        // SAFETY: As for `read16`.
        unsafe { vmread(field.encoding()) }
    }

    /// Reads a natural-width field.
    #[inline]
    pub(crate) fn read(&self, field: FieldNatural) -> u64 {
        // SAFETY: As for `read16`.
        unsafe { vmread(field.encoding()) }
    }

    /// Writes a 16-bit field.
    #[inline]
    pub(crate) fn write16(&mut self, field: Field16, value: u16) {
        // SAFETY: The VMCS is current. Guest state may hold any value: VM entry checks it. Host state
        // and controls are written by `setup` and `prepare` alone.
        unsafe { vmwrite(field.encoding(), u64::from(value)) }
    }

    /// Writes a 32-bit field.
    #[inline]
    pub(crate) fn write32(&mut self, field: Field32, value: u32) {
        // SAFETY: As for `write16`.
        unsafe { vmwrite(field.encoding(), u64::from(value)) }
    }

    /// Writes a 64-bit field.
    #[inline]
    pub(crate) fn write64(&mut self, field: Field64, value: u64) {
        // SAFETY: As for `write16`.
        unsafe { vmwrite(field.encoding(), value) }
    }

    /// Writes a natural-width field.
    #[inline]
    pub(crate) fn write(&mut self, field: FieldNatural, value: u64) {
        // SAFETY: As for `write16`.
        unsafe { vmwrite(field.encoding(), value) }
    }

    /// Reads a segment register whole.
    pub(crate) fn segment(&self, segment: VmcsSegment) -> Segment {
        Segment {
            selector: self.read16(segment.selector()),
            base: self.read(segment.base()),
            limit: self.read32(segment.limit()),
            access: AccessRights(self.read32(segment.access_rights())),
        }
    }

    /// Writes a segment register whole.
    pub(crate) fn set_segment(&mut self, segment: VmcsSegment, value: &Segment) {
        self.write16(segment.selector(), value.selector);
        self.write(segment.base(), value.base);
        self.write32(segment.limit(), value.limit);
        self.write32(segment.access_rights(), value.access.0);
    }

    /// Sets the TPR threshold, 0 to 15: no more than the task priority's class.
    #[inline]
    pub(crate) fn set_tpr_threshold(&mut self, class: u8) {
        if self.hardware.virtual_apic.threshold != class {
            self.hardware.virtual_apic.threshold = class;
            self.write32(Field32::TPR_THRESHOLD, class.into());
        }
    }

    /// Says whether the guest's x2APIC has its TPR in the virtual-APIC page, for a guest with a TPR shadow
    /// whose secondary controls `secondary` say the same. Where it has not, accesses exit: without the
    /// control they would reach the host's own APIC.
    pub(crate) fn virtualize_x2apic(&mut self, is_x2apic: bool, secondary: u32) {
        self.write32(Field32::SECONDARY_CONTROLS, secondary);
        let hardware = &mut *self.hardware;
        hardware.virtual_apic.is_x2apic = is_x2apic;
        let bitmap = &mut hardware.msr_bitmap;
        bitmap.set_read_exits(MsrIndex::X2APIC_TPR, !is_x2apic);
        bitmap.set_write_exits(MsrIndex::X2APIC_TPR, !is_x2apic);
    }

    /// Drops all translations that this CPU holds for the virtual machine's EPT.
    // Out of line: where it is not needed, nothing of it shall be on the way to the entry.
    #[inline(never)]
    pub(crate) fn flush_ept(&mut self) {
        // SAFETY: VMX is on; single-context INVEPT was checked at load.
        unsafe { invept(self.hardware.eptp) };
    }

    /// Drops all translations that this CPU holds for the virtual CPU.
    pub(crate) fn flush_vpid(&mut self) {
        // SAFETY: VMX is on; single-context INVVPID was checked at load.
        unsafe { invvpid(self.hardware.vpid) };
    }

    /// The CPU that the VMCS was last entered on is another one than this.
    pub(crate) fn has_moved(&self) -> bool {
        self.hardware.cpu != Some(self.irqs.cpu())
    }

    /// Brings the host-state area up to date and the guest's registers into the CPU.
    #[inline]
    fn prepare(&mut self) {
        if !self.hardware.displacing {
            self.hardware.displace_host(self.irqs);
            let fs_base = self.hardware.displaced.fs_base;
            if self.hardware.host.fs_base != fs_base {
                self.hardware.host.fs_base = fs_base;
                self.write(FieldNatural::HOST_FS_BASE, fs_base);
            }
            if self.has_moved() {
                self.hardware.cpu = Some(self.irqs.cpu());
                super::setup::write_per_cpu_host_state(self);
            }
        }
        let cr3 = cpu::cr3();
        if self.hardware.host.cr3 != cr3 {
            self.hardware.host.cr3 = cr3;
            self.write(FieldNatural::HOST_CR3, cr3);
        }
        let cr4 = cpu::cr4();
        if self.hardware.host.cr4 != cr4 {
            self.hardware.host.cr4 = cr4;
            self.write(FieldNatural::HOST_CR4, cr4);
        }
    }

    /// Runs the guest until its next exit.
    ///
    /// # Errors
    ///
    /// The VM-instruction error, where the VM-entry instruction itself failed.
    #[inline]
    pub(crate) fn enter(
        &mut self,
        registers: &mut Registers,
    ) -> core::result::Result<ExitReasonField, u32> {
        self.prepare();
        let hardware = &mut *self.hardware;
        if hardware.seldom & (seldom::BREAKPOINTS | seldom::PEBS) != 0 {
            hardware.prepare_seldom();
        }
        if cpu::cr2() != hardware.cr2.raw() {
            cpu::set_cr2(hardware.cr2, self.irqs);
        }
        // A host that does not use XSAVE has no XCR0.
        let switch_xcr0 = hardware.host_xcr0 != 0 && hardware.xcr0 != hardware.host_xcr0;
        if switch_xcr0 {
            // SAFETY: The guest's XCR0 was checked when it was set; the host's follows below.
            unsafe { cpu::xsetbv(hardware.xcr0) };
        }
        let host_rsp = &mut hardware.host.rsp;
        // SAFETY: Interrupts are off by `irqs`, and the VMCS is current and set up. Which of the two it
        // is entered by never changes.
        let outcome = unsafe {
            if hardware.guard.is_needed() {
                let host_ran = core::mem::take(&mut self.host_ran);
                let guard = &mut hardware.guard;
                guard.enter(registers, host_rsp, hardware.launched, host_ran, self.irqs)
            } else {
                enter::enter(registers, host_rsp, hardware.launched)
            }
        };
        if switch_xcr0 {
            // SAFETY: The host's own value.
            unsafe { cpu::xsetbv(hardware.host_xcr0) };
        }
        hardware.cr2 = Gva::new(cpu::cr2());
        hardware.symbols.restore_breakpoints(self.irqs);
        if hardware.seldom & (seldom::DEBUGCTL | seldom::PEBS) != 0 {
            hardware.restore_seldom();
        }
        match outcome {
            Outcome::Exit => {
                let reason = ExitReasonField(self.read32(Field32::EXIT_REASON));
                if !reason.is_entry_failure() {
                    self.hardware.launched = true;
                }
                Ok(reason)
            }
            Outcome::Failed => Err(self.read32(Field32::INSTRUCTION_ERROR)),
        }
    }
}

impl Hardware {
    fn activate(&mut self, ours: Hpa) -> Result {
        if self.fresh {
            // SAFETY: VMX is on, and the region is ours and was never loaded.
            unsafe { vmclear(ours) }.map_err(|VmFail| EIO)?;
            self.fresh = false;
        }
        // SAFETY: VMX is on, and the region is active on no other CPU: it is cleared before its
        // thread leaves one.
        unsafe { vmptrld(ours) }.map_err(|VmFail| EIO)?;
        self.active = true;
        Ok(())
    }
}

impl Drop for CurrentVmcs<'_> {
    #[inline]
    fn drop(&mut self) {
        if !self.hardware.running {
            self.hardware.clear();
        }
        if let Some(previous) = self.previous {
            // SAFETY: It was current on this CPU, interrupts have been off since, and its owner
            // takes it for current still.
            let _ = unsafe { vmptrld(previous) };
        }
    }
}
