// SPDX-License-Identifier: GPL-2.0

//! Statistics in KVM's binary form (Documentation/virt/kvm/api.rst, KVM_GET_STATS_FD): what is counted, and
//! the file that it is read from.
//!
//! The file is a header, the identifier, the descriptors and the data. All of them are multiples of 8 bytes,
//! so that it is made word by word, and only as far as it is read.

use core::sync::atomic::{AtomicU64, Ordering};

/// Bytes of a name, and of the identifier, with the zeros behind it.
pub const NAME_SIZE: usize = 48;

const WORD: usize = 8;
const NAME_WORDS: usize = NAME_SIZE / WORD;
const HEADER_WORDS: usize = 3;
const DESCRIPTOR_WORDS: usize = 2 + NAME_WORDS;
const DESCRIPTORS: usize = HEADER_WORDS + NAME_WORDS;

/// What a number means, with the descriptor's flags: the type, the unit and, for the exponent, the base.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// It only grows.
    Counter,
    /// It grows by nanoseconds.
    Nanoseconds,
    /// True or false now.
    Flag,
    /// That many counters, one for each value from 0 up.
    Histogram(u16),
}

impl Kind {
    const fn flags(self) -> u64 {
        const INSTANT: u64 = 1;
        const LINEAR_HISTOGRAM: u64 = 3;
        const SECONDS: u64 = 2 << 4;
        const BOOLEAN: u64 = 4 << 4;
        match self {
            Self::Counter => 0,
            Self::Nanoseconds => SECONDS,
            Self::Flag => INSTANT | BOOLEAN,
            Self::Histogram(_) => LINEAR_HISTOGRAM,
        }
    }

    const fn exponent(self) -> i16 {
        match self {
            Self::Nanoseconds => -9,
            _ => 0,
        }
    }

    /// The numbers that it has.
    const fn size(self) -> u16 {
        match self {
            Self::Histogram(size) => size,
            _ => 1,
        }
    }

    const fn bucket_size(self) -> u64 {
        matches!(self, Self::Histogram(_)) as u64
    }
}

/// A statistic: its name, its kind, and where its numbers come from.
#[derive(Clone, Copy, Debug)]
pub struct Statistic<S> {
    name: &'static str,
    kind: Kind,
    source: S,
}

/// The statistics of one object as a file.
#[derive(Debug)]
pub struct File<'a, S> {
    /// Names the object.
    pub id: [u8; NAME_SIZE],
    /// What it has, in the order of the descriptors.
    pub statistics: &'a [Statistic<S>],
}

impl<S: Copy> File<'_, S> {
    /// Bytes of the whole.
    pub fn size(&self) -> usize {
        self.data()
            .saturating_add(self.numbers(self.statistics.len()))
            .saturating_mul(WORD)
    }

    /// The first word of the data.
    fn data(&self) -> usize {
        self.statistics
            .len()
            .saturating_mul(DESCRIPTOR_WORDS)
            .saturating_add(DESCRIPTORS)
    }

    /// The numbers of the first `count` statistics.
    fn numbers(&self, count: usize) -> usize {
        let sizes = self
            .statistics
            .iter()
            .take(count)
            .map(|one| usize::from(one.kind.size()));
        sizes.fold(0, usize::saturating_add)
    }

    /// Fills `buffer` with what the file has from `position` on, and says how much that is. `number` gives
    /// the number of a source at a place, which is 0 but for histograms.
    pub fn read(
        &self,
        position: u64,
        buffer: &mut [u8],
        number: impl Fn(S, usize) -> u64,
    ) -> usize {
        let size = self.size();
        let start = usize::try_from(position).unwrap_or(size).min(size);
        let mut at = start;
        let mut rest = buffer;
        while at < size && !rest.is_empty() {
            let bytes = self.word(at / WORD, &number).to_le_bytes();
            let wanted = bytes.get(at % WORD..).unwrap_or_default();
            let count = wanted.len().min(rest.len());
            let (to, behind) = rest.split_at_mut(count);
            for (to, from) in to.iter_mut().zip(wanted) {
                *to = *from;
            }
            rest = behind;
            at = at.saturating_add(count);
        }
        at.saturating_sub(start)
    }

    fn word(&self, place: usize, number: &impl Fn(S, usize) -> u64) -> u64 {
        if let Some(place) = place.checked_sub(self.data()) {
            return self.number(place, number);
        }
        if let Some(place) = place.checked_sub(DESCRIPTORS) {
            return self.descriptor(place / DESCRIPTOR_WORDS, place % DESCRIPTOR_WORDS);
        }
        let bytes = |words: usize| words.saturating_mul(WORD) as u64;
        match place {
            // The flags are 0.
            0 => pair(0, NAME_SIZE as u64),
            1 => pair(self.statistics.len() as u64, bytes(HEADER_WORDS)),
            2 => pair(bytes(DESCRIPTORS), bytes(self.data())),
            _ => text_word(&self.id, place.wrapping_sub(HEADER_WORDS)),
        }
    }

    fn descriptor(&self, which: usize, word: usize) -> u64 {
        let Some(Statistic { name, kind, .. }) = self.statistics.get(which) else {
            return 0;
        };
        match word {
            0 => {
                let exponent = u64::from(kind.exponent() as u16);
                pair(kind.flags(), exponent | (u64::from(kind.size()) << 16))
            }
            1 => {
                let offset = self.numbers(which).saturating_mul(WORD);
                pair(offset as u64, kind.bucket_size())
            }
            _ => text_word(name.as_bytes(), word.wrapping_sub(2)),
        }
    }

    fn number(&self, mut place: usize, number: &impl Fn(S, usize) -> u64) -> u64 {
        for one in self.statistics {
            match place.checked_sub(one.kind.size().into()) {
                None => return number(one.source, place),
                Some(behind) => place = behind,
            }
        }
        0
    }
}

