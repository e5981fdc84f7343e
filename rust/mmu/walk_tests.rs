// SPDX-License-Identifier: GPL-2.0

//! The guest page walk on tables that a builder lays out from a list of what each level says; the
//! expected rights and error codes come from a table of sentences of the SDM (vol. 3, 5.6 and 5.7).

use super::walk::*;
use crate::x86::address::{Gpa, Gva};
use crate::x86::control::{Cr0, Cr3, Cr4, Efer};
use crate::x86::vector::{Exception, ExceptionVector};
use proptest::prelude::*;
use std::collections::BTreeMap;

/// Guest memory by 4-byte words; what was never written can't be reached.
#[derive(Default, Clone)]
struct Memory {
    words: BTreeMap<u64, u32>,
    /// How often a compare-and-exchange still fails.
    contention: u32,
}

impl Memory {
    fn put64(&mut self, gpa: u64, value: u64) {
        self.words.insert(gpa, value as u32);
        self.words.insert(gpa + 4, (value >> 32) as u32);
    }

    fn get64(&self, gpa: u64) -> u64 {
        u64::from(self.words[&gpa]) | (u64::from(self.words[&(gpa + 4)]) << 32)
    }
}

impl GuestPhysicalMemory for Memory {
    type Error = ();

    fn read_u32(&mut self, gpa: Gpa) -> Result<u32, ()> {
        assert_eq!(gpa.raw() % 4, 0);
        self.words.get(&gpa.raw()).copied().ok_or(())
    }

    fn read_u64(&mut self, gpa: Gpa) -> Result<u64, ()> {
        assert_eq!(gpa.raw() % 8, 0);
        if !self.words.contains_key(&gpa.raw()) {
            return Err(());
        }
        Ok(self.get64(gpa.raw()))
    }

    fn compare_exchange_u32(&mut self, gpa: Gpa, old: u32, new: u32) -> Result<bool, ()> {
        if self.contention > 0 {
            self.contention -= 1;
            return Ok(false);
        }
        assert_eq!(self.words.insert(gpa.raw(), new), Some(old));
        Ok(true)
    }

    fn compare_exchange_u64(&mut self, gpa: Gpa, old: u64, new: u64) -> Result<bool, ()> {
        if self.contention > 0 {
            self.contention -= 1;
            return Ok(false);
        }
        assert_eq!(self.get64(gpa.raw()), old);
        self.put64(gpa.raw(), new);
        Ok(true)
    }
}

const P: u64 = 1;
const W: u64 = 2;
const U: u64 = 4;
const A: u64 = 0x20;
const D: u64 = 0x40;
const PS: u64 = 0x80;
const XD: u64 = 1 << 63;

#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    Bits32,
    Pae,
    Four,
    Five,
}

const KINDS: [Kind; 4] = [Kind::Bits32, Kind::Pae, Kind::Four, Kind::Five];

/// The flags of each level, from the root's entry to the page's.
type Levels = Vec<u64>;

/// The shifts of the indices, from the root down; PAE's top level is in registers.
fn shifts(kind: Kind) -> &'static [u32] {
    match kind {
        Kind::Bits32 => &[22, 12],
        Kind::Pae => &[21, 12],
        Kind::Four => &[39, 30, 21, 12],
        Kind::Five => &[48, 39, 30, 21, 12],
    }
}

fn paging(kind: Kind) -> Paging {
    let long = matches!(kind, Kind::Four | Kind::Five);
    let mut cr4 = 0;
    cr4 |= if kind == Kind::Bits32 {
        Cr4::PSE
    } else {
        Cr4::PAE
    };
    cr4 |= if kind == Kind::Five { Cr4::LA57 } else { 0 };
    let efer = if long { Efer::LME | Efer::LMA } else { 0 };
    let nxe = if kind == Kind::Bits32 { 0 } else { Efer::NXE };
    Paging {
        cr0: Cr0(Cr0::PE | Cr0::PG | Cr0::WP),
        cr3: Cr3(0x10_0000),
        cr4: Cr4(cr4),
        efer: Efer(efer | nxe),
        pdptes: [0x10_0001; 4],
        physical_bits: 40,
        gbpages: true,
        ..Paging::default()
    }
}

