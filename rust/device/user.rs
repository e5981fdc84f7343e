// SPDX-License-Identifier: GPL-2.0

//! Structures that cross to and from userspace, and the numbers of the ioctls that carry them.

use crate::bindings as uapi;
use kernel::{
    ioctl::{_IO, _IOR, _IOW, _IOWR},
    prelude::*,
    uaccess::{UserPtr, UserSlice},
};

/// A structure of KVM's API.
///
/// # Safety
///
/// Any bytes make a valid value, and a value has no padding, so that all of its bytes are initialised.
pub(crate) unsafe trait Plain: Copy + Default {}

macro_rules! plain {
    ($($type:ident: $size:literal,)*) => {
        $(
            const _: () = assert!(size_of::<uapi::$type>() == $size);
            // SAFETY: A structure of integers and arrays of them. Its size is the sum of its fields',
            // which KVM's header pads by hand.
            unsafe impl Plain for uapi::$type {}
        )*
    };
}

plain! {
    kvm_clock_data: 48,
    kvm_coalesced_mmio_zone: 16,
    kvm_cpuid_entry2: 40,
    kvm_debugregs: 128,
    kvm_enable_cap: 104,
    kvm_fpu: 416,
    kvm_interrupt: 4,
    kvm_ioeventfd: 64,
    kvm_irq_level: 8,
    kvm_irqchip: 520,
    kvm_irqfd: 32,
    kvm_irq_routing_entry: 48,
    kvm_lapic_state: 1024,
    kvm_mp_state: 4,
    kvm_msi: 32,
    kvm_msr_entry: 16,
    kvm_pit_config: 64,
    kvm_pit_state2: 112,
    kvm_regs: 144,
    kvm_reinject_control: 32,
    kvm_sregs: 312,
    kvm_tpr_access_ctl: 40,
    kvm_userspace_memory_region: 32,
    kvm_userspace_memory_region2: 160,
    kvm_vapic_addr: 8,
    kvm_vcpu_events: 64,
    kvm_x86_mce: 64,
    kvm_xcrs: 392,
}

// SAFETY: An integer.
unsafe impl Plain for u32 {}
// SAFETY: An integer.
unsafe impl Plain for u64 {}
// SAFETY: Integers, without padding.
unsafe impl Plain for [u64; 2] {}
// SAFETY: As above.
unsafe impl Plain for [u64; 3] {}

/// Reads a structure at `address` of the current process.
///
/// # Errors
///
/// `EFAULT`.
pub(crate) fn read<T: Plain>(address: usize) -> Result<T> {
    let mut value = T::default();
    // SAFETY: `value` is that many bytes, and any bytes make a valid one.
    let bytes = unsafe {
        core::slice::from_raw_parts_mut(
            core::ptr::from_mut(&mut value).cast::<u8>(),
            size_of::<T>(),
        )
    };
    UserSlice::new(UserPtr::from_addr(address), bytes.len())
        .reader()
        .read_slice(bytes)?;
    Ok(value)
}

/// Writes a structure at `address` of the current process.
///
/// # Errors
///
/// `EFAULT`.
pub(crate) fn write<T: Plain>(address: usize, value: &T) -> Result {
    // SAFETY: `value` is that many initialised bytes.
    let bytes = unsafe {
        core::slice::from_raw_parts(core::ptr::from_ref(value).cast::<u8>(), size_of::<T>())
    };
    UserSlice::new(UserPtr::from_addr(address), bytes.len())
        .writer()
        .write_slice(bytes)
}

/// The address of the element at `place` of an array of `T` that begins `offset` bytes past `base`.
///
/// # Errors
///
/// `EFAULT` where that wraps.
pub(crate) fn element<T>(base: usize, offset: usize, place: usize) -> Result<usize> {
    place
        .checked_mul(size_of::<T>())
        .and_then(|inside| inside.checked_add(offset))
        .and_then(|inside| inside.checked_add(base))
        .ok_or(EFAULT)
}

