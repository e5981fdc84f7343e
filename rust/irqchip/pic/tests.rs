// SPDX-License-Identifier: GPL-2.0

use super::*;

/// The controllers as a PC's firmware and Linux set them up: vectors 0x30 and 0x38, all unmasked.
fn ready() -> DualPic {
    let mut pic = DualPic::new();
    for (port, value) in [
        (0x20, 0x11),
        (0x21, 0x30),
        (0x21, 0x04),
        (0x21, 0x01),
        (0xa0, 0x11),
        (0xa1, 0x38),
        (0xa1, 0x02),
        (0xa1, 0x01),
        (0x21, 0x00),
        (0xa1, 0x00),
    ] {
        assert!(pic.write_port(port, value));
    }
    pic.take_events();
    pic
}

fn raise(pic: &mut DualPic, line: u8) {
    pic.set_line(line, LineSource::USERSPACE, true);
}

fn lower(pic: &mut DualPic, line: u8) {
    pic.set_line(line, LineSource::USERSPACE, false);
}

fn in_service(pic: &mut DualPic) -> [u8; 2] {
    pic.write_port(0x20, 0x0b);
    pic.write_port(0xa0, 0x0b);
    [pic.read_port(0x20).unwrap(), pic.read_port(0xa0).unwrap()]
}

#[test]
fn edge_gives_one_interrupt() {
    let mut pic = ready();
    assert!(!pic.output());
    raise(&mut pic, 4);
    assert!(pic.output());
    assert_eq!(pic.acknowledge(), Vector(0x34));
    assert!(!pic.output());
    assert_eq!(in_service(&mut pic), [0x10, 0]);
    pic.write_port(0x20, 0x20);
    assert_eq!(in_service(&mut pic), [0, 0]);
    assert!(!pic.output(), "the line is still high but has made no edge");
    lower(&mut pic, 4);
    raise(&mut pic, 4);
    assert!(pic.output());
}

#[test]
fn level_gives_interrupts_while_it_lasts() {
    let mut pic = ready();
    pic.write_port(0x4d1, 0x08);
    assert_eq!(pic.read_port(0x4d1), Some(0x08));
    raise(&mut pic, 11);
    assert_eq!(pic.acknowledge(), Vector(0x3b));
    assert_eq!(in_service(&mut pic), [0x04, 0x08]);
    pic.write_port(0xa0, 0x20);
    pic.write_port(0x20, 0x20);
    assert!(pic.output());
    assert_eq!(pic.acknowledge(), Vector(0x3b));
    lower(&mut pic, 11);
    pic.write_port(0xa0, 0x63);
    pic.write_port(0x20, 0x62);
    assert!(!pic.output());
}

#[test]
fn priorities_nest() {
    let mut pic = ready();
    raise(&mut pic, 5);
    assert_eq!(pic.acknowledge(), Vector(0x35));
    raise(&mut pic, 7);
    assert!(!pic.output(), "lower priority waits");
    raise(&mut pic, 1);
    assert_eq!(pic.acknowledge(), Vector(0x31));
    pic.write_port(0x20, 0x20);
    assert_eq!(in_service(&mut pic), [0x20, 0]);
    assert!(!pic.output());
    pic.write_port(0x20, 0x20);
    assert_eq!(pic.acknowledge(), Vector(0x37));
}

#[test]
fn lines_of_the_second_controller_come_at_line_2() {
    let mut pic = ready();
    raise(&mut pic, 3);
    raise(&mut pic, 8);
    assert_eq!(pic.acknowledge(), Vector(0x38));
    assert_eq!(in_service(&mut pic), [0x04, 0x01]);
    pic.write_port(0xa0, 0x20);
    pic.write_port(0x20, 0x20);
    assert_eq!(pic.acknowledge(), Vector(0x33));
}

#[test]
fn masks_hold_back_without_forgetting() {
    let mut pic = ready();
    pic.write_port(0x21, 0x10);
    assert_eq!(
        pic.set_line(4, LineSource::USERSPACE, true),
        LineOutcome::Ignored
    );
    assert!(!pic.output());
    assert_eq!(pic.read_port(0x21), Some(0x10));
    pic.write_port(0x21, 0x00);
    assert!(pic.output());
    assert_eq!(pic.take_events().unmasked, 0x10);
    assert_eq!(pic.acknowledge(), Vector(0x34));
}

#[test]
fn request_that_is_gone_is_spurious_line_7() {
    let mut pic = ready();
    assert_eq!(pic.acknowledge(), Vector(0x37));
    assert_eq!(in_service(&mut pic), [0, 0]);
    pic.write_port(0x4d1, 0x08);
    raise(&mut pic, 11);
    lower(&mut pic, 11);
    assert!(pic.output());
    assert_eq!(pic.acknowledge(), Vector(0x3f));
    assert_eq!(in_service(&mut pic), [0x04, 0]);
}

#[test]
fn automatic_eoi_ends_and_rotates() {
    let mut pic = ready();
    for (port, value) in [(0x20, 0x11), (0x21, 0x30), (0x21, 4), (0x21, 3)] {
        pic.write_port(port, value);
    }
    pic.take_events();
    raise(&mut pic, 0);
    assert_eq!(pic.acknowledge(), Vector(0x30));
    assert_eq!(in_service(&mut pic), [0, 0]);
    assert_eq!(pic.take_events().ended, 1);
    pic.write_port(0x20, 0x80);
    lower(&mut pic, 0);
    raise(&mut pic, 0);
    assert_eq!(pic.acknowledge(), Vector(0x30));
    // Line 0 now comes last.
    lower(&mut pic, 0);
    raise(&mut pic, 0);
    raise(&mut pic, 7);
    assert_eq!(pic.acknowledge(), Vector(0x37));
}

