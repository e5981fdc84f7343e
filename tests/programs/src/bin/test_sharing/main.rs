// SPDX-License-Identifier: GPL-2.0
//! What machines take of a host with one busy CPU (shares, limits, and what becomes of one that wants more), and
//! what the tool shows of it.

mod machine;
mod seeing;

use machine::{Hierarchy, Machine, Software};
use rvisor_tests::host::QuietLog;
use rvisor_tests::ktap::Context;
use rvisor_tests::{check, check_eq, ktap, tests, Device, Fail, Outcome};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::time::{Duration, Instant};

/// How long to look at who gets the CPU.
const LOOK: Duration = Duration::from_secs(2);
const SECOND: Duration = Duration::from_secs(1);
/// How long a machine may take to its first instructions or to its end.
fn patience() -> Duration {
    Duration::from_secs(4) * ktap::slowness()
}
/// An ordinary user.
const NOBODY: u32 = 65534;

/// Fails unless each of `machines` gets its percentage of one CPU, within 5.
fn check_shares(machines: &[(&Machine, f64)]) -> Outcome {
    let began = Instant::now();
    let mut before = Vec::new();
    for (machine, _) in machines {
        before.push(machine.cpu_time()?);
    }
    std::thread::sleep(LOOK);
    let took = began.elapsed();
    for ((machine, wanted), before) in machines.iter().zip(before) {
        let used = machine.cpu_time()? - before;
        let percent = 100.0 * used.as_secs_f64() / took.as_secs_f64();
        check!(
            (percent - wanted).abs() <= 5.0,
            "{} got {percent:.1} %, not {wanted}",
            machine.name()
        );
    }
    Ok(())
}

fn shares(device: &Device) -> Outcome {
    let _cgroups = Hierarchy::mounted()?;
    let large = Machine::start(device, Software::Spins, &["--cpu-share", "300"])?;
    let small = Machine::start(device, Software::Spins, &["--cpu-share", "100"])?;
    large.await_cpu_time(patience())?;
    small.await_cpu_time(patience())?;
    check_shares(&[(&large, 75.0), (&small, 25.0)])
}

/// Held at 50 %, with nobody else who wants the CPU.
fn half(device: &Device) -> Outcome {
    let _cgroups = Hierarchy::mounted()?;
    let machine = Machine::start(device, Software::Spins, &["--cpu-max", "50%"])?;
    machine.await_cpu_time(patience())?;
    let mut looks = vec![(Instant::now(), machine.cpu_time()?)];
    while looks[0].0.elapsed() < LOOK {
        std::thread::sleep(Duration::from_millis(50));
        looks.push((Instant::now(), machine.cpu_time()?));
    }
    for (start, before) in &looks {
        let Some((end, after)) = looks.iter().find(|(end, _)| *end >= *start + SECOND) else {
            break;
        };
        let percent = 100.0 * (*after - *before).as_secs_f64() / (*end - *start).as_secs_f64();
        // What it may take at once, 10 ms, and a tick of the host's, of a second.
        check!(
            (45.0..=51.5).contains(&percent),
            "in one second it took {percent:.1} %"
        );
    }
    Ok(())
}

/// One that eats memory is ended by its own limit and says so; the other one does not notice.
fn memory(device: &Device) -> Outcome {
    let _cgroups = Hierarchy::mounted()?;
    // The kernel reports with a stack what it ends, which the test host takes for a complaint.
    let _quiet = QuietLog::new()?;
    let other = Machine::start(device, Software::Spins, &["--memory-max", "32M"])?;
    let mut eater = Machine::start(device, Software::EatsMemory, &["--memory-max", "32M"])?;
    other.await_cpu_time(patience())?;
    let (status, text) = eater.end(patience())?;
    check_eq!(status, Some(7), "the exit status: {text}");
    check!(
        text.lines().count() == 1 && text.contains("--memory-max of 32 MiB"),
        "its words: {text}"
    );
    check!(!eater.group().exists(), "its cgroup is still there");
    let before = other.cpu_time()?;
    std::thread::sleep(Duration::from_millis(200));
    check!(other.cpu_time()? > before, "the other one stands still");
    Ok(())
}

