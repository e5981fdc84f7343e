// SPDX-License-Identifier: GPL-2.0

//! The routing table against a plain list.

use proptest::prelude::*;
use rvisor_core::irqchip::routing::{RawRoute, Route, RoutingIndex, RoutingRules, Target};
use rvisor_core::x86::vector::Gsi;

const RULES: RoutingRules = RoutingRules {
    controllers: true,
    extended_msi: false,
};

fn raw() -> impl Strategy<Value = RawRoute> {
    let gsi = prop_oneof![0u32..40, (0u32..16).prop_map(|n| n * 256 + 7)];
    let pin = (gsi, 0u32..4, 0u32..26).prop_map(|(gsi, chip, pin)| RawRoute {
        gsi,
        kind: 1,
        flags: 0,
        words: [chip, pin, 0],
    });
    let msi = (0u32..4100, any::<[u32; 3]>()).prop_map(|(gsi, words)| RawRoute {
        gsi,
        kind: 2,
        flags: 0,
        words,
    });
    let other = any::<(u32, u32, u32, [u32; 3])>().prop_map(|(gsi, kind, flags, words)| RawRoute {
        gsi,
        kind,
        flags,
        words,
    });
    prop_oneof![16 => pin, 4 => msi, 1 => other]
}

/// The controller that a target is on; 3 for an MSI.
fn controller(target: Target) -> u8 {
    match target {
        Target::Pic(line) => line / 8,
        Target::IoApic(_) => 2,
        Target::Msi { .. } => 3,
    }
}

/// Whether two routes of one GSI exclude each other.
fn conflict(a: Target, b: Target) -> bool {
    controller(a) == controller(b) || controller(a) == 3 || controller(b) == 3
}

proptest! {
    #![proptest_config(super::config())]

    #[test]
    fn index_finds_what_a_search_finds(raws in proptest::collection::vec(raw(), 0..40)) {
        let mut routes: Vec<_> = raws.iter().filter_map(|r| Route::parse(r, RULES).ok()).collect();
        let list: Vec<_> = routes.iter().map(|route| (route.gsi, route.target)).collect();
        let clash = list.iter().enumerate().any(|(place, &(gsi, target))| {
            list[..place].iter().any(|&(g, t)| g == gsi && conflict(t, target))
        });
        let mut index = RoutingIndex::new();
        prop_assert_eq!(index.build(&mut routes).is_err(), clash);
        if clash {
            return Ok(());
        }
        for gsi in (0..4100).map(Gsi) {
            let mut found: Vec<_> = index.targets(&routes, gsi).collect();
            let mut expected: Vec<_> =
                list.iter().filter(|(g, _)| *g == gsi).map(|&(_, target)| target).collect();
            found.sort_by_key(|&target| controller(target));
            expected.sort_by_key(|&target| controller(target));
            prop_assert_eq!(found, expected);
        }
        // Looking into another table than one's own ends, and finds no more than three.
        for gsi in (0..40).map(Gsi) {
            prop_assert!(index.targets(&routes[..routes.len() / 2], gsi).count() <= 3);
        }
    }
}
