// SPDX-License-Identifier: GPL-2.0
//! Accesses to addresses without memory.

use crate::start;
use kvm_bindings as kb;
use rvisor_tests::guest::{self, Mode};
use rvisor_tests::layout::{CODE, DATA, DONE_PORT, HOLE, MEMORY};
use rvisor_tests::mapping::Mapping;
use rvisor_tests::raw::Errno;
use rvisor_tests::{check, check_eq, guest_code, Cpu, Device, Exit, Machine, Outcome};

guest_code!(
    write_all,
    code64,
    [
        "mov rbx, {hole}",
        "movabs rax, 0x8877665544332211",
        "mov [rbx], al",
        "mov [rbx + 2], ax",
        "mov [rbx + 4], eax",
        "mov [rbx + 8], rax",
        "mov [rbx + 16], ah",
        "mov byte ptr [rbx + 17], 0x5a",
        "mov word ptr [rbx + 18], 0x1234",
        "mov dword ptr [rbx + 20], 0x12345678",
        "mov qword ptr [rbx + 24], -2",
        "mov r13, 4",
        "mov [rbx + 8 * r13 + 0x100], r13d",
        "out {done}, al",
    ],
    hole = HOLE,
    done = DONE_PORT
);

/// The exit for a write of these bytes.
pub(crate) fn write(address: u64, data: &[u8]) -> Exit {
    Exit::MmioWrite {
        address,
        data: data.to_vec(),
    }
}

pub(crate) fn write_sizes(device: &Device) -> Outcome {
    let (_machine, cpu) = start(device, write_all())?;
    let rax = [0x11, 0x22, 0x33, 0x44, 0x55, 0x66, 0x77, 0x88];
    for (offset, data) in [
        (0, &rax[..1]),
        (2, &rax[..2]),
        (4, &rax[..4]),
        (8, &rax),
        (16, &[0x22]),
        (17, &[0x5a]),
        (18, &[0x34, 0x12]),
        (20, &[0x78, 0x56, 0x34, 0x12]),
        (24, &[0xfe, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]),
        (0x120, &[4, 0, 0, 0]),
    ] {
        cpu.run_expecting(&write(HOLE + offset, data))?;
    }
    cpu.run_until_done()
}

/// Runs until the guest reads `length` bytes of this address and answers with `data`.
pub(crate) fn answer_read(cpu: &Cpu, address: u64, data: &[u8]) -> Outcome {
    cpu.run_expecting(&Exit::MmioRead {
        address,
        length: data.len() as u32,
    })?;
    cpu.answer_mmio(data);
    Ok(())
}

guest_code!(
    read_all,
    code64,
    [
        "mov r12, {hole}",
        "mov rax, -1",
        "mov rbx, rax",
        "mov rcx, rax",
        "mov rdx, rax",
        "mov rsi, rax",
        "mov al, [r12]",
        "mov rdi, r12",
        "mov bh, [rdi + 1]",
        "mov cx, [r12 + 2]",
        "mov edx, [r12 + 4]",
        "mov rsi, [r12 + 8]",
        "mov r8d, [r12]",
        "out {done}, al",
    ],
    hole = HOLE,
    done = DONE_PORT
);

pub(crate) fn read_sizes(device: &Device) -> Outcome {
    let (_machine, cpu) = start(device, read_all())?;
    answer_read(&cpu, HOLE, &[0x11])?;
    answer_read(&cpu, HOLE + 1, &[0x22])?;
    answer_read(&cpu, HOLE + 2, &[0x33, 0x44])?;
    answer_read(&cpu, HOLE + 4, &[1, 2, 3, 4])?;
    answer_read(&cpu, HOLE + 8, &[1, 2, 3, 4, 5, 6, 7, 8])?;
    answer_read(&cpu, HOLE, &[9, 9, 9, 0x99])?;
    cpu.run_until_done()?;
    let regs = cpu.regs()?;
    check_eq!(regs.rax, 0xffff_ffff_ffff_ff11, "AL");
    check_eq!(regs.rbx, 0xffff_ffff_ffff_22ff, "BH");
    check_eq!(regs.rcx, 0xffff_ffff_ffff_4433, "CX");
    check_eq!(regs.rdx, 0x0403_0201, "EDX clears the upper half");
    check_eq!(regs.rsi, 0x0807_0605_0403_0201, "RSI");
    check_eq!(regs.r8, 0x9909_0909, "R8D clears the upper half");
    Ok(())
}

