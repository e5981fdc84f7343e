// SPDX-License-Identifier: GPL-2.0

//! An IOAPIC with 24 pins (Intel 82093AA).

use super::destination::{
    matches, ApicIdentity, DeliveryMode, InterruptMessage, Shorthand, Source,
};
use super::vector_set::VectorSet;
use super::{high_half, low_half, LineOutcome, LineSource, TriggerMode};
use crate::x86::vector::Vector;

/// The number of pins.
pub const PINS: usize = 24;
/// The guest-physical address of the registers.
pub const BASE_ADDRESS: u64 = 0xfec0_0000;
/// The size of the registers' window, in bytes.
pub const WINDOW_SIZE: u64 = 0x100;

/// The registers that a guest reaches directly.
const SELECT: u8 = 0x00;
const WINDOW: u8 = 0x10;
/// The registers behind the window.
const REGISTER_ID: u8 = 0;
const REGISTER_VERSION: u8 = 1;
const REGISTER_ARBITRATION: u8 = 2;
const REGISTER_FIRST_ENTRY: u8 = 0x10;
/// The version register: version 0x11, which has no EOI register, and the highest pin.
const VERSION: u32 = 0x11 | (23 << 16);

/// An entry of the redirection table (82093AA, 3.2.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Entry(u64);

impl Entry {
    const RESET: Self = Self(Self::MASKED);
    const LOGICAL: u64 = 1 << 11;
    const DELIVERY_STATUS: u64 = 1 << 12;
    const REMOTE_IRR: u64 = 1 << 14;
    const LEVEL: u64 = 1 << 15;
    const MASKED: u64 = 1 << 16;
    const READ_ONLY: u64 = Self::DELIVERY_STATUS | Self::REMOTE_IRR;
    /// What the entry holds: bits 16:0 and the destination in 63:56.
    const IMPLEMENTED: u64 = 0xff00_0000_0001_ffff;

    const fn vector(self) -> Vector {
        Vector((self.0 & 0xff) as u8)
    }

    const fn is_level(self) -> bool {
        self.0 & Self::LEVEL != 0
    }

    const fn is_masked(self) -> bool {
        self.0 & Self::MASKED != 0
    }

    const fn remote_irr(self) -> bool {
        self.0 & Self::REMOTE_IRR != 0
    }

    const fn message(self) -> InterruptMessage {
        InterruptMessage {
            destination: (self.0 >> 56) as u32,
            logical: self.0 & Self::LOGICAL != 0,
            delivery_mode: DeliveryMode::from_bits(((self.0 >> 8) & 7) as u8),
            vector: self.vector(),
            level: true,
            trigger: TriggerMode::from_bit(self.is_level()),
            shorthand: Shorthand::None,
            redirection_hint: false,
        }
    }

    /// The entry that the owner sets: all bits, but only a level-triggered one can await its EOI.
    const fn restored(value: u64) -> Self {
        let value = value & Self::IMPLEMENTED;
        if value & Self::LEVEL != 0 {
            Self(value)
        } else {
            Self(value & !Self::REMOTE_IRR)
        }
    }

    /// The entry after software wrote `value` to it: read-only bits stay. Remote IRR goes out when
    /// the entry becomes edge-triggered, which is how software ends an interrupt by hand where there
    /// is no EOI register.
    const fn written(self, value: u64) -> Self {
        let value = value & Self::IMPLEMENTED & !Self::READ_ONLY;
        let kept = if value & Self::LEVEL != 0 {
            self.0 & Self::READ_ONLY
        } else {
            self.0 & Self::DELIVERY_STATUS
        };
        Self(value | kept)
    }
}

/// The state that KVM_GET_IRQCHIP and KVM_SET_IRQCHIP carry, field by field `struct
/// kvm_ioapic_state`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IoApicState {
    /// The guest-physical address of the registers. It cannot be moved.
    pub base_address: u64,
    /// The selected register.
    pub select: u32,
    /// The identifier, 0 to 15.
    pub id: u32,
    /// The pins with a request that no message has been sent for: bit n is pin n.
    pub irr: u32,
    /// The redirection table.
    pub redirection: [u64; PINS],
}

/// What a register write asks of the outside.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[must_use]
pub struct IoApicEffect {
    /// The pin whose redirection entry was written. Where its vector or destination is used by
    /// others, it is to be published.
    pub changed: Option<u8>,
    /// The pin was masked before and is not any more.
    pub unmasked: bool,
    /// A message to be delivered, from the pin `changed`.
    pub message: Option<InterruptMessage>,
    /// The pin is one of [`IoApic::set_resampled`] and had a request when it was unmasked: its
    /// resamplers are to be told, and raise it again if it still is high.
    pub resample: bool,
}

