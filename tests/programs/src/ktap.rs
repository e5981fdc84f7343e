// SPDX-License-Identifier: GPL-2.0
//! Runs tests and reports them as KTAP (Documentation/dev-tools/ktap.rst).
//!
//! Each test runs in a child process under a watchdog, so that one which crashes or hangs is one
//! failure and no more.

use crate::raw::Device;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd};
use std::panic::AssertUnwindSafe;
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// Why a test did not pass.
#[derive(Debug)]
pub enum Fail {
    /// Something was not as expected.
    Failed(String),
    /// The test does not apply here; the text says why.
    Skipped(String),
}

/// What a test function returns.
pub type Outcome = Result<(), Fail>;

impl Fail {
    /// A failure with this text.
    pub fn new(text: impl Into<String>) -> Self {
        Self::Failed(text.into())
    }

    /// A skip with this reason.
    pub fn skip(text: impl Into<String>) -> Self {
        Self::Skipped(text.into())
    }

    /// The same, with what was being done in front.
    pub fn during(self, what: &str) -> Self {
        match self {
            Self::Failed(text) => Self::Failed(format!("{what}: {text}")),
            Self::Skipped(text) => Self::Skipped(text),
        }
    }
}

impl From<std::io::Error> for Fail {
    fn from(error: std::io::Error) -> Self {
        Self::Failed(error.to_string())
    }
}

impl From<kvm_ioctls::Error> for Fail {
    fn from(error: kvm_ioctls::Error) -> Self {
        Self::Failed(std::io::Error::from(error).to_string())
    }
}

/// Adds what was being done to an error.
pub trait Context<T> {
    /// The same result; an error says that it happened during `what`.
    fn during(self, what: &str) -> Result<T, Fail>;
}

impl<T, E: Into<Fail>> Context<T> for Result<T, E> {
    fn during(self, what: &str) -> Result<T, Fail> {
        self.map_err(|error| error.into().during(what))
    }
}

/// Fails the test where the condition does not hold; the rest is a format string.
#[macro_export]
macro_rules! check {
    ($condition:expr, $($why:tt)+) => {
        if !$condition {
            return Err($crate::Fail::new(format!("line {}: {}", line!(), format!($($why)+))));
        }
    };
}

/// Fails the test where two values differ; the rest is a format string that says what they are.
#[macro_export]
macro_rules! check_eq {
    ($found:expr, $expected:expr, $($what:tt)+) => {
        match (&$found, &$expected) {
            (found, expected) => {
                if *found != *expected {
                    return Err($crate::Fail::new(format!(
                        "line {}: {}: {:x?}, expected {:x?}",
                        line!(), format!($($what)+), found, expected
                    )));
                }
            }
        }
    };
}

/// One test: a name and a function.
#[derive(Clone, Copy)]
pub struct Test {
    /// The name in the report: one word.
    pub name: &'static str,
    /// What runs.
    pub run: fn(&Device) -> Outcome,
}

/// A list of [`Test`]s from the names of functions.
#[macro_export]
macro_rules! tests {
    ($($($part:ident)::+),+ $(,)?) => {
        &[$($crate::Test { name: $crate::last_word(stringify!($($part)::+)), run: $($part)::+ }),+]
    };
}

/// `c` of `a::b::c`.
pub fn last_word(path: &'static str) -> &'static str {
    path.rsplit([':', ' ']).next().unwrap_or(path)
}

/// How much longer all takes where the host's kernel checks each lock.
pub fn slowness() -> u32 {
    if std::path::Path::new("/proc/lockdep").exists() {
        3
    } else {
        1
    }
}

/// How long one test may take, by the machine's time.
fn limit() -> Duration {
    Duration::from_secs(20) * slowness()
}

/// Seconds that a killed child may take to be gone.
const KILL_LIMIT: Duration = Duration::from_secs(10);

/// Runs the tests that the command line names (all of them without a name) and reports them.
///
/// The exit status is 0 where none failed, 1 where one did, 2 for wrong arguments.
pub fn main(tests: &[Test]) -> ExitCode {
    let (device, names) = match Device::from_arguments() {
        Ok(found) => found,
        Err(text) => {
            eprintln!("{text}");
            return ExitCode::from(2);
        }
    };
    if let Some(name) = names
        .iter()
        .find(|name| !tests.iter().any(|test| test.name == name.as_str()))
    {
        eprintln!("no test is called {name}");
        return ExitCode::from(2);
    }
    let chosen: Vec<Test> = tests
        .iter()
        .filter(|test| names.is_empty() || names.iter().any(|name| name == test.name))
        .copied()
        .collect();
    println!("KTAP version 1\n1..{}", chosen.len());
    if let Err(error) = device.open() {
        println!("Bail out! {}: {error}", device.path());
        return ExitCode::FAILURE;
    }
    let mut failed = 0;
    for (number, test) in (1..).zip(&chosen) {
        let line = match in_child(test, &device) {
            Ok(()) => format!("ok {number} {}", test.name),
            Err(Fail::Skipped(why)) => format!("ok {number} {} # SKIP {}", test.name, flat(&why)),
            Err(Fail::Failed(why)) => {
                failed += 1;
                format!("not ok {number} {} # {}", test.name, flat(&why))
            }
        };
        println!("{line}");
        if std::io::stdout().flush().is_err() {
            return ExitCode::FAILURE;
        }
    }
    ExitCode::from(u8::from(failed != 0))
}

/// One line without `#`, which would start a directive.
fn flat(text: &str) -> String {
    let words: Vec<&str> = text.split_whitespace().collect();
    words.join(" ").replace('#', "")
}

/// A pipe's two ends, closed in programs that a test starts.
pub fn pipe() -> Result<(std::fs::File, std::fs::File), std::io::Error> {
    let mut ends = [0; 2];
    // SAFETY: `ends` has place for two descriptors.
    if unsafe { libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC) } != 0 {
        return Err(std::io::Error::last_os_error());
    }
    // SAFETY: Both were made just now and nobody else owns them.
    Ok(unsafe {
        (
            std::fs::File::from_raw_fd(ends[0]),
            std::fs::File::from_raw_fd(ends[1]),
        )
    })
}

