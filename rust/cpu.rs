// SPDX-License-Identifier: GPL-2.0

//! What CPU a guest sees: CPUID, and the policy of model-specific registers.

pub mod cpuid;
pub mod feature;
pub mod guest;
pub mod machine_check;
pub mod msr;
pub mod msr_list;
pub mod mtrr;
pub mod supported;
pub mod xsave;

#[cfg(test)]
mod msr_tests;
#[cfg(test)]
mod supported_tests;
