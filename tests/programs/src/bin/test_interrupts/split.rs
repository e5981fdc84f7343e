// SPDX-License-Identifier: GPL-2.0
//! KVM_CAP_SPLIT_IRQCHIP: the local APICs in the kernel, the IOAPIC and the PICs in userspace.

use kvm_bindings as kb;
use rvisor_tests::guest::{self, Mode};
use rvisor_tests::handlers::{self, count, Acknowledge};
use rvisor_tests::layout::{COUNTS, DONE_PORT, LAPIC};
use rvisor_tests::raw::{expect_errno, ioctl, ioctl_with, owned, Errno};
use rvisor_tests::{
    check_eq, guest_code, uapi, Config, Context, Cpu, Device, EventFd, Exit, Fail, Machine, Outcome,
};
use std::os::fd::AsRawFd;

/// GSIs below this are pins of userspace's IOAPIC.
const PINS: u64 = 24;

fn split(vm: &impl AsRawFd, pins: u64) -> Result<i32, Errno> {
    let mut request = kb::kvm_enable_cap {
        cap: kb::KVM_CAP_SPLIT_IRQCHIP,
        args: [pins, 0, 0, 0],
        ..Default::default()
    };
    ioctl_with(vm, uapi::ENABLE_CAP, &mut request)
}

/// A machine with the split controller and no vCPU yet.
fn machine(device: &Device) -> Result<Machine, Fail> {
    let machine = Machine::with(device, Config::default())?;
    if machine.extension(kb::KVM_CAP_SPLIT_IRQCHIP) == 0 {
        return Err(Fail::skip("SPLIT_IRQCHIP is not offered"));
    }
    split(&machine.vm, PINS).during("KVM_CAP_SPLIT_IRQCHIP")?;
    Ok(machine)
}

pub(crate) fn rules(device: &Device) -> Outcome {
    let first = machine(device)?;
    let vm = &first.vm;
    expect_errno(split(vm, PINS), libc::EEXIST, "the split controller twice")?;
    expect_errno(
        ioctl(vm, uapi::CREATE_IRQCHIP, 0),
        libc::EEXIST,
        "KVM_CREATE_IRQCHIP after it",
    )?;
    let mut pit = kb::kvm_pit_config::default();
    expect_errno(
        ioctl_with(vm, uapi::CREATE_PIT2, &mut pit),
        libc::ENOENT,
        "KVM_CREATE_PIT2",
    )?;
    let mut chip = kb::kvm_irqchip::default();
    expect_errno(
        ioctl_with(vm, uapi::GET_IRQCHIP, &mut chip),
        libc::ENXIO,
        "KVM_GET_IRQCHIP",
    )?;
    expect_errno(
        route(&first, 3, kb::KVM_IRQ_ROUTING_IRQCHIP, 0),
        libc::EINVAL,
        "a route to a pin",
    )?;
    let bare = Machine::new(device)?;
    expect_errno(split(&bare.vm, 4097), libc::EINVAL, "4097 pins")?;
    expect_errno(split(&bare.vm, u64::MAX), libc::EINVAL, "too many pins")?;
    let _vcpu = owned(ioctl(&bare.vm, uapi::CREATE_VCPU, 0))?;
    expect_errno(split(&bare.vm, PINS), libc::EEXIST, "after a vCPU")?;
    let full = Machine::with_irqchip(device)?;
    expect_errno(
        split(&full.vm, PINS),
        libc::EEXIST,
        "after KVM_CREATE_IRQCHIP",
    )
}

/// Sets one route: a GSI's MSI to APIC 0 with this data, or a pin of the IOAPIC.
fn route(machine: &Machine, gsi: u32, kind: u32, data: u32) -> Result<i32, Errno> {
    #[repr(C)]
    struct Table {
        header: [u32; 2],
        entry: kb::kvm_irq_routing_entry,
    }
    let mut entry = kb::kvm_irq_routing_entry {
        gsi,
        type_: kind,
        ..Default::default()
    };
    if kind == kb::KVM_IRQ_ROUTING_MSI {
        entry.u.msi = kb::kvm_irq_routing_msi {
            address_lo: LAPIC as u32,
            data,
            ..Default::default()
        };
    }
    let mut table = Table {
        header: [1, 0],
        entry,
    };
    ioctl_with(&machine.vm, uapi::SET_GSI_ROUTING, &mut table)
}

