// SPDX-License-Identifier: GPL-2.0

use super::*;

fn passed(utf8: bool, input: &[u8]) -> Vec<u8> {
    Filter::new(utf8).passed(input)
}

#[track_caller]
fn passes(input: &str) {
    let out = passed(true, input.as_bytes());
    assert_eq!(String::from_utf8_lossy(&out), input);
}

/// All of it is dropped but the marks around it.
#[track_caller]
fn drops(input: &[u8]) {
    let mut marked = b"a".to_vec();
    marked.extend_from_slice(input);
    marked.push(b'z');
    let out = passed(true, &marked);
    assert_eq!(String::from_utf8_lossy(&out), "az");
}

#[test]
fn text_and_what_places_and_colours_it_passes() {
    passes("login: \r\n\tdone\x08 \x07");
    passes("\u{a0}\u{e9}\u{20ac}\u{1f600}");
    passes("\x1b[m\x1b[1;31mred\x1b[38;2;255;255;255;48;2;10;20;30m\x1b[4:3m");
    passes("\x1b[2J\x1b[10;20H\x1b[5A\x1b[1K\x1b[J\x1b[2L\x1b[3P\x1b[1;24r\x1b[2S\x1b[1T");
    // Only without a number do s and u save the cursor and restore it.
    passes("\x1b[s\x1b[u\x1b[H\x1b[K\x1b[r\x1b[ q");
    // A number that is left out is 0, and the other way around.
    assert_eq!(
        passed(true, b"\x1b[0m\x1b[;5H\x1b[0K"),
        b"\x1b[m\x1b[0;5H\x1b[K"
    );
    passes("\x1b7\x1b8\x1bM\x1b(0\x1b(B\x0e\x0f\x1b=\x1b>\x1b[4h\x1b[4l\x1b[2 q");
    passes("\x1b[?1049h\x1b[?25l\x1b[?7;25h\x1b[?1;2004l");
}

#[test]
fn what_makes_the_terminal_answer_is_dropped() {
    // Device attributes, reports of status and place, answerback, mode and terminal state, version, keyboard.
    for question in [
        "\x1b[c",
        "\x1b[0c",
        "\x1b[>c",
        "\x1b[=c",
        "\x1bZ",
        "\x1b[5n",
        "\x1b[6n",
        "\x1b[?6n",
        "\x05",
        "\x1b[?25$p",
        "\x1b[1$w",
        "\x1b[x",
        "\x1b[>q",
        "\x1b[?u",
        "\x1b[1;1;1;1;1;1*y",
        "\x1bP$qm\x1b\\",
        "\x1bP+q544e\x1b\\",
        "\x1b[18t",
        "\x1b[21t",
        "\x1b]4;1;?\x07",
        "\x1b]11;?\x1b\\",
        "\x1b]52;c;?\x07",
        "\x1b_Gi=1,a=q;AAAA\x1b\\",
    ] {
        drops(question.as_bytes());
    }
}

#[test]
fn what_changes_more_than_the_screen_is_dropped() {
    // Title, clipboard, links, printer, resizing, mouse, focus, 132 columns, what was scrolled past, reset, UTF-8.
    for order in [
        "\x1b]0;title\x07",
        "\x1b]2;title\x1b\\",
        "\x1b]52;c;cm0gLXJmIC8K\x07",
        "\x1b]8;;http://x\x1b\\",
        "\x1b[5i",
        "\x1b[?5i",
        "\x1b[8;1;1t",
        "\x1b[?1000h",
        "\x1b[?1003;1006h",
        "\x1b[?1004h",
        "\x1b[?25;1000h",
        "\x1b[?3h",
        "\x1b[3J",
        "\x1b[03J",
        "\x1b[2;3J",
        "\x1bc",
        "\x1b%G",
        "\x1b%@",
        "\x1b#8",
        "\x1b[>4;2m",
        "\x1b[1;1;1;1;1T",
        "\x1b[12h",
        "\x1b[99999b",
        "\x1b[!p",
        "\x1b[4$h",
        "\x1bXsos\x1b\\",
        "\x1b^pm\x1b\\",
        "\x1b(%5",
    ] {
        drops(order.as_bytes());
    }
}

