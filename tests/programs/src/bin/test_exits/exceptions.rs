// SPDX-License-Identifier: GPL-2.0
//! Exceptions that are the guest's own.

use crate::start;
use rvisor_tests::handlers::{self, Record};
use rvisor_tests::layout::{CODE, DATA, DONE_PORT, PAGE_TABLES, STACK};
use rvisor_tests::{check, check_eq, guest_code, Device, Outcome};

guest_code!(
    divide,
    code64,
    ["xor ecx, ecx", "div ecx", "out {done}, al",],
    done = DONE_PORT
);
guest_code!(
    undefined,
    code64,
    ["ud2", "out {done}, al"],
    done = DONE_PORT
);
guest_code!(
    breakpoint,
    code64,
    ["int3", "out {done}, al"],
    done = DONE_PORT
);
guest_code!(
    software,
    code64,
    ["int 0x0d", "out {done}, al"],
    done = DONE_PORT
);
guest_code!(
    bad_selector,
    code64,
    ["mov ax, 0x5678", "mov fs, ax", "out {done}, al",],
    done = DONE_PORT
);
guest_code!(
    not_canonical,
    code64,
    [
        "movabs rax, 0x8000000000000000",
        "mov rax, [rax]",
        "out {done}, al",
    ],
    done = DONE_PORT
);
guest_code!(
    stack_not_canonical,
    code64,
    [
        "mov rbx, rsp",
        "movabs rbp, 0x8000000000000000",
        "mov rax, [rbp]",
        "out {done}, al",
    ],
    done = DONE_PORT
);
guest_code!(
    no_fpu,
    code64,
    [
        "mov rax, cr0",
        "or rax, 8",
        "mov cr0, rax",
        "fninit",
        "out {done}, al",
    ],
    done = DONE_PORT
);
guest_code!(
    simd,
    code64,
    [
        "push 0x1d80",
        "ldmxcsr [rsp]",
        "pop rax",
        "mov eax, 0x3f800000",
        "movd xmm0, eax",
        "xorps xmm1, xmm1",
        "divss xmm0, xmm1",
        "out {done}, al",
    ],
    done = DONE_PORT
);
guest_code!(
    no_vmx,
    code64,
    ["vmxoff", "out {done}, al"],
    done = DONE_PORT
);
guest_code!(long_instruction, code64, [
    ".byte 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x90",
    "out {done}, al",
], done = DONE_PORT);

/// What runs, which exception comes, its error code, and where RIP points: so far from the start.
struct Row {
    name: &'static str,
    code: fn() -> &'static [u8],
    vector: u64,
    error: u64,
    at: u64,
}

const ROWS: [Row; 11] = [
    Row {
        name: "#DE",
        code: divide,
        vector: 0,
        error: 0,
        at: 2,
    },
    Row {
        name: "#UD",
        code: undefined,
        vector: 6,
        error: 0,
        at: 0,
    },
    Row {
        name: "#BP: behind INT3",
        code: breakpoint,
        vector: 3,
        error: 0,
        at: 1,
    },
    Row {
        name: "#GP: a selector beyond the table",
        code: bad_selector,
        vector: 13,
        error: 0x5678,
        at: 4,
    },
    Row {
        name: "#GP: a non-canonical address",
        code: not_canonical,
        vector: 13,
        error: 0,
        at: 10,
    },
    Row {
        name: "#SS: a non-canonical stack",
        code: stack_not_canonical,
        vector: 12,
        error: 0,
        at: 13,
    },
    Row {
        name: "#NM",
        code: no_fpu,
        vector: 7,
        error: 0,
        at: 10,
    },
    Row {
        name: "#XM",
        code: simd,
        vector: 19,
        error: 0,
        at: 22,
    },
    Row {
        name: "#UD: VMX in a guest",
        code: no_vmx,
        vector: 6,
        error: 0,
        at: 0,
    },
    Row {
        name: "#GP: 16 bytes",
        code: long_instruction,
        vector: 13,
        error: 0,
        at: 0,
    },
    Row {
        name: "#UD: again",
        code: undefined,
        vector: 6,
        error: 0,
        at: 0,
    },
];

pub(crate) fn table(device: &Device) -> Outcome {
    for row in ROWS {
        let code = (row.code)();
        let (machine, cpu) = start(device, code)?;
        handlers::set_resume(&machine.memory, CODE + code.len() as u64 - 2);
        cpu.run_until_done().map_err(|fail| fail.during(row.name))?;
        let record = Record::read(&machine.memory);
        check_eq!(
            (record.count, record.vector, record.error),
            (1, row.vector, row.error),
            "{}: exceptions, vector, error code",
            row.name
        );
        check_eq!(record.rip, CODE + row.at, "{}: RIP", row.name);
    }
    // INT n pushes no error code, so the handler of vector 13 would take RIP for it: only that the
    // vector is reached can be seen. The stub's extra word is this test's, not the CPU's.
    let (machine, cpu) = start(device, software())?;
    let exit = cpu.run()?;
    check!(
        !exit.is_done() && Record::read(&machine.memory).vector == 13,
        "INT 13: {exit:x?}"
    );
    Ok(())
}

