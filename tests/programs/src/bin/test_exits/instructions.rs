// SPDX-License-Identifier: GPL-2.0
//! Instructions that the hypervisor answers itself.

use crate::start;
use kvm_bindings as kb;
use rvisor_tests::guest::{self, Mode};
use rvisor_tests::handlers::{self, Record};
use rvisor_tests::layout::{CODE, DATA, DONE_PORT, PAGE_TABLES};
use rvisor_tests::{check, check_eq, guest_code, Cpu, Device, Exit, Fail, Machine, Outcome};

guest_code!(
    ask_cpuid,
    code64,
    ["2: cpuid", "out {done}, al", "jmp 2b",],
    done = DONE_PORT
);

/// Runs from the start of the code with these registers.
fn again(cpu: &Cpu, change: impl Fn(&mut kb::kvm_regs)) -> Result<kb::kvm_regs, Fail> {
    let mut regs = cpu.regs()?;
    regs.rip = CODE;
    change(&mut regs);
    cpu.set_regs(&regs)?;
    cpu.run_until_done()?;
    cpu.regs()
}

/// The guest sees what KVM_SET_CPUID2 said; a leaf beyond the highest one answers as an Intel CPU does.
pub(crate) fn cpuid(device: &Device) -> Outcome {
    let machine = Machine::new(device)?;
    let fd = machine.vm.create_vcpu(0)?;
    let cpu = Cpu::new(fd, machine.kvm.get_vcpu_mmap_size()?)?;
    let mut set = machine.kvm.get_supported_cpuid(kb::KVM_MAX_CPUID_ENTRIES)?;
    for entry in set.as_mut_slice() {
        if entry.function == 0 {
            // "Tests for you".
            (entry.ebx, entry.edx, entry.ecx) = (0x7473_6554, 0x6f66_2073, 0x756f_7920);
        }
        if entry.function == 0x8000_0002 {
            (entry.eax, entry.ebx, entry.ecx, entry.edx) = (1, 0x8000_0002, 3, 4);
        }
    }
    cpu.fd.set_cpuid2(&set)?;
    guest::load(&machine, &cpu, Mode::Long, ask_cpuid())?;
    let ask = |leaf: u64, index: u64| -> Result<[u64; 4], Fail> {
        // Upper halves are ignored at the start and cleared at the end.
        let regs = again(&cpu, |regs| {
            (regs.rax, regs.rcx) = (leaf | (7 << 32), index | (7 << 32));
            (regs.rbx, regs.rdx) = (u64::MAX, u64::MAX);
        })?;
        Ok([regs.rax, regs.rbx, regs.rcx, regs.rdx])
    };
    let zero = ask(0, 0)?;
    check_eq!(
        zero[1..],
        [0x7473_6554, 0x756f_7920, 0x6f66_2073],
        "leaf 0's name in EBX, ECX, EDX"
    );
    check_eq!(
        ask(0x8000_0002, 0)?,
        [1, 0x8000_0002, 3, 4],
        "leaf 0x80000002"
    );
    let features = ask(1, 0)?;
    let given = set
        .as_slice()
        .iter()
        .find(|entry| entry.function == 1)
        .map_or(0, |entry| entry.edx);
    // APIC (bit 9) follows APIC_BASE at run time.
    check_eq!(
        features[3] & !(1 << 9),
        u64::from(given) & !(1 << 9),
        "leaf 1's EDX"
    );
    check_eq!(
        ask(4, 0x7777)?[0] & 0x1f,
        0,
        "leaf 4 has no cache of that index"
    );
    check_eq!(
        ask(0x4000_ffff, 0)?,
        [0; 4].map(|_: i32| 0),
        "leaf 0x4000ffff"
    );
    Ok(())
}

guest_code!(
    msr_access,
    code64,
    [
        "wrmsr",
        "xor eax, eax",
        "xor edx, edx",
        "rdmsr",
        "out {done}, al",
    ],
    done = DONE_PORT
);

