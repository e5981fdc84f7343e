// SPDX-License-Identifier: GPL-2.0
//! Forms that read, change and write addresses without memory: exchanges, bits, the stack, strings.

use crate::mmio::{answer_read, write};
use crate::start;
use rvisor_tests::guest::{self, Mode};
use rvisor_tests::layout::{DATA, DONE_PORT, FREE_PORT, HOLE, MEMORY};
use rvisor_tests::mapping::Mapping;
use rvisor_tests::{check_eq, guest_code, Context, Device, Exit, Fail, Machine, Outcome};

/// A form that KVM does not emulate: KVM's own answer is an internal error.
pub(crate) fn unless_kvm(device: &Device, form: &str) -> Outcome {
    if device.path().ends_with("/kvm") {
        return Err(Fail::skip(format!("KVM does not emulate {form}")));
    }
    Ok(())
}

guest_code!(
    exchange_all,
    code64,
    [
        "mov r12, {hole}",
        "mov ecx, 5",
        "lock xadd [r12], ecx",
        // Equal, then unequal.
        "mov eax, 7",
        "mov edx, 9",
        "lock cmpxchg [r12 + 4], edx",
        "setz r8b",
        "cmpxchg [r12 + 4], edx",
        "setz r9b",
        "mov r10, rax",
        // Likewise 8 bytes.
        "mov eax, 0x11111111",
        "mov edx, 0x22222222",
        "mov ebx, 0x33333333",
        "mov r11, rcx",
        "mov ecx, 0x44444444",
        "lock cmpxchg8b [r12 + 8]",
        "setz r13b",
        "lock cmpxchg8b [r12 + 8]",
        "setz r14b",
        "out {done}, al",
    ],
    hole = HOLE,
    done = DONE_PORT
);

pub(crate) fn exchanges(device: &Device) -> Outcome {
    let (_machine, cpu) = start(device, exchange_all())?;
    answer_read(&cpu, HOLE, &[0xff, 0xff, 0xff, 0xff])?;
    cpu.run_expecting(&write(HOLE, &[4, 0, 0, 0]))?;
    answer_read(&cpu, HOLE + 4, &[7, 0, 0, 0])?;
    cpu.run_expecting(&write(HOLE + 4, &[9, 0, 0, 0]))?;
    // What is unequal is written back.
    answer_read(&cpu, HOLE + 4, &[8, 0, 0, 0])?;
    cpu.run_expecting(&write(HOLE + 4, &[8, 0, 0, 0]))?;
    let equal = [0x11, 0x11, 0x11, 0x11, 0x22, 0x22, 0x22, 0x22];
    answer_read(&cpu, HOLE + 8, &equal)?;
    let new = [0x33, 0x33, 0x33, 0x33, 0x44, 0x44, 0x44, 0x44];
    cpu.run_expecting(&write(HOLE + 8, &new))?;
    let unequal = [1, 2, 3, 4, 5, 6, 7, 8];
    answer_read(&cpu, HOLE + 8, &unequal)?;
    cpu.run_expecting(&write(HOLE + 8, &unequal))?;
    cpu.run_until_done()?;
    let regs = cpu.regs()?;
    check_eq!(regs.r11, 0xffff_ffff, "ECX after XADD");
    check_eq!((regs.r8 & 0xff, regs.r9 & 0xff), (1, 0), "ZF of CMPXCHG");
    check_eq!(regs.r10, 8, "EAX after the unequal CMPXCHG");
    check_eq!(
        (regs.r13 & 0xff, regs.r14 & 0xff),
        (1, 0),
        "ZF of CMPXCHG8B"
    );
    check_eq!(
        (regs.rax, regs.rdx),
        (0x0403_0201, 0x0807_0605),
        "EDX:EAX after the unequal CMPXCHG8B"
    );
    Ok(())
}

