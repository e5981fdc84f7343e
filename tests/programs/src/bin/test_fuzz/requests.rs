// SPDX-License-Identifier: GPL-2.0
//! The device's requests with arguments at random, near enough to right ones to get behind the first checks.

use crate::random::Random;
use crate::world::World;
use kvm_bindings as kb;
use rvisor_tests::uapi;

/// A pair of requests that read and write one structure, whose size the second one's number has.
pub(crate) const VCPU_STATE: &[(u64, u64)] = &[
    (uapi::GET_REGS, uapi::SET_REGS),
    (uapi::GET_SREGS, uapi::SET_SREGS),
    (uapi::GET_FPU, uapi::SET_FPU),
    (uapi::GET_LAPIC, uapi::SET_LAPIC),
    (uapi::GET_MP_STATE, uapi::SET_MP_STATE),
    (uapi::GET_VCPU_EVENTS, uapi::SET_VCPU_EVENTS),
    (uapi::GET_DEBUGREGS, uapi::SET_DEBUGREGS),
    (uapi::GET_XSAVE, uapi::SET_XSAVE),
    (uapi::GET_XSAVE2, uapi::SET_XSAVE),
    (uapi::GET_XCRS, uapi::SET_XCRS),
];

/// The same for a VM.
pub(crate) const VM_STATE: &[(u64, u64)] = &[
    (uapi::GET_IRQCHIP, uapi::SET_IRQCHIP),
    (uapi::GET_PIT2, uapi::SET_PIT2),
    (uapi::GET_CLOCK, uapi::SET_CLOCK),
];

/// Requests whose argument is a structure of words, or a number.
const VCPU: &[u64] = &[
    uapi::INTERRUPT,
    uapi::NMI,
    uapi::X86_SETUP_MCE,
    uapi::X86_SET_MCE,
    uapi::GET_MSRS,
    uapi::SET_MSRS,
    uapi::SET_CPUID2,
    uapi::GET_CPUID2,
    uapi::SET_SIGNAL_MASK,
    uapi::TPR_ACCESS_REPORTING,
    uapi::SET_VAPIC_ADDR,
    uapi::ENABLE_CAP,
    uapi::SET_TSC_KHZ,
    uapi::GET_TSC_KHZ,
    uapi::SET_MP_STATE,
    uapi::SET_XCRS,
    uapi::SET_LAPIC,
];

const VM: &[u64] = &[
    uapi::CREATE_IRQCHIP,
    uapi::CREATE_PIT2,
    uapi::IRQ_LINE,
    uapi::IRQ_LINE_STATUS,
    uapi::SIGNAL_MSI,
    uapi::SET_GSI_ROUTING,
    uapi::IRQFD,
    uapi::IRQFD,
    uapi::IOEVENTFD,
    uapi::IOEVENTFD,
    uapi::REGISTER_COALESCED_MMIO,
    uapi::UNREGISTER_COALESCED_MMIO,
    uapi::SET_USER_MEMORY_REGION,
    uapi::SET_USER_MEMORY_REGION,
    uapi::SET_USER_MEMORY_REGION2,
    uapi::GET_DIRTY_LOG,
    uapi::CLEAR_DIRTY_LOG,
    uapi::REINJECT_CONTROL,
    uapi::SET_BOOT_CPU_ID,
    uapi::SET_TSS_ADDR,
    uapi::SET_IDENTITY_MAP_ADDR,
    uapi::SET_NR_MMU_PAGES,
    uapi::ENABLE_CAP,
    uapi::CHECK_EXTENSION,
    uapi::SET_TSC_KHZ,
];

const SYSTEM: &[u64] = &[
    uapi::GET_API_VERSION,
    uapi::CHECK_EXTENSION,
    uapi::GET_VCPU_MMAP_SIZE,
    uapi::GET_MSR_INDEX_LIST,
    uapi::GET_MSR_FEATURE_INDEX_LIST,
    uapi::GET_SUPPORTED_CPUID,
    uapi::GET_EMULATED_CPUID,
    uapi::X86_GET_MCE_CAP_SUPPORTED,
    uapi::GET_MSRS,
];

/// What a descriptor is of.
#[derive(Clone, Copy)]
pub(crate) enum Kind {
    System,
    Vm,
    Vcpu,
}

/// One of the requests for such a descriptor.
pub(crate) fn any(random: &mut Random, kind: Kind) -> u64 {
    let table = match kind {
        Kind::System => SYSTEM,
        Kind::Vm => VM,
        Kind::Vcpu => VCPU,
    };
    random.of(table)
}

fn put<const N: usize>(place: &mut [u8], words: [u64; N]) {
    for (place, word) in place.chunks_exact_mut(8).zip(words) {
        place.copy_from_slice(&word.to_le_bytes());
    }
}

/// Two words of 32 bits.
const fn pair(low: u64, high: u64) -> u64 {
    (low & 0xffff_ffff) | (high << 32)
}

const PAGE: u64 = 4096;

