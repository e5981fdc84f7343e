// SPDX-License-Identifier: GPL-2.0

//! A virtual CPU: what it is made of.

use super::{
    completion::Completion,
    emulation::Hint,
    events::Events,
    machine::Vm,
    mmio::Replay,
    run_page::RunPage,
    shared::{Request, VcpuShared},
};
use crate::{
    host::{
        cpu,
        fpu::GuestFpu,
        irq::IrqsOff,
        mutex,
        preempt::{assert_not_unpin, Preemptible},
        signal::SignalMask,
        timer::{self, Timer},
    },
    vmx::{
        enter::Registers,
        hardware::{CurrentVmcs, Hardware},
        setup::{self, Pointers},
    },
};
use kernel::{
    new_mutex,
    prelude::*,
    sync::{Arc, Mutex},
};
use rvisor_core::{
    cpu::{
        cpuid::{self, CpuidEntry, Index},
        guest::GuestCpu,
        msr::MsrState,
    },
    irqchip::{
        lapic::{Deadline, Features, LapicEffect, LocalApic},
        Clock, Nanoseconds, Now,
    },
    trace::Record,
    x86::{
        control::{Cr0, Cr4, Dr6, Efer},
        controls::entry,
        msr::{APIC_BASE_BSP, APIC_BASE_ENABLE, APIC_BASE_RESET_ADDRESS},
        vector::{ApicId, Vector},
        vmcs::{Field32, Field64, FieldNatural},
    },
};

/// What DX holds after reset while the guest's CPUID was not set: family 6.
const DEFAULT_SIGNATURE: u32 = 0x600;

/// Whether a virtual CPU runs (KVM_GET_MP_STATE).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum MpState {
    Runnable,
    /// An application processor before its first INIT.
    Uninitialized,
    /// INIT has come, SIPI has not.
    InitReceived,
    Halted,
}

/// A virtual CPU's state but for what its VMCS holds.
pub(crate) struct Core {
    pub(crate) vm: Arc<Vm>,
    pub(crate) shared: Arc<VcpuShared>,
    /// The general registers. RSP's place is a copy that [`Core::sync_rsp`] makes true.
    pub(crate) registers: Registers,
    /// CR0 as the guest sees it, but for the bits that it owns, which the VMCS holds.
    pub(crate) cr0: Cr0,
    /// CR4, likewise.
    pub(crate) cr4: Cr4,
    pub(crate) efer: Efer,
    /// CR8 and IA32_APIC_BASE where there is no local APIC in the kernel.
    pub(crate) cr8: u64,
    pub(crate) apic_base: u64,
    pub(crate) dr6: u64,
    pub(crate) lapic: Option<KBox<LocalApic>>,
    pub(crate) events: Events,
    /// Userspace waits for the moment when the guest can take an interrupt.
    pub(crate) wants_window: bool,
    pub(crate) primary_controls: u32,
    entry_controls: u32,
    pub(crate) mp_state: MpState,
    /// The last SIPI's vector, userspace's included.
    pub(crate) sipi_vector: Vector,
    /// Userspace says that a SIPI has come (KVM_MP_STATE_SIPI_RECEIVED).
    pub(crate) sipi_given: bool,
    pub(crate) cpuid: KVec<CpuidEntry>,
    pub(crate) cpuid_index: Index,
    pub(crate) cpu: GuestCpu,
    pub(crate) msrs: MsrState,
    /// What the guest's TSC is ahead of the host's, modulo 2^64.
    pub(crate) tsc_offset: u64,
    pub(crate) completion: Option<Completion>,
    /// The interrupt whose end userspace's IOAPIC is to be told of.
    pub(crate) ended: Option<Vector>,
    pub(crate) replay: Replay,
    pub(crate) hint: Hint,
    /// The generation of guest memory whose translations this CPU may hold.
    pub(crate) generation: u64,
    /// Guest-virtual translations are to be dropped before the next entry.
    pub(crate) flush_guest: bool,
    /// RUN has been called.
    pub(crate) has_run: bool,
    /// The last exit, where it is being traced.
    pub(super) noted: Option<Record>,
}

/// The monotonic clock and the guest's TSC.
#[derive(Clone, Copy)]
pub(crate) struct GuestClock {
    tsc_offset: u64,
}

impl Clock for GuestClock {
    #[inline(never)]
    fn now(&self) -> Now {
        Now {
            nanoseconds: Nanoseconds(timer::monotonic()),
            tsc: cpu::rdtsc().wrapping_add(self.tsc_offset),
        }
    }
}

