// SPDX-License-Identifier: GPL-2.0

//! The dirty log's bitmap: one bit for each frame of a slot, the first in bit 0 of the first word
//! (Documentation/virt/kvm/api.rst, KVM_GET_DIRTY_LOG and KVM_CLEAR_DIRTY_LOG).

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

/// Copies words from `at` on to `copied`; how many there were.
pub fn copy(words: &[u64], at: usize, copied: &mut [u64]) -> usize {
    let mut count = 0usize;
    for (word, to) in words.iter().skip(at).zip(copied) {
        *to = *word;
        count = count.wrapping_add(1);
    }
    count
}

/// Removes those notes of the word `at` that `mask` has, and says which there were.
pub fn clear(words: &mut [u64], at: usize, mask: u64) -> u64 {
    let Some(word) = words.get_mut(at) else {
        return 0;
    };
    let cleared = *word & mask;
    *word &= !mask;
    cleared
}

/// Notes each of so many frames.
pub fn mark_all(words: &mut [u64], frames: u64) {
    let mut left = frames;
    for word in words {
        *word = match left {
            FRAMES_PER_WORD.. => u64::MAX,
            left => (1u64 << left).wrapping_sub(1),
        };
        left = left.saturating_sub(FRAMES_PER_WORD);
    }
}

/// Whether the notes of `count` frames from `first` on, in a slot of so many, can be cleared: whole words, or
/// up to the slot's end.
pub const fn is_part(first: u64, count: u64, frames: u64) -> bool {
    let Some(behind) = frames.checked_sub(first) else {
        return false;
    };
    first % FRAMES_PER_WORD == 0
        && count <= behind
        && (count == behind || count % FRAMES_PER_WORD == 0)
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

/// The first frames of a word that are noted and stand side by side: first, and the one past the last.
#[inline]
pub const fn run(word: u64) -> Option<(u64, u64)> {
    if word == 0 {
        return None;
    }
    let first = word.trailing_zeros();
    let length = word.wrapping_shr(first).trailing_ones();
    Some((first as u64, first.wrapping_add(length) as u64))
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

    #[test]
    fn runs() {
        assert_eq!(run(0), None);
        assert_eq!(run(1), Some((0, 1)));
        assert_eq!(run(1 << 63), Some((63, 64)));
        assert_eq!(run(0b1011_1000), Some((3, 6)));
        assert_eq!(run(u64::MAX), Some((0, 64)));
    }

    #[test]
    fn all_marked() {
        for (frames, expected) in [
            (0, [0, 0]),
            (5, [0b11111, 0]),
            (64, [u64::MAX, 0]),
            (65, [u64::MAX, 1]),
            (128, [u64::MAX; 2]),
        ] {
            let mut words = [7; 2];
            mark_all(&mut words, frames);
            assert_eq!(words, expected);
        }
    }

    #[test]
    fn parts() {
        for (first, count) in [
            (0, 0),
            (0, 64),
            (0, 130),
            (64, 64),
            (64, 66),
            (128, 2),
            (128, 0),
        ] {
            assert!(is_part(first, count, 130), "{first} {count}");
        }
        for (first, count) in [
            (0, 1),
            (0, 65),
            (0, 131),
            (0, 192),
            (1, 129),
            (64, 128),
            (130, 0),
            (192, 0),
            (u64::MAX, 1),
            (u64::MAX - 63, 64),
            (64, u64::MAX),
        ] {
            assert!(!is_part(first, count, 130), "{first} {count}");
        }
        assert!(is_part(128, 0, 128));
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        /// What is cleared was noted, and nothing else changes.
        #[test]
        fn cleared(old in any::<[u64; 3]>(), at in 0usize..4, mask: u64) {
            let mut words = old;
            let cleared = clear(&mut words, at, mask);
            let mut expected = old;
            if let Some(word) = expected.get_mut(at) {
                *word &= !mask;
            }
            prop_assert_eq!(words, expected);
            prop_assert_eq!(cleared, old.get(at).map_or(0, |word| word & mask));
            let mut copied = [0; 4];
            prop_assert_eq!(copy(&words, at, &mut copied), 3usize.saturating_sub(at));
            prop_assert!(copied.iter().zip(words.iter().skip(at)).all(|(copied, word)| copied == word));
        }

        /// The runs of a word are the word.
        #[test]
        fn a_word_of_runs(word: u64) {
            let mut left = word;
            let mut end = 0;
            while let Some((first, behind)) = run(left) {
                prop_assert!(first >= end && behind > first);
                prop_assert!((first..behind).all(|bit| (word >> bit) & 1 == 1));
                left &= u64::MAX.checked_shl(behind as u32).unwrap_or(0);
                end = behind;
            }
            prop_assert_eq!(left, 0);
        }

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
