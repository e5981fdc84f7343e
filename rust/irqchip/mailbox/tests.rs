// SPDX-License-Identifier: GPL-2.0

use super::*;

/// What a thread's next step is. Each step makes one access to what is shared, so that all orders of
/// the steps are all that sequentially consistent memory allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    // Who leaves something.
    Leave,
    Look,
    // The thread of the vCPU.
    Go,
    Queue,
    Check,
    Rest,
}

/// A wait queue with one thread, and a CPU that runs its guest until it is kicked.
#[derive(Clone, Debug, Default)]
struct Host {
    queued: bool,
    /// The thread sleeps, or the guest runs.
    resting: bool,
    woken: bool,
    kicked: bool,
}

/// One order of steps: `order` says who comes next, the vCPU's thread (0), which goes to `place` by the
/// steps `receiver`, or one of the others. Gives whether the vCPU's thread rests although something was
/// left for it.
fn run(place: Place, receiver: &[Step], order: &[usize], senders: usize) -> bool {
    let mailbox = Mailbox::new();
    let mut host = Host::default();
    let mut receiver = receiver.iter();
    let mut others: Vec<_> = (0..senders)
        .map(|_| [Step::Leave, Step::Look].iter())
        .collect();
    let mut found = false;
    for &who in order {
        let Some(step) = (if who == 0 {
            receiver.next()
        } else {
            others[who - 1].next()
        }) else {
            continue;
        };
        match step {
            Step::Leave => mailbox.leave(Request::EVENT),
            Step::Look => match mailbox.place() {
                // A wake-up reaches who is on the queue, and is lost on who is not.
                Place::Asleep => host.woken |= host.queued,
                // A kick that comes before the guest is entered makes it exit at once.
                Place::Guest(_) => host.kicked = true,
                Place::Outside => {}
            },
            Step::Go => mailbox.go(place),
            Step::Queue => host.queued = true,
            Step::Check => found = mailbox.has_requests(),
            Step::Rest => host.resting = !found,
        }
    }
    host.resting && !host.woken && !host.kicked
}

/// All orders in which the vCPU's `own` steps and the other threads' two steps can come.
fn orders(own: usize, senders: usize) -> Vec<Vec<usize>> {
    fn extend(left: &mut Vec<usize>, order: &mut Vec<usize>, all: &mut Vec<Vec<usize>>) {
        if left.iter().all(|&steps| steps == 0) {
            all.push(order.clone());
            return;
        }
        for who in 0..left.len() {
            if left[who] > 0 {
                left[who] -= 1;
                order.push(who);
                extend(left, order, all);
                order.pop();
                left[who] += 1;
            }
        }
    }
    let mut left = vec![own];
    left.resize(senders + 1, 2);
    let mut all = Vec::new();
    extend(&mut left, &mut Vec::new(), &mut all);
    all
}

const SLEEP: [Step; 4] = [Step::Go, Step::Queue, Step::Check, Step::Rest];
const ENTER: [Step; 3] = [Step::Go, Step::Check, Step::Rest];

/// Whether something is left unseen in any order.
fn loses(place: Place, receiver: &[Step], senders: usize) -> bool {
    orders(receiver.len(), senders)
        .iter()
        .any(|order| run(place, receiver, order, senders))
}

#[test]
fn nothing_is_left_unseen_in_any_order() {
    for senders in 1..=3 {
        assert!(!loses(Place::Asleep, &SLEEP, senders));
        assert!(!loses(Place::Guest(0), &ENTER, senders));
    }
}

#[test]
fn each_step_is_in_its_place() {
    let [go, queue, check, rest] = SLEEP;
    for wrong in [
        [go, check, queue, rest],
        [check, go, queue, rest],
        [queue, check, go, rest],
    ] {
        assert!(loses(Place::Asleep, &wrong, 1), "{wrong:?}");
    }
    assert!(!loses(Place::Asleep, &[queue, go, check, rest], 2));
    assert!(loses(Place::Guest(0), &[check, go, rest], 1));
}

