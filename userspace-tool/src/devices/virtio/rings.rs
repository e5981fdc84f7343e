// SPDX-License-Identifier: GPL-2.0

//! A device's view of its rings.

use std::time::Duration;

use virtio_bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::{Address, Bytes, GuestAddress, GuestMemory};

use super::Fault;
use crate::memory::Memory;

/// A chain of descriptors. It ends early where the guest made it wrongly: what a request needs and does not
/// find there is missing.
pub type Chain<'a> = DescriptorChain<&'a Memory>;

/// How many chains one call of a device takes. Between two calls the worker looks whether it shall stop.
const BATCH: u32 = 48;

/// Where in the used ring its elements begin (virtio 1.3, 2.7.8).
const USED_ELEMENTS: u64 = 4;
/// The size of one: the chain's first descriptor and the bytes written, 32 bits each.
const USED_ELEMENT: u64 = 8;

/// Whether the rings of `queue` lie in the guest's memory. The library's own look wants a byte behind each.
pub(super) fn lie_in(memory: &Memory, queue: &Queue) -> bool {
    let size = usize::from(queue.size());
    let inside = |at, length| memory.check_range(GuestAddress(at), length);
    inside(queue.desc_table(), 16 * size)
        && inside(queue.avail_ring(), 6 + 2 * size)
        && inside(queue.used_ring(), 6 + 8 * size)
}

/// Says whether the machine is to pause or has ended, so that a device leaves the rest for later.
pub(super) type Halt<'a> = &'a dyn Fn() -> bool;

/// The rings of a device while it works.
pub struct Rings<'a> {
    queues: &'a mut [Queue],
    memory: &'a Memory,
    left: u32,
    halt: Halt<'a>,
    /// Queues with used chains that the driver was not told of, a bit each.
    used: u64,
    finished: Finished,
}

/// What is to be done when all calls of a device have ended.
#[derive(Default)]
pub(super) struct Finished {
    /// The driver is to be interrupted.
    pub(super) interrupt: bool,
    /// It is to be told of a change of the configuration space.
    pub(super) config: bool,
    /// The queues that want another call, a bit each.
    pub(super) again: u64,
    /// Why the device can't go on before the user has done something, and after how long all queues want another
    /// call, whatever happens.
    pub(super) stuck: Option<(Duration, String)>,
}

impl<'a> Rings<'a> {
    pub(super) fn new(queues: &'a mut [Queue], memory: &'a Memory, halt: Halt<'a>) -> Self {
        Self {
            queues,
            memory,
            left: BATCH,
            halt,
            used: 0,
            finished: Finished::default(),
        }
    }

    /// The guest's memory.
    #[must_use]
    pub fn memory(&self) -> &'a Memory {
        self.memory
    }

    /// What a device asks that is long at one chain; the chain is then put back.
    pub fn halt(&self) -> Halt<'a> {
        self.halt
    }

    /// How many chains the driver can make available in `queue`.
    #[must_use]
    pub fn size(&self, queue: usize) -> usize {
        let ring = self.queues.get(queue);
        ring.map_or(0, |ring| ring.size().into())
    }

    /// Has `queue` processed again at once, or when the machine goes on.
    pub fn again(&mut self, queue: usize) {
        self.finished.again |= 1 << queue;
    }

    /// Takes the next chain from `queue`, if there is one, the call has not taken its share, and the machine is not
    /// to halt.
    ///
    /// # Errors
    ///
    /// The ring is none.
    pub fn pop(&mut self, queue: usize) -> Result<Option<Chain<'a>>, Fault> {
        let Some(ring) = self.queues.get_mut(queue).filter(|ring| ring.ready()) else {
            return Ok(None);
        };
        // The second look is for a chain that came just before its kick was asked for.
        for _ in 0..2 {
            if self.left == 0 || (self.halt)() {
                self.again(queue);
                return Ok(None);
            }
            if let Some(chain) = ring.iter(self.memory)?.next() {
                self.left -= 1;
                return Ok(Some(chain));
            }
            // Without event indices the driver kicks each time.
            if !ring.event_idx_enabled() || !ring.enable_notification(self.memory)? {
                return Ok(None);
            }
        }
        Err(Fault::Guest(
            "the available ring lies outside the memory".into(),
        ))
    }

    /// Puts the chain that was taken last from `queue` back: it will be the next one.
    pub fn put_back(&mut self, queue: usize) {
        if let Some(ring) = self.queues.get_mut(queue) {
            ring.go_to_previous_position();
        }
    }

    /// Gives `chain` back to the driver by `queue`, with `length` bytes written to it.
    ///
    /// # Errors
    ///
    /// The ring is none.
    pub fn push(&mut self, queue: usize, chain: &Chain<'_>, length: u32) -> Result<(), Fault> {
        if let Some(ring) = self.queues.get_mut(queue) {
            ring.add_used(self.memory, chain.head_index(), length)?;
            self.used |= 1 << queue;
        }
        Ok(())
    }

    /// Gives chains back that belong together, each with the bytes written to it: the driver sees none of them
    /// before it sees all.
    ///
    /// # Errors
    ///
    /// The ring is none.
    pub fn push_all(&mut self, queue: usize, chains: &[(Chain<'_>, u32)]) -> Result<(), Fault> {
        let (Some(ring), Some(((last, length), others))) =
            (self.queues.get_mut(queue), chains.split_last())
        else {
            return Ok(());
        };
        let mut next = ring.next_used();
        for (chain, length) in others {
            let head = chain.head_index();
            let place = next.checked_rem(ring.size()).filter(|_| head < ring.size());
            let place = u64::from(place.ok_or(virtio_queue::Error::InvalidDescriptorIndex)?);
            let offset = USED_ELEMENTS + place * USED_ELEMENT;
            let at = GuestAddress(ring.used_ring()).checked_add(offset);
            self.memory
                .write_obj(
                    (u64::from(head) | (u64::from(*length) << 32)).to_le(),
                    at.ok_or(virtio_queue::Error::AddressOverflow)?,
                )
                .map_err(virtio_queue::Error::GuestMemory)?;
            next = next.wrapping_add(1);
        }
        // The index that the driver looks at moves with the last one alone. The queue does not count the others
        // when it finds out whether the driver has asked for an interrupt at one of them.
        self.finished.interrupt |= ring.event_idx_enabled() && !others.is_empty();
        ring.set_next_used(next);
        self.push(queue, last, *length)
    }

    /// The configuration space has changed.
    pub fn config_changed(&mut self) {
        self.finished.config = true;
    }

    /// The device can't go on before the user has done what `reason` says: the guest is to be paused, and
    /// all queues are processed again when it goes on, or after `delay`.
    pub fn stuck(&mut self, delay: Duration, reason: String) {
        self.finished.stuck = Some((delay, reason));
    }

    /// A call of the device has ended: the next one has a share of its own.
    pub(super) fn next_share(&mut self) {
        self.left = BATCH;
    }

    /// All calls have ended.
    ///
    /// # Errors
    ///
    /// A ring is none.
    pub(super) fn finish(mut self) -> Result<Finished, Fault> {
        for (index, queue) in self.queues.iter_mut().enumerate() {
            if self.used & (1 << index) != 0 && queue.needs_notification(self.memory)? {
                // Without event indices the driver has a flag, which the library does not look at.
                self.finished.interrupt |= queue.event_idx_enabled() || {
                    let flags = GuestAddress(queue.avail_ring());
                    let flags: u16 = self.memory.read_obj(flags).unwrap_or(0);
                    flags & VRING_AVAIL_F_NO_INTERRUPT as u16 == 0
                };
            }
        }
        Ok(self.finished)
    }
}
