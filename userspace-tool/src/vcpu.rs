// SPDX-License-Identifier: GPL-2.0

//! One virtual CPU: its state at the start, and the loop that runs it.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Mutex, MutexGuard, OnceLock};

use kvm_bindings::{
    CpuId, KVM_SYSTEM_EVENT_CRASH, KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN,
};
use kvm_ioctls::{VcpuExit, VcpuFd, VmFd};

use crate::boot::{entry, Start};
use crate::cpuid::Template;
use crate::devices::virtio::Bus;
use crate::devices::{lock, Ports};
use crate::error::{failed, Result};
use crate::machine::{saved, Control};
use crate::outcome::Outcome;
use crate::stat::counters::Counters;
use crate::stat::{Meter, Times};
use crate::{ioctls, registers};

/// What firmware sets, by the number of the MSR. IA32_MISC_ENABLE: fast string operations. IA32_MTRR_DEF_TYPE: memory
/// type ranges are on and all memory is write-back.
const FIRMWARE_MSRS: [(u32, u64); 2] = [(0x1a0, 1), (0x2ff, (1 << 11) | 6)];

/// Offsets of the local APIC's local vector table in its register page (SDM volume 3, table 12-1).
const APIC_LVT_LINT0: usize = 0x350;
const APIC_LVT_LINT1: usize = 0x360;
/// Delivery modes there: the 8259's interrupts, NMI.
const DELIVER_EXTINT: u32 = 0x700;
const DELIVER_NMI: u32 = 0x400;

/// A virtual CPU.
pub struct Vcpu {
    /// Its thread has it except while the CPU is parked.
    fd: Mutex<VcpuFd>,
    /// Its number.
    pub id: u32,
    /// Its counters, where the hypervisor has some.
    pub counters: Option<Counters>,
    meter: OnceLock<Meter>,
    /// The descriptor, for what can be asked while the CPU runs.
    raw: RawFd,
}

impl Vcpu {
    /// Makes the CPU with that number, which is its APIC ID as well. The first one starts as `start` says;
    /// the others wait for it.
    ///
    /// # Errors
    ///
    /// [`crate::error::Error::Call`] where the hypervisor refuses.
    pub fn new(vm: &VmFd, id: u32, cpuid: &Template, start: Start) -> Result<Self> {
        let vcpu = Self::with(vm, id, &cpuid.for_cpu(id)?)?;
        if let Start::Kernel(entry) = start {
            let fd = vcpu.fd();
            set_msrs(&fd)?;
            if id == 0 {
                entry::set_registers(&fd, entry)?;
                wire_interrupts(&fd)?;
            }
        }
        Ok(vcpu)
    }

    /// Makes the CPU with that number as it was saved, but for its state: [`saved::Cpu::load`] is to follow.
    ///
    /// # Errors
    ///
    /// [`crate::error::Error::Input`] where the hypervisor does not offer its features, [`crate::error::Error::Call`]
    /// where it refuses.
    pub fn restored(vm: &VmFd, id: u32, saved: &saved::Cpu) -> Result<Self> {
        Self::with(vm, id, &saved.cpuid()?)
    }

    fn with(vm: &VmFd, id: u32, cpuid: &CpuId) -> Result<Self> {
        let fd = vm.create_vcpu(id.into()).map_err(failed("making a CPU"))?;
        fd.set_cpuid2(cpuid)
            .map_err(failed("setting a CPU's features"))?;
        Ok(Self {
            counters: Counters::open(&fd),
            meter: OnceLock::new(),
            raw: fd.as_raw_fd(),
            fd: Mutex::new(fd),
            id,
        })
    }

    /// The times of its thread, 0 before that runs.
    #[must_use]
    pub fn times(&self) -> Times {
        self.meter.get().map(Meter::read).unwrap_or_default()
    }

    /// A stream of its exits, whether it runs or not.
    ///
    /// # Errors
    ///
    /// As [`ioctls::trace`].
    pub fn trace(&self) -> io::Result<File> {
        ioctls::trace(&self.raw)
    }