/// An IOAPIC.
#[derive(Clone, Debug)]
pub struct IoApic {
    select: u8,
    id: u8,
    /// The pins that have a request: level-triggered ones while they are high, edge-triggered ones
    /// from their edge until they are low again.
    irr: u32,
    /// The edge-triggered pins in `irr` whose message has been sent.
    sent: u32,
    /// The pins whose level is looked at anew when they are unmasked.
    resampled: u32,
    table: [Entry; PINS],
    /// The sources that hold each pin high.
    lines: [u32; PINS],
}

impl Default for IoApic {
    fn default() -> Self {
        Self::new()
    }
}

impl IoApic {
    /// An IOAPIC after reset: all pins are masked.
    pub const fn new() -> Self {
        Self {
            select: 0,
            id: 0,
            irr: 0,
            sent: 0,
            resampled: 0,
            table: [Entry::RESET; PINS],
            lines: [0; PINS],
        }
    }

    /// Reads the register at `offset` bytes into the window.
    pub fn read(&self, offset: u8) -> u32 {
        match offset {
            SELECT => u32::from(self.select),
            WINDOW => self.read_selected(),
            _ => 0,
        }
    }

    fn read_selected(&self) -> u32 {
        match self.select {
            REGISTER_ID | REGISTER_ARBITRATION => u32::from(self.id) << 24,
            REGISTER_VERSION => VERSION,
            register => {
                let entry = selected_pin(register)
                    .and_then(|pin| self.table.get(usize::from(pin)))
                    .map_or(u64::MAX, |entry| entry.0);
                if register & 1 == 0 {
                    low_half(entry)
                } else {
                    high_half(entry)
                }
            }
        }
    }

    /// Writes the register at `offset` bytes into the window.
    pub fn write(&mut self, offset: u8, value: u32) -> IoApicEffect {
        match (offset, self.select) {
            (SELECT, _) => self.select = (value & 0xff) as u8,
            (WINDOW, REGISTER_ID) => self.id = ((value >> 24) & 0xf) as u8,
            (WINDOW, register) => {
                if let Some(pin) = selected_pin(register) {
                    return self.write_entry(pin, register & 1 != 0, value);
                }
            }
            _ => {}
        }
        IoApicEffect::default()
    }

    fn write_entry(&mut self, pin: u8, high: bool, value: u32) -> IoApicEffect {
        let Some(entry) = self.table.get_mut(usize::from(pin)) else {
            return IoApicEffect::default();
        };
        let before = *entry;
        let value = if high {
            (before.0 & 0xffff_ffff) | (u64::from(value) << 32)
        } else {
            (before.0 & !0xffff_ffff) | u64::from(value)
        };
        let after = before.written(value);
        *entry = after;
        let mut effect = IoApicEffect {
            changed: Some(pin),
            unmasked: before.is_masked() && !after.is_masked(),
            ..IoApicEffect::default()
        };
        let bit = pin_bit(pin);
        if after.is_level() && !after.is_masked() && !after.remote_irr() && self.irr & bit != 0 {
            // A resampled line may have fallen while it was masked, and only its device knows.
            if self.resampled & bit != 0 {
                self.irr &= !bit;
                effect.resample = true;
            } else {
                effect.message = self.service(pin);
            }
        }
        effect
    }

    /// Sends the message of a pin with a request, unless it is masked or its last one has not ended.
    fn service(&mut self, pin: u8) -> Option<InterruptMessage> {
        let entry = self.table.get_mut(usize::from(pin))?;
        if entry.is_masked() || (entry.is_level() && entry.remote_irr()) {
            return None;
        }
        if entry.is_level() {
            entry.0 |= Entry::REMOTE_IRR;
        } else {
            self.sent |= pin_bit(pin);
        }
        Some(entry.message())
    }

    /// Drives the pin `pin` from `source`. The pin is high while any source holds it so.
    pub fn set_line(&mut self, pin: u8, source: LineSource, level: bool) -> LineOutcome {
        let Some(drivers) = self.lines.get_mut(usize::from(pin)) else {
            return LineOutcome::Ignored;
        };
        if level {
            *drivers |= source.bit();
        } else {
            *drivers &= !source.bit();
        }
        let level = *drivers != 0;
        self.set_level(pin, level)
    }

    fn set_level(&mut self, pin: u8, level: bool) -> LineOutcome {
        let Some(entry) = self.table.get(usize::from(pin)).copied() else {
            return LineOutcome::Ignored;
        };
        let bit = pin_bit(pin);
        if !level {
            self.irr &= !bit;
            return LineOutcome::Taken;
        }
        let requested = self.irr & bit != 0;
        self.irr |= bit;
        if !entry.is_level() {
            self.sent &= !bit;
            if requested {
                return LineOutcome::Coalesced;
            }
        }
        self.service(pin)
            .map_or(LineOutcome::Ignored, LineOutcome::Send)
    }