fn in_child(test: &Test, device: &Device) -> Outcome {
    let (mut reader, writer) = pipe()?;
    // SAFETY: This process has one thread, so the child's copy of it is whole.
    let pid = unsafe { libc::fork() };
    if pid < 0 {
        return Err(std::io::Error::last_os_error().into());
    }
    if pid == 0 {
        drop(reader);
        let text = run_caught(test, device);
        let mut writer = writer;
        let sent = writer.write_all(text.as_bytes()).is_ok();
        drop(writer);
        // SAFETY: Ends the child at once, without the parent's exit handlers.
        unsafe { libc::_exit(i32::from(!sent)) };
    }
    drop(writer);
    let limit = limit();
    let text = read_until(&mut reader, limit)?;
    let in_time = text.is_some();
    let status = reap(pid, in_time)?;
    match text.as_deref() {
        None => Err(Fail::new(format!("no end within {} s", limit.as_secs()))),
        Some("") => Err(Fail::new(format!("the test's process ended: {status}"))),
        Some("ok") => Ok(()),
        Some(text) => Err(match text.strip_prefix("skip ") {
            Some(why) => Fail::skip(why),
            None => Fail::new(text),
        }),
    }
}

/// Runs the test; `ok`, `skip WHY` or why it failed.
fn run_caught(test: &Test, device: &Device) -> String {
    // The panic's message goes into the report and not, out of order, to the standard error output.
    let message = std::sync::Arc::new(std::sync::Mutex::new(String::new()));
    let sink = message.clone();
    std::panic::set_hook(Box::new(move |info| {
        if let Ok(mut text) = sink.lock() {
            *text = info.to_string();
        }
    }));
    match std::panic::catch_unwind(AssertUnwindSafe(|| (test.run)(device))) {
        Ok(Ok(())) => "ok".into(),
        Ok(Err(Fail::Skipped(why))) => format!("skip {why}"),
        Ok(Err(Fail::Failed(why))) => format!("failed: {why}"),
        Err(_) => message
            .lock()
            .map_or("panic".into(), |text| format!("panic: {text}")),
    }
}

/// Everything up to the end of the pipe, or `None` where it does not end within `limit`.
fn read_until(
    reader: &mut std::fs::File,
    limit: Duration,
) -> Result<Option<String>, std::io::Error> {
    let end = Instant::now() + limit;
    let mut text = Vec::new();
    loop {
        let left = end.saturating_duration_since(Instant::now());
        let mut entry = libc::pollfd {
            fd: reader.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        let wait = i32::try_from(left.as_millis()).unwrap_or(i32::MAX);
        // SAFETY: `entry` is one valid pollfd.
        match unsafe { libc::poll(&raw mut entry, 1, wait) } {
            0 => return Ok(None),
            1.. => {
                let mut part = [0; 512];
                match reader.read(&mut part)? {
                    0 => return Ok(Some(String::from_utf8_lossy(&text).into_owned())),
                    length => text.extend_from_slice(&part[..length]),
                }
            }
            _ => {
                let error = std::io::Error::last_os_error();
                if error.kind() != std::io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
}

/// Waits for the child, after killing it where it is late; says how it ended.
fn reap(pid: libc::pid_t, in_time: bool) -> Result<String, Fail> {
    if !in_time {
        // SAFETY: `pid` is our child, not reaped yet.
        unsafe { libc::kill(pid, libc::SIGKILL) };
    }
    let end = Instant::now() + KILL_LIMIT;
    let mut killed = !in_time;
    loop {
        let mut status = 0;
        // SAFETY: `status` is a valid place for the result.
        let found = unsafe { libc::waitpid(pid, &raw mut status, libc::WNOHANG) };
        if found == pid {
            return Ok(if libc::WIFSIGNALED(status) {
                format!("signal {}", libc::WTERMSIG(status))
            } else {
                format!("status {}", libc::WEXITSTATUS(status))
            });
        }
        if Instant::now() > end {
            if killed {
                return Err(Fail::new("its process survives SIGKILL"));
            }
            // SAFETY: As above.
            unsafe { libc::kill(pid, libc::SIGKILL) };
            killed = true;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}
