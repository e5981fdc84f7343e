// SPDX-License-Identifier: GPL-2.0
//! A guest that makes one access after the other for its test: MSRs, ports, device memory.

use kvm_bindings as kb;
use rvisor_tests::guest::{self, Mode};
use rvisor_tests::handlers::{self, count, Acknowledge, RESUME};
use rvisor_tests::layout::{DONE_PORT, LAPIC, RECORD};
use rvisor_tests::{guest_code, Context, Cpu, Fail, Machine};

/// IA32_APIC_BASE.
pub(crate) const APIC_BASE: u32 = 0x1b;
/// IA32_APIC_BASE: the local APIC is on.
pub(crate) const ENABLE: u64 = 1 << 11;
/// IA32_APIC_BASE: x2APIC mode.
pub(crate) const X2APIC: u64 = 1 << 10;

const READ_MSR: u64 = 0;
const WRITE_MSR: u64 = 1;
const READ_MEMORY: u64 = 2;
const WRITE_MEMORY: u64 = 3;
const IN: u64 = 4;
const OUT: u64 = 5;
const OPEN: u64 = 6;

// What to do comes in EDI, an address or a port in RSI. R8 is 1 afterwards where it raised no exception.
guest_code!(
    accesses,
    code64,
    [
        "lea rax, [rip + 8f]",
        "mov [{resume}], rax",
        "mov r8d, 1",
        "jmp 9f",
        "2: mov r8d, 1",
        "cmp edi, 1",
        "jb 3f",
        "je 4f",
        "cmp edi, 3",
        "jb 5f",
        "je 6f",
        "mov edx, esi",
        "cmp edi, 5",
        "jb 7f",
        "je 22f",
        // Interrupts that wait are taken, one after the other.
        "sti",
        "nop",
        "nop",
        "cli",
        "jmp 9f",
        "3: rdmsr",
        "jmp 9f",
        "4: wrmsr",
        "jmp 9f",
        "5: mov eax, [rsi]",
        "jmp 9f",
        "6: mov [rsi], eax",
        "jmp 9f",
        "7: in al, dx",
        "jmp 9f",
        "22: out dx, al",
        "jmp 9f",
        "8: xor r8d, r8d",
        "9: out {done}, al",
        "jmp 2b",
    ],
    resume = RECORD + RESUME,
    done = DONE_PORT
);

/// A vCPU that runs the guest.
pub(crate) struct Probe<'a> {
    machine: &'a Machine,
    pub(crate) cpu: Cpu,
}

impl<'a> Probe<'a> {
    /// The vCPU `id`, which must be the machine's bootstrap processor.
    pub(crate) fn new(machine: &'a Machine, id: u64) -> Result<Self, Fail> {
        let cpu = machine.vcpu(id)?;
        guest::load(machine, &cpu, Mode::Long, accesses())?;
        handlers::set_acknowledge(&machine.memory, Acknowledge::None);
        cpu.run_until_done()?;
        Ok(Self { machine, cpu })
    }

    /// Makes an access; RAX and RDX after it, or nothing where it raised an exception.
    fn access(&self, what: u64, index: u64, address: u64, value: u64) -> Result<Option<u64>, Fail> {
        let mut regs = self.cpu.regs()?;
        (regs.rdi, regs.rcx, regs.rsi) = (what, index, address);
        (regs.rax, regs.rdx) = (value & 0xffff_ffff, value >> 32);
        self.cpu.set_regs(&regs)?;
        self.cpu.run_until_done()?;
        let regs = self.cpu.regs()?;
        Ok((regs.r8 == 1).then_some(regs.rax & 0xffff_ffff | (regs.rdx << 32)))
    }

    /// RDMSR.
    pub(crate) fn rdmsr(&self, index: u32) -> Result<Option<u64>, Fail> {
        self.access(READ_MSR, index.into(), 0, 0)
    }

    /// WRMSR; whether it raised no exception.
    pub(crate) fn wrmsr(&self, index: u32, value: u64) -> Result<bool, Fail> {
        let done = self.access(WRITE_MSR, index.into(), 0, value)?;
        Ok(done.is_some())
    }

