// SPDX-License-Identifier: GPL-2.0
//! Changes while the guest runs: another thread makes them under it.

use crate::guests::{Guest, PAGE, PLACE};
use rvisor_tests::guest::{self, Mode};
use rvisor_tests::layout::{AP_STACK, CODE, DATA, DONE_PORT, HOLE};
use rvisor_tests::mapping::Mapping;
use rvisor_tests::userfault::Userfault;
use rvisor_tests::{check, check_eq, guest_code, Cpu, Device, Exit, Fail, Outcome};
use std::time::{Duration, Instant};

/// A guest ends where it finds this to be not 0.
pub(crate) const STOP: u64 = DATA;

// Counts in RCX and writes the count to [RSI], until it is told to stop.
guest_code!(
    pub(crate) count_into,
    code64,
    [
        "sti",
        "2: inc rcx",
        "mov [rsi], rcx",
        "cmp qword ptr [{stop}], 0",
        "je 2b",
        "out {done}, al",
    ],
    stop = STOP,
    done = DONE_PORT
);

// Moves words from a device to [RSI], which is emulated, until it is told to stop.
guest_code!(
    pub(crate) move_into,
    code64,
    [
        "sti",
        "mov rdx, rsi",
        "2: mov esi, {hole}",
        "mov rdi, rdx",
        "movsq",
        "cmp qword ptr [{stop}], 0",
        "je 2b",
        "out {done}, al",
    ],
    hole = HOLE,
    stop = STOP,
    done = DONE_PORT
);

/// Runs a guest to its end; whatever device it reads gives a count, and what it writes to one is dropped.
fn run_to_end(cpu: &Cpu) -> Outcome {
    let mut count = 0_u64;
    loop {
        match cpu.run()? {
            Exit::MmioRead { .. } => {
                count += 1;
                cpu.answer_mmio(&count.to_le_bytes());
            }
            Exit::MmioWrite { .. } => {}
            exit if exit.is_done() => return Ok(()),
            exit => return Err(cpu.unexpected(&exit)),
        }
    }
}

/// Runs `change` while the guest of `cpus` runs, then stops it.
pub(crate) fn beside(guest: &Guest, others: Vec<Cpu>, change: impl FnOnce() -> Outcome) -> Outcome {
    std::thread::scope(|scope| {
        let mut running = vec![scope.spawn(|| run_to_end(&guest.cpu))];
        for cpu in others {
            running.push(scope.spawn(move || run_to_end(&cpu)));
        }
        let changed = change();
        guest.machine.memory.write_u64(STOP, 1);
        for thread in running {
            let ended = thread
                .join()
                .map_err(|_| Fail::new("a vCPU's thread panicked"))?;
            ended.map_err(|fail| fail.during("the guest"))?;
        }
        changed
    })
}

