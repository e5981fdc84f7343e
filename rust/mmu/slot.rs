// SPDX-License-Identifier: GPL-2.0

//! Memory slots: which guest frames are backed by which addresses of the owning process
//! (Documentation/virt/kvm/api.rst, KVM_SET_USER_MEMORY_REGION).
//!
//! The slots of one address space are a slice sorted by their first frame, without overlap; the
//! caller owns it.

use super::page_size::PageSize;
use crate::x86::address::{Gfn, Gpa, Hva, PAGE_SHIFT, PAGE_SIZE};

/// KVM_MEM_LOG_DIRTY_PAGES: writes are to be noted in the dirty log.
pub const LOG_DIRTY_PAGES: u32 = 1 << 0;
/// KVM_MEM_READONLY: writes go to userspace as MMIO.
pub const READONLY: u32 = 1 << 1;
/// The most frames a slot can have: dirty-log bitmaps are indexed by a 31-bit number.
pub const MAX_PAGES: u64 = (1 << 31) - 1;

/// A range of guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot {
    /// The number that userspace gave it, unique in its address space.
    pub id: u16,
    /// The address space: 0, or 1 for SMM where that is offered.
    pub address_space: u16,
    /// The first frame.
    pub base: Gfn,
    /// The number of frames, at least 1. `base + pages` does not overflow.
    pub pages: u64,
    /// The address in the owning process that backs the first frame; page-aligned.
    pub hva: Hva,
    /// [`LOG_DIRTY_PAGES`] and [`READONLY`].
    pub flags: u32,
}

impl Slot {
    /// The first frame past the slot.
    #[inline]
    pub const fn end(&self) -> Gfn {
        Gfn::new(self.base.raw().wrapping_add(self.pages))
    }

    /// Whether the slot holds a frame.
    #[inline]
    pub const fn contains(&self, gfn: Gfn) -> bool {
        gfn.raw().wrapping_sub(self.base.raw()) < self.pages
    }

    /// Whether the slot shares a frame with `pages` frames from `base`.
    #[inline]
    const fn overlaps(&self, base: Gfn, pages: u64) -> bool {
        let end = base.raw().saturating_add(pages);
        self.base.raw() < end && base.raw() < self.end().raw()
    }

    /// The address in the owning process that backs a frame of the slot.
    #[inline]
    pub const fn hva_of(&self, gfn: Gfn) -> Option<Hva> {
        if !self.contains(gfn) {
            return None;
        }
        let frames = gfn.raw().wrapping_sub(self.base.raw());
        Some(self.hva.wrapping_add(frames << PAGE_SHIFT))
    }

    /// The frames that a range of the process's addresses backs, to the page: first and end.
    #[inline]
    pub const fn frames_of(&self, start: Hva, end: Hva) -> Option<(Gfn, Gfn)> {
        let slot_start = self.hva.raw();
        let slot_end = slot_start.saturating_add(self.pages << PAGE_SHIFT);
        let mut from = start.page_start().raw();
        if from < slot_start {
            from = slot_start;
        }
        let mut to = end.raw().saturating_add(PAGE_SIZE - 1);
        if to > slot_end {
            to = slot_end;
        }
        let first = from.saturating_sub(slot_start) >> PAGE_SHIFT;
        let last = to.saturating_sub(slot_start) >> PAGE_SHIFT;
        if first >= last {
            return None;
        }
        let base = self.base.raw();
        Some((
            Gfn::new(base.wrapping_add(first)),
            Gfn::new(base.wrapping_add(last)),
        ))
    }

    /// Whether writes are noted in the dirty log.
    #[inline]
    pub const fn logs_dirty(&self) -> bool {
        self.flags & LOG_DIRTY_PAGES != 0
    }

    /// Whether the guest can't write.
    #[inline]
    pub const fn is_read_only(&self) -> bool {
        self.flags & READONLY != 0
    }

    /// The largest page that can map `gfn`, as far as the slot goes: it lies wholly inside, and
    /// guest and process addresses are congruent modulo its size. A slot with a dirty log has small
    /// pages only, so that the log is exact.
    #[inline]
    pub const fn largest_page(&self, gfn: Gfn) -> PageSize {
        if self.logs_dirty() {
            return PageSize::Size4K;
        }
        if self.fits(gfn, PageSize::Size1G) {
            PageSize::Size1G
        } else if self.fits(gfn, PageSize::Size2M) {
            PageSize::Size2M
        } else {
            PageSize::Size4K
        }
    }