guest_code!(
    extend_all,
    code64,
    [
        "mov r12, {hole}",
        "movzx eax, byte ptr [r12]",
        "movzx ebx, word ptr [r12 + 2]",
        "movsx ecx, byte ptr [r12]",
        "movsx rdx, word ptr [r12 + 2]",
        "movsxd rsi, dword ptr [r12 + 4]",
        "mov rdi, -1",
        "movzx di, byte ptr [r12]",
        "out {done}, al",
    ],
    hole = HOLE,
    done = DONE_PORT
);

pub(crate) fn read_extends(device: &Device) -> Outcome {
    let (_machine, cpu) = start(device, extend_all())?;
    answer_read(&cpu, HOLE, &[0x81])?;
    answer_read(&cpu, HOLE + 2, &[0x82, 0x83])?;
    answer_read(&cpu, HOLE, &[0x84])?;
    answer_read(&cpu, HOLE + 2, &[0x85, 0x86])?;
    answer_read(&cpu, HOLE + 4, &[0x87, 0x88, 0x89, 0x8a])?;
    answer_read(&cpu, HOLE, &[0x8b])?;
    cpu.run_until_done()?;
    let regs = cpu.regs()?;
    check_eq!(regs.rax, 0x81, "MOVZX from a byte");
    check_eq!(regs.rbx, 0x8382, "MOVZX from a word");
    check_eq!(regs.rcx, 0xffff_ff84, "MOVSX from a byte to 32 bits");
    check_eq!(
        regs.rdx,
        0xffff_ffff_ffff_8685,
        "MOVSX from a word to 64 bits"
    );
    check_eq!(regs.rsi, 0xffff_ffff_8a89_8887, "MOVSXD");
    check_eq!(
        regs.rdi,
        0xffff_ffff_ffff_008b,
        "MOVZX to 16 bits leaves the rest"
    );
    Ok(())
}

guest_code!(
    modify_all,
    code64,
    [
        "mov r12, {hole}",
        "mov ecx, 0x0f0f0f0f",
        "and [r12], ecx",
        "setz al",
        "or dword ptr [r12 + 4], 1",
        "cmp dword ptr [r12 + 8], 5",
        "sete bl",
        "test byte ptr [r12 + 12], 0x80",
        "setnz bh",
        "mov rdx, 7",
        "xchg [r12 + 16], edx",
        "out {done}, al",
    ],
    hole = HOLE,
    done = DONE_PORT
);

/// Forms that read and write, or read and set the flags.
pub(crate) fn read_modify_write(device: &Device) -> Outcome {
    let (_machine, cpu) = start(device, modify_all())?;
    answer_read(&cpu, HOLE, &[0xf0, 0xf0, 0xf0, 0xf0])?;
    cpu.run_expecting(&write(HOLE, &[0, 0, 0, 0]))?;
    answer_read(&cpu, HOLE + 4, &[0x10, 0, 0, 0])?;
    cpu.run_expecting(&write(HOLE + 4, &[0x11, 0, 0, 0]))?;
    answer_read(&cpu, HOLE + 8, &[5, 0, 0, 0])?;
    answer_read(&cpu, HOLE + 12, &[0xff])?;
    answer_read(&cpu, HOLE + 16, &[0x21, 0x43, 0, 0])?;
    cpu.run_expecting(&write(HOLE + 16, &[7, 0, 0, 0]))?;
    cpu.run_until_done()?;
    let regs = cpu.regs()?;
    check_eq!(regs.rax & 0xff, 1, "ZF after AND");
    check_eq!(
        regs.rbx & 0xffff,
        0x0101,
        "ZF after CMP, ZF clear after TEST"
    );
    check_eq!(regs.rdx, 0x4321, "EDX after XCHG");
    Ok(())
}

