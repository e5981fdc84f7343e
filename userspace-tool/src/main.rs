// SPDX-License-Identifier: GPL-2.0

//! The command `rvisor`. All of it is in the library; this is the exit status.

use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use rvisor::arguments::{self, Command, RunOptions};
use rvisor::control::Request;
use rvisor::error::{print, say, Error, Result};
use rvisor::registry::Name;
use rvisor::snapshot::{self, Snapshot};
use rvisor::{check, client, console, detach, generate, machine, stat, supervisor, top, trace, up};

fn main() -> ExitCode {
    let command = match arguments::parse() {
        Ok(command) => command,
        Err(status) => return ExitCode::from(status),
    };
    let starts = matches!(
        command,
        Command::Run(_) | Command::Restore { .. } | Command::Up(_)
    );
    let status = command_status(command).unwrap_or_else(|error| {
        let next = match error {
            Error::Call { .. } if starts => "; 'rvisor check' tells what this host lacks",
            _ => "",
        };
        say(format_args!("{error}{next}"));
        error.status()
    });
    ExitCode::from(status)
}

/// Does what the user wants. Returns the exit status.
fn command_status(command: Command) -> Result<u8> {
    match command {
        Command::Run(options) => return run(&options),
        Command::Check { device } => return check::run(&device),
        Command::Console { name, raw_console } => return console::attach(&name, raw_console),
        Command::Stop { name, timeout } => {
            let timeout = Duration::from_secs(timeout.into());
            return Ok(client::stop(&name, timeout)?.status);
        }
        Command::Restore { detach: true, .. } => return detach(),
        Command::Restore {
            file,
            name,
            detached,
            ..
        } => return restore(&file, name, detached),
        Command::Up(options) => return up::up(&options),
        Command::Ps { json } => return client::ps(json),
        Command::Kill(machine) => drop(client::kill(&machine.name)?),
        Command::Pause(machine) => client::tell(&machine.name, &Request::Pause {})?,
        Command::Resume(machine) => client::tell(&machine.name, &Request::Resume {})?,
        Command::Balloon { name, size: bytes } => {
            client::tell(&name, &Request::Balloon { bytes })?;
        }
        Command::Snapshot { name, file } => snapshot::take(&name, &file)?,
        Command::Generate { directory } => generate::run(&directory)?,
        Command::Stat { name, json } => stat::print(&name, json)?,
        Command::Top => return top::run(),
        Command::Trace {
            name,
            reason: reasons,
            cpu,
            json,
        } => trace::run(&name, trace::Wanted { reasons, cpu }, json)?,
    }
    Ok(0)
}

/// Starts this command's machine in another process. Returns the exit status.
fn detach() -> Result<u8> {
    Ok(match detach::start(&detach::words(), None, None)? {
        Ok((name, _)) => {
            print(&format!("{name}\n"))?;
            0
        }
        Err(status) => status,
    })
}

fn run(options: &RunOptions) -> Result<u8> {
    if options.detach {
        return detach();
    }
    if let Some(status) = supervisor::share(options)? {
        return Ok(status);
    }
    machine::run(options).map(|outcome| outcome.status())
}

/// Runs the machine of a snapshot. Returns the exit status.
fn restore(file: &Path, name: Option<Name>, detached: bool) -> Result<u8> {
    let snapshot = Snapshot::open(file)?;
    let head = &snapshot.head;
    // All that goes by the machine's name has the same one: its cgroup, its socket and its log.
    let name = name.unwrap_or_else(|| head.name.clone());
    let options = arguments::run_options(&head.origin, Some(name), detached)?;
    if let Some(status) = supervisor::share(&options)? {
        return Ok(status);
    }
    // Its paths are relative to where it was started; one that is gone fails where it is needed.
    let _ = std::env::set_current_dir(&head.origin.folder);
    machine::restore(&options, snapshot).map(|outcome| outcome.status())
}
