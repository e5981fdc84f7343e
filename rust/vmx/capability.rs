// SPDX-License-Identifier: GPL-2.0

//! What this CPU's VMX can do (SDM vol. 3, appendix A), checked once when the module is loaded.

use crate::{bindings, host::cpu};
use kernel::prelude::*;
use rvisor_core::x86::{
    controls::{entry, exit, pin, primary, secondary, AllowedControls},
    msr::MsrIndex,
};

/// VM-execution, entry and exit controls as every VMCS starts with them.
#[derive(Clone, Copy)]
pub(crate) struct Controls {
    pub(crate) pin: u32,
    pub(crate) primary: u32,
    pub(crate) secondary: u32,
    pub(crate) exit: u32,
    pub(crate) entry: u32,
}

/// What the CPU offers, and the controls chosen from it.
#[derive(Clone, Copy)]
pub(crate) struct Capabilities {
    /// The VMCS revision identifier.
    pub(crate) revision: u32,
    /// The controls.
    pub(crate) controls: Controls,
    /// Bits that CR0 must have and may have.
    pub(crate) cr0_fixed: (u64, u64),
    /// Bits that CR4 must have and may have.
    pub(crate) cr4_fixed: (u64, u64),
    /// EPT leaves of 2 MiB.
    pub(crate) ept_2m: bool,
    /// EPT leaves of 1 GiB.
    pub(crate) ept_1g: bool,
    /// Accessed and dirty flags in EPT.
    pub(crate) ept_accessed_dirty: bool,
}

const FEATURE_CONTROL: MsrIndex = MsrIndex(bindings::MSR_IA32_FEAT_CTL);
const BASIC: MsrIndex = MsrIndex(bindings::MSR_IA32_VMX_BASIC);
const EPT_VPID_CAP: MsrIndex = MsrIndex(bindings::MSR_IA32_VMX_EPT_VPID_CAP);

const FEATURE_CONTROL_LOCKED: u64 = 1 << 0;
const FEATURE_CONTROL_VMX_OUTSIDE_SMX: u64 = 1 << 2;

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
    | primary::CR8_LOAD_EXITING
    | primary::CR8_STORE_EXITING
    | primary::MOV_DR_EXITING
    | primary::UNCONDITIONAL_IO_EXITING
    | primary::USE_MSR_BITMAPS
    | primary::ACTIVATE_SECONDARY;
/// Set later, while a guest waits for an interrupt or NMI window.
const PRIMARY_ON_DEMAND: u32 = primary::INTERRUPT_WINDOW_EXITING | primary::NMI_WINDOW_EXITING;
const SECONDARY_REQUIRED: u32 = secondary::ENABLE_EPT
    | secondary::ENABLE_VPID
    | secondary::UNRESTRICTED_GUEST
    | secondary::WBINVD_EXITING;
const SECONDARY_OPTIONAL: u32 =
    secondary::ENABLE_RDTSCP | secondary::ENABLE_INVPCID | secondary::PAUSE_LOOP_EXITING;
const EXIT_REQUIRED: u32 = exit::HOST_ADDRESS_SPACE_SIZE
    | exit::SAVE_DEBUG_CONTROLS
    | exit::SAVE_PAT
    | exit::LOAD_PAT
    | exit::SAVE_EFER
    | exit::LOAD_EFER;
const ENTRY_REQUIRED: u32 = entry::LOAD_DEBUG_CONTROLS | entry::LOAD_PAT | entry::LOAD_EFER;

fn read(index: MsrIndex, name: &str) -> Result<u64> {
    cpu::rdmsr_safe(index).ok_or_else(|| {
        pr_err!(
            "this CPU does not have the MSR {} that describes its VMX\n",
            name
        );
        ENODEV
    })
}

