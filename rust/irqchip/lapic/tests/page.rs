// SPDX-License-Identifier: GPL-2.0

//! The page of registers that userspace reads and writes.

use super::*;

fn word(page: &[u8; REGISTERS_SIZE], offset: usize) -> u32 {
    u32::from_le_bytes(page[offset..offset + 4].try_into().unwrap())
}

#[test]
fn page_carries_the_whole_state() {
    let mut apic = enabled();
    let _ = apic.write(0xd0, 0x0400_0000, NOW);
    let _ = apic.write(0x320, 0x2_00ec, NOW);
    let _ = apic.write(0x3e0, 0b1011, NOW);
    let _ = apic.write(0x350, 0x700, NOW);
    let _ = apic.write(0x310, 0x0500_0000, NOW);
    let _ = apic.write(0x300, 0x4041, NOW);
    let _ = apic.write(0x380, 1_000_000, NOW);
    request(&mut apic, 0x31);
    apic.set_irr(Vector(0xa1), TriggerMode::Level);
    apic.acknowledge(Vector(0xa1));
    apic.set_tpr(0x23);
    let later = at(NOW.nanoseconds.0 + 300_000);
    let page = apic.registers(PageFormat::Legacy, later);
    assert_eq!(word(&page, 0x20), 3 << 24);
    assert_eq!(word(&page, 0xa0), 0xa0);
    assert_eq!(word(&page, 0x150), 2);
    assert_eq!(word(&page, 0x210), 1 << 17);
    assert_eq!(word(&page, 0x390), 700_000);

    let mut copy = LocalApic::new(ApicId(3), false, features(), BusCycle::DEFAULT);
    let restored = at(5);
    copy.set_registers(&page, PageFormat::Legacy, restored)
        .unwrap();
    assert_eq!(
        copy.deadline(),
        Some(Deadline::At(Nanoseconds(700_005))),
        "the rest of the count"
    );
    assert_eq!(copy.registers(PageFormat::Legacy, restored), page);
    assert_eq!(copy.identity(), apic.identity());
    assert_eq!(copy.eoi(), Some(Vector(0xa1)));
    assert_eq!(copy.highest_pending(), Some(Vector(0x31)));
}

#[test]
fn page_has_the_x2apic_identifier_in_either_form() {
    let mut apic = LocalApic::new(ApicId(0x123), false, features(), BusCycle::DEFAULT);
    let _ = apic.set_base(0xfee0_0c00, Origin::Guest).unwrap();
    let legacy = apic.registers(PageFormat::Legacy, NOW);
    assert_eq!(word(&legacy, 0x20), 0x2300_0000);
    let mut page = apic.registers(PageFormat::X2Apic, NOW);
    assert_eq!(word(&page, 0x20), 0x123);
    assert_eq!(word(&page, 0xd0), 0x0012_0008);
    assert!(apic.set_registers(&page, PageFormat::X2Apic, NOW).is_ok());
    assert!(apic.set_registers(&legacy, PageFormat::Legacy, NOW).is_ok());
    page[0x20] = 0x22;
    assert_eq!(
        apic.set_registers(&page, PageFormat::X2Apic, NOW),
        Err(Invalid)
    );
    let _ = apic.write_msr(MsrIndex(0x80f), 0x1ff, NOW);
    let _ = apic.write_msr(MsrIndex(0x830), 0x0001_0002_0000_4041, NOW);
    let page = apic.registers(PageFormat::X2Apic, NOW);
    assert_eq!(
        (word(&page, 0x300), word(&page, 0x310)),
        (0x4041, 0x0001_0002)
    );
    apic.set_registers(&page, PageFormat::X2Apic, NOW).unwrap();
    assert_eq!(
        apic.read_msr(MsrIndex(0x830), NOW),
        Ok(0x0001_0002_0000_4041)
    );
}
