// SPDX-License-Identifier: GPL-2.0

//! The local APIC against a model of its priorities, and against a hostile guest and owner.

use std::collections::BTreeSet;

use proptest::prelude::*;
use rvisor_core::irqchip::destination::{ApicIdentity, ApicMode};
use rvisor_core::irqchip::lapic::{
    BusCycle, Deadline, Features, LapicEffect, LocalApic, LocalInput, Origin, PageFormat,
    ResetKind, REGISTERS_SIZE,
};
use rvisor_core::irqchip::{Nanoseconds, Now, TriggerMode};
use rvisor_core::x86::msr::MsrIndex;
use rvisor_core::x86::vector::{ApicId, Vector};

fn now(nanoseconds: u64) -> Now {
    Now {
        nanoseconds: Nanoseconds(nanoseconds),
        tsc: nanoseconds.wrapping_mul(3),
    }
}

fn features(bits: u8) -> Features {
    Features {
        x2apic: bits & 1 != 0,
        tsc_deadline: bits & 2 != 0,
        suppress_eoi_broadcast: bits & 4 != 0,
        cmci: bits & 8 != 0,
        physical_bits: 36 + (bits >> 4),
        lint0_virtual_wire: bits & 16 != 0,
    }
}

#[derive(Clone, Debug)]
enum Step {
    Request(u8, bool),
    Merge([u64; 4], [u64; 4]),
    Deliver,
    Eoi,
    Tpr(u8),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        (16u8.., any::<bool>()).prop_map(|(vector, level)| Step::Request(vector, level)),
        // Few bits, so that the sets are not full at once.
        any::<[[u64; 4]; 4]>().prop_map(|[a, b, c, level]| Step::Merge(
            std::array::from_fn(|i| a[i] & b[i] & c[i] & if i == 0 { !0xffff } else { !0 }),
            level
        )),
        Just(Step::Deliver),
        Just(Step::Eoi),
        any::<u8>().prop_map(Step::Tpr),
    ]
}

/// SDM vol. 3, 12.8, in the words of sets.
#[derive(Default)]
struct Model {
    requested: BTreeSet<u8>,
    in_service: BTreeSet<u8>,
    level: BTreeSet<u8>,
    tpr: u8,
}

impl Model {
    fn request(&mut self, vector: u8, level: bool) {
        self.requested.insert(vector);
        if level {
            self.level.insert(vector);
        } else {
            self.level.remove(&vector);
        }
    }

    fn ppr(&self) -> u8 {
        let service = self.in_service.last().map_or(0, |vector| vector & 0xf0);
        if self.tpr & 0xf0 >= service {
            self.tpr
        } else {
            service
        }
    }

    fn pending(&self) -> Option<u8> {
        let vector = *self.requested.last()?;
        (vector >> 4 > self.ppr() >> 4).then_some(vector)
    }
}

#[derive(Clone, Debug)]
enum Abuse {
    Read(u16),
    Write(u16, u32),
    ReadMsr(u8),
    WriteMsr(u8, u64),
    Base(u64, bool),
    Deadline(u64),
    Fire,
    Wait(u64),
    Input(u8),
    Acknowledge(u8),
    Merge([u64; 4]),
    Page(Vec<u8>, bool),
    Features(u8),
    Reset(bool),
}

fn abuse() -> impl Strategy<Value = Abuse> {
    // Registers that exist come often, others sometimes.
    let offset = prop_oneof![(0u16..64).prop_map(|index| index << 4), any::<u16>()];
    let base = prop_oneof![
        (0u64..4).prop_map(|mode| 0xfee0_0000 | (mode << 10)),
        any::<u64>()
    ];
    let value = prop_oneof![any::<u32>(), 0u32..0x200, Just(0x2_00ec), Just(0x4_00ec)];
    prop_oneof![
        1 => offset.clone().prop_map(Abuse::Read),
        4 => (offset, value.clone()).prop_map(|(offset, value)| Abuse::Write(offset, value)),
        1 => any::<u8>().prop_map(Abuse::ReadMsr),
        2 => (any::<u8>(), value.prop_map(u64::from)).prop_map(|(i, v)| Abuse::WriteMsr(i, v)),
        1 => (any::<u8>(), any::<u64>()).prop_map(|(index, value)| Abuse::WriteMsr(index, value)),
        1 => (base, any::<bool>()).prop_map(|(base, host)| Abuse::Base(base, host)),
        1 => any::<u64>().prop_map(Abuse::Deadline),
        2 => Just(Abuse::Fire),
        1 => prop_oneof![0u64..10_000_000, any::<u64>()].prop_map(Abuse::Wait),
        1 => (0u8..6).prop_map(Abuse::Input),
        1 => any::<u8>().prop_map(Abuse::Acknowledge),
        1 => any::<[u64; 4]>().prop_map(Abuse::Merge),
        1 => (
            proptest::collection::vec(any::<u8>(), REGISTERS_SIZE),
            any::<bool>()
        )
            .prop_map(|(page, legacy)| Abuse::Page(page, legacy)),
        1 => any::<u8>().prop_map(Abuse::Features),
        1 => any::<bool>().prop_map(Abuse::Reset),
    ]
}

