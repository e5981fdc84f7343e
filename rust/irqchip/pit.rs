// SPDX-License-Identifier: GPL-2.0

//! A PC's 8254 interval timer: channel 0 to line 0 of the interrupt controllers, channel 1 once for
//! memory refresh, channel 2 to the speaker, with the gate and output of the latter at port 0x61.

mod backlog;
mod channel;

pub use channel::ChannelState;

use super::Nanoseconds;
use backlog::Backlog;
use channel::{Access, Channel};

/// The rate that the channels count at, in Hz.
pub const FREQUENCY: u64 = 1_193_182;

/// The shortest period of interrupts, in ticks of the timer: just over 200 microseconds, so that a
/// guest can't keep the host busy with timer interrupts. KVM's min_timer_period_us is the same.
const MIN_PERIOD_TICKS: u64 = 239;

/// The flags of [`PitState`].
mod flag {
    /// KVM_PIT_FLAGS_HPET_LEGACY: an HPET has taken over line 0.
    pub(super) const HPET_LEGACY: u32 = 1;
    /// KVM_PIT_FLAGS_SPEAKER_DATA_ON: bit 1 of port 0x61.
    pub(super) const SPEAKER_DATA_ON: u32 = 2;
}

/// The state that KVM_GET_PIT2 and KVM_SET_PIT2 carry, field by field `struct kvm_pit_state2`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PitState {
    /// The channels.
    pub channels: [ChannelState; 3],
    /// KVM_PIT_FLAGS_HPET_LEGACY and KVM_PIT_FLAGS_SPEAKER_DATA_ON.
    pub flags: u32,
}

/// Rising edges of an output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Edges {
    start: Nanoseconds,
    /// Ticks from `start` to the first edge, and from one to the next where they are periodic.
    period: u64,
    periodic: bool,
    /// There is one at `start` too, with which the count before this one ended.
    at_start: bool,
    /// How many have been told of.
    told: u64,
}

impl Edges {
    const fn one_after(start: Nanoseconds, ticks: u64) -> Self {
        Self {
            start,
            period: ticks,
            periodic: false,
            at_start: false,
            told: 0,
        }
    }

    const fn every(start: Nanoseconds, ticks: u64) -> Self {
        Self {
            periodic: true,
            ..Self::one_after(start, ticks)
        }
    }

    fn until(&self, now: Nanoseconds) -> u64 {
        if now < self.start {
            return 0;
        }
        let ticks = ticks_in(now.since(self.start));
        let edges = ticks.checked_div(self.period).unwrap_or(0);
        if self.periodic {
            edges.saturating_add(self.at_start.into())
        } else {
            edges.min(1)
        }
    }

    fn next(&self) -> Option<Nanoseconds> {
        if !self.periodic && self.told > 0 {
            return None;
        }
        let periods = self.told.saturating_add((!self.at_start).into());
        let ticks = periods.saturating_mul(self.period);
        Some(self.start.after(nanoseconds_of(ticks)))
    }
}

/// The timer.
#[derive(Clone, Debug)]
pub struct Pit {
    channels: [Channel; 3],
    /// Those of channel 0.
    edges: Option<Edges>,
    /// How many of the edges of a count that has been replaced nobody has been told of.
    owed: u64,
    backlog: Backlog,
    speaker: bool,
    hpet_legacy: bool,
}

/// What became of channel 0 in a while.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tick {
    /// Its output has risen.
    pub rose: bool,
    /// The line of the interrupt controllers is to be pulsed.
    pub interrupts: bool,
}

impl Pit {
    /// The timer after power-up. No channel is programmed; the gate of channel 2 is low.
    pub fn new(now: Nanoseconds) -> Self {
        Self {
            channels: [
                Channel::new(true, now),
                Channel::new(true, now),
                Channel::new(false, now),
            ],
            edges: None,
            owed: 0,
            backlog: Backlog::new(true),
            speaker: false,
            hpet_legacy: false,
        }
    }

    /// Reads one byte from `port`, 0x40 to 0x43 or 0x61; `None` for any other.
    pub fn read_port(&mut self, port: u16, now: Nanoseconds) -> Option<u8> {
        match port {
            0x40..=0x42 => self.channel(port & 3).map(|channel| channel.read(now)),
            0x43 => Some(0),
            0x61 => Some(self.read_speaker(now)),
            _ => None,
        }
    }

    /// Writes one byte to `port`, 0x40 to 0x43 or 0x61. Gives whether it is one of the timer's. The
    /// deadline may have changed after that.
    pub fn write_port(&mut self, port: u16, value: u8, now: Nanoseconds) -> bool {
        match port {
            0x40..=0x42 => {
                let changed = self
                    .channel(port & 3)
                    .is_some_and(|channel| channel.write(value, now));
                if changed && port == 0x40 {
                    self.start_edges(now);
                }
            }
            0x43 => self.write_control(value, now),
            0x61 => self.write_speaker(value, now),
            _ => return false,
        }
        true
    }

    fn channel(&mut self, index: u16) -> Option<&mut Channel> {
        self.channels.get_mut(usize::from(index))
    }

    fn write_control(&mut self, value: u8, now: Nanoseconds) {
        let select = value >> 6;
        if select == 3 {
            // Read-back: bits 1 to 3 choose channels, bits 5 and 4 say what not to latch.
            for (channel, bit) in self.channels.iter_mut().zip([2, 4, 8]) {
                if value & bit == 0 {
                    continue;
                }
                if value & 0x20 == 0 {
                    channel.latch_count(now);
                }
                if value & 0x10 == 0 {
                    channel.latch_status(now);
                }
            }
            return;
        }
        let Some(channel) = self.channel(u16::from(select)) else {
            return;
        };
        match Access::from_control(value) {
            None => channel.latch_count(now),
            Some(access) => {
                channel.program(access, value);
                // The output is set by the mode, and nothing counts until there is a count.
                if select == 0 {
                    self.edges = None;
                }
            }
        }
    }

