// SPDX-License-Identifier: GPL-2.0

//! What an exit to userspace leaves to be done when RUN is called again.

use super::{
    mmio::Replay,
    port::merge,
    run_page::{RunPage, UserExit},
    vcpu::{Core, State},
};
use crate::vmx::hardware::CurrentVmcs;
use kernel::prelude::*;
use rvisor_core::x86::{address::Gva, exit::IoAccess, vmcs::FieldNatural};

/// The rest of an instruction.
#[derive(Clone, Copy)]
pub(crate) enum Completion {
    /// OUT: move behind it, where userspace left RIP.
    Out { rip: u64, length: u32 },
    /// IN: the same, and take the data.
    In { size: u8, rip: u64, length: u32 },
    /// One element of INS or OUTS.
    String {
        is_in: bool,
        is_rep: bool,
        size: u8,
        linear: Gva,
        rip: u64,
        length: u32,
        /// The registers' bits of the address size.
        mask: u64,
    },
    /// An MMIO read of OUTS: take the data and make the exit at this RIP again.
    StringRead { access: IoAccess, rip: u64 },
    /// An MMIO read: take the data and execute the instruction again.
    MmioRead,
    /// MMIO writes of an instruction that has retired: the rest of them.
    MmioWrite,
}

impl State {
    /// Does what is left of an earlier exit. That may end in another exit.
    ///
    /// # Errors
    ///
    /// `EFAULT` where guest memory is backed by nothing.
    pub(super) fn complete(&mut self, run: &RunPage) -> Result<Option<UserExit>> {
        let Some(completion) = self.core.completion else {
            return Ok(None);
        };
        match completion {
            Completion::Out { rip, length } => {
                self.core.completion = None;
                self.with_vmcs(|core, vmcs| core.step_over(vmcs, rip, length))?;
                Ok(None)
            }
            Completion::In { size, rip, length } => {
                self.core.completion = None;
                let data = run.io_data(size);
                self.with_vmcs(|core, vmcs| {
                    if core.step_over(vmcs, rip, length) {
                        core.registers[0] = merge(core.registers[0], size, data);
                    }
                })?;
                Ok(None)
            }
            Completion::String { size, .. } => self.complete_string(run.io_data(size)),
            Completion::StringRead { access, rip } => {
                if !self.take_mmio_read(run, |_, at| at == rip)? {
                    return Ok(None);
                }
                self.handle_string_io(&access)
            }
            Completion::MmioRead => {
                if !self.take_mmio_read(run, Replay::is_kept_for)? {
                    return Ok(None);
                }
                self.emulate()
            }
            Completion::MmioWrite => Ok(self.next_mmio_write()),
        }
    }

    /// Takes what userspace has read, unless it has sent the guest elsewhere: then the instruction is
    /// given up.
    fn take_mmio_read(
        &mut self,
        run: &RunPage,
        is_expected: impl FnOnce(&Replay, u64) -> bool,
    ) -> Result<bool> {
        self.core.completion = None;
        let rip = self.with_vmcs(|_, vmcs| vmcs.read(FieldNatural::GUEST_RIP))?;
        if !is_expected(&self.core.replay, rip) {
            self.core.abandon_emulation();
            return Ok(false);
        }
        self.core.replay.supply(run.mmio_data());
        Ok(true)
    }
}

impl Core {
    /// Moves behind an instruction, where RIP still stands on it.
    fn step_over(&mut self, vmcs: &mut CurrentVmcs<'_>, rip: u64, length: u32) -> bool {
        let untouched = vmcs.read(FieldNatural::GUEST_RIP) == rip;
        if untouched {
            self.retire_over(vmcs, rip, length);
        }
        untouched
    }
}