    /// Its descriptor, for the thread of the CPU, and for others while it is parked.
    pub(crate) fn fd(&self) -> MutexGuard<'_, VcpuFd> {
        lock(&self.fd)
    }

    /// Runs it until the guest has ended.
    ///
    /// # Errors
    ///
    /// [`crate::error::Error::Call`] where a device fails.
    pub fn run(&self, ports: &Ports, bus: &Bus, control: &Control) -> Result<()> {
        self.meter.get_or_init(Meter::of_this_thread);
        let mut fd = self.fd();
        while !control.ended() {
            // Where it is to park, it finishes the instruction that it left the guest in and comes back.
            let paused = control.paused();
            fd.set_kvm_immediate_exit(u8::from(paused));
            match fd.run() {
                Ok(VcpuExit::IoOut(port, data)) => ports.write(port, data)?,
                Ok(VcpuExit::IoIn(port, data)) => ports.read(port, data),
                Ok(VcpuExit::MmioRead(address, data)) => bus.read(address, data),
                Ok(VcpuExit::MmioWrite(address, data)) => bus.write(address, data),
                // A signal came; or the CPU, which waited for the first one, has become ready to run.
                Err(error) if [libc::EINTR, libc::EAGAIN].contains(&error.errno()) => {
                    if paused {
                        drop(fd);
                        control.park();
                        fd = self.fd();
                    }
                }
                Ok(VcpuExit::Shutdown) => control.end(Outcome::Crashed(self.report(&fd))),
                Ok(VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_SHUTDOWN, _)) => {
                    control.end(Outcome::PoweredOff);
                }
                Ok(VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_RESET, _)) => {
                    control.end(Outcome::Rebooted);
                }
                exit => {
                    let reason = reason(&exit);
                    let reason =
                        reason.unwrap_or_else(|| registers::internal_error(fd.get_kvm_run()));
                    control.end(Outcome::Stuck(format!("{reason}\n{}", self.report(&fd))));
                }
            }
        }
        // They stay as they are here when this thread has gone.
        let _ = self.times();
        Ok(())
    }

    /// Its registers, for a message.
    fn report(&self, fd: &VcpuFd) -> String {
        format!("CPU {}: {}", self.id, registers::report(fd))
    }
}

/// Why a CPU can't go on, except where the hypervisor had an internal error and tells more of it.
fn reason(exit: &std::result::Result<VcpuExit<'_>, kvm_ioctls::Error>) -> Option<String> {
    Some(match exit {
        Ok(VcpuExit::InternalError) => return None,
        Ok(VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_CRASH, _)) => {
            "it reported a crash of its own".to_owned()
        }
        Ok(VcpuExit::FailEntry(reason, cpu)) => format!(
            "the CPU refused to enter the guest, reason {reason:#x}, on the host's CPU {cpu}"
        ),
        Ok(exit) => format!("an exit that nobody asked for: {exit:?}"),
        Err(error) => format!("KVM_RUN: {error}"),
    })
}

/// Sets what firmware sets. A hypervisor that lacks one of these registers has the guest without it.
fn set_msrs(fd: &VcpuFd) -> Result<()> {
    for (index, data) in FIRMWARE_MSRS {
        let set = fd.set_msrs(&saved::one_msr(index, data)?);
        set.map_err(failed("setting a CPU's MSRs"))?;
    }
    Ok(())
}

/// Lets the 8259's interrupts and NMIs through the first CPU's local APIC, as firmware does: a kernel
/// that does not use the IOAPIC gets its interrupts so.
fn wire_interrupts(fd: &VcpuFd) -> Result<()> {
    let mut lapic = fd.get_lapic().map_err(failed("reading the local APIC"))?;
    for (offset, mode) in [
        (APIC_LVT_LINT0, DELIVER_EXTINT),
        (APIC_LVT_LINT1, DELIVER_NMI),
    ] {
        for (register, byte) in lapic.regs[offset..].iter_mut().zip(mode.to_le_bytes()) {
            *register = byte as std::ffi::c_char;
        }
    }
    fd.set_lapic(&lapic)
        .map_err(failed("setting the local APIC"))
}