guest_code!(
    counting_guest,
    code64,
    [
        "mov ebx, {lapic}",
        "mov dword ptr [rbx + 0xf0], 0x1ff",
        "4: out {done}, al",
        "2: sti",
        "hlt",
        "cli",
        "cmp qword ptr [{count}], rdi",
        "jb 2b",
        "jmp 4b",
    ],
    lapic = LAPIC as i32,
    count = COUNTS + 8 * 0x50,
    done = DONE_PORT
);

fn start(device: &Device, code: &[u8], how: Acknowledge) -> Result<(Machine, Cpu), Fail> {
    let machine = machine(device)?;
    let cpu = machine.vcpu(0)?;
    guest::load(&machine, &cpu, Mode::Long, code)?;
    handlers::set_acknowledge(&machine.memory, how);
    Ok((machine, cpu))
}

fn wait_for(cpu: &Cpu, interrupts: u64) -> Outcome {
    let mut regs = cpu.regs()?;
    regs.rdi = interrupts;
    cpu.set_regs(&regs)
}

/// Each way of an MSI into the guest: KVM_SIGNAL_MSI, KVM_IRQ_LINE and an irqfd.
pub(crate) fn messages(device: &Device) -> Outcome {
    let (machine, cpu) = start(device, counting_guest(), Acknowledge::LocalApic)?;
    cpu.run_until_done()?;
    route(&machine, 30, kb::KVM_IRQ_ROUTING_MSI, 0x50)?;
    let eventfd = EventFd::new()?;
    let mut request = kb::kvm_irqfd {
        fd: eventfd.as_raw_fd() as u32,
        gsi: 30,
        ..Default::default()
    };
    ioctl_with(&machine.vm, uapi::IRQFD, &mut request).during("KVM_IRQFD")?;
    for interrupts in 1..=6 {
        match interrupts % 3 {
            0 => eventfd.signal()?,
            1 => machine.vm.set_irq_line(30, true)?,
            _ => {
                let sent = machine.vm.signal_msi(kb::kvm_msi {
                    address_lo: LAPIC as u32,
                    data: 0x50,
                    ..Default::default()
                })?;
                check_eq!(sent, 1, "KVM_SIGNAL_MSI");
            }
        }
        wait_for(&cpu, interrupts)?;
        cpu.run_until_done()?;
        check_eq!(count(&machine.memory, 0x50), interrupts, "interrupts");
    }
    Ok(())
}

/// A resampler needs the kernel's IOAPIC.
pub(crate) fn no_resampler(device: &Device) -> Outcome {
    let machine = machine(device)?;
    let (raise, ended) = (EventFd::new()?, EventFd::new()?);
    let mut request = kb::kvm_irqfd {
        fd: raise.as_raw_fd() as u32,
        gsi: 10,
        flags: kb::KVM_IRQFD_FLAG_RESAMPLE,
        resamplefd: ended.as_raw_fd() as u32,
        ..Default::default()
    };
    expect_errno(
        ioctl_with(&machine.vm, uapi::IRQFD, &mut request),
        libc::EINVAL,
        "KVM_IRQFD with a resampler",
    )
}

/// KVM_EXIT_IOAPIC_EOI comes for level-triggered interrupts of the IOAPIC's pins, and for no others.
pub(crate) fn end_of_interrupt(device: &Device) -> Outcome {
    const LEVEL: u32 = 0xc000;
    let (machine, cpu) = start(device, counting_guest(), Acknowledge::LocalApic)?;
    cpu.run_until_done()?;
    // Above the pins, and an edge: no exit.
    for (gsi, data) in [(30, LEVEL | 0x50), (10, 0x50)] {
        route(&machine, gsi, kb::KVM_IRQ_ROUTING_MSI, data)?;
        let before = count(&machine.memory, 0x50);
        machine.vm.set_irq_line(gsi, true)?;
        wait_for(&cpu, before + 1)?;
        cpu.run_until_done().during(&format!("GSI {gsi}"))?;
    }
    route(&machine, 10, kb::KVM_IRQ_ROUTING_MSI, LEVEL | 0x50)?;
    for interrupts in 3..=4 {
        machine.vm.set_irq_line(10, true)?;
        wait_for(&cpu, interrupts)?;
        cpu.run_expecting(&Exit::Other(kb::KVM_EXIT_IOAPIC_EOI))?;
        let union = std::mem::offset_of!(kb::kvm_run, __bindgen_anon_1) as u64;
        check_eq!(cpu.run_page().read(union, 1), vec![0x50], "the vector");
        check_eq!(count(&machine.memory, 0x50), interrupts, "interrupts");
        cpu.run_until_done()?;
    }
    Ok(())
}

