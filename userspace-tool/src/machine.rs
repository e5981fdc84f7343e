// SPDX-License-Identifier: GPL-2.0

//! The guest's machine while it runs: what its commands do.

pub mod saved;
mod start;
mod state;

use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use kvm_ioctls::{Kvm, VmFd};
use serde::{Deserialize, Serialize};
use vmm_sys_util::signal::{Killable, SIGRTMIN};

use crate::arguments::RunOptions;
use crate::console::Console;
use crate::control::{answer, stream, Answer, Nothing, Request};
use crate::devices::{lock, virtio, Ports};
use crate::error::{failed, say, Error, Result};
use crate::memory::Memory;
use crate::outcome::Outcome;
use crate::registry::Name;
use crate::size;
use crate::snapshot::{self, State};
use crate::stat::Sampler;
use crate::trace;
use crate::vcpu::Vcpu;
pub(crate) use start::NEEDED;
pub use start::{restore, run};
pub use state::Control;

/// How long a thread gets to leave the guest before it is asked again.
const KICK_AGAIN: Duration = Duration::from_millis(1);

/// A machine that runs, as its commands reach it.
pub struct Machine {
    /// Its name.
    pub name: Name,
    /// What it was made by.
    pub options: RunOptions,
    /// Ends and pauses it.
    pub control: Control,
    kvm: Kvm,
    vm: Arc<VmFd>,
    memory: Memory,
    /// How much of its memory its firmware has for itself, in bytes.
    rom: u64,
    /// Its CPUs.
    pub vcpus: Vec<Vcpu>,
    /// Its virtio devices.
    pub bus: virtio::Bus,
    /// Its devices on I/O ports.
    pub ports: Ports,
    console: Console,
    /// What it has done so far.
    pub sampler: Sampler,
    /// Held by whoever pauses it or has it go on.
    pausing: Mutex<()>,
    /// All its threads, until the guest has ended.
    threads: Mutex<Vec<JoinHandle<()>>>,
    /// Seconds since 1970.
    started: u64,
}

/// What `status` answers.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Status {
    /// The machine's name.
    pub name: Name,
    /// The process that runs it.
    pub pid: u32,
    /// `running`, `paused` or `ended`.
    pub state: String,
    /// Why it is paused, where it is.
    pub reason: Option<String>,
    /// The number of its CPUs.
    pub cpus: u32,
    /// Its memory in bytes.
    pub memory: u64,
    /// How much of it its guest has left to the host, in bytes. Machines of earlier versions don't tell.
    #[serde(default)]
    pub balloon: u64,
    /// The hypervisor's device.
    pub device: PathBuf,
    /// When it started, in seconds since the beginning of 1970.
    pub started: u64,
}

impl Machine {
    /// What is to be told about it.
    #[must_use]
    pub fn status(&self) -> Status {
        let reason = self.control.pause_reason();
        let state = match &reason {
            _ if self.control.ended() => "ended",
            Some(_) => "paused",
            None => "running",
        };
        Status {
            name: self.name.clone(),
            pid: std::process::id(),
            state: state.to_owned(),
            reason,
            cpus: self.options.cpus,
            memory: self.options.memory,
            balloon: self.balloon().and_then(|it| it.balloon()).unwrap_or(0),
            device: self.options.device.clone(),
            started: self.started,
        }
    }

    /// Pauses the guest: comes back when no CPU runs it any more and its devices rest.
    ///
    /// # Errors
    ///
    /// [`Error::Input`] where the guest ends meanwhile. [`Error::Call`] where a device can't write what the guest was told
    /// is written; it is paused all the same.
    pub fn pause(&self, reason: &str) -> Result<()> {
        self.pause_with(&lock(&self.pausing), reason)
    }

    fn pause_with(&self, _pausing: &MutexGuard<'_, ()>, reason: &str) -> Result<()> {
        if !self.control.paused() {
            self.control.set_paused(reason);
        }
        while !self.control.await_parked(self.vcpus.len(), KICK_AGAIN) {
            if self.control.ended() {
                return Err(Error::input(
                    format!("machine {} has ended", self.name),
                    "start it again",
                ));
            }
            self.kick();
        }
        let paused = self.bus.devices().map(|device| device.pause());
        paused.fold(Ok(()), Result::and)
    }

    /// Gets the threads out of the guest. A signal that comes between a thread's look at the control and its entry
    /// into the guest is lost, so this has to be done until all are.
    fn kick(&self) {
        for thread in lock(&self.threads).iter() {
            // Fails only for a thread that has ended.
            let _ = thread.kill(SIGRTMIN());
        }
    }

    /// Waits for the ends of all threads.
    fn join(&self) {
        loop {
            lock(&self.threads).retain(|thread| !thread.is_finished());
            if lock(&self.threads).is_empty() {
                return;
            }
            self.console.wake.wake();
            self.kick();
            thread::sleep(KICK_AGAIN);
        }
    }

    /// Has a paused guest go on.
    pub fn resume(&self) {
        self.resume_with(&lock(&self.pausing));
    }

