// SPDX-License-Identifier: GPL-2.0

//! What a guest's output may do to the terminal that shows it.
//!
//! A terminal obeys more than text: it answers questions as if the user had typed the answer, sets its title
//! and the clipboard, prints, resizes itself (ECMA-48; "XTerm Control Sequences"). [`Filter`] lets text through,
//! colours, the cursor's movement and what erases, by a list of what is known to be harmless; everything else
//! is dropped. A sequence is held until it is whole, so that the terminal never sees the start of one.

use std::os::fd::AsFd;

use rustix::termios::isatty;

/// The escape character.
const ESC: u8 = 0x1b;
/// The longest control sequence that passes, in bytes; colours of 24 bits for both grounds take 38.
const LONGEST: usize = 64;
/// The most digits of a number in it: nothing is done a million times.
const DIGITS: usize = 4;
/// What stands for a character that does not pass.
const UNKNOWN: u8 = b'?';

/// The private modes that a guest may set and reset: cursor keys, reverse video, origin, line wrap, the
/// cursor's blinking and visibility, the alternate screen, the marks around pasted text. Not those that make
/// the terminal report the mouse or its focus.
const MODES: [u32; 11] = [1, 5, 6, 7, 12, 25, 47, 1047, 1048, 1049, 2004];

/// Where in the stream the filter stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Between characters.
    Ground,
    /// In a character of UTF-8 that lacks so many bytes.
    Character(u8),
    /// Behind an ESC.
    Escape,
    /// Behind ESC and the number of a character set.
    CharacterSet,
    /// In a control sequence, behind ESC [.
    Control,
    /// In a sequence that will be dropped; its last byte is this one or a greater one.
    Dropped(u8),
    /// In a string for the terminal (OSC, DCS, SOS, PM, APC), which is dropped.
    String,
}

/// The filter of one stream of output.
#[derive(Clone, Debug)]
pub struct Filter {
    state: State,
    /// The sequence or character that is not whole yet.
    held: Vec<u8>,
    utf8: bool,
}

impl Filter {
    /// A filter for a terminal that reads UTF-8, or one that does not: that one gets ASCII alone, because to it
    /// some bytes of UTF-8 are control characters.
    #[must_use]
    pub fn new(utf8: bool) -> Self {
        Self {
            state: State::Ground,
            held: Vec::with_capacity(LONGEST),
            utf8,
        }
    }

    /// A filter for `output` where that is a terminal, unless it is to get all of it, `unfiltered`. LC_ALL, LC_CTYPE
    /// and LANG name what the terminal reads.
    #[must_use]
    pub fn for_output(output: &impl AsFd, unfiltered: bool) -> Option<Self> {
        if unfiltered || !isatty(output) {
            return None;
        }
        let locale = ["LC_ALL", "LC_CTYPE", "LANG"]
            .into_iter()
            .find_map(|name| std::env::var(name).ok().filter(|value| !value.is_empty()));
        let locale = locale.unwrap_or_default().to_ascii_lowercase();
        Some(Self::new(
            locale.contains("utf-8") || locale.contains("utf8"),
        ))
    }

    /// Takes the next bytes of the stream and puts those that pass behind `out`.
    pub fn pass(&mut self, bytes: &[u8], out: &mut Vec<u8>) {
        for byte in bytes {
            self.feed(*byte, out);
        }
    }

    fn feed(&mut self, byte: u8, out: &mut Vec<u8>) {
        match (self.state, byte) {
            (State::Ground, _) => self.begin(byte, out),
            (State::Character(1), 0x80..=0xbf) => {
                self.held.push(byte);
                self.end_character(out);
            }
            (State::Character(missing), 0x80..=0xbf) => {
                self.hold(byte, State::Character(missing - 1))
            }
            (State::Escape, b'[') => self.hold(byte, State::Control),
            (State::Escape, b']' | b'P' | b'X' | b'^' | b'_') => self.state = State::String,
            (State::Escape, b'('..=b'+') => self.hold(byte, State::CharacterSet),
            (State::Escape | State::CharacterSet, 0x20..=0x2f) => {
                self.state = State::Dropped(0x30);
            }
            // Save and restore the cursor, index, next line, reverse index, set a tab, the keypad's modes.
            (State::Escape, b'7' | b'8' | b'D' | b'E' | b'M' | b'H' | b'=' | b'>') => {
                self.end(byte, true, out)
            }
            (State::CharacterSet, b'0' | b'A' | b'B') => self.end(byte, true, out),
            (State::Escape | State::CharacterSet, 0x30..=0x7e) => self.end(byte, false, out),
            (State::Control, 0x20..=0x3f) if self.held.len() < LONGEST => {
                self.hold(byte, State::Control)
            }
            (State::Control, 0x20..=0x3f) => self.state = State::Dropped(0x40),
            (State::Control, 0x40..=0x7e) => {
                let harmless = self
                    .held
                    .get(2..)
                    .is_some_and(|body| is_harmless(body, byte));
                self.end(byte, harmless, out);
            }
            (State::Dropped(_), 0x20..=0x7e) => self.end_dropped(byte),
            // Also the end of a line ends a string: this terminal has not seen it begin.
            (State::String, ESC | b'\n') => self.begin(byte, out),
            (State::String, 0x07 | 0x18 | 0x1a) => self.state = State::Ground,
            (State::String, _) => {}
            // What does not belong into the character or the sequence ends it, unseen.
            _ => {
                if matches!(self.state, State::Character(_)) {
                    out.push(UNKNOWN);
                }
                self.begin(byte, out);
            }
        }
    }

