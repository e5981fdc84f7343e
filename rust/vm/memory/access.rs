// SPDX-License-Identifier: GPL-2.0

//! The kernel's own accesses to guest memory: through the process's addresses, as the process would.

use super::{log::LogPlace, GuestMemory};
use crate::host::{memory, wait::WaitQueue};
use core::sync::atomic::{AtomicU32, Ordering};
use kernel::{
    prelude::*,
    static_lock_class,
    uaccess::{UserPtr, UserSlice},
};
use rvisor_core::{
    mmu::slot::Slot,
    x86::address::{Gfn, Gpa, Hva, PAGE_SIZE},
};

/// The accesses that write guest memory through a slot, so that a slot's end can wait for them: what
/// was the slot's memory is then the process's alone.
///
/// Two generations take turns. An access counts in the one that is current; who waits makes the other
/// one current and sees the first one run dry.
#[pin_data]
pub(super) struct Writers {
    generation: AtomicU32,
    counts: [AtomicU32; 2],
    #[pin]
    queue: WaitQueue,
}

/// An access under way.
struct Writing<'a> {
    writers: &'a Writers,
    generation: u32,
}

impl Writers {
    pub(super) fn new() -> impl PinInit<Self> {
        pin_init!(Self {
            generation: AtomicU32::new(0),
            counts: [const { AtomicU32::new(0) }; 2],
            queue <- WaitQueue::new(static_lock_class!()),
        })
    }

    fn count(&self, generation: u32) -> &AtomicU32 {
        let [even, odd] = &self.counts;
        if generation & 1 == 0 {
            even
        } else {
            odd
        }
    }

    /// Begins an access. The slot must be looked up after this.
    #[inline]
    fn begin(&self) -> Writing<'_> {
        loop {
            let generation = self.generation.load(Ordering::SeqCst);
            self.count(generation).fetch_add(1, Ordering::SeqCst);
            let access = Writing {
                writers: self,
                generation,
            };
            // Whoever has changed it meanwhile may not have seen the count.
            if self.generation.load(Ordering::SeqCst) == generation {
                return access;
            }
        }
    }

    /// Returns when every access has ended that may have seen the slots as they were before the call.
    /// One caller at a time.
    pub(super) fn wait(&self) {
        let generation = self.generation.fetch_add(1, Ordering::SeqCst);
        let count = self.count(generation);
        if count.load(Ordering::SeqCst) != 0 {
            self.queue
                .wait_through(|| count.load(Ordering::SeqCst) == 0);
        }
    }
}

impl Drop for Writing<'_> {
    #[inline]
    fn drop(&mut self) {
        let count = self.writers.count(self.generation);
        if count.fetch_sub(1, Ordering::SeqCst) == 1
            && self.writers.generation.load(Ordering::SeqCst) != self.generation
        {
            self.writers.queue.wake();
        }
    }
}

impl GuestMemory {
    /// What backs `gpa`, where memory is there and `write` is allowed.
    #[inline]
    fn backing(&self, gpa: Gpa, write: bool) -> Option<(Hva, Option<LogPlace>)> {
        let gfn = gpa.frame();
        let mut mmu = self.mmu.lock();
        let slot = mmu.find_ref(gfn)?;
        if write && slot.is_read_only() {
            return None;
        }
        let log = (write && slot.logs_dirty()).then(|| LogPlace::of(slot, gfn));
        let hva = slot.hva_of(gfn)?;
        Some((hva.wrapping_add(gpa.page_offset()), log))
    }

    /// Notes a write in the slot's log, where it has one.
    #[inline]
    fn note_write(&self, log: Option<LogPlace>) {
        if let Some(place) = log {
            self.mmu.lock().mark_dirty(place);
        }
    }

    /// The slot that holds a frame.
    #[inline]
    pub(crate) fn slot(&self, gfn: Gfn) -> Option<Slot> {
        self.mmu.lock().find(gfn)
    }

    /// Reads guest memory inside one page. `None` where no memory is there.
    ///
    /// # Errors
    ///
    /// `EFAULT` where the process has nothing at the slot's address.
    pub(crate) fn read(&self, gpa: Gpa, data: &mut [u8]) -> Result<Option<()>> {
        let Some((hva, _)) = self.backing(gpa, false) else {
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
        // Nearly all that comes here is for a device.
        if self.backing(gpa, true).is_none() {
            return Ok(None);
        }
        let _writing = self.writers.begin();
        let Some((hva, log)) = self.backing(gpa, true) else {
            return Ok(None);
        };
        debug_assert!(gpa.page_offset() + data.len() as u64 <= PAGE_SIZE);
        UserSlice::new(UserPtr::from_addr(hva.raw() as usize), data.len())
            .writer()
            .write_slice(data)?;
        self.note_write(log);
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
        self.exchange(gpa, |hva| memory::compare_exchange(hva, size, old, new))
    }

    /// Likewise 16 aligned bytes.
    ///
    /// # Errors
    ///
    /// As [`Self::read`]; `EOPNOTSUPP` where this CPU has no such instruction.
    pub(crate) fn compare_exchange_16(
        &self,
        gpa: Gpa,
        old: &[u64; 2],
        new: &[u64; 2],
    ) -> Result<Option<bool>> {
        self.exchange(gpa, |hva| memory::compare_exchange_16(hva, old, new))
    }

    #[inline]
    fn exchange(&self, gpa: Gpa, f: impl FnOnce(Hva) -> Result<bool>) -> Result<Option<bool>> {
        let _writing = self.writers.begin();
        let Some((hva, log)) = self.backing(gpa, true) else {
            return Ok(None);
        };
        let done = f(hva)?;
        if done {
            self.note_write(log);
        }
        Ok(Some(done))
    }
}
