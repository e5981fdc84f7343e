// SPDX-License-Identifier: GPL-2.0
//! KVM_IRQFD without a resampler.

use crate::doorbell;
use crate::start;
use kvm_bindings as kb;
use rvisor_tests::guest::Mode;
use rvisor_tests::handlers::{count, Acknowledge};
use rvisor_tests::host::real_time;
use rvisor_tests::layout::{COUNTS, DONE_PORT, IOAPIC, LAPIC};
use rvisor_tests::raw::{expect_errno, ioctl_with, Errno};
use rvisor_tests::{
    check_eq, guest_code, set_up_8259s, uapi, Config, Context, Cpu, Device, EventFd, Machine,
    Outcome,
};
use std::os::fd::AsRawFd;

/// KVM_IRQFD with these fields.
pub(crate) fn irqfd(
    vm: &impl AsRawFd,
    fd: i32,
    gsi: u32,
    flags: u32,
    resampler: i32,
) -> Result<i32, Errno> {
    let mut request = kb::kvm_irqfd {
        fd: fd as u32,
        gsi,
        flags,
        resamplefd: resampler as u32,
        ..Default::default()
    };
    ioctl_with(vm, uapi::IRQFD, &mut request)
}

/// Ties an eventfd to a GSI.
fn assign(machine: &Machine, eventfd: &EventFd, gsi: u32) -> Outcome {
    irqfd(&machine.vm, eventfd.as_raw_fd(), gsi, 0, 0).during("KVM_IRQFD")?;
    Ok(())
}

fn deassign(machine: &Machine, eventfd: &EventFd, gsi: u32) -> Outcome {
    let flag = kb::KVM_IRQFD_FLAG_DEASSIGN;
    irqfd(&machine.vm, eventfd.as_raw_fd(), gsi, flag, 0).during("KVM_IRQFD, deassign")?;
    Ok(())
}

pub(crate) fn errors(device: &Device) -> Outcome {
    let bare = Machine::new(device)?;
    let eventfd = EventFd::new()?;
    let fd = eventfd.as_raw_fd();
    expect_errno(
        irqfd(&bare.vm, fd, 4, 0, 0),
        libc::EINVAL,
        "without interrupt controllers",
    )?;
    let machine = Machine::with_irqchip(device)?;
    let vm = &machine.vm;
    expect_errno(irqfd(vm, -1, 4, 0, 0), libc::EBADF, "no descriptor")?;
    expect_errno(
        irqfd(vm, vm.as_raw_fd(), 4, 0, 0),
        libc::EINVAL,
        "a descriptor that is no eventfd",
    )?;
    expect_errno(irqfd(vm, fd, 4, 4, 0), libc::EINVAL, "an unknown flag")?;
    let remove = kb::KVM_IRQFD_FLAG_DEASSIGN;
    expect_errno(
        irqfd(vm, -1, 4, remove, 0),
        libc::EBADF,
        "removing without a descriptor",
    )?;
    // What is not there is removed already.
    irqfd(vm, fd, 4, remove, 0)?;
    irqfd(vm, fd, 4, 0, 0)?;
    for gsi in [4, 5] {
        expect_errno(
            irqfd(vm, fd, gsi, 0, 0),
            libc::EBUSY,
            "an eventfd that another irqfd has",
        )?;
    }
    let other = Machine::with_irqchip(device)?;
    expect_errno(
        irqfd(&other.vm, fd, 4, 0, 0),
        libc::EBUSY,
        "an eventfd that another machine has",
    )?;
    // Another GSI's is not removed.
    irqfd(vm, fd, 5, remove, 0)?;
    expect_errno(irqfd(vm, fd, 4, 0, 0), libc::EBUSY, "still there")?;
    irqfd(vm, fd, 4, remove, 0)?;
    irqfd(&other.vm, fd, 4, 0, 0).during("after its removal")?;
    // Two eventfds of one GSI, and a GSI without a route.
    let (second, third) = (EventFd::new()?, EventFd::new()?);
    irqfd(&other.vm, second.as_raw_fd(), 4, 0, 0)?;
    irqfd(&other.vm, third.as_raw_fd(), 100, 0, 0)?;
    third.signal()
}

