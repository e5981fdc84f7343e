// SPDX-License-Identifier: GPL-2.0

//! The policy of MSRs.

use super::guest::{GuestCpu, Origin};
use super::msr::*;
use super::msr_list::{indices, FEATURE_INDICES};
use crate::x86::msr::MsrIndex;
use proptest::prelude::*;

const GUEST: Origin = Origin::Guest;
const HOST: Origin = Origin::Host;

fn cpu() -> GuestCpu {
    GuestCpu {
        physical_bits: 40,
        linear_bits: 48,
        cr4_reserved: 0,
        efer_reserved: 0,
        xcr0: 7,
        long_mode: true,
        gbpages: true,
        x2apic: true,
        tsc_deadline: true,
        tsc_adjust: true,
        invpcid: true,
        rdtscp: true,
        rdpid: true,
        xsaves: true,
        spec_ctrl: 7,
        ibpb: true,
        flush_l1d: true,
        arch_capabilities: true,
    }
}

fn poor() -> GuestCpu {
    GuestCpu {
        x2apic: false,
        tsc_adjust: false,
        rdtscp: false,
        rdpid: false,
        xsaves: false,
        spec_ctrl: 0,
        ibpb: false,
        flush_l1d: false,
        arch_capabilities: false,
        ..cpu()
    }
}

fn write(state: &mut MsrState, index: MsrIndex, value: u64) -> Result<MsrEffect, MsrError> {
    state.write(index, value, GUEST, &cpu())
}

fn known(state: &MsrState, index: MsrIndex) -> u64 {
    match state.read(index, GUEST, &cpu()) {
        Ok(MsrValue::Known(value)) => value,
        other => panic!("{index:x?}: {other:?}"),
    }
}

#[test]
fn every_listed_msr_can_be_saved_and_restored() {
    for cpu in [cpu(), poor()] {
        let mut state = MsrState::new(0x1234);
        let listed: Vec<_> = indices(&cpu).collect();
        let mut distinct = listed.clone();
        distinct.sort();
        distinct.dedup();
        assert_eq!(distinct.len(), listed.len());
        for index in listed {
            let before = state;
            if let MsrValue::Known(value) = state.read(index, HOST, &cpu).unwrap() {
                state.write(index, value, HOST, &cpu).unwrap();
                assert_eq!(state, before, "{index:x?}");
            }
        }
        let saved: Vec<_> = indices(&cpu).collect();
        assert!(FEATURE_INDICES.iter().all(|index| saved.contains(index)));
    }
    for index in FEATURE_INDICES {
        let begins = MsrState::new(0x1234).read(index, HOST, &cpu());
        let value = feature_value(index, 0x1234).map(MsrValue::Known);
        assert_eq!(begins.ok(), value, "{index:x?}");
    }
}

#[test]
fn unknown_msrs_are_refused() {
    let mut state = MsrState::new(0);
    for index in [
        0x2,
        0x480,
        0x48f,
        0x212,
        0x24f,
        0x700,
        0x900,
        0x4b56_4d00,
        0xc000_0085,
        u32::MAX,
    ] {
        let index = MsrIndex(index);
        assert_eq!(
            state.read(index, GUEST, &cpu()),
            Err(MsrError::Unknown),
            "{index:x?}"
        );
        assert!(write(&mut state, index, 0).is_err(), "{index:x?}");
        assert!(state.write(index, 0, HOST, &cpu()).is_err(), "{index:x?}");
    }
}

#[test]
fn values_follow_the_sdm() {
    let mut state = MsrState::new(0);
    let invalid = Err(MsrError::Invalid);
    let hole = 1u64 << 47;
    for index in [
        0xc000_0082,
        0xc000_0083,
        0xc000_0100,
        0xc000_0101,
        0xc000_0102,
        0x175,
        0x176,
    ] {
        assert_eq!(
            write(&mut state, MsrIndex(index), hole),
            invalid,
            "{index:x}"
        );
        assert!(
            write(&mut state, MsrIndex(index), !(hole - 1)).is_ok(),
            "{index:x}"
        );
    }
    assert_eq!(write(&mut state, MsrIndex::PAT, 2), invalid);
    let pat = write(&mut state, MsrIndex::PAT, 0x0606_0606_0606_0606);
    assert_eq!(
        pat,
        Ok(MsrEffect::Loaded(LoadedMsr::Pat, 0x0606_0606_0606_0606))
    );
    assert_eq!(write(&mut state, MsrIndex::SYSCALL_MASK, 1 << 32), invalid);
    assert_eq!(write(&mut state, MsrIndex::TSC_AUX, 1 << 32), invalid);
    assert_eq!(write(&mut state, MsrIndex::SPEC_CTRL, 8), invalid);
    assert_eq!(write(&mut state, MsrIndex::XSS, 1), invalid);
    assert_eq!(write(&mut state, MsrIndex::MTRR_CAP, 0), invalid);
    assert_eq!(write(&mut state, MsrIndex::PLATFORM_INFO, 0), invalid);
    assert_eq!(write(&mut state, MsrIndex::ARCH_CAPABILITIES, 0), invalid);
    assert_eq!(write(&mut state, MsrIndex::PRED_CMD, 2), invalid);
    assert_eq!(
        write(&mut state, MsrIndex::PRED_CMD, 1),
        Ok(MsrEffect::PredictionBarrier)
    );
    assert!(state.read(MsrIndex::PRED_CMD, HOST, &cpu()).is_err());
    assert_eq!(write(&mut state, MsrIndex::FLUSH_CMD, 2), invalid);
    assert_eq!(
        write(&mut state, MsrIndex::FLUSH_CMD, 1),
        Ok(MsrEffect::FlushL1d)
    );
    assert!(state.read(MsrIndex::FLUSH_CMD, HOST, &cpu()).is_err());
    // The CPU has it: the guest writes it without an exit.
    assert_eq!(
        write(&mut state, MsrIndex::SPEC_CTRL, 5),
        Ok(MsrEffect::Loaded(LoadedMsr::SpecCtrl, 5))
    );
    assert_eq!(
        state.read(MsrIndex::SPEC_CTRL, GUEST, &cpu()),
        Ok(MsrValue::SpecCtrl)
    );
}

