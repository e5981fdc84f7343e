// SPDX-License-Identifier: GPL-2.0

//! Entries of extended page tables (SDM vol. 3, tables 30-1 to 30-7).

use crate::{
    mmu::page_size::PageSize,
    x86::address::{Hpa, Pfn},
};

/// What a guest may do to a page. Writable pages are always readable: the CPU takes a writable,
/// unreadable entry as a misconfiguration (SDM vol. 3, 30.3.3.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(transparent)]
pub struct Permissions(u8);

impl Permissions {
    /// Read.
    pub const READ: Self = Self(1);
    /// Read and write.
    pub const READ_WRITE: Self = Self(3);
    /// Read and execute.
    pub const READ_EXECUTE: Self = Self(5);
    /// Read, write and execute.
    pub const ALL: Self = Self(7);

    /// Read, and what is said.
    #[inline]
    pub const fn of(write: bool, execute: bool) -> Self {
        match (write, execute) {
            (false, false) => Self::READ,
            (true, false) => Self::READ_WRITE,
            (false, true) => Self::READ_EXECUTE,
            (true, true) => Self::ALL,
        }
    }

    /// Whether the guest may read.
    #[inline]
    pub const fn can_read(self) -> bool {
        self.0 & 1 != 0
    }

    /// Whether the guest may write.
    #[inline]
    pub const fn can_write(self) -> bool {
        self.0 & 2 != 0
    }

    /// Whether the guest may execute.
    #[inline]
    pub const fn can_execute(self) -> bool {
        self.0 & 4 != 0
    }
}

/// The memory types of a leaf, with the SDM's numbers (vol. 3, 30.3.7.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum MemoryType {
    /// UC.
    Uncacheable = 0,
    /// WC.
    WriteCombining = 1,
    /// WT.
    WriteThrough = 4,
    /// WP.
    WriteProtected = 5,
    /// WB.
    WriteBack = 6,
}

/// A leaf's memory type, and whether the guest's PAT has a say in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CachePolicy {
    /// The type in the entry.
    pub memory_type: MemoryType,
    /// Whether the entry's type stands alone and the guest's PAT is ignored.
    pub ignore_pat: bool,
}

impl CachePolicy {
    /// Ordinary memory: write-back, whatever the guest's PAT says.
    pub const MEMORY: Self = Self {
        memory_type: MemoryType::WriteBack,
        ignore_pat: true,
    };
}

/// An entry of a table (SDM vol. 3, tables 30-1 to 30-7).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(transparent)]
pub struct Entry(pub u64);

impl Entry {
    /// Readable, writable and executable: an entry with none of these is absent.
    pub(super) const PERMISSIONS: u64 = 7;
    /// Writable.
    pub(super) const WRITE: u64 = 1 << 1;
    /// The memory type's place in a leaf.
    pub(super) const TYPE_SHIFT: u32 = 3;
    /// In a leaf: the guest's PAT is ignored.
    pub(super) const IGNORE_PAT: u64 = 1 << 6;
    /// In tables of level 2 and 3: a leaf.
    pub(super) const LEAF: u64 = 1 << 7;
    /// The CPU has used the entry.
    pub(super) const ACCESSED: u64 = 1 << 8;
    /// In a leaf: the CPU has written to the page.
    pub(super) const DIRTY: u64 = 1 << 9;
    /// The address of a table or page.
    pub(super) const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

    /// An entry that refers to a table.
    #[inline]
    pub(super) const fn to_table(table: Hpa) -> Self {
        Self((table.raw() & Self::ADDRESS) | Self::PERMISSIONS)
    }

    /// A leaf. It is born accessed, and dirty where writable: that spares the CPU setting the flags
    /// on the first access, which is what the leaf is made for.
    #[inline]
    pub(super) const fn leaf(
        pfn: Pfn,
        size: PageSize,
        permissions: Permissions,
        cache: CachePolicy,
    ) -> Self {
        let mut raw = (pfn.address().raw() & Self::ADDRESS)
            | permissions.0 as u64
            | ((cache.memory_type as u64) << Self::TYPE_SHIFT)
            | Self::ACCESSED;
        if cache.ignore_pat {
            raw |= Self::IGNORE_PAT;
        }
        if permissions.can_write() {
            raw |= Self::DIRTY;
        }
        if !matches!(size, PageSize::Size4K) {
            raw |= Self::LEAF;
        }
        Self(raw)
    }

    /// Whether the entry refers to a table or page.
    #[inline]
    pub const fn is_present(self) -> bool {
        self.0 & Self::PERMISSIONS != 0
    }

    /// Whether the entry, which stands in a table of `level` and is present, maps a page.
    #[inline]
    pub(super) const fn is_leaf(self, level: u32) -> bool {
        level == 1 || self.0 & Self::LEAF != 0
    }

    /// The address of the table or page.
    #[inline]
    pub(super) const fn address(self) -> Hpa {
        Hpa::new(self.0 & Self::ADDRESS)
    }

    /// What the entry permits.
    #[inline]
    pub(super) const fn permissions(self) -> Permissions {
        Permissions((self.0 & Self::PERMISSIONS) as u8)
    }

    /// Whether a CPU that has cached `self` may go on using it after the change to `new`: the same
    /// page in the same way, with no right taken away.
    #[inline]
    pub(super) const fn may_stay_cached(self, new: Self) -> bool {
        let ignored = Self::PERMISSIONS | Self::ACCESSED | Self::DIRTY;
        let same_page = (self.0 ^ new.0) & !ignored == 0;
        same_page && self.0 & !new.0 & Self::PERMISSIONS == 0
    }
}
