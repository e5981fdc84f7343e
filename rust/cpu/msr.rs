// SPDX-License-Identifier: GPL-2.0

//! The policy of model-specific registers: which a guest has, where each lives, and which values may
//! be written.
//!
//! [`MsrState`] keeps what nothing else keeps. For the rest, a read says where to look and a write
//! says what to do, and the caller, who has the VMCS, the local APIC and the clock, does it. The
//! order of the matches is that of the SDM's numbers.

use super::guest::{GuestCpu, Origin};
use super::machine_check::{ErrorReport, MachineCheck, Reported, Unsupported};
use super::mtrr::{self, Mtrrs};
use crate::x86::msr::{
    is_canonical_for, is_valid_pat, MsrIndex, APIC_BASE_ENABLE, APIC_BASE_X2APIC, PAT_RESET,
};

/// An MSR that the CPU holds while the guest runs, and which the guest may change without an exit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HardwareMsr {
    /// IA32_SYSENTER_CS: in the VMCS.
    SysenterCs,
    /// IA32_SYSENTER_ESP: in the VMCS.
    SysenterEsp,
    /// IA32_SYSENTER_EIP: in the VMCS.
    SysenterEip,
    /// IA32_FS_BASE: the base of FS in the VMCS.
    FsBase,
    /// IA32_GS_BASE: the base of GS in the VMCS.
    GsBase,
    /// IA32_KERNEL_GS_BASE: in the CPU's MSR, which SWAPGS changes.
    KernelGsBase,
}

/// An MSR that is kept here, and which the CPU must have while the guest runs, since instructions
/// use it. The guest's writes exit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LoadedMsr {
    /// IA32_STAR.
    Star,
    /// IA32_LSTAR.
    Lstar,
    /// IA32_CSTAR.
    Cstar,
    /// IA32_FMASK.
    SyscallMask,
    /// IA32_TSC_AUX.
    TscAux,
    /// IA32_SPEC_CTRL.
    SpecCtrl,
    /// IA32_PAT: in the VMCS.
    Pat,
}

/// Where the value of an MSR is to be had.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MsrValue {
    /// Here it is.
    Known(u64),
    /// In the VMCS or the CPU.
    Hardware(HardwareMsr),
    /// IA32_TIME_STAMP_COUNTER: the guest's TSC.
    Tsc,
    /// IA32_APIC_BASE: with the local APIC.
    ApicBase,
    /// IA32_TSC_DEADLINE: with the local APIC.
    TscDeadline,
    /// An x2APIC register, by its offset from 0x800. #GP outside x2APIC mode.
    X2apic(u8),
    /// IA32_EFER: with the control registers.
    Efer,
    /// IA32_SPEC_CTRL: the guest may have changed it without an exit, so it is with the CPU.
    SpecCtrl,
    /// MSR_PLATFORM_INFO, which a machine may hide from its guest: #GP then.
    PlatformInfo(u64),
}

/// What is to be done for a write to take effect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MsrEffect {
    /// Nothing.
    Done,
    /// Put the value into the VMCS or the CPU.
    Hardware(HardwareMsr, u64),
    /// The value is kept; put it into the CPU or VMCS too, where the guest's are loaded.
    Loaded(LoadedMsr, u64),
    /// Make the guest's TSC read this from now on. After a guest's write, call
    /// [`MsrState::tsc_moved`] with the change of the TSC offset.
    SetTsc(u64),
    /// Add this to the TSC offset, modulo 2^64.
    MoveTsc(u64),
    /// Give the value to the local APIC, after [`check_apic_base`].
    ApicBase(u64),
    /// Give the value to the local APIC.
    TscDeadline(u64),
    /// Give the value to the local APIC, for the register at this offset from 0x800; #GP outside
    /// x2APIC mode.
    X2apic(u8, u64),
    /// Load EFER by [`check_efer_change`](crate::x86::control::check_efer_change) with the bits of
    /// [`GuestCpu::efer_reserved`]. For userspace's write CR0.PG is no obstacle: pass CR0 as 0.
    Efer(u64),
    /// IBPB: write 1 to the CPU's IA32_PRED_CMD.
    PredictionBarrier,
    /// L1D_FLUSH: write 1 to the CPU's IA32_FLUSH_CMD.
    FlushL1d,
}

