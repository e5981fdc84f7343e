// SPDX-License-Identifier: GPL-2.0
//! Interrupts: through the PICs, the IOAPIC and the local APIC, its timer, IPIs, and KVM_INTERRUPT.

mod apic;
mod chips;
mod halt;
mod ipi;
mod pic;
mod priority;
mod probe;
mod smp;
mod split;
mod window;
mod x2apic;

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
        priority::cr8_lets_through,
        priority::x2apic_lets_through,
        priority::priority_behind_in_service,
        priority::priority_falls_by_itself,
        priority::priority_moves,
        priority::priority_for_userspace,
        priority::x2apic_comes_and_goes,
        apic::hlt_wakes,
        apic::nmi_wakes_hlt,
        apic::sti_shadow,
        smp::init_sipi,
        smp::ipi_both_ways,
        smp::sipi_received,
        x2apic::x2apic_transitions,
        x2apic::x2apic_registers,
        x2apic::x2apic_self_ipi,
        x2apic::x2apic_page,
        x2apic::x2apic_state,
        x2apic::x2apic_api,
        x2apic::bus_cycle,
        ipi::ipi_flat,
        ipi::ipi_cluster,
        ipi::ipi_x2apic,
        ipi::ipi_lowest_priority,
        ipi::ipi_nmi_init_startup,
        ipi::msi_destinations,
        chips::pic_priorities,
        chips::pic_rotation,
        chips::pic_automatic_eoi,
        chips::pic_poll,
        chips::pic_level,
        chips::ioapic_remote_irr,
        chips::pit_speaker_port,
        chips::pit_channel_2,
        chips::pit_channel_0,
        chips::pit_backlog,
        chips::pit_watchdog,
        halt::hlt_costs_nothing,
        halt::wake_ups_by_messages,
        halt::wake_ups_by_deadlines,
        halt::wake_ups_by_ipis,
        halt::pic_wakes_another,
        split::rules,
        split::messages,
        split::no_resampler,
        split::end_of_interrupt,
        split::external,
        split::masked_window,
        window::interrupt,
        window::request_window,
        window::impossible_priority,
        window::second_interrupt,
    ])
}
