// SPDX-License-Identifier: GPL-2.0
//! Making and ending machines, measured in userspace.

use crate::tsc;
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use rvisor_tests::host::free_kib;
use rvisor_tests::{Context, Device, Fail};

/// Machines that a time is the mean of.
const ROUNDS: u64 = 16;
/// Machines that memory is the mean of.
const MACHINES: u64 = 64;

fn make(kvm: &Kvm) -> Result<(VcpuFd, VmFd), Fail> {
    let vm = kvm.create_vm().during("KVM_CREATE_VM")?;
    vm.create_irq_chip().during("KVM_CREATE_IRQCHIP")?;
    let vcpu = vm.create_vcpu(0).during("KVM_CREATE_VCPU")?;
    Ok((vcpu, vm))
}

/// Mean of making, mean of ending: the last descriptor is closed.
pub(crate) fn make_and_end(device: &Device) -> Result<(u64, u64), Fail> {
    let kvm = device.kvm()?;
    drop(make(&kvm)?);
    let (mut making, mut ending) = (0, 0);
    for _ in 0..ROUNDS {
        let start = tsc();
        let machine = make(&kvm)?;
        let middle = tsc();
        drop(machine);
        ending += tsc() - middle;
        making += middle - start;
    }
    Ok((making / ROUNDS, ending / ROUNDS))
}

/// KiB of kernel memory that one machine holds.
pub(crate) fn kernel_memory(device: &Device) -> Result<u64, Fail> {
    let kvm = device.kvm()?;
    // What ended before is gone for good.
    std::thread::sleep(std::time::Duration::from_millis(300));
    // As many that stay: they take what was free in the caches that machines before this left behind.
    let mut kept = Vec::with_capacity(2 * MACHINES as usize);
    for _ in 0..MACHINES {
        kept.push(make(&kvm)?);
    }
    let before = free_kib()?;
    for _ in 0..MACHINES {
        kept.push(make(&kvm)?);
    }
    let after = free_kib()?;
    Ok(before.saturating_sub(after) / MACHINES)
}
