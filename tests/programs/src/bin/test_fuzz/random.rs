// SPDX-License-Identifier: GPL-2.0
//! Numbers at random, the same for the same seed.

/// A generator of such numbers (xorshift64*).
#[derive(Debug)]
pub(crate) struct Random(u64);

impl Random {
    /// One that begins at this seed.
    pub(crate) fn new(seed: u64) -> Self {
        // A seed of 0 would give nothing but 0, and near ones begin alike.
        let mut random = Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        for _ in 0..8 {
            random.next();
        }
        random
    }

    /// Any number.
    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// One below `end`, which is not 0.
    pub(crate) fn below(&mut self, end: u64) -> u64 {
        (self.next() >> 16) % end
    }

    /// True once in `times`.
    pub(crate) fn once_in(&mut self, times: u64) -> bool {
        self.below(times) == 0
    }

    /// One of these.
    pub(crate) fn of<T: Copy>(&mut self, all: &[T]) -> T {
        all[self.below(all.len() as u64) as usize]
    }

    /// A number such as programs give and bounds are about: small, a single bit, all ones, near a power of two, or any.
    pub(crate) fn word(&mut self) -> u64 {
        match self.below(8) {
            0 => 0,
            1 => self.below(16),
            2 => 1 << self.below(64),
            3 => (1_u64 << self.below(64)).wrapping_sub(1),
            4 => u64::MAX << self.below(64),
            5 => self.below(1 << 20) << 12,
            6 => self.next() & 0xffff_ffff,
            _ => self.next(),
        }
    }

    /// Changes some of the bytes.
    pub(crate) fn disturb(&mut self, bytes: &mut [u8]) {
        for _ in 0..=self.below(4) {
            let place = self.below(bytes.len() as u64) as usize;
            match self.below(3) {
                0 => bytes[place] ^= 1 << self.below(8),
                1 => bytes[place] = self.next() as u8,
                _ => {
                    let word = self.word().to_le_bytes();
                    let place = place & !7;
                    let end = bytes.len().min(place + word.len());
                    bytes[place..end].copy_from_slice(&word[..end - place]);
                }
            }
        }
    }

    /// The index of an MSR that may be there.
    pub(crate) fn msr(&mut self) -> u64 {
        match self.below(4) {
            0 => 0x800 + self.below(0x40),
            1 => 0xc000_0080 + self.below(0x90),
            2 => 0x200 + self.below(0x100),
            _ => self.below(0x500),
        }
    }
}
