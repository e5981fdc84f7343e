// SPDX-License-Identifier: GPL-2.0

//! The dirty log: which frames of a slot were written to since userspace asked last.
//!
//! In a slot that has one, a frame that the guest can write to is noted. It loses the right when
//! userspace takes the note, and the fault of the next write notes it again.

use super::{invalidate::Unmapping, GuestMemory, Mmu};
use crate::{bindings as uapi, host::memory};
use core::sync::atomic::Ordering;
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

/// KVM_GET_DIRTY_LOG leaves the notes, and KVM_CLEAR_DIRTY_LOG takes them.
const MANUAL: u64 = uapi::KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE as u64;
/// A new log has a note of each frame.
const INITIALLY_SET: u64 = uapi::KVM_DIRTY_LOG_INITIALLY_SET as u64;
/// What KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 offers.
pub(crate) const LOG_OPTIONS: u64 = MANUAL | INITIALLY_SET;

/// How many words are taken under the lock at once.
const WORDS_AT_ONCE: usize = 64;

/// The notes of one slot.
pub(super) struct DirtyLog {
    slot: u16,
    words: KVVec<u64>,
}

impl DirtyLog {
    /// Notes for a slot: of none of its frames yet, or of all.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(super) fn new(slot: &Slot, of_all: bool) -> Result<Self> {
        let count = dirty::words_for(slot.pages) as usize;
        let mut words = KVVec::from_elem(0, count, GFP_KERNEL_ACCOUNT)?;
        if of_all {
            dirty::mark_all(&mut words, slot.pages);
        }
        Ok(Self {
            slot: slot.id,
            words,
        })
    }
}

