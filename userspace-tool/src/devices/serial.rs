// SPDX-License-Identifier: GPL-2.0

//! The first serial port, a 16550 (vm-superio's), and its interrupt.

use std::io;
use std::sync::Arc;

use kvm_ioctls::VmFd;
use serde::{Deserialize, Serialize};
use vm_superio::serial::{SerialEvents, SerialState};
use vm_superio::Trigger;

use crate::console::{Output, Wake};

/// The first of its ports.
pub const BASE: u16 = 0x3f8;
/// The number of its ports.
pub const PORTS: u8 = 8;
/// The last of them.
pub const LAST: u16 = BASE + PORTS as u16 - 1;
/// Its interrupt: the GSI is the number of the ISA interrupt.
pub const IRQ: u32 = 4;

/// The serial port, with its interrupt and the console behind it.
pub type Serial = vm_superio::Serial<Line, Drained, Output>;

/// An edge-triggered interrupt line into the in-kernel interrupt controllers.
///
/// It is raised by ioctls and not by an irqfd: the thread that raises it is the virtual CPU's own, between
/// two runs, and so the guest has the interrupt when it runs on. An irqfd would hand it to a worker of the
/// host's kernel that has to get the CPU first.
pub struct Line(pub Arc<VmFd>);

impl Trigger for Line {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.set_irq_line(IRQ, true)?;
        Ok(self.0.set_irq_line(IRQ, false)?)
    }
}

/// How [`SerialState`] is kept outside.
#[derive(Serialize, Deserialize)]
#[serde(remote = "SerialState", deny_unknown_fields)]
pub(super) struct State {
    baud_divisor_low: u8,
    baud_divisor_high: u8,
    interrupt_enable: u8,
    interrupt_identification: u8,
    line_control: u8,
    line_status: u8,
    modem_control: u8,
    modem_status: u8,
    scratch: u8,
    in_buffer: Vec<u8>,
}

/// Takes over a state. Says whether it could.
pub(super) fn load(serial: &mut Serial, state: &SerialState) -> bool {
    let line = Line(Arc::clone(&serial.interrupt_evt().0));
    let drained = Drained(serial.events().0.clone());
    let output = serial.writer().clone();
    Serial::from_state(state, line, drained, output)
        .map(|new| *serial = new)
        .is_ok()
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
