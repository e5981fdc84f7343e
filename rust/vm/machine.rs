// SPDX-License-Identifier: GPL-2.0

//! A virtual machine.

use super::{
    apic_settings::ApicSettings,
    bus::Registrations,
    clock::Clock,
    irqchip::IrqChip,
    irqfd::Irqfds,
    memory::{GuestMemory, Pages},
    settings::Settings,
    shared::VcpuShared,
    split::SplitChip,
    vcpu::Vcpu,
};
use crate::{
    host::{
        cpu, eventfd::EventQueue, hotplug::VmxOn, memory, notifier::Notifier, preempt::NotifiersOn,
        speculation, symbols::Symbols,
    },
    vmx::{
        capability::{self, Capabilities},
        guard::Mitigations,
    },
};
use core::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};
use kernel::{
    current, new_mutex,
    prelude::*,
    sync::{Arc, Mutex, SetOnce},
};
use rvisor_core::{
    cpu::{
        cpuid::CpuidEntry,
        guest::GuestCpu,
        supported::{supported, HostCpuid, Offer},
        xsave::XsaveLayout,
    },
    irqchip::{
        destination::{lowest_priority, matches, DeliveryMode, InterruptMessage, Source},
        lapic::BusCycle,
        routing::MAX_ROUTES,
        LineSource,
    },
    mmu::page_size::PageSize,
    x86::vector::{ApicId, Gsi, Vector},
};

/// KVM_CAP_MAX_VCPUS and KVM_CAP_MAX_VCPU_ID: what 8-bit APIC identifiers can name.
pub(crate) const MAX_VCPUS: u32 = 255;

/// What the host offers to every virtual machine. Lives as long as the module or any machine.
pub(crate) struct Host {
    pub(crate) symbols: Symbols,
    pub(crate) capabilities: Capabilities,
    pub(crate) offer: Offer,
    /// The widest CPU that a guest can have.
    pub(crate) offered: GuestCpu,
    /// The XSAVE components that a guest can have.
    pub(crate) xcr0: u64,
    pub(crate) xsave: XsaveLayout,
    /// The host's TSC frequency.
    pub(crate) tsc_khz: u64,
    pub(crate) physical_bits: u32,
    /// Where irqfds' events are seen to.
    events: Arc<EventQueue>,
    pub(crate) mitigations: Mitigations,
    _notifiers: NotifiersOn,
    _vmx: VmxOn,
}

/// The CPU's own CPUID.
pub(crate) struct RealCpuid;

impl HostCpuid for RealCpuid {
    fn cpuid(&self, function: u32, index: u32) -> [u32; 4] {
        crate::host::cpu::cpuid(function, index)
    }
}

/// The most entries that the table of supported leaves has.
const MAX_SUPPORTED: usize = 100;

/// The table of KVM_GET_SUPPORTED_CPUID.
///
/// # Errors
///
/// `E2BIG` where it does not fit, `ENOMEM`.
pub(crate) fn supported_cpuid(offer: &Offer) -> Result<KVec<CpuidEntry>> {
    let mut table = KVec::from_elem(CpuidEntry::default(), MAX_SUPPORTED, GFP_KERNEL)?;
    let count = supported(&RealCpuid, offer, &mut table).map_err(|_| E2BIG)?;
    table.truncate(count);
    Ok(table)
}

