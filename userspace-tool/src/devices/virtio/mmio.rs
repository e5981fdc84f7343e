// SPDX-License-Identifier: GPL-2.0

//! The MMIO transport, version 2 (virtio 1.3, 4.2): a device's registers, its rings, its interrupt and its
//! worker thread.

use std::io::{self, Read};
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use kvm_ioctls::{IoEventAddress, VmFd};
use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_DRIVER_OK as DRIVER_OK, VIRTIO_CONFIG_S_FEATURES_OK as FEATURES_OK,
    VIRTIO_CONFIG_S_NEEDS_RESET as NEEDS_RESET, VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_mmio as register;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::{Queue, QueueState, QueueT};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EventFd, EFD_CLOEXEC, EFD_NONBLOCK};

use super::balloon::Pages;
use super::rings::{self, Finished, Halt};
use super::{bit, Counter, Device, Fault, Rings};
use crate::devices::lock;
use crate::error::{failed, say, Error, Result};
use crate::machine::Control;
use crate::memory::Memory;

const MAGIC: u32 = u32::from_le_bytes(*b"virt");
const VERSION: u32 = 2;
/// Nobody registers these numbers.
const VENDOR: u32 = u32::from_le_bytes(*b"RVSR");
/// Features that all devices here offer: no legacy driver, indirect descriptors, event indices.
const FEATURES: u64 =
    bit(VIRTIO_F_VERSION_1) | bit(VIRTIO_RING_F_INDIRECT_DESC) | bit(VIRTIO_RING_F_EVENT_IDX);
/// All queues of a device, a bit each.
pub(super) const EVERYTHING: u64 = u64::MAX;

/// A device on the transport.
pub struct Transport {
    state: Mutex<State>,
    /// What messages call the device.
    pub name: String,
    /// What the device counts, by its names.
    pub counters: Vec<(&'static str, Counter)>,
    balloon: Option<Arc<Pages>>,
    status: AtomicU32,
    interrupts: AtomicU32,
    generation: AtomicU32,
    interrupt: EventFd,
    kicks: Vec<EventFd>,
    wake: EventFd,
    memory: Memory,
}

/// What the driver and the worker change, one after the other.
struct State {
    device: Box<dyn Device>,
    queues: Vec<Queue>,
    registers: Registers,
    paused: bool,
    /// What is wrong was said once.
    told: bool,
}

/// What the driver has written to the registers.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
struct Registers {
    device_features_select: u32,
    driver_features_select: u32,
    driver_features: u64,
    queue_select: u32,
}

/// The state of a transport, as it is kept outside.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Saved {
    status: u32,
    interrupts: u32,
    generation: u32,
    registers: Registers,
    queues: Vec<SavedQueue>,
    device: Vec<u8>,
}

/// The state of a queue, as it is kept outside.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
struct SavedQueue(#[serde(with = "QueueFields")] QueueState);

/// How [`QueueState`] is kept outside.
#[derive(Deserialize, Serialize)]
#[serde(remote = "QueueState")]
struct QueueFields {
    max_size: u16,
    next_avail: u16,
    next_used: u16,
    event_idx_enabled: bool,
    size: u16,
    ready: bool,
    desc_table: u64,
    avail_ring: u64,
    used_ring: u64,
}

fn eventfd() -> Result<EventFd> {
    EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK).map_err(failed("making an eventfd"))
}

impl Transport {
    /// A device whose guest has `memory`.
    ///
    /// # Errors
    ///
    /// [`Error::Call`] where no more file descriptors can be had.
    pub fn new(device: Box<dyn Device>, memory: Memory) -> Result<Self> {
        let queues = device
            .queue_sizes()
            .iter()
            .map(|size| Queue::new(*size))
            .collect::<std::result::Result<Vec<_>, _>>()
            .map_err(failed("making a queue"))?;
        let kicks = queues.iter().map(|_| eventfd()).collect::<Result<_>>()?;
        Ok(Self {
            name: device.name(),
            counters: device.counters(),
            balloon: device.balloon(),
            status: AtomicU32::new(0),
            interrupts: AtomicU32::new(0),
            generation: AtomicU32::new(0),
            interrupt: eventfd()?,
            kicks,
            wake: eventfd()?,
            memory,
            state: Mutex::new(State {
                device,
                queues,
                registers: Registers::default(),
                paused: false,
                told: false,
            }),
        })
    }

