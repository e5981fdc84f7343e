// SPDX-License-Identifier: GPL-2.0

//! What a machine may take of the host: the options, and what they are as files of a cgroup
//! (Documentation/admin-guide/cgroup-v2.rst) and as a set of CPUs.

use std::fs;
use std::os::linux::fs::MetadataExt;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use clap::Args;
use rustix::fs::{major, minor};
use rustix::io::Errno;
use rustix::thread::{sched_getaffinity, sched_setaffinity, CpuSet};

use crate::error::{failed, Error, Result};
use crate::size;

/// The share of CPU time that a cgroup has which asks for none (`cpu.weight`).
const DEFAULT_SHARE: u32 = 100;
/// The period of `cpu.max`, in microseconds. A machine at its limit can have what is left of one period at the
/// start of a stretch of time and a whole one at its end: short ones keep that small.
const PERIOD: u64 = 20_000;
/// The period where that one would leave less than [`LEAST_QUOTA`] of it.
const LONG_PERIOD: u64 = 100_000;
/// The least time in a period that the kernel takes, in microseconds.
const LEAST_QUOTA: u64 = 1_000;
/// The most that makes sense to anyone: a thousand CPUs.
const MOST_PERCENT: u32 = 100_000;

/// A file of a cgroup, `CONTROLLER.NAME`, what is written there, and the option that wants it.
pub type Setting = (&'static str, String, &'static str);

/// The options that share out the host. Each one that is given but `--pin` needs a cgroup.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "Sharing")]
pub struct Sharing {
    /// The machine's share of CPU time where others want it too, 1 to 10000 (cpu.weight); a machine with 300
    /// gets three times what one with 100 gets, which is what a cgroup without this has
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub cpu_share: Option<u32>,

    /// The most CPU time that the machine gets, all its CPUs and devices together; 100% is one CPU of the
    /// host's, 150% one and a half
    #[arg(long, value_name = "PERCENT", value_parser = percent)]
    pub cpu_max: Option<u32>,

    /// The host's CPUs that the machine runs on, such as 0-3,6
    #[arg(long, value_name = "CPUS")]
    pub pin: Option<Cpus>,

    /// The most memory that the machine gets, the tool's own and the page tables counted in; where it needs more,
    /// it alone is ended
    #[arg(long, value_name = "SIZE", value_parser = size::parse)]
    pub memory_max: Option<u64>,

    /// The most that the machine reads and writes a second on the disk DEV, or the disk that the file DEV lies on:
    /// DEV:rbps=SIZE,wbps=SIZE,riops=N,wiops=N, each may be left out; for more disks, again
    #[arg(long, value_name = "DEV:LIMITS")]
    pub io_max: Vec<IoMax>,
}

impl Sharing {
    /// What is written into the files of the machine's cgroup; nothing where it needs none.
    ///
    /// # Errors
    ///
    /// [`Error::Input`] where `--io-max` names no disk.
    pub fn settings(&self) -> Result<Vec<Setting>> {
        let mut settings = Vec::new();
        if self.cpu_share.is_some() || self.cpu_max.is_some() {
            let share = self.cpu_share.unwrap_or(DEFAULT_SHARE);
            settings.push(("cpu.weight", share.to_string(), "--cpu-share"));
        }
        if let Some(percent) = self.cpu_max {
            settings.push(("cpu.max", quota(percent), "--cpu-max"));
        }
        if let Some(bytes) = self.memory_max {
            // Its helpers die with it.
            settings.push(("memory.oom.group", "1".to_owned(), "--memory-max"));
            settings.push(("memory.max", bytes.to_string(), "--memory-max"));
        }
        for limit in &self.io_max {
            let line = format!("{} {}", disk(&limit.path)?, limit.limits);
            settings.push(("io.max", line, "--io-max"));
        }
        Ok(settings)
    }

