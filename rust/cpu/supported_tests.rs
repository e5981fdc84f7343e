// SPDX-License-Identifier: GPL-2.0

//! The offered table on made-up hosts, and what a guest's table comes to.

use super::cpuid::{find, has, CpuidEntry};
use super::feature::Feature;
use super::guest::{GuestCpu, InvalidCpuid};
use super::supported::*;
use super::xsave::XsaveLayout;
use crate::x86::control::{check_xcr0, Cr4, Xcr0};

/// A host that has every bit that CPUID can tell, with AVX-512 and the layout of the XSAVE area that
/// Intel's server CPUs have.
struct Full;

impl HostCpuid for Full {
    fn cpuid(&self, function: u32, index: u32) -> [u32; 4] {
        match (function, index) {
            (0, _) => [0x24, 0x756e_6547, 0x6c65_746e, 0x4965_6e69],
            (4, 4..) => [0; 4],
            (4, _) => [0x121, 1, 2, 3],
            (7, 0) => [5, u32::MAX, u32::MAX, u32::MAX],
            (0xd, 0) => [0x602e7, 2696, 2696, 0],
            (0xd, 1) => [0x1f, 0, 0xffff, 0],
            (0xd, 2) => [256, 576, 0, 0],
            (0xd, 5) => [64, 1088, 0, 0],
            (0xd, 6) => [512, 1152, 0, 0],
            (0xd, 7) => [1024, 1664, 0, 0],
            (0xd, 9) => [8, 2688, 0, 0],
            (0xd, 17) => [64, 2752, 2, 0],
            (0xd, 18) => [8192, 2816, 6, 0],
            (0xd, _) => [0; 4],
            (0x8000_0000, _) => [0x8000_0021, 0, 0, 0],
            (0x8000_0008, _) => [0x3934, u32::MAX, u32::MAX, u32::MAX],
            _ => [u32::MAX; 4],
        }
    }
}

/// A host like the first CPUs with VMX: nothing newer than leaf 4.
struct Old;

impl HostCpuid for Old {
    fn cpuid(&self, function: u32, _index: u32) -> [u32; 4] {
        match function {
            0 => [4, 0, 0, 0],
            1 => [0x6f0, 0x0102_0800, 0x2201, 0xbfeb_fbff],
            0x8000_0000 => [0x8000_0001, 0, 0, 0],
            0x8000_0001 => [0, 0, 1, 0x2010_0800],
            _ => [0; 4],
        }
    }
}

const ALL: Offer = Offer {
    xcr0: u64::MAX,
    rdtscp: true,
    invpcid: true,
    xsaves: true,
    pku: true,
    spec_ctrl: true,
    leaf_7_ebx: u32::MAX,
    speculation: u32::MAX,
    arch_capabilities: Some(u64::MAX),
};

fn table(host: &impl HostCpuid, offer: &Offer) -> Vec<CpuidEntry> {
    let mut entries = [CpuidEntry::default(); 100];
    let count = supported(host, offer, &mut entries).unwrap();
    entries[..count].to_vec()
}

#[test]
fn what_does_not_work_is_never_offered() {
    let table = table(&Full, &ALL);
    for absent in [
        Feature::MONITOR,
        Feature::VMX,
        Feature::PDCM,
        Feature::OSXSAVE,
        Feature::OSPKE,
    ] {
        assert!(!has(&table, absent), "{absent:?}");
    }
    let leaf = |function, index| find(&table, function, index).unwrap().registers();
    // SGX (2), MPX (14), PT (25) in EBX; WAITPKG (5), CET (7), KL (23), BUS_LOCK (24), ENQCMD (29),
    // SGX_LC (30), PKS (31) in ECX; UINTR (5), PCONFIG (18), LBR (19), IBT (20), AMX (22, 24, 25) in
    // EDX.
    let [_, ebx, ecx, edx] = leaf(7, 0);
    assert_eq!(ebx & ((1 << 2) | (1 << 14) | (1 << 25)), 0);
    let ecx_absent = [5, 7, 23, 24, 29, 30, 31]
        .map(|bit| 1u32 << bit)
        .iter()
        .sum::<u32>();
    assert_eq!(ecx & ecx_absent, 0u32);
    let edx_absent = [5, 18, 19, 20, 22, 24, 25]
        .map(|bit| 1u32 << bit)
        .iter()
        .sum::<u32>();
    assert_eq!(edx & edx_absent, 0);
    // LAM (26), FRED (17) and LKGS (18).
    assert_eq!(leaf(7, 1)[0] & ((1 << 26) | (1 << 17) | (1 << 18)), 0);
    for function in [3, 5, 0xa, 0x12, 0x14, 0x15, 0x16] {
        assert_eq!(leaf(function, 0), [0; 4], "leaf {function:#x}");
    }
}

