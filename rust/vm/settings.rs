// SPDX-License-Identifier: GPL-2.0

//! What KVM_ENABLE_CAP changes of a machine.

use core::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use kernel::prelude::*;

/// The settings, as they are for a machine that nobody has set anything of.
pub(crate) struct Settings {
    /// KVM_CAP_MAX_VCPU_ID: virtual CPUs' numbers are below this.
    vcpu_ids: AtomicU32,
    is_limited: AtomicBool,
    /// KVM_CAP_MSR_PLATFORM_INFO: the guest can't read the MSR.
    hides_platform_info: AtomicBool,
}

impl Settings {
    /// The default.
    pub(crate) fn new(vcpu_ids: u32) -> Self {
        Self {
            vcpu_ids: AtomicU32::new(vcpu_ids),
            is_limited: AtomicBool::new(false),
            hides_platform_info: AtomicBool::new(false),
        }
    }

    /// The numbers of virtual CPUs and of the bootstrap processor are below this.
    pub(crate) fn vcpu_ids(&self) -> u32 {
        self.vcpu_ids.load(Ordering::Relaxed)
    }

    /// Limits the numbers of virtual CPUs, once, for a machine whose bootstrap processor is `bootstrap`.
    /// The caller keeps others from making virtual CPUs.
    ///
    /// # Errors
    ///
    /// `EINVAL` for more than there can be, for fewer than the bootstrap processor needs, and where
    /// another limit or a virtual CPU came before.
    pub(super) fn limit_vcpu_ids(&self, limit: u64, bootstrap: u32, has_vcpus: bool) -> Result {
        let old = self.vcpu_ids();
        let limit = u32::try_from(limit).map_err(|_| EINVAL)?;
        let is_same = old == limit;
        let is_fixed = has_vcpus || self.is_limited.load(Ordering::Relaxed);
        if bootstrap > limit || limit > old || (is_fixed && !is_same) {
            return Err(EINVAL);
        }
        self.vcpu_ids.store(limit, Ordering::Relaxed);
        self.is_limited.store(true, Ordering::Relaxed);
        Ok(())
    }

    /// Whether MSR_PLATFORM_INFO is hidden from the guest.
    #[inline]
    pub(crate) fn hides_platform_info(&self) -> bool {
        self.hides_platform_info.load(Ordering::Relaxed)
    }

    /// Shows MSR_PLATFORM_INFO to the guest, or hides it.
    pub(crate) fn show_platform_info(&self, show: bool) {
        self.hides_platform_info.store(!show, Ordering::Relaxed);
    }
}