    /// Whether a page of `size` around `gfn` lies inside the slot and is congruent.
    #[inline]
    pub const fn fits(&self, gfn: Gfn, size: PageSize) -> bool {
        let mask = size.frame_mask();
        let first = gfn.raw() & !mask;
        let last = gfn.raw() | mask;
        let is_congruent = (self.base.raw() ^ (self.hva.raw() >> PAGE_SHIFT)) & mask == 0;
        is_congruent && self.contains(Gfn::new(first)) && self.contains(Gfn::new(last))
    }
}

/// The slot that holds a frame.
#[inline]
pub fn find(slots: &[Slot], gfn: Gfn) -> Option<&Slot> {
    let after = slots.partition_point(|slot| slot.base <= gfn);
    slots
        .get(after.wrapping_sub(1))
        .filter(|slot| slot.contains(gfn))
}

/// The slot that holds a frame, looked for first where `hint` says. `hint` is then where it was
/// found; a stale one costs time only.
#[inline]
pub fn find_hinted<'a>(slots: &'a [Slot], gfn: Gfn, hint: &mut usize) -> Option<&'a Slot> {
    if let Some(slot) = slots.get(*hint) {
        if slot.contains(gfn) {
            return Some(slot);
        }
    }
    let at = slots
        .partition_point(|slot| slot.base <= gfn)
        .wrapping_sub(1);
    let slot = slots.get(at).filter(|slot| slot.contains(gfn))?;
    *hint = at;
    Some(slot)
}

/// A part of a slot that a range of the process's addresses backs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Backed {
    /// The first frame.
    pub first: Gfn,
    /// The first frame past it.
    pub end: Gfn,
    /// The first frame past the whole slot, from which to look for the next.
    pub slot_end: Gfn,
}

/// The first part of a slot, from the frame `from` on, that the process's addresses `start..end` back.
///
/// Whoever goes through all of them may let the slots change meanwhile: each that stays is met.
#[inline]
pub fn next_backed(slots: &[Slot], from: Gfn, start: Hva, end: Hva) -> Option<Backed> {
    let place = slots.partition_point(|slot| slot.end() <= from);
    slots.get(place..)?.iter().find_map(|slot| {
        let (first, last) = slot.frames_of(start, end)?;
        let first = first.max(from);
        (first < last).then_some(Backed {
            first,
            end: last,
            slot_end: slot.end(),
        })
    })
}

/// The place at which a slot with this first frame belongs.
#[inline]
pub fn insertion_point(slots: &[Slot], base: Gfn) -> usize {
    slots.partition_point(|slot| slot.base < base)
}

/// The place of the slot with this number.
#[inline]
pub fn position_of(slots: &[Slot], id: u16) -> Option<usize> {
    slots.iter().position(|slot| slot.id == id)
}

/// What KVM_SET_USER_MEMORY_REGION asks for, as it came from userspace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// The slot's number in the lower, the address space in the upper 16 bits.
    pub slot: u32,
    /// The flags.
    pub flags: u32,
    /// The guest-physical address.
    pub gpa: Gpa,
    /// The size in bytes; 0 deletes.
    pub bytes: u64,
    /// The address in the process.
    pub hva: Hva,
}

/// What a VM can have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// The number of slots of an address space: KVM_CAP_NR_MEMSLOTS.
    pub slots: u16,
    /// The number of address spaces.
    pub address_spaces: u16,
    /// The flags that are offered.
    pub flags: u32,
    /// The first frame number past guest-physical memory.
    pub end_of_memory: Gfn,
}

/// A change that may be made. Places are indices into the slice that was checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// A new slot.
    Create(Slot),
    /// The slot at this place goes.
    Delete(usize),
    /// The slot at this place goes to another guest-physical address; its flags may change too.
    Move(usize, Slot),
    /// The slot at this place has other flags.
    Flags(usize, Slot),
    /// Nothing changes.
    Nothing,
}

/// Why a change may not be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SlotError {
    /// EINVAL: an address or size is no multiple of 4 KiB, wraps or goes past the end of memory, a
    /// flag or number is out of range, a slot to be deleted is missing, or a live slot was to have
    /// another size, process address or READONLY.
    Invalid,
    /// EEXIST: the range overlaps another slot.
    Overlap,
}

/// The address space that a request is about, for choosing the slice that goes to
/// [`check_change`].
#[inline]
pub const fn address_space_of(request: &Request) -> u16 {
    (request.slot >> 16) as u16
}

