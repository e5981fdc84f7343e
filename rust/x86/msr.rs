// SPDX-License-Identifier: GPL-2.0

//! Model-specific registers: their numbers and the rules that hold for whole classes of them (SDM
//! vol. 4, and vol. 3, 2.2 and 12.11).

use super::address::Gva;

/// The number of an MSR, as in ECX of RDMSR and WRMSR.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(transparent)]
pub struct MsrIndex(pub u32);

macro_rules! indices {
    ($($(#[$doc:meta])* $name:ident = $value:expr;)*) => {
        impl MsrIndex {
            $($(#[$doc])* pub const $name: Self = Self($value);)*
        }
    };
}

indices! {
    /// Machine-check address of the Pentium.
    P5_MC_ADDR = 0x0;
    /// Machine-check type of the Pentium.
    P5_MC_TYPE = 0x1;
    /// The time-stamp counter.
    TSC = 0x10;
    /// Platform identification.
    PLATFORM_ID = 0x17;
    /// The local APIC's base, mode and the bootstrap flag.
    APIC_BASE = 0x1b;
    /// Hard power-on configuration.
    EBL_CR_POWERON = 0x2a;
    /// What firmware allows: VMX, SMX, SGX, LMCE.
    FEATURE_CONTROL = 0x3a;
    /// What was added to the TSC by software.
    TSC_ADJUST = 0x3b;
    /// Speculation control: IBRS, STIBP, SSBD.
    SPEC_CTRL = 0x48;
    /// Prediction commands: IBPB. Write-only.
    PRED_CMD = 0x49;
    /// Triggers a microcode update. Write-only.
    BIOS_UPDT_TRIG = 0x79;
    /// The microcode's revision, in the upper half.
    BIOS_SIGN_ID = 0x8b;
    /// SMM monitor control.
    SMM_MONITOR_CTL = 0x9b;
    /// SMRAM base.
    SMBASE = 0x9e;
    /// The first general performance counter.
    PMC0 = 0xc1;
    /// Bus frequency of older CPUs.
    FSB_FREQ = 0xcd;
    /// Platform information: TSC ratio, CPUID faulting.
    PLATFORM_INFO = 0xce;
    /// Counts at the TSC's rate while in C0.
    MPERF = 0xe7;
    /// Counts at the actual rate while in C0.
    APERF = 0xe8;
    /// What range and fixed MTRRs there are.
    MTRR_CAP = 0xfe;
    /// Which vulnerabilities the CPU is free of.
    ARCH_CAPABILITIES = 0x10a;
    /// Flush commands: L1D_FLUSH. Write-only.
    FLUSH_CMD = 0x10b;
    /// L2 cache control of the Pentium II and III.
    BBL_CR_CTL3 = 0x11e;
    /// TSX control.
    TSX_CTRL = 0x122;
    /// Miscellaneous mitigation controls.
    MCU_OPT_CTRL = 0x123;
    /// SYSENTER's code segment.
    SYSENTER_CS = 0x174;
    /// SYSENTER's stack pointer.
    SYSENTER_ESP = 0x175;
    /// SYSENTER's instruction pointer.
    SYSENTER_EIP = 0x176;
    /// Machine-check capabilities: the number of banks.
    MCG_CAP = 0x179;
    /// Machine-check status.
    MCG_STATUS = 0x17a;
    /// Machine-check control.
    MCG_CTL = 0x17b;
    /// The first event selector.
    PERFEVTSEL0 = 0x186;
    /// Current performance state and TSC ratio.
    PERF_STATUS = 0x198;
    /// Requested performance state.
    PERF_CTL = 0x199;
    /// Clock modulation.
    CLOCK_MODULATION = 0x19a;
    /// Thermal interrupts.
    THERM_INTERRUPT = 0x19b;
    /// Thermal status.
    THERM_STATUS = 0x19c;
    /// Miscellaneous features.
    MISC_ENABLE = 0x1a0;
    /// Temperature target.
    TEMPERATURE_TARGET = 0x1a2;
    /// Off-core response selection.
    OFFCORE_RSP_0 = 0x1a6;
    /// Prefetchers.
    MISC_FEATURE_CONTROL = 0x1a4;
    /// Energy and performance bias.
    ENERGY_PERF_BIAS = 0x1b0;
    /// Debug control: LBR, BTF, bus-lock detection.
    DEBUGCTL = 0x1d9;
    /// Source of the last branch.
    LAST_BRANCH_FROM_IP = 0x1db;
    /// Destination of the last branch.
    LAST_BRANCH_TO_IP = 0x1dc;
    /// Source of the last branch before an interrupt.
    LAST_INT_FROM_IP = 0x1dd;
    /// Destination of the last branch before an interrupt.
    LAST_INT_TO_IP = 0x1de;
    /// Power control.
    POWER_CTL = 0x1fc;
    /// The first variable MTRR's base.
    MTRR_PHYS_BASE0 = 0x200;
    /// The first variable MTRR's mask.
    MTRR_PHYS_MASK0 = 0x201;
    /// Fixed MTRR: 64 KiB ranges from 0.
    MTRR_FIX_64K_00000 = 0x250;
    /// Fixed MTRR: 16 KiB ranges from 512 KiB.
    MTRR_FIX_16K_80000 = 0x258;
    /// Fixed MTRR: 16 KiB ranges from 640 KiB.
    MTRR_FIX_16K_A0000 = 0x259;
    /// Fixed MTRR: 4 KiB ranges from 768 KiB; seven more follow.
    MTRR_FIX_4K_C0000 = 0x268;
    /// The last of the fixed MTRRs of 4 KiB ranges.
    MTRR_FIX_4K_F8000 = 0x26f;
    /// The page attribute table.
    PAT = 0x277;
    /// Corrected machine-check interrupts of bank 0.
    MC0_CTL2 = 0x280;
    /// The default memory type, and the enables of the MTRRs.
    MTRR_DEF_TYPE = 0x2ff;
    /// Performance capabilities.
    PERF_CAPABILITIES = 0x345;
    /// Enables of the performance counters.
    PERF_GLOBAL_CTRL = 0x38f;
    /// Machine-check bank 0 control; four MSRs a bank.
    MC0_CTL = 0x400;
    /// The first of the capability MSRs of VMX.
    VMX_BASIC = 0x480;
    /// The last of the capability MSRs of VMX.
    VMX_VMFUNC = 0x491;
    /// The debug store's area.
    DS_AREA = 0x600;
    /// Energy units.
    RAPL_POWER_UNIT = 0x606;
    /// Package energy.
    PKG_ENERGY_STATUS = 0x611;
    /// The TSC value at which the local APIC's timer fires.
    TSC_DEADLINE = 0x6e0;
    /// The first MSR of the x2APIC.
    X2APIC_FIRST = 0x800;
    /// The x2APIC's task priority.
    X2APIC_TPR = 0x808;
    /// The last MSR of the x2APIC.
    X2APIC_LAST = 0x8ff;
    /// Supervisor state components of XSAVES.
    XSS = 0xda0;
    /// KVM's wall clock: the old number.
    KVM_WALL_CLOCK = 0x11;
    /// KVM's per-vCPU clock: the old number.
    KVM_SYSTEM_TIME = 0x12;
    /// KVM's wall clock.
    KVM_WALL_CLOCK_NEW = 0x4b56_4d00;
    /// KVM's per-vCPU clock.
    KVM_SYSTEM_TIME_NEW = 0x4b56_4d01;
    /// KVM's asynchronous page faults.
    KVM_ASYNC_PF_EN = 0x4b56_4d02;
    /// KVM's steal time.
    KVM_STEAL_TIME = 0x4b56_4d03;
    /// KVM's paravirtual end of interrupt.
    KVM_PV_EOI_EN = 0x4b56_4d04;
    /// KVM's control of polling at HLT.
    KVM_POLL_CONTROL = 0x4b56_4d05;
    /// The extended-feature-enable register.
    EFER = 0xc000_0080;
    /// SYSCALL's segments, and its 32-bit instruction pointer.
    STAR = 0xc000_0081;
    /// SYSCALL's instruction pointer in 64-bit mode.
    LSTAR = 0xc000_0082;
    /// SYSCALL's instruction pointer in compatibility mode.
    CSTAR = 0xc000_0083;
    /// The RFLAGS that SYSCALL clears.
    SYSCALL_MASK = 0xc000_0084;
    /// FS's base.
    FS_BASE = 0xc000_0100;
    /// GS's base.
    GS_BASE = 0xc000_0101;
    /// What SWAPGS exchanges with GS's base.
    KERNEL_GS_BASE = 0xc000_0102;
    /// What RDTSCP and RDPID give.
    TSC_AUX = 0xc000_0103;
    /// AMD's hardware configuration.
    K7_HWCR = 0xc001_0015;
}

impl MsrIndex {
    /// Whether this is an x2APIC register (SDM vol. 3, 12.12.1.2).
    #[inline]
    pub const fn is_x2apic(self) -> bool {
        self.0 >> 8 == Self::X2APIC_FIRST.0 >> 8
    }

    /// Whether WRMSR with a non-canonical value raises #GP(0) (SDM vol. 2, WRMSR).
    #[inline]
    pub const fn wants_canonical(self) -> bool {
        matches!(
            self,
            Self::FS_BASE
                | Self::GS_BASE
                | Self::KERNEL_GS_BASE
                | Self::LSTAR
                | Self::CSTAR
                | Self::SYSENTER_EIP
                | Self::SYSENTER_ESP
                | Self::DS_AREA
        )
    }
}

/// The page attribute table after reset (SDM vol. 3, 13.12.4).
pub const PAT_RESET: u64 = 0x0007_0406_0007_0406;

/// IA32_APIC_BASE: this is the bootstrap processor.
pub const APIC_BASE_BSP: u64 = 1 << 8;
/// IA32_APIC_BASE: x2APIC mode.
pub const APIC_BASE_X2APIC: u64 = 1 << 10;
/// IA32_APIC_BASE: the local APIC is enabled.
pub const APIC_BASE_ENABLE: u64 = 1 << 11;
/// The address of the local APIC after reset, which also is what IA32_APIC_BASE then holds apart
/// from its flags.
pub const APIC_BASE_RESET_ADDRESS: u64 = 0xfee0_0000;

/// Whether `value` names a valid memory type in each byte of the PAT: UC, WC, WT, WP, WB or UC-
/// (SDM vol. 3, table 13-10).
#[inline]
pub const fn is_valid_pat(value: u64) -> bool {
    let mut rest = value;
    let mut entry = 0;
    while entry < 8u32 {
        if !matches!(rest & 0xff, 0 | 1 | 4 | 5 | 6 | 7) {
            return false;
        }
        rest >>= 8;
        entry = entry.wrapping_add(1);
    }
    true
}

/// Whether `kind` is a memory type that an MTRR can hold: UC, WC, WT, WP or WB (SDM vol. 3, table
/// 13-8).
#[inline]
pub const fn is_valid_mtrr_type(kind: u64) -> bool {
    matches!(kind, 0 | 1 | 4 | 5 | 6)
}

/// Whether each byte of a fixed MTRR is a valid type.
#[inline]
pub const fn is_valid_fixed_mtrr(value: u64) -> bool {
    // The types are those of the PAT, but for UC- (7), which only the PAT has.
    let mut rest = value;
    let mut entry = 0;
    while entry < 8u32 {
        if !is_valid_mtrr_type(rest & 0xff) {
            return false;
        }
        rest >>= 8;
        entry = entry.wrapping_add(1);
    }
    true
}

/// Whether `value` may be written to `index` as far as canonicality goes, on a CPU with
/// `linear_bits` (48 or 57) of linear address.
#[inline]
pub const fn is_canonical_for(index: MsrIndex, value: u64, linear_bits: u32) -> bool {
    !index.wants_canonical() || Gva::new(value).is_canonical(linear_bits)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pat_types() {
        assert!(is_valid_pat(PAT_RESET));
        assert!(is_valid_pat(0x0705_0600_0406_0100));
        for bad in [2u64, 3, 8, 0x10, 0xff] {
            for byte in 0..8 {
                assert!(!is_valid_pat(bad << (8 * byte)), "{bad:#x} in byte {byte}");
            }
        }
    }

    #[test]
    fn fixed_mtrrs_have_no_uc_minus() {
        assert!(is_valid_fixed_mtrr(0x0606_0606_0606_0606));
        assert!(!is_valid_fixed_mtrr(0x0606_0706_0606_0606));
    }

    #[test]
    fn x2apic_range_ends() {
        assert!(!MsrIndex(0x7ff).is_x2apic());
        assert!(MsrIndex(0x800).is_x2apic());
        assert!(MsrIndex(0x8ff).is_x2apic());
        assert!(!MsrIndex(0x900).is_x2apic());
    }

    #[test]
    fn canonical_is_asked_of_addresses_only() {
        let odd = 0x8000_0000_0000_0000;
        assert!(!is_canonical_for(MsrIndex::LSTAR, odd, 48));
        assert!(is_canonical_for(MsrIndex::STAR, odd, 48));
        assert!(is_canonical_for(MsrIndex::FS_BASE, 1 << 50, 57));
        assert!(!is_canonical_for(MsrIndex::FS_BASE, 1 << 50, 48));
    }
}
