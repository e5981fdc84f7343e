// SPDX-License-Identifier: GPL-2.0

//! The client's side of a machine's socket.
//!
//! Who writes there is the machine's process, which may be its guest's by then: what comes from there is bounded, and
//! its texts have no characters that a terminal obeys.

use std::io::{self, BufReader, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::sockopt::socket_peercred;
use rustix::process::{pidfd_open, PidfdFlags};
use serde::de::{Deserialize, DeserializeOwned};
use serde_json::Value;

use super::{gone, read_line, Reply, Request, Told};
use crate::error::{failed, Error, Result, STATUS_INPUT};
use crate::registry::{self, Name};

/// How long a machine may take for an answer, unless the command is one that lasts.
const ANSWER: Duration = Duration::from_secs(10);
/// The length that no line from a machine has, in bytes. That of one with 255 CPUs about its counters has 1 MiB.
pub(super) const LONGEST: usize = 4 << 20;

/// A connection to a machine.
pub struct Client {
    name: Name,
    stream: BufReader<UnixStream>,
    /// A line that has not come as a whole.
    line: Vec<u8>,
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

    /// Connects to the machine of that name, to receive how it ends.
    ///
    /// # Errors
    ///
    /// As with [`Self::connect`].
    pub fn waiting(name: &Name) -> Result<Self> {
        let mut client = Self::connect(name)?;
        client.send(&[&Request::Wait {}]).map(|()| client)
    }

    /// The client's side of that connection.
    #[must_use]
    pub fn new(name: &Name, stream: UnixStream) -> Self {
        Self {
            name: name.clone(),
            stream: BufReader::new(stream),
            line: Vec::new(),
        }
    }

    /// Gives a command and waits some seconds for the answer.
    ///
    /// # Errors
    ///
    /// The machine's own; [`Error::Call`] where it does not answer.
    pub fn call<R: DeserializeOwned>(&mut self, request: &Request) -> Result<R> {
        self.send(&[request])?;
        self.receive(ANSWER)?
            .ok_or_else(|| self.lost(io::Error::other("it does not answer")))
    }

    /// Gives commands whose answers [`Self::receive`] will read.
    ///
    /// # Errors
    ///
    /// [`Error::Call`] where the machine does not take them.
    pub fn send(&mut self, requests: &[&Request]) -> Result<()> {
        let mut lines = String::new();
        for request in requests {
            lines += &serde_json::to_string(request).map_err(failed("writing a command"))?;
            lines.push('\n');
        }
        let mut connection = self.stream.get_ref();
        connection
            .set_write_timeout(Some(ANSWER))
            .and_then(|()| connection.write_all(lines.as_bytes()))
            .map_err(|error| self.lost(error))
    }

    /// Waits for an answer; `None` where it takes longer than `patience`.
    ///
    /// # Errors
    ///
    /// As [`Self::call`].
    pub fn receive<R: DeserializeOwned>(&mut self, patience: Duration) -> Result<Option<R>> {
        let value = match self.read(Some(patience)) {
            Ok(Some(value)) => value,
            Ok(None) => return Err(self.lost(io::Error::other("it has gone"))),
            Err(error) if error.kind() == io::ErrorKind::TimedOut => return Ok(None),
            Err(error) => return Err(self.lost(error)),
        };
        match self.parse(value)? {
            Reply::Ok(value) => self.parse(value).map(Some),
            Reply::Error(told) => Err(self.said(told)),
        }
    }

    /// The next object of a stream of such; `None` at its end.
    ///
    /// # Errors
    ///
    /// As [`Self::call`].
    pub fn next_object<T: DeserializeOwned>(&mut self) -> Result<Option<T>> {
        let Some(value) = self.read(None).map_err(|error| self.lost(error))? else {
            return Ok(None);
        };
        match Reply::deserialize(&value) {
            Ok(Reply::Error(told)) => Err(self.said(told)),
            _ => self.parse(value).map(Some),
        }
    }

    /// The next line; `None` where the machine has gone.
    fn read(&mut self, patience: Option<Duration>) -> io::Result<Option<Value>> {
        if !read_line(&mut self.stream, &mut self.line, LONGEST, patience)? {
            return Ok(None);
        }
        let line = std::mem::take(&mut self.line);
        Ok(Some(plain(serde_json::from_slice(&line)?, false)))
    }

    fn parse<T: DeserializeOwned>(&self, value: Value) -> Result<T> {
        serde_json::from_value(value)
            .map_err(|error| self.lost(io::Error::other(format!("its answer: {error}"))))
    }

    fn said(&self, told: Told) -> Error {
        match told.status {
            STATUS_INPUT => Error::input(told.cause, told.next),
            _ => self.lost(io::Error::other(told.cause)),
        }
    }

    fn lost(&self, error: io::Error) -> Error {
        Error::call(format!("machine {}", self.name), error)
    }

    /// The process that runs the machine; none where it has gone.
    ///
    /// # Errors
    ///
    /// [`Error::Call`] where the kernel does not tell.
    pub fn process(&self) -> Result<Option<OwnedFd>> {
        let lost = |error: Errno| self.lost(error.into());
        let stream = self.stream.get_ref();
        let number = socket_peercred(stream).map_err(lost)?.pid;
        match pidfd_open(number, PidfdFlags::empty()) {
            // While the connection has its other end, the number can't have become another process's.
            Ok(process) => Ok((!gone(stream)).then_some(process)),
            Err(Errno::SRCH) => Ok(None),
            Err(error) => Err(lost(error)),
        }
    }

    /// The connection, once it carries a stream. The machine may be silent for as long as it likes.
    ///
    /// # Errors
    ///
    /// [`Error::Call`] where the kernel refuses.
    pub fn into_stream(self) -> Result<BufReader<UnixStream>> {
        let unbounded = self.stream.get_ref().set_read_timeout(None);
        unbounded.map_err(failed("setting a socket"))?;
        Ok(self.stream)
    }
}

/// The same without control characters, in names of fields too. The end of a line becomes a space, but in how a machine
/// ended, which may have several.
fn plain(value: Value, lines: bool) -> Value {
    let kept = move |c: char| match c {
        '\n' if !lines => ' ',
        '\n' => c,
        c if c.is_control() => char::REPLACEMENT_CHARACTER,
        c => c,
    };
    let text = |text: String| text.chars().map(kept).collect::<String>();
    match value {
        Value::String(it) => Value::String(text(it)),
        Value::Array(values) => values.into_iter().map(|it| plain(it, lines)).collect(),
        Value::Object(fields) => fields
            .into_iter()
            .map(|(name, value)| {
                let lines = name == "outcome";
                (text(name), plain(value, lines))
            })
            .collect(),
        other => other,
    }
}
