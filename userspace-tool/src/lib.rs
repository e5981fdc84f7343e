// SPDX-License-Identifier: GPL-2.0

//! `rvisor`: launches and watches one guest on `/dev/rvisor`, or on any other device that speaks KVM's
//! API (`Documentation/virt/kvm/api.rst`).
//!
//! The path of a guest through the modules: [`arguments`] and [`boot::Software`] take what the user gave
//! and say in one line what is wrong with it, [`hypervisor`] opens the device, [`machine`] builds the
//! PC ([`memory`], [`boot`], [`acpi`], [`cpuid`], [`devices`]) and runs one [`vcpu`] thread a virtual CPU
//! and one [`console`] thread until the first of them ends the guest with an [`outcome`].

pub mod acpi;
pub mod arguments;
pub mod boot;
pub mod cgroup;
pub mod check;
pub mod client;
pub mod confine;
pub mod console;
pub mod control;
pub mod cpuid;
pub mod detach;
pub mod devices;
pub mod error;
pub mod generate;
pub mod hypervisor;
pub mod ioctls;
pub mod layout;
pub mod machine;
pub mod memory;
pub mod net;
pub mod outcome;
pub mod ready;
pub mod registers;
pub mod registry;
pub mod sharing;
pub mod size;
pub mod snapshot;
pub mod stat;
pub mod supervisor;
pub mod top;
pub mod trace;
pub mod up;
pub mod vcpu;
