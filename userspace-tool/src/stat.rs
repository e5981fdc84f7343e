// SPDX-License-Identifier: GPL-2.0

//! What a machine has done so far: its counters, times and memory, for `rvisor stat`, `rvisor top` and
//! `rvisor run --metrics`.

pub mod counters;
mod meter;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::File;
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt;
use std::time::{Duration, UNIX_EPOCH};

use rustix::thread::nanosleep;
use rustix::time::{clock_gettime, ClockId, Timespec};
use serde::{Deserialize, Serialize};

use crate::cgroup;
use crate::client;
use crate::control::{Client, Request};
use crate::error::{say, Error, Result};
use crate::layout;
use crate::machine::{Machine, Status};
use crate::registry::Name;
use crate::size;
use counters::{Counters, Counts};
pub use meter::{Meter, Times};

/// How often `--metrics` writes.
const PERIOD: Timespec = Timespec {
    tv_sec: 1,
    tv_nsec: 0,
};

/// A machine at one moment. All numbers but those of memory only grow.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Sample {
    /// What `status` says of it.
    #[serde(flatten)]
    pub status: Status,
    /// When this was, in milliseconds since the beginning of 1970.
    pub time_ms: u64,
    /// The same by the host's monotonic clock, in nanoseconds.
    pub clock_ns: u64,
    /// Each CPU.
    pub vcpus: Vec<VcpuSample>,
    /// The VM's own counters, by KVM's names.
    pub vm: Counts,
    /// CPU time of the whole process: CPUs, devices and the rest.
    pub process: Times,
    /// Memory of the process that is in the host's memory, in bytes.
    pub resident: u64,
    /// What the machine's cgroup has of memory, page tables included; none without `--memory-max`.
    pub charged: Option<u64>,
    /// The counters of each disk and network card, by the device's name: of a disk `requests`, `read_bytes`,
    /// `written_bytes` and `flushes`, of a card `received_frames`, `received_bytes`, `sent_frames` and `sent_bytes`.
    pub devices: BTreeMap<String, Counts>,
}

/// A virtual CPU at one moment.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct VcpuSample {
    /// Its thread's times.
    #[serde(flatten)]
    pub times: Times,
    /// Its exits by their reason.
    pub exits: Counts,
    /// All its counters, by KVM's names.
    pub counters: Counts,
}

impl VcpuSample {
    /// All its exits.
    #[must_use]
    pub fn exits(&self) -> u64 {
        self.counters.get("exits").copied().unwrap_or(0)
    }
}

/// Takes the samples of a machine. All that it reads is opened in the beginning.
pub struct Sampler {
    vm: Option<Counters>,
    process: Meter,
    statm: Option<File>,
    charged: Option<File>,
}

impl Sampler {
    /// For the machine of this process with that VM.
    #[must_use]
    pub fn new(vm: &kvm_ioctls::VmFd) -> Self {
        let charged = cgroup::current().map(|path| path.join("memory.current"));
        Self {
            vm: Counters::open(vm),
            process: Meter::of_process(),
            statm: File::open("/proc/self/statm").ok(),
            charged: charged.and_then(|path| File::open(path).ok()),
        }
    }

    fn resident(&self) -> Option<u64> {
        let text = meter::read(self.statm.as_ref()?)?;
        let pages: u64 = text.split_whitespace().nth(1)?.parse().ok()?;
        Some(pages * layout::PAGE_SIZE)
    }

    /// The machine now.
    #[must_use]
    pub fn sample(&self, machine: &Machine) -> Sample {
        let charged = self.charged.as_ref().and_then(meter::read);
        let vcpus = machine.vcpus.iter().map(|vcpu| {
            let counters = vcpu.counters.as_ref().map(Counters::read);
            let (counters, exits) = counters.unwrap_or_default();
            let times = vcpu.times();
            VcpuSample {
                times,
                exits,
                counters,
            }
        });
        Sample {
            status: machine.status(),
            time_ms: UNIX_EPOCH.elapsed().unwrap_or_default().as_millis() as u64,
            clock_ns: monotonic(),
            vcpus: vcpus.collect(),
            vm: self.vm.as_ref().map(|vm| vm.read().0).unwrap_or_default(),
            process: self.process.read(),
            resident: self.resident().unwrap_or(0),
            charged: charged.and_then(|text| text.trim().parse().ok()),
            devices: machine.bus.counters(),
        }
    }
}

fn monotonic() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

/// Opens the file of `--metrics`.
///
/// # Errors
///
/// [`Error::Input`] where it can't be made.
pub fn open_metrics(path: &std::path::Path) -> Result<File> {
    let mut new = File::options();
    new.write(true).create(true).truncate(true);
    // A pipe that nobody reads would hold the machine's end up.
    let new = new.custom_flags(libc::O_NONBLOCK).open(path);
    new.map_err(|error| {
        Error::input(
            format!("--metrics {}: {error}", path.display()),
            "give a file that this user can write",
        )
    })
}

