// SPDX-License-Identifier: GPL-2.0

//! The trace of a virtual CPU's exits (RVISOR_TRACE_OPEN). The thread notes an exit when it comes, and leaves
//! itself a request: when that is seen to, before the next entry, the record is complete and goes into the ring.

use super::{
    shared::{Request, VcpuShared},
    vcpu::Core,
};
use crate::{
    bindings as uapi,
    host::{cpu, rcu::RcuCell, wait::WaitQueue},
    vmx::hardware::CurrentVmcs,
};
use core::sync::atomic::{AtomicBool, Ordering};
use kernel::{prelude::*, static_lock_class, sync::Arc};
use rvisor_core::{
    trace::{Record, Ring, Slot},
    x86::{
        exit::{ExitReason, ExitReasonField},
        vmcs::{Field64, FieldNatural},
    },
};

/// The records on their way to who reads them.
#[pin_data]
pub(crate) struct Stream {
    pub(crate) ring: Ring<KVVec<Slot>>,
    #[pin]
    pub(crate) arrival: WaitQueue,
}

impl Stream {
    /// An empty one.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    fn new() -> Result<Arc<Self>> {
        let count = uapi::RVISOR_TRACE_RECORDS as usize;
        let mut slots = KVVec::with_capacity(count, GFP_KERNEL_ACCOUNT)?;
        for _ in 0..count {
            slots.push_within_capacity(Slot::default())?;
        }
        Arc::pin_init(
            pin_init!(Self {
                ring: Ring::new(slots),
                arrival <- WaitQueue::new(static_lock_class!()),
            }),
            GFP_KERNEL_ACCOUNT,
        )
    }
}

/// Where a virtual CPU's records go.
pub(crate) struct Trace {
    stream: RcuCell<Arc<Stream>>,
    /// Somebody has it.
    taken: AtomicBool,
}

impl Trace {
    /// Nowhere.
    pub(crate) const fn new() -> Self {
        Self {
            stream: RcuCell::new(),
            taken: AtomicBool::new(false),
        }
    }

    /// Whether exits are to be noted.
    #[inline]
    pub(crate) fn is_on(&self) -> bool {
        !self.stream.is_empty()
    }

    /// Begins a trace; [`Self::end`] ends it.
    ///
    /// # Errors
    ///
    /// `EBUSY` where there is one; `ENOMEM`.
    pub(crate) fn begin(&self) -> Result<Arc<Stream>> {
        let stream = Stream::new()?;
        let boxed = KBox::new(stream.clone(), GFP_KERNEL_ACCOUNT)?;
        if self.taken.swap(true, Ordering::Acquire) {
            return Err(EBUSY);
        }
        self.stream.replace(Some(boxed));
        Ok(stream)
    }

    /// Ends the trace that [`Self::begin`] began.
    pub(crate) fn end(&self) {
        self.stream.replace(None);
        self.taken.store(false, Ordering::Release);
    }

    fn push(&self, record: &Record) {
        self.stream.read(|stream| {
            stream.ring.push(record);
            stream.arrival.wake();
        });
    }
}

impl Core {
    /// Notes an exit, before anything is done about it.
    #[cold]
    #[inline(never)]
    pub(super) fn note_exit(
        &mut self,
        vmcs: &CurrentVmcs<'_>,
        shared: &VcpuShared,
        reason: ExitReasonField,
    ) {
        let tsc = cpu::rdtsc();
        let detail = match reason.basic() {
            ExitReason::EPT_VIOLATION => vmcs.read64(Field64::GUEST_PHYSICAL_ADDRESS),
            ExitReason::RDMSR | ExitReason::WRMSR => self.registers[1] & 0xffff_ffff,
            _ => self.registers[0],
        };
        self.noted = Some(Record {
            tsc,
            handling: 0,
            rip: vmcs.read(FieldNatural::GUEST_RIP),
            qualification: vmcs.read(FieldNatural::EXIT_QUALIFICATION),
            detail,
            reason: reason.0,
        });
        shared.request_self(Request::TRACE);
    }

    /// The exit that was noted last has been seen to.
    #[cold]
    pub(super) fn tell_exit(&mut self) {
        if let Some(mut record) = self.noted.take() {
            record.handling = cpu::rdtsc().wrapping_sub(record.tsc);
            self.shared.trace.push(&record);
        }
    }
}
