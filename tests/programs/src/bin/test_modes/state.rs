// SPDX-License-Identifier: GPL-2.0
//! The processor's state goes in, the guest sees it, and comes out.

use kvm_bindings as kb;
use rvisor_tests::guest::{self, Mode};
use rvisor_tests::handlers::{self, Record};
use rvisor_tests::layout::{CODE, DATA, DONE_PORT, STACK};
use rvisor_tests::{check, check_eq, guest_code, Cpu, Device, Exit, Fail, Machine, Outcome};

fn start(device: &Device, code: &[u8]) -> Result<(Machine, Cpu), Fail> {
    let machine = Machine::new(device)?;
    let cpu = machine.vcpu(0)?;
    guest::load(&machine, &cpu, Mode::Long, code)?;
    Ok((machine, cpu))
}

guest_code!(
    increment_all,
    code64,
    [
        "inc rax",
        "inc rbx",
        "inc rcx",
        "inc rdx",
        "inc rsi",
        "inc rdi",
        "inc rbp",
        "inc rsp",
        "inc r8",
        "inc r9",
        "inc r10",
        "inc r11",
        "inc r12",
        "inc r13",
        "inc r14",
        "inc r15",
        "stc",
        "out {done}, al",
    ],
    done = DONE_PORT
);

fn pattern(first: u64) -> kb::kvm_regs {
    let value = |index: u64| first.wrapping_mul(index + 1);
    kb::kvm_regs {
        rax: value(0),
        rbx: value(1),
        rcx: value(2),
        rdx: value(3),
        rsi: value(4),
        rdi: value(5),
        rsp: value(6),
        rbp: value(7),
        r8: value(8),
        r9: value(9),
        r10: value(10),
        r11: value(11),
        r12: value(12),
        r13: value(13),
        r14: value(14),
        r15: value(15),
        rip: CODE,
        rflags: 2,
    }
}

/// The general registers in the order of `kvm_regs`.
fn general(regs: &kb::kvm_regs) -> [u64; 16] {
    [
        regs.rax, regs.rbx, regs.rcx, regs.rdx, regs.rsi, regs.rdi, regs.rsp, regs.rbp, regs.r8,
        regs.r9, regs.r10, regs.r11, regs.r12, regs.r13, regs.r14, regs.r15,
    ]
}

pub(crate) fn general_registers(device: &Device) -> Outcome {
    let (_machine, cpu) = start(device, increment_all())?;
    let set = pattern(0x1234_5678_9abc_de01);
    cpu.set_regs(&set)?;
    check_eq!(cpu.regs()?, set, "the registers that were set");
    cpu.run_until_done()?;
    let found = cpu.regs()?;
    check_eq!(
        general(&found),
        general(&set).map(|value| value.wrapping_add(1)),
        "each of them plus 1"
    );
    check_eq!(found.rflags & 3, 3, "RFLAGS with CF");
    // Bit 1 of RFLAGS is always 1, whatever is set.
    cpu.set_regs(&kb::kvm_regs { rflags: 0, ..set })?;
    check_eq!(cpu.regs()?.rflags, 2, "RFLAGS set to 0");
    Ok(())
}

guest_code!(
    read_controls,
    code64,
    [
        "mov rax, cr0",
        "mov rbx, cr2",
        "mov rcx, cr3",
        "mov rdx, cr4",
        "mov rsi, cr8",
        "sgdt [{data}]",
        "sidt [{data} + 16]",
        "sldt edi",
        "str ebp",
        "out {done}, al",
    ],
    data = DATA,
    done = DONE_PORT
);