/// The access can't be: #GP(0) for the guest; for userspace the count of MSRs done ends here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MsrError {
    /// The guest's CPU has no such MSR.
    Unknown,
    /// The value is not one that the MSR can have, or it is read-only or write-only.
    Invalid,
}

/// IA32_MISC_ENABLE: branch-trace storage and precise sampling are unavailable.
const MISC_ENABLE_NO_PMU: u64 = (1 << 11) | (1 << 12);
/// IA32_MISC_ENABLE: performance monitoring available, which the guest can't change.
const MISC_ENABLE_EMON: u64 = 1 << 7;
/// IA32_FEATURE_CONTROL: locked until reset.
const FEATURE_CONTROL_LOCKED: u64 = 1 << 0;
/// MSR_PLATFORM_INFO: CPUID faulting is available.
const PLATFORM_INFO_CPUID_FAULT: u64 = 1 << 31;
/// MISC_FEATURES_ENABLES.
const MISC_FEATURES: MsrIndex = MsrIndex(0x140);
/// MISC_FEATURES_ENABLES: CPUID faults outside CPL 0.
const MISC_FEATURES_CPUID_FAULT: u64 = 1 << 0;
/// IA32_DEBUGCTL: last-branch records and single-stepping on branches. Neither is virtualised, and
/// a guest that asks does without.
const DEBUGCTL_IGNORED: u64 = (1 << 0) | (1 << 1);
/// MSR_K7_HWCR: bits whose writes AMD's systems expect to be without effect.
const HWCR_IGNORED: u64 = (1 << 3) | (1 << 6) | (1 << 8);
/// MSR_K7_HWCR: McStatusWrEn and TscFreqSel.
const HWCR_WRITABLE: u64 = (1 << 18) | (1 << 24);
/// IA32_PERF_STATUS: a plausible ratio, which drivers divide by.
const PERF_STATUS: u64 = (4 << 40) | 1000;
/// MSR_FSB_FREQ: 166 MHz in the coding of the Core family.
const FSB_FREQ: u64 = 3;
/// MSR_BBL_CR_CTL3: an L2 cache of 256 KiB that is on.
const BBL_CR_CTL3: u64 = 0xbe70_2111;

/// The MSRs of a vCPU that live nowhere else.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MsrState {
    star: u64,
    lstar: u64,
    cstar: u64,
    syscall_mask: u64,
    tsc_aux: u64,
    pat: u64,
    tsc_adjust: u64,
    feature_control: u64,
    microcode_revision: u64,
    arch_capabilities: u64,
    platform_info: u64,
    misc_features: u64,
    misc_enable: u64,
    power_control: u64,
    hardware_configuration: u64,
    mtrrs: Mtrrs,
    machine_check: MachineCheck,
}

impl MsrState {
    /// The state after reset. `arch_capabilities` is what
    /// [`Offer::guest_arch_capabilities`](super::supported::Offer::guest_arch_capabilities) gives.
    pub fn new(arch_capabilities: u64) -> Self {
        Self {
            star: 0,
            lstar: 0,
            cstar: 0,
            syscall_mask: 0,
            tsc_aux: 0,
            pat: PAT_RESET,
            tsc_adjust: 0,
            feature_control: 0,
            microcode_revision: feature_value(MsrIndex::BIOS_SIGN_ID, 0).unwrap_or(0),
            arch_capabilities,
            platform_info: 0,
            misc_features: 0,
            misc_enable: MISC_ENABLE_NO_PMU,
            power_control: 0,
            hardware_configuration: 0,
            mtrrs: Mtrrs::default(),
            machine_check: MachineCheck::default(),
        }
    }

    /// What the CPU must have while the guest runs.
    #[inline]
    pub const fn loaded(&self, msr: LoadedMsr) -> u64 {
        match msr {
            LoadedMsr::Star => self.star,
            LoadedMsr::Lstar => self.lstar,
            LoadedMsr::Cstar => self.cstar,
            LoadedMsr::SyscallMask => self.syscall_mask,
            LoadedMsr::TscAux => self.tsc_aux,
            // Not here: see [`MsrValue::SpecCtrl`].
            LoadedMsr::SpecCtrl => 0,
            LoadedMsr::Pat => self.pat,
        }
    }