/// Two 32-bit words as one of 64 bits.
const fn pair(low: u64, high: u64) -> u64 {
    (low & 0xffff_ffff) | (high << 32)
}

/// The word at `place` of a text with zeros behind it.
fn text_word(text: &[u8], place: usize) -> u64 {
    let bytes = text.chunks(WORD).nth(place).unwrap_or_default();
    bytes
        .iter()
        .rev()
        .fold(0, |word, byte| (word << 8) | u64::from(*byte))
}

/// What a virtual CPU's thread counts beside its exits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// An EPT violation that memory has answered.
    FaultFixed,
    /// An EPT violation at a device.
    FaultEmulated,
    /// Translations were dropped before an entry.
    TlbFlush,
    /// An exit to userspace for device memory.
    MmioExit,
    /// An exit to userspace because of a signal.
    SignalExit,
    /// An exit to userspace because the guest can take an interrupt.
    RequestIrqExit,
    /// An instruction was emulated.
    Emulation,
    /// One could not be.
    EmulationFailure,
    /// An external interrupt went into the guest.
    IrqInjection,
    /// An NMI went into the guest.
    NmiInjection,
    /// A halted CPU was woken.
    HaltWakeup,
    /// The nanoseconds that it slept.
    HaltWait,
}

const EVENTS: usize = Event::HaltWait as usize + 1;
/// More than there are basic exit reasons (SDM vol. 3, appendix C); a power of 2.
const REASONS: usize = 128;
/// Those that are told.
const TOLD_REASONS: u16 = 80;

/// The counters of a virtual CPU. Its own thread counts, all may read.
#[derive(Debug)]
pub struct VcpuCounters {
    exits: [AtomicU64; REASONS],
    events: [AtomicU64; EVENTS],
}

impl Default for VcpuCounters {
    fn default() -> Self {
        Self::new()
    }
}

impl VcpuCounters {
    /// All at 0.
    pub const fn new() -> Self {
        Self {
            exits: [const { AtomicU64::new(0) }; REASONS],
            events: [const { AtomicU64::new(0) }; EVENTS],
        }
    }

    /// Counts an exit by its basic reason.
    #[inline]
    pub fn exit(&self, reason: u32) {
        if let Some(count) = self.exits.get(reason as usize & (REASONS - 1)) {
            add(count, 1);
        }
    }

    /// Counts an event.
    #[inline]
    pub fn count(&self, event: Event) {
        self.count_many(event, 1);
    }

    /// Counts that many of an event.
    #[inline]
    pub fn count_many(&self, event: Event, more: u64) {
        if let Some(count) = self.events.get(event as usize) {
            add(count, more);
        }
    }

