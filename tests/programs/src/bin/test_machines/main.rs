// SPDX-License-Identifier: GPL-2.0
//! Machines by their names: `rvisor run --detach`, `ps`, `console`, `stop`, `kill`, `pause`, `resume` and `up`.

mod console;
mod firmware;
mod snapshot;
mod up;

use rvisor_tests::ktap::Context;
use rvisor_tests::{check, check_eq, ktap, tests, Device, Fail, Outcome};
use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

const TOOL: &str = "/bin/rvisor";
/// How long a guest may take to its userspace, and a command for what it does.
fn patience() -> Duration {
    Duration::from_secs(8) * ktap::slowness()
}
/// The words that make the small guest's kernel quiet.
const QUIET: &str = "loglevel=4";

/// The machines of one test: in a folder of its own, and all killed at its end.
struct Machines {
    device: String,
    folder: PathBuf,
}

impl Machines {
    fn new(device: &Device) -> Result<Self, Fail> {
        let folder = PathBuf::from(format!("/tmp/machines-{}", std::process::id()));
        fs::create_dir(&folder)?;
        Ok(Self {
            device: device.path(),
            folder,
        })
    }

    /// A file of the machines' folder.
    fn file(&self, name: &str) -> PathBuf {
        self.folder.join("rvisor").join(name)
    }

    /// `rvisor` with those words, of these machines.
    fn tool(&self, words: &[&str]) -> Command {
        let mut command = Command::new(TOOL);
        command
            .args(words)
            .env("XDG_RUNTIME_DIR", &self.folder)
            .current_dir(&self.folder)
            .stdin(Stdio::null());
        command
    }

    /// Runs `rvisor` with those words to its end.
    fn run(&self, words: &[&str]) -> Result<Output, Fail> {
        self.tool(words).output().during(TOOL)
    }

    /// Runs it and checks its exit status; gives what it printed on standard output and standard error.
    fn gives(&self, wanted: i32, words: &[&str]) -> Result<(String, String), Fail> {
        let output = self.run(words)?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        check_eq!(
            output.status.code(),
            Some(wanted),
            "status of {words:?}: {said}"
        );
        Ok((String::from_utf8_lossy(&output.stdout).into_owned(), said))
    }

    /// Starts the small guest, detached; it ends as `end` says.
    fn start(&self, name: &str, end: &str) -> Outcome {
        self.start_with(name, end, &["--memory", "64M"])
    }

    /// The same with more options.
    fn start_with(&self, name: &str, end: &str, more: &[&str]) -> Outcome {
        let line = format!("{QUIET} guest.end={end}");
        let words = ["run", "--detach", "--name", name, "--device", &self.device];
        let guest = [
            "--kernel",
            "/guest/bzImage",
            "--initrd",
            "/guest/initramfs.cpio",
            "--cmdline",
            &line,
        ];
        let (printed, _) = self.gives(0, &[words.as_slice(), &guest, more].concat())?;
        check_eq!(printed.trim(), name, "what run --detach prints");
        Ok(())
    }

    /// What `ps --json` prints.
    fn list(&self) -> Result<String, Fail> {
        Ok(self.gives(0, &["ps", "--json"])?.0)
    }

    /// Waits until the console has shown `text`.
    fn await_console(&self, name: &str, text: &str) -> Outcome {
        let mut client = self.connect(name)?;
        client.write_all(b"{\"command\":\"console\"}\n")?;
        await_text(&mut client, text).map(drop)
    }

    /// A connection to a machine's socket.
    fn connect(&self, name: &str) -> Result<UnixStream, Fail> {
        Ok(UnixStream::connect(self.file(&format!("{name}/sock")))?)
    }

