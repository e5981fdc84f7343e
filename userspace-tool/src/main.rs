// SPDX-License-Identifier: GPL-2.0

//! The command `rvisor`. All of it is in the library; this is the exit status.

use std::process::ExitCode;

use rvisor::arguments::{self, Command};
use rvisor::error::Error;
use rvisor::{check, machine};

fn main() -> ExitCode {
    let command = match arguments::parse() {
        Ok(command) => command,
        Err(status) => return ExitCode::from(status),
    };
    let status = match command {
        Command::Run(options) => match machine::run(&options) {
            Ok(outcome) => {
                eprintln!("rvisor: {outcome}");
                outcome.status()
            }
            Err(error) => {
                let next = match error {
                    Error::Input { .. } => "",
                    Error::Call { .. } => "; 'rvisor check' tells what this host lacks",
                };
                eprintln!("rvisor: {error}{next}");
                error.status()
            }
        },
        Command::Check(options) => check::run(&options.device),
    };
    ExitCode::from(status)
}
