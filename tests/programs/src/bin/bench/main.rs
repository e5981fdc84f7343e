// SPDX-License-Identifier: GPL-2.0
//! What exits and machines cost, by the TSC: where that advances by one an instruction, as in Bochs, the
//! figures are the lengths of the host's paths in instructions and the same on every run.
//!
//! `bench --device PATH` prints `row<TAB>figure` lines. `bench load` is for the guest of a machine of the tool's, with
//! a disk and a network: it prints its own, with `row<TAB>` in front; `disk`, `udp`, `sent`, `received` behind it name
//! some of them. `bench serve` on the host answers it.

mod guests;
mod load;
mod machines;
mod tool;

use core::arch::x86_64::_rdtsc;
use guests::Row;
use rvisor_tests::{Device, Fail};
use std::process::ExitCode;

fn tsc() -> u64 {
    // SAFETY: RDTSC reads a counter; CR4.TSD is clear for userspace in Linux.
    unsafe { _rdtsc() }
}

fn report(device: &Device) -> Result<(), Fail> {
    for row in guests::ROWS {
        let Row { name, .. } = row;
        println!(
            "{name}\t{}",
            row.mean(device).map_err(|fail| fail.during(name))?
        );
    }
    println!(
        "first touch of a 4 KiB page\t{}",
        guests::first_touch(device)?
    );
    let (make, end) = machines::make_and_end(device)?;
    println!("VM with irqchip and one vCPU: make\t{make}");
    println!("VM with irqchip and one vCPU: end\t{end}");
    println!(
        "VM with irqchip and one vCPU: KiB\t{}",
        machines::kernel_memory(device)?
    );
    tool::report(device).map_err(|fail| fail.during("rvisor run"))?;
    Ok(())
}

fn main() -> ExitCode {
    let (device, words) = match Device::from_arguments() {
        Ok(found) => found,
        Err(text) => {
            eprintln!("{text}");
            return ExitCode::from(2);
        }
    };
    let result = match words.first().map(String::as_str) {
        None => report(&device).map_err(|fail| fail.during(&device.path())),
        Some("load") => load::run(&words[1..]),
        Some("serve") => load::serve(),
        Some(word) => {
            eprintln!("{word}: bench takes 'load' or 'serve', or nothing but --device PATH");
            return ExitCode::from(2);
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(fail) => {
            eprintln!("bench: {fail:?}");
            ExitCode::FAILURE
        }
    }
}
