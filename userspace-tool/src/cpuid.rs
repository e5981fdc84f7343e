// SPDX-License-Identifier: GPL-2.0

//! The CPU that the guest sees: what the hypervisor supports, with each virtual CPU's place in the machine
//! filled in. The machine is one package, of one core of one thread for each virtual CPU.
//!
//! Leaves and fields are those of the SDM, volume 2, CPUID.

use kvm_bindings::{
    kvm_cpuid_entry2, CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES,
};
use kvm_ioctls::{Cap, Kvm};

use crate::error::{failed, Result};

/// Leaf 1, ECX: the local APIC's timer has a mode with a TSC deadline.
const TSC_DEADLINE: u32 = 1 << 24;
/// Leaf 1, EDX: the package has room for more than one logical processor.
const HTT: u32 = 1 << 28;

/// Leaf 0xb, ECX[15:8]: a level of threads, a level of cores.
const LEVEL_SMT: u32 = 1;
const LEVEL_CORE: u32 = 2;

/// What the CPUs of a machine are made from.
#[derive(Debug)]
pub struct Template {
    /// What the hypervisor supports.
    supported: CpuId,
    cpus: u32,
    /// KVM tells the timer's mode with a TSC deadline by a capability: it takes the in-kernel local APIC.
    deadline: bool,
}

impl Template {
    /// Asks the hypervisor, for a machine with `cpus` CPUs.
    ///
    /// # Errors
    ///
    /// [`crate::error::Error::Call`] where the hypervisor does not tell.
    pub fn new(kvm: &Kvm, cpus: u32) -> Result<Self> {
        Ok(Self {
            supported: kvm
                .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
                .map_err(failed("asking which CPU features guests can have"))?,
            cpus,
            deadline: kvm.check_extension(Cap::TscDeadlineTimer),
        })
    }

    /// The leaves for the CPU with that APIC ID.
    ///
    /// # Errors
    ///
    /// [`crate::error::Error::Call`] where there are more leaves than a call can take.
    pub fn for_cpu(&self, apic_id: u32) -> Result<CpuId> {
        let cpus = self.cpus;
        debug_assert!(apic_id < cpus);
        let mut cpuid = self.supported.clone();
        let leaf_0 = cpuid.as_slice().iter().find(|entry| entry.function == 0);
        let most_leaf = leaf_0.map_or(0, |entry| entry.eax);
        cpuid.retain(|entry| !is_topology(entry.function));
        let leaves = [0xb, 0x1f].into_iter().filter(|leaf| *leaf <= most_leaf);
        for level in leaves.flat_map(|leaf| topology(leaf, cpus)) {
            cpuid
                .push(level)
                .map_err(failed("listing the CPU's features"))?;
        }
        for entry in cpuid.as_mut_slice() {
            match entry.function {
                1 => {
                    let ids = cpus.next_power_of_two().min(0xff);
                    entry.ebx = entry.ebx & 0xffff | (ids << 16) | (apic_id << 24);
                    entry.edx &= !HTT;
                    if cpus > 1 {
                        entry.edx |= HTT;
                    }
                    if self.deadline {
                        entry.ecx |= TSC_DEADLINE;
                    }
                }
                4 => cache_sharing(entry, cpus),
                leaf if is_topology(leaf) => entry.edx = apic_id,
                // AMD: the number of cores, less 1, and the width of the APIC ID's part for them.
                0x8000_0008 if entry.ecx & 0xff != 0 || cpus > 1 => {
                    entry.ecx = entry.ecx & !0xf0ff | (cpus - 1) & 0xff | (core_bits(cpus) << 12);
                }
                // AMD: the extended APIC ID.
                0x8000_001e => entry.eax = apic_id,
                _ => {}
            }
        }
        Ok(cpuid)
    }
}

/// Whether a leaf enumerates the topology by levels.
fn is_topology(leaf: u32) -> bool {
    matches!(leaf, 0xb | 0x1f)
}

/// The number of bits of an APIC ID that tell `cpus` CPUs apart.
fn core_bits(cpus: u32) -> u32 {
    cpus.next_power_of_two().trailing_zeros()
}

/// Leaf 0xb or 0x1f: one thread a core, and the cores.
fn topology(leaf: u32, cpus: u32) -> [kvm_cpuid_entry2; 3] {
    let level = |index: u32, kind: u32, shift: u32, count: u32| kvm_cpuid_entry2 {
        function: leaf,
        index,
        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax: shift,
        ebx: count,
        ecx: (kind << 8) | index,
        ..Default::default()
    };
    [
        level(0, LEVEL_SMT, 0, 1),
        level(1, LEVEL_CORE, core_bits(cpus), cpus),
        level(2, 0, 0, 0),
    ]
}

