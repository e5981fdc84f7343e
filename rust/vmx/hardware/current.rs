// SPDX-License-Identifier: GPL-2.0

//! The VMCS while it is current: its fields, and entering the guest.

use super::{seldom, Hardware};
use crate::{
    host::{cpu, irq::IrqsOff},
    vmx::{
        enter::{self, Outcome, Registers},
        instruction::{invept, invvpid, vmptrld, vmptrst, vmread, vmwrite},
    },
};
use kernel::prelude::*;
use rvisor_core::x86::{
    address::{Gva, Hpa},
    exit::ExitReasonField,
    msr::MsrIndex,
    segment::{AccessRights, Segment},
    vmcs::{Field16, Field32, Field64, FieldNatural, VmcsSegment},
};

/// The VMCS is current on this CPU and interrupts are off.
pub(crate) struct CurrentVmcs<'a> {
    /// What belongs to the guest beside the VMCS.
    pub(crate) hardware: &'a mut Hardware,
    irqs: &'a IrqsOff,
    /// What was current before, where it wasn't ours.
    previous: Option<Hpa>,
    /// The host ran with interrupts on since the guest's last exit.
    host_ran: bool,
    /// The host-state area is up to date: nothing that it holds changes while interrupts are off.
    prepared: bool,
}

impl<'a> CurrentVmcs<'a> {
    /// Makes the VMCS current.
    ///
    /// # Errors
    ///
    /// `EIO` where the CPU refuses it, which it does only where VMX was switched off under us.
    #[inline]
    pub(crate) fn new(hardware: &'a mut Hardware, irqs: &'a IrqsOff) -> Result<Self> {
        // SAFETY: VMX is on while the module is loaded.
        let current = unsafe { vmptrst() };
        let ours = hardware.region;
        let mut previous = None;
        if current != Some(ours) || !hardware.active {
            previous = current;
            hardware.beside |= current.is_some_and(|current| current != ours);
            hardware.activate(ours)?;
        }
        Ok(Self {
            hardware,
            irqs,
            previous,
            host_ran: true,
            prepared: false,
        })
    }

