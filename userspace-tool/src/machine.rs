// SPDX-License-Identifier: GPL-2.0

//! The guest's machine from its parts to its end.

pub mod saved;
mod screen;
mod state;

use std::fs::File;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::{self, JoinHandle};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use kvm_bindings::{kvm_pit_config, KVM_PIT_SPEAKER_DUMMY};
use kvm_ioctls::{Cap, Kvm, VmFd};
use serde::{Deserialize, Serialize};
use vmm_sys_util::signal::{register_signal_handler, Killable, SIGRTMIN};

use crate::arguments::RunOptions;
use crate::boot::Software;
use crate::console::{Console, Hub, Output, Raw, Signals, Wake};
use crate::control::{Commands, Ended, Nothing, Server};
use crate::cpuid::Template;
use crate::devices::cmos::Cmos;
use crate::devices::debug::Debug;
use crate::devices::fwcfg::FwCfg;
use crate::devices::serial::{Drained, Line, Serial};
use crate::devices::{lock, virtio, Firmware, Ports};
use crate::error::{failed, say, Error, Result};
use crate::memory::Memory;
use crate::outcome::Outcome;
use crate::registry::{Claim, Name};
use crate::snapshot::{self, State};
use crate::stat::{self, Sample, Sampler};
use crate::trace;
use crate::vcpu::Vcpu;
use crate::{confine, detach, hypervisor, layout, memory};
use screen::Screen;
pub use state::Control;

/// How long a thread gets to leave the guest before it is asked again.
const KICK_AGAIN: Duration = Duration::from_millis(1);

