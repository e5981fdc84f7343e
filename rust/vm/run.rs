// SPDX-License-Identifier: GPL-2.0

//! KVM_RUN: from userspace's call to the guest and back. Read it from top to bottom: `run` is the
//! call, `run_loop` the part with interrupts on, `run_inner` the part with interrupts off.

use super::{
    events::is_interruptible,
    exits::Next,
    run_page::UserExit,
    shared::{Request, VcpuShared},
    vcpu::{Core, MpState, State, Vcpu},
};
use crate::{
    bindings,
    host::{
        irq::{GuestTime, IrqsOff, ThreadFlags},
        signal::SignalMask,
        timer,
    },
    vmx::hardware::{CurrentVmcs, Hardware},
};
use kernel::{current, prelude::*};
use rvisor_core::{
    irqchip::Clock,
    stats::Event,
    x86::{
        control::{Cr0, Rflags},
        vmcs::{interruptibility, Field32, FieldNatural},
    },
};

/// What the part with interrupts on has to do next. Its tag is a byte of its own, as that of [`Next`].
#[repr(u8)]
enum Outer {
    /// Enter again.
    Again,
    /// Carry out what needs sleep or guest memory.
    Slow(super::exits::Slow),
    /// Return to userspace, which has been told why.
    User,
}

/// Whether the guest can be entered.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Entry {
    Ready,
    /// Not yet: what was to be delivered has left something to see to before.
    Again,
    /// It has shut down.
    Shutdown,
}

impl Vcpu {
    /// Carries out KVM_RUN.
    ///
    /// # Errors
    ///
    /// `EINTR` for a signal or `immediate_exit`; `EAGAIN` after an application processor that waited
    /// was started; `EFAULT` where guest memory is backed by nothing; `EINVAL` for a `cr8` above 15; `ENOMEM`.
    pub(crate) fn run(&self) -> Result<isize> {
        self.with_state(|state| {
            let blocked = state.signal_mask.as_ref().map(SignalMask::block);
            let result = self.run_locked(state);
            drop(blocked);
            result.map(|()| 0)
        })
    }

    /// Tells userspace why RUN returns, where the reason arises: it is long, and would else be copied at
    /// each return on the way.
    #[inline(never)]
    fn tell(&self, exit: &UserExit) {
        match exit {
            UserExit::Mmio { .. } => self.shared.counters.count(Event::MmioExit),
            UserExit::InterruptWindow => self.shared.counters.count(Event::RequestIrqExit),
            UserExit::Emulation { .. } => self.shared.counters.count(Event::EmulationFailure),
            _ => {}
        }
        self.run.set_exit(exit);
    }

    /// Returns to userspace for `exit`.
    fn leave(&self, exit: &UserExit) -> Result<Outer> {
        self.tell(exit);
        Ok(Outer::User)
    }

    fn run_locked(&self, state: &mut State) -> Result {
        if state.core.mp_state == MpState::Uninitialized {
            let result = self.wait_for_startup(state);
            self.report_state(state)?;
            return result;
        }
        if state.core.lapic.is_none() {
            let cr8 = self.run.cr8();
            if cr8 > 0xf {
                return Err(EINVAL);
            }
            state.core.cr8 = cr8;
        }
        state.core.wants_window =
            state.core.vm.irqchip().is_none() && self.run.wants_interrupt_window();
        state.core.events.attention = true;
        state.fpu.load();
        // SAFETY: `state` stays where it is, pinned by `self`, and the notifier is taken back below.
        unsafe { state.hardware.arm(Hardware::start_running) };
        // What userspace owes an earlier exit comes first, even where it wants to leave at once.
        let result = match state.complete(&self.run) {
            Ok(None) if self.run.immediate_exit() => Err(EINTR),
            Ok(None) => self.run_loop(state),
            Ok(Some(exit)) => {
                self.tell(&exit);
                Ok(())
            }
            Err(error) => Err(error),
        };
        // There may be no next entry.
        if state.core.noted.is_some() {
            state.core.tell_exit();
        }
        // While the VMCS is active still.
        let reported = self.report_state(state);
        {
            let irqs = IrqsOff::new();
            state.hardware.get_mut(&irqs).stop_running(&irqs);
        }
        // SAFETY: Registered above by this thread.
        unsafe { state.hardware.disarm() };
        state.fpu.unload();
        reported?;
        result
    }

