// SPDX-License-Identifier: GPL-2.0

//! Each feature that is needed, taken away from a CPU that has them all.

use super::*;

/// A CPU with everything: each control may be 0 and may be 1.
fn whole(index: MsrIndex) -> Option<u64> {
    Some(match index.0 {
        0x3a => 0x5,
        // The "true" MSRs, revision 4.
        0x480 => (1 << 55) | 4,
        0x481..=0x484 | 0x48b | 0x48d..=0x490 => 0xffff_ffff_0000_0000,
        0x486 => 0x8000_0021,
        0x487 => 0xffff_ffff,
        0x488 => 0x2000,
        0x489 => 0x0037_27ff,
        0x48c => 0x0f01_0633_4141,
        _ => return None,
    })
}

/// The same with the bits of `clear` gone from `index`, and those of `set` there.
fn changed(index: u32, clear: u64, set: u64) -> Result<Capabilities, Missing> {
    Capabilities::detect(|asked| {
        whole(asked).map(|value| {
            if asked.0 == index {
                (value & !clear) | set
            } else {
                value
            }
        })
    })
}

/// What is missing where the control bit `bit` may not be 1.
fn without_control(index: u32, bit: u32) -> Option<Missing> {
    changed(index, u64::from(bit) << 32, 0).err()
}

#[test]
fn a_whole_cpu_is_taken() {
    let found = Capabilities::detect(whole).unwrap();
    assert_eq!(found.revision, 4);
    assert_eq!(found.cr0_fixed, (0x8000_0021, 0xffff_ffff));
    assert_eq!(found.cr4_fixed, (0x2000, 0x0037_27ff));
    assert!(found.ept_2m && found.ept_1g && found.ept_accessed_dirty);
    assert!(found.has_rdtscp() && found.has_invpcid() && found.has_pause_loop_exiting());
    assert!(found.has_encls_exiting() && found.has_enclv_exiting());
    // Windows are opened on demand, and IA-32e mode follows EFER.
    assert_eq!(found.controls.primary & PRIMARY_ON_DEMAND, 0);
    assert_eq!(found.controls.entry & entry::IA32E_MODE_GUEST, 0);
}

#[test]
fn firmware_must_have_locked_vmx_on() {
    for control in [0, 1, 4, 2 | 1] {
        assert_eq!(
            changed(0x3a, u64::MAX, control),
            Err(Missing::FirmwareOff(control))
        );
    }
}

#[test]
fn each_named_feature_has_its_own_answer() {
    for (index, bit, name) in [
        (0x48e, 1 << 28, "MSR bitmaps"),
        (0x48e, 1 << 31, "secondary controls"),
        (0x48b, 1 << 1, "extended page tables (EPT)"),
        (0x48b, 1 << 7, "unrestricted guest mode"),
        (0x48b, 1 << 5, "virtual-processor identifiers (VPID)"),
    ] {
        assert_eq!(
            without_control(index, bit),
            Some(Missing::Feature(name)),
            "{name}"
        );
    }
    for (bit, name) in [
        (6, "4-level EPT walk"),
        (14, "write-back EPT structures"),
        (20, "single-context INVEPT"),
        (25, "single-context INVEPT"),
        (32, "single-context INVVPID"),
        (41, "single-context INVVPID"),
    ] {
        assert_eq!(
            changed(0x48c, 1 << bit, 0),
            Err(Missing::Feature(name)),
            "bit {bit} of IA32_VMX_EPT_VPID_CAP"
        );
    }
}

/// Bit numbers from the SDM's tables of controls: 26-5, 26-6, 26-7, 26-13 and 26-15.
#[test]
fn each_control_that_is_needed_is_named() {
    let groups: [(u32, &str, &[u32]); 5] = [
        (0x48d, "pin-based", &[0, 3, 5]),
        (
            0x48e,
            "primary processor-based",
            &[2, 3, 7, 10, 11, 19, 20, 22, 23, 24, 29],
        ),
        (0x48b, "secondary processor-based", &[6]),
        (0x48f, "VM-exit", &[2, 9, 18, 19, 20, 21]),
        (0x490, "VM-entry", &[2, 9, 14, 15]),
    ];
    for (index, group, bits) in groups {
        for bit in bits {
            assert_eq!(
                without_control(index, 1 << bit),
                Some(Missing::Controls(group, 1 << bit)),
                "bit {bit} of {group}"
            );
        }
    }
}

#[test]
fn what_is_not_needed_may_be_missing() {
    for bit in [3, 4, 10, 12, 15, 28] {
        let found = changed(0x48b, 1 << (32 + bit), 0).unwrap();
        assert_eq!(found.controls.secondary & (1 << bit), 0);
    }
    for bit in [16, 17, 21] {
        changed(0x48c, 1 << bit, 0).unwrap();
    }
    let found = changed(0x48c, (1 << 16) | (1 << 17) | (1 << 21), 0).unwrap();
    assert!(!found.ept_2m && !found.ept_1g && !found.ept_accessed_dirty);
}

