// SPDX-License-Identifier: GPL-2.0

//! Zeroed pages of the kernel, accounted to the process that asks.

use crate::bindings;
use core::ptr::NonNull;
use kernel::prelude::*;
use rvisor_core::x86::address::Hpa;

/// One 4 KiB page, zeroed when made and freed on drop.
///
/// # Invariants
///
/// `address` is a page from the page allocator that this owns.
pub(crate) struct KernelPage {
    address: NonNull<u8>,
}

// SAFETY: The page belongs to no thread.
unsafe impl Send for KernelPage {}
// SAFETY: Through `&KernelPage` only its address can be had.
unsafe impl Sync for KernelPage {}

impl KernelPage {
    /// A new zeroed page.
    ///
    /// # Errors
    ///
    /// `ENOMEM`, the limit of the process's memory cgroup included.
    pub(crate) fn new() -> Result<Self> {
        // SAFETY: May be called wherever sleeping is allowed.
        let address = unsafe { bindings::rvisor_page_alloc() };
        // INVARIANT: Freshly allocated.
        Ok(Self {
            address: NonNull::new(address.cast()).ok_or(ENOMEM)?,
        })
    }

    /// The page's kernel address.
    #[inline]
    pub(crate) fn as_ptr(&self) -> *mut u8 {
        self.address.as_ptr()
    }

    /// The page's physical address.
    #[inline]
    pub(crate) fn physical(&self) -> Hpa {
        // SAFETY: The address is in the direct map, as all of the page allocator's are.
        Hpa::new(unsafe { bindings::rvisor_virt_to_phys(self.as_ptr().cast()) })
    }

    /// The page's `struct page`.
    pub(crate) fn as_page(&self) -> *mut kernel::bindings::page {
        // SAFETY: As for `physical`.
        unsafe { bindings::rvisor_virt_to_page(self.as_ptr().cast()) }
    }

    /// Gives the page up: the physical address is then its only name.
    pub(crate) fn into_physical(self) -> Hpa {
        let physical = self.physical();
        core::mem::forget(self);
        physical
    }

    /// Takes a page back.
    ///
    /// # Safety
    ///
    /// `physical` comes from [`Self::into_physical`] and is taken back once.
    pub(crate) unsafe fn from_physical(physical: Hpa) -> Self {
        // SAFETY: A page of the allocator is in the direct map.
        let address = unsafe { bindings::rvisor_phys_to_virt(physical.raw()) };
        Self {
            // SAFETY: The direct map has no page at address zero.
            address: unsafe { NonNull::new_unchecked(address.cast()) },
        }
    }
}

impl Drop for KernelPage {
    fn drop(&mut self) {
        // SAFETY: Owned by the invariant.
        unsafe { bindings::rvisor_page_free(self.as_ptr().cast()) };
    }
}
