// SPDX-License-Identifier: GPL-2.0

//! Virtio devices (virtio 1.3) with split rings on the MMIO transport, one worker thread each.
//!
//! [`Device`] is what each kind of device is, [`mmio::Transport`] what they share: the registers, the
//! rings, the interrupt and the thread. A kick reaches the thread through an ioeventfd and an interrupt the
//! guest through an irqfd, so that no CPU of the guest waits for input or output. [`Bus`] is the place of
//! the register pages in the guest's physical addresses.

pub mod balloon;
pub mod block;
pub mod console;
pub mod mmio;
pub mod net;
mod rings;
pub mod rng;

use std::collections::BTreeMap;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;

use kvm_ioctls::VmFd;

use crate::arguments::RunOptions;
use crate::error::{Error, Result};
use crate::layout;
use crate::memory::Memory;
use crate::net::Link;
use crate::stat::counters::Counts;
use balloon::Pages;
pub use mmio::Transport;
pub use rings::{Chain, Rings};

/// A feature, by its number, among all.
pub(crate) const fn bit(feature: u32) -> u64 {
    1 << feature
}

/// A number that only grows: a device's worker adds to it, and anybody reads it without the device's lock.
#[derive(Clone, Debug, Default)]
pub struct Counter(Arc<AtomicU64>);

impl Counter {
    /// Counts `more`.
    pub fn add(&self, more: u64) {
        self.0.fetch_add(more, Ordering::Relaxed);
    }

    /// What was counted.
    #[must_use]
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Why a device could not go on.
#[derive(Debug, thiserror::Error)]
pub enum Fault {
    /// The guest's rings or requests are broken: the device wants a reset (virtio 1.3, 2.1.1). The text names
    /// what is, for the user.
    #[error("{0}")]
    Guest(String),
    /// The host failed: the guest ends.
    #[error(transparent)]
    Host(#[from] Error),
}

impl From<virtio_queue::Error> for Fault {
    fn from(error: virtio_queue::Error) -> Self {
        Self::Guest(error.to_string())
    }
}

/// What reading or writing a chain of the guest's gives where that is none.
fn broken(error: std::io::Error) -> Fault {
    Fault::Guest(error.to_string())
}

/// One kind of virtio device.
///
/// All methods are called with the device's lock held, [`process`](Self::process) by its worker thread. What comes
/// from the guest is hostile: nothing there may panic, loop without a bound or allocate as much as a guest says.
pub trait Device: Send {
    /// The device's number (virtio 1.3, chapter 5).
    fn id(&self) -> u32;

    /// What messages call it: a word, and what tells it from its siblings.
    fn name(&self) -> String;

    /// The features of its kind that it offers. The transport adds those of the rings.
    fn features(&self) -> u64 {
        0
    }

    /// The most entries of each of its queues: powers of 2, at most 16 queues.
    fn queue_sizes(&self) -> &[u16];

    /// Its configuration space, from byte 0 on. What lies behind the end reads as 0.
    fn config(&self) -> Vec<u8> {
        Vec::new()
    }

    /// The guest writes `data` at `offset` of the configuration space.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    /// The driver is ready and has accepted `features`, some of those that were offered.
    fn activate(&mut self, _features: u64) {}

    /// The driver gives the device up: all is as at the start.
    fn reset(&mut self) {}

