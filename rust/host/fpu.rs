// SPDX-License-Identifier: GPL-2.0

//! The guest's FPU, SSE, AVX and further XSAVE state, kept by the kernel's own guest-FPU code.

use super::{
    irq::{IrqsOff, ThreadFlags},
    symbols::Symbols,
    vector,
};
use crate::bindings;
use kernel::{bindings as kb, error::to_result, prelude::*};
use rvisor_core::{
    emulate::{Encoding, Vector},
    x86::control::Xcr0,
};

/// The guest's extended state.
///
/// # Invariants
///
/// `state` was filled by `fpu_alloc_guest_fpstate` and is freed once.
pub(crate) struct GuestFpu {
    state: KBox<kb::fpu_guest>,
    symbols: Symbols,
}

// SAFETY: The state belongs to no thread while it isn't loaded, and `LoadedFpu` is not Send.
unsafe impl Send for GuestFpu {}

impl GuestFpu {
    /// State as after reset.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(crate) fn new(symbols: &Symbols) -> Result<Self> {
        let mut state = KBox::new(kb::fpu_guest::default(), GFP_KERNEL_ACCOUNT)?;
        // SAFETY: `state` is a `struct fpu_guest` to fill.
        if !unsafe { (symbols.fpu_alloc_guest_fpstate)(&mut *state) } {
            return Err(ENOMEM);
        }
        Ok(Self {
            state,
            symbols: *symbols,
        })
    }

    /// The size of the state in KVM_GET_XSAVE2's form, in bytes.
    pub(crate) fn uabi_size(&self) -> usize {
        self.state.uabi_size as usize
    }

    /// Puts the guest's state in the place of this thread's, until [`Self::unload`].
    pub(crate) fn load(&mut self) {
        // SAFETY: The state is valid by the invariant; this thread's goes to its own buffer.
        unsafe { (self.symbols.fpu_swap_kvm_fpstate)(&mut *self.state, true) };
    }

    /// Gives the thread its own state back.
    pub(crate) fn unload(&mut self) {
        // SAFETY: Balances `load` on the same thread.
        unsafe { (self.symbols.fpu_swap_kvm_fpstate)(&mut *self.state, false) };
    }

    /// Loads the registers where an interrupt's use of the FPU or a context switch has taken them away, as the
    /// flags say that were read since interrupts are off.
    #[inline]
    pub(crate) fn ensure_registers(&self, flags: ThreadFlags, _irqs: &IrqsOff) {
        if flags.needs_fpu_load() {
            // SAFETY: Called as before VM entry in KVM: interrupts off, this thread's flag set.
            unsafe { (self.symbols.switch_fpu_return)() };
        }
    }

    /// A vector register of the guest's, 0 to 15, while the state is loaded: bits 127:0, or with
    /// [`Encoding::Vex`] bits 255:0. `None` where the CPU has no more than the former.
    pub(crate) fn vector(&self, number: u8, encoding: Encoding, irqs: &IrqsOff) -> Option<Vector> {
        self.ensure_registers(ThreadFlags::read(), irqs);
        match encoding {
            Encoding::Legacy => Some(vector::read_xmm(number, irqs)),
            // SAFETY: The host's XCR0 has AVX.
            Encoding::Vex if has_avx() => Some(unsafe { vector::read_ymm(number, irqs) }),
            Encoding::Vex => None,
        }
    }

    /// Sets a vector register: bits 127:0, or with [`Encoding::Vex`] bits 255:0, upon which those above
    /// are cleared.
    pub(crate) fn set_vector(
        &mut self,
        number: u8,
        value: &Vector,
        encoding: Encoding,
        irqs: &IrqsOff,
    ) {
        self.ensure_registers(ThreadFlags::read(), irqs);
        match encoding {
            Encoding::Legacy => vector::write_xmm(number, value, irqs),
            // SAFETY: The host's XCR0 has AVX.
            Encoding::Vex if has_avx() => unsafe { vector::write_ymm(number, value, irqs) },
            Encoding::Vex => {}
        }
    }

    /// Writes the state in the XSAVE standard format; `buffer` may be longer than it.
    pub(crate) fn export(&mut self, buffer: &mut [u8], features: u64, pkru: u32) {
        // SAFETY: The function writes no more than the length given.
        unsafe {
            (self.symbols.fpu_copy_guest_fpstate_to_uabi)(
                &mut *self.state,
                buffer.as_mut_ptr(),
                buffer.len() as u32,
                features,
                pkru,
            )
        };
    }

    /// Takes the state from the XSAVE standard format.
    ///
    /// # Errors
    ///
    /// `EINVAL` for features outside `xcr0`, reserved MXCSR bits or header bytes.
    pub(crate) fn import(&mut self, buffer: &[u8], xcr0: u64, pkru: &mut u32) -> Result {
        if buffer.len() < self.uabi_size() {
            return Err(EINVAL);
        }
        // SAFETY: The function reads no more than the state's own size, which `buffer` has.
        to_result(unsafe {
            (self.symbols.fpu_copy_uabi_to_guest_fpstate)(
                &mut *self.state,
                buffer.as_ptr(),
                xcr0,
                pkru,
            )
        })
    }
}

/// Whether the host has enabled AVX's registers.
fn has_avx() -> bool {
    // SAFETY: Reads XCR0 where there is one. It is the host's own: the guest's is there in guest mode only.
    let xcr0 = Xcr0(unsafe { bindings::rvisor_host_xcr0() });
    xcr0.has(Xcr0::SSE | Xcr0::AVX)
}

impl Drop for GuestFpu {
    fn drop(&mut self) {
        // SAFETY: Allocated by the invariant, and not loaded: `unload` runs before a RUN ends.
        unsafe { (self.symbols.fpu_free_guest_fpstate)(&mut *self.state) };
    }
}
