// SPDX-License-Identifier: GPL-2.0

//! The ioctls of a virtual machine.

use super::{
    chardev::check_extension,
    chip_state, stats_file,
    user::{self, element, LIST_HEADER},
};
use crate::{
    bindings as uapi,
    host::{
        anon_file::{self, AnonFile, Reservation},
        eventfd::EventFd,
    },
    vm::{
        machine::{Host, Vm},
        memory::LogPart,
    },
    RvisorModule,
};
use kernel::{
    prelude::*,
    sync::{Arc, ArcBorrow},
};
use rvisor_core::{
    bus::{
        coalesced::Zone,
        doorbell::{Doorbell, FLAG_DEASSIGN},
    },
    irqchip::{
        destination::InterruptMessage,
        routing::{RawRoute, Route, RoutingRules, MAX_ROUTES},
    },
    mmu::slot,
    x86::{
        address::{Gpa, Hva},
        vector::Gsi,
    },
};

/// The last address at which the three pages of KVM_SET_TSS_ADDR lie below 4 GiB.
const MAX_TSS_ADDRESS: usize = 0xffff_d000;

/// The least that KVM_SET_NR_MMU_PAGES takes (KVM_MIN_ALLOC_MMU_PAGES).
const MIN_MMU_PAGES: usize = 64;

impl AnonFile for Vm {
    const NAME: &'static CStr = c"rvisor-vm";
    type OwnerModule = RvisorModule;

    fn ioctl(this: ArcBorrow<'_, Self>, command: u32, argument: usize) -> Result<isize> {
        if !this.is_owned_by_current() {
            return Err(EIO);
        }
        let vm: Arc<Self> = this.into();
        vm_ioctl(&vm, command, argument)
    }

    fn released(this: &Arc<Self>) {
        this.irqfds.release(this);
    }
}

fn vm_ioctl(vm: &Arc<Vm>, command: u32, argument: usize) -> Result<isize> {
    match command {
        user::CHECK_EXTENSION if argument == uapi::KVM_CAP_X86_APIC_BUS_CYCLES_NS as usize => {
            Ok(vm.apics.bus_cycle().nanoseconds() as isize)
        }
        user::CHECK_EXTENSION => Ok(check_extension(&vm.host, argument)),
        user::CREATE_VCPU => {
            let id = u32::try_from(argument).map_err(|_| EINVAL)?;
            let reservation = Reservation::new()?;
            let vcpu = vm.create_vcpu(id)?;
            anon_file::open(reservation, vcpu).inspect_err(|_| vm.remove_vcpu(id))
        }
        user::SET_USER_MEMORY_REGION => set_memory(vm, argument),
        user::GET_DIRTY_LOG => {
            // Beside the slot's number is padding; the address space is in its upper half.
            let [slot, bitmap]: [u64; 2] = user::read(argument)?;
            let bitmap = usize::try_from(bitmap).map_err(|_| EFAULT)?;
            vm.memory.dirty_log(slot as u32, bitmap).map(|()| 0)
        }
        user::CLEAR_DIRTY_LOG => {
            let [slot_and_count, first, bitmap]: [u64; 3] = user::read(argument)?;
            let bitmap = usize::try_from(bitmap).map_err(|_| EFAULT)?;
            let part = LogPart {
                slot: slot_and_count as u32,
                first,
                count: slot_and_count >> 32,
            };
            vm.memory.clear_dirty_log(&part, bitmap).map(|()| 0)
        }
        // An unrestricted guest needs neither the TSS nor the identity map of older CPUs.
        user::SET_USER_MEMORY_REGION2 => set_memory2(vm, argument),
        // It limits what shadow paging makes; with EPT it means nothing, to KVM neither.
        user::SET_NR_MMU_PAGES if argument < MIN_MMU_PAGES => Err(EINVAL),
        user::SET_NR_MMU_PAGES => Ok(0),
        user::SET_TSS_ADDR if argument > MAX_TSS_ADDRESS => Err(EINVAL),
        user::SET_TSS_ADDR => Ok(0),
        user::SET_IDENTITY_MAP_ADDR if vm.has_vcpus() => Err(EINVAL),
        user::SET_IDENTITY_MAP_ADDR => user::read::<u64>(argument).map(|_| 0),
        user::CREATE_IRQCHIP => vm.create_irqchip().map(|()| 0),
        user::SET_BOOT_CPU_ID => vm.set_bootstrap(argument).map(|()| 0),
        user::IRQ_LINE => {
            let line: uapi::kvm_irq_level = user::read(argument)?;
            irq_line(vm, &line).map(|_| 0)
        }
        user::IRQ_LINE_STATUS => {
            let mut line: uapi::kvm_irq_level = user::read(argument)?;
            let status = irq_line(vm, &line)?;
            line.__bindgen_anon_1.status = status;
            user::write(argument, &line)?;
            Ok(0)
        }
        user::GET_STATS_FD => stats_file::of_vm(vm),
        user::SET_GSI_ROUTING => set_routing(vm, argument),
        user::SIGNAL_MSI => signal_msi(vm, argument),
        user::IRQFD => irqfd(vm, argument),
        user::IOEVENTFD => ioeventfd(vm, argument),
        user::REGISTER_COALESCED_MMIO => {
            vm.registrations.add_zone(read_zone(argument)?).map(|()| 0)
        }
        user::UNREGISTER_COALESCED_MMIO => vm
            .registrations
            .remove_zones(&read_zone(argument)?)
            .map(|()| 0),
        user::GET_IRQCHIP => chip_state::get_irqchip(vm, argument),
        user::SET_IRQCHIP => chip_state::set_irqchip(vm, argument),
        user::CREATE_PIT => create_pit(vm, true),
        user::CREATE_PIT2 => {
            let config: uapi::kvm_pit_config = user::read(argument)?;
            if config.flags & !uapi::KVM_PIT_SPEAKER_DUMMY != 0 {
                return Err(EINVAL);
            }
            create_pit(vm, config.flags & uapi::KVM_PIT_SPEAKER_DUMMY != 0)
        }
        user::REINJECT_CONTROL => {
            let control: uapi::kvm_reinject_control = user::read(argument)?;
            let chip = vm.irqchip().ok_or(ENXIO)?;
            chip.keep_pit_interrupts(vm, control.pit_reinject != 0)?;
            Ok(0)
        }
        user::ENABLE_CAP => {
            enable_capability(vm, &user::read(argument)?)?;
            Ok(0)
        }
        user::GET_CLOCK => {
            user::write(argument, &vm.clock.get())?;
            Ok(0)
        }
        user::SET_CLOCK => {
            vm.clock.set(&user::read(argument)?)?;
            Ok(0)
        }
        user::GET_TSC_KHZ => Ok(vm.host.tsc_khz as isize),
        user::SET_TSC_KHZ if vm.has_vcpus() => Err(EINVAL),
        user::SET_TSC_KHZ => set_tsc_khz(&vm.host, argument),
        user::GET_PIT2 => chip_state::get_pit(vm, argument),
        user::SET_PIT2 => chip_state::set_pit(vm, argument),
        _ => Err(ENOTTY),
    }
}

