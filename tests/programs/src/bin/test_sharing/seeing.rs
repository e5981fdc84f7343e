// SPDX-License-Identifier: GPL-2.0
//! What the tool shows of machines that run.

use crate::machine::{Hierarchy, Machine, Software, TOOL};
use crate::patience;
use rvisor_tests::ktap::Context;
use rvisor_tests::terminal::{check_same, Terminal};
use rvisor_tests::{check, check_eq, Device, Fail, Outcome};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// Starts a machine that spins, and lets it come to that.
fn start(device: &Device, name: &str, words: &[&str]) -> Result<Machine, Fail> {
    let machine = Machine::start_named(device, name, None, Software::Spins, words)?;
    std::thread::sleep(Duration::from_millis(500));
    Ok(machine)
}

/// What a command of the tool's prints.
fn says(words: &[&str]) -> Result<String, Fail> {
    let output = Command::new(TOOL).args(words).output().during(TOOL)?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    check_eq!(
        output.status.code(),
        Some(0),
        "the exit status of {words:?}: {said}"
    );
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// The number behind the first `"key":` of a line of JSON.
fn number(text: &str, key: &str) -> Result<u64, Fail> {
    let behind = text.split_once(&format!("\"{key}\":")).map(|parts| parts.1);
    let digits = behind.and_then(|text| text.split(|c: char| !c.is_ascii_digit()).next());
    digits
        .and_then(|digits| digits.parse().ok())
        .ok_or_else(|| Fail::new(format!("no number {key} in {text}")))
}

/// Times and memory of a machine that runs; on KVM, the guest's part of the time.
pub(crate) fn stat(device: &Device) -> Outcome {
    let _cgroups = Hierarchy::mounted()?;
    let _machine = start(device, "seen", &["--memory-max", "64M"])?;
    let before = says(&["stat", "seen", "--json"])?;
    std::thread::sleep(Duration::from_millis(300));
    let after = says(&["stat", "seen", "--json"])?;
    check_eq!(number(&after, "cpus")?, 1, "CPUs in {after}");
    let grown = |key: &str| Ok::<u64, Fail>(number(&after, key)? - number(&before, key)?);
    // It has the CPU for itself but for the test.
    let (ran, passed) = (grown("run_ns")?, grown("clock_ns")?);
    check!(
        ran * 10 > passed * 7 && ran <= passed,
        "it ran {ran} ns of {passed}"
    );
    if device.path() == "/dev/kvm" {
        let guest = grown("guest_ns")?;
        check!(guest * 10 > ran * 7, "{guest} ns in the guest of {ran}");
    }
    let charged = number(&after, "charged")?;
    check!(
        (1 << 20..64 << 20).contains(&charged),
        "{charged} bytes in its cgroup"
    );
    check!(number(&after, "resident")? > 1 << 20, "{after}");
    let text = says(&["stat", "seen"])?;
    check!(
        text.starts_with("seen: running") && text.contains("CPU 0: ran "),
        "{text}"
    );
    Ok(())
}

/// Exits are counted, all of them and by their reason.
pub(crate) fn exits(device: &Device) -> Outcome {
    let _machine = start(device, "exits", &[])?;
    let before = says(&["stat", "exits", "--json"])?;
    if before.contains("\"counters\":{}") {
        return Err(Fail::skip("the hypervisor has no statistics"));
    }
    std::thread::sleep(Duration::from_millis(300));
    let after = says(&["stat", "exits", "--json"])?;
    // The counters stand behind the exits by their reason.
    let all = |text: &str| {
        number(
            text.split_once("\"counters\"").map_or("", |parts| parts.1),
            "exits",
        )
    };
    // The host's timer ends the guest at least that often.
    let (before, after) = (all(&before)?, all(&after)?);
    check!(
        after > before + 20,
        "{before} exits, and 0.3 s later {after}"
    );
    let text = says(&["stat", "exits"])?;
    check!(
        text.contains("EXTERNAL_INTERRUPT") || text.contains("\n  irq "),
        "the host's interrupts are not there: {text}"
    );
    Ok(())
}

/// A line a second, and one at the end.
pub(crate) fn metrics(device: &Device) -> Outcome {
    let path = "/tmp/metrics.jsonl";
    let mut machine = start(device, "metrics", &["--metrics", path])?;
    std::thread::sleep(Duration::from_millis(1700));
    machine.signal(libc::SIGTERM)?;
    let (status, text) = machine.end(patience())?;
    check_eq!(status, Some(143), "the exit status: {text}");
    let text = std::fs::read_to_string(path).during(path)?;
    let lines: Vec<&str> = text.lines().collect();
    check!(
        (3..=5).contains(&lines.len()),
        "{} lines in 2.2 s",
        lines.len()
    );
    for pair in lines.windows(2) {
        let grown = |key: &str| {
            Ok::<u64, Fail>(number(pair[1], key)?.saturating_sub(number(pair[0], key)?))
        };
        check!(grown("clock_ns")? > 0 && grown("run_ns")? > 0, "{pair:?}");
        check!(
            pair[1].starts_with('{') && pair[1].ends_with('}'),
            "{}",
            pair[1]
        );
    }
    let mut refused = start(device, "metrics", &["--metrics", "/nowhere/file"])?;
    let (status, text) = refused.end(patience())?;
    check_eq!(status, Some(2), "the exit status: {text}");
    check!(
        text.contains("--metrics /nowhere/file") && text.lines().count() == 1,
        "{text}"
    );
    Ok(())
}

/// The screen shows the machine, takes keys, leaves the terminal as it was, and ends where that is gone.
pub(crate) fn top(device: &Device) -> Outcome {
    let _machine = start(device, "topmost", &[])?;
    let mut terminal = Terminal::new()?;
    terminal.resize(24, 120)?;
    let before = terminal.mode()?;
    let side = terminal.user_side()?;
    let start = || -> Result<_, Fail> {
        let mut top = Command::new(TOOL);
        top.arg("top").env("TERM", "linux");
        top.stdin(side.try_clone()?).stdout(side.try_clone()?);
        Ok(top.stderr(side.try_clone()?).spawn()?)
    };
    let mut child = start()?;
    terminal.await_text("topmost", patience())?;
    terminal.await_text("128 MiB", patience())?;
    terminal.type_keys(b"q")?;
    let screen = terminal.read_until_idle(&mut child, patience())?;
    check_eq!(child.wait()?.code(), Some(0), "the exit status: {screen}");
    check_same(&before, &terminal.mode()?)?;
    let mut child = start()?;
    terminal.await_text("topmost", patience())?;
    let pid = libc::pid_t::try_from(child.id()).map_err(|_| Fail::new("its pid"))?;
    // SAFETY: Our own child, not reaped yet.
    unsafe { libc::kill(pid, libc::SIGTERM) };
    let screen = terminal.read_until_idle(&mut child, patience())?;
    check_eq!(child.wait()?.code(), Some(143), "after SIGTERM: {screen}");
    check_same(&before, &terminal.mode()?)?;
    let mut child = start()?;
    terminal.await_text("topmost", patience())?;
    // It waits for a key then.
    std::thread::sleep(Duration::from_millis(300));
    drop(terminal);
    let end = Instant::now() + patience();
    while child.try_wait()?.is_none() && Instant::now() < end {
        std::thread::sleep(Duration::from_millis(20));
    }
    let ended = child.try_wait()?.is_some();
    let _ = child.kill();
    check!(ended, "it runs on without its terminal");
    // Without a terminal it says what to do instead.
    let output = Command::new(TOOL).arg("top").output()?;
    let text = String::from_utf8_lossy(&output.stderr);
    check_eq!(output.status.code(), Some(2), "the exit status: {text}");
    check!(text.contains("rvisor stat"), "{text}");
    Ok(())
}

/// The exits as they happen, those that were asked for.
pub(crate) fn trace(device: &Device) -> Outcome {
    let _machine = start(device, "traced", &[])?;
    let words = [
        "trace",
        "traced",
        "--json",
        "--reason",
        "external_interrupt",
    ];
    let mut child = Command::new(TOOL)
        .args(words)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    std::thread::sleep(Duration::from_millis(500));
    if child.try_wait()?.is_none() {
        child.kill()?;
    }
    let output = child.wait_with_output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    if said.contains("no trace") {
        check_eq!(output.status.code(), Some(2), "the exit status: {said}");
        check!(
            said.contains("kvm_exit") && said.lines().count() == 1,
            "{said}"
        );
        return Err(Fail::skip(
            "the hypervisor has no trace, which is what the tool says",
        ));
    }
    let text = String::from_utf8_lossy(&output.stdout);
    let lines: Vec<&str> = text.lines().collect();
    check!(
        lines.len() > 10,
        "{} exits in half a second: {said}",
        lines.len()
    );
    let mut other = Command::new(TOOL);
    other.args(["trace", "traced", "--cpu", "1"]);
    let output = other.output().during(TOOL)?;
    let said = String::from_utf8_lossy(&output.stderr);
    check_eq!(output.status.code(), Some(2), "of CPU 1: {said}");
    check!(
        said.contains("no CPU 1") && said.lines().count() == 1,
        "{said}"
    );
    check!(
        lines
            .iter()
            .all(|line| line.contains("\"reason\":\"EXTERNAL_INTERRUPT\"")),
        "others are among them: {text}"
    );
    Ok(())
}