    /// The witness that interrupts are off.
    #[inline]
    pub(crate) fn irqs(&self) -> &'a IrqsOff {
        self.irqs
    }

    /// Reads a 16-bit field.
    #[inline]
    pub(crate) fn read16(&self, field: Field16) -> u16 {
        // SAFETY: The VMCS is current; the fields named are on every CPU that rvisor loads on.
        unsafe { vmread(field.encoding()) as u16 }
    }

    /// Reads a 32-bit field.
    #[inline]
    pub(crate) fn read32(&self, field: Field32) -> u32 {
        // SAFETY: As for `read16`.
        unsafe { vmread(field.encoding()) as u32 }
    }

    /// Reads a 64-bit field.
    #[inline]
    pub(crate) fn read64(&self, field: Field64) -> u64 {
        // SAFETY: As for `read16`.
        unsafe { vmread(field.encoding()) }
    }

    /// Reads a natural-width field.
    #[inline]
    pub(crate) fn read(&self, field: FieldNatural) -> u64 {
        // SAFETY: As for `read16`.
        unsafe { vmread(field.encoding()) }
    }

    /// Writes a 16-bit field.
    #[inline]
    pub(crate) fn write16(&mut self, field: Field16, value: u16) {
        // SAFETY: The VMCS is current. Guest state may hold any value: VM entry checks it. Host state
        // and controls are written by `setup` and `prepare` alone.
        unsafe { vmwrite(field.encoding(), u64::from(value)) }
    }

    /// Writes a 32-bit field.
    #[inline]
    pub(crate) fn write32(&mut self, field: Field32, value: u32) {
        // SAFETY: As for `write16`.
        unsafe { vmwrite(field.encoding(), u64::from(value)) }
    }

    /// Writes a 64-bit field.
    #[inline]
    pub(crate) fn write64(&mut self, field: Field64, value: u64) {
        // SAFETY: As for `write16`.
        unsafe { vmwrite(field.encoding(), value) }
    }

    /// Writes a natural-width field.
    #[inline]
    pub(crate) fn write(&mut self, field: FieldNatural, value: u64) {
        // SAFETY: As for `write16`.
        unsafe { vmwrite(field.encoding(), value) }
    }

    /// Reads a segment register whole.
    pub(crate) fn segment(&self, segment: VmcsSegment) -> Segment {
        Segment {
            selector: self.read16(segment.selector()),
            base: self.read(segment.base()),
            limit: self.read32(segment.limit()),
            access: AccessRights(self.read32(segment.access_rights())),
        }
    }

    /// Writes a segment register whole.
    pub(crate) fn set_segment(&mut self, segment: VmcsSegment, value: &Segment) {
        self.write16(segment.selector(), value.selector);
        self.write(segment.base(), value.base);
        self.write32(segment.limit(), value.limit);
        self.write32(segment.access_rights(), value.access.0);
    }

    /// Sets the TPR threshold, 0 to 15: no more than the task priority's class.
    #[inline]
    pub(crate) fn set_tpr_threshold(&mut self, class: u8) {
        if self.hardware.virtual_apic.threshold != class {
            self.hardware.virtual_apic.threshold = class;
            self.write32(Field32::TPR_THRESHOLD, class.into());
        }
    }

    /// Says whether the guest's x2APIC has its TPR in the virtual-APIC page, for a guest with a TPR shadow
    /// whose secondary controls `secondary` say the same. Where it has not, accesses exit: without the
    /// control they would reach the host's own APIC.
    pub(crate) fn virtualize_x2apic(&mut self, is_x2apic: bool, secondary: u32) {
        self.write32(Field32::SECONDARY_CONTROLS, secondary);
        let hardware = &mut *self.hardware;
        hardware.virtual_apic.is_x2apic = is_x2apic;
        let bitmap = &mut hardware.msr_bitmap;
        bitmap.set_read_exits(MsrIndex::X2APIC_TPR, !is_x2apic);
        bitmap.set_write_exits(MsrIndex::X2APIC_TPR, !is_x2apic);
    }

    /// Drops all translations that this CPU holds for the virtual machine's EPT.
    // Out of line: where it is not needed, nothing of it shall be on the way to the entry.
    #[inline(never)]
    pub(crate) fn flush_ept(&mut self) {
        // SAFETY: VMX is on; single-context INVEPT was checked at load.
        unsafe { invept(self.hardware.eptp) };
    }

    /// Drops all translations that this CPU holds for the virtual CPU.
    pub(crate) fn flush_vpid(&mut self) {
        // SAFETY: VMX is on; single-context INVVPID was checked at load.
        unsafe { invvpid(self.hardware.vpid) };
    }

    /// The CPU that the VMCS was last entered on is another one than this.
    pub(crate) fn has_moved(&self) -> bool {
        self.hardware.cpu != Some(self.irqs.cpu())
    }

    /// Brings the host-state area up to date and the guest's registers into the CPU.
    #[inline(never)]
    fn prepare(&mut self) {
        self.prepared = true;
        if !self.hardware.displacing {
            self.hardware.displace_host(self.irqs);
            let fs_base = self.hardware.displaced.fs_base;
            if self.hardware.host.fs_base != fs_base {
                self.hardware.host.fs_base = fs_base;
                self.write(FieldNatural::HOST_FS_BASE, fs_base);
            }
            if self.has_moved() {
                self.hardware.cpu = Some(self.irqs.cpu());
                crate::vmx::setup::write_per_cpu_host_state(self);
            }
        }
        let cr3 = cpu::cr3();
        if self.hardware.host.cr3 != cr3 {
            self.hardware.host.cr3 = cr3;
            self.write(FieldNatural::HOST_CR3, cr3);
        }
        let cr4 = cpu::cr4();
        if self.hardware.host.cr4 != cr4 {
            self.hardware.host.cr4 = cr4;
            self.write(FieldNatural::HOST_CR4, cr4);
        }
    }

    /// Runs the guest until its next exit.
    ///
    /// # Errors
    ///
    /// The VM-instruction error, where the VM-entry instruction itself failed.
    #[inline]
    pub(crate) fn enter(
        &mut self,
        registers: &mut Registers,
    ) -> core::result::Result<ExitReasonField, u32> {
        if !self.prepared {
            self.prepare();
        }
        let hardware = &mut *self.hardware;
        if hardware.seldom & seldom::ENTRY != 0 {
            hardware.prepare_seldom();
        }
        if cpu::cr2() != hardware.cr2.raw() {
            cpu::set_cr2(hardware.cr2, self.irqs);
        }
        // A host that does not use XSAVE has no XCR0.
        let switch_xcr0 = hardware.host_xcr0 != 0 && hardware.xcr0 != hardware.host_xcr0;
        if switch_xcr0 {
            // SAFETY: The guest's XCR0 was checked when it was set; the host's follows below.
            unsafe { cpu::xsetbv(hardware.xcr0) };
        }
        let host_rsp = &mut hardware.host.rsp;
        // SAFETY: Interrupts are off by `irqs`, and the VMCS is current and set up. Which of the two it
        // is entered by never changes.
        let outcome = unsafe {
            if hardware.guard.is_needed() {
                let host_ran = core::mem::take(&mut self.host_ran);
                let guard = &mut hardware.guard;
                guard.enter(registers, host_rsp, hardware.launched, host_ran, self.irqs)
            } else {
                enter::enter(registers, host_rsp, hardware.launched)
            }
        };
        if switch_xcr0 {
            // SAFETY: The host's own value.
            unsafe { cpu::xsetbv(hardware.host_xcr0) };
        }
        hardware.cr2 = Gva::new(cpu::cr2());
        if hardware.seldom & seldom::EXIT != 0 {
            hardware.restore_seldom(self.irqs);
        }
        match outcome {
            Outcome::Exit => {
                let reason = ExitReasonField(self.read32(Field32::EXIT_REASON));
                if !reason.is_entry_failure() {
                    self.hardware.launched = true;
                }
                Ok(reason)
            }
            Outcome::Failed => Err(self.read32(Field32::INSTRUCTION_ERROR)),
        }
    }
}

impl Drop for CurrentVmcs<'_> {
    #[inline]
    fn drop(&mut self) {
        if !self.hardware.running {
            self.hardware.clear();
        }
        if let Some(previous) = self.previous {
            // SAFETY: It was current on this CPU, interrupts have been off since, and its owner
            // takes it for current still.
            let _ = unsafe { vmptrld(previous) };
        }
    }
}
