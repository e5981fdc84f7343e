// SPDX-License-Identifier: GPL-2.0

//! The memory balloon (virtio 1.3, 5.5): the guest gives pages back to the host, as many as it is asked for
//! and those that it has free.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::Arc;

use rustix::mm::{madvise, Advice};
use virtio_bindings::virtio_ids::VIRTIO_ID_BALLOON;
use vm_memory::{Address, GuestAddress, GuestMemory, Le32};

use super::{Device, Fault, Rings};
use crate::layout::{self, PAGE_SIZE};
use crate::memory::Memory;

/// The driver takes pages back where it would have to kill a process.
const DEFLATE_ON_OOM: u64 = 1 << 2;
/// The driver tells of pages that are free.
const REPORTING: u64 = 1 << 5;
/// Queues. That for free pages is the third, as the ones for statistics and hints are not offered.
const INFLATE: usize = 0;
const DEFLATE: usize = 1;
/// The most pages of one request to inflate.
const MOST: usize = 1 << 16;

/// How many pages the guest is asked for, and how many it says that it has given.
#[derive(Default)]
pub struct Pages {
    target: AtomicU32,
    actual: AtomicU32,
}

impl Pages {
    /// Asks for whole pages, `bytes` at least.
    pub fn ask_for(&self, bytes: u64) {
        let pages = u32::try_from(bytes.div_ceil(PAGE_SIZE)).unwrap_or(u32::MAX);
        self.target.store(pages, Ordering::SeqCst);
    }

    /// How many bytes the guest has given.
    #[must_use]
    pub fn given(&self) -> u64 {
        u64::from(self.actual.load(Ordering::SeqCst)) * PAGE_SIZE
    }
}

/// The balloon.
pub struct Balloon(Arc<Pages>);

impl Balloon {
    /// A balloon that asks the guest for `bytes`.
    #[must_use]
    pub fn new(bytes: u64) -> Self {
        let pages = Arc::<Pages>::default();
        pages.ask_for(bytes);
        Self(pages)
    }
}

impl Device for Balloon {
    fn id(&self) -> u32 {
        VIRTIO_ID_BALLOON
    }

    fn name(&self) -> String {
        "balloon".into()
    }

    fn features(&self) -> u64 {
        DEFLATE_ON_OOM | REPORTING
    }

    fn queue_sizes(&self) -> &[u16] {
        &[128, 128, 32]
    }

    fn config(&self) -> Vec<u8> {
        let fields = [&self.0.target, &self.0.actual];
        fields
            .map(|field| field.load(Ordering::SeqCst).to_le_bytes())
            .concat()
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        if let (4, Ok(actual)) = (offset, data.try_into()) {
            let actual = u32::from_le_bytes(actual);
            self.0.actual.store(actual, Ordering::SeqCst);
        }
    }

    fn reset(&mut self) {
        self.0.actual.store(0, Ordering::SeqCst);
    }

    fn balloon(&self) -> Option<Arc<Pages>> {
        Some(Arc::clone(&self.0))
    }

    fn save(&self) -> Vec<u8> {
        self.config()
    }

    fn restore(&mut self, saved: &[u8]) -> bool {
        let Ok(bytes) = saved.try_into() else {
            return false;
        };
        let both = u64::from_le_bytes(bytes);
        self.0.target.store(both as u32, Ordering::SeqCst);
        self.0.actual.store((both >> 32) as u32, Ordering::SeqCst);
        true
    }

    fn process(&mut self, queue: usize, rings: &mut Rings<'_>) -> Result<(), Fault> {
        let memory = rings.memory();
        while let Some(chain) = rings.pop(queue)? {
            match queue {
                INFLATE => {
                    let mut reader = chain.clone().reader(memory)?;
                    if reader.available_bytes() > MOST * size_of::<Le32>() {
                        return Err(Fault::Guest("a request has too many pages".into()));
                    }
                    let mut run = 0..0;
                    while let Ok(number) = reader.read_obj::<Le32>() {
                        let page = u64::from(number.to_native()) * PAGE_SIZE;
                        if page != run.end {
                            give_up(memory, run.start, run.end - run.start);
                            run = page..page;
                        }
                        run.end += PAGE_SIZE;
                    }
                    give_up(memory, run.start, run.end - run.start);
                }
                // The pages come back when they are touched.
                DEFLATE => {}
                _ => chain.clone().writable().for_each(|range| {
                    give_up(memory, range.addr().raw_value(), range.len().into());
                }),
            }
            rings.push(queue, &chain, 0)?;
        }
        Ok(())
    }
}

