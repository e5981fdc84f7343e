// SPDX-License-Identifier: GPL-2.0

//! The state of a machine that stands still, taken out of the hypervisor and the devices and put into others.
//!
//! The order of the calls is what KVM wants: asking for a CPU's MP state, and for its local APIC, may change the
//! rest, so they come first; a TSC deadline means something only with the TSC and the local APIC's timer in place;
//! events come last, over what other calls made of them (Documentation/virt/kvm/api.rst).

use kvm_bindings::{
    kvm_clock_data, kvm_cpuid_entry2, kvm_debugregs, kvm_irqchip, kvm_lapic_state, kvm_mp_state,
    kvm_msr_entry, kvm_pit_state2, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
    CpuId, Msrs, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE,
    KVM_MAX_CPUID_ENTRIES,
};
use kvm_ioctls::{Cap, VcpuFd, VmFd};
use serde::{Deserialize, Serialize};

use crate::error::{failed, Error, Result};

/// IA32_TSC_DEADLINE.
const MSR_TSC_DEADLINE: u32 = 0x6e0;
/// The interrupt controllers beside the local APICs.
const CHIPS: [u32; 3] = [
    KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE,
    KVM_IRQCHIP_IOAPIC,
];

/// A virtual CPU.
#[derive(Default, Serialize, Deserialize)]
pub struct Cpu {
    cpuid: Vec<kvm_cpuid_entry2>,
    mp_state: kvm_mp_state,
    lapic: kvm_lapic_state,
    regs: kvm_regs,
    sregs: kvm_sregs,
    xsave: kvm_xsave,
    xcrs: kvm_xcrs,
    debug: kvm_debugregs,
    msrs: Vec<kvm_msr_entry>,
    events: kvm_vcpu_events,
}

impl Cpu {
    /// Takes the state of a CPU that is parked, with the MSRs of those numbers that it has.
    ///
    /// # Errors
    ///
    /// [`Error::Call`] where the hypervisor does not give it.
    pub fn save(fd: &VcpuFd, msrs: &[u32]) -> Result<Self> {
        let mp_state = fd.get_mp_state().map_err(failed("reading a CPU's state"))?;
        let lapic = fd.get_lapic().map_err(failed("reading a local APIC"))?;
        let cpuid = fd
            .get_cpuid2(KVM_MAX_CPUID_ENTRIES)
            .map_err(failed("reading a CPU's features"))?;
        Ok(Self {
            cpuid: cpuid.as_slice().to_vec(),
            mp_state,
            lapic,
            regs: fd.get_regs().map_err(failed("reading registers"))?,
            sregs: fd.get_sregs().map_err(failed("reading registers"))?,
            xsave: fd.get_xsave().map_err(failed("reading the FPU"))?,
            xcrs: fd.get_xcrs().map_err(failed("reading XCR0"))?,
            debug: fd
                .get_debug_regs()
                .map_err(failed("reading debug registers"))?,
            msrs: read_msrs(fd, msrs)?,
            events: fd.get_vcpu_events().map_err(failed("reading events"))?,
        })
    }

    /// The features that it was made with.
    ///
    /// # Errors
    ///
    /// [`Error::Input`] where they are more than a CPU can have.
    pub fn cpuid(&self) -> Result<CpuId> {
        let what = "the snapshot is damaged: a CPU has too many features";
        CpuId::from_entries(&self.cpuid).map_err(|_| Error::input(what, "use another one"))
    }

    /// Puts the state into a new CPU that was made with [`Self::cpuid`].
    ///
    /// # Errors
    ///
    /// [`Error::Input`] where this hypervisor takes it not: another one, or another CPU, gave it.
    pub fn load(&self, fd: &VcpuFd) -> Result<()> {
        set("a CPU's state", fd.set_mp_state(self.mp_state))?;
        set("registers", fd.set_regs(&self.regs))?;
        set("special registers", fd.set_sregs(&self.sregs))?;
        #[allow(unsafe_code)]
        // SAFETY: The hypervisor reads more than a `kvm_xsave` only for a guest that has state components which
        // this process asked the kernel for (arch_prctl); it never does.
        let xsave = unsafe { fd.set_xsave(&self.xsave) };
        set("FPU state", xsave)?;
        set("XCR0", fd.set_xcrs(&self.xcrs))?;
        set("debug registers", fd.set_debug_regs(&self.debug))?;
        set("a local APIC", fd.set_lapic(&self.lapic))?;
        let is_deadline = |msr: &kvm_msr_entry| msr.index == MSR_TSC_DEADLINE;
        let (deadline, others): (Vec<_>, Vec<_>) = self.msrs.iter().copied().partition(is_deadline);
        for msr in others.into_iter().chain(deadline) {
            write_msr(fd, msr)?;
        }
        set("events", fd.set_vcpu_events(&self.events))
    }
}

