// SPDX-License-Identifier: GPL-2.0

//! The EPT against a model that knows leaves only, and its entries against the SDM's bits.

use super::ept::*;
use super::page_size::PageSize;
use super::test_tables::TestTables;
use crate::x86::address::{Gfn, Gpa, Pfn};
use proptest::prelude::*;
use std::collections::{BTreeMap, BTreeSet};

const SIZES: [PageSize; 3] = [PageSize::Size4K, PageSize::Size2M, PageSize::Size1G];
const RIGHTS: [Permissions; 4] = [
    Permissions::READ,
    Permissions::READ_WRITE,
    Permissions::READ_EXECUTE,
    Permissions::ALL,
];

/// Rights as the three bits of the SDM, told from the outside.
fn bits(permissions: Permissions) -> u8 {
    u8::from(permissions.can_read())
        | (u8::from(permissions.can_write()) << 1)
        | (u8::from(permissions.can_execute()) << 2)
}

#[derive(Clone, Debug)]
enum Op {
    Map {
        gfn: u64,
        pfn: u64,
        size: PageSize,
        permissions: Permissions,
        stock: usize,
    },
    Unmap(u64, u64, u32),
    WriteProtect(u64, u64),
    Age(u64, u64),
}

/// Frames close to the edges of tables of every level.
fn frame() -> impl Strategy<Value = u64> {
    let digit = || prop::sample::select(vec![0u64, 1, 2, 511]);
    (
        prop::sample::select(vec![0u64, 511]),
        digit(),
        digit(),
        digit(),
    )
        .prop_map(|(a, b, c, d)| (a << 27) | (b << 18) | (c << 9) | d)
}

fn range() -> impl Strategy<Value = (u64, u64)> {
    prop_oneof![
        (frame(), 1u64..1100).prop_map(|(first, pages)| (first, first + pages)),
        (frame(), frame()),
        (frame(), Just(u64::MAX)).prop_map(|(first, end)| (first, end)),
    ]
}

fn op() -> impl Strategy<Value = Op> {
    let map = (
        frame(),
        0u64..4,
        prop::sample::select(SIZES.to_vec()),
        prop::sample::select(RIGHTS.to_vec()),
        prop_oneof![4 => Just(8usize), 1 => 0usize..3],
    )
        .prop_map(|(gfn, page, size, permissions, stock)| Op::Map {
            gfn: gfn & !size.frame_mask(),
            pfn: (page + 1) * size.frames(),
            size,
            permissions,
            stock,
        });
    prop_oneof![
        6 => map,
        2 => (range(), prop_oneof![Just(1u32), 1u32..2000]).prop_map(|((a, b), steps)| Op::Unmap(a, b, steps)),
        1 => range().prop_map(|(a, b)| Op::WriteProtect(a, b)),
        1 => range().prop_map(|(a, b)| Op::Age(a, b)),
    ]
}

#[derive(Clone, Copy, Debug, PartialEq)]
struct Leaf {
    frames: u64,
    pfn: u64,
    rights: u8,
    accessed: bool,
}

/// Leaves by their first frame.
#[derive(Default)]
struct Model(BTreeMap<u64, Leaf>);

impl Model {
    fn touching(&self, first: u64, end: u64) -> Vec<u64> {
        let touches =
            |(&at, leaf): &(&u64, &Leaf)| first < end && at < end && first < at + leaf.frames;
        self.0.iter().filter(touches).map(|(&at, _)| at).collect()
    }

    fn translate(&self, gfn: u64) -> Option<(u64, u8, u64)> {
        let (at, leaf) = self.0.range(..=gfn).next_back()?;
        (gfn < at + leaf.frames).then(|| (leaf.pfn + (gfn - at), leaf.rights, leaf.frames))
    }
}

/// Every table that is reachable from the root; panics on a cycle or a table used twice.
fn reachable(memory: &TestTables, root: u64) -> BTreeSet<u64> {
    let mut seen = BTreeSet::new();
    let mut pending = vec![(root, 4)];
    while let Some((table, level)) = pending.pop() {
        assert!(seen.insert(table), "table {table:#x} is used twice");
        for &entry in memory.tables[&table].iter() {
            if level > 1 && entry & 7 != 0 && entry & 0x80 == 0 {
                pending.push((entry & 0x000f_ffff_ffff_f000, level - 1));
            }
        }
    }
    seen
}

