// SPDX-License-Identifier: GPL-2.0
//! Registers and memory of several guests and of the host.

use crate::{counting, start};
use kvm_bindings as kb;
use rvisor_tests::guest::{self, Mode, MODES};
use rvisor_tests::layout::{CODE, DATA, DONE_PORT};
use rvisor_tests::{check_eq, guest_code, Cpu, Device, Fail, Machine, Outcome};

// Fills everything with RDI, then gives it out once an exit, without touching it.
guest_code!(
    fill_all,
    code64,
    [
        "mov rax, rdi",
        "mov rbx, rdi",
        "mov rsi, rdi",
        "mov rbp, rdi",
        "mov r8, rdi",
        "mov r12, rdi",
        "mov r14, rdi",
        "movq xmm0, rdi",
        "movq xmm15, rdi",
        "mov dr0, rdi",
        "mov dr3, rdi",
        "mov cr2, rdi",
        "mov ecx, 0xc0000102",
        "mov rdx, rdi",
        "shr rdx, 32",
        "wrmsr",
        "mov ecx, 0xc0000082",
        "wrmsr",
        "2: out {done}, al",
        // And what the guest sees itself, into memory.
        "movq [{data}], xmm15",
        "mov r9, dr3",
        "mov [{data} + 8], r9",
        "mov r9, cr2",
        "mov [{data} + 16], r9",
        "mov ecx, 0xc0000102",
        "rdmsr",
        "shl rdx, 32",
        "lea r9, [rax + rdx]",
        "mov [{data} + 24], r9",
        "mov rax, rdi",
        "jmp 2b",
    ],
    data = DATA,
    done = DONE_PORT
);

fn check_guest(machine: &Machine, cpu: &Cpu, value: u64) -> Outcome {
    let regs = cpu.regs()?;
    check_eq!(
        [regs.rax, regs.rbx, regs.rsi, regs.rdi, regs.rbp, regs.r8, regs.r12, regs.r14],
        [value; 8],
        "general registers"
    );
    let bytes: Vec<u8> = value.to_le_bytes().into_iter().chain([0; 8]).collect();
    let fpu = cpu.fd.get_fpu()?;
    check_eq!(fpu.xmm[0][..], bytes[..], "XMM0");
    check_eq!(fpu.xmm[15][..], bytes[..], "XMM15");
    let debug = cpu.fd.get_debug_regs()?;
    check_eq!((debug.db[0], debug.db[3]), (value, value), "DR0 and DR3");
    check_eq!(cpu.sregs()?.cr2, value, "CR2");
    check_eq!(cpu.msr(0xc000_0102)?, value, "KERNEL_GS_BASE");
    check_eq!(cpu.msr(0xc000_0082)?, value, "LSTAR");
    let seen: Vec<u64> = (0..4)
        .map(|word| machine.memory.read_u64(DATA + 8 * word))
        .collect();
    check_eq!(
        seen,
        [value; 4],
        "XMM15, DR3, CR2 and KERNEL_GS_BASE in the guest"
    );
    Ok(())
}

/// Two guests in turn on one CPU, each with its own value everywhere.
pub(crate) fn registers_apart(device: &Device) -> Outcome {
    let values = [0x1111_2222_3333_4444, 0x5555_6666_7777_0888_u64];
    let mut guests = Vec::new();
    for value in values {
        let (machine, cpu) = start(device, fill_all())?;
        let mut regs = cpu.regs()?;
        // A canonical address, as the MSRs want one.
        regs.rdi = value & 0x7fff_ffff_ffff;
        cpu.set_regs(&regs)?;
        guests.push((regs.rdi, machine, cpu));
    }
    for (_, _, cpu) in &guests {
        cpu.run_until_done()?;
    }
    for _ in 0..8 {
        for (value, machine, cpu) in &guests {
            cpu.run_until_done()?;
            check_guest(machine, cpu, *value)?;
        }
    }
    Ok(())
}

// Counts the words from DATA to RSI that are not RDI.
guest_code!(
    compare,
    code64,
    [
        "xor eax, eax",
        "mov ebx, {data}",
        "2: cmp [rbx], rdi",
        "je 3f",
        "inc rax",
        "3: add rbx, 8",
        "cmp rbx, rsi",
        "jb 2b",
        "out {done}, al",
    ],
    data = DATA,
    done = DONE_PORT
);