/// Reads a control's capability MSR and chooses from it.
fn choose(index: u32, name: &str, required: u32, optional: u32) -> Result<u32> {
    AllowedControls(read(MsrIndex(index), name)?)
        .choose(required, optional)
        .map_err(|missing| {
            pr_err!(
                "this CPU's VMX lacks {} controls {:#x}, which rvisor needs\n",
                name,
                missing.0
            );
            ENODEV
        })
}

impl Capabilities {
    /// Checks that this CPU and its firmware offer what rvisor needs.
    ///
    /// # Errors
    ///
    /// `ENODEV` or `EPERM`, after a message of its own for each cause.
    pub(crate) fn detect() -> Result<Self> {
        check_vmx()?;
        let basic = read(BASIC, "IA32_VMX_BASIC")?;
        // Bit 55: the "true" capability MSRs, which allow more of the controls to be 0.
        let offset = if basic & (1 << 55) != 0 {
            bindings::MSR_IA32_VMX_TRUE_PINBASED_CTLS - bindings::MSR_IA32_VMX_PINBASED_CTLS
        } else {
            0
        };
        check_primary(offset)?;
        check_secondary()?;
        let primary = choose(
            bindings::MSR_IA32_VMX_PROCBASED_CTLS + offset,
            "primary processor-based",
            PRIMARY_REQUIRED | PRIMARY_ON_DEMAND,
            0,
        )? & !PRIMARY_ON_DEMAND;
        if primary & (primary::CR3_LOAD_EXITING | primary::CR3_STORE_EXITING) != 0 {
            pr_err!("this CPU's VMX makes every CR3 access exit, which rvisor does not handle\n");
            return Err(ENODEV);
        }
        let ept = check_ept()?;
        let controls = Controls {
            pin: choose(
                bindings::MSR_IA32_VMX_PINBASED_CTLS + offset,
                "pin-based",
                PIN_REQUIRED,
                0,
            )?,
            primary,
            secondary: choose(
                bindings::MSR_IA32_VMX_PROCBASED_CTLS2,
                "secondary processor-based",
                SECONDARY_REQUIRED,
                SECONDARY_OPTIONAL,
            )?,
            exit: choose(
                bindings::MSR_IA32_VMX_EXIT_CTLS + offset,
                "VM-exit",
                EXIT_REQUIRED,
                0,
            )?,
            // Whether the guest is in IA-32e mode follows its EFER.
            entry: choose(
                bindings::MSR_IA32_VMX_ENTRY_CTLS + offset,
                "VM-entry",
                ENTRY_REQUIRED | entry::IA32E_MODE_GUEST,
                0,
            )? & !entry::IA32E_MODE_GUEST,
        };
        Ok(Self {
            revision: (basic & 0x7fff_ffff) as u32,
            controls,
            cr0_fixed: (
                read(
                    MsrIndex(bindings::MSR_IA32_VMX_CR0_FIXED0),
                    "IA32_VMX_CR0_FIXED0",
                )?,
                read(
                    MsrIndex(bindings::MSR_IA32_VMX_CR0_FIXED1),
                    "IA32_VMX_CR0_FIXED1",
                )?,
            ),
            cr4_fixed: (
                read(
                    MsrIndex(bindings::MSR_IA32_VMX_CR4_FIXED0),
                    "IA32_VMX_CR4_FIXED0",
                )?,
                read(
                    MsrIndex(bindings::MSR_IA32_VMX_CR4_FIXED1),
                    "IA32_VMX_CR4_FIXED1",
                )?,
            ),
            ept_2m: ept & ept_cap::PAGE_2M != 0,
            ept_1g: ept & ept_cap::PAGE_1G != 0,
            ept_accessed_dirty: ept & ept_cap::ACCESSED_DIRTY != 0,
        })
    }

    /// A virtual CPU that spins for another one can be made to exit.
    pub(crate) fn has_pause_loop_exiting(&self) -> bool {
        self.controls.secondary & secondary::PAUSE_LOOP_EXITING != 0
    }

