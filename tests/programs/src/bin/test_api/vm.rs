// SPDX-License-Identifier: GPL-2.0
//! The VM descriptor.

use crate::system::BAD_POINTER;
use kvm_bindings as kb;
use rvisor_tests::guest::{self, Mode};
use rvisor_tests::handlers::{self, Record};
use rvisor_tests::layout::DONE_PORT;
use rvisor_tests::raw::{expect_errno, ioctl, ioctl_with, owned};
use rvisor_tests::{
    check, check_eq, guest_code, uapi, Config, Context, Device, Fail, Machine, Outcome,
};
use std::os::fd::OwnedFd;

/// An empty VM.
pub(crate) fn new_vm(device: &Device) -> Result<OwnedFd, Fail> {
    let system = device.open()?;
    owned(ioctl(&system, uapi::CREATE_VM, 0)).during("KVM_CREATE_VM")
}

pub(crate) fn unknown_ioctls(device: &Device) -> Outcome {
    let vm = new_vm(device)?;
    for request in [
        uapi::io(0xff),
        uapi::RUN,
        uapi::GET_REGS,
        uapi::GET_API_VERSION,
        0x5401,
    ] {
        expect_errno(
            ioctl(&vm, request, 0),
            libc::ENOTTY,
            &format!("{request:#x}"),
        )?;
    }
    Ok(())
}

pub(crate) fn vcpu_ids(device: &Device) -> Outcome {
    let vm = new_vm(device)?;
    let create = |id| owned(ioctl(&vm, uapi::CREATE_VCPU, id));
    let most = ioctl(&vm, uapi::CHECK_EXTENSION, kb::KVM_CAP_MAX_VCPU_ID.into())?;
    let most = most.max(1) as u64;
    let _first = create(0)?;
    expect_errno(create(0), libc::EEXIST, "vCPU 0 twice")?;
    for id in [most, 0xffff_ffff, 0x1_0000_0000, u64::MAX] {
        expect_errno(create(id), libc::EINVAL, &format!("vCPU {id:#x}"))?;
    }
    // Ids need not be dense, and an id stays taken when its descriptor is closed.
    let third = create(3)?;
    drop(third);
    expect_errno(create(3), libc::EEXIST, "vCPU 3 after its close")
}

pub(crate) fn irqchip_order(device: &Device) -> Outcome {
    let vm = new_vm(device)?;
    ioctl(&vm, uapi::CREATE_IRQCHIP, 0)?;
    expect_errno(
        ioctl(&vm, uapi::CREATE_IRQCHIP, 0),
        libc::EEXIST,
        "KVM_CREATE_IRQCHIP twice",
    )?;
    let vm = new_vm(device)?;
    let _vcpu = owned(ioctl(&vm, uapi::CREATE_VCPU, 0))?;
    expect_errno(
        ioctl(&vm, uapi::CREATE_IRQCHIP, 0),
        libc::EINVAL,
        "KVM_CREATE_IRQCHIP after a vCPU",
    )
}

pub(crate) fn pit_order(device: &Device) -> Outcome {
    let vm = new_vm(device)?;
    let mut config = kb::kvm_pit_config::default();
    expect_errno(
        ioctl_with(&vm, uapi::CREATE_PIT2, &mut config),
        libc::ENOENT,
        "KVM_CREATE_PIT2 without irqchip",
    )?;
    let mut state = kb::kvm_pit_state2::default();
    expect_errno(
        ioctl_with(&vm, uapi::GET_PIT2, &mut state),
        libc::ENXIO,
        "KVM_GET_PIT2 without a PIT",
    )?;
    expect_errno(
        ioctl(&vm, uapi::CREATE_PIT2, BAD_POINTER),
        libc::EFAULT,
        "KVM_CREATE_PIT2 with a bad pointer",
    )?;
    ioctl(&vm, uapi::CREATE_IRQCHIP, 0)?;
    ioctl_with(&vm, uapi::CREATE_PIT2, &mut config)?;
    expect_errno(
        ioctl_with(&vm, uapi::CREATE_PIT2, &mut config),
        libc::EEXIST,
        "KVM_CREATE_PIT2 twice",
    )
}

