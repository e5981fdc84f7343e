// SPDX-License-Identifier: GPL-2.0

//! What a guest's CPUID means for its registers, worked out once when the table is set.

use super::cpuid::{find, has, CpuidEntry};
use super::feature::Feature;
use crate::x86::control::{physical_mask, Cr4, Efer};

/// Who reads or writes: the rules for userspace, which restores what was saved, are laxer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// The guest's own instruction.
    Guest,
    /// An ioctl.
    Host,
}

/// The table of KVM_SET_CPUID2 can't be: EINVAL.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InvalidCpuid;

/// A CPU model.
///
/// [`Self::offered`] makes the widest one from the table that
/// [`supported`](super::supported::supported) gives. A vCPU has that until userspace sets a table,
/// and [`Self::new`] gives one no more than that has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestCpu {
    /// MAXPHYADDR: the width of physical addresses.
    pub physical_bits: u32,
    /// The width of linear addresses: 48 or 57.
    pub linear_bits: u32,
    /// The bits of CR4 that can't be set.
    pub cr4_reserved: u64,
    /// The bits of EFER that the guest can't set.
    pub efer_reserved: u64,
    /// The state components that XSETBV can turn on; 0 without XSAVE.
    pub xcr0: u64,
    /// Long mode.
    pub long_mode: bool,
    /// 1 GiB pages.
    pub gbpages: bool,
    /// The x2APIC.
    pub x2apic: bool,
    /// The local APIC's timer can wait for a TSC value.
    pub tsc_deadline: bool,
    /// IA32_TSC_ADJUST.
    pub tsc_adjust: bool,
    /// INVPCID.
    pub invpcid: bool,
    /// RDTSCP.
    pub rdtscp: bool,
    /// RDPID.
    pub rdpid: bool,
    /// XSAVES and IA32_XSS.
    pub xsaves: bool,
    /// The bits of IA32_SPEC_CTRL that can be set; 0 where there is no such MSR.
    pub spec_ctrl: u64,
    /// IA32_PRED_CMD with IBPB.
    pub ibpb: bool,
    /// IA32_FLUSH_CMD with L1D_FLUSH.
    pub flush_l1d: bool,
    /// IA32_ARCH_CAPABILITIES.
    pub arch_capabilities: bool,
}

/// MAXPHYADDR where CPUID does not tell it (SDM vol. 2, CPUID).
const DEFAULT_PHYSICAL_BITS: u32 = 36;
/// The bits of CR4 that every CPU with VMX has.
const CR4_ALWAYS: u64 = Cr4::VME
    | Cr4::PVI
    | Cr4::TSD
    | Cr4::DE
    | Cr4::PSE
    | Cr4::PAE
    | Cr4::MCE
    | Cr4::PGE
    | Cr4::PCE
    | Cr4::OSFXSR
    | Cr4::OSXMMEXCPT;
/// The bits of CR4 that hang on a feature.
const CR4_FEATURES: [(u64, Feature); 8] = [
    (Cr4::UMIP, Feature::UMIP),
    (Cr4::LA57, Feature::LA57),
    (Cr4::FSGSBASE, Feature::FSGSBASE),
    (Cr4::PCIDE, Feature::PCID),
    (Cr4::OSXSAVE, Feature::XSAVE),
    (Cr4::SMEP, Feature::SMEP),
    (Cr4::SMAP, Feature::SMAP),
    (Cr4::PKE, Feature::PKU),
];
/// The bits of EFER that hang on a feature.
const EFER_FEATURES: [(u64, Feature); 2] = [
    (Efer::LME | Efer::LMA, Feature::LM),
    (Efer::NXE, Feature::NX),
];
/// The bits of EFER that userspace can set whatever the guest's CPUID says.
const EFER_HOST: u64 = Efer::SCE | Efer::LME | Efer::LMA | Efer::NXE;

/// The bits of `pairs` whose feature is there.
fn allowed(entries: &[CpuidEntry], pairs: &[(u64, Feature)]) -> u64 {
    pairs
        .iter()
        .filter(|(_, feature)| has(entries, *feature))
        .fold(0, |bits, (bit, _)| bits | bit)
}

