// SPDX-License-Identifier: GPL-2.0

//! The stack, pairs of registers, and wide moves: what a device must not notice, and races.

use super::*;

#[test]
fn push_of_device_memory_reads_no_device_where_the_stack_faults() {
    let mut fake = Fake::long();
    fake.gprs[0] = DEVICE;
    fake.gprs[4] = 0x2_0000;
    fake.answer = Some(vec![1; 8]);
    // push qword ptr [rax]
    assert_eq!(fake.run(&[0xff, 0x30]), Err(Stop::Machine(Why::NotPresent)));
    assert!(fake.answer.is_some());
    assert_eq!((fake.gprs[4], fake.rip), (0x2_0000, 0x100));
    fake.gprs[4] = 0x80;
    assert_eq!(fake.run(&[0xff, 0x30]), Ok(Progress::Retired));
    assert_eq!(fake.memory[0x78..0x80], [1; 8]);
    assert_eq!(fake.gprs[4], 0x78);
}

#[test]
fn call_pushes_the_next_address_to_a_device_and_goes_on_at_its_target() {
    let mut fake = Fake::long();
    fake.gprs[4] = DEVICE + 0x20;
    // call +0x10
    let relative = [0xe8, 0x10, 0, 0, 0];
    assert_eq!(fake.run(&relative), Ok(Progress::Retired));
    let pushed = 0x105u64.to_le_bytes().to_vec();
    assert_eq!(fake.device_writes, [(DEVICE + 0x18, pushed)]);
    assert_eq!((fake.gprs[4], fake.rip), (DEVICE + 0x18, 0x115));
    // call rsp: the stack pointer as it was
    assert_eq!(fake.run(&[0xff, 0xd4]), Ok(Progress::Retired));
    assert_eq!((fake.gprs[4], fake.rip), (DEVICE + 0x10, DEVICE + 0x18));
    // Backwards, in 16 bits: IP wraps.
    let mut fake = Fake::new(CodeSize::Bits16, Protection::Real);
    fake.gprs[4] = 0x80;
    assert_eq!(fake.run(&[0xe8, 0xf0, 0xfe]), Ok(Progress::Retired));
    assert_eq!((fake.gprs[4], fake.rip), (0x7e, 0xfff3));
    assert_eq!(fake.memory[0x7e..0x80], [0x03, 0x01]);
}

#[test]
fn a_call_that_leads_nowhere_pushes_nothing() {
    let general_protection =
        Stop::Fault(Exception::with_code(ExceptionVector::GeneralProtection, 0));
    let mut fake = Fake::long();
    fake.gprs[0] = 1 << 47;
    fake.gprs[4] = DEVICE + 8;
    // call rax
    assert_eq!(fake.run(&[0xff, 0xd0]), Err(general_protection));
    let mut far = Fake::new(CodeSize::Bits32, Protection::Protected);
    far.gprs[0] = 0x1_0000;
    far.gprs[4] = DEVICE + 8;
    assert_eq!(far.run(&[0xff, 0xd0]), Err(general_protection));
    for fake in [fake, far] {
        assert_eq!((fake.gprs[4], fake.rip), (DEVICE + 8, 0x100));
        assert!(fake.device_writes.is_empty());
    }
}

#[test]
fn pop_moves_nothing_where_its_destination_faults() {
    let mut fake = Fake::long();
    fake.gprs[0] = 0x2_0000;
    fake.gprs[4] = DEVICE;
    fake.answer = Some(vec![2; 8]);
    // pop qword ptr [rax], with the stack on a device
    assert_eq!(fake.run(&[0x8f, 0x00]), Err(Stop::Machine(Why::NotPresent)));
    assert!(fake.answer.is_some());
    assert_eq!((fake.gprs[4], fake.rip), (DEVICE, 0x100));
    fake.gprs[0] = 0x80;
    assert_eq!(fake.run(&[0x8f, 0x00]), Ok(Progress::Retired));
    assert_eq!(fake.memory[0x80..0x88], [2; 8]);
    assert_eq!(fake.gprs[4], DEVICE + 8);
}

#[test]
fn the_stack_pointer_wraps_as_wide_as_the_stack() {
    let mut fake = Fake::new(CodeSize::Bits16, Protection::Real);
    fake.gprs[4] = 0xabcd_0000;
    fake.gprs[1] = 0x1234;
    fake.device_writes.clear();
    // push cx: to 0xfffe, which is the device's; pop dx
    assert_eq!(fake.run(&[0x51]), Ok(Progress::Retired));
    assert_eq!(fake.device_writes, [(0xfffe, vec![0x34, 0x12])]);
    assert_eq!(fake.gprs[4], 0xabcd_fffe);
    fake.answer = Some(vec![0x78, 0x56]);
    assert_eq!(fake.run(&[0x5a]), Ok(Progress::Retired));
    assert_eq!((fake.gprs[2], fake.gprs[4]), (0x5678, 0xabcd_0000));
    // Half of it would be outside of the segment: #SS.
    fake.gprs[4] = 1;
    assert_eq!(
        fake.run(&[0x51]),
        Err(Stop::Fault(Exception::plain(ExceptionVector::StackFault)))
    );
}

#[test]
fn pop_into_the_stack_pointer_is_not_moved_on() {
    let mut fake = Fake::long();
    fake.gprs[4] = 0x80;
    fake.memory[0x80..0x88].copy_from_slice(&0x1234_u64.to_le_bytes());
    assert_eq!(fake.run(&[0x5c]), Ok(Progress::Retired));
    assert_eq!(fake.gprs[4], 0x1234);
    // push rsp pushes it as it was.
    fake.gprs[4] = 0x80;
    assert_eq!(fake.run(&[0x54]), Ok(Progress::Retired));
    assert_eq!(fake.memory[0x78..0x80], 0x80_u64.to_le_bytes());
}