pub(crate) fn boot_cpu(device: &Device) -> Outcome {
    let vm = new_vm(device)?;
    if ioctl(
        &vm,
        uapi::CHECK_EXTENSION,
        kb::KVM_CAP_SET_BOOT_CPU_ID.into(),
    )? == 0
    {
        return Err(Fail::skip("SET_BOOT_CPU_ID is not offered"));
    }
    let most = ioctl(&vm, uapi::CHECK_EXTENSION, kb::KVM_CAP_MAX_VCPU_ID.into())? as u64;
    for id in [most + 1, 1 << 32] {
        expect_errno(
            ioctl(&vm, uapi::SET_BOOT_CPU_ID, id),
            libc::EINVAL,
            &format!("KVM_SET_BOOT_CPU_ID {id:#x}"),
        )?;
    }
    ioctl(&vm, uapi::SET_BOOT_CPU_ID, 1)?;
    let _vcpu = owned(ioctl(&vm, uapi::CREATE_VCPU, 0))?;
    expect_errno(
        ioctl(&vm, uapi::SET_BOOT_CPU_ID, 0),
        libc::EBUSY,
        "KVM_SET_BOOT_CPU_ID after a vCPU",
    )
}

/// An old CPU's page tables for real mode: nothing to see, but the call has its rules.
pub(crate) fn identity_map(device: &Device) -> Outcome {
    let vm = new_vm(device)?;
    let mut address = 0xfffb_c000_u64;
    ioctl_with(&vm, uapi::SET_IDENTITY_MAP_ADDR, &mut address)?;
    let _vcpu = owned(ioctl(&vm, uapi::CREATE_VCPU, 0))?;
    for pointer in [0, BAD_POINTER] {
        expect_errno(
            ioctl(&vm, uapi::SET_IDENTITY_MAP_ADDR, pointer),
            libc::EINVAL,
            "KVM_SET_IDENTITY_MAP_ADDR after a vCPU",
        )?;
    }
    Ok(())
}

pub(crate) fn enable_capability(device: &Device) -> Outcome {
    let vm = new_vm(device)?;
    for (cap, flags) in [
        (0xffff, 0),
        (kb::KVM_CAP_IRQCHIP, 0),
        (kb::KVM_CAP_SPLIT_IRQCHIP, 1),
    ] {
        let mut request = kb::kvm_enable_cap {
            cap,
            flags,
            args: [24, 0, 0, 0],
            ..Default::default()
        };
        expect_errno(
            ioctl_with(&vm, uapi::ENABLE_CAP, &mut request),
            libc::EINVAL,
            &format!("capability {cap} with flags {flags}"),
        )?;
    }
    expect_errno(
        ioctl(&vm, uapi::ENABLE_CAP, BAD_POINTER),
        libc::EFAULT,
        "a bad pointer",
    )
}

/// KVM_CAP_MAX_VCPU_ID limits the numbers of vCPUs, once.
pub(crate) fn vcpu_id_limit(device: &Device) -> Outcome {
    let vm = new_vm(device)?;
    let most = ioctl(&vm, uapi::CHECK_EXTENSION, kb::KVM_CAP_MAX_VCPU_ID.into())? as u64;
    let limit = |vm: &OwnedFd, limit: u64| {
        let mut request = kb::kvm_enable_cap {
            cap: kb::KVM_CAP_MAX_VCPU_ID,
            args: [limit, 0, 0, 0],
            ..Default::default()
        };
        ioctl_with(vm, uapi::ENABLE_CAP, &mut request)
    };
    expect_errno(limit(&vm, most + 1), libc::EINVAL, "more than there can be")?;
    ioctl(&vm, uapi::SET_BOOT_CPU_ID, 5)?;
    expect_errno(limit(&vm, 4), libc::EINVAL, "less than the boot CPU's")?;
    limit(&vm, 8)?;
    limit(&vm, 8).during("the same again")?;
    expect_errno(limit(&vm, 9), libc::EINVAL, "another limit")?;
    let _last = owned(ioctl(&vm, uapi::CREATE_VCPU, 7))?;
    expect_errno(
        ioctl(&vm, uapi::CREATE_VCPU, 8),
        libc::EINVAL,
        "the number at the limit",
    )?;
    let late = new_vm(device)?;
    let _vcpu = owned(ioctl(&late, uapi::CREATE_VCPU, 0))?;
    expect_errno(limit(&late, 8), libc::EINVAL, "after a vCPU")
}

