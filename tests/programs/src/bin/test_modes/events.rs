// SPDX-License-Identifier: GPL-2.0
//! Events on their way into the guest: what cuts their delivery short, what userspace is told of them and
//! gives back. A stack in device memory cuts any delivery short.

use kvm_bindings as kb;
use rvisor_tests::guest::{self, Mode};
use rvisor_tests::handlers::{self, count, Record};
use rvisor_tests::layout::{CODE, DONE_PORT, STACK};
use rvisor_tests::raw::ioctl_with;
use rvisor_tests::{check, check_eq, guest_code, uapi, Cpu, Device, Exit, Fail, Machine, Outcome};

/// In the fourth GiB, which is mapped one to one and has no memory.
const DEVICE_STACK: u64 = 0xd000_1000;
const DELIVERY: Exit = Exit::Internal(kb::KVM_INTERNAL_ERROR_DELIVERY_EV);
const IF: u64 = 1 << 9;
/// The length of the OUT that each guest here starts with.
const OUT: u64 = 2;

guest_code!(
    count_on,
    code64,
    ["2: out {done}, al", "inc ebx", "inc ebx", "jmp 2b",],
    done = DONE_PORT
);
guest_code!(
    int_n,
    code64,
    ["out {done}, al", "int 0x40", "out {done}, al"],
    done = DONE_PORT
);
guest_code!(
    int3,
    code64,
    ["out {done}, al", "int3", "out {done}, al"],
    done = DONE_PORT
);

/// A guest behind its first OUT, with interrupts on.
fn start(machine: &Machine, code: &[u8]) -> Result<Cpu, Fail> {
    let cpu = machine.vcpu(0)?;
    guest::load(machine, &cpu, Mode::Long, code)?;
    cpu.run_until_done()?;
    change(&cpu, |regs| {
        regs.rip = CODE + OUT;
        regs.rflags |= IF;
    })?;
    Ok(cpu)
}

fn change(cpu: &Cpu, f: impl FnOnce(&mut kb::kvm_regs)) -> Outcome {
    let mut regs = cpu.regs()?;
    f(&mut regs);
    cpu.set_regs(&regs)
}

/// KVM_SET_VCPU_EVENTS of what KVM_GET_VCPU_EVENTS gives, changed.
fn give(cpu: &Cpu, f: impl FnOnce(&mut kb::kvm_vcpu_events)) -> Outcome {
    let mut events = cpu.fd.get_vcpu_events()?;
    f(&mut events);
    Ok(cpu.fd.set_vcpu_events(&events)?)
}

fn post_nmi(cpu: &Cpu) -> Outcome {
    give(cpu, |events| {
        events.nmi.pending = 1;
        events.flags = kb::KVM_VCPUEVENT_VALID_NMI_PENDING;
    })
}

/// An NMI that was cut short is told as injected, NMIs as not blocked; it comes once.
pub(crate) fn cut_nmi(device: &Device) -> Outcome {
    let machine = Machine::new(device)?;
    let cpu = start(&machine, count_on())?;
    change(&cpu, |regs| regs.rsp = DEVICE_STACK)?;
    post_nmi(&cpu)?;
    cpu.run_expecting(&DELIVERY)?;
    let nmi = cpu.fd.get_vcpu_events()?.nmi;
    check_eq!(
        (nmi.injected, nmi.pending, nmi.masked),
        (1, 0, 0),
        "NMI injected, pending, masked"
    );
    // Saved and restored, it comes all the same.
    give(&cpu, |_| {})?;
    change(&cpu, |regs| regs.rsp = STACK)?;
    cpu.run_until_done()?;
    check_eq!(count(&machine.memory, 2), 1, "NMIs");
    check_eq!(
        Record::read(&machine.memory).interrupted,
        CODE + OUT,
        "where it came"
    );
    cpu.run_until_done()?;
    check_eq!(count(&machine.memory, 2), 1, "NMIs later");
    Ok(())
}

