// SPDX-License-Identifier: GPL-2.0
//! A guest that runs until it is killed, for tests of what happens to the host meanwhile.
//!
//! `looper --device PATH FILE` keeps the number of the guest's rounds in FILE. The guest holds values in
//! registers of all kinds and looks at them in each round; the program ends with status 1 where one has
//! changed, or where KVM_RUN gives what it should not.

use rvisor_tests::guest::{self, Mode};
use rvisor_tests::layout::{DATA, DONE_PORT, UNEXPECTED_PORT};
use rvisor_tests::{guest_code, Device, Exit, Fail, Machine};
use std::convert::Infallible;
use std::io::{Seek, Write};
use std::process::ExitCode;

/// Turns of the loop in one round.
const TURNS: u32 = 20_000;

// Interrupts are on: see test_exits on what Bochs does otherwise.
guest_code!(
    rounds,
    code64,
    [
        "mov rax, 0x1234567890abcdef",
        "mov r8, rax",
        "mov r9, rax",
        "mov r15, rax",
        "movq xmm3, rax",
        "movq xmm13, rax",
        "mov dr2, rax",
        "mov cr2, rax",
        "mov ecx, 0xc0000102",
        "mov eax, 0x4321000",
        "xor edx, edx",
        "wrmsr",
        "mov ecx, 0xc0000082",
        "wrmsr",
        "mov [{data}], r8",
        "sti",
        "2: mov ebp, {turns}",
        "3: inc r14",
        "dec ebp",
        "jnz 3b",
        // What was set is there.
        "cmp r9, r8",
        "jne 4f",
        "cmp r15, r8",
        "jne 4f",
        "movq rax, xmm3",
        "cmp rax, r8",
        "jne 4f",
        "movq rax, xmm13",
        "cmp rax, r8",
        "jne 4f",
        "mov rax, dr2",
        "cmp rax, r8",
        "jne 4f",
        "mov rax, cr2",
        "cmp rax, r8",
        "jne 4f",
        "cmp [{data}], r8",
        "jne 4f",
        "mov ecx, 0xc0000102",
        "rdmsr",
        "cmp eax, 0x4321000",
        "jne 4f",
        "mov ecx, 0xc0000082",
        "rdmsr",
        "cmp eax, 0x4321000",
        "jne 4f",
        "out {done}, al",
        "jmp 2b",
        "4: out {bad}, al",
    ],
    turns = TURNS,
    data = DATA,
    done = DONE_PORT,
    bad = UNEXPECTED_PORT
);

fn run(device: &Device, path: &str) -> Result<Infallible, Fail> {
    let mut file = std::fs::File::create(path)?;
    let machine = Machine::new(device)?;
    let cpu = machine.vcpu(0)?;
    guest::load(&machine, &cpu, Mode::Long, rounds())?;
    let mut count: u64 = 0;
    loop {
        match cpu.run()? {
            exit if exit.is_done() => count += 1,
            // A signal, or the freezer's before a suspend.
            Exit::Interrupted(_) => {}
            exit => {
                return Err(cpu
                    .unexpected(&exit)
                    .during(&format!("after {count} rounds")))
            }
        }
        file.rewind()?;
        file.write_all(format!("{count}\n").as_bytes())?;
    }
}

fn main() -> ExitCode {
    let (device, words) = match Device::from_arguments() {
        Ok(found) => found,
        Err(text) => {
            eprintln!("{text}");
            return ExitCode::from(2);
        }
    };
    let [path] = words.as_slice() else {
        eprintln!("usage: looper --device PATH FILE");
        return ExitCode::from(2);
    };
    let Err(fail) = run(&device, path);
    eprintln!("looper: {fail:?}");
    ExitCode::FAILURE
}
