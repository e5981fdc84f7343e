// SPDX-License-Identifier: GPL-2.0

//! The hypervisor's device and what it offers.

use std::path::Path;

use kvm_ioctls::{Cap, Kvm};

use super::Finding;
use crate::hypervisor::{how_to_load, try_open, OpenError, API_VERSION};

/// The lines about the device.
pub(super) fn findings(device: &Path) -> Vec<Finding> {
    let name = device.display();
    let kvm = match try_open(device) {
        Ok(kvm) => kvm,
        Err(error) => return vec![not_open(device, error)],
    };
    vec![
        Finding::good(format!("device: {name} can be opened by this user")),
        Finding::good(format!("API: version {API_VERSION}")),
        capabilities(&kvm),
        machine(&kvm),
    ]
}

fn not_open(device: &Path, error: OpenError) -> Finding {
    let name = device.display();
    match error {
        OpenError::Missing => {
            Finding::missing(format!("device: there is no {name}"), how_to_load(device))
        }
        OpenError::Forbidden => Finding::missing(
            format!("device: {name} may not be opened by this user"),
            format!(
                "as root, 'chgrp kvm {name}; chmod 660 {name}' and put the user into that group"
            ),
        ),
        OpenError::NotKvm(what) => {
            Finding::missing(format!("device: {name} is {what}"), how_to_load(device))
        }
        OpenError::Other(error) => Finding::missing(
            format!("device: {name} can't be opened: {error}"),
            "see the kernel's log, 'dmesg'",
        ),
    }
}

/// What a PC can't be built without.
fn capabilities(kvm: &Kvm) -> Finding {
    let missing: Vec<&str> = crate::machine::NEEDED
        .iter()
        .filter(|(cap, _)| !kvm.check_extension(*cap))
        .map(|(_, name)| *name)
        .collect();
    if !missing.is_empty() {
        return Finding::missing(
            format!("API: no {}", missing.join(", no ")),
            "use a newer hypervisor; KVM has these where its kernel has CONFIG_KVM_IOAPIC",
        );
    }
    let most = kvm.check_extension_int(Cap::MaxVcpus);
    Finding::good(format!("API: all that a PC needs, up to {most} CPUs"))
}

/// Making a VM is what fails where KVM is loaded on a CPU that can't run it.
fn machine(kvm: &Kvm) -> Finding {
    match kvm.create_vm() {
        Ok(_) => Finding::good("virtual machine: one was made and closed"),
        Err(error) => Finding::missing(
            format!("virtual machine: none can be made: {error}"),
            "see the kernel's log, 'dmesg', for the reason",
        ),
    }
}
