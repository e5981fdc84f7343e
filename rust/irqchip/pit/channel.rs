// SPDX-License-Identifier: GPL-2.0

//! One counter of an 8254.

use super::{nanoseconds_of, ticks_in, Edges};
use crate::irqchip::Nanoseconds;

/// The state of a channel, field by field `struct kvm_pit_channel_state`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ChannelState {
    /// The count that was loaded, 1 to 65536, in BCD where `bcd` says so.
    pub count: u32,
    /// The count that is latched.
    pub latched_count: u16,
    /// Which bytes of it remain to be read: 0 none, 1 the low one, 2 the high one, 3 both.
    pub count_latched: u8,
    /// A status is latched.
    pub status_latched: u8,
    /// The status that is latched.
    pub status: u8,
    /// The next byte to be read: 1 low, 2 high, 3 low and then high, 4 high after low.
    pub read_state: u8,
    /// The next byte to be written, likewise.
    pub write_state: u8,
    /// The low byte of a count that is being written.
    pub write_latch: u8,
    /// The bytes that are read and written: 1 low, 2 high, 3 both.
    pub rw_mode: u8,
    /// The mode, 0 to 5; 0xff before the first control word.
    pub mode: u8,
    /// The channel counts in BCD: 0 or 1.
    pub bcd: u8,
    /// The gate: 0 or 1.
    pub gate: u8,
    /// When the count was loaded, in nanoseconds of the host's monotonic clock.
    pub count_load_time: i64,
}

/// Which bytes of a count are read or written, as a control word sets it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Access {
    Low,
    High,
    Both,
}

impl Access {
    /// What bits 5:4 of a control word ask for; `None` is the latch command.
    pub(super) const fn from_control(word: u8) -> Option<Self> {
        Self::from_number((word >> 4) & 3)
    }

    const fn from_number(number: u8) -> Option<Self> {
        match number {
            1 => Some(Self::Low),
            2 => Some(Self::High),
            3 => Some(Self::Both),
            _ => None,
        }
    }

    const fn number(self) -> u8 {
        match self {
            Self::Low => 1,
            Self::High => 2,
            Self::Both => 3,
        }
    }
}

/// What a read or write in two bytes comes to next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Turn {
    Low,
    High,
    LowOfBoth,
    HighOfBoth,
}

impl Turn {
    const fn first(access: Access) -> Self {
        match access {
            Access::Low => Self::Low,
            Access::High => Self::High,
            Access::Both => Self::LowOfBoth,
        }
    }

    const fn next(self) -> Self {
        match self {
            Self::LowOfBoth => Self::HighOfBoth,
            Self::HighOfBoth => Self::LowOfBoth,
            other => other,
        }
    }

    const fn is_low(self) -> bool {
        matches!(self, Self::Low | Self::LowOfBoth)
    }

    const fn number(self) -> u8 {
        match self {
            Self::Low => 1,
            Self::High => 2,
            Self::LowOfBoth => 3,
            Self::HighOfBoth => 4,
        }
    }

    const fn from_number(number: u8) -> Self {
        match number {
            2 => Self::High,
            3 => Self::LowOfBoth,
            4 => Self::HighOfBoth,
            _ => Self::Low,
        }
    }
}

/// The modes (8254, "Mode definitions").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    /// No control word has been written since power-up.
    Unprogrammed,
    /// 0: the output rises when the count has ended.
    TerminalCount,
    /// 1: the gate's rise begins a low pulse of the count's length.
    OneShot,
    /// 2: the output is low for one tick of each count.
    RateGenerator,
    /// 3: the output is high for half of each count.
    SquareWave,
    /// 4: the output is low for one tick when the count has ended.
    SoftwareStrobe,
    /// 5: the same, the count beginning with the gate's rise.
    HardwareStrobe,
}

impl Mode {
    const fn from_number(number: u8) -> Self {
        match number {
            0 => Self::TerminalCount,
            1 => Self::OneShot,
            2 | 6 => Self::RateGenerator,
            3 | 7 => Self::SquareWave,
            4 => Self::SoftwareStrobe,
            5 => Self::HardwareStrobe,
            _ => Self::Unprogrammed,
        }
    }

    const fn number(self) -> u8 {
        match self {
            Self::TerminalCount => 0,
            Self::OneShot => 1,
            Self::RateGenerator => 2,
            Self::SquareWave => 3,
            Self::SoftwareStrobe => 4,
            Self::HardwareStrobe => 5,
            Self::Unprogrammed => 0xff,
        }
    }

