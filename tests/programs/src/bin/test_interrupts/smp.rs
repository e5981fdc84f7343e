// SPDX-License-Identifier: GPL-2.0
//! Two processors.

use kvm_bindings as kb;
use rvisor_tests::guest::{self, Mode};
use rvisor_tests::handlers::{self, count, Acknowledge};
use rvisor_tests::layout::{AP_CODE, AP_STACK, COUNTS, DATA, DONE_PORT, LAPIC, RECORD};
use rvisor_tests::{check_eq, guest_code, Device, Fail, Machine, Outcome};

/// What the second processor writes, in the first 64 KiB.
const FLAG: u64 = RECORD + 0x800;

guest_code!(
    start_other,
    code64,
    [
        "mov ebx, {lapic}",
        "mov dword ptr [rbx + 0xf0], 0x1ff",
        "mov dword ptr [rbx + 0x310], 0x01000000",
        "mov dword ptr [rbx + 0x300], 0x4500",
        "mov dword ptr [rbx + 0x300], 0x4608",
        "mov dword ptr [rbx + 0x300], 0x4608",
        "sti",
        "2: pause",
        "cmp word ptr [{flag}], 0x1234",
        "jne 2b",
        "cli",
        "out {done}, al",
    ],
    lapic = LAPIC as i32,
    flag = FLAG,
    done = DONE_PORT
);

guest_code!(
    other,
    code16,
    [
        "xor ax, ax",
        "mov ds, ax",
        "mov word ptr [{flag}], 0x1234",
        "out {done}, al",
    ],
    flag = FLAG,
    done = DONE_PORT
);

/// INIT and two SIPIs start the second processor in real mode at the vector's page.
pub(crate) fn init_sipi(device: &Device) -> Outcome {
    let machine = Machine::with_irqchip(device)?;
    let first = machine.vcpu(0)?;
    let second = machine.vcpu(1)?;
    guest::load(&machine, &first, Mode::Long, start_other())?;
    machine.memory.write(AP_CODE, other());
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| second.run_until_done());
        first.run_until_done()?;
        thread
            .join()
            .map_err(|_| Fail::new("the second processor's thread panicked"))?
    })?;
    let sregs = second.sregs()?;
    check_eq!(
        (sregs.cs.selector, sregs.cs.base),
        (AP_CODE as u16 >> 4, AP_CODE),
        "CS"
    );
    check_eq!(
        second.regs()?.rip,
        other().len() as u64 - 2,
        "RIP of its OUT"
    );
    check_eq!(
        second.fd.get_mp_state()?.mp_state,
        kb::KVM_MP_STATE_RUNNABLE,
        "its state"
    );
    Ok(())
}

// Each sends vector 0x42 to the other 100 times and waits for the answer; who starts has EDI = 1, and
// RBP points at what it counts.
guest_code!(
    ping_pong,
    code64,
    [
        "mov ebx, {lapic}",
        "mov dword ptr [rbx + 0xf0], 0x1ff",
        "mov [rbx + 0x310], esi",
        "mov r12d, 100",
        "sti",
        "2: test edi, edi",
        "jz 3f",
        "inc qword ptr [rbp]",
        "mov dword ptr [rbx + 0x300], 0x42",
        // The other one answers by its own counter.
        "3: mov rax, [rbp]",
        "4: pause",
        "cmp [r13], rax",
        "jb 4b",
        "test edi, edi",
        "jnz 5f",
        "inc qword ptr [rbp]",
        "mov dword ptr [rbx + 0x300], 0x42",
        "5: dec r12d",
        "jnz 2b",
        "6: pause",
        "cmp qword ptr [{count}], 200",
        "jb 6b",
        "cli",
        "out {done}, al",
    ],
    lapic = LAPIC as i32,
    count = COUNTS + 8 * 0x42,
    done = DONE_PORT
);

/// 200 interrupts between two processors in long mode, and none is lost.
pub(crate) fn ipi_both_ways(device: &Device) -> Outcome {
    let machine = Machine::with_irqchip(device)?;
    let first = machine.vcpu(0)?;
    let second = machine.vcpu(1)?;
    guest::load(&machine, &first, Mode::Long, ping_pong())?;
    guest::enter(&second, Mode::Long, rvisor_tests::layout::CODE, AP_STACK)?;
    handlers::set_acknowledge(&machine.memory, Acknowledge::LocalApic);
    for (cpu, starts, target, own, others) in [
        (&first, 1, 0x0100_0000, DATA, DATA + 64),
        (&second, 0, 0, DATA + 64, DATA),
    ] {
        let mut regs = cpu.regs()?;
        (regs.rdi, regs.rsi, regs.rbp, regs.r13) = (starts, target, own, others);
        cpu.set_regs(&regs)?;
    }
    second.fd.set_mp_state(kb::kvm_mp_state {
        mp_state: kb::KVM_MP_STATE_RUNNABLE,
    })?;
    // The second waits for the first's counter to be above its own.
    machine.memory.write_u64(DATA + 64, 0);
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| second.run_until_done());
        first.run_until_done()?;
        thread
            .join()
            .map_err(|_| Fail::new("the second processor's thread panicked"))?
    })?;
    check_eq!(count(&machine.memory, 0x42), 200, "interrupts");
    Ok(())
}
