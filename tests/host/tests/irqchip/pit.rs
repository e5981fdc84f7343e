// SPDX-License-Identifier: GPL-2.0

//! The interval timer: its edges come at the datasheet's rate, and no access breaks it.

use proptest::prelude::*;
use rvisor_core::irqchip::pit::{ChannelState, Pit, PitState};
use rvisor_core::irqchip::Nanoseconds;

#[derive(Clone, Debug)]
enum Step {
    Read(u16),
    Write(u16, u8),
    Wait(u64),
    Advance,
    State(Vec<u8>, [u32; 3], u32),
}

fn step() -> impl Strategy<Value = Step> {
    let port = prop_oneof![0x40u16..0x44, Just(0x61), Just(0x44)];
    prop_oneof![
        4 => port.clone().prop_map(Step::Read),
        8 => (port, any::<u8>()).prop_map(|(port, value)| Step::Write(port, value)),
        4 => prop_oneof![0u64..100_000_000, any::<u64>()].prop_map(Step::Wait),
        4 => Just(Step::Advance),
        1 => (proptest::collection::vec(any::<u8>(), 36), any::<[u32; 3]>(), any::<u32>())
            .prop_map(|(bytes, counts, flags)| Step::State(bytes, counts, flags)),
    ]
}

fn channel_state(b: &[u8], count: u32) -> ChannelState {
    ChannelState {
        count,
        latched_count: u16::from_le_bytes([b[0], b[1]]),
        count_latched: b[2],
        status_latched: b[3],
        status: b[4],
        read_state: b[5],
        write_state: b[6],
        write_latch: b[7],
        rw_mode: b[8],
        mode: b[9],
        bcd: b[10],
        gate: b[11],
        count_load_time: i64::from(count),
    }
}

proptest! {
    #![proptest_config(super::config())]

    /// The edges until any moment are the whole periods until then, however often it is asked.
    #[test]
    fn edges_are_the_elapsed_periods(
        mode in 2u8..4,
        count in 239u32..=65536,
        start in 0u64..1 << 60,
        waits in proptest::collection::vec(0u64..1_000_000_000_000, 1..50),
    ) {
        let mut pit = Pit::new(Nanoseconds(0));
        let start = Nanoseconds(start);
        pit.write_port(0x43, 0x30 | (mode << 1), start);
        let [low, high] = ((count & 0xffff) as u16).to_le_bytes();
        pit.write_port(0x40, low, start);
        pit.write_port(0x40, high, start);
        let mut now = start;
        let mut edges = 0;
        for wait in waits {
            now.0 += wait;
            edges += pit.advance(now);
            let elapsed = u128::from(now.0 - start.0);
            let periods = elapsed * 1_193_182 / 1_000_000_000 / u128::from(count);
            prop_assert_eq!(u128::from(edges), periods);
            // The next one is told at its moment, and not a nanosecond before.
            let deadline = pit.deadline().unwrap();
            prop_assert!(deadline > now);
            let mut copy = pit.clone();
            prop_assert_eq!(copy.advance(Nanoseconds(deadline.0 - 1)), 0);
            prop_assert_eq!(copy.advance(deadline), 1);
        }
    }

    #[test]
    fn any_sequence_is_survived(steps in proptest::collection::vec(step(), 1..200)) {
        let mut now = Nanoseconds(0);
        let mut pit = Pit::new(now);
        for step in steps {
            match step {
                Step::Read(port) => {
                    prop_assert_eq!(pit.read_port(port, now).is_some(), port != 0x44);
                }
                Step::Write(port, value) => {
                    prop_assert_eq!(pit.write_port(port, value, now), port != 0x44);
                }
                Step::Wait(by) => now = now.after(by),
                Step::Advance => {
                    pit.advance(now);
                    if let Some(deadline) = pit.deadline() {
                        prop_assert!(deadline > now || now.0 == u64::MAX);
                    }
                    prop_assert_eq!(pit.advance(now), 0);
                }
                Step::State(bytes, [a, b, c], flags) => {
                    let state = PitState {
                        channels: [
                            channel_state(&bytes[..12], a),
                            channel_state(&bytes[12..24], b),
                            channel_state(&bytes[24..], c),
                        ],
                        flags,
                    };
                    pit.set_state(&state, now);
                }
            }
            let state = pit.state(now);
            for channel in state.channels {
                prop_assert!((1..=0x1_0000).contains(&channel.count));
                prop_assert!(channel.mode <= 5 || channel.mode == 0xff);
                prop_assert!((1..=3).contains(&channel.rw_mode) && channel.gate <= 1);
                prop_assert!((1..=4).contains(&channel.read_state));
                prop_assert!((1..=4).contains(&channel.write_state));
            }
            let mut copy = Pit::new(now);
            copy.set_state(&state, now);
            let again = copy.state(now);
            for (channel, again) in state.channels.into_iter().zip(again.channels) {
                prop_assert_eq!(ChannelState { count_load_time: 0, ..again },
                    ChannelState { count_load_time: 0, ..channel });
            }
        }
    }

    /// What is latched is what was there, however long the guest takes to read it.
    #[test]
    fn latch_freezes_the_count(count in 2u16.., elapsed in 0u64..1 << 40, later in 0u64..1 << 40) {
        let mut pit = Pit::new(Nanoseconds(0));
        pit.write_port(0x43, 0xb4, Nanoseconds(0));
        let [low, high] = count.to_le_bytes();
        pit.write_port(0x42, low, Nanoseconds(0));
        pit.write_port(0x61, 1, Nanoseconds(0));
        pit.write_port(0x42, high, Nanoseconds(0));
        let ticks = u128::from(elapsed) * 1_193_182 / 1_000_000_000;
        let expected = u128::from(count) - ticks % u128::from(count);
        pit.write_port(0x43, 0x80, Nanoseconds(elapsed));
        let at = Nanoseconds(elapsed + later);
        let bytes = [pit.read_port(0x42, at).unwrap(), pit.read_port(0x42, at).unwrap()];
        prop_assert_eq!(u128::from(u16::from_le_bytes(bytes)), expected);
    }
}
