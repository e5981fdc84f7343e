// SPDX-License-Identifier: GPL-2.0

//! Commands to a machine that runs, over its socket (see [`crate::registry`] for where that is).
//!
//! A client sends one JSON object a line, of at most [`LONGEST`] bytes, and gets one line back for each, in
//! their order:
//!
//! ```text
//! {"command":"status"}
//! {"ok":{"name":"web","pid":4711,"state":"running", ...}}
//! {"command":"sing"}
//! {"error":{"cause":"a machine has no command 'sing'","next":"...","status":2}}
//! ```
//!
//! The fields beside `command` are its arguments; one that the command does not know is an error. `status` is
//! the exit status that `rvisor` gives for the error: 2 for wrong input, 1 for a failure of the host.
//! A command that goes over into a stream, `console` for one, is answered by a line like any other; from then on
//! the connection carries the stream's bytes and no further command. A client must read the answer before it
//! sends such bytes.
//!
//! | command | arguments | answer |
//! | --- | --- | --- |
//! | `status` | | see [`crate::machine::Status`] |
//! | `wait` | | once the machine has ended and its name is free: `outcome`, a text, and `status`, its exit status |
//! | `pause` | | `{}`, once no CPU runs the guest any more |
//! | `resume` | | `{}` |
//! | `power-button` | | `{}`; the guest decides what comes of it |
//! | `snapshot` | | `{}`, then the snapshot (see [`crate::snapshot`]); the machine stands still meanwhile |
//! | `kill` | | `{}`; the machine ends at once |
//! | `console` | | `{}`, then the console's bytes in both directions, the last 64 KiB of output first |
//!
//! At most [`CLIENTS`] clients are served at a time; others get an error. One that sends no whole line for
//! [`PATIENCE`], or takes no answer for that long, is disconnected.

use std::collections::BTreeMap;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::event::{poll, PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::net::sockopt::socket_peercred;
use rustix::process::Pid;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{json, Map, Value};

use crate::console::Wake;
use crate::devices::lock;
use crate::error::{failed, Error, Result, STATUS_INPUT};
use crate::outcome::Outcome;
use crate::registry::{self, Name};

/// The longest line from a client, in bytes.
pub const LONGEST: u64 = 64 << 10;
/// The most clients at a time.
pub const CLIENTS: usize = 32;
/// How long a client may take for a line of its own, and for taking one.
pub const PATIENCE: Duration = Duration::from_secs(30);
/// How long a machine may take for an answer, unless the command is one that lasts.
const ANSWER: Duration = Duration::from_secs(10);
/// How long a machine that ends waits for its clients.
const GOODBYE: Duration = Duration::from_secs(1);

/// The arguments of a command that has none.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Nothing {}

/// How a machine ended: the answer to `wait`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Ended {
    /// The outcome as `rvisor run` says it.
    pub outcome: String,
    /// The exit status of `rvisor run`.
    pub status: u8,
}

impl From<&Outcome> for Ended {
    fn from(outcome: &Outcome) -> Self {
        Self {
            outcome: outcome.to_string(),
            status: outcome.status(),
        }
    }
}

type Answer = dyn Fn(Value) -> Result<Value> + Send + Sync;
type Stream = dyn Fn(Value, &UnixStream) -> Result<()> + Send + Sync;

enum Handler {
    Answer(Box<Answer>),
    /// Checks the arguments; what it gives back answers the client and has the connection then.
    Stream(Box<Stream>),
}