/// Waits until the word is another one.
pub(crate) fn wait_for_change(memory: &Mapping, offset: u64) -> Outcome {
    let old = memory.read_u64(offset);
    let end = Instant::now() + Duration::from_secs(2);
    while memory.read_u64(offset) == old {
        check!(
            Instant::now() < end,
            "the guest's writes do not come through: {old:#x} stays"
        );
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

/// Checks that the guest, which runs on, does not write here.
fn check_still(memory: &Mapping, what: &str) -> Outcome {
    let before = memory.read_u64(0);
    std::thread::sleep(Duration::from_millis(3));
    check_eq!(memory.read_u64(0), before, "{what}: the word");
    Ok(())
}

fn slots_under(device: &Device, code: &[u8]) -> Outcome {
    let guest = Guest::with(device, code)?;
    let memory = [Mapping::anonymous(PAGE)?, Mapping::anonymous(PAGE)?];
    let set = |address: u64, memory: &Mapping, length: usize| {
        guest.machine.set_slot(1, 0, address, memory, 0, length)
    };
    guest.prepare(PLACE, None)?;
    beside(&guest, Vec::new(), || {
        for round in 0..40 {
            let (first, second) = (&memory[round & 1], &memory[!round & 1]);
            set(PLACE, first, PAGE)?;
            wait_for_change(first, 0)?;
            // To another address, and back.
            set(PLACE + 0x20_0000, first, PAGE)?;
            check_still(first, "the slot moved away")?;
            set(PLACE, first, PAGE)?;
            wait_for_change(first, 0)?;
            set(PLACE, first, 0)?;
            check_still(first, "the slot is gone")?;
            check_still(second, "the other memory")?;
        }
        Ok(())
    })
}

/// Slots move and go under a guest that writes to them: afterwards it writes there no more.
pub(crate) fn slots_change(device: &Device) -> Outcome {
    slots_under(device, count_into())
}

/// The same where the writes are an emulated instruction's.
pub(crate) fn slots_change_under_emulation(device: &Device) -> Outcome {
    slots_under(device, move_into())
}

/// A slot is gone only when an emulated write to it that is under way has ended: after that the memory is
/// the process's alone.
pub(crate) fn delete_waits_for_emulation(device: &Device) -> Outcome {
    const SOON: Duration = Duration::from_millis(100);
    let guest = Guest::with(device, move_into())?;
    let memory = Mapping::anonymous(PAGE)?;
    let fault = Userfault::new(&memory)?;
    guest.machine.set_slot(1, 0, PLACE, &memory, 0, PAGE)?;
    guest.prepare(PLACE, None)?;
    beside(&guest, Vec::new(), || {
        let missed = fault.wait(Duration::from_secs(2))?;
        let address = missed.ok_or_else(|| Fail::new("the guest does not write"))?;
        // The kernel waits for a page inside of the guest's write.
        let (sender, receiver) = std::sync::mpsc::channel();
        let (guest, memory) = (&guest, &memory);
        std::thread::scope(|scope| {
            scope.spawn(move || {
                let deleted = guest.machine.set_slot(1, 0, PLACE, memory, 0, 0);
                sender.send(deleted.is_ok()).ok();
            });
            let early = receiver.recv_timeout(SOON);
            fault.supply(address, 0)?;
            check!(
                early.is_err(),
                "the slot went while a write to it was under way"
            );
            let late = receiver.recv_timeout(Duration::from_secs(2));
            check_eq!(late, Ok(true), "the slot's end");
            check_still(memory, "the slot is gone")
        })
    })
}

/// A slot goes while a fault on it waits for its page: the page that comes then is not the guest's.
pub(crate) fn slot_goes_during_a_fault(device: &Device) -> Outcome {
    let guest = Guest::with(device, count_into())?;
    let memory = Mapping::anonymous(PAGE)?;
    let fault = Userfault::new(&memory)?;
    guest.machine.set_slot(1, 0, PLACE, &memory, 0, PAGE)?;
    guest.prepare(PLACE, None)?;
    beside(&guest, Vec::new(), || {
        let missed = fault.wait(Duration::from_secs(2))?;
        let address = missed.ok_or_else(|| Fail::new("the guest does not write"))?;
        let (guest, memory) = (&guest, &memory);
        std::thread::scope(|scope| {
            // KVM waits for the fault here.
            let deleting = scope.spawn(move || guest.machine.set_slot(1, 0, PLACE, memory, 0, 0));
            std::thread::sleep(Duration::from_millis(30));
            fault.supply(address, 0x77)?;
            deleting
                .join()
                .map_err(|_| Fail::new("the thread panicked"))??;
            check_still(memory, "the slot is gone")
        })?;
        std::thread::sleep(Duration::from_millis(20));
        check_still(memory, "the slot is gone, later")?;
        check!(memory.read_u64(8) == 0x77, "the rest of the page");
        Ok(())
    })
}

fn more_cpus(guest: &Guest) -> Result<Vec<Cpu>, Fail> {
    let second = guest.machine.vcpu(1)?;
    guest::enter(&second, Mode::Long, CODE, AP_STACK)?;
    let mut regs = second.regs()?;
    regs.rsi = PLACE + 0x1008;
    second.set_regs(&regs)?;
    Ok(vec![second])
}

/// Pages are given back under two CPUs that write to them all the time: both find the new ones.
pub(crate) fn pages_go(device: &Device) -> Outcome {
    let guest = Guest::with(device, count_into())?;
    let memory = Mapping::anonymous(2 * PAGE)?;
    guest.machine.set_slot(1, 0, PLACE, &memory, 0, 2 * PAGE)?;
    guest.prepare(PLACE, None)?;
    let others = more_cpus(&guest)?;
    beside(&guest, others, || {
        for _ in 0..60 {
            wait_for_change(&memory, 0)?;
            wait_for_change(&memory, 0x1008)?;
            memory.advise(0, 2 * PAGE, libc::MADV_DONTNEED)?;
        }
        Ok(())
    })
}

/// A page becomes read-only and writable again, is replaced and is copied, under a guest that writes to it.
pub(crate) fn rights_change(device: &Device) -> Outcome {
    let guest = Guest::with(device, count_into())?;
    let memory = Mapping::anonymous(PAGE)?;
    guest.machine.set_slot(1, 0, PLACE, &memory, 0, PAGE)?;
    guest.prepare(PLACE, None)?;
    beside(&guest, Vec::new(), || {
        for _ in 0..20 {
            wait_for_change(&memory, 0)?;
            memory.replace(0, PAGE)?;
            wait_for_change(&memory, 0)?;
            // A child's copy stays as it is.
            let child = crate::process::Child::fork(|| {
                let old = memory.read_u64(0);
                std::thread::sleep(Duration::from_millis(2));
                i32::from(memory.read_u64(0) != old)
            })?;
            wait_for_change(&memory, 0)?;
            check_eq!(child.end()?, 0, "whether the child's page changed");
        }
        Ok(())
    })
}
