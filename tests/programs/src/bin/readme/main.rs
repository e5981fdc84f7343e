// SPDX-License-Identifier: GPL-2.0
//! README shows what is: each command of its sessions runs here, in their order, each on a terminal, and what stands
//! there then is compared with what README shows. A session is an indented block that begins with the prompt `# `.
//!
//! In what is shown, `...` is any text or any lines, numbers stand for all numbers, a line `~ # WORDS` is typed to a
//! guest, and keys are in brackets. Prints KTAP: a session is a test.

mod screen;

use rvisor_tests::host::QuietLog;
use rvisor_tests::terminal::Terminal;
use rvisor_tests::{Fail, Outcome};
use std::process::{Child, Command, ExitCode};
use std::time::{Duration, Instant};

/// The machine's time that a command may take to its end, or to what is typed next.
const PATIENCE: Duration = Duration::from_secs(20);
/// The guest's prompt.
const GUEST: &str = "~ # ";
/// Keys by README's words for them.
const KEYS: [(&str, &str); 3] = [("[Ctrl-A d]", "\x01d"), ("[Ctrl-C]", "\x03"), ("[q]", "q")];

/// A command, and what README shows behind it.
struct Step {
    command: String,
    shown: Vec<String>,
}

/// An indented block with commands, named by the section that it is in.
struct Session {
    name: String,
    steps: Vec<Step>,
}

/// What is typed once the screen is as `shown`.
struct Keys {
    shown: Vec<String>,
    typed: String,
}

/// README's sessions.
fn sessions(text: &str) -> Vec<Session> {
    let mut sessions: Vec<Session> = Vec::new();
    let (mut section, mut number, mut inside) = (String::new(), 0, false);
    for line in text.lines() {
        if let Some(title) = line.strip_prefix("## ") {
            section = title
                .to_lowercase()
                .replace(|c: char| !c.is_alphanumeric(), "_");
            number = 0;
        }
        let Some(line) = line.strip_prefix("    ") else {
            inside &= line.is_empty();
            continue;
        };
        if !inside && line.starts_with("# ") {
            number += 1;
            inside = true;
            sessions.push(Session {
                name: format!("{section}_{number}"),
                steps: Vec::new(),
            });
        }
        if let (true, Some(session)) = (inside, sessions.last_mut()) {
            session.add(line);
        }
    }
    sessions
}

impl Session {
    fn add(&mut self, line: &str) {
        match (line.strip_prefix("# "), self.steps.last_mut()) {
            (Some(command), _) => self.steps.push(Step {
                command: command.to_owned(),
                shown: Vec::new(),
            }),
            (None, Some(step)) if step.shown.is_empty() && step.command.ends_with('\\') => {
                step.command.push('\n');
                step.command.push_str(line);
            }
            (None, Some(step)) => step.shown.push(line.trim_end().to_owned()),
            (None, None) => {}
        }
    }
}

impl Step {
    /// What is typed while the command runs, and what is on the screen at its end.
    fn script(&self) -> (Vec<Keys>, Vec<String>) {
        let (mut script, mut before) = (Vec::new(), Vec::new());
        for line in &self.shown {
            let key = KEYS.iter().find_map(|(word, typed)| {
                let (start, end) = line.split_once(word)?;
                Some((start, (*typed).to_owned(), format!("{start}{end}")))
            });
            let typed = || {
                let words = line.strip_prefix(GUEST)?;
                Some((GUEST, format!("{words}\r"), line.clone()))
            };
            let Some((start, typed, rest)) = key.or_else(typed) else {
                before.push(line.clone());
                continue;
            };
            let shown = [before.as_slice(), &[start.trim_end().to_owned()]].concat();
            script.push(Keys { shown, typed });
            before.push(rest);
        }
        (script, before)
    }

    /// Runs the command as its user would.
    fn run(&self) -> Outcome {
        // The kernel reports with a stack what it ends, which the test host takes for a complaint.
        let quiet = self.command.contains("--memory-max").then(QuietLog::new);
        let _quiet = quiet.transpose()?;
        let mut terminal = Terminal::new()?;
        terminal.resize(40, 132)?;
        let mut shell = Command::new("/bin/setsid");
        shell
            .args(["-c", "sh", "-c", &self.command])
            .env("TERM", "linux")
            .current_dir("/root");
        let side = || terminal.user_side();
        let mut child = shell
            .stdin(side()?)
            .stdout(side()?)
            .stderr(side()?)
            .spawn()?;
        let result = self.converse(&mut terminal, &mut child);
        let _ = child.kill();
        let _ = child.wait();
        result
    }

    fn converse(&self, terminal: &mut Terminal, child: &mut Child) -> Outcome {
        let (script, last) = self.script();
        for Keys { shown, typed } in script {
            self.wait(terminal, child, &shown, false)?;
            terminal.type_keys(typed.as_bytes())?;
        }
        self.wait(terminal, child, &last, true)
    }

    /// Waits until the screen is as `shown`, and the command has ended where this is the `last` of it.
    fn wait(
        &self,
        terminal: &mut Terminal,
        child: &mut Child,
        shown: &[String],
        last: bool,
    ) -> Outcome {
        let end = Instant::now() + PATIENCE;
        loop {
            // Asked before the look, so that all that it wrote is seen.
            let ended = child.try_wait()?.is_some();
            let (written, more) = terminal.read()?;
            let ended = ended && !more;
            // Ctrl-C shows where the cursor happens to be.
            let found = screen::lines(&written.replace("^C", ""));
            if (ended || !last) && screen::is(&found, shown) {
                return Ok(());
            }
            if ended || Instant::now() > end {
                return Err(self.differs(&found, shown));
            }
        }
    }

    /// The first line that is not as README shows it; the screen goes to the log.
    fn differs(&self, found: &[String], shown: &[String]) -> Fail {
        println!("# {} gives:", self.command.replace('\n', " "));
        found.iter().for_each(|line| println!("#     {line}"));
        let any = ["...".to_owned()];
        let fits = |count: &usize| screen::is(found, &[&shown[..*count], &any].concat());
        let fitting = (0..=shown.len()).rev().find(fits).unwrap_or(0);
        let line = shown.get(fitting).map_or("the end", String::as_str);
        Fail::new(format!("after {:?} there is no {line:?}", self.command))
    }
}

fn main() -> ExitCode {
    let file = std::env::args().next_back().unwrap_or_default();
    let text = std::fs::read_to_string(&file).unwrap_or_default();
    let sessions = sessions(&text);
    println!("KTAP version 1\n1..{}", sessions.len().max(1));
    if sessions.is_empty() {
        println!("not ok 1 sessions # {file} has none");
    }
    for (number, session) in (1..).zip(sessions) {
        match session.steps.iter().try_for_each(Step::run) {
            Ok(()) => println!("ok {number} {}", session.name),
            Err(Fail::Failed(why)) => println!("not ok {number} {} # {why}", session.name),
            Err(Fail::Skipped(why)) => println!("ok {number} {} # SKIP {why}", session.name),
        }
    }
    ExitCode::SUCCESS
}
