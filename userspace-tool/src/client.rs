// SPDX-License-Identifier: GPL-2.0

//! The commands that are about machines which run already: `ps`, `stop`, `kill`, `pause`, `resume` and
//! `balloon`.

use std::time::{Duration, Instant, UNIX_EPOCH};

use rustix::process::{pidfd_send_signal, Signal};
use serde::Serialize;

use crate::control::{Client, Ended, Nothing, Request};
use crate::error::{failed, print, say, Error, Result};
use crate::machine::Status;
use crate::outcome::Outcome;
use crate::registry::{self, Name};
use crate::size;

/// How long a machine that was told to end may take for it before its process is killed.
const INSIST: Duration = Duration::from_secs(5);

/// Prints a table of the machines that run, or an array of what each answers to `status`. Returns the exit status: not
/// 0 where one does not answer.
///
/// # Errors
///
/// [`Error::Call`] where the machines' folder or standard output fails.
pub fn ps(json: bool) -> Result<u8> {
    let (mut machines, mut bad) = (Vec::new(), 0);
    for name in registry::names()? {
        let status = match registry::connect(&name) {
            Ok(Some(stream)) => Client::new(&name, stream).call(&Request::Status {}),
            Ok(None) => {
                registry::sweep(&name);
                continue;
            }
            Err(error) => Err(error),
        };
        match status {
            Ok(status) => machines.push(status),
            // It has ended meanwhile.
            Err(_) if registry::connect(&name).is_ok_and(|found| found.is_none()) => {}
            Err(error) => {
                bad = error.status();
                say(error);
            }
        }
    }
    if json {
        print_json(&machines)?;
    } else {
        let now = UNIX_EPOCH.elapsed().unwrap_or_default();
        print(&table(&machines, now.as_secs()))?;
    }
    Ok(bad)
}

/// The table, for a moment in seconds since 1970.
fn table(machines: &[Status], now: u64) -> String {
    let mut table = format!(
        "{:<16} {:>7} {:<8} {:>4} {:>8} {:>9}  DEVICE\n",
        "NAME", "PID", "STATE", "CPUS", "MEMORY", "UP"
    );
    for machine in machines {
        let up = now.saturating_sub(machine.started);
        let up = format!("{}:{:02}:{:02}", up / 3600, up / 60 % 60, up % 60);
        let line = format!(
            "{:<16} {:>7} {:<8} {:>4} {:>8} {up:>9}  {}{}",
            machine.name,
            machine.pid,
            machine.state,
            machine.cpus,
            size::text(machine.memory),
            machine.device.display(),
            machine
                .reason
                .as_ref()
                .map_or(String::new(), |reason| format!(" ({reason})")),
        );
        // A machine has one line, whatever it says of itself.
        table += &(line.replace('\n', " ") + "\n");
    }
    table
}

/// Prints a value as one line of JSON.
///
/// # Errors
///
/// [`Error::Call`] where standard output fails.
pub fn print_json(value: &impl Serialize) -> Result<()> {
    let text = serde_json::to_string(value).map_err(failed("writing JSON"))?;
    print(&(text + "\n"))
}

/// Presses the machine's power button and waits for its end; after `timeout` ends it, at once where that is 0.
/// Returns how it ended.
///
/// # Errors
///
/// [`Error::Input`] where no such machine runs or it is paused, [`Error::Call`] where it can't be ended.
pub fn stop(name: &Name, timeout: Duration) -> Result<Ended> {
    // That would leave the guest no time to see its button, and a socket takes no timeout of 0.
    if timeout.is_zero() {
        return kill(name);
    }
    match end_by(
        &mut Client::connect(name)?,
        &Request::PowerButton {},
        timeout,
    )? {
        Some(ended) => Ok(ended),
        None => {
            say(format_args!(
                "{name} did not switch itself off within {} s: ending it",
                timeout.as_secs()
            ));
            kill(name)
        }
    }
}

/// Ends the machine at once, with its process where that does not answer. Returns how it ended.
///
/// # Errors
///
/// [`Error::Input`] where no such machine runs, [`Error::Call`] where its process can't be killed.
pub fn kill(name: &Name) -> Result<Ended> {
    let mut end = Client::connect(name)?;
    if let Some(ended) = end_by(&mut end, &Request::Kill {}, INSIST)? {
        return Ok(ended);
    }
    if let Some(process) = end.process()? {
        pidfd_send_signal(process, Signal::KILL)
            .map_err(|error| Error::call(format!("killing {name}"), error))?;
    }
    // Its end is that of the connection.
    let _ = end.receive::<Ended>(INSIST);
    Ok(Ended {
        outcome: "it did not answer: its process was killed".to_owned(),
        status: Outcome::Killed.status(),
    })
}

/// Gives the machine a command and waits for its end, in one go, as it may be quick. Returns how it ended; `None` where
/// both together take longer than `patience`.
fn end_by(machine: &mut Client, request: &Request, patience: Duration) -> Result<Option<Ended>> {
    let until = Instant::now() + patience;
    machine.send(&[request, &Request::Wait {}])?;
    match machine.receive(patience)? {
        Some(Nothing {}) => machine.receive(until.saturating_duration_since(Instant::now())),
        None => Ok(None),
    }
}

/// Gives the machine a command without answer: `pause`, `resume`, `balloon`.
///
/// # Errors
///
/// [`Error::Input`] where no such machine runs, or it can't do that now.
pub fn tell(name: &Name, request: &Request) -> Result<()> {
    let Nothing {} = Client::connect(name)?.call(request)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::unix::net::UnixStream;
    use std::thread;

    #[test]
    fn a_machine_that_answers_and_hangs_has_no_second_patience() {
        let (ours, mut theirs) = UnixStream::pair().expect("sockets");
        let patience = Duration::from_millis(400);
        let hangs = thread::spawn(move || {
            thread::sleep(patience / 2);
            theirs.write_all(b"{\"ok\":{}}\n").expect("it is read");
            theirs
        });
        let mut machine = Client::new(&"web".parse().expect("a name"), ours);
        let begin = Instant::now();
        let ended = end_by(&mut machine, &Request::Kill {}, patience).expect("no failure");
        assert!(ended.is_none());
        assert!(begin.elapsed() < patience * 5 / 4, "{:?}", begin.elapsed());
        drop(hangs.join().expect("it has answered"));
    }

    #[test]
    fn the_table_has_a_line_for_each_machine() {
        let status = Status {
            name: "web".parse().expect("a name"),
            pid: 4711,
            state: "paused".to_owned(),
            reason: Some("by\na test".to_owned()),
            cpus: 2,
            memory: 512 << 20,
            balloon: 0,
            device: "/dev/rvisor".into(),
            started: 1000,
        };
        assert_eq!(
            table(&[status], 1000 + 3 * 3600 + 62),
            "NAME                 PID STATE    CPUS   MEMORY        UP  DEVICE\n\
             web                 4711 paused      2  512 MiB   3:01:02  /dev/rvisor (by a test)\n"
        );
    }
}
