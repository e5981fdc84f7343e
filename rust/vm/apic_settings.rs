// SPDX-License-Identifier: GPL-2.0

//! What userspace decides about all local APICs of a machine (KVM_ENABLE_CAP).

use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use kernel::prelude::*;
use rvisor_core::irqchip::{
    destination::Source,
    lapic::{BusCycle, PageFormat},
};

/// KVM_X2APIC_API_USE_32BIT_IDS, which is a macro that bindgen does not see through, as is the next.
const USE_32BIT_IDS: u64 = 1 << 0;
/// KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK.
const DISABLE_BROADCAST_QUIRK: u64 = 1 << 1;
/// The flags of KVM_CAP_X2APIC_API that work here. The suppression of EOI broadcasts is not offered.
pub(crate) const X2APIC_API_FLAGS: u64 = USE_32BIT_IDS | DISABLE_BROADCAST_QUIRK;

/// The settings. Each is read at a moment of its own, as in KVM.
pub(crate) struct ApicSettings {
    long_ids: AtomicBool,
    no_broadcast_quirk: AtomicBool,
    /// In nanoseconds; always one that [`BusCycle::new`] takes.
    bus_cycle: AtomicU64,
}

impl ApicSettings {
    /// What a machine begins with.
    pub(crate) const fn new() -> Self {
        Self {
            long_ids: AtomicBool::new(false),
            no_broadcast_quirk: AtomicBool::new(false),
            bus_cycle: AtomicU64::new(BusCycle::DEFAULT.nanoseconds()),
        }
    }

    /// Carries out KVM_ENABLE_CAP of KVM_CAP_X2APIC_API.
    ///
    /// # Errors
    ///
    /// `EINVAL` for an unknown flag.
    pub(crate) fn set_x2apic_api(&self, flags: u64) -> Result {
        if flags & !X2APIC_API_FLAGS != 0 {
            return Err(EINVAL);
        }
        if flags & USE_32BIT_IDS != 0 {
            self.long_ids.store(true, Ordering::Relaxed);
        }
        if flags & DISABLE_BROADCAST_QUIRK != 0 {
            self.no_broadcast_quirk.store(true, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Whether identifiers and MSI destinations have 32 bits in userspace's structures.
    pub(crate) fn long_ids(&self) -> bool {
        self.long_ids.load(Ordering::Relaxed)
    }

    /// The form of KVM_GET_LAPIC and KVM_SET_LAPIC.
    pub(crate) fn page_format(&self) -> PageFormat {
        if self.long_ids() {
            PageFormat::X2Apic
        } else {
            PageFormat::Legacy
        }
    }

    /// What devices' messages come from.
    #[inline]
    pub(crate) fn device(&self) -> Source {
        if self.no_broadcast_quirk.load(Ordering::Relaxed) {
            Source::DeviceWithoutQuirk
        } else {
            Source::Device
        }
    }

    /// The bus cycle of local APICs that are made from now on.
    pub(crate) fn bus_cycle(&self) -> BusCycle {
        BusCycle::new(self.bus_cycle.load(Ordering::Relaxed)).unwrap_or(BusCycle::DEFAULT)
    }

    /// Sets the bus cycle.
    pub(crate) fn set_bus_cycle(&self, cycle: BusCycle) {
        self.bus_cycle.store(cycle.nanoseconds(), Ordering::Relaxed);
    }
}
