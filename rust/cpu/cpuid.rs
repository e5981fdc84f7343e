// SPDX-License-Identifier: GPL-2.0

//! CPUID as a guest executes it: the table that userspace has set, and the bits that follow the
//! guest's registers.

use super::feature::{Feature, Register};
use super::xsave::XsaveLayout;
use crate::x86::control::Cr4;

/// The most entries that KVM_SET_CPUID2 takes.
pub const MAX_ENTRIES: usize = 256;
/// KVM_CPUID_FLAG_SIGNIFCANT_INDEX: the entry answers one subleaf only.
pub const SIGNIFICANT_INDEX: u32 = 1 << 0;

/// What CPUID answers for a leaf, or for one of its subleaves; the fields of `struct
/// kvm_cpuid_entry2`, without its padding.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CpuidEntry {
    /// The leaf: EAX on entry.
    pub function: u32,
    /// The subleaf: ECX on entry.
    pub index: u32,
    /// [`SIGNIFICANT_INDEX`].
    pub flags: u32,
    /// EAX.
    pub eax: u32,
    /// EBX.
    pub ebx: u32,
    /// ECX.
    pub ecx: u32,
    /// EDX.
    pub edx: u32,
}

impl CpuidEntry {
    /// The answer: EAX, EBX, ECX, EDX.
    #[inline]
    pub const fn registers(&self) -> [u32; 4] {
        [self.eax, self.ebx, self.ecx, self.edx]
    }

    /// Whether the entry answers the leaf and subleaf.
    #[inline]
    const fn answers(&self, function: u32, index: u32) -> bool {
        self.function == function && (self.flags & SIGNIFICANT_INDEX == 0 || self.index == index)
    }

    /// Whether the entry has a feature, which must be one of its leaf.
    #[inline]
    pub const fn has(&self, feature: Feature) -> bool {
        let register = match feature.register {
            Register::Eax => self.eax,
            Register::Ebx => self.ebx,
            Register::Ecx => self.ecx,
            Register::Edx => self.edx,
        };
        register & feature.mask != 0
    }
}

/// The entry that answers a leaf and subleaf; the first one, where userspace gave several.
#[inline]
pub fn find(entries: &[CpuidEntry], function: u32, index: u32) -> Option<&CpuidEntry> {
    entries.iter().find(|entry| entry.answers(function, index))
}

/// Whether the table has a feature.
pub fn has(entries: &[CpuidEntry], feature: Feature) -> bool {
    find(entries, feature.function, feature.index).is_some_and(|entry| entry.has(feature))
}

/// The number of leaves that [`Index`] covers from 0 and from 0x80000000.
const INDEXED: usize = 32;
/// No entry has this place.
const ABSENT: u16 = u16::MAX;

/// Where the entries of the usual leaves begin in a table, so that an exit need not search.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Index {
    basic: [u16; INDEXED],
    extended: [u16; INDEXED],
}

impl Default for Index {
    /// The index of an empty table.
    fn default() -> Self {
        Self::new(&[])
    }
}

impl Index {
    /// Indexes a table. It serves that table only, and until its next change.
    pub fn new(entries: &[CpuidEntry]) -> Self {
        let mut index = Self {
            basic: [ABSENT; INDEXED],
            extended: [ABSENT; INDEXED],
        };
        for (place, entry) in (0u16..ABSENT).zip(entries) {
            let offset = entry.function & 0x7fff_ffff;
            let half = if entry.function >> 31 == 0 {
                &mut index.basic
            } else {
                &mut index.extended
            };
            if let Some(first) = half.get_mut(offset as usize) {
                *first = (*first).min(place);
            }
        }
        index
    }

    /// The entry that answers a leaf and subleaf, as [`find`] gives it.
    #[inline]
    fn find<'a>(
        &self,
        entries: &'a [CpuidEntry],
        function: u32,
        index: u32,
    ) -> Option<&'a CpuidEntry> {
        let half = if function >> 31 == 0 {
            &self.basic
        } else {
            &self.extended
        };
        match half.get((function & 0x7fff_ffff) as usize) {
            Some(&first) => find(entries.get(usize::from(first)..)?, function, index),
            None => find(entries, function, index),
        }
    }
}

/// What in the guest's registers CPUID shows.
#[derive(Clone, Copy, Debug)]
pub struct Runtime<'a> {
    /// CR4: OSXSAVE and PKE.
    pub cr4: Cr4,
    /// Whether IA32_APIC_BASE has the local APIC on.
    pub apic_enabled: bool,
    /// XCR0.
    pub xcr0: u64,
    /// IA32_XSS.
    pub xss: u64,
    /// The layout of the XSAVE area.
    pub layout: &'a XsaveLayout,
}

