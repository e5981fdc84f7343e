// SPDX-License-Identifier: GPL-2.0

//! Interrupts by eventfd (KVM_IRQFD).
//!
//! A signal of the eventfd is one edge of its GSI. With a resampler it raises the line instead, which
//! stays high until the guest ends the interrupt; the resampler's eventfd then asks the device's owner
//! whether to raise it again.

use super::{
    machine::Vm,
    resample::{ResamplerTable, MAX_RESAMPLERS},
};
use crate::host::eventfd::{EventFd, EventQueue, Hook, Listener};
use core::sync::atomic::{AtomicBool, Ordering};
use kernel::{
    new_mutex,
    prelude::*,
    sync::{Arc, Mutex},
};
use rvisor_core::{irqchip::LineSource, x86::vector::Gsi};

/// The most irqfds of one machine: as many as it has routes. Each that goes is looked for among them.
const MAX_IRQFDS: usize = rvisor_core::irqchip::routing::MAX_ROUTES;

/// A resampler: the GSI at whose end of interrupt the eventfd is signalled.
#[derive(Clone)]
pub(crate) struct Resampler {
    pub(crate) gsi: Gsi,
    pub(crate) eventfd: Arc<EventFd>,
}

/// One eventfd's way into a machine.
pub(crate) struct Irqfd {
    // The machine's own list holds this: a cycle that `Irqfds::release` breaks.
    vm: Arc<Vm>,
    gsi: Gsi,
    resampler: Option<Resampler>,
}

impl Listener for Irqfd {
    fn try_signalled(&self) -> bool {
        self.resampler.is_none() && self.vm.try_send(self.gsi)
    }

    fn signalled(&self) {
        if self.resampler.is_some() {
            self.vm.set_line(self.gsi, LineSource::RESAMPLER, true);
        } else {
            self.vm.set_line(self.gsi, LineSource::USERSPACE, true);
            self.vm.set_line(self.gsi, LineSource::USERSPACE, false);
        }
    }

    fn closed(this: Arc<Self>) {
        this.vm
            .irqfds
            .remove_where(&this.vm, |hook| Arc::ptr_eq(hook.listener(), &this));
    }
}

/// What the irqfds' lock guards.
struct List {
    hooks: KVVec<Hook<Irqfd>>,
    /// An empty table with room for every resampler of `hooks`, so that a removal needs no memory.
    spare: Option<ResamplerTable>,
}

/// The irqfds of one virtual machine.
#[pin_data]
pub(crate) struct Irqfds {
    #[pin]
    list: Mutex<List>,
    /// There was one, so that a worker may have something to do.
    used: AtomicBool,
    queue: Arc<EventQueue>,
}

impl Irqfds {
    /// None.
    pub(crate) fn new(queue: Arc<EventQueue>) -> impl PinInit<Self> {
        pin_init!(Self {
            list <- new_mutex!(List {
                hooks: KVVec::new(),
                spare: None,
            }),
            used: AtomicBool::new(false),
            queue,
        })
    }

    /// Carries out KVM_IRQFD without KVM_IRQFD_FLAG_DEASSIGN.
    ///
    /// # Errors
    ///
    /// `EINVAL` without interrupt controllers in the kernel; `EBADF` and `EINVAL` for a descriptor that is
    /// no eventfd; `EBUSY` where another irqfd has it; `ENOSPC` for too many; `ENOMEM`.
    pub(crate) fn add(
        &self,
        vm: &Arc<Vm>,
        descriptor: u32,
        gsi: Gsi,
        resample: Option<u32>,
    ) -> Result {
        // The end of an interrupt is known only where the IOAPIC is the kernel's.
        if !vm.has_local_apics() || (resample.is_some() && vm.irqchip().is_none()) {
            return Err(EINVAL);
        }
        // The kind of file comes first, whatever the other descriptor is.
        drop(EventFd::from_descriptor(descriptor)?);
        let resampler = match resample {
            Some(descriptor) => Some(Resampler {
                gsi,
                eventfd: Arc::new(EventFd::from_descriptor(descriptor)?, GFP_KERNEL_ACCOUNT)?,
            }),
            None => None,
        };
        let irqfd = Arc::new(
            Irqfd {
                vm: vm.clone(),
                gsi,
                resampler: resampler.clone(),
            },
            GFP_KERNEL_ACCOUNT,
        )?;
        let mut list = self.list.lock();
        if list.hooks.len() >= MAX_IRQFDS {
            return Err(ENOSPC);
        }
        self.used.store(true, Ordering::Relaxed);
        list.hooks.reserve(1, GFP_KERNEL_ACCOUNT)?;
        // The end of an interrupt must find the resampler before the eventfd can raise the line.
        if let Some(resampler) = resampler {
            list.publish_with(vm, resampler)?;
        }
        match Hook::attach(descriptor, self.queue.clone(), irqfd.clone()) {
            Ok(hook) => Ok(list.hooks.push_within_capacity(hook)?),
            Err(error) => {
                if irqfd.resampler.is_some() {
                    list.publish(vm);
                }
                Err(error)
            }
        }
    }