    /// The number of a source at a place; the sleeping CPU's thread is told of by `blocking`.
    pub fn number(&self, source: VcpuSource, place: usize, blocking: bool) -> u64 {
        let of_reason = |reason: usize| self.exits.get(reason).map_or(0, read);
        match source {
            VcpuSource::Exits => self.exits.iter().map(read).fold(0, u64::wrapping_add),
            VcpuSource::Reason(reason) => of_reason(reason.into()),
            VcpuSource::Reasons => of_reason(place),
            VcpuSource::Event(event) => self.events.get(event as usize).map_or(0, read),
            VcpuSource::Blocking => blocking.into(),
        }
    }
}

/// Only one thread counts: no locked instruction.
#[inline]
fn add(count: &AtomicU64, more: u64) {
    count.store(
        count.load(Ordering::Relaxed).wrapping_add(more),
        Ordering::Relaxed,
    );
}

fn read(count: &AtomicU64) -> u64 {
    count.load(Ordering::Relaxed)
}

/// Where a virtual CPU's numbers come from.
#[derive(Clone, Copy, Debug)]
pub enum VcpuSource {
    /// All exits.
    Exits,
    /// The exits of one basic reason.
    Reason(u8),
    /// The exits of each basic reason.
    Reasons,
    /// An event.
    Event(Event),
    /// Whether its thread sleeps.
    Blocking,
}

const fn statistic<S>(name: &'static str, kind: Kind, source: S) -> Statistic<S> {
    assert!(name.len() < NAME_SIZE);
    Statistic { name, kind, source }
}

const fn exits_of(name: &'static str, reason: u8) -> Statistic<VcpuSource> {
    statistic(name, Kind::Counter, VcpuSource::Reason(reason))
}

const fn event(name: &'static str, event: Event) -> Statistic<VcpuSource> {
    statistic(name, Kind::Counter, VcpuSource::Event(event))
}

/// A virtual CPU's statistics. The names are KVM's, but for `exit_reasons`.
pub const VCPU: &[Statistic<VcpuSource>] = &[
    event("halt_wakeup", Event::HaltWakeup),
    statistic(
        "halt_wait_ns",
        Kind::Nanoseconds,
        VcpuSource::Event(Event::HaltWait),
    ),
    statistic("blocking", Kind::Flag, VcpuSource::Blocking),
    exits_of("pf_taken", 48),
    event("pf_fixed", Event::FaultFixed),
    event("pf_emulate", Event::FaultEmulated),
    event("tlb_flush", Event::TlbFlush),
    statistic("exits", Kind::Counter, VcpuSource::Exits),
    exits_of("io_exits", 30),
    event("mmio_exits", Event::MmioExit),
    event("signal_exits", Event::SignalExit),
    exits_of("irq_window_exits", 7),
    exits_of("nmi_window_exits", 8),
    exits_of("halt_exits", 12),
    event("request_irq_exits", Event::RequestIrqExit),
    exits_of("irq_exits", 1),
    event("insn_emulation", Event::Emulation),
    event("insn_emulation_fail", Event::EmulationFailure),
    exits_of("hypercalls", 18),
    event("irq_injections", Event::IrqInjection),
    event("nmi_injections", Event::NmiInjection),
    statistic(
        "exit_reasons",
        Kind::Histogram(TOLD_REASONS),
        VcpuSource::Reasons,
    ),
];

/// Where a virtual machine's numbers come from.
#[derive(Clone, Copy, Debug)]
pub enum VmSource {
    /// How often all of its CPUs had to drop translations.
    Flushes,
}

/// A virtual machine's statistics. The names are KVM's.
pub const VM: &[Statistic<VmSource>] = &[statistic(
    "remote_tlb_flush",
    Kind::Counter,
    VmSource::Flushes,
)];

#[cfg(test)]
mod tests {
    use super::*;

