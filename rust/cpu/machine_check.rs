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
/// The flags that userspace can ask for: KVM_X86_GET_MCE_CAP_SUPPORTED.
pub const SUPPORTED_CAPABILITIES: u64 = CTL_PRESENT | SOFTWARE_RECOVERY;

/// KVM_X86_SETUP_MCE asks for what is not there: EINVAL.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unsupported;

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
        let unknown = capabilities & !(SUPPORTED_CAPABILITIES | 0xff) != 0;
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