/// `register` with the bits of `mask` as `on` says.
#[inline]
fn put(register: &mut u32, mask: u32, on: bool) {
    if on {
        *register |= mask;
    } else {
        *register &= !mask;
    }
}

/// Whether [`Runtime`] may have something to say of a leaf.
#[inline]
const fn shows_registers(function: u32) -> bool {
    matches!(function, 1 | 7 | 0xd)
}

impl Runtime<'_> {
    /// Brings an entry up to date.
    #[inline]
    pub fn apply(&self, entry: &mut CpuidEntry) {
        match (entry.function, entry.index) {
            (1, _) => {
                let osxsave = self.cr4.has(Cr4::OSXSAVE);
                put(&mut entry.ecx, Feature::OSXSAVE.mask, osxsave);
                put(&mut entry.edx, Feature::APIC.mask, self.apic_enabled);
            }
            (7, 0) => {
                let ospke = self.cr4.has(Cr4::PKE);
                put(&mut entry.ecx, Feature::OSPKE.mask, ospke);
            }
            (0xd, 0) => entry.ebx = self.layout.standard_size(self.xcr0),
            (0xd, 1) => {
                let compacts = Feature::XSAVEC.mask | Feature::XSAVES.mask;
                if entry.eax & compacts != 0 {
                    entry.ebx = self.layout.compacted_size(self.xcr0 | self.xss);
                }
            }
            _ => {}
        }
    }

    /// Brings a whole table up to date: before KVM_GET_CPUID2 gives it out, or KVM_SET_CPUID2 after
    /// a first run compares it with another one.
    pub fn apply_all(&self, entries: &mut [CpuidEntry]) {
        entries.iter_mut().for_each(|entry| self.apply(entry));
    }
}

/// Executes CPUID with `function` in EAX and `index` in ECX and gives EAX, EBX, ECX and EDX. `runtime` is
/// asked for the leaves that show registers only.
///
/// A leaf that is out of range answers as the highest basic leaf does, with the same subleaf, as
/// Intel's CPUs have it; one that is in range and absent answers zeroes (SDM vol. 2, CPUID).
#[inline]
pub fn execute<'a>(
    entries: &[CpuidEntry],
    table: &Index,
    runtime: impl FnOnce() -> Runtime<'a>,
    function: u32,
    index: u32,
) -> [u32; 4] {
    if let Some(entry) = table.find(entries, function, index) {
        let mut entry = *entry;
        if shows_registers(entry.function) {
            runtime().apply(&mut entry);
        }
        return entry.registers();
    }
    execute_absent(entries, table, &runtime(), function, index)
}

/// CPUID for what has no entry.
#[cold]
fn execute_absent(
    entries: &[CpuidEntry],
    table: &Index,
    runtime: &Runtime<'_>,
    function: u32,
    index: u32,
) -> [u32; 4] {
    let mut effective = function;
    if let Some(highest) = highest_basic_instead(entries, table, function) {
        effective = highest;
        if let Some(entry) = table.find(entries, highest, index) {
            let mut entry = *entry;
            runtime.apply(&mut entry);
            return entry.registers();
        }
    }
    // Of the topology leaves, CL and the x2APIC ID are there in every subleaf.
    if matches!(effective, 0xb | 0x1f) {
        if let Some(topology) = table.find(entries, effective, 1) {
            return [0, 0, index & 0xff, topology.edx];
        }
    }
    [0; 4]
}

/// The highest basic leaf, where `function` lies past the end of its range or its range is absent.
/// AMD's CPUs have no such rule.
fn highest_basic_instead(entries: &[CpuidEntry], table: &Index, function: u32) -> Option<u32> {
    let basic = table.find(entries, 0, 0)?;
    let vendor = [basic.ebx, basic.edx, basic.ecx];
    if vendor == *VENDOR_AMD || vendor == *VENDOR_HYGON {
        return None;
    }
    let base = match function {
        0x4000_0000..=0x4fff_ffff => function & 0xffff_ff00,
        0xc000_0000.. => 0xc000_0000,
        _ => function & 0x8000_0000,
    };
    let is_in_range = table
        .find(entries, base, 0)
        .is_some_and(|class| function <= class.eax);
    (!is_in_range).then_some(basic.eax)
}