/// All of a virtual CPU that its mutex guards.
pub(crate) struct State {
    pub(crate) hardware: Preemptible<Hardware>,
    pub(crate) core: Core,
    pub(crate) fpu: GuestFpu,
    /// KVM_SET_SIGNAL_MASK.
    pub(crate) signal_mask: Option<SignalMask>,
}

// `hardware` is shared with a callback while RUN holds the whole by `&mut`.
assert_not_unpin!(State);

/// A virtual CPU.
#[pin_data]
pub(crate) struct Vcpu {
    /// The local APIC's timer. First, since fields drop in order and its callback uses `shared`.
    #[pin]
    pub(crate) lapic_timer: Timer<VcpuShared>,
    pub(crate) vm: Arc<Vm>,
    pub(crate) shared: Arc<VcpuShared>,
    pub(crate) run: RunPage,
    #[pin]
    pub(crate) state: Mutex<State>,
}

impl Vcpu {
    /// A virtual CPU as after power-up.
    ///
    /// # Errors
    ///
    /// `ENOMEM`; `EIO` where VMX fails.
    pub(crate) fn new(vm: Arc<Vm>, id: u32) -> Result<Arc<Self>> {
        let shared = Arc::pin_init(VcpuShared::new(id), GFP_KERNEL_ACCOUNT)?;
        let state = State::new(&vm, &shared)?;
        let target: *const VcpuShared = &*shared;
        Arc::pin_init(
            pin_init!(Self {
                vm,
                shared,
                run: RunPage::new()?,
                state <- new_mutex!(state),
                // SAFETY: `shared` is a field of the same object, in an `Arc` that it never gives up.
                lapic_timer <- unsafe { Timer::new(target) },
            }? Error),
            GFP_KERNEL_ACCOUNT,
        )
    }

    /// Runs `f` with the state, which no other thread has meanwhile.
    ///
    /// # Errors
    ///
    /// `EINTR` where the thread is killed while another has the state, and those of `f`.
    pub(crate) fn with_state<R>(&self, f: impl FnOnce(&mut State) -> Result<R>) -> Result<R> {
        let mut guard = mutex::lock_killable(&self.state)?;
        // SAFETY: The state is not moved out of its place.
        f(unsafe { guard.as_mut().get_unchecked_mut() })
    }
}

impl State {
    /// The state after power-up, with a VMCS that is set up.
    ///
    /// # Errors
    ///
    /// `ENOMEM`; `EIO` where VMX fails.
    fn new(vm: &Arc<Vm>, shared: &Arc<VcpuShared>) -> Result<Self> {
        let host = &vm.host;
        let capabilities = &host.capabilities;
        // Unique in the virtual machine, which is enough: translations are tagged with its EPT too.
        let vpid = u16::try_from(shared.id)
            .map_err(|_| EINVAL)?
            .checked_add(1)
            .ok_or(EINVAL)?;
        let eptp = vm.memory.eptp();
        let mut hardware = Hardware::new(
            &host.symbols,
            capabilities.revision,
            vpid,
            eptp,
            capabilities.has_rdtscp(),
            &host.mitigations,
        )?;
        super::msr::fill_bitmap(&mut hardware.msr_bitmap);
        let pointers = Pointers {
            msr_bitmap: hardware.msr_bitmap.physical(),
            virtual_apic: hardware.virtual_apic.physical(),
            eptp,
            vpid,
        };
        let mut state = Self {
            hardware: Preemptible::new(hardware),
            core: Core::new(vm, shared)?,
            fpu: GuestFpu::new(&host.symbols)?,
            signal_mask: None,
        };
        state.with_vmcs(|core, vmcs| {
            setup::initialise(vmcs, capabilities, core.primary_controls, &pointers);
            core.reset(vmcs);
            vmcs.write64(Field64::TSC_OFFSET, core.tsc_offset);
        })?;
        Ok(state)
    }