    /// Takes back that the message of a level-triggered pin is under way, because no APIC took it:
    /// the pin's next change sends another.
    pub fn undelivered(&mut self, pin: u8) {
        if let Some(entry) = self.table.get_mut(usize::from(pin)) {
            entry.0 &= !Entry::REMOTE_IRR;
        }
    }

    /// The pins whose entry has the vector `vector`: bit n is pin n.
    pub fn pins_with_vector(&self, vector: Vector) -> u32 {
        self.pins_where(|entry| entry.vector() == vector)
    }

    fn pins_where(&self, condition: impl Fn(Entry) -> bool) -> u32 {
        let mut pins = 0;
        for (pin, entry) in (0u8..).zip(self.table) {
            if condition(entry) {
                pins |= pin_bit(pin);
            }
        }
        pins
    }

    /// Ends the interrupts of the vector `vector`: clears remote IRR of the level-triggered pins that
    /// have it, and calls `deliver` with each pin that is still high and its next message. Who lowers
    /// a pin at its EOI does so before this, see [`IoApic::pins_with_vector`].
    pub fn eoi(&mut self, vector: Vector, mut deliver: impl FnMut(u8, InterruptMessage)) {
        for pin in PinsOf(self.pins_where(|entry| entry.is_level() && entry.vector() == vector)) {
            if let Some(entry) = self.table.get_mut(usize::from(pin)) {
                entry.0 &= !Entry::REMOTE_IRR;
            }
            if self.irr & pin_bit(pin) == 0 {
                continue;
            }
            if let Some(message) = self.service(pin) {
                deliver(pin, message);
            }
        }
    }

    /// Sets the pins whose level is asked for when they are unmasked, bit n for pin n, because an
    /// irqfd with a resampler drives them.
    pub fn set_resampled(&mut self, pins: u32) {
        self.resampled = pins;
    }

    /// The vectors of the edge-triggered pins in `watched`, bit n for pin n, whose messages go to the APIC
    /// `identity`: those whose EOI it is to tell though it does not broadcast it.
    pub fn watched_vectors(
        &self,
        identity: &ApicIdentity,
        source: Source,
        watched: u32,
    ) -> VectorSet {
        let mut vectors = VectorSet::EMPTY;
        for (pin, entry) in (0u8..).zip(self.table) {
            let told = !entry.is_level() && watched & pin_bit(pin) != 0;
            if told && matches(identity, &entry.message(), source) {
                vectors.insert(entry.vector());
            }
        }
        vectors
    }

    /// The message of `pin` as its entry stands, masked or not.
    pub fn message(&self, pin: u8) -> Option<InterruptMessage> {
        self.table
            .get(usize::from(pin))
            .map(|entry| entry.message())
    }

    /// The state.
    pub fn state(&self) -> IoApicState {
        let mut redirection = [0; PINS];
        for (slot, entry) in redirection.iter_mut().zip(self.table) {
            *slot = entry.0;
        }
        IoApicState {
            base_address: BASE_ADDRESS,
            select: u32::from(self.select),
            id: u32::from(self.id),
            irr: self.irr & !self.sent,
            redirection,
        }
    }

    /// Sets the state, and calls `deliver` with the messages of the pins that have a request. What
    /// drives the lines stays.
    pub fn set_state(
        &mut self,
        state: &IoApicState,
        mut deliver: impl FnMut(u8, InterruptMessage),
    ) {
        self.select = (state.select & 0xff) as u8;
        self.id = (state.id & 0xf) as u8;
        self.irr = 0;
        self.sent = 0;
        for (entry, value) in self.table.iter_mut().zip(state.redirection) {
            *entry = Entry::restored(value);
        }
        for pin in PinsOf(state.irr) {
            if let LineOutcome::Send(message) = self.set_level(pin, true) {
                deliver(pin, message);
            }
        }
    }
}

/// The pins of a set, bit n being pin n. Bits beyond the last pin are not in it.
struct PinsOf(u32);

impl Iterator for PinsOf {
    type Item = u8;

    #[inline]
    fn next(&mut self) -> Option<u8> {
        let left = self.0 & 0x00ff_ffff;
        if left == 0 {
            return None;
        }
        // The lowest bit goes out; a value that is not 0 has one below bit 32.
        self.0 = left & left.wrapping_sub(1);
        Some((left.trailing_zeros() & 31) as u8)
    }
}

#[inline]
const fn pin_bit(pin: u8) -> u32 {
    1u32.wrapping_shl(pin as u32)
}

/// The pin whose entry the register `register` is half of.
#[inline]
fn selected_pin(register: u8) -> Option<u8> {
    let pin = register.checked_sub(REGISTER_FIRST_ENTRY)? >> 1;
    (usize::from(pin) < PINS).then_some(pin)
}

#[cfg(test)]
mod tests;
