// SPDX-License-Identifier: GPL-2.0

//! The first serial port, a 16550 (vm-superio's), and its interrupt.

use std::io;
use std::sync::Arc;

use kvm_ioctls::VmFd;
use vm_superio::serial::{SerialEvents, SerialState};
use vm_superio::Trigger;

use crate::console::{Output, Wake};

/// The first of its ports.
pub const BASE: u16 = 0x3f8;
/// The number of its ports.
pub const PORTS: u16 = 8;
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

/// Its registers, in the order of [`SerialState`], and what it has received.
#[must_use]
pub(super) fn save(serial: &Serial) -> ([u8; 9], Vec<u8>) {
    let state = serial.state();
    let registers = [
        state.baud_divisor_low,
        state.baud_divisor_high,
        state.interrupt_enable,
        state.interrupt_identification,
        state.line_control,
        state.line_status,
        state.modem_control,
        state.modem_status,
        state.scratch,
    ];
    (registers, state.in_buffer)
}

/// Takes over what [`save`] gave. Says whether it could.
pub(super) fn load(serial: &mut Serial, (registers, in_buffer): &([u8; 9], Vec<u8>)) -> bool {
    let [baud_divisor_low, baud_divisor_high, interrupt_enable, interrupt_identification, line_control, line_status, modem_control, modem_status, scratch] =
        *registers;
    let state = SerialState {
        baud_divisor_low,
        baud_divisor_high,
        interrupt_enable,
        interrupt_identification,
        line_control,
        line_status,
        modem_control,
        modem_status,
        scratch,
        in_buffer: in_buffer.clone(),
    };
    let line = Line(Arc::clone(&serial.interrupt_evt().0));
    let drained = Drained(serial.events().0.clone());
    let output = serial.writer().clone();
    Serial::from_state(&state, line, drained, output)
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
