// SPDX-License-Identifier: GPL-2.0

//! Port I/O: the controllers in the kernel, and the way to userspace for all other ports.

use super::{
    completion::Completion,
    emulation::Halt,
    exits::{Next, Slow},
    run_page::UserExit,
    vcpu::{Core, State},
};
use crate::vmx::hardware::CurrentVmcs;
use kernel::prelude::*;
use rvisor_core::{
    bus::Bus,
    x86::{
        address::Gva,
        control::Rflags,
        exit::IoAccess,
        vmcs::{Field32, FieldNatural},
    },
};

/// Merges what an IN of `size` bytes gives into RAX: 4 bytes clear the upper half, fewer keep the rest.
pub(super) fn merge(rax: u64, size: u8, data: u32) -> u64 {
    match size {
        1 => (rax & !0xff) | u64::from(data & 0xff),
        2 => (rax & !0xffff) | u64::from(data & 0xffff),
        _ => u64::from(data),
    }
}

impl Core {
    /// IN, OUT, INS and OUTS.
    #[inline]
    pub(super) fn exit_io(&mut self, vmcs: &mut CurrentVmcs<'_>) -> Next {
        let access = IoAccess::from_qualification(vmcs.read(FieldNatural::EXIT_QUALIFICATION));
        if access.is_string {
            return Next::Slow(Slow::StringIo(access));
        }
        if access.is_in {
            if let Some(data) = self.read_port(&access) {
                self.registers[0] = merge(self.registers[0], access.size, data);
                return self.skip(vmcs);
            }
        } else if self.write_port(&access, self.registers[0] as u32) {
            return self.skip(vmcs);
        }
        self.io_to_userspace(vmcs, &access)
    }

    /// RIP moves when userspace comes back, and only where userspace left it.
    fn io_to_userspace(&mut self, vmcs: &mut CurrentVmcs<'_>, access: &IoAccess) -> Next {
        let rip = vmcs.read(FieldNatural::GUEST_RIP);
        let length = vmcs.read32(Field32::EXIT_INSTRUCTION_LENGTH);
        self.completion = Some(if access.is_in {
            Completion::In {
                size: access.size,
                rip,
                length,
            }
        } else {
            Completion::Out { rip, length }
        });
        Next::User(UserExit::Io {
            is_in: access.is_in,
            size: access.size,
            port: access.port,
            data: self.registers[0] as u32,
        })
    }

    /// Reads a port of a device in the kernel: byte by byte where the access is wider.
    fn read_port(&self, access: &IoAccess) -> Option<u32> {
        let chip = self.vm.irqchip()?;
        if access.size == 1 {
            return chip.read_port(&self.vm, access.port).map(u32::from);
        }
        let first = chip.read_port(&self.vm, access.port)?;
        let mut data = u32::from(first);
        for place in 1..u16::from(access.size) {
            let byte = chip
                .read_port(&self.vm, access.port.wrapping_add(place))
                .unwrap_or(0xff);
            data |= u32::from(byte) << (8 * place);
        }
        Some(data)
    }

    /// Writes a port that is seen to in the kernel.
    #[inline]
    fn write_port(&mut self, access: &IoAccess, data: u32) -> bool {
        if self.write_chip_port(access, data) {
            return true;
        }
        let bytes = data.to_le_bytes();
        let data = bytes.get(..usize::from(access.size)).unwrap_or(&bytes);
        self.vm
            .registrations
            .write(Bus::Port, access.port.into(), data)
    }

    /// Writes a port of the controllers.
    fn write_chip_port(&mut self, access: &IoAccess, data: u32) -> bool {
        let Some(chip) = self.vm.irqchip() else {
            return false;
        };
        let [first, rest @ ..] = data.to_le_bytes();
        if !chip.write_port(&self.vm, access.port, first) {
            return false;
        }
        let more = usize::from(access.size.saturating_sub(1));
        for (place, byte) in (1u16..).zip(rest.iter().take(more)) {
            chip.write_port(&self.vm, access.port.wrapping_add(place), *byte);
        }
        self.events.attention = true;
        true
    }
}

