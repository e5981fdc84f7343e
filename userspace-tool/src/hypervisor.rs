// SPDX-License-Identifier: GPL-2.0

//! Opening the hypervisor's device and asking what it offers.

use std::ffi::CString;
use std::fs::Metadata;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use kvm_ioctls::Kvm;

use crate::arguments::DEFAULT_DEVICE;
use crate::error::{Error, Result};

/// The only version that KVM's API ever had since it became stable (Documentation/virt/kvm/api.rst, 4.1).
const API_VERSION: i32 = 12;

/// APIC IDs are 8 bits wide and 255 means all of them: more CPUs would need x2APIC IDs in ACPI's tables.
const MAX_CPUS: u32 = 254;

/// Opens `device` and checks that it speaks KVM's API.
///
/// # Errors
///
/// [`Error::Input`] with the next step.
pub fn open(device: &Path) -> Result<Kvm> {
    let name = device.display();
    let cannot = |error: io::Error| match error.kind() {
        io::ErrorKind::NotFound => Error::input(format!("there is no {name}"), how_to_load(device)),
        io::ErrorKind::PermissionDenied => Error::input(
            format!("{name} may not be opened by this user"),
            how_to_permit(device),
        ),
        _ => Error::input(
            format!("{name} can't be opened: {error}"),
            "see the kernel's log, 'dmesg'",
        ),
    };
    let no_kvm = |what: &str| {
        Error::input(
            format!("{name} is {what}"),
            format!("give --device {DEFAULT_DEVICE} or /dev/kvm"),
        )
    };
    // Opening some other kind of file, a FIFO for one, could block or do harm.
    if !device
        .metadata()
        .map_err(cannot)?
        .file_type()
        .is_char_device()
    {
        return Err(no_kvm("no character device"));
    }
    let path = CString::new(device.as_os_str().as_bytes()).map_err(|e| cannot(e.into()))?;
    let kvm = Kvm::new_with_path(&path).map_err(|e| cannot(e.into()))?;
    match kvm.get_api_version() {
        API_VERSION => Ok(kvm),
        version if version < 0 => Err(no_kvm("no device with KVM's API")),
        version => Err(no_kvm(&format!(
            "a device with version {version} of KVM's API, not {API_VERSION}"
        ))),
    }
}

/// What gives a user the right to the device at this path. A rule of udev's, where one is installed, gives it to a group.
fn how_to_permit(device: &Path) -> String {
    let name = device.display();
    let has_group = |node: Metadata| node.gid() != 0 && node.mode() & 0o060 == 0o060;
    if device.metadata().is_ok_and(has_group) {
        format!("run rvisor as root, or as a member of the group that 'stat -c %G {name}' tells")
    } else {
        format!(
            "run rvisor as root, who can let a group in: 'chgrp GROUP {name}; chmod 660 {name}'"
        )
    }
}

/// What brings the device at this path into being.
fn how_to_load(device: &Path) -> String {
    match device.to_str() {
        Some(DEFAULT_DEVICE) => {
            "load the module as root, 'modprobe rvisor' or 'insmod rvisor.ko'; 'rvisor check' tells what it needs"
                .to_owned()
        }
        Some("/dev/kvm") => {
            "load KVM as root, 'modprobe kvm_intel' or 'modprobe kvm_amd'".to_owned()
        }
        _ => format!("give --device {DEFAULT_DEVICE} or /dev/kvm"),
    }
}

/// Checks the number of CPUs against what `kvm` takes; without it, against what any guest can have.
///
/// # Errors
///
/// [`Error::Input`] for none, or more than that.
pub fn check_cpus(cpus: u32, kvm: Option<&Kvm>) -> Result<()> {
    let most = kvm.map_or(usize::MAX, Kvm::get_max_vcpus);
    let most = u32::try_from(most).unwrap_or(MAX_CPUS).clamp(1, MAX_CPUS);
    match cpus {
        0 => Err(Error::input(
            "--cpus 0 leaves the guest without a CPU",
            "give 1 or more",
        )),
        _ if cpus <= most => Ok(()),
        _ => Err(Error::input(
            format!("--cpus {cpus} is more than a guest can have here"),
            format!("give {most} or less"),
        )),
    }
}
