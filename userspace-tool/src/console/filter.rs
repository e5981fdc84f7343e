// SPDX-License-Identifier: GPL-2.0

//! What a guest's output may do to the terminal that shows it.
//!
//! A terminal obeys more than text: it answers questions as if the user had typed the answer, sets its title
//! and the clipboard, prints, resizes itself (ECMA-48; "XTerm Control Sequences"). [`Filter`] lets text through,
//! colours, the cursor's movement and what erases, by a list of what is known to be harmless; everything else
//! is dropped. The crate `vte` takes the stream apart, and what passes is written anew from the parts, so that the
//! terminal gets no sequence but whole ones of the list.

use std::io::Write;
use std::os::fd::AsFd;

use rustix::termios::isatty;
use vte::{Params, Parser, Perform};

/// The greatest number in a sequence: nothing is done a million times.
const MOST: u16 = 9999;
/// What stands for a character that does not pass.
const UNKNOWN: char = '?';
/// The escape character.
const ESC: u8 = 0x1b;
/// CAN, which ends a sequence that is not whole.
const CANCEL: u8 = 0x18;

/// The private modes that a guest may set and reset: cursor keys, reverse video, origin, line wrap, the
/// cursor's blinking and visibility, the alternate screen, the marks around pasted text. Not those that make
/// the terminal report the mouse or its focus.
const MODES: [u16; 11] = [1, 5, 6, 7, 12, 25, 47, 1047, 1048, 1049, 2004];

/// The filter of one stream of output.
pub struct Filter {
    parser: Parser,
    allowed: Allowed,
}

/// What it lets through.
#[derive(Clone, Copy)]
struct Allowed {
    /// Characters beyond ASCII.
    utf8: bool,
    /// What changes colours.
    colours: bool,
    /// What is harmless to a screen that is the stream's alone.
    screen: bool,
}

impl Filter {
    /// A filter for a terminal that reads UTF-8, or one that does not: that one gets ASCII alone, because to it
    /// some bytes of UTF-8 are control characters.
    #[must_use]
    pub fn new(utf8: bool) -> Self {
        Self {
            parser: Parser::new(),
            allowed: Allowed {
                utf8,
                colours: true,
                screen: true,
            },
        }
    }

    /// The same for a screen that several streams share, and that gets a line at a time of each: text and, where it
    /// has some, `colours`, which end with the line. Nothing moves the cursor to the lines of others.
    #[must_use]
    pub fn within_lines(mut self, colours: bool) -> Self {
        (self.allowed.colours, self.allowed.screen) = (colours, false);
        self
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

    /// Takes the next bytes of the stream and gives those that pass.
    pub fn passed(&mut self, bytes: &[u8]) -> Vec<u8> {
        let mut passed = Passed {
            allowed: self.allowed,
            out: Vec::with_capacity(bytes.len()),
        };
        for line in bytes.chunk_by(|_, next| *next != b'\n') {
            if line.starts_with(b"\n") {
                // What has no end there would swallow all that follows.
                self.parser.advance(&mut passed, &[CANCEL]);
            }
            self.parser.advance(&mut passed, line);
        }
        if !self.allowed.screen && passed.out.contains(&ESC) {
            passed.out.extend_from_slice(b"\x1b[m");
        }
        passed.out
    }
}

/// Takes what the parser has found, and writes what of it passes.
struct Passed {
    allowed: Allowed,
    out: Vec<u8>,
}

impl Perform for Passed {
    fn print(&mut self, character: char) {
        let shown = match character {
            ' '..='~' => character,
            '\x7f' => return,
            char::REPLACEMENT_CHARACTER => UNKNOWN,
            _ if character.is_control() || !self.allowed.utf8 => UNKNOWN,
            _ => character,
        };
        self.out
            .extend_from_slice(shown.encode_utf8(&mut [0; 4]).as_bytes());
    }

    fn execute(&mut self, byte: u8) {
        match byte {
            b'\t' => self.out.push(byte),
            // Bell, backspace, ends of lines and pages, the shifts between two character sets.
            0x07..=0x0f if self.allowed.screen => self.out.push(byte),
            0x80.. => self.print(UNKNOWN),
            _ => {}
        }
    }

    fn esc_dispatch(&mut self, between: &[u8], _ignore: bool, last: u8) {
        let harmless = match between {
            _ if !self.allowed.screen => false,
            // Save and restore the cursor, index, next line, reverse index, set a tab, the keypad's modes.
            [] => b"78DEMH=>".contains(&last),
            // The character set of a number.
            [b'('..=b'+'] => b"0AB".contains(&last),
            _ => false,
        };
        if harmless {
            self.out.push(ESC);
            self.out.extend_from_slice(between);
            self.out.push(last);
        }
    }

    fn csi_dispatch(&mut self, params: &Params, between: &[u8], ignore: bool, last: char) {
        let is_allowed = self.allowed.screen || self.allowed.colours && last == 'm';
        if ignore || !is_allowed || !is_harmless(params, between, last) {
            return;
        }
        let numbers = |group: &[u16]| {
            let numbers: Vec<String> = group.iter().map(u16::to_string).collect();
            numbers.join(":")
        };
        // One that is 0 may be one that was left out, as it has to be where it would make another sequence.
        let groups: Vec<String> = match params.iter().next() {
            Some([0]) if params.len() == 1 => Vec::new(),
            _ => params.iter().map(numbers).collect(),
        };
        let (private, space) = match between {
            [b'?'] => ("?", ""),
            [b' '] => ("", " "),
            _ => ("", ""),
        };
        // Writing to memory can't fail.
        let _ = write!(self.out, "\x1b[{private}{}{space}{last}", groups.join(";"));
    }
}

/// Whether a control sequence does no more than to place, colour or erase text.
fn is_harmless(params: &Params, between: &[u8], last: char) -> bool {
    let numbers: Vec<u16> = params.iter().flatten().copied().collect();
    if numbers.iter().any(|number| *number > MOST) {
        return false;
    }
    match (between, last) {
        ([b'?'], 'h' | 'l') => numbers.iter().all(|number| MODES.contains(number)),
        // The cursor's shape.
        ([b' '], 'q') => true,
        // With more than one number it tracks the mouse.
        ([], 'T') => numbers.len() == 1,
        // 3 would erase what the user has scrolled past.
        ([], 'J') => !numbers.contains(&3),
        // Inserting mode.
        ([], 'h' | 'l') => numbers == [4],
        ([], 'm' | 'r' | 's' | 'u') => true,
        // The cursor's movement, tabs, inserting, deleting, erasing, scrolling and repeating.
        ([], '@'..='I' | 'K'..='M' | 'P' | 'S' | 'X' | 'Z' | '`'..='b' | 'd'..='g') => true,
        _ => false,
    }
}

#[cfg(test)]
mod tests;
