// SPDX-License-Identifier: GPL-2.0

//! What a CPU's VMX can do, from its capability MSRs (SDM vol. 3, appendix A), and whether that is
//! enough. A feature that is needed and missing is named, never dropped in silence.

use super::{
    controls::{entry, exit, pin, primary, secondary, AllowedControls},
    msr::MsrIndex,
};
use core::fmt;

/// VM-execution, entry and exit controls as every VMCS starts with them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Controls {
    /// Pin-based.
    pub pin: u32,
    /// Primary processor-based.
    pub primary: u32,
    /// Secondary processor-based.
    pub secondary: u32,
    /// VM exit.
    pub exit: u32,
    /// VM entry. Whether the guest is in IA-32e mode follows its EFER.
    pub entry: u32,
}

/// What secondary controls a guest has as far as its CPU has them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GuestFeatures {
    /// RDTSCP and RDPID.
    pub rdtscp: bool,
    /// INVPCID.
    pub invpcid: bool,
    /// The virtual-APIC page answers for the x2APIC's TPR.
    pub x2apic_mode: bool,
}

/// What the CPU offers, and the controls chosen from it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capabilities {
    /// The VMCS revision identifier.
    pub revision: u32,
    /// The controls.
    pub controls: Controls,
    /// Bits that CR0 must have and may have.
    pub cr0_fixed: (u64, u64),
    /// Bits that CR4 must have and may have.
    pub cr4_fixed: (u64, u64),
    /// EPT leaves of 2 MiB.
    pub ept_2m: bool,
    /// EPT leaves of 1 GiB.
    pub ept_1g: bool,
    /// Accessed and dirty flags in EPT.
    pub ept_accessed_dirty: bool,
}

/// Why rvisor can't use this CPU's VMX. Its text is what the user is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Missing {
    /// The firmware left VMX off; IA32_FEATURE_CONTROL.
    FirmwareOff(u64),
    /// An MSR that describes VMX.
    Msr(MsrIndex),
    /// A feature, by the name that it has in the SDM.
    Feature(&'static str),
    /// CR3 accesses exit whatever is asked for.
    Cr3Exits,
    /// Controls that can't be set: the group's name and the bits.
    Controls(&'static str, u32),
}

impl fmt::Display for Missing {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::FirmwareOff(control) => write!(
                out,
                "the firmware left VMX off (IA32_FEATURE_CONTROL is {control:#x}): switch on \
                 \"Intel Virtualization Technology\" in its set-up"
            ),
            Self::Msr(MsrIndex(index)) => write!(
                out,
                "this CPU does not have the MSR {index:#x} that describes its VMX"
            ),
            Self::Feature(name) => {
                write!(out, "this CPU's VMX has no {name}: rvisor needs it")
            }
            Self::Cr3Exits => write!(
                out,
                "this CPU's VMX makes every CR3 access exit, which rvisor does not handle"
            ),
            Self::Controls(group, bits) => write!(
                out,
                "this CPU's VMX lacks {group} controls {bits:#x}, which rvisor needs"
            ),
        }
    }
}

/// The MSRs that are read (SDM vol. 3, appendix A).
mod index {
    use super::MsrIndex;

    pub(super) const BASIC: MsrIndex = MsrIndex(0x480);
    pub(super) const PIN: MsrIndex = MsrIndex(0x481);
    pub(super) const PRIMARY: MsrIndex = MsrIndex(0x482);
    pub(super) const EXIT: MsrIndex = MsrIndex(0x483);
    pub(super) const ENTRY: MsrIndex = MsrIndex(0x484);
    pub(super) const CR0_FIXED0: MsrIndex = MsrIndex(0x486);
    pub(super) const CR0_FIXED1: MsrIndex = MsrIndex(0x487);
    pub(super) const CR4_FIXED0: MsrIndex = MsrIndex(0x488);
    pub(super) const CR4_FIXED1: MsrIndex = MsrIndex(0x489);
    pub(super) const SECONDARY: MsrIndex = MsrIndex(0x48b);
    pub(super) const EPT_VPID: MsrIndex = MsrIndex(0x48c);
    pub(super) const TRUE_PIN: MsrIndex = MsrIndex(0x48d);
    pub(super) const TRUE_PRIMARY: MsrIndex = MsrIndex(0x48e);
    pub(super) const TRUE_EXIT: MsrIndex = MsrIndex(0x48f);
    pub(super) const TRUE_ENTRY: MsrIndex = MsrIndex(0x490);
}

