// SPDX-License-Identifier: GPL-2.0
//! Hardware task switches of 32-bit guests (SDM volume 3, chapter 8).

use rvisor_tests::guest::{self, Mode};
use rvisor_tests::layout::{
    AP_CODE, AP_STACK, CODE, CODE_SELECTOR, DATA, DATA_SELECTOR, DONE_PORT, GDT, IDT, PAGE_TABLES,
    STACK, TSS, TSS_SELECTOR,
};
use rvisor_tests::mapping::Mapping;
use rvisor_tests::{check, check_eq, guest_code, Cpu, Device, Fail, Machine, Outcome};

/// The second task's TSS and its selector.
const SECOND: u64 = DATA;
const SECOND_SELECTOR: u16 = 0x30;
/// What the second task finds in EAX.
const IN_EAX: u32 = 0x5ec0_11d5;
/// Offsets in a TSS (SDM volume 3, figure 8-2).
const LINK: u64 = 0;
const EIP: u64 = 0x20;
const EFLAGS: u64 = 0x24;
const EAX: u64 = 0x28;
const ESP: u64 = 0x38;
const CS: u64 = 0x4c;
const NT: u32 = 1 << 14;
/// The busy flag in a descriptor.
const BUSY: u64 = 1 << 41;
const CR0_TS: u64 = 8;
const INTERRUPT: u64 = 0x40;

// JMP 0x30:0, then the end with another value in AL.
guest_code!(
    jump,
    code32,
    [
        "mov eax, 0x11223344",
        ".byte 0xea, 0, 0, 0, 0, 0x30, 0",
        "out {done}, al"
    ],
    done = DONE_PORT
);
// CALL 0x30:0.
guest_code!(
    call,
    code32,
    [
        "mov eax, 0x11223344",
        ".byte 0x9a, 0, 0, 0, 0, 0x30, 0",
        "out {done}, al"
    ],
    done = DONE_PORT
);
guest_code!(
    software,
    code32,
    ["mov eax, 0x11223344", "int 0x40", "out {done}, al"],
    done = DONE_PORT
);
guest_code!(
    bad_selector,
    code32,
    ["mov eax, 0x5678", "mov fs, ax", "out {done}, al"],
    done = DONE_PORT
);
// The second task: says that it is there, then goes back to the first by JMP 0x18:0.
guest_code!(
    jumps_back,
    code32,
    ["out {done}, al", ".byte 0xea, 0, 0, 0, 0, 0x18, 0"],
    done = DONE_PORT
);
// The same by IRET.
guest_code!(
    returns,
    code32,
    ["out {done}, al", "iretd"],
    done = DONE_PORT
);
// It takes the error code from its stack.
guest_code!(
    takes_code,
    code32,
    ["pop ebx", "out {done}, al"],
    done = DONE_PORT
);
/// Bytes of the first instruction, and of a far JMP or CALL.
const MOV: u64 = 5;
const FAR: u64 = 7;

fn u32_at(memory: &Mapping, address: u64) -> u32 {
    let bytes = memory.read(address, 4);
    bytes
        .iter()
        .rev()
        .fold(0, |word, byte| (word << 8) | u32::from(*byte))
}

/// A guest with two tasks: the first runs `first`, the second `second`.
fn start(device: &Device, mode: Mode, first: &[u8], second: &[u8]) -> Result<(Machine, Cpu), Fail> {
    let machine = Machine::new(device)?;
    let cpu = machine.vcpu(0)?;
    guest::load(&machine, &cpu, mode, first)?;
    let memory = &machine.memory;
    memory.write(AP_CODE, second);
    for tss in [TSS, SECOND] {
        memory.write(tss, &[0; 0x68]);
    }
    let words = [
        (0x1c, PAGE_TABLES as u32),
        (EIP, AP_CODE as u32),
        (EFLAGS, 2),
        (EAX, IN_EAX),
        (ESP, AP_STACK as u32),
        (CS, CODE_SELECTOR.into()),
        // ES, SS, DS, FS, GS.
        (0x48, DATA_SELECTOR.into()),
        (0x50, DATA_SELECTOR.into()),
        (0x54, DATA_SELECTOR.into()),
        (0x58, 0),
        (0x5c, DATA_SELECTOR.into()),
    ];
    for (offset, word) in words {
        memory.write(SECOND + offset, &word.to_le_bytes());
    }
    // An available 32-bit TSS; the first task's CR3 is not saved by a switch.
    memory.write_u64(
        GDT + u64::from(SECOND_SELECTOR),
        0x0000_8900_0000_0067 | ((SECOND & 0xffff) << 16) | ((SECOND >> 16) << 32),
    );
    memory.write(TSS + 0x1c, &(PAGE_TABLES as u32).to_le_bytes());
    let mut sregs = cpu.sregs()?;
    sregs.gdt.limit = SECOND_SELECTOR + 7;
    cpu.set_sregs(&sregs)?;
    Ok((machine, cpu))
}

/// A task gate for the second task.
fn set_gate(machine: &Machine, vector: u64) {
    machine.memory.write_u64(
        IDT + 8 * vector,
        (0x8500 << 32) | (u64::from(SECOND_SELECTOR) << 16),
    );
}

