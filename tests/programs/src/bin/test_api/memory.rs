// SPDX-License-Identifier: GPL-2.0
//! The rules of KVM_SET_USER_MEMORY_REGION.

use crate::system::BAD_POINTER;
use crate::vm::new_vm;
use kvm_bindings as kb;
use rvisor_tests::mapping::Mapping;
use rvisor_tests::raw::{expect_errno, ioctl, ioctl_with, Errno};
use rvisor_tests::{uapi, Context, Device, Fail, Outcome};
use std::os::fd::OwnedFd;

const PAGE: u64 = 4096;

/// A region that is changed from call to call.
#[derive(Clone, Copy)]
struct Region {
    slot: u32,
    flags: u32,
    address: u64,
    size: u64,
    hva: u64,
}

impl Region {
    fn set(self, vm: &OwnedFd) -> Result<i32, Errno> {
        let mut region = kb::kvm_userspace_memory_region {
            slot: self.slot,
            flags: self.flags,
            guest_phys_addr: self.address,
            memory_size: self.size,
            userspace_addr: self.hva,
        };
        ioctl_with(vm, uapi::SET_USER_MEMORY_REGION, &mut region)
    }
}

/// A VM, 16 pages, and a region with the first four of them at 1 MiB.
fn one_region(device: &Device) -> Result<(OwnedFd, Mapping, Region), rvisor_tests::Fail> {
    let vm = new_vm(device)?;
    let memory = Mapping::anonymous(16 * PAGE as usize)?;
    let region = Region {
        slot: 1,
        flags: 0,
        address: 0x10_0000,
        size: 4 * PAGE,
        hva: memory.start(),
    };
    Ok((vm, memory, region))
}

pub(crate) fn slot_rules(device: &Device) -> Outcome {
    let (vm, _memory, first) = one_region(device)?;
    first.set(&vm)?;
    first.set(&vm).during("the same region again")?;
    let wrong = [
        (
            "another host address",
            Region {
                hva: first.hva + PAGE,
                ..first
            },
        ),
        (
            "another size",
            Region {
                size: 5 * PAGE,
                ..first
            },
        ),
        (
            "READONLY turned on",
            Region {
                flags: kb::KVM_MEM_READONLY,
                ..first
            },
        ),
        (
            "an unknown flag",
            Region {
                flags: 1 << 20,
                slot: 2,
                address: 0,
                ..first
            },
        ),
        (
            "an address space that there is not",
            Region {
                slot: 7 << 16,
                address: 0,
                ..first
            },
        ),
        (
            "a slot beyond all",
            Region {
                slot: 0xffff,
                address: 0,
                ..first
            },
        ),
    ];
    for (what, region) in wrong {
        expect_errno(region.set(&vm), libc::EINVAL, what)?;
    }
    Ok(())
}

pub(crate) fn slot_overlap(device: &Device) -> Outcome {
    let (vm, _memory, first) = one_region(device)?;
    first.set(&vm)?;
    let other = Region {
        slot: 2,
        hva: first.hva + 8 * PAGE,
        ..first
    };
    for (what, address) in [
        ("the same place", first.address),
        ("its last page", first.address + 3 * PAGE),
        ("its first page, from below", first.address - 3 * PAGE),
    ] {
        expect_errno(Region { address, ..other }.set(&vm), libc::EEXIST, what)?;
    }
    Region {
        address: first.address + 4 * PAGE,
        ..other
    }
    .set(&vm)
    .during("right behind it")?;
    expect_errno(
        Region {
            address: first.address + PAGE,
            ..first
        }
        .set(&vm),
        libc::EEXIST,
        "moving the first onto the second",
    )?;
    // Two slots may show the same memory.
    Region {
        slot: 3,
        address: 0x20_0000,
        ..first
    }
    .set(&vm)
    .during("the same host memory twice")?;
    Ok(())
}

