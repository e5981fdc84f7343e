// SPDX-License-Identifier: GPL-2.0
//! A guest that fails, loops or is killed harms nobody; guests never see each other's state.

mod crowd;
mod failing;
mod replies;
mod state;

use rvisor_tests::guest::{self, Mode};
use rvisor_tests::layout::DONE_PORT;
use rvisor_tests::{check_eq, guest_code, ktap, tests, Cpu, Device, Fail, Machine, Outcome};

guest_code!(
    counting,
    code64,
    ["2: inc r15", "out {done}, al", "jmp 2b"],
    done = DONE_PORT
);

/// A guest in long mode that runs `code`.
fn start(device: &Device, code: &[u8]) -> Result<(Machine, Cpu), Fail> {
    let machine = Machine::new(device)?;
    let cpu = machine.vcpu(0)?;
    guest::load(&machine, &cpu, Mode::Long, code)?;
    Ok((machine, cpu))
}

/// The guest that goes on while others fail: it counts its exits.
struct Bystander {
    _machine: Machine,
    cpu: Cpu,
    rounds: u64,
}

impl Bystander {
    fn new(device: &Device) -> Result<Self, Fail> {
        let (machine, cpu) = start(device, counting())?;
        Ok(Self {
            _machine: machine,
            cpu,
            rounds: 0,
        })
    }

    /// Three rounds, none lost.
    fn go_on(&mut self) -> Outcome {
        for _ in 0..3 {
            self.cpu
                .run_until_done()
                .map_err(|fail| fail.during("the second guest"))?;
            self.rounds += 1;
        }
        check_eq!(
            self.cpu.regs()?.r15,
            self.rounds,
            "the second guest's rounds"
        );
        Ok(())
    }
}

fn main() -> std::process::ExitCode {
    ktap::main(tests![
        failing::triple_fault,
        failing::bad_entry_state,
        failing::killed_in_loop,
        failing::killed_while_it_waits,
        failing::killed_in_deaf_loop,
        failing::killed_in_hlt,
        failing::close_orders,
        failing::many_rounds,
        state::registers_apart,
        state::memory_apart,
        state::host_registers,
        state::eight_machines,
        crowd::crowd_of_sixteen,
        replies::replies_hold_nothing_else,
    ])
}
