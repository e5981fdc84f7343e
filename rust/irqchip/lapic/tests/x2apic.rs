// SPDX-License-Identifier: GPL-2.0

//! The registers as MSRs.

use super::*;
use crate::irqchip::Clock;

/// Tells no time: whoever asks is wrong.
struct NoClock;

impl Clock for NoClock {
    fn now(&self) -> Now {
        panic!("the moment does not matter here")
    }
}

#[test]
fn clocks_are_read_for_the_timer_only() {
    let mut apic = x2apic();
    for index in [
        0x802, 0x803, 0x808, 0x80a, 0x80d, 0x80f, 0x810, 0x830, 0x838,
    ] {
        assert!(apic.read_msr(MsrIndex(index), NoClock).is_ok());
    }
    for (index, value) in [(0x808, 0), (0x80b, 0), (0x830, 0x41), (0x83f, 0x41)] {
        assert!(apic.write_msr(MsrIndex(index), value, NoClock).is_ok());
    }
    let mut apic = enabled();
    let _ = apic.read(0x30, NoClock);
    assert_eq!(apic.write(0xb0, 0, NoClock), LapicEffect::None);
}

#[test]
fn x2apic_eoi_ends_the_highest() {
    let mut apic = x2apic();
    request(&mut apic, 0x41);
    apic.acknowledge(Vector(0x41));
    apic.set_irr(Vector(0x71), TriggerMode::Level);
    apic.acknowledge(Vector(0x71));
    let mut end = || apic.write_msr(MsrIndex(0x80b), 0, NOW);
    assert_eq!(end(), Ok(LapicEffect::Eoi(Vector(0x71))));
    assert_eq!(end(), Ok(LapicEffect::None));
    assert_eq!(apic.ppr(), 0);
}

#[test]
fn x2apic_registers() {
    let mut apic = x2apic();
    assert_eq!(apic.read_msr(MsrIndex(0x802), NOW), Ok(3));
    assert_eq!(apic.read_msr(MsrIndex(0x80d), NOW), Ok(0x8));
    // SDM vol. 3, table 12-6: no DFR, no upper ICR, and what can only be written.
    for index in [0x80b, 0x80e, 0x831, 0x83f, 0x840, 0x800, 0x809] {
        assert_eq!(
            apic.read_msr(MsrIndex(index), NOW),
            Err(Invalid),
            "{index:x}"
        );
    }
    for index in [
        0x802, 0x803, 0x80a, 0x80d, 0x810, 0x827, 0x839, 0x80e, 0x831,
    ] {
        assert_eq!(
            apic.write_msr(MsrIndex(index), 0, NOW),
            Err(Invalid),
            "{index:x}"
        );
    }
    for (index, bad) in [
        (0x808, 0x100),
        (0x80b, 1),
        (0x80f, 0x400),
        (0x828, 1),
        (0x832, 1 << 20),
        (0x835, 1 << 17),
        (0x837, 1 << 15),
        (0x83e, 4),
        (0x838, 1 << 32),
        (0x830, 1 << 13),
        (0x830, 1 << 16),
        (0x830, 1 << 20),
    ] {
        assert_eq!(
            apic.write_msr(MsrIndex(index), bad, NOW),
            Err(Invalid),
            "{index:x}"
        );
    }
    let Ok(LapicEffect::SendIpi(message)) =
        apic.write_msr(MsrIndex(0x830), 0x0001_0002_0000_4841, NOW)
    else {
        panic!("no IPI");
    };
    assert_eq!(message.destination, 0x0001_0002);
    assert!(message.logical);
    assert_eq!(
        apic.read_msr(MsrIndex(0x830), NOW),
        Ok(0x0001_0002_0000_4841)
    );
    assert_eq!(enabled().read_msr(MsrIndex(0x802), NOW), Err(Invalid));
}