pub(crate) fn control_registers(device: &Device) -> Outcome {
    let (machine, cpu) = start(device, read_controls())?;
    let mut sregs = cpu.sregs()?;
    sregs.cr2 = 0xffff_8000_1234_5678;
    sregs.cr8 = 5;
    // WP and AM in CR0; TSD in CR4.
    sregs.cr0 |= (1 << 16) | (1 << 18);
    sregs.cr4 |= 1 << 2;
    cpu.set_sregs(&sregs)?;
    let mut found = cpu.sregs()?;
    check_eq!(found, sregs, "the registers that were set");
    // Without a local APIC in the kernel, CR8 is what userspace says at each entry.
    cpu.set_cr8(5);
    cpu.run_until_done()?;
    let regs = cpu.regs()?;
    check_eq!(
        (regs.rax, regs.rbx, regs.rcx, regs.rdx, regs.rsi),
        (sregs.cr0, sregs.cr2, sregs.cr3, sregs.cr4, sregs.cr8),
        "CR0, CR2, CR3, CR4 and CR8 as the guest reads them"
    );
    check_eq!(cpu.cr8(), 5, "cr8 in the shared page");
    let table = |at| {
        let bytes = machine.memory.read(at, 10);
        let base = bytes[2..]
            .iter()
            .rev()
            .fold(0, |value: u64, byte| (value << 8) | u64::from(*byte));
        (base, u16::from_le_bytes([bytes[0], bytes[1]]))
    };
    check_eq!(table(DATA), (sregs.gdt.base, sregs.gdt.limit), "GDTR");
    check_eq!(table(DATA + 16), (sregs.idt.base, sregs.idt.limit), "IDTR");
    check_eq!(regs.rdi & 0xffff, sregs.ldt.selector.into(), "LDTR");
    check_eq!(regs.rbp & 0xffff, sregs.tr.selector.into(), "TR");
    found = cpu.sregs()?;
    check_eq!(found.cs, sregs.cs, "CS after the guest ran");
    check_eq!(found.ss, sregs.ss, "SS after the guest ran");
    check_eq!(found.tr, sregs.tr, "TR after the guest ran");
    Ok(())
}

guest_code!(
    use_fpu,
    code64,
    [
        "pcmpeqd xmm0, xmm0",
        "fld1",
        "out {done}, al",
        "paddq xmm0, xmm1",
        "movaps xmm15, xmm2",
        "fld1",
        "fnstcw [{data}]",
        "out {done}, al",
    ],
    data = DATA,
    done = DONE_PORT
);

/// MXCSR is not in this: KVM_GET_FPU and KVM_SET_FPU leave that field alone. And the guest uses FPU and
/// SSE first: KVM's KVM_SET_FPU does not reach the guest while XSTATE_BV calls them unused.
pub(crate) fn fpu(device: &Device) -> Outcome {
    let (machine, cpu) = start(device, use_fpu())?;
    cpu.run_until_done()?;
    let mut set = kb::kvm_fpu {
        fcw: 0x27f,
        ..Default::default()
    };
    for (index, register) in (1_u8..).zip(set.xmm.iter_mut()) {
        *register = [index; 16];
    }
    cpu.fd.set_fpu(&set)?;
    let found = cpu.fd.get_fpu()?;
    check_eq!((found.xmm, found.fcw), (set.xmm, set.fcw), "what was set");
    cpu.run_until_done()?;
    let found = cpu.fd.get_fpu()?;
    check_eq!(found.xmm[0], [3; 16], "XMM0, 1 + 2 in each byte");
    check_eq!(found.xmm[15], [3; 16], "XMM15, from XMM2");
    check_eq!(found.xmm[7], [8; 16], "XMM7, untouched");
    // 1.0 as an 80-bit number; FSW's stack top went from 0 to 7.
    check_eq!(
        found.fpr[0][..10],
        [0, 0, 0, 0, 0, 0, 0, 0x80, 0xff, 0x3f],
        "ST0"
    );
    check_eq!((found.fsw >> 11) & 7, 7, "the FPU's stack top");
    check_eq!(
        machine.memory.read_u64(DATA) as u16,
        0x27f,
        "FCW in the guest"
    );
    Ok(())
}

guest_code!(
    use_debug_registers,
    code64,
    [
        "mov rax, dr0",
        "mov rbx, dr3",
        "mov rcx, dr7",
        "mov rdx, dr6",
        "mov rsi, 0x7777",
        "mov dr1, rsi",
        "out {done}, al",
    ],
    done = DONE_PORT
);

pub(crate) fn debug_registers(device: &Device) -> Outcome {
    let (_machine, cpu) = start(device, use_debug_registers())?;
    let set = kb::kvm_debugregs {
        db: [0x1000, 0x2000, 0x3000, 0xffff_8000_0000_4000],
        dr6: 0xffff_0ff1,
        dr7: 0x400,
        ..Default::default()
    };
    cpu.fd.set_debug_regs(&set)?;
    let found = cpu.fd.get_debug_regs()?;
    check_eq!(
        (found.db, found.dr6, found.dr7),
        (set.db, set.dr6, set.dr7),
        "what was set"
    );
    cpu.run_until_done()?;
    let regs = cpu.regs()?;
    check_eq!(
        (regs.rax, regs.rbx, regs.rcx, regs.rdx),
        (set.db[0], set.db[3], set.dr7, set.dr6),
        "DR0, DR3, DR7 and DR6 in the guest"
    );
    check_eq!(cpu.fd.get_debug_regs()?.db[1], 0x7777, "DR1 from the guest");
    Ok(())
}

