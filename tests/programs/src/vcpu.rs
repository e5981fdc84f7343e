// SPDX-License-Identifier: GPL-2.0
//! A virtual processor, its shared page and its exits.

use crate::ktap::{Context, Fail};
use crate::mapping::Mapping;
use crate::raw::{ioctl, Errno};
use crate::{layout, uapi};
use kvm_bindings as kb;
use kvm_ioctls::VcpuFd;
use std::mem::offset_of;
use std::os::fd::AsRawFd;

/// Why KVM_RUN came back (Documentation/virt/kvm/api.rst, section 5).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Exit {
    /// Halted; only without a local APIC in the kernel.
    Hlt,
    /// Reads a port: this many bytes, this often.
    In {
        /// The port.
        port: u16,
        /// Bytes of one access.
        size: u8,
        /// Accesses.
        count: u32,
    },
    /// Writes these bytes to a port.
    Out {
        /// The port.
        port: u16,
        /// Bytes of one access.
        size: u8,
        /// All accesses' bytes.
        data: Vec<u8>,
    },
    /// Reads so many bytes of an address without memory.
    MmioRead {
        /// The guest-physical address.
        address: u64,
        /// 1 to 8.
        length: u32,
    },
    /// Writes these bytes to an address without memory.
    MmioWrite {
        /// The guest-physical address.
        address: u64,
        /// 1 to 8 bytes.
        data: Vec<u8>,
    },
    /// KVM_RUN failed with EINTR; the shared page's exit_reason is beside it.
    Interrupted(u32),
    /// The guest can take an interrupt now.
    InterruptWindow,
    /// A triple fault.
    Shutdown,
    /// The CPU refused the guest's state.
    FailEntry(u64),
    /// The hypervisor can't go on: its suberror.
    Internal(u32),
    /// Another exit_reason.
    Other(u32),
}

impl Exit {
    /// Whether this is the guest's report that it is done.
    pub fn is_done(&self) -> bool {
        matches!(self, Self::Out { port, .. } if *port == layout::DONE_PORT)
    }
}

/// A vCPU and its `struct kvm_run`.
#[derive(Debug)]
pub struct Cpu {
    /// The descriptor.
    pub fd: VcpuFd,
    run: Mapping,
}

macro_rules! run_field {
    ($(#[$doc:meta] $get:ident $($set:ident)?: $field:ident as $kind:ty;)+) => {$(
        #[$doc]
        pub fn $get(&self) -> $kind {
            let field = offset_of!(kb::kvm_run, $field);
            // SAFETY: The mapping is at least a kvm_run long and the field has this type.
            unsafe { self.run.address().add(field).cast::<$kind>().read_volatile() }
        }
        $(/// Sets the field.
        pub fn $set(&self, value: $kind) {
            let field = offset_of!(kb::kvm_run, $field);
            // SAFETY: As for reading it.
            unsafe { self.run.address().add(field).cast::<$kind>().write_volatile(value) };
        })?
    )+};
}

impl Cpu {
    /// Maps the vCPU's shared page: `size` bytes, as KVM_GET_VCPU_MMAP_SIZE says.
    ///
    /// # Errors
    ///
    /// What mmap(2) gives.
    pub fn new(fd: VcpuFd, size: usize) -> Result<Self, Fail> {
        if size < size_of::<kb::kvm_run>() {
            return Err(Fail::new(format!("the mapping has {size} bytes only")));
        }
        let run = Mapping::shared(fd.as_raw_fd(), size).during("mmap of a vCPU")?;
        Ok(Self { fd, run })
    }

    run_field! {
        /// `exit_reason`
        exit_reason set_exit_reason: exit_reason as u32;
        /// `immediate_exit`
        immediate_exit set_immediate_exit: immediate_exit as u8;
        /// `request_interrupt_window`
        interrupt_window request_interrupt_window: request_interrupt_window as u8;
        /// `ready_for_interrupt_injection`
        ready_for_injection: ready_for_interrupt_injection as u8;
        /// `if_flag`
        if_flag: if_flag as u8;
        /// `cr8`
        cr8 set_cr8: cr8 as u64;
        /// `apic_base`
        apic_base: apic_base as u64;
    }

