// SPDX-License-Identifier: GPL-2.0

//! The lists of MSRs for userspace: what must be saved and restored with a vCPU, and what tells of
//! features.

use super::guest::GuestCpu;
use crate::x86::msr::MsrIndex;

/// What every vCPU has.
const ALWAYS: [MsrIndex; 23] = [
    MsrIndex::SYSENTER_CS,
    MsrIndex::SYSENTER_ESP,
    MsrIndex::SYSENTER_EIP,
    MsrIndex::STAR,
    MsrIndex::CSTAR,
    MsrIndex::KERNEL_GS_BASE,
    MsrIndex::SYSCALL_MASK,
    MsrIndex::LSTAR,
    MsrIndex::TSC,
    MsrIndex::PAT,
    MsrIndex::FEATURE_CONTROL,
    MsrIndex::DEBUGCTL,
    MsrIndex::TSC_ADJUST,
    MsrIndex::TSC_DEADLINE,
    MsrIndex::ARCH_CAPABILITIES,
    MsrIndex::MISC_ENABLE,
    MsrIndex::MCG_STATUS,
    MsrIndex::MCG_CTL,
    MsrIndex::PLATFORM_INFO,
    MsrIndex(0x140),
    MsrIndex::POWER_CTL,
    MsrIndex::BIOS_SIGN_ID,
    MsrIndex::K7_HWCR,
];

/// KVM_GET_MSR_FEATURE_INDEX_LIST.
pub const FEATURE_INDICES: [MsrIndex; 3] = [
    MsrIndex::BIOS_SIGN_ID,
    MsrIndex::ARCH_CAPABILITIES,
    MsrIndex::PLATFORM_INFO,
];

/// KVM_GET_MSR_INDEX_LIST, for the widest CPU model that is offered.
pub fn indices(offered: &GuestCpu) -> impl Iterator<Item = MsrIndex> + '_ {
    let optional = [
        (offered.rdtscp || offered.rdpid, MsrIndex::TSC_AUX),
        (offered.spec_ctrl != 0, MsrIndex::SPEC_CTRL),
        (offered.xsaves, MsrIndex::XSS),
    ];
    let there = optional.into_iter().filter(|(has, _)| *has);
    ALWAYS.into_iter().chain(there.map(|(_, index)| index))
}
