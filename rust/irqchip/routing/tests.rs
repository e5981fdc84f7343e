// SPDX-License-Identifier: GPL-2.0

use super::*;

const FULL: RoutingRules = RoutingRules {
    controllers: true,
    extended_msi: false,
};

fn pin(gsi: u32, chip: u32, pin: u32) -> RawRoute {
    RawRoute {
        gsi,
        kind: 1,
        flags: 0,
        words: [chip, pin, 0],
    }
}

fn msi(gsi: u32, high: u32) -> RawRoute {
    RawRoute {
        gsi,
        kind: 2,
        flags: 0,
        words: [0xfee0_0000, high, 0x41],
    }
}

fn parse(raw: RawRoute) -> Result<Target, Invalid> {
    Route::parse(&raw, FULL).map(|route| route.target)
}

fn build(raw: &[RawRoute]) -> Result<(Vec<Route>, RoutingIndex), Invalid> {
    let mut routes = raw
        .iter()
        .map(|raw| Route::parse(raw, FULL))
        .collect::<Result<Vec<_>, _>>()?;
    let mut index = RoutingIndex::new();
    index.build(&mut routes)?;
    Ok((routes, index))
}

#[test]
fn default_is_the_same_number_on_both() {
    let mut routes = DEFAULT_ROUTES;
    let mut index = RoutingIndex::new();
    index.build(&mut routes).unwrap();
    for gsi in 0..24u8 {
        let targets: Vec<_> = index.targets(&routes, Gsi(u32::from(gsi))).collect();
        assert!(targets.contains(&Target::IoApic(gsi)));
        assert_eq!(targets.contains(&Target::Pic(gsi)), gsi < 16);
        assert_eq!(targets.len(), if gsi < 16 { 2 } else { 1 });
        assert_eq!(index.gsi_of_ioapic_pin(gsi), Some(Gsi(u32::from(gsi))));
    }
    assert_eq!(index.gsi_of_pic_line(15), Some(Gsi(15)));
    assert_eq!(index.targets(&routes, Gsi(24)).count(), 0);
    assert_eq!(index.targets(&routes, Gsi(u32::MAX)).count(), 0);
}

#[test]
fn entries_are_checked() {
    assert_eq!(parse(pin(0, 0, 7)), Ok(Target::Pic(7)));
    assert_eq!(parse(pin(0, 1, 7)), Ok(Target::Pic(15)));
    assert_eq!(parse(pin(0, 2, 23)), Ok(Target::IoApic(23)));
    for bad in [
        pin(0, 0, 8),
        pin(0, 1, 8),
        pin(0, 2, 24),
        pin(0, 3, 0),
        pin(4096, 2, 0),
        pin(0, 2, 0x100),
    ] {
        assert_eq!(parse(bad), Err(Invalid), "{bad:?}");
    }
    assert_eq!(
        parse(msi(4095, 0x0100_0000)),
        Ok(Target::Msi {
            address: 0x0100_0000_fee0_0000,
            data: 0x41
        })
    );
    assert_eq!(
        parse(RawRoute {
            kind: 4,
            ..msi(1, 0)
        }),
        Err(Invalid)
    );
    assert_eq!(
        parse(RawRoute {
            flags: 2,
            ..msi(1, 0)
        }),
        Err(Invalid)
    );
    assert!(parse(RawRoute {
        flags: 1,
        ..msi(1, 0)
    })
    .is_ok());
    assert_eq!(
        parse(RawRoute {
            flags: 1,
            ..pin(1, 0, 0)
        }),
        Err(Invalid)
    );
    let split = RoutingRules {
        controllers: false,
        extended_msi: true,
    };
    assert_eq!(Route::parse(&pin(0, 2, 0), split), Err(Invalid));
    assert!(Route::parse(&msi(0, 0x100), split).is_ok());
    assert_eq!(Route::parse(&msi(0, 1), split), Err(Invalid));
}

#[test]
fn one_route_to_each_controller() {
    assert!(build(&[pin(5, 0, 5), pin(5, 1, 5), pin(5, 2, 5)]).is_ok());
    assert!(build(&[pin(5, 2, 5), pin(5, 2, 6)]).is_err());
    assert!(build(&[pin(5, 0, 5), pin(5, 2, 6), pin(5, 0, 6)]).is_err());
    assert!(build(&[msi(5, 0), msi(5, 0)]).is_err());
    assert!(build(&[msi(5, 0), pin(5, 2, 5)]).is_err());
    assert!(build(&[pin(5, 2, 5), msi(5, 0)]).is_err());
}

#[test]
fn routes_are_found_wherever_they_stand() {
    let (routes, index) = build(&[
        msi(4095, 0),
        pin(0, 2, 2),
        pin(7, 2, 9),
        pin(0, 0, 0),
        msi(6, 0),
    ])
    .unwrap();
    let of = |gsi| index.targets(&routes, Gsi(gsi)).collect::<Vec<_>>();
    assert_eq!(of(0), [Target::Pic(0), Target::IoApic(2)]);
    assert_eq!(of(7), [Target::IoApic(9)]);
    assert_eq!(of(4095).len(), 1);
    assert!(of(1).is_empty());
    assert_eq!(index.gsi_of_ioapic_pin(2), Some(Gsi(0)));
    assert_eq!(index.gsi_of_ioapic_pin(9), Some(Gsi(7)));
    assert_eq!(index.gsi_of_ioapic_pin(0), None);
    assert_eq!(index.gsi_of_ioapic_pin(200), None);
}

#[test]
fn full_table_is_taken_and_a_larger_one_is_not() {
    let raw: Vec<_> = (0..4096).map(|gsi| msi(gsi, 0)).collect();
    let (mut routes, mut index) = build(&raw).unwrap();
    assert_eq!(index.targets(&routes, Gsi(4095)).count(), 1);
    routes.push(Route::new(Gsi(0), Target::IoApic(0)));
    assert_eq!(index.build(&mut routes), Err(Invalid));
}

#[test]
fn longest_chain_is_walked_to_its_end() {
    // All GSIs of one chain, each with three routes: the first entered is the last in the chain.
    let raw: Vec<_> = (0..16u32)
        .flat_map(|n| [0, 1, 2].map(|chip| pin(n * 256 + 9, chip, 5)))
        .collect();
    let (routes, index) = build(&raw).unwrap();
    for n in 0..16 {
        let mut targets: Vec<_> = index.targets(&routes, Gsi(n * 256 + 9)).collect();
        targets.reverse();
        assert_eq!(
            targets,
            [Target::Pic(5), Target::Pic(13), Target::IoApic(5)]
        );
    }
}