#[test]
fn what_software_provides_is_there_on_every_host() {
    let old = table(&Old, &Offer::default());
    for present in [Feature::X2APIC, Feature::TSC_DEADLINE, Feature::HYPERVISOR] {
        assert!(has(&old, present), "{present:?}");
    }
    // SSE3, CX16 and SSSE3 are the host's; VMX (5), bit 13 aside, is not passed on.
    assert_eq!(find(&old, 1, 0).unwrap().ecx & 0x00ff_ffff, 0x20_2201);
    // No APIC ID of the host, but the line size.
    assert_eq!(find(&old, 1, 0).unwrap().ebx, 0x0800);
    assert!(find(&old, 7, 0).is_none());
    assert!(find(&old, 0xd, 0).is_none());
    assert_eq!(find(&old, 0x4000_0000, 0).unwrap().ebx, 0x4b4d_564b);
}

#[test]
fn controls_that_are_missing_take_their_features_along() {
    let none = Offer {
        xcr0: u64::MAX,
        ..Offer::default()
    };
    let (with, without) = (table(&Full, &ALL), table(&Full, &none));
    for feature in [
        Feature::RDTSCP,
        Feature::RDPID,
        Feature::INVPCID,
        Feature::XSAVES,
        Feature::PKU,
        Feature::SPEC_CTRL,
        Feature::STIBP,
        Feature::SSBD,
        Feature::FLUSH_L1D,
        Feature::BHI_CTRL,
        Feature::PSFD,
    ] {
        assert!(has(&with, feature), "{feature:?}");
        assert!(!has(&without, feature), "{feature:?}");
    }
    assert_eq!(ALL.guest_arch_capabilities() & 0b11, 0b11);
    // Without IA32_SPEC_CTRL a guest must not be told to use IBRS in it.
    let silent = Offer {
        spec_ctrl: false,
        ..ALL
    };
    assert_eq!(silent.guest_arch_capabilities() & 0b11, 0b01);
    // What the host's kernel does not trust is not offered.
    let distrusted = Offer {
        speculation: !(Feature::STIBP.mask | Feature::FLUSH_L1D.mask),
        ..ALL
    };
    let entries = table(&Full, &distrusted);
    assert!(has(&entries, Feature::SPEC_CTRL) && !has(&entries, Feature::STIBP));
    assert!(!has(&entries, Feature::FLUSH_L1D));
}

#[test]
fn what_the_hosts_kernel_does_without_is_not_offered() {
    let slow_strings = Offer {
        leaf_7_ebx: !(Feature::ERMS.mask | Feature::TSC_ADJUST.mask),
        ..ALL
    };
    let entries = table(&Full, &slow_strings);
    assert!(has(&table(&Full, &ALL), Feature::ERMS) && !has(&entries, Feature::ERMS));
    assert!(has(&entries, Feature::SMEP));
    // It is rvisor's own.
    assert!(has(&entries, Feature::TSC_ADJUST));
}