/// The capabilities without which no PC can be built.
pub(crate) const NEEDED: [(Cap, &str); 4] = [
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
    (Cap::Pit2, "KVM_CAP_PIT2"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
];

/// Builds the guest's machine, runs it, and tells how it ended.
///
/// # Errors
///
/// [`Error::Input`] where the input is wrong, [`Error::Call`] where the host failed before the guest ran.
pub fn run(options: &RunOptions) -> Result<Outcome> {
    if options.detached {
        detach::begin()?;
    }
    // Everything that the device is not needed for comes first: it can be checked anywhere.
    hypervisor::check_cpus_early(options.cpus)?;
    let mut software = Software::open(options)?;
    memory::check_size(options.memory)?;
    let claim = Claim::new(options.name.clone().unwrap_or_else(Name::of_this_process))?;
    let memory = memory::allocate(options.memory, software.rom_size())?;
    let screen = Screen::open(options)?;
    let devices = screen.devices(options)?;
    let start = software.load(&memory, options, devices.len())?;

    let (kvm, vm) = create_vm(options, &memory)?;
    let cpuid = Template::new(&kvm, options.cpus)?;
    let vcpus = (0..options.cpus)
        .map(|id| Vcpu::new(&vm, id, &cpuid, start).map(Arc::new))
        .collect::<Result<Vec<_>>>()?;
    let parts = Parts {
        bus: virtio::Bus::new(&vm, &memory, devices)?,
        kvm,
        vm,
        memory,
        rom: software.rom_size(),
        vcpus,
    };
    run_to_end(claim, parts, screen, options, None)
}

/// Builds the machine of a snapshot as `options` say, which are those that it was made with, and goes on as
/// [`run`] does.
///
/// # Errors
///
/// As [`run`]; [`Error::Input`] where the snapshot is damaged, or from another hypervisor.
pub fn restore(
    options: &RunOptions,
    state: &State,
    fill: impl FnOnce(&Memory) -> Result<()>,
) -> Result<Outcome> {
    if options.detached {
        detach::begin()?;
    }
    hypervisor::check_cpus_early(options.cpus)?;
    memory::check_size(options.memory)?;
    let sizes = layout::FIRMWARE_SIZE;
    if state.cpus.len() as u64 != u64::from(options.cpus)
        || state.rom != 0 && (!sizes.contains(&state.rom) || state.rom % layout::PAGE_SIZE != 0)
    {
        return Err(Error::input(
            "the snapshot's state is not that of its machine",
            "use another snapshot",
        ));
    }
    let claim = Claim::new(options.name.clone().unwrap_or_else(|| state.name.clone()))?;
    let memory = memory::allocate(options.memory, state.rom)?;
    fill(&memory)?;
    let screen = Screen::open(options)?;
    let devices = screen.devices(options)?;
    let (kvm, vm) = create_vm(options, &memory)?;
    let vcpus = (0..)
        .zip(&state.cpus)
        .map(|(id, saved)| Vcpu::restored(&vm, id, saved).map(Arc::new))
        .collect::<Result<Vec<_>>>()?;
    let parts = Parts {
        bus: virtio::Bus::new(&vm, &memory, devices)?,
        kvm,
        vm,
        memory,
        rom: state.rom,
        vcpus,
    };
    run_to_end(claim, parts, screen, options, Some(state))
}

/// What a machine is made of.
pub struct Parts {
    /// The hypervisor.
    pub kvm: Kvm,
    /// Its VM.
    pub vm: Arc<VmFd>,
    /// Its memory.
    pub memory: Memory,
    /// How much of it its firmware has for itself, in bytes.
    pub rom: u64,
    /// Its CPUs.
    pub vcpus: Vec<Arc<Vcpu>>,
    /// Its virtio devices.
    pub bus: virtio::Bus,
}

/// A machine that runs, as its commands reach it.
pub struct Machine {
    /// Its name.
    pub name: Name,
    /// What it was made by.
    pub options: RunOptions,
    /// Ends and pauses it.
    pub control: Control,
    /// What it is made of.
    pub parts: Parts,
    /// Its devices on I/O ports.
    pub ports: Ports,
    /// Its console's clients.
    pub hub: Hub,
    /// Takes samples of it.
    sampler: Sampler,
    /// Where they go, one a second.
    metrics: Option<File>,
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
            device: self.options.device.clone(),
            started: self.started,
        }
    }

    /// What it has done so far.
    #[must_use]
    pub fn sample(&self) -> Sample {
        self.sampler.sample(self)
    }

    /// Pauses the guest: comes back when no CPU runs it any more and its devices rest.
    ///
    /// # Errors
    ///
    /// [`Error::Input`] where the guest ends meanwhile.
    pub fn pause(&self, reason: &str) -> Result<()> {
        self.pause_with(&lock(&self.pausing), reason)
    }

    fn pause_with(&self, _pausing: &MutexGuard<'_, ()>, reason: &str) -> Result<()> {
        if !self.control.paused() {
            self.control.set_paused(reason);
        }
        // A signal can be lost as in `stop`.
        while !self
            .control
            .await_parked(self.parts.vcpus.len(), KICK_AGAIN)
        {
            if self.control.ended() {
                return Err(Error::input(
                    format!("machine {} has ended", self.name),
                    "start it again",
                ));
            }
            for thread in lock(&self.threads).iter() {
                // Fails only for a thread that has ended.
                let _ = thread.kill(SIGRTMIN());
            }
        }
        self.parts.bus.devices().for_each(|device| device.pause());
        Ok(())
    }

    /// Has a paused guest go on.
    pub fn resume(&self) {
        self.resume_with(&lock(&self.pausing));
    }

    fn resume_with(&self, _pausing: &MutexGuard<'_, ()>) {
        self.parts.bus.devices().for_each(|device| device.resume());
        self.control.resume();
    }

    /// A device can't go on before the user has done something: pauses the guest and says why.
    fn stuck(&self, reason: &str) {
        say(format_args!(
            "{reason}; the machine is paused, 'rvisor resume {}' has it try again",
            self.name
        ));
        // Fails only where the guest ends.
        let _ = self.pause(reason);
    }

    /// Writes a snapshot of the machine, which stands still meanwhile.
    ///
    /// # Errors
    ///
    /// [`Error::Input`] where the machine has ended, [`Error::Call`] where the hypervisor or `out` fails.
    fn snapshot(&self, out: impl std::io::Write) -> Result<()> {
        // Nobody has it go on before all is written.
        let pausing = lock(&self.pausing);
        let was_paused = self.control.paused();
        self.pause_with(&pausing, "for a snapshot")?;
        let written = self.save().and_then(|state| {
            snapshot::write(out, &state, &self.parts.memory).map_err(failed("writing a snapshot"))
        });
        if !was_paused {
            self.resume_with(&pausing);
        }
        written
    }

    fn save(&self) -> Result<State> {
        let parts = &self.parts;
        let msrs = saved::msr_indices(&parts.kvm)?;
        let cpus = || -> Result<_> {
            let cpus = parts
                .vcpus
                .iter()
                .map(|vcpu| saved::Cpu::save(&vcpu.fd(), &msrs));
            Ok((cpus.collect::<Result<_>>()?, saved::Vm::save(&parts.vm)?))
        };
        let (ports, (cpus, vm)) = self.ports.save(cpus)?;
        Ok(State {
            words: self.options.origin.words.clone(),
            folder: self.options.origin.folder.clone(),
            name: self.name.clone(),
            rom: parts.rom,
            cpus,
            vm,
            ports,
            virtio: parts.bus.devices().map(|device| device.save()).collect(),
        })
    }

    fn load(&self, state: &State) -> Result<()> {
        self.ports.load(&state.ports)?;
        for (vcpu, saved) in self.parts.vcpus.iter().zip(&state.cpus) {
            saved.load(&vcpu.fd())?;
        }
        state.vm.load(&self.parts.vm)?;
        self.ports.interrupt_again()?;
        if state.virtio.len() != self.parts.bus.devices().count() {
            return Err(Error::input(
                "the snapshot has other devices than its machine",
                "restore it with the rvisor that made it",
            ));
        }
        let mut devices = self.parts.bus.devices().zip(&state.virtio);
        devices.try_for_each(|(device, saved)| device.restore(saved))
    }

    /// Adds the commands that every machine takes.
    fn add_commands(self: &Arc<Self>, commands: &mut Commands) {
        let machine = Arc::clone(self);
        commands.add("status", move |_: Nothing| Ok(machine.status()));
        let machine = Arc::clone(self);
        commands.add("pause", move |_: Nothing| {
            machine.pause("by 'rvisor pause'")?;
            Ok(Nothing {})
        });
        let machine = Arc::clone(self);
        commands.add("resume", move |_: Nothing| {
            machine.resume();
            Ok(Nothing {})
        });
        let machine = Arc::clone(self);
        commands.add("kill", move |_: Nothing| {
            machine.control.end(Outcome::Killed);
            Ok(Nothing {})
        });
        let machine = Arc::clone(self);
        commands.add("power-button", move |_: Nothing| {
            if machine.control.paused() {
                return Err(Error::input(
                    format!(
                        "machine {} is paused and hears no power button",
                        machine.name
                    ),
                    "resume it before, or kill it",
                ));
            }
            machine.ports.press_power_button()?;
            Ok(Nothing {})
        });
        let machine = Arc::clone(self);
        commands.add_stream("snapshot", move |_: Nothing, client| {
            // The client sees that it is not whole.
            machine
                .snapshot(client)
                .inspect_err(|error| say(format_args!("a snapshot failed: {error}")))
        });
        let machine = Arc::clone(self);
        commands.add_stream("console", move |_: Nothing, client| {
            machine.hub.attach(client)
        });
    }
}

