// SPDX-License-Identifier: GPL-2.0
//! KVM_IRQFD with a resampler: the line stays high until the guest ends the interrupt.

use crate::irqfd::{irqfd, wait_for};
use crate::start;
use kvm_bindings as kb;
use rvisor_tests::guest::Mode;
use rvisor_tests::handlers::{count, Acknowledge};
use rvisor_tests::host::{bind_to_cpu, real_time};
use rvisor_tests::layout::{COUNTS, DATA, DONE_PORT, IOAPIC, LAPIC};
use rvisor_tests::raw::expect_errno;
use rvisor_tests::{
    check, check_eq, guest_code, set_up_8259s, Context, Device, EventFd, Fail, Machine, Outcome,
};
use std::os::fd::AsRawFd;

/// Where a guest is told that the waiter had its turn.
const FLAG: u64 = DATA + 64;
const RESAMPLE: u32 = kb::KVM_IRQFD_FLAG_RESAMPLE;

/// The line's eventfd and the resampler's, tied to a GSI.
struct Line {
    raise: EventFd,
    ended: EventFd,
    gsi: u32,
}

impl Line {
    fn new(machine: &Machine, gsi: u32) -> Result<Self, Fail> {
        if machine.extension(kb::KVM_CAP_IRQFD_RESAMPLE) == 0 {
            return Err(Fail::skip("IRQFD_RESAMPLE is not offered"));
        }
        let (raise, ended) = (EventFd::new()?, EventFd::new()?);
        irqfd(
            &machine.vm,
            raise.as_raw_fd(),
            gsi,
            RESAMPLE,
            ended.as_raw_fd(),
        )
        .during("KVM_IRQFD with a resampler")?;
        Ok(Self { raise, ended, gsi })
    }

    fn remove(&self, machine: &Machine) -> Outcome {
        let flag = kb::KVM_IRQFD_FLAG_DEASSIGN;
        irqfd(&machine.vm, self.raise.as_raw_fd(), self.gsi, flag, 0)?;
        Ok(())
    }
}

pub(crate) fn errors(device: &Device) -> Outcome {
    let machine = Machine::with_irqchip(device)?;
    let _offered = Line::new(&machine, 9)?;
    let eventfd = EventFd::new()?;
    let fd = eventfd.as_raw_fd();
    let assign = |fd, resampler| irqfd(&machine.vm, fd, 10, RESAMPLE, resampler);
    expect_errno(assign(fd, -1), libc::EBADF, "no descriptor")?;
    expect_errno(
        assign(fd, machine.vm.as_raw_fd()),
        libc::EINVAL,
        "no eventfd",
    )?;
    expect_errno(assign(-1, fd), libc::EBADF, "no descriptor for the line")?;
    // Nothing is left of what failed.
    assign(fd, EventFd::new()?.as_raw_fd())?;
    expect_errno(assign(fd, fd), libc::EBUSY, "an eventfd in use")
}

guest_code!(
    level_guest,
    code64,
    [
        "mov ebx, {lapic}",
        "mov dword ptr [rbx + 0xf0], 0x1ff",
        "mov esi, {ioapic}",
        "mov dword ptr [rsi], 0x25",
        "mov dword ptr [rsi + 0x10], 0",
        "mov dword ptr [rsi], 0x24",
        "mov dword ptr [rsi + 0x10], 0x8050",
        "4: out {done}, al",
        "2: sti",
        "pause",
        "cli",
        "cmp qword ptr [{count}], rdi",
        "jb 2b",
        "jmp 4b",
    ],
    lapic = LAPIC as i32,
    ioapic = IOAPIC as i32,
    count = COUNTS + 8 * 0x50,
    done = DONE_PORT
);

/// Each signal is one interrupt, and the resampler hears of each end.
pub(crate) fn ioapic_line(device: &Device) -> Outcome {
    let (machine, cpu) = start(device, Mode::Long, level_guest(), Acknowledge::LocalApic)?;
    cpu.run_until_done()?;
    let line = Line::new(&machine, 10)?;
    let second = Line::new(&machine, 10)?;
    for interrupts in 1..=3 {
        line.raise.signal()?;
        wait_for(&cpu, interrupts)?;
        cpu.run_until_done()?;
        check_eq!(count(&machine.memory, 0x50), interrupts, "interrupts");
        check_eq!(line.ended.wait(), 1, "the resampler's count");
        check_eq!(second.ended.wait(), 1, "the other resampler's count");
    }
    Ok(())
}

