// SPDX-License-Identifier: GPL-2.0

//! Commands to a machine that runs, over its socket (see [`crate::registry`] for where that is).
//!
//! A client sends one JSON object a line, of less than [`LONGEST`] bytes, and gets one line back for each, in
//! their order:
//!
//! ```text
//! {"command":"status"}
//! {"ok":{"name":"web","pid":4711,"state":"running", ...}}
//! {"command":"sing"}
//! {"error":{"cause":"no command: unknown variant `sing`, expected ...","next":"...","status":2}}
//! ```
//!
//! The fields beside `command` are its arguments; one that the command does not know is an error. `status` is
//! the exit status that `rvisor` gives for the error: 2 for wrong input, 1 for a failure of the host.
//! A command that goes over into a stream, `console` for one, is answered by a line like any other; from then on
//! the connection carries the stream's bytes and no further command. A client must read the answer before it
//! sends such bytes.
//!
//! [`Request`] lists the commands. At most [`CLIENTS`] clients are served at a time; others get an error. One that
//! sends no whole line for [`PATIENCE`], or takes no answer for that long, is disconnected.

mod client;

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::sockopt::{set_socket_timeout, Timeout};
use serde::{Deserialize, Serialize};
use serde_json::{json, Value};

use crate::devices::lock;
use crate::error::{failed, Error, Result};
use crate::outcome::Outcome;
use crate::ready::{self, PollFlags};
use crate::trace::Wanted;
pub use client::Client;

/// The length that no line from a client has, in bytes.
pub const LONGEST: usize = 64 << 10;
/// The most clients at a time.
pub const CLIENTS: usize = 32;
/// How long a client may take for a line of its own, and for taking one.
pub const PATIENCE: Duration = Duration::from_secs(30);
/// How long a machine that ends waits for its clients.
const GOODBYE: Duration = Duration::from_secs(1);

/// What a client's line asks for. Where nothing else is said the answer is `{}`.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Request {
    /// What there is to know of the machine: [`crate::machine::Status`].
    Status {},
    /// Its counters: [`crate::stat::Sample`].
    Stats {},
    /// Once the machine has ended and its name is free: [`Ended`].
    Wait {},
    /// No CPU runs the guest any more when the answer comes, nor where it is that something can't be written.
    Pause {},
    /// A paused guest goes on.
    Resume {},
    /// Presses the power button; the guest decides what comes of it.
    PowerButton {},
    /// Ends the machine at once.
    Kill {},
    /// Asks the guest to leave so many bytes of its memory to the host, in place of what it was asked for before; what
    /// it has left by then is `balloon` in [`crate::machine::Status`].
    Balloon {
        /// At most the machine's memory, in bytes; rounded up to whole pages of 4 KiB.
        bytes: u64,
    },
    /// Goes over into the machine's snapshot ([`crate::snapshot`]); it stands still meanwhile.
    Snapshot {},
    /// Goes over into the console's bytes in both directions, the last 64 KiB of output first.
    Console {},
    /// Goes over into its exits, a [`crate::trace::Exit`] a line.
    Trace(Wanted),
}

/// The answer of a command that has nothing to tell.
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

/// A line to the client.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Reply {
    Ok(Value),
    Error(Told),
}

/// An [`Error`] to the client.
#[derive(Debug, Serialize, Deserialize)]
struct Told {
    cause: String,
    next: String,
    status: u8,
}

impl From<Error> for Reply {
    fn from(error: Error) -> Self {
        let status = error.status();
        let (cause, next) = match error {
            Error::Input { cause, next } => (cause, next),
            error @ Error::Call { .. } => (error.to_string(), String::new()),
        };
        Self::Error(Told {
            cause,
            next,
            status,
        })
    }
}

/// What a handler gives back: the answer, or nothing where the connection has been a stream's.
pub type Answer = Result<Option<Value>>;

/// Does what a client asks for, in that client's thread: it may last, and several run at once.
type Handler = dyn Fn(Request, &UnixStream) -> Answer + Send + Sync;