/// What the guest writes userspace reads, for MSRs behind the bitmap and such that pass through.
pub(crate) fn msr_values(device: &Device) -> Outcome {
    let (_machine, cpu) = start(device, msr_access())?;
    for (index, value, name) in [
        (0x174, 0x10, "SYSENTER_CS"),
        (0x175, 0xffff_8000_0000_1230, "SYSENTER_ESP"),
        (0x277, 0x0007_0406_0007_0406, "PAT"),
        (0x2ff, 0xc06, "MTRR_DEF_TYPE"),
        (0xc000_0081, 0x0023_0010_0000_0000, "STAR"),
        (0xc000_0082, 0xffff_8000_0000_3210, "LSTAR"),
        (0xc000_0084, 0x4_7700, "SFMASK"),
        (0xc000_0100, 0x7fff_1234_5670, "FS_BASE"),
        (0xc000_0102, 0xffff_8000_0000_6540, "KERNEL_GS_BASE"),
        (0xc000_0080, 0x501, "EFER with SCE"),
    ] {
        let regs = again(&cpu, |regs| {
            // Only the lower halves count.
            regs.rcx = index | (3 << 32);
            regs.rax = value & 0xffff_ffff | (5 << 32);
            regs.rdx = (value >> 32) | (5 << 32);
        })
        .map_err(|fail| fail.during(name))?;
        check_eq!(
            (regs.rdx, regs.rax),
            (value >> 32, value & 0xffff_ffff),
            "{name} read back"
        );
        check_eq!(cpu.msr(index as u32)?, value, "{name} in userspace");
    }
    check_eq!(cpu.sregs()?.efer, 0x501, "EFER in KVM_GET_SREGS");
    Ok(())
}

