// SPDX-License-Identifier: GPL-2.0
//! `rvisor up`: the machines of a file.

use super::{check_line, kill, Machines, QUIET};
use rvisor_tests::{check, check_eq, Device, Fail, Outcome};
use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::process::Stdio;
use std::time::Duration;

/// A file with a machine for each name and end.
fn file(machines: &Machines, list: &[(&str, &str)]) -> Outcome {
    let mut text = String::new();
    for (name, end) in list {
        text += &format!(
            "[machine.{name}]\nkernel = \"kernel\"\ninitrd = '/guest/initramfs.cpio'\nmemory = \"64M\"\ncpus = 1\n\
             device = {:?}\ncmdline = \"{QUIET} guest.end={end}\"\n",
            machines.device
        );
    }
    fs::write(machines.folder.join("machines.toml"), text)?;
    // A path that is relative to the file.
    let link = machines.folder.join("kernel");
    if !link.exists() {
        std::os::unix::fs::symlink("/guest/bzImage", link)?;
    }
    Ok(())
}

/// Two machines in the foreground, each line with its machine's name, to their ends.
pub(super) fn up(device: &Device) -> Outcome {
    let machines = Machines::new(device)?;
    file(&machines, &[("one", "poweroff"), ("second", "reboot")])?;
    let (shown, said) = machines.gives(3, &["up"])?;
    for line in [
        "one    | guest: userspace reached",
        "one    | rvisor: the guest powered off",
        "second | guest: userspace reached",
        "second | rvisor: the guest asked for a reboot",
    ] {
        check!(shown.contains(line), "no {line:?}: {shown}");
    }
    check!(
        said.contains("one runs") && said.contains("second runs"),
        "{said}"
    );
    check_eq!(machines.list()?.trim(), "[]", "machines afterwards");
    Ok(())
}

/// Detached, they run on; where one can't start, none is left.
pub(super) fn all_or_none(device: &Device) -> Outcome {
    let machines = Machines::new(device)?;
    file(&machines, &[("one", "wait"), ("two", "wait")])?;
    let path = machines.folder.join("machines.toml");
    let path = path.to_string_lossy();
    let (shown, _) = machines.gives(0, &["up", "--detach", "--json", &path])?;
    check_eq!(
        shown.trim(),
        "[{\"name\":\"one\"},{\"name\":\"two\"}]",
        "what it prints"
    );
    let (_, said) = machines.gives(2, &["up", "--detach", &path])?;
    check_line(&said, &["runs already", "rvisor stop"])?;
    for name in ["one", "two"] {
        machines.gives(0, &["kill", name])?;
    }
    // The second one's initrd is not there: a mistake that only its start finds.
    let text = fs::read_to_string(&*path)?;
    let (first, second) = text.split_at(text.rfind("[machine").unwrap_or_default());
    fs::write(
        &*path,
        format!("{first}{}", second.replace("initramfs.cpio", "nothing")),
    )?;
    let (_, said) = machines.gives(2, &["up", "--detach", &path])?;
    check!(
        said.contains("/guest/nothing") && said.contains("did not start"),
        "{said}"
    );
    check_eq!(
        machines.list()?.trim(),
        "[]",
        "machines where one can't start"
    );
    Ok(())
}

/// A mistake has its line and column, and nothing starts.
pub(super) fn mistakes(device: &Device) -> Outcome {
    let machines = Machines::new(device)?;
    file(&machines, &[("one", "wait"), ("two", "wait")])?;
    let path = machines.folder.join("machines.toml");
    let good = fs::read_to_string(&path)?;
    for (text, words) in [
        (
            format!("{good}  memroy = '1G'\n"),
            ["machines.toml:15:3", "no option 'memroy'"],
        ),
        (
            good.replace("cpus = 1", "cpus = 'x'"),
            ["machines.toml:5:8", "invalid value"],
        ),
        (
            format!("{good}[machine"),
            ["machines.toml:15:9", "unclosed"],
        ),
    ] {
        fs::write(&path, text)?;
        let (_, said) = machines.gives(2, &["up"])?;
        check_line(&said, &words)?;
    }
    fs::remove_file(&path)?;
    check_line(
        &machines.gives(2, &["up"])?.1,
        &["machines.toml", "No such file"],
    )?;
    check_eq!(machines.list()?.trim(), "[]", "machines");
    Ok(())
}

/// SIGTERM ends a start that lasts, here because passt does; none is left of what was started.
pub(super) fn interrupted(device: &Device) -> Outcome {
    interrupt(device, "")?;
    // One that does not obey: it is stopped.
    interrupt(device, "kill -STOP $PPID")
}

/// The same with what passt does first.
fn interrupt(device: &Device, first_of_all: &str) -> Outcome {
    let machines = Machines::new(device)?;
    file(&machines, &[("one", "wait"), ("two", "wait")])?;
    let path = machines.folder.join("machines.toml");
    let text = fs::read_to_string(&path)?;
    let (first, second) = text.split_at(text.rfind("[machine").unwrap_or_default());
    fs::write(&path, format!("{first}{second}net = ['user']\n"))?;
    let silent = machines.folder.join("passt");
    // Longer than anybody waits here.
    fs::write(
        &silent,
        format!("#!/bin/sh\n{first_of_all}\nexec /bin/sleep 60\n"),
    )?;
    fs::set_permissions(&silent, PermissionsExt::from_mode(0o755))?;
    let mut command = machines.tool(&["up"]);
    command.env("PATH", &machines.folder).stdout(Stdio::null());
    let mut child = command.spawn()?;
    machines.wait("the first runs", || Ok(machines.connect("one").is_ok()))?;
    // The second waits for its network then.
    std::thread::sleep(Duration::from_millis(500));
    let pid = libc::pid_t::try_from(child.id()).map_err(|_| Fail::new("its pid"))?;
    kill(pid, libc::SIGTERM);
    let mut status = None;
    let ended = machines.wait("it ends", || {
        status = child.try_wait()?;
        Ok(status.is_some())
    });
    let _ = child.kill();
    ended?;
    check_eq!(status.and_then(|it| it.code()), Some(143), "status");
    check_eq!(machines.list()?.trim(), "[]", "machines afterwards");
    Ok(())
}

/// SIGTERM stops all machines, and insists, also where nobody reads what they print.
pub(super) fn stopped_by_signal(device: &Device) -> Outcome {
    let machines = Machines::new(device)?;
    file(&machines, &[("one", "wait"), ("two", "wait")])?;
    let (_reader, mut full) = std::os::unix::net::UnixStream::pair()?;
    full.set_nonblocking(true)?;
    while full.write(&[b'x'; 4096]).is_ok() {}
    full.set_nonblocking(false)?;
    let child = machines
        .tool(&["up", "--timeout", "1"])
        .stdout(std::os::fd::OwnedFd::from(full))
        .stderr(Stdio::piped())
        .spawn()?;
    for name in ["one", "two"] {
        machines.wait("both run", || Ok(machines.connect(name).is_ok()))?;
        machines.await_console(name, "guest: end by wait")?;
    }
    let pid = libc::pid_t::try_from(child.id()).map_err(|_| Fail::new("its pid"))?;
    kill(pid, libc::SIGTERM);
    let output = child.wait_with_output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    check_eq!(output.status.code(), Some(8), "status: {said}");
    check_eq!(
        said.matches("did not switch itself off").count(),
        2,
        "{said}"
    );
    check_eq!(machines.list()?.trim(), "[]", "machines afterwards");
    Ok(())
}
