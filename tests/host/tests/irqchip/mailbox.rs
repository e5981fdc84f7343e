// SPDX-License-Identifier: GPL-2.0

//! Interrupts between real threads: each is taken before the next is sent, so one wake-up that is lost
//! is the end of it.

use rvisor_core::irqchip::mailbox::{Mailbox, Place, Request};
use rvisor_core::x86::vector::Vector;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

/// How long nothing may happen before a wake-up counts as lost.
const PATIENCE: Duration = Duration::from_secs(30);

/// Spins for a while, then lets others run: the machine may have no CPU to spare.
#[derive(Default)]
struct Pause {
    spins: u32,
    began: Option<Instant>,
}

impl Pause {
    /// Waits for a moment; gives for how long others have been let run.
    fn take(&mut self) -> Duration {
        self.spins += 1;
        if self.spins < 64 {
            std::hint::spin_loop();
            return Duration::ZERO;
        }
        thread::yield_now();
        self.began.get_or_insert_with(Instant::now).elapsed()
    }
}

/// A vCPU as its host sees it: a thread that sleeps as the kernel's wait queues let it, or that runs its
/// guest until the CPU is interrupted.
struct Vcpu {
    mailbox: Mailbox,
    /// The thread is on its queue and its state says that it sleeps.
    sleeping: AtomicBool,
    interrupted: AtomicBool,
    taken: AtomicU64,
    end: AtomicBool,
}

impl Vcpu {
    fn send(&self, vector: Vector, thread: &Thread) {
        if !self.mailbox.post(vector, false) {
            return;
        }
        match self.mailbox.request(Request::EVENT) {
            Place::Asleep => {
                if self.sleeping.swap(false, Ordering::SeqCst) {
                    thread.unpark();
                }
            }
            Place::Guest(_) => self.interrupted.store(true, Ordering::SeqCst),
            Place::Outside => {}
        }
    }

    fn sleep(&self) {
        self.mailbox.go(Place::Asleep);
        self.sleeping.store(true, Ordering::SeqCst);
        if !self.mailbox.has_requests() {
            while self.sleeping.load(Ordering::SeqCst) {
                thread::park();
            }
        }
        self.sleeping.store(false, Ordering::SeqCst);
        self.mailbox.come_back();
    }

    fn run_guest(&self) {
        self.mailbox.go(Place::Guest(0));
        if !self.mailbox.has_requests() {
            let mut pause = Pause::default();
            while !self.interrupted.swap(false, Ordering::SeqCst) {
                pause.take();
            }
        }
        self.mailbox.come_back();
    }

    /// The vCPU's thread: takes what was left, then runs its guest for a while, or halts.
    fn run(&self) {
        let mut turn = 0u32;
        while !self.end.load(Ordering::Relaxed) {
            if self.mailbox.take_requests().has(Request::EVENT) {
                let posted = self.mailbox.take_posted();
                let count: u32 = posted.vectors.iter().map(|word| word.count_ones()).sum();
                self.taken.fetch_add(count.into(), Ordering::SeqCst);
            }
            turn = turn.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            if turn >> 31 == 0 {
                self.sleep();
            } else {
                self.run_guest();
            }
        }
    }
}

#[test]
fn wake_ups_arrive() {
    try_rounds(100_000);
}

#[test]
#[ignore = "takes minutes where others use the CPUs; make wakeups runs it"]
fn a_million_wake_ups_arrive() {
    try_rounds(1_000_000);
}

fn try_rounds(rounds: u64) {
    let vcpu = Vcpu {
        mailbox: Mailbox::new(),
        sleeping: AtomicBool::new(false),
        interrupted: AtomicBool::new(false),
        taken: AtomicU64::new(0),
        end: AtomicBool::new(false),
    };
    thread::scope(|scope| {
        let thread = scope.spawn(|| vcpu.run()).thread().clone();
        for round in 0..rounds {
            vcpu.send(Vector(16 + (round % 240) as u8), &thread);
            let mut pause = Pause::default();
            while vcpu.taken.load(Ordering::SeqCst) == round {
                if pause.take() > PATIENCE {
                    // The other thread would never end.
                    eprintln!("round {round} was not seen");
                    std::process::exit(1);
                }
            }
            assert_eq!(vcpu.taken.load(Ordering::SeqCst), round + 1);
        }
        vcpu.end.store(true, Ordering::Relaxed);
        vcpu.send(Vector(16), &thread);
    });
}
