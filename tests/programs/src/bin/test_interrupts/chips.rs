// SPDX-License-Identifier: GPL-2.0
//! The 8259s' modes, the IOAPIC's states and the 8254's channels, register by register.

use crate::probe::Probe;
use kvm_bindings as kb;
use rvisor_tests::guest::{self, Mode};
use rvisor_tests::handlers::{self, Acknowledge};
use rvisor_tests::layout::IOAPIC;
use rvisor_tests::{
    check, check_eq, guest_code, Config, Context, Device, Exit, Fail, Machine, Outcome,
};
use std::time::{Duration, Instant};

const SET_UP: [(u16, u8); 10] = [
    (0x20, 0x11),
    (0x21, 0x20),
    (0x21, 4),
    (0x21, 1),
    (0xa0, 0x11),
    (0xa1, 0x28),
    (0xa1, 2),
    (0xa1, 1),
    (0x21, 0),
    (0xa1, 0),
];

/// A guest whose 8259s are set up for vectors 0x20 and 0x28, nothing masked.
fn with_pics(machine: &Machine) -> Result<Probe<'_>, Fail> {
    let probe = Probe::new(machine, 0)?;
    probe.output(&SET_UP)?;
    Ok(probe)
}

fn pulse(machine: &Machine, line: u32) -> Result<(), Fail> {
    machine.vm.set_irq_line(line, true)?;
    machine.vm.set_irq_line(line, false).during("KVM_IRQ_LINE")
}

/// IRR and ISR as OCW3 selects them.
fn requests_and_service(probe: &Probe<'_>, port: u16) -> Result<(u8, u8), Fail> {
    probe.output(&[(port, 0x0a)])?;
    let irr = probe.input(port)?;
    probe.output(&[(port, 0x0b)])?;
    Ok((irr, probe.input(port)?))
}

/// Fully nested mode: what is requested and in service, and the order of priority.
pub(crate) fn pic_priorities(device: &Device) -> Outcome {
    let machine = Machine::with_irqchip(device)?;
    let probe = with_pics(&machine)?;
    for line in [6, 10, 3] {
        pulse(&machine, line)?;
    }
    check_eq!(requests_and_service(&probe, 0x20)?, (0x4c, 0), "the first");
    check_eq!(requests_and_service(&probe, 0xa0)?, (0x04, 0), "the second");
    check_eq!(probe.take_interrupts()?, [0x2a], "taken");
    check_eq!(
        requests_and_service(&probe, 0x20)?,
        (0x48, 0x04),
        "the first"
    );
    check_eq!(requests_and_service(&probe, 0xa0)?, (0, 0x04), "the second");
    probe.output(&[(0xa0, 0x62), (0x20, 0x62)])?;
    check_eq!(probe.take_interrupts()?, [0x23], "taken");
    pulse(&machine, 1)?;
    check_eq!(probe.take_interrupts()?, [0x21], "taken on top of it");
    probe.output(&[(0x20, 0x20)])?;
    check_eq!(
        requests_and_service(&probe, 0x20)?,
        (0x40, 0x08),
        "after EOI"
    );
    probe.output(&[(0x20, 0x20)])?;
    check_eq!(probe.take_interrupts()?, [0x26], "taken at the end");
    Ok(())
}

/// Rotation: on EOI, by command, and on automatic EOI.
pub(crate) fn pic_rotation(device: &Device) -> Outcome {
    let machine = Machine::with_irqchip(device)?;
    let probe = with_pics(&machine)?;
    pulse(&machine, 1)?;
    check_eq!(probe.take_interrupts()?, [0x21], "the first");
    // Rotate on non-specific EOI: line 1 comes last now, line 3 before it.
    probe.output(&[(0x20, 0xa0)])?;
    pulse(&machine, 1)?;
    pulse(&machine, 3)?;
    check_eq!(probe.take_interrupts()?, [0x23], "after rotation");
    probe.output(&[(0x20, 0x63)])?;
    check_eq!(probe.take_interrupts()?, [0x21], "then the other");
    probe.output(&[(0x20, 0x61)])?;
    // Set priority: line 4 is the lowest, line 5 the highest.
    probe.output(&[(0x20, 0xc4)])?;
    pulse(&machine, 0)?;
    pulse(&machine, 5)?;
    check_eq!(probe.take_interrupts()?, [0x25], "after set priority");
    // Rotate on specific EOI: line 5 last, line 6 first.
    probe.output(&[(0x20, 0xe5)])?;
    pulse(&machine, 6)?;
    check_eq!(probe.take_interrupts()?, [0x26], "after specific rotation");
    Ok(())
}

