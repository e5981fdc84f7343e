// SPDX-License-Identifier: GPL-2.0

//! A driver for tests: it sets a device up by its registers, as a guest's does, and serves it in the test's
//! own thread. [`torture`] is a driver that does all wrongly.

use vm_memory::{Bytes, GuestAddress};

use super::{Device, Transport};
use crate::memory::{self, Memory};
use crate::size::MIB;
use virtio_bindings::virtio_mmio as register;

const SIZE: u64 = 2 * MIB;
/// Where the driver's buffers lie.
pub(crate) const BUFFERS: u64 = MIB;
const RING_FLAG_NEXT: u16 = 1;
const RING_FLAG_WRITE: u16 = 2;
const NEEDS_RESET: u32 = 64;

fn descriptors(queue: usize) -> u64 {
    0x1_0000 + queue as u64 * 0x8000
}

fn available(queue: usize) -> u64 {
    descriptors(queue) + 0x4000
}

fn used(queue: usize) -> u64 {
    descriptors(queue) + 0x6000
}

/// A driver of one device.
pub(crate) struct Driver {
    pub(crate) transport: Transport,
    pub(crate) memory: Memory,
    next: Vec<u16>,
}

impl Driver {
    /// Sets `device` up, with all features that it offers.
    pub(crate) fn new(device: Box<dyn Device>) -> Self {
        let memory = memory::allocate(SIZE, 0).unwrap();
        let mut driver = Self {
            transport: Transport::new(device, memory.clone()).unwrap(),
            memory,
            next: Vec::new(),
        };
        driver.set_up(u64::MAX);
        driver
    }

    pub(crate) fn read(&self, offset: u32) -> u32 {
        let mut bytes = [0; 4];
        self.transport.read(offset.into(), &mut bytes);
        u32::from_le_bytes(bytes)
    }

    pub(crate) fn write(&self, offset: u32, value: u32) {
        self.transport.write(offset.into(), &value.to_le_bytes());
    }

    /// Resets the device and sets it up again, with those of its features that are in `mask`.
    pub(crate) fn set_up(&mut self, mask: u64) {
        self.set_up_short(mask, u32::MAX);
    }

    /// The same with queues of so many entries at most.
    pub(crate) fn set_up_short(&mut self, mask: u64, most: u32) {
        self.write(register::VIRTIO_MMIO_STATUS, 0);
        assert_eq!(self.read(register::VIRTIO_MMIO_STATUS), 0);
        self.write(register::VIRTIO_MMIO_STATUS, 3);
        for half in 0..2 {
            self.write(register::VIRTIO_MMIO_DEVICE_FEATURES_SEL, half);
            self.write(register::VIRTIO_MMIO_DRIVER_FEATURES_SEL, half);
            let offered = self.read(register::VIRTIO_MMIO_DEVICE_FEATURES);
            let taken = offered & (mask >> (32 * half)) as u32;
            self.write(register::VIRTIO_MMIO_DRIVER_FEATURES, taken);
        }
        self.write(register::VIRTIO_MMIO_STATUS, 11);
        assert_eq!(self.read(register::VIRTIO_MMIO_STATUS), 11);
        self.next.clear();
        for queue in 0.. {
            self.write(register::VIRTIO_MMIO_QUEUE_SEL, queue);
            let size = self.read(register::VIRTIO_MMIO_QUEUE_NUM_MAX);
            if size == 0 {
                break;
            }
            self.next.push(0);
            let queue = queue as usize;
            // A fresh ring.
            let zeros = vec![0; 0x8000];
            let start = GuestAddress(descriptors(queue));
            self.memory.write_slice(&zeros, start).unwrap();
            self.write(register::VIRTIO_MMIO_QUEUE_NUM, size.min(most));
            self.write(
                register::VIRTIO_MMIO_QUEUE_DESC_LOW,
                descriptors(queue) as u32,
            );
            self.write(
                register::VIRTIO_MMIO_QUEUE_AVAIL_LOW,
                available(queue) as u32,
            );
            self.write(register::VIRTIO_MMIO_QUEUE_USED_LOW, used(queue) as u32);
            self.write(register::VIRTIO_MMIO_QUEUE_READY, 1);
        }
        self.write(register::VIRTIO_MMIO_STATUS, 15);
        assert_eq!(self.read(register::VIRTIO_MMIO_STATUS), 15);
    }

