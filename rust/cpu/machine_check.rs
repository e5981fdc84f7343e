// SPDX-License-Identifier: GPL-2.0

//! The machine-check banks (SDM vol. 3, 17.3): kept for the guest, and nothing is ever reported in
//! them unless userspace does.

use super::guest::Origin;
use crate::x86::msr::MsrIndex;

/// The number of banks, at most and after reset: KVM_CAP_MCE.
pub const MAX_BANKS: u32 = 10;
/// The MSRs of a bank: control, status, address, miscellaneous.
const BANK_MSRS: u32 = 4;
/// MCG_CTL_P: IA32_MCG_CTL is there.
const CTL_PRESENT: u64 = 1 << 8;
/// MCG_SER_P: software can recover from some errors.
const SOFTWARE_RECOVERY: u64 = 1 << 24;
/// MCG_EXT_CNT, which has no meaning without MCG_EXT_P.
const EXTENDED_COUNT: u64 = 0xff << 16;
/// The flags that userspace can ask for: KVM_X86_GET_MCE_CAP_SUPPORTED.
pub const SUPPORTED_CAPABILITIES: u64 = CTL_PRESENT | SOFTWARE_RECOVERY;

/// KVM_X86_SETUP_MCE asks for what is not there: EINVAL.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unsupported;

/// IA32_MCi_STATUS (SDM vol. 3, figure 17-6).
mod status {
    pub(super) const VALID: u64 = 1 << 63;
    pub(super) const OVERFLOW: u64 = 1 << 62;
    pub(super) const UNCORRECTED: u64 = 1 << 61;
    pub(super) const CONTEXT_CORRUPT: u64 = 1 << 57;
    pub(super) const SIGNALLED: u64 = 1 << 56;
    pub(super) const ACTION_REQUIRED: u64 = 1 << 55;
}
/// MCIP of IA32_MCG_STATUS: a machine check is being handled.
const IN_PROGRESS: u64 = 1 << 2;

/// An error that userspace reports to the guest, `struct kvm_x86_mce`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ErrorReport {
    /// IA32_MCi_STATUS.
    pub status: u64,
    /// IA32_MCi_ADDR.
    pub address: u64,
    /// IA32_MCi_MISC.
    pub misc: u64,
    /// IA32_MCG_STATUS.
    pub global_status: u64,
    /// The bank i.
    pub bank: u8,
}

/// What a reported error does to the vCPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reported {
    /// Nothing: its bank holds it, or such errors are not enabled.
    Silent,
    /// #MC.
    Exception,
    /// It shuts down: another machine check is in progress, or CR4.MCE is clear (SDM vol. 3, 17.3.1.2).
    Shutdown,
}

/// The machine-check state of a vCPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct MachineCheck {
    capabilities: u64,
    status: u64,
    control: u64,
    banks: [u64; (MAX_BANKS * BANK_MSRS) as usize],
}

impl Default for MachineCheck {
    fn default() -> Self {
        Self {
            capabilities: u64::from(MAX_BANKS),
            status: 0,
            control: 0,
            banks: [0; (MAX_BANKS * BANK_MSRS) as usize],
        }
    }
}

impl MachineCheck {
    /// KVM_X86_SETUP_MCE: IA32_MCG_CAP becomes `capabilities`, whose lower 8 bits say how many
    /// banks there are, and every error is enabled.
    pub(crate) fn set_up(&mut self, capabilities: u64) -> Result<(), Unsupported> {
        let banks = capabilities & 0xff;
        let unknown = capabilities & !(SUPPORTED_CAPABILITIES | EXTENDED_COUNT | 0xff) != 0;
        if unknown || banks == 0 || banks > u64::from(MAX_BANKS) {
            return Err(Unsupported);
        }
        self.capabilities = capabilities;
        self.control = if capabilities & CTL_PRESENT != 0 {
            u64::MAX
        } else {
            0
        };
        for bank in self.banks.chunks_mut(BANK_MSRS as usize) {
            if let Some(control) = bank.first_mut() {
                *control = u64::MAX;
            }
        }
        Ok(())
    }

