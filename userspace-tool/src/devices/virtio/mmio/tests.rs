// SPDX-License-Identifier: GPL-2.0

//! The registers and the worker, with a device that gives each buffer back.

use std::thread;
use std::time::Instant;

use super::super::tests::Driver;
use super::super::{Bus, Rings};
use super::*;
use crate::layout;
use crate::outcome::Outcome;

/// Gives buffers back as they are; its configuration space has what was written to it.
#[derive(Default)]
struct Echo {
    config: [u8; 8],
    active: bool,
}

impl Device for Echo {
    fn id(&self) -> u32 {
        42
    }

    fn name(&self) -> String {
        "echo".into()
    }

    fn features(&self) -> u64 {
        1 << 3
    }

    fn queue_sizes(&self) -> &[u16] {
        &[64, 8]
    }

    fn config(&self) -> Vec<u8> {
        self.config.to_vec()
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        self.config[offset as usize..][..data.len()].copy_from_slice(data);
    }

    fn activate(&mut self, features: u64) {
        self.active = features & (1 << 3) != 0;
    }

    fn process(&mut self, queue: usize, rings: &mut Rings<'_>) -> std::result::Result<(), Fault> {
        assert!(self.active);
        while let Some(chain) = rings.pop(queue)? {
            rings.push(queue, &chain, 0)?;
        }
        Ok(())
    }
}

fn driver() -> Driver {
    Driver::new(Box::<Echo>::default())
}

#[test]
fn the_registers_tell_what_the_device_is() {
    let driver = driver();
    let words = [0, 4, 8].map(|register| driver.read(register));
    assert_eq!(words, [0x7472_6976, 2, 42]);
    let mut byte = [0xff];
    driver.transport.read(0, &mut byte);
    assert_eq!(byte, [0], "registers are read as 4 bytes");
    driver.write(register::VIRTIO_MMIO_QUEUE_SEL, 2);
    assert_eq!(driver.read(register::VIRTIO_MMIO_QUEUE_NUM_MAX), 0);
}

#[test]
fn the_configuration_space_is_read_and_written_by_bytes() {
    let driver = driver();
    driver.transport.write(0x103, &[7, 8]);
    let mut bytes = [0xff; 8];
    driver.transport.read(0x102, &mut bytes);
    assert_eq!(bytes, [0, 7, 8, 0, 0, 0, 0, 0]);
    driver.transport.read(0xffc, &mut bytes);
    assert_eq!(bytes, [0; 8]);
}

#[test]
fn features_that_are_not_offered_are_not_accepted() {
    let driver = driver();
    for (low, high, status) in [(1 << 3, 1, 11), (1 << 4, 1, 3), (1 << 3, 0, 3), (0, 3, 3)] {
        driver.write(register::VIRTIO_MMIO_STATUS, 0);
        driver.write(register::VIRTIO_MMIO_STATUS, 3);
        for (half, value) in [(0, low), (1, high), (2, u32::MAX), (u32::MAX, 7)] {
            driver.write(register::VIRTIO_MMIO_DRIVER_FEATURES_SEL, half);
            driver.write(register::VIRTIO_MMIO_DRIVER_FEATURES, value);
        }
        driver.write(register::VIRTIO_MMIO_STATUS, 11);
        assert_eq!(driver.read(register::VIRTIO_MMIO_STATUS), status);
    }
}

#[test]
fn rings_outside_the_memory_want_a_reset() {
    let mut driver = driver();
    driver.write(register::VIRTIO_MMIO_STATUS, 0);
    driver.write(register::VIRTIO_MMIO_DRIVER_FEATURES_SEL, 1);
    driver.write(register::VIRTIO_MMIO_DRIVER_FEATURES, 1);
    driver.write(register::VIRTIO_MMIO_STATUS, 11);
    driver.write(register::VIRTIO_MMIO_QUEUE_DESC_HIGH, 1);
    driver.write(register::VIRTIO_MMIO_QUEUE_READY, 1);
    driver.write(register::VIRTIO_MMIO_STATUS, 15);
    assert!(driver.needs_reset());
    driver.set_up(u64::MAX);
    driver.request(0, &[&[1]], 0);
}

#[test]
fn the_driver_is_interrupted_as_often_as_it_wants() {
    // With event indices, at the first buffer after the one that it names; without, each time.
    for (mask, wanted) in [(u64::MAX, [true, false]), (!(1 << 29), [true, true])] {
        let mut driver = driver();
        driver.set_up(mask | (1 << 3));
        for interrupted in wanted {
            driver.request(0, &[&[1]], 0);
            assert_eq!(driver.transport.interrupted(), interrupted);
        }
        assert_eq!(driver.read(register::VIRTIO_MMIO_INTERRUPT_STATUS), 1);
        driver.write(register::VIRTIO_MMIO_INTERRUPT_ACK, 1);
        assert_eq!(driver.read(register::VIRTIO_MMIO_INTERRUPT_STATUS), 0);
    }
}

