// SPDX-License-Identifier: GPL-2.0

//! The interrupt controllers and the interval timer that a virtual machine's CPUs share.
//!
//! `chips` is a leaf lock, never taken in an interrupt handler: the PIT's timer only leaves a request
//! for the bootstrap processor. Messages are delivered after it is dropped.

use super::{
    irqfd::Resampler,
    machine::Vm,
    pit::PitRoute,
    resample::{Ended, Resampled},
    shared::{Request, VcpuShared},
};
use crate::host::{
    rcu::RcuCell,
    timer::{self, Expire, Timer},
};
use core::sync::atomic::{AtomicBool, AtomicPtr, Ordering};
use kernel::{
    new_spinlock,
    prelude::*,
    sync::{Arc, SpinLock, SpinLockGuard},
};
use rvisor_core::{
    irqchip::{
        destination::InterruptMessage,
        ioapic::{self, IoApic},
        pic::DualPic,
        pit::Pit,
        routing::{Route, RoutingIndex, Target, DEFAULT_ROUTES},
        LineOutcome, LineSource, Nanoseconds,
    },
    x86::{
        address::Gpa,
        vector::{Gsi, Vector},
    },
};

/// The most messages that one operation on the IOAPIC can send: one for each pin.
const MAX_MESSAGES: usize = ioapic::PINS;

/// Messages on their way from under the lock to the local APICs.
pub(super) struct Messages {
    /// Each with the IOAPIC's pin that it comes from, where it comes from there.
    list: [Option<(Option<u8>, InterruptMessage)>; MAX_MESSAGES],
    count: usize,
}

impl Messages {
    pub(super) fn new() -> Self {
        Self {
            list: [None; MAX_MESSAGES],
            count: 0,
        }
    }

    pub(super) fn push(&mut self, pin: Option<u8>, message: InterruptMessage) {
        if let Some(place) = self.list.get_mut(self.count) {
            *place = Some((pin, message));
            self.count += 1;
        }
    }

    pub(super) fn deliver(&self, vm: &Vm) {
        for (pin, message) in self.list.iter().take(self.count).flatten() {
            let taken = vm.deliver(message, None);
            if let (false, Some(pin), Some(chip)) = (taken, *pin, vm.irqchip()) {
                // No APIC will ever end it: the pin's next change sends another.
                chip.chips.lock().ioapic.undelivered(pin);
            }
        }
    }
}

/// What the lock guards.
pub(crate) struct Chips {
    pub(crate) pic: DualPic,
    pub(crate) ioapic: IoApic,
    pub(crate) pit: Option<Pit>,
    /// Port 0x61 is the PIT's too, and not userspace's.
    speaker: bool,
    pub(super) pit_route: PitRoute,
    /// MSIs have 32-bit destinations.
    long_ids: bool,
    pub(super) routes: KVec<Route>,
    pub(super) index: KBox<RoutingIndex>,
    pub(super) resampled: Resampled,
}

/// The PIT's timer wakes the bootstrap processor, once that is there.
struct PitTarget {
    bootstrap: AtomicPtr<VcpuShared>,
}

impl Expire for PitTarget {
    fn expire(&self) {
        let vcpu = self.bootstrap.load(Ordering::Acquire);
        // SAFETY: The pointer is null or one that `IrqChip::set_bootstrap` took out of an `Arc` that
        // the chip holds until after its timer is cancelled.
        if let Some(vcpu) = unsafe { vcpu.as_ref() } {
            vcpu.request(Request::PIT);
        }
    }
}

/// The controllers of one virtual machine.
#[pin_data]
pub(crate) struct IrqChip {
    #[pin]
    pub(crate) chips: SpinLock<Chips>,
    pub(super) resamplers: RcuCell<KVVec<Resampler>>,
    /// The PICs' INTR line, published so that entering the guest needs no lock.
    pic_output: AtomicBool,
    // Fields drop in order: the timer goes before what its callback uses.
    #[pin]
    pit_timer: Timer<PitTarget>,
    pit_target: KBox<PitTarget>,
    #[pin]
    bootstrap: SpinLock<Option<Arc<VcpuShared>>>,
}

