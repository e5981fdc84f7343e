// SPDX-License-Identifier: GPL-2.0
//! KVM_IOEVENTFD: writes that only signal an eventfd.

use kvm_bindings as kb;
use rvisor_tests::guest::{self, Mode};
use rvisor_tests::layout::{DATA, DONE_PORT, FREE_PORT, HOLE};
use rvisor_tests::raw::{expect_errno, ioctl_with, Errno};
use rvisor_tests::{
    check_eq, guest_code, uapi, Context, Cpu, Device, EventFd, Exit, Fail, Machine, Outcome,
};
use std::os::fd::AsRawFd;

pub(crate) const PIO: u32 = 1 << kb::kvm_ioeventfd_flag_nr_pio;
const MATCH: u32 = 1 << kb::kvm_ioeventfd_flag_nr_datamatch;
const REMOVE: u32 = 1 << kb::kvm_ioeventfd_flag_nr_deassign;

/// What a doorbell rings on.
#[derive(Clone, Copy)]
struct On {
    flags: u32,
    address: u64,
    length: u32,
    value: u64,
}

fn ioeventfd(machine: &Machine, fd: i32, on: On) -> Result<i32, Errno> {
    let mut request = kb::kvm_ioeventfd {
        datamatch: on.value,
        addr: on.address,
        len: on.length,
        fd,
        flags: on.flags,
        ..Default::default()
    };
    ioctl_with(&machine.vm, uapi::IOEVENTFD, &mut request)
}

/// A new eventfd that rings on this.
fn bell(
    machine: &Machine,
    flags: u32,
    address: u64,
    length: u32,
    value: u64,
) -> Result<EventFd, Fail> {
    let eventfd = EventFd::new()?;
    let on = On {
        flags,
        address,
        length,
        value,
    };
    ioeventfd(machine, eventfd.as_raw_fd(), on).during("KVM_IOEVENTFD")?;
    Ok(eventfd)
}

/// A new eventfd that rings on any OUT to this port.
pub(crate) fn port(machine: &Machine, port: u64) -> Result<EventFd, Fail> {
    bell(machine, PIO, port, 0, 0)
}

pub(crate) fn errors(device: &Device) -> Outcome {
    let machine = Machine::new(device)?;
    let eventfd = EventFd::new()?;
    let fd = eventfd.as_raw_fd();
    let try_with = |flags, address, length, value| {
        ioeventfd(
            &machine,
            fd,
            On {
                flags,
                address,
                length,
                value,
            },
        )
    };
    for length in [3, 5, 6, 7, 9, 16] {
        expect_errno(
            try_with(0, HOLE, length, 0),
            libc::EINVAL,
            &format!("{length} bytes"),
        )?;
    }
    expect_errno(
        try_with(0, u64::MAX, 4, 0),
        libc::EINVAL,
        "past the end of the address space",
    )?;
    expect_errno(
        try_with(1 << 5, HOLE, 4, 0),
        libc::EINVAL,
        "an unknown flag",
    )?;
    expect_errno(
        try_with(MATCH, HOLE, 0, 7),
        libc::EINVAL,
        "a value without a length",
    )?;
    let on = On {
        flags: 0,
        address: HOLE,
        length: 4,
        value: 0,
    };
    expect_errno(ioeventfd(&machine, -1, on), libc::EBADF, "no descriptor")?;
    expect_errno(
        ioeventfd(&machine, machine.vm.as_raw_fd(), on),
        libc::EINVAL,
        "no eventfd",
    )?;
    try_with(MATCH, HOLE, 4, 7)?;
    expect_errno(try_with(MATCH, HOLE, 4, 7), libc::EEXIST, "twice")?;
    expect_errno(try_with(0, HOLE, 4, 0), libc::EEXIST, "any value")?;
    expect_errno(try_with(0, HOLE, 0, 0), libc::EEXIST, "any length")?;
    try_with(MATCH, HOLE, 4, 8)?;
    try_with(0, HOLE, 2, 0)?;
    try_with(PIO, HOLE, 4, 0)?;
    expect_errno(
        try_with(REMOVE | MATCH, HOLE, 4, 9),
        libc::ENOENT,
        "another value",
    )?;
    expect_errno(
        try_with(REMOVE, HOLE, 4, 7),
        libc::ENOENT,
        "any value, to be removed",
    )?;
    let other = EventFd::new()?;
    let on = On {
        flags: REMOVE | MATCH,
        address: HOLE,
        length: 4,
        value: 7,
    };
    expect_errno(
        ioeventfd(&machine, other.as_raw_fd(), on),
        libc::ENOENT,
        "another eventfd",
    )?;
    ioeventfd(&machine, fd, on)?;
    expect_errno(ioeventfd(&machine, fd, on), libc::ENOENT, "removed twice")
}

/// A machine and a vCPU that runs `code`.
fn run(device: &Device, code: &[u8]) -> Result<(Machine, Cpu), Fail> {
    let machine = Machine::new(device)?;
    let cpu = machine.vcpu(0)?;
    guest::load(&machine, &cpu, Mode::Long, code)?;
    Ok((machine, cpu))
}

