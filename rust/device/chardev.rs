// SPDX-License-Identifier: GPL-2.0

//! `/dev/rvisor`: what can be asked before there is a virtual machine.

use super::{
    user::{self, element, LIST_HEADER},
    vcpu_file::XSAVE_SIZE,
};
use crate::{
    bindings as uapi,
    host::anon_file::{self, Reservation},
    vm::{
        apic_settings::X2APIC_API_FLAGS,
        clock,
        machine::{supported_cpuid, Host, Vm, MAX_VCPUS},
        memory::{LOG_OPTIONS, SLOTS},
        run_page::{MMAP_SIZE, RING_PAGE},
    },
    RvisorModule,
};
use kernel::{
    container_of,
    fs::File,
    miscdevice::{MiscDevice, MiscDeviceRegistration},
    prelude::*,
    sync::Arc,
};
use rvisor_core::{
    cpu::{
        cpuid::{CpuidEntry, MAX_ENTRIES},
        machine_check::{MAX_BANKS, SUPPORTED_CAPABILITIES},
        msr::feature_value,
        msr_list::{indices, FEATURE_INDICES},
    },
    irqchip::lapic::BusCycle,
    x86::msr::MsrIndex,
};

/// The most entries of KVM_GET_MSRS and KVM_SET_MSRS, exclusive.
pub(super) const MAX_MSRS: u32 = 256;

/// An open `/dev/rvisor`.
pub(crate) struct Chardev {
    host: Arc<Host>,
}

#[vtable]
impl MiscDevice for Chardev {
    type Ptr = KBox<Self>;

    fn open(_file: &File, misc: &MiscDeviceRegistration<Self>) -> Result<KBox<Self>> {
        let misc: *const MiscDeviceRegistration<Self> = misc;
        // SAFETY: The only registration is the field of the module's own structure, whose `host` is
        // initialised before it and dropped after it.
        let module = unsafe { &*container_of!(misc, RvisorModule, device) };
        Ok(KBox::new(
            Self {
                host: module.host.clone(),
            },
            GFP_KERNEL,
        )?)
    }

    fn ioctl(this: &Self, _file: &File, command: u32, argument: usize) -> Result<isize> {
        this.system_ioctl(command, argument)
    }
}

