// SPDX-License-Identifier: GPL-2.0

//! The command `rvisor`. All of it is in the library; this is the exit status.

use std::process::ExitCode;
use std::time::Duration;

use rvisor::arguments::{self, Command, RunOptions};
use rvisor::error::{Error, Result};
use rvisor::{check, client, console, detach, machine, supervisor, up};

fn main() -> ExitCode {
    let command = match arguments::parse() {
        Ok(command) => command,
        Err(status) => return ExitCode::from(status),
    };
    let starts = matches!(command, Command::Run(_) | Command::Up { .. });
    let status = command_status(command).unwrap_or_else(|error| {
        let next = match error {
            Error::Call { .. } if starts => "; 'rvisor check' tells what this host lacks",
            _ => "",
        };
        eprintln!("rvisor: {error}{next}");
        error.status()
    });
    ExitCode::from(status)
}

/// Does what the user wants. Returns the exit status.
fn command_status(command: Command) -> Result<u8> {
    let seconds = |count: u32| Duration::from_secs(count.into());
    match command {
        Command::Run(options) => run(&options),
        Command::Check(options) => Ok(check::run(&options.device)),
        Command::Ps { json } => client::ps(json).map(|()| 0),
        Command::Console(machine) => console::attach(&machine.name),
        Command::Stop { name, timeout } => {
            client::stop(&name, seconds(timeout)).map(|ended| ended.status)
        }
        Command::Kill(machine) => client::kill(&machine.name).map(|_| 0),
        Command::Pause(machine) => client::tell(&machine.name, "pause").map(|()| 0),
        Command::Resume(machine) => client::tell(&machine.name, "resume").map(|()| 0),
        Command::Up {
            file,
            detach,
            json,
            timeout,
        } => up::up(&file, detach, json, seconds(timeout)),
    }
}

fn run(options: &RunOptions) -> Result<u8> {
    if options.detach {
        return Ok(match detach::start(&detach::words(), None)? {
            Ok(name) => {
                println!("{name}");
                0
            }
            Err(status) => status,
        });
    }
    if let Some(status) = supervisor::share(options)? {
        return Ok(status);
    }
    let outcome = machine::run(options)?;
    eprintln!("rvisor: {outcome}");
    Ok(outcome.status())
}