fn is_busy(machine: &Machine, selector: u16) -> bool {
    machine.memory.read_u64(GDT + u64::from(selector)) & BUSY != 0
}

/// The second task runs, with what its TSS says.
fn check_second(cpu: &Cpu) -> Outcome {
    let regs = cpu.regs()?;
    check_eq!(regs.rax, u64::from(IN_EAX), "the second task's EAX");
    check_eq!(regs.rip >> 8, AP_CODE >> 8, "its EIP");
    let sregs = cpu.sregs()?;
    check_eq!(
        (sregs.tr.selector, sregs.tr.base, sregs.tr.type_),
        (SECOND_SELECTOR, SECOND, 0xb),
        "its TR"
    );
    check!(sregs.cr0 & CR0_TS != 0, "CR0.TS is clear: {:#x}", sregs.cr0);
    check!(sregs.fs.unusable != 0, "FS is usable: {:x?}", sregs.fs);
    check_eq!(
        (sregs.cs.selector, sregs.ss.selector),
        (CODE_SELECTOR, DATA_SELECTOR),
        "its CS and SS"
    );
    Ok(())
}

/// The first task runs again.
fn check_first(cpu: &Cpu, machine: &Machine) -> Outcome {
    cpu.run_until_done()?;
    check_eq!(cpu.regs()?.rax, 0x1122_3344, "the first task's EAX");
    check_eq!(cpu.regs()?.rsp, STACK, "its ESP");
    check_eq!(cpu.sregs()?.tr.selector, TSS_SELECTOR, "its TR");
    check_eq!(
        (
            is_busy(machine, TSS_SELECTOR),
            is_busy(machine, SECOND_SELECTOR)
        ),
        (true, false),
        "which task is busy at the end"
    );
    Ok(())
}

/// JMP to a task and back.
pub(crate) fn task_jump(device: &Device) -> Outcome {
    for mode in [Mode::Protected, Mode::Paged] {
        let (machine, cpu) = start(device, mode, jump(), jumps_back())?;
        cpu.run_until_done()?;
        check_second(&cpu)?;
        check_eq!(cpu.regs()?.rflags & u64::from(NT), 0, "NT after JMP");
        let memory = &machine.memory;
        check_eq!(
            (u32_at(memory, TSS + EIP), u32_at(memory, TSS + EAX)),
            ((CODE + MOV + FAR) as u32, 0x1122_3344),
            "the first task's EIP and EAX in its TSS"
        );
        check_eq!(
            (u32_at(memory, TSS + ESP), u32_at(memory, TSS + CS)),
            (STACK as u32, CODE_SELECTOR.into()),
            "its ESP and CS there"
        );
        check_eq!(u32_at(memory, SECOND + LINK), 0, "the link after JMP");
        check_eq!(
            (
                is_busy(&machine, TSS_SELECTOR),
                is_busy(&machine, SECOND_SELECTOR)
            ),
            (false, true),
            "which task is busy"
        );
        check_first(&cpu, &machine)?;
    }
    Ok(())
}

/// CALL to a task, which returns.
pub(crate) fn task_call(device: &Device) -> Outcome {
    for mode in [Mode::Protected, Mode::Paged] {
        let (machine, cpu) = start(device, mode, call(), returns())?;
        cpu.run_until_done()?;
        check_second(&cpu)?;
        check_eq!(
            cpu.regs()?.rflags & u64::from(NT),
            NT.into(),
            "NT after CALL"
        );
        check_eq!(
            u32_at(&machine.memory, SECOND + LINK),
            TSS_SELECTOR.into(),
            "the link after CALL"
        );
        check!(is_busy(&machine, TSS_SELECTOR), "the caller is not busy");
        check_first(&cpu, &machine)?;
        check_eq!(
            u32_at(&machine.memory, SECOND + EFLAGS) & NT,
            0,
            "NT in the TSS that IRET has left"
        );
    }
    Ok(())
}

/// INT n through a task gate: the task returns behind the instruction.
pub(crate) fn task_gate(device: &Device) -> Outcome {
    let (machine, cpu) = start(device, Mode::Protected, software(), returns())?;
    set_gate(&machine, INTERRUPT);
    cpu.run_until_done()?;
    check_second(&cpu)?;
    check_eq!(
        u32_at(&machine.memory, TSS + EIP),
        (CODE + MOV + 2) as u32,
        "where the first task goes on"
    );
    check_first(&cpu, &machine)
}

/// A fault through a task gate: the task finds the error code on its stack.
pub(crate) fn task_gate_with_code(device: &Device) -> Outcome {
    let (machine, cpu) = start(device, Mode::Protected, bad_selector(), takes_code())?;
    set_gate(&machine, 13);
    cpu.run_until_done()?;
    check_second(&cpu)?;
    let regs = cpu.regs()?;
    check_eq!(regs.rbx, 0x5678, "the error code");
    check_eq!(regs.rsp, AP_STACK, "ESP behind it");
    check_eq!(
        u32_at(&machine.memory, TSS + EIP),
        (CODE + MOV) as u32,
        "EIP of the instruction that faulted"
    );
    Ok(())
}