    /// Joins the device to `vm`: its registers lie at `address`, its interrupt is `gsi`.
    ///
    /// # Errors
    ///
    /// [`Error::Call`] where the hypervisor refuses.
    pub fn connect(&self, vm: &VmFd, address: u64, gsi: u32) -> Result<()> {
        let notify = address + u64::from(register::VIRTIO_MMIO_QUEUE_NOTIFY);
        for (queue, kick) in (0_u32..).zip(&self.kicks) {
            vm.register_ioevent(kick, &IoEventAddress::Mmio(notify), queue)
                .map_err(failed("joining a queue to an eventfd"))?;
        }
        vm.register_irqfd(&self.interrupt, gsi)
            .map_err(failed("joining an interrupt to an eventfd"))
    }

    /// The guest reads its registers at `offset`, as many bytes as `data` has.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some(at) = offset.checked_sub(register::VIRTIO_MMIO_CONFIG.into()) {
            let config = lock(&self.state).device.config();
            let from = usize::try_from(at).ok().and_then(|at| config.get(at..));
            let _ = from.unwrap_or_default().read(data);
        } else if data.len() == 4 {
            data.copy_from_slice(&self.read_register(offset as u32).to_le_bytes());
        }
    }

    fn read_register(&self, offset: u32) -> u32 {
        match offset {
            register::VIRTIO_MMIO_MAGIC_VALUE => MAGIC,
            register::VIRTIO_MMIO_VERSION => VERSION,
            register::VIRTIO_MMIO_VENDOR_ID => VENDOR,
            register::VIRTIO_MMIO_INTERRUPT_STATUS => self.interrupts.load(Ordering::SeqCst),
            register::VIRTIO_MMIO_STATUS => self.status.load(Ordering::SeqCst),
            register::VIRTIO_MMIO_CONFIG_GENERATION => self.generation.load(Ordering::SeqCst),
            // There is no shared memory.
            register::VIRTIO_MMIO_SHM_LEN_LOW..=register::VIRTIO_MMIO_SHM_BASE_HIGH => u32::MAX,
            _ => lock(&self.state).read_register(offset),
        }
    }

    /// The guest writes `data` to its registers at `offset`.
    pub fn write(&self, offset: u64, data: &[u8]) {
        if let Some(at) = offset.checked_sub(register::VIRTIO_MMIO_CONFIG.into()) {
            lock(&self.state).device.write_config(at, data);
            return;
        }
        let Ok(bytes) = <[u8; 4]>::try_from(data) else {
            return;
        };
        let value = u32::from_le_bytes(bytes);
        match offset as u32 {
            // The hypervisor takes those that name a queue.
            register::VIRTIO_MMIO_QUEUE_NOTIFY => {}
            register::VIRTIO_MMIO_INTERRUPT_ACK => {
                self.interrupts.fetch_and(!value, Ordering::SeqCst);
            }
            register::VIRTIO_MMIO_STATUS => self.write_status(value),
            register => {
                let status = self.status.load(Ordering::SeqCst);
                lock(&self.state).write_register(register, value, status);
            }
        }
    }

    /// The driver tells how far it is (virtio 1.3, 3.1.1): it adds bits, or resets the device with 0.
    fn write_status(&self, value: u32) {
        let mut state = lock(&self.state);
        let old = self.status.load(Ordering::SeqCst);
        let mut new = old | (value & 0xff);
        if value == 0 {
            state.reset();
            self.interrupts.store(0, Ordering::SeqCst);
            new = 0;
        }
        if new & !old & FEATURES_OK != 0 && !state.accepts_features() {
            new &= !FEATURES_OK;
        }
        if new & !old & DRIVER_OK != 0 && (new & FEATURES_OK == 0 || !state.activate(&self.memory))
        {
            new = (new & !DRIVER_OK) | NEEDS_RESET;
        }
        self.status.store(new, Ordering::SeqCst);
        // There may be work already.
        self.wake();
    }

    /// Raises the interrupt for `why`, a bit of the interrupt status register.
    fn raise(&self, why: u32) {
        self.interrupts.fetch_or(why, Ordering::SeqCst);
        // Fails only where the count is full, and then the interrupt is under way.
        let _ = self.interrupt.write(1);
    }

    fn wake(&self) {
        // Fails only where the count is full, and then the worker is awake.
        let _ = self.wake.write(1);
    }

    /// The configuration space has changed: the driver is told where it is at work.
    fn config_changed(&self) {
        self.generation.fetch_add(1, Ordering::SeqCst);
        if self.status.load(Ordering::SeqCst) & DRIVER_OK != 0 {
            self.raise(register::VIRTIO_MMIO_INT_CONFIG);
        }
    }

    /// Asks the guest for memory, where this is the balloon.
    pub fn set_balloon(&self, bytes: u64) {
        if let Some(pages) = &self.balloon {
            pages.ask_for(bytes);
            self.config_changed();
        }
    }

    /// How many bytes of its memory the guest has left, where this is the balloon.
    #[must_use]
    pub fn balloon(&self) -> Option<u64> {
        self.balloon.as_ref().map(|pages| pages.given())
    }

    /// Lets the device rest: when this returns, the worker does nothing and touches no memory of the guest
    /// until [`resume`](Self::resume), and the device's files have what the guest was told is written.
    ///
    /// # Errors
    ///
    /// What the host answers where the files do not have that. The device rests all the same, and it stays to be written.
    pub fn pause(&self) -> Result<()> {
        let mut state = lock(&self.state);
        state.paused = true;
        state.device.settle()
    }

    /// Lets the device go on with what has come meanwhile.
    pub fn resume(&self) {
        lock(&self.state).paused = false;
        self.wake();
    }

    /// The state of registers, rings and the device. The device must be paused, so that it goes with the memory.
    #[must_use]
    pub fn save(&self) -> Saved {
        let state = lock(&self.state);
        let queues = state.queues.iter().map(|queue| SavedQueue(queue.state()));
        // Before the interrupts: whoever asks for memory takes no lock, and raises one behind that.
        let device = state.device.save();
        Saved {
            status: self.status.load(Ordering::SeqCst),
            interrupts: self.interrupts.load(Ordering::SeqCst),
            generation: self.generation.load(Ordering::SeqCst),
            registers: state.registers.clone(),
            queues: queues.collect(),
            device,
        }
    }

    /// Takes a state over, before the guest runs. The device must be of the kind that it was saved from.
    ///
    /// # Errors
    ///
    /// [`Error::Input`] where it is none of this device.
    pub fn restore(&self, saved: &Saved) -> Result<()> {
        let wrong = || {
            Error::input(
                format!("the saved state of {} is none of it", self.name),
                "restore with the devices that the machine was saved with",
            )
        };
        let mut state = lock(&self.state);
        let features = saved.registers.driver_features;
        if saved.queues.len() != state.queues.len() || features & !state.offered() != 0 {
            return Err(wrong());
        }
        let event_idx_enabled = features & bit(VIRTIO_RING_F_EVENT_IDX) != 0;
        let queues = saved
            .queues
            .iter()
            .zip(&state.queues)
            .map(|(saved, queue)| {
                Queue::try_from(QueueState {
                    max_size: queue.max_size(),
                    event_idx_enabled,
                    ..saved.0
                })
            });
        let queues = queues
            .collect::<std::result::Result<_, _>>()
            .map_err(|_| wrong())?;
        if !state.device.restore(&saved.device) {
            return Err(wrong());
        }
        state.queues = queues;
        state.registers = saved.registers.clone();
        if saved.status & DRIVER_OK != 0 {
            state.device.activate(features);
        }
        self.status.store(saved.status, Ordering::SeqCst);
        self.interrupts.store(saved.interrupts, Ordering::SeqCst);
        self.generation.store(saved.generation, Ordering::SeqCst);
        if saved.interrupts != 0 {
            // It may have been under way.
            self.raise(0);
        }
        self.wake();
        Ok(())
    }

    /// The worker: serves the queues until the guest has ended, and closes the device. Calls `stuck` with the
    /// reason, each time that it finds the device unable to go on before the user has done something.
    ///
    /// # Errors
    ///
    /// [`Error::Call`] where the host fails.
    pub fn work(&self, control: &Control, stuck: impl Fn(&str)) -> Result<()> {
        let events = self
            .watch()
            .map_err(|error| Error::call("watching a device's queues", error))?;
        let mut todo = 0;
        let mut retry = None;
        while !control.ended() {
            let timeout = if todo == 0 {
                retry
            } else {
                Some(Duration::ZERO)
            };
            todo |= wait(&events, timeout)
                .map_err(|error| Error::call(format!("waiting for {}", self.name), error))?;
            if todo == 0 && retry.is_some() {
                todo = EVERYTHING;
            }
            let finished = self.serve(todo, &|| control.ended() || control.paused())?;
            todo = finished.again;
            retry = finished.stuck.map(|(delay, reason)| {
                stuck(&reason);
                delay
            });
        }
        if let Err(error) = lock(&self.state).device.settle() {
            // How the guest ended is decided, and this is not why.
            say(error);
        }
        Ok(())
    }

    /// What the worker waits for, with the queues that each event is for. Edges: each write to an eventfd is one, so
    /// that nobody must read it.
    fn watch(&self) -> io::Result<Epoll> {
        let events = Epoll::new()?;
        let add = |file: RawFd, queues: u64, set: EventSet| {
            let event = EpollEvent::new(set | EventSet::EDGE_TRIGGERED, queues);
            events.ctl(ControlOperation::Add, file, event)
        };
        for (queue, kick) in self.kicks.iter().enumerate() {
            add(kick.as_raw_fd(), 1 << queue, EventSet::IN)?;
        }
        add(self.wake.as_raw_fd(), EVERYTHING, EventSet::IN)?;
        if let Some(source) = lock(&self.state).device.source() {
            add(source.as_raw_fd(), EVERYTHING, EventSet::IN | EventSet::OUT)?;
        }
        Ok(events)
    }

    /// Serves the queues that have a bit in `todo`, until `halt`. Says what is to be done next.
    ///
    /// # Errors
    ///
    /// [`Error::Call`] where the host fails.
    pub(super) fn serve(&self, todo: u64, halt: Halt<'_>) -> Result<Finished> {
        let mut guard = lock(&self.state);
        let state = &mut *guard;
        let status = self.status.load(Ordering::SeqCst);
        if state.paused || status & (DRIVER_OK | NEEDS_RESET) != DRIVER_OK {
            // Resuming and becoming ready wake the worker for everything.
            return Ok(Finished::default());
        }
        let mut rings = Rings::new(&mut state.queues, &self.memory, halt);
        let mut result = Ok(());
        for queue in (0..self.kicks.len()).filter(|queue| todo & (1 << queue) != 0) {
            rings.next_share();
            result = result.and_then(|()| state.device.process(queue, &mut rings));
        }
        match result.and_then(|()| rings.finish()) {
            Ok(finished) => {
                if finished.interrupt {
                    self.raise(register::VIRTIO_MMIO_INT_VRING);
                }
                if finished.config {
                    self.config_changed();
                }
                Ok(finished)
            }
            Err(Fault::Host(error)) => Err(error),
            Err(Fault::Guest(reason)) => {
                self.status.fetch_or(NEEDS_RESET, Ordering::SeqCst);
                self.raise(register::VIRTIO_MMIO_INT_CONFIG);
                if !std::mem::replace(&mut state.told, true) {
                    say(format_args!(
                        "{} stops until the guest resets it: {reason}",
                        self.name
                    ));
                }
                Ok(Finished::default())
            }
        }
    }

    #[cfg(test)]
    pub(super) fn interrupted(&self) -> bool {
        self.interrupt.read().is_ok()
    }
}