/// Checks the parts of a request that stand by themselves. Whether the process address is one of
/// the user's is the caller's to check.
fn check_request(request: &Request, limits: &Limits) -> Result<(), SlotError> {
    let unaligned = request.bytes | request.gpa.raw() | request.hva.raw();
    let id = request.slot & 0xffff;
    let legal = request.flags & !limits.flags == 0
        && unaligned & (PAGE_SIZE - 1) == 0
        && address_space_of(request) < limits.address_spaces
        && id < u32::from(limits.slots)
        && request.gpa.checked_add(request.bytes).is_some()
        && request.hva.checked_add(request.bytes).is_some()
        && request.bytes >> PAGE_SHIFT <= MAX_PAGES;
    if legal {
        Ok(())
    } else {
        Err(SlotError::Invalid)
    }
}

/// Says what a request comes to, given the slots of its address space.
pub fn check_change(
    slots: &[Slot],
    request: &Request,
    limits: &Limits,
) -> Result<Change, SlotError> {
    check_request(request, limits)?;
    let id = (request.slot & 0xffff) as u16;
    let place = position_of(slots, id);
    let old = place.and_then(|at| slots.get(at));
    if request.bytes == 0 {
        return place.map(Change::Delete).ok_or(SlotError::Invalid);
    }
    let new = Slot {
        id,
        address_space: address_space_of(request),
        base: request.gpa.frame(),
        pages: request.bytes >> PAGE_SHIFT,
        hva: request.hva,
        flags: request.flags,
    };
    let change = match (place, old) {
        (Some(at), Some(old)) => {
            let is_other = new.hva != old.hva
                || new.pages != old.pages
                || (new.flags ^ old.flags) & READONLY != 0;
            if is_other {
                return Err(SlotError::Invalid);
            }
            if new.base != old.base {
                Change::Move(at, new)
            } else if new.flags != old.flags {
                return Ok(Change::Flags(at, new));
            } else {
                return Ok(Change::Nothing);
            }
        }
        _ => Change::Create(new),
    };
    let overlaps = |other: &Slot| other.id != id && other.overlaps(new.base, new.pages);
    if slots.iter().any(overlaps) {
        return Err(SlotError::Overlap);
    }
    if new.end() > limits.end_of_memory {
        return Err(SlotError::Invalid);
    }
    Ok(change)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const LIMITS: Limits = Limits {
        slots: 509,
        address_spaces: 1,
        flags: LOG_DIRTY_PAGES | READONLY,
        end_of_memory: Gfn::new(1 << 27),
    };

    fn slot(id: u16, base: u64, pages: u64) -> Slot {
        Slot {
            id,
            address_space: 0,
            base: Gfn::new(base),
            pages,
            hva: Hva::new(0x7000_0000_0000 + (base << 12)),
            flags: 0,
        }
    }

    fn request(slot: &Slot) -> Request {
        Request {
            slot: u32::from(slot.id),
            flags: slot.flags,
            gpa: slot.base.address(),
            bytes: slot.pages << 12,
            hva: slot.hva,
        }
    }

    #[test]
    fn each_kind_of_change() {
        let slots = [slot(3, 0, 16), slot(1, 0x100, 16)];
        let check = |request: &Request| check_change(&slots, request, &LIMITS);
        let new = slot(2, 16, 1);
        assert_eq!(check(&request(&new)), Ok(Change::Create(new)));
        let mut gone = request(&slots[1]);
        gone.bytes = 0;
        assert_eq!(check(&gone), Ok(Change::Delete(1)));
        gone.slot = 7;
        assert_eq!(check(&gone), Err(SlotError::Invalid));
        let mut moved = slots[0];
        moved.base = Gfn::new(8);
        assert_eq!(check(&request(&moved)), Ok(Change::Move(0, moved)));
        let mut logged = slots[0];
        logged.flags = LOG_DIRTY_PAGES;
        assert_eq!(check(&request(&logged)), Ok(Change::Flags(0, logged)));
        assert_eq!(check(&request(&slots[0])), Ok(Change::Nothing));
    }

    #[test]
    fn what_a_live_slot_keeps() {
        let slots = [slot(3, 0, 16)];
        let check = |slot: Slot| check_change(&slots, &request(&slot), &LIMITS);
        let mut other = slots[0];
        other.pages = 17;
        assert_eq!(check(other), Err(SlotError::Invalid));
        other = slots[0];
        other.hva = Hva::new(0x1000);
        assert_eq!(check(other), Err(SlotError::Invalid));
        other = slots[0];
        other.flags = READONLY;
        assert_eq!(check(other), Err(SlotError::Invalid));
    }

    #[test]
    fn wrong_requests() {
        let good = request(&slot(0, 16, 16));
        let fails = |edit: &dyn Fn(&mut Request)| {
            let mut bad = good;
            edit(&mut bad);
            assert_eq!(
                check_change(&[], &bad, &LIMITS),
                Err(SlotError::Invalid),
                "{bad:?}"
            );
        };
        assert!(check_change(&[], &good, &LIMITS).is_ok());
        fails(&|r| r.gpa = Gpa::new(0x10_0800));
        fails(&|r| r.hva = Hva::new(0x10_0001));
        fails(&|r| r.bytes = 0x800);
        fails(&|r| r.flags = 4);
        fails(&|r| r.slot = 509);
        fails(&|r| r.slot = 1 << 16);
        fails(&|r| r.gpa = Gpa::new(0xffff_ffff_ffff_f000));
        fails(&|r| r.hva = Hva::new(0xffff_ffff_ffff_f000));
        fails(&|r| r.bytes = (MAX_PAGES + 1) << 12);
        fails(&|r| r.gpa = Gpa::new((1 << 39) - 0x1000));
    }

    #[test]
    fn overlap_is_told_at_its_edges() {
        let slots = [slot(1, 0x10, 0x10), slot(2, 0x30, 0x10)];
        let check = |base, pages| check_change(&slots, &request(&slot(5, base, pages)), &LIMITS);
        assert!(check(0x20, 0x10).is_ok());
        assert_eq!(check(0x20, 0x11), Err(SlotError::Overlap));
        assert_eq!(check(0x1f, 0x1), Err(SlotError::Overlap));
        assert_eq!(check(0x0, 0x100), Err(SlotError::Overlap));
        assert!(check(0x0, 0x10).is_ok());
    }

    #[test]
    fn page_sizes_follow_congruence_and_the_edges() {
        let mut slot = slot(0, 0x100, 0x800);
        assert_eq!(slot.largest_page(Gfn::new(0x1ff)), PageSize::Size4K);
        assert_eq!(slot.largest_page(Gfn::new(0x200)), PageSize::Size2M);
        assert_eq!(slot.largest_page(Gfn::new(0x7ff)), PageSize::Size2M);
        assert_eq!(slot.largest_page(Gfn::new(0x800)), PageSize::Size4K);
        slot.hva = Hva::new(slot.hva.raw() + 0x1000);
        assert_eq!(slot.largest_page(Gfn::new(0x200)), PageSize::Size4K);
        slot.hva = Hva::new(slot.hva.raw() + 0x1f_f000);
        assert_eq!(slot.largest_page(Gfn::new(0x200)), PageSize::Size2M);
        slot.flags = LOG_DIRTY_PAGES;
        assert_eq!(slot.largest_page(Gfn::new(0x200)), PageSize::Size4K);
        let mut giant = slot;
        giant.flags = 0;
        giant.base = Gfn::new(0x4_0000);
        giant.pages = 0x4_0000;
        giant.hva = Hva::new(0x7000_4000_0000);
        assert_eq!(giant.largest_page(Gfn::new(0x5_1234)), PageSize::Size1G);
    }

    #[test]
    fn frames_behind_addresses() {
        let slot = slot(0, 0x100, 0x10);
        let at = |offset: u64| Hva::new(slot.hva.raw().wrapping_add(offset));
        let frames = |from, to| {
            slot.frames_of(at(from), at(to))
                .map(|(first, end)| (first.raw(), end.raw()))
        };
        assert_eq!(frames(0, 0x1_0000), Some((0x100, 0x110)));
        // Single bytes, the last of one page and the first of the next.
        assert_eq!(frames(0xfff, 0x1001), Some((0x100, 0x102)));
        assert_eq!(frames(0x1000, 0x1001), Some((0x101, 0x102)));
        assert_eq!(frames(0xf000, 0x10_0000), Some((0x10f, 0x110)));
        assert_eq!(frames(0x1_0000, 0x10_0000), None);
        assert_eq!(frames(0x1000, 0x1000), None);
        assert_eq!(slot.frames_of(Hva::new(0), at(0)), None);
        assert_eq!(
            slot.frames_of(Hva::new(0), Hva::new(u64::MAX)),
            Some((slot.base, slot.end()))
        );
        assert_eq!(slot.frames_of(at(0x2000), at(0x1000)), None);
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        /// Going through the parts finds each frame that the addresses back, once, in order.
        #[test]
        fn backed_parts_are_all_found(
            places in prop::collection::btree_map(0u64..40, (1u64..4, 0u64..20), 0..8),
            (start, pages) in (0u64..24, 0u64..24),
        ) {
            let mut slots: Vec<Slot> = Vec::new();
            for (id, (base, (pages, hva))) in (0..).zip(places) {
                if slots.last().is_some_and(|last| last.end().raw() > base) {
                    continue;
                }
                slots.push(Slot { hva: Hva::new(hva << 12), ..slot(id, base, pages) });
            }
            let range = (start << 12, (start + pages) << 12);
            let expected: Vec<u64> = slots
                .iter()
                .flat_map(|slot| (slot.base.raw()..slot.end().raw()).map(Gfn::new))
                .filter(|gfn| {
                    let hva = find(&slots, *gfn).unwrap().hva_of(*gfn).unwrap().raw();
                    (range.0..range.1).contains(&hva)
                })
                .map(Gfn::raw)
                .collect();
            let mut found = Vec::new();
            let mut from = Gfn::new(0);
            while let Some(part) =
                next_backed(&slots, from, Hva::new(range.0), Hva::new(range.1))
            {
                // A frame at a time, as where the lock is given up after each.
                found.push(part.first.raw());
                from = Gfn::new(part.first.raw() + 1);
            }
            prop_assert_eq!(&found, &expected);
            let mut whole = Vec::new();
            from = Gfn::new(0);
            while let Some(part) =
                next_backed(&slots, from, Hva::new(range.0), Hva::new(range.1))
            {
                whole.extend(part.first.raw()..part.end.raw());
                from = part.slot_end;
            }
            prop_assert_eq!(whole, expected);
        }
    }

    fn requests() -> impl Strategy<Value = Request> {
        let size = prop_oneof![1 => Just(0u64), 4 => 1u64..6];
        (0u32..4, 0u64..12, size, 0u64..3, 0u32..4).prop_map(|(slot, gfn, pages, hva, flags)| {
            Request {
                slot,
                flags,
                gpa: Gpa::new(gfn << 12),
                bytes: pages << 12,
                hva: Hva::new(hva << 12),
            }
        })
    }

    /// What KVM's documentation says of a request, on an array of slots by number.
    fn told(slots: &[Option<Slot>; 4], request: &Request) -> Result<Option<Slot>, SlotError> {
        let old = slots[request.slot as usize];
        if request.bytes == 0 {
            return old.map(|_| None).ok_or(SlotError::Invalid);
        }
        let new = Slot {
            id: request.slot as u16,
            address_space: 0,
            base: request.gpa.frame(),
            pages: request.bytes >> 12,
            hva: request.hva,
            flags: request.flags,
        };
        if let Some(old) = old {
            let kept = |slot: Slot| (slot.pages, slot.hva, slot.flags & READONLY);
            if kept(old) != kept(new) {
                return Err(SlotError::Invalid);
            }
        }
        let frames = |slot: &Slot| slot.base.raw()..slot.base.raw() + slot.pages;
        let others = slots.iter().flatten().filter(|slot| slot.id != new.id);
        for other in others {
            if frames(other).any(|gfn| frames(&new).contains(&gfn)) {
                return Err(SlotError::Overlap);
            }
        }
        Ok(Some(new))
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn agrees_with_an_array(requests in prop::collection::vec(requests(), 1..30)) {
            let mut by_number = [None; 4];
            let mut sorted: Vec<Slot> = Vec::new();
            let mut hint = 0;
            for request in &requests {
                let change = check_change(&sorted, request, &LIMITS);
                let expected = told(&by_number, request);
                prop_assert_eq!(change.err(), expected.err(), "{:?}", request);
                let Ok(change) = change else { continue };
                by_number[request.slot as usize] = expected.unwrap();
                match change {
                    Change::Create(new) => sorted.insert(insertion_point(&sorted, new.base), new),
                    Change::Delete(at) => {
                        sorted.remove(at);
                    }
                    Change::Move(at, new) => {
                        sorted.remove(at);
                        sorted.insert(insertion_point(&sorted, new.base), new);
                    }
                    Change::Flags(at, new) => sorted[at] = new,
                    Change::Nothing => {}
                }
                for gfn in (0..20).map(Gfn::new) {
                    let holder = by_number.iter().flatten().find(|slot| slot.contains(gfn));
                    prop_assert_eq!(find(&sorted, gfn), holder);
                    prop_assert_eq!(find_hinted(&sorted, gfn, &mut hint), holder);
                }
            }
        }
    }
}
