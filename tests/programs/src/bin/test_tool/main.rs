// SPDX-License-Identifier: GPL-2.0
//! The tool on a terminal: raw while the guest runs, and as it was whatever ends the guest.

use rvisor_tests::ktap::Context;
use rvisor_tests::terminal::{self, Terminal};
use rvisor_tests::{check, check_eq, ktap, tests, Device, Fail, Outcome};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

const TOOL: &str = "/bin/rvisor";
/// How long the guest may take to its userspace, and the tool to its end, by the machine's clock.
const PATIENCE: Duration = Duration::from_secs(9);
/// An ordinary user.
const NOBODY: u32 = 65534;

/// A guest on a terminal of its own.
struct Guest {
    terminal: Terminal,
    before: libc::termios,
    child: Child,
}

impl Guest {
    /// Starts the tool with a Linux guest that ends as `words` on its command line say.
    fn start(device: &Device, words: &str) -> Result<Self, Fail> {
        let terminal = Terminal::new()?;
        let before = terminal.mode()?;
        check!(
            before.c_lflag & libc::ICANON != 0,
            "a new terminal is in raw mode already"
        );
        let child = tool(device)
            .args(["--initrd", "/guest/initramfs.cpio", "--cmdline"])
            .arg(format!(
                "console=ttyS0 loglevel=4 panic=-1 reboot=k {words}"
            ))
            .stdin(terminal.user_side()?)
            .stdout(terminal.user_side()?)
            .stderr(terminal.user_side()?)
            .spawn()
            .during(TOOL)?;
        Ok(Self {
            terminal,
            before,
            child,
        })
    }

    /// Waits for `text` on the screen.
    fn await_text(&mut self, text: &str) -> Outcome {
        self.terminal.await_text(text, PATIENCE)
    }

