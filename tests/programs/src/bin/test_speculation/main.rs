// SPDX-License-Identifier: GPL-2.0
//! Speculation control of guests: IA32_SPEC_CTRL, IA32_PRED_CMD and IA32_FLUSH_CMD, where the CPU has them.

use kvm_bindings as kb;
use rvisor_tests::guest::{self, Mode};
use rvisor_tests::handlers::{self, Record};
use rvisor_tests::layout::{CODE, DONE_PORT};
use rvisor_tests::{check, check_eq, guest_code, ktap, tests, Cpu, Device, Fail, Machine, Outcome};

const SPEC_CTRL: u64 = 0x48;
const PRED_CMD: u64 = 0x49;
const FLUSH_CMD: u64 = 0x10b;

/// Bits of EDX of CPUID leaf 7.
const HAS_SPEC_CTRL: u32 = 1 << 26;
const HAS_STIBP: u32 = 1 << 27;
const HAS_FLUSH_L1D: u32 = 1 << 28;
const HAS_SSBD: u32 = 1 << 31;

const IBRS: u64 = 1 << 0;
const SSBD: u64 = 1 << 2;
/// A bit of IA32_SPEC_CTRL that no CPU has.
const RESERVED: u64 = 1 << 33;

// EDI 0 reads the MSR ESI, 1 writes RDX:RAX to it.
guest_code!(
    access,
    code64,
    [
        "mov ecx, esi",
        "test edi, edi",
        "jnz 2f",
        "rdmsr",
        "jmp 3f",
        "2: wrmsr",
        "3: out {done}, al",
    ],
    done = DONE_PORT
);

/// A guest that accesses MSRs.
struct Guest {
    machine: Machine,
    cpu: Cpu,
}

impl Guest {
    /// With the CPUID that is offered, but for `hidden` of EDX of leaf 7.
    fn new(device: &Device, hidden: u32) -> Result<Self, Fail> {
        let machine = Machine::new(device)?;
        let mut table = machine.kvm.get_supported_cpuid(kb::KVM_MAX_CPUID_ENTRIES)?;
        for entry in table.as_mut_slice() {
            match (entry.function, entry.index) {
                (7, 0) => entry.edx &= !hidden,
                // What AMD's CPUs say of the same.
                (0x8000_0008, _) if hidden != 0 => entry.ebx = 0,
                _ => {}
            }
        }
        let fd = machine.vm.create_vcpu(0)?;
        let cpu = Cpu::new(fd, machine.kvm.get_vcpu_mmap_size()?)?;
        cpu.fd.set_cpuid2(&table)?;
        guest::load(&machine, &cpu, Mode::Long, access())?;
        let end = CODE + access().len() as u64 - 2;
        handlers::set_resume(&machine.memory, end);
        Ok(Self { machine, cpu })
    }

    /// `None` where the access gave #GP(0), which is the only exception that it may give.
    fn access(&self, index: u64, write: Option<u64>) -> Result<Option<u64>, Fail> {
        let before = Record::read(&self.machine.memory).count;
        let mut regs = self.cpu.regs()?;
        let value = write.unwrap_or(0);
        (regs.rip, regs.rsi, regs.rdi) = (CODE, index, u64::from(write.is_some()));
        (regs.rax, regs.rdx) = (value & 0xffff_ffff, value >> 32);
        self.cpu.set_regs(&regs)?;
        self.cpu.run_until_done()?;
        let record = Record::read(&self.machine.memory);
        if record.count != before {
            check_eq!((record.vector, record.error), (13, 0), "the exception");
            return Ok(None);
        }
        let regs = self.cpu.regs()?;
        Ok(Some((regs.rdx << 32) | (regs.rax & 0xffff_ffff)))
    }

    fn read(&self, index: u64) -> Result<Option<u64>, Fail> {
        self.access(index, None)
    }

    fn writes(&self, index: u64, value: u64) -> Result<bool, Fail> {
        Ok(self.access(index, Some(value))?.is_some())
    }
}