    /// Waits until `done` says so.
    fn wait(&self, what: &str, mut done: impl FnMut() -> Result<bool, Fail>) -> Outcome {
        let end = Instant::now() + patience();
        while Instant::now() < end {
            if done()? {
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        Err(Fail::new(format!("it never came about: {what}")))
    }
}

impl Drop for Machines {
    fn drop(&mut self) {
        for pid in pids(&self.list().unwrap_or_default()) {
            kill(pid, libc::SIGKILL);
        }
        let _ = fs::remove_dir_all(&self.folder);
    }
}

/// Reads until `text` has come, and what came before it.
fn await_text(client: &mut UnixStream, text: &str) -> Result<String, Fail> {
    let end = Instant::now() + patience();
    let mut read = String::new();
    client.set_read_timeout(Some(Duration::from_millis(100)))?;
    while !read.contains(text) {
        let mut bytes = [0; 4096];
        match client.read(&mut bytes) {
            Ok(0) => return Err(Fail::new(format!("the end came before {text:?}: {read}"))),
            Ok(count) => read.push_str(&String::from_utf8_lossy(&bytes[..count])),
            Err(_) if Instant::now() < end => {}
            Err(_) => return Err(Fail::new(format!("no {text:?}: {read}"))),
        }
    }
    Ok(read)
}

/// The numbers of the processes that a list of machines has.
fn pids(list: &str) -> Vec<libc::pid_t> {
    let numbers = list.split("\"pid\":").skip(1);
    numbers
        .filter_map(|rest| rest.split(',').next()?.parse().ok())
        .collect()
}

fn kill(pid: libc::pid_t, signal: i32) {
    // SAFETY: A process of this test's; at worst it has gone.
    unsafe { libc::kill(pid, signal) };
}

/// One line, with all of `words`.
fn check_line(text: &str, words: &[&str]) -> Outcome {
    check_eq!(text.trim_end().lines().count(), 1, "lines: {text}");
    for word in words {
        check!(text.contains(word), "no {word:?}: {text}");
    }
    Ok(())
}

/// A machine is listed while it runs, has its name for itself, and leaves nothing.
fn life(device: &Device) -> Outcome {
    let machines = Machines::new(device)?;
    check_eq!(machines.list()?.trim(), "[]", "no machines");
    machines.start("one", "wait")?;
    let list = machines.list()?;
    for word in [
        "\"name\":\"one\"",
        "\"state\":\"running\"",
        "\"cpus\":1",
        "\"memory\":67108864",
    ] {
        check!(list.contains(word), "no {word}: {list}");
    }
    let (table, _) = machines.gives(0, &["ps"])?;
    let line = table.lines().nth(1).unwrap_or_default();
    check!(
        line.starts_with("one ") && line.contains(" running "),
        "the table: {table}"
    );
    let kernel = ["run", "--name", "one", "--kernel", "/guest/bzImage"];
    for more in [[].as_slice(), &["--detach"]] {
        let (_, said) = machines.gives(2, &[&kernel, more].concat())?;
        check_line(&said, &["one runs already", "--name"])?;
    }
    machines.await_console("one", "guest: end by wait")?;
    machines.gives(0, &["kill", "one"])?;
    check_eq!(machines.list()?.trim(), "[]", "after kill");
    for command in ["console", "stop", "kill", "pause", "resume"] {
        let (_, said) = machines.gives(2, &[command, "one"])?;
        check_line(&said, &["no machine named one", "rvisor ps"])?;
    }
    let left: Vec<_> = fs::read_dir(machines.file("one"))?
        .flatten()
        .map(|entry| entry.file_name())
        .collect();
    check_eq!(left, ["log"], "files");
    let log = fs::read_to_string(machines.file("one/log"))?;
    check_line(&log, &["rvisor kill"])
}

/// A killed process leaves nothing that the next start trips over.
fn killed(device: &Device) -> Outcome {
    let machines = Machines::new(device)?;
    machines.start("one", "wait")?;
    for pid in pids(&machines.list()?) {
        kill(pid, libc::SIGKILL);
    }
    machines.wait("the killed one is gone", || {
        Ok(machines.connect("one").is_err())
    })?;
    // Before ps removes what it left.
    check!(
        machines.file("one/sock").exists(),
        "the killed one removed its socket"
    );
    machines.start("one", "wait")?;
    machines.await_console("one", "guest: end by wait")?;
    machines.gives(0, &["kill", "one"]).map(drop)
}

/// SIGTERM ends a detached machine; whoever waits for it learns how.
fn sigterm(device: &Device) -> Outcome {
    let machines = Machines::new(device)?;
    machines.start("one", "wait")?;
    let mut client = machines.connect("one")?;
    client.write_all(b"{\"command\":\"wait\"}\n")?;
    machines.await_console("one", "guest: end by wait")?;
    for pid in pids(&machines.list()?) {
        kill(pid, libc::SIGTERM);
    }
    await_text(&mut client, "\"status\":143")?;
    check!(!machines.file("one/sock").exists(), "its name is not free");
    check_line(
        &fs::read_to_string(machines.file("one/log"))?,
        &["signal 15"],
    )?;
    // Its name is free, at once.
    machines.start("one", "wait")?;
    machines.gives(0, &["kill", "one"]).map(drop)
}

/// What can't start detached says so and has the status of `run`.
fn no_start(device: &Device) -> Outcome {
    let machines = Machines::new(device)?;
    let (_, said) = machines.gives(2, &["run", "--detach", "--kernel", "/nowhere"])?;
    check_line(&said, &["/nowhere"])?;
    let (_, said) = machines.gives(
        2,
        &[
            "run",
            "--detach",
            "--kernel",
            "/guest/bzImage",
            "--device",
            "/dev/null",
        ],
    )?;
    check_line(&said, &["/dev/null"])?;
    let (_, said) = machines.gives(2, &["run", "--name", "a/b", "--kernel", "/guest/bzImage"])?;
    check_line(&said, &["a/b", "letters"])?;
    fs::set_permissions(
        machines.file(""),
        std::os::unix::fs::PermissionsExt::from_mode(0o755),
    )?;
    let (_, said) = machines.gives(2, &["run", "--detach", "--kernel", "/guest/bzImage"])?;
    check_line(&said, &["machines' folder", "XDG_RUNTIME_DIR"])
}

/// A paused guest does nothing, and goes on where it was.
fn pause_and_resume(device: &Device) -> Outcome {
    let machines = Machines::new(device)?;
    machines.start("one", "shell")?;
    machines.await_console("one", "guest: end by shell")?;
    let mut client = machines.connect("one")?;
    client.write_all(b"{\"command\":\"console\"}\n")?;
    await_text(&mut client, "{\"ok\":{}}\n")?;
    client.write_all(b"i=0; while :; do i=$((i+1)); echo tick-$i; usleep 20000; done\n")?;
    await_text(&mut client, "tick-3")?;
    machines.gives(0, &["pause", "one"])?;
    let list = machines.list()?;
    check!(list.contains("\"state\":\"paused\""), "{list}");
    // Nothing is under way any more once as much time has passed as ten ticks take.
    std::thread::sleep(Duration::from_millis(50));
    client.set_nonblocking(true)?;
    let mut bytes = [0; 4096];
    while client.read(&mut bytes).is_ok_and(|count| count > 0) {}
    std::thread::sleep(Duration::from_millis(200));
    check!(client.read(&mut bytes).is_err(), "a paused guest prints");
    client.set_nonblocking(false)?;
    let (_, said) = machines.gives(2, &["stop", "one"])?;
    check_line(&said, &["paused", "resume"])?;
    // Pausing twice is pausing.
    machines.gives(0, &["pause", "one"])?;
    machines.gives(0, &["resume", "one"])?;
    await_text(&mut client, "tick-")?;
    machines.gives(0, &["kill", "one"]).map(drop)
}

/// A guest leaves memory to the host when it is asked to, and gets it back.
fn balloon(device: &Device) -> Outcome {
    let machines = Machines::new(device)?;
    machines.start("one", "wait")?;
    machines.await_console("one", "guest: end by wait")?;
    for (size, bytes) in [("16M", 16 << 20), ("0", 0)] {
        machines.gives(0, &["balloon", "one", size])?;
        let told = format!("\"balloon\":{bytes},");
        machines.wait(&told, || Ok(machines.list()?.contains(&told)))?;
    }
    let (_, said) = machines.gives(2, &["balloon", "one", "65M"])?;
    check_line(&said, &["has 64 MiB", "less"])?;
    let kernel = ["run", "--kernel", "/guest/bzImage", "--memory", "64M"];
    let (_, said) = machines.gives(2, &[&kernel, ["--balloon", "65M"].as_slice()].concat())?;
    check_line(
        &said,
        &["--balloon 65 MiB", "--memory of 64 MiB", "smaller"],
    )?;
    machines.gives(0, &["kill", "one"]).map(drop)
}

/// A machine whose process does not answer is ended by its number, with all it has.
fn kill_insists(device: &Device) -> Outcome {
    let machines = Machines::new(device)?;
    machines.start("one", "wait")?;
    let pids = pids(&machines.list()?);
    for pid in &pids {
        kill(*pid, libc::SIGSTOP);
    }
    machines.gives(0, &["kill", "one"])?;
    for pid in pids {
        check!(
            !PathBuf::from(format!("/proc/{pid}/fd/0")).exists(),
            "{pid} is there"
        );
    }
    check_eq!(machines.list()?.trim(), "[]", "after kill");
    Ok(())
}

/// A list without a machine that does not answer is no list of all; a file is no machine.
fn silent(device: &Device) -> Outcome {
    let machines = Machines::new(device)?;
    firmware::start(&machines, firmware::minds_nothing())?;
    fs::write(machines.file("file"), "")?;
    let pids = pids(&machines.list()?);
    for pid in &pids {
        kill(*pid, libc::SIGSTOP);
    }
    let listed = machines.gives(1, &["ps", "--json"]);
    for pid in pids {
        kill(pid, libc::SIGKILL);
    }
    let (list, said) = listed?;
    check_eq!(list.trim(), "[]", "the list");
    check_line(&said, &["machine one", "does not answer"])
}

/// Clients that hang, send nonsense or are many do no harm.
fn bad_clients(device: &Device) -> Outcome {
    let machines = Machines::new(device)?;
    machines.start("one", "wait")?;
    let _silent = machines.connect("one")?;
    let mut half = machines.connect("one")?;
    half.write_all(b"{\"command\":\"sta")?;
    let mut nonsense = machines.connect("one")?;
    nonsense.write_all(b"\xff\xfe\n")?;
    await_text(&mut nonsense, "no command: expected value")?;
    let mut long = machines.connect("one")?;
    // It is hung up before all is taken.
    let _ = long.write_all(&[b'x'; 1 << 20]);
    let mut reader = machines.connect("one")?;
    reader.write_all(b"{\"command\":\"console\"}\n")?;
    let list = machines.list()?;
    check!(list.contains("\"state\":\"running\""), "{list}");
    machines.gives(0, &["kill", "one"]).map(drop)
}

fn main() -> std::process::ExitCode {
    ktap::main(tests![
        life,
        killed,
        sigterm,
        no_start,
        pause_and_resume,
        balloon,
        kill_insists,
        silent,
        bad_clients,
        console::console,
        console::two_at_once,
        firmware::power_button,
        firmware::stop_insists,
        snapshot::snapshot,
        snapshot::two_cpus,
        snapshot::of_firmware,
        snapshot::bad_snapshots,
        up::up,
        up::all_or_none,
        up::mistakes,
        up::interrupted,
        up::stopped_by_signal,
    ])
}
