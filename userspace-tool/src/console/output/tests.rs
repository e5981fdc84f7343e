// SPDX-License-Identifier: GPL-2.0

use std::time::Instant;

use rustix::pipe::pipe;

use super::*;

fn output(file: Option<File>) -> (Output, Control) {
    let (control, _) = Control::new();
    let wake = Wake::new().expect("an eventfd");
    let output = Output::new(wake, file, false, control.clone());
    output.start().expect("a thread");
    (output, control)
}

/// Writes as a guest does that has `bytes` at once.
fn write(output: &Output, bytes: &[u8]) {
    output.clone().write_all(bytes).expect("it is taken");
}

fn attached(output: &Output) -> (UnixStream, thread::JoinHandle<Result<()>>) {
    let (ours, theirs) = UnixStream::pair().expect("sockets");
    let output = output.clone();
    (ours, thread::spawn(move || output.attach(&theirs)))
}

fn read(client: &mut UnixStream, count: usize) -> Vec<u8> {
    let mut bytes = vec![0; count];
    client.read_exact(&mut bytes).expect("that many bytes");
    bytes
}

#[test]
fn clients_see_what_was_and_what_comes() {
    let (output, _) = output(None);
    write(&output, b"before ");
    let (mut one, _) = attached(&output);
    let (mut two, _) = attached(&output);
    assert_eq!(read(&mut one, 7), b"before ");
    write(&output, b"after");
    assert_eq!(read(&mut one, 5), b"after");
    assert_eq!(read(&mut two, 12), b"before after");
}

#[test]
fn clients_wait_for_no_end_of_line_behind_much() {
    let (output, _) = output(None);
    let (mut client, _) = attached(&output);
    let round = |_| {
        let start = Instant::now();
        write(&output, b"x");
        thread::sleep(DELAY / 5);
        write(&output, &[b'x'; MOST as usize]);
        read(&mut client, 1 + MOST as usize);
        start.elapsed()
    };
    let least = (0..20).map(round).min();
    assert!(least < Some(DELAY * 4 / 5), "{least:?}");
}

#[test]
fn scrollback_is_bounded() {
    let (output, _) = output(None);
    write(&output, b"lost");
    write(&output, &[b'x'; SCROLLBACK]);
    let (mut client, thread) = attached(&output);
    assert_eq!(read(&mut client, SCROLLBACK), [b'x'; SCROLLBACK]);
    client.shutdown(std::net::Shutdown::Write).expect("open");
    thread.join().expect("no panic").expect("a good end");
    assert_eq!(client.read(&mut [0]).expect("the end"), 0);
}

#[test]
fn a_client_that_takes_nothing_holds_up_nobody() {
    let (output, _) = output(None);
    let (_stuck, _) = attached(&output);
    for _ in 0..64 {
        write(&output, &[b'x'; SCROLLBACK]);
    }
    let (mut client, _) = attached(&output);
    assert_eq!(read(&mut client, SCROLLBACK), [b'x'; SCROLLBACK]);
}

#[test]
fn a_client_that_stalls_goes_on_and_is_told_what_it_missed() {
    let (output, _) = output(None);
    let (mut client, theirs) = UnixStream::pair().expect("sockets");
    // As the server does for answers.
    let patience = Some(Duration::from_millis(20));
    theirs.set_write_timeout(patience).expect("a timeout");
    thread::spawn({
        let output = output.clone();
        move || output.attach(&theirs)
    });
    write(&output, b"first");
    assert_eq!(read(&mut client, 5), b"first");
    for _ in 0..64 {
        write(&output, &[b'x'; SCROLLBACK]);
        thread::sleep(Duration::from_millis(5));
    }
    write(&output, b"last");
    let mut seen = Vec::new();
    while !seen.ends_with(b"last") {
        seen.extend(read(&mut client, 1));
    }
    let seen = String::from_utf8_lossy(&seen);
    let (_, note) = seen.split_once("rvisor: ").expect("a note");
    let (missed, _) = note.split_once(" bytes were too fast").expect("a number");
    let missed: usize = missed.parse().expect("a number");
    assert_eq!(missed + seen.matches('x').count(), 64 * SCROLLBACK);
}

#[test]
fn what_is_typed_waits_for_the_guest_within_bounds() {
    let (output, _) = output(None);
    let (mut client, thread) = attached(&output);
    client.write_all(&[b'k'; 5 * TYPED]).expect("taken");
    drop(client);
    thread.join().expect("no panic").expect("a good end");
    let mut waiting = VecDeque::new();
    output.take_typed(&mut waiting);
    assert_eq!(waiting.len(), TYPED);
}

