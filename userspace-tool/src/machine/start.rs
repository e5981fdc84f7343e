// SPDX-License-Identifier: GPL-2.0

//! A machine from its parts to its end.

use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::mpsc::Receiver;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{SystemTime, UNIX_EPOCH};

use kvm_bindings::{kvm_pit_config, KVM_PIT_SPEAKER_DUMMY};
use kvm_ioctls::{Cap, Kvm, VmFd};
use vmm_sys_util::signal::{register_signal_handler, SIGRTMIN};

use super::{Control, Machine, Parts};
use crate::arguments::{ConsoleKind, RunOptions};
use crate::boot::Software;
use crate::console::{Console, Output, Raw, Signals, Wake};
use crate::control::{Ended, Server};
use crate::cpuid::Template;
use crate::devices::cmos::Cmos;
use crate::devices::debug::Debug;
use crate::devices::fwcfg::FwCfg;
use crate::devices::serial::{Drained, Line, Serial};
use crate::devices::virtio::console::Keyboard;
use crate::devices::{lock, virtio, Ports};
use crate::error::{failed, say, Error, Result};
use crate::memory::Memory;
use crate::outcome::Outcome;
use crate::registry::{Claim, Name};
use crate::snapshot::{Snapshot, State};
use crate::stat::{self, Sampler};
use crate::vcpu::Vcpu;
use crate::{confine, detach, hypervisor, layout, memory};

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
    // Everything that the device is not needed for comes first: it can be checked anywhere.
    begin(options)?;
    let mut software = Software::open(options)?;
    let base = Base::new(options, Name::of_this_process(), software.rom_size())?;
    let start = software.load(&base.memory, options, base.devices.len())?;
    base.run(options, None, |kvm, vm| {
        let cpuid = Template::new(kvm, options.cpus)?;
        (0..options.cpus)
            .map(|id| Vcpu::new(vm, id, &cpuid, start).map(Arc::new))
            .collect()
    })
}

/// Builds the machine of a snapshot as `options` say, which are those that it was made with, and goes on as
/// [`run`] does.
///
/// # Errors
///
/// As [`run`]; [`Error::Input`] where the snapshot is damaged, or from another hypervisor.
pub fn restore(options: &RunOptions, mut snapshot: Snapshot) -> Result<Outcome> {
    begin(options)?;
    if !snapshot.state.fits(options) {
        return Err(Error::input(
            "the snapshot's state is not that of its machine",
            "use another snapshot",
        ));
    }
    let base = Base::new(options, snapshot.head.name.clone(), snapshot.state.rom)?;
    snapshot.fill(&base.memory)?;
    base.run(options, Some(&snapshot.state), |_, vm| {
        (0..)
            .zip(&snapshot.state.cpus)
            .map(|(id, saved)| Vcpu::restored(vm, id, saved).map(Arc::new))
            .collect()
    })
}

fn begin(options: &RunOptions) -> Result<()> {
    if options.detached {
        detach::begin()?;
    }
    hypervisor::check_cpus(options.cpus, None)
}

/// What a machine has that needs no hypervisor.
struct Base {
    claim: Claim,
    memory: Memory,
    rom: u64,
    devices: Vec<Box<dyn virtio::Device>>,
    wake: Wake,
    output: Output,
    /// That of the virtio console, where the guest has one.
    keyboard: Option<Keyboard>,
    control: Control,
    outcomes: Receiver<Outcome>,
}

impl Base {
    /// Opens it as `options` say, with `rom` bytes of memory for firmware; `name` is for a machine without one.
    fn new(options: &RunOptions, name: Name, rom: u64) -> Result<Self> {
        let what = "opening the console";
        memory::check_size(options.memory)?;
        let claim = Claim::new(options.name.clone().unwrap_or(name))?;
        let memory = memory::allocate(options.memory, rom)?;
        let wake = Wake::new().map_err(failed(what))?;
        let (here, raw) = (!options.detached, options.raw_console);
        let (control, outcomes) = Control::new();
        let output = Output::new(wake.clone(), here, raw, control.clone()).map_err(failed(what))?;
        let keyboard = match options.console {
            ConsoleKind::Serial => None,
            ConsoleKind::Virtio => Some(Keyboard::new(wake.clone()).map_err(failed(what))?),
        };
        let console = keyboard
            .clone()
            .map(|keyboard| virtio::console::Console::new(keyboard, output.clone()));
        Ok(Self {
            devices: virtio::open(options, console)?,
            claim,
            memory,
            rom,
            wake,
            output,
            keyboard,
            control,
            outcomes,
        })
    }

