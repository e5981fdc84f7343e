// SPDX-License-Identifier: GPL-2.0

use super::*;

const START: Nanoseconds = Nanoseconds(5_000_000_000);

/// The first moment at which `ticks` ticks have gone by since `START`, from the timer's frequency in
/// exact arithmetic.
fn after(ticks: u64) -> Nanoseconds {
    let nanoseconds = (u128::from(ticks) * 1_000_000_000).div_ceil(1_193_182);
    Nanoseconds(START.0 + u64::try_from(nanoseconds).unwrap())
}

/// The first moment at which `ticks` ticks have gone by since `from`.
fn past(from: Nanoseconds, ticks: u64) -> Nanoseconds {
    Nanoseconds(from.0 + (after(ticks).0 - START.0))
}

/// A timer with `channel` in `mode`, loaded with `count` at `START`.
fn loaded(channel: u8, mode: u8, count: u16) -> Pit {
    let mut pit = Pit::new(Nanoseconds(0));
    pit.write_port(0x61, 1, START);
    pit.write_port(0x43, (channel << 6) | 0x30 | (mode << 1), START);
    let [low, high] = count.to_le_bytes();
    let port = 0x40 + u16::from(channel);
    pit.write_port(port, low, START);
    pit.write_port(port, high, START);
    pit
}

fn read_count(pit: &mut Pit, channel: u8, now: Nanoseconds) -> u16 {
    pit.write_port(0x43, channel << 6, now);
    let port = 0x40 + u16::from(channel);
    u16::from_le_bytes([
        pit.read_port(port, now).unwrap(),
        pit.read_port(port, now).unwrap(),
    ])
}

fn output(pit: &mut Pit, now: Nanoseconds) -> bool {
    pit.read_port(0x61, now).unwrap() & 0x20 != 0
}

#[test]
fn periodic_edges_do_not_drift() {
    for mode in [2, 3, 6, 7] {
        // Linux at 100 Hz.
        let mut pit = loaded(0, mode, 11932);
        let mut edges = 0u64;
        while edges < 1000 {
            let deadline = pit.deadline().unwrap();
            assert_eq!(deadline, after((edges + 1) * 11932));
            assert_eq!(pit.advance(Nanoseconds(deadline.0 - 1)), 0);
            assert_eq!(pit.advance(deadline), 1);
            edges += 1;
        }
    }
}

#[test]
fn edges_that_were_missed_are_counted() {
    let mut pit = loaded(0, 2, 0);
    assert_eq!(pit.advance(after(65536 * 1000 + 65535)), 1000);
    assert_eq!(pit.advance(after(65536 * 1001)), 1);
    assert_eq!(pit.advance(START), 0, "a clock that ran back gives none");
    assert_eq!(pit.deadline(), Some(after(65536 * 1002)));
}

#[test]
fn one_shot_modes_give_one_edge() {
    for mode in [0, 4] {
        let mut pit = loaded(0, mode, 1000);
        assert_eq!(pit.deadline(), Some(after(1000)));
        assert_eq!(pit.advance(after(999)), 0);
        assert_eq!(pit.advance(after(100_000)), 1);
        assert_eq!(pit.deadline(), None);
        assert_eq!(pit.advance(after(200_000)), 0);
    }
}

#[test]
fn triggered_modes_need_a_gate_that_channel_0_has_not() {
    for mode in [1, 5] {
        let mut pit = loaded(0, mode, 1000);
        assert_eq!(pit.deadline(), None);
        assert_eq!(pit.advance(after(100_000)), 0);
    }
}

#[test]
fn control_word_stops_the_edges() {
    let mut pit = loaded(0, 2, 1000);
    pit.write_port(0x43, 0x30, after(500));
    assert_eq!(pit.deadline(), None);
    assert_eq!(pit.advance(after(5000)), 0);
    // Half a count does not start it.
    pit.write_port(0x40, 1, after(5000));
    assert_eq!(pit.deadline(), None);
}

#[test]
fn short_periods_are_limited() {
    let mut pit = loaded(0, 2, 2);
    assert_eq!(pit.advance(Nanoseconds(START.0 + 1_000_000_000)), 4992);
    // 1193182 / 239 is 4992.4: 200.3 microseconds each.
    assert!(pit.deadline().unwrap() > Nanoseconds(START.0 + 1_000_000_000));
}

