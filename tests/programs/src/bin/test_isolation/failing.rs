// SPDX-License-Identifier: GPL-2.0
//! Guests that can't go on, and machines that end in odd ways.

use crate::{counting, start, Bystander};
use rvisor_tests::guest::{self, Mode};
use rvisor_tests::host::free_kib;
use rvisor_tests::{check, check_eq, guest_code, Cpu, Device, Exit, Fail, Machine, Outcome};
use std::io::Read;

guest_code!(undefined, code64, ["ud2"]);

/// An exception without any handler, not even for the double fault.
pub(crate) fn triple_fault(device: &Device) -> Outcome {
    let mut bystander = Bystander::new(device)?;
    bystander.go_on()?;
    let (_machine, cpu) = start(device, undefined())?;
    let mut sregs = cpu.sregs()?;
    sregs.idt.limit = 0;
    cpu.set_sregs(&sregs)?;
    cpu.run_expecting(&Exit::Shutdown)?;
    bystander.go_on()?;
    // The state that userspace resets it from can be read and written.
    sregs.idt.limit = 0xfff;
    cpu.set_sregs(&sregs)?;
    cpu.regs()?;
    bystander.go_on()
}

/// Segment registers that no CPU could load (SDM volume 3, section 28.3.1.2).
pub(crate) fn bad_entry_state(device: &Device) -> Outcome {
    let mut bystander = Bystander::new(device)?;
    let (_machine, cpu) = start(device, counting())?;
    let good = cpu.sregs()?;
    let mut sregs = good;
    // A code segment in SS.
    sregs.ss.type_ = 0xb;
    cpu.set_sregs(&sregs)?;
    let exit = cpu.run()?;
    check!(
        matches!(exit, Exit::FailEntry(0x8000_0021) | Exit::Internal(_)),
        "{exit:x?}"
    );
    bystander.go_on()?;
    cpu.set_sregs(&good)?;
    cpu.run_until_done()?;
    check_eq!(cpu.regs()?.r15, 1, "the guest runs once its state is right");
    bystander.go_on()
}

/// A child process that runs `run` until it is killed, 30 ms after it said that it is ready.
fn killed(device: &Device, run: fn(&Device, &mut dyn FnMut()) -> Outcome) -> Outcome {
    let (mut reader, writer) = rvisor_tests::ktap::pipe()?;
    // SAFETY: This process has one thread.
    let pid = unsafe { libc::fork() };
    if pid == 0 {
        drop(reader);
        let mut writer = Some(writer);
        let result = run(device, &mut || drop(writer.take()));
        // SAFETY: Ends the child at once.
        unsafe { libc::_exit(if result.is_ok() { 0 } else { 1 }) };
    }
    drop(writer);
    // The pipe ends when the child is ready, or dead.
    reader.read_to_end(&mut Vec::new())?;
    std::thread::sleep(std::time::Duration::from_millis(30));
    let mut status = 0;
    // SAFETY: `pid` is our child; `status` is a place for its end.
    unsafe {
        libc::kill(pid, libc::SIGKILL);
        libc::waitpid(pid, &raw mut status, 0);
    }
    check!(
        libc::WIFSIGNALED(status) && libc::WTERMSIG(status) == libc::SIGKILL,
        "the child ended with status {status:#x} and not by the signal"
    );
    Ok(())
}

// Interrupts on: see test_exits on what Bochs does otherwise.
guest_code!(forever, code64, ["sti", "2: inc rax", "jmp 2b"]);

pub(crate) fn killed_in_loop(device: &Device) -> Outcome {
    let mut bystander = Bystander::new(device)?;
    for _ in 0..3 {
        killed(device, |device, ready| {
            let (_machine, cpu) = start(device, forever())?;
            ready();
            Err(cpu.unexpected(&cpu.run()?))
        })?;
        bystander.go_on()?;
    }
    Ok(())
}

/// KVM_GET_REGS of the vCPU behind the pointer; nothing else, since it runs in its parent's memory.
extern "C" fn get_regs(cpu: *mut libc::c_void) -> libc::c_int {
    // SAFETY: The caller's vCPU, which lives on.
    let cpu = unsafe { &*cpu.cast::<Cpu>() };
    i32::from(cpu.fd.get_regs().is_err())
}

