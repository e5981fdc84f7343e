// SPDX-License-Identifier: GPL-2.0
//! Guests start in each mode and go from one to the next.

use kvm_bindings as kb;
use rvisor_tests::guest::{self, Mode, MODES};
use rvisor_tests::handlers::{self, Record};
use rvisor_tests::layout::{
    CODE, CODE32_SELECTOR, CODE_SELECTOR, DATA, DATA_SELECTOR, DONE_PORT, PAGE_TABLES, RECORD,
    STACK, UNEXPECTED_PORT,
};
use rvisor_tests::mapping::Mapping;
use rvisor_tests::{check_eq, guest_code, Cpu, Device, Exit, Fail, Machine, Outcome};

/// The state after power-up (SDM volume 3, table 11-1), as an Intel CPU has it.
pub(crate) fn reset_state(device: &Device) -> Outcome {
    let machine = Machine::with_irqchip(device)?;
    let cpu = machine.vcpu(0)?;
    let regs = cpu.regs()?;
    check_eq!(regs.rip, 0xfff0, "RIP");
    check_eq!(regs.rflags, 2, "RFLAGS");
    for (name, value) in [
        ("RAX", regs.rax),
        ("RBX", regs.rbx),
        ("RCX", regs.rcx),
        ("RSP", regs.rsp),
        ("RBP", regs.rbp),
        ("R15", regs.r15),
    ] {
        check_eq!(value, 0, "{name}");
    }
    let sregs = cpu.sregs()?;
    check_eq!(sregs.cr0, 0x6000_0010, "CR0");
    for (name, value) in [
        ("CR2", sregs.cr2),
        ("CR3", sregs.cr3),
        ("CR4", sregs.cr4),
        ("CR8", sregs.cr8),
        ("EFER", sregs.efer),
    ] {
        check_eq!(value, 0, "{name}");
    }
    check_eq!(
        sregs.apic_base,
        0xfee0_0900,
        "the boot processor's APIC_BASE"
    );
    check_segment("CS", &sregs.cs, 0xf000, 0xffff_0000, 0xb, 1)?;
    for (name, segment) in [
        ("DS", &sregs.ds),
        ("ES", &sregs.es),
        ("FS", &sregs.fs),
        ("GS", &sregs.gs),
        ("SS", &sregs.ss),
    ] {
        check_segment(name, segment, 0, 0, 3, 1)?;
    }
    check_segment("LDTR", &sregs.ldt, 0, 0, 2, 0)?;
    check_segment("TR", &sregs.tr, 0, 0, 0xb, 0)?;
    for (name, table) in [("GDTR", sregs.gdt), ("IDTR", sregs.idt)] {
        check_eq!((table.base, table.limit), (0, 0xffff), "{name}");
    }
    let debug = cpu.fd.get_debug_regs()?;
    check_eq!(
        (debug.db, debug.dr6, debug.dr7),
        ([0; 4], 0xffff_0ff0, 0x400),
        "the debug registers"
    );
    let xcrs = cpu.fd.get_xcrs()?;
    check_eq!((xcrs.nr_xcrs, xcrs.xcrs[0].value), (1, 1), "XCR0");
    let second = machine.vcpu(1)?;
    check_eq!(
        second.sregs()?.apic_base,
        0xfee0_0800,
        "the second processor's APIC_BASE"
    );
    Ok(())
}

fn check_segment(
    name: &str,
    found: &kb::kvm_segment,
    selector: u16,
    base: u64,
    type_: u8,
    s: u8,
) -> Outcome {
    check_eq!(
        (
            found.selector,
            found.base,
            found.limit,
            found.type_,
            found.s
        ),
        (selector, base, 0xffff, type_, s),
        "{name}'s selector, base, limit, type and S"
    );
    check_eq!((found.present, found.dpl), (1, 0), "{name}'s P and DPL");
    Ok(())
}

guest_code!(
    say_42,
    code16,
    ["mov al, 0x42", "out {done}, al", "hlt"],
    done = DONE_PORT
);

/// A vCPU whose state nobody touched starts 16 bytes below 4 GiB.
pub(crate) fn reset_vector(device: &Device) -> Outcome {
    let machine = Machine::new(device)?;
    let rom = Mapping::anonymous(4096)?;
    rom.write(0xff0, say_42());
    machine.set_slot(1, 0, 0xffff_f000, &rom, 0, 4096)?;
    let cpu = machine.vcpu(0)?;
    cpu.run_until_done()?;
    check_eq!(cpu.regs()?.rax & 0xff, 0x42, "AL");
    // Out of the machine before the ROM's memory goes.
    drop(cpu);
    machine.set_slot(1, 0, 0xffff_f000, &rom, 0, 0)
}