    /// Whether the channel counts only after the gate has risen.
    const fn is_triggered(self) -> bool {
        matches!(self, Self::OneShot | Self::HardwareStrobe)
    }

    /// Whether a low gate halts the count.
    const fn is_gated(self) -> bool {
        matches!(
            self,
            Self::TerminalCount | Self::RateGenerator | Self::SquareWave | Self::SoftwareStrobe
        )
    }
}

/// Where a count is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Progress {
    /// It has not begun: there is no count since the control word, or no trigger.
    Waiting,
    /// It began at this moment.
    Since(Nanoseconds),
    /// It was halted after this many nanoseconds.
    Halted(u64),
}

/// The count that goes on until its period ends, where another was loaded meanwhile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Outgoing {
    start: Nanoseconds,
    count: u32,
    until: Nanoseconds,
}

#[derive(Clone, Debug)]
pub(super) struct Channel {
    mode: Mode,
    bcd: bool,
    access: Access,
    read_turn: Turn,
    write_turn: Turn,
    low_byte: u8,
    /// What was loaded, 1 to 0x10000, in BCD where `bcd` says so.
    count: u32,
    /// A control word has been written since, and no count.
    null_count: bool,
    progress: Progress,
    outgoing: Option<Outgoing>,
    gate: bool,
    latched: u16,
    /// Which bytes of `latched` remain to be read.
    latched_bytes: Option<Access>,
    status: Option<u8>,
}

impl Channel {
    pub(super) const fn new(gate: bool, now: Nanoseconds) -> Self {
        Self {
            mode: Mode::Unprogrammed,
            bcd: false,
            access: Access::Low,
            read_turn: Turn::Low,
            write_turn: Turn::Low,
            low_byte: 0,
            count: 0x1_0000,
            null_count: false,
            progress: Progress::Since(now),
            outgoing: None,
            gate,
            latched: 0,
            latched_bytes: None,
            status: None,
        }
    }

    pub(super) const fn gate(&self) -> bool {
        self.gate
    }

    /// Takes a control word for this channel.
    pub(super) fn program(&mut self, access: Access, word: u8) {
        self.access = access;
        self.read_turn = Turn::first(access);
        self.write_turn = Turn::first(access);
        self.mode = Mode::from_number((word >> 1) & 7);
        self.bcd = word & 1 != 0;
        self.null_count = true;
        self.progress = Progress::Waiting;
        self.outgoing = None;
        self.latched_bytes = None;
        self.status = None;
    }

    /// Takes a byte of a count. Gives whether the output's edges are to be counted anew: a count is
    /// complete, or its first byte has stopped the last one.
    pub(super) fn write(&mut self, value: u8, now: Nanoseconds) -> bool {
        let turn = self.write_turn;
        self.write_turn = turn.next();
        let count = match turn {
            Turn::Low => u16::from(value),
            Turn::High => u16::from(value) << 8,
            Turn::LowOfBoth => {
                self.low_byte = value;
                // In mode 0 the first byte stops the count, and the output falls (8254, mode 0).
                if self.mode != Mode::TerminalCount {
                    return false;
                }
                self.progress = Progress::Waiting;
                return true;
            }
            Turn::HighOfBoth => u16::from_le_bytes([self.low_byte, value]),
        };
        self.load(u32::from(count), now);
        true
    }

    /// Loads a count, 0 standing for the greatest.
    fn load(&mut self, count: u32, now: Nanoseconds) {
        let boundary = self.end_of_period(now);
        if let (Some(until), Progress::Since(start)) = (boundary, self.progress) {
            // One that has not ended stays, whatever is loaded before it does.
            if self.outgoing.is_none_or(|outgoing| outgoing.until <= now) {
                let count = self.count;
                self.outgoing = Some(Outgoing {
                    start,
                    count,
                    until,
                });
            }
        }
        self.count = if count == 0 { 0x1_0000 } else { count };
        // A count does not disturb one that a trigger began (8254, modes 1 and 5).
        if !self.mode.is_triggered() {
            self.progress = if self.gate || !self.mode.is_gated() {
                Progress::Since(boundary.unwrap_or(now))
            } else {
                Progress::Halted(0)
            };
        }
        self.null_count = false;
    }