    /// Runs `f` with the VMCS current and interrupts off.
    ///
    /// # Errors
    ///
    /// `EIO` where VMX was switched off under us.
    pub(crate) fn with_vmcs<R>(
        &mut self,
        f: impl FnOnce(&mut Core, &mut CurrentVmcs<'_>) -> R,
    ) -> Result<R> {
        let irqs = IrqsOff::with_vmx()?;
        let mut vmcs = CurrentVmcs::new(self.hardware.get_mut(&irqs), &irqs)?;
        Ok(f(&mut self.core, &mut vmcs))
    }
}

impl Core {
    /// What the VMCS does not hold, as after power-up; [`Core::reset`] follows.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    fn new(vm: &Arc<Vm>, shared: &Arc<VcpuShared>) -> Result<Self> {
        let host = &vm.host;
        let capabilities = &host.capabilities;
        let is_bootstrap = vm.is_bootstrap(shared.id);
        let lapic = if vm.has_local_apics() {
            Some(KBox::new(
                LocalApic::new(
                    ApicId(shared.id),
                    is_bootstrap,
                    Features::default(),
                    vm.apics.bus_cycle(),
                ),
                GFP_KERNEL_ACCOUNT,
            )?)
        } else {
            None
        };
        if let Some(lapic) = &lapic {
            shared.mailbox.publish_identity(lapic.identity());
        }
        Ok(Self {
            vm: vm.clone(),
            shared: shared.clone(),
            registers: [0; 16],
            cr0: Cr0(Cr0::RESET),
            cr4: Cr4(0),
            efer: Efer(0),
            cr8: 0,
            apic_base: APIC_BASE_RESET_ADDRESS
                | APIC_BASE_ENABLE
                | if is_bootstrap { APIC_BASE_BSP } else { 0 },
            dr6: Dr6::RESET,
            mp_state: if lapic.is_none() || is_bootstrap {
                MpState::Runnable
            } else {
                MpState::Uninitialized
            },
            sipi_vector: Vector(0),
            sipi_given: false,
            primary_controls: capabilities.guest_primary(lapic.is_some()),
            lapic,
            events: Events::default(),
            wants_window: false,
            entry_controls: capabilities.controls.entry,
            cpuid: KVec::new(),
            cpuid_index: Index::default(),
            cpu: GuestCpu::new(&[], &host.offered).map_err(|_| EINVAL)?,
            msrs: MsrState::new(host.offer.guest_arch_capabilities()),
            tsc_offset: vm.tsc_offset(),
            completion: None,
            ended: None,
            replay: Replay::default(),
            hint: Hint::default(),
            generation: 0,
            flush_guest: true,
            has_run: false,
            noted: None,
        })
    }

    /// Puts all registers into their state after power-up or INIT (SDM vol. 3, table 11-1).
    pub(crate) fn reset(&mut self, vmcs: &mut CurrentVmcs<'_>) {
        setup::reset_guest(vmcs);
        self.registers = [0; 16];
        // DX holds the processor's signature.
        self.registers[2] = cpuid::find(&self.cpuid, 1, 0)
            .map_or(DEFAULT_SIGNATURE, |entry| entry.eax)
            .into();
        self.dr6 = Dr6::RESET;
        vmcs.hardware.debug = cpu::DebugRegisters::default();
        vmcs.hardware.arm_breakpoints(false);
        vmcs.hardware.cr2 = rvisor_core::x86::address::Gva::new(0);
        vmcs.hardware.guard.set_spec_ctrl(0);
        self.events = Events::default();
        self.cr8 = 0;
        self.set_cr4(vmcs, Cr4(0));
        self.set_efer(vmcs, Efer(0));
        self.set_cr0(vmcs, Cr0(Cr0::RESET));
        self.flush_guest = true;
    }

    /// Makes RSP's place in the registers true.
    #[inline]
    pub(crate) fn sync_rsp(&mut self, vmcs: &CurrentVmcs<'_>) {
        self.registers[4] = vmcs.read(FieldNatural::GUEST_RSP);
    }

    /// A general register by its number, 0 to 15.
    #[inline]
    pub(crate) fn gpr(&self, vmcs: &CurrentVmcs<'_>, number: u8) -> u64 {
        if number == 4 {
            vmcs.read(FieldNatural::GUEST_RSP)
        } else {
            self.registers[usize::from(number & 15)]
        }
    }

    /// Sets a general register by its number, 0 to 15.
    #[inline]
    pub(crate) fn set_gpr(&mut self, vmcs: &mut CurrentVmcs<'_>, number: u8, value: u64) {
        if number == 4 {
            vmcs.write(FieldNatural::GUEST_RSP, value);
        } else {
            self.registers[usize::from(number & 15)] = value;
        }
    }

    /// CR0 as the guest reads it.
    pub(crate) fn read_cr0(&self, vmcs: &CurrentVmcs<'_>) -> Cr0 {
        let mask = setup::CR0_GUEST_OWNED;
        Cr0((self.cr0.0 & !mask) | (vmcs.read(FieldNatural::GUEST_CR0) & mask))
    }

