// SPDX-License-Identifier: GPL-2.0

//! A machine from its parts to its end.

use std::fs::File;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::mpsc::Receiver;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::UNIX_EPOCH;

use kvm_bindings::{kvm_pit_config, KVM_PIT_SPEAKER_DUMMY};
use kvm_ioctls::{Cap, Kvm, VmFd};
use vmm_sys_util::signal::{register_signal_handler, SIGRTMIN};

use super::{Control, Machine};
use crate::arguments::RunOptions;
use crate::boot::{Software, Start};
use crate::console::{Console, Raw, Signals};
use crate::control::{Ended, Server};
use crate::cpuid::Template;
use crate::devices::cmos::Cmos;
use crate::devices::debug::Debug;
use crate::devices::fwcfg::FwCfg;
use crate::devices::serial::{Drained, Line, Serial};
use crate::devices::{lock, virtio, Ports};
use crate::error::{failed, say, Error, Result};
use crate::memory::Memory;
use crate::outcome::Outcome;
use crate::registry::{Claim, Name};
use crate::snapshot::{Snapshot, State};
use crate::stat::{self, Sampler};
use crate::vcpu::Vcpu;
use crate::{confine, detach, hypervisor, layout, memory, size};

/// The capabilities without which no PC can be built.
pub(crate) const NEEDED: [(Cap, &str); 4] = [
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
    (Cap::Pit2, "KVM_CAP_PIT2"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
];

/// How a machine's CPUs begin.
enum Begin {
    At(Start),
    As(Box<State>),
}

/// Builds the guest's machine, runs it, and tells how it ended.
///
/// # Errors
///
/// [`Error::Input`] where the input is wrong, [`Error::Call`] where the host failed before the guest ran.
pub fn run(options: &RunOptions) -> Result<Outcome> {
    begin(options)?;
    let mut software = Software::open(options)?;
    // What it has open and has read goes when it is loaded.
    start(options, software.rom_size(), move |memory, devices| {
        software.load(memory, options, devices).map(Begin::At)
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
    start(options, snapshot.state.rom, |memory, _| {
        snapshot.fill(memory)?;
        Ok(Begin::As(Box::new(snapshot.state)))
    })
}

fn begin(options: &RunOptions) -> Result<()> {
    if options.detached {
        detach::begin()?;
    }
    hypervisor::check_cpus(options.cpus, None)
}

/// Builds a machine with `rom` bytes of memory for firmware, and runs it. `load` puts something into its memory, which
/// is told the number of virtio devices. Everything that the hypervisor is not needed for comes first: it can be
/// checked anywhere.
fn start(
    options: &RunOptions,
    rom: u64,
    load: impl FnOnce(&Memory, usize) -> Result<Begin>,
) -> Result<Outcome> {
    memory::check_size(options.memory)?;
    if options.balloon > options.memory {
        let [balloon, memory] = [options.balloon, options.memory].map(size::text);
        let cause = format!("--balloon {balloon} is more than the --memory of {memory}");
        return Err(Error::input(cause, "give a smaller --balloon"));
    }
    let claim = Claim::new(Name::of(options.name.as_ref(), std::process::id()))?;
    let memory = memory::allocate(options.memory, rom)?;
    let (control, outcomes) = Control::new();
    let console = Console::new(options, &control).map_err(failed("opening the console"))?;
    let devices = virtio::open(options, console.device())?;
    let begin = load(&memory, devices.len())?;
    let (kvm, vm) = create_vm(options, &memory)?;
    let machine = Arc::new(Machine {
        name: claim.name.clone(),
        options: options.clone(),
        sampler: Sampler::new(&vm),
        ports: ports(options, &control, &vm, &console),
        vcpus: vcpus(options, &kvm, &vm, &begin)?,
        bus: virtio::Bus::new(&vm, &memory, devices)?,
        control,
        console,
        kvm,
        vm,
        memory,
        rom,
        pausing: Mutex::default(),
        threads: Mutex::default(),
        started: UNIX_EPOCH.elapsed().unwrap_or_default().as_secs(),
    });
    if let Begin::As(state) = begin {
        machine.load(&state)?;
    }
    run_to_end(&machine, claim, &outcomes)
}

fn vcpus(options: &RunOptions, kvm: &Kvm, vm: &VmFd, begin: &Begin) -> Result<Vec<Vcpu>> {
    match begin {
        Begin::At(start) => {
            let cpuid = Template::new(kvm, options.cpus)?;
            let ids = 0..options.cpus;
            ids.map(|id| Vcpu::new(vm, id, &cpuid, *start)).collect()
        }
        Begin::As(state) => (0..)
            .zip(&state.cpus)
            .map(|(id, saved)| Vcpu::restored(vm, id, saved))
            .collect(),
    }
}

fn ports(options: &RunOptions, control: &Control, vm: &Arc<VmFd>, console: &Console) -> Ports {
    let drained = Drained(console.wake.clone());
    let serial = Serial::with_events(Line(Arc::clone(vm)), drained, console.output.clone());
    let cmos = Cmos::new(options.memory, options.cpus);
    // A boot loader's screen is on the serial port. Firmware shows itself there too, so its other words would
    // only be in the way.
    let screen = !options.disks.is_empty();
    let firmware = options.firmware.is_some();
    let config = firmware.then(|| FwCfg::new(options.memory, screen));
    let debug = (firmware && !screen).then(|| Debug(console.output.clone()));
    let (control, vm) = (control.clone(), Arc::clone(vm));
    Ports::new(control, vm, serial, cmos, config, debug)
}

/// Runs the machine until the guest has ended and all threads are gone.
fn run_to_end(
    machine: &Arc<Machine>,
    claim: Claim,
    outcomes: &Receiver<Outcome>,
) -> Result<Outcome> {
    let options = &machine.options;
    let metrics = options.metrics.as_deref().map(stat::open_metrics);
    let metrics = metrics.transpose()?;
    register_signal_handler(SIGRTMIN(), kicked).map_err(failed("catching a signal"))?;
    // Caught before the terminal changes, so that no signal can leave it changed.
    let signals = Signals::catch()?;
    claim.record(&options.origin)?;
    let listener = claim.listen()?;
    let ready = options.detached.then(|| detach::Ready::new(&claim));
    let ready = ready.transpose()?;
    let raw = Raw::new().map_err(failed("setting the terminal"))?;
    // All that has a name is open by now, and all threads are still to come.
    confine::seal(&claim.opened)?;
    let server = Server::start(listener, {
        let machine = Arc::clone(machine);
        move |request, client| machine.obey(request, client)
    })?;

    let started = start_threads(machine, signals, metrics);
    let told = started.and_then(|()| ready.map_or(Ok(()), |ready| ready.tell(&claim.name)));
    if let Err(error) = told {
        machine.control.end(Outcome::Host(error));
    }
    // There always is one: each thread that ends for a reason of its own gives it, a panic included.
    let outcome = outcomes.recv();
    let outcome = outcome.unwrap_or_else(|e| Outcome::Host(failed("watching the guest")(e)));
    machine.join();
    machine.console.output.finish();
    let outcome = decisive(outcome, outcomes.try_iter());
    drop(raw);
    say(&outcome);
    // Whoever waits for the end may start one of the same name then.
    drop(claim);
    server.finish(Ended::from(&outcome));
    Ok(outcome)
}

/// The first outcome, but where the guest ended well before it was seen that its last words are lost.
fn decisive(first: Outcome, mut later: impl Iterator<Item = Outcome>) -> Outcome {
    match first {
        Outcome::PoweredOff | Outcome::Rebooted => later
            .find(|later| matches!(later, Outcome::OutputLost(_)))
            .unwrap_or(first),
        first => first,
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
fn start_threads(machine: &Arc<Machine>, signals: Signals, metrics: Option<File>) -> Result<()> {
    spawn(machine, "console", move |machine| {
        machine.console.run(&signals, &machine.ports)
    })?;
    for device in machine.bus.devices() {
        let of_thread = Arc::clone(device);
        spawn(machine, &device.name, move |machine| {
            of_thread.work(&machine.control, |reason| machine.stuck(reason))
        })?;
    }
    if let Some(file) = metrics {
        spawn(machine, "metrics", move |machine| {
            stat::write_metrics(&file, machine);
            Ok(())
        })?;
    }
    for (index, vcpu) in machine.vcpus.iter().enumerate() {
        spawn(machine, &format!("vcpu{}", vcpu.id), move |machine| {
            let vcpu = &machine.vcpus[index];
            vcpu.run(&machine.ports, &machine.bus, &machine.control)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_lost_output_takes_a_good_end_back() {
        let error = || Error::call("test", "it failed");
        let lost = || Outcome::OutputLost(error());
        let decided = |first, later: [_; 2]| decisive(first, later.into_iter()).status();
        let failed = || Outcome::Host(error());
        assert_eq!(decided(Outcome::PoweredOff, [failed(), Outcome::Quit]), 0);
        assert_eq!(decided(Outcome::PoweredOff, [failed(), lost()]), 1);
        assert_eq!(decided(Outcome::Rebooted, [failed(), Outcome::Killed]), 3);
        assert_eq!(decided(Outcome::Rebooted, [lost(), failed()]), 1);
        assert_eq!(decided(Outcome::Killed, [lost(), failed()]), 8);
    }
}
