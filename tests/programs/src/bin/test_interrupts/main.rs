// SPDX-License-Identifier: GPL-2.0
//! Interrupts: through the PICs, the IOAPIC and the local APIC, its timer, IPIs, and KVM_INTERRUPT.

mod apic;
mod pic;
mod smp;
mod window;

use rvisor_tests::guest::{self, Mode};
use rvisor_tests::handlers::{self, Acknowledge};
use rvisor_tests::{ktap, tests, Cpu, Device, Fail, Machine};

/// A machine with interrupt controllers and timer, and one vCPU that runs `code`.
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
        pic::timer_in_each_mode,
        pic::edge_line,
        pic::slave_line,
        pic::masked_line,
        apic::ioapic_edge,
        apic::ioapic_level,
        apic::timer_one_shot,
        apic::timer_periodic,
        apic::timer_tsc_deadline,
        apic::self_ipi,
        apic::task_priority,
        apic::hlt_wakes,
        apic::nmi_wakes_hlt,
        apic::sti_shadow,
        smp::init_sipi,
        smp::ipi_both_ways,
        window::interrupt,
        window::request_window,
    ])
}
