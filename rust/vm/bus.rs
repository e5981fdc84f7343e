// SPDX-License-Identifier: GPL-2.0

//! Writes to devices that userspace does not want to see one by one: doorbells and coalesced zones.
//!
//! What is registered is a table that readers find without a lock and that each change makes anew.

use crate::{
    bindings as uapi,
    host::{eventfd::EventFd, page::KernelPage, rcu::RcuCell},
};
use core::{mem::offset_of, ptr};
use kernel::{
    new_mutex, new_spinlock,
    prelude::*,
    sync::{Arc, Mutex, SetOnce, SpinLock},
};
use rvisor_core::{
    bus::{
        coalesced::{next_place, Zone, MAX_ZONES},
        doorbell::{find, insertion_point, Doorbell},
        Bus,
    },
    x86::address::PAGE_SIZE,
};

type RingEntry = uapi::kvm_coalesced_mmio;

/// Where the ring's entries begin, and how many there are (KVM_COALESCED_MMIO_MAX).
const RING_HEADER: usize = size_of::<uapi::kvm_coalesced_mmio_ring>();
const RING_PLACES: u32 = ((PAGE_SIZE as usize - RING_HEADER) / size_of::<RingEntry>()) as u32;

/// The most doorbells of one machine. KVM has no bound; a table is copied at each change.
const MAX_BELLS: usize = 1 << 16;

/// A doorbell and what it rings.
#[derive(Clone)]
struct Bell {
    rings_on: Doorbell,
    eventfd: Arc<EventFd>,
}

struct Table {
    /// Sorted by what they ring on.
    bells: KVVec<Bell>,
    zones: KVVec<Zone>,
}

/// The registrations of one virtual machine.
#[pin_data]
pub(crate) struct Registrations {
    table: RcuCell<Table>,
    /// Serialises changes of the table.
    #[pin]
    update: Mutex<()>,
    ring: SetOnce<KernelPage>,
    /// Serialises the writers of the ring.
    #[pin]
    ring_lock: SpinLock<()>,
}

impl Registrations {
    /// None.
    pub(crate) fn new() -> impl PinInit<Self> {
        pin_init!(Self {
            table: RcuCell::new(),
            update <- new_mutex!(()),
            ring: SetOnce::new(),
            ring_lock <- new_spinlock!(()),
        })
    }

    /// Does what was asked for a write of a guest. `false` where nothing was: it is userspace's.
    #[inline]
    pub(crate) fn write(&self, bus: Bus, address: u64, data: &[u8]) -> bool {
        !self.table.is_empty() && self.find_and_write(bus, address, data)
    }

    #[inline(never)]
    fn find_and_write(&self, bus: Bus, address: u64, data: &[u8]) -> bool {
        self.table
            .read(|table| {
                let place = find(&table.bells, |bell| &bell.rings_on, bus, address, data);
                if let Some(bell) = place.and_then(|place| table.bells.get(place)) {
                    bell.eventfd.signal();
                    return true;
                }
                let length = data.len() as u64;
                table
                    .zones
                    .iter()
                    .any(|zone| zone.holds(bus, address, length))
                    && self.put_by(bus, address, data)
            })
            .unwrap_or(false)
    }

    /// Puts a write into the ring. `false` where it is full.
    fn put_by(&self, bus: Bus, address: u64, data: &[u8]) -> bool {
        let mut entry = RingEntry {
            phys_addr: address,
            len: data.len() as u32,
            ..RingEntry::default()
        };
        entry.__bindgen_anon_1.pio = u32::from(bus == Bus::Port);
        let (Some(ring), Some(to)) = (self.ring.as_ref(), entry.data.get_mut(..data.len())) else {
            return false;
        };
        to.copy_from_slice(data);
        let ring = ring.as_ptr();
        let _lock = self.ring_lock.lock();
        // SAFETY: The page begins with the ring's header. Userspace may write it at any time, hence the
        // volatile accesses and the check of what was read.
        unsafe {
            let first = ring.add(offset_of!(uapi::kvm_coalesced_mmio_ring, first));
            let last = ring.add(offset_of!(uapi::kvm_coalesced_mmio_ring, last));
            let (first, last) = (first.cast::<u32>(), last.cast::<u32>());
            let found = next_place(
                ptr::read_volatile(first),
                ptr::read_volatile(last),
                RING_PLACES,
            );
            let Some((place, next)) = found else {
                return false;
            };
            ptr::write_volatile(
                ring.add(RING_HEADER)
                    .cast::<RingEntry>()
                    .add(place as usize),
                entry,
            );
            // The entry is there before userspace can know of it.
            core::sync::atomic::fence(core::sync::atomic::Ordering::Release);
            ptr::write_volatile(last, next);
        }
        true
    }

