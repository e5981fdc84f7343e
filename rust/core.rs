// SPDX-License-Identifier: GPL-2.0

//! The pure half of rvisor: everything that follows from a specification alone.
//!
//! Nothing here touches the kernel, allocates or is `unsafe`. The same files are compiled into the
//! module by Kbuild and into a host crate by cargo (`tests/host`), where they are tested.
//!
//! The rooms `bus`, `mmu`, `emulate`, `irqchip`, `cpu`, `stats` and `trace` stand on `x86` and never on each other.

#![cfg_attr(all(not(MODULE), not(test)), no_std)]
#![forbid(unsafe_code)]
#![cfg_attr(
    not(test),
    deny(
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::panic,
        clippy::indexing_slicing,
        clippy::arithmetic_side_effects,
        clippy::cast_possible_truncation
    )
)]

pub mod bus;
pub mod cpu;
pub mod emulate;
pub mod irqchip;
pub mod mmu;
pub mod stats;
pub mod trace;
pub mod x86;
