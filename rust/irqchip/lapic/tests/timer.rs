// SPDX-License-Identifier: GPL-2.0

//! The timer.

use super::*;

#[test]
fn one_shot_timer() {
    let mut apic = enabled();
    let _ = apic.write(0x320, 0xec, NOW);
    // Divide by 16.
    let _ = apic.write(0x3e0, 3, NOW);
    assert_eq!(apic.write(0x380, 1000, NOW), LapicEffect::TimerChanged);
    let end = NOW.nanoseconds.0 + 16_000;
    assert_eq!(apic.deadline(), Some(Deadline::At(Nanoseconds(end))));
    assert_eq!(apic.read(0x390, NOW), 1000);
    assert_eq!(apic.read(0x390, at(end - 8_000)), 500);
    assert!(!apic.timer_fired(at(end - 1)));
    assert!(apic.timer_fired(at(end)));
    assert_eq!(apic.highest_pending(), Some(Vector(0xec)));
    assert_eq!(apic.deadline(), None);
    assert_eq!(apic.read(0x390, at(end + 5)), 0);
    assert_eq!(apic.read(0x380, NOW), 1000);
    assert!(!apic.timer_fired(at(end + 100)));
}

#[test]
fn divide_configurations() {
    // SDM vol. 3, figure 12-10.
    for (configuration, divisor) in [
        (0b0000, 2),
        (0b0001, 4),
        (0b0010, 8),
        (0b0011, 16),
        (0b1000, 32),
        (0b1001, 64),
        (0b1010, 128),
        (0b1011, 1),
    ] {
        let mut apic = enabled();
        let _ = apic.write(0x3e0, configuration, NOW);
        let _ = apic.write(0x380, 10, NOW);
        let end = NOW.nanoseconds.0 + 10 * divisor;
        assert_eq!(apic.deadline(), Some(Deadline::At(Nanoseconds(end))));
        assert_eq!(apic.read(0x3e0, NOW), configuration);
    }
}

#[test]
fn divide_changes_the_rate_of_what_is_left() {
    let mut apic = enabled();
    let _ = apic.write(0x3e0, 0b1011, NOW);
    let _ = apic.write(0x380, 1_000_000, NOW);
    let half = at(NOW.nanoseconds.0 + 500_000);
    assert_eq!(apic.write(0x3e0, 0b0001, half), LapicEffect::TimerChanged);
    assert_eq!(apic.read(0x390, half), 500_000);
    assert_eq!(
        apic.deadline(),
        Some(Deadline::At(Nanoseconds(half.nanoseconds.0 + 2_000_000)))
    );
}

#[test]
fn periodic_timer_keeps_its_phase() {
    let mut apic = enabled();
    let _ = apic.write(0x320, 0x2_00ec, NOW);
    let _ = apic.write(0x3e0, 0b1011, NOW);
    let _ = apic.write(0x380, 1_000_000, NOW);
    let start = NOW.nanoseconds.0;
    assert!(apic.timer_fired(at(start + 1_000_000)));
    assert_eq!(
        apic.deadline(),
        Some(Deadline::At(Nanoseconds(start + 2_000_000)))
    );
    // Late by many periods: one interrupt, and the next is in phase.
    assert_eq!(apic.read(0x390, at(start + 7_250_000)), 750_000);
    assert!(apic.timer_fired(at(start + 7_250_000)));
    assert_eq!(
        apic.deadline(),
        Some(Deadline::At(Nanoseconds(start + 8_000_000)))
    );
    let _ = apic.write(0x380, 0, NOW);
    assert_eq!(apic.deadline(), None);
}

#[test]
fn periodic_timer_has_a_shortest_period() {
    let mut apic = enabled();
    let _ = apic.write(0x320, 0x2_00ec, NOW);
    let _ = apic.write(0x380, 1, NOW);
    assert_eq!(
        apic.deadline(),
        Some(Deadline::At(Nanoseconds(NOW.nanoseconds.0 + 200_000)))
    );
}

#[test]
fn masked_timer_counts_in_silence() {
    let mut apic = enabled();
    let _ = apic.write(0x320, 0x1_00ec, NOW);
    let _ = apic.write(0x380, 1000, NOW);
    assert!(!apic.timer_fired(at(NOW.nanoseconds.0 + 2000)));
    assert_eq!(apic.highest_pending(), None);
    assert_eq!(apic.deadline(), None);
}

