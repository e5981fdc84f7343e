// SPDX-License-Identifier: GPL-2.0
//! A small virtual machine.

use crate::ktap::{Context, Fail};
use crate::layout;
use crate::mapping::Mapping;
use crate::raw::Device;
use crate::vcpu::Cpu;
use kvm_bindings as kb;
use kvm_ioctls::{Kvm, VmFd};

/// What a machine has.
#[derive(Clone, Copy, Debug)]
pub struct Config {
    /// Bytes of memory from address 0, in slot 0.
    pub memory: usize,
    /// Local APICs, IOAPIC and PICs in the kernel.
    pub irqchip: bool,
    /// The interval timer in the kernel; needs `irqchip`.
    pub pit: bool,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            memory: layout::MEMORY,
            irqchip: false,
            pit: false,
        }
    }
}

/// Where Intel hosts without unrestricted guest keep three pages for real mode.
const TSS_ADDRESS: usize = 0xfffb_d000;

/// A VM with memory in slot 0. It ends before its memory does.
#[derive(Debug)]
pub struct Machine {
    /// The VM's descriptor.
    pub vm: VmFd,
    /// The system's descriptor.
    pub kvm: Kvm,
    /// The memory of slot 0.
    pub memory: Mapping,
}

impl Machine {
    /// The default machine, without interrupt controllers.
    ///
    /// # Errors
    ///
    /// The ioctl that failed and its errno.
    pub fn new(device: &Device) -> Result<Self, Fail> {
        Self::with(device, Config::default())
    }

    /// A machine with interrupt controllers and timer in the kernel.
    ///
    /// # Errors
    ///
    /// The ioctl that failed and its errno.
    pub fn with_irqchip(device: &Device) -> Result<Self, Fail> {
        Self::with(
            device,
            Config {
                irqchip: true,
                pit: true,
                ..Config::default()
            },
        )
    }

    /// A machine as `config` says.
    ///
    /// # Errors
    ///
    /// The ioctl that failed and its errno.
    pub fn with(device: &Device, config: Config) -> Result<Self, Fail> {
        let kvm = device.kvm()?;
        let vm = kvm.create_vm().during("KVM_CREATE_VM")?;
        let memory = Mapping::anonymous(config.memory).during("the guest's memory")?;
        let machine = Self { vm, kvm, memory };
        machine.set_slot(0, 0, 0, &machine.memory, 0, config.memory)?;
        machine
            .vm
            .set_tss_address(TSS_ADDRESS)
            .during("KVM_SET_TSS_ADDR")?;
        if config.irqchip {
            machine.vm.create_irq_chip().during("KVM_CREATE_IRQCHIP")?;
        }
        if config.pit {
            machine
                .vm
                .create_pit2(kb::kvm_pit_config::default())
                .during("KVM_CREATE_PIT2")?;
        }
        Ok(machine)
    }

    /// A vCPU with the CPUID that the hypervisor offers and its own APIC id.
    ///
    /// # Errors
    ///
    /// The ioctl that failed and its errno.
    pub fn vcpu(&self, id: u64) -> Result<Cpu, Fail> {
        let fd = self.vm.create_vcpu(id).during("KVM_CREATE_VCPU")?;
        let size = self
            .kvm
            .get_vcpu_mmap_size()
            .during("KVM_GET_VCPU_MMAP_SIZE")?;
        let cpu = Cpu::new(fd, size)?;
        let mut cpuid = self
            .kvm
            .get_supported_cpuid(kb::KVM_MAX_CPUID_ENTRIES)
            .during("KVM_GET_SUPPORTED_CPUID")?;
        let apic_id = u32::try_from(id).unwrap_or(0);
        for entry in cpuid.as_mut_slice() {
            match entry.function {
                1 => entry.ebx = entry.ebx & 0x00ff_ffff | (apic_id << 24),
                0xb | 0x1f => entry.edx = apic_id,
                _ => {}
            }
        }
        cpu.fd.set_cpuid2(&cpuid).during("KVM_SET_CPUID2")?;
        Ok(cpu)
    }

    /// KVM_SET_USER_MEMORY_REGION: `length` bytes of `memory` from `offset`; 0 bytes delete the slot.
    ///
    /// # Errors
    ///
    /// The errno.
    pub fn set_slot(
        &self,
        slot: u32,
        flags: u32,
        address: u64,
        memory: &Mapping,
        offset: usize,
        length: usize,
    ) -> Result<(), Fail> {
        let region = kb::kvm_userspace_memory_region {
            slot,
            flags,
            guest_phys_addr: address,
            memory_size: length as u64,
            userspace_addr: memory.start() + offset as u64,
        };
        // SAFETY: Memory of a mapping that its owner keeps for as long as guests run on it; where it is
        // unmapped before, that is what the test is about and the guest faults.
        unsafe { self.vm.set_user_memory_region(region) }.during("KVM_SET_USER_MEMORY_REGION")
    }

    /// KVM_CHECK_EXTENSION on the VM.
    pub fn extension(&self, number: u32) -> i32 {
        crate::raw::ioctl(&self.vm, crate::uapi::CHECK_EXTENSION, u64::from(number)).unwrap_or(0)
    }
}
