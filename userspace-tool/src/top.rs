// SPDX-License-Identifier: GPL-2.0

//! `rvisor top`: the machines on a screen that is made anew each second.

use std::collections::BTreeMap;
use std::io::{self, IsTerminal};
use std::ops::Range;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};
use std::{process, thread};

use ratatui::crossterm::event::{self, Event, KeyCode, KeyEventKind, KeyModifiers};
use ratatui::layout::{Constraint, Layout};
use ratatui::style::{Style, Stylize};
use ratatui::widgets::{Paragraph, Row, Table, TableState};
use ratatui::Frame;
use signal_hook::consts::SIGHUP;

use crate::console::Signals;
use crate::control::{Client, Request};
use crate::error::{failed, Error, Result};
use crate::outcome::Outcome;
use crate::ready::{self, PollFlags};
use crate::registry::{self, Name};
use crate::size;
use crate::stat::counters::{largest, Counts};
use crate::stat::{mib, Sample, VcpuSample};

/// How long a screen stands.
const PERIOD: Duration = Duration::from_secs(1);

/// What a machine did between two samples.
struct Rates<'a> {
    before: Option<&'a Sample>,
    now: &'a Sample,
    seconds: f64,
}

impl<'a> Rates<'a> {
    fn new(before: Option<&'a Sample>, now: &'a Sample) -> Self {
        // Another machine of the same name has begun anew.
        let before = before
            .filter(|before| before.status.pid == now.status.pid && before.clock_ns < now.clock_ns);
        let since = before.map_or(0, |before| before.clock_ns);
        Self {
            before,
            now,
            seconds: now.clock_ns.saturating_sub(since) as f64 / 1e9,
        }
    }

    /// How much a number grew in a second; 0 where there is nothing to compare with.
    fn rate(&self, of: impl Fn(&Sample) -> u64) -> f64 {
        self.before.map_or(0.0, |before| {
            of(self.now).saturating_sub(of(before)) as f64 / self.seconds
        })
    }

    /// The same of nanoseconds, in percent of a CPU.
    fn percent(&self, of: impl Fn(&Sample) -> u64) -> String {
        format!("{:.1}", self.rate(of) / 1e7)
    }

    /// What the threads of those of the virtual CPUs did: percent of a CPU on one, in the guest and waiting; exits.
    fn work(&self, cpus: &Range<usize>) -> [String; 4] {
        let sum = |of: fn(&VcpuSample) -> u64| {
            move |sample: &Sample| {
                let cpus = sample.vcpus.get(cpus.clone()).unwrap_or_default();
                cpus.iter().map(of).sum()
            }
        };
        [
            self.percent(sum(|vcpu| vcpu.times.run_ns)),
            self.percent(sum(|vcpu| vcpu.times.guest_ns)),
            self.percent(sum(|vcpu| vcpu.times.wait_ns)),
            format!("{:.0}", self.rate(sum(VcpuSample::exits))),
        ]
    }

    fn machine(&self) -> Row<'static> {
        let status = &self.now.status;
        let [_, guest, wait, exits] = self.work(&(0..self.now.vcpus.len()));
        Row::new([
            status.name.to_string(),
            status.state.clone(),
            status.cpus.to_string(),
            self.percent(|sample| sample.process.run_ns),
            guest,
            wait,
            exits,
            mib(self.now.resident),
            size::text(status.memory),
            self.devices("read_bytes", "written_bytes"),
            self.devices("received_bytes", "sent_bytes"),
        ])
    }

    /// Two counters of all devices, in KiB a second.
    fn devices(&self, first: &str, second: &str) -> String {
        let sum = |name: &str| {
            let of = |sample: &Sample| {
                let devices = sample.devices.values();
                devices.filter_map(|counts| counts.get(name)).sum()
            };
            self.rate(of) / 1024.0
        };
        format!("{:.0}/{:.0}", sum(first), sum(second))
    }

    fn vcpus(&self) -> Vec<Row<'static>> {
        let row = |cpu| {
            let [run, guest, wait, exits] = self.work(&(cpu..cpu + 1));
            Row::new([format!("CPU {cpu}"), run, guest, wait, exits])
        };
        (0..self.now.vcpus.len()).map(row).collect()
    }

    /// Exits a second by their reason, of all CPUs, the most frequent first.
    fn reasons(&self) -> Vec<Row<'static>> {
        let all = self.now.vcpus.iter().flat_map(|vcpu| vcpu.exits.keys());
        let of = |reason: &String| {
            let count = |sample: &Sample| {
                let vcpus = sample.vcpus.iter();
                vcpus.filter_map(|vcpu| vcpu.exits.get(reason)).sum()
            };
            (reason.clone(), self.rate(count) as u64)
        };
        let grown: Counts = all.map(of).collect();
        largest(&grown)
            .iter()
            .map(|(name, count)| Row::new([(*name).to_owned(), count.to_string()]))
            .collect()
    }
}

