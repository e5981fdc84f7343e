// SPDX-License-Identifier: GPL-2.0
//! `rvisor stop`: a guest that minds its power button, and one that does not.

use super::{check_line, Machines};
use rvisor_tests::{check, guest_code, set_up_8259s, Device, Outcome};
use std::fs;
use std::time::Instant;

/// A ROM's size, and where the CPU enters it.
const ROM: usize = 64 << 10;
const RESET: usize = ROM - 16;
/// Jumps to the ROM's begin in the first MiB: `jmp 0xf000:0`.
const JUMP: [u8; 5] = [0xea, 0, 0, 0, 0xf0];

guest_code!(
    /// Waits for the interrupt of ACPI, IRQ 9, level-triggered, by the 8259s at vectors 0x20 and 0x28, and switches
    /// off where the power button is its cause.
    pub(super) minds_the_button,
    code16,
    [
        "cli",
        "xor ax, ax",
        "mov ds, ax",
        "mov ss, ax",
        "mov sp, 0x7000",
        // The call leaves the address of what follows, the handler, for vector 0x29.
        "call 55f",
        "mov dx, 0x600",
        "in ax, dx",
        "test ax, 0x100",
        "jz 44f",
        "mov dx, 0x604",
        "mov ax, 0x3400",
        "out dx, ax",
        "44: hlt",
        "jmp 44b",
        "55: pop word ptr [0x29 * 4]",
        "mov word ptr [0x29 * 4 + 2], cs",
        // All masked but the cascade and IRQ 9.
        set_up_8259s!(1, 0xfb, 0xfd),
        // IRQ 9 is level-triggered.
        "mov dx, 0x4d1",
        "mov al, 2",
        "out dx, al",
        // The power button's enable bit.
        "mov dx, 0x602",
        "mov ax, 0x100",
        "out dx, ax",
        "mov dx, 0x402",
        "mov al, 'r'",
        "out dx, al",
        "sti",
        "33: hlt",
        "jmp 33b",
    ]
);

guest_code!(
    /// Halts.
    pub(super) minds_nothing,
    code16,
    ["mov dx, 0x402", "mov al, 'r'", "out dx, al", "22: cli", "hlt", "jmp 22b"]
);

/// Starts that code as firmware and waits until it has said that it is ready.
pub(super) fn start(machines: &Machines, code: &[u8]) -> Outcome {
    let mut rom = vec![0; ROM];
    rom[..code.len()].copy_from_slice(code);
    rom[RESET..RESET + JUMP.len()].copy_from_slice(&JUMP);
    let path = machines.folder.join("rom");
    fs::write(&path, rom)?;
    let path = path.to_string_lossy();
    machines.gives(
        0,
        &[
            "run",
            "--detach",
            "--name",
            "one",
            "--memory",
            "16M",
            "--device",
            &machines.device,
            "--firmware",
            &path,
        ],
    )?;
    machines.await_console("one", "{\"ok\":{}}\nr")
}

/// The power button reaches the guest by its interrupt.
pub(super) fn power_button(device: &Device) -> Outcome {
    let machines = Machines::new(device)?;
    start(&machines, minds_the_button())?;
    machines.gives(0, &["stop", "one", "--timeout", "8"])?;
    check_line(
        &fs::read_to_string(machines.file("one/log"))?,
        &["powered off"],
    )
}

/// A guest that does not react is ended, not before its time.
pub(super) fn stop_insists(device: &Device) -> Outcome {
    let machines = Machines::new(device)?;
    start(&machines, minds_nothing())?;
    let began = Instant::now();
    let (_, said) = machines.gives(8, &["stop", "one", "--timeout", "1"])?;
    check!(
        began.elapsed().as_millis() >= 1000,
        "ended after {:?}",
        began.elapsed()
    );
    check_line(&said, &["did not switch itself off within 1 s"])
}
