// SPDX-License-Identifier: GPL-2.0

//! What other threads and interrupt handlers leave for the thread that runs a vCPU, and how that thread
//! is made to look.
//!
//! The thread is outside of the guest, in it, or asleep, and says so in one word, its [`Place`]. Who
//! leaves something first leaves it, then reads the place, and kicks or wakes what it finds there. The
//! thread first says where it goes, then looks whether anything was left, and only then goes. All four
//! steps are sequentially consistent, so of the two at least one sees the other: nothing is left behind
//! unseen. A thread that is asleep must also be on the queue that wakes it before it looks.

use super::destination::ApicIdentity;
use super::vector_set::VectorSet;
use crate::x86::vector::{ApicId, Vector};
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// Something that a vCPU's thread must see to before it runs its guest again. A set of bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request(u32);

impl Request {
    /// Interrupts may have become pending: look at the local APIC, the PIC and NMIs.
    pub const EVENT: Self = Self(1 << 0);
    /// The local APIC's timer is due.
    pub const LAPIC_TIMER: Self = Self(1 << 1);
    /// The PIT is due; only for the bootstrap processor.
    pub const PIT: Self = Self(1 << 2);
    /// INIT or SIPI has come.
    pub const INIT_OR_SIPI: Self = Self(1 << 3);
    /// An NMI has come.
    pub const NMI: Self = Self(1 << 4);
    /// The local APIC's deadline has changed: set the host's timer.
    pub const ARM_TIMER: Self = Self(1 << 6);
    /// Userspace's IOAPIC is to be told of the end of an interrupt.
    pub const INTERRUPT_ENDED: Self = Self(1 << 8);

    /// The vectors whose EOI is to be told have changed.
    pub const WATCH: Self = Self(1 << 7);
    /// The record of the last exit is to be completed.
    pub const TRACE: Self = Self(1 << 9);

    /// Whether nothing is in the set.
    #[inline]
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// Whether the set holds any of `other`.
    #[inline]
    pub const fn has(self, other: Self) -> bool {
        self.0 & other.0 != 0
    }

    /// What is in either set.
    #[inline]
    pub const fn with(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

/// Where a vCPU's thread is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// In the kernel or in userspace: it looks before it enters the guest.
    Outside,
    /// On its wait queue: it is to be woken.
    Asleep,
    /// In the guest, or about to enter it, on this CPU of the host: it is to be kicked.
    Guest(u32),
}

impl Place {
    const OUTSIDE: u32 = u32::MAX;
    const ASLEEP: u32 = u32::MAX - 1;

    #[inline]
    const fn to_word(self) -> u32 {
        match self {
            Self::Outside => Self::OUTSIDE,
            Self::Asleep => Self::ASLEEP,
            Self::Guest(cpu) => cpu,
        }
    }

    #[inline]
    const fn from_word(word: u32) -> Self {
        match word {
            Self::OUTSIDE => Self::Outside,
            Self::ASLEEP => Self::Asleep,
            cpu => Self::Guest(cpu),
        }
    }
}

/// INIT and SIPI as they wait together (SDM vol. 3, 10.4): a SIPI counts only behind the last INIT.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Startup {
    /// An INIT has come.
    pub init: bool,
    /// The vector of the SIPI that came last, behind the INIT where there was one.
    pub sipi: Option<Vector>,
}

const STARTUP_INIT: u32 = 1 << 8;
const STARTUP_SIPI: u32 = 1 << 9;

/// The most NMIs that wait: one may be in service and one be latched behind it (SDM vol. 3, 7.7.1).
const MAX_NMIS: u32 = 2;

/// Each word of the posted vectors has 32 of them, and above each vector's bit the one that says whether it is
/// level-triggered: both are taken at once.
const POSTED_WORDS: usize = 8;
const LEVEL: u32 = 32;
const POSTED_MASK: u64 = 0xffff_ffff;

/// Vectors on their way to a local APIC.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Posted {
    /// All of them: bit `v % 64` of word `v / 64` is vector `v`.
    pub vectors: [u64; 4],
    /// Those of them that are level-triggered.
    pub level: [u64; 4],
}

/// What waits for one vCPU.
#[derive(Debug)]
pub struct Mailbox {
    requests: AtomicU32,
    /// A [`Place`].
    place: AtomicU32,
    posted: [AtomicU64; POSTED_WORDS],
    /// The local APIC's identity for destination matching, packed.
    identity: AtomicU32,
    /// [`STARTUP_INIT`], [`STARTUP_SIPI`] and the SIPI's vector.
    startup: AtomicU32,
    nmis: AtomicU32,
}

impl Default for Mailbox {
    fn default() -> Self {
        Self::new()
    }
}

impl Mailbox {
    /// An empty one; the thread is outside.
    pub const fn new() -> Self {
        Self {
            requests: AtomicU32::new(0),
            place: AtomicU32::new(Place::OUTSIDE),
            posted: [const { AtomicU64::new(0) }; POSTED_WORDS],
            identity: AtomicU32::new(0),
            startup: AtomicU32::new(0),
            nmis: AtomicU32::new(0),
        }
    }

    /// Leaves a request. The caller then looks at [`Mailbox::place`], or uses [`Mailbox::request`].
    #[inline]
    pub fn leave(&self, request: Request) {
        self.requests.fetch_or(request.0, Ordering::SeqCst);
    }

