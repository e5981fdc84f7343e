// SPDX-License-Identifier: GPL-2.0

//! A module for tests alone: when it is loaded it says in the log what the CPU that it is loaded on holds.
//!
//! `taskset 2 insmod observer.ko` asks CPU 1. It holds nothing and can be unloaded at once.

use core::arch::asm;
use kernel::prelude::*;

module! {
    type: Observer,
    name: "observer",
    authors: ["The rvisor maintainers"],
    description: "Shows control registers of the host to tests",
    license: "GPL",
}

struct Observer;

/// Whether CPUID leaf 7 shows IA32_SPEC_CTRL.
fn has_spec_ctrl() -> bool {
    // SAFETY: Every 64-bit CPU has CPUID.
    unsafe {
        let highest = core::arch::x86_64::__cpuid(0).eax;
        highest >= 7 && core::arch::x86_64::__cpuid_count(7, 0).edx & (1 << 26) != 0
    }
}

fn rdmsr(index: u32) -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: Every CPU that this is called on has the MSR.
    unsafe {
        asm!("rdmsr", in("ecx") index, out("eax") low, out("edx") high, options(nomem, nostack, preserves_flags))
    };
    u64::from(high) << 32 | u64::from(low)
}

impl kernel::Module for Observer {
    fn init(_module: &'static ThisModule) -> Result<Self> {
        let cr4: u64;
        // SAFETY: Reading a control register has no effect.
        unsafe { asm!("mov {}, cr4", out(reg) cr4, options(nomem, nostack, preserves_flags)) };
        pr_info!("vmxe={}\n", cr4 >> 13 & 1);
        if has_spec_ctrl() {
            pr_info!("spec_ctrl={:#x}\n", rdmsr(0x48));
        }
        Ok(Self)
    }
}
