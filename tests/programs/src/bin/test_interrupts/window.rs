// SPDX-License-Identifier: GPL-2.0
//! Interrupts from userspace, without an interrupt controller in the kernel.

use rvisor_tests::guest::{self, Mode};
use rvisor_tests::handlers::count;
use rvisor_tests::layout::{CODE, DONE_PORT};
use rvisor_tests::{check, check_eq, guest_code, Device, Exit, Machine, Outcome};

guest_code!(
    open_window,
    code64,
    [
        "out {done}, al",
        "mov ecx, 100",
        "2: dec ecx",
        "jnz 2b",
        "sti",
        "inc esi",
        "mov ecx, 100",
        "3: dec ecx",
        "jnz 3b",
        "out {done}, al",
    ],
    done = DONE_PORT
);

/// KVM_INTERRUPT when the guest is ready is delivered at the next entry.
pub(crate) fn interrupt(device: &Device) -> Outcome {
    let machine = Machine::new(device)?;
    let cpu = machine.vcpu(0)?;
    guest::load(&machine, &cpu, Mode::Long, open_window())?;
    cpu.run_until_done()?;
    check_eq!(cpu.ready_for_injection(), 0, "ready while IF is clear");
    cpu.run_until_done()?;
    check_eq!(cpu.ready_for_injection(), 1, "ready after STI");
    let mut regs = cpu.regs()?;
    regs.rip = CODE;
    cpu.set_regs(&regs)?;
    rvisor_tests::raw::ioctl_with(&cpu.fd, rvisor_tests::uapi::INTERRUPT, &mut 0x60_u32)?;
    cpu.run_until_done()?;
    check_eq!(count(&machine.memory, 0x60), 1, "interrupts");
    Ok(())
}

/// request_interrupt_window gives an exit as soon as the guest takes interrupts, not before.
pub(crate) fn request_window(device: &Device) -> Outcome {
    let machine = Machine::new(device)?;
    let cpu = machine.vcpu(0)?;
    guest::load(&machine, &cpu, Mode::Long, open_window())?;
    cpu.run_until_done()?;
    cpu.request_interrupt_window(1);
    let exit = cpu.run()?;
    check_eq!(exit, Exit::InterruptWindow, "the exit");
    let regs = cpu.regs()?;
    check_eq!(
        (cpu.if_flag(), cpu.ready_for_injection()),
        (1, 1),
        "if_flag and ready_for_interrupt_injection"
    );
    check_eq!(regs.rsi, 1, "the instruction behind STI has run");
    check!(
        regs.rcx == 0 || regs.rcx == 100,
        "RCX {}: at once",
        regs.rcx
    );
    cpu.request_interrupt_window(0);
    rvisor_tests::raw::ioctl_with(&cpu.fd, rvisor_tests::uapi::INTERRUPT, &mut 0x61_u32)?;
    cpu.run_until_done()?;
    check_eq!(count(&machine.memory, 0x61), 1, "interrupts");
    Ok(())
}

/// KVM_INTERRUPT in the place of one that waits still.
pub(crate) fn second_interrupt(device: &Device) -> Outcome {
    let machine = Machine::new(device)?;
    let cpu = machine.vcpu(0)?;
    guest::load(&machine, &cpu, Mode::Long, open_window())?;
    cpu.run_until_done()?;
    cpu.run_until_done()?;
    let mut regs = cpu.regs()?;
    regs.rip = CODE;
    cpu.set_regs(&regs)?;
    for mut vector in [0x60_u32, 0x61] {
        rvisor_tests::raw::ioctl_with(&cpu.fd, rvisor_tests::uapi::INTERRUPT, &mut vector)?;
    }
    cpu.run_until_done()?;
    check_eq!(
        (count(&machine.memory, 0x60), count(&machine.memory, 0x61)),
        (0, 1),
        "interrupts with vectors 0x60 and 0x61"
    );
    Ok(())
}

/// A task priority that no CPU has: KVM_RUN refuses it and the guest goes on afterwards, KVM_SET_SREGS leaves the
/// one that there is.
pub(crate) fn impossible_priority(device: &Device) -> Outcome {
    let machine = Machine::new(device)?;
    let cpu = machine.vcpu(0)?;
    guest::load(&machine, &cpu, Mode::Long, open_window())?;
    cpu.set_cr8(5);
    cpu.run_until_done()?;
    cpu.set_cr8(16);
    rvisor_tests::raw::expect_errno(cpu.run_raw(), libc::EINVAL, "KVM_RUN with CR8 16")?;
    let mut sregs = cpu.sregs()?;
    check_eq!(sregs.cr8, 5, "CR8 behind it");
    sregs.cr8 = 16;
    cpu.set_sregs(&sregs)?;
    check_eq!(cpu.sregs()?.cr8, 5, "CR8 behind KVM_SET_SREGS with 16");
    cpu.set_cr8(3);
    cpu.run_until_done()?;
    check_eq!(cpu.sregs()?.cr8, 3, "CR8 in the end");
    Ok(())
}