/// Automatic EOI: nothing stays in service, and nothing holds back what comes next.
pub(crate) fn pic_automatic_eoi(device: &Device) -> Outcome {
    let machine = Machine::with_irqchip(device)?;
    let probe = with_pics(&machine)?;
    probe.output(&[(0x20, 0x11), (0x21, 0x20), (0x21, 4), (0x21, 3), (0x21, 0)])?;
    pulse(&machine, 3)?;
    check_eq!(probe.take_interrupts()?, [0x23], "taken");
    check_eq!(requests_and_service(&probe, 0x20)?, (0, 0), "afterwards");
    pulse(&machine, 7)?;
    check_eq!(probe.take_interrupts()?, [0x27], "taken without an EOI");
    // With rotation line 7 came last anyway; line 0 does after its turn.
    probe.output(&[(0x20, 0x80)])?;
    pulse(&machine, 0)?;
    check_eq!(probe.take_interrupts()?, [0x20], "taken, rotating");
    probe.output(&[(0x20, 0x00)])?;
    pulse(&machine, 0)?;
    pulse(&machine, 6)?;
    check_eq!(
        probe.take_interrupts()?.first(),
        Some(&0x20),
        "one of both: the list is by vector"
    );
    Ok(())
}

/// A poll acknowledges in place of the CPU.
pub(crate) fn pic_poll(device: &Device) -> Outcome {
    let machine = Machine::with_irqchip(device)?;
    let probe = with_pics(&machine)?;
    probe.output(&[(0x20, 0x0c)])?;
    check_eq!(probe.input(0x20)? & 0x80, 0, "a poll without a request");
    pulse(&machine, 5)?;
    probe.output(&[(0x20, 0x0c)])?;
    check_eq!(probe.input(0x20)?, 0x85, "a poll");
    probe.output(&[(0x20, 0x0a)])?;
    check_eq!(probe.input(0x20)?, 0, "IRR after it");
    check_eq!(probe.take_interrupts()?, [], "what is left for the CPU");
    probe.output(&[(0x20, 0x65)])?;
    pulse(&machine, 12)?;
    probe.output(&[(0xa0, 0x0c)])?;
    check_eq!(probe.input(0xa0)?, 0x84, "a poll of the second");
    check_eq!(probe.take_interrupts()?, [], "what is left for the CPU");
    Ok(())
}

/// ELCR: a level-triggered line interrupts until it is low, an edge once.
pub(crate) fn pic_level(device: &Device) -> Outcome {
    let machine = Machine::with_irqchip(device)?;
    let probe = with_pics(&machine)?;
    probe.output(&[(0x4d0, 0xff), (0x4d1, 0xff)])?;
    check_eq!(
        (probe.input(0x4d0)?, probe.input(0x4d1)?),
        (0xf8, 0xde),
        "ELCR: lines 0, 1, 2, 8 and 13 stay edge-triggered"
    );
    machine.vm.set_irq_line(11, true)?;
    for _ in 0..2 {
        check_eq!(probe.take_interrupts()?, [0x2b], "while it is high");
        check_eq!(probe.take_interrupts()?, [], "before its EOI");
        probe.output(&[(0xa0, 0x20), (0x20, 0x20)])?;
    }
    check_eq!(probe.take_interrupts()?, [0x2b], "once more");
    machine.vm.set_irq_line(11, false)?;
    probe.output(&[(0xa0, 0x20), (0x20, 0x20)])?;
    check_eq!(probe.take_interrupts()?, [], "when it is low");
    Ok(())
}

