// SPDX-License-Identifier: GPL-2.0

//! What userspace asks to be done with a guest's writes in its stead: ring a doorbell (KVM_IOEVENTFD), or
//! put them by for later (KVM_REGISTER_COALESCED_MMIO).
//!
//! The lists are kept by the owner, in slices of its own; this is what is in them and how it is found.

pub mod coalesced;
pub mod doorbell;

/// An address space that a guest writes devices in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Bus {
    /// Guest-physical memory.
    Memory,
    /// I/O ports.
    Port,
}

/// A request that is not a legal one: EINVAL.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Invalid;

/// The little-endian value of a write of 1, 2, 4 or 8 bytes; none for other widths.
#[inline]
fn value_of(data: &[u8]) -> Option<u64> {
    if !matches!(data.len(), 1 | 2 | 4 | 8) {
        return None;
    }
    Some(
        data.iter()
            .rev()
            .fold(0, |value, byte| (value << 8) | u64::from(*byte)),
    )
}
