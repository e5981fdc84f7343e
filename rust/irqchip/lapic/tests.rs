// SPDX-License-Identifier: GPL-2.0

mod page;
mod timer;
mod x2apic;

use super::*;
use crate::irqchip::destination::{DeliveryMode, Shorthand};
use crate::irqchip::Nanoseconds;
use crate::x86::msr::MsrIndex;

const NOW: Now = at(1_000_000_000);

const fn at(nanoseconds: u64) -> Now {
    Now {
        nanoseconds: Nanoseconds(nanoseconds),
        tsc: nanoseconds * 2,
    }
}

fn features() -> Features {
    Features {
        x2apic: true,
        tsc_deadline: true,
        physical_bits: 46,
        ..Features::default()
    }
}

/// An enabled xAPIC with the identifier 3.
fn enabled() -> LocalApic {
    let mut apic = LocalApic::new(ApicId(3), false, features(), BusCycle::DEFAULT);
    let _ = apic.write(0xf0, 0x1ff, NOW);
    apic
}

fn x2apic() -> LocalApic {
    let mut apic = enabled();
    let _ = apic.set_base(0xfee0_0c00, Origin::Guest).unwrap();
    apic
}

fn request(apic: &mut LocalApic, vector: u8) {
    assert!(apic.set_irr(Vector(vector), TriggerMode::Edge));
}

#[test]
fn reset_state_is_the_manuals() {
    // SDM vol. 3, 12.4.7.1.
    let mut apic = LocalApic::new(ApicId(3), false, Features::default(), BusCycle::DEFAULT);
    assert_eq!(apic.base(), 0xfee0_0800);
    assert_eq!(apic.mmio_base(), 0xfee0_0000);
    assert_eq!(apic.read(0x20, NOW), 3 << 24);
    assert_eq!(apic.read(0x30, NOW), 0x0005_0014);
    assert_eq!(apic.read(0xe0, NOW), 0xffff_ffff);
    assert_eq!(apic.read(0xf0, NOW), 0xff);
    for entry in [0x320, 0x330, 0x340, 0x350, 0x360, 0x370] {
        assert_eq!(apic.read(entry, NOW), 0x1_0000);
    }
    for zero in [0x80, 0xa0, 0xd0, 0x100, 0x200, 0x280, 0x300, 0x380, 0x390] {
        assert_eq!(apic.read(zero, NOW), 0, "{zero:#x}");
    }
    assert!(!apic.accepts_pic_interrupt());
    let bootstrap = LocalApic::new(ApicId(0), true, Features::default(), BusCycle::DEFAULT);
    assert_eq!(bootstrap.base(), 0xfee0_0900);
    assert!(bootstrap.accepts_pic_interrupt());
}

#[test]
fn highest_vector_above_the_priority_is_delivered() {
    let mut apic = enabled();
    assert_eq!(apic.highest_pending(), None);
    request(&mut apic, 0x31);
    request(&mut apic, 0x52);
    assert_eq!(apic.highest_pending(), Some(Vector(0x52)));
    apic.acknowledge(Vector(0x52));
    assert_eq!(apic.ppr(), 0x50);
    assert_eq!(apic.highest_pending(), None);
    request(&mut apic, 0x5f);
    assert_eq!(apic.highest_pending(), None, "the same class waits");
    request(&mut apic, 0x60);
    assert_eq!(apic.highest_pending(), Some(Vector(0x60)));
    apic.acknowledge(Vector(0x60));
    assert_eq!(apic.eoi(), None);
    assert_eq!(apic.ppr(), 0x50);
    apic.eoi();
    assert_eq!(apic.highest_pending(), Some(Vector(0x5f)));
    assert_eq!(apic.eoi(), None, "nothing in service");
}

#[test]
fn task_priority_holds_back() {
    let mut apic = enabled();
    request(&mut apic, 0x52);
    apic.set_cr8(5);
    assert_eq!(apic.tpr(), 0x50);
    assert_eq!(apic.highest_pending(), None);
    assert_eq!(apic.tpr_threshold(), 5);
    apic.set_tpr(0x4f);
    assert_eq!(apic.ppr(), 0x4f);
    assert_eq!(apic.highest_pending(), Some(Vector(0x52)));
    assert_eq!(apic.tpr_threshold(), 0);
    // SDM vol. 3, 12.8.3.1: with the same class in service the PPR is the TPR.
    apic.acknowledge(Vector(0x52));
    apic.set_tpr(0x5a);
    assert_eq!(apic.ppr(), 0x5a);
    assert_eq!(apic.cr8(), 5);
}