    /// Whether CPUID outside CPL 0 raises #GP(0).
    #[inline]
    pub const fn faults_cpuid(&self) -> bool {
        self.misc_features & MISC_FEATURES_CPUID_FAULT != 0
    }

    /// Notes that the guest's write to its TSC changed the offset by `delta`, modulo 2^64, which
    /// IA32_TSC_ADJUST shows (SDM vol. 3, 19.17.3).
    #[inline]
    pub fn tsc_moved(&mut self, delta: u64) {
        self.tsc_adjust = self.tsc_adjust.wrapping_add(delta);
    }

    /// KVM_X86_SETUP_MCE.
    pub fn set_up_machine_check(&mut self, capabilities: u64) -> Result<(), Unsupported> {
        self.machine_check.set_up(capabilities)
    }

    /// KVM_X86_SET_MCE. `cr4_mce` is the guest's CR4.MCE.
    pub fn report_machine_check(
        &mut self,
        report: &ErrorReport,
        cr4_mce: bool,
    ) -> Result<Reported, Unsupported> {
        self.machine_check.report(report, cr4_mce)
    }

    /// Reads an MSR.
    pub fn read(
        &self,
        index: MsrIndex,
        origin: Origin,
        cpu: &GuestCpu,
    ) -> Result<MsrValue, MsrError> {
        // What a guest lacks, userspace may read, to save it.
        let guest_has = |has: bool| {
            if has || origin == Origin::Host {
                Ok(())
            } else {
                Err(MsrError::Unknown)
            }
        };
        if let Some(value) = Self::elsewhere(index) {
            return Ok(value);
        }
        let value = match index {
            MsrIndex::FEATURE_CONTROL => self.feature_control,
            MsrIndex::TSC_ADJUST => self.tsc_adjust,
            MsrIndex::SPEC_CTRL => {
                guest_has(cpu.spec_ctrl != 0)?;
                return Ok(MsrValue::SpecCtrl);
            }
            MsrIndex::BIOS_SIGN_ID => self.microcode_revision,
            MsrIndex::PLATFORM_INFO if origin == Origin::Guest => {
                return Ok(MsrValue::PlatformInfo(self.platform_info))
            }
            MsrIndex::PLATFORM_INFO => self.platform_info,
            MsrIndex::MTRR_CAP => mtrr::CAPABILITIES,
            MsrIndex::ARCH_CAPABILITIES => {
                guest_has(cpu.arch_capabilities)?;
                if cpu.arch_capabilities {
                    self.arch_capabilities
                } else {
                    0
                }
            }
            MISC_FEATURES => self.misc_features,
            MsrIndex::MISC_ENABLE => self.misc_enable,
            MsrIndex::POWER_CTL => self.power_control,
            MsrIndex::PAT => self.pat,
            MsrIndex::XSS => {
                guest_has(cpu.xsaves)?;
                0
            }
            MsrIndex::STAR => self.star,
            MsrIndex::LSTAR => self.lstar,
            MsrIndex::CSTAR => self.cstar,
            MsrIndex::SYSCALL_MASK => self.syscall_mask,
            MsrIndex::TSC_AUX => {
                guest_has(cpu.rdtscp || cpu.rdpid)?;
                self.tsc_aux
            }
            MsrIndex::K7_HWCR => self.hardware_configuration,
            _ => constant(index)
                .or_else(|| self.mtrrs.read(index))
                .or_else(|| self.machine_check.read(index, origin))
                .ok_or(MsrError::Unknown)?,
        };
        Ok(MsrValue::Known(value))
    }

