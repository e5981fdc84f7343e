// SPDX-License-Identifier: GPL-2.0

//! KVM's API: the character device, and the ioctls of systems, virtual machines and virtual CPUs.

pub(crate) mod chardev;
pub(crate) mod chip_state;
pub(crate) mod stats_file;
pub(crate) mod trace_file;
pub(crate) mod user;
pub(crate) mod vcpu_file;
pub(crate) mod vm_file;
