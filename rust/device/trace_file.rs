// SPDX-License-Identifier: GPL-2.0

//! RVISOR_TRACE_OPEN: the live stream of a virtual CPU's exits (include/uapi/rvisor.h).

use crate::{
    bindings as uapi,
    host::{
        anon_file::{self, Access, AnonFile, Reading, Reservation},
        mutex,
        wait::WaitQueue,
    },
    vm::{trace::Stream, vcpu::Vcpu},
    RvisorModule,
};
use kernel::{
    current, new_mutex,
    prelude::*,
    sync::{Arc, ArcBorrow, Mutex},
    uaccess::UserSliceWriter,
};
use rvisor_core::trace::WORDS;

/// Bytes of a record.
const RECORD: usize = WORDS * size_of::<u64>();
const _: () = assert!(RECORD == size_of::<uapi::rvisor_trace_record>());

/// A virtual CPU that is being traced; no longer when this is dropped.
struct Traced(Arc<Vcpu>);

impl Drop for Traced {
    fn drop(&mut self) {
        self.0.shared.trace.end();
    }
}

/// An open trace.
#[pin_data]
struct TraceFile {
    stream: Arc<Stream>,
    /// One thread reads at a time.
    #[pin]
    reader: Mutex<()>,
    _traced: Traced,
}

/// Opens the trace of a virtual CPU.
///
/// # Errors
///
/// `EINVAL` with an argument; `EBUSY` where it is open; `EMFILE`, `ENFILE`, `ENOMEM`.
// Out of line: nothing of it shall be on the way of other calls.
#[inline(never)]
pub(super) fn open(vcpu: Arc<Vcpu>, argument: usize) -> Result<isize> {
    if argument != 0 {
        return Err(EINVAL);
    }
    let reservation = Reservation::new()?;
    let stream = vcpu.shared.trace.begin()?;
    let traced = Traced(vcpu);
    let file = Arc::pin_init(
        pin_init!(TraceFile {
            stream,
            reader <- new_mutex!(()),
            _traced: traced,
        }),
        GFP_KERNEL_ACCOUNT,
    )?;
    anon_file::open(reservation, file)
}

impl TraceFile {
    /// Gives userspace the records that are there, as many as fit, and says how many bytes they are.
    ///
    /// # Errors
    ///
    /// `EFAULT` where not even the first can be written: none is lost then; `EINTR` for a thread that is killed
    /// while another one reads.
    fn give(&self, to: &mut UserSliceWriter) -> Result<usize> {
        let _reader = mutex::lock_killable(&self.reader)?;
        let ring = &self.stream.ring;
        let mut given = 0;
        // The guest may be as fast as the reader: no more than the ring holds.
        for _ in 0..uapi::RVISOR_TRACE_RECORDS {
            if to.len() < RECORD {
                break;
            }
            let Some(words) = ring.first() else {
                break;
            };
            match words.iter().try_for_each(|word| to.write(word)) {
                Err(error) if given == 0 => return Err(error),
                Err(_) => break,
                Ok(()) => {}
            }
            ring.advance();
            given += RECORD;
        }
        Ok(given)
    }
}

impl AnonFile for TraceFile {
    const NAME: &'static CStr = c"rvisor-trace";
    const ACCESS: Access = Access::Stream;
    type OwnerModule = RvisorModule;

    fn read(this: ArcBorrow<'_, Self>, reading: Reading) -> Result<usize> {
        let Reading {
            mut to, at_once, ..
        } = reading;
        if to.len() < RECORD {
            return Err(EINVAL);
        }
        let stream = &this.stream;
        loop {
            let given = this.give(&mut to)?;
            if given > 0 {
                return Ok(given);
            }
            if at_once {
                return Err(EAGAIN);
            }
            stream.arrival.wait_until(|| !stream.ring.is_empty());
            if stream.ring.is_empty() && current!().signal_pending() {
                return Err(ERESTARTSYS);
            }
        }
    }

    fn readiness(&self) -> Option<(&WaitQueue, bool)> {
        Some((&self.stream.arrival, !self.stream.ring.is_empty()))
    }
}