/// Opens the hypervisor and makes a VM with that memory, and with the interrupt controllers and the timer in the
/// hypervisor.
fn create_vm(options: &RunOptions, memory: &Memory) -> Result<(Kvm, Arc<VmFd>)> {
    let kvm = hypervisor::open(&options.device)?;
    hypervisor::check_cpus(&kvm, options.cpus)?;
    for (cap, name) in NEEDED {
        if !kvm.check_extension(cap) {
            return Err(Error::input(
                format!("this hypervisor lacks {name}, without which no PC can be built"),
                "use a newer one; KVM has it where its kernel has CONFIG_KVM_IOAPIC",
            ));
        }
    }
    let vm = kvm
        .create_vm()
        .map_err(failed("making a virtual machine"))?;
    // Only Intel CPUs without unrestricted guest use these pages, but KVM wants them named.
    if kvm.check_extension(Cap::SetIdentityMapAddr) {
        vm.set_identity_map_address(layout::IDENTITY_MAP)
            .map_err(failed("placing the identity map"))?;
    }
    if kvm.check_extension(Cap::SetTssAddr) {
        vm.set_tss_address(layout::TSS)
            .map_err(failed("placing the task state segment"))?;
    }
    vm.create_irq_chip()
        .map_err(failed("making the interrupt controllers"))?;
    // With a dummy speaker the hypervisor answers port 0x61, by which guests calibrate their clocks.
    let pit = kvm_pit_config {
        flags: KVM_PIT_SPEAKER_DUMMY,
        ..Default::default()
    };
    vm.create_pit2(pit).map_err(failed("making the timer"))?;
    memory::give(&vm, memory)?;
    Ok((kvm, Arc::new(vm)))
}

