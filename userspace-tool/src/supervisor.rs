// SPDX-License-Identifier: GPL-2.0

//! A machine with a cgroup of its own has a second process: this one, outside of that cgroup, which makes it, starts
//! the machine's process in it, passes signals on, and is there to say so and to remove the cgroup where the
//! kernel ends the machine for want of memory.

use std::env;
use std::ffi::OsString;
use std::fs::File;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, Command};

use rustix::event::{poll, PollFd, PollFlags};
use rustix::io::{retry_on_intr, Errno};
use rustix::process::{
    getpid, getppid, pidfd_open, pidfd_send_signal, set_parent_process_death_signal, Pid,
    PidfdFlags, Signal,
};

use crate::arguments::RunOptions;
use crate::cgroup::{self, Cgroup};
use crate::console::{Raw, Signals};
use crate::error::{failed, say, Error, Result};
use crate::outcome::{status_of, STATUS_MEMORY};
use crate::registry::{self, Name};
use crate::{detach, size};

/// Tells the machine's process its cgroup, behind its parent's number.
const INSIDE: &str = "RVISOR_CGROUP";

/// Gives the machine what its options promise. Returns in the process that is to run it; where that is another one,
/// this returns that one's exit status after its end.
///
/// # Errors
///
/// [`Error::Input`] where the promise can't be kept, [`Error::Call`] where the host fails.
pub fn share(options: &RunOptions) -> Result<Option<u8>> {
    let sharing = &options.sharing;
    if let Some(inside) = env::var_os(INSIDE) {
        enter(&inside)?;
        return Ok(None);
    }
    sharing.pin()?;
    if sharing.controllers().is_empty() {
        return Ok(None);
    }
    let name = options.name.clone();
    let group = Cgroup::new(&name.unwrap_or_else(Name::of_this_process), sharing)?;
    // The mode that the machine's process can't bring back where it is killed.
    let _terminal = Raw::keep().map_err(failed("looking at the terminal"))?;
    let signals = Signals::catch()?;
    let mut arguments = env::args_os();
    let mut inside = OsString::from(format!("{} ", getpid()));
    inside.push(group.path());
    let mut child = Command::new("/proc/self/exe")
        .arg0(arguments.next().unwrap_or_else(|| "rvisor".into()))
        .args(arguments)
        .env(INSIDE, inside)
        .spawn()
        .map_err(failed("starting the machine's process"))?;
    let let_go = options.detached.then(detach::let_go).transpose();
    // A child that is not watched must not run on.
    let ended = let_go
        .and_then(|_| watch(&mut child, &signals))
        .inspect_err(|_| {
            let _ = child.kill();
            let _ = child.wait();
        })?;
    let Some(signal) = ended.signal() else {
        return Ok(Some(status_of(ended)));
    };
    let (text, status) = if signal == libc::SIGKILL && group.out_of_memory() > 0 {
        let most = size::text(sharing.memory_max.unwrap_or(0));
        let text = format!(
            "the machine reached its --memory-max of {most} and was ended; give it more, or less --memory"
        );
        (text, STATUS_MEMORY)
    } else {
        let text = format!("the machine's process was killed by signal {signal}");
        (text, status_of(ended))
    };
    tell(options, child.id(), &text);
    Ok(Some(status))
}

/// Says why there is no machine any more: here, or where a detached machine says such things.
fn tell(options: &RunOptions, process: u32, text: &str) {
    if !options.detached {
        return say(text);
    }
    let name = options.name.clone();
    let folder = registry::folder(&name.unwrap_or_else(|| Name::of_process(process)));
    let log = folder.map(|folder| {
        File::options()
            .append(true)
            .open(folder.join(registry::LOG))
    });
    if let Ok(Ok(mut log)) = log {
        // Nobody may be left to tell.
        let _ = writeln!(log, "rvisor: {text}");
    }
}

/// In the machine's process: goes into its cgroup, to end there with its parent.
fn enter(inside: &OsString) -> Result<()> {
    env::remove_var(INSIDE);
    let mut parts = inside.as_bytes().splitn(2, |byte| *byte == b' ');
    let parent = parts
        .next()
        .and_then(|text| std::str::from_utf8(text).ok()?.parse().ok());
    let (Some(parent), Some(path)) = (parent, parts.next()) else {
        return Err(Error::input(
            format!("{INSIDE} is rvisor's own"),
            "remove it from the environment",
        ));
    };
    set_parent_process_death_signal(Some(Signal::KILL))
        .map_err(failed("following the parent's end"))?;
    // It may have ended before.
    if getppid().map(Pid::as_raw_pid) != Some(parent) {
        return Err(Error::call(
            "following the parent's end",
            std::io::Error::from(Errno::SRCH),
        ));
    }
    cgroup::enter(Path::new(std::ffi::OsStr::from_bytes(path)))
}

/// Passes signals on to the child until it has ended.
fn watch(child: &mut Child, signals: &Signals) -> Result<std::process::ExitStatus> {
    let process: OwnedFd = pidfd_open(Pid::from_child(child), PidfdFlags::empty())
        .map_err(failed("watching the machine's process"))?;
    loop {
        let mut fds = [
            PollFd::new(&process, PollFlags::IN),
            PollFd::new(signals, PollFlags::IN),
        ];
        retry_on_intr(|| poll(&mut fds, None)).map_err(failed("watching the machine's process"))?;
        if !fds[0].revents().is_empty() {
            return child
                .wait()
                .map_err(failed("waiting for the machine's process"));
        }
        let signal = signals.take().map(i32::from);
        if let Some(signal) = signal.and_then(Signal::from_named_raw) {
            // Fails only where it has just ended.
            let _ = pidfd_send_signal(&process, signal);
        }
    }
}