    /// The guest may have put buffers into `queue`: takes them with [`Rings::pop`] until there are none, and
    /// gives each back with [`Rings::push`]. Called without a reason now and then.
    ///
    /// # Errors
    ///
    /// [`Fault::Guest`] stops the device until its reset, [`Fault::Host`] ends the guest.
    fn process(&mut self, queue: usize, rings: &mut Rings<'_>) -> std::result::Result<(), Fault>;

    /// A file of the host's that the worker watches beside the kicks. Asked for once, at the start. Each time that it
    /// becomes readable or writable all queues are processed, and once for that: what is not read until the file would
    /// block must be remembered and read when a queue is processed that gives room.
    fn source(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    /// What it counts, under the names that [`crate::stat`] tells. Asked for once, at the start.
    fn counters(&self) -> Vec<(&'static str, Counter)> {
        Vec::new()
    }

    /// What the guest is asked for and has given of its memory, where this device asks it. Asked for once, at the start:
    /// nobody who wants to know waits for the device.
    fn balloon(&self) -> Option<Arc<Pages>> {
        None
    }

    /// What it has for a snapshot beside its rings and the transport's registers.
    fn save(&self) -> Vec<u8> {
        Vec::new()
    }

    /// Takes over what [`save`](Self::save) gave. Says whether it is this device's; else nothing changes.
    fn restore(&mut self, saved: &[u8]) -> bool {
        saved.is_empty()
    }

    /// The guest has ended, or is paused: writes what its files do not have yet.
    ///
    /// # Errors
    ///
    /// What the host answers.
    fn settle(&mut self) -> Result<()> {
        Ok(())
    }
}

/// Opens the devices that `options` name, in the order in which the guest finds them; with a `console`, that
/// too.
///
/// # Errors
///
/// [`Error::Input`] where one can't be had.
pub fn open(
    options: &RunOptions,
    console: Option<console::Console>,
) -> Result<Vec<Box<dyn Device>>> {
    let mut devices: Vec<Box<dyn Device>> = Vec::new();
    for disk in &options.disks {
        devices.push(Box::new(block::Block::open(disk)?));
    }
    let machine = options.name.as_ref().map(ToString::to_string);
    for (number, options) in options.net.iter().enumerate() {
        let (link, mac) = Link::open(options, machine.as_deref().unwrap_or_default(), number)?;
        devices.push(Box::new(net::Net::new(number, mac, link)));
    }
    if let Some(console) = console {
        devices.push(Box::new(console));
    }
    devices.push(Box::new(rng::Rng));
    devices.push(Box::new(balloon::Balloon::new(options.balloon)));
    let most = layout::VIRTIO_GSIS.len();
    if devices.len() > most {
        return Err(Error::input(
            format!(
                "{} virtio devices are more than the {most} that a guest has interrupts for",
                devices.len()
            ),
            "leave some out",
        ));
    }
    Ok(devices)
}

/// The register pages of all devices, in the order of their addresses.
#[derive(Clone)]
pub struct Bus(Vec<Arc<Transport>>);

impl Bus {
    /// Gives each of `devices` its page and its interrupt in `vm`, whose guest has `memory`.
    ///
    /// # Errors
    ///
    /// [`Error::Call`] where the hypervisor refuses.
    pub fn new(vm: &VmFd, memory: &Memory, devices: Vec<Box<dyn Device>>) -> Result<Self> {
        let mut transports = Vec::new();
        for (index, device) in devices.into_iter().enumerate() {
            let transport = Transport::new(device, memory.clone())?;
            transport.connect(vm, layout::virtio_page(index), layout::VIRTIO_GSIS[index])?;
            transports.push(Arc::new(transport));
        }
        Ok(Self(transports))
    }

    /// The devices.
    pub fn devices(&self) -> impl Iterator<Item = &Arc<Transport>> {
        self.0.iter()
    }

    /// What the devices have counted, by their names. Two of the same name are disks in one file, and told together.
    #[must_use]
    pub fn counters(&self) -> BTreeMap<String, Counts> {
        let mut all = BTreeMap::<String, Counts>::new();
        for device in &self.0 {
            for (name, counter) in &device.counters {
                let counts = all.entry(device.name.clone()).or_default();
                *counts.entry((*name).to_owned()).or_default() += counter.get();
            }
        }
        all
    }

    /// The guest reads at a physical address as many bytes as `data` has. Where no device is, all bits read
    /// as 1.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        match self.find(address) {
            Some((device, offset)) => device.read(offset, data),
            None => data.fill(0xff),
        }
    }

    /// The guest writes `data` at a physical address.
    pub fn write(&self, address: u64, data: &[u8]) {
        if let Some((device, offset)) = self.find(address) {
            device.write(offset, data);
        }
    }

    /// The device whose page has `address`, and the offset there.
    fn find(&self, address: u64) -> Option<(&Transport, u64)> {
        let offset = address.checked_sub(layout::VIRTIO)?;
        let index = usize::try_from(offset / layout::PAGE_SIZE).ok()?;
        let device = self.0.get(index)?;
        Some((device, offset % layout::PAGE_SIZE))
    }
}

#[cfg(test)]
mod tests;
