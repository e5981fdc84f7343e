// SPDX-License-Identifier: GPL-2.0

//! The devices that are not the hypervisor's, on the I/O ports where a PC has them.

pub mod cmos;
pub mod debug;
pub mod fwcfg;
pub mod power;
pub mod serial;
pub mod virtio;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_ioctls::VmFd;
use serde::{Deserialize, Serialize};
use vm_superio::serial::SerialState;

use crate::error::{failed, Error, Result};
use crate::machine::Control;
use crate::outcome::Outcome;
use cmos::Cmos;
use debug::Debug;
use fwcfg::FwCfg;
use power::{Power, SCI};
use serial::Serial;

/// The keyboard controller's ports: data 0x60, command 0x64. The hypervisor's PIT has 0x61 between them. All that it does
/// is to pull the CPU's reset line, at this command; vm-superio's does no more.
const I8042: u16 = 0x60;
const I8042_COMMAND: u16 = 0x64;
const I8042_RESET: u8 = 0xfe;
/// What nobody answers reads as all ones, as on a bus.
const NOBODY: u8 = 0xff;

/// Locks, whatever became of the thread that had the lock last: every device's state is plain registers,
/// of which any value is one the guest could have written.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The state of the devices on I/O ports, as it is kept outside. The keyboard controller has none.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Saved {
    #[serde(with = "serial::State")]
    serial: SerialState,
    cmos: Cmos,
    power: Power,
    /// How far firmware has read what it is to know.
    config: Option<(u16, usize)>,
}

/// The I/O ports.
pub struct Ports {
    control: Control,
    /// The serial port, which the console feeds too.
    pub serial: Mutex<Serial>,
    cmos: Mutex<Cmos>,
    /// What firmware is to know of its machine.
    config: Option<Mutex<FwCfg>>,
    /// The port on which firmware tells what it does, where somebody listens.
    debug: Option<Debug>,
    power: Mutex<Power>,
    vm: Arc<VmFd>,
}

impl Ports {
    /// The ports of a machine that `control` ends, with those devices, the last two for firmware; their interrupts go
    /// to `vm`.
    #[must_use]
    pub fn new(
        control: Control,
        vm: Arc<VmFd>,
        serial: Serial,
        cmos: Cmos,
        config: Option<FwCfg>,
        debug: Option<Debug>,
    ) -> Self {
        Self {
            serial: Mutex::new(serial),
            cmos: Mutex::new(cmos),
            config: config.map(Mutex::new),
            debug,
            power: Mutex::new(Power::default()),
            control,
            vm,
        }
    }

    /// Presses the power button.
    ///
    /// # Errors
    ///
    /// [`Error::Call`] where its interrupt can't be raised.
    pub fn press_power_button(&self) -> Result<()> {
        self.with_power(Power::press_button)
    }

    /// The devices' state, and what `with` gives while the serial port can't interrupt the guest.
    ///
    /// # Errors
    ///
    /// What `with` gives.
    pub fn save<T>(&self, with: impl FnOnce() -> Result<T>) -> Result<(Saved, T)> {
        let serial = lock(&self.serial);
        let saved = Saved {
            serial: serial.state(),
            cmos: lock(&self.cmos).clone(),
            power: lock(&self.power).save(),
            config: self.config.as_ref().map(|config| lock(config).place()),
        };
        Ok((saved, with()?))
    }

    /// Takes a state over, before the guest runs. The state of the interrupt controllers is to follow.
    ///
    /// # Errors
    ///
    /// [`Error::Input`] where it is none.
    pub fn load(&self, saved: &Saved) -> Result<()> {
        let done = serial::load(&mut lock(&self.serial), &saved.serial) && saved.cmos.is_whole();
        if !done {
            return Err(Error::input(
                "the snapshot's state of devices is none",
                "use another snapshot",
            ));
        }
        *lock(&self.cmos) = saved.cmos.clone();
        *lock(&self.power) = saved.power.save();
        if let (Some(config), Some(place)) = (&self.config, saved.config) {
            lock(config).go_to(place);
        }
        Ok(())
    }

    /// Raises the level-triggered interrupts of a state that was taken over, once the interrupt controllers have
    /// theirs.
    ///
    /// # Errors
    ///
    /// [`Error::Call`] where the hypervisor refuses.
    pub fn interrupt_again(&self) -> Result<()> {
        self.interrupt(&lock(&self.power))
    }

    fn interrupt(&self, power: &Power) -> Result<()> {
        self.vm
            .set_irq_line(SCI.into(), power.interrupts())
            .map_err(failed("setting the interrupt of ACPI"))
    }

    /// Does something with ACPI's registers; the interrupt follows them.
    fn with_power<T>(&self, work: impl FnOnce(&mut Power) -> T) -> Result<T> {
        let mut power = lock(&self.power);
        let before = power.interrupts();
        let result = work(&mut power);
        if power.interrupts() != before {
            self.interrupt(&power)?;
        }
        Ok(result)
    }

    /// The guest writes `data` to `port`.
    ///
    /// The exit tells the number of bytes, not whether they are one access or the items of a string
    /// instruction. Devices of 8 bits take them one after another at the same port, which is right for a
    /// string; nobody writes wider than 8 bits to such a device.
    ///
    /// # Errors
    ///
    /// [`Error::Call`] where an interrupt can't be raised, or the console can't be written.
    pub fn write(&self, port: u16, data: &[u8]) -> Result<()> {
        match port {
            serial::BASE..=serial::LAST => {
                let mut serial = lock(&self.serial);
                for byte in data {
                    serial
                        .write((port - serial::BASE) as u8, *byte)
                        .map_err(failed("the serial port"))?;
                }
            }
            debug::PORT => {
                if let Some(debug) = &self.debug {
                    debug.write(data).map_err(failed("writing the console"))?;
                }
            }
            fwcfg::SELECTOR => {
                if let Some(config) = &self.config {
                    lock(config).select(data);
                }
            }
            cmos::INDEX | cmos::DATA => {
                let mut cmos = lock(&self.cmos);
                data.iter().for_each(|byte| cmos.write(port, *byte));
            }
            I8042_COMMAND if data.contains(&I8042_RESET) => self.control.end(Outcome::Rebooted),
            _ => {
                if let Some(outcome) = self.with_power(|power| power.write(port, data))? {
                    self.control.end(outcome);
                }
            }
        }
        Ok(())
    }

    /// The guest reads from `port` as many bytes as `data` has.
    pub fn read(&self, port: u16, data: &mut [u8]) {
        data.fill(NOBODY);
        match port {
            serial::BASE..=serial::LAST => {
                let mut serial = lock(&self.serial);
                data.fill_with(|| serial.read((port - serial::BASE) as u8));
            }
            debug::PORT if self.debug.is_some() => data.fill(debug::LISTENING),
            fwcfg::DATA => {
                if let Some(config) = &self.config {
                    lock(config).read(data);
                }
            }
            cmos::INDEX | cmos::DATA => data.fill(lock(&self.cmos).read(port)),
            I8042 | I8042_COMMAND => data.fill(0),
            _ => lock(&self.power).read(port, data),
        }
    }
}