/// Writes a sample a second to `file`, one JSON object a line, until the guest has ended. A file that takes no more
/// gets no more; the guest goes on.
pub fn write_metrics(mut file: &File, machine: &Machine) {
    loop {
        // The last line has what there is at the end.
        let ended = machine.control.ended();
        let line =
            serde_json::to_string(&machine.sampler.sample(machine)).map_err(std::io::Error::other);
        if let Err(error) = line.and_then(|line| file.write_all((line + "\n").as_bytes())) {
            say(format_args!(
                "warning: --metrics: {error}; nothing more is written there"
            ));
            return;
        }
        if ended {
            return;
        }
        // A signal cuts it short where the guest has ended.
        let _ = nanosleep(&PERIOD);
    }
}

/// Prints what a machine has done.
///
/// # Errors
///
/// [`Error::Input`] where no such machine runs, [`Error::Call`] where it does not answer or standard output fails.
pub fn print(name: &Name, json: bool) -> Result<()> {
    let sample = Client::connect(name)?.call(&Request::Stats {})?;
    if json {
        return client::print_json(&sample);
    }
    crate::error::print(&text(&sample))
}

/// Seconds of nanoseconds, as `12.34 s`.
fn seconds(nanoseconds: u64) -> String {
    format!("{:.2} s", Duration::from_nanos(nanoseconds).as_secs_f64())
}

/// Bytes in MiB.
#[must_use]
pub fn mib(bytes: u64) -> String {
    format!("{} MiB", bytes.div_ceil(size::MIB))
}

fn text(sample: &Sample) -> String {
    let status = &sample.status;
    let mut text = format!(
        "{}: {}, process {}, {}\nmemory: {}, {} resident",
        status.name,
        status.state,
        status.pid,
        status.device.display(),
        size::text(status.memory),
        mib(sample.resident)
    );
    if let Some(charged) = sample.charged {
        let _ = write!(text, ", {} in its cgroup", mib(charged));
    }
    let vcpus: u64 = sample.vcpus.iter().map(|vcpu| vcpu.times.run_ns).sum();
    let rest = sample.process.run_ns.saturating_sub(vcpus);
    let _ = writeln!(text, "\ntool and devices: ran {}", seconds(rest));
    for (id, vcpu) in sample.vcpus.iter().enumerate() {
        let times = vcpu.times;
        let _ = writeln!(
            text,
            "CPU {id}: ran {}, {} of it in the guest, waited {} for a CPU of the host's; {} exits",
            seconds(times.run_ns),
            seconds(times.guest_ns),
            seconds(times.wait_ns),
            vcpu.exits()
        );
        print_counts(&mut text, &vcpu.exits);
    }
    for (name, counts) in &sample.devices {
        let _ = writeln!(text, "{name}:");
        print_counts(&mut text, counts);
    }
    text
}

/// The counters that are not 0, the largest first.
fn print_counts(text: &mut String, counts: &Counts) {
    for (name, count) in counters::largest(counts) {
        let _ = writeln!(text, "  {name:<28} {count:>12}");
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A machine that has run for a while.
    pub(crate) fn example() -> Sample {
        let text = r#"{"name":"web","pid":4711,"state":"running","reason":null,"cpus":1,"memory":268435456,"balloon":0,
            "device":"/dev/rvisor","started":1,"time_ms":2000,"clock_ns":5000000000,"vcpus":[{"run_ns":1500000000,
            "guest_ns":1200000000,"wait_ns":10000000,"exits":{"HLT":7,"IO_INSTRUCTION":900},"counters":{"exits":907}}],
            "vm":{},"process":{"run_ns":1600000000,"guest_ns":1200000000,"wait_ns":0},"resident":10485760,
            "charged":null,"devices":{"disk a.img":{"requests":3,"read_bytes":8192,"flushes":0},
            "network card 0":{"sent_bytes":60,"received_bytes":1200}}}"#;
        serde_json::from_str(text).expect("what is written is read")
    }

    #[test]
    fn the_text_tells_all_there_is() {
        assert_eq!(
            text(&example()),
            "web: running, process 4711, /dev/rvisor\n\
             memory: 256 MiB, 10 MiB resident\n\
             tool and devices: ran 0.10 s\n\
             CPU 0: ran 1.50 s, 1.20 s of it in the guest, waited 0.01 s for a CPU of the host's; 907 exits\n  \
             IO_INSTRUCTION                        900\n  \
             HLT                                     7\n\
             disk a.img:\n  \
             read_bytes                           8192\n  \
             requests                                3\n\
             network card 0:\n  \
             received_bytes                       1200\n  \
             sent_bytes                             60\n"
        );
    }

    #[test]
    fn a_pipe_that_nobody_reads_holds_nothing_up() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("pipe");
        let made = std::process::Command::new("mkfifo").arg(&path).status();
        assert!(made.expect("a process").success());
        let error = open_metrics(&path).expect_err("nobody is there");
        assert_eq!(error.status(), 2);
        let mut reading = File::options();
        let _reader = reading
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(&path);
        let mut file = open_metrics(&path).expect("somebody is");
        let full = std::iter::repeat_with(|| file.write_all(&[0; 4096])).find_map(|it| it.err());
        assert_eq!(full.map(|e| e.kind()), Some(std::io::ErrorKind::WouldBlock));
    }

    #[test]
    fn a_sample_is_one_flat_object() {
        let value = serde_json::to_value(example()).expect("it is text and numbers");
        assert_eq!(value["name"], "web");
        assert_eq!(value["vcpus"][0]["guest_ns"], 1_200_000_000);
    }
}
