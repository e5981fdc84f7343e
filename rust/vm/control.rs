// SPDX-License-Identifier: GPL-2.0

//! Accesses to CR0, CR3, CR4 and the debug registers.

use super::{
    run_page::UserExit,
    vcpu::{Core, State},
};
use crate::vmx::hardware::CurrentVmcs;
use kernel::prelude::*;
use rvisor_core::x86::{
    address::Gpa,
    control::{
        check_cr0_change, check_cr3, check_cr4_change, dr6_written, dr7_written, physical_mask,
        reloads_pdptes, Cr0, Cr3, Cr4, Efer, Illegal, CR4_FLUSHES,
    },
    exit::CrAccess,
    segment::AccessRights,
    vector::Exception,
    vmcs::{Field64, FieldNatural, VmcsSegment},
};

/// The four root entries of PAE paging.
pub(crate) type Pdptes = [u64; 4];

impl Core {
    /// A debug register by its number; 4 and 5 are resolved by the caller.
    pub(crate) fn debug_register(&self, vmcs: &CurrentVmcs<'_>, register: u8) -> u64 {
        match register {
            6 => self.dr6,
            7 => vmcs.read(FieldNatural::GUEST_DR7),
            number => vmcs
                .hardware
                .debug
                .address
                .get(usize::from(number))
                .copied()
                .unwrap_or(0),
        }
    }

    /// Sets a debug register.
    ///
    /// # Errors
    ///
    /// [`Illegal`] for bits 63:32 in DR6 and DR7: #GP(0).
    pub(crate) fn set_debug_register(
        &mut self,
        vmcs: &mut CurrentVmcs<'_>,
        register: u8,
        value: u64,
    ) -> core::result::Result<(), Illegal> {
        match register {
            6 => self.dr6 = dr6_written(value)?.0,
            7 => {
                let dr7 = dr7_written(value)?;
                vmcs.write(FieldNatural::GUEST_DR7, dr7.0);
                // Bits 7:0 arm the four breakpoints.
                vmcs.hardware.arm_breakpoints(dr7.0 & 0xff != 0);
            }
            number => {
                if let Some(address) = vmcs.hardware.debug.address.get_mut(usize::from(number)) {
                    *address = value;
                }
            }
        }
        Ok(())
    }

    /// Puts the root entries of PAE paging into the VMCS.
    pub(crate) fn load_pdptes(vmcs: &mut CurrentVmcs<'_>, pdptes: &Pdptes) {
        for (place, entry) in pdptes.iter().enumerate() {
            vmcs.write64(Field64::guest_pdpte(place as u32), *entry);
        }
    }
}

impl State {
    /// Reads the root entries that `cr3` points at, for PAE paging. `None` where one is not legal
    /// (SDM vol. 3, 5.4.1).
    ///
    /// # Errors
    ///
    /// `EFAULT` where guest memory is backed by nothing.
    pub(crate) fn read_pdptes(&self, cr3: u64) -> Result<Option<Pdptes>> {
        // Reserved in a present entry: bits 2:1, 8:5 and those past the physical addresses.
        let reserved = 0x1e6 | !physical_mask(self.core.cpu.physical_bits);
        let mut bytes = [0u8; 32];
        let gpa = Gpa::new(cr3 & 0xffff_ffe0);
        if self.core.vm.memory.read(gpa, &mut bytes)?.is_none() {
            bytes.fill(0xff);
        }
        let mut pdptes = [0; 4];
        for (entry, chunk) in pdptes.iter_mut().zip(bytes.chunks_exact(8)) {
            let mut raw = [0; 8];
            raw.copy_from_slice(chunk);
            *entry = u64::from_le_bytes(raw);
            if *entry & 1 != 0 && *entry & reserved != 0 {
                return Ok(None);
            }
        }
        Ok(Some(pdptes))
    }

    /// A control-register access whose consequences may reach into guest memory.
    ///
    /// # Errors
    ///
    /// `EFAULT` where guest memory is backed by nothing.
    pub(super) fn handle_cr(&mut self, access: CrAccess) -> Result<Option<UserExit>> {
        let done = match access {
            CrAccess::MovTo { register, source } => {
                let value = self.with_vmcs(|core, vmcs| core.operand(vmcs, source))?;
                match register {
                    0 => self.write_cr0(value)?,
                    3 => self.write_cr3(value)?,
                    4 => self.write_cr4(value)?,
                    _ => return self.raise(Exception::INVALID_OPCODE),
                }
            }
            CrAccess::MovFrom {
                register: 3,
                destination,
            } => {
                self.with_vmcs(|core, vmcs| {
                    let cr3 = vmcs.read(FieldNatural::GUEST_CR3);
                    core.set_gpr(vmcs, destination, cr3);
                })?;
                true
            }
            CrAccess::MovFrom { .. } => return self.raise(Exception::INVALID_OPCODE),
            CrAccess::Clts => {
                let cr0 = self.with_vmcs(|core, vmcs| core.read_cr0(vmcs))?;
                self.write_cr0(cr0.without(Cr0::TS).0)?
            }
            CrAccess::Lmsw { source } => {
                // LMSW changes the four lowest bits and can't clear PE.
                let cr0 = self.with_vmcs(|core, vmcs| core.read_cr0(vmcs))?;
                let low = u64::from(source) & 0xf;
                self.write_cr0((cr0.0 & !0xe) | low)?
            }
        };
        if !done {
            return self.raise(Exception::GENERAL_PROTECTION);
        }
        self.with_vmcs(|core, vmcs| core.skip_instruction(vmcs))?;
        Ok(None)
    }

