// SPDX-License-Identifier: GPL-2.0
//! `rvisor snapshot` and `restore`: a guest goes on where it was, in another process.

use super::{await_text, check_line, firmware, pids, Machines};
use rvisor_tests::{check, check_eq, Device, Fail, Outcome};
use std::fs;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::process::Command;

/// A client on the console of a machine.
fn console(machines: &Machines, name: &str) -> Result<UnixStream, Fail> {
    let mut client = machines.connect(name)?;
    client.write_all(b"{\"command\":\"console\"}\n")?;
    await_text(&mut client, "{\"ok\":{}}\n")?;
    Ok(client)
}

/// Starts the small guest and has its shell count; gives what it has counted to.
fn counting(machines: &Machines, words: &[&str]) -> Result<u32, Fail> {
    machines.start_with("one", "shell", words)?;
    machines.await_console("one", "guest: end by shell")?;
    let mut client = console(machines, "one")?;
    client.write_all(b"i=0; while :; do i=$((i+1)); echo tick-$i; usleep 20000; done\n")?;
    await_text(&mut client, "tick-5")?;
    tick(&mut client)
}

/// What it has counted to. The number at the end of what has come may go on, so it is none.
fn tick(client: &mut UnixStream) -> Result<u32, Fail> {
    let text = await_text(client, "tick-")? + &await_text(client, "tick-")?;
    let number = text.rsplit("tick-").find_map(|rest| {
        let (digits, _) = rest.split_once(|c: char| !c.is_ascii_digit())?;
        digits.parse().ok()
    });
    number.ok_or_else(|| Fail::new(format!("no tick: {text}")))
}

/// A guest with one CPU, beside the machine that it was taken of.
pub(super) fn snapshot(device: &Device) -> Outcome {
    let machines = Machines::new(device)?;
    counting(&machines, &["--memory", "36M"])?;
    machines.gives(0, &["snapshot", "one", "file"])?;
    let size = fs::metadata(machines.folder.join("file"))?.len();
    check!(size < 34 << 20, "zeros are in the file: {size} bytes");
    let mut client = console(&machines, "one")?;
    let before = tick(&mut client)?;
    await_text(&mut client, &format!("tick-{}", before + 3))?;
    restored(&machines, "two")?;
    check_eq!(pids(&machines.list()?).len(), 2, "machines");
    let mut client = console(&machines, "two")?;
    client.write_all(b"poweroff -f\n")?;
    machines.wait("the restored guest powers off", || {
        Ok(!machines.list()?.contains("\"two\""))
    })
}

/// A guest with two, whose timers go on; under its old name.
pub(super) fn two_cpus(device: &Device) -> Outcome {
    let machines = Machines::new(device)?;
    counting(&machines, &["--memory", "36M", "--cpus", "2"])?;
    machines.gives(0, &["snapshot", "one", "file"])?;
    machines.gives(0, &["kill", "one"])?;
    restored(&machines, "one")?;
    let mut client = console(&machines, "one")?;
    client
        .write_all(b"for c in 0 1; do taskset -c $c usleep 1000 && echo on-$c-$((3+4)); done\n")?;
    await_text(&mut client, "on-1-7").map(drop)
}

/// Restores the guest that counts; it goes on, and its input and interrupts work.
fn restored(machines: &Machines, name: &str) -> Outcome {
    let (printed, _) = machines.gives(0, &["restore", "file", "--detach", "--name", name])?;
    check_eq!(printed.trim(), name, "what it prints");
    let mut client = console(machines, name)?;
    let first = tick(&mut client)?;
    check!(
        first > 4,
        "it counts from {first}: the guest has booted anew"
    );
    await_text(&mut client, &format!("tick-{}", first + 5))?;
    // The shell takes Ctrl-C and a command.
    client.write_all(b"\x03")?;
    client.write_all(b"usleep 100000; echo slept-$((3+4))\n")?;
    await_text(&mut client, "slept-7").map(drop)
}

/// The power button, the 8259s and the ROM of firmware are as they were.
pub(super) fn of_firmware(device: &Device) -> Outcome {
    let machines = Machines::new(device)?;
    firmware::start(&machines, firmware::minds_the_button())?;
    machines.gives(0, &["snapshot", "one", "file"])?;
    machines.gives(0, &["kill", "one"])?;
    fs::remove_file(machines.folder.join("rom"))?;
    machines.gives(0, &["restore", "file", "--detach"])?;
    machines
        .gives(0, &["stop", "one", "--timeout", "5"])
        .map(drop)
}

/// What is no snapshot, or none any more, is told in one line; nothing is left of a snapshot that fails.
pub(super) fn bad_snapshots(device: &Device) -> Outcome {
    let machines = Machines::new(device)?;
    firmware::start(&machines, firmware::minds_nothing())?;
    machines.gives(0, &["snapshot", "one", "file"])?;
    let (_, said) = machines.gives(2, &["snapshot", "one", "nowhere/file"])?;
    check_line(&said, &["nowhere/", "folder"])?;
    let (_, said) = machines.gives(2, &["restore", "file"])?;
    check_line(&said, &["one runs already", "--name"])?;
    full_disk(&machines)?;
    let (_, said) = machines.gives(2, &["snapshot", "two", "file"])?;
    check_line(&said, &["no machine named two"])?;
    machines.gives(0, &["kill", "one"])?;
    let path = machines.folder.join("file");
    let good = fs::read(&path)?;
    let mut later = good.clone();
    later[8] = 9;
    let mut damaged = good.clone();
    damaged[good.len() / 2] ^= 1;
    for (bytes, words) in [
        (
            b"nothing".as_slice(),
            ["file is no snapshot", "rvisor snapshot"],
        ),
        (&later, ["version 9", "the rvisor that made it"]),
        (&damaged, ["file is damaged", "checksums"]),
        (
            &good[..good.len() - 100],
            ["file is damaged", "ends too early"],
        ),
    ] {
        fs::write(&path, bytes)?;
        let (_, said) = machines.gives(2, &["restore", "file", "--detach"])?;
        check_line(&said, &words)?;
    }
    check_eq!(machines.list()?.trim(), "[]", "machines");
    let left: Vec<_> = fs::read_dir(&machines.folder)?
        .flatten()
        .map(|entry| entry.file_name())
        .collect();
    check_eq!(left.len(), 4, "files in {left:?}");
    Ok(())
}

/// On a disk that is full, what was there stays and nothing else, and the machine goes on.
fn full_disk(machines: &Machines) -> Outcome {
    let folder = machines.folder.join("full");
    fs::create_dir(&folder)?;
    let mount = ["-t", "tmpfs", "-o", "size=4k", "none"];
    let status = Command::new("mount").args(mount).arg(&folder).status()?;
    check!(status.success(), "no small disk: {status}");
    fs::write(folder.join("file"), "old")?;
    let said = machines.gives(1, &["snapshot", "one", "full/file"]);
    let left: Vec<_> = fs::read_dir(&folder)?
        .flatten()
        .map(|entry| entry.file_name())
        .collect();
    let old = fs::read_to_string(folder.join("file"))?;
    Command::new("umount").arg(&folder).status()?;
    check_line(&said?.1, &["full/file", "No space left"])?;
    check_eq!(
        (left.len(), old.as_str()),
        (1, "old"),
        "files on the full disk: {left:?}"
    );
    machines.wait("the machine goes on", || {
        Ok(machines.list()?.contains("\"state\":\"running\""))
    })
}
