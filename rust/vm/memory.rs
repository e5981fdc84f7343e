// SPDX-License-Identifier: GPL-2.0

//! A virtual machine's memory: the slots that userspace gave it and the EPT that is filled from them.
//!
//! Locking: `update` serialises changes of the slots; `mmu` is a leaf lock under which nothing sleeps
//! and no other CPU is waited for. Pages of the process are taken hold of outside of it: a counter
//! that the process's notifier advances tells whether what was learnt still holds.

mod access;
mod invalidate;
mod log;

pub(crate) use self::log::{LogPart, LOG_OPTIONS};
use self::{
    access::Writers,
    invalidate::Unmapping,
    log::{DirtyLog, LogChange, LogPlace},
};
use super::shared::VcpuShared;
use crate::host::{
    memory::{self, Tables, UserPage},
    page::KernelPage,
};
use core::sync::atomic::{AtomicU64, Ordering};
use kernel::{
    new_mutex, new_spinlock,
    prelude::*,
    sync::{Arc, Mutex, SpinLock},
};
use rvisor_core::{
    mmu::{
        changes::Changes,
        ept::{CachePolicy, Ept, MapError, MapOutcome, Permissions},
        page_size::PageSize,
        slot::{self, Change, Limits, Slot, SlotError},
        walk::AccessKind,
    },
    x86::address::{Gfn, Gpa, Hva, Pfn, PAGE_SHIFT, PAGE_SIZE},
};

/// KVM_CAP_NR_MEMSLOTS.
pub(crate) const SLOTS: u16 = 509;

/// The pages that a guest can have.
#[derive(Clone, Copy)]
pub(crate) struct Pages {
    /// The largest.
    pub(crate) largest: PageSize,
    /// Whether large ones may hold code. On CPUs that can't bear it a guest that changes the size of a
    /// page under its code stops the host (CVE-2018-12207).
    pub(crate) large_execute: bool,
}

/// What to do about an EPT violation.
pub(crate) enum Fault {
    /// The page is mapped, or will be on another try.
    Resolved,
    /// No memory is there, or it is read-only and was written: the access is a device's.
    Device,
}

struct Mmu {
    slots: KVec<Slot>,
    /// The slot that was taken out of `slots` and has translations still.
    leaving: Option<Slot>,
    /// Of the slots that have one.
    logs: KVec<DirtyLog>,
    hint: usize,
    /// `None` once the process is gone.
    ept: Option<Ept>,
    tables: Tables,
    /// Of the process's page tables, and of the slots.
    changes: Changes,
    /// Translations were taken away whose flush is not over.
    flushing: u32,
}

/// What backs a frame of the guest.
enum Backing {
    /// A slot, the address in the process, and the number of the last change of either.
    Slot(Slot, Hva, u64),
    /// A slot whose page the process is changing just now.
    Changing,
    /// No memory, or none that can be written.
    Device,
}

/// The memory of one virtual machine.
#[pin_data]
pub(crate) struct GuestMemory {
    eptp: u64,
    accessed_dirty: bool,
    pages: Pages,
    end_of_memory: Gfn,
    #[pin]
    update: Mutex<()>,
    #[pin]
    mmu: SpinLock<Mmu>,
    /// Advanced whenever translations were taken away; each vCPU compares it before it enters.
    generation: AtomicU64,
    /// Of [`LOG_OPTIONS`].
    log_options: AtomicU64,
    #[pin]
    writers: Writers,
    #[pin]
    vcpus: SpinLock<KVec<Arc<VcpuShared>>>,
}