    /// CR4 as the guest reads it.
    pub(crate) fn read_cr4(&self, vmcs: &CurrentVmcs<'_>) -> Cr4 {
        let mask = setup::CR4_GUEST_OWNED;
        Cr4((self.cr4.0 & !mask) | (vmcs.read(FieldNatural::GUEST_CR4) & mask))
    }

    /// Sets CR0 to a legal value. The caller sees to the PDPTEs.
    pub(crate) fn set_cr0(&mut self, vmcs: &mut CurrentVmcs<'_>, value: Cr0) {
        let old = self.cr0;
        self.cr0 = value;
        if old.changed(value) & Cr0::PG != 0 && self.efer.has(Efer::LME) {
            let efer = if value.has(Cr0::PG) {
                self.efer.with(Efer::LMA)
            } else {
                self.efer.without(Efer::LMA)
            };
            self.set_efer(vmcs, efer);
        }
        let (fixed, allowed) = self.vm.host.capabilities.cr0_fixed;
        // An unrestricted guest may have PE and PG clear whatever the fixed bits say. The guest's
        // caches are the host's to rule: memory types come from EPT.
        let fixed = fixed & !(Cr0::PE | Cr0::PG);
        let real = ((value.0 & !(Cr0::CD | Cr0::NW)) | fixed) & allowed;
        vmcs.write(FieldNatural::GUEST_CR0, real);
        vmcs.write(FieldNatural::CR0_READ_SHADOW, value.0);
    }

    /// Sets CR4 to a legal value. The caller sees to the PDPTEs.
    pub(crate) fn set_cr4(&mut self, vmcs: &mut CurrentVmcs<'_>, value: Cr4) {
        self.cr4 = value;
        let real = value.in_guest(Cr4(cpu::cr4()), self.vm.host.capabilities.cr4_fixed);
        vmcs.write(FieldNatural::GUEST_CR4, real);
        vmcs.write(FieldNatural::CR4_READ_SHADOW, value.0);
    }

    /// Sets EFER to a legal value, LMA included.
    pub(crate) fn set_efer(&mut self, vmcs: &mut CurrentVmcs<'_>, value: Efer) {
        self.efer = value;
        vmcs.write64(Field64::GUEST_EFER, value.0);
        let controls = if value.has(Efer::LMA) {
            self.entry_controls | entry::IA32E_MODE_GUEST
        } else {
            self.entry_controls & !entry::IA32E_MODE_GUEST
        };
        if controls != self.entry_controls {
            self.entry_controls = controls;
            vmcs.write32(Field32::ENTRY_CONTROLS, controls);
        }
    }

    /// Whether the guest is in protected mode.
    #[inline]
    pub(crate) fn is_protected(&self) -> bool {
        self.cr0.has(Cr0::PE)
    }

    /// Whether the guest uses PAE paging, whose four root entries the VMCS holds.
    #[inline]
    pub(crate) fn uses_pdptes(&self) -> bool {
        self.cr0.has(Cr0::PG) && self.cr4.has(Cr4::PAE) && !self.efer.has(Efer::LMA)
    }

    /// The clocks of the local APIC's timer.
    #[inline]
    pub(crate) fn clock(&self) -> GuestClock {
        GuestClock {
            tsc_offset: self.tsc_offset,
        }
    }

    /// The guest's TSC.
    #[inline]
    pub(crate) fn guest_tsc(&self) -> u64 {
        cpu::rdtsc().wrapping_add(self.tsc_offset)
    }

    /// Whether an external interrupt waits that the local APIC's priorities let through.
    #[inline]
    pub(crate) fn has_interrupt(&self) -> bool {
        match &self.lapic {
            Some(lapic) => lapic.highest_pending().is_some() || self.has_pic_interrupt(lapic),
            None => self.events.interrupt.is_some(),
        }
    }

    /// Whether the 8259s, the kernel's or userspace's, have an interrupt that `lapic` lets through.
    #[inline]
    fn has_pic_interrupt(&self, lapic: &LocalApic) -> bool {
        let waits = match self.vm.irqchip() {
            Some(chip) => chip.pic_output(),
            None => self.events.interrupt.is_some(),
        };
        waits && lapic.accepts_pic_interrupt()
    }

    /// Whether userspace has the 8259s, or all interrupt controllers, and may give the guest an interrupt
    /// of theirs now: there is a place for its vector, and the local APIC lets it through.
    pub(crate) fn takes_external_interrupt(&self) -> bool {
        self.vm.irqchip().is_none()
            && self.events.interrupt.is_none()
            && self
                .lapic
                .as_ref()
                .is_none_or(|lapic| lapic.accepts_pic_interrupt())
    }