#[test]
fn level_triggered_vectors_are_broadcast_at_eoi() {
    let mut apic = enabled();
    apic.set_irr(Vector(0x71), TriggerMode::Level);
    assert_eq!(apic.read(0x180 + 0x30, NOW), 1 << 17);
    apic.acknowledge(Vector(0x71));
    assert_eq!(apic.write(0xb0, 0, NOW), LapicEffect::Eoi(Vector(0x71)));
    request(&mut apic, 0x71);
    apic.acknowledge(Vector(0x71));
    assert_eq!(apic.write(0xb0, 0, NOW), LapicEffect::None);
    let mut watched = VectorSet::EMPTY;
    watched.insert(Vector(0x71));
    apic.watch_eoi(&watched);
    request(&mut apic, 0x71);
    apic.acknowledge(Vector(0x71));
    assert_eq!(apic.eoi(), Some(Vector(0x71)));
}

#[test]
fn broadcast_can_be_suppressed_where_that_exists() {
    for exists in [false, true] {
        let mut apic = enabled();
        apic.set_features(Features {
            suppress_eoi_broadcast: exists,
            ..features()
        });
        assert_eq!(apic.read(0x30, NOW) & (1 << 24) != 0, exists);
        let _ = apic.write(0xf0, 0x11ff, NOW);
        assert_eq!(apic.read(0xf0, NOW), if exists { 0x11ff } else { 0x1ff });
        apic.set_irr(Vector(0x71), TriggerMode::Level);
        apic.acknowledge(Vector(0x71));
        assert_eq!(apic.eoi().is_none(), exists);
    }
}

#[test]
fn requests_are_merged() {
    let mut apic = enabled();
    let bit = |vector: u8| {
        let mut set = VectorSet::EMPTY;
        set.insert(Vector(vector));
        *set.words()
    };
    apic.merge_requests_with_level(&bit(0x91), &bit(0x91));
    assert!(apic.is_level_triggered(Vector(0x91)));
    apic.merge_requests(&bit(0xe1));
    assert_eq!(apic.highest_pending(), Some(Vector(0xe1)));
    apic.merge_requests(&bit(0x91));
    assert!(!apic.is_level_triggered(Vector(0x91)));
    // A level bit without a request says nothing.
    apic.merge_requests_with_level(&[0; 4], &[u64::MAX; 4]);
    assert!(!apic.is_level_triggered(Vector(0x91)));
}

#[test]
fn illegal_vectors_are_errors() {
    let mut apic = enabled();
    let _ = apic.write(0x370, 0xfe, NOW);
    assert!(!apic.set_irr(Vector(15), TriggerMode::Edge));
    assert_eq!(apic.read(0x280, NOW), 0, "readable only after a write");
    let _ = apic.write(0x280, 0, NOW);
    assert_eq!(apic.read(0x280, NOW), 1 << 6);
    assert_eq!(apic.highest_pending(), Some(Vector(0xfe)));
    let _ = apic.write(0x280, 0, NOW);
    assert_eq!(apic.read(0x280, NOW), 0);
    assert_eq!(apic.write(0x300, 0x000c_0008, NOW), LapicEffect::None);
    let _ = apic.write(0x280, 0, NOW);
    assert_eq!(apic.read(0x280, NOW), 1 << 5);
    assert_eq!(apic.read(0x3f0, NOW), 0);
    let _ = apic.write(0x280, 0, NOW);
    assert_eq!(apic.read(0x280, NOW), 1 << 7);
}

#[test]
fn software_disable_masks_and_refuses() {
    let mut apic = enabled();
    let _ = apic.write(0x350, 0x700, NOW);
    request(&mut apic, 0x45);
    assert_eq!(apic.write(0xf0, 0xff, NOW), LapicEffect::IdentityChanged);
    assert!(!apic.set_irr(Vector(0x46), TriggerMode::Edge));
    assert_eq!(apic.read(0x350, NOW), 0x1_0700);
    let _ = apic.write(0x350, 0x700, NOW);
    assert_eq!(apic.read(0x350, NOW), 0x1_0700, "can't be unmasked");
    assert_eq!(apic.highest_pending(), Some(Vector(0x45)), "is held");
}

#[test]
fn masking_lint0_with_all_others_is_told() {
    let mut apic = LocalApic::new(ApicId(0), true, features(), BusCycle::DEFAULT);
    assert!(apic.identity().takes_pic);
    assert_eq!(apic.write(0xf0, 0xff, NOW), LapicEffect::IdentityChanged);
    assert!(!apic.identity().takes_pic);
}