/// The redirection entry of a pin, by KVM_GET_IRQCHIP.
fn entry(machine: &Machine, pin: usize) -> Result<u64, Fail> {
    let mut chip = kb::kvm_irqchip {
        chip_id: kb::KVM_IRQCHIP_IOAPIC,
        ..Default::default()
    };
    machine
        .vm
        .get_irqchip(&mut chip)
        .during("KVM_GET_IRQCHIP")?;
    // SAFETY: The union is integers and arrays of them, and the IOAPIC's state was asked for.
    Ok(unsafe { chip.chip.ioapic.redirtbl[pin].bits })
}

fn program(probe: &Probe<'_>, pin: u32, entry: u64) -> Result<(), Fail> {
    for (register, value) in [
        (0x11 + 2 * pin, (entry >> 32) as u32),
        (0x10 + 2 * pin, entry as u32),
    ] {
        probe.write_memory(IOAPIC, register)?;
        probe.write_memory(IOAPIC + 0x10, value)?;
    }
    Ok(())
}

const REMOTE_IRR: u64 = 1 << 14;
const LEVEL: u64 = 1 << 15;
const MASKED: u64 = 1 << 16;

/// Remote IRR: from a level-triggered pin's message to the EOI of its vector.
pub(crate) fn ioapic_remote_irr(device: &Device) -> Outcome {
    let machine = Machine::with_irqchip(device)?;
    let probe = Probe::new(&machine, 0)?;
    probe.set_lapic(0xf0, 0x1ff)?;
    let remote_irr = |pin| Ok::<_, Fail>(entry(&machine, pin)? & REMOTE_IRR != 0);
    // Two pins with one vector, a third one edge-triggered.
    program(&probe, 10, LEVEL | 0x61)?;
    program(&probe, 12, LEVEL | MASKED | 0x61)?;
    program(&probe, 14, 0x62)?;
    pulse(&machine, 14)?;
    check!(!remote_irr(14)?, "remote IRR of an edge");
    check_eq!(probe.take_interrupts()?, [0x62], "the edge");
    probe.set_lapic(0xb0, 0)?;
    machine.vm.set_irq_line(10, true)?;
    machine.vm.set_irq_line(12, true)?;
    check!(remote_irr(10)?, "remote IRR of the one that is high");
    check!(!remote_irr(12)?, "remote IRR of the masked one");
    check_eq!(probe.take_interrupts()?, [0x61], "the first");
    check_eq!(
        probe.lapic(0x1b0)? & 2,
        2,
        "the TMR's bit of the level-triggered vector"
    );
    check!(remote_irr(10)?, "remote IRR until the EOI");
    // Lowered and raised before the EOI: one more after it.
    machine.vm.set_irq_line(10, false)?;
    machine.vm.set_irq_line(10, true)?;
    check_eq!(probe.take_interrupts()?, [], "before the EOI");
    probe.set_lapic(0xb0, 0)?;
    check!(remote_irr(10)?, "remote IRR: it is high still");
    check_eq!(probe.take_interrupts()?, [0x61], "after the EOI");
    machine.vm.set_irq_line(10, false)?;
    probe.set_lapic(0xb0, 0)?;
    check!(!remote_irr(10)?, "remote IRR when it is low");
    check_eq!(probe.take_interrupts()?, [], "when it is low");
    // Unmasked while it is high.
    program(&probe, 12, LEVEL | 0x61)?;
    check!(remote_irr(12)?, "remote IRR when it is unmasked");
    check_eq!(probe.take_interrupts()?, [0x61], "when it is unmasked");
    // Who makes an entry edge-triggered ends its interrupt.
    program(&probe, 12, 0x61)?;
    check!(!remote_irr(12)?, "remote IRR when it is edge-triggered");
    Ok(())
}

/// A machine whose PIT has port 0x61.
fn with_speaker(device: &Device) -> Result<Machine, Fail> {
    let machine = Machine::with(
        device,
        Config {
            irqchip: true,
            ..Config::default()
        },
    )?;
    let pit = kb::kvm_pit_config {
        flags: kb::KVM_PIT_SPEAKER_DUMMY,
        ..Default::default()
    };
    machine.vm.create_pit2(pit).during("KVM_CREATE_PIT2")?;
    Ok(machine)
}

