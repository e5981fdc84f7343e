// SPDX-License-Identifier: GPL-2.0

//! The IOAPIC: requests are neither lost nor made up.

use proptest::prelude::*;
use rvisor_core::irqchip::ioapic::{IoApic, IoApicState, PINS};
use rvisor_core::irqchip::{LineOutcome, LineSource};
use rvisor_core::x86::vector::Vector;

const VECTOR: u64 = 0xff;
const REMOTE_IRR: u64 = 1 << 14;
const LEVEL: u64 = 1 << 15;
const MASKED: u64 = 1 << 16;

#[derive(Clone, Debug)]
enum Step {
    Line(u8, u8, bool),
    Entry(u8, u64),
    Raw(u8, u32),
    Eoi(u8),
    State(u32, [u64; PINS]),
}

fn step() -> impl Strategy<Value = Step> {
    // Few vectors, so that pins share them.
    let entry = (0x30u64..0x34, any::<bool>(), any::<bool>(), any::<u64>()).prop_map(
        |(vector, level, masked, rest)| {
            (rest & !(VECTOR | LEVEL | MASKED))
                | vector
                | if level { LEVEL } else { 0 }
                | if masked { MASKED } else { 0 }
        },
    );
    prop_oneof![
        8 => (0u8..26, 0u8..3, any::<bool>()).prop_map(|(p, s, l)| Step::Line(p, s, l)),
        4 => (0u8..24, entry).prop_map(|(pin, entry)| Step::Entry(pin, entry)),
        2 => any::<(u8, u32)>().prop_map(|(offset, value)| Step::Raw(offset, value)),
        4 => (0x30u8..0x34).prop_map(Step::Eoi),
        1 => any::<(u32, [u64; PINS])>().prop_map(|(irr, table)| Step::State(irr, table)),
    ]
}

fn entries(ioapic: &IoApic) -> [u64; PINS] {
    ioapic.state().redirection
}

proptest! {
    #![proptest_config(super::config())]

    #[test]
    fn requests_are_neither_lost_nor_made_up(
        steps in proptest::collection::vec(step(), 1..200),
    ) {
        let mut ioapic = IoApic::new();
        let mut held = [0u8; PINS];
        // The pins whose request was made by a restored state and not by a line.
        let mut restored = 0u32;
        for step in steps {
            let before = entries(&ioapic);
            let mut sent = Vec::new();
            let mut ended = None;
            match step {
                Step::Line(pin, source, level) => {
                    let outcome =
                        ioapic.set_line(pin, LineSource::new(source).unwrap(), level);
                    let Some(held) = held.get_mut(usize::from(pin)) else {
                        prop_assert_eq!(outcome, LineOutcome::Ignored);
                        continue;
                    };
                    if level {
                        *held |= 1 << source;
                    } else {
                        *held &= !(1 << source);
                    }
                    restored &= !(1 << pin);
                    sent.extend(outcome.message().map(|message| (pin, message)));
                }
                Step::Entry(pin, entry) => {
                    for (register, half) in
                        [(0x11 + pin * 2, entry >> 32), (0x10 + pin * 2, entry)]
                    {
                        let _ = ioapic.write(0, u32::from(register));
                        let effect = ioapic.write(0x10, half as u32);
                        prop_assert_eq!(effect.changed, Some(pin));
                        sent.extend(effect.message.map(|message| (pin, message)));
                    }
                }
                Step::Raw(offset, value) => {
                    let effect = ioapic.write(offset, value);
                    ioapic.read(offset);
                    sent.extend(effect.message.map(|message| (effect.changed.unwrap(), message)));
                }
                Step::Eoi(vector) => {
                    ioapic.eoi(Vector(vector), |pin, message| sent.push((pin, message)));
                    ended = Some(vector);
                }
                Step::State(irr, redirection) => {
                    let state = IoApicState { base_address: 0, select: irr, id: irr, irr, redirection };
                    ioapic.set_state(&state, |pin, message| sent.push((pin, message)));
                    restored = irr;
                    // A source must act anew before its line counts again.
                    held = [0; PINS];
                    ioapic = {
                        let mut fresh = IoApic::new();
                        fresh.set_state(&ioapic.state(), |_, _| {});
                        fresh
                    };
                    restored &= ioapic.state().irr;
                    continue;
                }
            }
            let after = entries(&ioapic);
            for &(pin, message) in &sent {
                let entry = after[usize::from(pin)];
                prop_assert_eq!(entry & MASKED, 0, "a masked pin sends nothing");
                prop_assert_eq!(u64::from(message.vector.0), entry & VECTOR);
                prop_assert_eq!(u64::from(message.destination), entry >> 56);
                if entry & LEVEL != 0 {
                    prop_assert_ne!(entry & REMOTE_IRR, 0);
                    prop_assert!(held[usize::from(pin)] != 0 || restored & (1 << pin) != 0);
                }
            }
            for pin in 0..PINS {
                // Remote IRR goes out only by an EOI of the vector, or by turning edge-triggered.
                if before[pin] & REMOTE_IRR != 0 && after[pin] & REMOTE_IRR == 0 {
                    let by_eoi = ended.is_some_and(|vector| {
                        before[pin] & VECTOR == u64::from(vector) && before[pin] & LEVEL != 0
                    });
                    prop_assert!(by_eoi || after[pin] & LEVEL == 0);
                }
                // A level-triggered pin that is high, open and not under way has no business to be.
                if after[pin] & (LEVEL | MASKED | REMOTE_IRR) == LEVEL {
                    prop_assert_eq!(held[pin], 0, "pin {} waits for nothing", pin);
                }
            }
        }
    }
}
