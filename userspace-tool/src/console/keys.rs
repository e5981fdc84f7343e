// SPDX-License-Identifier: GPL-2.0

//! What is typed on standard input, and the keys that are `rvisor`'s own: those after Ctrl-A.

use std::os::fd::AsFd;
use std::time::Duration;

use rustix::io::{read, Errno};
use rustix::stdio::stdin;

use super::Signals;
use crate::error::{failed, Result};
use crate::ready::{self, PollFlags};

/// Ctrl-A.
const ESCAPE: u8 = 0x01;

/// What a byte of input means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Key {
    /// It goes to the guest.
    Guest(u8),
    /// End the guest.
    Quit,
    /// Leave the console and let the guest run.
    Detach,
    /// Show the keys.
    Help,
}

/// Reads the keys and tells them apart.
#[derive(Debug, Default)]
pub(super) struct Keys {
    pending: bool,
    ended: bool,
}

impl Keys {
    /// Sleeps until `file` can be read, one of `signals` has come or, where that is `wanted`, something was typed; no
    /// longer than `timeout`. Says whether `file` can be read, and what was typed.
    ///
    /// # Errors
    ///
    /// [`Error::Call`](crate::error::Error::Call) where the host's kernel refuses.
    pub(super) fn wait(
        &mut self,
        file: &impl AsFd,
        signals: &Signals,
        wanted: bool,
        timeout: Option<Duration>,
    ) -> Result<(bool, Vec<Key>)> {
        let stdin = stdin();
        let mut files: Vec<(&dyn AsFd, _)> = vec![(file, PollFlags::IN), (signals, PollFlags::IN)];
        if wanted && !self.ended {
            files.push((&stdin, PollFlags::IN));
        }
        let ready = ready::wait(&files, timeout).map_err(failed("waiting for the console"))?;
        let keys = match ready[..] {
            [_, _, true] => self.read(),
            _ => Vec::new(),
        };
        Ok((ready[0], keys))
    }

    fn read(&mut self) -> Vec<Key> {
        let mut bytes = [0; 256];
        match read(stdin(), &mut bytes) {
            Ok(count @ 1..) => bytes[..count]
                .iter()
                .filter_map(|byte| self.feed(*byte))
                .collect(),
            Err(Errno::INTR | Errno::AGAIN) => Vec::new(),
            // Its end; or the terminal is gone, or it is not ours to read.
            Ok(0) | Err(_) => {
                self.ended = true;
                Vec::new()
            }
        }
    }

    /// Takes the next byte. The first half of a key means nothing yet, and an unknown one never does.
    fn feed(&mut self, byte: u8) -> Option<Key> {
        if !self.pending {
            self.pending = byte == ESCAPE;
            return (!self.pending).then_some(Key::Guest(byte));
        }
        self.pending = false;
        match byte {
            ESCAPE => Some(Key::Guest(ESCAPE)),
            b'x' | b'X' => Some(Key::Quit),
            b'd' | b'D' => Some(Key::Detach),
            b'h' | b'H' | b'?' => Some(Key::Help),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys(input: &[u8]) -> Vec<Key> {
        let mut keys = Keys::default();
        input.iter().filter_map(|byte| keys.feed(*byte)).collect()
    }

    #[test]
    fn ordinary_bytes_go_to_the_guest() {
        assert_eq!(keys(b"xh"), [Key::Guest(b'x'), Key::Guest(b'h')]);
        // Ctrl-C too: it is the guest's.
        assert_eq!(keys(&[3, 0xff]), [Key::Guest(3), Key::Guest(0xff)]);
    }

    #[test]
    fn the_keys_after_ctrl_a() {
        assert_eq!(keys(b"\x01x"), [Key::Quit]);
        assert_eq!(keys(b"\x01d"), [Key::Detach]);
        assert_eq!(keys(b"\x01h"), [Key::Help]);
        assert_eq!(keys(b"\x01\x01"), [Key::Guest(1)]);
    }

    #[test]
    fn an_unknown_key_is_dropped_and_the_next_is_ordinary() {
        assert_eq!(keys(b"\x01qx"), [Key::Guest(b'x')]);
        assert_eq!(keys(b"\x01\x01x"), [Key::Guest(1), Key::Guest(b'x')]);
    }
}