guest_code!(
    move_strings,
    code64,
    [
        "cld",
        "mov rdi, {hole}",
        "mov eax, 0x04030201",
        "mov ecx, 2",
        "rep stosd",
        "mov rsi, {data}",
        "mov ecx, 2",
        "rep movsb",
        "mov rsi, {hole}",
        "mov rdi, {data} + 8",
        "mov ecx, 2",
        "rep movsw",
        "out {done}, al",
    ],
    hole = HOLE,
    data = DATA,
    done = DONE_PORT
);

pub(crate) fn string_moves(device: &Device) -> Outcome {
    let (machine, cpu) = start(device, move_strings())?;
    machine.memory.write(DATA, &[0xaa, 0xbb]);
    for offset in [0, 4] {
        cpu.run_expecting(&write(HOLE + offset, &[1, 2, 3, 4]))?;
    }
    cpu.run_expecting(&write(HOLE + 8, &[0xaa]))?;
    cpu.run_expecting(&write(HOLE + 9, &[0xbb]))?;
    answer_read(&cpu, HOLE, &[0x11, 0x22])?;
    answer_read(&cpu, HOLE + 2, &[0x33, 0x44])?;
    cpu.run_until_done()?;
    check_eq!(
        machine.memory.read(DATA + 8, 4),
        [0x11, 0x22, 0x33, 0x44],
        "the memory after MOVSW"
    );
    check_eq!(cpu.regs()?.rcx, 0, "RCX");
    Ok(())
}

guest_code!(
    cross,
    code64,
    [
        "mov rbx, {hole} + 0x1000 - 3",
        "movabs rax, 0x8877665544332211",
        "mov [rbx], rax",
        "mov rcx, [rbx]",
        // Half in memory, half behind its end.
        "mov rbx, {end} - 2",
        "mov [rbx], eax",
        "mov edx, [rbx]",
        "out {done}, al",
    ],
    hole = HOLE,
    end = MEMORY as u64,
    done = DONE_PORT
);

/// What crosses a page is one access of the guest's and an exit for each page.
pub(crate) fn page_crossing(device: &Device) -> Outcome {
    let (machine, cpu) = start(device, cross())?;
    let page = HOLE + 0x1000;
    let end = MEMORY as u64;
    cpu.run_expecting(&write(page - 3, &[0x11, 0x22, 0x33]))?;
    cpu.run_expecting(&write(page, &[0x44, 0x55, 0x66, 0x77, 0x88]))?;
    answer_read(&cpu, page - 3, &[1, 2, 3])?;
    answer_read(&cpu, page, &[4, 5, 6, 7, 8])?;
    cpu.run_expecting(&write(end, &[0x33, 0x44]))?;
    answer_read(&cpu, end, &[0x77, 0x88])?;
    cpu.run_until_done()?;
    let regs = cpu.regs()?;
    check_eq!(regs.rcx, 0x0807_0605_0403_0201, "RCX");
    check_eq!(
        machine.memory.read(end - 2, 2),
        [0x11, 0x22],
        "the memory's part"
    );
    check_eq!(regs.rdx, 0x8877_2211, "EDX");
    Ok(())
}

guest_code!(
    access32,
    code32,
    [
        "mov ebx, {hole}",
        "mov eax, 0x12345678",
        "mov [ebx + 4 * esi + 0x10], eax",
        "mov cx, [ebx]",
        "mov [{hole} + 0x20], al",
        "out {done}, al",
    ],
    hole = HOLE,
    done = DONE_PORT
);

pub(crate) fn protected_mode(device: &Device) -> Outcome {
    for mode in [Mode::Protected, Mode::Paged] {
        let machine = Machine::new(device)?;
        let cpu = machine.vcpu(0)?;
        guest::load(&machine, &cpu, mode, access32())?;
        cpu.run_expecting(&write(HOLE + 0x10, &[0x78, 0x56, 0x34, 0x12]))?;
        answer_read(&cpu, HOLE, &[0xcd, 0xab])?;
        cpu.run_expecting(&write(HOLE + 0x20, &[0x78]))?;
        cpu.run_until_done()?;
        check_eq!(cpu.regs()?.rcx & 0xffff, 0xabcd, "CX");
    }
    Ok(())
}

