// SPDX-License-Identifier: GPL-2.0

//! Virtual machines and virtual CPUs: what a guest is made of and how its exits are handled.

pub(crate) mod apic_settings;
pub(crate) mod bus;
pub(crate) mod clock;
pub(crate) mod completion;
pub(crate) mod control;
mod emulated;
pub(crate) mod emulation;
mod event_state;
pub(crate) mod events;
pub(crate) mod exits;
pub(crate) mod irqchip;
pub(crate) mod irqfd;
pub(crate) mod machine;
mod machine_check;
pub(crate) mod memory;
pub(crate) mod mmio;
pub(crate) mod msr;
mod pit;
pub(crate) mod port;
mod resample;
pub(crate) mod run;
pub(crate) mod run_page;
pub(crate) mod settings;
pub(crate) mod shared;
pub(crate) mod split;
pub(crate) mod state;
mod task;
mod task_priority;
pub(crate) mod trace;
pub(crate) mod vcpu;
