// SPDX-License-Identifier: GPL-2.0

//! The architecture's own vocabulary: addresses, registers, vectors, MSRs, VMCS fields.

pub mod address;
pub mod capability;
pub mod control;
pub mod controls;
pub mod exit;
pub mod msr;
pub mod segment;
pub mod speculation;
pub mod vector;
pub mod vmcs;