/// `rvisor up` tells of such a machine as `run` does.
fn memory_of_up(device: &Device) -> Outcome {
    let _cgroups = Hierarchy::mounted()?;
    let _quiet = QuietLog::new()?;
    let output = machine::up_eater(device)?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    check_eq!(output.status.code(), Some(7), "the exit status: {said}");
    check!(
        said.contains("eater | rvisor: it has ended; what it said then is in"),
        "its words: {said}"
    );
    Ok(())
}

/// One that can't even start within its limit says so to who waits for it.
fn memory_of_start(device: &Device) -> Outcome {
    let _cgroups = Hierarchy::mounted()?;
    let _quiet = QuietLog::new()?;
    let mut command = machine::tool(device, &Software::Spins)?;
    command.args(["--detach", "--memory-max", "64K"]);
    let output = command.output().during(machine::TOOL)?;
    let said = String::from_utf8_lossy(&output.stderr);
    check_eq!(output.status.code(), Some(7), "the exit status: {said}");
    check!(
        said.lines().count() == 1 && said.contains("--memory-max"),
        "its words: {said}"
    );
    Ok(())
}

/// A guest that forks and spins on two CPUs, and one that spins on one, with the same share.
fn fork_and_spin(device: &Device) -> Outcome {
    let _cgroups = Hierarchy::mounted()?;
    let share = ["--cpu-share", "100"];
    let mut wild = Machine::start(
        device,
        Software::Shell,
        &[share[0], share[1], "--cpus", "2"],
    )?;
    wild.await_text("guest: end by shell", patience())?;
    wild.type_keys(b"while :; do (while :; do :; done) & done\r")?;
    let calm = Machine::start(device, Software::Spins, &share)?;
    calm.await_cpu_time(patience())?;
    check_shares(&[(&wild, 50.0), (&calm, 50.0)])
}

/// Pinning needs no cgroup, and names a CPU that is not there.
fn pin(device: &Device) -> Outcome {
    let mut machine = Machine::start(device, Software::Spins, &["--pin", "0"])?;
    std::thread::sleep(Duration::from_millis(300));
    let threads = machine.allowed_cpus()?;
    check!(threads.len() >= 2, "it has {} threads", threads.len());
    check!(threads.iter().all(|cpus| cpus == "0"), "{threads:?}");
    machine.kill()?;
    let mut machine = Machine::start(device, Software::Spins, &["--pin", "0,77"])?;
    let (status, text) = machine.end(patience())?;
    check_eq!(status, Some(2), "the exit status: {text}");
    check!(
        text.contains("CPU 77") && text.lines().count() == 1,
        "{text}"
    );
    Ok(())
}

/// Signals go through to the machine, and nothing is left of the cgroup.
fn signal(device: &Device) -> Outcome {
    let _cgroups = Hierarchy::mounted()?;
    let mut machine = Machine::start(device, Software::Spins, &["--cpu-share", "50"])?;
    machine.await_cpu_time(patience())?;
    machine.signal(libc::SIGTERM)?;
    let (status, text) = machine.end(patience())?;
    check_eq!(status, Some(143), "the exit status: {text}");
    check!(!machine.group().exists(), "its cgroup is still there");
    Ok(())
}

/// What a machine leaves that was killed with its supervisor is nothing that the next one trips over.
fn killed(device: &Device) -> Outcome {
    let _cgroups = Hierarchy::mounted()?;
    let start = || {
        let words = ["--cpu-share", "50"];
        Machine::start_named(device, "killed", None, Software::Spins, &words)
    };
    let mut machine = start()?;
    machine.await_cpu_time(patience())?;
    machine.kill()?;
    let group = machine.group();
    check!(group.exists(), "its cgroup went away: nothing was tested");
    let end = Instant::now() + patience();
    while !std::fs::read(group.join("cgroup.procs"))?.is_empty() {
        check!(Instant::now() < end, "its process lives on");
        std::thread::sleep(Duration::from_millis(20));
    }
    start()?.await_cpu_time(patience())
}

