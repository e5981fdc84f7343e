// SPDX-License-Identifier: GPL-2.0

//! The interval timer's interrupts: their way to the controllers, and back the news of their end, for
//! which those wait that came too fast.

use super::{
    irqchip::{now, Chips, IrqChip, Messages},
    machine::Vm,
    shared::Request,
};
use kernel::prelude::*;
use rvisor_core::{
    irqchip::{
        destination::ApicIdentity, pic::PicEvents, pit::Pit, routing::Target,
        vector_set::VectorSet, LineSource,
    },
    x86::vector::Gsi,
};

/// The GSI of the PIT.
const PIT_GSI: Gsi = Gsi(0);

/// Where it goes: bit n is the IOAPIC's pin or the PICs' line n.
#[derive(Default)]
pub(super) struct PitRoute {
    pins: u32,
    lines: u16,
}

impl Chips {
    /// Finds anew where the PIT's GSI goes.
    pub(super) fn find_pit_route(&mut self) {
        let mut route = PitRoute::default();
        for target in self.index.targets(&self.routes, PIT_GSI) {
            match target {
                Target::Pic(line) => route.lines |= 1 << line,
                Target::IoApic(pin) => route.pins |= 1 << pin,
                Target::Msi { .. } => {}
            }
        }
        self.pit_route = route;
    }

    fn keeps_ticks(&self) -> bool {
        self.pit.as_ref().is_some_and(Pit::keeps_interrupts)
    }

    /// The IOAPIC's pins whose interrupts the PIT waits to be ended, bit n for pin n.
    pub(super) fn kept_pins(&self) -> u32 {
        if self.keeps_ticks() {
            self.pit_route.pins
        } else {
            0
        }
    }

    /// The PICs' lines whose interrupts anyone waits to be ended, bit n for line n.
    pub(super) fn awaited_lines(&self) -> u16 {
        if self.keeps_ticks() {
            self.pit_route.lines | self.resampled_lines()
        } else {
            self.resampled_lines()
        }
    }

    /// One edge at the PIT's lines.
    fn pulse_pit(&mut self, messages: &mut Messages) {
        self.drive(PIT_GSI, LineSource::PIT, true, messages);
        self.drive(PIT_GSI, LineSource::PIT, false, messages);
    }

    /// An interrupt of the PIT has ended: the next one comes, where one was kept.
    pub(super) fn end_pit(&mut self, messages: &mut Messages) {
        if self.pit.as_mut().is_some_and(Pit::ended) {
            self.pulse_pit(messages);
        }
    }
}

impl IrqChip {
    #[cold]
    pub(super) fn tell_of_lines(&self, vm: &Vm, events: PicEvents) {
        let mut messages = Messages::new();
        let resampled = {
            let mut chips = self.chips.lock();
            let lines = chips.pit_route.lines;
            if let (true, Some(pit)) = (events.unmasked & lines != 0, &mut chips.pit) {
                pit.unmasked();
            }
            if events.ended & lines != 0 {
                chips.end_pit(&mut messages);
            }
            self.publish(vm, &chips);
            events.ended & chips.resampled_lines()
        };
        messages.deliver(vm);
        if resampled != 0 {
            self.end_lines(vm, resampled);
        }
    }

    /// The edge-triggered vectors whose end the local APIC `identity` is to tell: the PIT waits for it.
    pub(crate) fn watched_vectors(&self, vm: &Vm, identity: &ApicIdentity) -> VectorSet {
        let chips = self.chips.lock();
        match chips.kept_pins() {
            0 => VectorSet::EMPTY,
            pins => chips
                .ioapic
                .watched_vectors(identity, vm.apics.device(), pins),
        }
    }

    /// Makes the local APICs ask for [`Self::watched_vectors`] anew.
    pub(super) fn watch(vm: &Vm) {
        vm.memory.with_vcpus(|vcpus| {
            for vcpu in vcpus {
                vcpu.request(Request::WATCH);
            }
        });
    }

    /// Carries out KVM_REINJECT_CONTROL: whether the PIT's interrupts are kept until the guest has ended
    /// those before.
    ///
    /// # Errors
    ///
    /// `ENXIO` without a PIT.
    pub(crate) fn keep_pit_interrupts(&self, vm: &Vm, keep: bool) -> Result {
        self.chips
            .lock()
            .pit
            .as_mut()
            .ok_or(ENXIO)?
            .keep_interrupts(keep);
        Self::watch(vm);
        Ok(())
    }

    /// Lets the PIT's edges that are due reach the controllers, and sets its timer anew.
    pub(crate) fn pit_due(&self, vm: &Vm) {
        let mut messages = Messages::new();
        let rose = {
            let mut chips = self.chips.lock();
            let Some(tick) = chips.pit.as_mut().map(|pit| pit.tick(now())) else {
                return;
            };
            if tick.interrupts {
                chips.pulse_pit(&mut messages);
            }
            self.publish(vm, &chips);
            self.arm_pit(&chips);
            tick.rose
        };
        messages.deliver(vm);
        if rose {
            // Where LINT0 is set up for it, each tick is an NMI too, past the PICs, as in KVM: so works
            // the NMI watchdog of older systems.
            vm.memory.with_vcpus(|vcpus| {
                for vcpu in vcpus.iter().filter(|vcpu| vcpu.identity().is_watchdog) {
                    vcpu.post_nmi();
                }
            });
        }
    }
}