    /// Where an MSR is that is not kept here.
    #[inline]
    fn elsewhere(index: MsrIndex) -> Option<MsrValue> {
        Some(match index {
            MsrIndex::TSC => MsrValue::Tsc,
            MsrIndex::APIC_BASE => MsrValue::ApicBase,
            MsrIndex::SYSENTER_CS => MsrValue::Hardware(HardwareMsr::SysenterCs),
            MsrIndex::SYSENTER_ESP => MsrValue::Hardware(HardwareMsr::SysenterEsp),
            MsrIndex::SYSENTER_EIP => MsrValue::Hardware(HardwareMsr::SysenterEip),
            MsrIndex::TSC_DEADLINE => MsrValue::TscDeadline,
            MsrIndex::EFER => MsrValue::Efer,
            MsrIndex::FS_BASE => MsrValue::Hardware(HardwareMsr::FsBase),
            MsrIndex::GS_BASE => MsrValue::Hardware(HardwareMsr::GsBase),
            MsrIndex::KERNEL_GS_BASE => MsrValue::Hardware(HardwareMsr::KernelGsBase),
            _ if index.is_x2apic() => MsrValue::X2apic((index.0 & 0xff) as u8),
            _ => return None,
        })
    }

    /// Writes an MSR. On an error nothing has changed.
    pub fn write(
        &mut self,
        index: MsrIndex,
        value: u64,
        origin: Origin,
        cpu: &GuestCpu,
    ) -> Result<MsrEffect, MsrError> {
        if !is_canonical_for(index, value, cpu.linear_bits) {
            return Err(MsrError::Invalid);
        }
        if let Some(place) = Self::elsewhere(index) {
            return Self::write_elsewhere(place, value);
        }
        if let Some(msr) = loaded_msr(index) {
            return self.write_loaded(msr, value, origin, cpu);
        }
        let is_host = origin == Origin::Host;
        match index {
            MsrIndex::TSC_ADJUST => return Ok(self.write_tsc_adjust(value, origin, cpu)),
            MsrIndex::PRED_CMD => {
                return write_command(value, origin, cpu.ibpb, MsrEffect::PredictionBarrier);
            }
            MsrIndex::FLUSH_CMD => {
                return write_command(value, origin, cpu.flush_l1d, MsrEffect::FlushL1d);
            }
            MsrIndex::FEATURE_CONTROL => self.write_feature_control(value, origin)?,
            // Microcode is the host's. A guest zeroes the revision before it reads it.
            MsrIndex::BIOS_UPDT_TRIG => {}
            MsrIndex::BIOS_SIGN_ID if is_host => self.microcode_revision = value,
            MsrIndex::BIOS_SIGN_ID => {}
            MsrIndex::PLATFORM_INFO if is_host => self.platform_info = value,
            MsrIndex::ARCH_CAPABILITIES if is_host => {
                accept(cpu.arch_capabilities || value == 0)?;
                if cpu.arch_capabilities {
                    self.arch_capabilities = value;
                }
            }
            MISC_FEATURES => self.write_misc_features(value)?,
            MsrIndex::MISC_ENABLE => self.write_misc_enable(value, origin)?,
            MsrIndex::DEBUGCTL => accept(value & !DEBUGCTL_IGNORED == 0)?,
            MsrIndex::POWER_CTL => self.power_control = value,
            MsrIndex::XSS if cpu.xsaves || is_host => accept(value == 0)?,
            MsrIndex::K7_HWCR => {
                accept(value & !(HWCR_IGNORED | HWCR_WRITABLE) == 0)?;
                self.hardware_configuration = value & HWCR_WRITABLE;
            }
            // No counters: systems clear them at boot.
            MsrIndex(0xc1..=0xc2 | 0x186..=0x187) => accept(value == 0)?,
            MsrIndex::BBL_CR_CTL3 => {}
            _ => self.write_group(index, value, origin, cpu)?,
        }
        Ok(MsrEffect::Done)
    }

    /// A write to what is not kept here.
    #[inline]
    fn write_elsewhere(place: MsrValue, value: u64) -> Result<MsrEffect, MsrError> {
        Ok(match place {
            MsrValue::Hardware(msr) => MsrEffect::Hardware(msr, value),
            MsrValue::Tsc => MsrEffect::SetTsc(value),
            MsrValue::ApicBase => MsrEffect::ApicBase(value),
            MsrValue::TscDeadline => MsrEffect::TscDeadline(value),
            MsrValue::X2apic(register) => MsrEffect::X2apic(register, value),
            MsrValue::Efer => MsrEffect::Efer(value),
            MsrValue::Known(_) | MsrValue::SpecCtrl | MsrValue::PlatformInfo(_) => {
                return Err(MsrError::Invalid)
            }
        })
    }