    /// RUN of an application processor that nobody has started: sleeps until INIT or a signal.
    fn wait_for_startup(&self, state: &mut State) -> Result {
        if self.run.immediate_exit() {
            return Err(EINTR);
        }
        self.shared.sleep();
        let request = self.shared.take_requests();
        state.with_vmcs(|core, vmcs| core.handle_requests(vmcs, self, request))?;
        if current!().signal_pending() {
            self.run.set_exit(&UserExit::Signal);
            return Err(EINTR);
        }
        Err(EAGAIN)
    }

    /// Tells userspace what it is told at every return.
    fn report_state(&self, state: &mut State) -> Result {
        let (if_flag, ready) = state.with_vmcs(|core, vmcs| {
            let if_flag = vmcs.read(FieldNatural::GUEST_RFLAGS) & Rflags::IF != 0;
            let ready = core.vm.irqchip().is_some() || core.is_window_open(vmcs);
            (if_flag, ready)
        })?;
        let (cr8, apic_base) = match &state.core.lapic {
            Some(lapic) => (lapic.cr8().into(), lapic.base()),
            None => (state.core.cr8, state.core.apic_base),
        };
        self.run.set_state(if_flag, cr8, apic_base, ready);
        Ok(())
    }

    fn run_loop(&self, state: &mut State) -> Result {
        state.core.has_run = true;
        loop {
            if state.core.mp_state != MpState::Runnable
                && state.core.wants_window
                && state.with_vmcs(Core::is_window_open)?
            {
                self.tell(&UserExit::InterruptWindow);
                return Ok(());
            }
            if state.core.mp_state != MpState::Runnable && !self.sleep(state)? {
                self.see_to_thread()?;
                continue;
            }
            match self.run_inner(state)? {
                // What the kernel wants of the thread, `run_inner` has looked for before each entry.
                Outer::Again => self.see_to_thread()?,
                Outer::Slow(slow) => {
                    if let Some(exit) = state.handle_slow(slow)? {
                        self.tell(&exit);
                        return Ok(());
                    }
                }
                Outer::User => return Ok(()),
            }
        }
    }

    /// Signals, rescheduling and whatever else the kernel wants of a thread before userspace runs.
    fn see_to_thread(&self) -> Result {
        // SAFETY: Task context, interrupts and preemption on.
        let signal = unsafe {
            ThreadFlags::read().has_work() && bindings::xfer_to_guest_mode_handle_work() != 0
        };
        if signal {
            self.shared.counters.count(Event::SignalExit);
            self.run.set_exit(&UserExit::Signal);
            return Err(EINTR);
        }
        Ok(())
    }

    /// HLT, or an application processor between INIT and SIPI: sleeps until there is something to do.
    /// Gives whether there is; a signal ends the sleep too.
    fn sleep(&self, state: &mut State) -> Result<bool> {
        loop {
            let request = self.shared.take_requests();
            let awake = state.with_vmcs(|core, vmcs| {
                core.handle_requests(vmcs, self, request);
                core.is_awake(vmcs)
            })?;
            if awake {
                state.core.mp_state = MpState::Runnable;
                return Ok(true);
            }
            if current!().signal_pending() {
                return Ok(false);
            }
            let start = timer::monotonic();
            self.shared.sleep();
            let counters = &self.shared.counters;
            counters.count_many(Event::HaltWait, timer::monotonic().wrapping_sub(start));
            if self.shared.has_requests() {
                counters.count(Event::HaltWakeup);
            }
        }
    }