/// Lays out tables, from 0x10_0000 on, a page each, that lead `gva` to `page` by entries with
/// `flags`. Gives the addresses of the entries.
fn lay(memory: &mut Memory, kind: Kind, gva: u64, page: u64, flags: &[u64]) -> Vec<u64> {
    let mut table = 0x10_0000u64;
    let mut places = Vec::new();
    for (level, flag) in flags.iter().enumerate() {
        let is_last = level + 1 == flags.len();
        let target = if is_last { page } else { table + 0x1000 };
        let (bits, width) = if kind == Kind::Bits32 {
            (10, 4)
        } else {
            (9, 8)
        };
        let index = (gva >> shifts(kind)[level]) & ((1 << bits) - 1);
        let place = table + index * width;
        if kind == Kind::Bits32 {
            memory.words.insert(place, (target | flag) as u32);
        } else {
            memory.put64(place, target | flag);
        }
        places.push(place);
        table = target;
    }
    places
}

const READ: Access = Access {
    kind: AccessKind::Read,
    privilege: Privilege::Supervisor,
};

fn code_of(result: Result<GuestMapping, WalkError<()>>) -> Option<u32> {
    match result {
        Ok(_) => None,
        Err(WalkError::Fault(Exception {
            vector: ExceptionVector::PageFault,
            error_code,
            ..
        })) => error_code,
        Err(other) => panic!("{other:?}"),
    }
}

#[test]
fn without_paging_addresses_are_physical() {
    let mut memory = Memory::default();
    let off = Paging::default();
    let found = walk(&mut memory, &off, Gva::new(0x1234_5678), READ).unwrap();
    assert_eq!(found.gpa, Gpa::new(0x1234_5678));
}

#[test]
fn pages_of_every_size() {
    for (kind, levels, page, bytes) in [
        (Kind::Bits32, 1, 0x0040_0000u64, 1u64 << 22),
        (Kind::Bits32, 2, 0x0040_1000, 1 << 12),
        (Kind::Pae, 1, 0x7f_ffe0_0000, 1 << 21),
        (Kind::Pae, 2, 0x7f_ffff_f000, 1 << 12),
        (Kind::Four, 2, 0x7f_c000_0000, 1 << 30),
        (Kind::Four, 3, 0x7f_ffe0_0000, 1 << 21),
        (Kind::Four, 4, 0x7f_ffff_f000, 1 << 12),
        (Kind::Five, 3, 0x7f_c000_0000, 1 << 30),
        (Kind::Five, 4, 0x20_0000, 1 << 21),
        (Kind::Five, 5, 0x7f_ffff_f000, 1 << 12),
    ] {
        let mut memory = Memory::default();
        let mut flags = vec![P | W | U; levels];
        if bytes > 1 << 12 {
            *flags.last_mut().unwrap() |= PS;
        }
        let gva = 0x00ab_cdef_9876_5432
            & if matches!(kind, Kind::Bits32 | Kind::Pae) {
                0xffff_ffff
            } else {
                u64::MAX
            };
        let places = lay(&mut memory, kind, gva, page, &flags);
        let access = Access {
            kind: AccessKind::Write,
            ..READ
        };
        let found = walk(&mut memory, &paging(kind), Gva::new(gva), access).unwrap();
        assert_eq!(
            found.gpa.raw(),
            page | (gva & (bytes - 1)),
            "{kind:?} {levels}"
        );
        assert_eq!(found.page_bytes, bytes);
        for (at, place) in places.iter().enumerate() {
            let marks = u64::from(memory.words[place]) & (A | D);
            let expected = if at + 1 == levels { A | D } else { A };
            assert_eq!(marks, expected, "{kind:?} {levels}: level {at}");
        }
    }
}

#[test]
fn pse_36_has_eight_more_bits_where_the_width_allows() {
    let mut memory = Memory::default();
    let entry = 0x0080_0000 | (0xabu64 << 13) | P | PS;
    memory.words.insert(0x10_0000, entry as u32);
    let mut registers = paging(Kind::Bits32);
    let found = walk(&mut memory, &registers, Gva::new(0x12_3456), READ).unwrap();
    assert_eq!(found.gpa.raw(), 0xab_0092_3456);
    registers.physical_bits = 39;
    let narrow = probe(&mut memory, &registers, Gva::new(0), READ);
    assert_eq!(code_of(narrow), Some(0b1001));
    registers.physical_bits = 40;
    memory.words.insert(0x10_0000, (entry | (1 << 21)) as u32);
    assert_eq!(
        code_of(probe(&mut memory, &registers, Gva::new(0), READ)),
        Some(0b1001)
    );
    // Without PSE the bit means nothing, and the entry leads to a table, which is not there.
    registers.cr4 = Cr4(0);
    let table = probe(&mut memory, &registers, Gva::new(0), READ);
    assert!(matches!(table, Err(WalkError::Memory(_, ()))), "{table:?}");
}

