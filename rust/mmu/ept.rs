// SPDX-License-Identifier: GPL-2.0

//! Extended page tables: guest-physical to host-physical (SDM vol. 3, 30.3).
//!
//! The tables have four levels and leaves of 4 KiB, 2 MiB and 1 GiB. Where a table lives and how it
//! is reached is the implementor's of [`TableMemory`]; here is what goes into it. All that changes
//! tables takes the memory by `&mut`, so that writers exclude each other; the CPU, which walks the
//! tables and sets accessed and dirty flags meanwhile, is met with single writes of whole entries.

mod entry;

pub use entry::{CachePolicy, Entry, MemoryType, Permissions};

use super::page_size::{PageSize, INDEX_BITS};
use crate::x86::address::{Gfn, Gpa, Hpa, Pfn, PAGE_SHIFT};

/// The number of entries of a table.
pub const TABLE_ENTRIES: usize = 512;
/// The number of levels.
const LEVELS: u32 = 4;
/// The first frame number past what four levels reach: 2^48 bytes.
pub const GFN_LIMIT: u64 = 1 << (LEVELS * INDEX_BITS);

/// Where the tables live. A table is a page of 512 entries, named by its host-physical address.
pub trait TableMemory {
    /// Reads an entry. `index` is below [`TABLE_ENTRIES`]. One load: the CPU may write at the same
    /// time.
    fn read(&self, table: Hpa, index: usize) -> u64;

    /// Writes an entry in one store.
    fn write(&mut self, table: Hpa, index: usize, entry: u64);

    /// Makes a table of zeroes, or `None` when the stock that the caller filled has run out.
    fn allocate(&mut self) -> Option<Hpa>;

    /// Takes a table out of use. A CPU may still walk it until the flush that the operation asks
    /// for, so it must neither be given out again nor be returned to the host before that.
    fn free(&mut self, table: Hpa);

    /// Writes an entry and gives what stood there. Atomic where the CPU sets accessed or dirty
    /// flags that must not be lost.
    #[inline]
    fn exchange(&mut self, table: Hpa, index: usize, entry: u64) -> u64 {
        let old = self.read(table, index);
        self.write(table, index, entry);
        old
    }

    /// Clears bits of an entry and gives what stood there; atomic as [`Self::exchange`] is.
    #[inline]
    fn clear_bits(&mut self, table: Hpa, index: usize, bits: u64) -> u64 {
        let old = self.read(table, index);
        self.write(table, index, old & !bits);
        old
    }
}

/// What [`Ept::map`] did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MapOutcome {
    /// Whether CPUs must drop what they cached of this EPT before the change counts as done: a
    /// right was taken away, another page put in place, a larger leaf dropped or a table freed.
    pub flush: bool,
    /// Whether any entry changed; if not, the mapping was there already.
    pub changed: bool,
}

/// Why [`Ept::map`] did nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MapError {
    /// [`TableMemory::allocate`] gave none: fill the stock and try again.
    OutOfTables,
    /// The guest frame lies past [`GFN_LIMIT`], or the host frame past 2^52 bytes.
    OutOfRange,
    /// A frame number is no multiple of the page's size.
    Misaligned,
}

/// What a guest-physical address translates to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Translation {
    /// The host-physical address, offset included.
    pub hpa: Hpa,
    /// What the guest may do.
    pub permissions: Permissions,
    /// The size of the leaf.
    pub size: PageSize,
}

/// How far [`Ept::unmap`] has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unmapped {
    /// Whether CPUs must drop what they cached of this EPT.
    pub flush: bool,
    /// Where to go on; `None` at the end of the range.
    pub next: Option<Gfn>,
}

/// A tree of tables.
#[derive(Debug)]
pub struct Ept {
    root: Hpa,
}

/// The index into the table of `level` (1 to 4) for a frame number.
#[inline]
const fn index(gfn: u64, level: u32) -> usize {
    let shift = INDEX_BITS.wrapping_mul(level.wrapping_sub(1));
    (gfn.wrapping_shr(shift) & 511) as usize
}