guest_code!(
    exchange_16,
    code64,
    [
        "mov r12, {hole}",
        "movabs rax, 0x1111111111111111",
        "movabs rdx, 0x2222222222222222",
        "movabs rbx, 0x3333333333333333",
        "movabs rcx, 0x4444444444444444",
        "lock cmpxchg16b [r12]",
        "setz r8b",
        "lock cmpxchg16b [r12]",
        "setz r9b",
        "out {done}, al",
    ],
    hole = HOLE,
    done = DONE_PORT
);

/// CMPXCHG16B: two exits of 8 bytes each way.
pub(crate) fn exchange_16_bytes(device: &Device) -> Outcome {
    unless_kvm(device, "CMPXCHG16B")?;
    let (_machine, cpu) = start(device, exchange_16())?;
    answer_read(&cpu, HOLE, &[0x11; 8])?;
    answer_read(&cpu, HOLE + 8, &[0x22; 8])?;
    cpu.run_expecting(&write(HOLE, &[0x33; 8]))?;
    cpu.run_expecting(&write(HOLE + 8, &[0x44; 8]))?;
    answer_read(&cpu, HOLE, &[0x11; 8])?;
    answer_read(&cpu, HOLE + 8, &[0x55; 8])?;
    cpu.run_expecting(&write(HOLE, &[0x11; 8]))?;
    cpu.run_expecting(&write(HOLE + 8, &[0x55; 8]))?;
    cpu.run_until_done()?;
    let regs = cpu.regs()?;
    check_eq!((regs.r8 & 0xff, regs.r9 & 0xff), (1, 0), "ZF");
    check_eq!(
        (regs.rax, regs.rdx),
        (0x1111_1111_1111_1111, 0x5555_5555_5555_5555),
        "RDX:RAX"
    );
    Ok(())
}

/// The same on memory, which is exchanged in one step. The emulator comes there where userspace gives the
/// guest another address before it answers the read.
pub(crate) fn exchange_16_in_memory(device: &Device) -> Outcome {
    unless_kvm(device, "CMPXCHG16B")?;
    let (machine, cpu) = start(device, exchange_16())?;
    machine.memory.write(DATA, &[0x11; 8]);
    machine.memory.write(DATA + 8, &[0x22; 8]);
    cpu.run_expecting(&Exit::MmioRead {
        address: HOLE,
        length: 8,
    })?;
    let mut regs = cpu.regs()?;
    regs.r12 = DATA;
    cpu.set_regs(&regs)?;
    cpu.answer_mmio(&[0xff; 8]);
    cpu.run_until_done()?;
    let expected = [[0x33; 8], [0x44; 8]].concat();
    check_eq!(machine.memory.read(DATA, 16), expected, "the memory");
    let regs = cpu.regs()?;
    check_eq!((regs.r8 & 0xff, regs.r9 & 0xff), (1, 0), "ZF");
    check_eq!(
        (regs.rax, regs.rdx),
        (0x3333_3333_3333_3333, 0x4444_4444_4444_4444),
        "RDX:RAX, by the CPU's own second one"
    );
    Ok(())
}

guest_code!(
    bits_all,
    code64,
    [
        "mov r12, {hole} + 0x100",
        // Bit 100 of the doublewords is bit 4 of the fourth; bit -1 is the top of the one before.
        "mov eax, 100",
        "bts [r12], eax",
        "setc r8b",
        "mov eax, -1",
        "lock btr [r12], eax",
        "setc r9b",
        "mov rax, -65",
        "btc [r12], rax",
        "setc r10b",
        // An immediate stays inside.
        "bt dword ptr [r12], 33",
        "setc r11b",
        "out {done}, al",
    ],
    hole = HOLE,
    done = DONE_PORT
);

