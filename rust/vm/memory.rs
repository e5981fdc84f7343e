// SPDX-License-Identifier: GPL-2.0

//! A virtual machine's memory: the slots that userspace gave it and the EPT that is filled from them.
//!
//! Locking: `update` serialises changes of the slots; `mmu` is a leaf lock under which nothing sleeps
//! and no other CPU is waited for. Pages of the process are taken hold of outside of it: a counter
//! that the process's notifier advances tells whether what was learnt still holds.

use super::shared::VcpuShared;
use crate::host::{
    memory::{self, Tables, UserPage},
    notifier::Invalidate,
    page::KernelPage,
};
use core::sync::atomic::{AtomicU64, Ordering};
use kernel::{
    new_mutex, new_spinlock,
    prelude::*,
    sync::{lock::spinlock::SpinLockGuard, Arc, Mutex, SpinLock},
    uaccess::{UserPtr, UserSlice},
};
use rvisor_core::{
    mmu::{
        ept::{CachePolicy, Ept, MapError, Permissions},
        page_size::PageSize,
        slot::{self, Change, Limits, Slot, SlotError},
    },
    x86::address::{Gfn, Gpa, Hva, PAGE_SHIFT, PAGE_SIZE},
};

/// KVM_CAP_NR_MEMSLOTS.
pub(crate) const SLOTS: u16 = 509;

/// What to do about an EPT violation.
pub(crate) enum Fault {
    /// The page is mapped, or will be on another try.
    Resolved,
    /// No memory is there, or it is read-only and was written: the access is a device's.
    Device,
}

struct Mmu {
    slots: KVec<Slot>,
    hint: usize,
    /// `None` once the process is gone.
    ept: Option<Ept>,
    tables: Tables,
    /// Changes of the process's page tables that are under way.
    changing: u32,
    /// Advanced by each such change and by each change of the slots.
    sequence: u64,
    /// Translations were taken away whose flush is not over.
    flushing: u32,
}

/// The memory of one virtual machine.
#[pin_data]
pub(crate) struct GuestMemory {
    eptp: u64,
    accessed_dirty: bool,
    large_pages: PageSize,
    end_of_memory: Gfn,
    #[pin]
    update: Mutex<()>,
    #[pin]
    mmu: SpinLock<Mmu>,
    /// Advanced whenever translations were taken away; each vCPU compares it before it enters.
    generation: AtomicU64,
    #[pin]
    vcpus: SpinLock<KVec<Arc<VcpuShared>>>,
}

