// SPDX-License-Identifier: GPL-2.0

//! A machine with a cgroup of its own has a second process: this one, outside of that cgroup, which makes it, starts
//! the machine's process in it, passes signals on, and is there to say so and to remove the cgroup where the
//! kernel ends the machine for want of memory.

use std::env;
use std::fs::File;
use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, Command, ExitStatus};

use rustix::process::{
    getppid, pidfd_open, pidfd_send_signal, set_parent_process_death_signal, Pid, PidfdFlags,
    Signal,
};

use crate::arguments::RunOptions;
use crate::cgroup::{self, Cgroup};
use crate::console::{Raw, Signals};
use crate::error::{failed, say, Error, Result};
use crate::outcome::{status_of, Outcome};
use crate::ready::{self, PollFlags};
use crate::registry::{self, Name};
use crate::{detach, size};

/// Tells the machine's process its cgroup.
const CGROUP: &str = "RVISOR_CGROUP";
/// Tells it the number of this process.
const PARENT: &str = "RVISOR_PARENT";

/// Gives the machine what its options promise. Returns in the process that is to run it; where that is another one,
/// this returns that one's exit status after its end.
///
/// # Errors
///
/// [`Error::Input`] where the promise can't be kept, [`Error::Call`] where the host fails.
pub fn share(options: &RunOptions) -> Result<Option<u8>> {
    let sharing = &options.sharing;
    if let Some(group) = env::var_os(CGROUP) {
        enter(Path::new(&group))?;
        return Ok(None);
    }
    sharing.pin()?;
    // What names no disk is found before anything is made.
    let settings = sharing.settings()?;
    if settings.is_empty() {
        return Ok(None);
    }
    let name = Name::of(options.name.as_ref(), std::process::id());
    // From here on no signal ends this process with the group left behind.
    let signals = Signals::catch()?;
    let group = Cgroup::new(&name, &settings)?;
    // The mode that the machine's process can't bring back where it is killed.
    let terminal = Raw::keep().map_err(failed("looking at the terminal"))?;
    let mut child = Command::new("/proc/self/exe")
        .arg0("rvisor")
        .args(env::args_os().skip(1))
        .env(CGROUP, group.path())
        .env(PARENT, std::process::id().to_string())
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
    drop(terminal);
    let Some(signal) = ended.signal() else {
        return Ok(Some(status_of(ended)));
    };
    let (text, status) = if signal == libc::SIGKILL && group.out_of_memory() > 0 {
        let outcome = Outcome::MemoryMax(size::text(sharing.memory_max.unwrap_or(0)));
        (outcome.to_string(), outcome.status())
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
    if let Ok(folder) = registry::folder(&Name::of(options.name.as_ref(), process))
        && let Ok(mut log) = File::options()
            .append(true)
            .open(folder.join(registry::LOG))
    {
        // Nobody may be left to tell.
        let _ = writeln!(log, "rvisor: {text}");
    }
}

/// In the machine's process: goes into its cgroup, to end there with its parent.
fn enter(group: &Path) -> Result<()> {
    let what = "following the parent's end";
    let parent = env::var(PARENT).ok().and_then(|text| text.parse().ok());
    set_parent_process_death_signal(Some(Signal::KILL)).map_err(failed(what))?;
    // It may have ended before.
    if getppid().map(Pid::as_raw_pid) != parent {
        return Err(Error::input(
            format!("{CGROUP} is rvisor's own, and not from this process's parent"),
            "remove it from the environment",
        ));
    }
    cgroup::enter(group)
}

/// Passes signals on to the child until it has ended.
fn watch(child: &mut Child, signals: &Signals) -> Result<ExitStatus> {
    let what = "watching the machine's process";
    let process = pidfd_open(Pid::from_child(child), PidfdFlags::empty()).map_err(failed(what))?;
    loop {
        let files: [(&dyn AsFd, _); 2] = [(&process, PollFlags::IN), (signals, PollFlags::IN)];
        if ready::wait(&files, None).map_err(failed(what))?[0] {
            return child.wait().map_err(failed(what));
        }
        if let Some(signal) = signals.take()
            && let Some(signal) = Signal::from_named_raw(signal.into())
        {
            // Fails only where it has just ended.
            let _ = pidfd_send_signal(&process, signal);
        }
    }
}