pub(crate) fn bits(device: &Device) -> Outcome {
    let (_machine, cpu) = start(device, bits_all())?;
    let base = HOLE + 0x100;
    answer_read(&cpu, base + 12, &[0x01, 0, 0, 0])?;
    cpu.run_expecting(&write(base + 12, &[0x11, 0, 0, 0]))?;
    answer_read(&cpu, base - 4, &[0xff, 0, 0, 0x80])?;
    cpu.run_expecting(&write(base - 4, &[0xff, 0, 0, 0]))?;
    answer_read(&cpu, base - 16, &[0, 0, 0, 0, 0, 0, 0, 0x80])?;
    cpu.run_expecting(&write(base - 16, &[0; 8]))?;
    answer_read(&cpu, base, &[2, 0, 0, 0])?;
    cpu.run_until_done()?;
    let regs = cpu.regs()?;
    let carries = [regs.r8, regs.r9, regs.r10, regs.r11].map(|value| value & 0xff);
    check_eq!(carries, [0, 1, 1, 1], "CF of BTS, BTR, BTC and BT");
    Ok(())
}

guest_code!(
    carry_all,
    code64,
    [
        "mov r12, {hole}",
        "stc",
        "adc word ptr [r12], 0x7fff",
        "seto r8b",
        "mov eax, 1",
        "stc",
        "sbb eax, [r12 + 4]",
        "setc r9b",
        // INC and DEC leave CF, which SBB set.
        "inc byte ptr [r12 + 8]",
        "setc r10b",
        "lock dec qword ptr [r12 + 16]",
        "setz r11b",
        "not dword ptr [r12 + 24]",
        "neg word ptr [r12 + 28]",
        "setc r13b",
        "mov rdi, r12",
        "xor [rdi + 30], bh",
        "sub dword ptr [r12 + 32], -1",
        "out {done}, al",
    ],
    hole = HOLE,
    done = DONE_PORT
);

pub(crate) fn carries_and_counts(device: &Device) -> Outcome {
    let (_machine, cpu) = start(device, carry_all())?;
    answer_read(&cpu, HOLE, &[0, 0])?;
    cpu.run_expecting(&write(HOLE, &[0, 0x80]))?;
    answer_read(&cpu, HOLE + 4, &[3, 0, 0, 0])?;
    answer_read(&cpu, HOLE + 8, &[0xff])?;
    cpu.run_expecting(&write(HOLE + 8, &[0]))?;
    answer_read(&cpu, HOLE + 16, &[1, 0, 0, 0, 0, 0, 0, 0])?;
    cpu.run_expecting(&write(HOLE + 16, &[0; 8]))?;
    answer_read(&cpu, HOLE + 24, &[0x0f, 0xff, 0, 0])?;
    cpu.run_expecting(&write(HOLE + 24, &[0xf0, 0, 0xff, 0xff]))?;
    answer_read(&cpu, HOLE + 28, &[1, 0])?;
    cpu.run_expecting(&write(HOLE + 28, &[0xff, 0xff]))?;
    answer_read(&cpu, HOLE + 30, &[0x5a])?;
    cpu.run_expecting(&write(HOLE + 30, &[0x5a]))?;
    answer_read(&cpu, HOLE + 32, &[0xff, 0xff, 0, 0])?;
    cpu.run_expecting(&write(HOLE + 32, &[0, 0, 1, 0]))?;
    cpu.run_until_done()?;
    let regs = cpu.regs()?;
    check_eq!(regs.r8 & 0xff, 1, "OF after ADC");
    check_eq!(regs.rax, 0xffff_fffd, "EAX after SBB");
    let flags = [regs.r9, regs.r10, regs.r11, regs.r13].map(|value| value & 0xff);
    check_eq!(
        flags,
        [1, 1, 1, 1],
        "CF after SBB and INC, ZF after DEC, CF after NEG"
    );
    Ok(())
}

