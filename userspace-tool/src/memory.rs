// SPDX-License-Identifier: GPL-2.0

//! The guest's memory: anonymous pages of this process, given to the hypervisor as slots.

use std::fs;

use kvm_bindings::{kvm_userspace_memory_region, KVM_MEM_READONLY};
use kvm_ioctls::{Cap, VmFd};
use vm_memory::{Address, GuestAddress, GuestMemory, GuestMemoryMmap, GuestMemoryRegion};

use crate::error::{failed, say, Error, Result};
use crate::layout;
use crate::size;

/// The guest's memory as this process sees it.
pub type Memory = GuestMemoryMmap<()>;

/// The least memory that there is a place for each of the parts that [`layout`] names.
const LEAST: u64 = 2 * size::MIB;

/// A field of /proc/meminfo, in bytes.
fn meminfo(text: &str, name: &str) -> Option<u64> {
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(size::KIB)
}

/// Checks that this host could give a guest `bytes` of memory, and warns on standard error where it
/// would have to take them from others.
///
/// # Errors
///
/// [`Error::Input`] where `bytes` is too little, no multiple of a page, or more than the host's memory.
pub fn check_size(bytes: u64) -> Result<()> {
    let text = size::text(bytes);
    let wrong = |what: &str| {
        let what = format!("--memory {text} {what}");
        Err(Error::input(what, "give a size such as 256M"))
    };
    if bytes < LEAST {
        return wrong("is too small for any kernel");
    }
    if !bytes.is_multiple_of(layout::PAGE_SIZE) {
        return wrong("is no multiple of 4 KiB");
    }
    // A host without /proc says nothing; then mmap has the last word.
    let host = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let fields = ["MemTotal", "MemAvailable"].map(|name| meminfo(&host, name));
    let [Some(total), Some(available)] = fields else {
        return Ok(());
    };
    let available_mib = available / size::MIB;
    if bytes > total {
        return Err(Error::input(
            format!(
                "--memory {text} is more than this host's {} MiB",
                total / size::MIB
            ),
            format!("give {available_mib} MiB or less"),
        ));
    }
    if bytes > available {
        say(format_args!(
            "warning: --memory {text} is more than the {available_mib} MiB that this host has free; \
             the guest or another program may be killed when it runs out"
        ));
    }
    Ok(())
}

/// Maps `bytes` of memory for a guest, and `rom` bytes for its firmware, 0 where it has none. The pages
/// come when they are first touched.
///
/// # Errors
///
/// [`Error::Input`] where the kernel refuses a mapping of that size.
pub fn allocate(bytes: u64, rom: u64) -> Result<Memory> {
    let ranges = layout::with_rom(layout::ram(bytes), rom);
    let ranges = ranges.iter().map(|range| {
        (
            GuestAddress(range.start),
            (range.end - range.start) as usize,
        )
    });
    // Private, anonymous, MAP_NORESERVE.
    Memory::from_ranges(&ranges.collect::<Vec<_>>()).map_err(|why| {
        Error::input(
            format!("the host gives no {} of memory: {why}", size::text(bytes)),
            "give a smaller --memory",
        )
    })
}

/// Gives `memory` to `vm`, one slot a region. The guest can't write to its firmware, where the hypervisor
/// offers that.
///
/// # Errors
///
/// [`Error::Call`] where the hypervisor refuses a slot.
pub fn give(vm: &VmFd, memory: &Memory) -> Result<()> {
    let protect = vm.check_extension(Cap::ReadonlyMem);
    for (slot, region) in (0..).zip(memory.iter()) {
        let rom = layout::is_rom(region.start_addr().raw_value());
        let host = memory
            .get_host_address(region.start_addr())
            .map_err(failed("finding the guest's memory"))?;
        let slot = kvm_userspace_memory_region {
            slot,
            flags: if rom && protect { KVM_MEM_READONLY } else { 0 },
            guest_phys_addr: region.start_addr().raw_value(),
            memory_size: region.len(),
            userspace_addr: host as u64,
        };
        #[allow(unsafe_code)]
        // SAFETY: The region is one that vm-memory mapped for the guest alone, `memory_size` bytes from
        // `userspace_addr` on; Rust code reaches it only through vm-memory's volatile accesses, so the
        // guest's writes break no reference. Should the mapping end before the VM does, the hypervisor
        // sees the addresses unmapped and the guest's accesses fail: it never keeps pages by itself.
        let given = unsafe { vm.set_user_memory_region(slot) };
        given.map_err(failed("giving memory to the guest"))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn meminfo_is_read() {
        let text =
            "MemTotal:        2048 kB\nMemFree:  1 kB\nMemAvailable:    1024 kB\nBad: x kB\n";
        assert_eq!(meminfo(text, "MemTotal"), Some(2 << 20));
        assert_eq!(meminfo(text, "MemAvailable"), Some(1 << 20));
        assert_eq!(meminfo(text, "Mem"), None);
        assert_eq!(meminfo(text, "Bad"), None);
    }

    #[test]
    fn memory_above_the_hole_is_mapped() -> Result<()> {
        let memory = allocate(layout::HOLE + layout::PAGE_SIZE, 0)?;
        assert_eq!(memory.num_regions(), 2);
        assert!(memory.address_in_range(GuestAddress(layout::ABOVE_4G)));
        assert!(!memory.address_in_range(GuestAddress(layout::HOLE)));
        Ok(())
    }
}