#[test]
fn reserved_bits_fault_as_such() {
    let reserved =
        |kind: Kind, levels: usize, level: usize, bit: u32, edit: &dyn Fn(&mut Paging)| {
            let mut memory = Memory::default();
            let mut flags = vec![P | W | U; levels];
            if levels < shifts(kind).len() {
                flags[levels - 1] |= PS;
            }
            flags[level] |= 1u64 << bit;
            lay(&mut memory, kind, 0, 0x4000_0000, &flags);
            let mut registers = paging(kind);
            edit(&mut registers);
            let result = probe(&mut memory, &registers, Gva::new(0), READ);
            matches!(result, Err(WalkError::Fault(fault)) if fault.error_code == Some(0b1001))
        };
    let plain: &dyn Fn(&mut Paging) = &|_| {};
    let no_nx: &dyn Fn(&mut Paging) = &|p| p.efer = Efer(p.efer.0 & !Efer::NXE);
    for level in 0..4 {
        assert!(reserved(Kind::Four, 4, level, 40, plain), "past the width");
        assert!(reserved(Kind::Four, 4, level, 51, plain));
        assert!(!reserved(Kind::Four, 4, level, 39, plain));
        assert!(!reserved(Kind::Four, 4, level, 52, plain), "free");
        assert!(!reserved(Kind::Four, 4, level, 62, plain));
        assert!(!reserved(Kind::Four, 4, level, 63, plain));
        assert!(reserved(Kind::Four, 4, level, 63, no_nx));
    }
    for level in 0..2 {
        assert!(reserved(Kind::Pae, 2, level, 52, plain));
        assert!(reserved(Kind::Pae, 2, level, 62, plain));
        assert!(!reserved(Kind::Pae, 2, level, 63, plain));
    }
    assert!(reserved(Kind::Four, 4, 0, 7, plain), "no 512 GiB pages");
    assert!(reserved(Kind::Five, 5, 0, 7, plain));
    assert!(reserved(Kind::Five, 5, 1, 7, plain));
    assert!(reserved(Kind::Four, 3, 2, 13, plain), "inside 2 MiB");
    assert!(reserved(Kind::Four, 3, 2, 20, plain));
    assert!(!reserved(Kind::Four, 3, 2, 12, plain), "PAT");
    assert!(reserved(Kind::Four, 2, 1, 29, plain), "inside 1 GiB");
    assert!(!reserved(Kind::Four, 2, 1, 12, plain));
    let no_giants: &dyn Fn(&mut Paging) = &|p| p.gbpages = false;
    assert!(reserved(Kind::Four, 2, 1, 7, no_giants));
}

#[test]
fn what_is_absent_or_out_of_reach() {
    for kind in KINDS {
        let depth = shifts(kind).len();
        for level in 0..depth {
            let mut memory = Memory::default();
            let mut flags = vec![P | W | U; depth];
            flags[level] &= !P;
            lay(&mut memory, kind, 0, 0x4000_0000, &flags);
            let access = Access {
                kind: AccessKind::Write,
                privilege: Privilege::User,
            };
            let code = code_of(probe(&mut memory, &paging(kind), Gva::new(0), access));
            assert_eq!(code, Some(0b110), "{kind:?} {level}");
        }
        let nothing = probe(&mut Memory::default(), &paging(kind), Gva::new(0), READ);
        assert_eq!(nothing, Err(WalkError::Memory(Gpa::new(0x10_0000), ())));
    }
    let mut registers = paging(Kind::Pae);
    registers.pdptes[1] = 0;
    let absent = probe(&mut Memory::default(), &registers, Gva::new(1 << 30), READ);
    assert_eq!(code_of(absent), Some(0));
}