#[test]
fn cr3_accesses_that_always_exit_are_refused() {
    for bit in [15, 16] {
        assert_eq!(changed(0x48e, 0, 1 << bit), Err(Missing::Cr3Exits));
    }
}

#[test]
fn without_the_true_msrs_the_old_ones_count() {
    let old = |asked: MsrIndex| match asked.0 {
        0x480 => Some(4),
        0x48d..=0x490 => None,
        // Bits 1, 4, 6, 8, 13 to 16 and 26 of the primary controls are fixed to 1 there, CR3 exiting too.
        0x482 => Some(0xffff_ffff_0401_e172),
        _ => whole(asked),
    };
    assert_eq!(Capabilities::detect(old), Err(Missing::Cr3Exits));
}

#[test]
fn a_missing_msr_is_named() {
    for index in [
        0x3a, 0x480, 0x486, 0x487, 0x488, 0x489, 0x48b, 0x48c, 0x48d, 0x48e, 0x48f, 0x490,
    ] {
        let found = Capabilities::detect(|asked| (asked.0 != index).then(|| whole(asked))?);
        assert_eq!(found, Err(Missing::Msr(MsrIndex(index))));
    }
}

/// A CPU without secondary controls has no MSR for them: the feature is named, not the MSR.
#[test]
fn features_come_before_the_msrs_that_hang_on_them() {
    let without = |control: u32, msr: u32| {
        Capabilities::detect(move |asked| match asked.0 {
            0x48e if control == 0 => whole(asked).map(|value| value & !(1 << 63)),
            0x48b if control == 1 => whole(asked).map(|value| value & !(0x22 << 32)),
            index if index == msr => None,
            _ => whole(asked),
        })
    };
    assert_eq!(
        without(0, 0x48b),
        Err(Missing::Feature("secondary controls"))
    );
    assert_eq!(
        without(1, 0x48c),
        Err(Missing::Feature("extended page tables (EPT)"))
    );
}

#[test]
fn a_guest_has_no_more_instructions_than_its_cpuid() {
    let found = Capabilities::detect(whole).unwrap();
    let all = GuestFeatures {
        rdtscp: true,
        invpcid: true,
        x2apic_mode: true,
    };
    let with = |features| found.guest_secondary(features);
    assert_eq!(with(all), found.controls.secondary);
    for (features, bit) in [
        (
            GuestFeatures {
                rdtscp: false,
                ..all
            },
            3,
        ),
        (
            GuestFeatures {
                invpcid: false,
                ..all
            },
            12,
        ),
        (
            GuestFeatures {
                x2apic_mode: false,
                ..all
            },
            4,
        ),
    ] {
        assert_eq!(with(all) & !with(features), 1 << bit);
    }
}

/// The TPR shadow comes in the place of CR8 exits, and only for a local APIC of the kernel's.
#[test]
fn a_tpr_shadow_takes_the_place_of_cr8_exits() {
    const SHADOW: u32 = 1 << 21;
    const CR8: u32 = (1 << 19) | (1 << 20);
    let found = Capabilities::detect(whole).unwrap();
    assert!(found.has_tpr_shadow() && found.has_x2apic_mode());
    assert_eq!(found.guest_primary(true) & (SHADOW | CR8), SHADOW);
    assert_eq!(found.guest_primary(false) & (SHADOW | CR8), CR8);
    // A CPU without it, and one whose CR8 exits can't be had off.
    for found in [
        changed(0x48e, u64::from(SHADOW) << 32, 0).unwrap(),
        changed(0x48e, 0, u64::from(CR8)).unwrap(),
        changed(0x48e, 0, 1 << 19).unwrap(),
    ] {
        assert!(!found.has_tpr_shadow() && !found.has_x2apic_mode());
        for has_local_apic in [false, true] {
            let primary = found.guest_primary(has_local_apic);
            assert_eq!(primary & (SHADOW | CR8), CR8);
        }
        // VM entry fails with x2APIC mode alone.
        assert_eq!(found.controls.secondary & (1 << 4), 0);
    }
    // The shadow alone will do.
    let found = changed(0x48b, 1 << (32 + 4), 0).unwrap();
    assert!(found.has_tpr_shadow() && !found.has_x2apic_mode());
}

#[test]
fn messages_name_what_is_missing() {
    assert_eq!(
        Missing::Feature("unrestricted guest mode").to_string(),
        "this CPU's VMX has no unrestricted guest mode: rvisor needs it"
    );
    assert!(Missing::FirmwareOff(1).to_string().contains("firmware"));
    assert!(Missing::Msr(MsrIndex(0x480)).to_string().contains("0x480"));
    assert!(Missing::Controls("VM-exit", 0x40)
        .to_string()
        .contains("VM-exit controls 0x40"));
}