    /// Enters the guest and handles its exits for as long as interrupts may stay off.
    fn run_inner(&self, state: &mut State) -> Result<Outer> {
        let State {
            hardware,
            core,
            fpu,
            ..
        } = state;
        let _guest_time = GuestTime::begin();
        let irqs = IrqsOff::with_vmx()?;
        let mut vmcs = CurrentVmcs::new(hardware.get_mut(&irqs), &irqs)?;
        vmcs.hardware.note_host_debugging(&irqs);
        if vmcs.has_moved() {
            // This CPU may hold translations from an earlier stay.
            core.generation = core.vm.memory.generation();
            vmcs.flush_ept();
        }
        // One load behind each exit, and not one for each use.
        let shared: &VcpuShared = &self.shared;
        let cpu = irqs.cpu();
        loop {
            // Requests are looked at after the world can see that the guest is entered, so that
            // whoever leaves one later kicks this CPU.
            shared.set_in_guest(cpu);
            if shared.has_requests() {
                shared.set_outside();
                let request = shared.take_requests();
                core.handle_requests(&mut vmcs, self, request);
                if let Some(vector) = core.ended.take() {
                    return self.leave(&UserExit::InterruptEnded { vector });
                }
                if core.mp_state != MpState::Runnable {
                    return Ok(Outer::Again);
                }
                // Requests may come without end, but not with interrupts off.
                shared.set_in_guest(cpu);
                if shared.has_requests() {
                    shared.set_outside();
                    return Ok(Outer::Again);
                }
            }
            let flags = ThreadFlags::read();
            if flags.has_work() {
                shared.set_outside();
                return Ok(Outer::Again);
            }
            match core.prepare_entry(&mut vmcs) {
                Entry::Ready => {}
                Entry::Again => {
                    shared.set_outside();
                    return Ok(Outer::Again);
                }
                Entry::Shutdown => {
                    shared.set_outside();
                    return self.leave(&UserExit::Shutdown);
                }
            }
            fpu.ensure_registers(flags, &irqs);
            let reason = vmcs.enter(&mut core.registers);
            shared.set_outside();
            match reason {
                Ok(reason) => {
                    shared.counters.exit(reason.basic().0);
                    if shared.trace.is_on() {
                        core.note_exit(&vmcs, shared, reason);
                    }
                    core.take_task_priority(&mut vmcs);
                    match core.handle_exit(&mut vmcs, reason) {
                        Next::Enter => {}
                        Next::OpenInterrupts => return Ok(Outer::Again),
                        Next::Slow(slow) => return Ok(Outer::Slow(slow)),
                        Next::User(ref exit) => return self.leave(exit),
                    }
                }
                Err(error) => {
                    core.take_back_injection(&mut vmcs);
                    return self.leave(&UserExit::FailedEntry {
                        reason: error.into(),
                        cpu,
                    });
                }
            }
        }
    }
}

impl Core {
    /// Does what has to be done before each entry.
    #[inline]
    fn prepare_entry(&mut self, vmcs: &mut CurrentVmcs<'_>) -> Entry {
        let generation = self.vm.memory.generation();
        if self.generation != generation {
            self.generation = generation;
            self.shared.counters.count(Event::TlbFlush);
            vmcs.flush_ept();
        }
        if self.flush_guest {
            self.flush_guest = false;
            self.shared.counters.count(Event::TlbFlush);
            vmcs.flush_vpid();
        }
        if !self.events.attention {
            return Entry::Ready;
        }
        if core::mem::take(&mut self.events.triple_fault) {
            return Entry::Shutdown;
        }
        self.inject_events(vmcs);
        // The 8259s end an interrupt when it is taken where the guest has told them so: that wakes who waits
        // for the end, and may raise the next, neither of which kicks the CPU that it happens on.
        if self.shared.has_requests() || ThreadFlags::read().has_work() {
            self.take_back_injection(vmcs);
            return Entry::Again;
        }
        Entry::Ready
    }

    /// Whether userspace can give the guest an interrupt by KVM_INTERRUPT now.
    fn is_window_open(&mut self, vmcs: &mut CurrentVmcs<'_>) -> bool {
        self.takes_external_interrupt()
            && self.events.reinjection.is_none()
            && is_interruptible(vmcs)
    }

