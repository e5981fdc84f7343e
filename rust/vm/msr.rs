// SPDX-License-Identifier: GPL-2.0

//! RDMSR and WRMSR: the policy is the pure crate's, where each value lives is known here.

use super::{exits::Next, vcpu::Core};
use crate::{
    bindings,
    host::{cpu, speculation},
    vmx::{hardware::CurrentVmcs, msr_bitmap::MsrBitmap},
};
use rvisor_core::{
    cpu::{
        guest::Origin,
        msr::{check_apic_base, HardwareMsr, LoadedMsr, MsrEffect, MsrValue},
    },
    irqchip::lapic::{self, LapicEffect},
    x86::{
        control::{check_efer_change, Cr0, Efer},
        msr::{MsrIndex, APIC_BASE_ENABLE},
        vector::Exception,
        vmcs::{Field32, Field64, FieldNatural},
    },
};

/// The access can't be: #GP(0) for a guest, the end of the list for userspace.
pub(crate) struct MsrFault;

/// MSRs that the guest reads and writes without an exit: the CPU switches them.
const PASSED_THROUGH: [u32; 6] = [
    bindings::MSR_FS_BASE,
    bindings::MSR_GS_BASE,
    bindings::MSR_KERNEL_GS_BASE,
    bindings::MSR_IA32_SYSENTER_CS,
    bindings::MSR_IA32_SYSENTER_ESP,
    bindings::MSR_IA32_SYSENTER_EIP,
];

/// Fills a new MSR bitmap: everything exits but [`PASSED_THROUGH`].
pub(super) fn fill_bitmap(bitmap: &mut MsrBitmap) {
    for index in PASSED_THROUGH {
        bitmap.pass_through(MsrIndex(index));
    }
}

impl Core {
    #[inline]
    pub(super) fn exit_rdmsr(&mut self, vmcs: &mut CurrentVmcs<'_>) -> Next {
        let index = MsrIndex(self.registers[1] as u32);
        match self.read_msr(vmcs, index, Origin::Guest) {
            Ok(value) => {
                self.registers[0] = value & 0xffff_ffff;
                self.registers[2] = value >> 32;
                self.skip(vmcs)
            }
            Err(MsrFault) => self.raise(Exception::GENERAL_PROTECTION),
        }
    }

    #[inline]
    pub(super) fn exit_wrmsr(&mut self, vmcs: &mut CurrentVmcs<'_>) -> Next {
        let index = MsrIndex(self.registers[1] as u32);
        let value = (self.registers[2] << 32) | (self.registers[0] & 0xffff_ffff);
        match self.write_msr(vmcs, index, value, Origin::Guest) {
            Ok(()) => self.skip(vmcs),
            Err(MsrFault) => self.raise(Exception::GENERAL_PROTECTION),
        }
    }

    /// IA32_APIC_BASE.
    #[inline]
    pub(super) fn apic_base(&self) -> u64 {
        match &self.lapic {
            Some(lapic) => lapic.base(),
            None => self.apic_base,
        }
    }

    /// Whether IA32_APIC_BASE has the local APIC on.
    #[inline]
    pub(super) fn apic_enabled(&self) -> bool {
        self.apic_base() & APIC_BASE_ENABLE != 0
    }

    /// Reads an MSR.
    #[inline]
    pub(crate) fn read_msr(
        &mut self,
        vmcs: &CurrentVmcs<'_>,
        index: MsrIndex,
        origin: Origin,
    ) -> core::result::Result<u64, MsrFault> {
        let value = self
            .msrs
            .read(index, origin, &self.cpu)
            .map_err(|_| MsrFault)?;
        Ok(match value {
            MsrValue::Known(value) => value,
            MsrValue::PlatformInfo(_) if self.vm.settings.hides_platform_info() => {
                return Err(MsrFault)
            }
            MsrValue::PlatformInfo(value) => value,
            MsrValue::ApicBase => self.apic_base(),
            MsrValue::Tsc => self.guest_tsc(),
            MsrValue::Efer => self.efer.0,
            MsrValue::SpecCtrl => vmcs.hardware.guard.spec_ctrl(),
            MsrValue::Hardware(msr) => read_hardware(vmcs, msr),
            MsrValue::TscDeadline => match &self.lapic {
                Some(lapic) if self.cpu.tsc_deadline || origin == Origin::Host => {
                    lapic.tsc_deadline()
                }
                _ => return Err(MsrFault),
            },
            MsrValue::X2apic(_) => {
                let clock = self.clock();
                let lapic = self.lapic.as_mut().ok_or(MsrFault)?;
                lapic.read_msr(index, clock).map_err(|_| MsrFault)?
            }
        })
    }

