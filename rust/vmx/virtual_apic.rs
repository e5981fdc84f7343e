// SPDX-License-Identifier: GPL-2.0

//! The virtual-APIC page, where a guest with a TPR shadow reads and writes its task priority without an
//! exit (SDM vol. 3, 31.1 to 31.3).

use crate::host::page::KernelPage;
use core::ptr;
use kernel::prelude::*;
use rvisor_core::x86::address::Hpa;

/// Where VTPR, the virtual task priority, lies in the page.
const VTPR: usize = 0x80;

/// The page, and what was last agreed on with the CPU.
pub(crate) struct VirtualApic {
    page: KernelPage,
    /// VTPR as the local APIC knows it.
    tpr: u8,
    /// The VMCS's TPR threshold, 0 to 15.
    pub(super) threshold: u8,
    /// The VMCS virtualises x2APIC mode, and accesses to the x2APIC's TPR do not exit.
    pub(super) is_x2apic: bool,
}

impl VirtualApic {
    /// A task priority of 0.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(super) fn new() -> Result<Self> {
        Ok(Self {
            page: KernelPage::new()?,
            tpr: 0,
            threshold: 0,
            is_x2apic: false,
        })
    }

    /// Where the page is.
    pub(crate) fn physical(&self) -> Hpa {
        self.page.physical()
    }

    /// The register, of which the CPU keeps bits 31:8 at 0.
    #[inline]
    fn vtpr(&self) -> *mut u32 {
        self.page.as_ptr().wrapping_add(VTPR).cast()
    }

    /// The task priority, where the guest has changed it since it was last asked for or set.
    #[inline]
    pub(crate) fn take_tpr(&mut self) -> Option<u8> {
        // SAFETY: Inside the page and aligned. The CPU writes there only while the guest runs.
        let tpr = unsafe { ptr::read_volatile(self.vtpr()) } as u8;
        if tpr == self.tpr {
            return None;
        }
        self.tpr = tpr;
        Some(tpr)
    }

    /// Sets the task priority; a threshold above it must be lowered before the next entry.
    #[inline]
    pub(crate) fn set_tpr(&mut self, tpr: u8) {
        if tpr != self.tpr {
            self.tpr = tpr;
            // SAFETY: As above.
            unsafe { ptr::write_volatile(self.vtpr(), tpr.into()) };
        }
    }

    /// The TPR threshold as last set.
    #[inline]
    pub(crate) fn threshold(&self) -> u8 {
        self.threshold
    }

    /// Whether the x2APIC's TPR is virtual.
    #[inline]
    pub(crate) fn is_x2apic(&self) -> bool {
        self.is_x2apic
    }
}