guest_code!(
    pic_guest,
    code32,
    [
        set_up_8259s!(1, 0xfb, 0xfb),
        // Line 10 is level-triggered.
        "mov dx, 0x4d1",
        "mov al, 4",
        "out dx, al",
        "4: out {done}, al",
        "2: sti",
        "pause",
        "cli",
        "cmp dword ptr [{count}], edi",
        "jb 2b",
        "jmp 4b",
    ],
    count = COUNTS + 8 * 0x2a,
    done = DONE_PORT
);

pub(crate) fn pic_line(device: &Device) -> Outcome {
    let (machine, cpu) = start(device, Mode::Protected, pic_guest(), Acknowledge::Pics)?;
    cpu.run_until_done()?;
    let line = Line::new(&machine, 10)?;
    for interrupts in 1..=3 {
        line.raise.signal()?;
        wait_for(&cpu, interrupts)?;
        cpu.run_until_done()?;
        check_eq!(count(&machine.memory, 0x2a), interrupts, "interrupts");
        check_eq!(line.ended.wait(), 1, "the resampler's count");
    }
    Ok(())
}

guest_code!(
    counting_guest,
    code32,
    [
        // Automatic end of interrupt.
        set_up_8259s!(3, 0xfb, 0xfb),
        "mov dx, 0x4d1",
        "mov al, 4",
        "out dx, al",
        "out {done}, al",
        "sti",
        // Rounds from the interrupt on.
        "2: cmp dword ptr [{count}], 0",
        "je 2b",
        "inc dword ptr [{data}]",
        "cmp dword ptr [{flag}], 0",
        "je 2b",
        "cli",
        "out {done}, al",
    ],
    count = COUNTS + 8 * 0x2a,
    data = DATA,
    flag = FLAG,
    done = DONE_PORT
);

/// An 8259 that ends an interrupt when it is taken: who waits for the end has its turn at once, although the
/// guest takes the interrupt and goes on without an exit.
pub(crate) fn woken_by_delivery(device: &Device) -> Outcome {
    // Fewer than a tick has room for by far, and more than fit between delivery and the waiter's turn.
    const ROUNDS: u64 = 2000;
    bind_to_cpu(0, 0)?;
    let (machine, cpu) = start(device, Mode::Protected, counting_guest(), Acknowledge::None)?;
    cpu.run_until_done()?;
    let line = Line::new(&machine, 10)?;
    std::thread::scope(|scope| {
        let waiter = scope.spawn(|| {
            // It inherits the CPU, and comes before this thread there.
            real_time(true)?;
            let ended = line.ended.wait();
            machine.memory.write_u64(FLAG, 1);
            Ok::<_, Fail>(ended)
        });
        // Until it waits.
        std::thread::sleep(std::time::Duration::from_millis(20));
        line.raise.signal()?;
        cpu.run_until_done()?;
        let ended = waiter.join().map_err(|_| Fail::new("the waiter"))??;
        check_eq!(ended, 1, "the resampler's count");
        check_eq!(count(&machine.memory, 0x2a), 1, "interrupts");
        let rounds = machine.memory.read_u64(DATA);
        check!(
            rounds < ROUNDS,
            "the waiter had its turn {rounds} rounds later"
        );
        Ok(())
    })
}

/// Removing the last irqfd of a GSI lowers its line.
pub(crate) fn lowered_at_the_end(device: &Device) -> Outcome {
    let (machine, cpu) = start(device, Mode::Long, level_guest(), Acknowledge::LocalApic)?;
    let line = Line::new(&machine, 10)?;
    line.raise.signal()?;
    // Masked still, the line is high and waits.
    std::thread::sleep(std::time::Duration::from_millis(20));
    line.remove(&machine)?;
    cpu.run_until_done()?;
    wait_for(&cpu, 0)?;
    cpu.run_until_done()?;
    check_eq!(count(&machine.memory, 0x50), 0, "interrupts");
    // The eventfds are free again.
    irqfd(
        &machine.vm,
        line.raise.as_raw_fd(),
        10,
        RESAMPLE,
        line.ended.as_raw_fd(),
    )?;
    Ok(())
}