/// Does nothing: a signal with a handler makes KVM_RUN return, which is all that it is for.
extern "C" fn kicked(_: i32, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

/// Runs the CPUs, the devices, the console and the commands until the guest has ended and all its threads are gone.
/// They begin with `state`, where there is one.
fn run_to_end(
    claim: Claim,
    parts: Parts,
    screen: Screen,
    options: &RunOptions,
    state: Option<&State>,
) -> Result<Outcome> {
    let Screen {
        wake,
        hub,
        output,
        control,
        outcomes,
        keyboard,
    } = screen;
    let ports = make_ports(
        &parts.vm,
        &control,
        &output,
        &wake,
        options,
        parts.bus.devices().count(),
    );
    let sampler = Sampler::new(&parts.vm);
    let metrics = options.metrics.as_deref();
    let metrics = metrics.map(stat::open_metrics).transpose()?;
    let machine = Arc::new(Machine {
        name: claim.name().clone(),
        options: options.clone(),
        control: control.clone(),
        parts,
        ports,
        hub: hub.clone(),
        sampler,
        metrics,
        pausing: Mutex::default(),
        threads: Mutex::default(),
        started: SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |time| time.as_secs()),
    });
    if let Some(state) = state {
        machine.load(state)?;
    }
    // Parts of the machine add their commands here, before the server starts.
    let mut commands = Commands::default();
    machine.add_commands(&mut commands);
    stat::add_commands(&machine, &mut commands);
    trace::add_commands(&machine, &mut commands);
    register_signal_handler(SIGRTMIN(), kicked).map_err(failed("catching a signal"))?;
    // Caught before the terminal changes, so that no signal can leave it changed.
    let signals = Signals::catch()?;
    claim.record(&options.origin)?;
    let listener = claim.listen()?;
    let ready = match options.detached {
        true => Some(detach::Ready::new(&claim)?),
        false => None,
    };
    let raw = Raw::new().map_err(failed("setting the terminal"))?;
    // All that has a name is open by now, and all threads are still to come.
    confine::seal(claim.opened())?;
    let server = Server::start(listener, commands)?;

    let console = Console {
        output,
        hub,
        keyboard,
        wake: wake.clone(),
        signals,
        control: control.clone(),
    };
    let started = start_threads(&machine, console);
    let started = started.and_then(|()| match ready {
        Some(ready) => ready.tell(claim.name()),
        None => Ok(()),
    });
    if let Err(error) = started {
        control.end(Outcome::Host(error));
    }
    // There always is one: each thread that ends for a reason of its own gives it, a panic included.
    let outcome = outcomes.recv().unwrap_or_else(|e| {
        Outcome::Host(Error::call("watching the guest", std::io::Error::other(e)))
    });
    stop(std::mem::take(&mut lock(&machine.threads)), &wake);
    drop(raw);
    say(&outcome);
    // Whoever waits for the end may start one of the same name then.
    drop(claim);
    server.finish(Ended::from(&outcome));
    Ok(outcome)
}