/// KVM_SIGNAL_MSI: 1 where an APIC takes it, 0 where none does, EPERM without a vCPU.
pub(crate) fn signal_msi_status(device: &Device) -> Outcome {
    let machine = Machine::with_irqchip(device)?;
    let send = |destination: u32| {
        let mut msi = kb::kvm_msi {
            address_lo: 0xfee0_0000 | (destination << 12),
            data: 0x50,
            ..Default::default()
        };
        ioctl_with(&machine.vm, uapi::SIGNAL_MSI, &mut msi)
    };
    expect_errno(send(0), libc::EPERM, "without a vCPU")?;
    let cpu = machine.vcpu(0)?;
    check_eq!(send(0)?, 0, "to an APIC that is off");
    // SVR: the APIC on, the vector as after reset.
    let mut page = [0_u8; 1024];
    ioctl_with(&cpu.fd, uapi::GET_LAPIC, &mut page)?;
    page[0xf1] |= 1;
    ioctl_with(&cpu.fd, uapi::SET_LAPIC, &mut page)?;
    check_eq!(send(0)?, 1, "to an APIC that is on");
    check_eq!(send(7)?, 0, "to an APIC that is not there");
    let mut wrong = kb::kvm_msi {
        flags: 1 << 4,
        ..Default::default()
    };
    expect_errno(
        ioctl_with(&machine.vm, uapi::SIGNAL_MSI, &mut wrong),
        libc::EINVAL,
        "unknown flags",
    )
}

guest_code!(
    read_platform_info,
    code64,
    [
        "mov ecx, 0xce",
        "rdmsr",
        "out {done}, al",
        "rdmsr",
        "2: out {done}, al",
    ],
    done = DONE_PORT
);

/// KVM_CAP_MSR_PLATFORM_INFO takes the MSR away from the guest, not from userspace.
pub(crate) fn platform_info(device: &Device) -> Outcome {
    const MSR: u32 = 0xce;
    let machine = Machine::new(device)?;
    if machine.extension(kb::KVM_CAP_MSR_PLATFORM_INFO) == 0 {
        return Err(Fail::skip("MSR_PLATFORM_INFO is not offered"));
    }
    let cpu = machine.vcpu(0)?;
    cpu.set_msr(MSR, 0xff00)?;
    guest::load(&machine, &cpu, Mode::Long, read_platform_info())?;
    cpu.run_until_done()?;
    check_eq!(cpu.regs()?.rax, 0xff00, "the MSR");
    let mut request = kb::kvm_enable_cap {
        cap: kb::KVM_CAP_MSR_PLATFORM_INFO,
        ..Default::default()
    };
    ioctl_with(&machine.vm, uapi::ENABLE_CAP, &mut request)?;
    check_eq!(cpu.msr(MSR)?, 0xff00, "the MSR for userspace");
    // The handler goes on behind the second RDMSR.
    handlers::set_resume(&machine.memory, cpu.regs()?.rip + 4);
    cpu.run_until_done()?;
    check_eq!(Record::read(&machine.memory).vector, 13, "the exception");
    Ok(())
}

pub(crate) fn irq_line_without_irqchip(device: &Device) -> Outcome {
    let vm = new_vm(device)?;
    let mut level = [0_u32, 1];
    expect_errno(
        ioctl_with(&vm, uapi::IRQ_LINE, &mut level),
        libc::ENXIO,
        "KVM_IRQ_LINE without irqchip",
    )?;
    let mut chip = kb::kvm_irqchip::default();
    expect_errno(
        ioctl_with(&vm, uapi::GET_IRQCHIP, &mut chip),
        libc::ENXIO,
        "KVM_GET_IRQCHIP without irqchip",
    )
}