/// Who waits for a vCPU that another runs, for as long as its guest likes, can be killed.
pub(crate) fn killed_while_it_waits(device: &Device) -> Outcome {
    let (machine, cpu) = start(device, forever())?;
    // Both stay until the process ends, and so does the thread that runs the guest.
    std::mem::forget(machine);
    let cpu: &'static Cpu = Box::leak(Box::new(cpu));
    std::thread::spawn(|| cpu.run());
    std::thread::sleep(std::time::Duration::from_millis(30));
    // A process of its own with the same memory, which is what a vCPU asks of its callers.
    let stack = Box::leak(vec![0_u128; 0x1000].into_boxed_slice());
    let argument = std::ptr::from_ref(cpu).cast_mut().cast();
    let flags = libc::CLONE_VM | libc::CLONE_FILES | libc::SIGCHLD;
    // SAFETY: The child has a stack of its own; it makes one ioctl and ends.
    let pid = unsafe {
        let top = stack.as_mut_ptr_range().end.cast();
        libc::clone(get_regs, top, flags, argument)
    };
    check!(pid > 0, "clone: {}", std::io::Error::last_os_error());
    std::thread::sleep(std::time::Duration::from_millis(30));
    let mut status = 0;
    // SAFETY: `pid` is our child; `status` is a place for its end.
    unsafe {
        check_eq!(
            libc::waitpid(pid, &raw mut status, libc::WNOHANG),
            0,
            "it waits"
        );
        libc::kill(pid, libc::SIGKILL);
        libc::waitpid(pid, &raw mut status, 0);
    }
    check!(
        libc::WIFSIGNALED(status) && libc::WTERMSIG(status) == libc::SIGKILL,
        "the child ended with status {status:#x} and not by the signal"
    );
    Ok(())
}

guest_code!(forever_deaf, code64, ["2: inc rax", "jmp 2b"]);

/// The same with interrupts off: the host's make the guest exit nevertheless.
pub(crate) fn killed_in_deaf_loop(device: &Device) -> Outcome {
    if std::fs::read_to_string("/proc/cmdline")?.contains("rvisor.host=bochs") {
        return Err(Fail::skip(
            "Bochs 3.0 loses external interrupts where host and guest both have IF clear at VM entry, on KVM too",
        ));
    }
    let mut bystander = Bystander::new(device)?;
    killed(device, |device, ready| {
        let (_machine, cpu) = start(device, forever_deaf())?;
        ready();
        Err(cpu.unexpected(&cpu.run()?))
    })?;
    bystander.go_on()
}

guest_code!(halting, code64, ["sti", "2: hlt", "jmp 2b"]);

pub(crate) fn killed_in_hlt(device: &Device) -> Outcome {
    let mut bystander = Bystander::new(device)?;
    killed(device, |device, ready| {
        let machine = Machine::with_irqchip(device)?;
        let cpu = machine.vcpu(0)?;
        guest::load(&machine, &cpu, Mode::Long, halting())?;
        ready();
        Err(cpu.unexpected(&cpu.run()?))
    })?;
    bystander.go_on()
}

/// Descriptors are closed in each order, after a run and without one.
pub(crate) fn close_orders(device: &Device) -> Outcome {
    for order in 0..6 {
        let machine = Machine::with_irqchip(device)?;
        let first = machine.vcpu(0)?;
        let second = machine.vcpu(1)?;
        if order % 2 == 0 {
            guest::load(&machine, &first, Mode::Long, counting())?;
            first.run_until_done()?;
        }
        let Machine { vm, kvm, memory } = machine;
        match order {
            0 => drop((vm, kvm, memory, first, second)),
            1 => drop((first, second, vm, memory, kvm)),
            2 => drop((memory, second, kvm, vm, first)),
            3 => drop((kvm, vm, second, first, memory)),
            4 => drop((second, memory, first, vm, kvm)),
            _ => drop((vm, first, kvm, second, memory)),
        }
    }
    Bystander::new(device)?.go_on()
}

/// Machines come and go, and each runs; free memory does not shrink with each.
pub(crate) fn many_rounds(device: &Device) -> Outcome {
    let round = || -> Outcome {
        let machine = Machine::with_irqchip(device)?;
        let cpu = machine.vcpu(0)?;
        guest::load(&machine, &cpu, Mode::Long, counting())?;
        cpu.run_until_done()
    };
    for _ in 0..4 {
        round()?;
    }
    let before = free_kib()?;
    const ROUNDS: u64 = 32;
    for _ in 0..ROUNDS {
        round()?;
    }
    let after = free_kib()?;
    // A machine holds some 100 KiB, so that a leak of whole machines would be ten times this.
    check!(
        after + ROUNDS * 10 >= before,
        "free memory went from {before} to {after} KiB in {ROUNDS} machines"
    );
    Ok(())
}
