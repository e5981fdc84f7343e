// SPDX-License-Identifier: GPL-2.0

//! The other side of [`super::output`]: this terminal on the console of a machine that another process runs.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use super::keys::{Key, Keys};
use super::{Filter, Raw, Signals};
use crate::control::{Client, Ended, Nothing, Request};
use crate::error::{failed, say, Error, Result};
use crate::outcome::Outcome;
use crate::registry::Name;

const KEYS: &[u8] =
    b"\r\nrvisor: Ctrl-A d leaves the console, Ctrl-A x ends the guest, Ctrl-A h shows this, \
Ctrl-A Ctrl-A sends Ctrl-A\r\n";
/// How long a machine whose console has ended may take to say how.
const GOODBYE: Duration = Duration::from_secs(5);

/// Joins this terminal to the console of the machine of that name until the user leaves it or the machine
/// ends. A terminal gets what [`Filter`] lets through, or all of it, `unfiltered`. Returns the exit status: 0,
/// that of the machine, or that of a signal.
///
/// # Errors
///
/// [`Error::Input`] where no such machine runs, [`Error::Call`] where it or the terminal can't be reached.
pub fn attach(name: &Name, unfiltered: bool) -> Result<u8> {
    let mut filter = Filter::for_output(&io::stdout(), unfiltered);
    let mut show = |bytes: &[u8]| match &mut filter {
        Some(filter) => write(&filter.passed(bytes)),
        None => write(bytes),
    };
    let mut end = Client::waiting(name)?;
    let mut console = Client::connect(name)?;
    let Nothing {} = console.call(&Request::Console {})?;
    let stream = console.into_stream()?;
    // What came right behind the answer.
    show(stream.buffer())?;
    let signals = Signals::catch()?;
    let raw = Raw::new().map_err(failed("setting the terminal"))?;
    let left = join(stream.get_ref(), &signals, name, &mut show);
    drop(raw);
    match left? {
        Left::Detached => {
            say(format_args!("{name} runs on"));
            Ok(0)
        }
        Left::Signal(signal) => Ok(Outcome::Signal(signal).status()),
        Left::Closed => {
            let ended: Option<Ended> = end.receive(GOODBYE)?;
            let ended = ended.ok_or_else(|| {
                let why = io::Error::other("it has closed this console and does not say why");
                Error::call(format!("machine {name}"), why)
            })?;
            say(format_args!("{name}: {}", ended.outcome));
            Ok(ended.status)
        }
    }
}

/// Why the console was left.
enum Left {
    Detached,
    Signal(u8),
    Closed,
}

fn join(
    mut stream: &UnixStream,
    signals: &Signals,
    name: &Name,
    show: &mut dyn FnMut(&[u8]) -> Result<()>,
) -> Result<Left> {
    let mut typed = Keys::default();
    let mut bytes = [0; 4096];
    loop {
        let (output, keys) = typed.wait(&stream, signals, true, None)?;
        if let Some(signal) = signals.take() {
            return Ok(Left::Signal(signal));
        }
        if output {
            match stream.read(&mut bytes) {
                Ok(0) | Err(_) => return Ok(Left::Closed),
                Ok(count) => show(&bytes[..count])?,
            }
        }
        if obey(keys, stream, name)? {
            return Ok(Left::Detached);
        }
    }
}

/// Sends the guest its keys and does what the others are for. Says whether the user leaves.
fn obey(keys: Vec<Key>, mut stream: &UnixStream, name: &Name) -> Result<bool> {
    let mut guests = Vec::with_capacity(keys.len());
    let mut leaves = false;
    for key in keys {
        match key {
            Key::Guest(byte) => guests.push(byte),
            Key::Detach => {
                leaves = true;
                break;
            }
            Key::Quit => {
                let Nothing {} = Client::connect(name)?.call(&Request::Kill {})?;
            }
            Key::Help => write(KEYS)?,
        }
    }
    // A machine that is gone shows by the end of its output.
    let _ = stream.write_all(&guests);
    Ok(leaves)
}

fn write(bytes: &[u8]) -> Result<()> {
    let mut stdout = io::stdout();
    stdout
        .write_all(bytes)
        .and_then(|()| stdout.flush())
        .map_err(failed("writing the console"))
}