/// The commands that a machine takes, and what does them. Each part of the machine adds its own before the
/// machine runs. A handler runs in the client's thread: it may last, and several run at once.
#[derive(Default)]
pub struct Commands(BTreeMap<&'static str, Handler>);

impl Commands {
    /// Adds a command whose arguments are an `A`: a structure with `deny_unknown_fields`, [`Nothing`] for none.
    pub fn add<A: DeserializeOwned, R: Serialize>(
        &mut self,
        command: &'static str,
        handle: impl Fn(A) -> Result<R> + Send + Sync + 'static,
    ) {
        let answer = move |arguments| to_value(&handle(from_value(command, arguments)?)?);
        self.0.insert(command, Handler::Answer(Box::new(answer)));
    }

    /// Adds a command that goes over into a stream. The handler has the connection until it returns, after the
    /// client got `{"ok":{}}`; it ends where the machine does, for then the connection is shut down for reading.
    pub fn add_stream<A: DeserializeOwned>(
        &mut self,
        command: &'static str,
        handle: impl Fn(A, &UnixStream) -> Result<()> + Send + Sync + 'static,
    ) {
        let stream = move |arguments, connection: &UnixStream| {
            let arguments = from_value(command, arguments)?;
            send(connection, &Reply::Ok(json!({})))?;
            handle(arguments, connection)
        };
        self.0.insert(command, Handler::Stream(Box::new(stream)));
    }
}

fn from_value<A: DeserializeOwned>(command: &str, arguments: Value) -> Result<A> {
    serde_json::from_value(arguments).map_err(|error| {
        Error::input(
            format!("the arguments of '{command}': {error}"),
            "see 'rvisor --help' for what it takes",
        )
    })
}

fn to_value<R: Serialize>(result: &R) -> Result<Value> {
    serde_json::to_value(result)
        .map_err(|error| Error::call("writing an answer", io::Error::other(error)))
}

/// A line to the client.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Reply {
    Ok(Value),
    Error {
        cause: String,
        next: String,
        status: u8,
    },
}

impl From<&Error> for Reply {
    fn from(error: &Error) -> Self {
        let status = error.status();
        let (cause, next) = match error {
            Error::Input { cause, next } => (cause.clone(), next.clone()),
            error @ Error::Call { .. } => (error.to_string(), String::new()),
        };
        Self::Error {
            cause,
            next,
            status,
        }
    }
}

fn send(mut connection: &UnixStream, reply: &Reply) -> Result<()> {
    let what = "answering a client";
    let mut line = serde_json::to_vec(reply).map_err(|e| Error::call(what, io::Error::other(e)))?;
    line.push(b'\n');
    connection.write_all(&line).map_err(failed(what))
}

/// Whether the other side has gone, or the connection was shut down for reading.
#[must_use]
pub fn gone(connection: &UnixStream) -> bool {
    let mut fds = [PollFd::new(connection, PollFlags::RDHUP)];
    poll(&mut fds, Some(&Timespec::default())).is_ok_and(|count| count > 0)
}

/// Takes commands on a machine's socket until it is told how the machine ended.
pub struct Server {
    shared: Arc<Shared>,
    acceptor: JoinHandle<()>,
}

struct Shared {
    commands: Commands,
    state: Mutex<State>,
    /// Clients have gone.
    changed: Condvar,
    /// Readable from the end on.
    end: Wake,
}

#[derive(Default)]
struct State {
    ended: Option<Ended>,
    clients: Vec<(u64, Arc<UnixStream>)>,
    next: u64,
}

impl Server {
    /// Starts to take `commands`, and `wait`.
    ///
    /// # Errors
    ///
    /// [`Error::Call`] where the host gives no thread or descriptor.
    pub fn start(listener: UnixListener, commands: Commands) -> Result<Self> {
        let shared = Arc::new(Shared {
            commands,
            state: Mutex::default(),
            changed: Condvar::new(),
            end: Wake::new().map_err(failed("making an eventfd"))?,
        });
        listener
            .set_nonblocking(true)
            .map_err(failed("setting a socket"))?;
        let acceptor = thread::Builder::new()
            .name("control".to_owned())
            .spawn({
                let shared = Arc::clone(&shared);
                move || accept(&shared, &listener)
            })
            .map_err(failed("starting a thread"))?;
        Ok(Self { shared, acceptor })
    }

    /// Tells the clients that wait how the machine ended, and takes no more commands.
    pub fn finish(self, ended: Ended) {
        let mut state = lock(&self.shared.state);
        state.ended = Some(ended);
        self.shared.end.wake();
        for (_, connection) in &state.clients {
            // Gone already where this fails.
            let _ = connection.shutdown(Shutdown::Read);
        }
        let clients_left = |state: &mut State| !state.clients.is_empty();
        drop(
            self.shared
                .changed
                .wait_timeout_while(state, GOODBYE, clients_left),
        );
        // It has nothing to wait for but the wake.
        let _ = self.acceptor.join();
    }
}

fn accept(shared: &Arc<Shared>, listener: &UnixListener) {
    while lock(&shared.state).ended.is_none() {
        let mut fds = [
            PollFd::from_borrowed_fd(listener.as_fd(), PollFlags::IN),
            PollFd::new(&shared.end, PollFlags::IN),
        ];
        if poll(&mut fds, None).is_err() {
            continue;
        }
        if let Ok((connection, _)) = listener.accept() {
            // A client that can't be served sees its connection closed.
            let _ = welcome(shared, connection);
        } else if !fds[0].revents().is_empty() {
            // Out of descriptors, for one: looking again at once would take a CPU for it.
            thread::sleep(Duration::from_millis(10));
        }
    }
}