/// The size of the header of `kvm_cpuid2`, `kvm_msrs` and `kvm_irq_routing`: two 32-bit words.
pub(crate) const LIST_HEADER: usize = 8;

const KVMIO: u32 = uapi::KVMIO;

/// rvisor's own (include/uapi/rvisor.h).
pub(crate) const TRACE_OPEN: u32 = _IO(uapi::RVISOR_IOCTL_TYPE, 0x00);

macro_rules! ioctls {
    ($($name:ident = $make:expr;)*) => {
        $(pub(crate) const $name: u32 = $make;)*
    };
}

/// The header of a list: the count of its entries and a word of padding or flags.
type ListHeader = [u32; 2];

ioctls! {
    GET_API_VERSION = _IO(KVMIO, 0x00);
    CREATE_VM = _IO(KVMIO, 0x01);
    GET_MSR_INDEX_LIST = _IOWR::<u32>(KVMIO, 0x02);
    CHECK_EXTENSION = _IO(KVMIO, 0x03);
    GET_VCPU_MMAP_SIZE = _IO(KVMIO, 0x04);
    GET_SUPPORTED_CPUID = _IOWR::<ListHeader>(KVMIO, 0x05);
    GET_MSR_FEATURE_INDEX_LIST = _IOWR::<u32>(KVMIO, 0x0a);
    CREATE_VCPU = _IO(KVMIO, 0x41);
    // A slot, padding, and the address of its bitmap.
    GET_DIRTY_LOG = _IOW::<[u64; 2]>(KVMIO, 0x42);
    SET_NR_MMU_PAGES = _IO(KVMIO, 0x44);
    SET_USER_MEMORY_REGION = _IOW::<uapi::kvm_userspace_memory_region>(KVMIO, 0x46);
    SET_TSS_ADDR = _IO(KVMIO, 0x47);
    SET_IDENTITY_MAP_ADDR = _IOW::<u64>(KVMIO, 0x48);
    SET_USER_MEMORY_REGION2 = _IOW::<uapi::kvm_userspace_memory_region2>(KVMIO, 0x49);
    CREATE_IRQCHIP = _IO(KVMIO, 0x60);
    IRQ_LINE = _IOW::<uapi::kvm_irq_level>(KVMIO, 0x61);
    GET_IRQCHIP = _IOWR::<uapi::kvm_irqchip>(KVMIO, 0x62);
    // The direction is wrong in KVM's header too.
    SET_IRQCHIP = _IOR::<uapi::kvm_irqchip>(KVMIO, 0x63);
    CREATE_PIT = _IO(KVMIO, 0x64);
    IRQ_LINE_STATUS = _IOWR::<uapi::kvm_irq_level>(KVMIO, 0x67);
    REGISTER_COALESCED_MMIO = _IOW::<uapi::kvm_coalesced_mmio_zone>(KVMIO, 0x67);
    UNREGISTER_COALESCED_MMIO = _IOW::<uapi::kvm_coalesced_mmio_zone>(KVMIO, 0x68);
    SET_GSI_ROUTING = _IOW::<ListHeader>(KVMIO, 0x6a);
    REINJECT_CONTROL = _IO(KVMIO, 0x71);
    IRQFD = _IOW::<uapi::kvm_irqfd>(KVMIO, 0x76);
    CREATE_PIT2 = _IOW::<uapi::kvm_pit_config>(KVMIO, 0x77);
    SET_BOOT_CPU_ID = _IO(KVMIO, 0x78);
    IOEVENTFD = _IOW::<uapi::kvm_ioeventfd>(KVMIO, 0x79);
    SET_CLOCK = _IOW::<uapi::kvm_clock_data>(KVMIO, 0x7b);
    GET_CLOCK = _IOR::<uapi::kvm_clock_data>(KVMIO, 0x7c);
    RUN = _IO(KVMIO, 0x80);
    GET_REGS = _IOR::<uapi::kvm_regs>(KVMIO, 0x81);
    SET_REGS = _IOW::<uapi::kvm_regs>(KVMIO, 0x82);
    GET_SREGS = _IOR::<uapi::kvm_sregs>(KVMIO, 0x83);
    SET_SREGS = _IOW::<uapi::kvm_sregs>(KVMIO, 0x84);
    INTERRUPT = _IOW::<uapi::kvm_interrupt>(KVMIO, 0x86);
    GET_MSRS = _IOWR::<ListHeader>(KVMIO, 0x88);
    SET_MSRS = _IOW::<ListHeader>(KVMIO, 0x89);
    SET_SIGNAL_MASK = _IOW::<u32>(KVMIO, 0x8b);
    GET_FPU = _IOR::<uapi::kvm_fpu>(KVMIO, 0x8c);
    SET_FPU = _IOW::<uapi::kvm_fpu>(KVMIO, 0x8d);
    GET_LAPIC = _IOR::<uapi::kvm_lapic_state>(KVMIO, 0x8e);
    SET_LAPIC = _IOW::<uapi::kvm_lapic_state>(KVMIO, 0x8f);
    SET_CPUID2 = _IOW::<ListHeader>(KVMIO, 0x90);
    GET_CPUID2 = _IOWR::<ListHeader>(KVMIO, 0x91);
    TPR_ACCESS_REPORTING = _IOWR::<uapi::kvm_tpr_access_ctl>(KVMIO, 0x92);
    SET_VAPIC_ADDR = _IOW::<uapi::kvm_vapic_addr>(KVMIO, 0x93);
    GET_MP_STATE = _IOR::<uapi::kvm_mp_state>(KVMIO, 0x98);
    SET_MP_STATE = _IOW::<uapi::kvm_mp_state>(KVMIO, 0x99);
    NMI = _IO(KVMIO, 0x9a);
    X86_SETUP_MCE = _IOW::<u64>(KVMIO, 0x9c);
    X86_GET_MCE_CAP_SUPPORTED = _IOR::<u64>(KVMIO, 0x9d);
    X86_SET_MCE = _IOW::<uapi::kvm_x86_mce>(KVMIO, 0x9e);
    ENABLE_CAP = _IOW::<uapi::kvm_enable_cap>(KVMIO, 0xa3);
    GET_PIT2 = _IOR::<uapi::kvm_pit_state2>(KVMIO, 0x9f);
    GET_VCPU_EVENTS = _IOR::<uapi::kvm_vcpu_events>(KVMIO, 0x9f);
    SET_PIT2 = _IOW::<uapi::kvm_pit_state2>(KVMIO, 0xa0);
    SET_VCPU_EVENTS = _IOW::<uapi::kvm_vcpu_events>(KVMIO, 0xa0);
    GET_DEBUGREGS = _IOR::<uapi::kvm_debugregs>(KVMIO, 0xa1);
    SET_DEBUGREGS = _IOW::<uapi::kvm_debugregs>(KVMIO, 0xa2);
    SET_TSC_KHZ = _IO(KVMIO, 0xa2);
    GET_TSC_KHZ = _IO(KVMIO, 0xa3);
    GET_XSAVE = _IOR::<[u8; 4096]>(KVMIO, 0xa4);
    SET_XSAVE = _IOW::<[u8; 4096]>(KVMIO, 0xa5);
    SIGNAL_MSI = _IOW::<uapi::kvm_msi>(KVMIO, 0xa5);
    GET_XCRS = _IOR::<uapi::kvm_xcrs>(KVMIO, 0xa6);
    SET_XCRS = _IOW::<uapi::kvm_xcrs>(KVMIO, 0xa7);
    GET_STATS_FD = _IO(KVMIO, 0xce);
    CLEAR_DIRTY_LOG = _IOWR::<[u64; 3]>(KVMIO, 0xc0);
    GET_XSAVE2 = _IOR::<[u8; 4096]>(KVMIO, 0xcf);
}