#[test]
fn base_transitions_are_the_manuals() {
    // SDM vol. 3, figure 12-27.
    const OFF: u64 = 0xfee0_0000;
    const ON: u64 = 0xfee0_0800;
    const X2: u64 = 0xfee0_0c00;
    const NONSENSE: u64 = 0xfee0_0400;
    let allowed = |from: u64, to: u64, origin| {
        let mut apic = enabled();
        let _ = apic.set_base(from, Origin::Host).unwrap();
        apic.set_base(to, origin).is_ok()
    };
    for (from, to, guest_may) in [
        (OFF, ON, true),
        (OFF, X2, false),
        (ON, OFF, true),
        (ON, X2, true),
        (X2, OFF, true),
        (X2, ON, false),
    ] {
        assert_eq!(
            allowed(from, to, Origin::Guest),
            guest_may,
            "{from:x} {to:x}"
        );
        assert!(allowed(from, to, Origin::Host));
        assert!(!allowed(from, NONSENSE, Origin::Host));
    }
    let mut apic = enabled();
    for reserved in [1, 1 << 7, 1 << 9, 1 << 46] {
        assert_eq!(apic.set_base(ON | reserved, Origin::Host), Err(Invalid));
    }
    assert_eq!(
        apic.set_base(0x1_0000_0800, Origin::Guest),
        Ok(LapicEffect::None)
    );
    assert_eq!(apic.mmio_base(), 0x1_0000_0000);
    apic.set_features(Features {
        x2apic: false,
        ..features()
    });
    assert_eq!(apic.set_base(X2, Origin::Guest), Err(Invalid));
}

#[test]
fn xapic_identifier_is_the_first_again_when_the_mode_is_entered() {
    let mut apic = enabled();
    let _ = apic.write(0x20, 0x0900_0000, NOW);
    assert_eq!(apic.identity().xapic_id, 9);
    for base in [0xfee0_0000, 0xfee0_0800] {
        let _ = apic.set_base(base, Origin::Guest).unwrap();
    }
    assert_eq!(apic.identity().xapic_id, 3);
}

#[test]
fn base_address_has_52_bits_at_most() {
    let mut apic = enabled();
    apic.set_features(Features {
        physical_bits: 64,
        ..features()
    });
    assert!(apic.set_base((1 << 51) | 0x800, Origin::Host).is_ok());
    assert!(apic.set_base((1 << 52) | 0x800, Origin::Host).is_err());
}

/// Who keeps the priority elsewhere too has to know.
#[test]
fn a_write_of_the_task_priority_is_told() {
    let mut apic = enabled();
    assert_eq!(apic.write(0x80, 0x50, NOW), LapicEffect::PriorityChanged);
    let _ = apic.set_base(0xfee0_0c00, Origin::Host).unwrap();
    let tpr = MsrIndex(0x808);
    assert_eq!(
        apic.write_msr(tpr, 0x34, NOW),
        Ok(LapicEffect::PriorityChanged)
    );
    assert_eq!((apic.tpr(), apic.read_msr(tpr, NOW)), (0x34, Ok(0x34)));
}

#[test]
fn switched_off_apic_leaves_intr_to_the_pic() {
    let mut apic = enabled();
    request(&mut apic, 0x45);
    let _ = apic.set_base(0xfee0_0000, Origin::Guest).unwrap();
    assert!(apic.accepts_pic_interrupt());
    assert_eq!(apic.highest_pending(), None);
    // The page stays where it was, and there is nothing in it.
    assert_eq!(apic.mmio_base(), 0xfee0_0000);
    assert_eq!(apic.read(0x30, NOW), 0xffff_ffff);
    assert_eq!(apic.write(0x80, 0x50, NOW), LapicEffect::None);
    assert_eq!(apic.tpr(), 0);
    assert!(!apic.set_irr(Vector(0x46), TriggerMode::Edge));
    assert_eq!(apic.identity().mode, ApicMode::Disabled);
}

#[test]
fn xapic_ipi_takes_both_halves() {
    let mut apic = enabled();
    assert_eq!(apic.write(0x310, 0x0500_0000, NOW), LapicEffect::None);
    let LapicEffect::SendIpi(message) = apic.write(0x300, 0x5041, NOW) else {
        panic!("no IPI");
    };
    assert_eq!(message.destination, 5);
    assert_eq!(message.vector, Vector(0x41));
    assert_eq!(message.delivery_mode, DeliveryMode::Fixed);
    assert_eq!(message.shorthand, Shorthand::None);
    assert_eq!(apic.read(0x300, NOW), 0x4041, "never busy");
    assert_eq!(apic.read(0x310, NOW), 0x0500_0000);
}

#[test]
fn self_ipi_stays_inside() {
    let mut apic = enabled();
    assert_eq!(apic.write(0x300, 0x0004_0041, NOW), LapicEffect::None);
    assert_eq!(apic.highest_pending(), Some(Vector(0x41)));
    let mut apic = x2apic();
    assert_eq!(
        apic.write_msr(MsrIndex(0x83f), 0x51, NOW),
        Ok(LapicEffect::None)
    );
    assert_eq!(apic.highest_pending(), Some(Vector(0x51)));
    assert_eq!(apic.write_msr(MsrIndex(0x83f), 0x151, NOW), Err(Invalid));
}