/// The notes that KVM_CLEAR_DIRTY_LOG is for.
pub(crate) struct LogPart {
    /// The slot's number, and in the upper half its address space.
    pub(crate) slot: u32,
    /// The first frame, from the slot's first.
    pub(crate) first: u64,
    /// The number of frames.
    pub(crate) count: u64,
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
        let of_all = memory.log_option(INITIALLY_SET);
        Ok(Some(Self {
            room: KVec::with_capacity(count + 1, GFP_KERNEL_ACCOUNT)?,
            added: added
                .filter(|slot| slot.logs_dirty())
                .map(|slot| DirtyLog::new(slot, of_all))
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

    /// Copies notes of a slot from the word `at` on; how many words there were.
    fn copy_dirty(&mut self, slot: &Slot, at: usize, copied: &mut [u64]) -> usize {
        self.log(slot.id)
            .map_or(0, |log| dirty::copy(&log.words, at, copied))
    }

    /// Takes those notes from the word `at` on that `masks` have, and these frames' right to be written to.
    /// Whether CPUs must be made to forget.
    fn clear_dirty(&mut self, slot: &Slot, at: usize, masks: &[u64]) -> bool {
        let mut flush = false;
        for (at, mask) in (at..).zip(masks) {
            let mut cleared = match self.log(slot.id) {
                Some(log) => dirty::clear(&mut log.words, at, *mask),
                None => 0,
            };
            let base = slot
                .base
                .raw()
                .wrapping_add(at as u64 * dirty::FRAMES_PER_WORD);
            let Self { ept, tables, .. } = self;
            // Those between keep it: they are noted still.
            while let (Some(ept), Some((first, end))) = (&*ept, dirty::run(cleared)) {
                let first = Gfn::new(base.wrapping_add(first));
                flush |= ept.write_protect(tables, first, Gfn::new(base.wrapping_add(end)));
                cleared &= u64::MAX.checked_shl(end as u32).unwrap_or(0);
            }
        }
        flush
    }
}

impl GuestMemory {
    fn log_option(&self, option: u64) -> bool {
        self.log_options.load(Ordering::Relaxed) & option != 0
    }

    /// Enables KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2.
    ///
    /// # Errors
    ///
    /// `EINVAL` for other options, and for the second without the first.
    pub(crate) fn set_log_options(&self, options: u64) -> Result {
        if options & !LOG_OPTIONS != 0 || options == INITIALLY_SET {
            return Err(EINVAL);
        }
        self.log_options.store(options, Ordering::Relaxed);
        Ok(())
    }

    /// The number of a slot of address space 0.
    fn slot_number(id: u32) -> Result<u16> {
        let id = u16::try_from(id).map_err(|_| EINVAL)?;
        if id < super::SLOTS {
            Ok(id)
        } else {
            Err(EINVAL)
        }
    }

    /// A slot that has a log. Under `update`.
    fn logged_slot(&self, id: u16) -> Result<Slot> {
        let mmu = self.mmu.lock();
        let place = slot::position_of(&mmu.slots, id).ok_or(ENOENT)?;
        let slot = *mmu.slots.get(place).ok_or(ENOENT)?;
        if slot.logs_dirty() {
            Ok(slot)
        } else {
            Err(ENOENT)
        }
    }

    /// Carries out KVM_CLEAR_DIRTY_LOG: takes the notes that the bitmap at `address` has, the part's first frame
    /// in bit 0 of its first word.
    ///
    /// # Errors
    ///
    /// `EINVAL` for a number out of range and for a part that is not made of whole words; `ENOENT` where there is
    /// no such slot or it has no log; `EFAULT`, `ENOMEM`. The log is as before then.
    pub(crate) fn clear_dirty_log(&self, part: &LogPart, address: usize) -> Result {
        let _update = self.update.lock();
        let id = Self::slot_number(part.slot)?;
        if part.first % dirty::FRAMES_PER_WORD != 0 {
            return Err(EINVAL);
        }
        let slot = self.logged_slot(id)?;
        if !dirty::is_part(part.first, part.count, slot.pages) {
            return Err(EINVAL);
        }
        // All of it first, so that nothing is lost where some of it can't be read.
        let count = dirty::words_for(part.count) as usize;
        let mut masks: KVVec<u64> = KVVec::from_elem(0, count, GFP_KERNEL_ACCOUNT)?;
        let mut reader =
            UserSlice::new(UserPtr::from_addr(address), count * size_of::<u64>()).reader();
        for mask in masks.iter_mut() {
            *mask = reader.read()?;
        }
        let mut unmapping = Unmapping::new(true);
        let mut at = (part.first / dirty::FRAMES_PER_WORD) as usize;
        for masks in masks.chunks(WORDS_AT_ONCE) {
            let mut mmu = self.mmu.lock();
            if mmu.clear_dirty(&slot, at, masks) {
                unmapping.note(&mut mmu);
            }
            drop(mmu);
            at += masks.len();
            memory::relax();
        }
        self.unlock_and_flush(self.mmu.lock(), unmapping);
        Ok(())
    }

    /// Carries out KVM_GET_DIRTY_LOG: writes the bitmap of the slot `id` of address space 0 to `address`.
    ///
    /// # Errors
    ///
    /// `EINVAL` for a number out of range, `ENOENT` where there is no such slot or it has no log,
    /// `EFAULT`; the part of the log that could not be written is kept. All of it is, where userspace takes the
    /// notes itself.
    pub(crate) fn dirty_log(&self, id: u32, address: usize) -> Result {
        let _update = self.update.lock();
        let slot = self.logged_slot(Self::slot_number(id)?)?;
        let is_manual = self.log_option(MANUAL);
        let bytes = dirty::words_for(slot.pages) as usize * size_of::<u64>();
        let mut writer = UserSlice::new(UserPtr::from_addr(address), bytes).writer();
        let mut unmapping = Unmapping::new(true);
        let mut at = 0;
        let result = loop {
            let mut taken = [0; WORDS_AT_ONCE];
            let mut mmu = self.mmu.lock();
            let (count, flush) = if is_manual {
                (mmu.copy_dirty(&slot, at, &mut taken), false)
            } else {
                mmu.take_dirty(&slot, at, &mut taken)
            };
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
