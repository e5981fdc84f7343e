// SPDX-License-Identifier: GPL-2.0
//! What a guest is not offered gives it the exception that the SDM names, and nothing of the host's.

use crate::start;
use kvm_bindings as kb;
use rvisor_tests::guest::{self, Mode};
use rvisor_tests::handlers::{self, Record};
use rvisor_tests::layout::{CODE, DATA, DONE_PORT};
use rvisor_tests::raw::ioctl_with;
use rvisor_tests::{check, check_eq, guest_code, uapi, Cpu, Device, Fail, Machine, Outcome};

/// KVM_CAP_DISABLE_QUIRKS2 and its quirk that MONITOR and MWAIT never raise #UD.
const DISABLE_QUIRKS2: u32 = 213;
const MWAIT_NEVER_UD_FAULTS: u64 = 1 << 6;

const UD: u64 = 6;
const GP: u64 = 13;

/// An instruction's bytes, its name, and the vector of what it raises at CPL 0.
struct Refused(&'static [u8], &'static str, u64);

const ALWAYS: [Refused; 31] = [
    // VMX, outside VMX operation.
    Refused(&[0x66, 0x0f, 0xc7, 0x33], "VMCLEAR", UD),
    Refused(&[0x0f, 0x01, 0xc2], "VMLAUNCH", UD),
    Refused(&[0x0f, 0x01, 0xc3], "VMRESUME", UD),
    Refused(&[0x0f, 0x01, 0xc4], "VMXOFF", UD),
    Refused(&[0x0f, 0xc7, 0x33], "VMPTRLD", UD),
    Refused(&[0x0f, 0xc7, 0x3b], "VMPTRST", UD),
    Refused(&[0x0f, 0x78, 0xc0], "VMREAD", UD),
    Refused(&[0x0f, 0x79, 0xc0], "VMWRITE", UD),
    Refused(&[0xf3, 0x0f, 0xc7, 0x33], "VMXON", UD),
    Refused(&[0x66, 0x0f, 0x38, 0x80, 0x03], "INVEPT", UD),
    Refused(&[0x66, 0x0f, 0x38, 0x81, 0x03], "INVVPID", UD),
    Refused(&[0x0f, 0x01, 0xd4], "VMFUNC", UD),
    // SVM.
    Refused(&[0x0f, 0x01, 0xd8], "VMRUN", UD),
    Refused(&[0x0f, 0x01, 0xda], "VMLOAD", UD),
    Refused(&[0x0f, 0x01, 0xdc], "STGI", UD),
    Refused(&[0x0f, 0x01, 0xde], "SKINIT", UD),
    // SMX, SMM, SGX, TDX, memory encryption.
    Refused(&[0x0f, 0x37], "GETSEC", UD),
    Refused(&[0x0f, 0xaa], "RSM", UD),
    Refused(&[0x0f, 0x01, 0xcf], "ENCLS", UD),
    Refused(&[0x0f, 0x01, 0xd7], "ENCLU", UD),
    Refused(&[0x0f, 0x01, 0xc0], "ENCLV", UD),
    Refused(&[0x66, 0x0f, 0x01, 0xcf], "SEAMCALL", UD),
    Refused(&[0x66, 0x0f, 0x01, 0xcc], "TDCALL", UD),
    Refused(&[0x0f, 0x01, 0xc5], "PCONFIG", UD),
    // What waits.
    Refused(&[0x0f, 0x01, 0xc8], "MONITOR", UD),
    Refused(&[0x0f, 0x01, 0xc9], "MWAIT", UD),
    Refused(&[0xf3, 0x0f, 0xae, 0xf3], "UMONITOR", UD),
    Refused(&[0xf2, 0x0f, 0xae, 0xf3], "UMWAIT", UD),
    Refused(&[0x66, 0x0f, 0xae, 0xf3], "TPAUSE", UD),
    // Protection keys are off, and there is no counter 0x4000_0007.
    Refused(&[0x0f, 0x01, 0xee], "RDPKRU", UD),
    Refused(&[0x0f, 0x33], "RDPMC", GP),
];

