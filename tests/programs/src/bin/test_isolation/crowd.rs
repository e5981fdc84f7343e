// SPDX-License-Identifier: GPL-2.0
//! Many machines at once, of which only some are well.

use crate::{counting, start};
use rvisor_tests::guest::{self, Mode};
use rvisor_tests::layout::HOLE;
use rvisor_tests::{check, check_eq, guest_code, Device, Exit, Fail, Machine, Outcome};

/// What a machine of the crowd does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// Counts, and ends when it has done its rounds.
    Healthy,
    /// Loops until it is killed.
    Looping,
    /// Fails, each time in another way, and is made anew, until it is killed.
    Crashing,
}

const CROWD: [Kind; 16] = {
    use Kind::{Crashing as C, Healthy as H, Looping as L};
    [H, L, C, H, L, C, H, L, C, H, L, C, H, L, C, H]
};

/// Rounds of a healthy machine, each some 50,000 instructions long.
const ROUNDS: u64 = 20;

guest_code!(
    working,
    code64,
    [
        "2: mov ebp, 20000",
        "3: inc r14",
        "dec ebp",
        "jnz 3b",
        "inc r15",
        "out {done}, al",
        "jmp 2b",
    ],
    done = rvisor_tests::layout::DONE_PORT
);
// Interrupts on: see test_exits on what Bochs does otherwise.
guest_code!(looping, code64, ["sti", "2: inc rax", "jmp 2b"]);
guest_code!(undefined, code64, ["ud2"]);
guest_code!(stray, code64, ["mov rax, [{hole}]", "hlt"], hole = HOLE);

fn healthy(device: &Device) -> Outcome {
    let (_machine, cpu) = start(device, working())?;
    for round in 1..=ROUNDS {
        cpu.run_until_done()?;
        let regs = cpu.regs()?;
        check_eq!((regs.r15, regs.r14), (round, round * 20_000), "the counts");
    }
    Ok(())
}

fn looping_forever(device: &Device) -> Outcome {
    let (_machine, cpu) = start(device, looping())?;
    Err(cpu.unexpected(&cpu.run()?))
}

/// One failure: a triple fault, segments that no CPU can load, or an access to nothing that is not answered.
fn crash(device: &Device, way: u32) -> Outcome {
    match way % 3 {
        0 => {
            let (_machine, cpu) = start(device, undefined())?;
            let mut sregs = cpu.sregs()?;
            sregs.idt.limit = 0;
            cpu.set_sregs(&sregs)?;
            cpu.run_expecting(&Exit::Shutdown)
        }
        1 => {
            let (_machine, cpu) = start(device, counting())?;
            let mut sregs = cpu.sregs()?;
            sregs.ss.type_ = 0xb;
            cpu.set_sregs(&sregs)?;
            let exit = cpu.run()?;
            check!(
                matches!(exit, Exit::FailEntry(_) | Exit::Internal(_)),
                "{exit:x?}"
            );
            Ok(())
        }
        _ => {
            let machine = Machine::with_irqchip(device)?;
            let cpu = machine.vcpu(0)?;
            guest::load(&machine, &cpu, Mode::Long, stray())?;
            let exit = cpu.run()?;
            check!(matches!(exit, Exit::MmioRead { .. }), "{exit:x?}");
            Ok(())
        }
    }
}

fn crashing(device: &Device) -> Outcome {
    for way in 0.. {
        crash(device, way)?;
    }
    Ok(())
}

/// A process that does what its kind says; its exit status is 0 where that ended well.
fn spawn(device: &Device, kind: Kind) -> Result<libc::pid_t, Fail> {
    // SAFETY: This process has one thread.
    let pid = unsafe { libc::fork() };
    if pid < 0 {
        return Err(std::io::Error::last_os_error().into());
    }
    if pid == 0 {
        // SAFETY: Only says that this process shall die with its parent.
        unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
        let outcome = match kind {
            Kind::Healthy => healthy(device),
            Kind::Looping => looping_forever(device),
            Kind::Crashing => crashing(device),
        };
        if let Err(fail) = &outcome {
            eprintln!("{kind:?}: {fail:?}");
        }
        // SAFETY: Ends the child at once.
        unsafe { libc::_exit(i32::from(outcome.is_err())) };
    }
    Ok(pid)
}

/// Waits for one child; its status.
fn wait(pid: libc::pid_t) -> i32 {
    let mut status = 0;
    // SAFETY: `pid` is our child; `status` is a place for its end.
    unsafe { libc::waitpid(pid, &raw mut status, 0) };
    status
}

/// 16 machines at once: those that are well finish, whatever the others do.
pub(crate) fn crowd_of_sixteen(device: &Device) -> Outcome {
    let mut children = Vec::new();
    for kind in CROWD {
        children.push((kind, spawn(device, kind)?));
    }
    let mut bad = Vec::new();
    for (kind, pid) in &children {
        if *kind == Kind::Healthy && wait(*pid) != 0 {
            bad.push(*kind);
        }
    }
    for (kind, pid) in &children {
        if *kind == Kind::Healthy {
            continue;
        }
        // SAFETY: `pid` is our child, not reaped yet.
        unsafe { libc::kill(*pid, libc::SIGKILL) };
        let status = wait(*pid);
        // One that ended by itself had met what it should not.
        if !libc::WIFSIGNALED(status) {
            bad.push(*kind);
        }
    }
    check!(
        bad.is_empty(),
        "machines that did not do their part: {bad:?}"
    );
    Ok(())
}
