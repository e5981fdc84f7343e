// SPDX-License-Identifier: GPL-2.0

//! `rvisor up`: the machines that a file describes.

mod file;

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::{mpsc, Arc, Mutex};
use std::thread;
use std::time::Duration;

use rustix::event::{poll, PollFd, PollFlags};
use serde::Serialize;

use crate::console::{Signals, Wake};
use crate::control::{Client, Ended, Nothing, Request};
use crate::devices::lock;
use crate::error::{failed, say, Error, Result};
use crate::outcome::{STATUS_KILLED, STATUS_SIGNAL};
use crate::registry::{self, Name};
use crate::{client, detach};

/// The longest piece of a line that is shown at once.
const LINE: u64 = 4096;

/// A machine that was started, for `--json`.
#[derive(Serialize)]
struct Started<'a> {
    name: &'a Name,
}

/// Starts the machines that `path` describes, all or none. Unless `detached`, shows what they say until all have
/// ended; the first signal stops them with `timeout` for each, a second one kills them. Returns the exit status:
/// that of the first machine that ended otherwise than by switching itself off, else 0.
///
/// # Errors
///
/// [`Error::Input`] where the file is wrong or a name is taken; what a machine's start gives.
pub fn up(path: &Path, detached: bool, json: bool, timeout: Duration) -> Result<u8> {
    let machines = file::read(path)?;
    for machine in &machines {
        if registry::connect(&machine.name)?.is_some() {
            return Err(Error::input(
                format!("a machine named {} runs already", machine.name),
                format!(
                    "end it by 'rvisor stop {}', or rename one of the two",
                    machine.name
                ),
            ));
        }
    }
    let signals = Signals::catch()?;
    let mut started: Vec<Name> = Vec::new();
    for machine in &machines {
        let result = detach::start(&machine.words, path.parent());
        let status = match (result, signals.take()) {
            (Ok(Ok(name)), None) => {
                say(format_args!("{name} runs"));
                started.push(name);
                continue;
            }
            (Ok(Ok(name)), Some(signal)) => {
                started.push(name);
                Ok(STATUS_SIGNAL.saturating_add(signal))
            }
            (Ok(Err(status)), _) => {
                say(format_args!("{} did not start", machine.name));
                Ok(status)
            }
            (Err(error), _) => Err(error),
        };
        end_all(&started, client::kill);
        return status;
    }
    if detached {
        if json {
            let started: Vec<_> = started.iter().map(|name| Started { name }).collect();
            client::print_json(&started)?;
        }
        return Ok(0);
    }
    watch(&started, &signals, timeout)
}

/// Ends all these machines at the same time, by `end`, and waits for that.
fn end_all(names: &[Name], end: impl Fn(&Name) -> Result<Ended> + Sync) {
    thread::scope(|scope| {
        for name in names {
            // One that has gone meanwhile needs nothing.
            scope.spawn(|| {
                end(name)
                    .map(drop)
                    .or_else(|_| client::kill(name).map(drop))
            });
        }
    });
}

/// Shows what the machines say until the last has ended.
fn watch(names: &[Name], signals: &Signals, timeout: Duration) -> Result<u8> {
    let (tell, told) = mpsc::channel();
    let wake = Wake::new().map_err(failed("making an eventfd"))?;
    let width = names.iter().map(|name| name.to_string().len()).max();
    let width = width.unwrap_or_default();
    let output = Arc::new(Mutex::new(io::stdout()));
    for name in names {
        let (name, tell, wake, output) = (
            name.clone(),
            tell.clone(),
            wake.clone(),
            Arc::clone(&output),
        );
        thread::spawn(move || {
            let status = follow(&name, width, &output).unwrap_or_else(|error| {
                say(error);
                STATUS_KILLED
            });
            // The receiver lives until all have told.
            let _ = tell.send(status);
            wake.wake();
        });
    }
    let mut statuses = Vec::new();
    let mut signalled: Option<u8> = None;
    while statuses.len() < names.len() {
        let mut fds = [
            PollFd::from_borrowed_fd(wake.as_fd(), PollFlags::IN),
            PollFd::from_borrowed_fd(signals.as_fd(), PollFlags::IN),
        ];
        // A signal interrupts it, and is found below.
        let _ = poll(&mut fds, None);
        wake.clear();
        statuses.extend(told.try_iter());
        if let Some(signal) = signals.take() {
            let names = names.to_vec();
            let first = signalled.replace(signal).is_none();
            thread::spawn(move || match first {
                true => end_all(&names, |name| client::stop(name, timeout)),
                false => end_all(&names, client::kill),
            });
        }
    }
    let bad = statuses.into_iter().find(|status| *status != 0);
    Ok(bad.unwrap_or_else(|| signalled.map_or(0, |signal| STATUS_SIGNAL.saturating_add(signal))))
}

/// Shows the lines of a machine's console until it has ended; returns its exit status.
fn follow(name: &Name, width: usize, output: &Mutex<io::Stdout>) -> Result<u8> {
    let mut end = Client::connect(name)?;
    end.send(&Request::Wait {})?;
    let mut console = Client::connect(name)?;
    let Nothing {} = console.call(&Request::Console {})?;
    let mut lines = console.into_stream();
    lines
        .get_ref()
        .set_read_timeout(None)
        .map_err(failed("setting a socket"))?;
    while let Some(line) = read_line(&mut lines) {
        let mut output = lock(output);
        // Nobody reads any more: the machines run on all the same.
        let _ = writeln!(output, "{name:width$} | {line}");
    }
    let ended: Option<Ended> = end.receive(None)?;
    let ended = ended.ok_or_else(|| Error::call("waiting", io::Error::other("no answer")))?;
    let _ = writeln!(lock(output), "{name:width$} | rvisor: {}", ended.outcome);
    Ok(ended.status)
}

/// A line without its end, or a piece of a long one, free of control characters; `None` at the end of all.
fn read_line(lines: &mut BufReader<impl Read>) -> Option<String> {
    let mut line = Vec::new();
    let count = lines.take(LINE).read_until(b'\n', &mut line).ok()?;
    let text = String::from_utf8_lossy(&line);
    (count > 0).then(|| {
        let plain = |c: &char| *c == '\t' || !c.is_control();
        text.trim_end_matches(['\r', '\n'])
            .chars()
            .filter(plain)
            .collect()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_bounded_and_plain() {
        let long = "x".repeat(LINE as usize + 1);
        let text = format!("one\r\n\x1b[31mred\n\n{long}\nend");
        let mut lines = BufReader::new(text.as_bytes());
        let read: Vec<String> = std::iter::from_fn(|| read_line(&mut lines)).collect();
        assert_eq!(read, ["one", "[31mred", "", &long[1..], "x", "end"]);
    }
}
