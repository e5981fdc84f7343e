// SPDX-License-Identifier: GPL-2.0

//! rvisor: `/dev/rvisor`, a hypervisor on Intel VMX that speaks KVM's API.
//!
//! `host` wraps the kernel, `vmx` the CPU, `vm` is made of both, and `device` is what userspace sees.
//! What follows from a specification alone is in the pure crate, `rvisor_core`.

use device::chardev::Chardev;
use kernel::{
    miscdevice::{MiscDeviceOptions, MiscDeviceRegistration},
    prelude::*,
    sync::Arc,
};
use vm::machine::Host;

mod bindings;
mod device;
mod host;
mod vm;
mod vmx;

module! {
    type: RvisorModule,
    name: "rvisor",
    authors: ["The rvisor maintainers"],
    description: "A hypervisor on Intel VMX that speaks KVM's API",
    license: "GPL",
}

/// The loaded module.
#[pin_data(PinnedDrop)]
pub(crate) struct RvisorModule {
    // Fields drop in order: the node goes before what its opener uses.
    #[pin]
    device: MiscDeviceRegistration<Chardev>,
    host: Arc<Host>,
}

impl kernel::InPlaceModule for RvisorModule {
    fn init(_module: &'static ThisModule) -> impl PinInit<Self, Error> {
        try_pin_init!(Self {
            host: Arc::new(Host::new()?, GFP_KERNEL)?,
            device <- MiscDeviceRegistration::register(MiscDeviceOptions { name: c"rvisor" }),
        })
    }
}

#[pinned_drop]
impl PinnedDrop for RvisorModule {
    fn drop(self: Pin<&mut Self>) {
        // No descriptor is open any more; what the kernel still has to free of ours, it frees now.
        host::notifier::synchronize();
    }
}
