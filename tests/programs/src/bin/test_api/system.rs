// SPDX-License-Identifier: GPL-2.0
//! The system descriptor.

use kvm_bindings as kb;
use rvisor_tests::raw::{expect_errno, ioctl, ioctl_words, owned};
use rvisor_tests::{check, check_eq, uapi, Device, Fail, Outcome};

/// An address that no process has.
pub(crate) const BAD_POINTER: u64 = 0xffff_8000_0000_0000;

pub(crate) fn version(device: &Device) -> Outcome {
    let system = device.open()?;
    check_eq!(
        ioctl(&system, uapi::GET_API_VERSION, 0)?,
        12,
        "KVM_GET_API_VERSION"
    );
    expect_errno(
        ioctl(&system, uapi::GET_API_VERSION, 1),
        libc::EINVAL,
        "KVM_GET_API_VERSION with an argument",
    )
}

pub(crate) fn unknown_ioctls(device: &Device) -> Outcome {
    let system = device.open()?;
    // An unused number, a VM's and a vCPU's call, and another type byte.
    for request in [
        uapi::io(0xff),
        uapi::CREATE_VCPU,
        uapi::CREATE_IRQCHIP,
        uapi::RUN,
        0x5401,
    ] {
        expect_errno(
            ioctl(&system, request, 0),
            libc::EINVAL,
            &format!("{request:#x}"),
        )?;
    }
    Ok(())
}

pub(crate) fn create_vm_type(device: &Device) -> Outcome {
    let system = device.open()?;
    for kind in [6, 0x1000, u64::MAX] {
        expect_errno(
            ioctl(&system, uapi::CREATE_VM, kind),
            libc::EINVAL,
            &format!("KVM_CREATE_VM of type {kind:#x}"),
        )?;
    }
    let vm = owned(ioctl(&system, uapi::CREATE_VM, 0))?;
    // SAFETY: Asks for the descriptor's flags.
    let flags = unsafe { libc::fcntl(std::os::fd::AsRawFd::as_raw_fd(&vm), libc::F_GETFD) };
    check_eq!(flags, libc::FD_CLOEXEC, "the VM's descriptor flags");
    Ok(())
}

pub(crate) fn mmap_size(device: &Device) -> Outcome {
    let system = device.open()?;
    let size = ioctl(&system, uapi::GET_VCPU_MMAP_SIZE, 0)?;
    let ring = ioctl(
        &system,
        uapi::CHECK_EXTENSION,
        kb::KVM_CAP_COALESCED_MMIO.into(),
    )?;
    check!(
        size % 4096 == 0 && size >= 8192,
        "the mapping has {size} bytes"
    );
    check!(
        ring == 0 || (ring + 1) * 4096 <= size,
        "the ring at page {ring} is not in {size} bytes"
    );
    expect_errno(
        ioctl(&system, uapi::GET_VCPU_MMAP_SIZE, 1),
        libc::EINVAL,
        "KVM_GET_VCPU_MMAP_SIZE with an argument",
    )
}

/// What every program wants (none works without), and answers that are exactly 1.
const NEEDED: [(u32, &str); 7] = [
    (kb::KVM_CAP_USER_MEMORY, "USER_MEMORY"),
    (kb::KVM_CAP_IRQCHIP, "IRQCHIP"),
    (kb::KVM_CAP_SET_TSS_ADDR, "SET_TSS_ADDR"),
    (kb::KVM_CAP_EXT_CPUID, "EXT_CPUID"),
    (kb::KVM_CAP_HLT, "HLT"),
    (kb::KVM_CAP_IMMEDIATE_EXIT, "IMMEDIATE_EXIT"),
    (kb::KVM_CAP_MP_STATE, "MP_STATE"),
];
/// Where they are offered at all, the answer is 1.
const BOOLEAN: [(u32, &str); 14] = [
    (kb::KVM_CAP_PIT2, "PIT2"),
    (kb::KVM_CAP_PIT_STATE2, "PIT_STATE2"),
    (kb::KVM_CAP_IRQFD, "IRQFD"),
    (kb::KVM_CAP_IOEVENTFD, "IOEVENTFD"),
    (kb::KVM_CAP_USER_NMI, "USER_NMI"),
    (kb::KVM_CAP_VCPU_EVENTS, "VCPU_EVENTS"),
    (kb::KVM_CAP_DEBUGREGS, "DEBUGREGS"),
    (kb::KVM_CAP_XCRS, "XCRS"),
    (kb::KVM_CAP_XSAVE, "XSAVE"),
    (kb::KVM_CAP_SIGNAL_MSI, "SIGNAL_MSI"),
    (kb::KVM_CAP_READONLY_MEM, "READONLY_MEM"),
    (kb::KVM_CAP_TSC_DEADLINE_TIMER, "TSC_DEADLINE_TIMER"),
    (kb::KVM_CAP_SET_IDENTITY_MAP_ADDR, "SET_IDENTITY_MAP_ADDR"),
    (kb::KVM_CAP_IRQ_INJECT_STATUS, "IRQ_INJECT_STATUS"),
];