guest_code!(
    push_pop,
    code64,
    [
        "mov r12, {hole}",
        "mov r13, rsp",
        "push qword ptr [r12]",
        "push word ptr [r12 + 8]",
        "pop word ptr [r12 + 16]",
        "pop qword ptr [r12 + 24]",
        "sub r13, rsp",
        // The address is that after POP: with the stack pointer 8 further.
        "mov rsp, {data}",
        "pop qword ptr [rsp + {hole} - {data}]",
        "mov r14, rsp",
        "out {done}, al",
    ],
    hole = HOLE,
    data = DATA,
    done = DONE_PORT
);

/// PUSH and POP with a device as their operand.
pub(crate) fn stack(device: &Device) -> Outcome {
    let (machine, cpu) = start(device, push_pop())?;
    machine.memory.write_u64(DATA, 0x1122_3344_5566_7788);
    let value = [1, 2, 3, 4, 5, 6, 7, 8];
    answer_read(&cpu, HOLE, &value)?;
    answer_read(&cpu, HOLE + 8, &[9, 10])?;
    cpu.run_expecting(&write(HOLE + 16, &[9, 10]))?;
    cpu.run_expecting(&write(HOLE + 24, &value))?;
    let popped = 0x1122_3344_5566_7788_u64.to_le_bytes();
    cpu.run_expecting(&write(HOLE + 8, &popped))?;
    cpu.run_until_done()?;
    let regs = cpu.regs()?;
    check_eq!(regs.r13, 0, "what the stack pointer moved");
    check_eq!(regs.r14, DATA + 8, "RSP");
    Ok(())
}

guest_code!(
    device_stack,
    code64,
    [
        "mov rax, rsp",
        "mov rsp, {hole} + 0x1000",
        "movabs rbx, 0x1122334455667788",
        "push rbx",
        "push -2",
        "push 0x12345678",
        "pop rcx",
        "pop dx",
        "mov rdi, rsp",
        "mov rsp, rax",
        "out {done}, al",
    ],
    hole = HOLE,
    done = DONE_PORT
);

/// PUSH and POP with the stack on a device.
pub(crate) fn stack_on_a_device(device: &Device) -> Outcome {
    let (_machine, cpu) = start(device, device_stack())?;
    let top = HOLE + 0x1000;
    let pushed = 0x1122_3344_5566_7788_u64.to_le_bytes();
    cpu.run_expecting(&write(top - 8, &pushed))?;
    cpu.run_expecting(&write(top - 16, &(-2_i64).to_le_bytes()))?;
    cpu.run_expecting(&write(top - 24, &0x1234_5678_u64.to_le_bytes()))?;
    answer_read(&cpu, top - 24, &[1, 2, 3, 4, 5, 6, 7, 8])?;
    answer_read(&cpu, top - 16, &[0xaa, 0xbb])?;
    cpu.run_until_done()?;
    let regs = cpu.regs()?;
    check_eq!(regs.rcx, 0x0807_0605_0403_0201, "RCX");
    check_eq!(regs.rdx & 0xffff, 0xbbaa, "DX");
    check_eq!(regs.rdi, top - 14, "RSP");
    Ok(())
}

guest_code!(
    compare_strings,
    code64,
    [
        "cld",
        "mov rsi, {hole}",
        "mov rdi, {data}",
        "mov ecx, 5",
        "repe cmpsb",
        "setb r8b",
        "mov r9, rcx",
        "mov eax, 0x2222",
        "mov rdi, {hole} + 0x10",
        "mov ecx, 3",
        "repne scasw",
        "setz r10b",
        "mov r11, rcx",
        "std",
        "mov rsi, {hole} + 0x24",
        "mov ecx, 2",
        "rep lodsd",
        "mov r13, rsi",
        "cld",
        "out {done}, al",
    ],
    hole = HOLE,
    data = DATA,
    done = DONE_PORT
);