guest_code!(
    unknown,
    code64,
    ["mov rbx, {hole}", "fld qword ptr [rbx]", "out {done}, al",],
    hole = HOLE,
    done = DONE_PORT
);

/// An instruction on device memory that is not emulated ends in KVM_EXIT_INTERNAL_ERROR with its bytes.
pub(crate) fn unknown_form(device: &Device) -> Outcome {
    const EMULATION: u32 = kvm_bindings::KVM_INTERNAL_ERROR_EMULATION;
    let (_machine, cpu) = start(device, unknown())?;
    let exit = cpu.run()?;
    check!(exit == Exit::Internal(EMULATION), "{exit:x?}");
    let data = cpu.internal_data();
    check!(data.len() >= 3, "{} words of data", data.len());
    check_eq!(data[0] & 1, 1, "the flag that says that there are bytes");
    let bytes = data[1].to_le_bytes();
    check!(bytes[0] >= 2, "{} bytes", bytes[0]);
    check_eq!(bytes[1..3], [0xdd, 0x03], "the instruction's bytes");
    Ok(())
}

guest_code!(
    move_then_read,
    code64,
    ["movsq", "mov rax, [rsi]", "out {done}, al"],
    done = DONE_PORT
);

/// What was read for an instruction that could not be finished does not serve another one.
pub(crate) fn read_of_another_instruction(device: &Device) -> Outcome {
    const SLOT: u64 = 0x0c00_0000;
    let (machine, cpu) = start(device, move_then_read())?;
    let gone = Mapping::anonymous(4096)?;
    machine.set_slot(1, 0, SLOT, &gone, 0, 4096)?;
    // SAFETY: The mapping is only the guest's, and is not looked at again.
    let result = unsafe { libc::mprotect(gone.address().cast(), 4096, libc::PROT_NONE) };
    check_eq!(result, 0, "mprotect");
    let mut regs = cpu.regs()?;
    (regs.rsi, regs.rdi) = (HOLE, SLOT);
    cpu.set_regs(&regs)?;
    answer_read(&cpu, HOLE, &[0x11; 8])?;
    // There is nothing to write to. KVM makes device memory of it.
    let result = cpu.run_raw();
    check!(
        matches!(
            result,
            Err(Errno(libc::EFAULT)) | Ok(kvm_bindings::KVM_EXIT_MMIO)
        ),
        "{result:?}"
    );
    // Behind MOVSQ.
    regs.rip = CODE + 2;
    cpu.set_regs(&regs)?;
    answer_read(&cpu, HOLE, &[0x22; 8])?;
    cpu.run_until_done()?;
    check_eq!(cpu.regs()?.rax, 0x2222_2222_2222_2222, "RAX");
    Ok(())
}

guest_code!(undefined, code64, ["ud2"]);

/// An exception whose descriptor lies in device memory: nothing that can be carried out, with what it was.
pub(crate) fn delivery_through_device(device: &Device) -> Outcome {
    let (_machine, cpu) = start(device, undefined())?;
    let mut sregs = cpu.sregs()?;
    sregs.idt.base = HOLE;
    cpu.set_sregs(&sregs)?;
    let exit = cpu.run()?;
    check_eq!(
        exit,
        Exit::Internal(kb::KVM_INTERNAL_ERROR_DELIVERY_EV),
        "the exit"
    );
    let data = cpu.internal_data();
    check_eq!(data.len(), 5, "words of data");
    // A valid hardware exception, #UD; its gate has 16 bytes.
    check_eq!(
        data[0] & 0x8000_07ff,
        0x8000_0306,
        "what was being delivered"
    );
    check!(
        matches!(data[1], 48 | 49),
        "the exit's reason is {}",
        data[1]
    );
    check_eq!(data[3], HOLE + 16 * 6, "the address");
    Ok(())
}