/// IA32_FEATURE_CONTROL: nothing in it can be changed until reset.
const FEATURE_CONTROL_LOCKED: u64 = 1 << 0;
/// IA32_FEATURE_CONTROL: VMXON works outside SMX operation.
const FEATURE_CONTROL_VMX_OUTSIDE_SMX: u64 = 1 << 2;
/// IA32_VMX_BASIC: there are the "true" capability MSRs, which allow more of the controls to be 0.
const BASIC_TRUE_CONTROLS: u64 = 1 << 55;
/// IA32_VMX_BASIC: the VMCS revision identifier.
const BASIC_REVISION: u64 = 0x7fff_ffff;

/// Bits of IA32_VMX_EPT_VPID_CAP (SDM vol. 3, appendix A.10).
mod ept_cap {
    pub(super) const WALK_4: u64 = 1 << 6;
    pub(super) const WRITE_BACK: u64 = 1 << 14;
    pub(super) const PAGE_2M: u64 = 1 << 16;
    pub(super) const PAGE_1G: u64 = 1 << 17;
    pub(super) const INVEPT: u64 = 1 << 20;
    pub(super) const ACCESSED_DIRTY: u64 = 1 << 21;
    pub(super) const INVEPT_SINGLE: u64 = 1 << 25;
    pub(super) const INVVPID: u64 = 1 << 32;
    pub(super) const INVVPID_SINGLE: u64 = 1 << 41;
}

const PIN_REQUIRED: u32 = pin::EXTERNAL_INTERRUPT_EXITING | pin::NMI_EXITING | pin::VIRTUAL_NMIS;
const PRIMARY_REQUIRED: u32 = primary::USE_TSC_OFFSETTING
    | primary::HLT_EXITING
    | primary::MWAIT_EXITING
    | primary::MONITOR_EXITING
    | primary::RDPMC_EXITING
    | CR8_EXITING
    | primary::MOV_DR_EXITING
    | primary::UNCONDITIONAL_IO_EXITING
    | primary::USE_MSR_BITMAPS
    | primary::ACTIVATE_SECONDARY;
/// What a guest without a TPR shadow has.
const CR8_EXITING: u32 = primary::CR8_LOAD_EXITING | primary::CR8_STORE_EXITING;
/// Set later, while a guest waits for an interrupt or NMI window.
const PRIMARY_ON_DEMAND: u32 = primary::INTERRUPT_WINDOW_EXITING | primary::NMI_WINDOW_EXITING;
const SECONDARY_REQUIRED: u32 = secondary::ENABLE_EPT
    | secondary::ENABLE_VPID
    | secondary::UNRESTRICTED_GUEST
    | secondary::WBINVD_EXITING;
/// ENCLS and ENCLV must exit where the CPU has them: without the control the guest would have SGX.
const SECONDARY_OPTIONAL: u32 = secondary::ENABLE_RDTSCP
    | secondary::VIRTUALIZE_X2APIC_MODE
    | secondary::ENABLE_INVPCID
    | secondary::PAUSE_LOOP_EXITING
    | secondary::ENCLS_EXITING
    | secondary::ENCLV_EXITING;
const EXIT_REQUIRED: u32 = exit::HOST_ADDRESS_SPACE_SIZE
    | exit::SAVE_DEBUG_CONTROLS
    | exit::SAVE_PAT
    | exit::LOAD_PAT
    | exit::SAVE_EFER
    | exit::LOAD_EFER;
const ENTRY_REQUIRED: u32 = entry::LOAD_DEBUG_CONTROLS | entry::LOAD_PAT | entry::LOAD_EFER;

