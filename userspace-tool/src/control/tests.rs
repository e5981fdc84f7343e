// SPDX-License-Identifier: GPL-2.0

use super::*;
use crate::error::STATUS_INPUT;
use std::sync::mpsc;

/// A server that tells how many commands it was given, knows no `pause`, and whose console sends back what it gets.
fn server(folder: &std::path::Path) -> (Server, impl Fn() -> UnixStream) {
    let path = folder.join("sock");
    let listener = UnixListener::bind(&path).expect("a socket");
    let given = Mutex::new(0);
    let handler = move |request, client: &UnixStream| match request {
        Request::Status {} => {
            *lock(&given) += 1;
            answer(&*lock(&given))
        }
        Request::Console {} => stream(client, |mut client| {
            let mut bytes = [0; 16];
            while let Ok(count @ 1..) = client.read(&mut bytes) {
                client
                    .write_all(&bytes[..count])
                    .map_err(failed("writing"))?;
            }
            Ok(())
        }),
        _ => Err(Error::input("too tired", "wait")),
    };
    let server = Server::start(listener, handler).expect("a server");
    (server, move || {
        UnixStream::connect(&path).expect("it listens")
    })
}

fn client(stream: UnixStream) -> Client {
    Client::new(&"test".parse().expect("a name"), stream)
}

/// Sends a line as it is and reads the answer.
fn ask(mut stream: &UnixStream, line: &str) -> Value {
    stream.write_all(line.as_bytes()).expect("sent");
    let mut answer = String::new();
    BufReader::new(stream)
        .read_line(&mut answer)
        .expect("an answer");
    serde_json::from_str(&answer).expect("JSON")
}

fn ended() -> Ended {
    Ended::from(&Outcome::PoweredOff)
}

#[test]
fn commands_are_answered_in_turn() {
    let folder = tempfile::tempdir().expect("a folder");
    let (server, connect) = server(folder.path());
    let mut client = client(connect());
    for number in [1, 2] {
        let given: u8 = client.call(&Request::Status {}).expect("an answer");
        assert_eq!(given, number);
    }
    let error = client
        .call::<Nothing>(&Request::Pause {})
        .expect_err("it says no");
    assert_eq!(
        (error.to_string(), error.status()),
        ("too tired; wait".to_owned(), STATUS_INPUT)
    );
    server.finish(ended());
}

#[test]
fn wrong_lines_are_answered_and_do_no_harm() {
    let folder = tempfile::tempdir().expect("a folder");
    let (server, connect) = server(folder.path());
    let stream = connect();
    for (line, words) in [
        ("\n", "EOF"),
        ("[1]\n", "command"),
        ("7\n", "command"),
        ("\u{fffd}\n", "expected value"),
        ("{\"number\":1}\n", "missing field `command`"),
        ("{\"command\":7}\n", "invalid type"),
        ("{\"command\":\"sing\"}\n", "`sing`"),
        ("{\"command\":\"status\",\"more\":2}\n", "unknown field"),
        ("{\"command\":\"trace\",\"cpu\":\"1\"}\n", "invalid type"),
        ("{\"command\":\"trace\",\"more\":2}\n", "unknown field"),
        ("{\"command\":\"wait\",\"more\":2}\n", "unknown field"),
    ] {
        let answer = ask(&stream, line);
        let cause = answer["error"]["cause"].as_str().expect("a cause");
        assert!(cause.contains(words), "{line}: {answer}");
        assert_eq!(answer["error"]["status"], 2);
    }
    assert_eq!(ask(&stream, "{\"command\":\"status\"}\n"), json!({"ok": 1}));
    server.finish(ended());
}

#[test]
fn a_line_is_bounded() {
    let folder = tempfile::tempdir().expect("a folder");
    let (server, connect) = server(folder.path());
    let stream = connect();
    let blanks = " ".repeat(LONGEST - "{\"command\":\"status\"}\n".len() - 1);
    let longest = format!("{{\"command\":{blanks}\"status\"}}\n");
    assert_eq!(ask(&stream, &longest), json!({"ok": 1}));
    let answer = ask(&stream, &"x".repeat(LONGEST));
    let cause = answer["error"]["cause"].as_str().expect("a cause");
    assert!(cause.contains("65536"), "{cause}");
    assert_eq!((&stream).read(&mut [0]).expect("the end"), 0);
    server.finish(ended());
}

#[test]
fn clients_are_bounded_and_idle_ones_hold_up_nobody() {
    let folder = tempfile::tempdir().expect("a folder");
    let (server, connect) = server(folder.path());
    let idle: Vec<UnixStream> = (1..CLIENTS).map(|_| connect()).collect();
    // An answer says that the server has taken it, and so those before it.
    let mut last = client(connect());
    assert_eq!(last.call::<u8>(&Request::Status {}).expect("an answer"), 1);
    let mut line = String::new();
    BufReader::new(connect())
        .read_line(&mut line)
        .expect("a line");
    assert!(line.contains("serves 32 clients"), "{line}");
    // Once one has gone there is room; the server sees that soon.
    drop(idle);
    let served = (0..500).any(|_| {
        thread::sleep(Duration::from_millis(10));
        client(connect()).call::<u8>(&Request::Status {}).is_ok()
    });
    assert!(served);
    server.finish(ended());
}