/// Leaf 4: how many CPUs share a cache (EAX[25:14]), and how many cores there are (EAX[31:26]), less 1.
fn cache_sharing(entry: &mut kvm_cpuid_entry2, cpus: u32) {
    let (kind, level) = (entry.eax & 0x1f, (entry.eax >> 5) & 7);
    if kind == 0 {
        return;
    }
    let ids = cpus.next_power_of_two() - 1;
    let sharing = if level >= 3 { ids.min(0xfff) } else { 0 };
    entry.eax = entry.eax & 0x3fff | (sharing << 14) | (ids.min(0x3f) << 26);
}

#[cfg(test)]
mod tests {
    use super::*;

    const SSE2: u32 = 1 << 26;

    fn entry(function: u32, index: u32, eax: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 {
            function,
            index,
            eax,
            ..Default::default()
        }
    }

    fn template(cpus: u32) -> Template {
        let mut leaf_1 = entry(1, 0, 0x306d4);
        (leaf_1.ebx, leaf_1.edx) = (0x0710_0800, HTT | SSE2);
        let supported = [
            entry(0, 0, 0x14),
            leaf_1,
            entry(4, 0, 0x1c00_4121),
            entry(4, 3, 0x1c03_c163),
            entry(0xb, 0, 99),
            entry(0x8000_0000, 0, 0x8000_0008),
        ];
        Template {
            supported: CpuId::from_entries(&supported).expect("they are few"),
            cpus,
            deadline: true,
        }
    }

    fn entries_for(template: &Template, apic_id: u32) -> CpuId {
        template.for_cpu(apic_id).expect("they are few")
    }

    fn find(entries: &CpuId, function: u32, index: u32) -> kvm_cpuid_entry2 {
        let mut found = entries
            .as_slice()
            .iter()
            .filter(|e| (e.function, e.index) == (function, index));
        let first = *found.next().expect("the leaf is there");
        assert!(
            found.next().is_none(),
            "{function:#x}.{index} is there twice"
        );
        first
    }

    #[test]
    fn each_cpu_has_its_own_apic_id() {
        let template = template(3);
        for id in 0..3 {
            let entries = entries_for(&template, id);
            assert_eq!(find(&entries, 1, 0).ebx >> 24, id);
            for level in 0..3 {
                assert_eq!(find(&entries, 0xb, level).edx, id);
            }
        }
    }

    #[test]
    fn what_is_not_the_topologys_stays() {
        let entries = entries_for(&template(3), 2);
        let leaf_1 = find(&entries, 1, 0);
        assert_eq!((leaf_1.eax, leaf_1.ebx & 0xffff), (0x306d4, 0x0800));
        assert_ne!(leaf_1.edx & SSE2, 0);
        assert_eq!(find(&entries, 4, 0).eax & 0x3fff, 0x1c00_4121 & 0x3fff);
    }

    #[test]
    fn the_topology_levels_count_threads_then_cores() {
        for (cpus, bits) in [(1, 0), (2, 1), (3, 2), (8, 3), (254, 8)] {
            let entries = entries_for(&template(cpus), 0);
            let (smt, core, end) = (
                find(&entries, 0xb, 0),
                find(&entries, 0xb, 1),
                find(&entries, 0xb, 2),
            );
            assert_eq!((smt.eax, smt.ebx, smt.ecx), (0, 1, 0x100));
            assert_eq!((core.eax, core.ebx, core.ecx), (bits, cpus, 0x201));
            assert_eq!((end.eax, end.ebx, end.ecx), (0, 0, 2));
        }
    }

    #[test]
    fn a_leaf_above_the_highest_is_not_made_up() {
        let entries = entries_for(&template(2), 0);
        assert!(entries
            .as_slice()
            .iter()
            .all(|entry| entry.function != 0x1f));
    }

    #[test]
    fn one_cpu_is_no_hyperthreading() {
        assert_eq!(find(&entries_for(&template(1), 0), 1, 0).edx & HTT, 0);
        assert_ne!(find(&entries_for(&template(2), 0), 1, 0).edx & HTT, 0);
    }

    #[test]
    fn caches_are_shared_from_the_third_level_on() {
        let entries = entries_for(&template(4), 0);
        let sharing = |index| ((find(&entries, 4, index).eax >> 14) & 0xfff) + 1;
        assert_eq!((sharing(0), sharing(3)), (1, 4));
        assert_eq!((find(&entries, 4, 0).eax >> 26) + 1, 4);
    }

    #[test]
    fn the_deadline_timer_comes_by_its_capability() {
        let supported = [entry(0, 0, 1), entry(1, 0, 0)];
        for deadline in [false, true] {
            let template = Template {
                supported: CpuId::from_entries(&supported).expect("they are few"),
                cpus: 1,
                deadline,
            };
            let entries = entries_for(&template, 0);
            assert_eq!(find(&entries, 1, 0).ecx & TSC_DEADLINE != 0, deadline);
        }
    }
}
