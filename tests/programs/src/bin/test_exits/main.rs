// SPDX-License-Identifier: GPL-2.0
//! Exits: to userspace with their data, and those that the hypervisor answers itself.

mod exceptions;
mod faulting;
mod instructions;
mod mmio;
mod mmio_forms;
mod mmio_vectors;
mod pio;
mod refused;
mod running;

use rvisor_tests::guest::{self, Mode};
use rvisor_tests::{ktap, tests, Cpu, Device, Fail, Machine};

/// A default machine with one vCPU in long mode that runs `code`.
fn start(device: &Device, code: &[u8]) -> Result<(Machine, Cpu), Fail> {
    let machine = Machine::new(device)?;
    let cpu = machine.vcpu(0)?;
    guest::load(&machine, &cpu, Mode::Long, code)?;
    Ok((machine, cpu))
}

fn main() -> std::process::ExitCode {
    ktap::main(tests![
        pio::out_sizes,
        pio::in_sizes,
        pio::in_merges,
        pio::outs_string,
        pio::ins_string,
        pio::outs_real_mode,
        mmio::write_sizes,
        mmio::read_sizes,
        mmio::read_extends,
        mmio::read_modify_write,
        mmio::string_moves,
        mmio::page_crossing,
        mmio::protected_mode,
        mmio::unknown_form,
        mmio::read_of_another_instruction,
        mmio_forms::exchanges,
        mmio_forms::exchange_16_bytes,
        mmio_forms::exchange_16_in_memory,
        mmio_forms::bits,
        mmio_forms::carries_and_counts,
        mmio_forms::stack,
        mmio_forms::stack_on_a_device,
        mmio_forms::string_compares,
        mmio_forms::string_ports,
        mmio_forms::real_mode,
        mmio_forms::locked_in_read_only_memory,
        mmio_vectors::sse_moves,
        mmio_vectors::sse_crossing,
        mmio_vectors::sse_parts,
        mmio_vectors::avx_moves,
        mmio_vectors::avx_crossing,
        mmio::delivery_through_device,
        running::guest_time,
        running::immediate_exit,
        running::immediate_exit_completes,
        running::signal,
        running::signal_mask,
        running::changed_rip,
        running::shared_page,
        instructions::cpuid,
        faulting::cpuid_faulting,
        instructions::msr_values,
        instructions::msr_unknown,
        instructions::vmcall,
        instructions::cache_control,
        instructions::xsetbv,
        instructions::control_registers,
        instructions::control_registers_refused,
        instructions::debug_registers,
        instructions::hlt,
        instructions::pause_and_tsc,
        exceptions::table,
        exceptions::page_fault,
        exceptions::nested_in_handler,
        exceptions::single_step,
        refused::instructions_refused,
        refused::instructions_hidden,
        refused::msrs_of_the_host,
    ])
}