impl GuestCpu {
    /// Works out the table that userspace has set; what it names and `offered` lacks is not there.
    pub fn new(entries: &[CpuidEntry], offered: &Self) -> Result<Self, InvalidCpuid> {
        let asked = Self::read(entries)?;
        Ok(Self {
            physical_bits: asked.physical_bits,
            // The CPU itself faults on an address that is canonical for the guest alone.
            linear_bits: asked.linear_bits.min(offered.linear_bits),
            cr4_reserved: asked.cr4_reserved | offered.cr4_reserved,
            efer_reserved: asked.efer_reserved | offered.efer_reserved,
            xcr0: asked.xcr0 & offered.xcr0,
            long_mode: asked.long_mode && offered.long_mode,
            gbpages: asked.gbpages && offered.gbpages,
            x2apic: asked.x2apic && offered.x2apic,
            tsc_deadline: asked.tsc_deadline && offered.tsc_deadline,
            tsc_adjust: asked.tsc_adjust && offered.tsc_adjust,
            invpcid: asked.invpcid && offered.invpcid,
            rdtscp: asked.rdtscp && offered.rdtscp,
            rdpid: asked.rdpid && offered.rdpid,
            xsaves: asked.xsaves && offered.xsaves,
            spec_ctrl: asked.spec_ctrl & offered.spec_ctrl,
            ibpb: asked.ibpb && offered.ibpb,
            flush_l1d: asked.flush_l1d && offered.flush_l1d,
            arch_capabilities: asked.arch_capabilities && offered.arch_capabilities,
        })
    }

    /// Works out the table of what is offered. `cr4_fixed1` is IA32_VMX_CR4_FIXED1: other bits of
    /// CR4 make VM entry fail.
    pub fn offered(entries: &[CpuidEntry], cr4_fixed1: u64) -> Result<Self, InvalidCpuid> {
        let mut model = Self::read(entries)?;
        model.cr4_reserved |= !cr4_fixed1;
        Ok(model)
    }

    /// What a table says.
    fn read(entries: &[CpuidEntry]) -> Result<Self, InvalidCpuid> {
        let has = |feature| has(entries, feature);
        let widths = Self::widths(entries);
        let linear_bits = match widths.map(|widths| (widths >> 8) & 0xff) {
            None | Some(0) => 48,
            Some(bits @ (48 | 57)) => bits,
            Some(_) => return Err(InvalidCpuid),
        };
        let components = find(entries, 0xd, 0).map_or(0, |entry| {
            u64::from(entry.eax) | (u64::from(entry.edx) << 32)
        });
        let cr4 = CR4_ALWAYS | allowed(entries, &CR4_FEATURES);
        let spec_ctrl = [
            (1 << 0, Feature::SPEC_CTRL),
            (1 << 1, Feature::STIBP),
            (1 << 2, Feature::SSBD),
            ((1 << 3) | (1 << 4), Feature::IPRED_CTRL),
            ((1 << 5) | (1 << 6), Feature::RRSBA_CTRL),
            (1 << 7, Feature::PSFD),
            (1 << 8, Feature::DDPD_U),
            (1 << 10, Feature::BHI_CTRL),
        ];
        Ok(Self {
            physical_bits: widths.map_or(DEFAULT_PHYSICAL_BITS, |widths| widths & 0xff),
            linear_bits,
            cr4_reserved: !cr4,
            // SYSCALL can be switched on whatever CPUID says, as with KVM.
            efer_reserved: !(Efer::SCE | allowed(entries, &EFER_FEATURES)),
            xcr0: if has(Feature::XSAVE) { components } else { 0 },
            long_mode: has(Feature::LM),
            gbpages: has(Feature::GBPAGES),
            x2apic: has(Feature::X2APIC),
            tsc_deadline: has(Feature::TSC_DEADLINE),
            tsc_adjust: has(Feature::TSC_ADJUST),
            invpcid: has(Feature::INVPCID),
            rdtscp: has(Feature::RDTSCP),
            rdpid: has(Feature::RDPID),
            xsaves: has(Feature::XSAVES),
            spec_ctrl: allowed(entries, &spec_ctrl),
            ibpb: has(Feature::SPEC_CTRL),
            flush_l1d: has(Feature::FLUSH_L1D),
            arch_capabilities: has(Feature::ARCH_CAPABILITIES),
        })
    }

    /// EAX of leaf 0x80000008, where the table has one and leaf 0x80000000 covers it.
    fn widths(entries: &[CpuidEntry]) -> Option<u32> {
        let highest = find(entries, 0x8000_0000, 0)?.eax;
        if highest < 0x8000_0008 {
            return None;
        }
        find(entries, 0x8000_0008, 0).map(|entry| entry.eax)
    }

    /// The bits that no physical address of the guest has.
    #[inline]
    pub const fn reserved_physical(&self) -> u64 {
        !physical_mask(self.physical_bits)
    }

    /// The bits of EFER that can't be set.
    #[inline]
    pub const fn efer_reserved(&self, origin: Origin) -> u64 {
        match origin {
            Origin::Guest => self.efer_reserved,
            Origin::Host => !EFER_HOST,
        }
    }
}
