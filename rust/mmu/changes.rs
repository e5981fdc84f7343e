// SPDX-License-Identifier: GPL-2.0

//! Changes of the owning process's page tables that are under way, and whether what was learnt of a
//! page before still holds.
//!
//! Who maps a page notes the [`Changes::sequence`] first, asks the process for the page without any
//! lock, and then, under the lock that guards this, asks whether it [`Changes::permit`]s the mapping.

use crate::x86::address::Hva;

/// The changes under way: how many, and the range that holds all of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Changes {
    count: u32,
    start: Hva,
    end: Hva,
    sequence: u64,
}

impl Changes {
    /// None.
    pub const fn new() -> Self {
        Self {
            count: 0,
            start: Hva::new(0),
            end: Hva::new(0),
            sequence: 0,
        }
    }

    /// The addresses `start..end` change from now on.
    #[inline]
    pub fn begin(&mut self, start: Hva, end: Hva) {
        if self.count == 0 {
            (self.start, self.end) = (start, end);
        } else {
            // What is between two changes waits with them: rare, and over soon.
            self.start = self.start.min(start);
            self.end = self.end.max(end);
        }
        self.count = self.count.saturating_add(1);
    }

    /// A change has ended.
    #[inline]
    pub fn end(&mut self) {
        self.count = self.count.saturating_sub(1);
        self.note();
    }

    /// Something else changed that mappings are made from, at once.
    #[inline]
    pub fn note(&mut self) {
        self.sequence = self.sequence.wrapping_add(1);
    }

    /// What to give to [`Self::permit`].
    #[inline]
    pub const fn sequence(&self) -> u64 {
        self.sequence
    }

    /// Whether a part of `bytes` from `start` on changes just now.
    #[inline]
    pub const fn touch(&self, start: Hva, bytes: u64) -> bool {
        self.count != 0
            && start.raw() < self.end.raw()
            && self.start.raw() < start.raw().saturating_add(bytes)
    }

    /// Whether what was learnt since `sequence` was noted of the `bytes` from `start` on holds still.
    #[inline]
    pub const fn permit(&self, sequence: u64, start: Hva, bytes: u64) -> bool {
        self.sequence == sequence && !self.touch(start, bytes)
    }
}

impl Default for Changes {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_is_inside_waits_and_what_is_outside_does_not() {
        let mut changes = Changes::new();
        let before = changes.sequence();
        assert!(changes.permit(before, Hva::new(0x5000), 0x1000));
        changes.begin(Hva::new(0x5000), Hva::new(0x7000));
        for (start, bytes, waits) in [
            (0x5000, 0x1000, true),
            (0x6000, 0x1000, true),
            (0x6fff, 1, true),
            (0x7000, 0x1000, false),
            (0x4000, 0x1000, false),
            // A large page that reaches in.
            (0, 0x20_0000, true),
            (u64::MAX - 0xfff, 0x1000, false),
        ] {
            let permitted = changes.permit(before, Hva::new(start), bytes);
            assert_eq!(permitted, !waits, "{start:#x}");
        }
        changes.end();
        // What was learnt before may be void, what is learnt now is not.
        assert!(!changes.permit(before, Hva::new(0x7000), 0x1000));
        assert!(changes.permit(changes.sequence(), Hva::new(0x5000), 0x1000));
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        /// Nothing is ever permitted that a change under way, or over since, may have made void.
        #[test]
        fn nothing_stale_is_permitted(
            steps in prop::collection::vec((0u64..16, 1u64..4, any::<bool>()), 1..40),
            (page, noted) in (0u64..16, 0usize..40),
        ) {
            let mut changes = Changes::new();
            let mut open: Vec<(u64, u64)> = Vec::new();
            let mut sequence = None;
            let mut ended_since = false;
            for (at, (start, pages, begins)) in steps.into_iter().enumerate() {
                if at == noted {
                    sequence = Some(changes.sequence());
                    ended_since = false;
                }
                if begins || open.is_empty() {
                    changes.begin(Hva::new(start << 12), Hva::new((start + pages) << 12));
                    open.push((start, start + pages));
                } else {
                    open.remove(0);
                    changes.end();
                    ended_since = true;
                }
                let hit = open.iter().any(|(from, to)| (*from..*to).contains(&page));
                let page = Hva::new(page << 12);
                if let Some(sequence) = sequence {
                    let permitted = changes.permit(sequence, page, 0x1000);
                    prop_assert!(!(permitted && (hit || ended_since)));
                    // With nothing under way nobody waits for ever.
                    prop_assert!(!open.is_empty() || changes.permit(changes.sequence(), page, 0x1000));
                }
            }
        }
    }
}