// The same bytes compute in all modes: 21 * 2 in AL by a loop, a byte to memory by the stack.
guest_code!(
    anywhere,
    code16,
    [
        "xor ax, ax",
        "mov cl, 21",
        "2: add al, 2",
        "dec cl",
        "jnz 2b",
        "push ax",
        "pop dx",
        "out {done}, al",
        "hlt",
        "mov al, 7",
        "out {done}, al",
    ],
    done = DONE_PORT
);

fn start(device: &Device, mode: Mode, code: &[u8]) -> Result<(Machine, Cpu), Fail> {
    let machine = Machine::new(device)?;
    let cpu = machine.vcpu(0)?;
    guest::load(&machine, &cpu, mode, code).map_err(|fail| fail.during(&format!("{mode:?}")))?;
    Ok((machine, cpu))
}

pub(crate) fn out_in_each_mode(device: &Device) -> Outcome {
    for mode in MODES {
        let (_machine, cpu) = start(device, mode, anywhere())?;
        let what = format!("{mode:?} mode");
        cpu.run_until_done().map_err(|fail| fail.during(&what))?;
        let regs = cpu.regs()?;
        check_eq!(regs.rax & 0xff, 42, "{what}: AL");
        check_eq!(regs.rdx & 0xff, 42, "{what}: DL, by the stack");
        check_eq!(regs.rsp, STACK, "{what}: RSP");
    }
    Ok(())
}

pub(crate) fn hlt_in_each_mode(device: &Device) -> Outcome {
    for mode in MODES {
        let (machine, cpu) = start(device, mode, anywhere())?;
        let what = format!("{mode:?} mode");
        cpu.run_until_done().map_err(|fail| fail.during(&what))?;
        cpu.run_expecting(&Exit::Hlt)
            .map_err(|fail| fail.during(&what))?;
        let rip = cpu.regs()?.rip;
        let before = machine.memory.read(rip - 1, 1);
        check_eq!(before, vec![0xf4], "{what}: the byte before RIP {rip:#x}");
        cpu.run_until_done()
            .map_err(|fail| fail.during(&format!("{what}: after HLT")))?;
        check_eq!(cpu.regs()?.rax & 0xff, 7, "{what}: AL after HLT");
    }
    Ok(())
}

// #UD, and the handler goes on behind it: the resume address stands in the record.
guest_code!(
    undefined,
    code16,
    ["ud2", "mov al, 9", "out {done}, al"],
    done = DONE_PORT
);

pub(crate) fn exception_in_each_mode(device: &Device) -> Outcome {
    for mode in MODES {
        let (machine, cpu) = start(device, mode, undefined())?;
        let what = format!("{mode:?} mode");
        handlers::set_resume(&machine.memory, CODE + 2);
        cpu.run_until_done().map_err(|fail| fail.during(&what))?;
        let record = Record::read(&machine.memory);
        check_eq!(
            (record.count, record.vector, record.rip),
            (1, 6, CODE),
            "{what}: exceptions, vector, address"
        );
        check_eq!(cpu.regs()?.rax & 0xff, 9, "{what}: AL behind it");
    }
    Ok(())
}

const GDTR: u64 = RECORD + 0x100;

// Far jumps are bytes: their targets are where the code will be, not where it is linked.
guest_code!(
    through_all_modes,
    code16,
    [
        "cli",
        "lgdt [{gdtr}]",
        "mov eax, cr0",
        "or al, 1",
        "mov cr0, eax",
        ".byte 0xea",
        ".word {code} + (2f - 77772b)",
        ".word {code32}",
        ".code32",
        "2:",
        "mov ax, {data_selector}",
        "mov ds, ax",
        "mov ss, ax",
        "mov eax, cr4",
        "or eax, 0x20",
        "mov cr4, eax",
        "mov eax, {tables}",
        "mov cr3, eax",
        "mov ecx, 0xc0000080",
        "rdmsr",
        "or eax, 0x100",
        "wrmsr",
        "mov eax, cr0",
        "or eax, 0x80000000",
        "mov cr0, eax",
        ".byte 0xea",
        ".long {code} + (3f - 77772b)",
        ".word {code64}",
        ".code64",
        "3:",
        "movabs rbx, 0x1122334455667788",
        "mov r15, rbx",
        "out {done}, al",
        // And back: paging off from a 32-bit segment leaves long mode.
        "push {code32}",
        ".byte 0x68",
        ".long {code} + (4f - 77772b)",
        ".byte 0x48, 0xcb",
        ".code32",
        "4:",
        "mov eax, cr0",
        "and eax, 0x7fffffff",
        "mov cr0, eax",
        "out {done}, al",
    ],
    gdtr = GDTR,
    code = CODE,
    code32 = CODE32_SELECTOR,
    code64 = CODE_SELECTOR,
    data_selector = DATA_SELECTOR,
    tables = PAGE_TABLES,
    done = DONE_PORT
);

