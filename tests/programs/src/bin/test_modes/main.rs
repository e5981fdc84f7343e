// SPDX-License-Identifier: GPL-2.0
//! Guests in each mode, and the processor's state in and out.

mod events;
mod modes;
mod state;
mod tasks;

use rvisor_tests::{ktap, tests};

fn main() -> std::process::ExitCode {
    ktap::main(tests![
        modes::reset_state,
        modes::reset_vector,
        modes::out_in_each_mode,
        modes::hlt_in_each_mode,
        modes::exception_in_each_mode,
        modes::real_to_long,
        modes::compatibility_mode,
        modes::segment_bases,
        tasks::task_jump,
        tasks::task_call,
        tasks::task_gate,
        tasks::task_gate_with_code,
        state::general_registers,
        state::control_registers,
        state::fpu,
        state::debug_registers,
        state::xcr0,
        state::xsave,
        state::msrs,
        state::msrs_refused,
        state::events_exception,
        state::events_nmi,
        events::cut_nmi,
        events::cut_interrupt,
        events::cut_software_events,
        events::injected_nmi,
        events::exception_goes_first,
        events::exception_vectors,
        events::nmi_behind_sti,
        events::failed_entry_keeps_event,
        events::sregs_interrupt,
    ])
}
