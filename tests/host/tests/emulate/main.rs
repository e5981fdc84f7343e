// SPDX-License-Identifier: GPL-2.0

//! The instruction emulator against others: `iced-x86` decodes, and this machine's CPU executes.
//!
//! `RVISOR_CASES` is the number of random cases of each test, `RVISOR_SEED` where they begin.

mod decode;
#[cfg(target_arch = "x86_64")]
mod execute;
#[cfg(target_arch = "x86_64")]
mod native;
mod random;