    /// The tool's end has the status `wanted` (less than 0: a signal), and the terminal is as it was.
    fn ends_with(mut self, wanted: i32) -> Outcome {
        let screen = self.terminal.read_until_idle(&mut self.child, PATIENCE)?;
        let status = self.child.wait()?;
        let found = status.code().ok_or_else(|| Fail::new("killed"))?;
        check_eq!(found, wanted, "the exit status; the screen: {screen}");
        terminal::check_same(&self.before, &self.terminal.mode()?)
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        // Already over where the test passed.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// `rvisor run` on this device, which dies with the test.
fn tool(device: &Device) -> Command {
    let mut command = Command::new(TOOL);
    command.args([
        "run",
        "--device",
        &device.path(),
        "--kernel",
        "/guest/bzImage",
    ]);
    // SAFETY: prctl is all that runs between fork and exec.
    unsafe {
        command.pre_exec(|| {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            Ok(())
        });
    }
    command
}

fn poweroff(device: &Device) -> Outcome {
    Guest::start(device, "guest.end=poweroff")?.ends_with(0)
}

fn reboot(device: &Device) -> Outcome {
    Guest::start(device, "guest.end=reboot")?.ends_with(3)
}

fn triple_fault(device: &Device) -> Outcome {
    Guest::start(device, "guest.end=reboot reboot=t")?.ends_with(4)
}

/// The mode while the guest runs, keys that reach the guest, the help, and the end by keys.
fn keys(device: &Device) -> Outcome {
    let mut guest = Guest::start(device, "guest.end=shell")?;
    guest.await_text("guest: end by shell")?;
    let during = guest.terminal.mode()?;
    check_eq!(
        during.c_lflag & (libc::ICANON | libc::ECHO | libc::ISIG),
        0,
        "canonical mode, echo and signals while the guest runs"
    );
    // The guest's shell answers with what was not typed so.
    guest.terminal.type_keys(b"echo seven-$((3+4))\r")?;
    guest.await_text("seven-7")?;
    guest.terminal.type_keys(b"\x01h")?;
    guest.await_text("Ctrl-A x ends the guest")?;
    guest.terminal.type_keys(b"\x01x")?;
    guest.ends_with(6)
}

fn signal(device: &Device, number: i32) -> Outcome {
    let mut guest = Guest::start(device, "guest.end=wait")?;
    guest.await_text("guest: end by wait")?;
    let pid = libc::pid_t::try_from(guest.child.id()).map_err(|_| Fail::new("its pid"))?;
    // SAFETY: Our own child, not reaped yet.
    unsafe { libc::kill(pid, number) };
    guest.ends_with(128 + number)
}

fn sigterm(device: &Device) -> Outcome {
    signal(device, libc::SIGTERM)
}

fn sighup(device: &Device) -> Outcome {
    signal(device, libc::SIGHUP)
}

fn sigint(device: &Device) -> Outcome {
    signal(device, libc::SIGINT)
}

/// Wrong input on a terminal: one line, status 2, and the terminal was never touched.
/// While the guest runs, each thread of the tool is an ordinary user's, can gain nothing, and has its system
/// calls filtered; the tool can be ended all the same.
fn gives_up_what_it_does_not_need(device: &Device) -> Outcome {
    let mut guest = Guest::start(device, "guest.end=wait")?;
    guest.await_text("guest: end by wait")?;
    let mut threads = 0;
    for thread in std::fs::read_dir(format!("/proc/{}/task", guest.child.id()))? {
        let status = std::fs::read_to_string(thread?.path().join("status"))?;
        let nobody = format!("{NOBODY}\t{NOBODY}\t{NOBODY}\t{NOBODY}");
        for (field, wanted) in [
            ("Uid", nobody.as_str()),
            ("Gid", nobody.as_str()),
            ("CapPrm", "0000000000000000"),
            ("CapEff", "0000000000000000"),
            ("NoNewPrivs", "1"),
            ("Seccomp", "2"),
        ] {
            let line = format!("{field}:\t{wanted}");
            check!(
                status.lines().any(|found| found == line),
                "a thread without the line {line:?}: {status}"
            );
        }
        threads += 1;
    }
    check!(
        threads >= 3,
        "the main thread, the console's and a CPU's are only {threads}"
    );
    guest.terminal.type_keys(b"\x01x")?;
    guest.ends_with(6)
}

fn wrong_input(device: &Device) -> Outcome {
    let mut terminal = Terminal::new()?;
    let before = terminal.mode()?;
    let mut child = tool(device)
        .args(["--initrd", "/nowhere"])
        .stdin(terminal.user_side()?)
        .stdout(terminal.user_side()?)
        .stderr(terminal.user_side()?)
        .spawn()?;
    let screen = terminal.read_until_idle(&mut child, PATIENCE)?;
    check_eq!(child.wait()?.code(), Some(2), "the exit status: {screen}");
    check_eq!(screen.trim_end().lines().count(), 1, "lines: {screen}");
    terminal::check_same(&before, &terminal.mode()?)
}

/// An ordinary user and a device that is root's alone.
fn no_permission(device: &Device) -> Outcome {
    let mode = std::fs::metadata(device.path())?.permissions().mode() & 0o7777;
    if mode & 0o006 != 0 {
        std::fs::set_permissions(device.path(), PermissionsExt::from_mode(mode & !0o007))?;
    }
    let output = tool(device)
        .uid(NOBODY)
        .gid(NOBODY)
        .stdin(Stdio::null())
        .output()?;
    std::fs::set_permissions(device.path(), PermissionsExt::from_mode(mode))?;
    let text = String::from_utf8_lossy(&output.stderr);
    check_eq!(output.status.code(), Some(2), "the exit status: {text}");
    check_eq!(text.lines().count(), 1, "lines: {text}");
    check!(
        text.contains(&device.path()) && text.contains("root"),
        "the line names neither the device nor who may help: {text}"
    );
    Ok(())
}

fn main() -> std::process::ExitCode {
    ktap::main(tests![
        poweroff,
        reboot,
        triple_fault,
        keys,
        sigterm,
        sighup,
        sigint,
        gives_up_what_it_does_not_need,
        wrong_input,
        no_permission,
    ])
}