    /// Makes the rest, with the CPUs that `vcpus` makes, and runs it until the guest has ended and all threads are
    /// gone. It begins with `state`, where there is one.
    fn run(
        self,
        options: &RunOptions,
        state: Option<&State>,
        vcpus: impl FnOnce(&Kvm, &VmFd) -> Result<Vec<Arc<Vcpu>>>,
    ) -> Result<Outcome> {
        let (kvm, vm) = create_vm(options, &self.memory)?;
        let ports = self.ports(&vm, options);
        let Self {
            claim,
            memory,
            rom,
            devices,
            wake,
            output,
            keyboard,
            control,
            outcomes,
        } = self;
        let vcpus = vcpus(&kvm, &vm)?;
        let metrics = options.metrics.as_deref();
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let machine = Arc::new(Machine {
            name: claim.name().clone(),
            options: options.clone(),
            control: control.clone(),
            sampler: Sampler::new(&vm),
            parts: Parts {
                bus: virtio::Bus::new(&vm, &memory, devices)?,
                kvm,
                vm,
                memory,
                rom,
                vcpus,
            },
            ports,
            output: output.clone(),
            metrics: metrics.map(stat::open_metrics).transpose()?,
            pausing: Mutex::default(),
            threads: Mutex::default(),
            started: now.map_or(0, |now| now.as_secs()),
        });
        if let Some(state) = state {
            machine.load(state)?;
        }
        register_signal_handler(SIGRTMIN(), kicked).map_err(failed("catching a signal"))?;
        // Caught before the terminal changes, so that no signal can leave it changed.
        let signals = Signals::catch()?;
        claim.record(&options.origin)?;
        let listener = claim.listen()?;
        let ready = options.detached.then(|| detach::Ready::new(&claim));
        let ready = ready.transpose()?;
        let raw = Raw::new().map_err(failed("setting the terminal"))?;
        // All that has a name is open by now, and all threads are still to come.
        confine::seal(claim.opened())?;
        let server = Server::start(listener, {
            let machine = Arc::clone(&machine);
            move |request, client| machine.obey(request, client)
        })?;

        let console = Console {
            output,
            keyboard,
            wake: wake.clone(),
            signals,
            control: control.clone(),
        };
        let started = start_threads(&machine, console);
        let told = started.and_then(|()| ready.map_or(Ok(()), |ready| ready.tell(claim.name())));
        if let Err(error) = told {
            control.end(Outcome::Host(error));
        }
        // There always is one: each thread that ends for a reason of its own gives it, a panic included.
        let outcome = outcomes.recv();
        let outcome = outcome.unwrap_or_else(|e| Outcome::Host(failed("watching the guest")(e)));
        machine.join(&wake);
        let outcome = match (machine.output.finish(), outcome) {
            // The guest's end came before it was seen that its last words are lost.
            (Err(error), Outcome::PoweredOff | Outcome::Rebooted) => Outcome::Host(error),
            (_, outcome) => outcome,
        };
        drop(raw);
        say(&outcome);
        // Whoever waits for the end may start one of the same name then.
        drop(claim);
        server.finish(Ended::from(&outcome));
        Ok(outcome)
    }

    fn ports(&self, vm: &Arc<VmFd>, options: &RunOptions) -> Ports {
        let drained = Drained(self.wake.clone());
        let serial = Serial::with_events(Line(Arc::clone(vm)), drained, self.output.clone());
        let cmos = Cmos::new(options.memory, options.cpus);
        // A boot loader's screen is on the serial port. Firmware shows itself there too, so its other words would
        // only be in the way.
        let screen = !options.disks.is_empty();
        let firmware = options.firmware.is_some();
        let config = firmware.then(|| FwCfg::new(options.memory, screen));
        let debug = (firmware && !screen).then(|| Debug(self.output.clone()));
        let (control, vm) = (self.control.clone(), Arc::clone(vm));
        Ports::new(control, vm, serial, cmos, config, debug)
    }
}

/// Opens the hypervisor and makes a VM with that memory, and with the interrupt controllers and the timer in the
/// hypervisor.
fn create_vm(options: &RunOptions, memory: &Memory) -> Result<(Kvm, Arc<VmFd>)> {
    let kvm = hypervisor::open(&options.device)?;
    hypervisor::check_cpus(options.cpus, Some(&kvm))?;
    if let Some((_, name)) = NEEDED.iter().find(|(cap, _)| !kvm.check_extension(*cap)) {
        return Err(Error::input(
            format!("this hypervisor lacks {name}, without which no PC can be built"),
            "use a newer one; KVM has it where its kernel has CONFIG_KVM_IOAPIC",
        ));
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

/// Starts the threads of the console, the devices and the CPUs, in that order.
fn start_threads(machine: &Arc<Machine>, console: Console) -> Result<()> {
    spawn(machine, "console", move |machine| {
        console.run(&machine.ports)
    })?;
    for device in machine.parts.bus.devices() {
        let of_thread = Arc::clone(device);
        spawn(machine, &device.name, move |machine| {
            of_thread.work(&machine.control, |reason| machine.stuck(reason))
        })?;
    }
    if machine.metrics.is_some() {
        spawn(machine, "metrics", |machine| {
            let files = machine.metrics.iter();
            files.for_each(|file| stat::write_metrics(file, machine, &machine.control));
            Ok(())
        })?;
    }
    for vcpu in &machine.parts.vcpus {
        let of_thread = Arc::clone(vcpu);
        spawn(machine, &format!("vcpu{}", vcpu.id), move |machine| {
            of_thread.run(&machine.ports, &machine.parts.bus, &machine.control)
        })?;
    }
    Ok(())
}

/// Starts a thread whose failure or panic ends the guest.
fn spawn(
    machine: &Arc<Machine>,
    name: &str,
    work: impl FnOnce(&Machine) -> Result<()> + Send + 'static,
) -> Result<()> {
    let (of_thread, what) = (Arc::clone(machine), format!("thread {name}"));
    let thread = thread::Builder::new().name(name.to_owned()).spawn(move || {
        // A panic leaves nothing broken behind: all that the closure leaves behind is the guest, which ends.
        let result = catch_unwind(AssertUnwindSafe(|| work(&of_thread)));
        let panicked = |_| Err(Error::call(what, "it panicked"));
        if let Err(error) = result.unwrap_or_else(panicked) {
            of_thread.control.end(Outcome::Host(error));
        }
    });
    lock(&machine.threads).push(thread.map_err(failed("starting a thread"))?);
    Ok(())
}
