// SPDX-License-Identifier: GPL-2.0
//! Two processors.

use kvm_bindings as kb;
use rvisor_tests::guest::{self, Mode};
use rvisor_tests::handlers::{self, count, Acknowledge};
use rvisor_tests::layout::{AP_CODE, AP_STACK, COUNTS, DONE_PORT, LAPIC, RECORD};
use rvisor_tests::raw::Errno;
use rvisor_tests::{check_eq, guest_code, Context, Cpu, Device, Exit, Fail, Machine, Outcome};

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

/// KVM_RUN of a processor that waits for its INIT gives EAGAIN once that came, and is called again.
fn run_started(cpu: &Cpu) -> Result<(), Fail> {
    loop {
        match cpu.run_raw() {
            Err(Errno(libc::EAGAIN)) => {}
            Err(error) => return Err(error.into()),
            Ok(kb::KVM_EXIT_IO) if cpu.io_port() == DONE_PORT.into() => return Ok(()),
            Ok(reason) => return Err(cpu.unexpected(&Exit::Other(reason))),
        }
    }
}

/// Runs both until each is done; gives the second back. Where the first fails, nobody waits for the other.
fn run_both(first: &Cpu, second: Cpu) -> Result<Cpu, Fail> {
    let thread = std::thread::spawn(move || (run_started(&second), second));
    first.run_until_done().during("the first processor")?;
    let (result, second) = thread
        .join()
        .map_err(|_| Fail::new("the second processor's thread panicked"))?;
    result.during("the second processor")?;
    Ok(second)
}

/// INIT and two SIPIs start the second processor in real mode at the vector's page.
pub(crate) fn init_sipi(device: &Device) -> Outcome {
    let machine = Machine::with_irqchip(device)?;
    let first = machine.vcpu(0)?;
    let second = machine.vcpu(1)?;
    guest::load(&machine, &first, Mode::Long, start_other())?;
    machine.memory.write(AP_CODE, other());
    let second = run_both(&first, second)?;
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

// Each sends vector R8 to the other 100 times and halts for the answer, which it counts at RBP; who starts
// has EDI = 1.
guest_code!(
    ping_pong,
    code64,
    [
        "mov ebx, {lapic}",
        "mov dword ptr [rbx + 0xf0], 0x1ff",
        "mov [rbx + 0x310], esi",
        // Nothing is sent before both local APICs are on.
        "lock inc qword ptr [{flag}]",
        "6: sti",
        "pause",
        "cmp qword ptr [{flag}], 2",
        "jb 6b",
        "mov r12d, 1",
        "2: test edi, edi",
        "jz 3f",
        "mov [rbx + 0x300], r8d",
        "3: cli",
        "cmp [rbp], r12",
        "jae 4f",
        "sti",
        "hlt",
        "jmp 3b",
        "4: test edi, edi",
        "jnz 5f",
        "mov [rbx + 0x300], r8d",
        "5: inc r12d",
        "cmp r12d, 100",
        "jbe 2b",
        "out {done}, al",
    ],
    lapic = LAPIC as i32,
    flag = FLAG,
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
    for (cpu, starts, target, sends, receives) in [
        (&first, 1, 0x0100_0000, 0x42, 0x43),
        (&second, 0, 0, 0x43, 0x42),
    ] {
        let mut regs = cpu.regs()?;
        (regs.rdi, regs.rsi, regs.r8) = (starts, target, sends);
        regs.rbp = COUNTS + 8 * receives;
        cpu.set_regs(&regs)?;
    }
    second.fd.set_mp_state(kb::kvm_mp_state {
        mp_state: kb::KVM_MP_STATE_RUNNABLE,
    })?;
    run_both(&first, second)?;
    for vector in [0x42, 0x43] {
        check_eq!(
            count(&machine.memory, vector),
            100,
            "interrupts with vector {vector:#x}"
        );
    }
    Ok(())
}

/// A SIPI that userspace says has come, with the vector that it gives before or after.
pub(crate) fn sipi_received(device: &Device) -> Outcome {
    for vector_first in [true, false] {
        let machine = Machine::with_irqchip(device)?;
        let _first = machine.vcpu(0)?;
        let second = machine.vcpu(1)?;
        guest::write_tables(&machine, Mode::Long);
        machine.memory.write(AP_CODE, other());
        let give_vector = || -> Outcome {
            let mut events = second.fd.get_vcpu_events()?;
            events.sipi_vector = (AP_CODE >> 12) as u32;
            events.flags = kb::KVM_VCPUEVENT_VALID_SIPI_VECTOR;
            Ok(second.fd.set_vcpu_events(&events)?)
        };
        if vector_first {
            give_vector()?;
        }
        second.fd.set_mp_state(kb::kvm_mp_state {
            mp_state: kb::KVM_MP_STATE_SIPI_RECEIVED,
        })?;
        if !vector_first {
            give_vector()?;
        }
        second.run_until_done()?;
        check_eq!(second.sregs()?.cs.base, AP_CODE, "CS");
        check_eq!(
            second.fd.get_mp_state()?.mp_state,
            kb::KVM_MP_STATE_RUNNABLE,
            "its state"
        );
    }
    Ok(())
}
