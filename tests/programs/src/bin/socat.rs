// SPDX-License-Identifier: GPL-2.0
//! As much of socat as README uses: `socat - UNIX:PATH` joins standard input and output to a UNIX socket. Busybox has
//! nothing that does.

use std::io;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::process::ExitCode;

fn join(path: &str) -> io::Result<()> {
    let mut socket = UnixStream::connect(path)?;
    let mut input = socket.try_clone()?;
    std::thread::spawn(move || {
        if io::copy(&mut io::stdin(), &mut input).is_ok() {
            // Where the other side has gone before, its end is seen below.
            let _ = input.shutdown(Shutdown::Write);
        }
    });
    io::copy(&mut socket, &mut io::stdout()).map(drop)
}

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let path = match words.as_slice() {
        [dash, socket] if dash == "-" => socket.strip_prefix("UNIX:"),
        _ => None,
    };
    let Some(path) = path else {
        eprintln!("socat: usage: socat - UNIX:PATH");
        return ExitCode::FAILURE;
    };
    match join(path) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("socat: {path}: {error}");
            ExitCode::FAILURE
        }
    }
}