/// An external interrupt that was cut short is told in both structures, and comes once.
pub(crate) fn cut_interrupt(device: &Device) -> Outcome {
    let machine = Machine::new(device)?;
    let cpu = start(&machine, count_on())?;
    change(&cpu, |regs| regs.rsp = DEVICE_STACK)?;
    ioctl_with(&cpu.fd, uapi::INTERRUPT, &mut 0x61_u32)?;
    cpu.run_expecting(&DELIVERY)?;
    let events = cpu.fd.get_vcpu_events()?;
    check_eq!(
        (events.interrupt.injected, events.interrupt.nr),
        (1, 0x61),
        "interrupt injected, vector"
    );
    check_eq!(
        cpu.sregs()?.interrupt_bitmap,
        [0, 1 << 33, 0, 0],
        "interrupt_bitmap"
    );
    give(&cpu, |_| {})?;
    change(&cpu, |regs| regs.rsp = STACK)?;
    cpu.run_until_done()?;
    check_eq!(count(&machine.memory, 0x61), 1, "interrupts");
    cpu.run_until_done()?;
    check_eq!(count(&machine.memory, 0x61), 1, "interrupts later");
    Ok(())
}

/// INT n and INT3 that were cut short are not told: saved and restored, the guest executes them again.
pub(crate) fn cut_software_events(device: &Device) -> Outcome {
    for (code, length, name) in [(int_n(), 2, "INT n"), (int3(), 1, "INT3")] {
        let machine = Machine::new(device)?;
        let cpu = start(&machine, code)?;
        handlers::set_resume(&machine.memory, CODE + OUT + length);
        change(&cpu, |regs| regs.rsp = DEVICE_STACK)?;
        cpu.run_expecting(&DELIVERY)?;
        let events = cpu.fd.get_vcpu_events()?;
        check_eq!(
            (
                events.exception.injected,
                events.interrupt.injected,
                events.interrupt.soft
            ),
            (0, 0, 0),
            "{name}: exception, interrupt, software interrupt"
        );
        cpu.fd.set_vcpu_events(&events)?;
        change(&cpu, |regs| regs.rsp = STACK)?;
        cpu.run_until_done().map_err(|fail| fail.during(name))?;
        let record = Record::read(&machine.memory);
        let (came, at) = if length == 2 {
            (count(&machine.memory, 0x40), record.interrupted)
        } else {
            (record.count, record.rip)
        };
        check_eq!((came, at), (1, CODE + OUT + length), "{name}: count, RIP");
    }
    Ok(())
}

/// An NMI that userspace gives as injected comes at once, even where NMIs are pending too.
pub(crate) fn injected_nmi(device: &Device) -> Outcome {
    let machine = Machine::new(device)?;
    let cpu = start(&machine, count_on())?;
    give(&cpu, |events| events.nmi.injected = 1)?;
    check_eq!(cpu.fd.get_vcpu_events()?.nmi.injected, 1, "injected");
    cpu.run_until_done()?;
    check_eq!(count(&machine.memory, 2), 1, "NMIs");
    check_eq!(cpu.fd.get_vcpu_events()?.nmi.injected, 0, "after it");
    Ok(())
}

/// An exception goes before an interrupt or NMI whose delivery it belongs to, at the RIP where it arose.
pub(crate) fn exception_goes_first(device: &Device) -> Outcome {
    for nmi in [0, 1] {
        let machine = Machine::new(device)?;
        let cpu = start(&machine, count_on())?;
        handlers::set_resume(&machine.memory, CODE);
        give(&cpu, |events| {
            events.exception.injected = 1;
            events.exception.nr = 13;
            events.exception.has_error_code = 1;
            events.exception.error_code = 0x18;
            events.interrupt.injected = 1 - nmi;
            events.interrupt.nr = 0x61;
            events.nmi.injected = nmi;
        })?;
        cpu.run_until_done()?;
        let record = Record::read(&machine.memory);
        check_eq!(
            (record.count, record.vector, record.error, record.rip),
            (1, 13, 0x18, CODE + OUT),
            "exceptions, vector, error code, RIP"
        );
        check_eq!(record.rsp, STACK, "RSP: no other event is below it");
    }
    Ok(())
}