fn format(legacy: bool) -> PageFormat {
    if legacy {
        PageFormat::Legacy
    } else {
        PageFormat::X2Apic
    }
}

const INPUTS: [LocalInput; 6] = [
    LocalInput::Timer,
    LocalInput::Thermal,
    LocalInput::Performance,
    LocalInput::Lint0,
    LocalInput::Lint1,
    LocalInput::CorrectedMachineCheck,
];

/// Takes one step of abuse. What it gives is the effect that must tell of changes.
fn apply(apic: &mut LocalApic, step: &Abuse, time: &mut u64) -> LapicEffect {
    match step {
        Abuse::Read(offset) => {
            apic.read(*offset, now(*time));
        }
        Abuse::Write(offset, value) => return apic.write(*offset, *value, now(*time)),
        Abuse::ReadMsr(index) => {
            let _ = apic.read_msr(MsrIndex(0x800 | u32::from(*index)), now(*time));
        }
        Abuse::WriteMsr(index, value) => {
            return apic
                .write_msr(MsrIndex(0x800 | u32::from(*index)), *value, now(*time))
                .unwrap_or(LapicEffect::None);
        }
        Abuse::Base(base, host) => {
            let origin = if *host { Origin::Host } else { Origin::Guest };
            return apic.set_base(*base, origin).unwrap_or(LapicEffect::None);
        }
        Abuse::Deadline(tsc) => return apic.set_tsc_deadline(*tsc),
        Abuse::Fire => {
            apic.timer_fired(now(*time));
            return LapicEffect::TimerChanged;
        }
        Abuse::Wait(by) => *time = time.saturating_add(*by),
        Abuse::Input(index) => {
            let _ = apic.local_interrupt(INPUTS[usize::from(*index)]);
        }
        Abuse::Acknowledge(vector) => apic.acknowledge(Vector(*vector)),
        Abuse::Merge(requests) => apic.merge_requests(requests),
        Abuse::Page(page, legacy) => {
            let page = page.as_slice().try_into().expect("a page's size");
            let _ = apic.set_registers(page, format(*legacy), now(*time));
            return LapicEffect::IdentityChanged;
        }
        Abuse::Features(bits) => apic.set_features(features(*bits)),
        Abuse::Reset(init) => {
            apic.reset(if *init {
                ResetKind::Init
            } else {
                ResetKind::PowerUp
            });
            return LapicEffect::IdentityChanged;
        }
    }
    LapicEffect::None
}