    /// A read of 4 bytes of the local APIC's page.
    pub(crate) fn lapic(&self, offset: u64) -> Result<u32, Fail> {
        let value = self.access(READ_MEMORY, 0, LAPIC + offset, 0)?;
        value
            .map(|value| value as u32)
            .ok_or_else(|| Fail::new("the read raised an exception"))
    }

    /// A write of 4 bytes to the local APIC's page.
    pub(crate) fn set_lapic(&self, offset: u64, value: u32) -> Result<(), Fail> {
        self.write_memory(LAPIC + offset, value)
    }

    /// A write of 4 bytes.
    pub(crate) fn write_memory(&self, address: u64, value: u32) -> Result<(), Fail> {
        self.access(WRITE_MEMORY, 0, address, value.into())?
            .map(|_| ())
            .ok_or_else(|| Fail::new("the write raised an exception"))
    }

    /// IN of a byte.
    pub(crate) fn input(&self, port: u16) -> Result<u8, Fail> {
        let value = self.access(IN, 0, port.into(), 0)?;
        value
            .map(|value| value as u8)
            .ok_or_else(|| Fail::new("IN raised an exception"))
    }

    /// OUTs of a byte each.
    pub(crate) fn output(&self, bytes: &[(u16, u8)]) -> Result<(), Fail> {
        for &(port, byte) in bytes {
            self.access(OUT, 0, port.into(), byte.into())?
                .ok_or_else(|| Fail::new("OUT raised an exception"))?;
        }
        Ok(())
    }

    /// Takes the interrupts that wait and whose priority suffices; gives the vectors of those that came.
    pub(crate) fn take_interrupts(&self) -> Result<Vec<u8>, Fail> {
        let before: Vec<u64> = self.counts();
        self.access(OPEN, 0, 0, 0)?;
        let after = self.counts();
        Ok((0..=255_u8)
            .zip(before.iter().zip(after))
            .flat_map(|(vector, (before, after))| {
                std::iter::repeat_n(vector, (after - before) as usize)
            })
            .collect())
    }

    fn counts(&self) -> Vec<u64> {
        (0..=255)
            .map(|vector| count(&self.machine.memory, vector))
            .collect()
    }
}

/// Puts a vCPU's local APIC into x2APIC mode.
pub(crate) fn enter_x2apic(cpu: &Cpu) -> Result<(), Fail> {
    let mut sregs = cpu.sregs()?;
    sregs.apic_base |= ENABLE | X2APIC;
    cpu.set_sregs(&sregs)
}

/// A register in KVM_GET_LAPIC's page.
pub(crate) fn register(state: &kb::kvm_lapic_state, offset: usize) -> u32 {
    state.regs[offset..offset + 4]
        .iter()
        .rev()
        .fold(0, |value, byte| (value << 8) | u32::from(*byte as u8))
}

/// Sets a register in KVM_SET_LAPIC's page.
pub(crate) fn set_register(state: &mut kb::kvm_lapic_state, offset: usize, value: u32) {
    for (place, byte) in state.regs[offset..].iter_mut().zip(value.to_le_bytes()) {
        *place = i8::from_ne_bytes([byte]);
    }
}

/// Changes registers of a vCPU's local APIC.
pub(crate) fn set_registers(cpu: &Cpu, values: &[(usize, u32)]) -> Result<(), Fail> {
    let mut state = cpu.fd.get_lapic().during("KVM_GET_LAPIC")?;
    for &(offset, value) in values {
        set_register(&mut state, offset, value);
    }
    cpu.fd.set_lapic(&state).during("KVM_SET_LAPIC")
}

/// Takes the vectors out of a vCPU's IRR and gives them.
pub(crate) fn take_requested(cpu: &Cpu) -> Result<Vec<u8>, Fail> {
    let mut state = cpu.fd.get_lapic().during("KVM_GET_LAPIC")?;
    let mut vectors = Vec::new();
    for vector in 0..=255_u8 {
        let offset = 0x200 + usize::from(vector >> 5) * 16;
        if register(&state, offset) & (1 << (vector & 31)) != 0 {
            vectors.push(vector);
        }
    }
    for word in 0..8 {
        set_register(&mut state, 0x200 + word * 16, 0);
    }
    cpu.fd.set_lapic(&state).during("KVM_SET_LAPIC")?;
    Ok(vectors)
}
