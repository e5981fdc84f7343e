// SPDX-License-Identifier: GPL-2.0
//! Exits, measured inside the guest.

use rvisor_tests::guest::{self, Mode};
use rvisor_tests::layout::{DONE_PORT, FREE_PORT, HOLE};
use rvisor_tests::{check, guest_code, Context, Cpu, Device, Fail, Machine};

/// Exits that one figure is the mean of.
const ROUNDS: u64 = 256;
/// Rounds before, whose first faults are not counted.
const WARM_UP: u64 = 4;

/// One kind of exit.
pub(crate) struct Row {
    /// What it is called in the table.
    pub(crate) name: &'static str,
    code: fn() -> &'static [u8],
    /// IA32_APIC_BASE, where it is another one than after reset.
    apic_base: Option<u64>,
}

impl Row {
    const fn new(name: &'static str, code: fn() -> &'static [u8]) -> Self {
        Self {
            name,
            code,
            apic_base: None,
        }
    }

    /// The same, with the local APIC in x2APIC mode.
    const fn x2apic(name: &'static str, code: fn() -> &'static [u8]) -> Self {
        Self {
            apic_base: Some(rvisor_tests::layout::LAPIC | 0xd00),
            ..Self::new(name, code)
        }
    }
}

/// A guest that does something RSI times and leaves the TSC's difference in R14. What it does may change
/// RAX to RDX only; RDI holds the address for it.
macro_rules! measured {
    ($name:ident, [$($line:literal),+ $(,)?] $(, $key:ident = $value:expr)*) => {
        guest_code!($name, code64, [
            "mov ebp, {done_port}",
            "2: rdtsc",
            "shl rdx, 32",
            "lea r13, [rax + rdx]",
            "3:",
            $($line,)+
            "dec rsi",
            "jnz 3b",
            "rdtsc",
            "shl rdx, 32",
            "lea r14, [rax + rdx]",
            "sub r14, r13",
            "mov edx, ebp",
            "out dx, al",
            "jmp 2b",
        ], done_port = DONE_PORT $(, $key = $value)*);
    };
}

measured!(cpuid, ["xor eax, eax", "cpuid"]);
measured!(vmcall, ["mov eax, 0x7fffffff", "vmcall"]);
measured!(rdmsr, ["mov ecx, 0x1b", "rdmsr"]);
measured!(
    wrmsr,
    ["mov ecx, 0x8b", "xor eax, eax", "xor edx, edx", "wrmsr"]
);
measured!(cr8, ["mov eax, 3", "mov cr8, rax", "mov rax, cr8"]);
measured!(pic, ["in al, 0x21"]);
measured!(apic_read, ["mov eax, [rdi + 0x30]"]);
measured!(apic_eoi, ["mov dword ptr [rdi + 0xb0], 0"]);
measured!(x2apic_read, ["mov ecx, 0x803", "rdmsr"]);
measured!(
    x2apic_priority,
    [
        "mov ecx, 0x808",
        "mov eax, 0x30",
        "xor edx, edx",
        "wrmsr",
        "rdmsr"
    ]
);
measured!(
    x2apic_eoi,
    ["mov ecx, 0x80b", "xor eax, eax", "xor edx, edx", "wrmsr"]
);
measured!(
    x2apic_self_ipi,
    ["mov ecx, 0x83f", "mov eax, 0x41", "xor edx, edx", "wrmsr"]
);
measured!(
    x2apic_command,
    ["mov ecx, 0x830", "mov eax, 0x41", "xor edx, edx", "wrmsr"]
);
measured!(input, ["mov dx, {port}", "in al, dx"], port = FREE_PORT);
measured!(output, ["mov dx, {port}", "out dx, al"], port = FREE_PORT);
measured!(mmio_read, ["mov eax, [{hole}]"], hole = HOLE);
measured!(mmio_write, ["mov [{hole}], eax"], hole = HOLE);
measured!(touch, ["mov [rdi], al", "add rdi, 4096"]);

/// The table, but for its last rows. The task priority is the CPU's own affair where it has a TPR shadow.
pub(crate) const ROWS: [Row; 17] = [
    Row::new("CPUID", cpuid),
    Row::new("VMCALL, unknown number", vmcall),
    Row::new("RDMSR IA32_APIC_BASE", rdmsr),
    Row::new("WRMSR IA32_BIOS_SIGN_ID", wrmsr),
    Row::new("CR8, write and read", cr8),
    Row::new("IN from the in-kernel PIC", pic),
    Row::new("local APIC register read, by MMIO", apic_read),
    Row::new("local APIC EOI, by MMIO", apic_eoi),
    Row::x2apic("x2APIC register read, by RDMSR", x2apic_read),
    Row::x2apic("x2APIC TPR, write and read", x2apic_priority),
    Row::x2apic("x2APIC EOI, by WRMSR", x2apic_eoi),
    Row::x2apic("x2APIC self-IPI, by WRMSR", x2apic_self_ipi),
    Row::x2apic("x2APIC ICR to itself, by WRMSR", x2apic_command),
    Row::new("IN to userspace and back", input),
    Row::new("OUT to userspace and back", output),
    Row::new("MMIO read to userspace and back", mmio_read),
    Row::new("MMIO write to userspace and back", mmio_write),
];

impl Row {
    /// The mean of [`ROUNDS`] exits.
    pub(crate) fn mean(&self, device: &Device) -> Result<u64, Fail> {
        let machine = Machine::with_irqchip(device)?;
        let cpu = machine.vcpu(0)?;
        guest::load(&machine, &cpu, Mode::Long, (self.code)())?;
        if let Some(apic_base) = self.apic_base {
            let mut sregs = cpu.sregs()?;
            sregs.apic_base = apic_base;
            cpu.set_sregs(&sregs)?;
        }
        measure(&cpu, WARM_UP, rvisor_tests::layout::LAPIC)?;
        measure(&cpu, ROUNDS, rvisor_tests::layout::LAPIC)
    }
}

/// Lets the guest do it so often; the mean.
fn measure(cpu: &Cpu, rounds: u64, address: u64) -> Result<u64, Fail> {
    let mut regs = cpu.regs()?;
    (regs.rsi, regs.rdi) = (rounds, address);
    cpu.set_regs(&regs)?;
    // Userspace does as little as it can: KVM_RUN again until the guest is done.
    let done = u64::from(DONE_PORT);
    loop {
        let reason = cpu.run_raw().during("KVM_RUN")?;
        if reason == kvm_bindings::KVM_EXIT_IO {
            if cpu.io_port() == done {
                break;
            }
        } else if reason != kvm_bindings::KVM_EXIT_MMIO {
            return Err(cpu.unexpected(&rvisor_tests::Exit::Other(reason)));
        }
    }
    let regs = cpu.regs()?;
    check!(regs.rsi == 0, "{} rounds are left", regs.rsi);
    Ok(regs.r14 / rounds)
}

/// The guest writes to pages of private anonymous memory that nobody touched; huge pages are off.
pub(crate) fn first_touch(device: &Device) -> Result<u64, Fail> {
    const FRESH: u64 = 2 << 20;
    let machine = Machine::with_irqchip(device)?;
    machine
        .memory
        .advise(0, machine.memory.len(), libc::MADV_NOHUGEPAGE)
        .during("MADV_NOHUGEPAGE")?;
    let cpu = machine.vcpu(0)?;
    guest::load(&machine, &cpu, Mode::Long, touch())?;
    measure(&cpu, WARM_UP, FRESH)?;
    measure(&cpu, ROUNDS, FRESH + WARM_UP * 4096)
}