impl Host {
    /// Checks the host and switches VMX on.
    ///
    /// # Errors
    ///
    /// As [`capability::detect`], [`Symbols::resolve`] and [`VmxOn::new`], each with its message.
    pub(crate) fn new() -> Result<Self> {
        let capabilities = capability::detect()?;
        let symbols = Symbols::resolve()?;
        let vmx = VmxOn::new(&symbols).inspect_err(|error| {
            pr_err!(
                "the kernel does not give VMX out (error {}): does another hypervisor have it?\n",
                error.to_errno()
            );
        })?;
        let mitigations = Mitigations::new()?;
        let offer = Offer {
            // SAFETY: Reads a register of the host's.
            xcr0: unsafe { crate::bindings::rvisor_host_xcr0() },
            rdtscp: capabilities.has_rdtscp(),
            invpcid: capabilities.has_invpcid(),
            spec_ctrl: mitigations.switches_spec_ctrl(),
            leaf_7_ebx: crate::host::cpu::leaf_7_ebx(),
            speculation: speculation::offered_cpuid(),
            arch_capabilities: Some(speculation::arch_capabilities()),
            ..Offer::default()
        };
        let table = supported_cpuid(&offer)?;
        let offered = GuestCpu::offered(&table, capabilities.cr4_fixed.1).map_err(|_| ENODEV)?;
        Ok(Self {
            symbols,
            capabilities,
            offered,
            xcr0: offer.guest_xcr0(&RealCpuid),
            xsave: XsaveLayout::of_host(&RealCpuid),
            // SAFETY: Reads a variable of the kernel's that is constant after boot.
            tsc_khz: unsafe { crate::bindings::rvisor_tsc_khz() } as u64,
            physical_bits: RealCpuid.cpuid(0x8000_0008, 0)[0] & 0xff,
            offer,
            events: Arc::new(EventQueue::new()?, GFP_KERNEL)?,
            mitigations,
            _notifiers: NotifiersOn::new(),
            _vmx: vmx,
        })
    }
}

/// A virtual machine. Its descriptor and those of its virtual CPUs each hold it.
#[pin_data(PinnedDrop)]
pub(crate) struct Vm {
    pub(crate) host: Arc<Host>,
    pub(crate) memory: Arc<GuestMemory>,
    _notifier: Notifier<GuestMemory>,
    /// The address space that the machine belongs to, for comparison only.
    mm: usize,
    /// The process that made it, by which its statistics are told apart.
    pub(crate) pid: i32,
    pub(crate) apics: ApicSettings,
    pub(crate) settings: Settings,
    /// KVM_SET_BOOT_CPU_ID.
    bootstrap: AtomicU32,
    irqchip: SetOnce<Pin<KBox<IrqChip>>>,
    /// Instead of `irqchip`, where userspace has the rest.
    split: SetOnce<Pin<KBox<SplitChip>>>,
    #[pin]
    pub(crate) irqfds: Irqfds,
    /// Doorbells and coalesced zones.
    #[pin]
    pub(crate) registrations: Registrations,
    /// What the machine's TSC is ahead of the host's, modulo 2^64.
    tsc_offset: AtomicU64,
    pub(crate) clock: Clock,
    /// Counts the messages of lowest priority, so that they go round.
    turn: AtomicUsize,
    /// The virtual CPUs; also serialises what must come before the first of them.
    #[pin]
    vcpus: Mutex<KVec<Arc<VcpuShared>>>,
}

impl Vm {
    /// A machine without memory and CPUs, of the current process.
    ///
    /// # Errors
    ///
    /// `ENOMEM`, `EINTR`.
    pub(crate) fn new(host: Arc<Host>) -> Result<Arc<Self>> {
        let mm = memory::current_mm().ok_or(EIO)?;
        let large_pages = match (host.capabilities.ept_2m, host.capabilities.ept_1g) {
            (true, true) => PageSize::Size1G,
            (true, false) => PageSize::Size2M,
            _ => PageSize::Size4K,
        };
        let pages = Pages {
            largest: large_pages,
            large_execute: host.mitigations.large_pages_execute(),
        };
        let memory = GuestMemory::new(
            pages,
            host.capabilities.ept_accessed_dirty,
            host.physical_bits,
        )?;
        // SAFETY: `mm` is the current thread's.
        let notifier = unsafe { Notifier::register(mm, memory.clone()) }?;
        Arc::pin_init(
            pin_init!(Self {
                irqfds <- Irqfds::new(host.events.clone()),
                registrations <- Registrations::new(),
                host,
                memory,
                _notifier: notifier,
                mm: mm.as_ptr() as usize,
                pid: current!().pid(),
                apics: ApicSettings::new(),
                settings: Settings::new(MAX_VCPUS),
                bootstrap: AtomicU32::new(0),
                irqchip: SetOnce::new(),
                split: SetOnce::new(),
                // The TSC starts at 0.
                tsc_offset: AtomicU64::new(cpu::rdtsc().wrapping_neg()),
                clock: Clock::new(),
                turn: AtomicUsize::new(0),
                vcpus <- new_mutex!(KVec::new()),
            }),
            GFP_KERNEL_ACCOUNT,
        )
    }

