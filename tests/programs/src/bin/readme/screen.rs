// SPDX-License-Identifier: GPL-2.0
//! What stands on a terminal after a program has written to it, and whether that is what README shows.

/// The lines that a terminal of unbounded size shows after `written`. Of escape sequences those count that place the
/// cursor and erase; the rest are colours and modes.
pub(crate) fn lines(written: &str) -> Vec<String> {
    let mut screen = Screen::default();
    let mut rest = written.chars();
    while let Some(c) = rest.next() {
        match c {
            '\r' => screen.column = 0,
            '\n' => screen.row += 1,
            '\u{8}' => screen.column = screen.column.saturating_sub(1),
            '\u{1b}' if rest.as_str().starts_with('[') => {
                let sequence =
                    rest.as_str()[1..].split_inclusive(|c: char| ('@'..='~').contains(&c));
                let sequence = sequence.take(1).collect::<String>();
                screen.obey(&sequence);
                rest = rest.as_str()[1 + sequence.len()..].chars();
            }
            c if c.is_control() => {}
            c => screen.put(c),
        }
    }
    let lines = screen.rows.iter();
    lines
        .map(|row| row.iter().collect::<String>().trim_end().to_owned())
        .collect()
}

#[derive(Default)]
struct Screen {
    rows: Vec<Vec<char>>,
    row: usize,
    column: usize,
}

impl Screen {
    fn put(&mut self, c: char) {
        let rows = self.rows.len().max(self.row + 1);
        self.rows.resize(rows, Vec::new());
        let row = &mut self.rows[self.row];
        let columns = row.len().max(self.column + 1);
        row.resize(columns, ' ');
        row[self.column] = c;
        self.column += 1;
    }

    fn obey(&mut self, sequence: &str) {
        let numbers = sequence.trim_end_matches(|c: char| !c.is_ascii_digit());
        let mut numbers = numbers
            .split(';')
            .map(|number| number.parse().unwrap_or(1_usize));
        let mut next = || numbers.next().unwrap_or(1).clamp(1, 500) - 1;
        match sequence.chars().last() {
            // The other screen, or all of it: `top` begins with these.
            Some('h') if sequence == "?1049h" => *self = Self::default(),
            Some('J') if sequence == "2J" => self.rows.clear(),
            Some('H') => (self.row, self.column) = (next(), next()),
            Some('C') => self.column += next() + 1,
            Some('J' | 'K') => {
                let column = self.column;
                self.rows
                    .iter_mut()
                    .skip(self.row)
                    .take(1)
                    .for_each(|row| row.truncate(column));
            }
            _ => {}
        }
    }
}

/// A line without what differs from run to run: numbers, and how much room there is between words. A number alone is
/// an exit status and stays.
fn masked(line: &str) -> String {
    if line.parse::<u8>().is_ok() {
        return line.to_owned();
    }
    let words: Vec<&str> = line.split_whitespace().collect();
    let mut masked = String::new();
    let mut rest = words.join(" ");
    while let Some(c) = rest.chars().next() {
        let (hexadecimal, digits) = match rest.strip_prefix("0x") {
            Some(digits) => (true, digits),
            None => (false, rest.as_str()),
        };
        let digit = |c: char| c.is_ascii_digit() || hexadecimal && c.is_ascii_hexdigit();
        let left = digits.trim_start_matches(digit);
        if left.len() < digits.len() {
            masked.push('0');
            rest = left.to_owned();
        } else {
            masked.push(c);
            rest.drain(..c.len_utf8());
        }
    }
    masked
}

/// Whether a line is as README shows it, where `...` is any text.
fn line_is(found: &str, shown: &str) -> bool {
    let (found, shown) = (masked(found), masked(shown));
    let Some((start, rest)) = shown.split_once("...") else {
        return found == shown;
    };
    let Some(mut found) = found.strip_prefix(start) else {
        return false;
    };
    let mut parts = rest.split("...").peekable();
    while let Some(part) = parts.next() {
        if parts.peek().is_none() {
            return found.ends_with(part);
        }
        match found.find(part) {
            Some(place) => found = &found[place + part.len()..],
            None => return false,
        }
    }
    true
}

/// Whether the screen is as README shows it, where a line `...` is any lines. Empty lines do not count.
pub(crate) fn is(found: &[String], shown: &[String]) -> bool {
    let Some((first, shown_rest)) = shown.split_first() else {
        return found.iter().all(|line| line.is_empty());
    };
    if first.is_empty() {
        return is(found, shown_rest);
    }
    if first == "..." {
        return (0..=found.len()).any(|skipped| is(&found[skipped..], shown_rest));
    }
    match found.split_first() {
        Some((line, found_rest)) if line.is_empty() => is(found_rest, shown),
        Some((line, found_rest)) => line_is(line, first) && is(found_rest, shown_rest),
        None => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shows(found: &str, shown: &str) -> bool {
        let split = |text: &str| text.lines().map(str::to_owned).collect::<Vec<_>>();
        is(&split(found), &split(shown))
    }

    #[test]
    fn numbers_are_any_and_words_are_not() {
        assert!(shows(
            "web  63  0:00:12  rip 0xffa0",
            "web 7 0:01:02 rip 0x1"
        ));
        assert!(!shows("db 63", "web 63"));
        assert!(!shows("rip ffa0", "rip 0x1"));
    }

    #[test]
    fn an_exit_status_is_not_any_number() {
        assert!(shows("8", "8"));
        assert!(!shows("8", "0"));
    }

    #[test]
    fn dots_are_any_text_and_any_lines() {
        assert!(shows("a\nb\n\nc\nd", "...\nc\nd"));
        assert!(shows("a\nd", "a\n...\nd"));
        assert!(shows("one two three", "one...e"));
        assert!(!shows("a\nb", "...\nc"));
        assert!(!shows("one two", "one...three"));
        assert!(!shows("a\nb", "a"));
        assert!(!shows("a", "a\nb"));
    }

    #[test]
    fn the_cursor_goes_where_it_is_sent() {
        assert_eq!(
            lines("x\u{1b}[?1049h\u{1b}[2;3Hab\u{1b}[1;1H\u{1b}[1mc\u{1b}[m"),
            ["c", "  ab"]
        );
        assert_eq!(lines("abc\r\u{1b}[Jd\r\ne\n f"), ["d", "e", "  f"]);
        assert_eq!(lines("abc\u{8}\u{8}x"), ["axc"]);
    }
}
