// SPDX-License-Identifier: GPL-2.0

use super::*;
use crate::irqchip::destination::{ApicMode, LogicalModel};
use crate::x86::vector::ApicId;

const LEVEL: u64 = 1 << 15;
const REMOTE_IRR: u64 = 1 << 14;
const MASKED: u64 = 1 << 16;

fn write(ioapic: &mut IoApic, register: u8, value: u32) -> IoApicEffect {
    let _ = ioapic.write(0, u32::from(register));
    ioapic.write(0x10, value)
}

fn read(ioapic: &mut IoApic, register: u8) -> u32 {
    let _ = ioapic.write(0, u32::from(register));
    ioapic.read(0x10)
}

fn set_entry(ioapic: &mut IoApic, pin: u8, entry: u64) -> IoApicEffect {
    let _ = write(ioapic, 0x11 + pin * 2, (entry >> 32) as u32);
    write(ioapic, 0x10 + pin * 2, entry as u32)
}

fn entry(ioapic: &mut IoApic, pin: u8) -> u64 {
    u64::from(read(ioapic, 0x10 + pin * 2)) | (u64::from(read(ioapic, 0x11 + pin * 2)) << 32)
}

fn raise(ioapic: &mut IoApic, pin: u8) -> LineOutcome {
    ioapic.set_line(pin, LineSource::USERSPACE, true)
}

fn lower(ioapic: &mut IoApic, pin: u8) -> LineOutcome {
    ioapic.set_line(pin, LineSource::USERSPACE, false)
}

fn eoi(ioapic: &mut IoApic, vector: u8) -> Vec<(u8, u8)> {
    let mut messages = Vec::new();
    ioapic.eoi(Vector(vector), |pin, message| {
        messages.push((pin, message.vector.0));
    });
    messages
}

#[test]
fn registers_after_reset() {
    let mut ioapic = IoApic::new();
    // 82093AA, 3.2: the version has the highest pin in bits 23:16.
    assert_eq!(read(&mut ioapic, 1), 0x0017_0011);
    for pin in 0..24 {
        assert_eq!(entry(&mut ioapic, pin), MASKED);
    }
    let _ = write(&mut ioapic, 0, 0xff00_0000);
    assert_eq!(read(&mut ioapic, 0), 0x0f00_0000);
    assert_eq!(read(&mut ioapic, 2), 0x0f00_0000);
    assert_eq!(ioapic.read(0), 2);
    assert_eq!(ioapic.read(0x20), 0);
}

#[test]
fn edge_sends_one_message() {
    let mut ioapic = IoApic::new();
    let _ = set_entry(&mut ioapic, 4, (0x12 << 56) | (1 << 11) | 0x131);
    let message = raise(&mut ioapic, 4).message().unwrap();
    assert_eq!(message.vector, Vector(0x31));
    assert_eq!(message.destination, 0x12);
    assert!(message.logical);
    assert_eq!(message.delivery_mode, DeliveryMode::LowestPriority);
    assert_eq!(message.trigger, TriggerMode::Edge);
    assert_eq!(raise(&mut ioapic, 4), LineOutcome::Coalesced);
    assert!(eoi(&mut ioapic, 0x31).is_empty());
    lower(&mut ioapic, 4);
    assert!(raise(&mut ioapic, 4).message().is_some());
}

#[test]
fn level_waits_for_its_eoi() {
    let mut ioapic = IoApic::new();
    let _ = set_entry(&mut ioapic, 10, LEVEL | 0x51);
    assert!(raise(&mut ioapic, 10).message().is_some());
    assert_eq!(entry(&mut ioapic, 10), LEVEL | REMOTE_IRR | 0x51);
    assert_eq!(raise(&mut ioapic, 10), LineOutcome::Ignored);
    assert_eq!(eoi(&mut ioapic, 0x50), []);
    assert_eq!(eoi(&mut ioapic, 0x51), [(10, 0x51)], "still high");
    lower(&mut ioapic, 10);
    assert_eq!(entry(&mut ioapic, 10) & REMOTE_IRR, REMOTE_IRR);
    assert_eq!(eoi(&mut ioapic, 0x51), []);
    assert_eq!(entry(&mut ioapic, 10) & REMOTE_IRR, 0);
}

#[test]
fn shared_vector_ends_on_all_its_pins() {
    let mut ioapic = IoApic::new();
    for pin in [16, 17] {
        let _ = set_entry(&mut ioapic, pin, LEVEL | 0x61);
        raise(&mut ioapic, pin);
    }
    assert_eq!(ioapic.pins_with_vector(Vector(0x61)), 3 << 16);
    lower(&mut ioapic, 16);
    assert_eq!(eoi(&mut ioapic, 0x61), [(17, 0x61)]);
}

#[test]
fn masked_level_pin_is_sent_when_unmasked() {
    let mut ioapic = IoApic::new();
    let _ = set_entry(&mut ioapic, 9, LEVEL | MASKED | 0x49);
    assert_eq!(raise(&mut ioapic, 9), LineOutcome::Ignored);
    let effect = set_entry(&mut ioapic, 9, LEVEL | 0x49);
    assert_eq!(effect.changed, Some(9));
    assert!(effect.unmasked);
    assert_eq!(effect.message.unwrap().vector, Vector(0x49));
}

#[test]
fn masked_edge_is_lost() {
    let mut ioapic = IoApic::new();
    raise(&mut ioapic, 3);
    assert_eq!(set_entry(&mut ioapic, 3, 0x43).message, None);
    assert_eq!(raise(&mut ioapic, 3), LineOutcome::Coalesced);
}

