// SPDX-License-Identifier: GPL-2.0
//! Moves between vector registers and addresses without memory. Userspace sees at most 8 bytes at once.

use crate::mmio::{answer_read, write};
use crate::mmio_forms::unless_kvm;
use crate::start;
use rvisor_tests::layout::{DATA, DONE_PORT, HOLE, MEMORY};
use rvisor_tests::{check_eq, guest_code, Cpu, Device, Fail, Machine, Outcome};

/// Answers the pieces of a read that begins at `address`.
fn answer_pieces(cpu: &Cpu, address: u64, data: &[u8]) -> Outcome {
    for (place, piece) in (0..).step_by(8).zip(data.chunks(8)) {
        answer_read(cpu, address + place, piece)?;
    }
    Ok(())
}

/// Expects the pieces of a write.
fn expect_pieces(cpu: &Cpu, address: u64, data: &[u8]) -> Outcome {
    for (place, piece) in (0..).step_by(8).zip(data.chunks(8)) {
        cpu.run_expecting(&write(address + place, piece))?;
    }
    Ok(())
}

/// Bytes that all differ.
fn pattern<const N: usize>(first: u8) -> [u8; N] {
    std::array::from_fn(|place| first.wrapping_add(place as u8))
}

guest_code!(
    sse_all,
    code64,
    [
        "mov r12, {hole}",
        "mov r13, {data}",
        "movups xmm1, [r12 + 1]",
        "movups [r13], xmm1",
        "movdqa xmm9, [r12 + 0x20]",
        "movdqu [r13 + 0x10], xmm9",
        "movaps [r12 + 0x40], xmm1",
        "movntdq [r12 + 0x50], xmm9",
        "movntps [r12 + 0x60], xmm1",
        "movdqu [r12 + 0x73], xmm9",
        // Between memory and registers it is the CPU's own.
        "movups [r13 + 0x20], xmm1",
        "out {done}, al",
    ],
    hole = HOLE,
    data = DATA,
    done = DONE_PORT
);

/// 16 bytes at once, aligned or not.
pub(crate) fn sse_moves(device: &Device) -> Outcome {
    let (machine, cpu) = start(device, sse_all())?;
    let (one, nine) = (pattern::<16>(0x10), pattern::<16>(0x80));
    answer_pieces(&cpu, HOLE + 1, &one)?;
    answer_pieces(&cpu, HOLE + 0x20, &nine)?;
    expect_pieces(&cpu, HOLE + 0x40, &one)?;
    expect_pieces(&cpu, HOLE + 0x50, &nine)?;
    expect_pieces(&cpu, HOLE + 0x60, &one)?;
    expect_pieces(&cpu, HOLE + 0x73, &nine)?;
    cpu.run_until_done()?;
    check_eq!(machine.memory.read(DATA, 16), one, "XMM1");
    check_eq!(machine.memory.read(DATA + 0x10, 16), nine, "XMM9");
    check_eq!(machine.memory.read(DATA + 0x20, 16), one, "XMM1 at the end");
    Ok(())
}

guest_code!(
    sse_cross,
    code64,
    [
        "mov r12, {hole} + 0x1000",
        "mov r13, {data}",
        "movups xmm0, [r12 - 3]",
        "movups [r13], xmm0",
        "movups [r12 - 13], xmm0",
        // Half in memory, half behind its end.
        "mov r12, {end}",
        "movups [r12 - 5], xmm0",
        "movups xmm2, [r12 - 5]",
        "movups [r13 + 0x10], xmm2",
        "out {done}, al",
    ],
    hole = HOLE,
    data = DATA,
    end = MEMORY as u64,
    done = DONE_PORT
);

