// SPDX-License-Identifier: GPL-2.0

//! What can keep a guest from running, in the words that the user reads.

use std::fmt::Display;
use std::io::Write;
use std::time::Duration;

use crate::ready::{self, PollFlags};

/// Exit status for a failure of this host or of the hypervisor, where the input was right.
pub const STATUS_HOST: u8 = 1;
/// Exit status for wrong input.
pub const STATUS_INPUT: u8 = 2;

/// Why no guest ran, or why it could not go on for a reason outside the guest.
///
/// Its text is one line: what is the matter, and the next step where the input is wrong.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The user's input is wrong, or the host is not prepared for it.
    #[error("{cause}; {next}")]
    Input {
        /// What is wrong, with the name or number that is.
        cause: String,
        /// What to do about it.
        next: String,
    },
    /// A call into the hypervisor or the host's kernel failed.
    #[error("{what}: {source}")]
    Call {
        /// What was to be done.
        what: String,
        /// The kernel's answer, or a library's.
        source: Source,
    },
}

/// Why a call failed.
type Source = Box<dyn std::error::Error + Send + Sync>;

/// How long standard error may take for a line.
const PATIENCE: Duration = Duration::from_secs(1);

/// Says a line on standard error, behind the tool's name. Where that can't be written, because its disk is full or
/// its pipe is not read, nobody is left to tell, and the line is lost.
#[allow(clippy::print_stderr)]
pub fn say(text: impl Display) {
    let line = format!("rvisor: {text}\n");
    let mut stderr = std::io::stderr();
    if !ready::within(PATIENCE, &stderr, PollFlags::OUT) {
        return;
    }
    if cfg!(test) {
        // That one is captured, and shown where the test fails.
        eprint!("{line}");
    } else {
        let _ = stderr.write_all(line.as_bytes());
    }
}

/// Prints what was asked for on standard output.
///
/// # Errors
///
/// [`Error::Call`] where it can't be written. Where nobody reads any more, nobody misses it.
pub fn print(text: &str) -> Result<()> {
    let mut stdout = std::io::stdout();
    let printed = stdout.write_all(text.as_bytes());
    match printed.and_then(|()| stdout.flush()) {
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        result => result.map_err(failed("writing standard output")),
    }
}

/// The result of everything here.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// Wrong input: `cause` names it, `next` tells what to do.
    pub fn input(cause: impl Into<String>, next: impl Into<String>) -> Self {
        Self::Input {
            cause: cause.into(),
            next: next.into(),
        }
    }

    /// A failed call: `what` was to be done, `source` is what came back.
    pub fn call(what: impl Display, source: impl Into<Source>) -> Self {
        Self::Call {
            what: what.to_string(),
            source: source.into(),
        }
    }

    /// The exit status: [`STATUS_INPUT`] or [`STATUS_HOST`].
    #[must_use]
    pub fn status(&self) -> u8 {
        match self {
            Self::Input { .. } => STATUS_INPUT,
            Self::Call { .. } => STATUS_HOST,
        }
    }
}

/// Names a failed call: `.map_err(failed("what was to be done"))`.
pub fn failed<E: Into<Source>>(what: &'static str) -> impl FnOnce(E) -> Error {
    move |source| Error::call(what, source)
}
