// SPDX-License-Identifier: GPL-2.0

//! The debug console of emulated PCs: firmware prints what it does there, and SeaBIOS its boot prompt too.

use std::io::{self, Write};

use crate::console::Output;

/// Its port.
pub const PORT: u16 = 0x402;
/// What reads there where somebody listens.
pub const LISTENING: u8 = 0xe9;

/// The port, with the console behind it.
pub struct Debug(pub Output);

impl Debug {
    /// The guest prints `text`, whose lines end as Unix has them; a terminal in raw mode wants more.
    ///
    /// # Errors
    ///
    /// What the console's file answers.
    pub fn write(&self, text: &[u8]) -> io::Result<()> {
        let mut output = self.0.clone();
        for byte in text {
            match byte {
                b'\n' => output.write_all(b"\r\n")?,
                byte => output.write_all(std::slice::from_ref(byte))?,
            }
        }
        Ok(())
    }
}