/// 16 bytes across a page: each page's part comes in pieces of its own.
pub(crate) fn sse_crossing(device: &Device) -> Outcome {
    let (machine, cpu) = start(device, sse_cross())?;
    let page = HOLE + 0x1000;
    let end = MEMORY as u64;
    let value = pattern::<16>(1);
    answer_pieces(&cpu, page - 3, &value[..3])?;
    answer_pieces(&cpu, page, &value[3..])?;
    expect_pieces(&cpu, page - 13, &value[..13])?;
    expect_pieces(&cpu, page, &value[13..])?;
    expect_pieces(&cpu, end, &value[5..])?;
    answer_pieces(&cpu, end, &value[5..])?;
    cpu.run_until_done()?;
    check_eq!(machine.memory.read(DATA, 16), value, "XMM0");
    check_eq!(
        machine.memory.read(end - 5, 5),
        value[..5],
        "the memory's part"
    );
    check_eq!(machine.memory.read(DATA + 0x10, 16), value, "XMM2");
    Ok(())
}

guest_code!(
    sse_some,
    code64,
    [
        "mov r12, {hole}",
        "mov r13, {data}",
        "movups xmm0, [r13]",
        "movups xmm1, xmm0",
        "movups xmm2, xmm0",
        "movups xmm3, xmm0",
        "movups xmm4, xmm0",
        "movd xmm0, dword ptr [r12]",
        "movss xmm1, [r12 + 4]",
        "movq xmm2, qword ptr [r12 + 8]",
        "movlps xmm3, [r12 + 0x10]",
        "movhpd xmm4, [r12 + 0x18]",
        "movd dword ptr [r12 + 0x20], xmm3",
        "movsd [r12 + 0x28], xmm3",
        "movhps [r12 + 0x30], xmm4",
        "movq qword ptr [r12 + 0x38], xmm4",
        "movups [r13], xmm0",
        "movups [r13 + 0x10], xmm1",
        "movups [r13 + 0x20], xmm2",
        "movups [r13 + 0x30], xmm3",
        "movups [r13 + 0x40], xmm4",
        "out {done}, al",
    ],
    hole = HOLE,
    data = DATA,
    done = DONE_PORT
);

/// 4 or 8 bytes of a register.
pub(crate) fn sse_parts(device: &Device) -> Outcome {
    unless_kvm(device, "MOVD, MOVQ, MOVSS, MOVSD, MOVLPS and MOVHPS")?;
    let (machine, cpu) = start(device, sse_some())?;
    let old = pattern::<16>(0x40);
    machine.memory.write(DATA, &old);
    answer_read(&cpu, HOLE, &[1, 2, 3, 4])?;
    answer_read(&cpu, HOLE + 4, &[5, 6, 7, 8])?;
    let low = pattern::<8>(0x81);
    answer_read(&cpu, HOLE + 8, &low)?;
    let (half, other) = (pattern::<8>(0xa1), pattern::<8>(0xc1));
    answer_read(&cpu, HOLE + 0x10, &half)?;
    answer_read(&cpu, HOLE + 0x18, &other)?;
    cpu.run_expecting(&write(HOLE + 0x20, &half[..4]))?;
    cpu.run_expecting(&write(HOLE + 0x28, &half))?;
    cpu.run_expecting(&write(HOLE + 0x30, &other))?;
    cpu.run_expecting(&write(HOLE + 0x38, &old[..8]))?;
    cpu.run_until_done()?;
    let zero = [0; 12];
    for (number, expected) in [
        [&[1, 2, 3, 4][..], &zero].concat(),
        [&[5, 6, 7, 8][..], &zero].concat(),
        [&low[..], &zero[..8]].concat(),
        [&half[..], &old[8..]].concat(),
        [&old[..8], &other].concat(),
    ]
    .iter()
    .enumerate()
    {
        let found = machine.memory.read(DATA + 16 * number as u64, 16);
        check_eq!(found, *expected, "XMM{number}");
    }
    Ok(())
}