    /// Whether the current process owns the machine.
    #[inline]
    pub(crate) fn is_owned_by_current(&self) -> bool {
        memory::current_mm().is_some_and(|mm| mm.as_ptr() as usize == self.mm)
    }

    /// The interrupt controllers, where they are in the kernel.
    #[inline]
    pub(crate) fn irqchip(&self) -> Option<&IrqChip> {
        self.irqchip.as_ref().map(|chip| &**chip)
    }

    /// The kernel's half of the split interrupt controller, where the machine has that.
    #[inline]
    pub(crate) fn split_chip(&self) -> Option<&SplitChip> {
        self.split.as_ref().map(|chip| &**chip)
    }

    /// Whether the local APICs are in the kernel.
    pub(crate) fn has_local_apics(&self) -> bool {
        self.irqchip().is_some() || self.split_chip().is_some()
    }

    /// Whether the virtual CPU `id` is the bootstrap processor.
    pub(crate) fn is_bootstrap(&self, id: u32) -> bool {
        self.bootstrap.load(Ordering::Relaxed) == id
    }

    /// Whether a virtual CPU was made.
    pub(crate) fn has_vcpus(&self) -> bool {
        !self.vcpus.lock().is_empty()
    }

    /// Carries out KVM_SET_BOOT_CPU_ID.
    ///
    /// # Errors
    ///
    /// `EBUSY` after the first virtual CPU was made; `EINVAL` for a number that none can have.
    pub(crate) fn set_bootstrap(&self, id: usize) -> Result {
        let vcpus = self.vcpus.lock();
        if !vcpus.is_empty() {
            return Err(EBUSY);
        }
        // One that is a little too large is taken, as by KVM: no CPU is the bootstrap processor then.
        let id = u32::try_from(id).map_err(|_| EINVAL)?;
        if id > self.settings.vcpu_ids() {
            return Err(EINVAL);
        }
        self.bootstrap.store(id, Ordering::Relaxed);
        Ok(())
    }

    /// Carries out KVM_CREATE_IRQCHIP.
    ///
    /// # Errors
    ///
    /// `EEXIST` where there is one, `EINVAL` after the first virtual CPU, `ENOMEM`.
    pub(crate) fn create_irqchip(&self) -> Result {
        let vcpus = self.vcpus.lock();
        if self.has_local_apics() {
            return Err(EEXIST);
        }
        if !vcpus.is_empty() {
            return Err(EINVAL);
        }
        self.irqchip.populate(IrqChip::new(self.apics.long_ids())?);
        Ok(())
    }

    /// Carries out KVM_ENABLE_CAP of KVM_CAP_X2APIC_API.
    ///
    /// # Errors
    ///
    /// `EINVAL` for an unknown flag.
    pub(crate) fn set_x2apic_api(&self, flags: u64) -> Result {
        // After this nobody makes controllers that do not know.
        let _vcpus = self.vcpus.lock();
        self.apics.set_x2apic_api(flags)?;
        if let Some(chip) = self.irqchip() {
            chip.set_long_ids(self.apics.long_ids());
        }
        Ok(())
    }

    /// Carries out KVM_ENABLE_CAP of KVM_CAP_X86_APIC_BUS_CYCLES_NS.
    ///
    /// # Errors
    ///
    /// `EINVAL` for a length that can't be, and after the first virtual CPU; `ENXIO` without local APICs
    /// in the kernel.
    pub(crate) fn set_apic_bus_cycle(&self, nanoseconds: u64) -> Result {
        let cycle = BusCycle::new(nanoseconds).map_err(|_| EINVAL)?;
        let vcpus = self.vcpus.lock();
        if !self.has_local_apics() {
            return Err(ENXIO);
        }
        if !vcpus.is_empty() {
            return Err(EINVAL);
        }
        self.apics.set_bus_cycle(cycle);
        Ok(())
    }

