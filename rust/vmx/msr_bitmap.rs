// SPDX-License-Identifier: GPL-2.0

//! Which accesses of a guest to MSRs exit (SDM vol. 3, 26.6.9).

use crate::host::page::KernelPage;
use kernel::prelude::*;
use rvisor_core::x86::{address::Hpa, address::PAGE_SIZE, msr::MsrIndex};

/// Where the bitmap for MSRs from 0xc0000000 begins; that of the low ones begins at 0.
const HIGH: usize = 0x400;
/// How far behind the bitmap for reads that for writes is.
const WRITES: usize = 0x800;
/// MSRs in one bitmap.
const COVERED: u32 = 0x2000;

/// The page that a VMCS points at.
pub(crate) struct MsrBitmap(KernelPage);

impl MsrBitmap {
    /// Everything exits.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(crate) fn new() -> Result<Self> {
        let mut bitmap = Self(KernelPage::new()?);
        bitmap.bytes().fill(0xff);
        Ok(bitmap)
    }

    /// Where it is.
    pub(crate) fn physical(&self) -> Hpa {
        self.0.physical()
    }

    fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: The page is whole, initialised and ours. The CPU reads it only while the virtual CPU
        // runs, which it does not while its state is borrowed to change.
        unsafe { core::slice::from_raw_parts_mut(self.0.as_ptr(), PAGE_SIZE as usize) }
    }

    fn set(&mut self, index: MsrIndex, base: usize, exits: bool) {
        let (half, number) = match index.0.checked_sub(0xc000_0000) {
            Some(number) => (HIGH, number),
            None => (0, index.0),
        };
        // Accesses to others always exit.
        if number >= COVERED {
            return;
        }
        let bit = 1u8 << (number % 8);
        if let Some(byte) = self.bytes().get_mut(base + half + (number / 8) as usize) {
            if exits {
                *byte |= bit;
            } else {
                *byte &= !bit;
            }
        }
    }

    /// Says whether reads exit.
    pub(crate) fn set_read_exits(&mut self, index: MsrIndex, exits: bool) {
        self.set(index, 0, exits);
    }

    /// Says whether writes exit.
    pub(crate) fn set_write_exits(&mut self, index: MsrIndex, exits: bool) {
        self.set(index, WRITES, exits);
    }

    /// The guest accesses the MSR by itself.
    pub(crate) fn pass_through(&mut self, index: MsrIndex) {
        self.set_read_exits(index, false);
        self.set_write_exits(index, false);
    }
}