/// Gives a client its thread.
fn welcome(shared: &Arc<Shared>, connection: UnixStream) -> io::Result<()> {
    connection.set_nonblocking(false)?;
    connection.set_write_timeout(Some(PATIENCE))?;
    let connection = Arc::new(connection);
    let id = {
        let mut state = lock(&shared.state);
        if state.clients.len() >= CLIENTS {
            let error = Error::input(
                format!("this machine serves {CLIENTS} clients already"),
                "end some of them",
            );
            connection.set_nonblocking(true)?;
            return send(&connection, &Reply::from(&error)).map_err(io::Error::other);
        }
        state.next += 1;
        let id = state.next;
        state.clients.push((id, Arc::clone(&connection)));
        id
    };
    let for_thread = Arc::clone(shared);
    let started = thread::Builder::new()
        .name("client".to_owned())
        .spawn(move || {
            // What ends it ends this client alone.
            let _ = serve(&for_thread, &connection);
            for_thread.forget(id);
        });
    started.map(drop).inspect_err(|_| shared.forget(id))
}

/// Serves one client until it goes.
fn serve(shared: &Shared, connection: &UnixStream) -> Result<()> {
    let mut buffer = Vec::new();
    while let Some(line) = read_line(connection, &mut buffer)
        .map_err(failed("reading from a client"))
        .or_else(|error| send(connection, &Reply::from(&error)).and(Ok(None)))?
    {
        let handled = shared.handle(&line, connection);
        match handled {
            Ok(Some(answer)) => send(connection, &Reply::Ok(answer))?,
            Ok(None) => return Ok(()),
            Err(error) => send(connection, &Reply::from(&error))?,
        }
    }
    Ok(())
}

/// Reads a line in time; what came behind it stays in `buffer`. `None` where the client has gone.
fn read_line(mut connection: &UnixStream, buffer: &mut Vec<u8>) -> io::Result<Option<Vec<u8>>> {
    let until = Instant::now() + PATIENCE;
    loop {
        if let Some(end) = buffer.iter().position(|byte| *byte == b'\n') {
            let rest = buffer.split_off(end + 1);
            return Ok(Some(std::mem::replace(buffer, rest)));
        }
        if buffer.len() as u64 >= LONGEST {
            return Err(io::Error::other(format!(
                "a line of more than {LONGEST} bytes"
            )));
        }
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        connection.set_read_timeout(Some(left))?;
        let mut bytes = [0; 4096];
        match connection.read(&mut bytes) {
            Ok(0) => return Ok(None),
            Ok(count) => buffer.extend_from_slice(&bytes[..count]),
            Err(error) => match error.kind() {
                io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock => {}
                _ => return Err(error),
            },
        }
    }
}

impl Shared {
    /// Does what a line says. `None` where the connection was a stream's, which has ended.
    fn handle(&self, line: &[u8], connection: &UnixStream) -> Result<Option<Value>> {
        let wrong = |cause: String| {
            Error::input(
                cause,
                format!(
                    "send one of {} as {{\"command\":\"...\"}}",
                    self.commands
                        .0
                        .keys()
                        .copied()
                        .collect::<Vec<_>>()
                        .join(", ")
                ),
            )
        };
        let mut arguments: Map<String, Value> = serde_json::from_slice(line)
            .map_err(|error| wrong(format!("no JSON object: {error}")))?;
        let command = match arguments.remove("command") {
            Some(Value::String(command)) => command,
            _ => return Err(wrong("the line names no command".to_owned())),
        };
        let arguments = Value::Object(arguments);
        if command == "wait" {
            let Nothing {} = from_value("wait", arguments)?;
            return self.wait_for_end(connection).map(Some);
        }
        match self.commands.0.get(command.as_str()) {
            Some(Handler::Answer(handle)) => handle(arguments).map(Some),
            Some(Handler::Stream(handle)) => handle(arguments, connection).map(|()| None),
            None => Err(wrong(format!("a machine has no command '{command}'"))),
        }
    }