fn set_memory(vm: &Vm, argument: usize) -> Result<isize> {
    let region: uapi::kvm_userspace_memory_region = user::read(argument)?;
    vm.memory.set_slot(&slot::Request {
        slot: region.slot,
        flags: region.flags,
        gpa: Gpa::new(region.guest_phys_addr),
        bytes: region.memory_size,
        hva: Hva::new(region.userspace_addr),
    })?;
    Ok(0)
}

/// What a machine can be told to do otherwise.
fn enable_capability(vm: &Vm, request: &uapi::kvm_enable_cap) -> Result {
    match request.cap {
        _ if request.flags != 0 => Err(EINVAL),
        uapi::KVM_CAP_X2APIC_API => vm.set_x2apic_api(request.args[0]),
        uapi::KVM_CAP_X86_APIC_BUS_CYCLES_NS => vm.set_apic_bus_cycle(request.args[0]),
        uapi::KVM_CAP_MAX_VCPU_ID => vm.limit_vcpu_ids(request.args[0]),
        uapi::KVM_CAP_MSR_PLATFORM_INFO => {
            vm.settings.show_platform_info(request.args[0] != 0);
            Ok(())
        }
        uapi::KVM_CAP_SPLIT_IRQCHIP => vm.create_split_chip(request.args[0]),
        uapi::KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 => vm.memory.set_log_options(request.args[0]),
        _ => Err(EINVAL),
    }
}

fn set_memory2(vm: &Vm, argument: usize) -> Result<isize> {
    let region: uapi::kvm_userspace_memory_region2 = user::read(argument)?;
    // Memory of a guest_memfd is not offered: its flag is an unknown one.
    vm.memory.set_slot(&slot::Request {
        slot: region.slot,
        flags: region.flags,
        gpa: Gpa::new(region.guest_phys_addr),
        bytes: region.memory_size,
        hva: Hva::new(region.userspace_addr),
    })?;
    Ok(0)
}

/// Carries out KVM_SET_TSC_KHZ: without TSC scaling a guest has the host's frequency, or one that is so
/// near that it won't notice (KVM's tolerance, 250 parts in a million); 0 is the host's.
///
/// # Errors
///
/// `EINVAL` for any other.
pub(super) fn set_tsc_khz(host: &Host, argument: usize) -> Result<isize> {
    // Only the lower half counts.
    let wanted = u64::from(argument as u32);
    let tolerance = host.tsc_khz / 4000;
    if wanted != 0 && wanted.abs_diff(host.tsc_khz) > tolerance {
        return Err(EINVAL);
    }
    Ok(0)
}