#[test]
fn counts_go_down() {
    let mut pit = loaded(0, 2, 1000);
    assert_eq!(read_count(&mut pit, 0, after(0)), 1000);
    assert_eq!(read_count(&mut pit, 0, after(1)), 999);
    assert_eq!(read_count(&mut pit, 0, after(999)), 1);
    assert_eq!(read_count(&mut pit, 0, after(1000)), 1000);
    let mut pit = loaded(2, 0, 1000);
    assert_eq!(read_count(&mut pit, 2, after(1000)), 0);
    assert_eq!(read_count(&mut pit, 2, after(1001)), 0xffff);
    let mut pit = loaded(2, 3, 1000);
    assert_eq!(read_count(&mut pit, 2, after(1)), 998);
    assert_eq!(read_count(&mut pit, 2, after(501)), 998);
    // The greatest count reads as 0.
    let mut pit = loaded(2, 2, 0);
    assert_eq!(read_count(&mut pit, 2, after(0)), 0);
    assert_eq!(read_count(&mut pit, 2, after(1)), 0xffff);
}

#[test]
fn bcd_counts_in_decimal() {
    let mut pit = Pit::new(START);
    pit.write_port(0x43, 0x35, START);
    pit.write_port(0x40, 0x00, START);
    pit.write_port(0x40, 0x10, START);
    assert_eq!(read_count(&mut pit, 0, after(1)), 0x0999);
    assert_eq!(pit.deadline(), Some(after(1000)));
    pit.write_port(0x43, 0x35, START);
    pit.write_port(0x40, 0x00, START);
    pit.write_port(0x40, 0x00, START);
    assert_eq!(pit.deadline(), Some(after(10_000)));
    assert_eq!(read_count(&mut pit, 0, after(1)), 0x9999);
}

#[test]
fn outputs_of_the_modes() {
    // Mode 0: low until the count has ended.
    let mut pit = loaded(2, 0, 100);
    assert!(!output(&mut pit, after(99)));
    assert!(output(&mut pit, after(100)));
    assert!(output(&mut pit, after(1_000_000)));
    // Mode 2: low during the last tick.
    let mut pit = loaded(2, 2, 100);
    assert!(output(&mut pit, after(98)));
    assert!(!output(&mut pit, after(99)));
    assert!(output(&mut pit, after(100)));
    assert!(!output(&mut pit, after(199)));
    // Mode 3, odd count: high for (N + 1) / 2 ticks.
    let mut pit = loaded(2, 3, 101);
    assert!(output(&mut pit, after(50)));
    assert!(!output(&mut pit, after(51)));
    assert!(output(&mut pit, after(101)));
    // Mode 4: low for one tick.
    let mut pit = loaded(2, 4, 100);
    assert!(output(&mut pit, after(99)));
    assert!(!output(&mut pit, after(100)));
    assert!(output(&mut pit, after(101)));
}

#[test]
fn gate_halts_mode_0() {
    let mut pit = loaded(2, 0, 1000);
    pit.write_port(0x61, 0, after(400));
    assert_eq!(read_count(&mut pit, 2, after(5000)), 600);
    assert!(!output(&mut pit, after(5000)));
    pit.write_port(0x61, 1, after(5000));
    assert!(!output(&mut pit, after(5598)));
    assert!(output(&mut pit, after(5602)));
}

#[test]
fn gate_triggers_modes_1_and_5() {
    let mut pit = loaded(2, 1, 100);
    assert!(output(&mut pit, after(50)), "high until triggered");
    pit.write_port(0x61, 0, after(1000));
    pit.write_port(0x61, 1, after(2000));
    assert!(!output(&mut pit, after(2050)));
    assert!(output(&mut pit, after(2102)));
    let mut pit = loaded(2, 5, 100);
    pit.write_port(0x61, 0, after(1000));
    pit.write_port(0x61, 1, START);
    assert!(output(&mut pit, after(99)));
    assert!(!output(&mut pit, after(100)));
    assert!(output(&mut pit, after(101)));
}

#[test]
fn gate_begins_the_periodic_modes_anew() {
    let mut pit = loaded(2, 2, 1000);
    pit.write_port(0x61, 0, after(600));
    assert!(output(&mut pit, after(700)));
    let again = after(700);
    pit.write_port(0x61, 1, again);
    assert_eq!(read_count(&mut pit, 2, again), 1000);
}

#[test]
fn linux_calibrates_with_channel_2() {
    let mut pit = Pit::new(Nanoseconds(0));
    let speaker = pit.read_port(0x61, START).unwrap();
    pit.write_port(0x61, (speaker & !2) | 1, START);
    pit.write_port(0x43, 0xb0, START);
    // CALIBRATE_LATCH for 10 ms.
    let [low, high] = 11931u16.to_le_bytes();
    pit.write_port(0x42, low, START);
    pit.write_port(0x42, high, START);
    assert!(!output(&mut pit, Nanoseconds(START.0 + 9_999_000)));
    assert!(output(&mut pit, Nanoseconds(START.0 + 10_000_000)));
}