#[test]
fn rotation_puts_the_ended_line_last() {
    let mut pic = ready();
    raise(&mut pic, 1);
    assert_eq!(pic.acknowledge(), Vector(0x31));
    pic.write_port(0x20, 0xa0);
    lower(&mut pic, 1);
    raise(&mut pic, 1);
    raise(&mut pic, 6);
    assert_eq!(pic.acknowledge(), Vector(0x36));
    // Set priority: line 5 last, so line 6 first.
    pic.write_port(0x20, 0x20);
    pic.write_port(0x20, 0xc5);
    raise(&mut pic, 5);
    lower(&mut pic, 6);
    raise(&mut pic, 6);
    assert_eq!(pic.acknowledge(), Vector(0x36));
}

#[test]
fn special_mask_mode_lets_lower_lines_through() {
    let mut pic = ready();
    raise(&mut pic, 1);
    assert_eq!(pic.acknowledge(), Vector(0x31));
    raise(&mut pic, 6);
    assert!(!pic.output());
    pic.write_port(0x21, 0x02);
    assert!(!pic.output());
    pic.write_port(0x20, 0x68);
    assert!(pic.output());
    assert_eq!(pic.acknowledge(), Vector(0x36));
    pic.write_port(0x20, 0x20);
    assert_eq!(in_service(&mut pic), [0x02, 0], "not the masked one");
}

#[test]
fn special_fully_nested_mode_takes_a_higher_line_of_the_second() {
    let mut pic = ready();
    for (port, value) in [(0x20, 0x11), (0x21, 0x30), (0x21, 4), (0x21, 0x11)] {
        pic.write_port(port, value);
    }
    raise(&mut pic, 12);
    assert_eq!(pic.acknowledge(), Vector(0x3c));
    raise(&mut pic, 9);
    assert!(pic.output());
    assert_eq!(pic.acknowledge(), Vector(0x39));
    let mut plain = ready();
    raise(&mut plain, 12);
    plain.acknowledge();
    raise(&mut plain, 9);
    assert!(!plain.output());
}

#[test]
fn poll_acknowledges() {
    let mut pic = ready();
    raise(&mut pic, 10);
    pic.write_port(0xa0, 0x0c);
    assert_eq!(pic.read_port(0xa0), Some(0x82));
    assert_eq!(in_service(&mut pic), [0, 0x04]);
    assert!(!pic.output());
    pic.write_port(0x20, 0x0c);
    assert_eq!(pic.read_port(0x21).unwrap() & 0x80, 0);
}

#[test]
fn line_is_high_while_any_source_holds_it() {
    let mut pic = ready();
    pic.write_port(0x4d0, 0x20);
    pic.set_line(5, LineSource::USERSPACE, true);
    pic.set_line(5, LineSource::RESAMPLER, true);
    pic.set_line(5, LineSource::USERSPACE, false);
    assert!(pic.output());
    pic.set_line(5, LineSource::RESAMPLER, false);
    assert!(!pic.output());
}

#[test]
fn outcomes_tell_new_from_coalesced() {
    let mut pic = ready();
    assert_eq!(pic.set_line(0, LineSource::PIT, true), LineOutcome::Taken);
    pic.set_line(0, LineSource::PIT, false);
    assert_eq!(
        pic.set_line(0, LineSource::PIT, true),
        LineOutcome::Coalesced
    );
    assert_eq!(
        pic.set_line(16, LineSource::PIT, true),
        LineOutcome::Ignored
    );
}

#[test]
fn edge_control_excludes_fixed_lines() {
    let mut pic = ready();
    pic.write_port(0x4d0, 0xff);
    pic.write_port(0x4d1, 0xff);
    // PIIX: lines 0 to 2, 8 and 13 stay edge-triggered.
    assert_eq!(pic.read_port(0x4d0), Some(0xf8));
    assert_eq!(pic.read_port(0x4d1), Some(0xde));
    assert_eq!(pic.read_port(0x22), None);
    assert!(!pic.write_port(0x22, 0));
}

#[test]
fn state_is_restored() {
    let mut pic = ready();
    raise(&mut pic, 3);
    raise(&mut pic, 12);
    pic.acknowledge();
    pic.write_port(0xa0, 0x11);
    pic.write_port(0xa1, 0x48);
    let mut copy = DualPic::new();
    for chip in [PicChip::Master, PicChip::Slave] {
        copy.set_state(chip, &pic.state(chip));
        assert_eq!(copy.state(chip), pic.state(chip));
    }
    assert_eq!(copy.output(), pic.output());
    let slave = pic.state(PicChip::Slave);
    assert_eq!(slave.init_state, 2);
    assert_eq!(slave.irq_base, 0x48);
    assert_eq!(pic.state(PicChip::Master).isr, 0x04);
}

#[test]
fn line_that_becomes_level_triggered_requests_by_its_level() {
    let mut pic = ready();
    raise(&mut pic, 5);
    assert_eq!(pic.acknowledge(), Vector(0x35));
    pic.write_port(0x20, 0x20);
    assert!(!pic.output());
    pic.write_port(0x4d0, 0x20);
    assert!(pic.output());
    assert_eq!(pic.acknowledge(), Vector(0x35));
    lower(&mut pic, 5);
    pic.write_port(0x20, 0x20);
    assert!(!pic.output());
    // An edge that was kept is gone where the line is low.
    raise(&mut pic, 6);
    lower(&mut pic, 6);
    assert!(pic.output());
    pic.write_port(0x4d0, 0x40);
    assert!(!pic.output());
}
