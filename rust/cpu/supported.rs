// SPDX-License-Identifier: GPL-2.0

//! What CPUID rvisor offers to guests: KVM_GET_SUPPORTED_CPUID, one function a leaf.
//!
//! A feature is offered where the host's CPU has it, it is named here as one that works in a guest,
//! and the hypervisor's other half, which knows the VMX controls and what it switches, has not
//! ruled it out. What software alone provides is offered always.

use super::cpuid::{CpuidEntry, SIGNIFICANT_INDEX};
use super::feature::{mask, Feature};
use super::xsave::XsaveLayout;
use crate::x86::control::Xcr0;

/// The host's CPUID instruction.
pub trait HostCpuid {
    /// EAX, EBX, ECX and EDX for a leaf and subleaf.
    fn cpuid(&self, function: u32, index: u32) -> [u32; 4];
}

/// What hangs on VMX controls and on state that is switched between host and guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offer {
    /// The host's XCR0: components that the host does not switch can't be a guest's.
    pub xcr0: u64,
    /// The control "enable RDTSCP" can be set, and IA32_TSC_AUX is switched.
    pub rdtscp: bool,
    /// The control "enable INVPCID" can be set.
    pub invpcid: bool,
    /// The control "enable XSAVES/XRSTORS" can be set.
    pub xsaves: bool,
    /// PKRU is switched.
    pub pku: bool,
    /// IA32_SPEC_CTRL is switched.
    pub spec_ctrl: bool,
    /// Bits of EBX of leaf 7 that the host's kernel uses itself: it takes away what does not work on this CPU, or
    /// not fast, and what its user has switched off.
    pub leaf_7_ebx: u32,
    /// Likewise of EDX, as far as speculation is concerned.
    pub speculation: u32,
    /// The host's IA32_ARCH_CAPABILITIES, where it has one.
    pub arch_capabilities: Option<u64>,
}

/// The slice can't hold the table: E2BIG.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TooSmall;

/// The highest basic leaf.
const MAX_BASIC: u32 = 0x1f;
/// The highest extended leaf.
const MAX_EXTENDED: u32 = 0x8000_0008;
/// The leaf of the hypervisor's signature.
const SIGNATURE: u32 = 0x4000_0000;
/// The leaf of KVM's paravirtual features.
const KVM_FEATURES: u32 = 0x4000_0001;
/// KVM_FEATURE_NOP_IO_DELAY: port writes for the delay's sake are needless.
const KVM_NOP_IO_DELAY: u32 = 1 << 1;
/// CPUs have fewer caches than this; leaf 4 ends by itself before.
const MAX_CACHES: u32 = 16;

const LEAF_1_ECX: u32 = mask(&[
    Feature::SSE3,
    Feature::PCLMULQDQ,
    Feature::SSSE3,
    Feature::FMA,
    Feature::CX16,
    Feature::PCID,
    Feature::SSE4_1,
    Feature::SSE4_2,
    Feature::MOVBE,
    Feature::POPCNT,
    Feature::AES,
    Feature::XSAVE,
    Feature::AVX,
    Feature::F16C,
    Feature::RDRAND,
]);
const LEAF_1_ECX_EMULATED: u32 =
    mask(&[Feature::X2APIC, Feature::TSC_DEADLINE, Feature::HYPERVISOR]);