    /// Begins to count channel 0's edges, from a count that has just been loaded, if one has.
    fn start_edges(&mut self, now: Nanoseconds) {
        let [channel, ..] = &self.channels;
        let before = self.edges.take();
        self.backlog.reset();
        let Some(mut edges) = channel.edges().filter(|_| !self.hpet_legacy) else {
            return;
        };
        if edges.periodic {
            edges.period = edges.period.max(MIN_PERIOD_TICKS);
        }
        if let (Some(before), true) = (before, edges.start > now) {
            // The count before goes on until this one starts, which is its last edge.
            edges.at_start = true;
            let until = before.until(now);
            self.owed = self.owed.saturating_add(until.saturating_sub(before.told));
        }
        self.edges = Some(edges);
    }

    fn read_speaker(&self, now: Nanoseconds) -> u8 {
        let [.., channel] = &self.channels;
        // The refresh signal changes about every 15 microseconds; this does every 16.4, as in KVM.
        let refresh = ((now.0 >> 14) & 1) as u8;
        u8::from(channel.gate())
            | (u8::from(self.speaker) << 1)
            | (refresh << 4)
            | (u8::from(channel.output(now)) << 5)
    }

    fn write_speaker(&mut self, value: u8, now: Nanoseconds) {
        self.speaker = value & 2 != 0;
        let [.., channel] = &mut self.channels;
        channel.set_gate(value & 1 != 0, now);
    }

    /// When the next rising edge of channel 0's output comes, if one does.
    pub fn deadline(&self) -> Option<Nanoseconds> {
        self.edges.as_ref().and_then(Edges::next)
    }

    /// The number of rising edges of channel 0's output since the last call.
    pub fn advance(&mut self, now: Nanoseconds) -> u64 {
        let owed = core::mem::take(&mut self.owed);
        let Some(edges) = &mut self.edges else {
            return owed;
        };
        let until = edges.until(now).max(edges.told);
        let new = until.saturating_sub(edges.told);
        edges.told = until;
        new.saturating_add(owed)
    }

    /// Lets the time until `now` go by. Interrupts that come before the last one has ended are kept, see
    /// [`Pit::ended`], unless [`Pit::keep_interrupts`] says otherwise.
    pub fn tick(&mut self, now: Nanoseconds) -> Tick {
        let edges = self.advance(now);
        Tick {
            rose: edges > 0,
            interrupts: self.backlog.add(edges),
        }
    }

    /// The system has ended an interrupt of channel 0. Gives whether the line is to be pulsed again, for
    /// one that was kept.
    pub fn ended(&mut self) -> bool {
        self.backlog.end()
    }

    /// The system has unmasked the line: what came while it was masked is not to come now.
    pub fn unmasked(&mut self) {
        self.backlog.reset();
    }

    /// Whether interrupts are kept (KVM_REINJECT_CONTROL).
    pub fn keeps_interrupts(&self) -> bool {
        self.backlog.is_kept()
    }

    /// Sets whether interrupts are kept.
    pub fn keep_interrupts(&mut self, keep: bool) {
        if keep != self.backlog.is_kept() {
            self.backlog = Backlog::new(keep);
        }
    }

    /// The state at `now`.
    pub fn state(&self, now: Nanoseconds) -> PitState {
        let [a, b, c] = &self.channels;
        let mut flags = 0;
        if self.hpet_legacy {
            flags |= flag::HPET_LEGACY;
        }
        if self.speaker {
            flags |= flag::SPEAKER_DATA_ON;
        }
        PitState {
            channels: [a.state(now), b.state(now), c.state(now)],
            flags,
        }
    }

    /// Sets the state. The channels begin to count at `now`, whatever `count_load_time` says, as in
    /// KVM. The deadline may have changed after that.
    pub fn set_state(&mut self, state: &PitState, now: Nanoseconds) {
        for (channel, state) in self.channels.iter_mut().zip(&state.channels) {
            channel.set_state(state, now);
        }
        self.speaker = state.flags & flag::SPEAKER_DATA_ON != 0;
        self.hpet_legacy = state.flags & flag::HPET_LEGACY != 0;
        self.owed = 0;
        self.start_edges(now);
    }
}

const SECOND: u64 = 1_000_000_000;

/// The whole ticks in `nanoseconds`. Exact: the product of a rest below a second with the frequency
/// stays below 2^51, and the seconds of 2^64 nanoseconds are fewer than 2^35.
const fn ticks_in(nanoseconds: u64) -> u64 {
    let seconds = nanoseconds / SECOND;
    let rest = nanoseconds % SECOND;
    seconds
        .wrapping_mul(FREQUENCY)
        .wrapping_add(rest.wrapping_mul(FREQUENCY) / SECOND)
}

/// The fewest nanoseconds that hold `ticks` whole ticks; the most representable where it is more.
const fn nanoseconds_of(ticks: u64) -> u64 {
    let seconds = ticks / FREQUENCY;
    let rest = ticks % FREQUENCY;
    seconds
        .saturating_mul(SECOND)
        .saturating_add(rest.wrapping_mul(SECOND).div_ceil(FREQUENCY))
}

#[cfg(test)]
mod tests;