#[test]
fn a_cpu_without_the_feature_has_not_the_msr() {
    let mut state = MsrState::new(1);
    for index in [
        MsrIndex::SPEC_CTRL,
        MsrIndex::TSC_AUX,
        MsrIndex::XSS,
        MsrIndex::ARCH_CAPABILITIES,
        MsrIndex::PRED_CMD,
        MsrIndex::FLUSH_CMD,
    ] {
        assert!(state.read(index, GUEST, &poor()).is_err(), "{index:x?}");
        assert!(state.write(index, 0, GUEST, &poor()).is_err(), "{index:x?}");
    }
}

#[test]
fn the_tsc_and_its_adjustment_move_together() {
    let mut state = MsrState::new(0);
    assert_eq!(
        write(&mut state, MsrIndex::TSC_ADJUST, 100),
        Ok(MsrEffect::MoveTsc(100))
    );
    let back = write(&mut state, MsrIndex::TSC_ADJUST, 40);
    assert_eq!(back, Ok(MsrEffect::MoveTsc(60u64.wrapping_neg())));
    assert_eq!(
        write(&mut state, MsrIndex::TSC, 5),
        Ok(MsrEffect::SetTsc(5))
    );
    state.tsc_moved(3u64.wrapping_neg());
    assert_eq!(known(&state, MsrIndex::TSC_ADJUST), 37);
    // Userspace restores the value; the TSC it restores by itself.
    let restored = state.write(MsrIndex::TSC_ADJUST, 7, HOST, &cpu());
    assert_eq!(restored, Ok(MsrEffect::Done));
    assert_eq!(known(&state, MsrIndex::TSC_ADJUST), 7);
}

#[test]
fn mtrrs_take_types_and_addresses_that_there_are() {
    let mut state = MsrState::new(0);
    let mut ok = |index: u32, value: u64| write(&mut state, MsrIndex(index), value).is_ok();
    assert!(ok(0x200, 0xff_ffff_f006));
    assert!(!ok(0x200, 0x100_0000_0006), "past 40 bits");
    assert!(!ok(0x200, 2), "no type 2");
    assert!(!ok(0x200, 0x106), "reserved bit");
    assert!(ok(0x20f, 0xff_ffff_f800));
    assert!(!ok(0x20f, 0xff_ffff_f806));
    assert!(!ok(0x20f, 0x400));
    assert!(!ok(0x210, 0), "eight ranges");
    assert!(ok(0x26f, 0x0605_0401_0006_0606));
    assert!(!ok(0x250, 7));
    assert!(ok(0x2ff, 0xc06));
    assert!(!ok(0x2ff, 0x1006));
    assert_eq!(known(&state, MsrIndex(0x20f)), 0xff_ffff_f800);
    assert_eq!(known(&state, MsrIndex(0x26f)), 0x0605_0401_0006_0606);
    assert_eq!(known(&state, MsrIndex(0x250)), 0);
    assert_eq!(known(&state, MsrIndex::MTRR_DEF_TYPE), 0xc06);
    assert_eq!(known(&state, MsrIndex::MTRR_CAP), 0x508);
}

#[test]
fn machine_check_banks() {
    let mut state = MsrState::new(0);
    assert_eq!(known(&state, MsrIndex::MCG_CAP), 10);
    assert!(
        state.read(MsrIndex(0x428), GUEST, &cpu()).is_err(),
        "ten banks"
    );
    assert!(write(&mut state, MsrIndex(0x400), u64::MAX).is_ok());
    assert!(write(&mut state, MsrIndex(0x400), 5).is_err());
    assert!(write(&mut state, MsrIndex(0x401), 5).is_err());
    assert!(state.write(MsrIndex(0x401), 5, HOST, &cpu()).is_ok());
    assert!(write(&mut state, MsrIndex(0x401), 0).is_ok());
    assert!(write(&mut state, MsrIndex::MCG_CTL, 0).is_err());
    assert!(state.set_up_machine_check(0).is_err());
    assert!(state.set_up_machine_check(11).is_err());
    assert!(state.set_up_machine_check((1 << 9) | 4).is_err());
    assert!(state.set_up_machine_check((1 << 8) | 4).is_ok());
    assert_eq!(known(&state, MsrIndex::MCG_CTL), u64::MAX);
    assert_eq!(known(&state, MsrIndex(0x40c)), u64::MAX);
    assert!(
        state.read(MsrIndex(0x410), GUEST, &cpu()).is_err(),
        "four banks"
    );
}