/// Features of which each has a name that says more than its control's bit.
const PRIMARY_FEATURES: [(u32, &str); 2] = [
    (primary::USE_MSR_BITMAPS, "MSR bitmaps"),
    (primary::ACTIVATE_SECONDARY, "secondary controls"),
];
const SECONDARY_FEATURES: [(u32, &str); 3] = [
    (secondary::ENABLE_EPT, "extended page tables (EPT)"),
    (secondary::UNRESTRICTED_GUEST, "unrestricted guest mode"),
    (
        secondary::ENABLE_VPID,
        "virtual-processor identifiers (VPID)",
    ),
];
const EPT_FEATURES: [(u64, &str); 4] = [
    (ept_cap::WALK_4, "4-level EPT walk"),
    (ept_cap::WRITE_BACK, "write-back EPT structures"),
    (
        ept_cap::INVEPT | ept_cap::INVEPT_SINGLE,
        "single-context INVEPT",
    ),
    (
        ept_cap::INVVPID | ept_cap::INVVPID_SINGLE,
        "single-context INVVPID",
    ),
];

/// Reads capability MSRs; `None` is a CPU without that MSR.
struct Reader<R: Fn(MsrIndex) -> Option<u64>>(R);

impl<R: Fn(MsrIndex) -> Option<u64>> Reader<R> {
    fn read(&self, index: MsrIndex) -> Result<u64, Missing> {
        (self.0)(index).ok_or(Missing::Msr(index))
    }

    fn pair(&self, low: MsrIndex, high: MsrIndex) -> Result<(u64, u64), Missing> {
        Ok((self.read(low)?, self.read(high)?))
    }

    /// Chooses from a control's capability MSR.
    fn choose(
        &self,
        index: MsrIndex,
        group: &'static str,
        required: u32,
        optional: u32,
    ) -> Result<u32, Missing> {
        AllowedControls(self.read(index)?)
            .choose(required, optional)
            .map_err(|missing| Missing::Controls(group, missing.0))
    }