    /// KVM_X86_SET_MCE.
    pub(crate) fn report(
        &mut self,
        report: &ErrorReport,
        cr4_mce: bool,
    ) -> Result<Reported, Unsupported> {
        let banks = self.capabilities & 0xff;
        let (control_present, global) = (self.capabilities & CTL_PRESENT != 0, self.control);
        let mut status = report.status;
        let bank = self
            .banks
            .chunks_mut(BANK_MSRS as usize)
            .take(banks as usize)
            .nth(report.bank.into());
        let Some([control, in_bank, address, misc]) = bank else {
            return Err(Unsupported);
        };
        if status & status::VALID == 0 {
            return Err(Unsupported);
        }
        let uncorrected = status & status::UNCORRECTED != 0;
        let severe = status::CONTEXT_CORRUPT | status::SIGNALLED | status::ACTION_REQUIRED;
        let needs_action = report.global_status != 0 || status & severe != 0;
        let mut reported = Reported::Silent;
        if uncorrected && needs_action {
            if (control_present && global != u64::MAX) || *control != u64::MAX {
                return Ok(Reported::Silent);
            }
            if self.status & IN_PROGRESS != 0 || !cr4_mce {
                return Ok(Reported::Shutdown);
            }
            reported = Reported::Exception;
        } else if !uncorrected
            && *in_bank & status::VALID != 0
            && *in_bank & status::UNCORRECTED != 0
        {
            // A worse error is there already.
            *in_bank |= status::OVERFLOW;
            return Ok(Reported::Silent);
        }
        if (needs_action || !uncorrected) && *in_bank & status::VALID != 0 {
            status |= status::OVERFLOW;
        }
        (*in_bank, *address, *misc) = (status, report.address, report.misc);
        if uncorrected {
            self.status = report.global_status;
        }
        Ok(reported)
    }

    /// The place of a bank's MSR, where the vCPU has that bank.
    fn bank_place(&self, index: MsrIndex) -> Option<usize> {
        let place = index.0.checked_sub(MsrIndex::MC0_CTL.0)?;
        let banks = (self.capabilities & 0xff) as u32;
        (place < banks.saturating_mul(BANK_MSRS)).then_some(place as usize)
    }

    /// Reads a machine-check MSR; `None` for what is none.
    pub(crate) fn read(&self, index: MsrIndex, origin: Origin) -> Option<u64> {
        match index {
            MsrIndex::P5_MC_ADDR | MsrIndex::P5_MC_TYPE => Some(0),
            MsrIndex::MCG_CAP => Some(self.capabilities),
            MsrIndex::MCG_STATUS => Some(self.status),
            MsrIndex::MCG_CTL => {
                let is_there = self.capabilities & CTL_PRESENT != 0 || origin == Origin::Host;
                is_there.then_some(self.control)
            }
            _ => self.banks.get(self.bank_place(index)?).copied(),
        }
    }

    /// Writes a machine-check MSR; `None` for what is none, and for a value that can't be.
    pub(crate) fn write(&mut self, index: MsrIndex, value: u64, origin: Origin) -> Option<()> {
        match index {
            MsrIndex::MCG_STATUS => self.status = value,
            MsrIndex::MCG_CTL => {
                let is_there = self.capabilities & CTL_PRESENT != 0;
                // Userspace may put back the zero that it read.
                let is_restored = origin == Origin::Host && value == 0;
                if !(is_there || is_restored) || !matches!(value, 0 | u64::MAX) {
                    return None;
                }
                self.control = value;
            }
            _ => {
                let place = self.bank_place(index)?;
                if !Self::is_valid_in_bank(place, value, origin) {
                    return None;
                }
                *self.banks.get_mut(place)? = value;
            }
        }
        Some(())
    }