impl GuestMemory {
    /// No slots, an empty EPT.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(crate) fn new(
        large_pages: PageSize,
        accessed_dirty: bool,
        physical_bits: u32,
    ) -> Result<Arc<Self>> {
        let mut tables = Tables::new();
        tables.add(KernelPage::new()?);
        let ept = Ept::new(&mut tables).ok_or(ENOMEM)?;
        let eptp = ept.eptp(accessed_dirty);
        let mmu = Mmu {
            slots: KVec::new(),
            hint: 0,
            ept: Some(ept),
            tables,
            changing: 0,
            sequence: 0,
            flushing: 0,
        };
        Arc::pin_init(
            pin_init!(Self {
                eptp,
                accessed_dirty,
                large_pages,
                end_of_memory: Gfn::new(1 << physical_bits.min(48).saturating_sub(PAGE_SHIFT)),
                update <- new_mutex!(()),
                mmu <- new_spinlock!(mmu),
                generation: AtomicU64::new(0),
                vcpus <- new_spinlock!(KVec::new()),
            }),
            GFP_KERNEL_ACCOUNT,
        )
    }

    /// The EPT pointer for the VMCS.
    pub(crate) fn eptp(&self) -> u64 {
        self.eptp
    }

    /// Forgets a virtual CPU that never ran.
    pub(crate) fn remove_vcpu(&self, id: u32) {
        self.vcpus.lock().retain(|vcpu| vcpu.id != id);
    }

    /// Makes a virtual CPU known, so that flushes reach it.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(crate) fn add_vcpu(&self, vcpu: Arc<VcpuShared>) -> Result {
        // Room is made outside of the lock, where sleeping is allowed.
        let mut room = KVec::new();
        loop {
            let mut vcpus = self.vcpus.lock();
            if vcpus.len() < vcpus.capacity() {
                return Ok(vcpus.push_within_capacity(vcpu)?);
            }
            if room.capacity() > vcpus.len() {
                for old in vcpus.drain_all() {
                    room.push_within_capacity(old)?;
                }
                core::mem::swap(&mut *vcpus, &mut room);
                continue;
            }
            let wanted = vcpus.len() + 8;
            drop(vcpus);
            room = KVec::with_capacity(wanted, GFP_KERNEL_ACCOUNT)?;
        }
    }

    /// Runs `f` with all virtual CPUs.
    pub(crate) fn with_vcpus<R>(&self, f: impl FnOnce(&[Arc<VcpuShared>]) -> R) -> R {
        f(&self.vcpus.lock())
    }

    /// The number of the last change that took translations away.
    #[inline]
    pub(crate) fn generation(&self) -> u64 {
        self.generation.load(Ordering::SeqCst)
    }

    /// Drops the lock after translations were taken away, and returns when no CPU uses them. Whoever
    /// finds them gone meanwhile must not go on as if they were: `flushing` says so.
    fn unlock_and_flush(&self, mut mmu: SpinLockGuard<'_, Mmu>) {
        mmu.flushing = mmu.flushing.saturating_add(1);
        let retired = mmu.tables.take_retired();
        drop(mmu);
        self.flush();
        let mut mmu = self.mmu.lock();
        mmu.flushing = mmu.flushing.saturating_sub(1);
        drop(mmu);
        drop(retired);
    }

    /// Returns when no CPU uses a translation that was taken away before the call.
    fn flush(&self) {
        self.generation.fetch_add(1, Ordering::SeqCst);
        // No lock is held while another CPU is waited for: it may want the lock with interrupts off.
        for place in 0.. {
            let vcpu = match self.vcpus.lock().get(place) {
                Some(vcpu) => vcpu.clone(),
                None => break,
            };
            vcpu.leave_guest_and_wait();
        }
    }

    /// Carries out KVM_SET_USER_MEMORY_REGION.
    ///
    /// # Errors
    ///
    /// `EINVAL`, `EEXIST`, `ENOMEM` as `Documentation/virt/kvm/api.rst` says; nothing changed then.
    pub(crate) fn set_slot(&self, request: &slot::Request) -> Result {
        let _update = self.update.lock();
        let limits = Limits {
            slots: SLOTS,
            address_spaces: 1,
            flags: slot::READONLY,
            end_of_memory: self.end_of_memory,
        };
        if request.bytes != 0 && !memory::is_user_range(request.hva, request.bytes) {
            return Err(EINVAL);
        }
        // Only this function changes the slots, under `update`, so that a copy stays true.
        let room = self.mmu.lock().slots.len() + 1;
        let mut slots = KVec::with_capacity(room, GFP_KERNEL_ACCOUNT)?;
        let change = {
            let mmu = self.mmu.lock();
            for slot in &mmu.slots {
                slots.push_within_capacity(*slot)?;
            }
            slot::check_change(&mmu.slots, request, &limits).map_err(SlotErrno)?
        };
        let (removed, added) = match change {
            Change::Nothing => return Ok(()),
            Change::Create(new) => (None, Some(new)),
            Change::Delete(place) => (slots.remove(place).ok(), None),
            Change::Move(place, new) => (slots.remove(place).ok(), Some(new)),
            Change::Flags(place, new) => (slots.remove(place).ok(), Some(new)),
        };
        if let Some(new) = added {
            let place = slot::insertion_point(&slots, new.base);
            slots
                .insert_within_capacity(place, new)
                .map_err(|_| ENOMEM)?;
        }
        let mut mmu = self.mmu.lock();
        core::mem::swap(&mut mmu.slots, &mut slots);
        mmu.sequence = mmu.sequence.wrapping_add(1);
        let flush = match removed {
            Some(old) => mmu.unmap(old.base, old.end()),
            None => false,
        };
        if flush || mmu.flushing != 0 {
            self.unlock_and_flush(mmu);
        }
        Ok(())
    }

    /// Sees to an EPT violation at `gpa`.
    ///
    /// # Errors
    ///
    /// `EFAULT` where the process has no memory at the slot's address; `ENOMEM`, `EINTR`.
    pub(crate) fn fault(&self, gpa: Gpa, write: bool) -> Result<Fault> {
        let gfn = gpa.frame();
        let (slot, sequence) = loop {
            let mut mmu = self.mmu.lock();
            if !mmu.tables.has_stock() {
                drop(mmu);
                let page = KernelPage::new()?;
                // Where another vCPU has filled the stock meanwhile, the page goes back on its own.
                let _spare = self.mmu.lock().tables.add(page);
                continue;
            }
            let sequence = mmu.sequence;
            match mmu.find(gfn) {
                Some(slot) if !(write && slot.is_read_only()) => break (slot, sequence),
                _ => return Ok(Fault::Device),
            }
        };
        let hva = slot.hva_of(gfn).ok_or(EFAULT)?;
        let page = UserPage::get(hva, write)?;
        let size = slot
            .largest_page(gfn)
            .min(self.large_pages)
            .min(if slot.pages > 1 {
                memory::host_mapping(hva)
            } else {
                PageSize::Size4K
            });
        let permissions = if page.writable && !slot.is_read_only() {
            Permissions::ALL
        } else {
            Permissions::READ_EXECUTE
        };
        let inside = gfn.raw() & size.frame_mask();
        let first = Gfn::new(gfn.raw() - inside);
        let pfn = rvisor_core::x86::address::Pfn::new(page.frame().raw().wrapping_sub(inside));
        let mut mmu = self.mmu.lock();
        if mmu.changing != 0 || mmu.sequence != sequence {
            // What was learnt may be void. The guest touches the page again.
            return Ok(Fault::Resolved);
        }
        let flush = {
            let Mmu { ept, tables, .. } = &mut *mmu;
            let ept = ept.as_ref().ok_or(EIO)?;
            match ept.map(tables, first, pfn, size, permissions, CachePolicy::MEMORY) {
                Ok(outcome) => outcome.flush,
                // Another vCPU has used the stock up; or the guest frame is past all memory.
                Err(MapError::OutOfTables) => false,
                Err(MapError::OutOfRange | MapError::Misaligned) => return Err(EFAULT),
            }
        };
        if flush {
            self.unlock_and_flush(mmu);
        }
        Ok(Fault::Resolved)
    }

    /// The address in the process that backs `gpa`, where memory is there and `write` is allowed.
    fn hva(&self, gpa: Gpa, write: bool) -> Option<Hva> {
        let slot = self.mmu.lock().find(gpa.frame())?;
        if write && slot.is_read_only() {
            return None;
        }
        Some(slot.hva_of(gpa.frame())?.wrapping_add(gpa.page_offset()))
    }

    /// The slot that holds a frame.
    #[inline]
    pub(crate) fn slot(&self, gfn: Gfn) -> Option<Slot> {
        self.mmu.lock().find(gfn)
    }

    /// Whether memory is at `gpa`, which may be written if `write` is asked for.
    pub(crate) fn is_memory(&self, gpa: Gpa, write: bool) -> bool {
        self.hva(gpa, write).is_some()
    }

    /// Reads guest memory inside one page. `None` where no memory is there.
    ///
    /// # Errors
    ///
    /// `EFAULT` where the process has nothing at the slot's address.
    pub(crate) fn read(&self, gpa: Gpa, data: &mut [u8]) -> Result<Option<()>> {
        let Some(hva) = self.hva(gpa, false) else {
            return Ok(None);
        };
        debug_assert!(gpa.page_offset() + data.len() as u64 <= PAGE_SIZE);
        UserSlice::new(UserPtr::from_addr(hva.raw() as usize), data.len())
            .reader()
            .read_slice(data)?;
        Ok(Some(()))
    }

    /// Writes guest memory inside one page. `None` where no memory is there or it is read-only.
    ///
    /// # Errors
    ///
    /// As [`Self::read`].
    pub(crate) fn write(&self, gpa: Gpa, data: &[u8]) -> Result<Option<()>> {
        let Some(hva) = self.hva(gpa, true) else {
            return Ok(None);
        };
        debug_assert!(gpa.page_offset() + data.len() as u64 <= PAGE_SIZE);
        UserSlice::new(UserPtr::from_addr(hva.raw() as usize), data.len())
            .writer()
            .write_slice(data)?;
        Ok(Some(()))
    }

    /// Replaces an aligned word of 1, 2, 4 or 8 bytes if it is still `old`. `None` where no memory is
    /// there or it is read-only.
    ///
    /// # Errors
    ///
    /// As [`Self::read`].
    pub(crate) fn compare_exchange(
        &self,
        gpa: Gpa,
        size: u32,
        old: u64,
        new: u64,
    ) -> Result<Option<bool>> {
        match self.hva(gpa, true) {
            Some(hva) => memory::compare_exchange(hva, size, old, new).map(Some),
            None => Ok(None),
        }
    }

    /// Frees the tables. No vCPU may run any more.
    pub(crate) fn destroy(&self) {
        let mut mmu = self.mmu.lock();
        let Mmu { ept, tables, .. } = &mut *mmu;
        if let Some(ept) = ept.take() {
            ept.destroy(tables);
        }
        self.unlock_and_flush(mmu);
    }

    /// The slots that back a range of the process, as guest frames.
    fn frames_of(slot: &Slot, start: Hva, end: Hva) -> Option<(Gfn, Gfn)> {
        let slot_start = slot.hva.raw();
        let slot_end = slot_start.saturating_add(slot.pages << PAGE_SHIFT);
        let start = start.page_start().raw().max(slot_start);
        let end = end.raw().saturating_add(PAGE_SIZE - 1).min(slot_end);
        if start >= end {
            return None;
        }
        let first = slot.base.raw() + ((start - slot_start) >> PAGE_SHIFT);
        let last = slot.base.raw() + ((end - slot_start).div_ceil(PAGE_SIZE));
        Some((Gfn::new(first), Gfn::new(last.min(slot.end().raw()))))
    }
}

