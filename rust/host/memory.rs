// SPDX-License-Identifier: GPL-2.0

//! Pages of the owning process, and the tables that map them for the guest.

use super::page::KernelPage;
use crate::bindings;
use core::{
    ptr::NonNull,
    sync::atomic::{AtomicU64, Ordering},
};
use kernel::{
    bindings as kb,
    prelude::*,
    uaccess::{UserPtr, UserSlice},
};
use rvisor_core::{
    mmu::{
        ept::{TableMemory, TABLE_ENTRIES},
        page_size::PageSize,
    },
    x86::address::{Hpa, Hva, Pfn},
};

/// The most tables that one mapping can need: one for each level below the root.
pub(crate) const TABLES_PER_MAPPING: usize = 3;

/// Table pages: those in use are reached from the root, the others are in stock or wait for a flush.
pub(crate) struct Tables {
    stock: [Option<KernelPage>; TABLES_PER_MAPPING + 1],
    /// The first of the pages that wait for a flush, linked; 0 ends the list.
    retired: u64,
}

impl Tables {
    /// None yet.
    pub(crate) fn new() -> Self {
        Self {
            stock: [const { None }; TABLES_PER_MAPPING + 1],
            retired: 0,
        }
    }

    /// Whether a mapping can be made without more pages.
    #[inline]
    pub(crate) fn has_stock(&self) -> bool {
        self.stock.iter().filter(|page| page.is_some()).count() >= TABLES_PER_MAPPING
    }

    /// Puts a page into stock; gives it back where there is no room.
    pub(crate) fn add(&mut self, page: KernelPage) -> Option<KernelPage> {
        match self.stock.iter_mut().find(|place| place.is_none()) {
            Some(place) => {
                *place = Some(page);
                None
            }
            None => Some(page),
        }
    }

    /// Takes the tables that wait for a flush; they may be freed after it.
    pub(crate) fn take_retired(&mut self) -> Retired {
        Retired(core::mem::take(&mut self.retired))
    }

    #[inline]
    fn entry(&self, table: Hpa, index: usize) -> &AtomicU64 {
        debug_assert!(index < TABLE_ENTRIES);
        // SAFETY: `table` came from `allocate`, and is one page of the direct map while it is in use;
        // the index stays inside by the mask. The CPU walks it at the same time, hence the atomic.
        unsafe {
            let base = bindings::rvisor_phys_to_virt(table.raw()).cast::<AtomicU64>();
            &*base.add(index & (TABLE_ENTRIES - 1))
        }
    }
}

impl TableMemory for Tables {
    #[inline]
    fn read(&self, table: Hpa, index: usize) -> u64 {
        self.entry(table, index).load(Ordering::Relaxed)
    }

    #[inline]
    fn write(&mut self, table: Hpa, index: usize, entry: u64) {
        self.entry(table, index).store(entry, Ordering::Release);
    }

    fn allocate(&mut self) -> Option<Hpa> {
        let page = self.stock.iter_mut().find_map(Option::take)?;
        // SAFETY: A page of ours.
        unsafe { bindings::rvisor_count_table(page.as_ptr().cast(), 1) };
        Some(page.into_physical())
    }

    fn free(&mut self, table: Hpa) {
        // SAFETY: `table` came from `allocate`. Its contents stay: a CPU may still walk it.
        unsafe {
            bindings::rvisor_page_set_link(bindings::rvisor_phys_to_virt(table.raw()), self.retired)
        };
        self.retired = table.raw();
    }

    #[inline]
    fn exchange(&mut self, table: Hpa, index: usize, entry: u64) -> u64 {
        self.entry(table, index).swap(entry, Ordering::AcqRel)
    }

    #[inline]
    fn clear_bits(&mut self, table: Hpa, index: usize, bits: u64) -> u64 {
        self.entry(table, index).fetch_and(!bits, Ordering::AcqRel)
    }
}

/// Tables that no entry points at any more; dropped after the flush.
pub(crate) struct Retired(u64);