#[test]
fn tsc_deadline_timer() {
    let mut apic = enabled();
    assert_eq!(apic.set_tsc_deadline(5), LapicEffect::None);
    assert_eq!(apic.tsc_deadline(), 0);
    let _ = apic.write(0x380, 1000, NOW);
    assert_eq!(apic.write(0x320, 0x4_00ec, NOW), LapicEffect::TimerChanged);
    assert_eq!(apic.deadline(), None, "a change of mode disarms");
    let _ = apic.write(0x380, 1000, NOW);
    assert_eq!(apic.deadline(), None, "the initial count is not used");
    assert_eq!(apic.read(0x390, NOW), 0);
    assert_eq!(apic.set_tsc_deadline(NOW.tsc), LapicEffect::TimerChanged);
    assert_eq!(apic.deadline(), Some(Deadline::Tsc(NOW.tsc)));
    assert!(apic.timer_fired(NOW));
    assert_eq!(apic.tsc_deadline(), 0);
    assert_eq!(apic.highest_pending(), Some(Vector(0xec)));
    let _ = apic.set_tsc_deadline(u64::MAX);
    assert!(!apic.timer_fired(NOW));
    assert_eq!(apic.set_tsc_deadline(0), LapicEffect::TimerChanged);
    assert_eq!(apic.deadline(), None);
    apic.set_features(Features {
        tsc_deadline: false,
        ..features()
    });
    let _ = apic.write(0x320, 0x4_00ec, NOW);
    assert_eq!(apic.read(0x320, NOW), 0xec);
}

#[test]
fn restored_count_is_no_longer_than_the_initial_one() {
    let mut apic = enabled();
    let _ = apic.write(0x3e0, 0b1011, NOW);
    let _ = apic.write(0x380, 1_000_000, NOW);
    let mut page = apic.registers(PageFormat::Legacy, NOW);
    page[0x390..0x394].copy_from_slice(&u32::MAX.to_le_bytes());
    apic.set_registers(&page, PageFormat::Legacy, at(0))
        .unwrap();
    assert_eq!(apic.deadline(), Some(Deadline::At(Nanoseconds(1_000_000))));
}

#[test]
fn bus_cycles_are_as_long_as_the_machine_wants() {
    // 40 ns: 25 MHz, the rate that TDX gives its guests.
    let cycle = BusCycle::new(40).unwrap();
    let mut apic = LocalApic::new(ApicId(0), false, features(), cycle);
    let _ = apic.write(0xf0, 0x1ff, NOW);
    let _ = apic.write(0x320, 0xec, NOW);
    // Divide by 4.
    let _ = apic.write(0x3e0, 1, NOW);
    let _ = apic.write(0x380, 1000, NOW);
    let start = NOW.nanoseconds.0;
    let end = Nanoseconds(start + 1000 * 4 * 40);
    assert_eq!(apic.deadline(), Some(Deadline::At(end)));
    assert_eq!(apic.read(0x390, at(start + 250 * 4 * 40)), 750);
    assert_eq!(apic.read(0x390, at(start + 250 * 4 * 40 + 159)), 749);
    // At half the rate what is left lasts twice as long.
    let _ = apic.write(0x3e0, 2, at(start + 500 * 4 * 40));
    let end = Nanoseconds(start + 500 * 4 * 40 + 500 * 8 * 40);
    assert_eq!(apic.deadline(), Some(Deadline::At(end)));
    // INIT does not change the machine.
    apic.reset(ResetKind::Init);
    let _ = apic.write(0x380, 1, NOW);
    assert_eq!(
        apic.deadline(),
        Some(Deadline::At(Nanoseconds(start + 2 * 40)))
    );
    let longest = u64::MAX / (0xffff_ffff << 7);
    assert!(BusCycle::new(longest).is_ok());
    for wrong in [0, longest + 1, u64::MAX] {
        assert_eq!(BusCycle::new(wrong), Err(Invalid));
    }
}

#[test]
fn longest_count_of_the_longest_cycle_is_no_overflow() {
    let cycle = BusCycle::new(u64::MAX / (0xffff_ffff << 7)).unwrap();
    let mut apic = LocalApic::new(ApicId(0), false, features(), cycle);
    let _ = apic.write(0x320, 0x2_00ec, NOW);
    let _ = apic.write(0x3e0, 0b1010, NOW);
    let _ = apic.write(0x380, u32::MAX, NOW);
    assert_eq!(apic.read(0x390, NOW), u32::MAX);
    let _ = apic.write(0x3e0, 0b1011, NOW);
    let _ = apic.write(0x3e0, 0b1010, NOW);
    assert!(apic.read(0x390, NOW) > 0);
    let page = apic.registers(PageFormat::Legacy, NOW);
    apic.set_registers(&page, PageFormat::Legacy, at(u64::MAX / 4))
        .unwrap();
    assert!(apic.deadline().is_some());
}

#[test]
fn a_disabled_apic_has_no_deadline() {
    let mut apic = enabled();
    let _ = apic.write(0x320, 0x4_00ec, NOW);
    assert_eq!(
        apic.set_tsc_deadline(NOW.tsc + 9),
        LapicEffect::TimerChanged
    );
    let base = apic.base();
    let _ = apic.set_base(base & !(1 << 11), Origin::Host).unwrap();
    assert_eq!(apic.tsc_deadline(), 0);
    assert_eq!(apic.set_tsc_deadline(5), LapicEffect::None);
    let _ = apic.set_base(base, Origin::Host).unwrap();
    assert_eq!(apic.tsc_deadline(), NOW.tsc + 9, "the write was ignored");
}