guest_code!(
    touch,
    code64,
    [
        "mov rbx, 0x300000",
        "test edi, edi",
        "jnz 2f",
        "mov rax, [rbx]",
        "jmp 4f",
        "2: cmp edi, 1",
        "jne 3f",
        "mov [rbx + 8], rax",
        "jmp 4f",
        "3: jmp rbx",
        "4: out {done}, al",
    ],
    done = DONE_PORT
);

/// #PF is the guest's alone: CR2 and error code, no exit (SDM volume 3, section 5.7).
pub(crate) fn page_fault(device: &Device) -> Outcome {
    const ADDRESS: u64 = 0x30_0000;
    /// The entry for that address in the table of 2 MiB pages.
    const ENTRY: u64 = PAGE_TABLES + 0x2000 + 8;
    let no_execute = 1 << 63;
    let present = 0x20_0083_u64;
    for (name, entry, what, error, cr2) in [
        ("reading what is not present", 0, 0, 0, ADDRESS),
        ("writing what is not present", 0, 1, 2, ADDRESS + 8),
        ("writing what is read-only", present & !2, 1, 3, ADDRESS + 8),
        ("executing what is not present", 0, 2, 0x10, ADDRESS),
        (
            "executing what may not be",
            present | no_execute,
            2,
            0x11,
            ADDRESS,
        ),
        ("a reserved bit", present | (1 << 13), 0, 9, ADDRESS),
    ] {
        let (machine, cpu) = start(device, touch())?;
        machine.memory.write_u64(ENTRY, entry);
        handlers::set_resume(&machine.memory, CODE + touch().len() as u64 - 2);
        let mut sregs = cpu.sregs()?;
        // Write protection for the kernel too; NXE.
        sregs.cr0 |= 1 << 16;
        sregs.efer |= 1 << 11;
        cpu.set_sregs(&sregs)?;
        let mut regs = cpu.regs()?;
        regs.rdi = what;
        cpu.set_regs(&regs)?;
        cpu.run_until_done().map_err(|fail| fail.during(name))?;
        let record = Record::read(&machine.memory);
        check_eq!(
            (record.count, record.vector, record.cr2),
            (1, 14, cr2),
            "{name}: exceptions, vector, CR2"
        );
        // Without NXE in use, a fetch is not told apart; here it is on.
        check_eq!(record.error, error, "{name}: error code");
    }
    Ok(())
}

guest_code!(
    twice,
    code64,
    [
        "ud2",
        "out {done}, al",
        "mov qword ptr [{data}], 1",
        "ud2",
        "out {done}, al",
    ],
    data = DATA,
    done = DONE_PORT
);

/// Exceptions one after the other, with an exit between; the stack is as before.
pub(crate) fn nested_in_handler(device: &Device) -> Outcome {
    let (machine, cpu) = start(device, twice())?;
    handlers::set_resume(&machine.memory, CODE + 2);
    cpu.run_until_done()?;
    handlers::set_resume(&machine.memory, CODE + twice().len() as u64 - 2);
    cpu.run_until_done()?;
    check_eq!(Record::read(&machine.memory).count, 2, "exceptions");
    check_eq!(machine.memory.read_u64(DATA), 1, "what ran between");
    check_eq!(cpu.regs()?.rsp, STACK, "RSP");
    Ok(())
}

// The trap flag is set by POPF; each instruction from the next but one on gives #DB. RESUME moves by the
// handler's own: the guest goes on at the last instruction, with TF cleared by hand.
guest_code!(
    stepping,
    code64,
    [
        "pushfq",
        "or qword ptr [rsp], 0x100",
        "popfq",
        "nop",
        "nop",
        "2: pushfq",
        "and qword ptr [rsp], -257",
        "popfq",
        "out {done}, al",
    ],
    done = DONE_PORT
);

/// #DB by the trap flag: RIP behind the instruction, DR6.BS set.
pub(crate) fn single_step(device: &Device) -> Outcome {
    let (machine, cpu) = start(device, stepping())?;
    let code = stepping();
    handlers::set_resume(&machine.memory, CODE + code.len() as u64 - 2);
    cpu.run_until_done()?;
    let record = Record::read(&machine.memory);
    check_eq!(record.vector, 1, "the vector");
    // The last one traps behind the OUT's predecessor only where TF is still set in the restored flags.
    check!(
        record.rip > CODE + 10 && record.rip <= CODE + code.len() as u64,
        "RIP {:#x}",
        record.rip
    );
    check_eq!(
        cpu.fd.get_debug_regs()?.dr6 & 0x4000,
        0x4000,
        "DR6's single-step bit"
    );
    Ok(())
}