#[test]
fn places_are_told_apart() {
    let mailbox = Mailbox::new();
    assert_eq!(mailbox.place(), Place::Outside);
    for place in [Place::Asleep, Place::Guest(0), Place::Guest(8191)] {
        mailbox.go(place);
        assert_eq!(mailbox.request(Request::NMI), place);
    }
    mailbox.come_back();
    assert_eq!(mailbox.place(), Place::Outside);
}

#[test]
fn requests_are_taken_once() {
    let mailbox = Mailbox::new();
    assert!(mailbox.take_requests().is_empty());
    mailbox.request_self(Request::ARM_TIMER);
    mailbox.leave(Request::PIT);
    assert!(mailbox.has_requests());
    let taken = mailbox.take_requests();
    assert_eq!(taken, Request::ARM_TIMER.with(Request::PIT));
    assert!(taken.has(Request::PIT) && !taken.has(Request::EVENT));
    assert!(!mailbox.has_requests());
}

#[test]
fn a_vector_is_announced_once_until_it_is_taken() {
    let mailbox = Mailbox::new();
    assert!(mailbox.post(Vector(0x91), true));
    assert!(!mailbox.post(Vector(0x91), false));
    assert!(mailbox.post(Vector(0x31), false));
    let posted = mailbox.take_posted();
    assert_eq!(posted.vectors, [1 << 0x31, 0, 1 << 0x11, 0]);
    assert_eq!(posted.level, [0, 0, 1 << 0x11, 0]);
    assert!(posted.set().contains(Vector(0x91)));
    assert_eq!(mailbox.take_posted(), Posted::default());
    assert!(mailbox.post(Vector(0x91), false));
    assert_eq!(mailbox.take_posted().level, [0; 4]);
}

/// A vector that is always posted as level-triggered is never taken as an edge, whenever it is taken.
#[test]
fn a_level_is_taken_with_its_vector() {
    let mailbox = Mailbox::new();
    let rounds = 200_000;
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for _ in 0..rounds {
                let _ = mailbox.post(Vector(0x91), true);
            }
        });
        for _ in 0..rounds {
            let posted = mailbox.take_posted();
            assert_eq!(posted.level, posted.vectors);
        }
    });
}

#[test]
fn two_nmis_wait_at_most() {
    let mailbox = Mailbox::new();
    for _ in 0..3 {
        mailbox.post_nmi();
    }
    assert_eq!(mailbox.take_nmis(), 2);
    assert_eq!(mailbox.take_nmis(), 0);
}

#[test]
fn a_sipi_counts_only_behind_the_last_init() {
    let mailbox = Mailbox::new();
    let none = Startup {
        init: false,
        sipi: None,
    };
    assert_eq!(mailbox.take_startup(), none);
    mailbox.post_init();
    mailbox.post_sipi(Vector(8));
    mailbox.post_sipi(Vector(9));
    assert_eq!(
        mailbox.take_startup(),
        Startup {
            init: true,
            sipi: Some(Vector(9))
        }
    );
    mailbox.post_sipi(Vector(0));
    assert_eq!(
        mailbox.take_startup(),
        Startup {
            init: false,
            sipi: Some(Vector(0))
        }
    );
    mailbox.post_sipi(Vector(8));
    mailbox.post_init();
    assert_eq!(
        mailbox.take_startup(),
        Startup {
            init: true,
            sipi: None
        }
    );
    assert_eq!(mailbox.take_startup(), none);
}

#[test]
fn identities_come_back_as_they_were() {
    use crate::irqchip::destination::{ApicMode, LogicalModel};
    let mailbox = Mailbox::new();
    let identity = ApicIdentity {
        id: ApicId(7),
        xapic_id: 9,
        logical_id: 0x80,
        model: LogicalModel::Cluster,
        mode: ApicMode::X2Apic,
        software_enabled: true,
        takes_pic: true,
        is_watchdog: true,
    };
    mailbox.publish_identity(identity);
    assert_eq!(mailbox.identity(ApicId(7)), identity);
}