/// A guest that lets GSI 10's pin of the IOAPIC through as an edge with the vector 0x50, says so, and then
/// counts interrupts up to what is in EDI, halted between them.
macro_rules! counting_guest {
    ($name:ident, $wait:literal) => {
        guest_code!(
            pub(crate) $name,
            code64,
            [
                "mov ebx, {lapic}",
                "mov dword ptr [rbx + 0xf0], 0x1ff",
                "mov esi, {ioapic}",
                "mov dword ptr [rsi], 0x25",
                "mov dword ptr [rsi + 0x10], 0",
                "mov dword ptr [rsi], 0x24",
                "mov dword ptr [rsi + 0x10], 0x50",
                "4: out {done}, al",
                "2: sti",
                $wait,
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
    };
}
counting_guest!(halting, "hlt");
counting_guest!(spinning, "pause");

/// How many interrupts the guest waits for until it is done again.
pub(crate) fn wait_for(cpu: &Cpu, interrupts: u64) -> Outcome {
    let mut regs = cpu.regs()?;
    regs.rdi = interrupts;
    cpu.set_regs(&regs)
}

/// Runs the guest until it has its interrupts, and expects their number.
fn expect_interrupts(machine: &Machine, cpu: &Cpu, interrupts: u64) -> Outcome {
    wait_for(cpu, interrupts)?;
    cpu.run_until_done()?;
    check_eq!(count(&machine.memory, 0x50), interrupts, "interrupts");
    Ok(())
}

fn ready(device: &Device) -> Result<(Machine, Cpu), rvisor_tests::Fail> {
    let (machine, cpu) = start(device, Mode::Long, halting(), Acknowledge::LocalApic)?;
    cpu.run_until_done()?;
    Ok((machine, cpu))
}

pub(crate) fn ioapic_line(device: &Device) -> Outcome {
    let (machine, cpu) = ready(device)?;
    let eventfd = EventFd::new()?;
    assign(&machine, &eventfd, 10)?;
    for interrupts in 1..=3 {
        eventfd.signal()?;
        expect_interrupts(&machine, &cpu, interrupts)?;
    }
    check_eq!(eventfd.take(), 0, "the event is taken");
    Ok(())
}

guest_code!(
    pic_guest,
    code32,
    [
        set_up_8259s!(1, 0xef, 0xff),
        "4: out {done}, al",
        "2: sti",
        "hlt",
        "cli",
        "cmp dword ptr [{count}], edi",
        "jb 2b",
        "jmp 4b",
    ],
    count = COUNTS + 8 * 0x24,
    done = DONE_PORT
);

/// GSI 4, the first serial port's, through the 8259s.
pub(crate) fn pic_line(device: &Device) -> Outcome {
    let (machine, cpu) = start(device, Mode::Protected, pic_guest(), Acknowledge::Pic)?;
    cpu.run_until_done()?;
    let eventfd = EventFd::new()?;
    assign(&machine, &eventfd, 4)?;
    for interrupts in 1..=3 {
        eventfd.signal()?;
        wait_for(&cpu, interrupts)?;
        cpu.run_until_done()?;
        check_eq!(count(&machine.memory, 0x24), interrupts, "interrupts");
    }
    Ok(())
}

/// Sets one route: GSI 24 is the MSI with the vector 0x50 to APIC 0.
fn route_message(machine: &Machine) -> Outcome {
    #[repr(C)]
    struct Table {
        header: [u32; 2],
        entry: kb::kvm_irq_routing_entry,
    }
    let mut entry = kb::kvm_irq_routing_entry {
        gsi: 24,
        type_: kb::KVM_IRQ_ROUTING_MSI,
        ..Default::default()
    };
    entry.u.msi = kb::kvm_irq_routing_msi {
        address_lo: LAPIC as u32,
        data: 0x50,
        ..Default::default()
    };
    let mut table = Table {
        header: [1, 0],
        entry,
    };
    ioctl_with(&machine.vm, uapi::SET_GSI_ROUTING, &mut table).during("KVM_SET_GSI_ROUTING")?;
    Ok(())
}

pub(crate) fn message(device: &Device) -> Outcome {
    let (machine, cpu) = ready(device)?;
    let eventfd = EventFd::new()?;
    // A route may come after the irqfd that uses it.
    assign(&machine, &eventfd, 24)?;
    route_message(&machine)?;
    for interrupts in 1..=3 {
        eventfd.signal()?;
        expect_interrupts(&machine, &cpu, interrupts)?;
    }
    Ok(())
}

/// Several signals before the guest looks are one edge.
pub(crate) fn counts_as_one(device: &Device) -> Outcome {
    let (machine, cpu) = ready(device)?;
    let (eventfd, other) = (EventFd::new()?, EventFd::new()?);
    assign(&machine, &eventfd, 10)?;
    assign(&machine, &other, 10)?;
    for _ in 0..5 {
        eventfd.signal()?;
    }
    other.signal()?;
    // Time for the workers.
    std::thread::sleep(std::time::Duration::from_millis(20));
    expect_interrupts(&machine, &cpu, 1)?;
    other.signal()?;
    expect_interrupts(&machine, &cpu, 2)
}

/// What an eventfd counted before it was assigned is an interrupt too.
pub(crate) fn signalled_before(device: &Device) -> Outcome {
    let (machine, cpu) = ready(device)?;
    let eventfd = EventFd::new()?;
    eventfd.signal()?;
    assign(&machine, &eventfd, 10)?;
    expect_interrupts(&machine, &cpu, 1)
}

/// The vCPU's thread sleeps in HLT while another thread signals, again and again.
pub(crate) fn wakes_hlt(device: &Device) -> Outcome {
    const ROUNDS: u64 = 200;
    let (machine, cpu) = ready(device)?;
    let eventfd = EventFd::new()?;
    assign(&machine, &eventfd, 10)?;
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for round in 1..=ROUNDS {
                if eventfd.signal().is_err() {
                    return;
                }
                while count(&machine.memory, 0x50) < round {
                    std::thread::yield_now();
                }
            }
        });
        expect_interrupts(&machine, &cpu, ROUNDS)
    })
}

