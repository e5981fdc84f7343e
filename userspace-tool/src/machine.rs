// SPDX-License-Identifier: GPL-2.0

//! The guest's machine from its parts to its end.

use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{mpsc, Arc};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use kvm_bindings::{kvm_pit_config, KVM_PIT_SPEAKER_DUMMY};
use kvm_ioctls::{Cap, Kvm, VmFd};
use vmm_sys_util::signal::{register_signal_handler, Killable, SIGRTMIN};

use crate::arguments::RunOptions;
use crate::boot::Software;
use crate::console::{Console, Output, Raw, Signals, Wake};
use crate::cpuid::Template;
use crate::devices::cmos::Cmos;
use crate::devices::debug::Debug;
use crate::devices::serial::{Drained, Line, Serial};
use crate::devices::{virtio, Ports};
use crate::error::{failed, Error, Result};
use crate::outcome::Outcome;
use crate::vcpu::Vcpu;
use crate::{hypervisor, layout, memory};

/// How long a thread gets to leave the guest before it is asked again.
const KICK_AGAIN: Duration = Duration::from_millis(1);

/// The capabilities without which no PC can be built.
pub(crate) const NEEDED: [(Cap, &str); 4] = [
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
    (Cap::Pit2, "KVM_CAP_PIT2"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
];

/// Ends the guest, from any thread. The first to do so decides how it ended.
#[derive(Clone)]
pub struct Control(Arc<Ending>);

struct Ending {
    ended: AtomicBool,
    first: mpsc::Sender<Outcome>,
}

impl Control {
    /// A control, and where its first outcome comes out.
    #[must_use]
    pub fn new() -> (Self, mpsc::Receiver<Outcome>) {
        let (first, outcomes) = mpsc::channel();
        (
            Self(Arc::new(Ending {
                ended: AtomicBool::new(false),
                first,
            })),
            outcomes,
        )
    }

    /// Ends the guest.
    pub fn end(&self, outcome: Outcome) {
        self.0.ended.store(true, Ordering::SeqCst);
        // Nobody listens any more when it has ended before.
        let _ = self.0.first.send(outcome);
    }

    /// Whether the guest has ended.
    #[must_use]
    pub fn ended(&self) -> bool {
        self.0.ended.load(Ordering::SeqCst)
    }
}

/// Builds the guest's machine, runs it, and tells how it ended.
///
/// # Errors
///
/// [`Error::Input`] where the input is wrong, [`Error::Call`] where the host failed before the guest ran.
pub fn run(options: &RunOptions) -> Result<Outcome> {
    // Everything that the device is not needed for comes first: it can be checked anywhere.
    hypervisor::check_cpus_early(options.cpus)?;
    let mut software = Software::open(options)?;
    memory::check_size(options.memory)?;
    let memory = memory::allocate(options.memory, software.rom_size())?;
    let devices = virtio::open(options)?;
    let start = software.load(&memory, options, devices.len())?;

    let kvm = hypervisor::open(&options.device)?;
    hypervisor::check_cpus(&kvm, options.cpus)?;
    let vm = Arc::new(create_vm(&kvm)?);
    memory::give(&vm, &memory)?;
    let cpuid = Template::new(&kvm, options.cpus)?;
    let vcpus = (0..options.cpus)
        .map(|id| Vcpu::new(&vm, id, &cpuid, start))
        .collect::<Result<Vec<_>>>()?;
    let bus = virtio::Bus::new(&vm, &memory, devices)?;
    run_to_end(vm, vcpus, bus, options)
}

/// Makes a VM with the interrupt controllers and the timer in the hypervisor.
fn create_vm(kvm: &Kvm) -> Result<VmFd> {
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
    Ok(vm)
}

/// Does nothing: a signal with a handler makes KVM_RUN return, which is all that it is for.
extern "C" fn kicked(_: i32, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

/// Runs the CPUs, the devices and the console until the guest has ended and all threads are gone.
fn run_to_end(
    vm: Arc<VmFd>,
    vcpus: Vec<Vcpu>,
    bus: virtio::Bus,
    options: &RunOptions,
) -> Result<Outcome> {
    let (control, outcomes) = Control::new();
    let wake = Wake::new().map_err(failed("making an eventfd"))?;
    let output = Output::new(wake.clone()).map_err(failed("opening the console"))?;
    let serial = Serial::with_events(Line(vm), Drained(wake.clone()), output.clone());
    let cmos = Cmos::new(options.memory, options.cpus);
    // An operating system has no use for firmware's console.
    let debug = options.firmware.as_ref().map(|_| Debug(output.clone()));
    let ports = Arc::new(Ports::new(control.clone(), serial, cmos, debug));
    register_signal_handler(SIGRTMIN(), kicked).map_err(failed("catching a signal"))?;
    // Caught before the terminal changes, so that no signal can leave it changed.
    let signals = Signals::catch()?;
    let raw = Raw::new().map_err(failed("setting the terminal"))?;

    let console = Console {
        output,
        wake: wake.clone(),
        signals,
        control: control.clone(),
    };
    let mut threads = vec![spawn(&control, "console".to_owned(), {
        let ports = Arc::clone(&ports);
        move || console.run(&ports)
    })];
    for device in bus.devices() {
        let (device, control) = (Arc::clone(device), control.clone());
        let name = device.name().to_owned();
        threads.push(spawn(&control.clone(), name, move || device.work(&control)));
    }
    for vcpu in vcpus {
        let (vcpu_control, ports, bus) = (control.clone(), Arc::clone(&ports), bus.clone());
        let name = format!("vcpu{}", vcpu.id());
        threads.push(spawn(&control, name, move || {
            vcpu.run(&ports, &bus, &vcpu_control)
        }));
    }
    let mut started = Vec::new();
    for thread in threads {
        match thread {
            Ok(thread) => started.push(thread),
            Err(error) => control.end(Outcome::Host(error)),
        }
    }
    // There always is one: each thread that ends for a reason of its own gives it, a panic included.
    let outcome = outcomes.recv().unwrap_or_else(|e| {
        Outcome::Host(Error::call("watching the guest", std::io::Error::other(e)))
    });
    stop(started, &wake);
    drop(raw);
    Ok(outcome)
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