impl IrqChip {
    /// The controllers after power-up; no PIT yet. With `long_ids` MSIs have 32-bit destinations.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(crate) fn new(long_ids: bool) -> Result<Pin<KBox<Self>>> {
        let mut routes = KVec::with_capacity(DEFAULT_ROUTES.len(), GFP_KERNEL_ACCOUNT)?;
        for route in DEFAULT_ROUTES {
            routes.push_within_capacity(route)?;
        }
        let mut index = KBox::new(RoutingIndex::new(), GFP_KERNEL_ACCOUNT)?;
        index.build(&mut routes).map_err(|_| EINVAL)?;
        let mut chips = Chips {
            pic: DualPic::new(),
            ioapic: IoApic::new(),
            pit: None,
            speaker: false,
            pit_route: PitRoute::default(),
            long_ids,
            routes,
            index,
            resampled: Resampled::default(),
        };
        chips.find_pit_route();
        let pit_target = KBox::new(
            PitTarget {
                bootstrap: AtomicPtr::new(core::ptr::null_mut()),
            },
            GFP_KERNEL_ACCOUNT,
        )?;
        let target: *const PitTarget = &*pit_target;
        KBox::pin_init(
            pin_init!(Self {
                chips <- new_spinlock!(chips),
                resamplers: RcuCell::new(),
                pic_output: AtomicBool::new(false),
                // SAFETY: The box behind `pit_target` is dropped after the timer.
                pit_timer <- unsafe { Timer::new(target) },
                pit_target,
                bootstrap <- new_spinlock!(None),
            }),
            GFP_KERNEL_ACCOUNT,
        )
    }

    /// Makes the bootstrap processor known, to whose LINT0 the PICs are wired.
    pub(crate) fn set_bootstrap(&self, vcpu: Arc<VcpuShared>) {
        let mut bootstrap = self.bootstrap.lock();
        if bootstrap.is_none() {
            let raw: *const VcpuShared = &*vcpu;
            self.pit_target
                .bootstrap
                .store(raw.cast_mut(), Ordering::Release);
            // The timer may have been due when there was nobody to tell.
            vcpu.request(Request::PIT);
            *bootstrap = Some(vcpu);
        }
    }

    /// Forgets the bootstrap processor.
    pub(crate) fn clear_bootstrap(&self) {
        let null = core::ptr::null_mut();
        self.pit_target.bootstrap.store(null, Ordering::Release);
        // A callback that has the old pointer still is over after this.
        self.pit_timer.cancel();
        let _old = self.bootstrap.lock().take();
    }

    /// Makes the PIT, with port 0x61 where `speaker` says so (KVM_PIT_SPEAKER_DUMMY).
    ///
    /// # Errors
    ///
    /// `EEXIST` where there is one.
    pub(crate) fn create_pit(&self, speaker: bool) -> Result {
        let mut chips = self.chips.lock();
        if chips.pit.is_some() {
            return Err(EEXIST);
        }
        chips.pit = Some(Pit::new(now()));
        chips.speaker = speaker;
        Ok(())
    }

    /// Sets whether MSIs have 32-bit destinations.
    pub(crate) fn set_long_ids(&self, long_ids: bool) {
        self.chips.lock().long_ids = long_ids;
    }

    /// Whether the PICs ask for an interrupt.
    #[inline]
    pub(crate) fn pic_output(&self) -> bool {
        self.pic_output.load(Ordering::SeqCst)
    }

    /// Publishes the PICs' output; the processors that it is wired to look at it where it rose.
    #[inline(never)]
    pub(super) fn publish(&self, vm: &Vm, chips: &Chips) {
        let output = chips.pic.output();
        if self.pic_output.swap(output, Ordering::SeqCst) != output && output {
            vm.memory.with_vcpus(|vcpus| {
                for vcpu in vcpus.iter().filter(|vcpu| vcpu.identity().takes_pic) {
                    vcpu.request(Request::EVENT);
                }
            });
        }
    }

    /// The vector of the interrupt that the CPU takes from the PICs.
    pub(crate) fn acknowledge_pic(&self, vm: &Vm) -> Vector {
        let mut chips = self.chips.lock();
        let vector = chips.pic.acknowledge();
        self.after_pic(vm, chips);
        vector
    }

    /// Lets what was done with the PICs take effect, and tells those who wait for the ends of interrupts.
    #[inline]
    fn after_pic(&self, vm: &Vm, mut chips: SpinLockGuard<'_, Chips>) {
        let events = chips.pic.take_events();
        self.publish(vm, &chips);
        if (events.ended | events.unmasked) & chips.awaited_lines() != 0 {
            drop(chips);
            self.tell_of_lines(vm, events);
        }
    }

    /// Drives a GSI's lines. Says whether the interrupt was taken: 0 coalesced, 1 delivered, -1 ignored.
    pub(crate) fn set_line(&self, vm: &Vm, gsi: Gsi, source: LineSource, level: bool) -> i32 {
        let mut messages = Messages::new();
        let mut status = -1;
        {
            let mut chips = self.chips.lock();
            status = status.max(chips.drive(gsi, source, level, &mut messages));
            self.publish(vm, &chips);
        }
        messages.deliver(vm);
        status
    }

    /// The MSI that a GSI is, where it is nothing else and the lock can be had without waiting.
    pub(crate) fn try_message(&self, gsi: Gsi) -> Option<InterruptMessage> {
        let chips = self.chips.try_lock()?;
        let mut targets = chips.index.targets(&chips.routes, gsi);
        match (targets.next(), targets.next()) {
            (Some(Target::Msi { address, data }), None) => {
                InterruptMessage::from_msi(address, data, chips.long_ids).ok()
            }
            _ => None,
        }
    }

    /// The end of an interrupt, as a local APIC tells it: of a level-triggered one, or of one of
    /// [`Self::watched_vectors`].
    pub(crate) fn end_of_interrupt(&self, vm: &Vm, vector: Vector) {
        let mut messages = Messages::new();
        let mut ended = Ended::none();
        {
            let mut chips = self.chips.lock();
            let pins = chips.ioapic.pins_with_vector(vector);
            if chips.has_resamplers() {
                chips.lower_pins(pins, &mut ended, &mut messages);
                self.publish(vm, &chips);
            }
            chips
                .ioapic
                .eoi(vector, |pin, message| messages.push(Some(pin), message));
            if pins & chips.kept_pins() != 0 {
                chips.end_pit(&mut messages);
                self.publish(vm, &chips);
            }
        }
        messages.deliver(vm);
        self.tell_resamplers(&ended);
    }

    /// Sets the routes.
    ///
    /// # Errors
    ///
    /// `EINVAL` where they contradict each other; nothing changed then.
    pub(crate) fn set_routes(&self, vm: &Vm, mut routes: KVec<Route>) -> Result {
        let mut index = KBox::new(RoutingIndex::new(), GFP_KERNEL_ACCOUNT)?;
        index.build(&mut routes).map_err(|_| EINVAL)?;
        let _old = {
            let mut chips = self.chips.lock();
            let old = (
                core::mem::replace(&mut chips.routes, routes),
                core::mem::replace(&mut chips.index, index),
            );
            self.refresh_resampled(&mut chips);
            chips.find_pit_route();
            old
        };
        Self::watch(vm);
        Ok(())
    }

    /// Sets the host's timer to the PIT's next edge.
    pub(crate) fn arm_pit(&self, chips: &Chips) {
        if let Some(deadline) = chips.pit.as_ref().and_then(Pit::deadline) {
            self.pit_timer.start(deadline.0);
        }
    }

    /// Reads a port of the controllers. `None` where it is not one of theirs.
    pub(crate) fn read_port(&self, vm: &Vm, port: u16) -> Option<u8> {
        let mut chips = self.chips.lock();
        if let Some(value) = chips.pic.read_port(port) {
            // Only a poll changes anything: it is an acknowledgement.
            if chips.pic.output() != self.pic_output() {
                self.after_pic(vm, chips);
            }
            return Some(value);
        }
        match port {
            0x61 if !chips.speaker => None,
            0x40..=0x43 | 0x61 => chips.pit.as_mut()?.read_port(port, now()),
            _ => None,
        }
    }

    /// Writes a port of the controllers. Says whether it is one of theirs.
    pub(crate) fn write_port(&self, vm: &Vm, port: u16, value: u8) -> bool {
        let mut chips = self.chips.lock();
        match port {
            0x20 | 0x21 | 0xa0 | 0xa1 | 0x4d0 | 0x4d1 => {
                let known = chips.pic.write_port(port, value);
                self.after_pic(vm, chips);
                known
            }
            0x61 if !chips.speaker => false,
            0x40..=0x43 | 0x61 => {
                let known = match chips.pit.as_mut() {
                    Some(pit) => pit.write_port(port, value, now()),
                    None => false,
                };
                if known {
                    self.arm_pit(&chips);
                }
                known
            }
            _ => false,
        }
    }

    /// The offset of `gpa` in the IOAPIC's window, where it lies there.
    pub(crate) fn ioapic_offset(gpa: Gpa) -> Option<u8> {
        let offset = gpa.raw().wrapping_sub(ioapic::BASE_ADDRESS);
        (offset < ioapic::WINDOW_SIZE).then_some(offset as u8)
    }

    /// Reads a register of the IOAPIC.
    pub(crate) fn read_ioapic(&self, offset: u8) -> u32 {
        self.chips.lock().ioapic.read(offset)
    }

    /// Writes a register of the IOAPIC.
    pub(crate) fn write_ioapic(&self, vm: &Vm, offset: u8, value: u32) {
        let mut messages = Messages::new();
        let mut ended = Ended::none();
        let watch = {
            let mut chips = self.chips.lock();
            let effect = chips.ioapic.write(offset, value);
            if let Some(message) = effect.message {
                messages.push(effect.changed, message);
            }
            if let (true, Some(pin)) = (effect.resample, effect.changed) {
                chips.ask_pin(pin, &mut ended);
            }
            let pin = effect.changed.map_or(0, |pin| 1 << pin);
            let is_pits = pin & chips.kept_pins() != 0;
            if let (true, true, Some(pit)) = (is_pits, effect.unmasked, &mut chips.pit) {
                pit.unmasked();
            }
            is_pits
        };
        messages.deliver(vm);
        self.tell_resamplers(&ended);
        if watch {
            Self::watch(vm);
        }
    }

    /// Runs `f` with the controllers, then lets what changed take effect.
    pub(crate) fn with_chips<R>(
        &self,
        vm: &Vm,
        f: impl FnOnce(&mut Chips, &mut dyn FnMut(InterruptMessage)) -> R,
    ) -> R {
        let mut messages = Messages::new();
        let result = {
            let mut chips = self.chips.lock();
            let result = f(&mut chips, &mut |message| messages.push(None, message));
            self.publish(vm, &chips);
            self.arm_pit(&chips);
            result
        };
        messages.deliver(vm);
        Self::watch(vm);
        result
    }
}