/// Instructions that are refused where CPUID does not show them: leaf, subleaf, register (EAX to EDX), bit.
const HIDDEN: [(Refused, u32, u32, usize, u32); 5] = [
    (
        Refused(&[0x66, 0x0f, 0x38, 0x82, 0x03], "INVPCID", UD),
        7,
        0,
        1,
        10,
    ),
    (
        Refused(&[0x0f, 0x01, 0xf9], "RDTSCP", UD),
        0x8000_0001,
        0,
        3,
        27,
    ),
    (Refused(&[0xf3, 0x0f, 0xc7, 0xf8], "RDPID", UD), 7, 0, 2, 22),
    (Refused(&[0x0f, 0xc7, 0x2b], "XSAVES", UD), 0xd, 1, 0, 3),
    (Refused(&[0x0f, 0xc7, 0x1b], "XRSTORS", UD), 0xd, 1, 0, 3),
];

/// OUT to [`DONE_PORT`], behind the instruction.
const DONE: [u8; 2] = [0xe6, DONE_PORT as u8];

fn expect(machine: &Machine, cpu: &Cpu, Refused(code, name, vector): &Refused) -> Outcome {
    let guest = [code, DONE.as_slice()].concat();
    guest::load(machine, cpu, Mode::Long, &guest)?;
    handlers::set_resume(&machine.memory, CODE + code.len() as u64);
    let mut regs = cpu.regs()?;
    // An address for the memory operands, a counter that there is not, and no request for XSAVE.
    (regs.rbx, regs.rcx, regs.rax, regs.rdx) = (DATA, 0x4000_0007, 0, 0);
    cpu.set_regs(&regs)?;
    cpu.run_until_done().map_err(|fail| fail.during(name))?;
    let record = Record::read(&machine.memory);
    check_eq!(
        (record.count, record.vector, record.error, record.rip),
        (1, *vector, 0, CODE),
        "{name}: exceptions, vector, error code, RIP"
    );
    Ok(())
}

/// KVM takes MONITOR and MWAIT for NOPs unless it is told not to.
fn without_quirk(machine: &Machine) -> Outcome {
    let quirks = machine.extension(DISABLE_QUIRKS2);
    if quirks as u64 & MWAIT_NEVER_UD_FAULTS == 0 {
        return Ok(());
    }
    let mut capability = kb::kvm_enable_cap {
        cap: DISABLE_QUIRKS2,
        ..Default::default()
    };
    capability.args[0] = MWAIT_NEVER_UD_FAULTS;
    ioctl_with(&machine.vm, uapi::ENABLE_CAP, &mut capability)?;
    Ok(())
}

/// Whether CPUID of this machine's CPU has the bit, and the table without it.
fn hide(
    machine: &Machine,
    leaf: u32,
    subleaf: u32,
    register: usize,
    bit: u32,
) -> Result<(bool, kb::CpuId), Fail> {
    let mut table = machine.kvm.get_supported_cpuid(kb::KVM_MAX_CPUID_ENTRIES)?;
    let mut had = false;
    for entry in table.as_mut_slice() {
        if (entry.function, entry.index) == (leaf, subleaf) {
            let place = [
                &mut entry.eax,
                &mut entry.ebx,
                &mut entry.ecx,
                &mut entry.edx,
            ];
            let value = place.into_iter().nth(register);
            if let Some(value) = value {
                had = (*value >> bit) & 1 != 0;
                *value &= !(1 << bit);
            }
        }
        // One VMX control gives RDTSCP and RDPID both.
        if (entry.function, bit) == (7, 27) {
            entry.ecx &= !(1 << 22);
        }
        if (entry.function, bit) == (0x8000_0001, 22) {
            entry.edx &= !(1 << 27);
        }
    }
    Ok((had, table))
}

/// Each instruction that no guest is offered.
pub(crate) fn instructions_refused(device: &Device) -> Outcome {
    let machine = Machine::new(device)?;
    without_quirk(&machine)?;
    let cpu = machine.vcpu(0)?;
    for refused in &ALWAYS {
        expect(&machine, &cpu, refused)?;
    }
    Ok(())
}