impl Mmu {
    #[inline]
    fn find(&mut self, gfn: Gfn) -> Option<Slot> {
        slot::find_hinted(&self.slots, gfn, &mut self.hint).copied()
    }

    fn was_accessed(&mut self, first: Gfn, end: Gfn, clear: bool) -> bool {
        match &self.ept {
            Some(ept) if clear => ept.test_and_clear_accessed(&mut self.tables, first, end),
            Some(ept) => ept.is_accessed(&mut self.tables, first, end),
            None => false,
        }
    }

    fn unmap(&mut self, first: Gfn, end: Gfn) -> bool {
        match &self.ept {
            Some(ept) => ept.unmap(&mut self.tables, first, end),
            None => false,
        }
    }
}

impl Invalidate for GuestMemory {
    fn start(&self, start: Hva, end: Hva) {
        let mut mmu = self.mmu.lock();
        mmu.changing += 1;
        let mut flush = mmu.flushing != 0;
        for place in 0..mmu.slots.len() {
            let Some((first, last)) = mmu
                .slots
                .get(place)
                .and_then(|slot| Self::frames_of(slot, start, end))
            else {
                continue;
            };
            flush |= mmu.unmap(first, last);
        }
        if flush {
            self.unlock_and_flush(mmu);
        }
    }