    /// The shared page's mapping.
    pub fn run_page(&self) -> &Mapping {
        &self.run
    }

    /// KVM_RUN: its errno, or the exit reason.
    ///
    /// # Errors
    ///
    /// The errno.
    pub fn run_raw(&self) -> Result<u32, Errno> {
        ioctl(&self.fd, uapi::RUN, 0).map(|_| self.exit_reason())
    }

    /// KVM_RUN and what it gave; EINTR is an exit too.
    ///
    /// # Errors
    ///
    /// Every other errno.
    pub fn run(&self) -> Result<Exit, Fail> {
        match self.run_raw() {
            Ok(reason) => Ok(self.decode(reason)),
            Err(Errno(libc::EINTR)) => Ok(Exit::Interrupted(self.exit_reason())),
            Err(error) => Err(Fail::from(error).during("KVM_RUN")),
        }
    }

    /// KVM_RUN until the guest says that it is done.
    ///
    /// # Errors
    ///
    /// Any other exit, with the guest's registers.
    pub fn run_until_done(&self) -> Result<(), Fail> {
        let exit = self.run()?;
        if exit.is_done() {
            return Ok(());
        }
        Err(self.unexpected(&exit))
    }

    /// KVM_RUN, which must give this exit.
    ///
    /// # Errors
    ///
    /// Any other exit, with the guest's registers.
    pub fn run_expecting(&self, expected: &Exit) -> Result<(), Fail> {
        let exit = self.run()?;
        if exit == *expected {
            return Ok(());
        }
        Err(self
            .unexpected(&exit)
            .during(&format!("expected {expected:x?}")))
    }

    /// A failure that tells of this exit.
    pub fn unexpected(&self, exit: &Exit) -> Fail {
        let place = self.regs().map_or(String::new(), |regs| {
            format!(
                ", RIP {:#x} RSP {:#x} RAX {:#x} RFLAGS {:#x}",
                regs.rip, regs.rsp, regs.rax, regs.rflags
            )
        });
        let more = match exit {
            Exit::Internal(_) => format!(" data {:x?}", self.internal_data()),
            _ => String::new(),
        };
        Fail::new(format!("unexpected exit {exit:x?}{more}{place}"))
    }

    /// The data of an internal error.
    pub fn internal_data(&self) -> Vec<u64> {
        let at = offset_of!(kb::kvm_run, __bindgen_anon_1) as u64;
        let count = u64::from(self.u32_at(at + 4)).min(16);
        (0..count)
            .map(|index| self.run.read_u64(at + 8 + 8 * index))
            .collect()
    }

    fn u32_at(&self, offset: u64) -> u32 {
        self.run
            .read(offset, 4)
            .iter()
            .rev()
            .fold(0, |value, byte| (value << 8) | u32::from(*byte))
    }

    /// Where the union of the exits' data starts.
    const UNION: u64 = offset_of!(kb::kvm_run, __bindgen_anon_1) as u64;

    fn decode(&self, reason: u32) -> Exit {
        match reason {
            kb::KVM_EXIT_HLT => Exit::Hlt,
            kb::KVM_EXIT_IO => self.decode_io(),
            kb::KVM_EXIT_MMIO => {
                let address = self.run.read_u64(Self::UNION);
                let length = self.u32_at(Self::UNION + 16);
                if self.run.read(Self::UNION + 20, 1) == [0] {
                    return Exit::MmioRead { address, length };
                }
                let data = self.run.read(Self::UNION + 8, length.min(8) as usize);
                Exit::MmioWrite { address, data }
            }
            kb::KVM_EXIT_IRQ_WINDOW_OPEN => Exit::InterruptWindow,
            kb::KVM_EXIT_SHUTDOWN => Exit::Shutdown,
            kb::KVM_EXIT_FAIL_ENTRY => Exit::FailEntry(self.run.read_u64(Self::UNION)),
            kb::KVM_EXIT_INTERNAL_ERROR => Exit::Internal(self.u32_at(Self::UNION)),
            other => Exit::Other(other),
        }
    }