#[test]
fn the_xsave_leaf_tells_sizes_of_what_is_offered() {
    let entries = table(&Full, &ALL);
    let sub = |index| find(&entries, 0xd, index).map(CpuidEntry::registers);
    // x87, SSE, AVX, AVX-512 and PKRU; no AMX.
    assert_eq!(sub(0), Some([0x2e7, 2696, 2696, 0]));
    // Compacted: 576 + 256 + 64 + 512 + 1024 + 8.
    assert_eq!(sub(1), Some([0xf, 2440, 0, 0]));
    assert_eq!(sub(7), Some([1024, 1664, 0, 0]));
    assert_eq!(sub(9), Some([8, 2688, 0, 0]));
    assert_eq!(sub(17), None);
    let avx_only = Offer { xcr0: 7, ..ALL };
    let entries = table(&Full, &avx_only);
    assert_eq!(
        find(&entries, 0xd, 0).unwrap().registers(),
        [7, 832, 832, 0]
    );
    assert!(find(&entries, 0xd, 5).is_none());
    // Without the host's AVX there is no AVX-512 either, and what is offered can be set.
    let no_avx = Offer { xcr0: 0xe3, ..ALL };
    assert_eq!(no_avx.guest_xcr0(&Full), 3);
    for xcr0 in 0..0x400 {
        let offered = Offer { xcr0, ..ALL }.guest_xcr0(&Full);
        if offered & 1 != 0 && offered & 6 != 4 {
            assert_eq!(check_xcr0(Xcr0(offered), offered), Ok(()), "{xcr0:#x}");
        }
    }
}

#[test]
fn compacted_components_are_aligned_where_the_cpu_says() {
    let layout = XsaveLayout::of_host(&Full);
    assert_eq!(layout.standard_size(3), 576);
    assert_eq!(layout.compacted_size(0x203), 584);
    // The tile configuration begins at a multiple of 64 behind PKRU: 640.
    assert_eq!(layout.compacted_size(0x20203), 704);
}

#[test]
fn a_table_that_does_not_fit_is_refused() {
    let full = table(&Full, &ALL).len();
    assert!(full <= 100, "{full} entries");
    let mut entries = [CpuidEntry::default(); 100];
    assert!(supported(&Full, &ALL, &mut entries[..full]).is_ok());
    let short = &mut entries[..full - 1];
    assert_eq!(supported(&Full, &ALL, short), Err(TooSmall));
    assert_eq!(supported(&Full, &ALL, &mut []), Err(TooSmall));
}

#[test]
fn the_model_follows_the_table() {
    let entries = table(&Full, &ALL);
    let offered = GuestCpu::offered(&entries, u64::MAX).unwrap();
    assert_eq!((offered.physical_bits, offered.linear_bits), (52, 57));
    assert_eq!(offered.cr4_reserved & Cr4::SMEP, 0);
    assert_ne!(offered.cr4_reserved & Cr4::VMXE, 0);
    assert_ne!(offered.cr4_reserved & Cr4::CET, 0);
    assert_eq!(offered.efer_reserved, !0xd01);
    // All that are defined: bit 9 is not.
    assert_eq!(offered.spec_ctrl, 0x5ff);
    assert!(offered.ibpb && offered.flush_l1d);
    let narrow = GuestCpu::offered(&entries, !Cr4::LA57).unwrap();
    assert_ne!(narrow.cr4_reserved & Cr4::LA57, 0);

    // A guest whose table claims more than is offered gets no more.
    let little = GuestCpu::offered(&table(&Full, &Offer::default()), u64::MAX).unwrap();
    let guest = GuestCpu::new(&entries, &little).unwrap();
    assert!(!guest.rdtscp && !guest.xsaves && guest.spec_ctrl == 0);
    assert_ne!(guest.cr4_reserved & Cr4::PKE, 0);

    // An empty table is the poorest CPU.
    let empty = GuestCpu::new(&[], &offered).unwrap();
    assert_eq!((empty.physical_bits, empty.linear_bits), (36, 48));
    assert!(!empty.long_mode && empty.xcr0 == 0);
    assert_eq!(empty.efer_reserved, !1);
}

#[test]
fn linear_widths_other_than_48_and_57_are_refused() {
    let offered = GuestCpu::offered(&table(&Full, &ALL), u64::MAX).unwrap();
    let with_width = |width: u32| {
        let mut entries = table(&Full, &ALL);
        for entry in entries.iter_mut().filter(|e| e.function == 0x8000_0008) {
            entry.eax = 40 | (width << 8);
        }
        GuestCpu::new(&entries, &offered).map(|cpu| cpu.linear_bits)
    };
    assert_eq!(with_width(48), Ok(48));
    assert_eq!(with_width(57), Ok(57));
    assert_eq!(with_width(0), Ok(48));
    assert_eq!(with_width(49), Err(InvalidCpuid));
}