#[test]
fn who_waits_learns_of_the_end_and_a_stream_ends() {
    let folder = tempfile::tempdir().expect("a folder");
    let (server, connect) = server(folder.path());
    let (told, tells) = mpsc::channel();
    let mut waiting = client(connect());
    let thread = thread::spawn(move || {
        let sent = waiting.send(&[&Request::Wait {}]);
        let ended: Result<Option<Ended>> = sent.and_then(|()| waiting.receive(PATIENCE));
        told.send(ended).expect("the test listens");
    });
    let mut streaming = client(connect());
    let Nothing {} = streaming.call(&Request::Console {}).expect("a stream");
    let mut stream = streaming.into_stream().expect("a socket");
    stream.get_mut().write_all(b"hello").expect("sent");
    let mut bytes = [0; 5];
    stream.read_exact(&mut bytes).expect("sent back");
    assert_eq!(&bytes, b"hello");
    assert!(tells.recv_timeout(Duration::from_millis(50)).is_err());
    server.finish(ended());
    assert_eq!(stream.read(&mut bytes).expect("the end"), 0);
    let ended = tells
        .recv()
        .expect("it was told")
        .expect("no error")
        .expect("an answer");
    assert_eq!(ended.status, 0);
    thread.join().expect("no panic");
}

/// As 'rvisor stop' does it: a machine with one place left, whose guest is quick.
#[test]
fn a_command_and_the_wait_for_the_end_need_one_connection() {
    let folder = tempfile::tempdir().expect("a folder");
    let (server, connect) = server(folder.path());
    let _others: Vec<UnixStream> = (1..CLIENTS).map(|_| connect()).collect();
    let mut client = client(connect());
    let sent = client.send(&[&Request::Status {}, &Request::Wait {}]);
    sent.expect("they are taken");
    let given: Option<u8> = client.receive(PATIENCE).expect("an answer");
    assert_eq!(given, Some(1));
    server.finish(ended());
    let told: Option<Ended> = client.receive(PATIENCE).expect("an answer");
    assert_eq!(told.map(|told| told.status), Some(0));
}

#[test]
fn a_client_that_waits_and_goes_leaves_its_place() {
    let folder = tempfile::tempdir().expect("a folder");
    let (server, connect) = server(folder.path());
    for _ in 0..2 * CLIENTS {
        let stream = connect();
        (&stream)
            .write_all(b"{\"command\":\"wait\"}\n")
            .expect("sent");
        drop(stream);
        // The next one finds room as soon as the server has seen this one go.
        let served = (0..500).any(|_| {
            let done = client(connect()).call::<u8>(&Request::Status {}).is_ok();
            if !done {
                thread::sleep(Duration::from_millis(10));
            }
            done
        });
        assert!(served);
    }
    server.finish(ended());
}

/// A machine that answers what `line` says, and then goes.
fn hostile(line: impl AsRef<[u8]>) -> Client {
    let (ours, mut theirs) = UnixStream::pair().expect("sockets");
    let line = [line.as_ref(), b"\n"].concat();
    // The client may have heard enough before all is sent.
    thread::spawn(move || theirs.write_all(&line));
    client(ours)
}

#[test]
fn what_a_machine_says_commands_no_terminal() {
    let harmless = |text: &str| !text.chars().any(char::is_control);
    let line = r#"{"ok":{"outcome":"a\u001b[2Jb\n\u009b1m\u007f\r","status":0}}"#;
    let ended: Option<Ended> = hostile(line).receive(PATIENCE).expect("an answer");
    let outcome = ended.expect("an answer").outcome;
    assert_eq!(outcome, "a\u{fffd}[2Jb\n\u{fffd}1m\u{fffd}\u{fffd}");
    for line in [
        r#"{"error":{"cause":"a\u001b[2J\nrvisor: b","next":"b\u0007\n","status":2}}"#,
        r#"{"error":{"cause":"a\nb","next":"","status":1}}"#,
        r#"{"error":{"cause":"a\u001b[2J","next":"b\u0007","status":1}}"#,
        r#"{"\u001b[2J\n":1}"#,
        r#"{"ok":{"outcome":"a","status":"\u001b[2J"}}"#,
        "{\"ok\":{\"\u{9b}2J\":7}}",
        "\x1b[2J",
    ] {
        let told = hostile(line).receive::<Ended>(PATIENCE);
        let told = told.expect_err(line).to_string();
        assert!(harmless(&told), "{told:?}");
    }
    let line = r#"{"cause\u001b[2J":"a\u001b[2J"}"#;
    let next: Option<Value> = hostile(line).next_object().expect("an object");
    assert_eq!(next, Some(json!({"cause\u{fffd}[2J": "a\u{fffd}[2J"})));
}

#[test]
fn a_machines_line_is_bounded() {
    let told = hostile(vec![b' '; client::LONGEST]).receive::<Ended>(PATIENCE);
    let told = told.expect_err("it is too long").to_string();
    assert!(told.contains("a line of 4194304 bytes"), "{told}");
}

#[test]
fn a_process_is_told_while_it_has_its_end_of_the_connection() {
    let (ours, theirs) = UnixStream::pair().expect("sockets");
    let client = client(ours);
    assert!(client.process().expect("it is told").is_some());
    drop(theirs);
    assert!(client.process().expect("it is told").is_none());
}