fn cpuid_leaf(machine: &Machine, function: u32, index: u32) -> Result<[u32; 4], Fail> {
    let list = machine.kvm.get_supported_cpuid(kb::KVM_MAX_CPUID_ENTRIES)?;
    Ok(list
        .as_slice()
        .iter()
        .find(|entry| entry.function == function && entry.index == index)
        .map_or([0; 4], |entry| [entry.eax, entry.ebx, entry.ecx, entry.edx]))
}

pub(crate) fn xcr0(device: &Device) -> Outcome {
    let machine = Machine::new(device)?;
    let cpu = machine.vcpu(0)?;
    if (cpuid_leaf(&machine, 1, 0)?[2] >> 26) & 1 == 0 {
        return Err(Fail::skip("the CPU has no XSAVE"));
    }
    let offered = u64::from(cpuid_leaf(&machine, 0xd, 0)?[0]);
    let set = |value: u64| {
        let mut xcrs = kb::kvm_xcrs {
            nr_xcrs: 1,
            ..Default::default()
        };
        xcrs.xcrs[0].value = value;
        cpu.fd.set_xcrs(&xcrs)
    };
    for value in [1, 3, 7] {
        if value & !offered == 0 {
            set(value)?;
            check_eq!(cpu.fd.get_xcrs()?.xcrs[0].value, value, "XCR0");
        }
    }
    // Without x87; AVX without SSE; a bit that is not offered (SDM volume 1, section 13.3).
    for value in [0, 2, 5, (1 << 62) | 1] {
        match set(value) {
            Err(error) => check_eq!(error.errno(), libc::EINVAL, "XCR0 = {value:#x}"),
            Ok(()) => return Err(Fail::new(format!("XCR0 = {value:#x} is taken"))),
        }
    }
    Ok(())
}

guest_code!(
    use_mxcsr,
    code64,
    [
        "movaps xmm3, xmm4",
        "stmxcsr [{data}]",
        "mov dword ptr [{data} + 8], 0x3f80",
        "ldmxcsr [{data} + 8]",
        "fnstcw [{data} + 16]",
        "out {done}, al",
    ],
    data = DATA,
    done = DONE_PORT
);

/// The legacy area: FCW at byte 0, MXCSR at 24, XMMn at 160 + 16 n; XSTATE_BV at 512.
pub(crate) fn xsave(device: &Device) -> Outcome {
    let (machine, cpu) = start(device, use_mxcsr())?;
    if machine.extension(kb::KVM_CAP_XSAVE) == 0 {
        return Err(Fail::skip("XSAVE is not offered"));
    }
    let mut area = cpu.fd.get_xsave()?;
    check_eq!(area.region[6], 0x1f80, "MXCSR at reset");
    area.region[0] = 0x27f;
    area.region[6] = 0x9f80;
    area.region[56..60].fill(0xa5a5_a5a5);
    area.region[128] |= 3;
    // SAFETY: The structure is the one that KVM_GET_XSAVE filled in; it has no pointers.
    unsafe { cpu.fd.set_xsave(&area) }?;
    cpu.run_until_done()?;
    check_eq!(
        machine.memory.read_u64(DATA) as u32,
        0x9f80,
        "MXCSR in the guest"
    );
    check_eq!(
        machine.memory.read_u64(DATA + 16) as u16,
        0x27f,
        "FCW in the guest"
    );
    let found = cpu.fd.get_xsave()?;
    check_eq!(found.region[6], 0x3f80, "MXCSR from the guest");
    check_eq!(
        found.region[52..56],
        [0xa5a5_a5a5; 4],
        "XMM3 from the guest"
    );
    check_eq!(found.region[56..60], [0xa5a5_a5a5; 4], "XMM4");
    // A bit of MXCSR that there is not.
    area.region[6] = 0x8000_0000;
    // SAFETY: As above.
    match unsafe { cpu.fd.set_xsave(&area) } {
        Err(error) => check_eq!(error.errno(), libc::EINVAL, "a reserved bit of MXCSR"),
        Ok(()) => return Err(Fail::new("a reserved bit of MXCSR is taken")),
    }
    Ok(())
}