    /// RDTSCP and RDPID can be given to a guest.
    pub(crate) fn has_rdtscp(&self) -> bool {
        self.controls.secondary & secondary::ENABLE_RDTSCP != 0
    }

    /// INVPCID can be given to a guest.
    pub(crate) fn has_invpcid(&self) -> bool {
        self.controls.secondary & secondary::ENABLE_INVPCID != 0
    }
}

fn check_vmx() -> Result {
    // SAFETY: Reads the kernel's own table of features.
    if !unsafe { bindings::rvisor_cpu_has_vmx() } {
        // The kernel clears the feature where the firmware locked VMX off, so ask the CPU itself.
        if cpu::cpuid(1, 0)[2] & (1 << 5) == 0 {
            pr_err!("this CPU has no VMX (Intel VT-x): rvisor can't run here\n");
            return Err(ENODEV);
        }
        pr_err!("VMX is there but the firmware or the kernel has it switched off: switch on \"Intel Virtualization Technology\" in the firmware's set-up\n");
        return Err(EPERM);
    }
    // SAFETY: Reads the kernel's own table of features.
    if unsafe { bindings::rvisor_cpu_has_fred() } {
        pr_err!("this kernel takes events by FRED, which rvisor can't pass NMIs on to yet: boot with fred=off\n");
        return Err(ENODEV);
    }
    let control = read(FEATURE_CONTROL, "IA32_FEATURE_CONTROL")?;
    let needed = FEATURE_CONTROL_LOCKED | FEATURE_CONTROL_VMX_OUTSIDE_SMX;
    if control & needed != needed {
        pr_err!("the firmware left VMX off (IA32_FEATURE_CONTROL is {:#x}): switch on \"Intel Virtualization Technology\" in its set-up\n", control);
        return Err(EPERM);
    }
    Ok(())
}

/// Fails with a message of its own for the first of `features` that a capability MSR does not allow.
fn check_features(index: u32, name: &str, features: &[(u32, &str)]) -> Result {
    let allowed = AllowedControls(read(MsrIndex(index), name)?);
    for (bit, feature) in features {
        if allowed.may_be_one() & bit == 0 {
            pr_err!("this CPU's VMX has no {}: rvisor needs them\n", feature);
            return Err(ENODEV);
        }
    }
    Ok(())
}

fn check_primary(offset: u32) -> Result {
    check_features(
        bindings::MSR_IA32_VMX_PROCBASED_CTLS + offset,
        "IA32_VMX_PROCBASED_CTLS",
        &[
            (primary::USE_MSR_BITMAPS, "MSR bitmaps"),
            (primary::ACTIVATE_SECONDARY, "secondary controls"),
        ],
    )
}

fn check_secondary() -> Result {
    check_features(
        bindings::MSR_IA32_VMX_PROCBASED_CTLS2,
        "IA32_VMX_PROCBASED_CTLS2",
        &[
            (secondary::ENABLE_EPT, "extended page tables (EPT)"),
            (secondary::UNRESTRICTED_GUEST, "unrestricted guests"),
            (
                secondary::ENABLE_VPID,
                "virtual-processor identifiers (VPID)",
            ),
        ],
    )
}

fn check_ept() -> Result<u64> {
    let capabilities = read(EPT_VPID_CAP, "IA32_VMX_EPT_VPID_CAP")?;
    for (bit, name) in [
        (ept_cap::WALK_4, "a 4-level EPT walk"),
        (ept_cap::WRITE_BACK, "write-back EPT structures"),
        (
            ept_cap::INVEPT | ept_cap::INVEPT_SINGLE,
            "single-context INVEPT",
        ),
        (
            ept_cap::INVVPID | ept_cap::INVVPID_SINGLE,
            "single-context INVVPID",
        ),
    ] {
        if capabilities & bit != bit {
            pr_err!("this CPU's VMX lacks {}: rvisor needs it\n", name);
            return Err(ENODEV);
        }
    }
    Ok(capabilities)
}