    /// Carries out KVM_ENABLE_CAP of KVM_CAP_SPLIT_IRQCHIP.
    ///
    /// # Errors
    ///
    /// `EINVAL` for more pins than there are GSIs; `EEXIST` where there is a controller or a virtual CPU;
    /// `ENOMEM`.
    pub(crate) fn create_split_chip(&self, ioapic_pins: u64) -> Result {
        let ioapic_pins = u32::try_from(ioapic_pins).map_err(|_| EINVAL)?;
        if ioapic_pins as usize > MAX_ROUTES {
            return Err(EINVAL);
        }
        let vcpus = self.vcpus.lock();
        if self.has_local_apics() || !vcpus.is_empty() {
            return Err(EEXIST);
        }
        self.split.populate(SplitChip::new(ioapic_pins)?);
        Ok(())
    }

    /// Carries out KVM_ENABLE_CAP of KVM_CAP_MAX_VCPU_ID.
    ///
    /// # Errors
    ///
    /// As [`Settings::limit_vcpu_ids`].
    pub(crate) fn limit_vcpu_ids(&self, limit: u64) -> Result {
        let vcpus = self.vcpus.lock();
        let bootstrap = self.bootstrap.load(Ordering::Relaxed);
        self.settings
            .limit_vcpu_ids(limit, bootstrap, !vcpus.is_empty())
    }

    /// Carries out KVM_CREATE_VCPU.
    ///
    /// # Errors
    ///
    /// `EINVAL` for an identifier out of range, `EEXIST` for one in use, `ENOMEM`.
    pub(crate) fn create_vcpu(self: &Arc<Self>, id: u32) -> Result<Arc<Vcpu>> {
        let mut vcpus = self.vcpus.lock();
        if id >= self.settings.vcpu_ids() {
            return Err(EINVAL);
        }
        if vcpus.iter().any(|vcpu| vcpu.id == id) {
            return Err(EEXIST);
        }
        vcpus.reserve(1, GFP_KERNEL_ACCOUNT)?;
        let vcpu = Vcpu::new(self.clone(), id)?;
        self.memory.add_vcpu(vcpu.shared.clone())?;
        vcpus.push_within_capacity(vcpu.shared.clone())?;
        if let Some(chip) = self.irqchip() {
            if self.is_bootstrap(id) {
                chip.set_bootstrap(vcpu.shared.clone());
            }
        }
        Ok(vcpu)
    }

    /// Forgets a virtual CPU whose descriptor could not be opened.
    pub(crate) fn remove_vcpu(&self, id: u32) {
        let mut vcpus = self.vcpus.lock();
        self.memory.remove_vcpu(id);
        if let (Some(chip), true) = (self.irqchip(), self.is_bootstrap(id)) {
            chip.clear_bootstrap();
        }
        vcpus.retain(|vcpu| vcpu.id != id);
    }

    /// The TSC offset with which a virtual CPU begins: that of the machine.
    pub(crate) fn tsc_offset(&self) -> u64 {
        self.tsc_offset.load(Ordering::Relaxed)
    }

    /// The TSC offset for a virtual CPU whose TSC userspace sets to `value`. Userspace sets those of all
    /// CPUs one after the other and means them to be equal: a value within a second of the machine's
    /// TSC, and 0, are taken as that.
    pub(crate) fn offset_for_tsc(&self, value: u64) -> u64 {
        let offset = value.wrapping_sub(cpu::rdtsc());
        let machine = self.tsc_offset();
        let second = self.host.tsc_khz.saturating_mul(1000);
        let apart = offset.wrapping_sub(machine);
        if value == 0 || apart < second || apart.wrapping_neg() < second {
            return machine;
        }
        self.tsc_offset.store(offset, Ordering::Relaxed);
        offset
    }

