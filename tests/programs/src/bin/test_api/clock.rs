// SPDX-License-Identifier: GPL-2.0
//! The machine's clock and its TSC's frequency.

use crate::system::BAD_POINTER;
use crate::vm::new_vm;
use kvm_bindings as kb;
use rvisor_tests::raw::{expect_errno, ioctl, ioctl_with, owned};
use rvisor_tests::{check, check_eq, uapi, Context, Device, Fail, Outcome};
use std::os::fd::OwnedFd;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

const SECOND: u64 = 1_000_000_000;

fn get(vm: &OwnedFd) -> Result<kb::kvm_clock_data, Fail> {
    let mut data = kb::kvm_clock_data::default();
    ioctl_with(vm, uapi::GET_CLOCK, &mut data).during("KVM_GET_CLOCK")?;
    Ok(data)
}

/// It begins at 0, goes on, and can be set.
pub(crate) fn get_and_set(device: &Device) -> Outcome {
    let vm = new_vm(device)?;
    let offered = ioctl(&vm, uapi::CHECK_EXTENSION, kb::KVM_CAP_ADJUST_CLOCK.into())? as u32;
    check!(offered != 0, "ADJUST_CLOCK is not offered");
    let first = get(&vm)?;
    check!(first.clock < SECOND, "it begins at {} ns", first.clock);
    std::thread::sleep(Duration::from_millis(5));
    let second = get(&vm)?;
    let passed = second.clock - first.clock;
    check!(
        (5_000_000..SECOND).contains(&passed),
        "5 ms were {passed} ns"
    );
    check_eq!(second.flags & !offered, 0, "flags that are not offered");
    let mut data = kb::kvm_clock_data {
        clock: 1000 * SECOND,
        ..Default::default()
    };
    ioctl_with(&vm, uapi::SET_CLOCK, &mut data).during("KVM_SET_CLOCK")?;
    let now = get(&vm)?.clock;
    check!(
        (1000 * SECOND..1001 * SECOND).contains(&now),
        "set to 1000 s, it shows {now} ns"
    );
    Ok(())
}

/// With the wall clock beside it, what has passed since is added.
pub(crate) fn set_with_wall_clock(device: &Device) -> Outcome {
    let vm = new_vm(device)?;
    if ioctl(&vm, uapi::CHECK_EXTENSION, kb::KVM_CAP_ADJUST_CLOCK.into())? as u32
        & kb::KVM_CLOCK_REALTIME
        == 0
    {
        return Err(Fail::skip("KVM_CLOCK_REALTIME is not offered"));
    }
    let wall = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_err(|error| Fail::new(error.to_string()))?
        .as_nanos() as u64;
    for (realtime, from) in [(wall - 50 * SECOND, 150), (wall + 50 * SECOND, 100)] {
        let mut data = kb::kvm_clock_data {
            clock: 100 * SECOND,
            flags: kb::KVM_CLOCK_REALTIME,
            realtime,
            ..Default::default()
        };
        ioctl_with(&vm, uapi::SET_CLOCK, &mut data).during("KVM_SET_CLOCK")?;
        let now = get(&vm)?.clock;
        check!(
            (from * SECOND..(from + 2) * SECOND).contains(&now),
            "{from} s were expected, it shows {now} ns"
        );
    }
    Ok(())
}

pub(crate) fn errors(device: &Device) -> Outcome {
    let vm = new_vm(device)?;
    let mut data = kb::kvm_clock_data {
        flags: 1,
        ..Default::default()
    };
    expect_errno(
        ioctl_with(&vm, uapi::SET_CLOCK, &mut data),
        libc::EINVAL,
        "an unknown flag",
    )?;
    for request in [uapi::GET_CLOCK, uapi::SET_CLOCK] {
        expect_errno(
            ioctl(&vm, request, BAD_POINTER),
            libc::EFAULT,
            "a bad pointer",
        )?;
    }
    Ok(())
}

/// The machine's frequency is the vCPU's, and can be asked for as it is.
pub(crate) fn tsc_frequency(device: &Device) -> Outcome {
    let vm = new_vm(device)?;
    let machine = ioctl(&vm, uapi::GET_TSC_KHZ, 0)?;
    check!(machine > 1000, "the machine's TSC has {machine} kHz");
    ioctl(&vm, uapi::SET_TSC_KHZ, 0)?;
    check_eq!(ioctl(&vm, uapi::GET_TSC_KHZ, 0)?, machine, "kHz after 0");
    let vcpu = owned(ioctl(&vm, uapi::CREATE_VCPU, 0))?;
    check_eq!(ioctl(&vcpu, uapi::GET_TSC_KHZ, 0)?, machine, "the vCPU's");
    ioctl(&vcpu, uapi::SET_TSC_KHZ, machine as u64)?;
    expect_errno(
        ioctl(&vm, uapi::SET_TSC_KHZ, 0),
        libc::EINVAL,
        "KVM_SET_TSC_KHZ on the machine after a vCPU",
    )
}