/// The answer with these fields.
///
/// # Errors
///
/// [`Error::Call`] where one of them is no text.
pub fn answer(fields: &impl Serialize) -> Answer {
    let value = serde_json::to_value(fields);
    value.map(Some).map_err(failed("writing an answer"))
}

/// Answers `client` that a stream follows, and has `with` do it, which is to end where [`gone`] says so.
///
/// # Errors
///
/// [`Error::Call`] where the client has gone, and what `with` gives.
pub fn stream(client: &UnixStream, with: impl FnOnce(&UnixStream) -> Result<()>) -> Answer {
    send(client, &Reply::Ok(json!({})))?;
    with(client).map(|()| None)
}

fn send(mut connection: &UnixStream, reply: &Reply) -> Result<()> {
    let what = "answering a client";
    let line = serde_json::to_string(reply).map_err(failed(what))?;
    let sent = connection.write_all((line + "\n").as_bytes());
    sent.map_err(failed(what))
}

/// Whether the other side has gone, or the connection was shut down for reading.
#[must_use]
pub fn gone(connection: &UnixStream) -> bool {
    ready::within(Duration::ZERO, connection, PollFlags::RDHUP)
}

/// Reads on in a line that is to have less than `longest` bytes. Says whether it is whole; it never will be where
/// the other side has gone.
///
/// # Errors
///
/// What the socket answers; that the line is too long; [`io::ErrorKind::TimedOut`] where it takes longer than
/// `patience`, and `line` has what came until then.
fn read_line(
    stream: &mut BufReader<impl Read + AsFd>,
    line: &mut Vec<u8>,
    longest: usize,
    patience: Option<Duration>,
) -> io::Result<bool> {
    let until = patience.map(|patience| Instant::now() + patience);
    loop {
        let left = until.map(|until| until.saturating_duration_since(Instant::now()));
        if left.is_some_and(|left| left.is_zero()) {
            return Err(io::ErrorKind::TimedOut.into());
        }
        set_socket_timeout(stream.get_ref(), Timeout::Recv, left)?;
        let bytes = match stream.fill_buf() {
            Ok([]) => return Ok(false),
            Ok(bytes) => bytes,
            Err(error) => match error.kind() {
                io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock => continue,
                _ => return Err(error),
            },
        };
        let end = bytes.iter().position(|byte| *byte == b'\n');
        let count = end.map_or(bytes.len(), |end| end + 1);
        line.extend_from_slice(&bytes[..count]);
        stream.consume(count);
        if line.len() >= longest {
            let what = format!("a line of {longest} bytes or more");
            return Err(io::Error::other(what));
        }
        if end.is_some() {
            return Ok(true);
        }
    }
}

/// Takes commands on a machine's socket until it is told how the machine ended.
pub struct Server {
    shared: Arc<Shared>,
    acceptor: JoinHandle<()>,
}

struct Shared {
    listener: UnixListener,
    handler: Box<Handler>,
    state: Mutex<State>,
    /// Clients have gone.
    changed: Condvar,
}

#[derive(Default)]
struct State {
    ended: Option<Ended>,
    clients: Vec<Arc<UnixStream>>,
}

impl Server {
    /// Starts to take commands, which `handler` does but for `wait`.
    ///
    /// # Errors
    ///
    /// [`Error::Call`] where the host gives no thread.
    pub fn start(
        listener: UnixListener,
        handler: impl Fn(Request, &UnixStream) -> Answer + Send + Sync + 'static,
    ) -> Result<Self> {
        let shared = Arc::new(Shared {
            listener,
            handler: Box::new(handler),
            state: Mutex::default(),
            changed: Condvar::new(),
        });
        let acceptor = thread::Builder::new().name("control".to_owned()).spawn({
            let shared = Arc::clone(&shared);
            move || shared.accept()
        });
        let acceptor = acceptor.map_err(failed("starting a thread"))?;
        Ok(Self { shared, acceptor })
    }