    fn resume_with(&self, _pausing: &MutexGuard<'_, ()>) {
        self.bus.devices().for_each(|device| device.resume());
        self.control.resume();
    }

    /// A device can't go on before the user has done something: pauses the guest and says why.
    fn stuck(&self, reason: &str) {
        say(format_args!(
            "{reason}; the machine is paused, 'rvisor resume {}' has it try again",
            self.name
        ));
        // Fails where the guest ends, and where there is no room for what is still to be written.
        let _ = self.pause(reason);
    }

    /// Writes a snapshot of the machine, which stands still meanwhile.
    ///
    /// # Errors
    ///
    /// [`Error::Input`] where the machine has ended, [`Error::Call`] where the hypervisor, a disk or `out` fails.
    fn snapshot(&self, out: impl std::io::Write) -> Result<()> {
        // Nobody has it go on before all is written.
        let pausing = lock(&self.pausing);
        let was_paused = self.control.paused();
        // Without what a disk does not take, the file would miss what its guest takes for written.
        let paused = self.pause_with(&pausing, "for a snapshot");
        let written = paused.and_then(|()| self.save()).and_then(|state| {
            snapshot::write(out, &state, &self.memory).map_err(failed("writing a snapshot"))
        });
        if !was_paused {
            self.resume_with(&pausing);
        }
        written
    }

    fn save(&self) -> Result<State> {
        let msrs = self.kvm.get_msr_index_list();
        let msrs = msrs.map_err(failed("listing the CPUs' MSRs"))?;
        let cpus = || -> Result<_> {
            let cpus = self.vcpus.iter();
            let cpus = cpus.map(|vcpu| saved::Cpu::save(&vcpu.fd(), msrs.as_slice()));
            Ok((cpus.collect::<Result<_>>()?, saved::Vm::save(&self.vm)?))
        };
        let (ports, (cpus, vm)) = self.ports.save(cpus)?;
        Ok(State {
            rom: self.rom,
            cpus,
            vm,
            ports,
            virtio: self.bus.devices().map(|device| device.save()).collect(),
        })
    }

    fn load(&self, state: &State) -> Result<()> {
        self.ports.load(&state.ports)?;
        for (vcpu, saved) in self.vcpus.iter().zip(&state.cpus) {
            saved.load(&vcpu.fd())?;
        }
        state.vm.load(&self.vm)?;
        self.ports.interrupt_again()?;
        if state.virtio.len() != self.bus.devices().count() {
            return Err(Error::input(
                "the snapshot has other devices than its machine",
                "restore it with the rvisor that made it",
            ));
        }
        let mut devices = self.bus.devices().zip(&state.virtio);
        devices.try_for_each(|(device, saved)| device.restore(saved))
    }

    /// Its memory balloon. No lock of another device's is taken, which may wait for a disk.
    fn balloon(&self) -> Option<&Arc<virtio::Transport>> {
        let mut devices = self.bus.devices();
        devices.find(|device| device.name == "balloon")
    }

    fn set_balloon(&self, bytes: u64) -> Result<()> {
        if bytes > self.options.memory {
            let has = size::text(self.options.memory);
            return Err(Error::input(
                format!("machine {} has {has} of memory in all", self.name),
                "ask for less",
            ));
        }
        if let Some(balloon) = self.balloon() {
            balloon.set_balloon(bytes);
        }
        Ok(())
    }

    fn press_power_button(&self) -> Result<()> {
        if self.control.paused() {
            return Err(Error::input(
                format!("machine {} is paused and hears no power button", self.name),
                "resume it before, or kill it",
            ));
        }
        self.ports.press_power_button()
    }

    /// Does what a client asks for, but for `wait`, which is the server's.
    fn obey(&self, request: Request, client: &UnixStream) -> Answer {
        match request {
            Request::Status {} => return answer(&self.status()),
            Request::Stats {} => return answer(&self.sampler.sample(self)),
            Request::Pause {} => self.pause("by 'rvisor pause'")?,
            Request::Resume {} => self.resume(),
            Request::Kill {} => self.control.end(Outcome::Killed),
            Request::PowerButton {} => self.press_power_button()?,
            Request::Balloon { bytes } => self.set_balloon(bytes)?,
            Request::Wait {} => {}
            // The client sees that it is not whole.
            Request::Snapshot {} => {
                return stream(client, |client| {
                    self.snapshot(client)
                        .inspect_err(|error| say(format_args!("a snapshot failed: {error}")))
                })
            }
            Request::Console {} => {
                return stream(client, |client| self.console.output.attach(client))
            }
            Request::Trace(wanted) => {
                return stream(client, |client| trace::stream(self, &wanted, client))
            }
        }
        answer(&Nothing {})
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_of_an_earlier_version_has_a_status() {
        let text = r#"{"name": "web", "pid": 7, "state": "running", "reason": null, "cpus": 1,
            "memory": 4096, "device": "/dev/rvisor", "started": 1}"#;
        let status: Status = serde_json::from_str(text).expect("its status");
        assert_eq!(status.balloon, 0);
    }
}
