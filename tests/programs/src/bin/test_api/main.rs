// SPDX-License-Identifier: GPL-2.0
//! The API itself: versions, capabilities, descriptors and the errno of each wrong call
//! (Documentation/virt/kvm/api.rst, sections 2 and 4).

mod clock;
mod memory;
mod stats;
mod system;
mod trace;
mod vcpu;
mod vm;

use rvisor_tests::{ktap, tests};

fn main() -> std::process::ExitCode {
    ktap::main(tests![
        system::version,
        system::unknown_ioctls,
        system::create_vm_type,
        system::mmap_size,
        system::extensions,
        system::msr_index_list,
        system::supported_cpuid,
        system::features_of_the_host,
        vm::unknown_ioctls,
        vm::vcpu_ids,
        vm::irqchip_order,
        vm::pit_order,
        vm::boot_cpu,
        vm::identity_map,
        vm::enable_capability,
        vm::vcpu_id_limit,
        vm::platform_info,
        vm::signal_msi_status,
        vm::irq_line_without_irqchip,
        vm::bad_pointers,
        vm::other_process,
        vm::vcpu_keeps_vm,
        vm::extension_on_vm,
        stats::form,
        stats::counted,
        stats::outlives,
        trace::records,
        trace::rules,
        trace::live,
        trace::losses,
        trace::fault,
        clock::get_and_set,
        clock::set_with_wall_clock,
        clock::errors,
        clock::tsc_frequency,
        memory::slot_rules,
        memory::slot_overlap,
        memory::slot_alignment,
        memory::slot_move_and_delete,
        memory::second_form,
        memory::shadow_page_limit,
        vcpu::unknown_ioctls,
        vcpu::run_argument,
        vcpu::mapping,
        vcpu::msr_lists,
        vcpu::msr_list_out_of_memory,
        vcpu::sregs_without_root_entries,
        vcpu::cpuid_rules,
        vcpu::bad_pointers,
        vcpu::signal_mask_length,
        vcpu::interrupt_errors,
        vcpu::lapic_errors,
        vcpu::sregs_refused,
        vcpu::mp_state,
        vcpu::machine_check_setup,
        vcpu::machine_check_errors,
        vcpu::extended_state_size,
        vcpu::task_priority_helpers,
    ])
}