    /// Holds this thread, and all that it starts from now on, to the CPUs of `--pin`.
    ///
    /// # Errors
    ///
    /// [`Error::Input`] where this process can't have one of them.
    pub fn pin(&self) -> Result<()> {
        let Some(Cpus { set, text }) = &self.pin else {
            return Ok(());
        };
        let what = "choosing CPUs";
        let missing = match sched_setaffinity(None, set) {
            // The kernel leaves out what there is not, and refuses where nothing is left.
            Ok(()) => {
                let got = sched_getaffinity(None).map_err(failed(what))?;
                (0..CpuSet::MAX_CPU).find(|cpu| set.is_set(*cpu) && !got.is_set(*cpu))
            }
            Err(Errno::INVAL) => (0..CpuSet::MAX_CPU).find(|cpu| set.is_set(*cpu)),
            Err(error) => return Err(Error::call(what, error)),
        };
        let Some(cpu) = missing else {
            return Ok(());
        };
        let online = fs::read_to_string("/sys/devices/system/cpu/online").unwrap_or_default();
        let online = online.trim();
        Err(Error::input(
            format!("--pin {text}: this process can't have CPU {cpu}"),
            format!("give CPUs that are online ({online}) and allowed here"),
        ))
    }
}

/// Reads `50%`: a part of the time of one CPU, or of more.
fn percent(text: &str) -> std::result::Result<u32, String> {
    text.strip_suffix('%')
        .and_then(|number| number.parse().ok())
        .filter(|percent| (1..=MOST_PERCENT).contains(percent))
        .ok_or_else(|| {
            format!("it is a whole number from 1 to {MOST_PERCENT} with % behind it, such as 50%")
        })
}

/// That as the value of `cpu.max`: so much time in each period, in microseconds.
fn quota(percent: u32) -> String {
    let part = |period: u64| period * u64::from(percent) / 100;
    let period = match part(PERIOD) {
        LEAST_QUOTA.. => PERIOD,
        _ => LONG_PERIOD,
    };
    format!("{} {period}", part(period))
}

/// CPUs of the host's.
#[derive(Clone, Debug)]
pub struct Cpus {
    set: CpuSet,
    text: String,
}

impl FromStr for Cpus {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let number = |word: &str| word.parse().ok().filter(|cpu| *cpu < CpuSet::MAX_CPU);
        let mut set = CpuSet::new();
        for part in text.split(',') {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            match (number(first), number(last)) {
                (Some(first), Some(last)) if first <= last => {
                    (first..=last).for_each(|cpu| set.set(cpu))
                }
                _ => {
                    return Err(format!(
                    "{part:?} is no CPU below {} and no range of them; it is a list such as 0-3,6",
                    CpuSet::MAX_CPU
                ))
                }
            }
        }
        Ok(Self {
            set,
            text: text.to_owned(),
        })
    }
}

/// What a machine may do on one disk in a second.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IoMax {
    path: PathBuf,
    /// As the kernel reads them.
    limits: String,
}

impl FromStr for IoMax {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let wrong = || "it is DEV:LIMITS, such as /dev/sda:rbps=10M,wiops=500".to_owned();
        let (path, limits) = text.rsplit_once(':').ok_or_else(wrong)?;
        let limits = limits.split(',').map(|limit| {
            let (name, value) = limit.split_once('=').ok_or_else(wrong)?;
            let value = match name {
                "rbps" | "wbps" => size::parse(value)?,
                "riops" | "wiops" => value
                    .parse()
                    .map_err(|_| format!("{value:?} is no number"))?,
                _ => return Err(format!("{name:?} is none of rbps, wbps, riops, wiops")),
            };
            // The kernel reads 0 as a mistake.
            if value == 0 {
                return Err(format!("{name}=0 would stop the machine for good"));
            }
            Ok(format!("{name}={value}"))
        });
        let limits = limits.collect::<std::result::Result<Vec<_>, String>>()?;
        Ok(Self {
            path: path.into(),
            limits: limits.join(" "),
        })
    }
}