/// What KVM_CHECK_EXTENSION answers: yes only to what works.
pub(super) fn check_extension(host: &Host, capability: usize) -> isize {
    let Ok(capability) = u32::try_from(capability) else {
        return 0;
    };
    match capability {
        uapi::KVM_CAP_IRQCHIP
        | uapi::KVM_CAP_HLT
        | uapi::KVM_CAP_MMU_SHADOW_CACHE_CONTROL
        | uapi::KVM_CAP_IRQFD
        | uapi::KVM_CAP_IRQFD_RESAMPLE
        | uapi::KVM_CAP_IOEVENTFD
        | uapi::KVM_CAP_IOEVENTFD_NO_LENGTH
        | uapi::KVM_CAP_IOEVENTFD_ANY_LENGTH
        | uapi::KVM_CAP_COALESCED_PIO
        | uapi::KVM_CAP_USER_MEMORY
        | uapi::KVM_CAP_SET_TSS_ADDR
        | uapi::KVM_CAP_EXT_CPUID
        | uapi::KVM_CAP_MP_STATE
        | uapi::KVM_CAP_SYNC_MMU
        | uapi::KVM_CAP_DESTROY_MEMORY_REGION_WORKS
        | uapi::KVM_CAP_USER_NMI
        | uapi::KVM_CAP_IRQ_INJECT_STATUS
        | uapi::KVM_CAP_JOIN_MEMORY_REGIONS_WORKS
        | uapi::KVM_CAP_PIT2
        | uapi::KVM_CAP_REINJECT_CONTROL
        | uapi::KVM_CAP_SET_BOOT_CPU_ID
        | uapi::KVM_CAP_PIT_STATE2
        | uapi::KVM_CAP_SET_IDENTITY_MAP_ADDR
        | uapi::KVM_CAP_INTERNAL_ERROR_DATA
        | uapi::KVM_CAP_VCPU_EVENTS
        | uapi::KVM_CAP_DEBUGREGS
        | uapi::KVM_CAP_XSAVE
        | uapi::KVM_CAP_GET_TSC_KHZ
        | uapi::KVM_CAP_TSC_DEADLINE_TIMER
        | uapi::KVM_CAP_SIGNAL_MSI
        | uapi::KVM_CAP_READONLY_MEM
        | uapi::KVM_CAP_CHECK_EXTENSION_VM
        | uapi::KVM_CAP_IMMEDIATE_EXIT
        | uapi::KVM_CAP_ENABLE_CAP
        | uapi::KVM_CAP_ENABLE_CAP_VM
        | uapi::KVM_CAP_MSR_PLATFORM_INFO
        | uapi::KVM_CAP_SPLIT_IRQCHIP
        | uapi::KVM_CAP_BINARY_STATS_FD
        | uapi::KVM_CAP_USER_MEMORY2
        | uapi::KVM_CAP_GET_MSR_FEATURES => 1,
        // That KVM_SET_GUEST_DEBUG has no fault of old: true where it is not offered. QEMU wants to hear it.
        uapi::KVM_CAP_X86_ROBUST_SINGLESTEP => 1,
        // A set of the types of machine: 0 is the only one.
        uapi::KVM_CAP_VM_TYPES => 1,
        uapi::KVM_CAP_MCE => MAX_BANKS as isize,
        uapi::KVM_CAP_ADJUST_CLOCK => clock::VALID_FLAGS as isize,
        uapi::KVM_CAP_XSAVE2 => xsave_size(host),
        uapi::KVM_CAP_COALESCED_MMIO => RING_PAGE as isize,
        uapi::KVM_CAP_X2APIC_API => X2APIC_API_FLAGS as isize,
        uapi::KVM_CAP_X86_APIC_BUS_CYCLES_NS => BusCycle::DEFAULT.nanoseconds() as isize,
        uapi::KVM_CAP_XCRS => (host.xcr0 != 0).into(),
        uapi::KVM_CAP_IRQ_ROUTING => rvisor_core::irqchip::routing::MAX_ROUTES as isize,
        uapi::KVM_CAP_NR_VCPUS => {
            // SAFETY: Reads the kernel's count of online CPUs.
            let online = unsafe { uapi::rvisor_online_cpus() };
            online.min(MAX_VCPUS) as isize
        }
        uapi::KVM_CAP_MAX_VCPUS | uapi::KVM_CAP_MAX_VCPU_ID => MAX_VCPUS as isize,
        uapi::KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 => LOG_OPTIONS as isize,
        uapi::KVM_CAP_NR_MEMSLOTS => SLOTS as isize,
        _ => 0,
    }
}

/// The size of KVM_GET_XSAVE2's area.
fn xsave_size(host: &Host) -> isize {
    (host.xsave.standard_size(host.xcr0) as isize).max(XSAVE_SIZE as isize)
}

impl Chardev {
    fn system_ioctl(&self, command: u32, argument: usize) -> Result<isize> {
        match command {
            user::GET_API_VERSION if argument != 0 => Err(EINVAL),
            user::GET_API_VERSION => Ok(uapi::KVM_API_VERSION as isize),
            // The one type of machine is 0.
            user::CREATE_VM if argument != 0 => Err(EINVAL),
            user::CREATE_VM => anon_file::open(Reservation::new()?, Vm::new(self.host.clone())?),
            user::CHECK_EXTENSION => Ok(check_extension(&self.host, argument)),
            user::GET_VCPU_MMAP_SIZE if argument != 0 => Err(EINVAL),
            user::GET_VCPU_MMAP_SIZE => Ok(MMAP_SIZE as isize),
            user::GET_SUPPORTED_CPUID => self.supported_cpuid(argument),
            user::GET_MSR_INDEX_LIST => write_indices(argument, || indices(&self.host.offered)),
            user::GET_MSR_FEATURE_INDEX_LIST => {
                write_indices(argument, || FEATURE_INDICES.into_iter())
            }
            user::GET_MSRS => self.feature_msrs(argument),
            user::X86_GET_MCE_CAP_SUPPORTED => {
                user::write(argument, &SUPPORTED_CAPABILITIES)?;
                Ok(0)
            }
            _ => Err(EINVAL),
        }
    }