    fn raise(&mut self, exception: Exception) -> Result<Option<UserExit>> {
        self.core.events.raise(exception);
        Ok(None)
    }

    /// MOV to CR0. `false` is #GP(0).
    fn write_cr0(&mut self, value: u64) -> Result<bool> {
        let (old, cr4, cr3, cs_is_long) = self.with_vmcs(|core, vmcs| {
            let cs = AccessRights(vmcs.read32(VmcsSegment::Cs.access_rights()));
            (
                core.read_cr0(vmcs),
                core.read_cr4(vmcs),
                vmcs.read(FieldNatural::GUEST_CR3),
                core.efer.has(Efer::LMA) && cs.is_long(),
            )
        })?;
        let new = Cr0(value);
        if check_cr0_change(old, new, cr4, self.core.efer, cs_is_long).is_err() {
            return Ok(false);
        }
        let new = Cr0((new.0 & Cr0::DEFINED) | Cr0::ET);
        let pae = new.has(Cr0::PG) && cr4.has(Cr4::PAE) && !self.core.efer.has(Efer::LME);
        let pdptes = if pae && reloads_pdptes(old.changed(new), 0) {
            match self.read_pdptes(cr3)? {
                Some(pdptes) => Some(pdptes),
                None => return Ok(false),
            }
        } else {
            None
        };
        self.with_vmcs(|core, vmcs| {
            core.set_cr0(vmcs, new);
            if let Some(pdptes) = &pdptes {
                Core::load_pdptes(vmcs, pdptes);
            }
            if old.changed(new) & (Cr0::PG | Cr0::WP) != 0 {
                core.flush_guest = true;
            }
        })?;
        Ok(true)
    }

    /// MOV to CR3, which exits only on CPUs that insist on it, and a task switch's load of it.
    pub(super) fn write_cr3(&mut self, value: u64) -> Result<bool> {
        let cr4 = self.core.cr4;
        let bits = self.core.cpu.physical_bits;
        if check_cr3(Cr3(value), cr4, self.core.efer, bits).is_err() {
            return Ok(false);
        }
        let pdptes = if self.core.uses_pdptes() {
            match self.read_pdptes(value)? {
                Some(pdptes) => Some(pdptes),
                None => return Ok(false),
            }
        } else {
            None
        };
        self.with_vmcs(|core, vmcs| {
            let keep = cr4.has(Cr4::PCIDE) && value & Cr3::NO_FLUSH != 0;
            let value = if cr4.has(Cr4::PCIDE) {
                value & !Cr3::NO_FLUSH
            } else {
                value
            };
            vmcs.write(FieldNatural::GUEST_CR3, value);
            if let Some(pdptes) = &pdptes {
                Core::load_pdptes(vmcs, pdptes);
            }
            core.flush_guest |= !keep;
        })?;
        Ok(true)
    }

    /// MOV to CR4.
    fn write_cr4(&mut self, value: u64) -> Result<bool> {
        let (old, cr0, cr3) = self.with_vmcs(|core, vmcs| {
            (
                core.read_cr4(vmcs),
                core.read_cr0(vmcs),
                vmcs.read(FieldNatural::GUEST_CR3),
            )
        })?;
        let new = Cr4(value);
        let core = &self.core;
        let reserved = core.cpu.cr4_reserved;
        if check_cr4_change(old, new, reserved, cr0, Cr3(cr3), core.efer).is_err() {
            return Ok(false);
        }
        let pae = cr0.has(Cr0::PG) && new.has(Cr4::PAE) && !core.efer.has(Efer::LMA);
        let pdptes = if pae && reloads_pdptes(0, old.changed(new)) {
            match self.read_pdptes(cr3)? {
                Some(pdptes) => Some(pdptes),
                None => return Ok(false),
            }
        } else {
            None
        };
        self.with_vmcs(|core, vmcs| {
            core.set_cr4(vmcs, new);
            if let Some(pdptes) = &pdptes {
                Core::load_pdptes(vmcs, pdptes);
            }
            if old.changed(new) & (CR4_FLUSHES | Cr4::PCIDE) != 0 {
                core.flush_guest = true;
            }
        })?;
        Ok(true)
    }
}