    /// Waits until the machine or the client goes.
    fn wait_for_end(&self, client: &UnixStream) -> Result<Value> {
        loop {
            if let Some(ended) = &lock(&self.state).ended {
                return to_value(ended);
            }
            let mut fds = [
                PollFd::new(&self.end, PollFlags::IN),
                PollFd::new(client, PollFlags::RDHUP),
            ];
            match poll(&mut fds, None) {
                Ok(_) if fds[0].revents().is_empty() => {
                    return Err(Error::call(
                        "waiting",
                        io::Error::other("the client has gone"),
                    ))
                }
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(Error::call("waiting", io::Error::from(error))),
            }
        }
    }

    fn forget(&self, id: u64) {
        lock(&self.state).clients.retain(|(other, _)| *other != id);
        self.changed.notify_all();
    }
}

/// A connection to a machine.
pub struct Client {
    name: Name,
    stream: BufReader<UnixStream>,
    /// An answer that has not come as a whole.
    line: String,
}

impl Client {
    /// Connects to the machine of that name.
    ///
    /// # Errors
    ///
    /// [`Error::Input`] where none runs.
    pub fn connect(name: &Name) -> Result<Self> {
        let stream = registry::connect(name)?.ok_or_else(|| {
            Error::input(
                format!("no machine named {name} runs"),
                "'rvisor ps' lists those that do",
            )
        })?;
        Ok(Self::new(name, stream))
    }

    /// The client's side of that connection.
    #[must_use]
    pub fn new(name: &Name, stream: UnixStream) -> Self {
        Self {
            name: name.clone(),
            stream: BufReader::new(stream),
            line: String::new(),
        }
    }

    /// Gives a command with these arguments (a structure, or [`Nothing`]) and waits some seconds for the answer.
    ///
    /// # Errors
    ///
    /// The machine's own; [`Error::Call`] where it does not answer.
    pub fn call<R: DeserializeOwned>(
        &mut self,
        command: &str,
        arguments: impl Serialize,
    ) -> Result<R> {
        self.send(command, arguments)?;
        self.receive(Some(ANSWER))?
            .ok_or_else(|| self.lost(io::Error::other("it does not answer")))
    }

    /// Gives a command whose answer [`Self::receive`] will read.
    ///
    /// # Errors
    ///
    /// [`Error::Call`] where the machine does not take it.
    pub fn send(&mut self, command: &str, arguments: impl Serialize) -> Result<()> {
        let mut request = to_value(&arguments)?;
        request["command"] = command.into();
        let mut connection = self.stream.get_ref();
        connection
            .set_write_timeout(Some(ANSWER))
            .and_then(|()| connection.write_all(format!("{request}\n").as_bytes()))
            .map_err(|error| self.lost(error))
    }

    /// Waits for an answer; `None` where it takes longer than `patience`, if that is bounded.
    ///
    /// # Errors
    ///
    /// As [`Self::call`].
    pub fn receive<R: DeserializeOwned>(
        &mut self,
        patience: Option<Duration>,
    ) -> Result<Option<R>> {
        let read = self.stream.get_ref().set_read_timeout(patience);
        match read.and_then(|()| self.stream.read_line(&mut self.line)) {
            Ok(0) => return Err(self.lost(io::Error::other("it has gone"))),
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
            Err(error) => return Err(self.lost(error)),
        }
        let line = std::mem::take(&mut self.line);
        let foreign = |error| self.lost(io::Error::other(format!("its answer: {error}")));
        match serde_json::from_str(&line).map_err(foreign)? {
            Reply::Ok(value) => serde_json::from_value(value).map(Some).map_err(foreign),
            Reply::Error {
                cause,
                next,
                status: STATUS_INPUT,
            } => Err(Error::input(cause, next)),
            Reply::Error { cause, .. } => Err(self.lost(io::Error::other(cause))),
        }
    }

    fn lost(&self, error: io::Error) -> Error {
        Error::call(format!("machine {}", self.name), error)
    }

    /// The process that runs the machine.
    ///
    /// # Errors
    ///
    /// [`Error::Call`] where the kernel does not tell.
    pub fn process(&self) -> Result<Pid> {
        socket_peercred(self.stream.get_ref())
            .map(|credentials| credentials.pid)
            .map_err(|error| self.lost(error.into()))
    }

    /// What the machine sends, while a stream lasts that it began.
    pub fn stream(&mut self) -> &mut impl Read {
        &mut self.stream
    }

    /// The connection, for a stream.
    #[must_use]
    pub fn into_stream(self) -> BufReader<UnixStream> {
        self.stream
    }
}

#[cfg(test)]
mod tests;