guest_code!(
    port_guest,
    code64,
    [
        "mov dx, {port}",
        "mov eax, 7",
        "out dx, al",
        "out dx, ax",
        "out dx, eax",
        "mov eax, 8",
        "out dx, eax",
        "add dx, 4",
        "out dx, al",
        "out dx, ax",
        "mov esi, {data}",
        "cld",
        "outsw",
        "mov ecx, 3",
        "rep outsb",
        "in al, dx",
        "out {done}, al",
    ],
    port = FREE_PORT,
    data = DATA as i32,
    done = DONE_PORT
);

pub(crate) fn ports(device: &Device) -> Outcome {
    let (machine, cpu) = run(device, port_guest())?;
    let port = u64::from(FREE_PORT);
    let byte = bell(&machine, PIO, port, 1, 0)?;
    let seven = bell(&machine, PIO | MATCH, port, 4, 7)?;
    let any = bell(&machine, PIO, port + 4, 0, 0)?;
    let elsewhere = bell(&machine, 0, port, 1, 0)?;
    cpu.run_expecting(&Exit::Out {
        port: FREE_PORT,
        size: 2,
        data: vec![7, 0],
    })?;
    check_eq!(byte.take(), 1, "one byte");
    cpu.run_expecting(&Exit::Out {
        port: FREE_PORT,
        size: 4,
        data: vec![8, 0, 0, 0],
    })?;
    check_eq!(seven.take(), 1, "4 bytes of value 7");
    // A doorbell answers no reads.
    cpu.run_expecting(&Exit::In {
        port: FREE_PORT + 4,
        size: 1,
        count: 1,
    })?;
    check_eq!(any.take(), 6, "any length, strings too");
    check_eq!(elsewhere.take(), 0, "the same number in memory");
    cpu.run_until_done()
}

guest_code!(
    memory_guest,
    code64,
    [
        "mov rbx, {hole}",
        "mov eax, 7",
        "mov [rbx], eax",
        "mov [rbx], rax",
        "mov [rbx], al",
        "mov dword ptr [rbx + 8], 1",
        "mov word ptr [rbx + 8], 1",
        "mov byte ptr [rbx + 9], 1",
        "mov edi, {hole} + 8",
        "mov ecx, 1",
        "rep stosd",
        "mov eax, [rbx]",
        "out {done}, al",
    ],
    hole = HOLE as i32,
    done = DONE_PORT
);

pub(crate) fn memory(device: &Device) -> Outcome {
    let (machine, cpu) = run(device, memory_guest())?;
    let seven = bell(&machine, MATCH, HOLE, 4, 7)?;
    let other = bell(&machine, MATCH, HOLE, 8, 8)?;
    let byte = bell(&machine, 0, HOLE, 1, 0)?;
    let any = bell(&machine, 0, HOLE + 8, 0, 0)?;
    cpu.run_expecting(&Exit::MmioWrite {
        address: HOLE,
        data: vec![7, 0, 0, 0, 0, 0, 0, 0],
    })?;
    check_eq!(seven.take(), 1, "4 bytes of value 7");
    cpu.run_expecting(&Exit::MmioWrite {
        address: HOLE + 9,
        data: vec![1],
    })?;
    check_eq!(byte.take(), 1, "one byte");
    cpu.run_expecting(&Exit::MmioRead {
        address: HOLE,
        length: 4,
    })?;
    check_eq!(any.take(), 3, "any length");
    check_eq!(other.take(), 0, "8 bytes of another value");
    cpu.answer_mmio(&[0; 4]);
    cpu.run_until_done()
}

guest_code!(
    ring_twice,
    code64,
    [
        "mov dx, {port}",
        "out dx, al",
        "out {done}, al",
        "out dx, al",
        "out {done}, al",
    ],
    port = FREE_PORT,
    done = DONE_PORT
);

pub(crate) fn removed(device: &Device) -> Outcome {
    let (machine, cpu) = run(device, ring_twice())?;
    let mut on = On {
        flags: PIO,
        address: FREE_PORT.into(),
        length: 1,
        value: 0,
    };
    let eventfd = EventFd::new()?;
    ioeventfd(&machine, eventfd.as_raw_fd(), on)?;
    cpu.run_until_done()?;
    check_eq!(eventfd.take(), 1, "while it is there");
    on.flags |= REMOVE;
    ioeventfd(&machine, eventfd.as_raw_fd(), on)?;
    let exit = cpu.run()?;
    check_eq!(
        matches!(
            exit,
            Exit::Out {
                port: FREE_PORT,
                ..
            }
        ),
        true,
        "an exit after its removal, not {exit:?}"
    );
    check_eq!(eventfd.take(), 0, "after its removal");
    Ok(())
}

guest_code!(
    write_memory,
    code64,
    [
        "mov ebx, {data}",
        "mov dword ptr [rbx], 0x12345678",
        "mov eax, [rbx]",
        "out {done}, al",
    ],
    data = DATA as i32,
    done = DONE_PORT
);

/// A doorbell where memory is never rings.
pub(crate) fn behind_memory(device: &Device) -> Outcome {
    let (machine, cpu) = run(device, write_memory())?;
    let eventfd = bell(&machine, 0, DATA, 4, 0)?;
    cpu.run_until_done()?;
    check_eq!(cpu.regs()?.rax, 0x1234_5678, "what was written");
    check_eq!(eventfd.take(), 0, "the eventfd");
    Ok(())
}