guest_code!(
    external_guest,
    code64,
    [
        "out {done}, al",
        "2: sti",
        "hlt",
        "cli",
        "cmp qword ptr [{count}], rdi",
        "jb 2b",
        "out {done}, al",
        // Mask LINT0.
        "mov ebx, {lapic}",
        "mov dword ptr [rbx + 0x350], 0x10700",
        "sti",
        "nop",
        "out {done}, al",
    ],
    lapic = LAPIC as i32,
    count = COUNTS + 8 * 0x60,
    done = DONE_PORT
);

/// Userspace's PICs give their vectors by KVM_INTERRUPT, which LINT0 lets through.
pub(crate) fn external(device: &Device) -> Outcome {
    let (machine, cpu) = start(device, external_guest(), Acknowledge::None)?;
    cpu.run_until_done()?;
    check_eq!(cpu.ready_for_injection(), 0, "ready while IF is clear");
    wait_for(&cpu, 1)?;
    cpu.request_interrupt_window(1);
    let exit = cpu.run()?;
    check_eq!(exit, Exit::InterruptWindow, "the exit");
    check_eq!(cpu.ready_for_injection(), 1, "ready in the window");
    cpu.request_interrupt_window(0);
    let interrupt = |mut vector: u32| ioctl_with(&cpu.fd, uapi::INTERRUPT, &mut vector);
    interrupt(0x60)?;
    expect_errno(interrupt(0x61), libc::EEXIST, "a second vector")?;
    expect_errno(interrupt(256), libc::EINVAL, "vector 256")?;
    cpu.run_until_done()?;
    check_eq!(count(&machine.memory, 0x60), 1, "interrupts");
    // With LINT0 masked the next one waits.
    cpu.run_until_done()?;
    check_eq!(cpu.if_flag(), 1, "IF");
    check_eq!(cpu.ready_for_injection(), 0, "ready while LINT0 is masked");
    Ok(())
}

guest_code!(
    masking_guest,
    code64,
    [
        "mov ebx, {lapic}",
        "mov dword ptr [rbx + 0xf0], 0x1ff",
        // Mask LINT0.
        "mov dword ptr [rbx + 0x350], 0x10700",
        "sti",
        "nop",
        "out {done}, al",
        "nop",
        "out {done}, al",
        "mov dword ptr [rbx + 0x350], 0x700",
        "nop",
        "out {done}, al",
        "nop",
        "out {done}, al",
    ],
    lapic = LAPIC as i32,
    done = DONE_PORT
);

/// The interrupt window that userspace asks for opens when LINT0 would let its interrupt through, and not
/// before: the guest goes on meanwhile. An interrupt of the local APIC that comes first does not close it.
pub(crate) fn masked_window(device: &Device) -> Outcome {
    let (machine, cpu) = start(device, masking_guest(), Acknowledge::LocalApic)?;
    cpu.run_until_done()?;
    check_eq!(cpu.if_flag(), 1, "IF");
    cpu.request_interrupt_window(1);
    cpu.run_until_done().during("while LINT0 is masked")?;
    check_eq!(cpu.ready_for_injection(), 0, "ready while LINT0 is masked");
    let exit = cpu.run()?;
    check_eq!(exit, Exit::InterruptWindow, "the exit behind the unmasking");
    check_eq!(cpu.ready_for_injection(), 1, "ready in the window");
    cpu.request_interrupt_window(0);
    cpu.run_until_done()?;
    machine.vm.signal_msi(kb::kvm_msi {
        address_lo: LAPIC as u32,
        data: 0x50,
        ..Default::default()
    })?;
    cpu.request_interrupt_window(1);
    let exit = cpu.run()?;
    check_eq!(exit, Exit::InterruptWindow, "the exit behind an interrupt");
    check_eq!(count(&machine.memory, 0x50), 1, "interrupts");
    cpu.request_interrupt_window(0);
    cpu.run_until_done()
}