/// The numbers of the whole disk that `path` is, is a part of, or lies on: `MAJOR:MINOR`.
fn disk(path: &Path) -> Result<String> {
    let name = path.display();
    let next = "give a disk such as /dev/sda, or a file on one";
    let metadata =
        fs::metadata(path).map_err(|e| Error::input(format!("--io-max {name}: {e}"), next))?;
    let number = if metadata.file_type().is_block_device() {
        metadata.st_rdev()
    } else {
        metadata.st_dev()
    };
    let (major, minor) = (major(number), minor(number));
    let sys = PathBuf::from(format!("/sys/dev/block/{major}:{minor}"));
    let whole = match sys.join("partition").exists() {
        true => "../dev",
        false => "dev",
    };
    let numbers = fs::read_to_string(sys.join(whole));
    let numbers = numbers.map(|text| text.trim().to_owned());
    numbers.map_err(|_| Error::input(format!("--io-max {name} lies on no disk"), next))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percents_become_time_in_a_period() {
        for (text, quota) in [
            ("1%", "1000 100000"),
            ("4%", "4000 100000"),
            ("5%", "1000 20000"),
            ("50%", "10000 20000"),
            ("250%", "50000 20000"),
            ("100000%", "20000000 20000"),
        ] {
            assert_eq!(percent(text).map(super::quota), Ok(quota.to_owned()));
        }
        for text in [
            "",
            "%",
            "0%",
            "50",
            "-5%",
            "1.5%",
            "100001%",
            "50%%",
            "99999999999%",
        ] {
            assert!(percent(text).is_err(), "{text:?}");
        }
    }

    #[test]
    fn cpus_are_numbers_and_ranges() {
        let list = |text: &str| {
            let cpus = text.parse::<Cpus>()?;
            Ok((0..CpuSet::MAX_CPU)
                .filter(|cpu| cpus.set.is_set(*cpu))
                .collect())
        };
        assert_eq!(list("0"), Ok::<Vec<usize>, String>(vec![0]));
        assert_eq!(list("0-2,6,1"), Ok(vec![0, 1, 2, 6]));
        assert_eq!(list("1023"), Ok(vec![1023]));
        for text in [
            "",
            ",",
            "0,",
            "3-1",
            "1024",
            "0-1024",
            "-1",
            "a",
            "0-",
            "0-99999999999999999999",
        ] {
            assert!(list(text).is_err(), "{text:?}");
        }
    }

    #[test]
    fn limits_of_disks_are_what_the_kernel_reads() {
        let parsed = "/dev/a:b:rbps=1M,wiops=500"
            .parse::<IoMax>()
            .expect("it is right");
        assert_eq!(parsed.path, Path::new("/dev/a:b"));
        assert_eq!(parsed.limits, "rbps=1048576 wiops=500");
        for text in [
            "",
            "/dev/a",
            "/dev/a:",
            "/dev/a:rbps",
            "/dev/a:rbps=x",
            "/dev/a:rbps=0",
            "/dev/a:bps=1",
            "/dev/a:riops=1M",
        ] {
            assert!(text.parse::<IoMax>().is_err(), "{text:?}");
        }
    }

    #[test]
    fn what_lies_on_no_disk_is_refused() {
        for path in ["/nowhere", "/dev/null", "/proc/self"] {
            assert!(disk(Path::new(path)).is_err(), "{path}");
        }
    }

    #[test]
    fn only_what_is_asked_for_needs_a_cgroup() {
        let mut sharing = Sharing {
            pin: "0".parse().ok(),
            ..Default::default()
        };
        let files = |sharing: &Sharing| {
            let settings = sharing.settings().expect("it names no disk");
            let files: Vec<_> = settings.iter().map(|(file, ..)| *file).collect();
            files.join(" ")
        };
        assert_eq!(files(&sharing), "");
        sharing.cpu_max = Some(50);
        assert_eq!(files(&sharing), "cpu.weight cpu.max");
        sharing.cpu_max = None;
        sharing.memory_max = Some(1);
        assert_eq!(files(&sharing), "memory.oom.group memory.max");
    }

    #[test]
    fn a_thread_keeps_to_the_cpu_that_it_is_held_to() {
        let kept = std::thread::spawn(|| {
            let allowed = sched_getaffinity(None).expect("the kernel tells");
            let last = (0..CpuSet::MAX_CPU)
                .rfind(|cpu| allowed.is_set(*cpu))
                .expect("it has one");
            let pin = last.to_string().parse().ok();
            Sharing {
                pin,
                ..Default::default()
            }
            .pin()
            .expect("it is allowed");
            let now = sched_getaffinity(None).expect("the kernel tells");
            (now.count(), now.is_set(last))
        });
        assert_eq!(kept.join().expect("it does not panic"), (1, true));
    }

    #[test]
    fn a_cpu_that_is_not_there_is_named() {
        // In a thread of its own: the others keep their CPUs.
        let result = std::thread::spawn(|| {
            let pin = "0-1023".parse().ok();
            Sharing {
                pin,
                ..Default::default()
            }
            .pin()
            .map_err(|e| e.to_string())
        });
        let text = result
            .join()
            .expect("it does not panic")
            .expect_err("no host has them all");
        assert!(
            text.contains("--pin 0-1023") && text.contains("CPU "),
            "{text}"
        );
    }
}