    pub(crate) fn put_descriptor(
        &self,
        queue: usize,
        index: u16,
        address: u64,
        length: u32,
        flags: u16,
        next: u16,
    ) {
        let at = descriptors(queue) + 16 * u64::from(index);
        self.put_descriptor_at(at, address, length, flags, next);
    }

    fn put_descriptor_at(&self, at: u64, address: u64, length: u32, flags: u16, next: u16) {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&address.to_le_bytes());
        bytes[8..12].copy_from_slice(&length.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..].copy_from_slice(&next.to_le_bytes());
        self.memory.write_slice(&bytes, GuestAddress(at)).unwrap();
    }

    /// Makes the chain that begins with `head` available, and does not kick.
    pub(crate) fn offer(&mut self, queue: usize, head: u16) {
        let size = self.queue_size(queue);
        let place = available(queue) + 4 + 2 * u64::from(self.next[queue] % size);
        self.memory.write_obj(head, GuestAddress(place)).unwrap();
        self.next[queue] = self.next[queue].wrapping_add(1);
        let index = GuestAddress(available(queue) + 2);
        self.memory.write_obj(self.next[queue], index).unwrap();
    }

    /// Sets the flags of an available ring.
    pub(crate) fn set_flags(&self, queue: usize, flags: u16) {
        let at = GuestAddress(available(queue));
        self.memory.write_obj(flags, at).unwrap();
    }

    /// Serves the device until it wants no more.
    pub(crate) fn serve(&self, queue: usize) {
        self.serve_all(1 << queue);
    }

    /// Serves what the device's source has become ready for.
    pub(crate) fn serve_source(&self) {
        self.serve_all(super::mmio::EVERYTHING);
    }

    fn serve_all(&self, mut todo: u64) {
        while todo != 0 {
            todo = self.transport.serve(todo, &|| false).unwrap().again;
        }
    }

    /// The element with that number in the used ring: the chain's first descriptor, and the bytes written.
    pub(crate) fn used_element(&self, queue: usize, number: u16) -> (u32, u32) {
        let element = used(queue) + 4 + 8 * u64::from(number);
        let part = |offset| {
            self.memory
                .read_obj(GuestAddress(element + offset))
                .unwrap()
        };
        (part(0), part(4))
    }

    /// How many chains the device has given back, modulo 65536.
    pub(crate) fn used(&self, queue: usize) -> u16 {
        self.memory.read_obj(GuestAddress(used(queue) + 2)).unwrap()
    }

    /// Has one request with `parts` to read and `length` bytes to write done. Returns how many bytes the
    /// device says that it wrote, and these bytes.
    pub(crate) fn request(&mut self, queue: usize, parts: &[&[u8]], length: u32) -> (u32, Vec<u8>) {
        let before = self.used(queue);
        let address = self.put_request(queue, parts, length);
        self.serve(queue);
        assert_eq!(self.used(queue), before.wrapping_add(1), "not given back");
        let element = used(queue) + 4 + 8 * u64::from(before % self.queue_size(queue));
        let written: u32 = self.memory.read_obj(GuestAddress(element + 4)).unwrap();
        let mut bytes = vec![0; length as usize];
        let from = GuestAddress(address);
        self.memory.read_slice(&mut bytes, from).unwrap();
        (written, bytes)
    }

    /// Makes such a request available. Returns where its bytes will be written.
    pub(crate) fn put_request(&mut self, queue: usize, parts: &[&[u8]], length: u32) -> u64 {
        let mut address = BUFFERS;
        let mut index = 0;
        for part in parts {
            let bytes = GuestAddress(address);
            self.memory.write_slice(part, bytes).unwrap();
            let more = (index as usize) + 1 < parts.len() || length > 0;
            let flags = if more { RING_FLAG_NEXT } else { 0 };
            self.put_descriptor(queue, index, address, part.len() as u32, flags, index + 1);
            index += 1;
            address += part.len() as u64;
        }
        if length > 0 {
            self.put_descriptor(queue, index, address, length, RING_FLAG_WRITE, 0);
        }
        self.offer(queue, 0);
        address
    }

    fn queue_size(&self, queue: usize) -> u16 {
        self.write(register::VIRTIO_MMIO_QUEUE_SEL, queue as u32);
        self.read(register::VIRTIO_MMIO_QUEUE_NUM_MAX) as u16
    }

    /// What the device has counted, all that is not 0.
    pub(crate) fn counted(&self) -> Vec<(&'static str, u64)> {
        let counters = self.transport.counters.iter();
        let counted = counters.map(|(name, counter)| (*name, counter.get()));
        counted.filter(|(_, count)| *count > 0).collect()
    }

    pub(crate) fn needs_reset(&self) -> bool {
        self.read(register::VIRTIO_MMIO_STATUS) & NEEDS_RESET != 0
    }
}