#[test]
fn misc_enable_keeps_what_tells_of_the_pmu() {
    let mut state = MsrState::new(0);
    assert_eq!(known(&state, MsrIndex::MISC_ENABLE), 0x1800);
    assert!(write(&mut state, MsrIndex::MISC_ENABLE, 1).is_err());
    assert!(write(&mut state, MsrIndex::MISC_ENABLE, 0x1881).is_ok());
    assert_eq!(known(&state, MsrIndex::MISC_ENABLE), 0x1801);
    assert!(state.write(MsrIndex::MISC_ENABLE, 1, HOST, &cpu()).is_ok());
    assert_eq!(known(&state, MsrIndex::MISC_ENABLE), 1);
}

#[test]
fn feature_control_locks() {
    let mut state = MsrState::new(0);
    assert!(
        write(&mut state, MsrIndex::FEATURE_CONTROL, 5).is_err(),
        "no VMX"
    );
    assert!(write(&mut state, MsrIndex::FEATURE_CONTROL, 1).is_ok());
    assert!(write(&mut state, MsrIndex::FEATURE_CONTROL, 0).is_err());
    assert!(state
        .write(MsrIndex::FEATURE_CONTROL, 0, HOST, &cpu())
        .is_ok());
}

#[test]
fn cpuid_faulting_only_where_userspace_offers_it() {
    let mut state = MsrState::new(0);
    let enables = MsrIndex(0x140);
    assert!(write(&mut state, enables, 1).is_err());
    let offer = state.write(MsrIndex::PLATFORM_INFO, 1 << 31, HOST, &cpu());
    assert_eq!(offer, Ok(MsrEffect::Done));
    assert!(write(&mut state, enables, 2).is_err());
    assert!(write(&mut state, enables, 1).is_ok());
    assert!(state.faults_cpuid());
}

#[test]
fn apic_base_changes_mode_by_the_steps_of_the_sdm() {
    let base = 0xfee0_0000u64;
    let (off, on, x2) = (base, base | 0x800, base | 0xc00);
    let guest = |old, new| check_apic_base(old, new, GUEST, &cpu()).is_ok();
    let modes = [off, on, x2];
    let allowed = modes.map(|old| modes.map(|new| guest(old, new)));
    assert_eq!(
        allowed,
        [[true, true, false], [true, true, true], [true, false, true]]
    );
    assert!(!guest(off, base | 0x400), "x2APIC without enable");
    assert!(!guest(on, on | 0x200), "bit 9");
    assert!(!guest(on, on | (1 << 40)), "past the address width");
    assert!(guest(on, on | 0x100), "bootstrap processor");
    assert!(check_apic_base(on, x2, GUEST, &poor()).is_err());
    assert!(check_apic_base(x2, on, HOST, &cpu()).is_ok());
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    /// No access panics; a refused write leaves no trace; what was written is read, or lies
    /// elsewhere.
    #[test]
    fn any_access(
        index in prop_oneof![0u32..0x1000, 0xc000_0000u32..0xc000_0200, any::<u32>()],
        value in prop_oneof![0u64..16, any::<u64>(), Just(u64::MAX)],
        from_host: bool,
        rich: bool,
    ) {
        let cpu = if rich { cpu() } else { poor() };
        let origin = if from_host { HOST } else { GUEST };
        let index = MsrIndex(index);
        let mut state = MsrState::new(0);
        let before = state;
        match state.write(index, value, origin, &cpu) {
            Err(_) => prop_assert_eq!(state, before),
            Ok(MsrEffect::Loaded(msr, loaded)) => {
                prop_assert_eq!(loaded, value);
                prop_assert_eq!(state.loaded(msr), value);
                prop_assert_eq!(state.read(index, HOST, &cpu), Ok(MsrValue::Known(value)));
            }
            Ok(MsrEffect::Done | MsrEffect::MoveTsc(_) | MsrEffect::PredictionBarrier) => {}
            Ok(_) => {
                prop_assert_eq!(state, before);
                let found = state.read(index, origin, &cpu);
                prop_assert!(!matches!(found, Ok(MsrValue::Known(_)) | Err(_)));
            }
        }
    }
}

#[test]
fn platform_information_is_told_apart() {
    // The owner decides whether a guest may see it.
    let mut state = MsrState::new(0);
    let offer = state.write(MsrIndex::PLATFORM_INFO, 0xff00, HOST, &cpu());
    assert_eq!(offer, Ok(MsrEffect::Done));
    assert_eq!(
        state.read(MsrIndex::PLATFORM_INFO, GUEST, &cpu()),
        Ok(MsrValue::PlatformInfo(0xff00))
    );
}