#[test]
fn a_guest_that_changes_entries_is_met_with_patience_and_then_not() {
    let mut memory = Memory::default();
    lay(&mut memory, Kind::Four, 0, 0x5000, &[P; 4]);
    memory.contention = 7;
    assert!(walk(&mut memory, &paging(Kind::Four), Gva::new(0), READ).is_ok());
    let mut memory = Memory::default();
    lay(&mut memory, Kind::Four, 0, 0x5000, &[P; 4]);
    memory.contention = 100;
    let given_up = walk(&mut memory, &paging(Kind::Four), Gva::new(0), READ);
    assert_eq!(given_up, Err(WalkError::Contended));
}

#[test]
fn pdptes_are_checked_where_they_are_loaded() {
    assert!(check_pdptes(&[0x1001, 0, 0xffff_ffff_ffff_fffe, 0x19], 40).is_ok());
    for bit in [1, 2, 5, 6, 7, 8, 40, 63] {
        assert!(
            check_pdptes(&[0, 0, 0, 1 | (1 << bit)], 40).is_err(),
            "{bit}"
        );
    }
    assert_eq!(pdptes_address(Cr3(0x1234_57ff)), Gpa::new(0x1234_57e0));
}

/// What the SDM says of an access whose page has these rights: the bits of an error code, or `None`
/// where it goes through.
fn expected(
    p: &Paging,
    access: Access,
    user: bool,
    write: bool,
    xd: bool,
    key: u32,
) -> Option<u32> {
    let long = p.efer.has(Efer::LMA);
    let (smep, smap) = (p.cr4.has(Cr4::SMEP), p.cr4.has(Cr4::SMAP));
    let wp = p.cr0.has(Cr0::WP);
    let by_user = access.privilege == Privilege::User;
    let explicit_ac = access.privilege == Privilege::Supervisor && p.alignment_check;
    // Section 5.6.2.
    let data = access.kind != AccessKind::Execute;
    let (ad, wd) = (
        (p.pkru >> (2 * key)) & 1 == 1,
        (p.pkru >> (2 * key + 1)) & 1 == 1,
    );
    let writes = access.kind == AccessKind::Write;
    let keyed =
        p.cr4.has(Cr4::PKE) && long && user && data && (ad || (writes && wd && (by_user || wp)));
    // Section 5.6.1, one arm a paragraph.
    let allowed = match (by_user, access.kind, user) {
        (false, AccessKind::Read, false) => true,
        (false, AccessKind::Read, true) => !smap || explicit_ac,
        (false, AccessKind::Write, false) => !wp || write,
        (false, AccessKind::Write, true) => (!wp || write) && (!smap || explicit_ac),
        (false, AccessKind::Execute, false) => !xd,
        (false, AccessKind::Execute, true) => !smep && !xd,
        (true, _, false) => false,
        (true, AccessKind::Read, true) => true,
        (true, AccessKind::Write, true) => write,
        (true, AccessKind::Execute, true) => !xd,
    };
    if allowed && !keyed {
        return None;
    }
    let fetch = !data && (smep || (p.cr4.has(Cr4::PAE) && p.efer.has(Efer::NXE)));
    let bits = [true, writes, by_user, false, fetch, keyed];
    Some(
        bits.iter()
            .rev()
            .fold(0, |code, bit| (code << 1) | u32::from(*bit)),
    )
}

fn flags() -> impl Strategy<Value = Levels> {
    let one = (
        any::<bool>(),
        prop::bool::weighted(0.8),
        prop::bool::weighted(0.2),
    );
    prop::collection::vec(
        one.prop_map(|(w, u, x)| {
            P | if w { W } else { 0 } | if u { U } else { 0 } | if x { XD } else { 0 }
        }),
        5,
    )
}

/// The bits of `mask` where `on`.
fn when(on: bool, mask: u64) -> u64 {
    if on {
        mask
    } else {
        0
    }
}

/// The addresses that paging of this kind translates.
fn linear_mask(kind: Kind) -> u64 {
    match kind {
        Kind::Bits32 | Kind::Pae => 0xffff_ffff,
        Kind::Four | Kind::Five => u64::MAX,
    }
}

fn access() -> impl Strategy<Value = Access> {
    let kinds = [AccessKind::Read, AccessKind::Write, AccessKind::Execute];
    let privileges = [Privilege::User, Privilege::Supervisor, Privilege::Implicit];
    (
        prop::sample::select(kinds.to_vec()),
        prop::sample::select(privileges.to_vec()),
    )
        .prop_map(|(kind, privilege)| Access { kind, privilege })
}

