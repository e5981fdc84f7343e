// SPDX-License-Identifier: GPL-2.0
//! HLT: it costs the host nothing, and every wake-up arrives.

use crate::probe;
use rvisor_tests::guest::{self, Mode};
use rvisor_tests::handlers::{self, count, Acknowledge};
use rvisor_tests::layout::{AP_CODE, AP_STACK, COUNTS, DONE_PORT};
use rvisor_tests::wakeups::{self, thread_time};
use rvisor_tests::{check, check_eq, guest_code, Device, Fail, Machine, Outcome};
use std::time::{Duration, Instant};

/// Wake-ups of each kind. `make wakeups` tries a million.
const ROUNDS: u64 = 5_000;

guest_code!(
    wait_for_one,
    code64,
    [
        "out {done}, al",
        "2: cli",
        "cmp qword ptr [rbp], 0",
        "jne 3f",
        "sti",
        "hlt",
        "jmp 2b",
        "3: out {done}, al",
    ],
    done = DONE_PORT
);

/// A halted processor's thread uses no CPU time.
pub(crate) fn hlt_costs_nothing(device: &Device) -> Outcome {
    const PAUSE: Duration = Duration::from_millis(300);
    let machine = Machine::with_irqchip(device)?;
    let cpu = machine.vcpu(0)?;
    guest::load(&machine, &cpu, Mode::Long, wait_for_one())?;
    handlers::set_acknowledge(&machine.memory, Acknowledge::None);
    probe::set_registers(&cpu, &[(0xf0, 0x1ff)])?;
    let mut regs = cpu.regs()?;
    regs.rbp = COUNTS + 8 * 0x51;
    cpu.set_regs(&regs)?;
    cpu.run_until_done()?;
    let (began, used) = (Instant::now(), thread_time()?);
    std::thread::scope(|scope| {
        let sender = scope.spawn(|| {
            std::thread::sleep(PAUSE);
            machine.vm.signal_msi(kvm_bindings::kvm_msi {
                address_lo: 0xfee0_0000,
                data: 0x51,
                ..Default::default()
            })
        });
        cpu.run_until_done()?;
        sender
            .join()
            .map_err(|_| Fail::new("the sender panicked"))?
            .map_err(Fail::from)
    })?;
    let (took, used) = (began.elapsed(), thread_time()? - used);
    check!(took >= PAUSE, "it woke after {took:?}");
    check!(used < took / 20, "it used {used:?} of {took:?}");
    Ok(())
}

/// Wake-ups by another thread's messages.
pub(crate) fn wake_ups_by_messages(device: &Device) -> Outcome {
    wakeups::by_messages(device, ROUNDS)
}

/// Wake-ups by the guest's own timer.
pub(crate) fn wake_ups_by_deadlines(device: &Device) -> Outcome {
    // Each distance once.
    wakeups::by_deadlines(device, 8192)
}

/// Wake-ups by another processor, in x2APIC mode.
pub(crate) fn wake_ups_by_ipis(device: &Device) -> Outcome {
    wakeups::by_ipis(device, ROUNDS)
}

/// The 8259's interrupts wake the processor whose LINT0 takes them, which need not be the first.
pub(crate) fn pic_wakes_another(device: &Device) -> Outcome {
    let machine = Machine::with_irqchip(device)?;
    let first = probe::Probe::new(&machine, 0)?;
    first.output(&[
        (0x20, 0x11),
        (0x21, 0x20),
        (0x21, 4),
        (0x21, 1),
        (0x21, 0xdf),
    ])?;
    // LINT0: masked here, ExtINT there.
    probe::set_registers(&first.cpu, &[(0xf0, 0x1ff), (0x350, 0x1_0700)])?;
    let second = machine.vcpu(1)?;
    machine.memory.write(AP_CODE, wait_for_one());
    guest::enter(&second, Mode::Long, AP_CODE, AP_STACK)?;
    probe::set_registers(&second, &[(0xf0, 0x1ff), (0x350, 0x700)])?;
    let mut regs = second.regs()?;
    regs.rbp = COUNTS + 8 * 0x25;
    second.set_regs(&regs)?;
    second.fd.set_mp_state(kvm_bindings::kvm_mp_state {
        mp_state: kvm_bindings::KVM_MP_STATE_RUNNABLE,
    })?;
    second.run_until_done()?;
    std::thread::scope(|scope| {
        let sender = scope.spawn(|| {
            std::thread::sleep(Duration::from_millis(20));
            machine.vm.set_irq_line(5, true)
        });
        second.run_until_done()?;
        sender
            .join()
            .map_err(|_| Fail::new("the sender panicked"))?
            .map_err(Fail::from)
    })?;
    check_eq!(count(&machine.memory, 0x25), 1, "interrupts");
    Ok(())
}
