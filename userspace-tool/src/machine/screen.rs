// SPDX-License-Identifier: GPL-2.0

//! The console's parts, which are there before the devices that show on it.

use std::sync::mpsc::Receiver;

use super::Control;
use crate::arguments::{ConsoleKind, RunOptions};
use crate::console::{Hub, Output, Wake};
use crate::devices::virtio;
use crate::devices::virtio::console::Keyboard;
use crate::error::{failed, Result};
use crate::outcome::Outcome;

/// The console's parts that its thread and the devices have.
pub(super) struct Screen {
    pub(super) wake: Wake,
    pub(super) hub: Hub,
    pub(super) output: Output,
    /// Ends the guest, and how it ended.
    pub(super) control: Control,
    pub(super) outcomes: Receiver<Outcome>,
    /// That of the virtio console, where the guest has one.
    pub(super) keyboard: Option<Keyboard>,
}

impl Screen {
    /// Opens them as `options` say.
    pub(super) fn open(options: &RunOptions) -> Result<Self> {
        let what = "opening the console";
        let wake = Wake::new().map_err(failed(what))?;
        let hub = Hub::new(wake.clone());
        let (here, raw) = (!options.detached, options.raw_console);
        let (control, outcomes) = Control::new();
        let output = Output::new(wake.clone(), hub.clone(), here, raw, control.clone())
            .map_err(failed(what))?;
        let keyboard = match options.console {
            ConsoleKind::Serial => None,
            ConsoleKind::Virtio => Some(Keyboard::new(wake.clone()).map_err(failed(what))?),
        };
        Ok(Self {
            wake,
            hub,
            output,
            control,
            outcomes,
            keyboard,
        })
    }

    /// Opens the virtio devices of the machine, this one's among them.
    pub(super) fn devices(&self, options: &RunOptions) -> Result<Vec<Box<dyn virtio::Device>>> {
        let console = self.keyboard.clone();
        let console =
            console.map(|keyboard| virtio::console::Console::new(keyboard, self.output.clone()));
        virtio::open(options, console)
    }
}