    fn supported_cpuid(&self, argument: usize) -> Result<isize> {
        let room: u32 = user::read(argument)?;
        let table = supported_cpuid(&self.host.offer)?;
        if (room as usize).min(MAX_ENTRIES) < table.len() {
            return Err(E2BIG);
        }
        write_cpuid(argument, &table)?;
        Ok(0)
    }

    /// KVM_GET_MSRS on the system: the MSRs that describe features.
    fn feature_msrs(&self, argument: usize) -> Result<isize> {
        for_each_msr(argument, true, |entry| {
            let known = self.host.offer.guest_arch_capabilities();
            match feature_value(MsrIndex(entry.index), known) {
                Some(value) => {
                    entry.data = value;
                    Ok(true)
                }
                None => Ok(false),
            }
        })
    }
}

/// Writes a list of MSR indices behind its count, which is filled in even where the room is too small.
fn write_indices<I: Iterator<Item = MsrIndex>>(
    argument: usize,
    list: impl Fn() -> I,
) -> Result<isize> {
    let room: u32 = user::read(argument)?;
    let count = list().count();
    user::write(argument, &(count as u32))?;
    if (room as usize) < count {
        return Err(E2BIG);
    }
    for (place, index) in list().enumerate() {
        let address = element::<u32>(argument, size_of::<u32>(), place)?;
        user::write(address, &index.0)?;
    }
    Ok(0)
}

/// Writes a CPUID table behind its count.
pub(super) fn write_cpuid(argument: usize, table: &[CpuidEntry]) -> Result {
    for (place, entry) in table.iter().enumerate() {
        let address = element::<uapi::kvm_cpuid_entry2>(argument, LIST_HEADER, place)?;
        user::write(
            address,
            &uapi::kvm_cpuid_entry2 {
                function: entry.function,
                index: entry.index,
                flags: entry.flags,
                eax: entry.eax,
                ebx: entry.ebx,
                ecx: entry.ecx,
                edx: entry.edx,
                padding: [0; 3],
            },
        )?;
    }
    user::write(argument, &(table.len() as u32))
}

/// Goes through a list of MSRs until `access` says that one can't be, and says how many there were
/// before it. `is_read` writes the values back. The list is read whole before the first access, so that
/// one that can't be read changes nothing.
///
/// # Errors
///
/// `E2BIG` for too many, `EFAULT`, `ENOMEM`, and what `access` gives.
pub(super) fn for_each_msr(
    argument: usize,
    is_read: bool,
    mut access: impl FnMut(&mut uapi::kvm_msr_entry) -> Result<bool>,
) -> Result<isize> {
    let count: u32 = user::read(argument)?;
    if count >= MAX_MSRS {
        return Err(E2BIG);
    }
    let place_of = |place| element::<uapi::kvm_msr_entry>(argument, LIST_HEADER, place);
    let mut list = KVec::with_capacity(count as usize, GFP_KERNEL_ACCOUNT)?;
    for place in 0..count as usize {
        list.push_within_capacity(user::read::<uapi::kvm_msr_entry>(place_of(place)?)?)?;
    }
    let mut done = 0;
    for entry in &mut list {
        if !access(entry)? {
            break;
        }
        done += 1;
    }
    if is_read {
        for (place, entry) in list.iter().enumerate() {
            user::write(place_of(place)?, entry)?;
        }
    }
    Ok(done)
}