    /// The end of the period that is under way, where the next count waits for it: in the periodic
    /// modes the present one goes on (8254, modes 2 and 3).
    fn end_of_period(&self, now: Nanoseconds) -> Option<Nanoseconds> {
        let Progress::Since(start) = self.progress else {
            return None;
        };
        if self.null_count || !self.is_periodic() || !self.gate {
            return None;
        }
        if let Some(outgoing) = self.outgoing.filter(|outgoing| now < outgoing.until) {
            return Some(outgoing.until);
        }
        let length = binary(self.bcd, self.count);
        let periods = ticks_in(now.since(start)).checked_div(length)?;
        let ticks = periods.saturating_add(1).saturating_mul(length);
        Some(start.after(nanoseconds_of(ticks)))
    }

    const fn is_periodic(&self) -> bool {
        matches!(self.mode, Mode::RateGenerator | Mode::SquareWave)
    }

    pub(super) fn set_gate(&mut self, gate: bool, now: Nanoseconds) {
        let rises = gate && !self.gate;
        let falls = !gate && self.gate;
        self.gate = gate;
        if rises || falls {
            self.outgoing = None;
        }
        self.progress = match (self.mode, self.progress) {
            (Mode::OneShot | Mode::HardwareStrobe, _) if rises && !self.null_count => {
                Progress::Since(now)
            }
            // In the periodic modes the count begins anew.
            (Mode::RateGenerator | Mode::SquareWave, Progress::Halted(_)) if rises => {
                Progress::Since(now)
            }
            (_, Progress::Halted(elapsed)) if rises => {
                Progress::Since(Nanoseconds(now.0.saturating_sub(elapsed)))
            }
            (mode, Progress::Since(start)) if falls && mode.is_gated() => {
                Progress::Halted(now.since(start))
            }
            (_, progress) => progress,
        };
    }

    /// The ticks since the count began, and how long it is, 1 to 65536.
    fn phase(&self, now: Nanoseconds) -> (Option<u64>, u64) {
        if let Some(outgoing) = self.outgoing.filter(|outgoing| now < outgoing.until) {
            let ticks = ticks_in(now.since(outgoing.start));
            return (Some(ticks), binary(self.bcd, outgoing.count));
        }
        let ticks = match self.progress {
            Progress::Waiting => None,
            Progress::Since(start) => Some(ticks_in(now.since(start))),
            Progress::Halted(elapsed) => Some(ticks_in(elapsed)),
        };
        (ticks, binary(self.bcd, self.count))
    }

    /// The counting element, as the guest reads it.
    fn current(&self, now: Nanoseconds) -> u16 {
        let (ticks, length) = self.phase(now);
        let span = if self.bcd { 10_000 } else { 0x1_0000 };
        let ticks = ticks.unwrap_or(0);
        let within = ticks.checked_rem(length).unwrap_or(0);
        let value = match self.mode {
            Mode::RateGenerator => length.wrapping_sub(within),
            // It counts by two, twice in each period.
            Mode::SquareWave => {
                let twice = within.wrapping_mul(2).checked_rem(length).unwrap_or(0);
                length.wrapping_sub(twice)
            }
            // It goes on below 0, from the greatest count.
            _ => length
                .wrapping_add(span)
                .wrapping_sub(ticks.checked_rem(span).unwrap_or(0)),
        };
        let value = value.checked_rem(span).unwrap_or(0);
        if self.bcd {
            to_bcd(value)
        } else {
            (value & 0xffff) as u16
        }
    }

    /// The level of the output.
    pub(super) fn output(&self, now: Nanoseconds) -> bool {
        let (ticks, length) = self.phase(now);
        let Some(ticks) = ticks else {
            // The control word alone sets it: low in mode 0, else high.
            return self.mode != Mode::TerminalCount;
        };
        let within = ticks.checked_rem(length).unwrap_or(0);
        // In the periodic modes a low gate sets the output high at once.
        let halted = matches!(self.progress, Progress::Halted(_));
        match self.mode {
            Mode::TerminalCount | Mode::OneShot | Mode::Unprogrammed => ticks >= length,
            Mode::RateGenerator => halted || within.wrapping_add(1) != length,
            Mode::SquareWave => halted || within < length.div_ceil(2),
            Mode::SoftwareStrobe | Mode::HardwareStrobe => ticks != length,
        }
    }