    /// Control registers take all zeroes or all ones; old systems leave bit 0 or bit 10 clear. A
    /// guest can only clear a status (SDM vol. 3, 17.3.2).
    fn is_valid_in_bank(place: usize, value: u64, origin: Origin) -> bool {
        match place & 3 {
            0 => value == 0 || value | (1 << 10) | 1 == u64::MAX,
            1 => value == 0 || origin == Origin::Host,
            _ => true,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const UC: u64 = status::VALID | status::UNCORRECTED;

    fn state(capabilities: u64) -> MachineCheck {
        let mut state = MachineCheck::default();
        state.set_up(capabilities).unwrap();
        state
    }

    fn report(status: u64, global_status: u64, bank: u8) -> ErrorReport {
        ErrorReport {
            status,
            address: 0x1234,
            misc: 0x56,
            global_status,
            bank,
        }
    }

    /// The bank's status, address and miscellaneous register.
    fn bank(state: &MachineCheck, bank: u32) -> [u64; 3] {
        [1, 2, 3].map(|register| {
            let index = MsrIndex(MsrIndex::MC0_CTL.0 + 4 * bank + register);
            state.read(index, Origin::Guest).unwrap()
        })
    }

    #[test]
    fn a_report_needs_a_bank_and_a_valid_status() {
        let mut state = state(4);
        assert_eq!(state.report(&report(UC, 4, 4), true), Err(Unsupported));
        assert_eq!(state.report(&report(UC, 4, 255), true), Err(Unsupported));
        let invalid = report(status::UNCORRECTED, 4, 0);
        assert_eq!(state.report(&invalid, true), Err(Unsupported));
        assert_eq!(bank(&state, 0), [0; 3]);
    }

    #[test]
    fn an_uncorrected_error_is_an_exception() {
        let mut state = state(10 | CTL_PRESENT);
        let first = report(UC, 5, 3);
        assert_eq!(state.report(&first, true), Ok(Reported::Exception));
        assert_eq!(bank(&state, 3), [UC, 0x1234, 0x56]);
        assert_eq!(state.read(MsrIndex::MCG_STATUS, Origin::Guest), Some(5));
        // MCIP is set: the next shuts the vCPU down, and is not recorded.
        assert_eq!(
            state.report(&report(UC, 5, 2), true),
            Ok(Reported::Shutdown)
        );
        assert_eq!(bank(&state, 2), [0; 3]);
        state.write(MsrIndex::MCG_STATUS, 0, Origin::Guest).unwrap();
        assert_eq!(state.report(&first, false), Ok(Reported::Shutdown));
        assert_eq!(state.report(&first, true), Ok(Reported::Exception));
        assert_eq!(bank(&state, 3)[0], UC | status::OVERFLOW);
    }

    #[test]
    fn what_is_not_enabled_is_not_reported() {
        let mut state = state(10 | CTL_PRESENT);
        let error = report(UC, 5, 1);
        state.write(MsrIndex::MCG_CTL, 0, Origin::Guest).unwrap();
        assert_eq!(state.report(&error, true), Ok(Reported::Silent));
        state
            .write(MsrIndex::MCG_CTL, u64::MAX, Origin::Guest)
            .unwrap();
        let control = MsrIndex(MsrIndex::MC0_CTL.0 + 4);
        state.write(control, 0, Origin::Guest).unwrap();
        assert_eq!(state.report(&error, true), Ok(Reported::Silent));
        assert_eq!(bank(&state, 1), [0; 3]);
    }

    #[test]
    fn corrected_errors_only_fill_their_bank() {
        let mut state = state(10);
        let corrected = report(status::VALID, 0, 0);
        assert_eq!(state.report(&corrected, false), Ok(Reported::Silent));
        assert_eq!(bank(&state, 0), [status::VALID, 0x1234, 0x56]);
        assert_eq!(state.report(&corrected, false), Ok(Reported::Silent));
        assert_eq!(bank(&state, 0)[0], status::VALID | status::OVERFLOW);
        // Uncorrected, and no action is required: no exception either.
        assert_eq!(state.report(&report(UC, 0, 0), true), Ok(Reported::Silent));
        assert_eq!(bank(&state, 0)[0], UC);
        // A corrected one does not push it out.
        assert_eq!(state.report(&corrected, true), Ok(Reported::Silent));
        assert_eq!(bank(&state, 0)[0], UC | status::OVERFLOW);
    }
}
