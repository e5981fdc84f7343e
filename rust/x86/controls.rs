// SPDX-License-Identifier: GPL-2.0

//! VM-execution, VM-entry and VM-exit controls: their bits, and which of them a CPU allows.

/// Pin-based VM-execution controls (SDM vol. 3, table 26-5).
pub mod pin {
    /// External interrupts exit.
    pub const EXTERNAL_INTERRUPT_EXITING: u32 = 1 << 0;
    /// NMIs exit.
    pub const NMI_EXITING: u32 = 1 << 3;
    /// Guest NMI blocking is tracked, apart from the host's.
    pub const VIRTUAL_NMIS: u32 = 1 << 5;
}

/// Primary processor-based VM-execution controls (SDM vol. 3, table 26-6).
pub mod primary {
    /// Exit as soon as the guest can take an interrupt.
    pub const INTERRUPT_WINDOW_EXITING: u32 = 1 << 2;
    /// RDTSC gives the host's TSC plus an offset.
    pub const USE_TSC_OFFSETTING: u32 = 1 << 3;
    /// HLT exits.
    pub const HLT_EXITING: u32 = 1 << 7;
    /// INVLPG exits.
    pub const INVLPG_EXITING: u32 = 1 << 9;
    /// MWAIT exits.
    pub const MWAIT_EXITING: u32 = 1 << 10;
    /// RDPMC exits.
    pub const RDPMC_EXITING: u32 = 1 << 11;
    /// MOV to CR3 exits.
    pub const CR3_LOAD_EXITING: u32 = 1 << 15;
    /// MOV from CR3 exits.
    pub const CR3_STORE_EXITING: u32 = 1 << 16;
    /// MOV to CR8 exits.
    pub const CR8_LOAD_EXITING: u32 = 1 << 19;
    /// MOV from CR8 exits.
    pub const CR8_STORE_EXITING: u32 = 1 << 20;
    /// MOV to and from CR8 reach the virtual-APIC page.
    pub const USE_TPR_SHADOW: u32 = 1 << 21;
    /// Exit as soon as the guest can take an NMI.
    pub const NMI_WINDOW_EXITING: u32 = 1 << 22;
    /// MOV to and from debug registers exits.
    pub const MOV_DR_EXITING: u32 = 1 << 23;
    /// Every I/O instruction exits.
    pub const UNCONDITIONAL_IO_EXITING: u32 = 1 << 24;
    /// The MSR bitmap says which accesses exit.
    pub const USE_MSR_BITMAPS: u32 = 1 << 28;
    /// MONITOR exits.
    pub const MONITOR_EXITING: u32 = 1 << 29;
    /// PAUSE exits.
    pub const PAUSE_EXITING: u32 = 1 << 30;
    /// The secondary controls are in use.
    pub const ACTIVATE_SECONDARY: u32 = 1 << 31;
}

/// Secondary processor-based VM-execution controls (SDM vol. 3, table 26-7).
pub mod secondary {
    /// EPT.
    pub const ENABLE_EPT: u32 = 1 << 1;
    /// Descriptor-table instructions exit.
    pub const DESCRIPTOR_TABLE_EXITING: u32 = 1 << 2;
    /// RDTSCP does not raise #UD.
    pub const ENABLE_RDTSCP: u32 = 1 << 3;
    /// RDMSR and WRMSR of the x2APIC's TPR reach the virtual-APIC page. Needs the TPR shadow.
    pub const VIRTUALIZE_X2APIC_MODE: u32 = 1 << 4;
    /// VPID.
    pub const ENABLE_VPID: u32 = 1 << 5;
    /// WBINVD exits.
    pub const WBINVD_EXITING: u32 = 1 << 6;
    /// The guest may run without paging and in real mode.
    pub const UNRESTRICTED_GUEST: u32 = 1 << 7;
    /// A loop of PAUSEs at CPL 0 exits.
    pub const PAUSE_LOOP_EXITING: u32 = 1 << 10;
    /// INVPCID does not raise #UD.
    pub const ENABLE_INVPCID: u32 = 1 << 12;
    /// ENCLS exits, as far as its bitmap says.
    pub const ENCLS_EXITING: u32 = 1 << 15;
    /// XSAVES and XRSTORS do not raise #UD.
    pub const ENABLE_XSAVES: u32 = 1 << 20;
    /// ENCLV exits, as far as its bitmap says.
    pub const ENCLV_EXITING: u32 = 1 << 28;
}