    /// The rising edges of the output that lie ahead of `now`; `None` where the mode makes none without
    /// a trigger, or nothing counts.
    pub(super) fn edges(&self) -> Option<Edges> {
        let Progress::Since(start) = self.progress else {
            return None;
        };
        let period = binary(self.bcd, self.count);
        match self.mode {
            Mode::TerminalCount | Mode::SoftwareStrobe => Some(Edges::one_after(start, period)),
            Mode::RateGenerator | Mode::SquareWave => Some(Edges::every(start, period)),
            Mode::OneShot | Mode::HardwareStrobe | Mode::Unprogrammed => None,
        }
    }

    /// Keeps the count for reading. A count that is latched already stays.
    pub(super) fn latch_count(&mut self, now: Nanoseconds) {
        if self.latched_bytes.is_none() {
            self.latched = self.current(now);
            self.latched_bytes = Some(self.access);
        }
    }

    /// Keeps the status for reading. A status that is latched already stays.
    pub(super) fn latch_status(&mut self, now: Nanoseconds) {
        if self.status.is_none() {
            self.status = Some(
                (u8::from(self.output(now)) << 7)
                    | (u8::from(self.null_count) << 6)
                    | (self.access.number() << 4)
                    | ((self.mode.number() & 7) << 1)
                    | u8::from(self.bcd),
            );
        }
    }

    /// Reads a byte: of a latched status, a latched count, or the count as it is.
    pub(super) fn read(&mut self, now: Nanoseconds) -> u8 {
        if let Some(status) = self.status.take() {
            return status;
        }
        if let Some(bytes) = self.latched_bytes.take() {
            let [low, high] = self.latched.to_le_bytes();
            return match bytes {
                Access::Low => low,
                Access::High => high,
                Access::Both => {
                    self.latched_bytes = Some(Access::High);
                    low
                }
            };
        }
        let turn = self.read_turn;
        self.read_turn = turn.next();
        let [low, high] = self.current(now).to_le_bytes();
        if turn.is_low() {
            low
        } else {
            high
        }
    }

    pub(super) fn state(&self, now: Nanoseconds) -> ChannelState {
        let start = match self.progress {
            Progress::Waiting => now.0,
            Progress::Since(start) => start.0,
            Progress::Halted(elapsed) => now.0.saturating_sub(elapsed),
        };
        ChannelState {
            count: self.count,
            latched_count: self.latched,
            count_latched: self.latched_bytes.map_or(0, Access::number),
            status_latched: u8::from(self.status.is_some()),
            status: self.status.unwrap_or(0),
            read_state: self.read_turn.number(),
            write_state: self.write_turn.number(),
            write_latch: self.low_byte,
            rw_mode: self.access.number(),
            mode: self.mode.number(),
            bcd: u8::from(self.bcd),
            gate: u8::from(self.gate),
            count_load_time: i64::try_from(start).unwrap_or(i64::MAX),
        }
    }

    pub(super) fn set_state(&mut self, state: &ChannelState, now: Nanoseconds) {
        *self = Self {
            mode: Mode::from_number(state.mode),
            bcd: state.bcd != 0,
            access: Access::from_number(state.rw_mode).unwrap_or(Access::Low),
            read_turn: Turn::from_number(state.read_state),
            write_turn: Turn::from_number(state.write_state),
            low_byte: state.write_latch,
            count: 0,
            null_count: false,
            // What is loaded below begins to count at once.
            progress: Progress::Waiting,
            outgoing: None,
            gate: state.gate != 0,
            latched: state.latched_count,
            latched_bytes: Access::from_number(state.count_latched),
            status: (state.status_latched != 0).then_some(state.status),
        };
        self.load(state.count.min(0x1_0000), now);
    }
}

/// A count in binary; a BCD digit above 9 counts for what it is.
fn binary(bcd: bool, count: u32) -> u64 {
    match (bcd, count) {
        (false, count) => u64::from(count),
        (true, 0x1_0000) => 10_000,
        (true, count) => {
            let digit = |shift: u32| u64::from(count.wrapping_shr(shift) & 0xf);
            digit(0)
                .wrapping_add(digit(4).wrapping_mul(10))
                .wrapping_add(digit(8).wrapping_mul(100))
                .wrapping_add(digit(12).wrapping_mul(1000))
        }
    }
}

/// The four decimal digits of a number below 10000.
fn to_bcd(value: u64) -> u16 {
    let ones = (value % 10) as u16;
    let tens = (value / 10 % 10) as u16;
    let hundreds = (value / 100 % 10) as u16;
    let thousands = (value / 1000 % 10) as u16;
    (thousands << 12) | (hundreds << 8) | (tens << 4) | ones
}