    /// A write to what the CPU must have.
    fn write_loaded(
        &mut self,
        msr: LoadedMsr,
        value: u64,
        origin: Origin,
        cpu: &GuestCpu,
    ) -> Result<MsrEffect, MsrError> {
        let is_host = origin == Origin::Host;
        let register = match msr {
            LoadedMsr::Star => &mut self.star,
            LoadedMsr::Lstar => &mut self.lstar,
            LoadedMsr::Cstar => &mut self.cstar,
            LoadedMsr::SyscallMask => {
                accept(value >> 32 == 0)?;
                &mut self.syscall_mask
            }
            LoadedMsr::TscAux => {
                exists(cpu.rdtscp || cpu.rdpid || is_host)?;
                accept(value >> 32 == 0)?;
                &mut self.tsc_aux
            }
            LoadedMsr::SpecCtrl => {
                exists(cpu.spec_ctrl != 0 || is_host)?;
                accept(value & !cpu.spec_ctrl == 0)?;
                return Ok(MsrEffect::Loaded(msr, value));
            }
            LoadedMsr::Pat => {
                accept(is_valid_pat(value))?;
                &mut self.pat
            }
        };
        *register = value;
        Ok(MsrEffect::Loaded(msr, value))
    }

    /// A guest's write moves its TSC by as much; userspace only puts the value back.
    fn write_tsc_adjust(&mut self, value: u64, origin: Origin, cpu: &GuestCpu) -> MsrEffect {
        if !cpu.tsc_adjust {
            return MsrEffect::Done;
        }
        let delta = value.wrapping_sub(self.tsc_adjust);
        self.tsc_adjust = value;
        match origin {
            Origin::Guest => MsrEffect::MoveTsc(delta),
            Origin::Host => MsrEffect::Done,
        }
    }

    /// Only the lock can be set: nothing that it would enable is there.
    fn write_feature_control(&mut self, value: u64, origin: Origin) -> Result<(), MsrError> {
        let is_locked = self.feature_control & FEATURE_CONTROL_LOCKED != 0;
        accept(!is_locked || origin == Origin::Host)?;
        accept(value & !FEATURE_CONTROL_LOCKED == 0)?;
        self.feature_control = value;
        Ok(())
    }

    /// CPUID faulting, where MSR_PLATFORM_INFO says that there is such a thing.
    fn write_misc_features(&mut self, value: u64) -> Result<(), MsrError> {
        let can_fault = self.platform_info & PLATFORM_INFO_CPUID_FAULT != 0;
        accept(value == 0 || (value == MISC_FEATURES_CPUID_FAULT && can_fault))?;
        self.misc_features = value;
        Ok(())
    }

    /// The guest can't change what tells of performance monitoring.
    fn write_misc_enable(&mut self, value: u64, origin: Origin) -> Result<(), MsrError> {
        self.misc_enable = match origin {
            Origin::Host => value,
            Origin::Guest => {
                accept((value ^ self.misc_enable) & MISC_ENABLE_NO_PMU == 0)?;
                (value & !MISC_ENABLE_EMON) | (self.misc_enable & MISC_ENABLE_EMON)
            }
        };
        Ok(())
    }

    /// The MTRRs and machine-check banks.
    fn write_group(
        &mut self,
        index: MsrIndex,
        value: u64,
        origin: Origin,
        cpu: &GuestCpu,
    ) -> Result<(), MsrError> {
        if self.mtrrs.read(index).is_some() {
            return self.mtrrs.write(index, value, cpu).ok_or(MsrError::Invalid);
        }
        self.machine_check
            .write(index, value, origin)
            .ok_or(MsrError::Invalid)
    }
}

/// `Ok` where the MSR exists.
#[inline]
const fn exists(has: bool) -> Result<(), MsrError> {
    if has {
        Ok(())
    } else {
        Err(MsrError::Unknown)
    }
}

/// `Ok` where the value may be.
#[inline]
const fn accept(valid: bool) -> Result<(), MsrError> {
    if valid {
        Ok(())
    } else {
        Err(MsrError::Invalid)
    }
}