impl Chips {
    /// Drives what a GSI is routed to. The status is as [`IrqChip::set_line`]'s.
    pub(super) fn drive(
        &mut self,
        gsi: Gsi,
        source: LineSource,
        level: bool,
        messages: &mut Messages,
    ) -> i32 {
        let Self {
            pic,
            ioapic,
            routes,
            index,
            long_ids,
            ..
        } = self;
        let mut status = -1;
        for target in index.targets(routes, gsi) {
            let outcome = match target {
                Target::Pic(line) => pic.set_line(line, source, level),
                Target::IoApic(pin) => ioapic.set_line(pin, source, level),
                // An MSI has an edge only.
                Target::Msi { .. } if !level => LineOutcome::Taken,
                Target::Msi { address, data, .. } => {
                    match InterruptMessage::from_msi(address, data, *long_ids) {
                        Ok(message) => LineOutcome::Send(message),
                        Err(_) => LineOutcome::Ignored,
                    }
                }
            };
            status = status.max(match outcome {
                LineOutcome::Ignored => -1,
                LineOutcome::Coalesced => 0,
                LineOutcome::Taken => 1,
                LineOutcome::Send(message) => {
                    let pin = match target {
                        Target::IoApic(pin) => Some(pin),
                        _ => None,
                    };
                    messages.push(pin, message);
                    1
                }
            });
        }
        status
    }
}

/// The clock of the PIT.
pub(crate) fn now() -> Nanoseconds {
    Nanoseconds(timer::monotonic())
}