#[test]
fn a_change_of_the_configuration_is_told() {
    let driver = driver();
    driver.transport.config_changed();
    assert!(driver.transport.interrupted());
    assert_eq!(driver.read(register::VIRTIO_MMIO_INTERRUPT_STATUS), 2);
    assert_eq!(driver.read(register::VIRTIO_MMIO_CONFIG_GENERATION), 1);
}

/// A driver that polls wants none.
#[test]
fn a_driver_without_event_indices_switches_interrupts_off() {
    let mut driver = driver();
    driver.set_up(!(1 << 29));
    for flags in [1, 0, 1] {
        driver.set_flags(0, flags);
        driver.request(0, &[&[1]], 0);
        assert_eq!(driver.transport.interrupted(), flags == 0);
    }
}

/// The last bytes of memory are as good as others.
#[test]
fn rings_may_end_where_the_memory_does() {
    for (ring, length) in [
        (register::VIRTIO_MMIO_QUEUE_DESC_LOW, 64 * 16),
        (register::VIRTIO_MMIO_QUEUE_AVAIL_LOW, 6 + 64 * 2),
    ] {
        for beyond in [0, 16] {
            let driver = driver();
            driver.write(register::VIRTIO_MMIO_STATUS, 0);
            driver.write(register::VIRTIO_MMIO_DRIVER_FEATURES_SEL, 1);
            driver.write(register::VIRTIO_MMIO_DRIVER_FEATURES, 1);
            driver.write(register::VIRTIO_MMIO_STATUS, 11);
            driver.write(ring, (2 << 20) - length + beyond);
            driver.write(register::VIRTIO_MMIO_QUEUE_READY, 1);
            driver.write(register::VIRTIO_MMIO_STATUS, 15);
            assert_eq!(driver.needs_reset(), beyond != 0);
        }
    }
}

#[test]
fn more_buffers_than_a_call_takes_all_come_back() {
    let mut driver = driver();
    driver.put_descriptor(0, 0, 0, 0, 0, 0);
    for _ in 0..60 {
        driver.offer(0, 0);
    }
    let finished = driver.transport.serve(1, &|| false).unwrap();
    assert_eq!((driver.used(0), finished.again), (48, 1));
    driver.serve(0);
    assert_eq!(driver.used(0), 60);
    // More than there are places is no ring.
    for _ in 0..65 {
        driver.offer(0, 0);
    }
    driver.serve(0);
    assert!(driver.needs_reset());
}

#[test]
fn the_state_goes_on_in_another_transport() {
    let mut driver = driver();
    driver.request(0, &[&[1]], 0);
    driver.request(1, &[&[1]], 0);
    let saved = serde_json::to_string(&driver.transport.save()).unwrap();
    let other = Transport::new(Box::<Echo>::default(), driver.memory.clone()).unwrap();
    let mut saved: Saved = serde_json::from_str(&saved).unwrap();
    other.restore(&saved).unwrap();
    assert_eq!(other.save(), saved);
    driver.transport = other;
    driver.request(0, &[&[1]], 0);

    saved.queues[0].0.size = 3;
    assert!(driver.transport.restore(&saved).is_err());
    saved.queues.pop();
    assert!(driver.transport.restore(&saved).is_err());
}

#[test]
fn the_worker_serves_kicks_rests_and_ends() {
    let mut driver = driver();
    let (control, _outcomes) = Control::new();
    driver.put_descriptor(0, 0, 0, 0, 0, 0);
    let wait_for = |driver: &Driver, used: u16| {
        let start = Instant::now();
        while driver.used(0) != used && start.elapsed() < Duration::from_secs(10) {
            thread::yield_now();
        }
        assert_eq!(driver.used(0), used);
    };
    let transport =
        std::sync::Arc::new(Transport::new(Box::<Echo>::default(), driver.memory.clone()).unwrap());
    transport.restore(&driver.transport.save()).unwrap();
    let worker = thread::spawn({
        let (transport, control) = (transport.clone(), control.clone());
        move || transport.work(&control, |_| ())
    });
    for used in 1..4 {
        driver.offer(0, 0);
        transport.kicks[0].write(1).unwrap();
        wait_for(&driver, used);
    }
    transport.pause().unwrap();
    driver.offer(0, 0);
    transport.kicks[0].write(1).unwrap();
    thread::sleep(Duration::from_millis(50));
    assert_eq!(driver.used(0), 3);
    transport.resume();
    wait_for(&driver, 4);
    control.end(Outcome::Quit);
    transport.wake();
    worker.join().unwrap().unwrap();
}

#[test]
fn addresses_without_a_device_read_as_ones() {
    let driver = driver();
    let bus = Bus(vec![std::sync::Arc::new(driver.transport)]);
    let mut word = [0; 4];
    for (address, value) in [
        (layout::VIRTIO, 0x7472_6976),
        (layout::VIRTIO + 8, 42),
        (layout::virtio_page(1), u32::MAX),
        (layout::VIRTIO - 4, u32::MAX),
        (u64::MAX, u32::MAX),
    ] {
        bus.read(address, &mut word);
        assert_eq!(u32::from_le_bytes(word), value);
        bus.write(address, &word);
    }
}
