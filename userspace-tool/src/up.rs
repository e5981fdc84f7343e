// SPDX-License-Identifier: GPL-2.0

//! `rvisor up`: the machines that a file describes.

mod file;

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::OwnedFd;
use std::process::Child;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use rustix::event::{poll, PollFd, PollFlags};
use rustix::process::{pidfd_open, Pid, PidfdFlags};
use serde_json::json;

use crate::arguments::UpOptions;
use crate::console::{Filter, Signals};
use crate::control::{Client, Ended, Nothing, Request};
use crate::error::{failed, say, Error, Result, STATUS_HOST};
use crate::outcome::{status_of, STATUS_SIGNAL};
use crate::registry::{self, Name};
use crate::{client, detach};

/// The longest piece of a line that is shown at once.
const LINE: u64 = 4096;
/// The escape character.
const ESC: u8 = 0x1b;
/// How long a machine whose console has ended may take to say how.
const GOODBYE: Duration = Duration::from_secs(5);
/// How long standard output may take for the rest when all machines have ended.
const REST: Duration = Duration::from_secs(2);

/// Starts the machines of a file, all or none. Unless detached, shows what they say until all have ended; the first
/// signal stops them, a second one kills them. Returns the exit status: that of the first machine that ended
/// otherwise than by switching itself off, else 0.
///
/// # Errors
///
/// [`Error::Input`] where the file is wrong or a name is taken; what a machine's start gives.
pub fn up(options: &UpOptions) -> Result<u8> {
    let machines = file::read(&options.file)?;
    for file::Machine { name, .. } in &machines {
        if registry::connect(name)?.is_some() {
            return Err(Error::input(
                format!("a machine named {name} runs already"),
                format!("end it by 'rvisor stop {name}', or rename one of the two"),
            ));
        }
    }
    let width = machines.iter().map(|it| it.name.to_string().len()).max();
    let signals = Signals::catch()?;
    // Dropped by each thread that has shown all of its machine.
    let (shows, shown) = mpsc::channel::<()>();
    let (mut names, mut processes) = (Vec::new(), Vec::new());
    for machine in &machines {
        let status = match detach::start(&machine.words, options.file.parent()) {
            Ok(Ok((name, process))) => {
                names.push(name.clone());
                processes.push(process);
                if let Some(signal) = signals.take() {
                    Ok(STATUS_SIGNAL.saturating_add(signal))
                } else {
                    say(format_args!("{name} runs"));
                    if !options.detach {
                        let screen = Screen::new(&name, width.unwrap_or(0), options.raw_console);
                        let shows = shows.clone();
                        thread::spawn(move || {
                            show(&name, screen);
                            drop(shows);
                        });
                    }
                    continue;
                }
            }
            Ok(Err(status)) => {
                say(format_args!("{} did not start", machine.name));
                Ok(status)
            }
            Err(error) => Err(error),
        };
        end_all(&names, client::kill);
        return status;
    }
    if options.detach {
        let started: Vec<_> = names.iter().map(|name| json!({ "name": name })).collect();
        return match options.json {
            true => client::print_json(&started).map(|()| 0),
            false => Ok(0),
        };
    }
    let timeout = Duration::from_secs(options.timeout.into());
    let status = watch(&names, processes, &signals, timeout)?;
    drop(shows);
    // Where standard output takes nothing, the rest of it is lost.
    let _ = shown.recv_timeout(REST);
    Ok(status)
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

/// Waits for the ends of all machines, whatever becomes of what they print.
fn watch(
    names: &[Name],
    processes: Vec<Child>,
    signals: &Signals,
    timeout: Duration,
) -> Result<u8> {
    let watched = processes.into_iter().map(|process| {
        let fd = pidfd_open(Pid::from_child(&process), PidfdFlags::empty());
        Ok((process, fd.map_err(failed("watching a machine"))?))
    });
    let mut running: Vec<(Child, OwnedFd)> = watched.collect::<Result<_>>()?;
    let (mut bad, mut signalled) = (None, None);
    while !running.is_empty() {
        let mut fds = vec![PollFd::new(signals, PollFlags::IN)];
        fds.extend(running.iter().map(|(_, fd)| PollFd::new(fd, PollFlags::IN)));
        // A signal interrupts it, and is found below.
        let _ = poll(&mut fds, None);
        running.retain_mut(|(process, _)| match process.try_wait() {
            Ok(None) => true,
            ended => {
                // That of a process that somebody else has waited for is not known.
                let status = ended.ok().flatten().map_or(STATUS_HOST, status_of);
                bad = bad.or((status != 0).then_some(status));
                false
            }
        });
        if let Some(signal) = signals.take() {
            let names = names.to_vec();
            let first = signalled.replace(signal).is_none();
            thread::spawn(move || match first {
                true => end_all(&names, |name| client::stop(name, timeout)),
                false => end_all(&names, client::kill),
            });
        }
    }
    let by_signal = signalled.map(|signal| STATUS_SIGNAL.saturating_add(signal));
    Ok(bad.or(by_signal).unwrap_or(0))
}

/// Shows what a machine prints until it has ended, and how it did.
fn show(name: &Name, mut screen: Screen) {
    let lost = || {
        let log = registry::folder(name).map(|folder| folder.join(registry::LOG));
        let log = log.map_or_else(|error| error.to_string(), |log| log.display().to_string());
        format!("it has ended; what it said then is in {log}")
    };
    let mut follow = || -> Result<Option<Ended>> {
        let mut end = Client::waiting(name)?;
        let mut console = Client::connect(name)?;
        let Nothing {} = console.call(&Request::Console {})?;
        let mut lines = console.into_stream();
        lines
            .get_ref()
            .set_read_timeout(None)
            .map_err(failed("setting a socket"))?;
        while let Some(line) = read_line(&mut lines) {
            screen.show(&line);
        }
        end.receive(Some(GOODBYE))
    };
    // A machine can end before anybody listens, and without a word.
    let outcome = follow()
        .ok()
        .flatten()
        .map_or_else(lost, |ended| ended.outcome);
    for line in outcome.lines() {
        screen.show(format!("rvisor: {line}").as_bytes());
    }
}

/// A line without its end, or a piece of a long one; `None` at the end of all.
fn read_line(lines: &mut BufReader<impl Read>) -> Option<Vec<u8>> {
    let mut line = Vec::new();
    let count = lines.take(LINE).read_until(b'\n', &mut line).ok()?;
    let end = line.iter().rposition(|byte| !b"\r\n".contains(byte));
    line.truncate(end.map_or(0, |last| last + 1));
    (count > 0).then_some(line)
}

/// Standard output, for the lines of one machine.
struct Screen {
    prefix: String,
    /// Unless all is let through.
    filter: Option<Filter>,
    /// Where that is a terminal.
    colours: bool,
}

impl Screen {
    fn new(name: &Name, width: usize, raw: bool) -> Self {
        let terminal = Filter::for_output(&io::stdout(), raw);
        Self {
            prefix: format!("{name:width$} | "),
            colours: terminal.is_some(),
            filter: terminal.or_else(|| (!raw).then(|| Filter::new(true))),
        }
    }

    fn show(&mut self, line: &[u8]) {
        // Where nobody reads any more, the machines run on all the same.
        let _ = io::stdout().lock().write_all(&self.text(line));
    }

    fn text(&mut self, line: &[u8]) -> Vec<u8> {
        let mut text = self.prefix.clone().into_bytes();
        match &mut self.filter {
            Some(filter) => {
                text.extend(within_line(&filter.passed(line), self.colours));
            }
            None => text.extend_from_slice(line),
        }
        text.push(b'\n');
        text
    }
}

/// Of what the filter has let through, that which stays in its line, text and perhaps colours: nothing that moves the
/// cursor to the lines of others.
fn within_line(passed: &[u8], colours: bool) -> Vec<u8> {
    let mut pieces = passed.split(|byte| *byte == ESC);
    let mut kept = pieces.next().unwrap_or_default().to_vec();
    for piece in pieces {
        // Whole sequences: ESC [, numbers and a last byte from 0x40 on; else the last byte is one from 0x30 on.
        let (start, least) = match piece.starts_with(b"[") {
            true => (1, 0x40),
            false => (0, 0x30),
        };
        let last = piece.iter().skip(start).position(|byte| *byte >= least);
        let (sequence, text) = piece.split_at(last.map_or(piece.len(), |at| start + at + 1));
        if colours && start == 1 && sequence.ends_with(b"m") {
            kept.extend([&[ESC], sequence].concat());
        }
        kept.extend_from_slice(text);
    }
    kept.retain(|byte| matches!(*byte, ESC | b'\t' | 0x20..));
    if kept.contains(&ESC) {
        kept.extend_from_slice(b"\x1b[m");
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_bounded_pieces() {
        let long = "x".repeat(LINE as usize + 1);
        let text = format!("one\r\n\x1b[31mred\n\n{long}\nend");
        let mut lines = BufReader::new(text.as_bytes());
        let read: Vec<Vec<u8>> = std::iter::from_fn(|| read_line(&mut lines)).collect();
        let expected = ["one", "\x1b[31mred", "", &long[1..], "x", "end"];
        assert_eq!(read, expected.map(|line| line.as_bytes().to_vec()));
    }

    #[test]
    fn a_machine_keeps_to_its_own_lines_of_a_terminal() {
        let prefix = "web | ".to_owned();
        let mut screen = Screen {
            prefix,
            filter: Some(Filter::new(true)),
            colours: true,
        };
        for (line, shown) in [
            ("plain\tüx", "web | plain\tüx\n"),
            ("\x1b[31mred", "web | \x1b[31mred\x1b[m\n"),
            (
                "a\rdb | \x08\x1b[2K\x1b[9D\x1bMb\x1b]0;t\x07\x1b(0c",
                "web | adb | bc\n",
            ),
        ] {
            let text = String::from_utf8(screen.text(line.as_bytes()));
            assert_eq!(text.as_deref(), Ok(shown));
        }
        screen.colours = false;
        assert_eq!(screen.text(b"\x1b[31mred\x1b[0m\r"), b"web | red\n");
        screen.filter = None;
        assert_eq!(screen.text(b"a\r\xff"), b"web | a\r\xff\n");
    }
}
