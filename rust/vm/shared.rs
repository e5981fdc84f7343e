// SPDX-License-Identifier: GPL-2.0

//! What other threads and interrupt handlers may do to a virtual CPU: leave a request, wake or kick it.

use crate::host::{irq, timer::Expire, wait::WaitQueue};
use core::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use kernel::{bindings as kb, prelude::*, static_lock_class};
use rvisor_core::{
    irqchip::destination::ApicIdentity,
    x86::vector::{ApicId, Vector},
};

/// Something that a virtual CPU must see to before it runs its guest again. A set of bits.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Request(u32);

impl Request {
    /// Interrupts may have become pending: look at the local APIC, the PIC and NMIs.
    pub(crate) const EVENT: Self = Self(1 << 0);
    /// The local APIC's timer is due.
    pub(crate) const LAPIC_TIMER: Self = Self(1 << 1);
    /// The PIT is due; only for the bootstrap processor.
    pub(crate) const PIT: Self = Self(1 << 2);
    /// INIT or SIPI has come.
    pub(crate) const INIT_OR_SIPI: Self = Self(1 << 3);
    /// An NMI has come.
    pub(crate) const NMI: Self = Self(1 << 4);
    /// The local APIC's deadline has changed: set the host's timer.
    pub(crate) const ARM_TIMER: Self = Self(1 << 6);

    /// Whether the set holds `other`.
    #[inline]
    pub(crate) fn has(self, other: Self) -> bool {
        self.0 & other.0 != 0
    }
}

/// The vCPU's thread is not in guest mode.
const OUTSIDE: u32 = u32::MAX;
/// No SIPI is waiting.
const NO_SIPI: u32 = u32::MAX;

/// The part of a virtual CPU that is not its thread's alone.
#[pin_data]
pub(crate) struct VcpuShared {
    /// The virtual CPU's number, which is its initial APIC ID.
    pub(crate) id: u32,
    requests: AtomicU32,
    /// The CPU that runs the guest at this moment, or [`OUTSIDE`].
    in_guest_on: AtomicU32,
    /// Vectors that wait to go into the local APIC's IRR, as a bitmap.
    posted: [AtomicU64; 4],
    /// Those of them that are level-triggered.
    posted_level: [AtomicU64; 4],
    /// The local APIC's identity for destination matching, packed.
    identity: AtomicU32,
    /// An INIT has come and was not seen to.
    init: AtomicBool,
    /// The vector of the last SIPI, or [`NO_SIPI`].
    sipi: AtomicU32,
    /// NMIs that wait, at most 2.
    nmis: AtomicU32,
    #[pin]
    wait: WaitQueue,
}

impl VcpuShared {
    /// A virtual CPU that no one has asked anything of.
    pub(crate) fn new(id: u32) -> impl PinInit<Self> {
        pin_init!(Self {
            id,
            requests: AtomicU32::new(0),
            in_guest_on: AtomicU32::new(OUTSIDE),
            posted: [const { AtomicU64::new(0) }; 4],
            posted_level: [const { AtomicU64::new(0) }; 4],
            identity: AtomicU32::new(0),
            init: AtomicBool::new(false),
            sipi: AtomicU32::new(NO_SIPI),
            nmis: AtomicU32::new(0),
            wait <- WaitQueue::new(static_lock_class!()),
        })
    }

    /// Leaves a request and makes the virtual CPU see it soon.
    pub(crate) fn request(&self, request: Request) {
        self.requests.fetch_or(request.0, Ordering::SeqCst);
        self.prod();
    }

    /// Leaves a request that the virtual CPU's own thread will find before its next entry.
    #[inline]
    pub(crate) fn request_self(&self, request: Request) {
        self.requests.fetch_or(request.0, Ordering::Relaxed);
    }

    /// Wakes the thread where it sleeps, and makes it leave the guest where it runs it.
    fn prod(&self) {
        self.wait.wake();
        let cpu = self.in_guest_on.load(Ordering::SeqCst);
        if cpu != OUTSIDE && cpu != irq::cpu_id() {
            irq::kick(cpu);
        }
    }

    /// Whether any request waits.
    #[inline]
    pub(crate) fn has_requests(&self) -> bool {
        self.requests.load(Ordering::SeqCst) != 0
    }

    /// Takes all requests.
    #[inline]
    pub(crate) fn take_requests(&self) -> Request {
        if self.requests.load(Ordering::Relaxed) == 0 {
            return Request(0);
        }
        Request(self.requests.swap(0, Ordering::SeqCst))
    }

