// SPDX-License-Identifier: GPL-2.0
//! `rvisor console`: a terminal that comes and goes.

use super::{patience, Machines};
use rvisor_tests::terminal::{self, Terminal};
use rvisor_tests::{check_eq, Device, Fail, Outcome};
use std::process::Child;

/// A terminal on a machine's console.
struct Console {
    terminal: Terminal,
    before: libc::termios,
    child: Child,
}

impl Console {
    fn new(machines: &Machines, name: &str) -> Result<Self, Fail> {
        let terminal = Terminal::new()?;
        let child = machines
            .tool(&["console", name])
            .stdin(terminal.user_side()?)
            .stdout(terminal.user_side()?)
            .stderr(terminal.user_side()?)
            .spawn()?;
        Ok(Self {
            before: terminal.mode()?,
            terminal,
            child,
        })
    }

    fn await_text(&mut self, text: &str) -> Outcome {
        self.terminal.await_text(text, patience())
    }

    /// It ends with that status, and the terminal is as it was.
    fn ends_with(mut self, wanted: i32) -> Result<String, Fail> {
        let screen = self.terminal.read_until_idle(&mut self.child, patience())?;
        check_eq!(
            self.child.wait()?.code(),
            Some(wanted),
            "status; screen: {screen}"
        );
        terminal::check_same(&self.before, &self.terminal.mode()?)?;
        Ok(screen)
    }
}

/// It shows what was printed before, takes keys, goes by Ctrl-A d and comes back; the machine's end is its end.
pub(super) fn console(device: &Device) -> Outcome {
    let machines = Machines::new(device)?;
    machines.start("one", "shell")?;
    machines.await_console("one", "guest: end by shell")?;
    let mut console = Console::new(&machines, "one")?;
    console.await_text("guest: userspace reached")?;
    console.await_text("guest: end by shell")?;
    console.terminal.type_keys(b"echo seven-$((3+4))\r")?;
    console.await_text("seven-7")?;
    console.terminal.type_keys(b"\x01h")?;
    console.await_text("Ctrl-A d leaves")?;
    console.terminal.type_keys(b"\x01d")?;
    console.ends_with(0)?;
    let mut again = Console::new(&machines, "one")?;
    again.await_text("seven-7")?;
    again.terminal.type_keys(b"poweroff -f\r")?;
    let screen = again.ends_with(0)?;
    rvisor_tests::check!(screen.contains("one: the guest powered off"), "{screen}");
    Ok(())
}

/// Two terminals see the same, each may type, and Ctrl-A x ends the machine for both.
pub(super) fn two_at_once(device: &Device) -> Outcome {
    let machines = Machines::new(device)?;
    machines.start("one", "shell")?;
    machines.await_console("one", "guest: end by shell")?;
    let mut consoles = [
        Console::new(&machines, "one")?,
        Console::new(&machines, "one")?,
    ];
    for console in &mut consoles {
        console.await_text("guest: end by shell")?;
    }
    for typing in [0, 1] {
        consoles[typing]
            .terminal
            .type_keys(format!("echo from-$(({typing}+40))\r").as_bytes())?;
        for console in &mut consoles {
            console.await_text(&format!("from-{}", typing + 40))?;
        }
    }
    consoles[0].terminal.type_keys(b"\x01x")?;
    for console in consoles {
        console.ends_with(8)?;
    }
    Ok(())
}
