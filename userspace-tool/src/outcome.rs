// SPDX-License-Identifier: GPL-2.0

//! How a guest ended, and the exit status that says so.

use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;

use crate::error::{Error, STATUS_HOST};

/// How a guest ended.
#[derive(Debug, thiserror::Error)]
pub enum Outcome {
    /// The guest switched itself off.
    #[error("the guest powered off")]
    PoweredOff,
    /// The guest asked for a reset. `rvisor run` ends there.
    #[error("the guest asked for a reboot, which ends this run")]
    Rebooted,
    /// A triple fault, with the registers of the virtual CPU that had it.
    #[error("the guest crashed: triple fault\n{0}")]
    Crashed(String),
    /// The hypervisor can't go on with the guest: what it said, with the registers.
    #[error("the hypervisor can't go on with the guest: {0}")]
    Stuck(String),
    /// The user typed Ctrl-A x.
    #[error("ended by Ctrl-A x")]
    Quit,
    /// A client of its socket ended it.
    #[error("ended by 'rvisor kill'")]
    Killed,
    /// A signal told `rvisor` to end.
    #[error("ended by signal {0}")]
    Signal(u8),
    /// A call into the host failed while the guest ran.
    #[error("{0}")]
    Host(Error),
}

/// Exit status of [`Outcome::Rebooted`].
pub const STATUS_REBOOTED: u8 = 3;
/// Exit status of [`Outcome::Crashed`].
pub const STATUS_CRASHED: u8 = 4;
/// Exit status of [`Outcome::Stuck`].
pub const STATUS_STUCK: u8 = 5;
/// Exit status of [`Outcome::Quit`].
pub const STATUS_QUIT: u8 = 6;
/// Exit status of [`Outcome::Killed`].
pub const STATUS_KILLED: u8 = 8;
/// Exit status where the machine reached its limit of memory (`--memory-max`).
pub const STATUS_MEMORY: u8 = 7;
/// Exit status of [`Outcome::Signal`], less the signal's number: the shell's own convention.
pub const STATUS_SIGNAL: u8 = 128;

/// The exit status of a machine's process, by the shell's convention where a signal ended it.
#[must_use]
pub fn status_of(ended: ExitStatus) -> u8 {
    let signal = ended
        .signal()
        .map(|signal| STATUS_SIGNAL.saturating_add(signal as u8));
    signal.unwrap_or(ended.code().unwrap_or(0) as u8)
}

impl Outcome {
    /// The exit status; `rvisor run --help` lists them.
    #[must_use]
    pub fn status(&self) -> u8 {
        match self {
            Self::PoweredOff => 0,
            Self::Rebooted => STATUS_REBOOTED,
            Self::Crashed(_) => STATUS_CRASHED,
            Self::Stuck(_) => STATUS_STUCK,
            Self::Quit => STATUS_QUIT,
            Self::Killed => STATUS_KILLED,
            Self::Signal(number) => STATUS_SIGNAL.saturating_add(*number),
            Self::Host(_) => STATUS_HOST,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn every_end_has_a_status_of_its_own() {
        let all = [
            Outcome::PoweredOff,
            Outcome::Rebooted,
            Outcome::Crashed(String::new()),
            Outcome::Stuck(String::new()),
            Outcome::Quit,
            Outcome::Killed,
            Outcome::Signal(15),
            Outcome::Host(Error::input("", "")),
        ];
        let mut statuses: BTreeSet<u8> = all.iter().map(Outcome::status).collect();
        statuses.extend([crate::error::STATUS_INPUT, STATUS_MEMORY]);
        assert_eq!(statuses.len(), all.len() + 2);
    }

    #[test]
    fn a_signal_follows_the_shell() {
        assert_eq!(Outcome::Signal(15).status(), 143);
    }
}
