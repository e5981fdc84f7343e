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
    /// The kernel ended it, for it wanted more memory than its limit, which this is.
    #[error(
        "the machine reached its --memory-max of {0} and was ended; give it more, or less --memory"
    )]
    MemoryMax(String),
    /// A client of its socket ended it.
    #[error("ended by 'rvisor kill'")]
    Killed,
    /// A signal told `rvisor` to end.
    #[error("ended by signal {0}")]
    Signal(u8),
    /// A call into the host failed while the guest ran.
    #[error("{0}")]
    Host(Error),
    /// The console's output could not be written. What the guest said last may be lost with it, so this holds even
    /// where it is seen only after the guest has powered off or asked for a reboot.
    #[error("{0}")]
    OutputLost(Error),
}

/// Exit status where a signal ended the machine, less its number: the shell's own convention.
const STATUS_SIGNAL: u8 = 128;

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
            // 2 is for wrong input.
            Self::Host(_) | Self::OutputLost(_) => STATUS_HOST,
            Self::Rebooted => 3,
            Self::Crashed(_) => 4,
            Self::Stuck(_) => 5,
            Self::Quit => 6,
            Self::MemoryMax(_) => 7,
            Self::Killed => 8,
            Self::Signal(number) => STATUS_SIGNAL.saturating_add(*number),
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
            Outcome::MemoryMax(String::new()),
            Outcome::Killed,
            Outcome::Signal(15),
            Outcome::Host(Error::input("", "")),
        ];
        let mut statuses: BTreeSet<u8> = all.iter().map(Outcome::status).collect();
        statuses.insert(crate::error::STATUS_INPUT);
        assert_eq!(statuses.len(), all.len() + 1);
    }

    #[test]
    fn a_signal_follows_the_shell() {
        assert_eq!(Outcome::Signal(15).status(), 143);
    }
}