impl State {
    /// INS and OUTS, one element at a time.
    ///
    /// # Errors
    ///
    /// `EFAULT` where guest memory is backed by nothing.
    pub(super) fn handle_string_io(&mut self, access: &IoAccess) -> Result<Option<UserExit>> {
        let (linear, rip, length, mask, count) = self.with_vmcs(|core, vmcs| {
            // Bits 9:7 of the instruction information: the address size (SDM vol. 3, table 29-9).
            let mask = match (vmcs.read32(Field32::EXIT_INSTRUCTION_INFO) >> 7) & 7 {
                0 => 0xffff,
                1 => 0xffff_ffff,
                _ => u64::MAX,
            };
            (
                Gva::new(vmcs.read(FieldNatural::GUEST_LINEAR_ADDRESS)),
                vmcs.read(FieldNatural::GUEST_RIP),
                vmcs.read32(Field32::EXIT_INSTRUCTION_LENGTH),
                mask,
                core.registers[1],
            )
        })?;
        if access.is_rep && count & mask == 0 {
            self.with_vmcs(|core, vmcs| core.skip(vmcs))?;
            return Ok(None);
        }
        let mut bytes = [0u8; 4];
        let data = bytes.get_mut(..usize::from(access.size)).ok_or(EIO)?;
        if access.is_in {
            // The destination must be writable before the device is read.
            if let Err(stop) = self.probe_linear(linear, access.size) {
                return self.stop_to_exit(stop);
            }
        } else if let Err(stop) = self.read_linear(linear, data) {
            let exit = self.stop_to_exit(stop)?;
            if stop == Halt::UserRead {
                let access = *access;
                self.core.completion = Some(Completion::StringRead { access, rip });
            }
            return Ok(exit);
        }
        let data = u32::from_le_bytes(bytes);
        self.core.completion = Some(Completion::String {
            is_in: access.is_in,
            is_rep: access.is_rep,
            size: access.size,
            linear,
            rip,
            length,
            mask,
        });
        let in_kernel = if access.is_in {
            self.core.read_port(access)
        } else {
            self.core.write_port(access, data).then_some(0)
        };
        match in_kernel {
            Some(value) => self.complete_string(value),
            None => Ok(Some(UserExit::Io {
                is_in: access.is_in,
                size: access.size,
                port: access.port,
                data,
            })),
        }
    }

    /// The end of one element of INS or OUTS.
    ///
    /// # Errors
    ///
    /// `EFAULT` where guest memory is backed by nothing.
    pub(super) fn complete_string(&mut self, value: u32) -> Result<Option<UserExit>> {
        let Some(Completion::String {
            is_in,
            is_rep,
            size,
            linear,
            rip,
            length,
            mask,
        }) = self.core.completion.take()
        else {
            return Ok(None);
        };
        // What was read for this element is void for the next.
        self.core.replay.forget();
        if is_in {
            let bytes = value.to_le_bytes();
            if let Err(stop) =
                self.write_linear(linear, bytes.get(..usize::from(size)).unwrap_or(&bytes))
            {
                return self.stop_to_exit(stop);
            }
        }
        self.with_vmcs(|core, vmcs| {
            if vmcs.read(FieldNatural::GUEST_RIP) != rip {
                return;
            }
            let backwards = vmcs.read(FieldNatural::GUEST_RFLAGS) & Rflags::DF != 0;
            let step = if backwards {
                u64::from(size).wrapping_neg()
            } else {
                u64::from(size)
            };
            // RDI for INS, RSI for OUTS.
            let pointer = if is_in { 7 } else { 6 };
            core.registers[pointer] = update(core.registers[pointer], step, mask);
            let mut done = true;
            if is_rep {
                core.registers[1] = update(core.registers[1], u64::MAX, mask);
                done = core.registers[1] & mask == 0;
            }
            if done {
                core.retire_over(vmcs, rip, length);
            }
        })?;
        match self.core.replay.has_writes() {
            true => Ok(self.next_mmio_write()),
            false => Ok(None),
        }
    }
}

/// Adds `step` to a register of the address size that `mask` stands for: 32 bits clear the upper half,
/// 16 keep the rest.
fn update(register: u64, step: u64, mask: u64) -> u64 {
    let sum = register.wrapping_add(step) & mask;
    if mask == 0xffff {
        (register & !mask) | sum
    } else {
        sum
    }
}