/// A guest that writes byte for byte sees no byte lost, and each comes in time, be it the end of a line or not.
#[test]
fn standard_output_gets_each_byte_in_time() {
    let (reader, writer) = pipe().expect("a pipe");
    let (output, _) = output(Some(File::from(writer)));
    let mut reader = File::from(reader);
    for text in [
        &b"a line\n"[..],
        b"login: ",
        b"two\nlines",
        &[b'x'; 3 * 4096],
    ] {
        let start = Instant::now();
        text.iter().for_each(|byte| write(&output, &[*byte]));
        let mut bytes = vec![0; text.len()];
        reader.read_exact(&mut bytes).expect("they come");
        assert_eq!(bytes, text);
        assert!(start.elapsed() < DELAY * 100);
    }
    output.say(b"help");
    let mut words = [0; 4];
    reader.read_exact(&mut words).expect("they come");
    assert_eq!(&words, b"help");
}

#[test]
fn standard_output_that_is_closed_ends_the_guest() {
    let (reader, writer) = pipe().expect("a pipe");
    let (output, control) = output(Some(File::from(writer)));
    drop(reader);
    let until = Instant::now() + REST * 4;
    while !control.ended() {
        assert!(Instant::now() < until, "it goes on");
        write(&output, b"line\n");
    }
    let start = Instant::now();
    output.finish();
    assert!(start.elapsed() < REST);
}

#[test]
fn last_words_that_can_not_be_written_are_missed() {
    let (reader, writer) = pipe().expect("a pipe");
    drop(reader);
    let (control, outcomes) = Control::new();
    let wake = Wake::new().expect("an eventfd");
    let output = Output::new(wake, Some(File::from(writer)), false, control.clone());
    write(&output, b"line\n");
    control.end(Outcome::PoweredOff);
    output.start().expect("a thread");
    output.finish();
    let told: Vec<_> = outcomes.try_iter().map(|it| it.to_string()).collect();
    assert!(
        matches!(&told[..], [end, lost] if end.contains("powered off") && lost.starts_with("writing the console: ")),
        "{told:?}"
    );
}

#[test]
fn a_panic_while_it_is_shown_ends_the_guest() {
    let (_reader, writer) = pipe().expect("a pipe");
    let (control, _) = Control::new();
    let wake = Wake::new().expect("an eventfd");
    let output = Output::new(wake, Some(File::from(writer)), false, control.clone());
    output.see_to(|| panic!("a test"));
    assert!(control.ended());
    // Nobody waits for what will never be shown.
    let start = Instant::now();
    write(&output, &[b'x'; 3 * 4096]);
    output.finish();
    assert!(start.elapsed() < REST);
}

/// A pipe that nobody reads holds the guest up, but neither its pausing nor its end; nor are others held up.
#[test]
fn output_that_nobody_reads_holds_nothing_up() {
    for end in [false, true] {
        let (reader, writer) = pipe().expect("a pipe");
        let (output, control) = output(Some(File::from(writer)));
        let guest = thread::spawn({
            let (output, control) = (output.clone(), control.clone());
            move || {
                let mut written = 0;
                while !control.ended() && !control.paused() {
                    write(&output, &[b'x'; 1023]);
                    write(&output, b"\n");
                    written += 1024;
                }
                written
            }
        });
        thread::sleep(LOOK * 4);
        assert!(!guest.is_finished(), "it is held up");
        output.say(b"help");
        if end {
            control.end(Outcome::Quit);
        } else {
            control.set_paused("a test");
        }
        let written = guest.join().expect("it goes on");
        assert!(written < 128 << 10, "{written} bytes");
        let start = Instant::now();
        output.finish();
        assert_eq!(control.ended(), end, "it is no error");
        assert!((REST..REST * 4).contains(&start.elapsed()));
        // All is there for a reader that comes after all.
        let mut bytes = vec![0; written + 4];
        File::from(reader).read_exact(&mut bytes).expect("a pipe");
    }
}

/// A pause lets go on who writes, with no less to show: one buffer of the virtio console, in pieces.
#[test]
fn a_pause_loses_nothing() {
    let (reader, writer) = pipe().expect("a pipe");
    let (output, control) = output(Some(File::from(writer)));
    control.set_paused("a test");
    let mut text: Vec<u8> = (0..1 << 20).map(|at: u32| (at >> 8) as u8).collect();
    text.extend_from_slice(b"the end");
    text.chunks(4096).for_each(|piece| write(&output, piece));
    let (mut reader, mut seen) = (File::from(reader), Vec::new());
    while !seen.ends_with(b"the end") {
        let mut bytes = vec![0; 4096];
        let count = reader.read(&mut bytes).expect("a pipe");
        seen.extend_from_slice(&bytes[..count]);
    }
    assert!(seen == text, "{} of {} bytes", seen.len(), text.len());
}
