// SPDX-License-Identifier: GPL-2.0
//! What exits and machines cost, by the TSC: where that advances by one an instruction, as in Bochs, the
//! figures are the lengths of the host's paths in instructions and the same on every run.
//!
//! `bench --device PATH` prints `row<TAB>figure` lines.

mod guests;
mod machines;

use guests::Row;
use rvisor_tests::{Device, Fail};
use std::process::ExitCode;

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
    Ok(())
}

fn main() -> ExitCode {
    let device = match Device::from_arguments() {
        Ok((device, words)) if words.is_empty() => device,
        Ok((_, words)) => {
            eprintln!("{}: bench takes no arguments but --device PATH", words[0]);
            return ExitCode::from(2);
        }
        Err(text) => {
            eprintln!("{text}");
            return ExitCode::from(2);
        }
    };
    match report(&device) {
        Ok(()) => ExitCode::SUCCESS,
        Err(fail) => {
            eprintln!("bench: {}: {fail:?}", device.path());
            ExitCode::FAILURE
        }
    }
}