    fn file() -> File<'static, VcpuSource> {
        let mut id = [0; NAME_SIZE];
        id[..5].copy_from_slice(b"kvm-7");
        File {
            id,
            statistics: VCPU,
        }
    }

    fn whole(counters: &VcpuCounters) -> Vec<u8> {
        let mut bytes = vec![0xee; file().size() + 9];
        let count = file().read(0, &mut bytes, |source, place| {
            counters.number(source, place, true)
        });
        assert_eq!(count, file().size());
        assert_eq!(bytes.split_off(count), [0xee; 9]);
        bytes
    }

    fn u32_at(bytes: &[u8], at: usize) -> u32 {
        u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
    }

    fn name_at(bytes: &[u8], at: usize) -> &str {
        let text = &bytes[at..at + NAME_SIZE];
        let end = text.iter().position(|byte| *byte == 0).unwrap();
        std::str::from_utf8(&text[..end]).unwrap()
    }

    /// The flags, exponent, size, bucket size and numbers of a statistic, found as userspace finds it.
    fn find(bytes: &[u8], name: &str) -> (u32, i16, u16, u32, Vec<u64>) {
        let (count, descriptors, data) = (u32_at(bytes, 8), u32_at(bytes, 16), u32_at(bytes, 20));
        let at = (0..count as usize)
            .map(|which| descriptors as usize + which * (16 + NAME_SIZE))
            .find(|at| name_at(bytes, at + 16) == name)
            .unwrap();
        let middle = u32_at(bytes, at + 4);
        let size = (middle >> 16) as u16;
        let first = data as usize + u32_at(bytes, at + 8) as usize;
        let numbers = (0..usize::from(size))
            .map(|place| u64::from_le_bytes(bytes[first + 8 * place..][..8].try_into().unwrap()))
            .collect();
        (
            u32_at(bytes, at),
            middle as u16 as i16,
            size,
            u32_at(bytes, at + 12),
            numbers,
        )
    }

    #[test]
    fn header_and_identifier() {
        let bytes = whole(&VcpuCounters::new());
        assert_eq!(u32_at(&bytes, 0), 0);
        assert_eq!(u32_at(&bytes, 4) as usize, NAME_SIZE);
        assert_eq!(u32_at(&bytes, 8) as usize, VCPU.len());
        assert_eq!(u32_at(&bytes, 12), 24);
        assert_eq!(name_at(&bytes, 24), "kvm-7");
        let data = u32_at(&bytes, 20) as usize;
        assert_eq!(data, 72 + 64 * VCPU.len());
        assert_eq!(
            bytes.len(),
            data + 8 * (VCPU.len() - 1 + usize::from(TOLD_REASONS))
        );
    }

    #[test]
    fn what_is_counted_is_told() {
        let counters = VcpuCounters::new();
        for reason in [12, 12, 30, 79, 127] {
            counters.exit(reason);
        }
        // No reason leads past the counters.
        counters.exit(u32::MAX);
        counters.count(Event::IrqInjection);
        counters.count_many(Event::HaltWait, 5);
        let bytes = whole(&counters);
        assert_eq!(find(&bytes, "exits"), (0, 0, 1, 0, vec![6]));
        assert_eq!(find(&bytes, "halt_exits").4, [2]);
        assert_eq!(find(&bytes, "io_exits").4, [1]);
        assert_eq!(find(&bytes, "irq_injections").4, [1]);
        assert_eq!(find(&bytes, "nmi_injections").4, [0]);
        assert_eq!(find(&bytes, "halt_wait_ns"), (0x20, -9, 1, 0, vec![5]));
        assert_eq!(find(&bytes, "blocking"), (0x41, 0, 1, 0, vec![1]));
        let (flags, exponent, size, bucket, numbers) = find(&bytes, "exit_reasons");
        assert_eq!((flags, exponent, size, bucket), (3, 0, TOLD_REASONS, 1));
        let told: Vec<_> = (0..)
            .zip(numbers)
            .filter(|(_, number)| *number != 0)
            .collect();
        assert_eq!(told, [(12, 2), (30, 1), (79, 1)]);
    }

    #[test]
    fn every_part_is_a_part_of_the_whole() {
        let counters = VcpuCounters::new();
        counters.exit(1);
        let all = whole(&counters);
        for position in 0..all.len() + 2 {
            for length in [0, 1, 7, 8, 9, 64, all.len()] {
                let mut part = vec![0xee; length];
                let count = file().read(position as u64, &mut part, |source, place| {
                    counters.number(source, place, true)
                });
                let expected = &all[position.min(all.len())
                    ..all
                        .len()
                        .min(position + length)
                        .max(position.min(all.len()))];
                assert_eq!(&part[..count], expected);
                assert!(part[count..].iter().all(|byte| *byte == 0xee));
            }
        }
        assert_eq!(file().read(u64::MAX, &mut [0; 8], |_, _| 0), 0);
    }
}
