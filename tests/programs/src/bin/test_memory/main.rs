// SPDX-License-Identifier: GPL-2.0
//! Guest memory: slots come, go and move; the guest's memory is the process's own, page by page.

mod basic;
mod guests;
mod large;
mod log;
mod pressure;
mod process;
mod race;
mod running;

use rvisor_tests::{ktap, tests};

fn main() -> std::process::ExitCode {
    ktap::main(tests![
        basic::host_and_guest_share,
        basic::read_only_slot,
        basic::read_only_stack,
        basic::delete_slot,
        basic::move_slot,
        basic::two_slots_one_memory,
        basic::dontneed,
        basic::unmapped,
        basic::copy_on_write,
        large::demand_paging,
        large::huge_pages,
        large::one_fault_2m,
        large::one_fault_2m_hugetlb,
        large::one_fault_1g_hugetlb,
        large::code_in_a_huge_page,
        large::not_congruent,
        large::collapse_merges,
        large::huge_page_split,
        large::split_by_rights,
        large::fork_of_a_huge_page,
        process::fork_and_child_writes,
        process::mprotect,
        process::read_only_mapping,
        process::shared_memfd,
        process::unlinked_hugetlb,
        process::private_file,
        process::madv_free,
        process::userfault,
        process::userfault_and_signal,
        pressure::swap,
        pressure::cgroup_limit_and_swap,
        pressure::sparse_64g,
        pressure::tables_are_accounted,
        pressure::cgroup_limit_on_tables,
        running::slots_change,
        running::slots_change_under_emulation,
        running::delete_waits_for_emulation,
        running::slot_goes_during_a_fault,
        race::fork_while_a_slot_goes,
        running::pages_go,
        running::rights_change,
        log::dirty_log,
        log::dirty_log_of_many_pages,
        log::dirty_log_errors,
        log::dirty_log_switched,
        log::dirty_log_and_huge_pages,
        log::dirty_log_of_emulation,
        log::dirty_log_of_a_running_guest,
        log::clear_dirty_log,
        log::clear_dirty_log_errors,
        log::clear_dirty_log_of_part,
        log::clear_dirty_log_of_a_running_guest,
        log::dirty_log_initially_set,
        log::dirty_log_options,
    ])
}