const LEAF_1_EDX: u32 = mask(&[
    Feature::FPU,
    Feature::VME,
    Feature::DE,
    Feature::PSE,
    Feature::TSC,
    Feature::MSR,
    Feature::PAE,
    Feature::MCE,
    Feature::CX8,
    Feature::APIC,
    Feature::SEP,
    Feature::MTRR,
    Feature::PGE,
    Feature::MCA,
    Feature::CMOV,
    Feature::PAT,
    Feature::PSE36,
    Feature::CLFLUSH,
    Feature::MMX,
    Feature::FXSR,
    Feature::SSE,
    Feature::SSE2,
    Feature::SELF_SNOOP,
]);
const LEAF_7_EBX: u32 = mask(&[
    Feature::FSGSBASE,
    Feature::BMI1,
    Feature::HLE,
    Feature::AVX2,
    Feature::FDP_EXCEPTION_ONLY,
    Feature::SMEP,
    Feature::BMI2,
    Feature::ERMS,
    Feature::INVPCID,
    Feature::RTM,
    Feature::ZERO_FCS_FDS,
    Feature::AVX512F,
    Feature::AVX512DQ,
    Feature::RDSEED,
    Feature::ADX,
    Feature::SMAP,
    Feature::AVX512IFMA,
    Feature::CLFLUSHOPT,
    Feature::CLWB,
    Feature::AVX512CD,
    Feature::SHA,
    Feature::AVX512BW,
    Feature::AVX512VL,
]);
const LEAF_7_ECX: u32 = mask(&[
    Feature::AVX512VBMI,
    Feature::UMIP,
    Feature::PKU,
    Feature::AVX512_VBMI2,
    Feature::GFNI,
    Feature::VAES,
    Feature::VPCLMULQDQ,
    Feature::AVX512_VNNI,
    Feature::AVX512_BITALG,
    Feature::AVX512_VPOPCNTDQ,
    Feature::LA57,
    Feature::RDPID,
    Feature::CLDEMOTE,
    Feature::MOVDIRI,
    Feature::MOVDIR64B,
]);
const LEAF_7_EDX: u32 = mask(&[
    Feature::FSRM,
    Feature::AVX512_VP2INTERSECT,
    Feature::MD_CLEAR,
    Feature::SERIALIZE,
    Feature::TSXLDTRK,
    Feature::AVX512_FP16,
]);
const LEAF_7_EDX_SPEC_CTRL: u32 = mask(&[Feature::SPEC_CTRL, Feature::STIBP, Feature::SSBD]);
const LEAF_7_1_EAX: u32 = mask(&[
    Feature::SHA512,
    Feature::SM3,
    Feature::SM4,
    Feature::AVX_VNNI,
    Feature::AVX512_BF16,
    Feature::CMPCCXADD,
    Feature::FZRM,
    Feature::FSRS,
    Feature::FSRC,
    Feature::AVX_IFMA,
]);
const LEAF_7_1_EDX: u32 = mask(&[
    Feature::AVX_VNNI_INT8,
    Feature::AVX_NE_CONVERT,
    Feature::AVX_VNNI_INT16,
    Feature::PREFETCHI,
]);
const LEAF_7_2_EDX: u32 = mask(&[Feature::MCDT_NO]);
const LEAF_7_2_EDX_SPEC_CTRL: u32 = mask(&[
    Feature::PSFD,
    Feature::IPRED_CTRL,
    Feature::RRSBA_CTRL,
    Feature::DDPD_U,
    Feature::BHI_CTRL,
]);
const LEAF_D_1_EAX: u32 = mask(&[Feature::XSAVEOPT, Feature::XSAVEC, Feature::XGETBV1]);
const EXTENDED_1_ECX: u32 = mask(&[Feature::LAHF_LM, Feature::LZCNT, Feature::PREFETCHW]);
const EXTENDED_1_EDX: u32 = mask(&[Feature::SYSCALL, Feature::NX, Feature::GBPAGES, Feature::LM]);
/// The state components that guests can have.
const XCR0: u64 = Xcr0::X87 | Xcr0::SSE | Xcr0::AVX | Xcr0::AVX512;