pub(crate) fn extensions(device: &Device) -> Outcome {
    let system = device.open()?;
    let ask = |number: u32| ioctl(&system, uapi::CHECK_EXTENSION, number.into());
    for (number, name) in NEEDED {
        check_eq!(ask(number)?, 1, "KVM_CAP_{name}");
    }
    for (number, name) in BOOLEAN {
        let answer = ask(number)?;
        check!(
            answer == 0 || answer == 1,
            "KVM_CAP_{name} answers {answer}"
        );
    }
    for number in [0xffff, u32::MAX] {
        check_eq!(ask(number)?, 0, "the unknown capability {number:#x}");
    }
    let (most, slots) = (ask(kb::KVM_CAP_MAX_VCPUS)?, ask(kb::KVM_CAP_NR_MEMSLOTS)?);
    check!(most >= 8, "MAX_VCPUS is {most}");
    check!(slots >= 32, "NR_MEMSLOTS is {slots}");
    let ids = ask(kb::KVM_CAP_MAX_VCPU_ID)?;
    check!(
        ids == 0 || ids >= most,
        "MAX_VCPU_ID {ids} is below MAX_VCPUS {most}"
    );
    Ok(())
}

pub(crate) fn msr_index_list(device: &Device) -> Outcome {
    let system = device.open()?;
    let mut words = [0_u32; 1024];
    expect_errno(
        ioctl_words(&system, uapi::GET_MSR_INDEX_LIST, &mut words),
        libc::E2BIG,
        "a list without places",
    )?;
    let count = words[0];
    check!((1..1023).contains(&count), "the count filled in is {count}");
    words[0] = count;
    ioctl_words(&system, uapi::GET_MSR_INDEX_LIST, &mut words)?;
    check_eq!(words[0], count, "the count");
    let list = &words[1..=count as usize];
    // SYSENTER_CS, STAR, LSTAR, KERNEL_GS_BASE and the TSC: what a Linux guest's state needs.
    for index in [0x174, 0x10, 0xc000_0081, 0xc000_0082, 0xc000_0102] {
        check!(list.contains(&index), "MSR {index:#x} is not in the list");
    }
    expect_errno(
        ioctl(&system, uapi::GET_MSR_INDEX_LIST, BAD_POINTER),
        libc::EFAULT,
        "a bad pointer",
    )
}

/// KVM_GET_SUPPORTED_CPUID with room for `places` entries; their number or the errno.
fn supported(
    system: &std::os::fd::OwnedFd,
    places: u32,
    words: &mut [u32],
) -> Result<u32, rvisor_tests::raw::Errno> {
    words[0] = places;
    ioctl_words(system, uapi::GET_SUPPORTED_CPUID, words)?;
    Ok(words[0])
}

/// Of what the CPU has, no more is offered than the host's kernel uses (/proc/cpuinfo): it takes away what does not
/// work well on this CPU, such as string moves without their fast form.
pub(crate) fn features_of_the_host(device: &Device) -> Outcome {
    let cpuinfo = std::fs::read_to_string("/proc/cpuinfo")?;
    let flags = cpuinfo.lines().find_map(|line| line.strip_prefix("flags"));
    let flags: Vec<&str> = flags.unwrap_or_default().split_whitespace().collect();
    check!(flags.contains(&"fpu"), "/proc/cpuinfo has no flags");
    let mut words = vec![0_u32; 2 + 10 * 256];
    let count = supported(&device.open()?, 256, &mut words)?;
    let leaf_7 = words[2..2 + 10 * count as usize]
        .chunks(10)
        .find(|entry| entry[..2] == [7, 0])
        .ok_or_else(|| Fail::skip("there is no leaf 7"))?;
    for (bit, name) in [
        (0, "fsgsbase"),
        (3, "bmi1"),
        (5, "avx2"),
        (7, "smep"),
        (8, "bmi2"),
        (9, "erms"),
        (10, "invpcid"),
        (18, "rdseed"),
        (19, "adx"),
        (20, "smap"),
    ] {
        let is_offered = (leaf_7[4] >> bit) & 1 == 1;
        check!(
            !is_offered || flags.contains(&name),
            "{name} is offered, which the host does not use"
        );
    }
    Ok(())
}

pub(crate) fn supported_cpuid(device: &Device) -> Outcome {
    let system = device.open()?;
    // 2 words in front, 10 each entry; more than 256 places are cut to 256.
    let mut words = vec![0_u32; 2 + 10 * 256];
    let count = supported(&system, 256, &mut words)?;
    check!(
        (3..=100).contains(&count),
        "{count} entries; programs have place for 100"
    );
    let leaf = |function: u32| {
        words[2..2 + 10 * count as usize]
            .chunks(10)
            .find(|entry| entry[0] == function)
    };
    check!(leaf(0).is_some(), "leaf 0 is missing");
    let features = leaf(1).map_or(0, |entry| entry[6]);
    // FPU, TSC, MSR, PAE, CX8, APIC, FXSR, SSE, SSE2: the least of an x86-64 CPU.
    for bit in [0, 4, 5, 6, 8, 9, 24, 25, 26] {
        check!((features >> bit) & 1 == 1, "leaf 1 EDX lacks bit {bit}");
    }
    check!(
        leaf(0x8000_0001).is_some_and(|entry| (entry[6] >> 29) & 1 == 1),
        "no long mode in leaf 0x80000001"
    );
    check!(
        leaf(0x8000_0008).is_some_and(|entry| matches!((entry[3] >> 8) & 0xff, 48 | 57)),
        "the linear address width is neither 48 nor 57"
    );
    check_eq!(
        supported(&system, count, &mut words)?,
        count,
        "the same again with no place left"
    );
    check_eq!(
        supported(&system, 100_000, &mut words)?,
        count,
        "the same with more places than there can be entries"
    );
    for places in [0, 1, count - 1] {
        expect_errno(
            supported(&system, places, &mut words),
            libc::E2BIG,
            &format!("{places} places"),
        )?;
    }
    expect_errno(
        ioctl(&system, uapi::GET_SUPPORTED_CPUID, BAD_POINTER),
        libc::EFAULT,
        "a bad pointer",
    )
}