/// VM-exit controls (SDM vol. 3, table 26-13).
pub mod exit {
    /// DR7 and IA32_DEBUGCTL are saved.
    pub const SAVE_DEBUG_CONTROLS: u32 = 1 << 2;
    /// The host runs in 64-bit mode.
    pub const HOST_ADDRESS_SPACE_SIZE: u32 = 1 << 9;
    /// The CPU takes an external interrupt off the local APIC at the exit.
    pub const ACKNOWLEDGE_INTERRUPT: u32 = 1 << 15;
    /// IA32_PAT is saved.
    pub const SAVE_PAT: u32 = 1 << 18;
    /// IA32_PAT is loaded.
    pub const LOAD_PAT: u32 = 1 << 19;
    /// IA32_EFER is saved.
    pub const SAVE_EFER: u32 = 1 << 20;
    /// IA32_EFER is loaded.
    pub const LOAD_EFER: u32 = 1 << 21;
}

/// VM-entry controls (SDM vol. 3, table 26-15).
pub mod entry {
    /// DR7 and IA32_DEBUGCTL are loaded.
    pub const LOAD_DEBUG_CONTROLS: u32 = 1 << 2;
    /// The guest is in IA-32e mode.
    pub const IA32E_MODE_GUEST: u32 = 1 << 9;
    /// IA32_PAT is loaded.
    pub const LOAD_PAT: u32 = 1 << 14;
    /// IA32_EFER is loaded.
    pub const LOAD_EFER: u32 = 1 << 15;
}

/// Controls that are needed and that the CPU does not offer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MissingControls(pub u32);

/// What a capability MSR allows: bits that must be 1 (31:0) and bits that may be 1 (63:32)
/// (SDM vol. 3, appendix A.3 to A.5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(transparent)]
pub struct AllowedControls(pub u64);

impl AllowedControls {
    /// The bits that must be set.
    #[inline]
    pub const fn must_be_one(self) -> u32 {
        (self.0 & 0xffff_ffff) as u32
    }

    /// The bits that may be set.
    #[inline]
    pub const fn may_be_one(self) -> u32 {
        (self.0 >> 32) as u32
    }

    /// Whether all of `bits` may be clear.
    #[inline]
    pub const fn may_be_zero(self, bits: u32) -> bool {
        self.must_be_one() & bits == 0
    }

    /// `required`, those of `optional` that the CPU has, and what it insists on.
    ///
    /// # Errors
    ///
    /// The bits of `required` that the CPU can't set: never dropped in silence.
    pub const fn choose(self, required: u32, optional: u32) -> Result<u32, MissingControls> {
        let missing = required & !self.may_be_one();
        if missing != 0 {
            return Err(MissingControls(missing));
        }
        Ok(required | (optional & self.may_be_one()) | self.must_be_one())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_required_control_is_named() {
        let allowed = AllowedControls(0x0000_00f6_0000_0016);
        assert_eq!(allowed.choose(0x1 | 0x20, 0), Err(MissingControls(0x1)));
    }

    #[test]
    fn optional_controls_are_taken_where_offered_and_fixed_ones_are_set() {
        let allowed = AllowedControls(0x0000_00f6_0000_0016);
        assert_eq!(allowed.choose(0x20, 0x40 | 0x8), Ok(0x20 | 0x40 | 0x16));
    }
}