/// The bits of IA32_ARCH_CAPABILITIES that say what the CPU is free of, or what its VERW and
/// branch predictor do, which holds in a guest as in the host (SDM vol. 4, table 2-2).
const ARCH_CAPABILITIES: u64 = {
    let immunities = (1 << 0) | (1 << 4) | (1 << 5) | (1 << 6) | (1 << 8);
    let stale_data = (1 << 13) | (1 << 14) | (1 << 15) | (1 << 17);
    let prediction = (1 << 2) | (1 << 20) | (1 << 24);
    let sampling = (1 << 26) | (1 << 27) | (1 << 28);
    immunities | stale_data | prediction | sampling
};
/// Its bits that tell how IA32_SPEC_CTRL works: IBRS_ALL and RRSBA.
const ARCH_CAPABILITIES_SPEC_CTRL: u64 = (1 << 1) | (1 << 19);

impl Offer {
    /// The state components that a guest can have.
    pub fn guest_xcr0(&self, host: &impl HostCpuid) -> u64 {
        if host.cpuid(0, 0)[0] < 0xd {
            return 0;
        }
        let [low, _, _, high] = host.cpuid(0xd, 0);
        let pkru = if self.offers_pku(host) { Xcr0::PKRU } else { 0 };
        let offered = (XCR0 | pkru) & self.xcr0 & (u64::from(low) | (u64::from(high) << 32));
        // AVX-512 needs its three components and AVX.
        let avx512 = Xcr0::AVX512 | Xcr0::AVX;
        if offered & avx512 == avx512 {
            offered
        } else {
            offered & !Xcr0::AVX512
        }
    }

    /// Protection keys need the host to have them on, or PKRU can't be switched.
    fn offers_pku(&self, host: &impl HostCpuid) -> bool {
        let on = Feature::PKU.mask | Feature::OSPKE.mask;
        self.pku && host.cpuid(7, 0)[2] & on == on
    }

    /// The guest's IA32_ARCH_CAPABILITIES: 0 where the host has none.
    pub fn guest_arch_capabilities(&self) -> u64 {
        let offered = if self.spec_ctrl {
            ARCH_CAPABILITIES | ARCH_CAPABILITIES_SPEC_CTRL
        } else {
            ARCH_CAPABILITIES
        };
        self.arch_capabilities.unwrap_or(0) & offered
    }
}

/// A table being filled.
struct Table<'a, H> {
    host: &'a H,
    offer: &'a Offer,
    entries: &'a mut [CpuidEntry],
    used: usize,
}

/// `value` where `condition` holds.
const fn when(condition: bool, value: u32) -> u32 {
    if condition {
        value
    } else {
        0
    }
}

/// Fills `entries` with what is offered and says how many there are, at most 100.
pub fn supported(
    host: &impl HostCpuid,
    offer: &Offer,
    entries: &mut [CpuidEntry],
) -> Result<usize, TooSmall> {
    let mut table = Table {
        host,
        offer,
        entries,
        used: 0,
    };
    let highest = host.cpuid(0, 0)[0].min(MAX_BASIC);
    for function in 0..=highest {
        table.basic(function)?;
    }
    let highest = host.cpuid(0x8000_0000, 0)[0].min(MAX_EXTENDED);
    for function in 0x8000_0000..=highest {
        table.extended(function)?;
    }
    table.hypervisor()?;
    Ok(table.used)
}

