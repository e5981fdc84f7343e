// SPDX-License-Identifier: GPL-2.0

//! The pages that a virtual CPU shares with its userspace program: `struct kvm_run` and the I/O data.
//!
//! Userspace may change them at any time, so each value is read once and checked after.

use crate::{bindings as uapi, host::page::KernelPage};
use core::{mem::offset_of, ptr};
use kernel::{bindings as kb, error::to_result, mm::virt::VmaNew, prelude::*};
use rvisor_core::x86::{
    address::{Gpa, PAGE_SIZE},
    vector::Vector,
};

/// The number of pages that can be mapped: `kvm_run`, the data of port I/O, and the ring of coalesced
/// writes, which all virtual CPUs share.
const PAGES: usize = 3;
/// What KVM_CHECK_EXTENSION(KVM_CAP_COALESCED_MMIO) answers: the ring's place.
pub(crate) const RING_PAGE: usize = 2;
/// What KVM_GET_VCPU_MMAP_SIZE answers.
pub(crate) const MMAP_SIZE: usize = PAGES * PAGE_SIZE as usize;
/// Where the data of port I/O lies in the mapping.
const PIO_OFFSET: u64 = PAGE_SIZE;

/// Why RUN returned, with what userspace is told.
#[derive(Clone, Copy, Debug)]
pub(crate) enum UserExit {
    /// KVM_EXIT_IO: `size` bytes, once.
    Io {
        is_in: bool,
        size: u8,
        port: u16,
        /// What is written out.
        data: u32,
    },
    /// KVM_EXIT_MMIO.
    Mmio {
        gpa: Gpa,
        length: u8,
        is_write: bool,
        /// What is written.
        data: [u8; 8],
    },
    /// KVM_EXIT_HLT.
    Halt,
    /// KVM_EXIT_SHUTDOWN: a triple fault.
    Shutdown,
    /// KVM_EXIT_IRQ_WINDOW_OPEN.
    InterruptWindow,
    /// KVM_EXIT_INTR: a signal.
    Signal,
    /// KVM_EXIT_SET_TPR.
    SetTpr,
    /// KVM_EXIT_IOAPIC_EOI.
    InterruptEnded { vector: Vector },
    /// KVM_EXIT_FAIL_ENTRY.
    FailedEntry { reason: u64, cpu: u32 },
    /// KVM_EXIT_INTERNAL_ERROR of the suberror that delivery of an event ran into trouble: what was
    /// delivered, the exit's reason and qualification, the guest-physical address, the host's CPU.
    Delivery { data: [u64; 5] },
    /// KVM_EXIT_INTERNAL_ERROR: an exit that rvisor does not know.
    UnexpectedExit { reason: u32, cpu: u32 },
    /// KVM_EXIT_INTERNAL_ERROR: an instruction that rvisor can't emulate.
    Emulation { bytes: [u8; 15], length: u8 },
}

/// The shared pages.
pub(crate) struct RunPage {
    run: KernelPage,
    pio: KernelPage,
}

/// The address of a field of `struct kvm_run`; for use in an `unsafe` block.
macro_rules! field {
    ($self:ident, $($field:tt)+) => {
        ptr::addr_of_mut!((*$self.raw()).$($field)+)
    };
}

