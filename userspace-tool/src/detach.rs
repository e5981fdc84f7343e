// SPDX-License-Identifier: GPL-2.0

//! Machines that outlive the command that starts them: `--detach`.
//!
//! The command starts itself once more, as the machine's process, with a pipe for standard output. While that
//! process has no guest, its errors go where the command's go. As soon as the guest runs it says its name on the
//! pipe, and has let go of all that it had from the command: its session, its folder, its files.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::Duration;

use rustix::io::Errno;
use rustix::process::{kill_process, setsid, Pid, Signal};
use rustix::stdio::{dup2_stderr, dup2_stdout};

use crate::console::Signals;
use crate::error::{failed, say, Error, Result};
use crate::outcome::Outcome;
use crate::ready::{self, PollFlags};
use crate::registry::{Claim, Name};

/// The option that `--detach` becomes for the machine's process.
pub const DETACHED: &str = "--detached";

/// How long a start may take to end by a signal.
const OBEY: Duration = Duration::from_secs(5);

const LETTING_GO: &str = "letting go of the terminal";

/// Starts a machine with those words behind `rvisor`, in the folder `directory` where there is one. Returns when
/// its guest runs, with its name and itself, or with the exit status after it said why there is none. One of `signals`,
/// which can be taken afterwards, ends it before.
///
/// # Errors
///
/// [`Error::Call`] where no process can be had, or it was killed.
pub fn start(
    words: &[OsString],
    directory: Option<&Path>,
    signals: Option<&Signals>,
) -> Result<std::result::Result<(Name, Child), u8>> {
    let what = "starting the machine's process";
    let mut command = Command::new("/proc/self/exe");
    command
        .arg0("rvisor")
        .args(words)
        .arg(DETACHED)
        .stdin(Stdio::null())
        .stdout(Stdio::piped());
    if let Some(directory) = directory.filter(|path| !path.as_os_str().is_empty()) {
        command.current_dir(directory);
    }
    let mut child = command.spawn().map_err(failed(what))?;
    let id = Pid::from_child(&child);
    let mut said = String::new();
    if let Some(pipe) = child.stdout.as_mut()
        && signals
            .map_or(Ok(true), |signals| says(pipe, signals, id))
            .map_err(failed(what))?
    {
        // One line: processes that the machine started may have the pipe for longer.
        BufReader::new(pipe)
            .read_line(&mut said)
            .map_err(failed(what))?;
    }
    if let Ok(name) = said.trim_end().parse() {
        return Ok(Ok((name, child)));
    }
    let status = child.wait().map_err(failed(what))?;
    match status.code().and_then(|code| u8::try_from(code).ok()) {
        // It ends with its guest, which never ran.
        Some(code) => {
            // Who watches it has no terminal to say so.
            if code == Outcome::MemoryMax(String::new()).status() {
                say("the machine reached its --memory-max before its guest ran; give it more");
            }
            Ok(Err(code.max(1)))
        }
        None => Err(Error::call(what, status.to_string())),
    }
}

/// Waits for what the machine's process `id` says on its pipe, or its end. The first of the signals ends that process,
/// and the second one kills it, or that it does not obey; `false` then.
fn says(pipe: &ChildStdout, signals: &Signals, id: Pid) -> io::Result<bool> {
    let mut timeout = None;
    for signal in [Signal::TERM, Signal::KILL] {
        if ready::wait(&[(pipe, PollFlags::IN), (signals, PollFlags::IN)], timeout)?[0] {
            return Ok(true);
        }
        signals.await_next();
        // It is in another session than the terminal that the signal may be from.
        let _ = kill_process(id, signal);
        timeout = Some(OBEY);
    }
    Ok(false)
}

/// Makes this process nobody's but its own, in the beginning.
///
/// # Errors
///
/// [`Error::Call`] where the kernel refuses.
pub fn begin() -> Result<()> {
    match setsid() {
        // It leads one already: it was started so.
        Ok(_) | Err(Errno::PERM) => Ok(()),
        Err(error) => Err(Error::call("making a session", io::Error::from(error))),
    }
}

/// What a detached machine needs to let go of the command that started it.
pub struct Ready {
    log: File,
    null: File,
}

impl Ready {
    /// Opens it, while files can be opened.
    ///
    /// # Errors
    ///
    /// [`Error::Call`] where the log can't be made.
    pub fn new(claim: &Claim) -> Result<Self> {
        let null = leave()?;
        Ok(Self {
            log: claim.log()?,
            null,
        })
    }

    /// Tells whoever started this process that the guest of the machine `name` runs, and lets go of what came
    /// from there.
    ///
    /// # Errors
    ///
    /// [`Error::Call`] where nobody listens any more.
    pub fn tell(self, name: &Name) -> Result<()> {
        let mut stdout = io::stdout();
        writeln!(stdout, "{name}")
            .and_then(|()| stdout.flush())
            .map_err(failed("telling that the guest runs"))?;
        dup2_stderr(self.log)
            .and_then(|()| dup2_stdout(self.null))
            .map_err(failed(LETTING_GO))
    }
}

/// Leaves the command's folder. Returns what takes the place of its terminal.
fn leave() -> Result<File> {
    rustix::process::chdir("/").map_err(failed(LETTING_GO))?;
    let null = File::options().write(true).open("/dev/null");
    null.map_err(failed(LETTING_GO))
}

/// Lets go of what came from the command, in a process that only waits for the machine's.
///
/// # Errors
///
/// [`Error::Call`] where the kernel refuses.
pub fn let_go() -> Result<()> {
    begin()?;
    let null = leave()?;
    dup2_stderr(&null)
        .and_then(|()| dup2_stdout(&null))
        .map_err(failed(LETTING_GO))
}

/// The words of this process's command line behind its name, for [`start`].
#[must_use]
pub fn words() -> Vec<OsString> {
    std::env::args_os()
        .skip(1)
        .filter(|word| word != "--detach")
        .collect()
}
