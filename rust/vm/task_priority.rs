// SPDX-License-Identifier: GPL-2.0

//! The task priority of a guest with a TPR shadow. While the guest runs it is in the virtual-APIC page, at
//! all other times in the local APIC: it is taken up after each exit, and given before each entry that
//! follows a change.

use super::vcpu::Core;
use crate::vmx::hardware::CurrentVmcs;
use rvisor_core::{
    irqchip::destination::ApicMode,
    x86::{capability::GuestFeatures, controls::primary},
};

impl Core {
    /// Takes up the task priority that the guest has set by itself.
    #[inline]
    pub(super) fn take_task_priority(&mut self, vmcs: &mut CurrentVmcs<'_>) {
        if let Some(tpr) = vmcs.hardware.virtual_apic.take_tpr() {
            self.task_priority_changed(vmcs, tpr);
        }
    }

    #[inline(never)]
    fn task_priority_changed(&mut self, vmcs: &CurrentVmcs<'_>, tpr: u8) {
        if let Some(lapic) = &mut self.lapic {
            lapic.set_tpr(tpr);
            let waits = lapic.has_request();
            self.events.attention |= waits || vmcs.hardware.virtual_apic.threshold() != 0;
        }
    }

    /// Gives the task priority to the guest, and has it exit where it lowers it so far that an interrupt
    /// gets through.
    pub(super) fn share_task_priority(&mut self, vmcs: &mut CurrentVmcs<'_>) {
        let Some(lapic) = &self.lapic else {
            return;
        };
        if self.primary_controls & primary::USE_TPR_SHADOW == 0 {
            return;
        }
        vmcs.hardware.virtual_apic.set_tpr(lapic.tpr());
        vmcs.set_tpr_threshold(lapic.tpr_threshold());
        let is_x2apic = lapic.mode() == ApicMode::X2Apic;
        if is_x2apic != vmcs.hardware.virtual_apic.is_x2apic() {
            self.change_x2apic_mode(vmcs, is_x2apic);
        }
    }

    /// The local APIC has entered x2APIC mode, or left it.
    #[cold]
    fn change_x2apic_mode(&self, vmcs: &mut CurrentVmcs<'_>, is_x2apic: bool) {
        if self.vm.host.capabilities.has_x2apic_mode() {
            vmcs.virtualize_x2apic(is_x2apic, self.secondary_controls(is_x2apic));
        }
    }

    /// The secondary controls for what the guest's CPUID shows.
    pub(super) fn secondary_controls(&self, x2apic_mode: bool) -> u32 {
        let offered = GuestFeatures {
            rdtscp: self.cpu.rdtscp || self.cpu.rdpid,
            invpcid: self.cpu.invpcid,
            x2apic_mode,
        };
        self.vm.host.capabilities.guest_secondary(offered)
    }
}
