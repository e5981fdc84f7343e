// SPDX-License-Identifier: GPL-2.0

//! What rvisor needs of the host kernel, behind safe interfaces; nearly all of the `unsafe` is here.

pub(crate) mod anon_file;
pub(crate) mod cpu;
pub(crate) mod eventfd;
pub(crate) mod fpu;
pub(crate) mod hotplug;
pub(crate) mod irq;
pub(crate) mod memory;
pub(crate) mod mutex;
pub(crate) mod notifier;
pub(crate) mod page;
pub(crate) mod preempt;
pub(crate) mod rcu;
pub(crate) mod signal;
pub(crate) mod speculation;
pub(crate) mod symbols;
pub(crate) mod timer;
mod vector;
pub(crate) mod wait;
