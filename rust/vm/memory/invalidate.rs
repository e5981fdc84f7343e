// SPDX-License-Identifier: GPL-2.0

//! Translations that go: because the process's page tables change, because a slot does, at the end.
//!
//! However much is mapped, the lock is held for a bounded time only, and all CPUs are made to forget
//! once, at the end. Whoever meets a translation gone whose flush is not over must not go on as if it
//! were: `flushing` tells.

use super::{GuestMemory, Mmu};
use crate::host::{memory, notifier::Invalidate};
use core::sync::atomic::Ordering;
use kernel::sync::lock::spinlock::SpinLockGuard;
use rvisor_core::{
    mmu::slot,
    x86::address::{Gfn, Hva},
};

/// How much is unmapped under the lock at once, as [`rvisor_core::mmu::ept::Ept::unmap`] counts it.
const STEPS: u32 = 512;

/// Translations that are being taken away: whether there were any yet, and whether the caller may sleep.
pub(super) struct Unmapping {
    flush: bool,
    may_sleep: bool,
}

impl Unmapping {
    pub(super) fn new(may_sleep: bool) -> Self {
        Self {
            flush: false,
            may_sleep,
        }
    }

    /// Takes frames away, as many as may be at once, and says where to go on.
    fn step(&mut self, mmu: &mut Mmu, first: Gfn, end: Gfn) -> Option<Gfn> {
        let Mmu { ept, tables, .. } = mmu;
        let part = ept.as_ref()?.unmap(tables, first, end, STEPS);
        if part.flush {
            self.note(mmu);
        }
        part.next
    }

    /// Something was taken away.
    pub(super) fn note(&mut self, mmu: &mut Mmu) {
        if !self.flush {
            self.flush = true;
            mmu.flushing = mmu.flushing.saturating_add(1);
        }
    }
}

