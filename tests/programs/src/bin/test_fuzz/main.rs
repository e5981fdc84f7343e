// SPDX-License-Identifier: GPL-2.0
//! A hostile program and hostile guests: requests at random from several threads at once, and guests of random
//! instructions in random states. What happens to the process is its own affair; the host must go on, and its log stay
//! free of warnings, which is what the test host looks at.
//!
//! `RVISOR_SEED` begins elsewhere, `RVISOR_ROUNDS` says how many rounds each test has.

mod random;
mod requests;
mod soup;
mod world;

use random::Random;
use rvisor_tests::guest::{self, Mode};
use rvisor_tests::layout::DONE_PORT;
use rvisor_tests::{check, guest_code, ktap, tests, Context, Device, Fail, Machine, Outcome};
use std::time::{Duration, Instant};
use world::World;

/// Rounds of a test, each with a process of its own.
const ROUNDS: u64 = 10;
/// How long a round's threads do things, and how long it may take before it is killed.
const ROUND: Duration = Duration::from_millis(700);
const LIMIT: Duration = Duration::from_secs(5);
/// How long a process may take to be gone when it was killed.
const KILL_LIMIT: Duration = Duration::from_secs(5);

guest_code!(done, code64, ["out {port}, al"], port = DONE_PORT);

fn number(name: &str, default: u64) -> Result<u64, Fail> {
    match std::env::var(name) {
        Ok(text) => text
            .parse()
            .map_err(|_| Fail::new(format!("{name}={text} is no number"))),
        Err(_) => Ok(default),
    }
}

extern "C" fn nothing(_: libc::c_int) {}

/// What the round's process does; it never returns.
fn round(world: &World, seed: u64, threads: usize) -> ! {
    let handler: extern "C" fn(libc::c_int) = nothing;
    // SAFETY: The handler does nothing. Without SA_RESTART, the signal ends KVM_RUN.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = handler as libc::sighandler_t;
        libc::sigaction(libc::SIGUSR1, &raw const action, std::ptr::null_mut());
    }
    let end = Instant::now() + ROUND;
    std::thread::scope(|scope| {
        let kicker = scope.spawn(|| world.kick());
        let runners: Vec<_> = (0..threads)
            .map(|number| {
                let random = Random::new(seed.wrapping_add(number as u64 * 1_000_003));
                scope.spawn(move || world.act(number, random, end))
            })
            .collect();
        for runner in runners {
            let _ = runner.join();
        }
        world.end();
        let _ = kicker.join();
    });
    // SAFETY: Ends the process at once, without its parent's exit handlers.
    unsafe { libc::_exit(0) }
}

/// Waits for a process until `limit`; gives its status where it has ended by then.
fn wait(process: libc::pid_t, limit: Duration) -> Option<i32> {
    let end = Instant::now() + limit;
    loop {
        let mut status = 0;
        // SAFETY: `status` is a valid place for the result.
        if unsafe { libc::waitpid(process, &raw mut status, libc::WNOHANG) } == process {
            return Some(status);
        }
        if Instant::now() >= end {
            return None;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn rounds(device: &Device, threads: usize) -> Outcome {
    let first = number("RVISOR_SEED", 1)?;
    let mut whole = 0;
    // Each process has a copy.
    let world = World::new(device)?;
    let count = number("RVISOR_ROUNDS", ROUNDS)?;
    for seed in first..first + count {
        // SAFETY: This process has one thread, so the child's copy of it is whole.
        let process = unsafe { libc::fork() };
        if process < 0 {
            return Err(std::io::Error::last_os_error()).during("fork");
        }
        if process == 0 {
            round(&world, seed, threads);
        }
        // Some are killed in the middle.
        let limit = if seed % 4 == 0 { ROUND / 8 } else { LIMIT };
        match wait(process, limit) {
            Some(status) => whole += u64::from(libc::WIFEXITED(status)),
            None => {
                // SAFETY: It is our child, not reaped yet.
                unsafe { libc::kill(process, libc::SIGKILL) };
                check!(
                    wait(process, KILL_LIMIT).is_some(),
                    "the process of round {seed} survives SIGKILL"
                );
            }
        }
    }
    check!(whole > 0, "not one of {count} rounds went to its end");
    println!("# {whole} of {count} rounds from seed {first} on went to their ends");
    // The device is as good as before.
    let machine = Machine::with_irqchip(device)?;
    let cpu = machine.vcpu(0)?;
    guest::load(&machine, &cpu, Mode::Long, done())?;
    cpu.run_until_done()
}

fn one_thread(device: &Device) -> Outcome {
    rounds(device, 1)
}

fn three_threads(device: &Device) -> Outcome {
    rounds(device, 3)
}

fn main() -> std::process::ExitCode {
    ktap::main(tests![one_thread, three_threads])
}