/// Numbers that look random and are the same each time (splitmix64).
pub(crate) struct Numbers(pub(crate) u64);

impl Numbers {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// One of `values`.
    pub(crate) fn of<T: Copy>(&mut self, values: &[T]) -> T {
        values[(self.next() % values.len() as u64) as usize]
    }
}

/// Drives the device that `make` makes with descriptors, rings and registers of which few are right. It must
/// neither panic nor run for ever, and be as new after a reset.
pub(crate) fn torture(make: impl Fn() -> Box<dyn Device>) {
    for seed in 0..60 {
        let mut numbers = Numbers(seed);
        let mut driver = Driver::new(make());
        for round in 0..60 {
            torture_once(&mut driver, &mut numbers);
            if driver.needs_reset() || round % 16 == 15 {
                driver.set_up(numbers.of(&[u64::MAX, !(1 << 29), 1 << 32]));
            }
        }
        driver.set_up(u64::MAX);
        driver.serve(0);
        assert!(!driver.needs_reset(), "seed {seed}");
    }
}

fn torture_once(driver: &mut Driver, numbers: &mut Numbers) {
    let queues = driver.next.len();
    let queue = (numbers.next() % queues as u64) as usize;
    // Requests that a device may know, at the places that descriptors name most.
    for part in 0..8 {
        let words = [
            numbers.of(&[0, 1, 4, 8, 11, 13, numbers.0]),
            numbers.of(&[0, 1, 7, 8, u64::MAX, numbers.0]),
            numbers.of(&[0, 1, 1 << 32, u64::MAX]),
        ];
        for (word, value) in words.into_iter().enumerate() {
            let at = GuestAddress(BUFFERS + part * 4096 + 8 * word as u64);
            driver.memory.write_obj(value, at).unwrap();
        }
    }
    // The last four are a table of their own, to which some of the others lead.
    const TABLE: u64 = BUFFERS + 8 * 4096;
    for index in 0..20 {
        let place = BUFFERS + 4096 * (numbers.next() % 8);
        let address = numbers.of(&[place, place, place, place, 0, SIZE - 8, SIZE, u64::MAX]);
        let length = numbers.of(&[16, 16, 1, 0, 512, 4096, 24, 65_536, 1 << 20, u32::MAX]);
        let flags = numbers.of(&[1, 1, 3, 3, 2, 2, 0, 4, 6, 0xffff]);
        let next = numbers.of(&[index + 1, index + 1, index + 1, 0, 5, 0xffff]);
        match (index, flags) {
            (16.., _) => {
                let at = TABLE + 16 * u64::from(index - 16);
                driver.put_descriptor_at(at, address, length, flags, next % 16);
            }
            (_, 4) => driver.put_descriptor(queue, index, TABLE, numbers.of(&[64, 16, 65]), 4, 0),
            _ => driver.put_descriptor(queue, index, address, length, flags, next),
        }
    }
    for _ in 0..numbers.of(&[1, 1, 2, 40]) {
        let head = numbers.of(&[0, 1, 2, 3, 7, 15, 15, 0xffff]);
        driver.offer(queue, head);
    }
    if numbers.next().is_multiple_of(16) {
        let index = numbers.next() as u16;
        let at = GuestAddress(available(queue) + 2);
        driver.memory.write_obj(index, at).unwrap();
        driver.next[queue] = index;
    }
    for _ in 0..2 {
        let offset = numbers.next() % 0x140;
        let width = numbers.of(&[4, 4, 4, 1, 2, 8]);
        // A status of 0 is for the caller.
        if offset != u64::from(register::VIRTIO_MMIO_STATUS) {
            driver.transport.read(offset, &mut [0; 8][..width]);
            let value = numbers.next().to_le_bytes();
            driver.transport.write(offset, &value[..width]);
        }
    }
    driver.serve(queue);
}