#[test]
fn control_characters_of_eight_bits_are_no_way_around() {
    // As single bytes and as UTF-8: CSI, OSC, DCS.
    for start in [
        &[0x9b_u8][..],
        &[0x9d],
        &[0x90],
        &[0xc2, 0x9b],
        &[0xc2, 0x9d],
        &[0xc2, 0x90],
    ] {
        assert_eq!(passed(true, start).first(), Some(&b'?'), "{start:x?}");
        assert!(
            passed(true, start).iter().all(|byte| *byte == b'?'),
            "{start:x?}"
        );
    }
    // A character with 0x9b in it, which is a control character of its own to some terminals.
    assert_eq!(passed(false, "\u{15b}6n".as_bytes()), b"?6n");
    // Longer than need be, cut short, surrogate, beyond the last.
    for wrong in [
        &[0xc0, 0x9b][..],
        &[0xe0, 0x82, 0x9b],
        &[0xed, 0xa0, 0x80],
        &[0xf4, 0x90, 0x80, 0x80],
        &[0xe2, 0x82],
    ] {
        let out = passed(true, &[wrong, b"z"].concat());
        assert!(
            out.is_ascii() && out.ends_with(b"z"),
            "{wrong:x?}: {out:x?}"
        );
    }
}

#[test]
fn what_breaks_a_sequence_off_is_seen_and_the_sequence_is_not() {
    assert_eq!(passed(true, b"\x1b[3\n1m"), b"\n1m");
    assert_eq!(passed(true, b"\x1b[3\x1b[1mx"), b"\x1b[1mx");
    assert_eq!(
        passed(true, b"\x1b]0;never ends\nnext line"),
        b"\nnext line"
    );
    assert_eq!(passed(true, b"\x1b]0;t\x1b[6nq"), b"q");
    let mut long = b"\x1b[".to_vec();
    long.extend_from_slice(&[b'1'; 192]);
    drops(&[&long[..], b"m"].concat());
}

/// A generator of bytes that are likely to matter (xorshift64*).
struct Bytes(u64);

impl Bytes {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 32
    }

    fn stream(&mut self) -> Vec<u8> {
        const LIKELY: &[u8] =
            b"\x1b\x1b\x1b[[[]P?>!$ ;:0123456789chlmnpqtxiJTuZ\\\x07\n\x05\xc2\x9b\x9d\x90\xe2\x82";
        let length = self.next() as usize % 200;
        let mut byte = || match self.next() {
            number if number % 4 == 0 => (number >> 8) as u8,
            number => LIKELY[(number >> 8) as usize % LIKELY.len()],
        };
        (0..length).map(|_| byte()).collect()
    }
}

/// Says what in `out` a terminal might do more with than show it. It is written from the lists in ECMA-48, apart
/// from the filter: the length of a sequence's parts first, then what they are.
fn danger(mut out: &[u8]) -> Option<String> {
    while let Some((first, rest)) = out.split_first() {
        let length = match *first {
            ESC => match rest.first().unwrap_or(&ESC) {
                b'[' => {
                    let end = rest[1..]
                        .iter()
                        .position(|byte| (0x40..=0x7e).contains(byte));
                    let Some(end) = end else {
                        return Some("a sequence without an end".into());
                    };
                    let (body, last) = (&rest[1..=end], rest[1 + end]);
                    let asks = b"cnxtipyw".contains(&last)
                        || body.iter().any(|byte| b"<=>!$\"'*+,#".contains(byte));
                    let mode = last == b'h' || last == b'l';
                    let mouse = mode && String::from_utf8_lossy(body).contains("100");
                    if asks || mouse || (last == b'u' && body.contains(&b'?')) {
                        return Some(format!("{body:?} {}", last as char));
                    }
                    end + 2
                }
                b'(' | b')' | b'*' | b'+' => 2,
                b'7' | b'8' | b'D' | b'E' | b'H' | b'M' | b'=' | b'>' => 1,
                other => return Some(format!("ESC {other:#x}")),
            },
            0x00..=0x06 | 0x10..=0x1f | 0x7f => return Some(format!("{first:#x}")),
            _ => 0,
        };
        let Some(next) = rest.get(length..) else {
            return Some("a sequence cut short".into());
        };
        out = next;
    }
    None
}

#[test]
fn random_output_harms_no_terminal() {
    let mut bytes = Bytes(0x5eed_0001);
    for round in 0..50_000 {
        let input = bytes.stream();
        let out = passed(true, &input);
        assert_eq!(
            danger(&out),
            None,
            "round {round}: {input:x?} gave {out:x?}"
        );
        let text = std::str::from_utf8(&out).expect("UTF-8 comes out");
        assert!(
            !text.contains(|c: char| ('\u{80}'..'\u{a0}').contains(&c)),
            "round {round}: {input:x?}"
        );
        assert_eq!(
            passed(true, &out),
            out,
            "round {round}: what passed once passes again"
        );
        assert!(passed(false, &input).is_ascii());
        let mut filter = Filter::new(true);
        let bytes = input.iter().flat_map(|byte| filter.passed(&[*byte]));
        let bytewise: Vec<u8> = bytes.collect();
        assert_eq!(bytewise, out, "round {round}: however it is cut");
    }
}