/// Port 0x61 is userspace's unless KVM_CREATE_PIT2 asks for it.
pub(crate) fn pit_speaker_port(device: &Device) -> Outcome {
    let machine = Machine::with_irqchip(device)?;
    let cpu = machine.vcpu(0)?;
    guest::load(&machine, &cpu, Mode::Long, speaker_guest())?;
    let exit = Exit::Out {
        port: 0x61,
        size: 1,
        data: vec![3],
    };
    cpu.run_expecting(&exit)
}

guest_code!(speaker_guest, code64, ["mov al, 3", "out 0x61, al"]);

/// Programs channel 2 with a count in binary, its gate up.
fn channel_2(probe: &Probe<'_>, mode: u8, count: u16) -> Result<(), Fail> {
    let [low, high] = count.to_le_bytes();
    probe.output(&[
        (0x61, 1),
        (0x43, 0xb0 | (mode << 1)),
        (0x42, low),
        (0x42, high),
    ])
}

fn output_2(probe: &Probe<'_>) -> Result<bool, Fail> {
    Ok(probe.input(0x61)? & 0x20 != 0)
}

/// Channel 2's count, output and gate, as the systems calibrate by it.
pub(crate) fn pit_channel_2(device: &Device) -> Outcome {
    let machine = with_speaker(device)?;
    let probe = Probe::new(&machine, 0)?;
    probe.output(&[(0x61, 3)])?;
    check_eq!(probe.input(0x61)? & 3, 3, "port 0x61: gate and speaker");
    probe.output(&[(0x61, 0)])?;
    check_eq!(probe.input(0x61)? & 3, 0, "port 0x61");
    // Mode 0: 11,932 ticks are 10 ms.
    let began = Instant::now();
    channel_2(&probe, 0, 11_932)?;
    check!(!output_2(&probe)?, "the output begins high");
    while !output_2(&probe)? {
        check!(
            began.elapsed() < Duration::from_secs(1),
            "no end in a second"
        );
    }
    let took = began.elapsed();
    check!(
        took >= Duration::from_millis(10) && took < Duration::from_millis(30),
        "10 ms took {took:?}"
    );
    // The status of each mode: both bytes, the mode, binary.
    for mode in 0..6 {
        channel_2(&probe, mode, 1000)?;
        probe.output(&[(0x43, 0xe8)])?;
        check_eq!(
            probe.input(0x42)? & 0x3f,
            0x30 | (mode << 1),
            "the status in mode {mode}"
        );
    }
    // Mode 3: the output is a square wave of 20 ms.
    channel_2(&probe, 3, 23_864)?;
    let mut levels = [0; 2];
    let began = Instant::now();
    while began.elapsed() < Duration::from_millis(60) {
        levels[usize::from(output_2(&probe)?)] += 1;
    }
    let share = 100 * levels[1] / (levels[0] + levels[1]);
    check!((35..=65).contains(&share), "high for {share} % of the time");
    // A latched count stays until it is read.
    channel_2(&probe, 2, 0)?;
    probe.output(&[(0x43, 0x80)])?;
    let (low, high) = (probe.input(0x42)?, probe.input(0x42)?);
    let first = u16::from_le_bytes([low, high]);
    probe.output(&[(0x43, 0x80)])?;
    std::thread::sleep(Duration::from_millis(2));
    let (low, high) = (probe.input(0x42)?, probe.input(0x42)?);
    let second = u16::from_le_bytes([low, high]);
    let ticks = first.wrapping_sub(second);
    check!(
        ticks < 1_500,
        "{ticks} ticks between two latches, the sleep included"
    );
    Ok(())
}

/// Channel 0's interrupts: once in mode 0, again and again in modes 2 and 3.
pub(crate) fn pit_channel_0(device: &Device) -> Outcome {
    let machine = Machine::with_irqchip(device)?;
    let probe = with_pics(&machine)?;
    let ticks = |duration| {
        let began = Instant::now();
        let mut ticks = 0;
        while began.elapsed() < duration {
            ticks += probe.take_interrupts()?.len();
            probe.output(&[(0x20, 0x20)])?;
        }
        Ok::<_, Fail>(ticks)
    };
    // 1,193 ticks are a millisecond.
    for (mode, expected) in [(0, 1..=1), (2, 10..=21), (3, 10..=21)] {
        probe.output(&[(0x43, 0x30 | (mode << 1)), (0x40, 0xa9), (0x40, 4)])?;
        let found = ticks(Duration::from_millis(20))?;
        check!(
            expected.contains(&found),
            "mode {mode}: {found} interrupts in 20 ms"
        );
    }
    Ok(())
}

