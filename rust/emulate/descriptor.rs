// SPDX-License-Identifier: GPL-2.0

//! Segment descriptors outside IA-32e mode (SDM vol. 3, 3.4.5), as a task switch reads them.

use super::task::TaskMachine;
use crate::x86::{
    address::Gva,
    segment::{AccessRights, Segment},
};

/// What a system descriptor stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SystemType {
    LocalTable,
    Task16,
    Task32,
}

/// Eight bytes of a descriptor table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Descriptor(u64);

/// Bit 8 of the descriptor's second half: accessed, by code and data.
const ACCESSED: u64 = 1 << 40;
/// Bit 9: busy, of a TSS.
const BUSY: u64 = 1 << 41;
/// Bits of the type of code and data (SDM vol. 3, table 3-1).
const CODE: u8 = 8;
const CONFORMING: u8 = 4;
/// Of code: readable; of data: writable.
const READ_OR_WRITE: u8 = 2;

/// Whether a selector names nothing: index 0 of the global table.
pub(super) const fn is_null(selector: u16) -> bool {
    selector & !3 == 0
}

/// Whether a selector names an entry of the local table.
pub(super) const fn is_local(selector: u16) -> bool {
    selector & 4 != 0
}

/// A register into which nothing usable was loaded.
pub(super) const fn unusable(selector: u16) -> Segment {
    Segment {
        selector,
        base: 0,
        limit: 0,
        access: AccessRights(AccessRights::UNUSABLE),
    }
}

/// A register in virtual-8086 mode.
pub(super) const fn virtual_8086_segment(selector: u16) -> Segment {
    Segment {
        selector,
        base: (selector as u64) << 4,
        limit: 0xffff,
        // Present, privilege level 3, accessed writable data (SDM vol. 3, 28.3.1.2).
        access: AccessRights(0xf3),
    }
}

/// The address of a selector's entry, or `None` past the table's limit.
fn address((base, limit): (u64, u32), selector: u16) -> Option<Gva> {
    let offset = u32::from(selector & !7);
    (offset.saturating_add(7) <= limit).then(|| Gva::new(base.wrapping_add(offset.into())))
}

/// Reads a selector's entry of the table. `None` past its limit.
///
/// # Errors
///
/// The machine's.
pub(super) fn read<M: TaskMachine>(
    machine: &mut M,
    table: (u64, u32),
    selector: u16,
) -> Result<Option<Descriptor>, M::Stop> {
    let Some(address) = address(table, selector) else {
        return Ok(None);
    };
    let mut bytes = [0; 8];
    machine.read(address, &mut bytes)?;
    Ok(Some(Descriptor(u64::from_le_bytes(bytes))))
}

/// Writes it.
///
/// # Errors
///
/// The machine's.
pub(super) fn write<M: TaskMachine>(
    machine: &mut M,
    table: (u64, u32),
    selector: u16,
    value: Descriptor,
) -> Result<(), M::Stop> {
    match address(table, selector) {
        Some(address) => machine.write(address, &value.0.to_le_bytes()),
        None => Ok(()),
    }
}

impl Descriptor {
    fn access(self) -> AccessRights {
        AccessRights(((self.0 >> 40) & 0xf0ff) as u32)
    }

    pub(super) fn is_present(self) -> bool {
        self.access().is_present()
    }

    pub(super) fn system_type(self) -> Option<SystemType> {
        let access = self.access();
        match access.kind() {
            _ if access.is_code_or_data() => None,
            2 => Some(SystemType::LocalTable),
            1 | 3 => Some(SystemType::Task16),
            9 | 11 => Some(SystemType::Task32),
            _ => None,
        }
    }

    pub(super) fn with_busy(self, busy: bool) -> Self {
        Self(if busy { self.0 | BUSY } else { self.0 & !BUSY })
    }

    pub(super) fn accessed(self) -> Self {
        Self(self.0 | ACCESSED)
    }

    /// The register that this is loaded into.
    pub(super) fn segment(self, selector: u16) -> Segment {
        let access = self.access();
        let limit = (((self.0 & 0xffff) | ((self.0 >> 32) & 0xf_0000)) & 0xf_ffff) as u32;
        Segment {
            selector,
            base: ((self.0 >> 16) & 0xff_ffff) | ((self.0 >> 32) & 0xff00_0000),
            limit: if access.is_granular() {
                (limit << 12) | 0xfff
            } else {
                limit
            },
            access,
        }
    }

    /// Code that runs at `level`.
    pub(super) fn may_be_code(self, selector: u16, level: u8) -> bool {
        let access = self.access();
        let privilege = access.privilege();
        access.is_code_or_data()
            && access.kind() & CODE != 0
            && (selector & 3) as u8 == level
            && if access.kind() & CONFORMING != 0 {
                privilege <= level
            } else {
                privilege == level
            }
    }

    /// A stack for `level`.
    pub(super) fn may_be_stack(self, selector: u16, level: u8) -> bool {
        let access = self.access();
        access.is_code_or_data()
            && access.kind() & (CODE | READ_OR_WRITE) == READ_OR_WRITE
            && access.privilege() == level
            && (selector & 3) as u8 == level
    }

    /// Data that `level` can read.
    pub(super) fn may_be_data(self, selector: u16, level: u8) -> bool {
        let access = self.access();
        let kind = access.kind();
        let readable = kind & CODE == 0 || kind & READ_OR_WRITE != 0;
        let conforming = kind & (CODE | CONFORMING) == CODE | CONFORMING;
        access.is_code_or_data()
            && readable
            && (conforming || access.privilege() >= level.max((selector & 3) as u8))
    }
}