    /// Leaves a request and says where the thread is, to be woken or kicked there.
    #[inline]
    #[must_use]
    pub fn request(&self, request: Request) -> Place {
        self.leave(request);
        self.place()
    }

    /// Leaves a request that the thread itself will find before its next entry.
    #[inline]
    pub fn request_self(&self, request: Request) {
        self.requests.fetch_or(request.0, Ordering::Relaxed);
    }

    /// Where the thread is.
    #[inline]
    pub fn place(&self) -> Place {
        Place::from_word(self.place.load(Ordering::SeqCst))
    }

    /// The thread says where it goes. Before it enters the guest or sleeps it must look at
    /// [`Mailbox::has_requests`] once more.
    #[inline]
    pub fn go(&self, place: Place) {
        self.place.store(place.to_word(), Ordering::SeqCst);
    }

    /// The thread is outside again.
    #[inline]
    pub fn come_back(&self) {
        self.place.store(Place::OUTSIDE, Ordering::Release);
    }

    /// Whether any request waits.
    #[inline]
    pub fn has_requests(&self) -> bool {
        self.requests.load(Ordering::SeqCst) != 0
    }

    /// Whether any request waits that is none of `others`.
    #[inline]
    pub fn has_requests_beside(&self, others: Request) -> bool {
        self.requests.load(Ordering::SeqCst) & !others.0 != 0
    }

    /// Takes all requests.
    #[inline]
    pub fn take_requests(&self) -> Request {
        if self.requests.load(Ordering::Relaxed) == 0 {
            return Request(0);
        }
        Request(self.requests.swap(0, Ordering::SeqCst))
    }

    /// Posts an interrupt for the local APIC. Gives whether [`Request::EVENT`] is to be left: a vector
    /// that is posted already is one with this one, and the request that came with it still stands.
    #[inline]
    #[must_use]
    pub fn post(&self, vector: Vector, level: bool) -> bool {
        let place = usize::from(vector.0 >> 5);
        let bit = 1u64.wrapping_shl(u32::from(vector.0 & 31));
        let Some(posted) = self.posted.get(place) else {
            return false;
        };
        let bits = if level {
            bit | bit.wrapping_shl(LEVEL)
        } else {
            bit
        };
        posted.fetch_or(bits, Ordering::SeqCst) & bit == 0
    }

    /// Takes what was posted.
    #[inline]
    pub fn take_posted(&self) -> Posted {
        let mut taken = Posted::default();
        let words = taken.vectors.iter_mut().zip(&mut taken.level);
        for (pair, (all, level)) in self.posted.chunks_exact(2).zip(words) {
            for (half, posted) in [0u32, 32].into_iter().zip(pair) {
                if posted.load(Ordering::Relaxed) != 0 {
                    let bits = posted.swap(0, Ordering::SeqCst);
                    *all |= (bits & POSTED_MASK).wrapping_shl(half);
                    *level |= bits.wrapping_shr(LEVEL).wrapping_shl(half);
                }
            }
        }
        taken
    }

    /// Posts an NMI; [`Request::NMI`] is to be left after this.
    pub fn post_nmi(&self) {
        let _ = self
            .nmis
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |count| {
                (count < MAX_NMIS).then_some(count.wrapping_add(1))
            });
    }

    /// Takes the NMIs that wait, at most two.
    pub fn take_nmis(&self) -> u32 {
        self.nmis.swap(0, Ordering::SeqCst)
    }

    /// Posts an INIT, which makes an earlier SIPI void; [`Request::INIT_OR_SIPI`] is to be left after
    /// this.
    pub fn post_init(&self) {
        self.startup.store(STARTUP_INIT, Ordering::SeqCst);
    }

    /// Posts a start-up interrupt; [`Request::INIT_OR_SIPI`] is to be left after this.
    pub fn post_sipi(&self, vector: Vector) {
        let sipi = STARTUP_SIPI | u32::from(vector.0);
        let _ = self
            .startup
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |waiting| {
                Some((waiting & STARTUP_INIT) | sipi)
            });
    }

    /// Takes INIT and SIPI. Who is not waiting for a SIPI after that drops it.
    pub fn take_startup(&self) -> Startup {
        let waiting = self.startup.swap(0, Ordering::SeqCst);
        Startup {
            init: waiting & STARTUP_INIT != 0,
            sipi: (waiting & STARTUP_SIPI != 0).then_some(Vector((waiting & 0xff) as u8)),
        }
    }

    /// Forgets vectors and NMIs, as INIT does.
    pub fn forget_interrupts(&self) {
        let _ = self.take_posted();
        let _ = self.take_nmis();
    }

    /// Publishes the local APIC's identity.
    pub fn publish_identity(&self, identity: ApicIdentity) {
        self.identity.store(identity.packed(), Ordering::SeqCst);
    }

    /// The identity of the local APIC `id` as last published.
    #[inline]
    pub fn identity(&self, id: ApicId) -> ApicIdentity {
        ApicIdentity::from_packed(id, self.identity.load(Ordering::SeqCst))
    }
}

impl Posted {
    /// The vectors as a set.
    pub const fn set(&self) -> VectorSet {
        VectorSet::from_words(self.vectors)
    }
}

#[cfg(test)]
mod tests;
