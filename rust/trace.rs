// SPDX-License-Identifier: GPL-2.0

//! The ring of exit records between a virtual CPU's thread, which never waits, and who reads them.

use core::{
    ops::Deref,
    sync::atomic::{AtomicU32, AtomicU64, Ordering},
};

/// Words of a record.
pub const WORDS: usize = 6;

/// One exit, as userspace reads it (`struct rvisor_trace_record`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Record {
    /// The host's TSC at the exit.
    pub tsc: u64,
    /// TSC cycles until the guest was entered again, or its thread slept.
    pub handling: u64,
    /// The guest's RIP.
    pub rip: u64,
    /// The exit qualification.
    pub qualification: u64,
    /// The guest-physical address, an MSR's index or RAX.
    pub detail: u64,
    /// The exit reason with its flags.
    pub reason: u32,
}

impl Record {
    /// The record's words, with the number of those that were lost before it.
    fn words(&self, lost: u32) -> [u64; WORDS] {
        [
            self.tsc,
            self.handling,
            self.rip,
            self.qualification,
            self.detail,
            u64::from(self.reason) | (u64::from(lost) << 32),
        ]
    }
}

/// The place of one record.
#[derive(Debug, Default)]
pub struct Slot([AtomicU64; WORDS]);

/// A ring over the slots `S`. One thread at a time writes, and one reads.
#[derive(Debug)]
pub struct Ring<S> {
    slots: S,
    /// Records that were written and read since the beginning.
    written: AtomicU64,
    read: AtomicU64,
    /// Those that found no place since the last that did.
    lost: AtomicU32,
}

impl<S: Deref<Target = [Slot]>> Ring<S> {
    /// An empty ring.
    pub const fn new(slots: S) -> Self {
        Self {
            slots,
            written: AtomicU64::new(0),
            read: AtomicU64::new(0),
            lost: AtomicU32::new(0),
        }
    }

    fn slot(&self, number: u64) -> Option<&Slot> {
        let place = number.checked_rem(self.slots.len() as u64)?;
        self.slots.get(usize::try_from(place).ok()?)
    }

    /// The writer's: appends a record, or counts it as lost where there is no place.
    pub fn push(&self, record: &Record) {
        let written = self.written.load(Ordering::Relaxed);
        let waiting = written.wrapping_sub(self.read.load(Ordering::Acquire));
        let lost = self.lost.load(Ordering::Relaxed);
        let slot = self
            .slot(written)
            .filter(|_| waiting < self.slots.len() as u64);
        let Some(slot) = slot else {
            self.lost.store(lost.saturating_add(1), Ordering::Relaxed);
            return;
        };
        for (to, from) in slot.0.iter().zip(record.words(lost)) {
            to.store(from, Ordering::Relaxed);
        }
        self.lost.store(0, Ordering::Relaxed);
        self.written
            .store(written.wrapping_add(1), Ordering::Release);
    }

    /// Whether no record waits.
    pub fn is_empty(&self) -> bool {
        self.written.load(Ordering::Acquire) == self.read.load(Ordering::Relaxed)
    }

    /// The reader's: the first record, which stays.
    pub fn first(&self) -> Option<[u64; WORDS]> {
        if self.is_empty() {
            return None;
        }
        let slot = self.slot(self.read.load(Ordering::Relaxed))?;
        let mut words = [0; WORDS];
        for (to, from) in words.iter_mut().zip(&slot.0) {
            *to = from.load(Ordering::Relaxed);
        }
        Some(words)
    }

    /// The reader's: makes the place of the first record free.
    pub fn advance(&self) {
        if !self.is_empty() {
            let read = self.read.load(Ordering::Relaxed);
            self.read.store(read.wrapping_add(1), Ordering::Release);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ring(slots: usize) -> Ring<Vec<Slot>> {
        Ring::new((0..slots).map(|_| Slot::default()).collect())
    }

    fn record(number: u64) -> Record {
        Record {
            tsc: number,
            handling: number + 1,
            rip: number + 2,
            qualification: number + 3,
            detail: number + 4,
            reason: number as u32,
        }
    }

    #[test]
    fn in_order_and_round() {
        let ring = ring(3);
        for number in 0..20 {
            assert!(ring.is_empty() && ring.first().is_none());
            ring.advance();
            ring.push(&record(number));
            ring.push(&record(number + 100));
            assert_eq!(ring.first(), Some(record(number).words(0)));
            assert_eq!(ring.first(), Some(record(number).words(0)));
            ring.advance();
            assert_eq!(ring.first(), Some(record(number + 100).words(0)));
            ring.advance();
        }
    }

    #[test]
    fn losses_are_told() {
        let ring = ring(2);
        for number in 0..5 {
            ring.push(&record(number));
        }
        ring.advance();
        ring.push(&record(5));
        assert_eq!(ring.first(), Some(record(1).words(0)));
        ring.advance();
        assert_eq!(ring.first(), Some(record(5).words(3)));
        ring.push(&record(6));
        ring.advance();
        assert_eq!(ring.first(), Some(record(6).words(0)));
    }

    #[test]
    fn no_slots() {
        let ring = ring(0);
        ring.push(&record(1));
        assert!(ring.is_empty() && ring.first().is_none());
    }

    #[test]
    fn beside_its_reader() {
        const COUNT: u64 = 20_000;
        let ring = ring(16);
        let mut expected = 0;
        std::thread::scope(|scope| {
            let writer = scope.spawn(|| (0..COUNT).for_each(|number| ring.push(&record(number))));
            loop {
                let is_last = writer.is_finished();
                while let Some(words) = ring.first() {
                    let lost = (words[5] >> 32) as u32;
                    expected += u64::from(lost);
                    assert_eq!(words, record(expected).words(lost));
                    expected += 1;
                    ring.advance();
                }
                if is_last {
                    break;
                }
            }
        });
        let lost = ring.lost.load(Ordering::Relaxed);
        assert_eq!(expected + u64::from(lost), COUNT);
    }
}