impl<H: HostCpuid> Table<'_, H> {
    fn push(&mut self, entry: CpuidEntry) -> Result<(), TooSmall> {
        *self.entries.get_mut(self.used).ok_or(TooSmall)? = entry;
        self.used = self.used.wrapping_add(1);
        Ok(())
    }

    /// Adds a leaf without subleaves.
    fn leaf(&mut self, function: u32, registers: [u32; 4]) -> Result<(), TooSmall> {
        let [eax, ebx, ecx, edx] = registers;
        self.push(CpuidEntry {
            function,
            index: 0,
            flags: 0,
            eax,
            ebx,
            ecx,
            edx,
        })
    }

    /// Adds a subleaf.
    fn subleaf(&mut self, function: u32, index: u32, registers: [u32; 4]) -> Result<(), TooSmall> {
        let [eax, ebx, ecx, edx] = registers;
        self.push(CpuidEntry {
            function,
            index,
            flags: SIGNIFICANT_INDEX,
            eax,
            ebx,
            ecx,
            edx,
        })
    }

    /// The basic leaves. Those without an arm say nothing of a guest, or what they tell is absent:
    /// the serial number (3), MONITOR (5), performance monitoring (0xa), cache allocation, SGX
    /// (0x12), processor trace (0x14), clocks (0x15, 0x16: userspace knows which rates its guest's
    /// timers have), AMX (0x1d, 0x1e).
    fn basic(&mut self, function: u32) -> Result<(), TooSmall> {
        match function {
            0 => self.vendor(),
            1 => self.version(),
            2 => self.leaf(2, self.host.cpuid(2, 0)),
            4 => self.caches(),
            6 => self.power(),
            7 => self.features(),
            // No topology: subleaf 1 is what tells one, and userspace writes it.
            0xb | 0x1f => self.subleaf(function, 0, [0; 4]),
            0xd => self.xsave(),
            _ => self.leaf(function, [0; 4]),
        }
    }

    /// Leaf 0: the highest leaf and the vendor.
    fn vendor(&mut self) -> Result<(), TooSmall> {
        let [highest, ebx, ecx, edx] = self.host.cpuid(0, 0);
        self.leaf(0, [highest.min(MAX_BASIC), ebx, ecx, edx])
    }

    /// Leaf 1: the model and features. Of EBX only the size of a CLFLUSH line is the CPU's own, the
    /// rest tells which of the host's CPUs this is.
    fn version(&mut self) -> Result<(), TooSmall> {
        let [eax, ebx, ecx, edx] = self.host.cpuid(1, 0);
        let ecx = (ecx & LEAF_1_ECX) | LEAF_1_ECX_EMULATED;
        self.leaf(1, [eax, ebx & 0xff00, ecx, edx & LEAF_1_EDX])
    }

    /// Leaf 4: the caches.
    fn caches(&mut self) -> Result<(), TooSmall> {
        for index in 0..MAX_CACHES {
            let cache = self.host.cpuid(4, index);
            self.subleaf(4, index, cache)?;
            // A cache of type 0 ends the list.
            if cache[0] & 0x1f == 0 {
                break;
            }
        }
        Ok(())
    }

    /// Leaf 6: only that the local APIC's timer runs on in every state.
    fn power(&mut self) -> Result<(), TooSmall> {
        self.leaf(6, [1 << 2, 0, 0, 0])
    }

    /// Leaf 7: more features.
    fn features(&mut self) -> Result<(), TooSmall> {
        let [highest, ebx, ecx, edx] = self.host.cpuid(7, 0);
        let offer = *self.offer;
        let highest = highest.min(2);
        let without_ebx = when(!offer.invpcid, Feature::INVPCID.mask);
        let without_ecx = when(!offer.rdtscp, Feature::RDPID.mask)
            | when(!offer.offers_pku(self.host), Feature::PKU.mask);
        let spec_ctrl = when(offer.spec_ctrl, LEAF_7_EDX_SPEC_CTRL);
        let speculation = (spec_ctrl | Feature::FLUSH_L1D.mask) & offer.speculation;
        // What the MSR would tell of an older CPU is all zeroes, so it needs no host MSR; guests
        // find mitigations by it.
        let capabilities = Feature::ARCH_CAPABILITIES.mask;
        let registers = [
            highest,
            (ebx & LEAF_7_EBX & offer.leaf_7_ebx & !without_ebx) | Feature::TSC_ADJUST.mask,
            ecx & LEAF_7_ECX & !without_ecx,
            (edx & (LEAF_7_EDX | speculation)) | capabilities,
        ];
        self.subleaf(7, 0, registers)?;
        if highest >= 1 {
            let [eax, _, _, edx] = self.host.cpuid(7, 1);
            self.subleaf(7, 1, [eax & LEAF_7_1_EAX, 0, 0, edx & LEAF_7_1_EDX])?;
        }
        if highest >= 2 {
            let edx = self.host.cpuid(7, 2)[3];
            let spec_ctrl = when(offer.spec_ctrl, LEAF_7_2_EDX_SPEC_CTRL);
            self.subleaf(7, 2, [0, 0, 0, edx & (LEAF_7_2_EDX | spec_ctrl)])?;
        }
        Ok(())
    }

    /// Leaf 0xd: the XSAVE area. EBX of subleaves 0 and 1 follows the guest's XCR0 later; here it
    /// has the most there can be.
    fn xsave(&mut self) -> Result<(), TooSmall> {
        let xcr0 = self.offer.guest_xcr0(self.host);
        let layout = XsaveLayout::of_host(self.host);
        let size = layout.standard_size(xcr0);
        let (low, high) = ((xcr0 & 0xffff_ffff) as u32, (xcr0 >> 32) as u32);
        self.subleaf(0xd, 0, [low, size, size, high])?;
        if xcr0 == 0 {
            return Ok(());
        }
        let offered = LEAF_D_1_EAX | when(self.offer.xsaves, Feature::XSAVES.mask);
        let eax = self.host.cpuid(0xd, 1)[0] & offered;
        let compacts = eax & (Feature::XSAVEC.mask | Feature::XSAVES.mask) != 0;
        let size = when(compacts, layout.compacted_size(xcr0));
        self.subleaf(0xd, 1, [eax, size, 0, 0])?;
        for index in (2..64u32).filter(|index| xcr0.wrapping_shr(*index) & 1 != 0) {
            let [size, offset, flags, _] = self.host.cpuid(0xd, index);
            // Of the flags, the alignment in the compacted format.
            self.subleaf(0xd, index, [size, offset, flags & 2, 0])?;
        }
        Ok(())
    }

    /// The extended leaves.
    fn extended(&mut self, function: u32) -> Result<(), TooSmall> {
        let [eax, ebx, ecx, edx] = self.host.cpuid(function, 0);
        let registers = match function {
            0x8000_0000 => [eax.min(MAX_EXTENDED), ebx, ecx, edx],
            0x8000_0001 => {
                let edx_offered = EXTENDED_1_EDX | when(self.offer.rdtscp, Feature::RDTSCP.mask);
                [0, 0, ecx & EXTENDED_1_ECX, edx & edx_offered]
            }
            // The name of the model.
            0x8000_0002..=0x8000_0004 => [eax, ebx, ecx, edx],
            // The L2 cache.
            0x8000_0006 => [0, 0, ecx, 0],
            0x8000_0007 => [0, 0, 0, edx & Feature::INVARIANT_TSC.mask],
            0x8000_0008 => Self::address_widths(eax),
            _ => [0; 4],
        };
        self.leaf(function, registers)
    }

    /// Leaf 0x80000008: the widths of physical (7:0) and linear (15:8) addresses, and in 23:16 the
    /// widest guest-physical address that EPT of four levels reaches.
    fn address_widths(eax: u32) -> [u32; 4] {
        let physical = eax & 0xff;
        let linear = ((eax >> 8) & 0xff).max(48);
        [physical | (linear << 8) | (physical.min(48) << 16), 0, 0, 0]
    }

    /// The hypervisor's leaves: that KVM's interface is here, and which paravirtual features.
    fn hypervisor(&mut self) -> Result<(), TooSmall> {
        let signature = [
            KVM_FEATURES,
            u32::from_le_bytes(*b"KVMK"),
            u32::from_le_bytes(*b"VMKV"),
            u32::from_le_bytes(*b"M\0\0\0"),
        ];
        self.leaf(SIGNATURE, signature)?;
        self.leaf(KVM_FEATURES, [KVM_NOP_IO_DELAY, 0, 0, 0])
    }
}