fn irq_line(vm: &Vm, line: &uapi::kvm_irq_level) -> Result<i32> {
    // SAFETY: Both members of the union are 32-bit integers.
    let gsi = unsafe { line.__bindgen_anon_1.irq };
    vm.irq_line(gsi, line.level != 0)
}

/// The PIT hangs on the controllers.
fn create_pit(vm: &Vm, speaker: bool) -> Result<isize> {
    vm.irqchip().ok_or(ENOENT)?.create_pit(speaker)?;
    Ok(0)
}

fn set_routing(vm: &Vm, argument: usize) -> Result<isize> {
    let count: u32 = user::read(argument)?;
    let flags: u32 = user::read(argument.checked_add(4).ok_or(EFAULT)?)?;
    if count as usize > MAX_ROUTES || flags != 0 {
        return Err(EINVAL);
    }
    if !vm.has_local_apics() {
        return Err(EINVAL);
    }
    let rules = RoutingRules {
        controllers: vm.irqchip().is_some(),
        extended_msi: vm.apics.long_ids(),
    };
    let mut routes = KVec::with_capacity(count as usize, GFP_KERNEL_ACCOUNT)?;
    for place in 0..count as usize {
        let address = element::<uapi::kvm_irq_routing_entry>(argument, LIST_HEADER, place)?;
        let entry: uapi::kvm_irq_routing_entry = user::read(address)?;
        // SAFETY: The union is an array of integers, whatever else it is.
        let words = unsafe { entry.u.pad };
        let raw = RawRoute {
            gsi: entry.gsi,
            kind: entry.type_,
            flags: entry.flags,
            words: [words[0], words[1], words[2]],
        };
        routes.push_within_capacity(Route::parse(&raw, rules).map_err(|_| EINVAL)?)?;
    }
    match (vm.irqchip(), vm.split_chip()) {
        (Some(chip), _) => chip.set_routes(vm, routes)?,
        (None, Some(chip)) => chip.set_routes(routes)?,
        (None, None) => return Err(EINVAL),
    }
    Ok(0)
}

fn signal_msi(vm: &Vm, argument: usize) -> Result<isize> {
    let msi: uapi::kvm_msi = user::read(argument)?;
    if !vm.has_local_apics() || msi.flags != 0 {
        return Err(EINVAL);
    }
    let address = u64::from(msi.address_hi) << 32 | u64::from(msi.address_lo);
    let message =
        InterruptMessage::from_msi(address, msi.data, vm.apics.long_ids()).map_err(|_| EINVAL)?;
    if vm.deliver(&message, None) {
        Ok(1)
    } else if vm.has_vcpus() {
        // The guest has its APIC off, or none that is meant.
        Ok(0)
    } else {
        Err(EPERM)
    }
}

fn irqfd(vm: &Arc<Vm>, argument: usize) -> Result<isize> {
    let request: uapi::kvm_irqfd = user::read(argument)?;
    let known = uapi::KVM_IRQFD_FLAG_DEASSIGN | uapi::KVM_IRQFD_FLAG_RESAMPLE;
    if request.flags & !known != 0 {
        return Err(EINVAL);
    }
    let gsi = Gsi(request.gsi);
    if request.flags & uapi::KVM_IRQFD_FLAG_DEASSIGN != 0 {
        vm.irqfds.remove(vm, request.fd, gsi)?;
    } else {
        let resample =
            (request.flags & uapi::KVM_IRQFD_FLAG_RESAMPLE != 0).then_some(request.resamplefd);
        vm.irqfds.add(vm, request.fd, gsi, resample)?;
    }
    Ok(0)
}

fn ioeventfd(vm: &Vm, argument: usize) -> Result<isize> {
    let request: uapi::kvm_ioeventfd = user::read(argument)?;
    let uapi::kvm_ioeventfd {
        datamatch,
        addr,
        len,
        fd,
        flags,
        ..
    } = request;
    if flags & FLAG_DEASSIGN != 0 {
        let eventfd = EventFd::from_descriptor(fd as u32)?;
        let doorbell = Doorbell::named(flags, addr, len, datamatch).ok_or(ENOENT)?;
        vm.registrations.remove_doorbell(&doorbell, &eventfd)?;
    } else {
        let doorbell = Doorbell::parse(flags, addr, len, datamatch).map_err(|_| EINVAL)?;
        let eventfd = EventFd::from_descriptor(fd as u32)?;
        vm.registrations.add_doorbell(doorbell, eventfd)?;
    }
    Ok(0)
}

fn read_zone(argument: usize) -> Result<Zone> {
    let zone: uapi::kvm_coalesced_mmio_zone = user::read(argument)?;
    // SAFETY: Both members of the union are 32-bit integers.
    let is_port = unsafe { zone.__bindgen_anon_1.pio };
    Zone::parse(zone.addr, zone.size, is_port).map_err(|_| EINVAL)
}
