// SPDX-License-Identifier: GPL-2.0

//! `rvisor up`: the machines that a file describes.

mod file;

use std::io::{self, BufRead, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::process::Child;
use std::sync::mpsc::{self, SyncSender};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use rustix::process::{kill_process, pidfd_open, pidfd_send_signal, Pid, PidfdFlags, Signal};
use serde_json::json;

use crate::arguments::UpOptions;
use crate::console::{Filter, Signals};
use crate::control::{Client, Ended, Nothing, Request};
use crate::error::{failed, say, Error, Result, STATUS_HOST};
use crate::outcome::{status_of, Outcome};
use crate::ready::{self, PollFlags};
use crate::registry::{self, Name};
use crate::{client, detach};

/// The longest piece of a line that is shown at once.
const LINE: u64 = 4096;
/// How long a machine whose console has ended may take to say how.
const GOODBYE: Duration = Duration::from_secs(5);
/// How long standard output may take for a line of the rest when all machines have ended.
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
    // Each line that is shown; the other ends go with the threads that have shown all of their machines.
    let (shows, shown) = mpsc::sync_channel::<()>(1);
    let (mut started, mut processes) = (Vec::new(), Vec::new());
    for machine in &machines {
        let mut begin = || -> Result<Option<u8>> {
            let folder = options.file.parent();
            let (name, process) = match detach::start(&machine.words, folder, Some(&signals))? {
                Ok(started) => started,
                Err(status) => {
                    say(format_args!("{} did not start", machine.name));
                    return Ok(Some(status));
                }
            };
            let id = Pid::from_child(&process);
            let ends = pidfd_open(id, PidfdFlags::empty()).map_err(|error| {
                // Nor are there descriptors to reach it otherwise.
                let _ = kill_process(id, Signal::TERM);
                Error::call("watching a machine", error)
            })?;
            let ends = Arc::new(ends);
            started.push((name.clone(), Arc::clone(&ends)));
            processes.push(process);
            if let Some(signal) = signals.take() {
                return Ok(Some(Outcome::Signal(signal).status()));
            }
            if !options.detach {
                let screen = Screen::new(&name, width.unwrap_or(0), options.raw_console);
                let (name, shows) = (name.clone(), shows.clone());
                thread::Builder::new()
                    .spawn(move || show(&name, screen, &ends, &shows))
                    .map_err(failed("starting a thread"))?;
            }
            say(format_args!("{name} runs"));
            Ok(None)
        };
        if let Some(status) = begin().transpose() {
            end_all(&started, Duration::ZERO);
            // What a signal has ended has not failed.
            return match signals.take() {
                Some(signal) => Ok(Outcome::Signal(signal).status()),
                None => status,
            };
        }
    }
    if options.detach {
        let started = started.iter().map(|(name, _)| json!({ "name": name }));
        let started: Vec<_> = started.collect();
        return match options.json {
            true => client::print_json(&started).map(|()| 0),
            false => Ok(0),
        };
    }
    let timeout = Duration::from_secs(options.timeout.into());
    let status = watch(&started, processes, &signals, timeout);
    drop(shows);
    // Where standard output takes nothing, the rest of it is lost.
    while shown.recv_timeout(REST).is_ok() {}
    Ok(status)
}

/// A machine that was started, and the pidfd of its process.
type Started = (Name, Arc<OwnedFd>);

/// Ends all these machines at the same time, as 'rvisor stop' does with that timeout, and waits for that.
fn end_all(machines: &[Started], timeout: Duration) {
    thread::scope(|scope| {
        for (name, process) in machines {
            let work = move || {
                // One that has gone meanwhile needs nothing; one that can't be reached, for want of descriptors, SIGTERM.
                let ended = client::stop(name, timeout).or_else(|_| client::kill(name));
                if ended.is_err() {
                    let _ = pidfd_send_signal(process, Signal::TERM);
                    has_ended(process, GOODBYE);
                }
            };
            // One after the other where no threads can be had.
            if thread::Builder::new().spawn_scoped(scope, work).is_err() {
                work();
            }
        }
    });
}

/// Waits for the ends of all machines, whatever becomes of what they print. Returns the exit status.
fn watch(machines: &[Started], processes: Vec<Child>, signals: &Signals, timeout: Duration) -> u8 {
    let (mut bad, mut signalled) = (None, None);
    let mut running: Vec<_> = processes.into_iter().zip(machines).collect();
    while !running.is_empty() {
        let mut files: Vec<(&dyn AsFd, _)> = vec![(signals, PollFlags::IN)];
        files.extend(
            running
                .iter()
                .map(|(_, (_, fd))| (fd as &dyn AsFd, PollFlags::IN)),
        );
        // Where it fails, looking again is all that there is.
        let _ = ready::wait(&files, None);
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
            let timeout = match signalled.replace(signal) {
                None => timeout,
                Some(_) => Duration::ZERO,
            };
            let all = machines.to_vec();
            let end = thread::Builder::new().spawn(move || end_all(&all, timeout));
            // Without a thread a second signal has to wait.
            if end.is_err() {
                end_all(machines, timeout);
            }
        }
    }
    let by_signal = signalled.map(|signal| Outcome::Signal(signal).status());
    bad.or(by_signal).unwrap_or(0)
}