impl GuestMemory {
    /// Gives the lock to others for a moment.
    fn breathe<'a>(
        &'a self,
        mmu: SpinLockGuard<'a, Mmu>,
        unmapping: &Unmapping,
    ) -> SpinLockGuard<'a, Mmu> {
        drop(mmu);
        if unmapping.may_sleep {
            memory::relax();
        }
        self.mmu.lock()
    }

    /// Takes the frames from `first` to before `end` away.
    pub(super) fn unmap<'a>(
        &'a self,
        mut mmu: SpinLockGuard<'a, Mmu>,
        unmapping: &mut Unmapping,
        first: Gfn,
        end: Gfn,
    ) -> SpinLockGuard<'a, Mmu> {
        let mut next = unmapping.step(&mut mmu, first, end);
        while let Some(at) = next {
            mmu = self.breathe(mmu, unmapping);
            next = unmapping.step(&mut mmu, at, end);
        }
        mmu
    }

    /// Takes the frames that the process's addresses `start..end` back away.
    fn unmap_addresses<'a>(
        &'a self,
        mut mmu: SpinLockGuard<'a, Mmu>,
        unmapping: &mut Unmapping,
        start: Hva,
        end: Hva,
    ) -> SpinLockGuard<'a, Mmu> {
        let mut from = Gfn::new(0);
        while let Some(part) = slot::next_backed(&mmu.slots, from, start, end) {
            from = match unmapping.step(&mut mmu, part.first, part.end) {
                // The slots may be others afterwards.
                Some(next) => {
                    mmu = self.breathe(mmu, unmapping);
                    next
                }
                None => part.slot_end,
            };
        }
        self.unmap_leaving(mmu, unmapping, start, end)
    }

    /// Likewise of the slot that is being taken away and is not among the others any more. Should it be
    /// another one after a breath, the first is unmapped whole, and what the second had mapped went with the
    /// others: nothing is mapped anew in a range that changes.
    fn unmap_leaving<'a>(
        &'a self,
        mut mmu: SpinLockGuard<'a, Mmu>,
        unmapping: &mut Unmapping,
        start: Hva,
        end: Hva,
    ) -> SpinLockGuard<'a, Mmu> {
        let mut from = Gfn::new(0);
        while let Some(part) = mmu
            .leaving
            .as_slice()
            .first()
            .and_then(|slot| slot::next_backed(core::slice::from_ref(slot), from, start, end))
        {
            from = match unmapping.step(&mut mmu, part.first, part.end) {
                Some(next) => {
                    mmu = self.breathe(mmu, unmapping);
                    next
                }
                None => part.slot_end,
            };
        }
        mmu
    }

    /// Drops the lock, and returns when no CPU uses a translation that was taken away, here or by
    /// another thread before.
    pub(super) fn unlock_and_flush(&self, mut mmu: SpinLockGuard<'_, Mmu>, unmapping: Unmapping) {
        if !unmapping.flush && mmu.flushing == 0 {
            return;
        }
        let retired = mmu.tables.take_retired();
        drop(mmu);
        self.flush();
        if unmapping.flush {
            let mut mmu = self.mmu.lock();
            mmu.flushing = mmu.flushing.saturating_sub(1);
        }
        retired.free(unmapping.may_sleep);
    }

    /// As [`Self::unlock_and_flush`], after a translation was replaced. The caller may sleep.
    pub(super) fn unlock_and_flush_replaced(&self, mut mmu: SpinLockGuard<'_, Mmu>) {
        let mut replaced = Unmapping::new(true);
        replaced.note(&mut mmu);
        self.unlock_and_flush(mmu, replaced);
    }

    /// Returns when no CPU uses a translation that was taken away before the call.
    fn flush(&self) {
        self.generation.fetch_add(1, Ordering::SeqCst);
        // No lock is held while another CPU is waited for: it may want the lock with interrupts off.
        // From the end: one that goes meanwhile moves only those that were seen to, and one that comes
        // forgets all before it first runs.
        let count = self.vcpus.lock().len();
        for place in (0..count).rev() {
            let vcpu = self.vcpus.lock().get(place).cloned();
            if let Some(vcpu) = vcpu {
                vcpu.leave_guest_and_wait();
            }
        }
    }

    /// Frees the tables. No vCPU may run any more, and the caller may sleep.
    pub(crate) fn destroy(&self) {
        let mut unmapping = Unmapping::new(true);
        let all = (Hva::new(0), Hva::new(u64::MAX));
        // Everything that is mapped lies in a slot or in the one that leaves. What is left then are a few tables.
        let mut mmu = self.unmap_addresses(self.mmu.lock(), &mut unmapping, all.0, all.1);
        let Mmu { ept, tables, .. } = &mut *mmu;
        if let Some(ept) = ept.take() {
            ept.destroy(tables);
        }
        let retired = mmu.tables.take_retired();
        self.unlock_and_flush(mmu, unmapping);
        retired.free(true);
    }
}

impl Invalidate for GuestMemory {
    fn start(&self, start: Hva, end: Hva, may_sleep: bool) {
        let mut mmu = self.mmu.lock();
        mmu.changes.begin(start, end);
        let mut unmapping = Unmapping::new(may_sleep);
        let mmu = self.unmap_addresses(mmu, &mut unmapping, start, end);
        self.unlock_and_flush(mmu, unmapping);
    }

    fn end(&self) {
        self.mmu.lock().changes.end();
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
        let mut unmapping = Unmapping::new(false);
        let mut from = Gfn::new(0);
        while let Some(part) = slot::next_backed(&mmu.slots, from, start, end) {
            from = part.slot_end;
            if unmap {
                mmu = self.unmap(mmu, &mut unmapping, part.first, part.end);
                used |= unmapping.flush;
            } else {
                used |= mmu.was_accessed(part.first, part.end, clear);
            }
        }
        if unmapping.flush {
            self.unlock_and_flush(mmu, unmapping);
        }
        used
    }
}
