// SPDX-License-Identifier: GPL-2.0

//! The CPU time of a thread or of this process, from /proc (Documentation/filesystems/proc.rst).

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Mutex;

use serde::{Deserialize, Serialize};

use crate::devices::lock;

/// Nanoseconds in one of the ticks that /proc counts in.
const TICK: u64 = 10_000_000;
/// Where fields stand in a `stat` file behind the name: those of proc(5) less 3.
const USER_TIME: usize = 11;
const SYSTEM_TIME: usize = 12;
const GUEST_TIME: usize = 40;

/// CPU times in nanoseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Times {
    /// On a CPU of the host's.
    pub run_ns: u64,
    /// In the guest, of that.
    pub guest_ns: u64,
    /// Ready to run while others had the CPU; 0 where the kernel does not count it.
    pub wait_ns: u64,
}

/// What the times are read from. What can't be opened counts nothing.
#[derive(Debug)]
pub struct Meter {
    stat: Option<File>,
    schedule: Option<File>,
    /// What was read last, which stays when the thread has gone.
    last: Mutex<Times>,
}

impl Meter {
    /// Of the thread that calls.
    #[must_use]
    pub fn of_this_thread() -> Self {
        Self {
            stat: File::open("/proc/thread-self/stat").ok(),
            schedule: File::open("/proc/thread-self/schedstat").ok(),
            last: Mutex::default(),
        }
    }

    /// Of all threads of this process.
    #[must_use]
    pub fn of_process() -> Self {
        Self {
            stat: File::open("/proc/self/stat").ok(),
            // That file is the first thread's alone.
            schedule: None,
            last: Mutex::default(),
        }
    }

    /// The times until now.
    #[must_use]
    pub fn read(&self) -> Times {
        let mut last = lock(&self.last);
        if let Some(stat) = self.stat.as_ref().and_then(read) {
            let schedule = self.schedule.as_ref().and_then(read).unwrap_or_default();
            *last = times(&stat, &schedule);
        }
        *last
    }
}

fn times(stat: &str, schedule: &str) -> Times {
    // The name, in parentheses, may hold whatever it likes.
    let behind = stat.rsplit_once(')').map_or("", |(_, behind)| behind);
    let ticks: Vec<u64> = behind
        .split_whitespace()
        .map(|word| word.parse().unwrap_or(0))
        .collect();
    let tick = |place: usize| ticks.get(place).copied().unwrap_or(0).saturating_mul(TICK);
    let mut precise = schedule
        .split_whitespace()
        .map_while(|word| word.parse().ok());
    // The kernel counts a guest's time as its thread's in user mode too.
    let counted = tick(USER_TIME).saturating_add(tick(SYSTEM_TIME));
    let run_ns = precise.next().unwrap_or(counted);
    Times {
        run_ns,
        guest_ns: tick(GUEST_TIME).min(run_ns),
        wait_ns: precise.next().unwrap_or(0),
    }
}

/// A file of the kernel's from its beginning.
pub(super) fn read(file: &File) -> Option<String> {
    let mut bytes = [0; 1024];
    let count = file.read_at(&mut bytes, 0).ok()?;
    Some(String::from_utf8_lossy(&bytes[..count]).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_found_behind_any_name() {
        let mut fields = vec!["0"; 49];
        (fields[USER_TIME], fields[SYSTEM_TIME], fields[GUEST_TIME]) = ("30", "12", "25");
        fields[0] = "R";
        let stat = format!("7 (a) 9 (b) {}\n", fields.join(" "));
        let expected = Times {
            run_ns: 420_000_000,
            guest_ns: 250_000_000,
            wait_ns: 0,
        };
        assert_eq!(times(&stat, ""), expected);
        let precise = Times {
            run_ns: 421_000_007,
            wait_ns: 5,
            ..expected
        };
        assert_eq!(times(&stat, "421000007 5 9\n"), precise);
        assert_eq!(times("", ""), Times::default());
        assert_eq!(times("7 (a", "x"), Times::default());
    }

    #[test]
    fn a_thread_that_works_has_run() {
        let meter = Meter::of_this_thread();
        let before = meter.read().run_ns;
        let mut sum = 0_u64;
        while meter.read().run_ns < before + 2 * TICK {
            sum = std::hint::black_box(sum.wrapping_add(1));
        }
        assert!(Meter::of_process().read().run_ns > 0);
    }

    #[test]
    fn the_times_of_a_thread_outlive_it() {
        let thread = std::thread::spawn(|| {
            let meter = Meter::of_this_thread();
            let mut sum = 0_u64;
            while meter.read().run_ns < TICK {
                sum = std::hint::black_box(sum.wrapping_add(1));
            }
            meter
        });
        let meter = thread.join().expect("it does not panic");
        assert!(meter.read().run_ns >= TICK);
    }
}