/// The MSRs that are kept here and loaded into the CPU.
#[inline]
const fn loaded_msr(index: MsrIndex) -> Option<LoadedMsr> {
    Some(match index {
        MsrIndex::SPEC_CTRL => LoadedMsr::SpecCtrl,
        MsrIndex::PAT => LoadedMsr::Pat,
        MsrIndex::STAR => LoadedMsr::Star,
        MsrIndex::LSTAR => LoadedMsr::Lstar,
        MsrIndex::CSTAR => LoadedMsr::Cstar,
        MsrIndex::SYSCALL_MASK => LoadedMsr::SyscallMask,
        MsrIndex::TSC_AUX => LoadedMsr::TscAux,
        _ => return None,
    })
}

/// What never changes, and what reads as zero because the thing it tells of is not there: systems
/// read these by the CPU's model, without asking CPUID.
const fn constant(index: MsrIndex) -> Option<u64> {
    match index {
        MsrIndex::PLATFORM_ID | MsrIndex::EBL_CR_POWERON | MsrIndex::DEBUGCTL => Some(0),
        MsrIndex::FSB_FREQ => Some(FSB_FREQ),
        MsrIndex::BBL_CR_CTL3 => Some(BBL_CR_CTL3),
        MsrIndex::PERF_STATUS => Some(PERF_STATUS),
        MsrIndex::PERF_CTL => Some(0),
        MsrIndex::LAST_BRANCH_FROM_IP | MsrIndex::LAST_BRANCH_TO_IP => Some(0),
        MsrIndex::LAST_INT_FROM_IP | MsrIndex::LAST_INT_TO_IP => Some(0),
        // Performance counters and their selectors, the count of SMIs, and energy: units, package,
        // memory, cores, graphics.
        MsrIndex(0xc1..=0xc2 | 0x186..=0x187) => Some(0),
        MsrIndex(0x34) => Some(0),
        MsrIndex(0x606 | 0x611 | 0x619 | 0x639 | 0x641) => Some(0),
        _ => None,
    }
}

/// IA32_PRED_CMD and IA32_FLUSH_CMD: bit 0 is the only command.
fn write_command(
    value: u64,
    origin: Origin,
    has_it: bool,
    command: MsrEffect,
) -> Result<MsrEffect, MsrError> {
    exists(has_it || origin == Origin::Host)?;
    match value {
        0 => Ok(MsrEffect::Done),
        1 if has_it => Ok(command),
        _ => Err(MsrError::Invalid),
    }
}

/// Checks a write of IA32_APIC_BASE over `old` (SDM vol. 3, 12.4.4 and 12.12.5): no reserved bits,
/// not x2APIC mode without the enable bit, and for the guest neither from x2APIC mode to xAPIC mode
/// nor from off to x2APIC mode.
pub const fn check_apic_base(
    old: u64,
    new: u64,
    origin: Origin,
    cpu: &GuestCpu,
) -> Result<(), MsrError> {
    const MODE: u64 = APIC_BASE_ENABLE | APIC_BASE_X2APIC;
    // Bits 7:0 and 9 are reserved; bit 8 says which CPU is the bootstrap processor.
    let mut reserved = cpu.reserved_physical() | 0x2ff;
    if !cpu.x2apic {
        reserved |= APIC_BASE_X2APIC;
    }
    if new & reserved != 0 || new & MODE == APIC_BASE_X2APIC {
        return Err(MsrError::Invalid);
    }
    let (from, to) = (old & MODE, new & MODE);
    let is_forbidden = (from == MODE && to == APIC_BASE_ENABLE) || (from == 0 && to == MODE);
    if is_forbidden && matches!(origin, Origin::Guest) {
        return Err(MsrError::Invalid);
    }
    Ok(())
}

/// What KVM_GET_MSRS on the system answers: the values with which a vCPU begins. `arch_capabilities`
/// is what [`MsrState::new`] takes.
pub const fn feature_value(index: MsrIndex, arch_capabilities: u64) -> Option<u64> {
    match index {
        // Revision 1, which stands in the upper half.
        MsrIndex::BIOS_SIGN_ID => Some(1 << 32),
        MsrIndex::ARCH_CAPABILITIES => Some(arch_capabilities),
        MsrIndex::PLATFORM_INFO => Some(0),
        _ => None,
    }
}