    /// Writes an MSR. On an error nothing has changed.
    pub(crate) fn write_msr(
        &mut self,
        vmcs: &mut CurrentVmcs<'_>,
        index: MsrIndex,
        value: u64,
        origin: Origin,
    ) -> core::result::Result<(), MsrFault> {
        let effect = self
            .msrs
            .write(index, value, origin, &self.cpu)
            .map_err(|_| MsrFault)?;
        match effect {
            MsrEffect::Done => {}
            // The CPU has the commands: CPUID shows them only where it has.
            MsrEffect::PredictionBarrier => speculation::barrier(),
            MsrEffect::FlushL1d => speculation::flush_l1d_by_msr(),
            MsrEffect::Hardware(msr, value) => write_hardware(vmcs, msr, value),
            MsrEffect::Loaded(msr, value) => write_loaded(vmcs, msr, value),
            MsrEffect::SetTsc(value) => {
                let offset = if origin == Origin::Guest {
                    let offset = value.wrapping_sub(cpu::rdtsc());
                    self.msrs.tsc_moved(offset.wrapping_sub(self.tsc_offset));
                    offset
                } else {
                    self.vm.offset_for_tsc(value)
                };
                self.set_tsc_offset(vmcs, offset);
            }
            MsrEffect::MoveTsc(delta) => {
                self.set_tsc_offset(vmcs, self.tsc_offset.wrapping_add(delta));
            }
            MsrEffect::ApicBase(value) => self.set_apic_base(value, origin)?,
            MsrEffect::TscDeadline(value) => {
                if !self.cpu.tsc_deadline && origin == Origin::Guest {
                    return Err(MsrFault);
                }
                let lapic = self.lapic.as_mut().ok_or(MsrFault)?;
                let effect = lapic.set_tsc_deadline(value);
                self.apply(effect);
            }
            MsrEffect::X2apic(_, value) => {
                let clock = self.clock();
                let lapic = self.lapic.as_mut().ok_or(MsrFault)?;
                let effect = lapic.write_msr(index, value, clock).map_err(|_| MsrFault)?;
                self.apply(effect);
            }
            MsrEffect::Efer(value) => self.write_efer(vmcs, value, origin)?,
        }
        Ok(())
    }

    fn set_tsc_offset(&mut self, vmcs: &mut CurrentVmcs<'_>, offset: u64) {
        self.tsc_offset = offset;
        vmcs.write64(Field64::TSC_OFFSET, offset);
        // A TSC deadline is now at another moment.
        self.apply(LapicEffect::TimerChanged);
    }

    /// Sets IA32_APIC_BASE.
    pub(crate) fn set_apic_base(
        &mut self,
        value: u64,
        origin: Origin,
    ) -> core::result::Result<(), MsrFault> {
        check_apic_base(self.apic_base(), value, origin, &self.cpu).map_err(|_| MsrFault)?;
        match &mut self.lapic {
            Some(lapic) => {
                let origin = match origin {
                    Origin::Guest => lapic::Origin::Guest,
                    Origin::Host => lapic::Origin::Host,
                };
                let effect = lapic.set_base(value, origin).map_err(|_| MsrFault)?;
                self.apply(effect);
            }
            None => self.apic_base = value,
        }
        Ok(())
    }

    fn write_efer(
        &mut self,
        vmcs: &mut CurrentVmcs<'_>,
        value: u64,
        origin: Origin,
    ) -> core::result::Result<(), MsrFault> {
        let reserved = self.cpu.efer_reserved(origin);
        let cr0 = if origin == Origin::Guest {
            self.cr0
        } else {
            Cr0(0)
        };
        let new = check_efer_change(self.efer, Efer(value), reserved, cr0).map_err(|_| MsrFault)?;
        self.set_efer(vmcs, new);
        self.flush_guest = true;
        Ok(())
    }
}

#[inline]
fn read_hardware(vmcs: &CurrentVmcs<'_>, msr: HardwareMsr) -> u64 {
    match msr {
        HardwareMsr::SysenterCs => vmcs.read32(Field32::GUEST_SYSENTER_CS).into(),
        HardwareMsr::SysenterEsp => vmcs.read(FieldNatural::GUEST_SYSENTER_ESP),
        HardwareMsr::SysenterEip => vmcs.read(FieldNatural::GUEST_SYSENTER_EIP),
        HardwareMsr::FsBase => vmcs.read(FieldNatural::GUEST_FS_BASE),
        HardwareMsr::GsBase => vmcs.read(FieldNatural::GUEST_GS_BASE),
        HardwareMsr::KernelGsBase => vmcs.hardware.kernel_gs_base(vmcs.irqs()),
    }
}

fn write_hardware(vmcs: &mut CurrentVmcs<'_>, msr: HardwareMsr, value: u64) {
    match msr {
        HardwareMsr::SysenterCs => vmcs.write32(Field32::GUEST_SYSENTER_CS, value as u32),
        HardwareMsr::SysenterEsp => vmcs.write(FieldNatural::GUEST_SYSENTER_ESP, value),
        HardwareMsr::SysenterEip => vmcs.write(FieldNatural::GUEST_SYSENTER_EIP, value),
        HardwareMsr::FsBase => vmcs.write(FieldNatural::GUEST_FS_BASE, value),
        HardwareMsr::GsBase => vmcs.write(FieldNatural::GUEST_GS_BASE, value),
        HardwareMsr::KernelGsBase => {
            let irqs = vmcs.irqs();
            vmcs.hardware.set_kernel_gs_base(value, irqs);
        }
    }
}

fn write_loaded(vmcs: &mut CurrentVmcs<'_>, msr: LoadedMsr, value: u64) {
    // The places are those of `SWITCHED_MSRS`.
    let place = match msr {
        LoadedMsr::Star => 0,
        LoadedMsr::Lstar => 1,
        LoadedMsr::SyscallMask => 2,
        LoadedMsr::TscAux => 3,
        LoadedMsr::Pat => return vmcs.write64(Field64::GUEST_PAT, value),
        LoadedMsr::SpecCtrl => {
            if vmcs.hardware.guard.set_spec_ctrl(value) {
                vmcs.hardware.msr_bitmap.pass_through(MsrIndex::SPEC_CTRL);
            }
            return;
        }
        // Intel's CPUs have no SYSCALL outside 64-bit mode.
        LoadedMsr::Cstar => return,
    };
    let irqs = vmcs.irqs();
    vmcs.hardware.set_switched_msr(place, value, irqs);
}