    /// Takes a byte between characters.
    fn begin(&mut self, byte: u8, out: &mut Vec<u8>) {
        self.held.clear();
        self.state = State::Ground;
        match byte {
            ESC => self.hold(byte, State::Escape),
            // Bell, backspace, tab, ends of lines and pages, the shifts between two character sets, ASCII.
            0x07..=0x0f | 0x20..=0x7e => out.push(byte),
            0xc2..=0xdf if self.utf8 => self.hold(byte, State::Character(1)),
            0xe0..=0xef if self.utf8 => self.hold(byte, State::Character(2)),
            0xf0..=0xf4 if self.utf8 => self.hold(byte, State::Character(3)),
            0x80..=0xff => out.push(UNKNOWN),
            _ => {}
        }
    }

    fn hold(&mut self, byte: u8, state: State) {
        self.held.push(byte);
        self.state = state;
    }

    /// Ends a sequence with its last byte.
    fn end(&mut self, byte: u8, passes: bool, out: &mut Vec<u8>) {
        if passes {
            out.extend_from_slice(&self.held);
            out.push(byte);
        }
        self.state = State::Ground;
    }

    fn end_dropped(&mut self, byte: u8) {
        if matches!(self.state, State::Dropped(last) if byte >= last) {
            self.state = State::Ground;
        }
    }

    /// Passes the character that is held, unless it is none or a control character (U+0080 to U+009F).
    fn end_character(&mut self, out: &mut Vec<u8>) {
        self.state = State::Ground;
        match std::str::from_utf8(&self.held) {
            Ok(text) if text >= "\u{a0}" => out.extend_from_slice(&self.held),
            _ => out.push(UNKNOWN),
        }
    }
}

/// Whether the control sequence with these parameters and this last byte does no more than to place, colour or
/// erase text.
fn is_harmless(body: &[u8], last: u8) -> bool {
    let (private, body) = match body {
        [b'?', body @ ..] => (true, body),
        body => (false, body),
    };
    let (space, body) = match body {
        [body @ .., b' '] => (true, body),
        body => (false, body),
    };
    let separator = |byte: &u8| matches!(byte, b';' | b':');
    let mut numbers = body.split(separator);
    let plain = |number: &[u8]| number.len() <= DIGITS && number.iter().all(u8::is_ascii_digit);
    if !numbers.clone().all(plain) {
        return false;
    }
    let value = |number: &[u8]| {
        let digits = number.iter().map(|digit| u32::from(digit - b'0'));
        digits.fold(0, |value, digit| value * 10 + digit)
    };
    match (private, space, last) {
        (true, false, b'h' | b'l') => numbers.all(|number| MODES.contains(&value(number))),
        // The cursor's shape.
        (false, true, b'q') => true,
        // With more than one number it tracks the mouse.
        (false, false, b'T') => !body.iter().any(separator),
        // 3 would erase what the user has scrolled past.
        (false, false, b'J') => numbers.all(|number| value(number) != 3),
        // Inserting mode.
        (false, false, b'h' | b'l') => body == b"4",
        (
            false,
            false,
            b'@'..=b'I'
            | b'K'..=b'M'
            | b'P'
            | b'S'
            | b'X'
            | b'Z'
            | b'`'..=b'b'
            | b'd'..=b'g'
            | b'm'
            | b'r'
            | b's'
            | b'u',
        ) => true,
        _ => false,
    }
}

#[cfg(test)]
mod tests;