/// The number of frames that one entry of a table of `level` (1 to 4) covers.
#[inline]
const fn span(level: u32) -> u64 {
    1u64.wrapping_shl(INDEX_BITS.wrapping_mul(level.wrapping_sub(1)))
}

/// The first frame past the entry of a table of `level` that covers `gfn`.
#[inline]
const fn span_end(gfn: u64, level: u32) -> u64 {
    let span = span(level);
    (gfn & !span.wrapping_sub(1)).wrapping_add(span)
}

impl Ept {
    /// An empty tree, or `None` where no table was to be had.
    pub fn new<T: TableMemory>(memory: &mut T) -> Option<Self> {
        Some(Self {
            root: memory.allocate()?,
        })
    }

    /// The root table.
    #[inline]
    pub const fn root(&self) -> Hpa {
        self.root
    }

    /// The EPT pointer for the VMCS: write-back, four levels (SDM vol. 3, table 26-9).
    /// `accessed_dirty` turns the accessed and dirty flags on; it needs bit 21 of
    /// IA32_VMX_EPT_VPID_CAP.
    #[inline]
    pub const fn eptp(&self, accessed_dirty: bool) -> u64 {
        let flags = if accessed_dirty { 1 << 6 } else { 0 };
        self.root.raw() | MemoryType::WriteBack as u64 | (3 << 3) | flags
    }

    /// Maps a page, and whatever stood in its place is gone afterwards: a leaf of the same size is
    /// replaced, a table of smaller pages freed, and a larger leaf that covers it is dropped whole,
    /// so that its other parts fault again.
    ///
    /// On an error nothing has changed. A tree that other CPUs walk changes by a single write, with
    /// all new tables below it complete.
    pub fn map<T: TableMemory>(
        &self,
        memory: &mut T,
        gfn: Gfn,
        pfn: Pfn,
        size: PageSize,
        permissions: Permissions,
        cache: CachePolicy,
    ) -> Result<MapOutcome, MapError> {
        if gfn.raw() >= GFN_LIMIT || pfn.raw() > Entry::ADDRESS >> PAGE_SHIFT {
            return Err(MapError::OutOfRange);
        }
        if (gfn.raw() | pfn.raw()) & size.frame_mask() != 0 {
            return Err(MapError::Misaligned);
        }
        let leaf = Entry::leaf(pfn, size, permissions, cache);
        let target = size.level();
        let mut table = self.root;
        let mut level = LEVELS;
        while level > target {
            let at = index(gfn.raw(), level);
            let old = Entry(memory.read(table, at));
            if !old.is_present() || old.is_leaf(level) {
                let branch = Self::grow(memory, gfn, target, level, leaf)?;
                memory.write(table, at, Entry::to_table(branch).0);
                return Ok(MapOutcome {
                    flush: old.is_present(),
                    changed: true,
                });
            }
            table = old.address();
            level = level.wrapping_sub(1);
        }
        Ok(Self::put_leaf(
            memory,
            table,
            index(gfn.raw(), target),
            target,
            leaf,
        ))
    }

    /// Makes the tables from below `level` down to `target`, with `leaf` in the lowest, and gives
    /// the highest. Nothing refers to them yet.
    #[inline]
    fn grow<T: TableMemory>(
        memory: &mut T,
        gfn: Gfn,
        target: u32,
        level: u32,
        leaf: Entry,
    ) -> Result<Hpa, MapError> {
        let mut entry = leaf;
        let mut top = None;
        let mut at_level = target;
        while at_level < level {
            let Some(table) = memory.allocate() else {
                if let Some(made) = top {
                    Self::free_tree(memory, made, at_level.wrapping_sub(1));
                }
                return Err(MapError::OutOfTables);
            };
            memory.write(table, index(gfn.raw(), at_level), entry.0);
            entry = Entry::to_table(table);
            top = Some(table);
            at_level = at_level.wrapping_add(1);
        }
        // `level` is above `target`, so at least one table was made.
        top.ok_or(MapError::OutOfTables)
    }

