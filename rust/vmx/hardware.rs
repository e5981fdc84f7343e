// SPDX-License-Identifier: GPL-2.0

//! One virtual CPU's VMCS and what of the guest's state lives in the CPU's own registers.
//!
//! Fields can be reached only through [`CurrentVmcs`], which exists only with interrupts off while the
//! VMCS is current. KVM caches which VMCS is current on each CPU, so whatever was current before is so
//! again when interrupts come back on.

mod current;

pub(crate) use current::CurrentVmcs;

use super::{
    guard::{Guard, Mitigations},
    instruction::{vmclear, vmptrld, VmFail},
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
    msr::MsrIndex,
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
    /// The host has breakpoints of its own, which VM exit disarms.
    pub(super) const HOST_BREAKPOINTS: u8 = 1 << 3;
    /// What is done before an entry.
    pub(super) const ENTRY: u8 = BREAKPOINTS | PEBS;
    /// What is done after an exit.
    pub(super) const EXIT: u8 = DEBUGCTL | PEBS | HOST_BREAKPOINTS;
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
    _vmcs: KernelPage,
    /// Where the VMCS lies.
    region: Hpa,
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
            region: vmcs.physical(),
            _vmcs: vmcs,
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

    /// Takes note of how the host traces and debugs itself, which interrupts may change: perf does so by IPI.
    pub(crate) fn note_host_debugging(&mut self, irqs: &IrqsOff) {
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
        if self.symbols.has_breakpoints(irqs) {
            self.seldom |= seldom::HOST_BREAKPOINTS;
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
    fn restore_seldom(&mut self, irqs: &IrqsOff) {
        if self.seldom & seldom::HOST_BREAKPOINTS != 0 {
            self.symbols.restore_breakpoints(irqs);
        }
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
            let failed = unsafe { bindings::rvisor_vmx_is_on() && vmclear(self.region).is_err() };
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
