// SPDX-License-Identifier: GPL-2.0

//! The dirty log's bitmap: one bit for each frame of a slot, the first in bit 0 of the first word
//! (Documentation/virt/kvm/api.rst, KVM_GET_DIRTY_LOG).

/// The frames of one word.
pub const FRAMES_PER_WORD: u64 = 64;

/// The number of words for so many frames.
#[inline]
pub const fn words_for(frames: u64) -> u64 {
    frames.div_ceil(FRAMES_PER_WORD)
}

/// Notes that a frame, numbered from the slot's first, was written to. One past the slot is ignored.
#[inline]
pub fn mark(words: &mut [u64], place: u64) {
    let word = usize::try_from(place / FRAMES_PER_WORD).unwrap_or(usize::MAX);
    if let Some(word) = words.get_mut(word) {
        *word |= 1 << (place % FRAMES_PER_WORD);
    }
}

/// Moves words from `at` on into `taken` and leaves zeroes; how many there were.
pub fn take(words: &mut [u64], at: usize, taken: &mut [u64]) -> usize {
    let mut count = 0usize;
    for (word, to) in words.iter_mut().skip(at).zip(taken) {
        *to = core::mem::take(word);
        count = count.wrapping_add(1);
    }
    count
}

/// Puts words back that could not be handed on, beside what was noted meanwhile.
pub fn put_back(words: &mut [u64], at: usize, taken: &[u64]) {
    for (word, from) in words.iter_mut().skip(at).zip(taken) {
        *word |= *from;
    }
}

/// The frames of a word that are noted, as far as they lie between the first and the last: first, and
/// the one past the last.
#[inline]
pub const fn span(word: u64) -> Option<(u64, u64)> {
    if word == 0 {
        return None;
    }
    let first = word.trailing_zeros() as u64;
    let end = FRAMES_PER_WORD.wrapping_sub(word.leading_zeros() as u64);
    Some((first, end))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    #[test]
    fn a_word_for_each_64_frames() {
        let words = [0, 1, 64, 65, 128, (1 << 31) - 1].map(words_for);
        assert_eq!(words, [0, 1, 1, 2, 2, 1 << 25]);
    }

    #[test]
    fn spans() {
        assert_eq!(span(0), None);
        assert_eq!(span(1), Some((0, 1)));
        assert_eq!(span(1 << 63), Some((63, 64)));
        assert_eq!(span(0x1010), Some((4, 13)));
        assert_eq!(span(u64::MAX), Some((0, 64)));
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        /// Each mark is found once, whether it was handed on or put back in between.
        #[test]
        fn no_mark_is_lost(
            rounds in prop::collection::vec((prop::collection::vec(0u64..300, 0..20), any::<bool>()), 1..6),
            chunk in 1usize..5,
        ) {
            let mut words = [0u64; 4];
            let mut expected = BTreeSet::new();
            for (marks, fails) in rounds {
                for place in marks {
                    mark(&mut words, place);
                    if place < 256 {
                        expected.insert(place);
                    }
                }
                let mut at = 0;
                let mut found = BTreeSet::new();
                loop {
                    let mut taken = vec![0; chunk];
                    let count = take(&mut words, at, &mut taken);
                    if count == 0 {
                        break;
                    }
                    if fails {
                        put_back(&mut words, at, &taken[..count]);
                    }
                    for (place, word) in taken[..count].iter().enumerate() {
                        let base = 64 * (at + place) as u64;
                        let bits = (0..64).filter(|bit| (word >> bit) & 1 == 1);
                        found.extend(bits.map(|bit| base + bit));
                        if let Some((first, end)) = span(*word) {
                            prop_assert!((word >> first) & 1 == 1 && (word >> (end - 1)) & 1 == 1);
                            prop_assert!((0..64).all(|bit| (word >> bit) & 1 == 0 || (first..end).contains(&bit)));
                        }
                    }
                    at += count;
                }
                prop_assert_eq!(&found, &expected);
                if !fails {
                    expected.clear();
                }
            }
        }
    }
}
