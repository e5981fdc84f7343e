// SPDX-License-Identifier: GPL-2.0

//! The console (virtio 1.3, 5.3), with one port.

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex};

use virtio_bindings::virtio_ids::VIRTIO_ID_CONSOLE;

use super::{broken, Device, Fault, Rings};
use crate::console::{Output, Wake};
use crate::devices::lock;
use crate::error::failed;

const RECEIVE: usize = 0;
/// How much of one buffer is written: what a driver sends at once is far shorter.
const MOST: usize = 1 << 20;
/// How much is read at once.
const PIECE: usize = 4096;

/// What was typed, on its way from the console's thread to the device.
#[derive(Clone)]
pub struct Keyboard {
    typed: Arc<Mutex<VecDeque<u8>>>,
    device: Wake,
    console: Wake,
}

impl Keyboard {
    /// A keyboard; `console` wakes the console's thread when more can be typed.
    ///
    /// # Errors
    ///
    /// No more file descriptors can be had.
    pub fn new(console: Wake) -> std::io::Result<Self> {
        Ok(Self {
            typed: Arc::default(),
            device: Wake::new()?,
            console,
        })
    }

    /// Takes what was typed, once the guest has what was typed before.
    pub fn take(&self, typed: &mut VecDeque<u8>) {
        let mut waiting = lock(&self.typed);
        if waiting.is_empty() && !typed.is_empty() {
            waiting.append(typed);
            self.device.wake();
        }
    }
}

/// The console.
pub struct Console {
    keyboard: Keyboard,
    output: Output,
}

impl Console {
    /// A console that types with `keyboard` and shows on `output`.
    #[must_use]
    pub fn new(keyboard: Keyboard, output: Output) -> Self {
        Self { keyboard, output }
    }

    fn receive(&mut self, rings: &mut Rings<'_>) -> Result<(), Fault> {
        let mut typed = lock(&self.keyboard.typed);
        if typed.is_empty() {
            return Ok(());
        }
        while !typed.is_empty() {
            let Some(chain) = rings.pop(RECEIVE)? else {
                return Ok(());
            };
            let mut writer = chain.clone().writer(rings.memory())?;
            let count = writer.write(typed.make_contiguous()).map_err(broken)?;
            typed.drain(..count);
            rings.push(RECEIVE, &chain, count as u32)?;
        }
        self.keyboard.console.wake();
        Ok(())
    }

    fn transmit(&mut self, queue: usize, rings: &mut Rings<'_>) -> Result<(), Fault> {
        while let Some(chain) = rings.pop(queue)? {
            let mut reader = chain.clone().reader(rings.memory())?.take(MOST as u64);
            let mut piece = [0; PIECE];
            loop {
                let count = reader.read(&mut piece).map_err(broken)?;
                if count == 0 {
                    break;
                }
                self.output
                    .write_all(&piece[..count])
                    .map_err(failed("writing the console"))?;
            }
            rings.push(queue, &chain, 0)?;
        }
        Ok(())
    }
}

impl Device for Console {
    fn id(&self) -> u32 {
        VIRTIO_ID_CONSOLE
    }

    fn name(&self) -> String {
        "console".into()
    }

    fn queue_sizes(&self) -> &[u16] {
        &[64, 64]
    }

    fn process(&mut self, queue: usize, rings: &mut Rings<'_>) -> Result<(), Fault> {
        match queue {
            RECEIVE => self.receive(rings),
            _ => self.transmit(queue, rings),
        }
    }

    fn source(&self) -> Option<BorrowedFd<'_>> {
        Some(self.keyboard.device.as_fd())
    }
}

#[cfg(test)]
mod tests;