    /// Delivers a message to the local APICs that it is for, and says whether there was one. `source` is
    /// the sending virtual CPU's number.
    pub(crate) fn deliver(&self, message: &InterruptMessage, source: Option<u32>) -> bool {
        let source = match source {
            Some(id) => Source::Apic(ApicId(id)),
            None => self.apics.device(),
        };
        self.memory
            .with_vcpus(|vcpus| self.deliver_to(vcpus, message, source))
    }

    fn deliver_to(
        &self,
        vcpus: &[Arc<VcpuShared>],
        message: &InterruptMessage,
        source: Source,
    ) -> bool {
        let targets = vcpus
            .iter()
            .filter(|vcpu| matches(&vcpu.identity(), message, source));
        if message.is_arbitrated() {
            let turn = self.turn.fetch_add(1, Ordering::Relaxed);
            let chosen = lowest_priority(targets, turn);
            if let Some(vcpu) = chosen {
                post(vcpu, message);
            }
            return chosen.is_some();
        }
        let mut taken = false;
        for vcpu in targets {
            post(vcpu, message);
            taken = true;
        }
        taken
    }

    /// Sends the MSI of a GSI, where that is all that it is and no lock has to be waited for; `false` where
    /// it was not sent. In any context but NMI, with interrupts off.
    pub(crate) fn try_send(&self, gsi: Gsi) -> bool {
        // Without SMP a lock can always be had, whoever has it; a real-time kernel's can sleep.
        if !cfg!(CONFIG_SMP) || cfg!(CONFIG_PREEMPT_RT) {
            return false;
        }
        let message = match (self.irqchip(), self.split_chip()) {
            (Some(chip), _) => chip.try_message(gsi),
            (None, Some(chip)) => chip.message(self, gsi),
            (None, None) => None,
        };
        let Some(message) = message else {
            return false;
        };
        self.memory
            .try_with_vcpus(|vcpus| self.deliver_to(vcpus, &message, self.apics.device()))
            .is_some()
    }

    /// A local APIC broadcasts the end of a level-triggered interrupt.
    pub(crate) fn end_of_interrupt(&self, vector: Vector) {
        if let Some(chip) = self.irqchip() {
            chip.end_of_interrupt(self, vector);
        }
    }

    /// Drives a GSI for userspace.
    ///
    /// # Errors
    ///
    /// `ENXIO` without interrupt controllers in the kernel.
    pub(crate) fn irq_line(&self, gsi: u32, level: bool) -> Result<i32> {
        self.set_line(Gsi(gsi), LineSource::USERSPACE, level)
            .ok_or(ENXIO)
    }

    /// Drives a GSI. Nothing without interrupt controllers in the kernel; else as [`IrqChip::set_line`].
    pub(crate) fn set_line(&self, gsi: Gsi, source: LineSource, level: bool) -> Option<i32> {
        match (self.irqchip(), self.split_chip()) {
            (Some(chip), _) => Some(chip.set_line(self, gsi, source, level)),
            (None, Some(chip)) => Some(chip.set_line(self, gsi, level)),
            (None, None) => None,
        }
    }
}

#[pinned_drop]
impl PinnedDrop for Vm {
    fn drop(self: Pin<&mut Self>) {
        // The memory's own end waits until no notification is under way; its tables need not.
        self.memory.destroy();
    }
}

/// Leaves a message with a virtual CPU.
fn post(vcpu: &VcpuShared, message: &InterruptMessage) {
    match message.delivery_mode {
        DeliveryMode::Fixed | DeliveryMode::LowestPriority => {
            vcpu.post(message.vector, message.trigger.is_level());
        }
        DeliveryMode::Nmi => vcpu.post_nmi(),
        DeliveryMode::Init => vcpu.post_init(),
        DeliveryMode::Startup => vcpu.post_sipi(message.vector),
        // There is no SMM, and no other mode reaches a CPU by message.
        DeliveryMode::Smi | DeliveryMode::RemoteRead | DeliveryMode::ExtInt => {}
    }
}
