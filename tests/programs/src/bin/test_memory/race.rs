// SPDX-License-Identifier: GPL-2.0
//! The process changes its memory at the very moment when a slot of it is being taken away.

use crate::guests::Guest;
use crate::process::Child;
use crate::running::{beside, wait_for_change, STOP};
use rvisor_tests::host::{bind_to_cpu, online_cpus, real_time};
use rvisor_tests::mapping::Mapping;
use rvisor_tests::{check, check_eq, guest_code, Device, Fail, Outcome};
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

/// Enough that taking the slot away lasts for several milliseconds.
const GIBS: u64 = 256;

// Writes a count to each GiB's first page, EDI of them from RSI, and to [R8] after each; again and again.
guest_code!(
    count_sparsely,
    code64,
    [
        "xor edx, edx",
        "2: mov rbx, rsi",
        "mov ecx, edi",
        "3: inc rdx",
        "mov [rbx], rdx",
        "mov [r8], rdx",
        "add rbx, r9",
        "dec ecx",
        "jnz 3b",
        "cmp qword ptr [{stop}], 0",
        "je 2b",
        "out {done}, al",
    ],
    stop = STOP,
    done = rvisor_tests::layout::DONE_PORT
);

/// Waits until the guest has written to all places.
fn wait_for_round(memory: &Mapping, hot: u64) -> Outcome {
    let first = memory.read_u64(hot);
    let end = Instant::now() + Duration::from_secs(2);
    while memory.read_u64(hot) < first + 2 * GIBS {
        check!(
            Instant::now() < end,
            "the guest's writes do not come through"
        );
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

/// A slot of many tables goes, its last page's last, while the guest writes to that page. In the middle the
/// process forks: from then on the page is shared with the child, and the guest's writes are none of its.
pub(crate) fn fork_while_a_slot_goes(device: &Device) -> Outcome {
    const ROUNDS: u64 = 6;
    const LOOK: Duration = Duration::from_millis(2);
    if online_cpus()? < 2 {
        return Err(Fail::skip("the host has one CPU"));
    }
    let guest = Guest::with(device, count_sparsely())?;
    let memory = Mapping::anonymous((GIBS << 30) as usize)?;
    memory.advise(0, memory.len(), libc::MADV_NOHUGEPAGE)?;
    let start = guest.map_gibs(GIBS)?;
    // In the last GiB, apart from the page that is written once in a round.
    let hot = ((GIBS - 1) << 30) + 0x5000;
    let set = |length| guest.machine.set_slot(1, 0, start, &memory, 0, length);
    set(memory.len())?;
    let mut regs = guest.cpu.regs()?;
    (regs.rsi, regs.rdi, regs.r8, regs.r9) = (start, GIBS, start + hot, 1 << 30);
    guest.cpu.set_regs(&regs)?;
    // The guest has a CPU of its own; on the other this thread goes before the one that takes the slot away.
    bind_to_cpu(0, 1)?;
    beside(&guest, Vec::new(), || {
        bind_to_cpu(0, 0)?;
        for round in 0..ROUNDS {
            wait_for_change(&memory, hot)?;
            wait_for_round(&memory, hot)?;
            let (sender, receiver) = channel();
            std::thread::scope(|scope| {
                let deleting = scope.spawn(move || {
                    receiver.recv().ok();
                    set(0)
                });
                // It waits before this begins.
                std::thread::sleep(Duration::from_millis(2));
                real_time(true)?;
                sender.send(()).ok();
                std::thread::sleep(Duration::from_micros(400 * (round + 1)));
                let child = Child::fork(|| {
                    let old = memory.read_u64(hot);
                    let end = Instant::now() + LOOK;
                    while Instant::now() < end {
                        if memory.read_u64(hot) != old {
                            return 1;
                        }
                    }
                    0
                });
                let changed = child.and_then(Child::end);
                real_time(false)?;
                deleting
                    .join()
                    .map_err(|_| Fail::new("the thread panicked"))??;
                check_eq!(
                    changed?,
                    0,
                    "whether the child's page changed, round {round}"
                );
                Ok::<(), Fail>(())
            })?;
            set(memory.len())?;
        }
        Ok(())
    })
}
