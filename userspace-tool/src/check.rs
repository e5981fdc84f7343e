// SPDX-License-Identifier: GPL-2.0

//! `rvisor check`: what this host has of what guests need, line by line.

mod cpu;
mod device;

use std::fs;
use std::path::Path;

use crate::arguments::DEFAULT_DEVICE;
use crate::error::{print, Result};

/// Exit status where something that guests need is missing.
const STATUS_MISSING: u8 = 1;
/// The Linux that the module is made for.
const KERNEL: (u32, u32) = (7, 3);

/// What a line says.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Verdict {
    /// It is there.
    Good,
    /// It is missing and needed: the next step.
    Missing(String),
    /// Worth knowing.
    Note,
}

/// A line of the report.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Finding {
    what: String,
    verdict: Verdict,
}

impl Finding {
    fn good(what: impl Into<String>) -> Self {
        Self {
            what: what.into(),
            verdict: Verdict::Good,
        }
    }

    fn missing(what: impl Into<String>, next: impl Into<String>) -> Self {
        Self {
            what: what.into(),
            verdict: Verdict::Missing(next.into()),
        }
    }

    fn note(what: impl Into<String>) -> Self {
        Self {
            what: what.into(),
            verdict: Verdict::Note,
        }
    }
}

impl std::fmt::Display for Finding {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.verdict {
            Verdict::Good => write!(f, "ok    {}", self.what),
            Verdict::Missing(next) => write!(f, "FAIL  {}\n      next: {next}", self.what),
            Verdict::Note => write!(f, "note  {}", self.what),
        }
    }
}

/// Prints the report for `device` and returns the exit status: 0 where guests can run there, else 1.
///
/// # Errors
///
/// Where standard output fails.
pub fn run(device: &Path) -> Result<u8> {
    let findings = findings(Path::new("/"), device);
    for finding in &findings {
        print(&format!("{finding}\n"))?;
    }
    let missing = findings
        .iter()
        .any(|finding| matches!(finding.verdict, Verdict::Missing(_)));
    let device = device.display();
    if missing {
        print(&format!("Guests can't run on {device} yet.\n"))?;
        return Ok(STATUS_MISSING);
    }
    print(&format!("Guests can run on {device}.\n"))?;
    Ok(0)
}

/// All findings; the host's /proc, /sys and /dev/cpu are looked for below `root`.
fn findings(root: &Path, device: &Path) -> Vec<Finding> {
    let mut findings = cpu::findings(root);
    if device == Path::new(DEFAULT_DEVICE) {
        findings.push(kernel(root));
        findings.push(module(root));
    }
    findings.extend(device::findings(device));
    findings.push(kvm(root, device));
    findings
}

/// The version of the kernel.
fn kernel(root: &Path) -> Finding {
    let release = fs::read_to_string(root.join("proc/sys/kernel/osrelease")).unwrap_or_default();
    let release = release.trim();
    let (major, minor) = KERNEL;
    let next = format!("boot Linux {major}.{minor} and build rvisor.ko for it");
    match version(release) {
        None => Finding::missing("kernel: its version can't be told", next),
        Some(version) if version < KERNEL => Finding::missing(
            format!("kernel: Linux {release}, older than {major}.{minor}"),
            next,
        ),
        Some(_) => Finding::good(format!("kernel: Linux {release}")),
    }
}

/// The first two numbers of a kernel release such as `7.3.4+deb13-cloud-amd64`.
fn version(release: &str) -> Option<(u32, u32)> {
    let mut parts = release.split(|c: char| !c.is_ascii_digit());
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

/// Whether rvisor's module is loaded.
fn module(root: &Path) -> Finding {
    if is_loaded(root, "rvisor") {
        Finding::good("module: rvisor is loaded")
    } else {
        Finding::missing(
            "module: rvisor is not loaded",
            "'insmod rvisor.ko' as root; where that fails, the kernel's log ('dmesg') has the reason",
        )
    }
}

/// Whether KVM is there beside it.
fn kvm(root: &Path, device: &Path) -> Finding {
    let loaded: Vec<&str> = ["kvm_intel", "kvm_amd"]
        .into_iter()
        .filter(|name| is_loaded(root, name))
        .collect();
    let state = match loaded.first() {
        Some(name) => format!("KVM: {name} is loaded"),
        None => "KVM: not loaded".to_owned(),
    };
    let beside = device == Path::new(DEFAULT_DEVICE) && !loaded.is_empty();
    Finding::note(if beside {
        state + "; it and rvisor run guests side by side"
    } else {
        state
    })
}

fn is_loaded(root: &Path, module: &str) -> bool {
    root.join("sys/module").join(module).is_dir()
        || fs::read_to_string(root.join("proc/modules")).is_ok_and(|modules| {
            modules
                .lines()
                .any(|line| line.split_whitespace().next() == Some(module))
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A host whose files are those.
    fn host(files: &[(&str, &[u8])]) -> tempfile::TempDir {
        let root = tempfile::tempdir().expect("a folder for the test");
        for (path, content) in files {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().expect("a path with a folder")).expect("its folder");
            fs::write(path, content).expect("the file");
        }
        root
    }

    fn missing(finding: &Finding) -> bool {
        matches!(finding.verdict, Verdict::Missing(_))
    }

    #[test]
    fn kernels_from_7_3_on_will_do() {
        for (release, good) in [
            ("7.3.4+deb13-cloud-amd64\n", true),
            ("7.3-rc1", true),
            ("7.10.0", true),
            ("8.0", true),
            ("7.2.9", false),
            ("6.12.48+deb13-amd64", false),
            ("", false),
            ("weird", false),
        ] {
            let host = host(&[("proc/sys/kernel/osrelease", release.as_bytes())]);
            assert_eq!(!missing(&kernel(host.path())), good, "{release:?}");
        }
        let host = host(&[]);
        assert!(missing(&kernel(host.path())));
    }

    #[test]
    fn a_module_is_found_in_either_list() {
        let listed = host(&[(
            "proc/modules",
            b"rvisor_not 1 0\nrvisor 16384 0 - Live 0x0\n",
        )]);
        assert!(!missing(&module(listed.path())));
        let in_sysfs = host(&[("sys/module/rvisor/refcnt", b"0")]);
        assert!(!missing(&module(in_sysfs.path())));
        let other = host(&[("proc/modules", b"rvisor_not 1 0\nkvm 1 1 rvisor\n")]);
        assert!(missing(&module(other.path())));
    }

    #[test]
    fn what_fails_names_the_next_step() {
        let host = host(&[]);
        let findings = findings(host.path(), &host.path().join("no-device"));
        assert!(findings.iter().any(missing));
        for finding in findings.iter().filter(|finding| missing(finding)) {
            assert!(finding.to_string().contains("next: "), "{finding}");
        }
    }

    #[test]
    fn only_rvisors_device_needs_rvisors_module() {
        let host = host(&[]);
        let has_module = |device: &str| {
            let findings = findings(host.path(), Path::new(device));
            findings
                .iter()
                .any(|finding| finding.what.starts_with("module"))
        };
        assert!(has_module("/dev/rvisor"));
        assert!(!has_module("/dev/no-such-device"));
    }
}