proptest! {
    #![proptest_config(super::config())]

    /// What is pending, the PPR and the EOIs follow the model, whatever comes.
    #[test]
    fn priorities_follow_the_manual(steps in proptest::collection::vec(step(), 1..200)) {
        let mut apic = LocalApic::new(ApicId(0), false, features(0), BusCycle::DEFAULT);
        let _ = apic.write(0xf0, 0x1ff, now(0));
        let mut model = Model::default();
        for step in steps {
            match step {
                Step::Request(vector, level) => {
                    prop_assert!(apic.set_irr(Vector(vector), TriggerMode::from_bit(level)));
                    model.request(vector, level);
                }
                Step::Merge(requests, level) => {
                    apic.merge_requests_with_level(&requests, &level);
                    for vector in 0..=255u8 {
                        let (word, bit) = (usize::from(vector / 64), 1 << (vector % 64));
                        if requests[word] & bit != 0 {
                            model.request(vector, level[word] & bit != 0);
                        }
                    }
                }
                Step::Deliver => {
                    if let Some(vector) = apic.highest_pending() {
                        apic.acknowledge(vector);
                        model.requested.remove(&vector.0);
                        model.in_service.insert(vector.0);
                    }
                }
                Step::Eoi => {
                    let ended = model.in_service.pop_last();
                    let told = ended.filter(|vector| model.level.contains(vector));
                    prop_assert_eq!(apic.eoi(), told.map(Vector));
                }
                Step::Tpr(tpr) => {
                    apic.set_tpr(tpr);
                    model.tpr = tpr;
                }
            }
            prop_assert_eq!(apic.ppr(), model.ppr());
            prop_assert_eq!(apic.highest_pending().map(|v| v.0), model.pending());
            // The threshold is 0, or the CR8 value below which something becomes deliverable.
            let threshold = apic.tpr_threshold();
            let mut lowered = apic.clone();
            if threshold == 0 {
                lowered.set_cr8(0);
                prop_assert_eq!(lowered.highest_pending().is_some(), apic.highest_pending().is_some());
            } else {
                prop_assert!(apic.cr8() >= threshold);
                prop_assert_eq!(lowered.highest_pending(), None);
                lowered.set_cr8(threshold - 1);
                prop_assert!(lowered.highest_pending().is_some());
            }
        }
    }

    /// Nothing that a guest or its owner does breaks what others rely on.
    #[test]
    fn abuse_is_survived(
        bits: u8,
        bootstrap: bool,
        steps in proptest::collection::vec(abuse(), 1..150),
    ) {
        let mut apic = LocalApic::new(ApicId(0x1234), bootstrap, features(bits), BusCycle::DEFAULT);
        let mut time = 0;
        for step in &steps {
            let (identity, deadline) = (apic.identity(), apic.deadline());
            let effect = apply(&mut apic, step, &mut time);
            if effect != LapicEffect::IdentityChanged {
                prop_assert_eq!(apic.identity(), identity, "{:?} told of no change", step);
                if effect != LapicEffect::TimerChanged {
                    prop_assert_eq!(apic.deadline(), deadline, "{:?} told of no change", step);
                }
            }
            let after = apic.identity();
            prop_assert_eq!(ApicIdentity::from_packed(after.id, after.packed()), after);
            prop_assert_eq!(after.id, ApicId(0x1234));
            if let Some(vector) = apic.highest_pending() {
                prop_assert!(vector.0 >> 4 > apic.ppr() >> 4);
                prop_assert!(after.mode != ApicMode::Disabled);
            }
            // A timer that has fired is not due at the same moment again.
            let mut fired = apic.clone();
            fired.timer_fired(now(time));
            match fired.deadline() {
                Some(Deadline::At(at)) => {
                    prop_assert!(at > Nanoseconds(time) || time == u64::MAX);
                }
                Some(Deadline::Tsc(tsc)) => prop_assert!(tsc > now(time).tsc),
                None => {}
            }
        }
    }

    /// A page that was got and set again is the same, and so is what the guest then sees.
    #[test]
    fn page_is_restored(bits: u8, steps in proptest::collection::vec(abuse(), 1..80), legacy: bool) {
        let mut apic = LocalApic::new(ApicId(0x12), true, features(bits), BusCycle::DEFAULT);
        let mut time = 0;
        // Features that go away leave behind what cannot be set again.
        for step in steps.iter().filter(|step| !matches!(step, Abuse::Features(_))) {
            let _ = apply(&mut apic, step, &mut time);
        }
        apic.timer_fired(now(time));
        let page = apic.registers(format(legacy), now(time));
        let mut copy = LocalApic::new(ApicId(0x12), true, apic.features(), BusCycle::DEFAULT);
        prop_assert!(copy.set_base(apic.base(), Origin::Host).is_ok());
        prop_assert_eq!(copy.set_registers(&page, format(legacy), now(time)), Ok(()));
        let _ = copy.set_tsc_deadline(apic.tsc_deadline());
        prop_assert_eq!(copy.highest_pending(), apic.highest_pending());
        prop_assert_eq!(copy.accepts_pic_interrupt(), apic.accepts_pic_interrupt());
        prop_assert_eq!(copy.tsc_deadline(), apic.tsc_deadline());
        prop_assert_eq!(&copy.registers(format(legacy), now(time))[..], &page[..]);
    }
}
