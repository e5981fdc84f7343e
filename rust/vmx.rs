// SPDX-License-Identifier: GPL-2.0

//! Intel VMX: capabilities, the VMCS that is current, the world switch. It knows no `Vm`.

pub(crate) mod capability;
pub(crate) mod enter;
pub(crate) mod guard;
pub(crate) mod hardware;
pub(crate) mod instruction;
pub(crate) mod msr_bitmap;
pub(crate) mod setup;
pub(crate) mod virtual_apic;
