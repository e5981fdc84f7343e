// SPDX-License-Identifier: GPL-2.0

//! The CPU and its firmware's settings.

use std::arch::x86_64::__cpuid;

use super::{missing, Finding};

/// Leaf 1, ECX (SDM volume 2, CPUID): VMX.
const VMX: u32 = 1 << 5;
/// What the module needs of VMX, with the kernel's words for it.
const NEEDED: [(&str, &str); 3] = [
    ("EPT", "ept"),
    ("unrestricted guest", "unrestricted_guest"),
    ("VPID", "vpid"),
];

/// Whether the CPU has VMX, be it on or not.
pub(super) fn has_vmx() -> bool {
    __cpuid(1).ecx & VMX != 0
}

/// The lines about the CPU, by the kernel's `cpuinfo` and by whether the CPU itself says that it has VMX.
pub(super) fn findings(cpuinfo: &str, has_vmx: bool) -> Vec<Finding> {
    let words = |name: &str| -> Option<Vec<&str>> {
        cpuinfo.lines().find_map(|line| {
            let (key, value) = line.split_once(':')?;
            (key.trim() == name).then(|| value.split_whitespace().collect())
        })
    };
    let (Some(vendor), Some(flags)) = (words("vendor_id"), words("flags")) else {
        return vec![missing(
            "CPU: /proc/cpuinfo does not tell",
            "mount /proc, 'mount -t proc proc /proc'",
        )];
    };
    let vendor = vendor.concat();
    if !flags.contains(&"vmx") {
        return vec![no_vmx(&vendor, &flags, has_vmx)];
    }
    // The kernel lists VMX only where the firmware has left it on.
    let vmx = Ok(format!("CPU: VMX ({vendor}), which the firmware left on"));
    [vmx]
        .into_iter()
        .chain(words("vmx flags").map(|flags| paging(&flags)))
        .collect()
}

fn no_vmx(vendor: &str, flags: &[&str], has_vmx: bool) -> Finding {
    if has_vmx {
        return missing(
            "CPU: VMX is switched off, by the firmware or by this kernel",
            "enable virtualization (VT-x) in the firmware's setup, then power the machine off and on; \
             a kernel without CONFIG_KVM_INTEL switches it off itself",
        );
    }
    if flags.contains(&"svm") {
        return missing(
            format!("CPU: no VMX but SVM ({vendor}), which rvisor does not drive"),
            "use a host with an Intel CPU; KVM runs guests here",
        );
    }
    if flags.contains(&"hypervisor") {
        return missing(
            format!("CPU: no VMX ({vendor}); this host is a guest itself"),
            "enable nested virtualization on the host below, for KVM: kvm_intel nested=1 and -cpu host",
        );
    }
    missing(
        format!("CPU: no VMX ({vendor})"),
        "enable virtualization (VT-x) in the firmware's setup, or use a CPU that has it",
    )
}

/// Extended page tables and their kin.
fn paging(vmx_flags: &[&str]) -> Finding {
    let lacks = |(_, flag): &(&str, &str)| !vmx_flags.contains(flag);
    let lacks: Vec<&str> = NEEDED
        .into_iter()
        .filter(lacks)
        .map(|(name, _)| name)
        .collect();
    if lacks.is_empty() {
        return Ok("CPU: EPT, unrestricted guest, VPID".to_owned());
    }
    missing(
        format!("CPU: no {}", lacks.join(", no ")),
        "use a newer CPU (Intel's have all since 2010); in a guest, enable them on the host below",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(flags: &str, has_vmx: bool) -> Vec<String> {
        let text = format!("processor\t: 0\nvendor_id\t: GenuineIntel\nflags\t\t: {flags}\n");
        findings(&text, has_vmx)
            .iter()
            .map(super::super::line)
            .collect()
    }

    #[test]
    fn cpuinfo_is_read_word_by_word() {
        assert!(lines("fpu vmx_not svmx", false)[0].starts_with("FAIL  CPU: no VMX (G"));
        assert!(findings("", true)[0].is_err());
    }

    #[test]
    fn the_reason_for_no_vmx_is_told_apart() {
        for (flags, has_vmx, words) in [
            ("fpu", true, "by the firmware or by this kernel"),
            ("fpu svm", false, "SVM"),
            ("fpu hypervisor", false, "is a guest itself"),
            ("fpu", false, "no VMX"),
        ] {
            let lines = lines(flags, has_vmx);
            assert_eq!(lines.len(), 1);
            assert!(
                lines[0].starts_with("FAIL") && lines[0].contains(words),
                "{lines:?}"
            );
        }
    }

    #[test]
    fn what_vmx_lacks_is_named() {
        let all = "fpu vmx\nvmx flags\t: ept unrestricted_guest vpid ept_ad";
        assert!(lines(all, true).iter().all(|line| line.starts_with("ok")));
        let old = lines("fpu vmx\nvmx flags\t: vpid ept_not", true);
        assert!(old[0].starts_with("ok"));
        assert!(
            old[1].starts_with("FAIL  CPU: no EPT, no unrestricted guest\n"),
            "{old:?}"
        );
        // A kernel that does not list them says nothing of them.
        assert_eq!(lines("fpu vmx", true).len(), 1);
    }
}
