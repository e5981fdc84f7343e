// SPDX-License-Identifier: GPL-2.0

//! The first serial port, a 16550 (vm-superio's), and its interrupt.

use std::io;
use std::sync::Arc;

use kvm_ioctls::{Cap, Kvm, VmFd};
use vm_superio::serial::SerialEvents;
use vm_superio::Trigger;
use vmm_sys_util::eventfd::EventFd;

use crate::console::{Output, Wake};
use crate::error::{failed, Result};

/// The first of its ports.
pub const BASE: u16 = 0x3f8;
/// The number of its ports.
pub const PORTS: u16 = 8;
/// Its interrupt: the GSI is the number of the ISA interrupt.
pub const IRQ: u32 = 4;

/// The serial port, with its interrupt and the console behind it.
pub type Serial = vm_superio::Serial<Line, Drained, Output>;

/// An edge-triggered interrupt line into the in-kernel interrupt controllers.
pub enum Line {
    /// By an eventfd that the hypervisor listens to: one system call an interrupt.
    Irqfd(EventFd),
    /// By an ioctl, where the hypervisor has no irqfd: two system calls.
    Ioctl(Arc<VmFd>),
}

impl Line {
    /// Connects [`IRQ`] in the way that the hypervisor offers.
    ///
    /// # Errors
    ///
    /// [`crate::error::Error::Call`] where the hypervisor refuses what it offers.
    pub fn new(kvm: &Kvm, vm: Arc<VmFd>) -> Result<Self> {
        if !kvm.check_extension(Cap::Irqfd) {
            return Ok(Self::Ioctl(vm));
        }
        let event = EventFd::new(0).map_err(failed("making an eventfd"))?;
        vm.register_irqfd(&event, IRQ)
            .map_err(failed("connecting the serial port's interrupt"))?;
        Ok(Self::Irqfd(event))
    }
}

impl Trigger for Line {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        match self {
            Self::Irqfd(event) => event.write(1),
            Self::Ioctl(vm) => {
                vm.set_irq_line(IRQ, true)?;
                Ok(vm.set_irq_line(IRQ, false)?)
            }
        }
    }
}

/// Tells the console when the guest has read all that was typed, so that it hands over more.
pub struct Drained(pub Wake);

impl SerialEvents for Drained {
    fn buffer_read(&self) {}
    fn out_byte(&self) {}
    fn tx_lost_byte(&self) {}

    fn in_buffer_empty(&self) {
        self.0.wake();
    }
}