// RBX tells what faulted.
guest_code!(
    bad_msrs,
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

/// An MSR that there is not, or a value that it can't have, gives #GP(0) and changes nothing.
pub(crate) fn msr_unknown(device: &Device) -> Outcome {
    let (machine, cpu) = start(device, bad_msrs())?;
    let done = CODE + bad_msrs().len() as u64 - 2;
    handlers::set_resume(&machine.memory, done);
    let before = cpu.msr(0xc000_0082)?;
    for (number, (index, write, value, name)) in (1..).zip([
        (0x4b4b_0000, 0, 0, "RDMSR of an unknown one"),
        (0x4b4b_0000, 1, 0, "WRMSR of an unknown one"),
        (0xc000_0082, 1, 1 << 63, "LSTAR that is not canonical"),
        (0xc000_0080, 1, 1 << 32, "EFER's reserved bits"),
        (0xc000_0080, 1, 0x401, "EFER.LME cleared under paging"),
        (0x277, 1, 2, "PAT with a type that there is not"),
        (0x1b, 1, 1 << 63, "APIC_BASE's reserved bits"),
    ]) {
        again(&cpu, |regs| {
            (regs.rsi, regs.rdi) = (index, write);
            (regs.rax, regs.rdx) = (value & 0xffff_ffff, value >> 32);
        })
        .map_err(|fail| fail.during(name))?;
        let record = Record::read(&machine.memory);
        check_eq!(
            (record.count, record.vector, record.error),
            (number, 13, 0),
            "{name}: exceptions, vector, error code"
        );
        let bytes = machine.memory.read(record.rip, 2);
        let expected = if write == 0 {
            [0x0f, 0x32]
        } else {
            [0x0f, 0x30]
        };
        check_eq!(bytes, expected, "{name}: the instruction at RIP");
    }
    check_eq!(cpu.msr(0xc000_0082)?, before, "LSTAR");
    check_eq!(cpu.sregs()?.efer, 0x500, "EFER");
    Ok(())
}

guest_code!(
    call_vmm,
    code64,
    [
        "mov rax, 0x7fffffff",
        "mov rbx, 5",
        "vmcall",
        "out {done}, al",
    ],
    done = DONE_PORT
);

/// An unknown hypercall answers -KVM_ENOSYS (1000) in RAX (Documentation/virt/kvm/x86/hypercalls.rst).
pub(crate) fn vmcall(device: &Device) -> Outcome {
    let (_machine, cpu) = start(device, call_vmm())?;
    cpu.run_until_done()?;
    let regs = cpu.regs()?;
    check_eq!(regs.rax as i64, -1000, "RAX");
    check_eq!(regs.rbx, 5, "RBX");
    Ok(())
}

guest_code!(
    drop_caches,
    code64,
    [
        "mov qword ptr [{data}], 7",
        "wbinvd",
        "invd",
        "invlpg [{data}]",
        "mov rax, [{data}]",
        "out {done}, al",
    ],
    data = DATA,
    done = DONE_PORT
);

/// INVD must not lose what the host has in its caches.
pub(crate) fn cache_control(device: &Device) -> Outcome {
    let (_machine, cpu) = start(device, drop_caches())?;
    cpu.run_until_done()?;
    check_eq!(cpu.regs()?.rax, 7, "what was written before INVD");
    Ok(())
}

guest_code!(
    set_xcr,
    code64,
    [
        "mov rsi, cr4",
        "or rsi, 0x40000",
        "mov cr4, rsi",
        "mov rcx, rdi",
        "xsetbv",
        "xor ecx, ecx",
        "xgetbv",
        "mov rbx, 1",
        "out {done}, al",
    ],
    done = DONE_PORT
);

pub(crate) fn xsetbv(device: &Device) -> Outcome {
    let (machine, cpu) = start(device, set_xcr())?;
    let list = machine.kvm.get_supported_cpuid(kb::KVM_MAX_CPUID_ENTRIES)?;
    let leaf = |function: u32| {
        list.as_slice()
            .iter()
            .find(|entry| entry.function == function)
            .copied()
            .unwrap_or_default()
    };
    if (leaf(1).ecx >> 26) & 1 == 0 {
        return Err(Fail::skip("the CPU has no XSAVE"));
    }
    let offered = u64::from(leaf(0xd).eax);
    for value in [1, 3, 7] {
        if value & !offered != 0 {
            continue;
        }
        let regs = again(&cpu, |regs| (regs.rdi, regs.rax, regs.rdx) = (0, value, 0))?;
        check_eq!(regs.rax, value, "XGETBV");
        check_eq!(cpu.fd.get_xcrs()?.xcrs[0].value, value, "KVM_GET_XCRS");
    }
    let before = cpu.fd.get_xcrs()?.xcrs[0].value;
    handlers::set_resume(&machine.memory, CODE + set_xcr().len() as u64 - 2);
    for (number, (index, value, name)) in (1..).zip([
        (0, 0, "x87 off"),
        (0, 5, "AVX without SSE"),
        (0, (1 << 40) | 1, "a bit that is not offered"),
        (1, 1, "XCR1"),
    ]) {
        again(&cpu, |regs| {
            (regs.rdi, regs.rax, regs.rdx) = (index, value & 0xffff_ffff, value >> 32);
        })
        .map_err(|fail| fail.during(name))?;
        let record = Record::read(&machine.memory);
        check_eq!(
            (record.count, record.vector, record.error),
            (number, 13, 0),
            "{name}: exceptions, vector, error code"
        );
    }
    check_eq!(cpu.fd.get_xcrs()?.xcrs[0].value, before, "XCR0 at the end");
    Ok(())
}

guest_code!(
    move_controls,
    code64,
    [
        // CR0: WP and TS on, read back; CLTS; LMSW and SMSW.
        "mov rax, cr0",
        "or rax, 0x10008",
        "mov cr0, rax",
        "mov rbx, cr0",
        "clts",
        "mov rcx, cr0",
        "mov edx, 0x9",
        "lmsw dx",
        "smsw esi",
        "clts",
        // CR3 with another table, the same contents; PCD and PWT are kept.
        "mov rdi, {other}",
        "mov cr3, rdi",
        "mov rdi, cr3",
        // CR4: PGE, TSD and MCE on, then MCE off.
        "mov r8, cr4",
        "or r8, 0xc4",
        "mov cr4, r8",
        "mov r9, cr4",
        "mov r8, r9",
        "and r8, -65",
        "mov cr4, r8",
        "mov r8, cr4",
        // CR8.
        "mov r10d, 11",
        "mov cr8, r10",
        "xor r10d, r10d",
        "mov r10, cr8",
        // CR2 is only a register.
        "movabs r11, 0x123456789abc",
        "mov cr2, r11",
        "xor r11d, r11d",
        "mov r11, cr2",
        "out {done}, al",
    ],
    other = DATA | 0x18,
    done = DONE_PORT
);

pub(crate) fn control_registers(device: &Device) -> Outcome {
    let (machine, cpu) = start(device, move_controls())?;
    let tables = machine.memory.read(PAGE_TABLES, 4096);
    machine.memory.write(DATA, &tables);
    let before = cpu.sregs()?;
    loop {
        let exit = cpu.run()?;
        if exit.is_done() {
            break;
        }
        check_eq!(exit, Exit::Other(kb::KVM_EXIT_SET_TPR), "the exit");
    }
    let (regs, sregs) = (cpu.regs()?, cpu.sregs()?);
    check_eq!(regs.rbx, before.cr0 | 0x1_0008, "CR0 with WP and TS");
    check_eq!(regs.rcx, before.cr0 | 0x1_0000, "CR0 after CLTS");
    check_eq!(
        regs.rsi & 0xffff,
        (before.cr0 & 0xffff) | 8,
        "SMSW after LMSW set TS and could not clear PE"
    );
    check_eq!(regs.rdi, DATA | 0x18, "CR3");
    check_eq!(regs.r9, before.cr4 | 0xc4, "CR4 with PGE, TSD and MCE");
    check_eq!(regs.r8, before.cr4 | 0x84, "CR4 without MCE");
    check_eq!(regs.r10, 11, "CR8");
    check_eq!(regs.r11, 0x1234_5678_9abc, "CR2");
    check_eq!(
        (sregs.cr0, sregs.cr2, sregs.cr3, sregs.cr4, sregs.cr8),
        (
            before.cr0 | 0x1_0000,
            0x1234_5678_9abc,
            DATA | 0x18,
            before.cr4 | 0x84,
            11
        ),
        "CR0, CR2, CR3, CR4 and CR8 in KVM_GET_SREGS"
    );
    Ok(())
}

// One row of the table below each: RDI chooses the instruction, RAX is the value.
guest_code!(
    bad_controls,
    code64,
    [
        "cmp edi, 0",
        "jne 2f",
        "mov cr0, rax",
        "2: cmp edi, 3",
        "jne 3f",
        "mov cr3, rax",
        "3: cmp edi, 4",
        "jne 4f",
        "mov cr4, rax",
        "4: cmp edi, 8",
        "jne 5f",
        "mov cr8, rax",
        "5: out {done}, al",
    ],
    done = DONE_PORT
);

/// Values that a control register can't have give #GP(0) (SDM volume 2, MOV to control registers).
pub(crate) fn control_registers_refused(device: &Device) -> Outcome {
    let (machine, cpu) = start(device, bad_controls())?;
    handlers::set_resume(&machine.memory, CODE + bad_controls().len() as u64 - 2);
    let before = cpu.sregs()?;
    for (number, (register, value, name)) in (1..).zip([
        (0, before.cr0 & !1, "CR0: PG without PE"),
        (0, before.cr0 | (1 << 29) & !(1 << 30), "CR0: NW without CD"),
        (0, before.cr0 | (1 << 40), "CR0: a bit above 31"),
        (0, before.cr0 & !(1 << 31), "CR0: PG off in 64-bit code"),
        (3, (1 << 63) | (1 << 62), "CR3: reserved bits"),
        (4, before.cr4 & !0x20, "CR4: PAE off in long mode"),
        (4, before.cr4 | (1 << 31), "CR4: a reserved bit"),
        (8, 16, "CR8: beyond 15"),
    ]) {
        again(&cpu, |regs| (regs.rdi, regs.rax) = (register, value))
            .map_err(|fail| fail.during(name))?;
        let record = Record::read(&machine.memory);
        check_eq!(
            (record.count, record.vector, record.error),
            (number, 13, 0),
            "{name}: exceptions, vector, error code"
        );
    }
    let after = cpu.sregs()?;
    check_eq!(
        (after.cr0, after.cr3, after.cr4),
        (before.cr0, before.cr3, before.cr4),
        "CR0, CR3 and CR4 at the end"
    );
    check!(after.cr8 < 16, "CR8 {:#x}", after.cr8);
    Ok(())
}

guest_code!(
    move_debug,
    code64,
    [
        "mov rax, 0x1111",
        "mov dr0, rax",
        "mov rax, 0x2222",
        "mov dr3, rax",
        "mov rbx, dr0",
        "mov rcx, dr3",
        // Without CR4.DE, DR4 is DR6 and DR5 is DR7: bytes, as no assembler knows them in 64-bit code.
        ".byte 0x0f, 0x21, 0xea",
        "mov rsi, dr7",
        "mov rdi, 0x0fff0ff0",
        "mov dr6, rdi",
        "mov rdi, dr6",
        "out {done}, al",
    ],
    done = DONE_PORT
);

pub(crate) fn debug_registers(device: &Device) -> Outcome {
    let (_machine, cpu) = start(device, move_debug())?;
    cpu.run_until_done()?;
    let regs = cpu.regs()?;
    check_eq!((regs.rbx, regs.rcx), (0x1111, 0x2222), "DR0 and DR3");
    check_eq!((regs.rdx, regs.rsi), (0x400, 0x400), "DR5 and DR7");
    check_eq!(regs.rdi & 0xf00f, 0, "DR6's cleared bits");
    let debug = cpu.fd.get_debug_regs()?;
    check_eq!(debug.db, [0x1111, 0, 0, 0x2222], "KVM_GET_DEBUGREGS");
    Ok(())
}

guest_code!(halt, code64, ["hlt", "out {done}, al"], done = DONE_PORT);

/// Without a local APIC in the kernel, HLT goes to userspace with RIP behind it.
pub(crate) fn hlt(device: &Device) -> Outcome {
    let (_machine, cpu) = start(device, halt())?;
    cpu.run_expecting(&Exit::Hlt)?;
    check_eq!(cpu.regs()?.rip, CODE + 1, "RIP");
    cpu.run_until_done()
}

guest_code!(
    measure,
    code64,
    [
        "rdtsc",
        "shl rdx, 32",
        "lea rbx, [rax + rdx]",
        "mov ecx, 1000",
        "2: pause",
        "dec ecx",
        "jnz 2b",
        "rdtsc",
        "shl rdx, 32",
        "lea rsi, [rax + rdx]",
        "out {done}, al",
        "rdtsc",
        "shl rdx, 32",
        "lea rdi, [rax + rdx]",
        "out {done}, al",
    ],
    done = DONE_PORT
);

/// A thousand PAUSEs end, and the TSC moves forward over them and over an exit to userspace.
pub(crate) fn pause_and_tsc(device: &Device) -> Outcome {
    let (_machine, cpu) = start(device, measure())?;
    cpu.run_until_done()?;
    let first = cpu.regs()?;
    check!(
        first.rsi - first.rbx > 1000,
        "the TSC went from {} to {}",
        first.rbx,
        first.rsi
    );
    let tsc = cpu.msr(0x10)?;
    cpu.run_until_done()?;
    let second = cpu.regs()?;
    check!(
        first.rsi < tsc && tsc < second.rdi,
        "the guest's TSC {}, then userspace's {tsc}, then the guest's {}",
        first.rsi,
        second.rdi
    );
    Ok(())
}
