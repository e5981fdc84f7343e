// SPDX-License-Identifier: GPL-2.0

use super::*;

fn xapic(id: u8, logical_id: u8, model: LogicalModel) -> ApicIdentity {
    ApicIdentity {
        id: ApicId(u32::from(id)),
        xapic_id: id,
        logical_id,
        model,
        mode: ApicMode::XApic,
        software_enabled: true,
        takes_pic: false,
        is_watchdog: false,
    }
}

fn x2apic(id: u32) -> ApicIdentity {
    ApicIdentity {
        id: ApicId(id),
        xapic_id: (id & 0xff) as u8,
        logical_id: 0,
        model: LogicalModel::Flat,
        mode: ApicMode::X2Apic,
        software_enabled: true,
        takes_pic: false,
        is_watchdog: false,
    }
}

fn fixed(destination: u32, logical: bool) -> InterruptMessage {
    InterruptMessage {
        destination,
        logical,
        delivery_mode: DeliveryMode::Fixed,
        vector: Vector(0x40),
        level: true,
        trigger: TriggerMode::Edge,
        shorthand: Shorthand::None,
        redirection_hint: false,
    }
}

fn shorthand(shorthand: Shorthand) -> InterruptMessage {
    InterruptMessage {
        shorthand,
        ..fixed(0, false)
    }
}

/// Which of eight xAPICs with the identifiers 0 to 7 take a message.
fn taken_by(
    message: InterruptMessage,
    logical_id: impl Fn(u8) -> u8,
    model: LogicalModel,
) -> Vec<u8> {
    (0..8)
        .filter(|&id| matches(&xapic(id, logical_id(id), model), &message, Source::Device))
        .collect()
}

#[test]
fn physical_destination_names_one_or_all() {
    let none = |_| 0;
    assert_eq!(taken_by(fixed(3, false), none, LogicalModel::Flat), [3]);
    assert_eq!(
        taken_by(fixed(0xff, false), none, LogicalModel::Flat),
        [0, 1, 2, 3, 4, 5, 6, 7]
    );
    assert!(taken_by(fixed(8, false), none, LogicalModel::Flat).is_empty());
}

#[test]
fn flat_logical_destination_is_a_bitmap() {
    let bit = |id| 1u8 << id;
    assert_eq!(
        taken_by(fixed(0b1010_0001, true), bit, LogicalModel::Flat),
        [0, 5, 7]
    );
    assert_eq!(
        taken_by(fixed(0xff, true), |_| 0, LogicalModel::Flat).len(),
        8
    );
}

#[test]
fn cluster_logical_destination_is_a_cluster_and_a_bitmap() {
    // Two clusters of four: SDM vol. 3, 12.6.2.2.
    let cluster = |id: u8| ((id / 4) << 4) | (1 << (id % 4));
    let taken = |destination| taken_by(fixed(destination, true), cluster, LogicalModel::Cluster);
    assert_eq!(taken(0x05), [0, 2]);
    assert_eq!(taken(0x1f), [4, 5, 6, 7]);
    assert!(taken(0x21).is_empty());
    assert!(taken_by(fixed(0x01, true), cluster, LogicalModel::Reserved).is_empty());
}

#[test]
fn x2apic_logical_identifier_is_made_of_the_identifier() {
    // SDM vol. 3, 12.12.10.2: identifier bits 19:4 are the cluster, bits 3:0 the bit in it.
    assert_eq!(x2apic_logical_id(ApicId(0)), 1);
    assert_eq!(x2apic_logical_id(ApicId(0x1f)), 0x0001_8000);
    let message = fixed(0x0001_8001, true);
    assert!(matches(&x2apic(0x10), &message, Source::Apic(ApicId(0))));
    assert!(matches(&x2apic(0x1f), &message, Source::Apic(ApicId(0))));
    assert!(!matches(&x2apic(0x11), &message, Source::Apic(ApicId(0))));
    assert!(!matches(&x2apic(0x00), &message, Source::Apic(ApicId(0))));
}

#[test]
fn x2apic_broadcast_is_32_bits_wide() {
    let all = fixed(0xffff_ffff, false);
    assert!(matches(&x2apic(5), &all, Source::Apic(ApicId(0))));
    let byte = fixed(0xff, false);
    assert!(!matches(&x2apic(5), &byte, Source::Apic(ApicId(0))));
    assert!(matches(&x2apic(0xff), &byte, Source::Apic(ApicId(0))));
    // But an IOAPIC cannot say more than 0xff.
    assert!(matches(&x2apic(5), &byte, Source::Device));
    assert!(!matches(&x2apic(5), &byte, Source::DeviceWithoutQuirk));
}

#[test]
fn wide_identifier_reaches_an_apic_before_it_enters_x2apic_mode() {
    let mut apic = x2apic(0x123);
    apic.mode = ApicMode::XApic;
    assert!(matches(&apic, &fixed(0x123, false), Source::Device));
    assert!(matches(&apic, &fixed(0x23, false), Source::Device));
}