    /// Tells the clients that wait how the machine ended, and takes no more commands.
    pub fn finish(self, ended: Ended) {
        let mut state = lock(&self.shared.state);
        state.ended = Some(ended);
        // These have gone already where this fails. The listener gets no more of them then, and its thread ends.
        let _ = rustix::net::shutdown(&self.shared.listener, rustix::net::Shutdown::Read);
        for connection in &state.clients {
            let _ = connection.shutdown(Shutdown::Read);
        }
        let clients_left = |state: &mut State| !state.clients.is_empty();
        drop(
            self.shared
                .changed
                .wait_timeout_while(state, GOODBYE, clients_left),
        );
        // It has nothing to wait for.
        let _ = self.acceptor.join();
    }
}

impl Shared {
    fn accept(self: &Arc<Self>) {
        loop {
            match self.listener.accept() {
                // A client that can't be served sees its connection closed.
                Ok((connection, _)) => drop(self.welcome(connection)),
                Err(_) if lock(&self.state).ended.is_some() => return,
                // Out of descriptors, for one: looking again at once would take a CPU for it.
                Err(_) => thread::sleep(Duration::from_millis(10)),
            }
        }
    }

    /// Gives a client its thread.
    fn welcome(self: &Arc<Self>, connection: UnixStream) -> Result<()> {
        let what = "serving a client";
        let connection = Arc::new(connection);
        let mut state = lock(&self.state);
        if state.ended.is_some() {
            return Ok(());
        }
        if state.clients.len() >= CLIENTS {
            drop(state);
            connection.set_nonblocking(true).map_err(failed(what))?;
            let cause = format!("this machine serves {CLIENTS} clients already");
            return send(&connection, &Error::input(cause, "end some of them").into());
        }
        state.clients.push(Arc::clone(&connection));
        drop(state);
        let started = thread::Builder::new().name("client".to_owned()).spawn({
            let (shared, connection) = (Arc::clone(self), Arc::clone(&connection));
            move || {
                // What ends it ends this client alone.
                let _ = shared.serve(&connection);
                shared.forget(&connection);
            }
        });
        started
            .map(drop)
            .inspect_err(|_| self.forget(&connection))
            .map_err(failed(what))
    }

    fn forget(&self, client: &Arc<UnixStream>) {
        let mut state = lock(&self.state);
        state.clients.retain(|other| !Arc::ptr_eq(other, client));
        self.changed.notify_all();
    }

    /// Serves one client until it goes.
    fn serve(&self, client: &UnixStream) -> Result<()> {
        let what = "reading from a client";
        client
            .set_write_timeout(Some(PATIENCE))
            .map_err(failed(what))?;
        let mut stream = BufReader::new(client);
        loop {
            let mut line = Vec::new();
            match read_line(&mut stream, &mut line, LONGEST, Some(PATIENCE)) {
                Ok(true) => {}
                Ok(false) => return Ok(()),
                Err(error) => return send(client, &Error::call(what, error).into()),
            }
            match self.handle(&line, client) {
                Ok(Some(answer)) => send(client, &Reply::Ok(answer))?,
                Ok(None) => return Ok(()),
                Err(error) => send(client, &error.into())?,
            }
        }
    }

    /// Does what a line says.
    fn handle(&self, line: &[u8], client: &UnixStream) -> Answer {
        let request = serde_json::from_slice(line).map_err(|error| {
            Error::input(
                format!("no command: {error}"),
                "send one as {\"command\":\"...\"} and its arguments beside it",
            )
        })?;
        match request {
            Request::Wait {} => self.wait_for_end(client),
            request => (self.handler)(request, client),
        }
    }

    /// Waits until the machine or the client goes: for both the connection can't be read any more.
    fn wait_for_end(&self, client: &UnixStream) -> Answer {
        ready::wait(&[(client, PollFlags::RDHUP)], None).map_err(failed("waiting"))?;
        match &lock(&self.state).ended {
            Some(ended) => answer(ended),
            None => Err(Error::call("waiting", Errno::PIPE)),
        }
    }
}

#[cfg(test)]
mod tests;