    /// Puts `leaf` into a table of `level`.
    #[inline]
    fn put_leaf<T: TableMemory>(
        memory: &mut T,
        table: Hpa,
        at: usize,
        level: u32,
        leaf: Entry,
    ) -> MapOutcome {
        let old = Entry(memory.read(table, at));
        if !old.is_present() {
            memory.write(table, at, leaf.0);
            return MapOutcome {
                flush: false,
                changed: true,
            };
        }
        if !old.is_leaf(level) {
            memory.write(table, at, leaf.0);
            Self::free_tree(memory, old.address(), level.wrapping_sub(1));
            return MapOutcome {
                flush: true,
                changed: true,
            };
        }
        let flags = Entry::ACCESSED | Entry::DIRTY;
        let changed = (old.0 ^ leaf.0) & !flags != 0;
        if changed || old.0 & flags != flags {
            memory.write(table, at, leaf.0 | (old.0 & flags));
        }
        MapOutcome {
            flush: !old.may_stay_cached(leaf),
            changed,
        }
    }

    /// Frees a table of `level` and all tables below it, which nothing refers to any more, and says
    /// how many tables and entries it took in hand.
    fn free_tree<T: TableMemory>(memory: &mut T, table: Hpa, level: u32) -> u32 {
        let mut steps = 1u32;
        // The lowest tables, nearly all there are, need no look inside.
        if level > 1 {
            steps = steps.saturating_add(1 << INDEX_BITS);
            for at in 0..TABLE_ENTRIES {
                let entry = Entry(memory.read(table, at));
                if entry.is_present() && !entry.is_leaf(level) {
                    let below = Self::free_tree(memory, entry.address(), level.wrapping_sub(1));
                    steps = steps.saturating_add(below);
                }
            }
        }
        memory.free(table);
        steps
    }

    /// Takes the frames from `first` to before `end` out of the tree, and tables that lie wholly
    /// inside, but for those of the third level, of which there are few. A larger leaf that is only
    /// touched is dropped whole.
    ///
    /// The work is bounded by the tables that are there, and what is done at once by `steps`: after
    /// about that many entries and tables the call returns and says where to go on. A step more may
    /// free the tables of one GiB.
    pub fn unmap<T: TableMemory>(
        &self,
        memory: &mut T,
        first: Gfn,
        end: Gfn,
        steps: u32,
    ) -> Unmapped {
        let end = end.raw().min(GFN_LIMIT);
        let mut gfn = first.raw();
        let mut flush = false;
        let mut done = 0u32;
        while gfn < end {
            if done >= steps {
                return Unmapped {
                    flush,
                    next: Some(Gfn::new(gfn)),
                };
            }
            done = done.saturating_add(1);
            let mut table = self.root;
            let mut level = LEVELS;
            loop {
                let at = index(gfn, level);
                let next = span_end(gfn, level);
                let entry = Entry(memory.read(table, at));
                if !entry.is_present() {
                    gfn = next;
                    break;
                }
                let is_leaf = entry.is_leaf(level);
                let is_covered =
                    level < LEVELS && gfn & span(level).wrapping_sub(1) == 0 && next <= end;
                if is_leaf || is_covered {
                    memory.write(table, at, 0);
                    if !is_leaf {
                        let below = Self::free_tree(memory, entry.address(), level.wrapping_sub(1));
                        done = done.saturating_add(below);
                    }
                    flush = true;
                    gfn = next;
                    break;
                }
                table = entry.address();
                level = level.wrapping_sub(1);
            }
        }
        Unmapped { flush, next: None }
    }

    /// Translates an address, or `None` where nothing is mapped.
    #[inline]
    pub fn walk<T: TableMemory>(&self, memory: &T, gpa: Gpa) -> Option<Translation> {
        let gfn = gpa.frame().raw();
        if gfn >= GFN_LIMIT {
            return None;
        }
        let mut table = self.root;
        let mut level = LEVELS;
        while level > 0 {
            let entry = Entry(memory.read(table, index(gfn, level)));
            if !entry.is_present() {
                return None;
            }
            if entry.is_leaf(level) {
                let size = PageSize::of_level(level)?;
                let offset = gpa.raw() & size.bytes().wrapping_sub(1);
                return Some(Translation {
                    hpa: entry.address().wrapping_add(offset),
                    permissions: entry.permissions(),
                    size,
                });
            }
            table = entry.address();
            level = level.wrapping_sub(1);
        }
        None
    }

