// SPDX-License-Identifier: GPL-2.0

//! Networks without root: `passt`, which speaks for the guest in connections of this user's.

use std::io::{self, ErrorKind};
use std::net::{Ipv4Addr, TcpListener};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};

use rustix::io::{fcntl_setfd, FdFlags};

use super::Forward;
use crate::error::{Error, Result};

const PROGRAM: &str = "passt";

/// Starts a `passt` of our own and gives our end of the socket to it.
///
/// It goes to the background when it is ready, so its first process ends with what became of that. It ends when
/// our end is closed, however this process ends.
///
/// # Errors
///
/// [`Error::Input`] where it is not installed or can't start, for one because a port is taken.
pub(super) fn start(forward: &[Forward]) -> Result<OwnedFd> {
    for Forward { host, .. } in forward {
        // passt is content where it gets the port for one of IPv4 and IPv6.
        TcpListener::bind((Ipv4Addr::UNSPECIFIED, *host)).map_err(|error| {
            Error::input(
                format!("--net user,forward={host}:... can't have port {host}: {error}"),
                "give another port of this host, above 1023 where you are not root",
            )
        })?;
    }
    let failed = |error: io::Error| Error::call("starting passt", error);
    let (ours, theirs) = UnixStream::pair().map_err(failed)?;
    ours.set_nonblocking(true).map_err(failed)?;
    // It inherits this one.
    fcntl_setfd(&theirs, FdFlags::empty()).map_err(|error| failed(error.into()))?;
    let mut command = Command::new(PROGRAM);
    // Without the map, the guest does not reach what listens on the host's loopback addresses alone.
    command.args([
        "--quiet",
        "--no-map-gw",
        "--fd",
        &theirs.as_raw_fd().to_string(),
    ]);
    for Forward { host, guest } in forward {
        command.args(["--tcp-ports", &format!("{host}:{guest}")]);
    }
    let ended = command
        .stdin(Stdio::null())
        .output()
        .map_err(|error| match error.kind() {
            ErrorKind::NotFound => Error::input(
                "--net user needs passt, which is not installed",
                "install the package passt, or use --net tap=NAME",
            ),
            _ => failed(error),
        })?;
    drop(theirs);
    if !ended.status.success() {
        let said = String::from_utf8_lossy(&ended.stderr);
        // Control characters could come out of a file name.
        let mut line = said.lines().last().unwrap_or_default().to_owned();
        line.retain(|c| !c.is_control());
        return Err(Error::input(
            format!("passt did not start ({}): {line}", ended.status),
            "change what it names, or use --net tap=NAME",
        ));
    }
    Ok(ours.into())
}