/// A name that is in use stays its owner's.
fn name_in_use(device: &Device) -> Outcome {
    let _cgroups = Hierarchy::mounted()?;
    let start = || {
        let words = ["--cpu-share", "50"];
        Machine::start_named(device, "twin", None, Software::Spins, &words)
    };
    let first = start()?;
    first.await_cpu_time(patience())?;
    let mut second = start()?;
    let (status, text) = second.end(patience())?;
    check_eq!(status, Some(2), "the exit status: {text}");
    check_eq!(text.lines().count(), 1, "lines: {text}");
    let before = first.cpu_time()?;
    std::thread::sleep(Duration::from_millis(200));
    check!(first.cpu_time()? > before, "the first one stands still");
    Ok(())
}

/// A cgroup that systemd has given away is divided; the processes in it make way.
fn delegated(device: &Device) -> Outcome {
    let _cgroups = Hierarchy::mounted()?;
    let given = machine::delegate("given")?;
    let mut machine = Machine::start_in(
        device,
        Some(&given),
        Software::Spins,
        &["--cpu-share", "50"],
    )?;
    machine.await_cpu_time(patience())?;
    check!(
        machine.group().starts_with(&given),
        "it went to {}",
        machine.group().display()
    );
    machine.signal(libc::SIGTERM)?;
    let (status, text) = machine.end(patience())?;
    check_eq!(status, Some(143), "the exit status: {text}");
    for left in ["rvisor.others", ""] {
        std::fs::remove_dir(given.join(left)).during("removing what the test made")?;
    }
    Ok(())
}

/// What can't be kept is said in one line with the next step, and nothing is made.
fn refused(device: &Device) -> Outcome {
    let refuse = |words: &[&str], user: Option<u32>, expected: &[&str]| -> Outcome {
        let mut command = machine::tool(device, &Software::Spins)?;
        command.args(words);
        if let Some(user) = user {
            command.uid(user).gid(user);
        }
        let output = command.output()?;
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        check_eq!(
            output.status.code(),
            Some(2),
            "the exit status of {words:?}: {text}"
        );
        check_eq!(text.lines().count(), 1, "lines: {text}");
        for word in expected {
            check!(text.contains(word), "no {word:?} in: {text}");
        }
        Ok(())
    };
    machine::unmount();
    refuse(
        &["--cpu-share", "7"],
        None,
        &["no cgroup2 at", "mount -t cgroup2"],
    )?;
    let _cgroups = Hierarchy::mounted()?;
    refuse(
        &["--cpu-share", "7"],
        Some(NOBODY),
        &["no cgroup", "systemd-run --user"],
    )?;
    refuse(
        &["--io-max", "/dev/null:rbps=1M"],
        None,
        &["/dev/null", "no disk"],
    )?;
    refuse(&["--memory-max", "16E"], None, &["--memory-max"])?;
    let left = std::fs::read_dir(Path::new(machine::PARENT)).map_or(0, |parent| {
        parent
            .flatten()
            .filter(|entry| entry.path().is_dir())
            .count()
    });
    check_eq!(left, 0, "cgroups that are left");
    Ok(())
}

/// What is written reaches the kernel: a limit on the RAM disk.
fn io(device: &Device) -> Outcome {
    let _cgroups = Hierarchy::mounted()?;
    if !Path::new("/dev/ram0").exists() {
        return Err(Fail::skip("there is no /dev/ram0"));
    }
    let words = ["--io-max", "/dev/ram0:rbps=1M,wiops=500"];
    let machine = Machine::start(device, Software::Spins, &words)?;
    machine.await_cpu_time(patience())?;
    let text = std::fs::read_to_string(machine.group().join("io.max"))?;
    check_eq!(
        text.trim(),
        "1:0 rbps=1048576 wbps=max riops=max wiops=500",
        "io.max"
    );
    Ok(())
}

fn main() -> std::process::ExitCode {
    ktap::main(tests![
        refused,
        pin,
        shares,
        half,
        memory,
        memory_of_up,
        memory_of_start,
        fork_and_spin,
        signal,
        killed,
        name_in_use,
        delegated,
        io,
        seeing::stat,
        seeing::exits,
        seeing::metrics,
        seeing::top,
        seeing::trace,
    ])
}
