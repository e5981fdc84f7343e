// SPDX-License-Identifier: GPL-2.0

//! Guest memory: extended page tables, memory slots, and the walk of the guest's own page tables.

pub mod changes;
pub mod dirty;
pub mod ept;
#[cfg(test)]
mod ept_tests;
pub mod page_size;
pub mod slot;
#[cfg(test)]
mod test_tables;
pub mod walk;
#[cfg(test)]
mod walk_tests;