/// EDX of leaf 7, as it is offered.
fn offered(device: &Device) -> Result<u32, Fail> {
    let table = device
        .kvm()?
        .get_supported_cpuid(kb::KVM_MAX_CPUID_ENTRIES)?;
    Ok(table
        .as_slice()
        .iter()
        .find(|entry| (entry.function, entry.index) == (7, 0))
        .map_or(0, |entry| entry.edx))
}

fn need(device: &Device, bits: u32, name: &str) -> Outcome {
    if offered(device)? & bits == bits {
        return Ok(());
    }
    Err(Fail::skip(format!("this CPU has no {name}")))
}

/// The guest's own value is there before and after its first write, and for userspace.
fn spec_ctrl(device: &Device) -> Outcome {
    need(device, HAS_SPEC_CTRL, "IA32_SPEC_CTRL")?;
    let guest = Guest::new(device, 0)?;
    check_eq!(guest.read(SPEC_CTRL)?, Some(0), "after reset");
    for value in [0, IBRS, 0, IBRS] {
        check!(guest.writes(SPEC_CTRL, value)?, "{value:#x} is refused");
        check_eq!(guest.read(SPEC_CTRL)?, Some(value), "read by the guest");
        check_eq!(guest.cpu.msr(SPEC_CTRL as u32)?, value, "read by userspace");
    }
    check!(
        !guest.writes(SPEC_CTRL, RESERVED)?,
        "a reserved bit is taken"
    );
    check_eq!(guest.read(SPEC_CTRL)?, Some(IBRS), "after the refusal");
    guest.cpu.set_msr(SPEC_CTRL as u32, 0)?;
    check_eq!(guest.read(SPEC_CTRL)?, Some(0), "set by userspace");
    Ok(())
}

/// Two machines that take turns on one CPU keep theirs, and a third begins with 0.
fn spec_ctrl_apart(device: &Device) -> Outcome {
    need(device, HAS_SPEC_CTRL | HAS_SSBD, "SSBD in IA32_SPEC_CTRL")?;
    let (first, second) = (Guest::new(device, 0)?, Guest::new(device, 0)?);
    check!(first.writes(SPEC_CTRL, IBRS)?, "IBRS is refused");
    check!(second.writes(SPEC_CTRL, SSBD)?, "SSBD is refused");
    for round in 0..3 {
        check_eq!(first.read(SPEC_CTRL)?, Some(IBRS), "the first, {round}");
        check_eq!(second.read(SPEC_CTRL)?, Some(SSBD), "the second, {round}");
    }
    let third = Guest::new(device, 0)?;
    check_eq!(third.read(SPEC_CTRL)?, Some(0), "the third");
    Ok(())
}

/// The commands: 0 and 1 only, and never read.
fn commands(device: &Device) -> Outcome {
    let offered = offered(device)?;
    let guest = Guest::new(device, 0)?;
    let mut there = 0;
    for (index, bit) in [(PRED_CMD, HAS_SPEC_CTRL), (FLUSH_CMD, HAS_FLUSH_L1D)] {
        if offered & bit == 0 {
            continue;
        }
        there += 1;
        check!(guest.writes(index, 0)?, "0 to MSR {index:#x} is refused");
        check!(guest.writes(index, 1)?, "1 to MSR {index:#x} is refused");
        check!(!guest.writes(index, 1 << 8)?, "MSR {index:#x} takes bit 8");
        check_eq!(guest.read(index)?, None, "MSR {index:#x} read");
    }
    if there == 0 {
        return Err(Fail::skip("this CPU has neither command"));
    }
    Ok(())
}

/// What the guest's CPUID does not show is not there.
fn hidden(device: &Device) -> Outcome {
    let all = HAS_SPEC_CTRL | HAS_STIBP | HAS_FLUSH_L1D | HAS_SSBD;
    let guest = Guest::new(device, all)?;
    for index in [SPEC_CTRL, PRED_CMD, FLUSH_CMD] {
        check_eq!(guest.read(index)?, None, "MSR {index:#x} read");
        check!(!guest.writes(index, 0)?, "MSR {index:#x} takes 0");
        check!(!guest.writes(index, 1)?, "MSR {index:#x} takes 1");
    }
    Ok(())
}

fn main() -> std::process::ExitCode {
    ktap::main(tests![spec_ctrl, spec_ctrl_apart, commands, hidden])
}
