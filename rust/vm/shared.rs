// SPDX-License-Identifier: GPL-2.0

//! What other threads and interrupt handlers may do to a virtual CPU: leave a request, wake or kick it.

use super::trace::Trace;
use crate::host::{irq, timer::Expire, wait::WaitQueue};
use kernel::{bindings as kb, prelude::*, static_lock_class};
pub(crate) use rvisor_core::irqchip::mailbox::Request;
use rvisor_core::{
    irqchip::{
        destination::ApicIdentity,
        mailbox::{Mailbox, Place},
    },
    stats::VcpuCounters,
    x86::vector::{ApicId, Vector},
};

/// The part of a virtual CPU that is not its thread's alone.
#[pin_data]
pub(crate) struct VcpuShared {
    /// The virtual CPU's number, which is its initial APIC ID.
    pub(crate) id: u32,
    pub(crate) mailbox: Mailbox,
    pub(crate) counters: VcpuCounters,
    pub(crate) trace: Trace,
    #[pin]
    wait: WaitQueue,
}

impl VcpuShared {
    /// A virtual CPU that no one has asked anything of.
    pub(crate) fn new(id: u32) -> impl PinInit<Self> {
        pin_init!(Self {
            id,
            mailbox: Mailbox::new(),
            counters: VcpuCounters::new(),
            trace: Trace::new(),
            wait <- WaitQueue::new(static_lock_class!()),
        })
    }

    /// Leaves a request and makes the virtual CPU see it soon: wakes its thread where it sleeps, and
    /// makes it leave the guest where it runs it.
    pub(crate) fn request(&self, request: Request) {
        match self.mailbox.request(request) {
            Place::Asleep => self.wait.wake(),
            Place::Guest(cpu) if cpu != irq::cpu_id() => irq::kick(cpu),
            Place::Guest(_) | Place::Outside => {}
        }
    }

    /// Leaves a request that the virtual CPU's own thread will find before its next entry.
    #[inline]
    pub(crate) fn request_self(&self, request: Request) {
        self.mailbox.request_self(request);
    }

    /// Whether any request waits.
    #[inline]
    pub(crate) fn has_requests(&self) -> bool {
        self.mailbox.has_requests()
    }

    /// Whether any request waits that is none of `others`.
    #[inline]
    pub(crate) fn has_requests_beside(&self, others: Request) -> bool {
        self.mailbox.has_requests_beside(others)
    }

    /// Takes all requests.
    #[inline]
    pub(crate) fn take_requests(&self) -> Request {
        self.mailbox.take_requests()
    }

    /// Says that `cpu`, which is this one, is about to run the guest. Requests must be looked at after this.
    #[inline]
    pub(crate) fn set_in_guest(&self, cpu: u32) {
        self.mailbox.go(Place::Guest(cpu));
    }

    /// Says that the guest has exited.
    #[inline]
    pub(crate) fn set_outside(&self) {
        self.mailbox.come_back();
    }

    /// Makes the virtual CPU leave the guest, and returns when it has.
    pub(crate) fn leave_guest_and_wait(&self) {
        /// # Safety
        ///
        /// None: it touches nothing.
        unsafe extern "C" fn nothing(_: *mut kernel::ffi::c_void) {}
        if let Place::Guest(cpu) = self.mailbox.place() {
            // SAFETY: The function touches nothing. An offline CPU runs no guest and is ignored.
            unsafe {
                kb::smp_call_function_single(cpu as i32, Some(nothing), core::ptr::null_mut(), true)
            };
        }
    }

    /// Whether its thread sleeps.
    pub(crate) fn is_asleep(&self) -> bool {
        self.mailbox.place() == Place::Asleep
    }

    /// Sleeps until a request comes or a signal is pending.
    pub(crate) fn sleep(&self) {
        self.mailbox.go(Place::Asleep);
        self.wait.wait_until(|| self.mailbox.has_requests());
        self.mailbox.come_back();
    }

    /// Posts an interrupt for the local APIC.
    pub(crate) fn post(&self, vector: Vector, level: bool) {
        if self.mailbox.post(vector, level) {
            self.request(Request::EVENT);
        }
    }

    /// Posts an NMI.
    pub(crate) fn post_nmi(&self) {
        self.mailbox.post_nmi();
        self.request(Request::NMI);
    }

    /// Posts an INIT.
    pub(crate) fn post_init(&self) {
        self.mailbox.post_init();
        self.request(Request::INIT_OR_SIPI);
    }

    /// Posts a start-up interrupt.
    pub(crate) fn post_sipi(&self, vector: Vector) {
        self.mailbox.post_sipi(vector);
        self.request(Request::INIT_OR_SIPI);
    }

    /// The local APIC's identity as last published.
    #[inline]
    pub(crate) fn identity(&self) -> ApicIdentity {
        self.mailbox.identity(ApicId(self.id))
    }
}

/// The local APIC's timer: it only leaves a request, the vCPU's thread does the rest.
impl Expire for VcpuShared {
    fn expire(&self) {
        self.request(Request::LAPIC_TIMER);
    }
}