/// Waits for events, no longer than `timeout`. Returns the queues that they are for.
fn wait(events: &Epoll, timeout: Option<Duration>) -> io::Result<u64> {
    let timeout = timeout.map_or(-1, |timeout| {
        i32::try_from(timeout.as_millis()).unwrap_or(i32::MAX)
    });
    let mut list = [EpollEvent::default(); 8];
    match events.wait(timeout, &mut list) {
        Ok(count) => Ok(list[..count]
            .iter()
            .fold(0, |all, event| all | event.data())),
        // The signal that tells of the guest's end.
        Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(0),
        Err(error) => Err(error),
    }
}

/// Where among the features the 32 lie that a driver has selected; there are 64.
fn half(select: u32) -> Option<u32> {
    (select < 2).then(|| 32 * select)
}

impl State {
    fn offered(&self) -> u64 {
        self.device.features() | FEATURES
    }

    fn read_register(&self, offset: u32) -> u32 {
        let queue = self.queues.get(self.registers.queue_select as usize);
        match offset {
            register::VIRTIO_MMIO_DEVICE_ID => self.device.id(),
            register::VIRTIO_MMIO_DEVICE_FEATURES => half(self.registers.device_features_select)
                .map_or(0, |shift| (self.offered() >> shift) as u32),
            register::VIRTIO_MMIO_QUEUE_NUM_MAX => queue.map_or(0, |queue| queue.max_size().into()),
            register::VIRTIO_MMIO_QUEUE_READY => queue.map_or(0, |queue| queue.ready().into()),
            _ => 0,
        }
    }