/// Fills the structure that such a request takes.
pub(crate) fn fill(random: &mut Random, world: &World, request: u64, place: &mut [u8]) {
    for place in place.chunks_exact_mut(8).take(32) {
        place.copy_from_slice(&random.word().to_le_bytes());
    }
    // A few without rhyme or reason, but for what could keep KVM_RUN from its end.
    if random.once_in(8) && request != uapi::SET_SIGNAL_MASK {
        return;
    }
    let event = world.event(random);
    match request {
        uapi::SET_USER_MEMORY_REGION | uapi::SET_USER_MEMORY_REGION2 => {
            let slot = pair(random.below(4), random.below(4));
            let pages = random.below(513);
            let from = random.of(&[0, 0x20_0000, 0x1000, 0xd0_0000, 0xfec0_0000]);
            let host = world.address(random);
            put(place, [slot, from, pages * PAGE, host, 0, 0]);
        }
        uapi::GET_DIRTY_LOG => {
            put(place, [random.below(4), world.address(random)]);
        }
        uapi::CLEAR_DIRTY_LOG => {
            let first = random.below(9) * 64;
            let count = random.of(&[64, 512, 1, 0, 4096]);
            let slot = pair(random.below(4), count);
            put(place, [slot, first, world.address(random)]);
        }
        uapi::IRQFD => {
            let flags = random.below(4);
            let resample = world.event(random);
            put(
                place,
                [pair(event, random.below(26)), pair(flags, resample), 0, 0],
            );
        }
        uapi::IOEVENTFD => {
            let address = random.of(&[0x40, 0xd0_0000, 0xd0_0050, 0x3f8, u64::MAX]);
            let length = random.of(&[0, 1, 2, 4, 8, 3]);
            let [data, flags] = [random.below(3), random.below(8)];
            put(
                place,
                [data, address, pair(length, event), flags, 0, 0, 0, 0],
            );
        }
        uapi::REGISTER_COALESCED_MMIO | uapi::UNREGISTER_COALESCED_MMIO => {
            let size = random.of(&[8, 4096, 4096]);
            put(place, [0xd0_0000, pair(size, random.below(2))]);
        }
        uapi::SET_GSI_ROUTING => routing(random, place),
        uapi::IRQ_LINE | uapi::IRQ_LINE_STATUS => {
            put(place, [pair(random.below(26), random.below(2))]);
        }
        uapi::SIGNAL_MSI => {
            let address = 0xfee0_0000 | (random.below(4) << 12) | (random.below(4) << 2);
            put(place, [address, pair(random.below(0x1000), 0), 0, 0]);
        }
        uapi::ENABLE_CAP => {
            let capability = random.of(&[
                kb::KVM_CAP_SPLIT_IRQCHIP,
                kb::KVM_CAP_X2APIC_API,
                kb::KVM_CAP_MAX_VCPU_ID,
                kb::KVM_CAP_MSR_PLATFORM_INFO,
                kb::KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
                kb::KVM_CAP_X86_APIC_BUS_CYCLES_NS,
            ]);
            let argument = random.of(&[0, 1, 3, 24, 10]);
            put(place, [capability.into(), argument, 0, 0, 0]);
            place[40..104].fill(0);
        }
        uapi::GET_MSRS | uapi::SET_MSRS => {
            let count = random.below(4);
            put(place, [count]);
            for entry in place[8..].chunks_exact_mut(16).take(count as usize) {
                put(entry, [random.msr(), random.word()]);
            }
        }
        uapi::SET_SIGNAL_MASK => {
            // Without the signal that ends KVM_RUN.
            put(place, [8]);
            let mask = random.word() & !(1 << (libc::SIGUSR1 - 1));
            place[4..12].copy_from_slice(&mask.to_le_bytes());
        }
        uapi::SET_XCRS => put(place, [pair(1, 0), 0, random.below(1024) | 1]),
        uapi::SET_MP_STATE => put(place, [random.below(5)]),
        uapi::INTERRUPT => put(place, [random.below(257)]),
        uapi::X86_SETUP_MCE => put(place, [random.below(33) | (random.below(2) << 24)]),
        uapi::GET_SUPPORTED_CPUID | uapi::GET_CPUID2 | uapi::GET_EMULATED_CPUID => {
            put(place, [random.of(&[0, 1, 80, 256, 257])]);
        }
        uapi::GET_MSR_INDEX_LIST | uapi::GET_MSR_FEATURE_INDEX_LIST => {
            put(place, [random.of(&[0, 1, 1000, 4000])]);
        }
        // What KVM_GET_SUPPORTED_CPUID gave, changed.
        uapi::SET_CPUID2 => {
            let known = world.cpuid();
            let length = known.len().min(place.len());
            place[..length].copy_from_slice(&known[..length]);
            if random.once_in(2) {
                random.disturb(&mut place[..length]);
            }
        }
        _ => {}
    }
}

fn routing(random: &mut Random, place: &mut [u8]) {
    let count = random.below(5);
    put(place, [count]);
    for entry in place[8..].chunks_exact_mut(48).take(count as usize) {
        let kind = random.of(&[1, 2, 1, 2, 3, 0]);
        let what = match kind {
            1 => [pair(random.below(4), random.below(25)), 0],
            _ => [
                pair(0xfee0_0000 | (random.below(4) << 12), 0),
                pair(random.below(0x1000), 0),
            ],
        };
        put(
            entry,
            [pair(random.below(30), kind), 0, what[0], what[1], 0, 0],
        );
    }
}
