// SPDX-License-Identifier: GPL-2.0
//! The ioctl numbers of KVM's API (Documentation/virt/kvm/api.rst, include/uapi/linux/kvm.h).

use std::mem::size_of;

/// The type byte of all KVM ioctls.
pub const KVMIO: u64 = 0xae;

const fn number(direction: u64, nr: u64, size: usize) -> u64 {
    (direction << 30) | ((size as u64) << 16) | (KVMIO << 8) | nr
}
/// An ioctl whose argument is a value or nothing.
pub const fn io(nr: u64) -> u64 {
    number(0, nr, 0)
}
/// An ioctl that reads a `T` from the caller.
pub const fn iow<T>(nr: u64) -> u64 {
    number(1, nr, size_of::<T>())
}
/// An ioctl that writes a `T` to the caller.
pub const fn ior<T>(nr: u64) -> u64 {
    number(2, nr, size_of::<T>())
}
/// An ioctl that reads and writes a `T`.
pub const fn iowr<T>(nr: u64) -> u64 {
    number(3, nr, size_of::<T>())
}
/// How many bytes the request's number says that it moves.
pub const fn size_of_request(request: u64) -> usize {
    ((request >> 16) & 0x3fff) as usize
}

macro_rules! requests {
    ($($name:ident = $make:ident$(::<$kind:ty>)?($nr:expr);)+) => {
        $(#[doc = concat!("`KVM_", stringify!($name), "`")]
        pub const $name: u64 = $make$(::<$kind>)?($nr);)+
    };
}

requests! {
    GET_API_VERSION = io(0x00);
    CREATE_VM = io(0x01);
    GET_MSR_INDEX_LIST = iowr::<u32>(0x02);
    CHECK_EXTENSION = io(0x03);
    GET_VCPU_MMAP_SIZE = io(0x04);
    GET_SUPPORTED_CPUID = iowr::<u64>(0x05);
    GET_EMULATED_CPUID = iowr::<u64>(0x09);
    GET_MSR_FEATURE_INDEX_LIST = iowr::<u32>(0x0a);
    CREATE_VCPU = io(0x41);
    GET_DIRTY_LOG = iow::<[u64; 2]>(0x42);
    SET_NR_MMU_PAGES = io(0x44);
    SET_USER_MEMORY_REGION = iow::<[u64; 4]>(0x46);
    SET_TSS_ADDR = io(0x47);
    SET_IDENTITY_MAP_ADDR = iow::<u64>(0x48);
    SET_USER_MEMORY_REGION2 = iow::<[u64; 20]>(0x49);
    CREATE_IRQCHIP = io(0x60);
    IRQ_LINE = iow::<[u32; 2]>(0x61);
    REINJECT_CONTROL = io(0x71);
    IRQ_LINE_STATUS = iowr::<[u32; 2]>(0x67);
    REGISTER_COALESCED_MMIO = iow::<kvm_bindings::kvm_coalesced_mmio_zone>(0x67);
    UNREGISTER_COALESCED_MMIO = iow::<kvm_bindings::kvm_coalesced_mmio_zone>(0x68);
    SET_GSI_ROUTING = iow::<u64>(0x6a);
    IRQFD = iow::<kvm_bindings::kvm_irqfd>(0x76);
    IOEVENTFD = iow::<kvm_bindings::kvm_ioeventfd>(0x79);
    CREATE_PIT2 = iow::<[u32; 16]>(0x77);
    SET_BOOT_CPU_ID = io(0x78);
    SIGNAL_MSI = iow::<[u64; 4]>(0xa5);
    GET_IRQCHIP = iowr::<kvm_bindings::kvm_irqchip>(0x62);
    SET_IRQCHIP = ior::<kvm_bindings::kvm_irqchip>(0x63);
    GET_PIT2 = ior::<kvm_bindings::kvm_pit_state2>(0x9f);
    SET_PIT2 = iow::<kvm_bindings::kvm_pit_state2>(0xa0);
    SET_CLOCK = iow::<kvm_bindings::kvm_clock_data>(0x7b);
    GET_CLOCK = ior::<kvm_bindings::kvm_clock_data>(0x7c);
    RUN = io(0x80);
    GET_REGS = ior::<kvm_bindings::kvm_regs>(0x81);
    SET_REGS = iow::<kvm_bindings::kvm_regs>(0x82);
    GET_SREGS = ior::<kvm_bindings::kvm_sregs>(0x83);
    SET_SREGS = iow::<kvm_bindings::kvm_sregs>(0x84);
    INTERRUPT = iow::<u32>(0x86);
    GET_MSRS = iowr::<u64>(0x88);
    SET_MSRS = iow::<u64>(0x89);
    SET_SIGNAL_MASK = iow::<u32>(0x8b);
    GET_FPU = ior::<kvm_bindings::kvm_fpu>(0x8c);
    SET_FPU = iow::<kvm_bindings::kvm_fpu>(0x8d);
    GET_LAPIC = ior::<[u8; 1024]>(0x8e);
    SET_LAPIC = iow::<[u8; 1024]>(0x8f);
    SET_CPUID2 = iow::<u64>(0x90);
    GET_CPUID2 = iowr::<u64>(0x91);
    TPR_ACCESS_REPORTING = iowr::<kvm_bindings::kvm_tpr_access_ctl>(0x92);
    SET_VAPIC_ADDR = iow::<u64>(0x93);
    GET_MP_STATE = ior::<u32>(0x98);
    SET_MP_STATE = iow::<u32>(0x99);
    NMI = io(0x9a);
    X86_SETUP_MCE = iow::<u64>(0x9c);
    X86_GET_MCE_CAP_SUPPORTED = ior::<u64>(0x9d);
    X86_SET_MCE = iow::<[u64; 8]>(0x9e);
    GET_VCPU_EVENTS = ior::<[u32; 16]>(0x9f);
    SET_VCPU_EVENTS = iow::<[u32; 16]>(0xa0);
    GET_DEBUGREGS = ior::<kvm_bindings::kvm_debugregs>(0xa1);
    SET_DEBUGREGS = iow::<kvm_bindings::kvm_debugregs>(0xa2);
    ENABLE_CAP = iow::<kvm_bindings::kvm_enable_cap>(0xa3);
    SET_TSC_KHZ = io(0xa2);
    GET_TSC_KHZ = io(0xa3);
    GET_XSAVE = ior::<[u8; 4096]>(0xa4);
    SET_XSAVE = iow::<[u8; 4096]>(0xa5);
    CLEAR_DIRTY_LOG = iowr::<[u64; 3]>(0xc0);
    GET_STATS_FD = io(0xce);
    GET_XSAVE2 = ior::<[u8; 4096]>(0xcf);
    GET_XCRS = ior::<kvm_bindings::kvm_xcrs>(0xa6);
    SET_XCRS = iow::<kvm_bindings::kvm_xcrs>(0xa7);
}

/// `RVISOR_TRACE_OPEN` (include/uapi/rvisor.h).
pub const RVISOR_TRACE_OPEN: u64 = 0xbd << 8;