impl RunPage {
    /// New pages.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(crate) fn new() -> Result<Self> {
        const { assert!(size_of::<uapi::kvm_run>() <= PAGE_SIZE as usize) };
        Ok(Self {
            run: KernelPage::new()?,
            pio: KernelPage::new()?,
        })
    }

    #[inline]
    fn raw(&self) -> *mut uapi::kvm_run {
        self.run.as_ptr().cast()
    }

    /// Maps the pages, and `ring` behind them, into a process.
    ///
    /// # Errors
    ///
    /// `EINVAL` where the range lies outside.
    pub(crate) fn map(&self, vma: &VmaNew, ring: &KernelPage) -> Result {
        // SAFETY: The VMA is being set up.
        let first = unsafe { (*vma.as_ptr()).vm_pgoff };
        let count = (vma.end() - vma.start()) / PAGE_SIZE as usize;
        if first.checked_add(count).is_none_or(|end| end > PAGES) {
            return Err(EINVAL);
        }
        vma.set_dontexpand();
        let mixed = vma.set_mixedmap();
        for (place, page) in [&self.run, &self.pio, ring]
            .into_iter()
            .skip(first)
            .take(count)
            .enumerate()
        {
            let address = vma.start() + place * PAGE_SIZE as usize;
            // SAFETY: The VMA is being set up with VM_MIXEDMAP; the mapping takes its own reference
            // to the page, which therefore outlives this.
            to_result(unsafe { kb::vm_insert_page(mixed.as_ptr(), address, page.as_page()) })?;
        }
        Ok(())
    }

    /// Whether userspace wants RUN to return at once.
    #[inline]
    pub(crate) fn immediate_exit(&self) -> bool {
        // SAFETY: The page holds a whole `struct kvm_run`.
        unsafe { ptr::read_volatile(field!(self, immediate_exit__unsafe)) != 0 }
    }

    /// Whether userspace wants to know when the guest can take an interrupt.
    #[inline]
    pub(crate) fn wants_interrupt_window(&self) -> bool {
        // SAFETY: The page holds a whole `struct kvm_run`.
        unsafe { ptr::read_volatile(field!(self, request_interrupt_window)) != 0 }
    }

    /// The CR8 that userspace left, for a VM without an interrupt controller in the kernel.
    pub(crate) fn cr8(&self) -> u64 {
        // SAFETY: The page holds a whole `struct kvm_run`.
        unsafe { ptr::read_volatile(field!(self, cr8)) }
    }

    /// What userspace is told at every return of RUN.
    pub(crate) fn set_state(&self, if_flag: bool, cr8: u64, apic_base: u64, ready: bool) {
        // SAFETY: The page holds a whole `struct kvm_run`.
        unsafe {
            ptr::write_volatile(field!(self, if_flag), if_flag.into());
            ptr::write_volatile(field!(self, flags), 0);
            ptr::write_volatile(field!(self, cr8), cr8);
            ptr::write_volatile(field!(self, apic_base), apic_base);
            ptr::write_volatile(field!(self, ready_for_interrupt_injection), ready.into());
        }
    }

    fn set_reason(&self, reason: u32) {
        // SAFETY: The page holds a whole `struct kvm_run`.
        unsafe { ptr::write_volatile(field!(self, exit_reason), reason) };
    }

    /// Writes at `offset` of the exit's own data.
    fn write<T: Copy>(&self, offset: usize, value: T) {
        const UNION: usize = offset_of!(uapi::kvm_run, __bindgen_anon_1);
        if UNION + offset + size_of::<T>() > size_of::<uapi::kvm_run>() {
            return;
        }
        // SAFETY: Inside the page by the check; userspace may write the same bytes, which nobody reads
        // back unchecked.
        unsafe {
            self.run
                .as_ptr()
                .add(UNION + offset)
                .cast::<T>()
                .write_unaligned(value)
        };
    }

    /// Tells userspace why RUN returns.
    pub(crate) fn set_exit(&self, exit: &UserExit) {
        match *exit {
            UserExit::Io {
                is_in,
                size,
                port,
                data,
            } => self.set_io(is_in, size, port, data),
            UserExit::Mmio {
                gpa,
                length,
                is_write,
                data,
            } => {
                self.set_reason(uapi::KVM_EXIT_MMIO);
                self.write(0, gpa.raw());
                self.write(8, data);
                self.write(16, u32::from(length));
                self.write(20, u8::from(is_write));
            }
            UserExit::Halt => self.set_reason(uapi::KVM_EXIT_HLT),
            UserExit::Shutdown => self.set_reason(uapi::KVM_EXIT_SHUTDOWN),
            UserExit::InterruptWindow => self.set_reason(uapi::KVM_EXIT_IRQ_WINDOW_OPEN),
            UserExit::Signal => self.set_reason(uapi::KVM_EXIT_INTR),
            UserExit::SetTpr => self.set_reason(uapi::KVM_EXIT_SET_TPR),
            UserExit::InterruptEnded { vector } => {
                self.set_reason(uapi::KVM_EXIT_IOAPIC_EOI);
                self.write(0, vector.0);
            }
            UserExit::FailedEntry { reason, cpu } => {
                self.set_reason(uapi::KVM_EXIT_FAIL_ENTRY);
                self.write(0, reason);
                self.write(8, cpu);
            }
            UserExit::Delivery { data } => {
                self.set_internal_error(uapi::KVM_INTERNAL_ERROR_DELIVERY_EV, &data);
            }
            UserExit::UnexpectedExit { reason, cpu } => self.set_internal_error(
                uapi::KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON,
                &[u64::from(reason), u64::from(cpu)],
            ),
            UserExit::Emulation { bytes, length } => self.set_emulation_failure(&bytes, length),
        }
    }

    fn set_io(&self, is_in: bool, size: u8, port: u16, data: u32) {
        self.set_reason(uapi::KVM_EXIT_IO);
        self.write(
            0,
            if is_in {
                uapi::KVM_EXIT_IO_IN
            } else {
                uapi::KVM_EXIT_IO_OUT
            } as u8,
        );
        self.write(1, size);
        self.write(2, port);
        self.write(4, 1u32);
        self.write(8, PIO_OFFSET);
        if !is_in {
            // SAFETY: The page is ours and longer than 4 bytes.
            unsafe { ptr::write_volatile(self.pio.as_ptr().cast::<u32>(), data) };
        }
    }

    fn set_internal_error(&self, suberror: u32, data: &[u64]) {
        self.set_reason(uapi::KVM_EXIT_INTERNAL_ERROR);
        self.write(0, suberror);
        self.write(4, data.len() as u32);
        for (place, value) in data.iter().enumerate() {
            self.write(8 + place * 8, *value);
        }
    }

    fn set_emulation_failure(&self, bytes: &[u8; 15], length: u8) {
        self.set_reason(uapi::KVM_EXIT_INTERNAL_ERROR);
        self.write(0, uapi::KVM_INTERNAL_ERROR_EMULATION);
        // Three words of data: the flags, and the length and bytes of the instruction.
        self.write(4, 3u32);
        self.write(
            8,
            u64::from(uapi::KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES),
        );
        self.write(16, length);
        self.write(17, *bytes);
    }

    /// What userspace gave for an IN of `size` bytes.
    pub(crate) fn io_data(&self, size: u8) -> u32 {
        // SAFETY: The page is ours and longer than 4 bytes.
        let data = unsafe { ptr::read_volatile(self.pio.as_ptr().cast::<u32>()) };
        match size {
            1 => data & 0xff,
            2 => data & 0xffff,
            _ => data,
        }
    }

    /// What userspace gave for an MMIO read.
    pub(crate) fn mmio_data(&self) -> [u8; 8] {
        const OFFSET: usize = offset_of!(uapi::kvm_run, __bindgen_anon_1) + 8;
        // SAFETY: `mmio.data` lies 8 bytes into the union.
        unsafe { ptr::read_volatile(self.run.as_ptr().add(OFFSET).cast::<[u8; 8]>()) }
    }
}
