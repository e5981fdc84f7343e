// SPDX-License-Identifier: GPL-2.0

//! The terminal's raw mode.

use std::io;

use rustix::stdio::stdin;
use rustix::termios::{isatty, tcgetattr, tcsetattr, OptionalActions, Termios};

/// Standard input in raw mode, where it is a terminal. Dropping it, in a panic's unwinding too, brings back
/// the mode that was there before.
pub struct Raw {
    before: Option<Termios>,
}

impl Raw {
    /// Sets raw mode. Where standard input is no terminal, nothing is done.
    ///
    /// # Errors
    ///
    /// What the terminal answers.
    pub fn new() -> io::Result<Self> {
        let kept = Self::keep()?;
        if let Some(before) = &kept.before {
            let mut raw = before.clone();
            raw.make_raw();
            tcsetattr(stdin(), OptionalActions::Now, &raw)?;
        }
        Ok(kept)
    }

    /// Leaves the terminal as it is, and brings that back whatever others do to it meanwhile.
    ///
    /// # Errors
    ///
    /// What the terminal answers.
    pub fn keep() -> io::Result<Self> {
        let before = isatty(stdin()).then(|| tcgetattr(stdin())).transpose()?;
        Ok(Self { before })
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        if let Some(before) = &self.before {
            // A terminal that is gone needs nothing.
            let _ = tcsetattr(stdin(), OptionalActions::Now, before);
        }
    }
}