#[test]
fn latched_values_stay_until_they_are_read() {
    let mut pit = loaded(0, 2, 0x1234);
    // Read-back of count and status of channel 0.
    pit.write_port(0x43, 0xc2, after(4));
    pit.write_port(0x43, 0xc2, after(100));
    // Output high, count loaded, both bytes, mode 2, binary.
    assert_eq!(pit.read_port(0x40, after(200)), Some(0xb4));
    assert_eq!(pit.read_port(0x40, after(200)), Some(0x30));
    assert_eq!(pit.read_port(0x40, after(200)), Some(0x12));
    // Then the count as it is.
    assert_eq!(pit.read_port(0x40, after(0x34)), Some(0x00));
    assert_eq!(pit.read_port(0x40, after(0x34)), Some(0x12));
}

#[test]
fn status_tells_that_there_is_no_count() {
    let mut pit = Pit::new(START);
    pit.write_port(0x43, 0x10, START);
    pit.write_port(0x43, 0xe2, START);
    assert_eq!(pit.read_port(0x40, START), Some(0x50));
}

#[test]
fn single_byte_access() {
    let mut pit = Pit::new(START);
    pit.write_port(0x43, 0x24, START);
    pit.write_port(0x40, 0x12, START);
    assert_eq!(pit.deadline(), Some(after(0x1200)));
    assert_eq!(pit.read_port(0x40, after(1)), Some(0x11));
    pit.write_port(0x43, 0x14, START);
    pit.write_port(0x40, 0xff, START);
    assert_eq!(pit.deadline(), Some(after(0xff)));
}

#[test]
fn state_is_restored_and_counts_begin_anew() {
    let mut pit = loaded(0, 2, 1000);
    pit.write_port(0x61, 3, START);
    pit.write_port(0x42, 0x55, START);
    pit.advance(after(1500));
    let state = pit.state(after(1500));
    assert_eq!(state.flags, 2);
    let [first, _, third] = state.channels;
    assert_eq!((first.count, first.mode, first.rw_mode), (1000, 2, 3));
    assert_eq!((third.mode, third.gate), (0xff, 1));
    let mut copy = Pit::new(START);
    copy.set_state(&state, START);
    assert_eq!(copy.deadline(), Some(after(1000)));
    assert_eq!(copy.state(START).channels[0].count, 1000);
    let hpet = PitState { flags: 1, ..state };
    copy.set_state(&hpet, START);
    assert_eq!(copy.deadline(), None);
    assert_eq!(copy.state(START).flags, 1);
}

#[test]
fn other_ports_are_not_the_timers() {
    let mut pit = Pit::new(START);
    assert_eq!(pit.read_port(0x44, START), None);
    assert!(!pit.write_port(0x60, 0, START));
}

#[test]
fn refresh_bit_changes() {
    let mut pit = Pit::new(START);
    let bits: std::collections::BTreeSet<_> = (0..4)
        .map(|step| pit.read_port(0x61, Nanoseconds(step * 16384)).unwrap() & 0x10)
        .collect();
    assert_eq!(bits.len(), 2);
}

#[test]
fn conversions_are_inverse_at_the_range_ends() {
    for ticks in [0, 1, 2, 1_193_181, 1_193_182, 1_193_183, 1 << 50] {
        let nanoseconds = nanoseconds_of(ticks);
        assert_eq!(ticks_in(nanoseconds), ticks);
        if ticks > 0 {
            assert_eq!(ticks_in(nanoseconds - 1), ticks - 1);
        }
    }
    let exact = u128::from(u64::MAX) * 1_193_182 / 1_000_000_000;
    assert_eq!(u128::from(ticks_in(u64::MAX)), exact);
    assert_eq!(nanoseconds_of(u64::MAX), u64::MAX);
}

#[test]
fn count_loaded_with_the_gate_low_waits() {
    let mut pit = loaded(2, 0, 1000);
    pit.write_port(0x61, 0, after(10));
    for byte in [0xe8, 0x03] {
        pit.write_port(0x42, byte, after(20));
    }
    assert_eq!(read_count(&mut pit, 2, after(900)), 1000);
    pit.write_port(0x61, 1, after(5000));
    assert!(!output(&mut pit, after(5998)));
    assert!(output(&mut pit, after(6002)));
}

#[test]
fn control_word_drops_what_is_latched() {
    let mut pit = loaded(0, 2, 0x1234);
    pit.write_port(0x43, 0xc2, after(4));
    pit.write_port(0x43, 0x34, after(5));
    for byte in [0xcd, 0xab] {
        pit.write_port(0x40, byte, after(5));
    }
    assert_eq!(read_count(&mut pit, 0, after(5)), 0xabcd);
}

