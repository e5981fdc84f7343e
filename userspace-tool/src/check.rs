// SPDX-License-Identifier: GPL-2.0

//! `rvisor check`: what this host has of what guests need, line by line.

mod cpu;

use std::fs;
use std::path::Path;

use crate::arguments::DEFAULT_DEVICE;
use crate::error::{print, Error, Result, STATUS_HOST};
use crate::hypervisor;

/// The Linux that the module is made for.
const KERNEL: (u32, u32) = (7, 3);

/// What is there; or what is missing, and the next step.
type Finding = Result<String>;

fn missing<T>(what: impl Into<String>, next: impl Into<String>) -> Result<T> {
    Err(Error::input(what, next))
}

/// The line, or two, of the report.
fn line(finding: &Finding) -> String {
    match finding {
        Ok(what) => format!("ok    {what}"),
        Err(Error::Input { cause, next }) => format!("FAIL  {cause}\n      next: {next}"),
        Err(error) => format!("FAIL  {error}"),
    }
}

/// Prints the report for `device` and returns the exit status: 0 where guests can run there, else [`STATUS_HOST`].
///
/// # Errors
///
/// Where standard output fails.
pub fn run(device: &Path) -> Result<u8> {
    let root = Path::new("/");
    let findings = findings(root, device);
    let lines: String = findings.iter().map(|it| line(it) + "\n").collect();
    let (status, can, yet) = match findings.iter().all(Result::is_ok) {
        true => (0, "can", ""),
        false => (STATUS_HOST, "can't", " yet"),
    };
    let (kvm, device) = (kvm(root, device), device.display());
    print(&format!(
        "{lines}note  {kvm}\nGuests {can} run on {device}{yet}.\n"
    ))?;
    Ok(status)
}

/// All findings; the host's /proc and /sys are looked for below `root`.
fn findings(root: &Path, device: &Path) -> Vec<Finding> {
    let (rvisor, api) = (device == Path::new(DEFAULT_DEVICE), api(device));
    let mut findings = Vec::new();
    // KVM runs on other CPUs too, so there they are no more than a reason.
    if rvisor || api.iter().any(Result::is_err) {
        let cpuinfo = fs::read_to_string(root.join("proc/cpuinfo")).unwrap_or_default();
        findings = cpu::findings(&cpuinfo, cpu::has_vmx());
    }
    if rvisor {
        findings.extend([kernel(root), module(root)]);
    }
    findings.extend(api);
    findings
}

/// The version of the kernel.
fn kernel(root: &Path) -> Finding {
    let release = fs::read_to_string(root.join("proc/sys/kernel/osrelease")).unwrap_or_default();
    let release = release.trim();
    let (major, minor) = KERNEL;
    let next = format!("boot Linux {major}.{minor} and build rvisor.ko for it");
    match version(release) {
        None => missing("kernel: its version can't be told", next),
        Some(version) if version < KERNEL => missing(
            format!("kernel: Linux {release}, older than {major}.{minor}"),
            next,
        ),
        Some(_) => Ok(format!("kernel: Linux {release}")),
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
        return Ok("module: rvisor is loaded".to_owned());
    }
    missing(
        "module: rvisor is not loaded",
        "'modprobe rvisor' or 'insmod rvisor.ko' as root; where that fails, the kernel's log ('dmesg') has the reason",
    )
}

/// The device and what it offers.
fn api(device: &Path) -> Vec<Finding> {
    let kvm = match hypervisor::open(device) {
        Ok(kvm) => kvm,
        Err(error) => return vec![Err(error)],
    };
    let lacks: Vec<&str> = crate::machine::NEEDED
        .iter()
        .filter(|(cap, _)| !kvm.check_extension(*cap))
        .map(|(_, name)| *name)
        .collect();
    let most = kvm.get_max_vcpus();
    let capabilities = match lacks.as_slice() {
        [] => Ok(format!("API: all that a PC needs, up to {most} CPUs")),
        lacks => missing(
            format!("API: no {}", lacks.join(", no ")),
            "use a newer hypervisor; KVM has these where its kernel has CONFIG_KVM_IOAPIC",
        ),
    };
    // It fails where KVM is loaded on a CPU that can't run it.
    let machine = kvm.create_vm().map_err(|error| {
        Error::input(
            format!("virtual machine: none can be made: {error}"),
            "see the kernel's log, 'dmesg', for the reason",
        )
    });
    vec![
        Ok(format!(
            "device: {} can be opened by this user",
            device.display()
        )),
        capabilities,
        machine.map(|_| "virtual machine: one was made and closed".to_owned()),
    ]
}

/// Whether KVM is there beside it: worth knowing.
fn kvm(root: &Path, device: &Path) -> String {
    let modules = ["kvm_intel", "kvm_amd"];
    match modules.into_iter().find(|name| is_loaded(root, name)) {
        None => "KVM: not loaded".to_owned(),
        Some(name) if device == Path::new(DEFAULT_DEVICE) => {
            format!("KVM: {name} is loaded; it and rvisor run guests side by side")
        }
        Some(name) => format!("KVM: {name} is loaded"),
    }
}

fn is_loaded(root: &Path, module: &str) -> bool {
    root.join("sys/module").join(module).is_dir()
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
            assert_eq!(kernel(host.path()).is_ok(), good, "{release:?}");
        }
        let host = host(&[]);
        assert!(kernel(host.path()).is_err());
    }

    #[test]
    fn a_module_is_found_by_its_name() {
        let loaded = host(&[("sys/module/rvisor/refcnt", b"0")]);
        assert!(module(loaded.path()).is_ok());
        assert!(kvm(loaded.path(), Path::new(DEFAULT_DEVICE)).ends_with("not loaded"));
        let other = host(&[("sys/module/kvm_intel/refcnt", b"0")]);
        assert!(module(other.path()).is_err());
        assert!(kvm(other.path(), Path::new(DEFAULT_DEVICE)).contains("side by side"));
    }

    #[test]
    fn what_fails_names_the_next_step() {
        let host = host(&[]);
        let findings = findings(host.path(), &host.path().join("no-device"));
        assert!(findings.iter().any(Result::is_err));
        for finding in findings.iter().filter(|finding| finding.is_err()) {
            assert!(line(finding).contains("next: "), "{finding:?}");
        }
    }

    #[test]
    fn of_a_device_that_works_the_cpu_matters_not() {
        let device = Path::new("/dev/kvm");
        if !api(device).iter().all(Result::is_ok) {
            return crate::error::say("SKIP: there is no /dev/kvm that works");
        }
        let host = host(&[]);
        let findings = findings(host.path(), device);
        assert!(findings.iter().all(Result::is_ok), "{findings:?}");
    }

    #[test]
    fn only_rvisors_device_needs_rvisors_module() {
        let host = host(&[]);
        let has_module = |device: &str| {
            let findings = findings(host.path(), Path::new(device));
            findings
                .iter()
                .any(|finding| line(finding).contains("module: "))
        };
        assert!(has_module("/dev/rvisor"));
        assert!(!has_module("/dev/no-such-device"));
    }
}