    fn end(&self) {
        let mut mmu = self.mmu.lock();
        mmu.sequence = mmu.sequence.wrapping_add(1);
        mmu.changing = mmu.changing.saturating_sub(1);
    }

    fn release(&self) {
        self.destroy();
    }

    fn was_used(&self, start: Hva, end: Hva, clear: bool) -> bool {
        let mut used = false;
        let mut mmu = self.mmu.lock();
        // Where the CPU sets no accessed flag, an entry that is taken away says by its return that the
        // page is used.
        let unmap = clear && !self.accessed_dirty;
        for place in 0..mmu.slots.len() {
            let Some((first, last)) = mmu
                .slots
                .get(place)
                .and_then(|slot| Self::frames_of(slot, start, end))
            else {
                continue;
            };
            used |= if unmap {
                mmu.unmap(first, last)
            } else {
                mmu.was_accessed(first, last, clear)
            };
        }
        if unmap && used {
            self.unlock_and_flush(mmu);
        }
        used
    }
}

impl Drop for Mmu {
    fn drop(&mut self) {
        if let Some(ept) = self.ept.take() {
            ept.destroy(&mut self.tables);
        }
        drop(self.tables.take_retired());
    }
}

impl From<SlotErrno> for Error {
    fn from(error: SlotErrno) -> Self {
        match error.0 {
            SlotError::Invalid => EINVAL,
            SlotError::Overlap => EEXIST,
        }
    }
}

/// A [`SlotError`] on its way to userspace.
struct SlotErrno(SlotError);