/// Each instruction that VMX can withhold, where the guest's CPUID does not show it.
pub(crate) fn instructions_hidden(device: &Device) -> Outcome {
    for (refused, leaf, subleaf, register, bit) in &HIDDEN {
        let machine = Machine::new(device)?;
        let (_, table) = hide(&machine, *leaf, *subleaf, *register, *bit)?;
        let fd = machine.vm.create_vcpu(0)?;
        let cpu = Cpu::new(fd, machine.kvm.get_vcpu_mmap_size()?)?;
        cpu.fd.set_cpuid2(&table)?;
        expect(&machine, &cpu, refused)?;
    }
    // The same instruction works where it is shown.
    let machine = Machine::new(device)?;
    let (has_invpcid, _) = hide(&machine, 7, 0, 1, 10)?;
    if !has_invpcid {
        return Err(Fail::skip("there is no INVPCID to show"));
    }
    let cpu = machine.vcpu(0)?;
    let code = [HIDDEN[0].0 .0, DONE.as_slice()].concat();
    guest::load(&machine, &cpu, Mode::Long, &code)?;
    let mut regs = cpu.regs()?;
    (regs.rbx, regs.rax) = (DATA, 2);
    cpu.set_regs(&regs)?;
    cpu.run_until_done()?;
    check_eq!(Record::read(&machine.memory).count, 0, "exceptions");
    Ok(())
}

// Reads the MSRs RSI to RDI. At each that there is RAX:RDX are written to [RBX], with the number; R15 counts.
guest_code!(
    sweep,
    code64,
    [
        "2: mov ecx, esi",
        "lea rbp, [rip + 3f]",
        "mov [0xb028], rbp",
        "rdmsr",
        "mov [rbx], ecx",
        "mov [rbx + 8], eax",
        "mov [rbx + 12], edx",
        "add rbx, 16",
        "inc r15",
        "3: inc esi",
        "cmp esi, edi",
        "jb 2b",
        "out {done}, al",
    ],
    done = DONE_PORT
);

/// MSRs of performance monitoring, tracing, last branches, SGX, power and temperature: a guest that could
/// read them would see the host or a sibling at work.
const SECRETS: [(u32, u32, &str); 12] = [
    (0x9b, 0x9f, "SMM"),
    (0xc3, 0xc9, "performance counters"),
    (0xe7, 0xe9, "MPERF and APERF"),
    (0x188, 0x190, "event selectors"),
    (0x19c, 0x19d, "temperature"),
    (0x1c8, 0x1ca, "last-branch selection and place"),
    (0x309, 0x30d, "fixed counters"),
    (0x3f1, 0x3f2, "PEBS"),
    (0x560, 0x588, "processor trace"),
    (0x600, 0x601, "the debug store"),
    (0x680, 0x6a0, "last branches"),
    (0xd90, 0xd92, "bounds and protection keys"),
];

/// No MSR gives a guest anything of the host's: what can be read was set by the machine itself, and no
/// address of the host's kernel is among it.
pub(crate) fn msrs_of_the_host(device: &Device) -> Outcome {
    let (machine, cpu) = start(device, sweep())?;
    let mut found = Vec::new();
    for (first, end) in [
        (0, 0x800),
        (0x900, 0x2000),
        (0xc000_0000, 0xc000_0400),
        (0xc001_0000, 0xc001_1200),
    ] {
        let mut regs = cpu.regs()?;
        (regs.rip, regs.rsi, regs.rdi) = (CODE, first, end);
        (regs.rbx, regs.r15) = (DATA, 0);
        cpu.set_regs(&regs)?;
        cpu.run_until_done()?;
        for place in 0..cpu.regs()?.r15 {
            let at = DATA + 16 * place;
            found.push((
                machine.memory.read_u64(at) as u32,
                machine.memory.read_u64(at + 8),
            ));
        }
    }
    check!(found.len() > 20, "only {} MSRs can be read", found.len());
    for (index, value) in &found {
        // The guest's own bases and entry points are 0 or in the lower half.
        check!(
            value >> 47 != 0x1_ffff,
            "MSR {index:#x} is {value:#x}, an address of the host's kernel"
        );
        if let Some((.., name)) = SECRETS
            .iter()
            .find(|(first, end, _)| (*first..*end).contains(index))
        {
            return Err(Fail::new(format!("{name}: MSR {index:#x} can be read")));
        }
    }
    Ok(())
}