    /// Fails with the name of the first of `features` that a control's capability MSR does not allow.
    fn check_features(
        &self,
        index: MsrIndex,
        features: &[(u32, &'static str)],
    ) -> Result<(), Missing> {
        let allowed = AllowedControls(self.read(index)?).may_be_one();
        match features.iter().find(|(bit, _)| allowed & bit == 0) {
            Some((_, name)) => Err(Missing::Feature(name)),
            None => Ok(()),
        }
    }

    fn check_firmware(&self) -> Result<(), Missing> {
        let control = self.read(MsrIndex::FEATURE_CONTROL)?;
        let needed = FEATURE_CONTROL_LOCKED | FEATURE_CONTROL_VMX_OUTSIDE_SMX;
        if control & needed != needed {
            return Err(Missing::FirmwareOff(control));
        }
        Ok(())
    }

    /// IA32_VMX_EPT_VPID_CAP, with all in it that is needed.
    fn ept(&self) -> Result<u64, Missing> {
        let offered = self.read(index::EPT_VPID)?;
        match EPT_FEATURES
            .iter()
            .find(|(bits, _)| offered & bits != *bits)
        {
            Some((_, name)) => Err(Missing::Feature(name)),
            None => Ok(offered),
        }
    }

    fn controls(&self, has_true: bool) -> Result<Controls, Missing> {
        let [pin, primary, exit, entry] = if has_true {
            [
                index::TRUE_PIN,
                index::TRUE_PRIMARY,
                index::TRUE_EXIT,
                index::TRUE_ENTRY,
            ]
        } else {
            [index::PIN, index::PRIMARY, index::EXIT, index::ENTRY]
        };
        self.check_features(primary, &PRIMARY_FEATURES)?;
        self.check_features(index::SECONDARY, &SECONDARY_FEATURES)?;
        // A shadow that accesses go past is none.
        let shadow = if AllowedControls(self.read(primary)?).may_be_zero(CR8_EXITING) {
            primary::USE_TPR_SHADOW
        } else {
            0
        };
        let primary = self.choose(
            primary,
            "primary processor-based",
            PRIMARY_REQUIRED | PRIMARY_ON_DEMAND,
            shadow,
        )? & !PRIMARY_ON_DEMAND;
        if primary & (primary::CR3_LOAD_EXITING | primary::CR3_STORE_EXITING) != 0 {
            return Err(Missing::Cr3Exits);
        }
        let mut secondary_optional = SECONDARY_OPTIONAL;
        if primary & primary::USE_TPR_SHADOW == 0 {
            // VM entry fails where one is set without the other (SDM vol. 3, 28.2.1.1).
            secondary_optional &= !secondary::VIRTUALIZE_X2APIC_MODE;
        }
        Ok(Controls {
            pin: self.choose(pin, "pin-based", PIN_REQUIRED, 0)?,
            primary,
            secondary: self.choose(
                index::SECONDARY,
                "secondary processor-based",
                SECONDARY_REQUIRED,
                secondary_optional,
            )?,
            exit: self.choose(exit, "VM-exit", EXIT_REQUIRED, 0)?,
            entry: self.choose(
                entry,
                "VM-entry",
                ENTRY_REQUIRED | entry::IA32E_MODE_GUEST,
                0,
            )? & !entry::IA32E_MODE_GUEST,
        })
    }
}

impl Capabilities {
    /// Works out whether a CPU with VMX, whose MSRs `read` gives, has what is needed.
    ///
    /// # Errors
    ///
    /// The first thing that is missing.
    pub fn detect(read: impl Fn(MsrIndex) -> Option<u64>) -> Result<Self, Missing> {
        let msrs = Reader(read);
        msrs.check_firmware()?;
        let basic = msrs.read(index::BASIC)?;
        let controls = msrs.controls(basic & BASIC_TRUE_CONTROLS != 0)?;
        let ept = msrs.ept()?;
        Ok(Self {
            revision: (basic & BASIC_REVISION) as u32,
            controls,
            cr0_fixed: msrs.pair(index::CR0_FIXED0, index::CR0_FIXED1)?,
            cr4_fixed: msrs.pair(index::CR4_FIXED0, index::CR4_FIXED1)?,
            ept_2m: ept & ept_cap::PAGE_2M != 0,
            ept_1g: ept & ept_cap::PAGE_1G != 0,
            ept_accessed_dirty: ept & ept_cap::ACCESSED_DIRTY != 0,
        })
    }

    const fn has_secondary(&self, control: u32) -> bool {
        self.controls.secondary & control != 0
    }

    /// A virtual CPU that spins for another one can be made to exit.
    pub const fn has_pause_loop_exiting(&self) -> bool {
        self.has_secondary(secondary::PAUSE_LOOP_EXITING)
    }

    /// RDTSCP and RDPID can be given to a guest.
    pub const fn has_rdtscp(&self) -> bool {
        self.has_secondary(secondary::ENABLE_RDTSCP)
    }

    /// INVPCID can be given to a guest.
    pub const fn has_invpcid(&self) -> bool {
        self.has_secondary(secondary::ENABLE_INVPCID)
    }

    /// A guest's CR8 can live in the virtual-APIC page.
    pub const fn has_tpr_shadow(&self) -> bool {
        self.controls.primary & primary::USE_TPR_SHADOW != 0
    }

    /// So can the TPR of a guest's x2APIC.
    pub const fn has_x2apic_mode(&self) -> bool {
        self.has_secondary(secondary::VIRTUALIZE_X2APIC_MODE)
    }

    /// ENCLS can be made to exit.
    pub const fn has_encls_exiting(&self) -> bool {
        self.has_secondary(secondary::ENCLS_EXITING)
    }

    /// ENCLV can be made to exit.
    pub const fn has_enclv_exiting(&self) -> bool {
        self.has_secondary(secondary::ENCLV_EXITING)
    }

    /// The primary controls for a guest at first. Where there is a TPR shadow, a guest whose local APIC is
    /// in the kernel has it, in the place of exits for CR8.
    pub const fn guest_primary(&self, has_local_apic: bool) -> u32 {
        if has_local_apic && self.has_tpr_shadow() {
            self.controls.primary & !CR8_EXITING
        } else {
            self.controls.primary & !primary::USE_TPR_SHADOW
        }
    }

    /// The secondary controls for a guest: instructions that its CPUID does not offer raise #UD, and its
    /// x2APIC's TPR is virtual in x2APIC mode alone.
    pub const fn guest_secondary(&self, offered: GuestFeatures) -> u32 {
        let mut controls = self.controls.secondary;
        if !offered.rdtscp {
            controls &= !secondary::ENABLE_RDTSCP;
        }
        if !offered.invpcid {
            controls &= !secondary::ENABLE_INVPCID;
        }
        if !offered.x2apic_mode {
            controls &= !secondary::VIRTUALIZE_X2APIC_MODE;
        }
        controls
    }
}

#[cfg(test)]
#[path = "capability_tests.rs"]
mod tests;