    /// Sees to what others asked of this virtual CPU.
    fn handle_requests(&mut self, vmcs: &mut CurrentVmcs<'_>, vcpu: &Vcpu, request: Request) {
        if request.has(Request::TRACE) {
            self.tell_exit();
        }
        if request.has(Request::INIT_OR_SIPI) {
            self.accept_init_or_sipi(vmcs);
        }
        if request.has(Request::EVENT.with(Request::NMI)) {
            self.take_posted();
        }
        if request.has(Request::PIT) {
            if let Some(chip) = self.vm.irqchip() {
                chip.pit_due(&self.vm);
            }
            self.take_posted();
        }
        if request.has(Request::WATCH) {
            self.watch_eois();
        }
        if request.has(Request::LAPIC_TIMER.with(Request::ARM_TIMER)) {
            // A deadline that has passed when it is set needs no timer of the host's.
            let now = self.clock().now();
            if let Some(lapic) = &mut self.lapic {
                // A vector that is none raises the error's interrupt.
                lapic.timer_fired(now);
                self.events.attention = true;
            }
            // A timer that is not needed any more only leaves a request that finds nothing.
            if let Some(deadline) = self.timer_deadline() {
                vcpu.lapic_timer.start(deadline);
            }
        }
    }

    /// INIT resets the processor and, but for the bootstrap one, makes it wait for SIPI (SDM vol. 3,
    /// 11.4.2 and 10.4.4.1); SIPI starts it.
    pub(super) fn accept_init_or_sipi(&mut self, vmcs: &mut CurrentVmcs<'_>) {
        use rvisor_core::{irqchip::lapic::ResetKind, x86::vmcs::VmcsSegment};
        let startup = self.shared.mailbox.take_startup();
        let given = core::mem::take(&mut self.sipi_given);
        if let Some(vector) = startup.sipi {
            self.sipi_vector = vector;
        }
        let sipi = startup.sipi.is_some() || (given && !startup.init);
        if startup.init {
            // What was on its way is lost with the state that it was for.
            self.shared.mailbox.forget_interrupts();
            let cache_bits = self.cr0.0 & (Cr0::CD | Cr0::NW);
            self.reset(vmcs);
            // INIT leaves the caches as they were (SDM vol. 3, table 11-1).
            self.set_cr0(vmcs, Cr0((Cr0::RESET & !(Cr0::CD | Cr0::NW)) | cache_bits));
            let mut is_bootstrap = true;
            if let Some(lapic) = &mut self.lapic {
                lapic.reset(ResetKind::Init);
                is_bootstrap = lapic.is_bootstrap();
                self.shared.mailbox.publish_identity(lapic.identity());
            }
            self.watch_eois();
            self.events.attention = true;
            self.mp_state = if is_bootstrap {
                MpState::Runnable
            } else {
                MpState::InitReceived
            };
        }
        if self.mp_state != MpState::InitReceived || !sipi {
            return;
        }
        let vector = self.sipi_vector;
        let mut cs = vmcs.segment(VmcsSegment::Cs);
        cs.selector = u16::from(vector.0) << 8;
        cs.base = u64::from(vector.0) << 12;
        vmcs.set_segment(VmcsSegment::Cs, &cs);
        vmcs.write(FieldNatural::GUEST_RIP, 0);
        self.mp_state = MpState::Runnable;
    }

    /// Whether a halted processor has something to do.
    fn is_awake(&self, vmcs: &CurrentVmcs<'_>) -> bool {
        match self.mp_state {
            MpState::Halted => {
                (self.events.nmis > 0
                    && vmcs.read32(Field32::GUEST_INTERRUPTIBILITY) & interruptibility::NMI == 0)
                    || self.events.exception.is_some()
                    || (self.has_interrupt()
                        && vmcs.read(FieldNatural::GUEST_RFLAGS) & Rflags::IF != 0)
            }
            MpState::Runnable => true,
            MpState::Uninitialized | MpState::InitReceived => false,
        }
    }
}

/// The CPU this runs on, for reports to userspace.
pub(super) fn current_cpu(vmcs: &CurrentVmcs<'_>) -> u32 {
    vmcs.irqs().cpu()
}