#[test]
fn accesses_keep_to_the_grid() {
    let mut apic = enabled();
    let _ = apic.write(0x84, 0x50, NOW);
    let _ = apic.write(0x81, 0x50, NOW);
    assert_eq!(apic.tpr(), 0);
    let _ = apic.write(0x80, 0x50, NOW);
    assert_eq!(apic.read(0x84, NOW), 0);
    assert_eq!(
        apic.read(0x32, NOW) & 0xff,
        0x05,
        "the version's third byte"
    );
}

#[test]
fn identity_changes_are_told() {
    let mut apic = enabled();
    for (offset, value) in [(0x20, 0x0900_0000), (0xd0, 0x8000_0000), (0xe0, 0)] {
        assert_eq!(apic.write(offset, value, NOW), LapicEffect::IdentityChanged);
    }
    let identity = apic.identity();
    assert_eq!(identity.xapic_id, 9);
    assert_eq!(identity.logical_id, 0x80);
    assert_eq!(identity.model, LogicalModel::Cluster);
    assert_eq!(apic.read(0xe0, NOW), 0x0fff_ffff);
    assert!(identity.software_enabled);
    assert!(!identity.takes_pic && !identity.is_watchdog);
    for (entry, takes_pic, is_watchdog) in [(0x700, true, false), (0x400, false, true)] {
        assert_eq!(apic.write(0x350, entry, NOW), LapicEffect::IdentityChanged);
        let identity = apic.identity();
        assert_eq!(
            (identity.takes_pic, identity.is_watchdog),
            (takes_pic, is_watchdog)
        );
    }
    assert_eq!(
        apic.set_base(0xfee0_0c00, Origin::Guest),
        Ok(LapicEffect::IdentityChanged)
    );
    assert_eq!(apic.identity().mode, ApicMode::X2Apic);
}

#[test]
fn local_inputs_go_by_their_entries() {
    let mut apic = enabled();
    assert_eq!(apic.local_interrupt(LocalInput::Lint1), LocalDelivery::None);
    let _ = apic.write(0x360, 0x400, NOW);
    assert!(apic.lint1_is_nmi());
    assert_eq!(apic.local_interrupt(LocalInput::Lint1), LocalDelivery::Nmi);
    let _ = apic.write(0x350, 0x700, NOW);
    assert!(apic.accepts_pic_interrupt() && !apic.lint0_is_nmi());
    assert_eq!(
        apic.local_interrupt(LocalInput::Lint0),
        LocalDelivery::ExtInt
    );
    let _ = apic.write(0x350, 0x8041, NOW);
    assert!(!apic.identity().takes_pic);
    assert_eq!(
        apic.local_interrupt(LocalInput::Lint0),
        LocalDelivery::Pending
    );
    assert!(apic.is_level_triggered(Vector(0x41)));
    // The counters' entry masks itself.
    let _ = apic.write(0x340, 0x400, NOW);
    assert_eq!(
        apic.local_interrupt(LocalInput::Performance),
        LocalDelivery::Nmi
    );
    assert_eq!(apic.read(0x340, NOW), 0x1_0400);
    assert_eq!(
        apic.local_interrupt(LocalInput::Performance),
        LocalDelivery::None
    );
}

#[test]
fn machine_check_entry_exists_where_it_is_given() {
    let mut apic = enabled();
    let _ = apic.write(0x2f0, 0x55, NOW);
    assert_eq!(
        apic.local_interrupt(LocalInput::CorrectedMachineCheck),
        LocalDelivery::None
    );
    apic.set_features(Features {
        cmci: true,
        ..features()
    });
    assert_eq!(apic.read(0x30, NOW), 0x0006_0014);
    assert_eq!(apic.read(0x2f0, NOW), 0x1_0000);
    let _ = apic.write(0x2f0, 0x55, NOW);
    assert_eq!(
        apic.local_interrupt(LocalInput::CorrectedMachineCheck),
        LocalDelivery::Pending
    );
}

#[test]
fn init_keeps_the_identity_and_the_mode() {
    let mut apic = x2apic();
    request(&mut apic, 0x41);
    apic.reset(ResetKind::Init);
    assert_eq!(apic.mode(), ApicMode::X2Apic);
    assert_eq!(apic.highest_pending(), None);
    assert!(!apic.is_software_enabled());
    apic.reset(ResetKind::PowerUp);
    assert_eq!(apic.mode(), ApicMode::XApic);
    let mut apic = enabled();
    let _ = apic.write(0x20, 0x0900_0000, NOW);
    apic.reset(ResetKind::Init);
    assert_eq!(apic.identity().xapic_id, 9);
    apic.reset(ResetKind::PowerUp);
    assert_eq!(apic.identity().xapic_id, 3);
}
