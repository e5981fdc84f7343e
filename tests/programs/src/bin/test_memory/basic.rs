// SPDX-License-Identifier: GPL-2.0
//! Slots come, go and move; what the process does to its memory the guest sees.

use crate::guests::{Guest, PAGE, PLACE};
use kvm_bindings as kb;
use rvisor_tests::layout::{CODE, DONE_PORT};
use rvisor_tests::mapping::Mapping;
use rvisor_tests::raw::expect_errno;
use rvisor_tests::{check_eq, guest_code, ktap, Device, Exit, Fail, Outcome};

pub(crate) fn host_and_guest_share(device: &Device) -> Outcome {
    let guest = Guest::new(device)?;
    let memory = Mapping::anonymous(4 * PAGE)?;
    guest.machine.set_slot(1, 0, PLACE, &memory, 0, 4 * PAGE)?;
    memory.write_u64(0, 1);
    check_eq!(guest.read(PLACE)?, 1, "what the host wrote before");
    memory.write_u64(0, 2);
    check_eq!(guest.read(PLACE)?, 2, "what the host wrote between");
    guest.write(PLACE + 8, 3)?;
    check_eq!(memory.read_u64(8), 3, "what the guest wrote");
    // Read by the guest first, when the page is the shared zero page.
    check_eq!(guest.read(PLACE + 0x1000)?, 0, "a fresh page");
    memory.write_u64(0x1000, 4);
    check_eq!(
        guest.read(PLACE + 0x1000)?,
        4,
        "what the host wrote to it later"
    );
    guest.write(PLACE + 0x1000, 5)?;
    check_eq!(memory.read_u64(0x1000), 5, "what the guest wrote to it");
    Ok(())
}

pub(crate) fn read_only_slot(device: &Device) -> Outcome {
    let guest = Guest::new(device)?;
    if guest.machine.extension(kb::KVM_CAP_READONLY_MEM) == 0 {
        return Err(Fail::skip("READONLY_MEM is not offered"));
    }
    let memory = Mapping::anonymous(PAGE)?;
    memory.write_u64(0, 9);
    guest
        .machine
        .set_slot(1, kb::KVM_MEM_READONLY, PLACE, &memory, 0, PAGE)?;
    for round in 0..2 {
        check_eq!(guest.read(PLACE)?, 9, "reading, round {round}");
        guest.prepare(PLACE, Some(0x55))?;
        guest.cpu.run_expecting(&Exit::MmioWrite {
            address: PLACE,
            data: vec![0x55, 0, 0, 0, 0, 0, 0, 0],
        })?;
        guest.cpu.run_until_done()?;
        check_eq!(
            memory.read_u64(0),
            9,
            "the memory after a write, round {round}"
        );
    }
    Ok(())
}

guest_code!(
    push_and_call,
    code64,
    [
        "mov rax, rsp",
        "mov rsp, rsi",
        "push 0x77",
        "call 2f",
        "2: lea rbx, [rip + 3f]",
        "call rbx",
        "3: mov rdi, rsp",
        "mov rsp, rax",
        "out {done}, al",
    ],
    done = DONE_PORT
);

/// PUSH and CALL with the stack in a read-only slot: what they push is a device's, and the guest goes on.
pub(crate) fn read_only_stack(device: &Device) -> Outcome {
    let guest = Guest::with(device, push_and_call())?;
    if guest.machine.extension(kb::KVM_CAP_READONLY_MEM) == 0 {
        return Err(Fail::skip("READONLY_MEM is not offered"));
    }
    let memory = Mapping::anonymous(PAGE)?;
    let flags = kb::KVM_MEM_READONLY;
    guest.machine.set_slot(1, flags, PLACE, &memory, 0, PAGE)?;
    let top = PLACE + 0x800;
    guest.prepare(top, None)?;
    // PUSH, CALL and MOV before the last LEA take 3, 3, 2 and 5 bytes; LEA and the other CALL 7 and 2.
    let pushed = [0x77, CODE + 13, CODE + 22];
    for (place, value) in (1..).zip(pushed) {
        guest.cpu.run_expecting(&Exit::MmioWrite {
            address: top - 8 * place,
            data: value.to_le_bytes().to_vec(),
        })?;
    }
    guest.cpu.run_until_done()?;
    check_eq!(guest.cpu.regs()?.rdi, top - 24, "RSP");
    check_eq!(memory.read_u64(0x800 - 8), 0, "the memory");
    Ok(())
}