/// Shows what a machine prints until it has ended, which `ends` tells, and how it did. Tells `shows` of each line.
fn show(name: &Name, mut screen: Screen, ends: &OwnedFd, shows: &SyncSender<()>) {
    let mut show = |line: &[u8]| {
        screen.show(line);
        // One word of it is enough.
        let _ = shows.try_send(());
    };
    let mut follow = || -> Result<Option<Ended>> {
        let mut end = Client::waiting(name)?;
        let mut console = Client::connect(name)?;
        let Nothing {} = console.call(&Request::Console {})?;
        let mut lines = console.into_stream()?;
        while let Some(line) = read_line(&mut lines) {
            show(&line);
        }
        end.receive(GOODBYE)
    };
    let outcome = match follow() {
        Ok(Some(ended)) => ended.outcome,
        // A machine can end before anybody listens, and without a word.
        _ if has_ended(ends, GOODBYE) => {
            let log = registry::folder(name).map(|folder| folder.join(registry::LOG));
            let log = log.map_or_else(|error| error.to_string(), |log| log.display().to_string());
            format!("it has ended; what it said then is in {log}")
        }
        Ok(None) => "its console has ended, and it does not say why".to_owned(),
        Err(error) => format!("what it prints is no longer shown: {error}"),
    };
    for line in outcome.lines() {
        show(format!("rvisor: {line}").as_bytes());
    }
}

/// Whether the process of that pidfd ends within `patience`.
fn has_ended(process: &OwnedFd, patience: Duration) -> bool {
    ready::within(patience, process, PollFlags::IN)
}

/// A line without its end, or a piece of a long one; `None` at the end of all.
fn read_line(lines: &mut impl BufRead) -> Option<Vec<u8>> {
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
}

impl Screen {
    fn new(name: &Name, width: usize, raw: bool) -> Self {
        let terminal = Filter::for_output(&io::stdout(), raw);
        let colours = terminal.is_some();
        let filter = terminal.or_else(|| (!raw).then(|| Filter::new(true)));
        Self {
            prefix: format!("{name:width$} | "),
            filter: filter.map(|filter| filter.within_lines(colours)),
        }
    }

    fn show(&mut self, line: &[u8]) {
        // Where nobody reads any more, the machines run on all the same.
        let _ = io::stdout().lock().write_all(&self.text(line));
    }

    fn text(&mut self, line: &[u8]) -> Vec<u8> {
        let line = match &mut self.filter {
            Some(filter) => filter.passed(line),
            None => line.to_vec(),
        };
        [self.prefix.as_bytes(), &line, b"\n"].concat()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_bounded_pieces() {
        let long = "x".repeat(LINE as usize + 1);
        let text = format!("one\r\n\x1b[31mred\n\n{long}\nend");
        let mut lines = text.as_bytes();
        let read: Vec<Vec<u8>> = std::iter::from_fn(|| read_line(&mut lines)).collect();
        let expected = ["one", "\x1b[31mred", "", &long[1..], "x", "end"];
        assert_eq!(read, expected.map(|line| line.as_bytes().to_vec()));
    }

    #[test]
    fn only_a_process_that_has_ended_is_said_to_have() {
        let mut child = std::process::Command::new("cat")
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::null())
            .spawn()
            .expect("a process");
        let process = pidfd_open(Pid::from_child(&child), PidfdFlags::empty()).expect("a pidfd");
        assert!(!has_ended(&process, Duration::from_millis(50)));
        drop(child.stdin.take());
        assert!(has_ended(&process, GOODBYE));
        child.wait().expect("it has ended");
        assert!(has_ended(&process, Duration::ZERO));
    }

    #[test]
    fn a_machine_keeps_to_its_own_lines_of_a_terminal() {
        let mut screen = Screen {
            prefix: "web | ".to_owned(),
            filter: Some(Filter::new(true).within_lines(true)),
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
        screen.filter = Some(Filter::new(true).within_lines(false));
        assert_eq!(screen.text(b"\x1b[31mred\x1b[0m\r"), b"web | red\n");
        screen.filter = None;
        assert_eq!(screen.text(b"a\r\xff"), b"web | a\r\xff\n");
    }
}