/// Each guest sees its own memory at the same addresses, and no other's behind its own.
pub(crate) fn memory_apart(device: &Device) -> Outcome {
    const WORDS: u64 = 0x2_0000;
    let mut guests = Vec::new();
    for value in [0xaaaa_0001_u64, 0xbbbb_0002, 0xcccc_0003] {
        let (machine, cpu) = start(device, compare())?;
        for offset in (0..WORDS).step_by(8) {
            machine.memory.write_u64(DATA + offset, value);
        }
        guests.push((value, machine, cpu));
    }
    for round in 0..2 {
        for (value, _, cpu) in &guests {
            let mut regs = cpu.regs()?;
            (regs.rip, regs.rdi, regs.rsi) = (CODE, *value, DATA + WORDS);
            cpu.set_regs(&regs)?;
            cpu.run_until_done()?;
            check_eq!(cpu.regs()?.rax, 0, "foreign words, round {round}");
        }
    }
    Ok(())
}

guest_code!(
    spoil,
    code64,
    [
        "pcmpeqd xmm14, xmm14",
        "pcmpeqd xmm15, xmm15",
        "mov rax, -1",
        "mov rbx, rax",
        "mov r12, rax",
        "mov r15, rax",
        "mov ecx, 0xc0000102",
        "mov eax, 0x1234",
        "xor edx, edx",
        "wrmsr",
        "mov ecx, 0xc0000101",
        "wrmsr",
        "mov ecx, 0xc0000100",
        "wrmsr",
        "std",
        "out {done}, al",
    ],
    done = DONE_PORT
);

/// KVM_RUN leaves the caller's registers as any system call does.
pub(crate) fn host_registers(device: &Device) -> Outcome {
    let (_machine, cpu) = start(device, spoil())?;
    let (before, gs) = (0x0123_4567_89ab_cdef_u64, 0xfeed_u64);
    let (after, kept, flags): (u64, u64, u64);
    let mut result = libc::SYS_ioctl;
    // SAFETY: KVM_RUN by hand: the kernel changes RAX, RCX and R11 only, which the block declares.
    unsafe {
        core::arch::asm!(
            "movq xmm15, r8",
            "mov r12, r9",
            "syscall",
            "pushfq",
            "pop r10",
            "movq r8, xmm15",
            inlateout("rax") result,
            in("rdi") std::os::fd::AsRawFd::as_raw_fd(&cpu.fd),
            in("rsi") rvisor_tests::uapi::RUN,
            in("rdx") 0,
            inlateout("r8") before => after,
            in("r9") gs,
            out("r12") kept,
            out("r10") flags,
            out("rcx") _,
            out("r11") _,
            out("xmm15") _,
        );
    }
    check_eq!(result, 0, "KVM_RUN");
    check_eq!(after, before, "XMM15 across KVM_RUN");
    check_eq!(kept, gs, "R12 across KVM_RUN");
    check_eq!(flags & 0x400, 0, "the direction flag");
    check_eq!(cpu.msr(0xc000_0102)?, 0x1234, "the guest's KERNEL_GS_BASE");
    Ok(())
}

/// Eight machines in all modes, each with a thread of its own.
pub(crate) fn eight_machines(device: &Device) -> Outcome {
    const ROUNDS: u64 = 20;
    let run = |number: u64| -> Result<u64, Fail> {
        let mode = MODES[number as usize % MODES.len()];
        let machine = Machine::new(device)?;
        let cpu = machine.vcpu(0)?;
        let code = match mode {
            Mode::Long => counting(),
            _ => counting_short(),
        };
        guest::load(&machine, &cpu, mode, code)?;
        let mut total = 0;
        for _ in 0..ROUNDS {
            cpu.run_until_done()?;
            let regs: kb::kvm_regs = cpu.regs()?;
            total = if mode == Mode::Long {
                regs.r15
            } else {
                regs.rbx & 0xffff
            };
            std::thread::yield_now();
        }
        Ok(total)
    };
    let run = &run;
    let results: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..8)
            .map(|number| scope.spawn(move || run(number)))
            .collect();
        threads.into_iter().map(|thread| thread.join()).collect()
    });
    for (number, result) in results.into_iter().enumerate() {
        let total = result.map_err(|_| Fail::new("a thread panicked"))??;
        check_eq!(total, ROUNDS, "rounds of machine {number}");
    }
    Ok(())
}

// The same bytes in 16 and 32 bits: INC BX is INC EBX there.
guest_code!(
    counting_short,
    code16,
    ["2: inc bx", "out {done}, al", "jmp 2b"],
    done = DONE_PORT
);
