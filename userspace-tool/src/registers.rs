// SPDX-License-Identifier: GPL-2.0

//! A virtual CPU's registers and the hypervisor's reasons as text, for the report of a guest that can't
//! go on.

use kvm_bindings::{
    kvm_regs, kvm_run, kvm_sregs, KVM_INTERNAL_ERROR_DELIVERY_EV, KVM_INTERNAL_ERROR_EMULATION,
    KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES, KVM_INTERNAL_ERROR_SIMUL_EX,
    KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON,
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

/// As the structures of KVM's API tell it themselves, in hexadecimal, four registers or one segment to a line.
fn text(regs: &kvm_regs, sregs: &kvm_sregs) -> String {
    let general = format!("{regs:x?}");
    let general = general.split(['{', ',', '}']);
    let general = general.filter_map(|field| field.split_once(": "));
    let general = general.map(|(name, value)| format!("{name:>7} {:>16}", value.trim()));
    let rows = general.collect::<Vec<_>>();
    let rows: Vec<_> = rows.chunks(4).map(|row| row.concat()).collect();
    let segments = format!("{sregs:x?}").replace("}, ", "},\n  ");
    format!("registers\n{}\n  {segments}", rows.join("\n"))
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
            "\n    rax                0    rbx ",
            "    r15             feed\n    rip         12345678 rflags                0\n",
            "\n  ldt: kvm_segment { base: 0,",
            " cr3: abcd000,",
        ] {
            assert!(text.contains(part), "{part} in {text}");
        }
        assert!(text.lines().all(|line| line.len() <= 160), "{text}");
    }
}