/// How many tables are freed between two looks whether another thread should run.
const FREED_AT_ONCE: u32 = 64;

impl Retired {
    /// Frees the tables. `may_sleep` lets other threads run meanwhile.
    pub(crate) fn free(mut self, may_sleep: bool) {
        let mut freed = 0u32;
        while self.free_one() {
            freed = freed.wrapping_add(1);
            if may_sleep && freed % FREED_AT_ONCE == 0 {
                relax();
            }
        }
    }

    /// Frees one table, if there is one.
    fn free_one(&mut self) -> bool {
        if self.0 == 0 {
            return false;
        }
        // SAFETY: The list holds pages that `Tables::free` linked, each once.
        unsafe {
            let address = bindings::rvisor_phys_to_virt(self.0);
            let next = bindings::rvisor_page_link(address);
            bindings::rvisor_count_table(address, -1);
            drop(KernelPage::from_physical(Hpa::new(self.0)));
            self.0 = next;
        }
        true
    }
}

impl Drop for Retired {
    fn drop(&mut self) {
        while self.free_one() {}
    }
}

/// Lets another thread run, where one should. The caller may sleep.
pub(crate) fn relax() {
    // SAFETY: Task context, no lock held, by the caller's promise; else the kernel says so.
    unsafe { bindings::rvisor_cond_resched() };
}

/// A page of the current process, held by a reference.
///
/// # Invariants
///
/// `page` has a reference that this owns.
pub(crate) struct UserPage {
    page: NonNull<kb::page>,
    /// The process may write it, and so may the guest.
    pub(crate) writable: bool,
}

impl UserPage {
    /// Takes hold of the page at `hva`, faulting it in as an access of the process would. A page that
    /// is read and happens to be writable already is taken so.
    ///
    /// # Errors
    ///
    /// `EFAULT` where the process could not access it either; `EINTR` where a signal came.
    pub(crate) fn get(hva: Hva, write: bool) -> Result<Self> {
        let address = hva.raw() as usize;
        let mut page: *mut kb::page = core::ptr::null_mut();
        // SAFETY: `page` is room for one pointer; the current process's memory is meant.
        let fast = unsafe { kb::get_user_pages_fast_only(address, 1, kb::FOLL_WRITE, &mut page) };
        if fast == 1 {
            return Self::from_raw(page, true);
        }
        // Where the page is on another node than its users, the kernel is to see this access. A signal
        // ends the wait for what may never come, as from a userfaultfd.
        let mut flags = kb::FOLL_HONOR_NUMA_FAULT | kb::FOLL_INTERRUPTIBLE;
        if write {
            flags |= kb::FOLL_WRITE;
        }
        // SAFETY: As above, and no lock is held.
        let got = unsafe { kb::get_user_pages_unlocked(address, 1, &mut page, flags) };
        match got {
            1 => Self::from_raw(page, write),
            0 => Err(EFAULT),
            error => Err(Error::from_errno(error as i32)),
        }
    }

    /// Says that the guest may write to the page from now on. While the process's notifier vouches
    /// that the host's own entry is writable still: afterwards the page may be somebody else's.
    pub(crate) fn mark_dirty(&self) {
        // SAFETY: The page is held.
        unsafe { bindings::rvisor_page_set_dirty(self.page.as_ptr()) };
    }

    fn from_raw(page: *mut kb::page, writable: bool) -> Result<Self> {
        // INVARIANT: The caller got the page with a reference.
        Ok(Self {
            page: NonNull::new(page).ok_or(EFAULT)?,
            writable,
        })
    }

    /// The page's frame.
    pub(crate) fn frame(&self) -> Pfn {
        // SAFETY: The page is held.
        Hpa::new(unsafe { bindings::rvisor_page_to_phys(self.page.as_ptr()) }).frame()
    }
}

impl Drop for UserPage {
    fn drop(&mut self) {
        // SAFETY: Releases the reference that this owns.
        unsafe { bindings::rvisor_page_put(self.page.as_ptr()) };
    }
}

