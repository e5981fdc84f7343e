// SPDX-License-Identifier: GPL-2.0
//! Port input and output.

use crate::start;
use rvisor_tests::guest::{self, Mode};
use rvisor_tests::layout::{DATA, DONE_PORT, FREE_PORT};
use rvisor_tests::{check, check_eq, guest_code, Device, Exit, Machine, Outcome};

guest_code!(
    out_all,
    code64,
    [
        "mov eax, 0x44332211",
        "mov dx, {port}",
        "out dx, al",
        "out dx, ax",
        "out dx, eax",
        "out 0x81, al",
        "out 0x82, eax",
        "out {done}, al",
    ],
    port = FREE_PORT,
    done = DONE_PORT
);

pub(crate) fn out_sizes(device: &Device) -> Outcome {
    let (_machine, cpu) = start(device, out_all())?;
    for (port, size, data) in [
        (FREE_PORT, 1, vec![0x11]),
        (FREE_PORT, 2, vec![0x11, 0x22]),
        (FREE_PORT, 4, vec![0x11, 0x22, 0x33, 0x44]),
        (0x81, 1, vec![0x11]),
        (0x82, 4, vec![0x11, 0x22, 0x33, 0x44]),
    ] {
        cpu.run_expecting(&Exit::Out { port, size, data })?;
        check!(
            cpu.io_data_offset() >= 4096 && cpu.io_data_offset() < 8192,
            "the data lies at {:#x}",
            cpu.io_data_offset()
        );
    }
    cpu.run_until_done()
}

guest_code!(
    in_all,
    code64,
    [
        "mov rax, -1",
        "mov rbx, rax",
        "mov dx, {port}",
        "in al, dx",
        "xchg rax, rbx",
        "in ax, dx",
        "mov rcx, rax",
        "mov rax, -1",
        "in eax, dx",
        "out {done}, al",
    ],
    port = FREE_PORT,
    done = DONE_PORT
);

pub(crate) fn in_sizes(device: &Device) -> Outcome {
    let (_machine, cpu) = start(device, in_all())?;
    for size in [1, 2, 4] {
        cpu.run_expecting(&Exit::In {
            port: FREE_PORT,
            size,
            count: 1,
        })?;
        cpu.answer_io(&[0x12, 0x34, 0x56, 0x78][..usize::from(size)]);
    }
    cpu.run_until_done()
}

/// One and two bytes leave the rest of RAX alone; four clear its upper half (SDM volume 1, 3.4.1.1).
pub(crate) fn in_merges(device: &Device) -> Outcome {
    let (_machine, cpu) = start(device, in_all())?;
    for answer in [&[0x12][..], &[0x12, 0x34], &[0x12, 0x34, 0x56, 0x78]] {
        let exit = cpu.run()?;
        check!(matches!(exit, Exit::In { .. }), "{exit:x?}");
        cpu.answer_io(answer);
    }
    cpu.run_until_done()?;
    let regs = cpu.regs()?;
    check_eq!(regs.rbx, 0xffff_ffff_ffff_ff12, "RAX after IN AL");
    check_eq!(regs.rcx, 0xffff_ffff_ffff_3412, "RAX after IN AX");
    check_eq!(regs.rax, 0x7856_3412, "RAX after IN EAX");
    Ok(())
}

guest_code!(
    outs,
    code64,
    [
        "cld",
        "mov rsi, {data}",
        "mov rcx, 10",
        "mov dx, {port}",
        "rep outsb",
        "mov rcx, 3",
        "rep outsd",
        "std",
        "mov rsi, {data} + 7",
        "mov rcx, 4",
        "rep outsw",
        "xor ecx, ecx",
        "rep outsb",
        "out {done}, al",
    ],
    data = DATA,
    port = FREE_PORT,
    done = DONE_PORT
);