impl GuestMemory {
    /// No slots, an empty EPT.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(crate) fn new(pages: Pages, accessed_dirty: bool, physical_bits: u32) -> Result<Arc<Self>> {
        let mut tables = Tables::new();
        tables.add(KernelPage::new()?);
        let ept = Ept::new(&mut tables).ok_or(ENOMEM)?;
        let eptp = ept.eptp(accessed_dirty);
        let mmu = Mmu {
            slots: KVec::new(),
            leaving: None,
            logs: KVec::new(),
            hint: 0,
            ept: Some(ept),
            tables,
            changes: Changes::new(),
            flushing: 0,
        };
        Arc::pin_init(
            pin_init!(Self {
                eptp,
                accessed_dirty,
                pages,
                end_of_memory: Gfn::new(1 << physical_bits.min(48).saturating_sub(PAGE_SHIFT)),
                update <- new_mutex!(()),
                mmu <- new_spinlock!(mmu),
                generation: AtomicU64::new(0),
                log_options: AtomicU64::new(0),
                writers <- Writers::new(),
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

    /// The same, where the list can be had without waiting.
    pub(crate) fn try_with_vcpus<R>(&self, f: impl FnOnce(&[Arc<VcpuShared>]) -> R) -> Option<R> {
        self.vcpus.try_lock().map(|vcpus| f(&vcpus))
    }

    /// The number of the last change that took translations away.
    #[inline]
    pub(crate) fn generation(&self) -> u64 {
        self.generation.load(Ordering::SeqCst)
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
            flags: slot::LOG_DIRTY_PAGES | slot::READONLY,
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
        let mut logs = LogChange::prepare(self, removed.as_ref(), added.as_ref())?;
        let mut mmu = self.mmu.lock();
        core::mem::swap(&mut mmu.slots, &mut slots);
        if let Some(logs) = &mut logs {
            logs.carry_out(&mut mmu);
        }
        mmu.changes.note();
        if let Some(old) = removed {
            // The lock is given up while it is unmapped: the process's own changes must find it.
            mmu.leaving = removed;
            let mut unmapping = Unmapping::new(true);
            mmu = self.unmap(mmu, &mut unmapping, old.base, old.end());
            mmu.leaving = None;
            self.unlock_and_flush(mmu, unmapping);
            self.writers.wait();
        }
        Ok(())
    }

    /// Finds what backs `gfn`, and sees to it that there are tables for a mapping.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    fn look_up(&self, gfn: Gfn, write: bool) -> Result<Backing> {
        loop {
            let mut mmu = self.mmu.lock();
            if !mmu.tables.has_stock() {
                drop(mmu);
                let page = KernelPage::new()?;
                // Where another vCPU has filled the stock meanwhile, the page goes back on its own.
                let _spare = self.mmu.lock().tables.add(page);
                continue;
            }
            let Some(slot) = mmu.find(gfn) else {
                return Ok(Backing::Device);
            };
            if write && slot.is_read_only() {
                return Ok(Backing::Device);
            }
            let hva = slot.hva_of(gfn).ok_or(EFAULT)?;
            if mmu.changes.touch(hva, PAGE_SIZE) {
                // What could be learnt of the page now would be void.
                return Ok(Backing::Changing);
            }
            return Ok(Backing::Slot(slot, hva, mmu.changes.sequence()));
        }
    }

    /// Sees to an EPT violation at `gpa`.
    ///
    /// # Errors
    ///
    /// `EFAULT` where the process has no memory at the slot's address; `ENOMEM`.
    pub(crate) fn fault(&self, gpa: Gpa, access: AccessKind) -> Result<Fault> {
        let gfn = gpa.frame();
        let write = matches!(access, AccessKind::Write);
        let (slot, hva, sequence) = match self.look_up(gfn, write)? {
            Backing::Slot(slot, hva, sequence) => (slot, hva, sequence),
            Backing::Changing => return Ok(Fault::Resolved),
            Backing::Device => return Ok(Fault::Device),
        };
        let page = match UserPage::get(hva, write) {
            // A signal, which is looked for before the guest runs on.
            Err(error) if error == EINTR => return Ok(Fault::Resolved),
            page => page?,
        };
        let mut size = slot.largest_page(gfn).min(self.pages.largest);
        if size > PageSize::Size4K {
            size = size.min(memory::host_mapping(hva));
        }
        let mut mmu = self.mmu.lock();
        if size > PageSize::Size4K && !self.pages.large_execute {
            size = mmu.largest_without_code(gfn, size, access);
        }
        let start = Hva::new(hva.raw() & !(size.bytes() - 1));
        if !mmu.changes.permit(sequence, start, size.bytes()) {
            // What was learnt may be void. The guest touches the page again.
            return Ok(Fault::Resolved);
        }
        // In a slot with a log only what is written to may be written to.
        let may_write = !slot.is_read_only() && (write || !slot.logs_dirty());
        let permissions = Permissions::of(
            page.writable && may_write,
            self.pages.large_execute || size == PageSize::Size4K,
        );
        let flush = match mmu.map(gfn, &page, size, permissions) {
            Ok(outcome) => outcome.flush,
            // Another vCPU has used the stock up.
            Err(MapError::OutOfTables) => return Ok(Fault::Resolved),
            Err(MapError::OutOfRange | MapError::Misaligned) => return Err(EFAULT),
        };
        if permissions.can_write() {
            page.mark_dirty();
            if slot.logs_dirty() {
                mmu.mark_dirty(LogPlace::of(&slot, gfn));
            }
        }
        if flush {
            self.unlock_and_flush_replaced(mmu);
        }
        Ok(Fault::Resolved)
    }
}

impl Mmu {
    /// Maps the page that backs `gfn`, with all of the larger page of which it is a part.
    #[inline]
    fn map(
        &mut self,
        gfn: Gfn,
        page: &UserPage,
        size: PageSize,
        permissions: Permissions,
    ) -> core::result::Result<MapOutcome, MapError> {
        let inside = gfn.raw() & size.frame_mask();
        let first = Gfn::new(gfn.raw() - inside);
        let pfn = Pfn::new(page.frame().raw().wrapping_sub(inside));
        match &self.ept {
            Some(ept) => ept.map(
                &mut self.tables,
                first,
                pfn,
                size,
                permissions,
                CachePolicy::MEMORY,
            ),
            // The process is gone, and the page with it.
            None => Err(MapError::OutOfRange),
        }
    }

    /// The size to map `gfn` with where large pages hold no code: what is fetched is a small page, and
    /// the table around it stays for as long as it is there, or code and data would take turns in
    /// driving each other out.
    fn largest_without_code(&self, gfn: Gfn, size: PageSize, access: AccessKind) -> PageSize {
        match (&self.ept, access) {
            (Some(ept), AccessKind::Read | AccessKind::Write) => {
                ept.fitting(&self.tables, gfn, size)
            }
            _ => PageSize::Size4K,
        }
    }

    #[inline]
    fn find_ref(&mut self, gfn: Gfn) -> Option<&Slot> {
        slot::find_hinted(&self.slots, gfn, &mut self.hint)
    }

    #[inline]
    fn find(&mut self, gfn: Gfn) -> Option<Slot> {
        self.find_ref(gfn).copied()
    }

    fn was_accessed(&mut self, first: Gfn, end: Gfn, clear: bool) -> bool {
        match &self.ept {
            Some(ept) if clear => ept.test_and_clear_accessed(&mut self.tables, first, end),
            Some(ept) => ept.is_accessed(&mut self.tables, first, end),
            None => false,
        }
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