/// Gives the whole pages among `length` bytes from `start` on back to the host's kernel; they read as zeroes
/// then. Does nothing where that is not the guest's RAM.
fn give_up(memory: &Memory, start: u64, length: u64) {
    let Some(first) = start.checked_next_multiple_of(PAGE_SIZE) else {
        return;
    };
    let last = start.saturating_add(length) & !(PAGE_SIZE - 1);
    let count = usize::try_from(last.saturating_sub(first)).unwrap_or(0);
    if count == 0 || layout::is_rom(first) {
        return;
    }
    if let Ok(slice) = memory.get_slice(GuestAddress(first), count) {
        let guard = slice.ptr_guard_mut();
        #[allow(unsafe_code)]
        // SAFETY: The range is `count` bytes of one mapping of the guest's memory, whole pages: regions begin
        // at page bounds on both sides. Rust code reaches that memory by volatile accesses alone, for which
        // it changes as if the guest had written zeroes.
        let result = unsafe { madvise(guard.as_ptr().cast(), count, Advice::LinuxDontNeed) };
        // Locked or huge pages may stay: then the host has less back.
        let _ = result;
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{self, Driver, BUFFERS};
    use super::*;
    use crate::size::MIB;
    use virtio_bindings::virtio_mmio as register;
    use vm_memory::Bytes;

    fn driver() -> Driver {
        Driver::new(Box::new(Balloon::new(0)))
    }

    const AT: u64 = BUFFERS + 0x4_0000;

    fn fill(driver: &Driver) {
        let ones = [1; 3 * PAGE_SIZE as usize];
        driver.memory.write_slice(&ones, GuestAddress(AT)).unwrap();
    }

    /// The first byte of each of three pages.
    fn first_bytes(driver: &Driver) -> [u8; 3] {
        [0, 1, 2].map(|page| {
            let at = GuestAddress(AT + page * PAGE_SIZE);
            driver.memory.read_obj(at).unwrap()
        })
    }

    #[test]
    fn pages_that_inflate_the_balloon_are_given_up() {
        let mut driver = driver();
        fill(&driver);
        let numbers = [AT / PAGE_SIZE, AT / PAGE_SIZE + 1, 0xffff_ffff, MIB];
        let bytes: Vec<u8> = numbers
            .iter()
            .flat_map(|number| (*number as u32).to_le_bytes())
            .collect();
        driver.request(INFLATE, &[&bytes], 0);
        assert_eq!(first_bytes(&driver), [0, 0, 1]);
        driver.request(DEFLATE, &[&bytes], 0);
        assert!(!driver.needs_reset());
    }

    #[test]
    fn free_pages_are_given_up_where_they_are_whole() {
        let mut driver = driver();
        for (from, length, left) in [
            (AT, 2 * PAGE_SIZE, [0, 0, 1]),
            (AT + 1, 2 * PAGE_SIZE, [1, 0, 1]),
            (AT, 3 * PAGE_SIZE - 1, [0, 0, 1]),
            (u64::MAX, 0xffff_ffff, [1, 1, 1]),
        ] {
            fill(&driver);
            driver.put_descriptor(2, 0, from, length as u32, 2, 0);
            driver.offer(2, 0);
            driver.serve(2);
            assert_eq!(first_bytes(&driver), left);
        }
    }

    #[test]
    fn the_target_reaches_the_driver_and_its_answer_the_host() {
        let driver = driver();
        driver.transport.set_balloon(1);
        assert_eq!(driver.read(register::VIRTIO_MMIO_CONFIG), 1);
        driver.transport.set_balloon(5 * MIB);
        assert_eq!(driver.read(register::VIRTIO_MMIO_CONFIG), 1280);
        assert_eq!(driver.read(register::VIRTIO_MMIO_INTERRUPT_STATUS), 2);
        driver.write(register::VIRTIO_MMIO_CONFIG + 4, 256);
        assert_eq!(driver.transport.balloon(), Some(MIB));
    }

    #[test]
    fn nobody_waits_for_the_device_to_ask() {
        let driver = driver();
        let halt = || {
            driver.transport.set_balloon(5 * MIB);
            assert_eq!(driver.transport.balloon(), Some(0));
            false
        };
        // The device has its lock while it looks whether it shall halt.
        driver.transport.serve(1, &halt).expect("no failure");
        assert_eq!(driver.read(register::VIRTIO_MMIO_CONFIG), 1280);
    }

    #[test]
    fn a_snapshot_has_what_it_was_asked_for_and_has_given() {
        let old = driver();
        old.transport.set_balloon(5 * MIB);
        old.write(register::VIRTIO_MMIO_CONFIG + 4, 256);
        let saved = old.transport.save();
        // The option is what it was at the start.
        let new = driver();
        new.transport.set_balloon(7 * MIB);
        new.transport.restore(&saved).expect("it is of a balloon");
        assert_eq!(new.read(register::VIRTIO_MMIO_CONFIG), 1280);
        assert_eq!(new.transport.balloon(), Some(MIB));
        assert_eq!(new.transport.save(), saved);
        // Of another device, and cut short.
        let rng = Driver::new(Box::new(super::super::rng::Rng));
        assert!(new.transport.restore(&rng.transport.save()).is_err());
        assert!(!Balloon::new(0).restore(&[0; 7]));
    }

    #[test]
    fn hostile_rings_do_no_harm() {
        tests::torture(|| Box::new(Balloon::new(u64::MAX)));
    }
}