    /// Takes the external interrupt that goes first.
    pub(crate) fn take_interrupt(&mut self) -> Option<Vector> {
        let Some(lapic) = &mut self.lapic else {
            return self.events.interrupt.take();
        };
        if let Some(chip) = self.vm.irqchip() {
            if chip.pic_output() && lapic.accepts_pic_interrupt() {
                return Some(chip.acknowledge_pic(&self.vm));
            }
        } else if self.events.interrupt.is_some() && lapic.accepts_pic_interrupt() {
            return self.events.interrupt.take();
        }
        let vector = lapic.highest_pending()?;
        lapic.acknowledge(vector);
        Some(vector)
    }

    /// Moves what other threads posted into the local APIC.
    pub(crate) fn take_posted(&mut self) {
        if let Some(lapic) = &mut self.lapic {
            let posted = self.shared.mailbox.take_posted();
            lapic.merge_requests_with_level(&posted.vectors, &posted.level);
        }
        self.events.nmis = (self.events.nmis + self.shared.mailbox.take_nmis()).min(2);
        self.events.attention = true;
    }

    /// Looks whether an access of the local APIC has let an interrupt through, or raised one.
    #[inline]
    pub(crate) fn note_interrupts(&mut self) {
        let waits = match &self.lapic {
            // One that waits for the task priority to fall counts too: the TPR threshold hangs on it.
            Some(lapic) => lapic.has_request() || self.has_pic_interrupt(lapic),
            None => self.events.interrupt.is_some(),
        };
        if waits {
            self.events.attention = true;
        }
    }

    /// Carries out what the local APIC asks for.
    #[inline]
    pub(crate) fn apply(&mut self, effect: LapicEffect) {
        if effect != LapicEffect::None {
            self.carry_out(effect);
        }
        // After the identity is published: the PICs tell only whom they know to be theirs.
        self.note_interrupts();
    }

    fn carry_out(&mut self, effect: LapicEffect) {
        match effect {
            LapicEffect::None => {}
            // What comes back to this APIC comes as a request.
            LapicEffect::SendIpi(message) => {
                self.vm.deliver(&message, Some(self.shared.id));
            }
            LapicEffect::Eoi(vector) => self.end_of_interrupt(vector),
            LapicEffect::TimerChanged => self.shared.request_self(Request::ARM_TIMER),
            LapicEffect::IdentityChanged => {
                if let Some(lapic) = &self.lapic {
                    self.shared.mailbox.publish_identity(lapic.identity());
                }
                self.watch_eois();
                // LINT0 may let userspace's interrupts through now, and the x2APIC's TPR be elsewhere.
                self.events.attention = true;
            }
            LapicEffect::PriorityChanged => self.events.attention = true,
        }
    }

    /// Lets the local APIC tell the ends of interrupts that a device waits for.
    pub(crate) fn watch_eois(&mut self) {
        if let (Some(lapic), Some(chip)) = (&mut self.lapic, self.vm.irqchip()) {
            let watched = chip.watched_vectors(&self.vm, &lapic.identity());
            lapic.watch_eoi(&watched);
        }
    }

    /// The local APIC broadcasts the end of a level-triggered interrupt.
    fn end_of_interrupt(&mut self, vector: Vector) {
        if let (Some(chip), Some(lapic)) = (self.vm.split_chip(), &self.lapic) {
            if chip.wants_end(&self.vm, &lapic.identity(), vector) {
                self.ended = Some(vector);
                self.shared.request_self(Request::INTERRUPT_ENDED);
            }
        } else {
            self.vm.end_of_interrupt(vector);
        }
    }

    /// The moment at which the host's timer must fire for the local APIC's.
    pub(crate) fn timer_deadline(&self) -> Option<u64> {
        match self.lapic.as_ref()?.deadline()? {
            Deadline::At(moment) => Some(moment.0),
            Deadline::Tsc(target) => {
                let cycles = target.saturating_sub(self.guest_tsc());
                let khz = self.vm.host.tsc_khz.max(1);
                // Split, so that nothing overflows: whole milliseconds and the rest.
                let nanoseconds = (cycles / khz)
                    .saturating_mul(1_000_000)
                    .saturating_add((cycles % khz) * 1_000_000 / khz);
                Some(timer::monotonic().saturating_add(nanoseconds))
            }
        }
    }
}