pub(crate) fn string_compares(device: &Device) -> Outcome {
    let (machine, cpu) = start(device, compare_strings())?;
    machine.memory.write(DATA, b"abcde");
    answer_read(&cpu, HOLE, b"a")?;
    answer_read(&cpu, HOLE + 1, b"b")?;
    answer_read(&cpu, HOLE + 2, b"B")?;
    answer_read(&cpu, HOLE + 0x10, &[0x11, 0x11])?;
    answer_read(&cpu, HOLE + 0x12, &[0x22, 0x22])?;
    answer_read(&cpu, HOLE + 0x24, &[1, 1, 1, 1])?;
    answer_read(&cpu, HOLE + 0x20, &[4, 3, 2, 1])?;
    cpu.run_until_done()?;
    let regs = cpu.regs()?;
    check_eq!((regs.r8 & 0xff, regs.r9), (1, 2), "CF and RCX after CMPS");
    check_eq!((regs.r10 & 0xff, regs.r11), (1, 1), "ZF and RCX after SCAS");
    check_eq!(
        (regs.rax & 0xffff_ffff, regs.r13),
        (0x0102_0304, HOLE + 0x1c),
        "EAX and RSI after LODS"
    );
    Ok(())
}

guest_code!(
    port_strings,
    code64,
    [
        "cld",
        "mov dx, {port}",
        "mov rsi, {hole}",
        "outsb",
        "mov ecx, 2",
        "rep outsd",
        "mov rdi, {hole} + 0x10",
        "insw",
        // Half in memory, half behind its end, both ways.
        "mov rdi, {end} - 2",
        "insd",
        "mov rsi, {end} - 2",
        "outsd",
        "out {done}, al",
    ],
    port = FREE_PORT,
    hole = HOLE,
    end = MEMORY as u64,
    done = DONE_PORT
);

/// INS and OUTS between a port and an address without memory: an exit for each.
pub(crate) fn string_ports(device: &Device) -> Outcome {
    let (machine, cpu) = start(device, port_strings())?;
    let end = MEMORY as u64;
    let out = |data: &[u8]| Exit::Out {
        port: FREE_PORT,
        size: data.len() as u8,
        data: data.to_vec(),
    };
    let input = |size| Exit::In {
        port: FREE_PORT,
        size,
        count: 1,
    };
    answer_read(&cpu, HOLE, &[0x11])?;
    cpu.run_expecting(&out(&[0x11]))?;
    answer_read(&cpu, HOLE + 1, &[1, 2, 3, 4])?;
    cpu.run_expecting(&out(&[1, 2, 3, 4]))?;
    answer_read(&cpu, HOLE + 5, &[5, 6, 7, 8])?;
    cpu.run_expecting(&out(&[5, 6, 7, 8]))?;
    cpu.run_expecting(&input(2))?;
    cpu.answer_io(&[0xaa, 0xbb]);
    cpu.run_expecting(&write(HOLE + 0x10, &[0xaa, 0xbb]))?;
    cpu.run_expecting(&input(4))?;
    cpu.answer_io(&[0x21, 0x22, 0x23, 0x24]);
    cpu.run_expecting(&write(end, &[0x23, 0x24]))?;
    answer_read(&cpu, end, &[0x33, 0x34])?;
    cpu.run_expecting(&out(&[0x21, 0x22, 0x33, 0x34]))?;
    cpu.run_until_done()?;
    let regs = cpu.regs()?;
    check_eq!(
        machine.memory.read(end - 2, 2),
        [0x21, 0x22],
        "the memory's part"
    );
    check_eq!(regs.rcx, 0, "RCX");
    check_eq!((regs.rsi, regs.rdi), (end + 2, end + 2), "RSI and RDI");
    Ok(())
}

/// Without memory, below 1 MiB.
const REAL_HOLE: u64 = 0xa_0000;

