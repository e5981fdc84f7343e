// SPDX-License-Identifier: GPL-2.0
//! What the test programs share: KTAP output, raw ioctls, a small virtual machine and tiny guests.
//!
//! Every program takes `--device PATH` (default `/dev/rvisor`) and must pass on `/dev/kvm` too: KVM is
//! the oracle for what is expected here.

pub mod cgroup;
pub mod eventfd;
pub mod fixture;
pub mod guest;
pub mod handlers;
pub mod host;
pub mod ktap;
pub mod layout;
pub mod mapping;
pub mod raw;
pub mod terminal;
pub mod uapi;
pub mod userfault;
pub mod vcpu;
pub mod wakeups;

pub use eventfd::EventFd;
pub use fixture::{Config, Machine};
pub use ktap::{last_word, Context, Fail, Outcome, Test};
pub use raw::Device;
pub use vcpu::{Cpu, Exit};