    /// The largest page up to `size` that can map `gfn` without a table in its place being freed.
    #[inline]
    pub fn fitting<T: TableMemory>(&self, memory: &T, gfn: Gfn, size: PageSize) -> PageSize {
        let mut table = self.root;
        let mut level = LEVELS;
        while level > 1 {
            let entry = Entry(memory.read(table, index(gfn.raw(), level)));
            if !entry.is_present() || entry.is_leaf(level) {
                return PageSize::of_level(level).map_or(size, |largest| largest.min(size));
            }
            table = entry.address();
            level = level.wrapping_sub(1);
        }
        PageSize::Size4K
    }

    /// Calls `visit` with the place of each leaf that touches the frames from `first` to before
    /// `end`; it says whether to go on.
    #[inline]
    fn each_leaf<T: TableMemory>(
        &self,
        memory: &mut T,
        first: Gfn,
        end: Gfn,
        mut visit: impl FnMut(&mut T, Hpa, usize, Entry) -> bool,
    ) {
        let end = end.raw().min(GFN_LIMIT);
        let mut gfn = first.raw();
        while gfn < end {
            let mut table = self.root;
            let mut level = LEVELS;
            loop {
                let at = index(gfn, level);
                let entry = Entry(memory.read(table, at));
                let is_present = entry.is_present();
                if is_present && !entry.is_leaf(level) {
                    table = entry.address();
                    level = level.wrapping_sub(1);
                    continue;
                }
                if is_present && !visit(memory, table, at, entry) {
                    return;
                }
                gfn = span_end(gfn, level);
                // The rest of a lowest table is read without a new descent.
                if level > 1 || gfn >= end || index(gfn, 1) == 0 {
                    break;
                }
            }
        }
    }

    /// Takes the right to write away from every leaf that touches the frames from `first` to before
    /// `end`, for dirty logging. Says whether CPUs must drop what they cached.
    pub fn write_protect<T: TableMemory>(&self, memory: &mut T, first: Gfn, end: Gfn) -> bool {
        let mut flush = false;
        self.each_leaf(memory, first, end, |memory, table, at, entry| {
            if entry.permissions().can_write() {
                memory.clear_bits(table, at, Entry::WRITE);
                flush = true;
            }
            true
        });
        flush
    }

    /// Whether any leaf that touches the frames from `first` to before `end` has been used, the
    /// flags being left as they are. Takes the memory by `&mut` as the other walks do.
    pub fn is_accessed<T: TableMemory>(&self, memory: &mut T, first: Gfn, end: Gfn) -> bool {
        let mut accessed = false;
        self.each_leaf(memory, first, end, |_, _, _, entry| {
            accessed = entry.0 & Entry::ACCESSED != 0;
            !accessed
        });
        accessed
    }

    /// Clears the accessed flag of every leaf that touches the frames from `first` to before `end`
    /// and says whether one was set. A CPU that has the leaf cached sets the flag again only after
    /// a flush, which the caller may spare itself where the answer need not be exact.
    ///
    /// Means something only where the EPT pointer has the accessed and dirty flags on; elsewhere
    /// [`Self::unmap`] is the way to learn of later use.
    pub fn test_and_clear_accessed<T: TableMemory>(
        &self,
        memory: &mut T,
        first: Gfn,
        end: Gfn,
    ) -> bool {
        let mut accessed = false;
        self.each_leaf(memory, first, end, |memory, table, at, entry| {
            if entry.0 & Entry::ACCESSED != 0 {
                memory.clear_bits(table, at, Entry::ACCESSED);
                accessed = true;
            }
            true
        });
        accessed
    }

    /// Frees every table, all at once: [`Self::unmap`] goes first where there may be many. No CPU may
    /// use the tree any more.
    pub fn destroy<T: TableMemory>(self, memory: &mut T) {
        Self::free_tree(memory, self.root, LEVELS);
    }
}
