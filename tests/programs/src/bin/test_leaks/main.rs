// SPDX-License-Identifier: GPL-2.0
//! Machines that end leave nothing behind: no object in any of the kernel's slab caches, no page, no file.
//!
//! `make test-leaks` runs this again and again and looks at the host around all of it.

use rvisor_tests::guest::{self, Mode};
use rvisor_tests::host::free_kib;
use rvisor_tests::layout::DONE_PORT;
use rvisor_tests::{check, guest_code, ktap, tests, Context, Device, Fail, Machine, Outcome};
use std::collections::HashMap;

guest_code!(
    counting,
    code64,
    ["2: inc r15", "out {done}, al", "jmp 2b"],
    done = DONE_PORT
);

/// Address ranges of vmalloc that the kernel keeps after their end: it frees them together when they come to
/// 32 MiB, and none of those that a vCPU's FPU state takes is smaller than two pages.
const LAZY_RANGES: i64 = (32 << 20) / (2 * 4096);

/// Runs of each machine.
const RUNS: u64 = 10;

/// Machines: those of KVM take some twenty times as long.
fn machines(device: &Device) -> u64 {
    if device.path().ends_with("kvm") {
        40
    } else {
        600
    }
}

/// Objects in use, by slab cache.
fn slabs() -> Result<HashMap<String, i64>, Fail> {
    let text = std::fs::read_to_string("/proc/slabinfo").during("/proc/slabinfo")?;
    let found: HashMap<_, _> = text
        .lines()
        .skip(2)
        .filter_map(|line| {
            let mut words = line.split_whitespace();
            Some((words.next()?.to_owned(), words.next()?.parse().ok()?))
        })
        .collect();
    check!(found.len() > 10, "/proc/slabinfo names {}", found.len());
    Ok(found)
}

/// Open files of the host.
fn files() -> Result<i64, Fail> {
    let text = std::fs::read_to_string("/proc/sys/fs/file-nr").during("file-nr")?;
    text.split_whitespace()
        .next()
        .and_then(|word| word.parse().ok())
        .ok_or_else(|| Fail::new(format!("file-nr says {text:?}")))
}

/// Makes machines one after the other, with two virtual CPUs each; one runs, both end.
fn live_and_end(device: &Device, count: u64) -> Outcome {
    for number in 0..count {
        let machine = Machine::with_irqchip(device)?;
        let cpu = machine.vcpu(0)?;
        let _idle = machine.vm.create_vcpu(1).during("KVM_CREATE_VCPU")?;
        guest::load(&machine, &cpu, Mode::Long, counting())?;
        for _ in 0..RUNS {
            cpu.run_until_done()
                .map_err(|fail| fail.during(&format!("machine {number}")))?;
        }
    }
    Ok(())
}

/// What is freed later is freed now: grace periods pass, and so do the work items behind them.
fn settle() {
    std::thread::sleep(std::time::Duration::from_millis(300));
}

fn nothing_stays(device: &Device) -> Outcome {
    let count = machines(device);
    // The first machines fill caches that stay.
    live_and_end(device, count / 10)?;
    settle();
    let (slabs_before, files_before, free_before) = (slabs()?, files()?, free_kib()?);
    live_and_end(device, count)?;
    settle();
    let (slabs_after, files_after, free_after) = (slabs()?, files()?, free_kib()?);
    // One object of each machine would be `count` of them. A cache counts its partly used slabs as full,
    // which is some hundred objects.
    let allowed = (count * 3 / 4) as i64;
    for (cache, after) in &slabs_after {
        let before = slabs_before.get(cache).unwrap_or(&0);
        // Where the kernel looks for leaks itself, it has two objects about each range.
        let lazy = match cache.as_str() {
            "vmap_area" | "kmemleak_object" | "kmemleak_scan_area" => LAZY_RANGES,
            _ => 0,
        };
        check!(
            after - before < allowed + lazy,
            "{cache} went from {before} to {after} objects in {count} machines"
        );
    }
    check!(
        files_after - files_before < 10,
        "open files went from {files_before} to {files_after}"
    );
    // A page of each machine would be 4 KiB times `count`.
    check!(
        free_after + 3 * count >= free_before,
        "free memory went from {free_before} to {free_after} KiB in {count} machines"
    );
    Ok(())
}

fn main() -> std::process::ExitCode {
    ktap::main(tests![nothing_stays])
}