fn registers() -> impl Strategy<Value = (Kind, Paging)> {
    let flags = any::<(bool, bool, bool, bool, bool)>();
    (prop::sample::select(KINDS.to_vec()), flags, any::<u32>()).prop_map(
        |(kind, (wp, smep, smap, pke, ac), pkru)| {
            let mut paging = paging(kind);
            paging.cr0 = Cr0(Cr0::PE | Cr0::PG | when(wp, Cr0::WP));
            let protections = when(smep, Cr4::SMEP) | when(smap, Cr4::SMAP);
            paging.cr4 = paging.cr4.with(protections | when(pke, Cr4::PKE));
            paging.alignment_check = ac;
            paging.pkru = pkru;
            (kind, paging)
        },
    )
}

/// Lays tables out and compares what the walk finds with what the SDM says.
fn check_rights(kind: Kind, paging: &Paging, flags: &[u64], key: u32, gva: u64, access: Access) {
    let mut memory = Memory::default();
    let page = if kind == Kind::Bits32 {
        0x7654_3000
    } else {
        0x7_6543_2000
    };
    lay(&mut memory, kind, gva, page, flags);
    let all = |bit: u64| flags.iter().all(|flag| flag & bit != 0);
    let xd = flags.iter().any(|flag| flag & XD != 0);
    let want = expected(paging, access, all(U), all(W), xd, key);

    let before = memory.clone();
    let probed = probe(&mut memory, paging, Gva::new(gva), access);
    assert_eq!(memory.words, before.words, "a probe changed something");
    let walked = walk(&mut memory, paging, Gva::new(gva), access);
    assert_eq!(probed, walked);
    if let Ok(mapping) = &walked {
        let rights = (mapping.user, mapping.writable, mapping.executable);
        assert_eq!(rights, (all(U), all(W), !xd));
        assert_eq!(mapping.gpa.raw(), page | (gva & 0xfff));
    }
    assert_eq!(code_of(walked), want);
}

/// Memory in which every address holds something, always present.
struct Wild(Vec<u64>);

impl GuestPhysicalMemory for Wild {
    type Error = ();

    fn read_u32(&mut self, gpa: Gpa) -> Result<u32, ()> {
        self.read_u64(gpa).map(|value| value as u32)
    }

    fn read_u64(&mut self, gpa: Gpa) -> Result<u64, ()> {
        Ok(self.0[(gpa.raw() >> 3) as usize % self.0.len()] | P)
    }

    fn compare_exchange_u32(&mut self, _: Gpa, _: u32, _: u32) -> Result<bool, ()> {
        Ok(true)
    }

    fn compare_exchange_u64(&mut self, _: Gpa, _: u64, _: u64) -> Result<bool, ()> {
        Ok(true)
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 1000,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn rights_are_those_of_the_sdm(
        (kind, paging) in registers(),
        levels in flags(),
        key in 0u32..16,
        access in access(),
        gva: u64,
    ) {
        let depth = shifts(kind).len();
        let mut flags: Levels = levels[..depth].to_vec();
        if kind == Kind::Bits32 {
            flags.iter_mut().for_each(|flag| *flag &= !XD);
        }
        if paging.efer.has(Efer::LMA) {
            flags[depth - 1] |= u64::from(key) << 59;
        }
        check_rights(kind, &paging, &flags, key, gva & linear_mask(kind), access);
    }

    /// Whatever lies in memory and in registers, a walk ends, inside the address width.
    #[test]
    fn any_tables(
        words in prop::collection::vec(any::<u64>(), 64),
        gva: u64,
        (cr0, cr3, cr4, efer) in any::<(u64, u64, u64, u64)>(),
        pdptes in any::<[u64; 4]>(),
        physical_bits in 0u32..70,
        gbpages: bool,
    ) {
        let registers = Paging {
            cr0: Cr0(cr0 | Cr0::PG),
            cr3: Cr3(cr3),
            cr4: Cr4(cr4),
            efer: Efer(efer),
            pdptes,
            physical_bits,
            gbpages,
            ..Paging::default()
        };
        if let Ok(mapping) = walk(&mut Wild(words), &registers, Gva::new(gva), READ) {
            let least = if registers.cr4.has(Cr4::PAE) { 12 } else { 32 };
            let limit = physical_bits.max(least);
            prop_assert!(limit >= 64 || mapping.gpa.raw() >> limit == 0);
        }
    }
}