/// All vectors of exceptions can be given, the NMI's and others can't.
pub(crate) fn exception_vectors(device: &Device) -> Outcome {
    let machine = Machine::new(device)?;
    let cpu = start(&machine, count_on())?;
    for vector in 0..=255_u8 {
        let result = give(&cpu, |events| {
            events.exception.injected = 1;
            events.exception.nr = vector;
        });
        check_eq!(
            result.is_ok(),
            vector < 32 && vector != 2,
            "vector {vector} is taken"
        );
    }
    // What was refused has changed nothing.
    check_eq!(cpu.fd.get_vcpu_events()?.exception.nr, 31, "the last taken");
    for vector in [20, 28] {
        handlers::set_resume(&machine.memory, CODE);
        give(&cpu, |events| {
            events.exception.injected = 1;
            events.exception.nr = vector;
            events.exception.has_error_code = 0;
        })?;
        cpu.run_until_done()?;
        check_eq!(
            Record::read(&machine.memory).vector,
            vector.into(),
            "the vector"
        );
    }
    Ok(())
}

/// In STI's shadow an NMI waits for one instruction, and not longer.
pub(crate) fn nmi_behind_sti(device: &Device) -> Outcome {
    let machine = Machine::new(device)?;
    let cpu = start(&machine, count_on())?;
    give(&cpu, |events| {
        events.nmi.pending = 1;
        events.interrupt.shadow = kb::KVM_X86_SHADOW_INT_STI as u8;
        events.flags = kb::KVM_VCPUEVENT_VALID_NMI_PENDING | kb::KVM_VCPUEVENT_VALID_SHADOW;
    })?;
    cpu.run_until_done()?;
    check_eq!(count(&machine.memory, 2), 1, "NMIs");
    check_eq!(
        Record::read(&machine.memory).interrupted,
        CODE + OUT + 2,
        "where it came"
    );
    Ok(())
}

/// An entry that fails keeps the NMI that was to go with it, and tells of it.
pub(crate) fn failed_entry_keeps_event(device: &Device) -> Outcome {
    let machine = Machine::new(device)?;
    let cpu = start(&machine, count_on())?;
    let good = cpu.sregs()?;
    let mut bad = good;
    // A code segment in SS (SDM volume 3, section 28.3.1.2).
    bad.ss.type_ = 0xb;
    cpu.set_sregs(&bad)?;
    post_nmi(&cpu)?;
    let exit = cpu.run()?;
    check!(
        matches!(exit, Exit::FailEntry(0x8000_0021) | Exit::Internal(_)),
        "{exit:x?}"
    );
    let nmi = cpu.fd.get_vcpu_events()?.nmi;
    check_eq!(nmi.injected + nmi.pending, 1, "NMIs injected and pending");
    cpu.set_sregs(&good)?;
    cpu.run_until_done()?;
    check_eq!(count(&machine.memory, 2), 1, "NMIs");
    cpu.run_until_done()?;
    check_eq!(count(&machine.memory, 2), 1, "NMIs later");
    Ok(())
}

/// KVM_SET_SREGS's interrupt is delivered, with a local APIC in the kernel too.
pub(crate) fn sregs_interrupt(device: &Device) -> Outcome {
    for irqchip in [false, true] {
        let machine = if irqchip {
            Machine::with_irqchip(device)?
        } else {
            Machine::new(device)?
        };
        let cpu = start(&machine, count_on())?;
        let mut sregs = cpu.sregs()?;
        sregs.interrupt_bitmap = [0, 1 << 33, 0, 0];
        cpu.set_sregs(&sregs)?;
        check_eq!(
            cpu.sregs()?.interrupt_bitmap,
            [0, 1 << 33, 0, 0],
            "interrupt_bitmap, controllers in the kernel: {irqchip}"
        );
        // Nothing in the bitmap takes nothing away.
        sregs.interrupt_bitmap = [0; 4];
        cpu.set_sregs(&sregs)?;
        cpu.run_until_done()?;
        check_eq!(
            count(&machine.memory, 0x61),
            1,
            "interrupts, controllers in the kernel: {irqchip}"
        );
    }
    Ok(())
}