guest_code!(
    real_all,
    code16,
    [
        "mov ax, 0xa000",
        "mov es, ax",
        "mov ds, ax",
        "xor di, di",
        "mov ax, 0x1234",
        "stosw",
        "mov cx, 2",
        "mov al, 0x55",
        "rep stosb",
        "xor si, si",
        "lodsb",
        "xchg [si], ah",
        "mov bp, 0x10",
        // By the stack's segment, whose base is 0: memory.
        "mov byte ptr [bp], 0x77",
        "mov byte ptr ds:[bp], 0x78",
        "push word ptr [si + 0x1f]",
        "pop dx",
        // The stack on the device, with a stack pointer of 16 bits.
        "mov cx, sp",
        "mov bx, 0xa000",
        "mov ss, bx",
        "mov sp, 0",
        "push dx",
        "pop bx",
        "xor di, di",
        "mov ss, di",
        "mov sp, cx",
        "out {done}, al",
    ],
    done = DONE_PORT
);

/// Real mode: segments, 16-bit addresses and a 16-bit stack.
pub(crate) fn real_mode(device: &Device) -> Outcome {
    let machine = Machine::new(device)?;
    // A second slot would be in the way: the hole is cut out of the first.
    machine.set_slot(0, 0, 0, &machine.memory, 0, 0)?;
    machine.set_slot(0, 0, 0, &machine.memory, 0, REAL_HOLE as usize)?;
    let cpu = machine.vcpu(0)?;
    guest::load(&machine, &cpu, Mode::Real, real_all())?;
    cpu.run_expecting(&write(REAL_HOLE, &[0x34, 0x12]))?;
    cpu.run_expecting(&write(REAL_HOLE + 2, &[0x55]))?;
    cpu.run_expecting(&write(REAL_HOLE + 3, &[0x55]))?;
    answer_read(&cpu, REAL_HOLE, &[0x99])?;
    answer_read(&cpu, REAL_HOLE + 1, &[0x66])?;
    cpu.run_expecting(&write(REAL_HOLE + 1, &[0x12]))?;
    cpu.run_expecting(&write(REAL_HOLE + 0x10, &[0x78]))?;
    answer_read(&cpu, REAL_HOLE + 0x20, &[0xcd, 0xab])?;
    cpu.run_expecting(&write(REAL_HOLE + 0xfffe, &[0xcd, 0xab]))?;
    answer_read(&cpu, REAL_HOLE + 0xfffe, &[0xef, 0xbe])?;
    cpu.run_until_done()?;
    let regs = cpu.regs()?;
    check_eq!(machine.memory.read(0x10, 1), [0x77], "memory by SS");
    check_eq!(regs.rax & 0xffff, 0x6699, "AX");
    check_eq!(regs.rdx & 0xffff, 0xabcd, "DX");
    check_eq!(regs.rbx & 0xffff, 0xbeef, "BX");
    Ok(())
}

guest_code!(
    locked_read_only,
    code64,
    [
        "mov r12, {rom}",
        "mov eax, 1",
        "lock xadd [r12], eax",
        "mov r8, rax",
        "lock bts dword ptr [r12 + 4], 3",
        "out {done}, al",
    ],
    rom = MEMORY as u64,
    done = DONE_PORT
);

/// A locked write to read-only memory: it is read there, and userspace gets the write.
pub(crate) fn locked_in_read_only_memory(device: &Device) -> Outcome {
    let (machine, cpu) = start(device, locked_read_only())?;
    let rom = MEMORY as u64;
    let contents = Mapping::anonymous(0x1000).during("memory for the ROM")?;
    contents.write(0, &[0x10, 0, 0, 0, 0x20, 0, 0, 0]);
    machine.set_slot(1, kvm_bindings::KVM_MEM_READONLY, rom, &contents, 0, 0x1000)?;
    cpu.run_expecting(&Exit::MmioWrite {
        address: rom,
        data: vec![0x11, 0, 0, 0],
    })?;
    cpu.run_expecting(&write(rom + 4, &[0x28, 0, 0, 0]))?;
    cpu.run_until_done()?;
    check_eq!(cpu.regs()?.r8, 0x10, "EAX after XADD");
    check_eq!(contents.read(0, 4), [0x10, 0, 0, 0], "the ROM");
    Ok(())
}