pub(crate) fn bad_pointers(device: &Device) -> Outcome {
    let vm = new_vm(device)?;
    ioctl(&vm, uapi::CREATE_IRQCHIP, 0)?;
    for (request, name) in [
        (uapi::SET_USER_MEMORY_REGION, "SET_USER_MEMORY_REGION"),
        (uapi::IRQ_LINE, "IRQ_LINE"),
        (uapi::IRQ_LINE_STATUS, "IRQ_LINE_STATUS"),
        (uapi::SET_IDENTITY_MAP_ADDR, "SET_IDENTITY_MAP_ADDR"),
        (uapi::GET_IRQCHIP, "GET_IRQCHIP"),
        (uapi::SET_IRQCHIP, "SET_IRQCHIP"),
    ] {
        for pointer in [0, BAD_POINTER] {
            expect_errno(
                ioctl(&vm, request, pointer),
                libc::EFAULT,
                &format!("KVM_{name} with {pointer:#x}"),
            )?;
        }
    }
    Ok(())
}

/// A VM belongs to the process that made it: a child that inherits the descriptors gets EIO.
pub(crate) fn other_process(device: &Device) -> Outcome {
    let vm = new_vm(device)?;
    let vcpu = owned(ioctl(&vm, uapi::CREATE_VCPU, 0))?;
    // SAFETY: The child only makes system calls and ends.
    let pid = unsafe { libc::fork() };
    if pid == 0 {
        let failed = |result: Result<i32, rvisor_tests::raw::Errno>| {
            result == Err(rvisor_tests::raw::Errno(libc::EIO))
        };
        let mut status = 0;
        for (bit, result) in [
            ioctl(&vm, uapi::CREATE_VCPU, 1),
            ioctl(&vm, uapi::CREATE_IRQCHIP, 0),
            ioctl(&vm, uapi::io(0xff), 0),
            ioctl(&vcpu, uapi::RUN, 0),
            ioctl(&vcpu, uapi::GET_REGS, BAD_POINTER),
            ioctl(&vcpu, uapi::io(0xff), 0),
        ]
        .into_iter()
        .enumerate()
        {
            status |= i32::from(!failed(result)) << bit;
        }
        // SAFETY: Ends the child at once.
        unsafe { libc::_exit(status) };
    }
    let mut status = 0;
    // SAFETY: Waits for the child that was made above.
    let found = unsafe { libc::waitpid(pid, &raw mut status, 0) };
    check_eq!(found, pid, "waitpid");
    check_eq!(
        status,
        0,
        "the calls of another process that did not give EIO (a bit each)"
    );
    // And the owner can still use it.
    ioctl(&vm, uapi::CREATE_VCPU, 1)?;
    Ok(())
}

guest_code!(
    say_done,
    code16,
    ["mov al, 0x5a", "out {done}, al", "hlt"],
    done = DONE_PORT
);

/// A vCPU goes on when the VM's and the system's descriptors are closed.
pub(crate) fn vcpu_keeps_vm(device: &Device) -> Outcome {
    let machine = Machine::new(device)?;
    let cpu = machine.vcpu(0)?;
    guest::load(&machine, &cpu, Mode::Real, say_done())?;
    let Machine { vm, kvm, memory } = machine;
    drop(vm);
    drop(kvm);
    cpu.run_until_done()?;
    check_eq!(cpu.regs()?.rax & 0xff, 0x5a, "AL");
    drop(cpu);
    drop(memory);
    Ok(())
}

pub(crate) fn extension_on_vm(device: &Device) -> Outcome {
    let machine = Machine::with(device, Config::default())?;
    if machine.extension(kb::KVM_CAP_CHECK_EXTENSION_VM) == 0 {
        return Err(Fail::skip("CHECK_EXTENSION_VM is not offered"));
    }
    for number in [
        kb::KVM_CAP_USER_MEMORY,
        kb::KVM_CAP_IRQCHIP,
        kb::KVM_CAP_IMMEDIATE_EXIT,
    ] {
        check_eq!(
            machine.extension(number),
            1,
            "capability {number} on the VM"
        );
    }
    check!(
        machine.extension(kb::KVM_CAP_MAX_VCPUS) >= 8,
        "MAX_VCPUS on the VM"
    );
    Ok(())
}