pub(crate) fn deassigned(device: &Device) -> Outcome {
    let (machine, cpu) = start(device, Mode::Long, spinning(), Acknowledge::LocalApic)?;
    cpu.run_until_done()?;
    let (eventfd, other) = (EventFd::new()?, EventFd::new()?);
    assign(&machine, &eventfd, 10)?;
    eventfd.signal()?;
    // Its interrupt is there when the call returns, and no later one comes.
    deassign(&machine, &eventfd, 10)?;
    eventfd.signal()?;
    expect_interrupts(&machine, &cpu, 1)?;
    check_eq!(eventfd.take(), 1, "the event stays where nobody takes it");
    assign(&machine, &other, 10)?;
    other.signal()?;
    expect_interrupts(&machine, &cpu, 2)
}

pub(crate) fn closed_eventfd(device: &Device) -> Outcome {
    let (machine, cpu) = ready(device)?;
    // A masked pin, which no line of the 8259s goes with.
    for _ in 0..50 {
        let eventfd = EventFd::new()?;
        assign(&machine, &eventfd, 20)?;
        eventfd.signal()?;
        drop(eventfd);
    }
    let eventfd = EventFd::new()?;
    assign(&machine, &eventfd, 10)?;
    eventfd.signal()?;
    expect_interrupts(&machine, &cpu, 1)?;
    // The machine goes right after an eventfd's end.
    let last = EventFd::new()?;
    assign(&machine, &last, 20)?;
    drop(last);
    drop(cpu);
    drop(machine);
    Ok(())
}

guest_code!(
    rings_ports,
    code64,
    [
        "2: out dx, al",
        "inc edx",
        "dec ecx",
        "jnz 2b",
        "out {done}, al",
    ],
    done = DONE_PORT
);

/// More eventfds than the kernel has workers for at once are closed, and signalled after that, before any
/// worker has seen to one: the ends do not wait for signals that wait behind them.
pub(crate) fn closed_then_signalled(device: &Device) -> Outcome {
    /// Above the kernel's limit on a workqueue, 1024.
    const EVENTFDS: u64 = 1300;
    const FIRST_PORT: u64 = 0x4000;
    raise_descriptor_limit(2 * EVENTFDS)?;
    let (machine, cpu) = ready(device)?;
    let (ringer, ring) = start(device, Mode::Long, rings_ports(), Acknowledge::None)?;
    let mut eventfds = Vec::with_capacity(EVENTFDS as usize);
    for index in 0..EVENTFDS {
        // Of another machine, whose guest signals it when its descriptor is gone.
        let eventfd = doorbell::port(&ringer, FIRST_PORT + index)?;
        assign(&machine, &eventfd, 20)?;
        eventfds.push(eventfd);
    }
    let mut regs = ring.regs()?;
    (regs.rdx, regs.rcx) = (FIRST_PORT, EVENTFDS);
    ring.set_regs(&regs)?;
    // On a host with one CPU no worker runs meanwhile.
    real_time(true)?;
    drop(eventfds);
    let rung = ring.run_until_done();
    real_time(false)?;
    rung?;
    let eventfd = EventFd::new()?;
    assign(&machine, &eventfd, 10)?;
    eventfd.signal()?;
    expect_interrupts(&machine, &cpu, 1)?;
    deassign(&machine, &eventfd, 10)
}

/// Lets this process have so many descriptors.
fn raise_descriptor_limit(descriptors: u64) -> Outcome {
    let limit = libc::rlimit {
        rlim_cur: descriptors,
        rlim_max: descriptors,
    };
    // SAFETY: Reads the structure.
    if unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) } != 0 {
        return Err(std::io::Error::last_os_error().into());
    }
    Ok(())
}

/// An eventfd lives on after the machine, and is nobody's then.
pub(crate) fn closed_machine(device: &Device) -> Outcome {
    let eventfd = EventFd::new()?;
    for _ in 0..5 {
        let machine = Machine::with(
            device,
            Config {
                irqchip: true,
                ..Config::default()
            },
        )?;
        // A vCPU's descriptor keeps the machine, but not its irqfds.
        let cpu = machine.vcpu(0)?;
        assign(&machine, &eventfd, 10)?;
        eventfd.signal()?;
        let Machine { vm, kvm, memory } = machine;
        drop((vm, kvm));
        eventfd.signal()?;
        check_eq!(eventfd.take(), 1, "the event");
        drop(cpu);
        drop(memory);
    }
    Ok(())
}