    /// Says that this CPU is about to run the guest. Requests must be looked at after this.
    #[inline]
    pub(crate) fn set_in_guest(&self, irqs: &irq::IrqsOff) {
        self.in_guest_on.store(irqs.cpu(), Ordering::SeqCst);
    }

    /// Says that the guest has exited.
    #[inline]
    pub(crate) fn set_outside(&self) {
        self.in_guest_on.store(OUTSIDE, Ordering::Release);
    }

    /// Makes the virtual CPU leave the guest, and returns when it has.
    pub(crate) fn leave_guest_and_wait(&self) {
        /// # Safety
        ///
        /// None: it touches nothing.
        unsafe extern "C" fn nothing(_: *mut kernel::ffi::c_void) {}
        let cpu = self.in_guest_on.load(Ordering::SeqCst);
        if cpu != OUTSIDE {
            // SAFETY: The function touches nothing. An offline CPU runs no guest and is ignored.
            unsafe {
                kb::smp_call_function_single(cpu as i32, Some(nothing), core::ptr::null_mut(), true)
            };
        }
    }

    /// Sleeps until a request comes, `ready` holds, or a signal is pending.
    pub(crate) fn sleep(&self, mut ready: impl FnMut() -> bool) {
        self.wait.wait_until(|| self.has_requests() || ready());
    }

    /// Posts an interrupt for the local APIC.
    pub(crate) fn post(&self, vector: Vector, level: bool) {
        let (word, bit) = (usize::from(vector.0 >> 6), 1u64 << (vector.0 & 63));
        if let (Some(posted), Some(levels)) = (self.posted.get(word), self.posted_level.get(word)) {
            if level {
                levels.fetch_or(bit, Ordering::Relaxed);
            }
            // Already posted and not taken: the request that came with it still stands.
            if posted.fetch_or(bit, Ordering::SeqCst) & bit != 0 {
                return;
            }
        }
        self.request(Request::EVENT);
    }

    /// Takes what was posted: all vectors, and those that are level-triggered.
    pub(crate) fn take_posted(&self) -> ([u64; 4], [u64; 4]) {
        let mut all = [0; 4];
        let mut level = [0; 4];
        for (word, (posted, levels)) in self.posted.iter().zip(&self.posted_level).enumerate() {
            if posted.load(Ordering::Relaxed) != 0 {
                all[word] = posted.swap(0, Ordering::SeqCst);
                level[word] = levels.fetch_and(!all[word], Ordering::SeqCst) & all[word];
            }
        }
        (all, level)
    }

    /// Posts an NMI.
    pub(crate) fn post_nmi(&self) {
        // One may be in service and one wait behind it (SDM vol. 3, 7.7.1).
        let _ = self
            .nmis
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| {
                (n < 2).then_some(n + 1)
            });
        self.request(Request::NMI);
    }

    /// Takes the NMIs that wait.
    pub(crate) fn take_nmis(&self) -> u32 {
        self.nmis.swap(0, Ordering::SeqCst)
    }

    /// Posts an INIT.
    pub(crate) fn post_init(&self) {
        self.sipi.store(NO_SIPI, Ordering::SeqCst);
        self.init.store(true, Ordering::SeqCst);
        self.request(Request::INIT_OR_SIPI);
    }

    /// Posts a start-up interrupt.
    pub(crate) fn post_sipi(&self, vector: Vector) {
        self.sipi.store(u32::from(vector.0), Ordering::SeqCst);
        self.request(Request::INIT_OR_SIPI);
    }

    /// Takes an INIT that waits.
    pub(crate) fn take_init(&self) -> bool {
        self.init.swap(false, Ordering::SeqCst)
    }

    /// Takes a SIPI that waits.
    pub(crate) fn take_sipi(&self) -> Option<Vector> {
        u8::try_from(self.sipi.swap(NO_SIPI, Ordering::SeqCst))
            .ok()
            .map(Vector)
    }

    /// Publishes the local APIC's identity.
    pub(crate) fn publish_identity(&self, identity: ApicIdentity) {
        self.identity.store(identity.packed(), Ordering::SeqCst);
    }

    /// The local APIC's identity as last published.
    #[inline]
    pub(crate) fn identity(&self) -> ApicIdentity {
        ApicIdentity::from_packed(ApicId(self.id), self.identity.load(Ordering::SeqCst))
    }
}

/// The local APIC's timer: it only leaves a request, the vCPU's thread does the rest.
impl Expire for VcpuShared {
    fn expire(&self) {
        self.request(Request::LAPIC_TIMER);
    }
}