#[test]
fn first_byte_of_a_count_stops_mode_0() {
    let mut pit = loaded(0, 0, 1000);
    pit.write_port(0x40, 0xe8, after(500));
    assert_eq!(pit.deadline(), None);
    assert_eq!(pit.advance(after(5000)), 0);
    pit.write_port(0x40, 0x03, after(5000));
    assert_eq!(pit.deadline(), Some(past(after(5000), 1000)));
    let mut pit = loaded(2, 0, 100);
    assert!(output(&mut pit, after(100)));
    pit.write_port(0x42, 100, after(200));
    assert!(!output(&mut pit, after(1000)));
    pit.write_port(0x42, 0, after(1000));
    assert!(!output(&mut pit, after(1099)));
    assert!(output(&mut pit, after(1101)));
}

#[test]
fn new_count_waits_for_the_end_of_a_period() {
    // 8254, modes 2 and 3: "the current counting sequence is not affected".
    for mode in [2, 3] {
        let mut pit = loaded(0, mode, 1000);
        let boundary = after(3000);
        for byte in [0xf4, 0x01] {
            pit.write_port(0x40, byte, after(2400));
        }
        assert_eq!(pit.advance(after(2400)), 2);
        assert_eq!(pit.deadline(), Some(boundary));
        assert_eq!(pit.advance(boundary), 1);
        assert_eq!(pit.deadline(), Some(past(boundary, 500)));
    }
    let mut pit = loaded(2, 2, 1000);
    for byte in [0xf4, 0x01] {
        pit.write_port(0x42, byte, after(2400));
    }
    assert_eq!(read_count(&mut pit, 2, after(2401)), 599);
    assert!(!output(&mut pit, after(2999)));
    let boundary = after(3000);
    assert!(output(&mut pit, boundary));
    assert_eq!(read_count(&mut pit, 2, past(boundary, 1)), 499);
    // The gate's rise takes the new count at once.
    for byte in [0x2c, 0x01] {
        pit.write_port(0x42, byte, after(3100));
    }
    pit.write_port(0x61, 0, after(3110));
    pit.write_port(0x61, 1, after(3120));
    assert_eq!(read_count(&mut pit, 2, past(after(3120), 10)), 290);
    // A control word stops the old count too.
    let mut pit = loaded(2, 2, 1000);
    pit.write_port(0x43, 0xb4, after(100));
    for byte in [0xf4, 0x01] {
        pit.write_port(0x42, byte, after(100));
    }
    assert_eq!(read_count(&mut pit, 2, past(after(100), 10)), 490);
}

#[test]
fn edges_before_a_new_count_are_not_lost() {
    let mut pit = loaded(0, 2, 1000);
    // Nobody has asked since; the periods until the boundary count with the old length.
    for byte in [0x88, 0x13] {
        pit.write_port(0x40, byte, after(4500));
    }
    assert_eq!(pit.advance(after(4500)), 4);
    assert_eq!(pit.advance(after(9999)), 1);
    assert_eq!(pit.advance(after(10_001)), 1);
}

const TICK: Tick = Tick {
    rose: true,
    interrupts: true,
};
const KEPT: Tick = Tick {
    rose: true,
    interrupts: false,
};

#[test]
fn interrupts_are_kept_until_the_last_one_has_ended() {
    let mut pit = loaded(0, 2, 1000);
    assert!(!pit.tick(after(999)).rose);
    assert_eq!(pit.tick(after(1000)), TICK);
    assert_eq!(pit.tick(after(2000)), KEPT);
    assert_eq!(pit.tick(after(4000)), KEPT);
    // Four have come; each that ends gives the next.
    assert!(pit.ended());
    assert!(pit.ended());
    assert!(pit.ended());
    assert!(!pit.ended());
    assert!(!pit.ended(), "an end without a beginning");
    assert_eq!(pit.tick(after(5000)), TICK);
    assert!(!pit.ended());
}

#[test]
fn unmasking_and_a_new_count_drop_what_is_kept() {
    let mut pit = loaded(0, 2, 1000);
    assert_eq!(pit.tick(after(5000)), TICK);
    pit.unmasked();
    assert_eq!(pit.tick(after(6000)), TICK);
    assert!(!pit.ended());
    assert_eq!(pit.tick(after(9000)), TICK);
    for byte in [0xe8, 0x03] {
        pit.write_port(0x40, byte, after(9000));
    }
    assert!(!pit.ended());
}

#[test]
fn interrupts_are_not_kept_where_nobody_wants_them() {
    let mut pit = loaded(0, 2, 1000);
    assert!(pit.keeps_interrupts());
    pit.keep_interrupts(false);
    assert_eq!(pit.tick(after(3000)), TICK);
    assert_eq!(pit.tick(after(4000)), TICK);
    assert!(!pit.ended());
    pit.keep_interrupts(true);
    assert_eq!(pit.tick(after(6000)), TICK);
    pit.keep_interrupts(true);
    assert_eq!(pit.tick(after(7000)), KEPT);
    assert!(pit.ended());
}