/// Sets whether the timer's interrupts are kept while those before have not ended.
fn keep_interrupts(machine: &Machine, keep: bool) -> Result<(), Fail> {
    let mut control = kb::kvm_reinject_control {
        pit_reinject: keep.into(),
        ..Default::default()
    };
    rvisor_tests::raw::ioctl_with(
        &machine.vm,
        rvisor_tests::uapi::REINJECT_CONTROL,
        &mut control,
    )
    .during("KVM_REINJECT_CONTROL")?;
    Ok(())
}

/// Lets 20 ms go by without the guest, then takes interrupts for 20 ms, ended by their handler; how many
/// of the timer's, one a millisecond, came, and how many were due.
fn ticks_after_a_pause(probe: &Probe<'_>) -> Result<(usize, usize), Fail> {
    let began = Instant::now();
    probe.output(&[(0x43, 0x34), (0x40, 0xa9), (0x40, 4)])?;
    std::thread::sleep(Duration::from_millis(20));
    let mut ticks = 0;
    while began.elapsed() < Duration::from_millis(40) {
        ticks += probe.take_interrupts()?.len();
        // What was kept may come from another thread.
        std::thread::yield_now();
    }
    let due = began.elapsed().as_millis();
    Ok((ticks, usize::try_from(due).unwrap_or(0)))
}

/// No tick is lost while the guest does not run, through the PICs and through the IOAPIC.
pub(crate) fn pit_backlog(device: &Device) -> Outcome {
    let machine = Machine::with_irqchip(device)?;
    let probe = with_pics(&machine)?;
    handlers::set_acknowledge(&machine.memory, Acknowledge::Pic);
    let (ticks, due) = ticks_after_a_pause(&probe)?;
    check!(
        4 * ticks >= 3 * due && ticks <= due + 1,
        "PICs: {ticks} ticks in {due} ms"
    );
    keep_interrupts(&machine, false)?;
    let (ticks, due) = ticks_after_a_pause(&probe)?;
    check!(
        4 * ticks < 3 * due,
        "PICs, nothing kept: {ticks} ticks in {due} ms"
    );
    let machine = Machine::with_irqchip(device)?;
    let probe = Probe::new(&machine, 0)?;
    handlers::set_acknowledge(&machine.memory, Acknowledge::LocalApic);
    probe.set_lapic(0xf0, 0x1ff)?;
    program(&probe, 0, 0x61)?;
    let (ticks, due) = ticks_after_a_pause(&probe)?;
    check!(
        4 * ticks >= 3 * due && ticks <= due + 1,
        "IOAPIC: {ticks} ticks in {due} ms"
    );
    Ok(())
}

/// Where LINT0 is set up for NMIs, each tick of the timer is one.
pub(crate) fn pit_watchdog(device: &Device) -> Outcome {
    let machine = Machine::with_irqchip(device)?;
    // Nobody ends the timer's interrupts here, and none is to wait for that.
    keep_interrupts(&machine, false)?;
    let probe = Probe::new(&machine, 0)?;
    probe.set_lapic(0xf0, 0x1ff)?;
    probe.set_lapic(0x350, 0x400)?;
    probe.output(&[(0x43, 0x34), (0x40, 0xa9), (0x40, 4)])?;
    let began = Instant::now();
    while rvisor_tests::handlers::count(&machine.memory, 2) < 3 {
        check!(began.elapsed() < Duration::from_secs(2), "no three NMIs");
        probe.take_interrupts()?;
    }
    check!(
        began.elapsed() >= Duration::from_millis(2),
        "three NMIs in {:?}",
        began.elapsed()
    );
    Ok(())
}