    /// Carries out KVM_IRQFD with KVM_IRQFD_FLAG_DEASSIGN: afterwards the eventfd raises no interrupt.
    ///
    /// # Errors
    ///
    /// `EBADF` and `EINVAL` for a descriptor that is no eventfd.
    pub(crate) fn remove(&self, vm: &Vm, descriptor: u32, gsi: Gsi) -> Result {
        let eventfd = EventFd::from_descriptor(descriptor)?;
        self.remove_where(vm, |hook| {
            hook.listener().gsi == gsi && hook.is_on(&eventfd)
        });
        // A worker that sees to the eventfd's end may have been faster, but must be done.
        self.queue.flush();
        Ok(())
    }

    /// Removes all of them. Nobody may add any more.
    pub(crate) fn release(&self, vm: &Vm) {
        if self.used.load(Ordering::Relaxed) {
            self.remove_where(vm, |_| true);
            self.queue.flush();
        }
    }

    fn remove_where(&self, vm: &Vm, matches: impl Fn(&Hook<Irqfd>) -> bool) {
        loop {
            let mut list = self.list.lock();
            let Some(hook) = list
                .hooks
                .iter()
                .position(&matches)
                .and_then(|place| list.hooks.remove(place).ok())
            else {
                return;
            };
            drop(list);
            let resampler = hook.listener().resampler.clone();
            // Waits for the workers, which may want the list.
            drop(hook);
            if let Some(resampler) = resampler {
                let mut list = self.list.lock();
                list.publish(vm);
                if !resamplers(&list.hooks).any(|other| other.gsi == resampler.gsi) {
                    vm.set_line(resampler.gsi, LineSource::RESAMPLER, false);
                }
            }
        }
    }
}

fn resamplers(list: &[Hook<Irqfd>]) -> impl Iterator<Item = &Resampler> {
    list.iter()
        .filter_map(|hook| hook.listener().resampler.as_ref())
}

/// Adds a resampler to a table that does not have it; `false` where there is no room.
fn add_to(table: &mut KVVec<Resampler>, resampler: &Resampler) -> bool {
    // Interrupts are off where they are told: each once, and not many.
    let is_known = table
        .iter()
        .any(|known| known.gsi == resampler.gsi && known.eventfd.is_same(&resampler.eventfd));
    is_known
        || (table.len() < MAX_RESAMPLERS && table.push_within_capacity(resampler.clone()).is_ok())
}

impl List {
    /// Tells the controllers of the resamplers and of one more.
    ///
    /// # Errors
    ///
    /// `ENOMEM`; `ENOSPC` for too many. Nothing has changed then.
    fn publish_with(&mut self, vm: &Vm, more: Resampler) -> Result {
        let chip = vm.irqchip().ok_or(EINVAL)?;
        let room = (resamplers(&self.hooks).count() + 1).min(MAX_RESAMPLERS);
        let make = || -> Result<ResamplerTable> {
            let table = KVVec::with_capacity(room, GFP_KERNEL_ACCOUNT)?;
            Ok(KBox::new(table, GFP_KERNEL_ACCOUNT)?)
        };
        let (mut table, spare) = (make()?, make()?);
        for resampler in Iterator::chain(resamplers(&self.hooks), [&more]) {
            if !add_to(&mut table, resampler) {
                return Err(ENOSPC);
            }
        }
        chip.set_resamplers(Some(table));
        self.spare = Some(spare);
        Ok(())
    }

    /// Tells the controllers of the resamplers, of which one has gone.
    fn publish(&mut self, vm: &Vm) {
        let (Some(chip), Some(mut table)) = (vm.irqchip(), self.spare.take()) else {
            return;
        };
        for resampler in resamplers(&self.hooks) {
            // There is room: the spare one was made when they were more.
            add_to(&mut table, resampler);
        }
        let table = (!table.is_empty()).then_some(table);
        self.spare = chip.set_resamplers(table).map(|mut old| {
            old.clear();
            old
        });
    }
}