#[test]
fn shorthands_go_by_the_sender() {
    let sender = Source::Apic(ApicId(1));
    let takers = |message: InterruptMessage| -> Vec<u8> {
        (0..4)
            .filter(|&id| matches(&xapic(id, 0, LogicalModel::Flat), &message, sender))
            .collect()
    };
    assert_eq!(takers(shorthand(Shorthand::Itself)), [1]);
    assert_eq!(takers(shorthand(Shorthand::All)), [0, 1, 2, 3]);
    assert_eq!(takers(shorthand(Shorthand::Others)), [0, 2, 3]);
}

#[test]
fn disabled_apics_take_what_the_manual_says() {
    let mut apic = xapic(0, 1, LogicalModel::Flat);
    apic.software_enabled = false;
    let with_mode = |delivery_mode| InterruptMessage {
        delivery_mode,
        ..fixed(0, false)
    };
    // SDM vol. 3, 12.4.7.2.
    for mode in [
        DeliveryMode::Init,
        DeliveryMode::Nmi,
        DeliveryMode::Smi,
        DeliveryMode::Startup,
    ] {
        assert!(matches(&apic, &with_mode(mode), Source::Device));
    }
    assert!(!matches(
        &apic,
        &with_mode(DeliveryMode::Fixed),
        Source::Device
    ));
    assert!(!matches(
        &apic,
        &with_mode(DeliveryMode::LowestPriority),
        Source::Device
    ));
    apic.mode = ApicMode::Disabled;
    assert!(!matches(
        &apic,
        &with_mode(DeliveryMode::Init),
        Source::Device
    ));
}

#[test]
fn init_level_deassert_is_for_nobody() {
    // 0xc500 is INIT, level-triggered, asserted; 0x8500 the same de-asserted.
    assert!(InterruptMessage::from_icr(0xc500, false).has_effect());
    assert!(!InterruptMessage::from_icr(0x8500, false).has_effect());
}

#[test]
fn icr_fields() {
    // Destination 0x12, start-up, vector 0x9a, asserted.
    let message = InterruptMessage::from_icr(0x1200_0000_0000_469a, false);
    assert_eq!(message.destination, 0x12);
    assert_eq!(message.delivery_mode, DeliveryMode::Startup);
    assert_eq!(message.vector, Vector(0x9a));
    assert!(message.level && !message.logical);
    assert_eq!(message.shorthand, Shorthand::None);
    let wide = InterruptMessage::from_icr(0x1234_5678_000c_0840, true);
    assert_eq!(wide.destination, 0x1234_5678);
    assert!(wide.logical);
    assert_eq!(wide.shorthand, Shorthand::Others);
}

#[test]
fn msi_fields() {
    // SDM vol. 3, 12.11: destination 0x0a, hint, logical; level-triggered NMI with vector 0x31.
    let message = InterruptMessage::from_msi(0xfee0_a00c, 0x8431, false).unwrap();
    assert_eq!(message.destination, 0x0a);
    assert!(message.redirection_hint && message.logical);
    assert_eq!(message.delivery_mode, DeliveryMode::Nmi);
    assert_eq!(message.vector, Vector(0x31));
    assert_eq!(message.trigger, TriggerMode::Level);
    assert!(message.is_arbitrated());
    let wide = InterruptMessage::from_msi(0x0012_3400_fee5_6000, 0x41, true).unwrap();
    assert_eq!(wide.destination, 0x0012_3456);
    assert!(!wide.is_arbitrated());
    let plain = InterruptMessage::from_msi(0x0012_3400_fee5_6000, 0x41, false).unwrap();
    assert_eq!(plain.destination, 0x56);
    assert_eq!(
        InterruptMessage::from_msi(0x0000_0001_fee0_0000, 0, true),
        Err(Invalid)
    );
}

#[test]
fn arbitration_goes_round() {
    let candidates = [4, 7, 9];
    let chosen: Vec<_> = (0..6)
        .filter_map(|turn| lowest_priority(candidates.iter().copied(), turn))
        .collect();
    assert_eq!(chosen, [4, 7, 9, 4, 7, 9]);
    assert_eq!(lowest_priority(core::iter::empty::<u8>(), 3), None);
}

#[test]
fn packed_identity_is_the_same() {
    for mode in [ApicMode::Disabled, ApicMode::XApic, ApicMode::X2Apic] {
        for model in [
            LogicalModel::Flat,
            LogicalModel::Cluster,
            LogicalModel::Reserved,
        ] {
            for software_enabled in [false, true] {
                let identity = ApicIdentity {
                    id: ApicId(0xdead_beef),
                    xapic_id: 0x81,
                    logical_id: 0x7e,
                    model,
                    mode,
                    software_enabled,
                    takes_pic: software_enabled,
                    is_watchdog: !software_enabled,
                };
                assert_eq!(
                    ApicIdentity::from_packed(identity.id, identity.packed()),
                    identity
                );
            }
        }
    }
}