fn make_ports(
    vm: &Arc<VmFd>,
    control: &Control,
    output: &Output,
    wake: &Wake,
    options: &RunOptions,
    virtio_devices: usize,
) -> Ports {
    let line = Line(Arc::clone(vm));
    let serial = Serial::with_events(line, Drained(wake.clone()), output.clone());
    let cmos = Cmos::new(options.memory, options.cpus);
    // A boot loader's screen is on the serial port. Firmware shows itself there too, so its other words would
    // only be in the way.
    let screen = !options.disks.is_empty();
    let config = |_| FwCfg::new(options.memory, options.cpus, virtio_devices, screen);
    let firmware = options
        .firmware
        .as_ref()
        .map(config)
        .map(|config| Firmware {
            debug: (!screen).then(|| Debug(output.clone())),
            config: Mutex::new(config),
        });
    Ports::new(control.clone(), Arc::clone(vm), serial, cmos, firmware)
}

/// What a thread of a machine does.
type Work = Box<dyn FnOnce(&Machine) -> Result<()> + Send>;

/// Starts the threads of the console, the devices and the CPUs, in that order.
fn start_threads(machine: &Arc<Machine>, console: Console) -> Result<()> {
    let start = |name: String, work: Work| {
        let for_thread = Arc::clone(machine);
        let thread = spawn(&machine.control, name, move || work(&for_thread))?;
        lock(&machine.threads).push(thread);
        Ok(())
    };
    start(
        "console".to_owned(),
        Box::new(move |machine| console.run(&machine.ports)),
    )?;
    for device in machine.parts.bus.devices() {
        let (name, device) = (device.name().to_owned(), Arc::clone(device));
        start(
            name,
            Box::new(move |machine| device.work(&machine.control, |reason| machine.stuck(reason))),
        )?;
    }
    if machine.metrics.is_some() {
        let work = |machine: &Machine| {
            let files = machine.metrics.iter();
            files.for_each(|file| stat::write_metrics(file, machine, &machine.control));
            Ok(())
        };
        start("metrics".to_owned(), Box::new(work))?;
    }
    for vcpu in &machine.parts.vcpus {
        let (name, vcpu) = (format!("vcpu{}", vcpu.id()), Arc::clone(vcpu));
        start(
            name,
            Box::new(move |machine| vcpu.run(&machine.ports, &machine.parts.bus, &machine.control)),
        )?;
    }
    Ok(())
}

/// Starts a thread whose failure or panic ends the guest.
fn spawn(
    control: &Control,
    name: String,
    work: impl FnOnce() -> Result<()> + Send + 'static,
) -> Result<JoinHandle<()>> {
    let control = control.clone();
    let what = name.clone();
    thread::Builder::new()
        .name(name)
        .spawn(move || {
            // A panic leaves nothing broken behind: all that the closure leaves behind is the guest, which ends.
            let result = catch_unwind(AssertUnwindSafe(work));
            let error = match result {
                Ok(Ok(())) => return,
                Ok(Err(error)) => error,
                Err(_) => Error::call(
                    format!("thread {what}"),
                    std::io::Error::other("it panicked"),
                ),
            };
            control.end(Outcome::Host(error));
        })
        .map_err(failed("starting a thread"))
}

/// Gets all threads out of the guest and waits for their ends.
///
/// A signal that comes between a thread's look at the control and its entry into the guest is lost, so
/// signals go out again until the thread is gone.
fn stop(mut threads: Vec<JoinHandle<()>>, wake: &Wake) {
    loop {
        threads.retain(|thread| !thread.is_finished());
        if threads.is_empty() {
            return;
        }
        wake.wake();
        for thread in &threads {
            // Fails only for a thread that has ended.
            let _ = thread.kill(SIGRTMIN());
        }
        if threads.iter().any(|thread| !thread.is_finished()) {
            thread::sleep(KICK_AGAIN);
        }
    }
}
