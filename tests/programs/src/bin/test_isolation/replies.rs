// SPDX-License-Identifier: GPL-2.0
//! Reserved bytes of what the API answers hold nothing of the host's memory.

use kvm_bindings as kb;
use rvisor_tests::raw::ioctl_with;
use rvisor_tests::{check, check_eq, uapi, Device, Fail, Machine, Outcome};
use std::mem::{offset_of, size_of};
use std::ops::Range;
use std::os::fd::AsRawFd;

/// The largest reply, KVM_GET_XSAVE's.
const SIZE: usize = 4096;

/// An answer's bytes where the caller's buffer was full of `pattern`, its first words `head`.
fn reply(fd: &impl AsRawFd, request: u64, head: &[u32], pattern: u8) -> Result<[u8; SIZE], Fail> {
    let mut buffer = [pattern; SIZE];
    for (place, word) in head.iter().enumerate() {
        buffer[4 * place..4 * place + 4].copy_from_slice(&word.to_le_bytes());
    }
    ioctl_with(fd, request, &mut buffer)?;
    Ok(buffer)
}

/// The reserved bytes are 0, or what the caller had there; and no byte behind the structure is written.
fn check_reply(
    fd: &impl AsRawFd,
    request: u64,
    head: &[u32],
    size: usize,
    reserved: &[Range<usize>],
    name: &str,
) -> Outcome {
    let first = reply(fd, request, head, 0xa5)?;
    let second = reply(fd, request, head, 0x5a)?;
    for place in reserved.iter().cloned().flatten() {
        let found = (first[place], second[place]);
        check!(
            found == (0, 0) || found == (0xa5, 0x5a),
            "{name}: byte {place} is {found:x?}"
        );
    }
    check!(
        first[size..].iter().all(|byte| *byte == 0xa5),
        "{name} writes behind its {size} bytes"
    );
    Ok(())
}

/// Where the segments' and tables' padding lies in `struct kvm_sregs`.
fn sregs_padding() -> Vec<Range<usize>> {
    let segments = offset_of!(kb::kvm_sregs, tr) / size_of::<kb::kvm_segment>() + 2;
    let tables = offset_of!(kb::kvm_sregs, gdt);
    let in_segment = offset_of!(kb::kvm_segment, padding);
    let in_table = offset_of!(kb::kvm_dtable, padding);
    let mut found: Vec<Range<usize>> = (0..segments)
        .map(|number| number * size_of::<kb::kvm_segment>() + in_segment)
        .map(|at| at..at + 1)
        .collect();
    for table in 0..2 {
        let at = tables + table * size_of::<kb::kvm_dtable>();
        found.push(at + in_table..at + size_of::<kb::kvm_dtable>());
    }
    found
}

pub(crate) fn replies_hold_nothing_else(device: &Device) -> Outcome {
    let machine = Machine::with_irqchip(device)?;
    let cpu = machine.vcpu(0)?;
    check_eq!(sregs_padding().len(), 10, "the places of padding");
    check_reply(
        &cpu.fd,
        uapi::GET_SREGS,
        &[],
        size_of::<kb::kvm_sregs>(),
        &sregs_padding(),
        "KVM_GET_SREGS",
    )?;
    let regs = size_of::<kb::kvm_regs>();
    check_reply(&cpu.fd, uapi::GET_REGS, &[], regs, &[], "KVM_GET_REGS")?;
    let fpu = size_of::<kb::kvm_fpu>();
    let pads = [
        offset_of!(kb::kvm_fpu, pad1)..offset_of!(kb::kvm_fpu, last_opcode),
        offset_of!(kb::kvm_fpu, pad2)..fpu,
    ];
    check_reply(&cpu.fd, uapi::GET_FPU, &[], fpu, &pads, "KVM_GET_FPU")?;
    let debug = size_of::<kb::kvm_debugregs>();
    let reserved = [offset_of!(kb::kvm_debugregs, reserved)..debug];
    check_reply(
        &cpu.fd,
        uapi::GET_DEBUGREGS,
        &[],
        debug,
        &reserved,
        "KVM_GET_DEBUGREGS",
    )?;
    let events = size_of::<kb::kvm_vcpu_events>();
    let reserved = [offset_of!(kb::kvm_vcpu_events, reserved)
        ..offset_of!(kb::kvm_vcpu_events, exception_has_payload)];
    check_reply(
        &cpu.fd,
        uapi::GET_VCPU_EVENTS,
        &[],
        events,
        &reserved,
        "KVM_GET_VCPU_EVENTS",
    )?;
    let xcrs = size_of::<kb::kvm_xcrs>();
    let reserved = [offset_of!(kb::kvm_xcrs, padding)..xcrs];
    check_reply(
        &cpu.fd,
        uapi::GET_XCRS,
        &[],
        xcrs,
        &reserved,
        "KVM_GET_XCRS",
    )?;
    let pit = size_of::<kb::kvm_pit_state2>();
    let reserved = [offset_of!(kb::kvm_pit_state2, reserved)..pit];
    check_reply(
        &machine.vm,
        uapi::GET_PIT2,
        &[],
        pit,
        &reserved,
        "KVM_GET_PIT2",
    )?;
    for chip in 0..3 {
        let state = if chip == 2 {
            size_of::<kb::kvm_ioapic_state>()
        } else {
            size_of::<kb::kvm_pic_state>()
        };
        let size = size_of::<kb::kvm_irqchip>();
        check_reply(
            &machine.vm,
            uapi::GET_IRQCHIP,
            &[chip, 0],
            size,
            std::slice::from_ref(&(8 + state..size)),
            "KVM_GET_IRQCHIP",
        )?;
    }
    Ok(())
}
