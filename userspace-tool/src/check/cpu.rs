// SPDX-License-Identifier: GPL-2.0

//! The CPU and its firmware's settings.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::Finding;

/// MSRs (SDM volume 4, table 2-2), read as files at `/dev/cpu/0/msr`.
const IA32_FEATURE_CONTROL: u64 = 0x3a;
const IA32_VMX_PROCBASED_CTLS2: u64 = 0x48b;
/// IA32_FEATURE_CONTROL: can't be written until the next reset; VMX outside SMX is on.
const LOCKED: u64 = 1;
const VMX_ON: u64 = 1 << 2;
/// IA32_VMX_PROCBASED_CTLS2: what may be set, in the upper half (SDM volume 3, table 26-7).
const MAY_EPT: u64 = 1 << (32 + 1);
const MAY_VPID: u64 = 1 << (32 + 5);
const MAY_UNRESTRICTED: u64 = 1 << (32 + 7);

/// What the CPU has, by its file in /proc.
struct Cpu {
    vendor: String,
    flags: BTreeSet<String>,
    /// `None` where the kernel does not list them.
    vmx_flags: Option<BTreeSet<String>>,
}

impl Cpu {
    fn from_cpuinfo(text: &str) -> Option<Self> {
        let field = |name: &str| {
            text.lines().find_map(|line| {
                let (key, value) = line.split_once(':')?;
                (key.trim() == name).then(|| value.trim())
            })
        };
        let words = |text: &str| text.split_whitespace().map(str::to_owned).collect();
        Some(Self {
            vendor: field("vendor_id")?.to_owned(),
            flags: words(field("flags")?),
            vmx_flags: field("vmx flags").map(words),
        })
    }
}

/// One MSR of the first CPU, where root may read it and the kernel has the device.
fn read_msr(root: &Path, index: u64) -> Option<u64> {
    let mut value = [0; 8];
    let file = File::open(root.join("dev/cpu/0/msr")).ok()?;
    file.read_exact_at(&mut value, index).ok()?;
    Some(u64::from_le_bytes(value))
}

/// The lines about the CPU.
pub(super) fn findings(root: &Path) -> Vec<Finding> {
    let text = fs::read_to_string(root.join("proc/cpuinfo")).unwrap_or_default();
    let Some(cpu) = Cpu::from_cpuinfo(&text) else {
        return vec![Finding::missing(
            "CPU: /proc/cpuinfo does not tell",
            "mount /proc, 'mount -t proc proc /proc'",
        )];
    };
    let feature_control = read_msr(root, IA32_FEATURE_CONTROL);
    if !cpu.flags.contains("vmx") {
        return vec![no_vmx(&cpu, feature_control)];
    }
    let mut findings = vec![Finding::good(format!("CPU: VMX ({})", cpu.vendor))];
    findings.push(firmware(feature_control));
    findings.push(paging(&cpu, read_msr(root, IA32_VMX_PROCBASED_CTLS2)));
    findings
}

/// The kernel hides VMX where the firmware has switched it off, so both are possible reasons.
fn no_vmx(cpu: &Cpu, feature_control: Option<u64>) -> Finding {
    if feature_control.is_some_and(|value| value & LOCKED != 0 && value & VMX_ON == 0) {
        return Finding::missing(
            "CPU: the firmware has switched VMX off",
            "enable virtualization (VT-x) in the firmware's setup, then power the machine off and on",
        );
    }
    if cpu.flags.contains("svm") {
        return Finding::missing(
            format!(
                "CPU: no VMX but SVM ({}), which rvisor does not drive",
                cpu.vendor
            ),
            "use a host with an Intel CPU; KVM runs guests here",
        );
    }
    if cpu.flags.contains("hypervisor") {
        return Finding::missing(
            format!("CPU: no VMX ({}); this host is a guest itself", cpu.vendor),
            "enable nested virtualization on the host below, for KVM: kvm_intel nested=1 and -cpu host",
        );
    }
    Finding::missing(
        format!("CPU: no VMX ({})", cpu.vendor),
        "enable virtualization (VT-x) in the firmware's setup, or use a CPU that has it",
    )
}