fn foreign(what: &str) -> Error {
    Error::input(
        format!("this hypervisor does not take the snapshot's {what}"),
        "restore it on the kind of CPU and the hypervisor that it was made on",
    )
}

/// What the hypervisor says to a part of the state.
fn set(what: &str, result: std::result::Result<(), kvm_ioctls::Error>) -> Result<()> {
    result.map_err(|error| foreign(&format!("{what} ({error})")))
}

/// Those of the MSRs that the CPU has.
fn read_msrs(fd: &VcpuFd, indices: &[u32]) -> Result<Vec<kvm_msr_entry>> {
    let mut read = Vec::with_capacity(indices.len());
    for index in indices {
        let mut msr = one_msr(*index, 0)?;
        if fd.get_msrs(&mut msr).map_err(failed("reading MSRs"))? > 0 {
            read.extend(msr.as_slice());
        }
    }
    Ok(read)
}

fn write_msr(fd: &VcpuFd, entry: kvm_msr_entry) -> Result<()> {
    match fd.set_msrs(&one_msr(entry.index, entry.data)?) {
        Ok(1..) => Ok(()),
        Ok(0) => Err(foreign(&format!("MSR {:#x}", entry.index))),
        Err(error) => Err(Error::call("writing MSRs", error)),
    }
}

/// A list of one, as the calls take it: of a longer one they tell only how far they came.
pub(crate) fn one_msr(index: u32, data: u64) -> Result<Msrs> {
    let entry = kvm_msr_entry {
        index,
        data,
        ..Default::default()
    };
    Msrs::from_entries(&[entry]).map_err(failed("listing MSRs"))
}

/// What the hypervisor has beside the CPUs.
#[derive(Default, Serialize, Deserialize)]
pub struct Vm {
    irqchips: Vec<kvm_irqchip>,
    pit: kvm_pit_state2,
    clock: Option<kvm_clock_data>,
}

impl Vm {
    /// Takes the state of a VM whose CPUs are parked.
    ///
    /// # Errors
    ///
    /// [`Error::Call`] where the hypervisor does not give it.
    pub fn save(vm: &VmFd) -> Result<Self> {
        let mut irqchips = CHIPS.map(|chip_id| kvm_irqchip {
            chip_id,
            ..Default::default()
        });
        for chip in &mut irqchips {
            vm.get_irqchip(chip)
                .map_err(failed("reading the interrupt controllers"))?;
        }
        let clock = vm.check_extension(Cap::AdjustClock).then(|| vm.get_clock());
        Ok(Self {
            irqchips: irqchips.to_vec(),
            pit: vm.get_pit2().map_err(failed("reading the timer"))?,
            clock: clock.transpose().map_err(failed("reading the clock"))?,
        })
    }

    /// Puts it into a new VM.
    ///
    /// # Errors
    ///
    /// [`Error::Input`] where the hypervisor does not take it.
    pub fn load(&self, vm: &VmFd) -> Result<()> {
        for chip in &self.irqchips {
            set("interrupt controllers", vm.set_irqchip(chip))?;
        }
        set("timer", vm.set_pit2(&self.pit))?;
        if let Some(clock) = self.clock.filter(|_| vm.check_extension(Cap::AdjustClock)) {
            // What the flags say is about the moment of reading.
            let clock = kvm_clock_data {
                clock: clock.clock,
                ..Default::default()
            };
            set("clock", vm.set_clock(&clock))?;
        }
        Ok(())
    }
}
