// SPDX-License-Identifier: GPL-2.0

//! The dirty log: which frames of a slot were written to since userspace asked last.
//!
//! In a slot that has one, a frame that the guest can write to is noted. It loses the right when
//! userspace takes the note, and the fault of the next write notes it again.

use super::{invalidate::Unmapping, GuestMemory, Mmu};
use crate::host::memory;
use kernel::{
    prelude::*,
    uaccess::{UserPtr, UserSlice},
};
use rvisor_core::{
    mmu::{
        dirty,
        slot::{self, Slot},
    },
    x86::address::Gfn,
};

/// How many words are taken under the lock at once.
const WORDS_AT_ONCE: usize = 64;

/// The notes of one slot.
pub(super) struct DirtyLog {
    slot: u16,
    words: KVVec<u64>,
}

impl DirtyLog {
    /// Notes for a slot, none yet.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(super) fn new(slot: &Slot) -> Result<Self> {
        let count = dirty::words_for(slot.pages) as usize;
        Ok(Self {
            slot: slot.id,
            words: KVVec::from_elem(0, count, GFP_KERNEL_ACCOUNT)?,
        })
    }
}

/// Where the note of a frame belongs.
#[derive(Clone, Copy)]
pub(super) struct LogPlace {
    slot: u16,
    frame: u64,
}

impl LogPlace {
    /// That of a frame of the slot.
    #[inline]
    pub(super) fn of(slot: &Slot, gfn: Gfn) -> Self {
        Self {
            slot: slot.id,
            frame: gfn.raw().wrapping_sub(slot.base.raw()),
        }
    }
}

/// The logs of slots that are about to change, made before the lock is taken.
pub(super) struct LogChange {
    room: KVec<DirtyLog>,
    added: Option<DirtyLog>,
    removed: Option<u16>,
}

impl LogChange {
    /// What becomes of the logs where one slot goes and another one comes, which may be the same one.
    /// Under `update`.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(super) fn prepare(
        memory: &GuestMemory,
        removed: Option<&Slot>,
        added: Option<&Slot>,
    ) -> Result<Option<Self>> {
        let had = removed.is_some_and(Slot::logs_dirty);
        let has = added.is_some_and(Slot::logs_dirty);
        if had == has {
            // A slot that moves keeps its notes.
            return Ok(None);
        }
        let count = memory.mmu.lock().logs.len();
        Ok(Some(Self {
            room: KVec::with_capacity(count + 1, GFP_KERNEL_ACCOUNT)?,
            added: added
                .filter(|slot| slot.logs_dirty())
                .map(DirtyLog::new)
                .transpose()?,
            removed: removed.filter(|_| had).map(|slot| slot.id),
        }))
    }

    /// Makes the change. What is left in `self` is dropped without the lock.
    pub(super) fn carry_out(&mut self, mmu: &mut Mmu) {
        core::mem::swap(&mut mmu.logs, &mut self.room);
        for log in self.room.drain_all() {
            if self.removed == Some(log.slot) {
                self.added = Some(log);
            } else {
                // There is room: it was made for all of them and one.
                let _ = mmu.logs.push_within_capacity(log);
            }
        }
        if self.removed.is_none() {
            if let Some(log) = self.added.take() {
                let _ = mmu.logs.push_within_capacity(log);
            }
        }
    }
}

impl Mmu {
    fn log(&mut self, id: u16) -> Option<&mut DirtyLog> {
        self.logs.iter_mut().find(|log| log.slot == id)
    }

    /// Notes that a frame may have been written to.
    pub(super) fn mark_dirty(&mut self, place: LogPlace) {
        if let Some(log) = self.log(place.slot) {
            dirty::mark(&mut log.words, place.frame);
        }
    }

    /// Takes notes of a slot from the word `at` on, and the frames' right to be written to. How many
    /// words there were, and whether CPUs must be made to forget.
    fn take_dirty(&mut self, slot: &Slot, at: usize, taken: &mut [u64]) -> (usize, bool) {
        let count = match self.log(slot.id) {
            Some(log) => dirty::take(&mut log.words, at, taken),
            None => 0,
        };
        let mut flush = false;
        let Self { ept, tables, .. } = self;
        let Some(ept) = ept else {
            return (count, false);
        };
        let mut base = slot
            .base
            .raw()
            .wrapping_add(at as u64 * dirty::FRAMES_PER_WORD);
        for word in taken.iter().take(count) {
            if let Some((first, end)) = dirty::span(*word) {
                let first = Gfn::new(base.wrapping_add(first));
                flush |= ept.write_protect(tables, first, Gfn::new(base.wrapping_add(end)));
            }
            base = base.wrapping_add(dirty::FRAMES_PER_WORD);
        }
        (count, flush)
    }
}

impl GuestMemory {
    /// Carries out KVM_GET_DIRTY_LOG: writes the bitmap of the slot `id` of address space 0 to `address`.
    ///
    /// # Errors
    ///
    /// `EINVAL` for a number out of range, `ENOENT` where there is no such slot or it has no log,
    /// `EFAULT`; the part of the log that could not be written is kept.
    pub(crate) fn dirty_log(&self, id: u32, address: usize) -> Result {
        let _update = self.update.lock();
        let id = u16::try_from(id).map_err(|_| EINVAL)?;
        if id >= super::SLOTS {
            return Err(EINVAL);
        }
        let slot = {
            let mmu = self.mmu.lock();
            let place = slot::position_of(&mmu.slots, id).ok_or(ENOENT)?;
            *mmu.slots.get(place).ok_or(ENOENT)?
        };
        if !slot.logs_dirty() {
            return Err(ENOENT);
        }
        let bytes = dirty::words_for(slot.pages) as usize * size_of::<u64>();
        let mut writer = UserSlice::new(UserPtr::from_addr(address), bytes).writer();
        let mut unmapping = Unmapping::new(true);
        let mut at = 0;
        let result = loop {
            let mut taken = [0; WORDS_AT_ONCE];
            let mut mmu = self.mmu.lock();
            let (count, flush) = mmu.take_dirty(&slot, at, &mut taken);
            if flush {
                unmapping.note(&mut mmu);
            }
            drop(mmu);
            if count == 0 {
                break Ok(());
            }
            let words = taken.get(..count).unwrap_or(&taken);
            if let Err(error) = words.iter().try_for_each(|word| writer.write(word)) {
                let mut mmu = self.mmu.lock();
                if let Some(log) = mmu.log(slot.id) {
                    dirty::put_back(&mut log.words, at, words);
                }
                break Err(error);
            }
            at += count;
            memory::relax();
        };
        // What is written from now on is noted again.
        self.unlock_and_flush(self.mmu.lock(), unmapping);
        result
    }
}