    fn write_register(&mut self, offset: u32, value: u32, status: u32) {
        let registers = &mut self.registers;
        match offset {
            register::VIRTIO_MMIO_DEVICE_FEATURES_SEL => registers.device_features_select = value,
            register::VIRTIO_MMIO_DRIVER_FEATURES_SEL => registers.driver_features_select = value,
            register::VIRTIO_MMIO_QUEUE_SEL => registers.queue_select = value,
            register::VIRTIO_MMIO_DRIVER_FEATURES if status & FEATURES_OK == 0 => {
                if let Some(shift) = half(registers.driver_features_select) {
                    registers.driver_features &= !(0xffff_ffff << shift);
                    registers.driver_features |= u64::from(value) << shift;
                }
            }
            _ if status & DRIVER_OK == 0 => self.write_queue(offset, value),
            _ => {}
        }
    }

    /// The driver tells where the selected queue is. The queue takes no value that can't be right.
    fn write_queue(&mut self, offset: u32, value: u32) {
        let Some(queue) = self.queues.get_mut(self.registers.queue_select as usize) else {
            return;
        };
        if offset == register::VIRTIO_MMIO_QUEUE_READY {
            queue.set_ready(value & 1 != 0);
            return;
        }
        if queue.ready() {
            return;
        }
        // An address is in two registers, its low half first.
        let (low, high) = match offset & 4 {
            0 => (Some(value), None),
            _ => (None, Some(value)),
        };
        match offset & !4 {
            _ if offset == register::VIRTIO_MMIO_QUEUE_NUM => {
                queue.set_size(value.try_into().unwrap_or(0));
            }
            register::VIRTIO_MMIO_QUEUE_DESC_LOW => queue.set_desc_table_address(low, high),
            register::VIRTIO_MMIO_QUEUE_AVAIL_LOW => queue.set_avail_ring_address(low, high),
            register::VIRTIO_MMIO_QUEUE_USED_LOW => queue.set_used_ring_address(low, high),
            _ => {}
        }
    }

    /// Whether the driver has taken no feature that was not offered, and the one that is needed.
    fn accepts_features(&self) -> bool {
        let features = self.registers.driver_features;
        features & !self.offered() == 0 && features & bit(VIRTIO_F_VERSION_1) != 0
    }

    /// Starts the device, where the rings that are ready lie in the guest's `memory`.
    fn activate(&mut self, memory: &Memory) -> bool {
        let features = self.registers.driver_features;
        let event_idx = features & bit(VIRTIO_RING_F_EVENT_IDX) != 0;
        for queue in self.queues.iter_mut().filter(|queue| queue.ready()) {
            if !rings::lie_in(memory, queue) {
                return false;
            }
            queue.set_event_idx(event_idx);
        }
        self.device.activate(features);
        true
    }

    fn reset(&mut self) {
        self.device.reset();
        self.queues.iter_mut().for_each(Queue::reset);
        self.registers = Registers::default();
    }
}

#[cfg(test)]
mod tests;