pub(crate) fn real_to_long(device: &Device) -> Outcome {
    let (machine, cpu) = start(device, Mode::Real, through_all_modes())?;
    guest::write_tables(&machine, Mode::Long);
    // A GDTR image: limit 47, the table's address.
    machine.memory.write(GDTR, &[47, 0, 0, 0x10, 0, 0]);
    let mut regs = cpu.regs()?;
    regs.rsp = STACK;
    cpu.set_regs(&regs)?;
    cpu.run_until_done()?;
    let (regs, sregs) = (cpu.regs()?, cpu.sregs()?);
    check_eq!(regs.r15, 0x1122_3344_5566_7788, "R15");
    check_eq!(sregs.efer, 0x500, "EFER: LME and LMA");
    check_eq!(sregs.cr0 & 0x8000_0001, 0x8000_0001, "CR0.PG and PE");
    check_eq!(sregs.cr4, 0x20, "CR4");
    check_eq!(
        (sregs.cs.l, sregs.cs.db, sregs.cs.selector),
        (1, 0, CODE_SELECTOR),
        "CS.L, CS.D and CS"
    );
    cpu.run_until_done()?;
    let sregs = cpu.sregs()?;
    check_eq!(sregs.efer, 0x100, "EFER once paging is off");
    check_eq!(
        (sregs.cs.l, sregs.cs.db, sregs.cs.selector),
        (0, 1, CODE32_SELECTOR),
        "CS.L, CS.D and CS"
    );
    Ok(())
}

// 32-bit code under long mode: INC EAX (0x40), which is a REX prefix in 64-bit code.
guest_code!(
    compatibility,
    code64,
    [
        "mov eax, -1",
        "movabs r8, 0x123456789abcdef0",
        "push {code32}",
        ".byte 0x68",
        ".long {code} + (2f - 77772b)",
        ".byte 0x48, 0xcb",
        ".code32",
        "2:",
        ".byte 0x40",
        "mov ebx, esp",
        "out {done}, al",
        ".byte 0xea",
        ".long {code} + (3f - 77772b)",
        ".word {code64}",
        ".code64",
        "3: inc r8",
        "out {done}, al",
    ],
    code = CODE,
    code32 = CODE32_SELECTOR,
    code64 = CODE_SELECTOR,
    done = DONE_PORT
);

pub(crate) fn compatibility_mode(device: &Device) -> Outcome {
    let (_machine, cpu) = start(device, Mode::Long, compatibility())?;
    cpu.run_until_done()?;
    check_eq!(cpu.regs()?.rax, 0, "EAX after INC in 32-bit code");
    check_eq!(cpu.sregs()?.cs.l, 0, "CS.L");
    cpu.run_until_done()?;
    check_eq!(
        cpu.regs()?.r8,
        0x1234_5678_9abc_def1,
        "R8, back in 64-bit code"
    );
    Ok(())
}

guest_code!(
    read_segments,
    code64,
    [
        "mov rax, fs:[0]",
        "mov rbx, gs:[8]",
        "swapgs",
        "mov rcx, gs:[8]",
        "mov rdx, [0]",
        "out {done}, al",
        "out {unexpected}, al",
    ],
    done = DONE_PORT,
    unexpected = UNEXPECTED_PORT
);

/// FS, GS and KERNEL_GS_BASE have bases in long mode; DS has none, whatever the registers say.
pub(crate) fn segment_bases(device: &Device) -> Outcome {
    const KERNEL_GS_BASE: u32 = 0xc000_0102;
    let (machine, cpu) = start(device, Mode::Long, read_segments())?;
    let mut sregs = cpu.sregs()?;
    (sregs.fs.base, sregs.gs.base, sregs.ds.base) = (DATA, DATA, DATA + 0x100);
    cpu.set_sregs(&sregs)?;
    cpu.set_msr(KERNEL_GS_BASE, DATA + 0x1000)?;
    machine.memory.write_u64(DATA, 1);
    machine.memory.write_u64(DATA + 8, 2);
    machine.memory.write_u64(DATA + 0x1008, 3);
    machine.memory.write_u64(0, 4);
    cpu.run_until_done()?;
    let regs = cpu.regs()?;
    check_eq!(
        (regs.rax, regs.rbx, regs.rcx, regs.rdx),
        (1, 2, 3, 4),
        "FS:0, GS:8, GS:8 after SWAPGS, DS:0"
    );
    check_eq!(
        cpu.sregs()?.gs.base,
        DATA + 0x1000,
        "GS's base after SWAPGS"
    );
    check_eq!(
        cpu.msr(KERNEL_GS_BASE)?,
        DATA,
        "KERNEL_GS_BASE after SWAPGS"
    );
    check_eq!(cpu.msr(0xc000_0100)?, DATA, "FS_BASE as an MSR");
    Ok(())
}
