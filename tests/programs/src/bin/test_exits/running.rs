// SPDX-License-Identifier: GPL-2.0
//! What KVM_RUN does besides: immediate_exit, signals, and what userspace changed.

use crate::start;
use rvisor_tests::layout::{CODE, DATA, DONE_PORT, FREE_PORT};
use rvisor_tests::raw::{expect_errno, ioctl_words, Errno};
use rvisor_tests::{check, check_eq, guest_code, uapi, Device, Exit, Fail, Outcome};

guest_code!(
    read_port,
    code64,
    [
        "mov rdx, {port}",
        "in al, dx",
        "mov [{data}], al",
        "out {done}, al",
    ],
    port = FREE_PORT,
    data = DATA,
    done = DONE_PORT
);

/// immediate_exit gives EINTR before the guest runs, and leaves exit_reason as it was.
pub(crate) fn immediate_exit(device: &Device) -> Outcome {
    let (_machine, cpu) = start(device, read_port())?;
    cpu.set_immediate_exit(1);
    cpu.set_exit_reason(0x7777);
    for _ in 0..3 {
        expect_errno(cpu.run_raw(), libc::EINTR, "KVM_RUN")?;
        check_eq!(cpu.exit_reason(), 0x7777, "exit_reason");
        check_eq!(cpu.regs()?.rip, CODE, "RIP");
    }
    cpu.set_immediate_exit(0);
    let exit = cpu.run()?;
    check!(matches!(exit, Exit::In { .. }), "{exit:x?}");
    Ok(())
}

/// What was pending is completed all the same: that is how state is saved consistently.
pub(crate) fn immediate_exit_completes(device: &Device) -> Outcome {
    let (machine, cpu) = start(device, read_port())?;
    let exit = cpu.run()?;
    check!(matches!(exit, Exit::In { .. }), "{exit:x?}");
    cpu.answer_io(&[0xab]);
    cpu.set_immediate_exit(1);
    expect_errno(cpu.run_raw(), libc::EINTR, "KVM_RUN")?;
    let regs = cpu.regs()?;
    check_eq!(regs.rax & 0xff, 0xab, "AL");
    check_eq!(
        machine.memory.read(regs.rip - 1, 1),
        [0xec],
        "the byte before RIP is the IN's"
    );
    check_eq!(machine.memory.read(DATA, 1), [0], "the guest did not run");
    cpu.set_immediate_exit(0);
    cpu.run_until_done()?;
    check_eq!(machine.memory.read(DATA, 1), [0xab], "the guest went on");
    Ok(())
}

// With interrupts on: Bochs 3.0 gives no exit for the host's interrupts while a guest that was entered
// with IF clear leaves it so.
guest_code!(forever, code64, ["sti", "2: inc rbx", "jmp 2b"]);

extern "C" fn nothing(_signal: libc::c_int) {}

/// A timer's signal after 20 ms, with a handler that does nothing.
fn signal_soon() -> Outcome {
    let handler: extern "C" fn(libc::c_int) = nothing;
    // SAFETY: The handler does nothing, and both structures are whole.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = handler as usize;
        check_eq!(
            libc::sigaction(libc::SIGALRM, &raw const action, std::ptr::null_mut()),
            0,
            "sigaction"
        );
        let mut timer: libc::itimerval = std::mem::zeroed();
        timer.it_value.tv_usec = 20_000;
        check_eq!(
            libc::setitimer(libc::ITIMER_REAL, &raw const timer, std::ptr::null_mut()),
            0,
            "setitimer"
        );
    }
    Ok(())
}

/// A signal ends KVM_RUN with EINTR and KVM_EXIT_INTR; the guest's state is whole.
pub(crate) fn signal(device: &Device) -> Outcome {
    let (_machine, cpu) = start(device, forever())?;
    let mut before = 0;
    for _ in 0..2 {
        signal_soon()?;
        let exit = cpu.run()?;
        check_eq!(
            exit,
            Exit::Interrupted(kvm_bindings::KVM_EXIT_INTR),
            "KVM_RUN under a signal"
        );
        let regs = cpu.regs()?;
        check!(
            regs.rbx > before,
            "the guest counted from {before} to {}",
            regs.rbx
        );
        check!(
            (CODE..CODE + forever().len() as u64).contains(&regs.rip),
            "RIP {:#x}",
            regs.rip
        );
        before = regs.rbx;
    }
    Ok(())
}

/// KVM_SET_SIGNAL_MASK: a signal that the thread blocks gets in while the guest runs, and stays pending.
pub(crate) fn signal_mask(device: &Device) -> Outcome {
    let (_machine, cpu) = start(device, forever())?;
    // SAFETY: The set is whole; blocking a signal touches nothing else.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        libc::sigaddset(&raw mut set, libc::SIGALRM);
        check_eq!(
            libc::sigprocmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()),
            0,
            "sigprocmask"
        );
    }
    // Nothing is blocked while the guest runs.
    ioctl_words(&cpu.fd, uapi::SET_SIGNAL_MASK, &mut [8, 0, 0])?;
    signal_soon()?;
    let result = cpu.run_raw();
    check_eq!(result, Err(Errno(libc::EINTR)), "KVM_RUN");
    let mut pending = std::mem::MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: sigpending(2) fills the set in.
    let is_pending = unsafe {
        libc::sigpending(pending.as_mut_ptr());
        libc::sigismember(pending.as_ptr(), libc::SIGALRM)
    };
    check_eq!(is_pending, 1, "SIGALRM is pending afterwards");
    Ok(())
}

