// SPDX-License-Identifier: GPL-2.0

//! KVM_GET_STATS_FD: the statistics of a virtual machine or CPU, as a file that outlives its descriptor.

use crate::{
    host::anon_file::{self, Access, AnonFile, Reading, Reservation},
    vm::{machine::Vm, vcpu::Vcpu},
    RvisorModule,
};
use core::fmt::Write;
use kernel::{
    prelude::*,
    str::Formatter,
    sync::{Arc, ArcBorrow},
};
use rvisor_core::stats::{self, File, VmSource, NAME_SIZE};

/// Statistics of a virtual machine.
struct VmStatistics(Arc<Vm>);

/// Statistics of a virtual CPU.
struct VcpuStatistics(Arc<Vcpu>);

/// Opens the statistics of a virtual machine.
///
/// # Errors
///
/// `EMFILE`, `ENFILE`, `ENOMEM`.
pub(super) fn of_vm(vm: &Arc<Vm>) -> Result<isize> {
    let file = Arc::new(VmStatistics(vm.clone()), GFP_KERNEL_ACCOUNT)?;
    anon_file::open(Reservation::new()?, file)
}

/// Opens the statistics of a virtual CPU.
///
/// # Errors
///
/// `EMFILE`, `ENFILE`, `ENOMEM`.
pub(super) fn of_vcpu(vcpu: Arc<Vcpu>) -> Result<isize> {
    let file = Arc::new(VcpuStatistics(vcpu), GFP_KERNEL_ACCOUNT)?;
    anon_file::open(Reservation::new()?, file)
}

/// The identifier of what belongs to a process's machine, as KVM makes it.
fn identifier(pid: i32, vcpu: Option<u32>) -> [u8; NAME_SIZE] {
    let mut id = [0; NAME_SIZE];
    // The last byte stays 0. Nothing of this is longer than that.
    if let Some(text) = id.get_mut(..NAME_SIZE - 1) {
        let mut writer = Formatter::new(text);
        let _fits = match vcpu {
            Some(vcpu) => write!(writer, "kvm-{pid}/vcpu-{vcpu}"),
            None => write!(writer, "kvm-{pid}"),
        };
    }
    id
}

/// Gives userspace what it wants of a file.
fn give<S: Copy>(
    file: &File<'_, S>,
    Reading {
        mut to, position, ..
    }: Reading,
    number: impl Fn(S, usize) -> u64,
) -> Result<usize> {
    let mut bytes = KVec::from_elem(0, to.len().min(file.size()), GFP_KERNEL)?;
    let count = file.read(position, &mut bytes, number);
    to.write_slice(bytes.get(..count).unwrap_or(&bytes))?;
    Ok(count)
}

impl AnonFile for VmStatistics {
    const NAME: &'static CStr = c"rvisor-vm-stats";
    const ACCESS: Access = Access::Read;
    type OwnerModule = RvisorModule;

    fn read(this: ArcBorrow<'_, Self>, reading: Reading) -> Result<usize> {
        let vm = &this.0;
        let file = File {
            id: identifier(vm.pid, None),
            statistics: stats::VM,
        };
        give(&file, reading, |source, _| match source {
            VmSource::Flushes => vm.memory.generation(),
        })
    }
}

impl AnonFile for VcpuStatistics {
    const NAME: &'static CStr = c"rvisor-vcpu-stats";
    const ACCESS: Access = Access::Read;
    type OwnerModule = RvisorModule;

    fn read(this: ArcBorrow<'_, Self>, reading: Reading) -> Result<usize> {
        let Vcpu { vm, shared, .. } = &*this.0;
        let file = File {
            id: identifier(vm.pid, Some(shared.id)),
            statistics: stats::VCPU,
        };
        give(&file, reading, |source, place| {
            shared.counters.number(source, place, shared.is_asleep())
        })
    }
}
