// SPDX-License-Identifier: GPL-2.0

//! Opening the hypervisor's device and asking what it offers.

use std::ffi::CString;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

use kvm_ioctls::{Cap, Kvm};

use crate::arguments::DEFAULT_DEVICE;
use crate::error::{Error, Result};

/// The only version that KVM's API ever had since it became stable (Documentation/virt/kvm/api.rst, 4.1).
pub const API_VERSION: i32 = 12;

/// APIC IDs are 8 bits wide and 255 means all of them: more CPUs would need x2APIC IDs in ACPI's tables.
const MAX_CPUS: u32 = 254;

/// Why a device could not be opened, apart from the words for it.
#[derive(Debug)]
pub enum OpenError {
    /// There is nothing at the path.
    Missing,
    /// This user may not open it.
    Forbidden,
    /// It is there, but speaks no KVM API of version 12. The text says what it is instead.
    NotKvm(String),
    /// The kernel gave another error.
    Other(io::Error),
}

/// Opens `device` and checks that it speaks KVM's API.
///
/// # Errors
///
/// Which of the usual things is the matter.
pub fn try_open(device: &Path) -> std::result::Result<Kvm, OpenError> {
    let open_error = |error: io::Error| match error.kind() {
        io::ErrorKind::NotFound => OpenError::Missing,
        io::ErrorKind::PermissionDenied => OpenError::Forbidden,
        _ => OpenError::Other(error),
    };
    // Opening some other kind of file, a FIFO for one, could block or do harm.
    let metadata = device.metadata().map_err(open_error)?;
    if !metadata.file_type().is_char_device() {
        return Err(OpenError::NotKvm("no character device".to_owned()));
    }
    let path = CString::new(device.as_os_str().as_bytes())
        .map_err(|error| OpenError::Other(error.into()))?;
    let kvm = Kvm::new_with_path(&path).map_err(|error| open_error(error.into()))?;
    match kvm.get_api_version() {
        API_VERSION => Ok(kvm),
        version if version < 0 => Err(OpenError::NotKvm("no device with KVM's API".to_owned())),
        version => Err(OpenError::NotKvm(format!(
            "a device with version {version} of KVM's API, not 12"
        ))),
    }
}

/// Opens `device` for running a guest.
///
/// # Errors
///
/// [`Error::Input`] with the next step.
pub fn open(device: &Path) -> Result<Kvm> {
    let name = device.display();
    try_open(device).map_err(|error| match error {
        OpenError::Missing => Error::input(format!("there is no {name}"), how_to_load(device)),
        OpenError::Forbidden => Error::input(
            format!("{name} may not be opened by this user"),
            "run rvisor as root, or have root give this user read and write permission for it",
        ),
        OpenError::NotKvm(what) => Error::input(
            format!("{name} is {what}"),
            format!("give --device {DEFAULT_DEVICE} or /dev/kvm"),
        ),
        OpenError::Other(error) => Error::input(
            format!("{name} can't be opened: {error}"),
            "see 'rvisor check'",
        ),
    })
}

/// What brings the device at this path into being.
#[must_use]
pub fn how_to_load(device: &Path) -> String {
    match device.to_str() {
        Some(DEFAULT_DEVICE) => {
            "load the module as root, 'insmod rvisor.ko'; 'rvisor check' tells what it needs"
                .to_owned()
        }
        Some("/dev/kvm") => {
            "load KVM as root, 'modprobe kvm_intel' or 'modprobe kvm_amd'".to_owned()
        }
        _ => format!("give --device {DEFAULT_DEVICE} or /dev/kvm"),
    }
}

/// Checks the number of CPUs against what the hypervisor takes.
///
/// # Errors
///
/// [`Error::Input`] for none, or more than it takes.
pub fn check_cpus(kvm: &Kvm, cpus: u32) -> Result<()> {
    let most = u32::try_from(kvm.check_extension_int(Cap::MaxVcpus))
        .unwrap_or(0)
        .clamp(1, MAX_CPUS);
    if cpus > most {
        return Err(too_many_cpus(cpus, most));
    }
    Ok(())
}

/// Checks what can be said of the number of CPUs without a hypervisor.
///
/// # Errors
///
/// [`Error::Input`] for none, or more than any guest can have.
pub fn check_cpus_early(cpus: u32) -> Result<()> {
    match cpus {
        0 => Err(Error::input(
            "--cpus 0 leaves the guest without a CPU",
            "give 1 or more",
        )),
        1..=MAX_CPUS => Ok(()),
        _ => Err(too_many_cpus(cpus, MAX_CPUS)),
    }
}

fn too_many_cpus(cpus: u32, most: u32) -> Error {
    Error::input(
        format!("--cpus {cpus} is more than a guest can have here"),
        format!("give {most} or less"),
    )
}