/// All machines, now and a second ago.
#[derive(Default)]
struct Screen {
    before: BTreeMap<Name, Sample>,
    now: BTreeMap<Name, Sample>,
    selected: TableState,
}

impl Screen {
    fn look(&mut self) -> Result<()> {
        self.before = std::mem::take(&mut self.now);
        for name in registry::names()? {
            let sample = Client::connect(&name).and_then(|mut machine| {
                machine.send(&[&Request::Stats {}])?;
                machine.receive(PERIOD)
            });
            // One that ends right now, or is silent, is left out.
            if let Ok(Some(sample)) = sample {
                self.now.insert(name, sample);
            }
        }
        let last = self.now.len().checked_sub(1);
        self.selected
            .select(last.map(|last| self.selected.selected().unwrap_or(0).min(last)));
        Ok(())
    }

    fn draw(&mut self, frame: &mut Frame<'_>) {
        let rates: Vec<_> = self
            .now
            .iter()
            .map(|(name, now)| Rates::new(self.before.get(name), now))
            .collect();
        // The heading, and one line to spare.
        let lines = u16::try_from(rates.len() + 2).unwrap_or(u16::MAX);
        let [title, machines, details] = Layout::vertical([
            Constraint::Length(1),
            Constraint::Max(lines),
            Constraint::Fill(1),
        ])
        .areas(frame.area());
        let [vcpus, reasons] =
            Layout::horizontal([Constraint::Length(44), Constraint::Fill(1)]).areas(details);
        let text = format!(
            "rvisor top: {} machine{}; up and down choose, q ends",
            rates.len(),
            if rates.len() == 1 { "" } else { "s" }
        );
        frame.render_widget(Paragraph::new(text).bold(), title);
        let widths = [16, 8, 4, 6, 6, 6, 9, 9, 9, 11, 11].map(Constraint::Length);
        let head = "NAME,STATE,CPUS,%CPU,%GUEST,%WAIT,EXITS/S,RESIDENT,MEMORY,DISK KiB/s,NET KiB/s";
        let table = table_of(rates.iter().map(Rates::machine), &widths, head);
        frame.render_stateful_widget(
            table.row_highlight_style(Style::new().reversed()),
            machines,
            &mut self.selected,
        );
        if let Some(chosen) = self.selected.selected().and_then(|place| rates.get(place)) {
            let widths = [8, 7, 7, 7, 9].map(Constraint::Length);
            let table = table_of(chosen.vcpus(), &widths, ",%CPU,%GUEST,%WAIT,EXITS/S");
            frame.render_widget(table, vcpus);
            let widths = [24, 10].map(Constraint::Length);
            let table = table_of(chosen.reasons(), &widths, "EXIT,A SECOND");
            frame.render_widget(table, reasons);
        }
    }
}

/// A table of columns that wide, with the words of `head` above them.
fn table_of<'a>(
    rows: impl IntoIterator<Item = Row<'a>>,
    widths: &[Constraint],
    head: &'a str,
) -> Table<'a> {
    Table::new(rows, widths).header(Row::new(head.split(',')).underlined())
}