/// "AuthenticAMD" as EBX, EDX and ECX have it.
const VENDOR_AMD: &[u32; 3] = &[
    u32::from_le_bytes(*b"Auth"),
    u32::from_le_bytes(*b"enti"),
    u32::from_le_bytes(*b"cAMD"),
];
/// "HygonGenuine".
const VENDOR_HYGON: &[u32; 3] = &[
    u32::from_le_bytes(*b"Hygo"),
    u32::from_le_bytes(*b"nGen"),
    u32::from_le_bytes(*b"uine"),
];

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32, index: u32, flags: u32, value: u32) -> CpuidEntry {
        CpuidEntry {
            function,
            index,
            flags,
            eax: value,
            ebx: value,
            ecx: value,
            edx: value,
        }
    }

    fn table() -> Vec<CpuidEntry> {
        vec![
            entry(0x8000_0000, 0, 0, 0x8000_0001),
            entry(0x8000_0001, 0, 0, 0x11),
            entry(4, 1, SIGNIFICANT_INDEX, 0x41),
            entry(4, 0, SIGNIFICANT_INDEX, 0x40),
            entry(0, 0, 0, 4),
            entry(0x4000_0000, 0, 0, 0x4000_0001),
            entry(0x4000_0001, 0, 0, 0x99),
        ]
    }

    fn run(entries: &[CpuidEntry], function: u32, index: u32) -> [u32; 4] {
        let layout = XsaveLayout::default();
        let runtime = Runtime {
            cr4: Cr4(0),
            apic_enabled: false,
            xcr0: 1,
            xss: 0,
            layout: &layout,
        };
        execute(entries, &Index::new(entries), || runtime, function, index)
    }

    #[test]
    fn exact_matches_whatever_the_order() {
        let table = table();
        assert_eq!(run(&table, 4, 0), [0x40; 4]);
        assert_eq!(run(&table, 4, 1), [0x41; 4]);
        assert_eq!(run(&table, 4, 2), [0; 4]);
        assert_eq!(run(&table, 0x8000_0001, 77), [0x11; 4]);
        assert_eq!(run(&table, 0x4000_0001, 0), [0x99; 4]);
    }

    #[test]
    fn leaves_out_of_range_are_the_highest_basic_one() {
        let table = table();
        // In range, absent.
        assert_eq!(run(&table, 2, 0), [0; 4]);
        let mut shorter = table.clone();
        shorter.remove(1);
        assert_eq!(run(&shorter, 0x8000_0001, 0), [0; 4]);
        // Past the end of each range, and a range that is not there.
        assert_eq!(run(&table, 5, 1), [0x41; 4]);
        assert_eq!(run(&table, 0x8000_0002, 0), [0x40; 4]);
        assert_eq!(run(&table, 0x4000_0002, 0), [0x40; 4]);
        assert_eq!(run(&table, 0x4000_0100, 0), [0x40; 4]);
        assert_eq!(run(&table, 0xc000_0000, 0), [0x40; 4]);
        assert_eq!(run(&table, 0xffff_ffff, 9), [0; 4]);
        assert_eq!(run(&[], 0, 0), [0; 4]);
    }

    #[test]
    fn amd_answers_zeroes_out_of_range() {
        let mut table = table();
        table[4].ebx = 0x6874_7541;
        table[4].edx = 0x6974_6e65;
        table[4].ecx = 0x444d_4163;
        assert_eq!(run(&table, 5, 0), [0; 4]);
    }

    #[test]
    fn topology_subleaves_keep_cl_and_the_x2apic_id() {
        let mut table = table();
        table.push(entry(0xb, 0, SIGNIFICANT_INDEX, 3));
        table.push(entry(0xb, 1, SIGNIFICANT_INDEX, 3));
        table[4].eax = 0xb;
        assert_eq!(run(&table, 0xb, 5), [0, 0, 5, 3]);
        assert_eq!(run(&table, 0x1234, 0x105), [0, 0, 5, 3]);
    }

    #[test]
    fn registers_show_in_their_bits() {
        let layout = XsaveLayout::default();
        let mut runtime = Runtime {
            cr4: Cr4(Cr4::OSXSAVE | Cr4::PKE),
            apic_enabled: true,
            xcr0: 3,
            xss: 0,
            layout: &layout,
        };
        let mut leaf_1 = entry(1, 0, 0, 0);
        let mut leaf_7 = entry(7, 0, SIGNIFICANT_INDEX, 0);
        runtime.apply(&mut leaf_1);
        runtime.apply(&mut leaf_7);
        assert_eq!((leaf_1.ecx, leaf_1.edx), (1 << 27, 1 << 9));
        assert_eq!(leaf_7.ecx, 1 << 4);
        runtime.cr4 = Cr4(0);
        runtime.apply_all(core::slice::from_mut(&mut leaf_1));
        assert_eq!(leaf_1.ecx, 0);
        let mut leaf_d = entry(0xd, 0, SIGNIFICANT_INDEX, 0);
        runtime.apply(&mut leaf_d);
        assert_eq!(leaf_d.ebx, 576);
    }
}