fn firmware(feature_control: Option<u64>) -> Finding {
    match feature_control {
        // The kernel lists VMX only where it is on: it sets what the firmware has left open.
        None => Finding::good("firmware: it left VMX on, says the kernel"),
        Some(value) if value & LOCKED == 0 => {
            Finding::good("firmware: it left VMX open, to be switched on by the kernel")
        }
        Some(value) if value & VMX_ON != 0 => Finding::good("firmware: VMX is on"),
        Some(_) => Finding::missing(
            "firmware: VMX is switched off",
            "enable virtualization (VT-x) in the firmware's setup, then power the machine off and on",
        ),
    }
}

/// Extended page tables and their kin, by the CPU's own word or else by the kernel's.
fn paging(cpu: &Cpu, controls: Option<u64>) -> Finding {
    let features = [
        ("EPT", MAY_EPT, "ept"),
        ("unrestricted guest", MAY_UNRESTRICTED, "unrestricted_guest"),
        ("VPID", MAY_VPID, "vpid"),
    ];
    let missing: Vec<&str> = match (controls, &cpu.vmx_flags) {
        (Some(controls), _) => features
            .iter()
            .filter(|(_, bit, _)| controls & bit == 0)
            .map(|(name, ..)| *name)
            .collect(),
        (None, Some(flags)) => features
            .iter()
            .filter(|(.., flag)| !flags.contains(*flag))
            .map(|(name, ..)| *name)
            .collect(),
        (None, None) => {
            return Finding::note(
                "CPU: whether it has EPT can't be told; 'modprobe msr' as root helps",
            );
        }
    };
    if missing.is_empty() {
        return Finding::good("CPU: EPT, unrestricted guest, VPID");
    }
    Finding::missing(
        format!("CPU: no {}", missing.join(", no ")),
        "use a newer CPU (Intel's have all since 2010); in a guest, enable them on the host below",
    )
}

#[cfg(test)]
mod tests {
    use super::super::Verdict;
    use super::*;

    fn cpu(flags: &str, vmx_flags: Option<&str>) -> Cpu {
        let mut text = format!("processor\t: 0\nvendor_id\t: GenuineIntel\nflags\t\t: {flags}\n");
        if let Some(flags) = vmx_flags {
            text.push_str(&format!("vmx flags\t: {flags}\n"));
        }
        Cpu::from_cpuinfo(&text).expect("this is how it looks")
    }

    fn missing(finding: &Finding) -> bool {
        matches!(finding.verdict, Verdict::Missing(_))
    }

    #[test]
    fn cpuinfo_is_read_word_by_word() {
        let cpu = cpu("fpu vmx_not svmx", None);
        assert!(!cpu.flags.contains("vmx") && !cpu.flags.contains("svm"));
        assert!(Cpu::from_cpuinfo("").is_none());
    }

    #[test]
    fn the_reason_for_no_vmx_is_told_apart() {
        let off_by_firmware = no_vmx(&cpu("fpu", None), Some(LOCKED));
        let amd = no_vmx(&cpu("fpu svm", None), None);
        let guest = no_vmx(&cpu("fpu hypervisor", None), None);
        let none = no_vmx(&cpu("fpu", None), Some(LOCKED | VMX_ON));
        for (finding, word) in [
            (off_by_firmware, "firmware has switched"),
            (amd, "SVM"),
            (guest, "is a guest itself"),
            (none, "no VMX"),
        ] {
            assert!(
                missing(&finding) && finding.what.contains(word),
                "{finding}"
            );
        }
    }

    #[test]
    fn firmware_that_locked_vmx_off_fails() {
        assert!(missing(&firmware(Some(LOCKED))));
        for value in [None, Some(0), Some(VMX_ON), Some(LOCKED | VMX_ON)] {
            assert!(!missing(&firmware(value)), "{value:?}");
        }
    }

    #[test]
    fn the_cpus_word_goes_before_the_kernels() {
        let all = Some("ept unrestricted_guest vpid ept_ad");
        assert!(!missing(&paging(&cpu("vmx", all), None)));
        assert!(missing(&paging(
            &cpu("vmx", Some("vpid unrestricted_guest")),
            None
        )));
        assert!(missing(&paging(&cpu("vmx", all), Some(MAY_EPT | MAY_VPID))));
        assert!(!missing(&paging(
            &cpu("vmx", None),
            Some(MAY_EPT | MAY_VPID | MAY_UNRESTRICTED)
        )));
        assert_eq!(paging(&cpu("vmx", None), None).verdict, Verdict::Note);
    }
}