/// A hypervisor may give several of a string's accesses in one exit or each in its own.
fn collect_out(
    cpu: &rvisor_tests::Cpu,
    size: u8,
    bytes: usize,
) -> Result<Vec<u8>, rvisor_tests::Fail> {
    let mut all = Vec::new();
    while all.len() < bytes {
        match cpu.run()? {
            Exit::Out {
                port: FREE_PORT,
                size: found,
                data,
            } if found == size => all.extend(data),
            other => return Err(cpu.unexpected(&other)),
        }
    }
    Ok(all)
}

pub(crate) fn outs_string(device: &Device) -> Outcome {
    let (machine, cpu) = start(device, outs())?;
    let data: Vec<u8> = (1..=32).collect();
    machine.memory.write(DATA, &data);
    check_eq!(collect_out(&cpu, 1, 10)?, data[..10], "REP OUTSB");
    check_eq!(collect_out(&cpu, 4, 12)?, data[10..22], "REP OUTSD");
    check_eq!(
        collect_out(&cpu, 2, 8)?,
        [8, 9, 6, 7, 4, 5, 2, 3],
        "REP OUTSW downwards"
    );
    cpu.run_until_done()?;
    let regs = cpu.regs()?;
    check_eq!(
        (regs.rcx, regs.rsi),
        (0, DATA + 7 - 8),
        "RCX and RSI at the end"
    );
    Ok(())
}

guest_code!(
    ins,
    code64,
    [
        "cld",
        "mov rdi, {data}",
        "mov rcx, 6",
        "mov dx, {port}",
        "rep insb",
        "mov rcx, 2",
        "rep insd",
        "insw",
        "out {done}, al",
    ],
    data = DATA,
    port = FREE_PORT,
    done = DONE_PORT
);

pub(crate) fn ins_string(device: &Device) -> Outcome {
    let (machine, cpu) = start(device, ins())?;
    machine.memory.write(DATA, &[0xee; 32]);
    let mut next = 1_u8;
    let mut given = Vec::new();
    for (wanted, bytes) in [(1, 6), (4, 8), (2, 2)] {
        let mut left = bytes;
        while left > 0 {
            let exit = cpu.run()?;
            let Exit::In {
                port: FREE_PORT,
                size,
                count,
            } = exit
            else {
                return Err(cpu.unexpected(&exit));
            };
            check_eq!(size, wanted, "the size");
            let length = usize::from(size) * count as usize;
            check!(length <= left, "{count} accesses at once are too many");
            let data: Vec<u8> = (0..length as u8).map(|index| next + index).collect();
            next += length as u8;
            cpu.answer_io(&data);
            given.extend(data);
            left -= length;
        }
    }
    cpu.run_until_done()?;
    given.extend([0xee; 16]);
    check_eq!(machine.memory.read(DATA, 32), given, "the guest's memory");
    let regs = cpu.regs()?;
    check_eq!((regs.rcx, regs.rdi), (0, DATA + 16), "RCX and RDI");
    Ok(())
}

// The source is DS:SI, so a segment's base counts; an override chooses another.
guest_code!(
    outs16,
    code16,
    [
        "cld",
        "mov ax, 0x100",
        "mov ds, ax",
        "mov ax, 0x200",
        "mov es, ax",
        "mov si, 0x10",
        "mov cx, 2",
        "mov dx, {port}",
        "rep outsb",
        "mov cx, 2",
        ".byte 0x26",
        "rep outsb",
        "xor ax, ax",
        "mov ds, ax",
        "out {done}, al",
    ],
    port = FREE_PORT,
    done = DONE_PORT
);

pub(crate) fn outs_real_mode(device: &Device) -> Outcome {
    let machine = Machine::new(device)?;
    let cpu = machine.vcpu(0)?;
    guest::load(&machine, &cpu, Mode::Real, outs16())?;
    machine.memory.write(0x1010, b"ab");
    machine.memory.write(0x2012, b"cd");
    check_eq!(collect_out(&cpu, 1, 2)?, b"ab", "REP OUTSB from DS");
    check_eq!(collect_out(&cpu, 1, 2)?, b"cd", "REP OUTSB from ES");
    cpu.run_until_done()
}
