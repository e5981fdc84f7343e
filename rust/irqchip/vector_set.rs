// SPDX-License-Identifier: GPL-2.0

//! A set of interrupt vectors, as the IRR, ISR and TMR are (SDM vol. 3, 12.8.4).

use crate::x86::vector::Vector;

/// A set of the vectors 0 to 255: vector `v` is bit `v % 64` of word `v / 64`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(transparent)]
pub struct VectorSet([u64; 4]);

impl VectorSet {
    /// The set without a vector.
    pub const EMPTY: Self = Self([0; 4]);

    /// The set with the given words.
    #[inline]
    pub const fn from_words(words: [u64; 4]) -> Self {
        Self(words)
    }

    /// The set's words.
    #[inline]
    pub const fn words(&self) -> &[u64; 4] {
        &self.0
    }

    /// Whether no vector is in the set.
    #[inline]
    pub const fn is_empty(&self) -> bool {
        let [a, b, c, d] = self.0;
        a | b | c | d == 0
    }

    /// Whether `vector` is in the set.
    #[inline]
    pub fn contains(&self, vector: Vector) -> bool {
        self.0
            .get(word_of(vector))
            .is_some_and(|word| word & bit_of(vector) != 0)
    }

    /// Adds `vector`.
    #[inline]
    pub fn insert(&mut self, vector: Vector) {
        if let Some(word) = self.0.get_mut(word_of(vector)) {
            *word |= bit_of(vector);
        }
    }

    /// Takes `vector` out.
    #[inline]
    pub fn remove(&mut self, vector: Vector) {
        if let Some(word) = self.0.get_mut(word_of(vector)) {
            *word &= !bit_of(vector);
        }
    }

    /// Adds all of `other`.
    #[inline]
    pub fn insert_all(&mut self, other: &Self) {
        for (word, more) in self.0.iter_mut().zip(other.0) {
            *word |= more;
        }
    }

    /// Takes all of `other` out.
    #[inline]
    pub fn remove_all(&mut self, other: &Self) {
        for (word, less) in self.0.iter_mut().zip(other.0) {
            *word &= !less;
        }
    }

    /// The highest vector in the set, which is the one of highest priority.
    #[inline]
    pub const fn highest(&self) -> Option<Vector> {
        let [a, b, c, d] = self.0;
        let (word, first) = if d != 0 {
            (d, 192u8)
        } else if c != 0 {
            (c, 128)
        } else if b != 0 {
            (b, 64)
        } else if a != 0 {
            (a, 0)
        } else {
            return None;
        };
        // `ilog2` of a word that is not 0 is at most 63.
        Some(Vector(first | (word.ilog2() & 63) as u8))
    }

    /// The 32 vectors from `32 * index`, as a local APIC's register holds them; 0 beyond the 8th.
    #[inline]
    pub fn register(&self, index: u8) -> u32 {
        let word = self.0.get(usize::from(index >> 1)).copied().unwrap_or(0);
        if index & 1 == 0 {
            super::low_half(word)
        } else {
            super::high_half(word)
        }
    }

    /// Sets the 32 vectors from `32 * index`; nothing beyond the 8th register.
    #[inline]
    pub fn set_register(&mut self, index: u8, value: u32) {
        if let Some(word) = self.0.get_mut(usize::from(index >> 1)) {
            *word = if index & 1 == 0 {
                (*word & 0xffff_ffff_0000_0000) | u64::from(value)
            } else {
                (*word & 0xffff_ffff) | (u64::from(value) << 32)
            };
        }
    }
}

#[inline]
fn word_of(vector: Vector) -> usize {
    usize::from(vector.0 >> 6)
}

#[inline]
const fn bit_of(vector: Vector) -> u64 {
    1u64.wrapping_shl((vector.0 & 63) as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn highest_is_the_last_inserted_in_ascending_order() {
        let mut set = VectorSet::EMPTY;
        assert_eq!(set.highest(), None);
        for number in 0..=255 {
            set.insert(Vector(number));
            assert_eq!(set.highest(), Some(Vector(number)));
            assert!(set.contains(Vector(number)));
        }
        for number in (1..=255).rev() {
            set.remove(Vector(number));
            assert_eq!(set.highest(), Some(Vector(number - 1)));
        }
    }

    #[test]
    fn registers_are_32_vectors_each() {
        let mut set = VectorSet::EMPTY;
        set.insert(Vector(31));
        set.insert(Vector(32));
        set.insert(Vector(255));
        assert_eq!(set.register(0), 1 << 31);
        assert_eq!(set.register(1), 1);
        assert_eq!(set.register(7), 1 << 31);
        assert_eq!(set.register(8), 0);
        let mut copy = VectorSet::EMPTY;
        for index in 0..8 {
            copy.set_register(index, set.register(index));
        }
        assert_eq!(copy, set);
    }
}
