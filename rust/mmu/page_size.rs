// SPDX-License-Identifier: GPL-2.0

//! The sizes of pages that 4-level tables of 512 entries map.

use crate::x86::address::PAGE_SHIFT;

/// The number of index bits of each level of the tables.
pub(crate) const INDEX_BITS: u32 = 9;

/// The size of a mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum PageSize {
    /// 4 KiB: a leaf of level 1.
    Size4K = 1,
    /// 2 MiB: a leaf of level 2.
    Size2M = 2,
    /// 1 GiB: a leaf of level 3.
    Size1G = 3,
}

impl PageSize {
    /// The level of the table that holds leaves of this size, 1 to 3.
    #[inline]
    pub const fn level(self) -> u32 {
        self as u32
    }

    /// The size of the leaves of `level`, for levels 1 to 3.
    #[inline]
    pub const fn of_level(level: u32) -> Option<Self> {
        match level {
            1 => Some(Self::Size4K),
            2 => Some(Self::Size2M),
            3 => Some(Self::Size1G),
            _ => None,
        }
    }

    /// The size in frames of 4 KiB: 1, 512 or 262144.
    #[inline]
    pub const fn frames(self) -> u64 {
        match self {
            Self::Size4K => 1,
            Self::Size2M => 1 << INDEX_BITS,
            Self::Size1G => 1 << (2 * INDEX_BITS),
        }
    }

    /// The size in bytes.
    #[inline]
    pub const fn bytes(self) -> u64 {
        self.frames() << PAGE_SHIFT
    }

    /// The mask of the bits of a frame number inside the page.
    #[inline]
    pub const fn frame_mask(self) -> u64 {
        self.frames().wrapping_sub(1)
    }
}
