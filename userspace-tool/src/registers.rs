// SPDX-License-Identifier: GPL-2.0

//! A virtual CPU's registers and the hypervisor's reasons as text, for the report of a guest that can't
//! go on.

use kvm_bindings::{
    kvm_dtable, kvm_regs, kvm_run, kvm_segment, kvm_sregs, KVM_INTERNAL_ERROR_DELIVERY_EV,
    KVM_INTERNAL_ERROR_EMULATION, KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES,
    KVM_INTERNAL_ERROR_SIMUL_EX, KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON,
};
use kvm_ioctls::VcpuFd;

/// The registers of `vcpu`, some lines of text.
#[must_use]
pub fn report(vcpu: &VcpuFd) -> String {
    match (vcpu.get_regs(), vcpu.get_sregs()) {
        (Ok(regs), Ok(sregs)) => text(&regs, &sregs),
        (Err(error), _) | (_, Err(error)) => format!("its registers can't be read: {error}"),
    }
}

fn text(regs: &kvm_regs, sregs: &kvm_sregs) -> String {
    let mut out = format!(
        "registers\n  rip {:016x}  rflags {:016x}",
        regs.rip, regs.rflags
    );
    let general = [
        ("rax", regs.rax),
        ("rbx", regs.rbx),
        ("rcx", regs.rcx),
        ("rdx", regs.rdx),
        ("rsi", regs.rsi),
        ("rdi", regs.rdi),
        ("rsp", regs.rsp),
        ("rbp", regs.rbp),
        ("r8 ", regs.r8),
        ("r9 ", regs.r9),
        ("r10", regs.r10),
        ("r11", regs.r11),
        ("r12", regs.r12),
        ("r13", regs.r13),
        ("r14", regs.r14),
        ("r15", regs.r15),
        ("cr0", sregs.cr0),
        ("cr2", sregs.cr2),
        ("cr3", sregs.cr3),
        ("cr4", sregs.cr4),
        ("cr8", sregs.cr8),
        ("efer", sregs.efer),
        ("apic", sregs.apic_base),
    ];
    for row in general.chunks(4) {
        let row = row
            .iter()
            .map(|(name, value)| format!("  {name} {value:016x}"));
        out += &format!("\n{}", row.collect::<String>());
    }
    let segments = [
        ("cs", &sregs.cs),
        ("ss", &sregs.ss),
        ("ds", &sregs.ds),
        ("es", &sregs.es),
        ("fs", &sregs.fs),
        ("gs", &sregs.gs),
        ("tr", &sregs.tr),
        ("ldt", &sregs.ldt),
    ];
    for (name, segment) in segments {
        out += &format!("\n  {name:3} {}", segment_text(segment));
    }
    for (name, kvm_dtable { base, limit, .. }) in [("gdt", &sregs.gdt), ("idt", &sregs.idt)] {
        out += &format!("\n  {name} base {base:016x} limit {limit:04x}");
    }
    out
}

fn segment_text(segment: &kvm_segment) -> String {
    let kvm_segment {
        base,
        limit,
        selector,
        type_,
        present,
        dpl,
        db,
        s,
        l,
        g,
        unusable,
        ..
    } = segment;
    format!(
        "{selector:04x} base {base:016x} limit {limit:08x} type {type_:x} s {s} dpl {dpl} p {present} \
         l {l} db {db} g {g}{}",
        if *unusable != 0 { " unusable" } else { "" }
    )
}

/// What the hypervisor told with `KVM_EXIT_INTERNAL_ERROR` in `run`: the reason, the instruction's bytes
/// where it gave them, and its data.
#[must_use]
pub fn internal_error(run: &kvm_run) -> String {
    // SAFETY: All members of the union are plain integers, of which any bit pattern is a value, and the
    // whole union was mapped and written by the kernel. `internal` is the member for this exit.
    #[allow(unsafe_code)]
    let internal = unsafe { run.__bindgen_anon_1.internal };
    internal_text(
        internal.suberror,
        &internal.data[..internal.data.len().min(internal.ndata as usize)],
    )
}

/// The text for a sub-error and its data words.
fn internal_text(suberror: u32, data: &[u64]) -> String {
    let what = match suberror {
        KVM_INTERNAL_ERROR_EMULATION => "it met an instruction that it can't emulate",
        KVM_INTERNAL_ERROR_SIMUL_EX => "simultaneous exceptions",
        KVM_INTERNAL_ERROR_DELIVERY_EV => "an exit while an event was delivered",
        KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON => "an exit that it does not know",
        other => &format!("internal error {other}"),
    };
    if let Some(bytes) = instruction(suberror, data) {
        let bytes: Vec<_> = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        return format!("{what}; its bytes: {}", bytes.join(" "));
    }
    let data: Vec<_> = data.iter().map(|word| format!("{word:#x}")).collect();
    match data.as_slice() {
        [] => what.to_owned(),
        data => format!("{what}; data: {}", data.join(" ")),
    }
}

/// The instruction that could not be emulated: behind the flags come its length in a byte, and at most 15
/// bytes (`emulation_failure` in Documentation/virt/kvm/api.rst, 5).
fn instruction(suberror: u32, data: &[u64]) -> Option<Vec<u8>> {
    let [flags, first, second, ..] = *data else {
        return None;
    };
    let given = flags & u64::from(KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES) != 0;
    if suberror != KVM_INTERNAL_ERROR_EMULATION || !given {
        return None;
    }
    let bytes = [first, second].map(u64::to_le_bytes).concat();
    let (length, bytes) = bytes.split_first()?;
    Some(bytes[..bytes.len().min(usize::from(*length))].to_vec())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn instruction_bytes_are_shown() {
        // Length 3, then 0f 01 c1.
        let data = [
            1,
            u64::from_le_bytes([3, 0x0f, 0x01, 0xc1, 9, 9, 9, 9]),
            0,
            0x30,
        ];
        let text = internal_text(KVM_INTERNAL_ERROR_EMULATION, &data);
        assert!(text.ends_with("its bytes: 0f 01 c1"), "{text}");
    }

    #[test]
    fn an_impossible_length_is_cut() {
        let data = [1, u64::MAX, u64::MAX];
        assert_eq!(
            instruction(KVM_INTERNAL_ERROR_EMULATION, &data).map(|bytes| bytes.len()),
            Some(15)
        );
        assert_eq!(instruction(KVM_INTERNAL_ERROR_EMULATION, &[1]), None);
        assert_eq!(instruction(KVM_INTERNAL_ERROR_EMULATION, &[]), None);
    }

    #[test]
    fn other_errors_show_their_data() {
        let text = internal_text(KVM_INTERNAL_ERROR_DELIVERY_EV, &[0x80, 0x30]);
        assert!(text.ends_with("data: 0x80 0x30"), "{text}");
        assert_eq!(internal_text(77, &[]), "internal error 77");
    }

    #[test]
    fn each_register_is_in_the_report() {
        let regs = kvm_regs {
            rip: 0x1234_5678,
            r15: 0xfeed,
            ..Default::default()
        };
        let sregs = kvm_sregs {
            cr3: 0xabc_d000,
            ..Default::default()
        };
        let text = text(&regs, &sregs);
        for part in [
            "rip 0000000012345678",
            "r15 000000000000feed",
            "cr3 000000000abcd000",
        ] {
            assert!(text.contains(part), "{part} in {text}");
        }
    }
}
