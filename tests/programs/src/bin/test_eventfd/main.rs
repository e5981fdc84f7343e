// SPDX-License-Identifier: GPL-2.0
//! What programs ask the hypervisor to do in their stead: interrupts by eventfd, doorbells, and writes put
//! by in a ring.

mod coalesced;
mod doorbell;
mod irqfd;
mod resampler;

use rvisor_tests::guest::{self, Mode};
use rvisor_tests::handlers::{self, Acknowledge};
use rvisor_tests::{ktap, tests, Cpu, Device, Fail, Machine};

/// A machine with interrupt controllers, and one vCPU that runs `code`.
fn start(
    device: &Device,
    mode: Mode,
    code: &[u8],
    how: Acknowledge,
) -> Result<(Machine, Cpu), Fail> {
    let machine = Machine::with_irqchip(device)?;
    let cpu = machine.vcpu(0)?;
    guest::load(&machine, &cpu, mode, code)?;
    handlers::set_acknowledge(&machine.memory, how);
    Ok((machine, cpu))
}

fn main() -> std::process::ExitCode {
    ktap::main(tests![
        irqfd::errors,
        irqfd::ioapic_line,
        irqfd::pic_line,
        irqfd::message,
        irqfd::counts_as_one,
        irqfd::signalled_before,
        irqfd::wakes_hlt,
        irqfd::deassigned,
        irqfd::closed_eventfd,
        irqfd::closed_then_signalled,
        irqfd::closed_machine,
        resampler::errors,
        resampler::ioapic_line,
        resampler::pic_line,
        resampler::woken_by_delivery,
        resampler::lowered_at_the_end,
        doorbell::errors,
        doorbell::ports,
        doorbell::memory,
        doorbell::removed,
        doorbell::behind_memory,
        coalesced::errors,
        coalesced::memory,
        coalesced::ports,
        coalesced::full_ring,
        coalesced::spoilt_ring,
        coalesced::removed,
    ])
}