#[test]
fn a_pair_that_lost_a_race_changes_nothing() {
    let mut fake = Fake::long();
    fake.gprs[6] = 0x40;
    (fake.gprs[3], fake.gprs[1]) = (0x1111, 0x2222);
    fake.rival = Some((0x4f, 1));
    let before = fake.gprs;
    // lock cmpxchg16b [rsi]
    let bytes = [0xf0, 0x48, 0x0f, 0xc7, 0x0e];
    assert_eq!(fake.run(&bytes), Ok(Progress::Again));
    assert_eq!((fake.gprs, fake.rip, fake.rflags), (before, 0x100, 2));
    // Now they differ: memory keeps its value and RDX:RAX get it.
    assert_eq!(fake.run(&bytes), Ok(Progress::Retired));
    assert_eq!((fake.gprs[0], fake.gprs[2]), (0, 1 << 56));
    assert_eq!(fake.rflags & flags::ZERO, 0);
    assert_eq!(fake.run(&bytes), Ok(Progress::Retired));
    assert_eq!(fake.memory[0x40..0x42], [0x11, 0x11]);
    assert_eq!(fake.memory[0x48..0x4a], [0x22, 0x22]);
    assert_eq!(fake.rflags & flags::ZERO, flags::ZERO);
    fake.gprs[6] = 0x48;
    assert_eq!(fake.run(&bytes), fault(ExceptionVector::GeneralProtection));
}

#[test]
fn a_wide_move_needs_wide_registers_before_a_device_is_read() {
    let mut fake = Fake::long();
    fake.vectors = Some([[7; 4]; 16]);
    fake.has_avx = false;
    fake.gprs[0] = DEVICE;
    fake.answer = Some((1..=32).collect());
    // vmovups ymm1, [rax]; vmovlps xmm1, xmm2, [rax]
    let wide = [0xc5, 0xfc, 0x10, 0x08];
    let half = [0xc5, 0xe8, 0x12, 0x08];
    assert_eq!(fake.run(&wide), Err(Stop::Unsupported));
    assert_eq!(fake.run(&half), Err(Stop::Unsupported));
    assert!(fake.answer.is_some());
    fake.has_avx = true;
    assert_eq!(fake.run(&wide), Ok(Progress::Retired));
    let bytes: Vec<u8> = (1..=32).collect();
    let expected = [0, 8, 16, 24].map(|place: usize| {
        let part = bytes[place..place + 8].try_into().unwrap();
        u64::from_le_bytes(part)
    });
    assert_eq!(fake.vectors.map(|vectors| vectors[1]), Some(expected));
    // vmovaps [rax], ymm1 wants 32 bytes aligned; vmovups does not.
    fake.gprs[0] = DEVICE + 16;
    assert_eq!(
        fake.run(&[0xc5, 0xfc, 0x29, 0x08]),
        fault(ExceptionVector::GeneralProtection)
    );
    assert_eq!(fake.run(&[0xc5, 0xfc, 0x11, 0x08]), Ok(Progress::Retired));
    assert_eq!(fake.device_writes, [(DEVICE + 16, bytes)]);
}

#[test]
fn alignment_is_checked_where_it_is_on() {
    let mut mode = Fake::long().mode;
    let at = |mode: &Mode, address, length| mode.alignment_fault(Gva::new(address), length);
    assert_eq!(at(&mode, 1, 2), None);
    mode.checks_alignment = true;
    let refused = Some(Exception::with_code(ExceptionVector::AlignmentCheck, 0));
    for length in [2, 4, 8, 16] {
        assert_eq!(at(&mode, length as u64, length), None);
        assert_eq!(at(&mode, length as u64 / 2, length), refused);
    }
    assert_eq!(at(&mode, 3, 1), None);
    assert_eq!((at(&mode, 16, 32), at(&mode, 8, 32)), (None, refused));
}

#[test]
fn a_vector_move_needs_alignment_and_a_machine_that_has_vectors() {
    let mut fake = Fake::long();
    fake.gprs[0] = DEVICE + 8;
    // movaps [rax], xmm0 and movups xmm0, [rax]: this machine has none, and its device is not read.
    fake.answer = Some(vec![0; 16]);
    assert_eq!(fake.run(&[0x0f, 0x29, 0x00]), Err(Stop::Unsupported));
    assert_eq!(fake.run(&[0x0f, 0x10, 0x00]), Err(Stop::Unsupported));
    assert!(fake.answer.is_some());
    fake.vectors = Some([[0x0707_0707_0707_0707; 4]; 16]);
    assert_eq!(
        fake.run(&[0x0f, 0x29, 0x00]),
        fault(ExceptionVector::GeneralProtection)
    );
    assert!(fake.device_writes.is_empty());
    fake.gprs[0] = DEVICE;
    assert_eq!(fake.run(&[0x0f, 0x29, 0x00]), Ok(Progress::Retired));
    assert_eq!(fake.device_writes, [(DEVICE, vec![7; 16])]);
    // movd xmm0, [rax] clears what is above.
    fake.answer = Some(vec![1, 2, 3, 4]);
    assert_eq!(fake.run(&[0x66, 0x0f, 0x6e, 0x00]), Ok(Progress::Retired));
    assert_eq!(
        fake.vectors.map(|vectors| vectors[0]),
        Some([0x0403_0201, 0, 0x0707_0707_0707_0707, 0x0707_0707_0707_0707])
    );
}