/// MSRs that a Linux guest uses, with a value that each can hold.
const MSRS: [(u32, u64, &str); 12] = [
    (0x174, 0x10, "SYSENTER_CS"),
    (0x175, 0xffff_8000_0000_1000, "SYSENTER_ESP"),
    (0x176, 0xffff_8000_0000_2000, "SYSENTER_EIP"),
    (0xc000_0081, 0x0023_0010_0000_0000, "STAR"),
    (0xc000_0082, 0xffff_8000_0000_3000, "LSTAR"),
    (0xc000_0083, 0xffff_8000_0000_4000, "CSTAR"),
    (0xc000_0084, 0x4_7700, "SFMASK"),
    (0xc000_0100, 0x7fff_1234_5000, "FS_BASE"),
    (0xc000_0101, 0xffff_8000_0000_5000, "GS_BASE"),
    (0xc000_0102, 0xffff_8000_0000_6000, "KERNEL_GS_BASE"),
    (0x277, 0x0007_0406_0007_0406, "PAT"),
    (0x2ff, 0x806, "MTRR_DEF_TYPE"),
];

guest_code!(
    read_msr,
    code64,
    ["2: rdmsr", "out {done}, al", "jmp 2b",],
    done = DONE_PORT
);

pub(crate) fn msrs(device: &Device) -> Outcome {
    let (_machine, cpu) = start(device, read_msr())?;
    for (index, value, name) in MSRS {
        cpu.set_msr(index, value)
            .map_err(|fail| fail.during(name))?;
    }
    for (index, value, name) in MSRS {
        check_eq!(cpu.msr(index)?, value, "{name}");
        let mut regs = cpu.regs()?;
        (regs.rip, regs.rcx) = (CODE, index.into());
        cpu.set_regs(&regs)?;
        cpu.run_until_done().map_err(|fail| fail.during(name))?;
        let regs = cpu.regs()?;
        check_eq!((regs.rdx << 32) | regs.rax, value, "{name} in the guest");
    }
    Ok(())
}

pub(crate) fn msrs_refused(device: &Device) -> Outcome {
    let (_machine, cpu) = start(device, read_msr())?;
    for (index, value, name) in [
        (
            0xc000_0082,
            0x8000_0000_0000_0000,
            "LSTAR that is not canonical",
        ),
        (
            0xc000_0102,
            0x0001_0000_0000_0000,
            "KERNEL_GS_BASE that is not canonical",
        ),
        (0x277, 0x02, "PAT with a type that there is not"),
        (0xc000_0080, 1 << 30, "EFER with a reserved bit"),
        (0x1b, 1 << 63, "APIC_BASE with a reserved bit"),
    ] {
        check!(!cpu.try_set_msr(index, value)?, "{name} is taken");
    }
    Ok(())
}

guest_code!(
    wait_here,
    code64,
    ["2: out {done}, al", "jmp 2b"],
    done = DONE_PORT
);

/// An exception that userspace gives goes to the guest's handler.
pub(crate) fn events_exception(device: &Device) -> Outcome {
    let (machine, cpu) = start(device, wait_here())?;
    cpu.run_until_done()?;
    handlers::set_resume(&machine.memory, CODE);
    let mut events = cpu.fd.get_vcpu_events()?;
    check_eq!(
        (
            events.exception.injected,
            events.interrupt.injected,
            events.nmi.injected
        ),
        (0, 0, 0),
        "events before"
    );
    events.exception.injected = 1;
    events.exception.nr = 13;
    events.exception.has_error_code = 1;
    events.exception.error_code = 0x18;
    cpu.fd.set_vcpu_events(&events)?;
    check_eq!(cpu.fd.get_vcpu_events()?.exception.injected, 1, "injected");
    cpu.run_until_done()?;
    let record = Record::read(&machine.memory);
    check_eq!(
        (record.count, record.vector, record.error, record.rsp),
        (1, 13, 0x18, STACK),
        "exceptions, vector, error code, RSP"
    );
    check_eq!(cpu.fd.get_vcpu_events()?.exception.injected, 0, "after it");
    Ok(())
}

pub(crate) fn events_nmi(device: &Device) -> Outcome {
    let (machine, cpu) = start(device, wait_here())?;
    cpu.run_until_done()?;
    let mut events = cpu.fd.get_vcpu_events()?;
    events.nmi.pending = 1;
    events.flags = kb::KVM_VCPUEVENT_VALID_NMI_PENDING;
    cpu.fd.set_vcpu_events(&events)?;
    let exit = cpu.run()?;
    check!(exit.is_done(), "{exit:x?}");
    check_eq!(handlers::count(&machine.memory, 2), 1, "NMIs");
    check_eq!(cpu.fd.get_vcpu_events()?.nmi.pending, 0, "pending after it");
    check!(matches!(cpu.run()?, Exit::Out { .. }), "the guest goes on");
    check_eq!(handlers::count(&machine.memory, 2), 1, "NMIs later");
    Ok(())
}