/// Turns AVX on in the guest, or skips.
fn start_with_avx(device: &Device, code: &[u8]) -> Result<(Machine, Cpu), Fail> {
    let (machine, cpu) = start(device, code)?;
    let list = machine
        .kvm
        .get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES)?;
    let has_avx = list
        .as_slice()
        .iter()
        .any(|entry| entry.function == 1 && (entry.ecx >> 28) & 1 != 0);
    if !has_avx {
        return Err(Fail::skip("the CPU has no AVX"));
    }
    let mut sregs = cpu.sregs()?;
    // OSXSAVE.
    sregs.cr4 |= 1 << 18;
    cpu.set_sregs(&sregs)?;
    let mut xcrs = cpu.fd.get_xcrs()?;
    xcrs.xcrs[0].value = 7;
    cpu.fd.set_xcrs(&xcrs)?;
    Ok((machine, cpu))
}

guest_code!(
    avx_all,
    code64,
    [
        "mov r12, {hole}",
        "mov r13, {data}",
        "vmovups ymm0, [r13]",
        "vmovups ymm1, ymm0",
        "vmovups ymm2, ymm0",
        "vmovups ymm11, [r12 + 3]",
        "vmovups xmm1, [r12 + 0x40]",
        // SSE's form keeps the upper half.
        "movups xmm2, [r12 + 0x60]",
        "vmovdqa [r12 + 0x80], ymm11",
        "vmovdqu [r12 + 0xa1], xmm11",
        "vmovntdq [r12 + 0xc0], ymm0",
        "vmovups [r13 + 0x20], ymm11",
        "vmovups [r13 + 0x40], ymm1",
        "vmovups [r13 + 0x60], ymm2",
        "out {done}, al",
    ],
    hole = HOLE,
    data = DATA,
    done = DONE_PORT
);

/// 32 bytes at once; what happens to the upper half of a register.
pub(crate) fn avx_moves(device: &Device) -> Outcome {
    let (machine, cpu) = start_with_avx(device, avx_all())?;
    let old = pattern::<32>(0x40);
    machine.memory.write(DATA, &old);
    let wide = pattern::<32>(0x80);
    let (one, two) = (pattern::<16>(0xc0), pattern::<16>(0xd0));
    answer_pieces(&cpu, HOLE + 3, &wide)?;
    answer_pieces(&cpu, HOLE + 0x40, &one)?;
    answer_pieces(&cpu, HOLE + 0x60, &two)?;
    expect_pieces(&cpu, HOLE + 0x80, &wide)?;
    expect_pieces(&cpu, HOLE + 0xa1, &wide[..16])?;
    expect_pieces(&cpu, HOLE + 0xc0, &old)?;
    cpu.run_until_done()?;
    check_eq!(machine.memory.read(DATA + 0x20, 32), wide, "YMM11");
    let expected = [&one[..], &[0; 16]].concat();
    check_eq!(machine.memory.read(DATA + 0x40, 32), expected, "YMM1");
    let expected = [&two[..], &old[16..]].concat();
    check_eq!(machine.memory.read(DATA + 0x60, 32), expected, "YMM2");
    Ok(())
}

guest_code!(
    avx_cross,
    code64,
    [
        "mov r12, {hole} + 0x1000",
        "mov r13, {data}",
        "vmovups ymm5, [r12 - 13]",
        "vmovups [r13], ymm5",
        "vmovups [r12 - 1], ymm5",
        "out {done}, al",
    ],
    hole = HOLE,
    data = DATA,
    done = DONE_PORT
);

/// 32 bytes across a page: five pieces.
pub(crate) fn avx_crossing(device: &Device) -> Outcome {
    let (machine, cpu) = start_with_avx(device, avx_cross())?;
    let page = HOLE + 0x1000;
    let value = pattern::<32>(0x21);
    answer_pieces(&cpu, page - 13, &value[..13])?;
    answer_pieces(&cpu, page, &value[13..])?;
    expect_pieces(&cpu, page - 1, &value[..1])?;
    expect_pieces(&cpu, page, &value[1..])?;
    cpu.run_until_done()?;
    check_eq!(machine.memory.read(DATA, 32), value, "YMM5");
    Ok(())
}