/// The size of the page that the current process's page tables have at `hva`; a hint that only an
/// [`super::notifier::Invalidate`] makes binding.
pub(crate) fn host_mapping(hva: Hva) -> PageSize {
    // SAFETY: The current thread has an address space, since it came from userspace.
    let shift = unsafe {
        bindings::rvisor_host_mapping_shift(bindings::rvisor_current_mm(), hva.raw() as usize)
    };
    match shift {
        30.. => PageSize::Size1G,
        21.. => PageSize::Size2M,
        _ => PageSize::Size4K,
    }
}

/// Whether the range lies in the part of the address space that userspace has.
pub(crate) fn is_user_range(hva: Hva, bytes: u64) -> bool {
    // SAFETY: Compares numbers.
    unsafe { bindings::rvisor_user_range_ok(hva.raw() as usize, bytes as usize) }
}

/// The current thread's address space.
pub(crate) fn current_mm() -> Option<NonNull<kb::mm_struct>> {
    // SAFETY: Reads a field of the current task.
    NonNull::new(unsafe { bindings::rvisor_current_mm() })
}

/// Reads 8 bytes of the current process in one load. `None` where nothing is there.
#[inline]
pub(crate) fn read_u64(hva: Hva) -> Option<u64> {
    let mut value = 0;
    // SAFETY: The kernel's accessor checks the address.
    unsafe { bindings::rvisor_read_user64(hva.raw() as usize, &mut value) }.then_some(value)
}

/// Reads 4 or 8 bytes of the current process in one load.
///
/// # Errors
///
/// `EFAULT`.
pub(crate) fn read_word(hva: Hva, size: u32) -> Result<u64> {
    let mut value = 0;
    // SAFETY: The kernel's accessor checks the address.
    kernel::error::to_result(unsafe {
        bindings::rvisor_read_user(hva.raw() as usize, size, &mut value)
    })?;
    Ok(value)
}

/// Reads bytes of the current process: 8 and more in loads of 8, the last of which may overlap.
///
/// # Errors
///
/// `EFAULT`.
pub(crate) fn read_bytes(hva: Hva, data: &mut [u8]) -> Result {
    let Some(last) = data.len().checked_sub(8) else {
        return UserSlice::new(UserPtr::from_addr(hva.raw() as usize), data.len())
            .reader()
            .read_slice(data);
    };
    let mut place = 0;
    loop {
        let word = read_u64(hva.wrapping_add(place as u64)).ok_or(EFAULT)?;
        if let Some(part) = data.get_mut(place..).and_then(<[u8]>::first_chunk_mut) {
            *part = word.to_le_bytes();
        }
        if place == last {
            return Ok(());
        }
        place = last.min(place.saturating_add(8));
    }
}

/// Replaces 1, 2, 4 or 8 bytes of the current process if they are still `old`, atomically, and says
/// whether they were.
///
/// # Errors
///
/// `EFAULT`.
pub(crate) fn compare_exchange(hva: Hva, size: u32, old: u64, new: u64) -> Result<bool> {
    // SAFETY: As for `read_word`.
    match unsafe { bindings::rvisor_cmpxchg_user(hva.raw() as usize, size, old, new) } {
        0 => Ok(true),
        1 => Ok(false),
        _ => Err(EFAULT),
    }
}

/// Likewise 16 bytes, of which the lower 8 come first.
///
/// # Errors
///
/// `EFAULT`, also where they are not aligned; `EOPNOTSUPP` where this CPU has no such instruction.
pub(crate) fn compare_exchange_16(hva: Hva, old: &[u64; 2], new: &[u64; 2]) -> Result<bool> {
    if hva.raw() & 0xf != 0 {
        return Err(EFAULT);
    }
    // SAFETY: As for `read_word`; both arrays are read only.
    match unsafe { bindings::rvisor_cmpxchg16_user(hva.raw() as usize, old.as_ptr(), new.as_ptr()) }
    {
        0 => Ok(true),
        1 => Ok(false),
        error => Err(Error::from_errno(error)),
    }
}
