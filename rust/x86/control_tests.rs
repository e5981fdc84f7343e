// SPDX-License-Identifier: GPL-2.0

//! The rules for control registers, one by one.

use super::*;

const LONG: Efer = Efer(Efer::LME | Efer::LMA);

#[test]
fn cr0_needs_protection_for_paging_and_cd_for_nw() {
    assert_eq!(check_cr0(Cr0(Cr0::RESET)), Ok(()));
    assert_eq!(check_cr0(Cr0(Cr0::PG)), Err(Illegal));
    assert_eq!(check_cr0(Cr0(Cr0::PG | Cr0::PE)), Ok(()));
    assert_eq!(check_cr0(Cr0(Cr0::NW)), Err(Illegal));
    assert_eq!(check_cr0(Cr0(1 << 32)), Err(Illegal));
}

#[test]
fn long_mode_starts_only_with_pae_and_a_32_bit_code_segment() {
    let (old, new) = (Cr0(Cr0::PE), Cr0(Cr0::PE | Cr0::PG));
    let efer = Efer(Efer::LME);
    let pae = Cr4(Cr4::PAE);
    assert_eq!(
        check_cr0_change(old, new, Cr4(0), efer, false),
        Err(Illegal)
    );
    assert_eq!(check_cr0_change(old, new, pae, efer, false), Ok(()));
    assert_eq!(check_cr0_change(old, new, pae, efer, true), Err(Illegal));
    assert_eq!(check_cr0_change(old, new, Cr4(0), Efer(0), false), Ok(()));
}

#[test]
fn paging_ends_only_without_pcid_and_outside_64_bit_code() {
    let (old, new) = (Cr0(Cr0::PE | Cr0::PG), Cr0(Cr0::PE));
    let pcid = Cr4(Cr4::PAE | Cr4::PCIDE);
    assert_eq!(check_cr0_change(old, new, pcid, LONG, false), Err(Illegal));
    let pae = Cr4(Cr4::PAE);
    assert_eq!(check_cr0_change(old, new, pae, LONG, true), Err(Illegal));
    assert_eq!(check_cr0_change(old, new, pae, LONG, false), Ok(()));
}

#[test]
fn cr4_rules_of_pcid_pae_and_la57() {
    let cr0 = Cr0(Cr0::PE | Cr0::PG | Cr0::WP);
    let change =
        |old, new, cr3, efer| check_cr4_change(Cr4(old), Cr4(new), Cr4::VMXE, cr0, Cr3(cr3), efer);
    let pae = Cr4::PAE;
    assert_eq!(change(pae, pae | Cr4::PCIDE, 0x1000, LONG), Ok(()));
    assert_eq!(change(pae, pae | Cr4::PCIDE, 0x1001, LONG), Err(Illegal));
    let kept = change(pae | Cr4::PCIDE, pae | Cr4::PCIDE | Cr4::PGE, 1, LONG);
    assert_eq!(kept, Ok(()));
    assert_eq!(change(pae, pae | Cr4::PCIDE, 0, Efer(0)), Err(Illegal));
    assert_eq!(change(pae, 0, 0, LONG), Err(Illegal));
    assert_eq!(change(pae, pae | Cr4::LA57, 0, LONG), Err(Illegal));
    assert_eq!(change(pae, pae | Cr4::LA57, 0, Efer(0)), Ok(()));
    assert_eq!(change(pae, pae | Cr4::VMXE, 0, LONG), Err(Illegal));
}

#[test]
fn machine_checks_stay_enabled_for_the_host_whatever_the_guest_says() {
    let vmx = (Cr4::VMXE, !Cr4::KL);
    for guest in [0, Cr4::MCE, Cr4::PAE, Cr4::PAE | Cr4::MCE] {
        for host in [Cr4::PAE | Cr4::PGE, Cr4::PAE | Cr4::PGE | Cr4::MCE] {
            let real = Cr4(guest).in_guest(Cr4(host), vmx);
            assert_eq!(real & Cr4::MCE, host & Cr4::MCE, "{guest:#x} {host:#x}");
            assert_eq!(real & !Cr4::MCE, (guest & Cr4::PAE) | Cr4::VMXE);
        }
    }
    assert_eq!(Cr4(Cr4::KL).in_guest(Cr4(0), vmx), Cr4::VMXE);
}

#[test]
fn lme_is_frozen_while_paging_and_lma_is_read_only() {
    let paging = Cr0(Cr0::PE | Cr0::PG);
    assert_eq!(check_efer_change(LONG, Efer(0), 0, paging), Err(Illegal));
    let stored = check_efer_change(LONG, Efer(Efer::LME | Efer::SCE), 0, paging);
    assert_eq!(stored, Ok(Efer(LONG.0 | Efer::SCE)));
    let stored = check_efer_change(Efer(0), Efer(LONG.0), 0, Cr0(0));
    assert_eq!(stored, Ok(Efer(Efer::LME)));
    let no_nx = check_efer_change(Efer(0), Efer(Efer::NXE), Efer::NXE, Cr0(0));
    assert_eq!(no_nx, Err(Illegal));
}

#[test]
fn cr3_heeds_the_physical_address_width() {
    let pcid = Cr4(Cr4::PAE | Cr4::PCIDE);
    assert_eq!(check_cr3(Cr3(1 << 39), pcid, LONG, 40), Ok(()));
    assert_eq!(check_cr3(Cr3(1 << 40), pcid, LONG, 40), Err(Illegal));
    assert_eq!(check_cr3(Cr3(Cr3::NO_FLUSH), pcid, LONG, 40), Ok(()));
    let flush_bit = Cr3(Cr3::NO_FLUSH);
    assert_eq!(check_cr3(flush_bit, Cr4(Cr4::PAE), LONG, 40), Err(Illegal));
    assert_eq!(check_cr3(Cr3(u64::MAX), Cr4(0), Efer(0), 36), Ok(()));
}

#[test]
fn xcr0_components_come_in_their_groups() {
    let all = u64::MAX;
    assert_eq!(check_xcr0(Xcr0(0), all), Err(Illegal));
    assert_eq!(check_xcr0(Xcr0(1), all), Ok(()));
    assert_eq!(check_xcr0(Xcr0(0b101), all), Err(Illegal));
    assert_eq!(check_xcr0(Xcr0(0b111), all), Ok(()));
    assert_eq!(check_xcr0(Xcr0(0b111), 0b11), Err(Illegal));
    assert_eq!(check_xcr0(Xcr0(0b1111), all), Err(Illegal));
    assert_eq!(check_xcr0(Xcr0(0b1_1001), all), Ok(()));
    assert_eq!(check_xcr0(Xcr0(0b0110_0111), all), Err(Illegal));
    assert_eq!(check_xcr0(Xcr0(0b1110_0111), all), Ok(()));
    assert_eq!(check_xcr0(Xcr0(0b1110_0011), all), Err(Illegal));
    assert_eq!(check_xcr0(Xcr0(1 | Xcr0::TILEDATA), all), Err(Illegal));
}

#[test]
fn debug_registers_keep_their_fixed_bits() {
    assert_eq!(dr6_written(0), Ok(Dr6(0xffff_0ff0)));
    assert_eq!(dr6_written(0x4001), Ok(Dr6(0xffff_4ff1)));
    assert_eq!(dr7_written(0x2), Ok(Dr7(0x402)));
    assert_eq!(dr7_written(1 << 32), Err(Illegal));
    // DR7 bits 12, 14 and 15 read as 0.
    assert_eq!(dr7_written(0xd000), Ok(Dr7(0x400)));
}
