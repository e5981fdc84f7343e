// SPDX-License-Identifier: GPL-2.0
//! The two PICs and the timer, with the local APIC as it is at reset: LINT0 carries ExtINT.

use crate::start;
use rvisor_tests::guest::Mode;
use rvisor_tests::handlers::{count, Acknowledge};
use rvisor_tests::layout::{COUNTS, DONE_PORT};
use rvisor_tests::{check, check_eq, guest_code, set_up_8259s, Context, Device, Outcome};

/// A guest that sets the PICs up (vectors 0x20 and 0x28) with these masks, says that it is ready, and
/// halts until the vector's count is reached.
macro_rules! pic_guest {
    ($name:ident, $mode:ident, $master:literal, $slave:literal, $vector:expr, $wanted:expr, [$($line:literal),*]) => {
        guest_code!($name, $mode, [
            set_up_8259s!(1, $master, $slave),
            $($line,)*
            "out {done}, al",
            "2: sti",
            "hlt",
            "cli",
            "cmp word ptr [{count}], {wanted}",
            "jb 2b",
            "out {done}, al",
        ], count = COUNTS + 8 * $vector, wanted = $wanted, done = DONE_PORT);
    };
}

// Channel 0, mode 2, every 4096 ticks of 1.193 MHz: 3.4 ms.
macro_rules! timer_guest {
    ($name:ident, $mode:ident) => {
        pic_guest!(
            $name,
            $mode,
            0xfe,
            0xff,
            0x20,
            3,
            [
                "mov al, 0x34",
                "out 0x43, al",
                "xor al, al",
                "out 0x40, al",
                "mov al, 0x10",
                "out 0x40, al"
            ]
        );
    };
}
timer_guest!(timer16, code16);
timer_guest!(timer32, code32);
timer_guest!(timer64, code64);

/// HLT blocks in the hypervisor, the timer's interrupts wake it, 3.4 ms apart.
pub(crate) fn timer_in_each_mode(device: &Device) -> Outcome {
    for (mode, code) in [
        (Mode::Real, timer16()),
        (Mode::Protected, timer32()),
        (Mode::Long, timer64()),
    ] {
        let what = format!("{mode:?} mode");
        let (machine, cpu) = start(device, mode, code, Acknowledge::Pic)?;
        cpu.run_until_done().during(&what)?;
        let begin = std::time::Instant::now();
        cpu.run_until_done().during(&what)?;
        let time = begin.elapsed().as_micros();
        check_eq!(count(&machine.memory, 0x20), 3, "{what}: interrupts");
        // The first may have come before; two whole periods lie between the first and the third.
        check!(
            (6_000..100_000).contains(&time),
            "{what}: three took {time} us"
        );
    }
    Ok(())
}

pic_guest!(line5, code32, 0xdf, 0xff, 0x25, 1, []);

/// An edge that came while interrupts were off is kept, and gives one interrupt.
pub(crate) fn edge_line(device: &Device) -> Outcome {
    let (machine, cpu) = start(device, Mode::Protected, line5(), Acknowledge::Pic)?;
    cpu.run_until_done()?;
    machine.vm.set_irq_line(5, true)?;
    machine.vm.set_irq_line(5, false)?;
    cpu.run_until_done()?;
    check_eq!(count(&machine.memory, 0x25), 1, "interrupts");
    Ok(())
}

pic_guest!(line10, code32, 0xfb, 0xfb, 0x2a, 2, ["nop"]);

/// The second PIC's interrupts come through line 2 of the first.
pub(crate) fn slave_line(device: &Device) -> Outcome {
    let (machine, cpu) = start(device, Mode::Protected, line10(), Acknowledge::Pics)?;
    cpu.run_until_done()?;
    std::thread::scope(|scope| {
        scope.spawn(|| {
            // The second edge comes when the first was taken.
            for _ in 0..2 {
                let before = count(&machine.memory, 0x2a);
                let sent = machine.vm.set_irq_line(10, true).is_ok()
                    && machine.vm.set_irq_line(10, false).is_ok();
                while sent && count(&machine.memory, 0x2a) == before {
                    std::thread::sleep(std::time::Duration::from_millis(1));
                }
            }
        });
        cpu.run_until_done()
    })?;
    check_eq!(count(&machine.memory, 0x2a), 2, "interrupts");
    Ok(())
}

pic_guest!(
    only_timer,
    code32,
    0xfe,
    0xff,
    0x20,
    2,
    [
        "mov al, 0x34",
        "out 0x43, al",
        "xor al, al",
        "out 0x40, al",
        "mov al, 0x10",
        "out 0x40, al"
    ]
);

/// A masked line gives nothing while others do.
pub(crate) fn masked_line(device: &Device) -> Outcome {
    let (machine, cpu) = start(device, Mode::Protected, only_timer(), Acknowledge::Pic)?;
    cpu.run_until_done()?;
    machine.vm.set_irq_line(5, true)?;
    machine.vm.set_irq_line(5, false)?;
    cpu.run_until_done()?;
    check_eq!(
        count(&machine.memory, 0x25),
        0,
        "the masked line's interrupts"
    );
    check_eq!(count(&machine.memory, 0x20), 2, "the timer's interrupts");
    Ok(())
}