    /// The page of the ring, which is made when somebody first wants it.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(crate) fn ring(&self) -> Result<&KernelPage> {
        let _update = self.update.lock();
        if self.ring.as_ref().is_none() {
            self.ring.populate(KernelPage::new()?);
        }
        self.ring.as_ref().ok_or(ENOMEM)
    }

    /// Carries out KVM_IOEVENTFD without KVM_IOEVENTFD_FLAG_DEASSIGN.
    ///
    /// # Errors
    ///
    /// `EEXIST` where a write could ring this doorbell and another; `ENOSPC` for too many; `ENOMEM`.
    pub(crate) fn add_doorbell(&self, rings_on: Doorbell, eventfd: EventFd) -> Result {
        let eventfd = Arc::new(eventfd, GFP_KERNEL_ACCOUNT)?;
        self.change(|table| {
            let list = table.bells.iter().map(|bell| &bell.rings_on);
            let place = insertion_point(list, &rings_on).ok_or(EEXIST)?;
            if table.bells.len() >= MAX_BELLS {
                return Err(ENOSPC);
            }
            table
                .bells
                .insert_within_capacity(place, Bell { rings_on, eventfd })
                .map_err(|_| ENOMEM)
        })
    }

    /// Carries out KVM_IOEVENTFD with KVM_IOEVENTFD_FLAG_DEASSIGN.
    ///
    /// # Errors
    ///
    /// `ENOENT` where there is no such doorbell; `ENOMEM`.
    pub(crate) fn remove_doorbell(&self, rings_on: &Doorbell, eventfd: &EventFd) -> Result {
        self.change(|table| {
            let place = table
                .bells
                .iter()
                .position(|bell| bell.rings_on == *rings_on && bell.eventfd.is_same(eventfd))
                .ok_or(ENOENT)?;
            table.bells.remove(place).map_err(|_| ENOENT)?;
            Ok(())
        })
    }

    /// Carries out KVM_REGISTER_COALESCED_MMIO.
    ///
    /// # Errors
    ///
    /// `ENOSPC` for too many; `ENOMEM`.
    pub(crate) fn add_zone(&self, zone: Zone) -> Result {
        self.ring()?;
        self.change(|table| {
            let same_bus = |other: &&Zone| other.bus() == zone.bus();
            if table.zones.iter().filter(same_bus).count() >= MAX_ZONES {
                return Err(ENOSPC);
            }
            Ok(table.zones.push_within_capacity(zone)?)
        })
    }

    /// Carries out KVM_UNREGISTER_COALESCED_MMIO: all zones that hold the named one go, if there are any.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(crate) fn remove_zones(&self, named: &Zone) -> Result {
        self.change(|table| {
            table.zones.retain(|zone| !zone.is_removed_by(named));
            Ok(())
        })
    }

    /// Replaces the table by a copy that `f` has changed. There is room for one more of each kind.
    fn change(&self, f: impl FnOnce(&mut Table) -> Result) -> Result {
        let _update = self.update.lock();
        // Nobody changes the table meanwhile, so that it stays as long as it is.
        let (bells, zones) = self
            .table
            .read(|table| (table.bells.len(), table.zones.len()))
            .unwrap_or((0, 0));
        let mut new = Table {
            bells: KVVec::with_capacity(bells + 1, GFP_KERNEL_ACCOUNT)?,
            zones: KVVec::with_capacity(zones + 1, GFP_KERNEL_ACCOUNT)?,
        };
        self.table
            .read(|old| -> Result {
                for bell in &old.bells {
                    new.bells.push_within_capacity(bell.clone())?;
                }
                for zone in &old.zones {
                    new.zones.push_within_capacity(*zone)?;
                }
                Ok(())
            })
            .unwrap_or(Ok(()))?;
        f(&mut new)?;
        let is_empty = new.bells.is_empty() && new.zones.is_empty();
        let new = if is_empty {
            None
        } else {
            Some(KBox::new(new, GFP_KERNEL_ACCOUNT)?)
        };
        self.table.replace(new);
        Ok(())
    }
}