#[test]
fn resampled_pin_is_asked_when_unmasked() {
    let mut ioapic = IoApic::new();
    ioapic.set_resampled(1 << 9);
    let _ = set_entry(&mut ioapic, 9, LEVEL | MASKED | 0x49);
    ioapic.set_line(9, LineSource::RESAMPLER, true);
    let effect = set_entry(&mut ioapic, 9, LEVEL | 0x49);
    assert!(effect.resample);
    assert_eq!(effect.message, None);
}

#[test]
fn turning_edge_triggered_ends_an_interrupt() {
    let mut ioapic = IoApic::new();
    let _ = set_entry(&mut ioapic, 10, LEVEL | 0x51);
    raise(&mut ioapic, 10);
    lower(&mut ioapic, 10);
    // What Linux does to end an interrupt at an IOAPIC without an EOI register.
    let _ = set_entry(&mut ioapic, 10, MASKED | 0x51);
    let _ = set_entry(&mut ioapic, 10, LEVEL | 0x51);
    assert_eq!(entry(&mut ioapic, 10), LEVEL | 0x51);
    assert!(raise(&mut ioapic, 10).message().is_some());
}

#[test]
fn read_only_bits_are_not_written() {
    let mut ioapic = IoApic::new();
    let _ = set_entry(&mut ioapic, 0, u64::MAX);
    assert_eq!(entry(&mut ioapic, 0), 0xff00_0000_0001_afff);
}

#[test]
fn undelivered_message_is_sent_again() {
    let mut ioapic = IoApic::new();
    let _ = set_entry(&mut ioapic, 10, LEVEL | 0x51);
    assert!(raise(&mut ioapic, 10).message().is_some());
    ioapic.undelivered(10);
    assert!(raise(&mut ioapic, 10).message().is_some());
}

#[test]
fn line_is_high_while_any_source_holds_it() {
    let mut ioapic = IoApic::new();
    let _ = set_entry(&mut ioapic, 10, LEVEL | 0x51);
    ioapic.set_line(10, LineSource::USERSPACE, true);
    ioapic.set_line(10, LineSource::RESAMPLER, true);
    ioapic.set_line(10, LineSource::USERSPACE, false);
    assert_eq!(eoi(&mut ioapic, 0x51), [(10, 0x51)]);
    ioapic.set_line(10, LineSource::RESAMPLER, false);
    assert_eq!(eoi(&mut ioapic, 0x51), []);
    assert_eq!(raise(&mut ioapic, 24), LineOutcome::Ignored);
}

#[test]
fn state_carries_unsent_requests_only() {
    let mut ioapic = IoApic::new();
    let _ = set_entry(&mut ioapic, 4, 0x34);
    let _ = set_entry(&mut ioapic, 5, LEVEL | MASKED | 0x35);
    raise(&mut ioapic, 4);
    raise(&mut ioapic, 5);
    let mut state = ioapic.state();
    assert_eq!(state.irr, 1 << 5);
    assert_eq!(state.base_address, 0xfec0_0000);
    state.redirection[5] &= !MASKED;
    let mut copy = IoApic::new();
    let mut sent = Vec::new();
    copy.set_state(&state, |pin, message| sent.push((pin, message.vector.0)));
    assert_eq!(sent, [(5, 0x35)]);
    assert_eq!(copy.state().redirection[5], LEVEL | REMOTE_IRR | 0x35);
    // Bits beyond the pins name nothing.
    state.irr = u32::MAX;
    copy.set_state(&state, |pin, _| assert!(pin < 24));
}

#[test]
fn watched_vectors_are_those_of_edges_for_the_apic() {
    let identity = ApicIdentity {
        id: ApicId(1),
        xapic_id: 1,
        logical_id: 2,
        model: LogicalModel::Flat,
        mode: ApicMode::XApic,
        software_enabled: true,
        takes_pic: false,
        is_watchdog: false,
    };
    let mut ioapic = IoApic::new();
    let _ = set_entry(&mut ioapic, 10, (1 << 56) | LEVEL | 0x51);
    let _ = set_entry(&mut ioapic, 11, (2 << 56) | 0x52);
    let _ = set_entry(&mut ioapic, 0, (1 << 56) | 0x53);
    let vectors = |watched| ioapic.watched_vectors(&identity, Source::Device, watched);
    assert_eq!(vectors(0), VectorSet::EMPTY);
    let mut expected = VectorSet::EMPTY;
    expected.insert(Vector(0x53));
    assert_eq!(vectors(u32::MAX), expected);
    assert_eq!(vectors(1), expected);
    assert_eq!(vectors(1 << 10), VectorSet::EMPTY);
}

#[test]
fn edge_that_came_while_masked_is_in_the_state_though_an_earlier_one_was_sent() {
    let mut ioapic = IoApic::new();
    let _ = set_entry(&mut ioapic, 4, 0x34);
    assert!(raise(&mut ioapic, 4).message().is_some());
    lower(&mut ioapic, 4);
    let _ = set_entry(&mut ioapic, 4, MASKED | 0x34);
    raise(&mut ioapic, 4);
    assert_eq!(ioapic.state().irr, 1 << 4);
}

#[test]
fn resampled_pin_that_awaits_its_eoi_is_not_asked() {
    let mut ioapic = IoApic::new();
    ioapic.set_resampled(1 << 9);
    let _ = set_entry(&mut ioapic, 9, LEVEL | 0x49);
    assert!(ioapic
        .set_line(9, LineSource::RESAMPLER, true)
        .message()
        .is_some());
    assert!(!set_entry(&mut ioapic, 9, LEVEL | 0x49).resample);
    assert_eq!(eoi(&mut ioapic, 0x49), [(9, 0x49)]);
}
