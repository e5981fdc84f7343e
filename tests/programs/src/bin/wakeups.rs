// SPDX-License-Identifier: GPL-2.0
//! Wakes halted guests a million times each way; the first wake-up that is lost is the end of it.

use rvisor_tests::{wakeups, Device, Fail};
use std::process::ExitCode;
use std::time::Instant;

/// Wake-ups of each kind, unless the command line says otherwise.
const ROUNDS: u64 = 1_000_000;

/// A way to wake a guest so often.
type Way = fn(&Device, u64) -> Result<(), Fail>;

fn main() -> ExitCode {
    let (device, words) = match Device::from_arguments() {
        Ok(found) => found,
        Err(text) => {
            eprintln!("{text}");
            return ExitCode::from(2);
        }
    };
    let rounds = match words.as_slice() {
        [] => ROUNDS,
        [word] if word.parse::<u64>().is_ok_and(|rounds| rounds > 0) => {
            word.parse().unwrap_or(ROUNDS)
        }
        _ => {
            eprintln!("usage: wakeups [--device PATH] [ROUNDS]");
            return ExitCode::from(2);
        }
    };
    let ways: [(&str, Way); 3] = [
        ("messages", wakeups::by_messages),
        ("deadlines", wakeups::by_deadlines),
        ("IPIs", wakeups::by_ipis),
    ];
    let mut failed = false;
    for (name, way) in ways {
        let began = Instant::now();
        match way(&device, rounds) {
            Ok(()) => {
                let each = began.elapsed().as_nanos() / u128::from(rounds);
                println!("{rounds} wake-ups by {name}: none lost, {each} ns each");
            }
            Err(Fail::Skipped(why)) => println!("{name}: skipped, {why}"),
            Err(Fail::Failed(why)) => {
                println!("{name}: {why}");
                failed = true;
            }
        }
    }
    ExitCode::from(u8::from(failed))
}
