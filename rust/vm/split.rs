// SPDX-License-Identifier: GPL-2.0

//! The split interrupt controller (KVM_CAP_SPLIT_IRQCHIP): the local APICs are in the kernel, the IOAPIC and
//! the 8259s are userspace's. What it wants to send it sends by MSI; of the end of a level-triggered
//! interrupt it is told by an exit.

use super::machine::Vm;
use crate::host::rcu::RcuCell;
use kernel::{new_mutex, prelude::*, sync::Mutex};
use rvisor_core::{
    irqchip::{
        destination::{matches, ApicIdentity, InterruptMessage},
        routing::{Route, RoutingIndex, Target},
    },
    x86::vector::{Gsi, Vector},
};

struct Routes {
    list: KVec<Route>,
    index: RoutingIndex,
}

/// The kernel's half.
#[pin_data]
pub(crate) struct SplitChip {
    /// The GSIs below this are pins of userspace's IOAPIC.
    ioapic_pins: u32,
    routes: RcuCell<Routes>,
    /// Serialises changes of the routes.
    #[pin]
    update: Mutex<()>,
}

impl SplitChip {
    /// A controller without routes.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(crate) fn new(ioapic_pins: u32) -> Result<Pin<KBox<Self>>> {
        KBox::pin_init(
            pin_init!(Self {
                ioapic_pins,
                routes: RcuCell::new(),
                update <- new_mutex!(()),
            }),
            GFP_KERNEL_ACCOUNT,
        )
    }

    /// Sets the routes.
    ///
    /// # Errors
    ///
    /// `EINVAL` where they contradict each other; `ENOMEM`. Nothing changed then.
    pub(crate) fn set_routes(&self, list: KVec<Route>) -> Result {
        let mut routes = KBox::new(
            Routes {
                list,
                index: RoutingIndex::new(),
            },
            GFP_KERNEL_ACCOUNT,
        )?;
        let Routes { list, index } = &mut *routes;
        index.build(list).map_err(|_| EINVAL)?;
        let _update = self.update.lock();
        self.routes.replace(Some(routes));
        Ok(())
    }

    /// The MSI that a GSI is.
    pub(crate) fn message(&self, vm: &Vm, gsi: Gsi) -> Option<InterruptMessage> {
        let wide = vm.apics.long_ids();
        self.routes.read(|routes| {
            routes
                .index
                .targets(&routes.list, gsi)
                .find_map(|target| message_of(target, wide))
        })?
    }

    /// Drives a GSI. An MSI has an edge only. Says whether it was taken: 1, or -1 where nobody took it.
    pub(crate) fn set_line(&self, vm: &Vm, gsi: Gsi, level: bool) -> i32 {
        match self.message(vm, gsi) {
            Some(_) if !level => 1,
            Some(message) if vm.deliver(&message, None) => 1,
            _ => -1,
        }
    }

    /// Whether userspace's IOAPIC wants to know that the local APIC `identity` has ended a level-triggered
    /// interrupt of `vector`.
    pub(crate) fn wants_end(&self, vm: &Vm, identity: &ApicIdentity, vector: Vector) -> bool {
        let (wide, source) = (vm.apics.long_ids(), vm.apics.device());
        self.routes
            .read(|routes| {
                routes
                    .list
                    .iter()
                    .filter(|route| route.gsi.0 < self.ioapic_pins)
                    .filter_map(|route| message_of(route.target, wide))
                    .any(|message| {
                        message.vector == vector
                            && message.trigger.is_level()
                            && matches(identity, &message, source)
                    })
            })
            .unwrap_or(false)
    }
}

fn message_of(target: Target, wide: bool) -> Option<InterruptMessage> {
    match target {
        Target::Msi { address, data } => InterruptMessage::from_msi(address, data, wide).ok(),
        Target::Pic(_) | Target::IoApic(_) => None,
    }
}