/// Shows the machines until the user has seen enough, or a signal ends it. Returns the exit status.
///
/// # Errors
///
/// [`Error::Input`] where standard output is no terminal; [`Error::Call`] where the terminal fails.
pub fn run() -> Result<u8> {
    if !io::stdout().is_terminal() {
        return Err(Error::input(
            "'rvisor top' needs a terminal",
            "use 'rvisor stat NAME --json' in a script",
        ));
    }
    let what = "using the terminal";
    let mut screen = Screen::default();
    screen.look()?;
    let signals = Signals::catch()?;
    let mut terminal = ratatui::try_init().map_err(failed(what))?;
    let mut next = Instant::now() + PERIOD;
    let watch = thread::Builder::new().spawn(move || end_by_signal(&signals));
    let result = watch
        .map_err(failed("starting a thread"))
        .and_then(|_| loop {
            let drawn = terminal.draw(|frame| screen.draw(frame));
            drawn.map_err(failed(what))?;
            let left = next.saturating_duration_since(Instant::now());
            if !event::poll(left).map_err(failed(what))? {
                screen.look()?;
                next = Instant::now() + PERIOD;
                continue;
            }
            let Event::Key(key) = event::read().map_err(failed(what))? else {
                continue;
            };
            match key.code {
                _ if key.kind == KeyEventKind::Release => {}
                KeyCode::Char('q') | KeyCode::Esc => return Ok(0),
                KeyCode::Char('c') if key.modifiers.contains(KeyModifiers::CONTROL) => {
                    return Ok(0)
                }
                KeyCode::Up => screen.selected.select_previous(),
                KeyCode::Down => screen.selected.select_next(),
                _ => {}
            }
        });
    // Where the terminal has gone, there is nothing to restore.
    let _ = ratatui::try_restore();
    result
}

/// Ends this process by the first signal, or where the terminal goes away: `event::poll` never returns then.
fn end_by_signal(signals: &Signals) {
    let stdout = io::stdout();
    // That a terminal has gone is told unasked.
    let files: [(&dyn AsFd, _); 2] = [(signals, PollFlags::IN), (&stdout, PollFlags::empty())];
    // Where it fails, nothing else would see the signals.
    let _ = ready::wait(&files, None);
    let signal = signals.take().unwrap_or(SIGHUP as u8);
    // Nothing is drawn any more.
    let _stdout = stdout.lock();
    let _ = ratatui::try_restore();
    process::exit(Outcome::Signal(signal).status().into());
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stat;
    use ratatui::backend::TestBackend;
    use ratatui::Terminal;

    #[test]
    fn the_screen_shows_what_grew_in_a_second() {
        let before = stat::tests::example();
        let mut now = before.clone();
        now.clock_ns += 2_000_000_000;
        now.process.run_ns += 1_000_000_000;
        now.vcpus[0].times.guest_ns += 500_000_000;
        now.vcpus[0].counters.insert("exits".to_owned(), 907 + 300);
        now.vcpus[0].exits.insert("HLT".to_owned(), 7 + 300);
        for (device, counter, grown) in [
            ("disk a.img", "read_bytes", 8192),
            ("network card 0", "sent_bytes", 6144),
        ] {
            let counts = now.devices.get_mut(device).expect("it is there");
            *counts.get_mut(counter).expect("it counts") += grown;
        }
        let name = now.status.name.clone();
        let mut screen = Screen {
            before: [(name.clone(), before)].into(),
            now: [(name, now)].into(),
            selected: TableState::new().with_selected(0),
        };
        let mut terminal = Terminal::new(TestBackend::new(120, 8)).expect("a screen for the test");
        terminal
            .draw(|frame| screen.draw(frame))
            .expect("it takes it");
        let shown = terminal.backend().to_string();
        let line = |word: &str| {
            shown
                .lines()
                .find(|line| line.contains(word))
                .unwrap_or_default()
                .to_owned()
        };
        for word in [
            "web", "running", "50.0", "25.0", "150", "10 MiB", "256 MiB", "4/0", "0/3",
        ] {
            assert!(line("web").contains(word), "{word:?} is not in:\n{shown}");
        }
        assert!(line("HLT").contains("150"), "{shown}");
        assert!(line("CPU 0").contains("25.0"), "{shown}");
    }

    #[test]
    fn another_machine_of_the_same_name_begins_anew() {
        let now = stat::tests::example();
        let mut before = now.clone();
        before.status.pid += 1;
        before.clock_ns -= 1;
        assert_eq!(Rates::new(Some(&before), &now).rate(|_| 7), 0.0);
        assert_eq!(Rates::new(None, &now).percent(|_| 7), "0.0");
    }
}