fn apply(memory: &mut TestTables, ept: &Ept, model: &mut Model, op: &Op) {
    match *op {
        Op::Map {
            gfn,
            pfn,
            size,
            permissions,
            stock,
        } => {
            memory.stock = stock;
            let before = memory.tables.clone();
            let result = ept.map(
                memory,
                Gfn::new(gfn),
                Pfn::new(pfn),
                size,
                permissions,
                CachePolicy::MEMORY,
            );
            let outcome = match result {
                Ok(outcome) => outcome,
                Err(error) => {
                    assert_eq!(error, MapError::OutOfTables);
                    assert!(stock < 3, "three tables are always enough");
                    assert_eq!(memory.tables, before, "a failed map left a trace");
                    return;
                }
            };
            let touched = model.touching(gfn, gfn + size.frames());
            let leaf = Leaf {
                frames: size.frames(),
                pfn,
                rights: bits(permissions),
                accessed: true,
            };
            let mut loses = false;
            for at in touched {
                let old = model.0.remove(&at).unwrap();
                let same_page = (at, old.frames, old.pfn) == (gfn, leaf.frames, leaf.pfn);
                loses |= !same_page || old.rights & !leaf.rights != 0;
                if same_page {
                    assert_eq!(outcome.changed, old.rights != leaf.rights);
                    assert_eq!(outcome.flush, old.rights & !leaf.rights != 0);
                }
            }
            assert!(outcome.flush || !loses, "{op:?} needs a flush");
            model.0.insert(gfn, leaf);
        }
        Op::Unmap(first, end, steps) => {
            let mut flush = false;
            let mut next = Some(Gfn::new(first));
            while let Some(at) = next {
                let part = ept.unmap(memory, at, Gfn::new(end), steps);
                assert!(
                    part.next.is_none_or(|gfn| gfn > at),
                    "{op:?} stands at {at:?}"
                );
                flush |= part.flush;
                next = part.next;
            }
            let gone = model.touching(first, end);
            assert!(flush || gone.is_empty(), "{op:?} needs a flush");
            model.0.retain(|at, _| !gone.contains(at));
        }
        Op::WriteProtect(first, end) => {
            let flush = ept.write_protect(memory, Gfn::new(first), Gfn::new(end));
            let mut loses = false;
            for at in model.touching(first, end) {
                let leaf = model.0.get_mut(&at).unwrap();
                loses |= leaf.rights & 2 != 0;
                leaf.rights &= !2;
            }
            assert_eq!(flush, loses);
        }
        Op::Age(first, end) => {
            let (first_gfn, end_gfn) = (Gfn::new(first), Gfn::new(end));
            let peeked = ept.is_accessed(memory, first_gfn, end_gfn);
            let accessed = ept.test_and_clear_accessed(memory, first_gfn, end_gfn);
            let mut expected = false;
            for at in model.touching(first, end) {
                let leaf = model.0.get_mut(&at).unwrap();
                expected |= std::mem::take(&mut leaf.accessed);
            }
            assert_eq!((peeked, accessed), (expected, expected));
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn agrees_with_the_model(
        ops in prop::collection::vec(op(), 1..40),
        probes in prop::collection::vec(frame(), 40),
    ) {
        let mut memory = TestTables::new(1);
        let ept = Ept::new(&mut memory).unwrap();
        let mut model = Model::default();
        for op in &ops {
            apply(&mut memory, &ept, &mut model, op);
            let made: BTreeSet<u64> = memory.tables.keys().copied().collect();
            prop_assert_eq!(reachable(&memory, ept.root().raw()), made, "a table leaked");
            let edges = model.0.iter().flat_map(|(at, leaf)| [*at, at + leaf.frames - 1, at + leaf.frames]);
            for gfn in edges.chain(probes.iter().copied()) {
                for size in SIZES {
                    prop_assert_eq!(
                        ept.fitting(&memory, Gfn::new(gfn & (GFN_LIMIT - 1)), size),
                        fitting(&memory, ept.root().raw(), gfn & (GFN_LIMIT - 1), size)
                    );
                }
                let gpa = Gpa::new((gfn << 12) | 0x123);
                let found = ept.walk(&memory, gpa)
                    .map(|t| (t.hpa.raw(), bits(t.permissions), t.size.frames()));
                let expected = model.translate(gfn)
                    .map(|(pfn, rights, frames)| ((pfn << 12) | 0x123, rights, frames));
                prop_assert_eq!(found, expected, "frame {:#x} after {:?}", gfn, op);
            }
        }
        ept.destroy(&mut memory);
        prop_assert!(memory.tables.is_empty());
    }
}

/// The largest size with no table at its own level or above it that would have to go.
fn fitting(memory: &TestTables, root: u64, gfn: u64, size: PageSize) -> PageSize {
    let mut tables = vec![root];
    for shift in [27, 18, 9] {
        let entry = memory.tables[tables.last().unwrap()][((gfn >> shift) & 511) as usize];
        if entry & 7 == 0 || entry & 0x80 != 0 {
            break;
        }
        tables.push(entry & 0x000f_ffff_ffff_f000);
    }
    // Tables below the root's entry, the 1 GiB one's and the 2 MiB one's.
    let largest = [
        PageSize::Size1G,
        PageSize::Size1G,
        PageSize::Size2M,
        PageSize::Size4K,
    ][tables.len() - 1];
    size.min(largest)
}

fn map_one(gfn: u64, pfn: u64, size: PageSize, cache: CachePolicy) -> (TestTables, Ept) {
    let mut memory = TestTables::new(8);
    let ept = Ept::new(&mut memory).unwrap();
    let (gfn, pfn) = (Gfn::new(gfn), Pfn::new(pfn));
    ept.map(
        &mut memory,
        gfn,
        pfn,
        size,
        Permissions::READ_EXECUTE,
        cache,
    )
    .unwrap();
    (memory, ept)
}

#[test]
fn entries_have_the_bits_of_the_sdm() {
    let cache = CachePolicy {
        memory_type: MemoryType::Uncacheable,
        ignore_pat: false,
    };
    let (memory, ept) = map_one(
        (1 << 27) | (2 << 18) | (3 << 9) | 4,
        0xabcde,
        PageSize::Size4K,
        cache,
    );
    let root = &memory.tables[&ept.root().raw()];
    assert_eq!(root[1] & 0xfff, 7);
    let pdpt = &memory.tables[&(root[1] & !0xfff)];
    assert_eq!(pdpt[2] & 0xfff, 7);
    let directory = &memory.tables[&(pdpt[2] & !0xfff)];
    let table = &memory.tables[&(directory[3] & !0xfff)];
    // Readable, executable, UC, heeding the PAT, accessed, not dirty.
    assert_eq!(table[4], 0xabcd_e105);

    let (memory, ept) = map_one(512, 0x200, PageSize::Size2M, CachePolicy::MEMORY);
    let root = &memory.tables[&ept.root().raw()];
    let pdpt = &memory.tables[&(root[0] & !0xfff)];
    let directory = &memory.tables[&(pdpt[0] & !0xfff)];
    // WB is 6 in bits 5:3, PAT ignored, a leaf, accessed.
    assert_eq!(
        directory[1],
        0x20_0000 | 0x5 | (6 << 3) | 0x40 | 0x80 | 0x100
    );
}

#[test]
fn eptp_is_write_back_with_four_levels() {
    let mut memory = TestTables::new(1);
    let ept = Ept::new(&mut memory).unwrap();
    assert_eq!(ept.eptp(false), ept.root().raw() | 0x1e);
    assert_eq!(ept.eptp(true), ept.root().raw() | 0x5e);
}

#[test]
fn what_can_not_be_mapped() {
    let mut memory = TestTables::new(8);
    let ept = Ept::new(&mut memory).unwrap();
    let mut map = |gfn, pfn, size| {
        ept.map(
            &mut memory,
            Gfn::new(gfn),
            Pfn::new(pfn),
            size,
            Permissions::ALL,
            CachePolicy::MEMORY,
        )
    };
    let small = PageSize::Size4K;
    assert_eq!(map(GFN_LIMIT, 0, small), Err(MapError::OutOfRange));
    assert_eq!(map(u64::MAX, 0, small), Err(MapError::OutOfRange));
    assert_eq!(map(0, 1 << 40, small), Err(MapError::OutOfRange));
    assert_eq!(map(1, 0, PageSize::Size2M), Err(MapError::Misaligned));
    assert_eq!(map(0, 511, PageSize::Size2M), Err(MapError::Misaligned));
    assert_eq!(map(512, 0, PageSize::Size1G), Err(MapError::Misaligned));
    assert!(map(GFN_LIMIT - 1, (1 << 40) - 1, small).is_ok());
    assert_eq!(ept.walk(&memory, Gpa::new(1 << 48)), None);
}

/// Maps small pages and gives the tree.
fn map_small(frames: &[u64]) -> (TestTables, Ept) {
    let mut memory = TestTables::new(usize::MAX);
    let ept = Ept::new(&mut memory).unwrap();
    for gfn in frames {
        let (gfn, pfn) = (Gfn::new(*gfn), Pfn::new(1));
        let small = PageSize::Size4K;
        ept.map(
            &mut memory,
            gfn,
            pfn,
            small,
            Permissions::ALL,
            CachePolicy::MEMORY,
        )
        .unwrap();
    }
    (memory, ept)
}

/// How many tables of all levels these frames need.
fn tables_for(frames: &[u64]) -> usize {
    let at = |shift: u32| {
        let places: BTreeSet<u64> = frames.iter().map(|gfn| gfn >> shift).collect();
        places.len()
    };
    at(9) + at(18) + at(27) + 1
}

/// The frames of 64 GiB.
const FRAMES_64G: u64 = 1 << 24;

proptest! {
    #![proptest_config(ProptestConfig { cases: 50, failure_persistence: None, ..ProptestConfig::default() })]

    /// Much address space with little of it in use needs tables for that little only.
    #[test]
    fn tables_follow_what_is_touched(frames in prop::collection::vec(0..FRAMES_64G, 0..200)) {
        let (memory, _ept) = map_small(&frames);
        prop_assert_eq!(memory.tables.len(), tables_for(&frames));
    }

    /// Taking 64 GiB out costs what is there, and no call more than it was allowed.
    #[test]
    fn unmapping_is_bounded(frames in prop::collection::vec(0..FRAMES_64G, 0..200), steps in 1u32..64) {
        let (mut memory, ept) = map_small(&frames);
        let tables = memory.tables.len() as u64;
        let mut next = Some(Gfn::new(0));
        let mut total = 0;
        while let Some(gfn) = next {
            memory.accesses.set(0);
            next = ept.unmap(&mut memory, gfn, Gfn::new(FRAMES_64G), steps).next;
            // Each step is one descent; the last may free one GiB's tables, 512 entries looked at.
            prop_assert!(memory.accesses.get() <= 5 * u64::from(steps) + 517);
            total += memory.accesses.get();
        }
        // 64 entries of the third level, and below them what is there.
        prop_assert!(total <= 64 * 5 + tables * 512, "{total} accesses for {tables} tables");
        prop_assert_eq!(memory.tables.len(), if frames.is_empty() { 1 } else { 2 });
    }
}

#[test]
fn a_table_of_one_gib_is_freed_in_one_step() {
    let frames: Vec<u64> = (0..512).map(|table| table << 9).collect();
    let (mut memory, ept) = map_small(&frames);
    assert_eq!(memory.tables.len(), 515);
    let part = ept.unmap(&mut memory, Gfn::new(0), Gfn::new(1 << 18), 1);
    assert_eq!(
        part,
        Unmapped {
            flush: true,
            next: None
        }
    );
    assert_eq!(memory.tables.len(), 2);
}