guest_code!(
    two_parts,
    code64,
    [
        "mov dx, {port}",
        "out dx, al",
        "mov bl, 1",
        "out {done}, al",
        "mov bl, 2",
        "out {done}, al",
    ],
    port = FREE_PORT,
    done = DONE_PORT
);

/// RIP moves over the OUT only where userspace left it alone.
pub(crate) fn changed_rip(device: &Device) -> Outcome {
    let (_machine, cpu) = start(device, two_parts())?;
    let exit = cpu.run()?;
    check!(
        matches!(
            exit,
            Exit::Out {
                port: FREE_PORT,
                ..
            }
        ),
        "{exit:x?}"
    );
    let mut regs = cpu.regs()?;
    // Behind "out dx, al", "mov bl, 1" and "out imm8, al".
    let second = CODE + 4 + 1 + 2 + 2;
    regs.rip = second;
    cpu.set_regs(&regs)?;
    cpu.run_until_done()?;
    check_eq!(cpu.regs()?.rbx & 0xff, 2, "BL");
    Ok(())
}

guest_code!(
    change_flags,
    code64,
    [
        "cli",
        "out {done}, al",
        "sti",
        "nop",
        "out {done}, al",
        "mov eax, 9",
        "mov cr8, rax",
        "out {done}, al",
    ],
    done = DONE_PORT
);

/// if_flag, cr8, apic_base and ready_for_interrupt_injection are current at every exit.
pub(crate) fn shared_page(device: &Device) -> Outcome {
    let (_machine, cpu) = start(device, change_flags())?;
    cpu.run_until_done()?;
    check_eq!(
        (cpu.if_flag(), cpu.ready_for_injection()),
        (0, 0),
        "after CLI"
    );
    let base = cpu.sregs()?.apic_base;
    check_eq!(cpu.apic_base(), base, "apic_base");
    cpu.run_until_done()?;
    check_eq!(
        (cpu.if_flag(), cpu.ready_for_injection()),
        (1, 1),
        "after STI"
    );
    // Without a local APIC in the kernel, a change of CR8 may give an exit of its own.
    let exit = cpu.run()?;
    if exit == Exit::Other(kvm_bindings::KVM_EXIT_SET_TPR) {
        check_eq!(cpu.cr8(), 9, "cr8 at KVM_EXIT_SET_TPR");
        cpu.run_until_done()?;
    } else {
        check!(exit.is_done(), "{exit:x?}");
    }
    check_eq!(cpu.cr8(), 9, "cr8");
    Ok(())
}

guest_code!(
    busy,
    code64,
    [
        "sti",
        "mov ecx, 40000000",
        "2: dec ecx",
        "jnz 2b",
        "out {done}, al"
    ],
    done = DONE_PORT
);

/// This thread's user time, its system time and its time in guests, in ticks of 10 ms (proc_pid_stat(5)).
fn thread_times() -> Result<[u64; 3], Fail> {
    let text = std::fs::read_to_string("/proc/thread-self/stat")?;
    let rest = text.rsplit_once(')').map_or("", |(_, rest)| rest);
    let fields: Vec<&str> = rest.split_whitespace().collect();
    let field = |number: usize| {
        let value = fields.get(number - 3).and_then(|word| word.parse().ok());
        value.ok_or_else(|| Fail::new(format!("no field {number} in {text}")))
    };
    Ok([field(14)?, field(15)?, field(43)?])
}

/// The kernel counts the time in the guest as such, and as the thread's user time; nothing else of it.
pub(crate) fn guest_time(device: &Device) -> Outcome {
    let (_machine, cpu) = start(device, busy())?;
    let before = thread_times()?;
    cpu.run_until_done()?;
    let after = thread_times()?;
    let [user, system, guest] = [0, 1, 2].map(|i| after[i] - before[i]);
    // 80 million instructions are some 80 ticks in Bochs, and two at 4 GHz.
    check!(guest >= 2, "{guest} ticks in the guest");
    // Each is rounded by itself.
    check!(
        user + 1 >= guest,
        "{user} ticks of user time, {guest} in the guest"
    );
    check!(
        system < guest / 4,
        "{system} ticks of system time, {guest} in the guest"
    );
    // Afterwards the thread is no guest any more.
    let end = std::time::Instant::now() + std::time::Duration::from_millis(100);
    while std::time::Instant::now() < end {
        std::hint::spin_loop();
    }
    check_eq!(
        thread_times()?[2],
        after[2],
        "ticks in the guest while it does not run"
    );
    Ok(())
}