pub(crate) fn slot_alignment(device: &Device) -> Outcome {
    let (vm, _memory, first) = one_region(device)?;
    let wrong = [
        (
            "an unaligned guest address",
            Region {
                address: first.address + 8,
                ..first
            },
        ),
        (
            "an unaligned size",
            Region {
                size: first.size + 8,
                ..first
            },
        ),
        (
            "an unaligned host address",
            Region {
                hva: first.hva + 8,
                ..first
            },
        ),
        (
            "a guest address that wraps",
            Region {
                address: 0_u64.wrapping_sub(PAGE),
                ..first
            },
        ),
        (
            "a host address of the kernel's",
            Region {
                hva: 0xffff_8000_0000_0000,
                ..first
            },
        ),
        (
            "a size that wraps",
            Region {
                size: 0_u64.wrapping_sub(PAGE),
                ..first
            },
        ),
    ];
    for (what, region) in wrong {
        expect_errno(region.set(&vm), libc::EINVAL, what)?;
    }
    expect_errno(
        ioctl(&vm, uapi::SET_USER_MEMORY_REGION, 0),
        libc::EFAULT,
        "no structure",
    )
}

pub(crate) fn slot_move_and_delete(device: &Device) -> Outcome {
    let (vm, _memory, first) = one_region(device)?;
    let deleted = Region { size: 0, ..first };
    expect_errno(deleted.set(&vm), libc::EINVAL, "deleting what is not there")?;
    first.set(&vm)?;
    let moved = Region {
        address: 0x20_0000,
        ..first
    };
    moved.set(&vm).during("moving it")?;
    Region {
        slot: 2,
        hva: first.hva + 8 * PAGE,
        ..first
    }
    .set(&vm)
    .during("another slot where it was")?;
    deleted.set(&vm).during("deleting it")?;
    expect_errno(deleted.set(&vm), libc::EINVAL, "deleting it twice")?;
    Region {
        size: 8 * PAGE,
        address: 0x20_0000,
        ..first
    }
    .set(&vm)
    .during("the slot again with another size")?;
    Ok(())
}

/// A limit for shadow paging, which has a least value.
pub(crate) fn shadow_page_limit(device: &Device) -> Outcome {
    let (vm, _memory, _) = one_region(device)?;
    for pages in [0, 63] {
        expect_errno(
            ioctl(&vm, uapi::SET_NR_MMU_PAGES, pages),
            libc::EINVAL,
            &format!("{pages} pages"),
        )?;
    }
    ioctl(&vm, uapi::SET_NR_MMU_PAGES, 64)?;
    Ok(())
}

/// KVM_SET_USER_MEMORY_REGION2 is the same call with room for more.
pub(crate) fn second_form(device: &Device) -> Outcome {
    let (vm, memory, first) = one_region(device)?;
    let offered = ioctl(&vm, uapi::CHECK_EXTENSION, kb::KVM_CAP_USER_MEMORY2.into())?;
    if offered == 0 {
        return Err(Fail::skip("USER_MEMORY2 is not offered"));
    }
    let set = |flags: u32, size: u64, hva: u64| {
        let mut region = kb::kvm_userspace_memory_region2 {
            slot: first.slot,
            flags,
            guest_phys_addr: first.address,
            memory_size: size,
            userspace_addr: hva,
            ..Default::default()
        };
        ioctl_with(&vm, uapi::SET_USER_MEMORY_REGION2, &mut region)
    };
    set(0, first.size, first.hva)?;
    first.set(&vm).during("the first form of the same")?;
    expect_errno(
        set(1 << 5, first.size, first.hva),
        libc::EINVAL,
        "an unknown flag",
    )?;
    expect_errno(
        set(0, first.size, memory.start() + PAGE),
        libc::EINVAL,
        "another host address",
    )?;
    set(0, 0, 0).during("removing it")?;
    expect_errno(set(0, 0, 0), libc::EINVAL, "removing it twice")?;
    expect_errno(
        ioctl(&vm, uapi::SET_USER_MEMORY_REGION2, BAD_POINTER),
        libc::EFAULT,
        "a bad pointer",
    )
}
