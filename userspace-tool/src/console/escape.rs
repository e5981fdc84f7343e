// SPDX-License-Identifier: GPL-2.0

//! The keys that are `rvisor`'s own: those after Ctrl-A.

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
    /// Nothing: the first half of a key, or an unknown one.
    Nothing,
}

/// Tells the keys apart.
#[derive(Debug, Default)]
pub(super) struct Escape {
    pending: bool,
}

impl Escape {
    /// Takes the next byte.
    pub(super) fn feed(&mut self, byte: u8) -> Key {
        if !self.pending {
            self.pending = byte == ESCAPE;
            return if self.pending {
                Key::Nothing
            } else {
                Key::Guest(byte)
            };
        }
        self.pending = false;
        match byte {
            ESCAPE => Key::Guest(ESCAPE),
            b'x' | b'X' => Key::Quit,
            b'd' | b'D' => Key::Detach,
            b'h' | b'H' | b'?' => Key::Help,
            _ => Key::Nothing,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys(input: &[u8]) -> Vec<Key> {
        let mut escape = Escape::default();
        input.iter().map(|byte| escape.feed(*byte)).collect()
    }

    #[test]
    fn ordinary_bytes_go_to_the_guest() {
        assert_eq!(keys(b"xh"), [Key::Guest(b'x'), Key::Guest(b'h')]);
        // Ctrl-C too: it is the guest's.
        assert_eq!(keys(&[3, 0xff]), [Key::Guest(3), Key::Guest(0xff)]);
    }

    #[test]
    fn the_keys_after_ctrl_a() {
        assert_eq!(keys(b"\x01x"), [Key::Nothing, Key::Quit]);
        assert_eq!(keys(b"\x01d"), [Key::Nothing, Key::Detach]);
        assert_eq!(keys(b"\x01h"), [Key::Nothing, Key::Help]);
        assert_eq!(keys(b"\x01\x01"), [Key::Nothing, Key::Guest(1)]);
    }

    #[test]
    fn an_unknown_key_is_dropped_and_the_next_is_ordinary() {
        let expected = [Key::Nothing, Key::Nothing, Key::Guest(b'x')];
        assert_eq!(keys(b"\x01qx"), expected);
        assert_eq!(keys(b"\x01\x01x")[1..], [Key::Guest(1), Key::Guest(b'x')]);
    }
}