pub(crate) fn delete_slot(device: &Device) -> Outcome {
    let guest = Guest::new(device)?;
    let memory = Mapping::anonymous(PAGE)?;
    guest.read_hole(PLACE)?;
    for round in 1..4 {
        memory.write_u64(0, round);
        guest.machine.set_slot(1, 0, PLACE, &memory, 0, PAGE)?;
        check_eq!(guest.read(PLACE)?, round, "with the slot");
        guest.machine.set_slot(1, 0, PLACE, &memory, 0, 0)?;
        guest.read_hole(PLACE)?;
    }
    Ok(())
}

pub(crate) fn move_slot(device: &Device) -> Outcome {
    const LATER: u64 = PLACE + 0x40_0000;
    let guest = Guest::new(device)?;
    let memory = Mapping::anonymous(PAGE)?;
    memory.write_u64(0, 6);
    guest.machine.set_slot(1, 0, PLACE, &memory, 0, PAGE)?;
    check_eq!(guest.read(PLACE)?, 6, "at the first place");
    guest.machine.set_slot(1, 0, LATER, &memory, 0, PAGE)?;
    check_eq!(guest.read(LATER)?, 6, "at the second place");
    guest.read_hole(PLACE)
}

pub(crate) fn two_slots_one_memory(device: &Device) -> Outcome {
    let guest = Guest::new(device)?;
    let memory = Mapping::anonymous(2 * PAGE)?;
    guest.machine.set_slot(1, 0, PLACE, &memory, 0, 2 * PAGE)?;
    guest
        .machine
        .set_slot(2, 0, PLACE + 0x10_0000, &memory, PAGE, PAGE)?;
    guest.write(PLACE + 0x1000, 8)?;
    check_eq!(guest.read(PLACE + 0x10_0000)?, 8, "by the second slot");
    guest.write(PLACE + 0x10_0000, 9)?;
    check_eq!(guest.read(PLACE + 0x1000)?, 9, "by the first slot");
    Ok(())
}

pub(crate) fn dontneed(device: &Device) -> Outcome {
    let guest = Guest::new(device)?;
    let memory = Mapping::anonymous(4 * PAGE)?;
    guest.machine.set_slot(1, 0, PLACE, &memory, 0, 4 * PAGE)?;
    for round in 1..4 {
        guest.write(PLACE + 0x1000, round)?;
        guest.write(PLACE + 0x2000, round)?;
        memory.advise(0x1000, PAGE, libc::MADV_DONTNEED)?;
        check_eq!(
            guest.read(PLACE + 0x1000)?,
            0,
            "the page that was given back"
        );
        check_eq!(guest.read(PLACE + 0x2000)?, round, "the page behind it");
    }
    Ok(())
}

pub(crate) fn unmapped(device: &Device) -> Outcome {
    let guest = Guest::new(device)?;
    let memory = Mapping::anonymous(PAGE)?;
    guest.machine.set_slot(1, 0, PLACE, &memory, 0, PAGE)?;
    guest.write(PLACE, 1)?;
    drop(memory);
    for write in [None, Some(2)] {
        guest.prepare(PLACE, write)?;
        expect_errno(
            guest.cpu.run_raw(),
            libc::EFAULT,
            "KVM_RUN of a guest that touches it",
        )?;
    }
    // The guest is none the worse for it elsewhere.
    check_eq!(guest.read(rvisor_tests::layout::DATA)?, 0, "other memory");
    Ok(())
}

pub(crate) fn copy_on_write(device: &Device) -> Outcome {
    let guest = Guest::new(device)?;
    let memory = Mapping::anonymous(PAGE)?;
    guest.machine.set_slot(1, 0, PLACE, &memory, 0, PAGE)?;
    guest.write(PLACE, 1)?;
    // A child that holds the same pages: the guest's next write must not be seen there.
    let (mut reader, writer) = ktap::pipe()?;
    // SAFETY: The child only reads a pipe and its own copy of the memory, and ends.
    let pid = unsafe { libc::fork() };
    if pid == 0 {
        drop(writer);
        let mut nothing = [0];
        let waited = std::io::Read::read(&mut reader, &mut nothing).is_ok();
        let seen = memory.read_u64(0);
        // SAFETY: Ends the child at once.
        unsafe { libc::_exit(if waited { seen as i32 } else { 99 }) };
    }
    guest.write(PLACE, 2)?;
    drop(writer);
    let mut status = 0;
    // SAFETY: Waits for the child that was made above.
    unsafe { libc::waitpid(pid, &raw mut status, 0) };
    check_eq!(libc::WEXITSTATUS(status), 1, "what the child has");
    check_eq!(memory.read_u64(0), 2, "what the parent has");
    check_eq!(guest.read(PLACE)?, 2, "what the guest has");
    Ok(())
}
