// SPDX-License-Identifier: GPL-2.0

//! Machine checks that userspace reports to a guest.

use super::vcpu::State;
use crate::bindings as uapi;
use kernel::prelude::*;
use rvisor_core::{
    cpu::machine_check::{ErrorReport, Reported},
    x86::{
        control::Cr4,
        vector::{Exception, ExceptionVector},
    },
};

impl State {
    /// Carries out KVM_X86_SET_MCE.
    ///
    /// # Errors
    ///
    /// `EINVAL` where there is no such bank, or nothing valid to report.
    pub(crate) fn report_machine_check(&mut self, mce: &uapi::kvm_x86_mce) -> Result {
        let report = ErrorReport {
            status: mce.status,
            address: mce.addr,
            misc: mce.misc,
            global_status: mce.mcg_status,
            bank: mce.bank,
        };
        self.with_vmcs(|core, vmcs| {
            let enabled = core.read_cr4(vmcs).has(Cr4::MCE);
            match core.msrs.report_machine_check(&report, enabled) {
                Ok(Reported::Silent) => {}
                Ok(Reported::Exception) => core
                    .events
                    .raise(Exception::plain(ExceptionVector::MachineCheck)),
                Ok(Reported::Shutdown) => {
                    core.events.triple_fault = true;
                    core.events.attention = true;
                }
                Err(_) => return Err(EINVAL),
            }
            Ok(())
        })?
    }
}