    fn decode_io(&self) -> Exit {
        let head = self.run.read(Self::UNION, 4);
        let port = u16::from_le_bytes([head[2], head[3]]);
        let (count, size) = (self.u32_at(Self::UNION + 4), head[1]);
        if u32::from(head[0]) == kb::KVM_EXIT_IO_IN {
            return Exit::In { port, size, count };
        }
        let data = self
            .run
            .read(self.io_data_offset(), usize::from(size) * count as usize);
        Exit::Out { port, size, data }
    }

    /// The port of a port access, read quickly.
    pub fn io_port(&self) -> u64 {
        (self.run.read_u64(Self::UNION) >> 16) & 0xffff
    }

    /// Where in the mapping the data of a port access lies.
    pub fn io_data_offset(&self) -> u64 {
        self.run.read_u64(Self::UNION + 8)
    }

    /// Answers a port read.
    pub fn answer_io(&self, data: &[u8]) {
        self.run.write(self.io_data_offset(), data);
    }

    /// Answers an MMIO read.
    pub fn answer_mmio(&self, data: &[u8]) {
        self.run.write(Self::UNION + 8, data);
    }

    /// KVM_GET_REGS
    ///
    /// # Errors
    ///
    /// The errno.
    pub fn regs(&self) -> Result<kb::kvm_regs, Fail> {
        self.fd.get_regs().during("KVM_GET_REGS")
    }

    /// KVM_SET_REGS
    ///
    /// # Errors
    ///
    /// The errno.
    pub fn set_regs(&self, regs: &kb::kvm_regs) -> Result<(), Fail> {
        self.fd.set_regs(regs).during("KVM_SET_REGS")
    }

    /// KVM_GET_SREGS
    ///
    /// # Errors
    ///
    /// The errno.
    pub fn sregs(&self) -> Result<kb::kvm_sregs, Fail> {
        self.fd.get_sregs().during("KVM_GET_SREGS")
    }

    /// KVM_SET_SREGS
    ///
    /// # Errors
    ///
    /// The errno.
    pub fn set_sregs(&self, sregs: &kb::kvm_sregs) -> Result<(), Fail> {
        self.fd.set_sregs(sregs).during("KVM_SET_SREGS")
    }

    /// One MSR by KVM_GET_MSRS.
    ///
    /// # Errors
    ///
    /// The errno, or that the MSR is unknown.
    pub fn msr(&self, index: u32) -> Result<u64, Fail> {
        let mut list = kb::Msrs::from_entries(&[kb::kvm_msr_entry {
            index,
            ..Default::default()
        }])
        .map_err(|error| Fail::new(format!("{error:?}")))?;
        match self.fd.get_msrs(&mut list).during("KVM_GET_MSRS")? {
            1 => Ok(list.as_slice()[0].data),
            _ => Err(Fail::new(format!("MSR {index:#x} is unknown"))),
        }
    }

    /// One MSR by KVM_SET_MSRS; whether it was taken.
    ///
    /// # Errors
    ///
    /// The errno.
    pub fn try_set_msr(&self, index: u32, data: u64) -> Result<bool, Fail> {
        let list = kb::Msrs::from_entries(&[kb::kvm_msr_entry {
            index,
            data,
            ..Default::default()
        }])
        .map_err(|error| Fail::new(format!("{error:?}")))?;
        Ok(self.fd.set_msrs(&list).during("KVM_SET_MSRS")? == 1)
    }

    /// One MSR by KVM_SET_MSRS.
    ///
    /// # Errors
    ///
    /// The errno, or that the value was refused.
    pub fn set_msr(&self, index: u32, data: u64) -> Result<(), Fail> {
        if self.try_set_msr(index, data)? {
            return Ok(());
        }
        Err(Fail::new(format!("MSR {index:#x} does not take {data:#x}")))
    }
}
