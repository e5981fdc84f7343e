// SPDX-License-Identifier: GPL-2.0
//! x2APIC mode (SDM volume 3, section 12.12).

use crate::probe::{self, register, Probe, APIC_BASE, ENABLE, X2APIC};
use kvm_bindings as kb;
use rvisor_tests::handlers::{self, count, Acknowledge};
use rvisor_tests::layout::LAPIC;
use rvisor_tests::raw::{self, expect_errno};
use rvisor_tests::{check, check_eq, uapi, Device, Fail, Machine, Outcome};

const ID: u32 = 0x802;
const VERSION: u32 = 0x803;
const TPR: u32 = 0x808;
const PPR: u32 = 0x80a;
const EOI: u32 = 0x80b;
const LDR: u32 = 0x80d;
const SPURIOUS: u32 = 0x80f;
const ISR: u32 = 0x810;
const IRR: u32 = 0x820;
const ESR: u32 = 0x828;
const ICR: u32 = 0x830;
const LVT_TIMER: u32 = 0x832;
const LVT_LINT0: u32 = 0x835;
const INITIAL_COUNT: u32 = 0x838;
const CURRENT_COUNT: u32 = 0x839;
const DIVIDE: u32 = 0x83e;
const SELF_IPI: u32 = 0x83f;

/// IA32_APIC_BASE takes the transitions of figure 12-27 and raises #GP for all others.
pub(crate) fn x2apic_transitions(device: &Device) -> Outcome {
    const BSP: u64 = 1 << 8;
    const OFF: u64 = LAPIC | BSP;
    const ON: u64 = OFF | ENABLE;
    const EXTENDED: u64 = ON | X2APIC;
    let machine = Machine::with_irqchip(device)?;
    let probe = Probe::new(&machine, 0)?;
    check_eq!(probe.rdmsr(APIC_BASE)?, Some(ON), "IA32_APIC_BASE");
    for (to, allowed) in [
        (OFF | X2APIC, false),
        (ON | 1, false),
        (ON | (1 << 9), false),
        (ON | (1 << 63), false),
        (EXTENDED, true),
        (ON, false),
        (OFF | X2APIC, false),
        (EXTENDED, true),
        (OFF, true),
        (EXTENDED, false),
        (OFF | X2APIC, false),
        (ON, true),
        (OFF, true),
        (ON, true),
        (EXTENDED, true),
    ] {
        let before = probe.rdmsr(APIC_BASE)?;
        check_eq!(
            probe.wrmsr(APIC_BASE, to)?,
            allowed,
            "from {before:x?} to {to:#x}"
        );
        let expected = if allowed { Some(to) } else { before };
        check_eq!(probe.rdmsr(APIC_BASE)?, expected, "IA32_APIC_BASE");
    }
    Ok(())
}

/// Which registers can be read and written, and that those of xAPIC mode are MSRs in this mode alone.
pub(crate) fn x2apic_registers(device: &Device) -> Outcome {
    let machine = Machine::with_irqchip(device)?;
    let id = 0x23_u64;
    raw::ioctl(&machine.vm, uapi::SET_BOOT_CPU_ID, id)?;
    let probe = Probe::new(&machine, id)?;
    for index in [ID, VERSION, TPR, ICR] {
        check_eq!(probe.rdmsr(index)?, None, "MSR {index:#x} in xAPIC mode");
    }
    check!(!probe.wrmsr(EOI, 0)?, "an EOI in xAPIC mode");
    check_eq!(probe.lapic(0x20)?, 0x2300_0000, "the xAPIC's identifier");
    probe::enter_x2apic(&probe.cpu)?;
    check_eq!(probe.rdmsr(ID)?, Some(0x23), "the identifier");
    check_eq!(
        probe.rdmsr(LDR)?,
        Some(0x0002_0008),
        "the logical identifier: cluster 2, the fourth"
    );
    check_eq!(
        probe.rdmsr(VERSION)?.map(|version| version & 0xff),
        Some(0x14),
        "the version"
    );
    // Write-only, or not there in this mode, or never.
    for index in [0x800, 0x801, 0x809, EOI, 0x80e, 0x831, SELF_IPI, 0x840] {
        check_eq!(probe.rdmsr(index)?, None, "reading MSR {index:#x}");
    }
    for index in [
        ID,
        VERSION,
        0x809,
        PPR,
        LDR,
        0x80e,
        ISR,
        IRR,
        0x831,
        CURRENT_COUNT,
    ] {
        check!(!probe.wrmsr(index, 0)?, "writing MSR {index:#x}");
    }
    for (index, value) in [
        (TPR, 1 << 8),
        (SPURIOUS, 1 << 32),
        (ESR, 1),
        (ICR, 1 << 20),
        (ICR, 1 << 13),
        (ICR, 1 << 16),
        (INITIAL_COUNT, 1 << 32),
        (SELF_IPI, 0x141),
    ] {
        check!(!probe.wrmsr(index, value)?, "{value:#x} to MSR {index:#x}");
    }
    for (index, value) in [
        (SPURIOUS, 0x1ff),
        (TPR, 0x35),
        (LVT_TIMER, 0x1_0040),
        (LVT_LINT0, 0x1_0700),
        (DIVIDE, 0xb),
        (ICR, 0x7_0000_0041),
    ] {
        check!(probe.wrmsr(index, value)?, "{value:#x} to MSR {index:#x}");
        check_eq!(probe.rdmsr(index)?, Some(value), "MSR {index:#x}");
    }
    check_eq!(probe.cpu.sregs()?.cr8, 3, "CR8");
    Ok(())
}

/// Self-IPIs are taken by priority, and EOIs end them from the highest down.
pub(crate) fn x2apic_self_ipi(device: &Device) -> Outcome {
    let machine = Machine::with_irqchip(device)?;
    let probe = Probe::new(&machine, 0)?;
    probe::enter_x2apic(&probe.cpu)?;
    probe.wrmsr(SPURIOUS, 0x1ff)?;
    for vector in [0x41, 0x92, 0x61] {
        check!(probe.wrmsr(SELF_IPI, vector)?, "self-IPI {vector:#x}");
    }
    check_eq!(probe.rdmsr(IRR + 2)?, Some(1 << 1), "IRR, 0x40 to 0x5f");
    check_eq!(probe.rdmsr(IRR + 4)?, Some(1 << 18), "IRR, 0x80 to 0x9f");
    // Nobody ends them: the first holds the others back.
    check_eq!(probe.take_interrupts()?, [0x92], "taken first");
    check_eq!(probe.rdmsr(ISR + 4)?, Some(1 << 18), "ISR, 0x80 to 0x9f");
    check_eq!(probe.rdmsr(PPR)?, Some(0x90), "PPR");
    check_eq!(probe.take_interrupts()?, [], "taken under the first");
    check!(probe.wrmsr(EOI, 0)?, "EOI");
    check_eq!(probe.take_interrupts()?, [0x61], "taken second");
    check!(probe.wrmsr(EOI, 0)?, "EOI");
    check!(probe.wrmsr(TPR, 0x40)?, "TPR");
    check_eq!(probe.take_interrupts()?, [], "taken under the TPR");
    check!(probe.wrmsr(TPR, 0)?, "TPR");
    handlers::set_acknowledge(&machine.memory, Acknowledge::X2apic);
    check_eq!(probe.take_interrupts()?, [0x41], "taken last");
    check_eq!(probe.rdmsr(PPR)?, Some(0), "PPR at the end");
    check_eq!(count(&machine.memory, 0x92), 1, "interrupts of 0x92");
    Ok(())
}

/// Outside of xAPIC mode there is nothing at the page's address, and nobody is asked.
pub(crate) fn x2apic_page(device: &Device) -> Outcome {
    let machine = Machine::with_irqchip(device)?;
    let probe = Probe::new(&machine, 0)?;
    let version = probe.lapic(0x30)?;
    check_eq!(version & 0xff, 0x14, "the version in xAPIC mode");
    for mode in [ENABLE | X2APIC, 0] {
        check!(
            probe.wrmsr(APIC_BASE, LAPIC | 0x100 | mode)?,
            "IA32_APIC_BASE"
        );
        check_eq!(probe.lapic(0x30)?, u32::MAX, "the page, mode {mode:#x}");
        probe.set_lapic(0x80, 0x20)?;
    }
    check!(
        probe.wrmsr(APIC_BASE, LAPIC | 0x100 | ENABLE)?,
        "IA32_APIC_BASE"
    );
    check_eq!(probe.lapic(0x30)?, version, "the version again");
    check_eq!(probe.lapic(0x80)?, 0, "TPR");
    Ok(())
}

/// KVM_GET_LAPIC and KVM_SET_LAPIC in x2APIC mode.
pub(crate) fn x2apic_state(device: &Device) -> Outcome {
    let machine = Machine::with_irqchip(device)?;
    let id = 0x23_u64;
    raw::ioctl(&machine.vm, uapi::SET_BOOT_CPU_ID, id)?;
    let probe = Probe::new(&machine, id)?;
    probe::enter_x2apic(&probe.cpu)?;
    for (index, value) in [(SPURIOUS, 0x1ff), (TPR, 0x20), (ICR, 0x77_0000_0041)] {
        check!(probe.wrmsr(index, value)?, "MSR {index:#x}");
    }
    let mut state = probe.cpu.fd.get_lapic()?;
    check_eq!(register(&state, 0x20), 0x2300_0000, "the identifier");
    check_eq!(register(&state, 0xd0), 0x0002_0008, "the LDR");
    check_eq!(register(&state, 0x80), 0x20, "the TPR");
    check_eq!(register(&state, 0x300), 0x41, "the ICR's lower half");
    check_eq!(register(&state, 0x310), 0x77, "the ICR's upper half");
    // The identifiers are not to be changed.
    probe::set_register(&mut state, 0x20, 0x0500_0000);
    probe::set_register(&mut state, 0xd0, 0x1234);
    probe::set_register(&mut state, 0x310, 0x99);
    probe.cpu.fd.set_lapic(&state)?;
    check_eq!(probe.rdmsr(ID)?, Some(0x23), "the identifier");
    check_eq!(probe.rdmsr(LDR)?, Some(0x0002_0008), "the LDR");
    check_eq!(probe.rdmsr(ICR)?, Some(0x99_0000_0041), "the ICR");
    Ok(())
}

/// KVM_CAP_X2APIC_API: 32-bit identifiers in userspace's structures, and 0xff is no broadcast.
pub(crate) fn x2apic_api(device: &Device) -> Outcome {
    const USE_32BIT_IDS: u64 = 1;
    const DISABLE_BROADCAST_QUIRK: u64 = 2;
    let machine = Machine::with_irqchip(device)?;
    let offered = machine.extension(kb::KVM_CAP_X2APIC_API);
    check_eq!(offered & 3, 3, "KVM_CAP_X2APIC_API");
    let enable = |flags: u64| {
        let mut request = kb::kvm_enable_cap {
            cap: kb::KVM_CAP_X2APIC_API,
            ..Default::default()
        };
        request.args[0] = flags;
        raw::ioctl_with(&machine.vm, uapi::ENABLE_CAP, &mut request)
    };
    expect_errno(enable(1 << 40), libc::EINVAL, "an unknown flag")?;
    let probe = Probe::new(&machine, 0)?;
    let other = machine.vcpu(3)?;
    for cpu in [&probe.cpu, &other] {
        probe::enter_x2apic(cpu)?;
        probe::set_registers(cpu, &[(0xf0, 0x1ff)])?;
    }
    // Bits 31:8 of the destination stand in the upper half of the address.
    let send = |high: u32, low: u32| {
        machine.vm.signal_msi(kb::kvm_msi {
            address_lo: 0xfee0_0000 | (low << 12),
            address_hi: high,
            data: 0x61,
            ..Default::default()
        })
    };
    let takers = || {
        Ok::<_, Fail>([
            probe::take_requested(&probe.cpu)?.len(),
            probe::take_requested(&other)?.len(),
        ])
    };
    send(0, 0xff)?;
    check_eq!(takers()?, [1, 1], "0xff as a broadcast");
    check_eq!(enable(DISABLE_BROADCAST_QUIRK).is_ok(), true, "the quirk");
    let _ = send(0, 0xff);
    check_eq!(takers()?, [0, 0], "0xff as an identifier");
    check_eq!(enable(USE_32BIT_IDS).is_ok(), true, "32-bit identifiers");
    send(0, 3)?;
    check_eq!(takers()?, [0, 1], "identifier 3");
    let _ = send(0x100, 3);
    check_eq!(takers()?, [0, 0], "identifier 0x103");
    send(0xffff_ff00, 0xff)?;
    check_eq!(takers()?, [1, 1], "0xffffffff as a broadcast");
    check!(send(1, 3).is_err(), "bits 39:32 of the address");
    let mut state = other.fd.get_lapic()?;
    check_eq!(register(&state, 0x20), 3, "the identifier");
    other.fd.set_lapic(&state)?;
    probe::set_register(&mut state, 0x20, 0x0300_0000);
    check!(
        other.fd.set_lapic(&state).is_err(),
        "KVM_SET_LAPIC took another identifier"
    );
    Ok(())
}

/// KVM_CAP_X86_APIC_BUS_CYCLES_NS: the timer counts at another rate.
pub(crate) fn bus_cycle(device: &Device) -> Outcome {
    let machine = Machine::with_irqchip(device)?;
    let cap = kb::KVM_CAP_X86_APIC_BUS_CYCLES_NS;
    check_eq!(machine.extension(cap), 1, "the cycle at first");
    let set = |nanoseconds: u64| {
        let mut request = kb::kvm_enable_cap {
            cap,
            ..Default::default()
        };
        request.args[0] = nanoseconds;
        raw::ioctl_with(&machine.vm, uapi::ENABLE_CAP, &mut request)
    };
    expect_errno(set(0), libc::EINVAL, "a cycle of nothing")?;
    expect_errno(set(1 << 32), libc::EINVAL, "a cycle of seconds")?;
    check!(set(1000).is_ok(), "a cycle of a microsecond");
    check_eq!(machine.extension(cap), 1000, "the cycle");
    let probe = Probe::new(&machine, 0)?;
    expect_errno(set(1), libc::EINVAL, "after the first vCPU")?;
    probe.set_lapic(0xf0, 0x1ff)?;
    probe.set_lapic(0x320, 0x1_0040)?;
    probe.set_lapic(0x3e0, 0xb)?;
    let began = std::time::Instant::now();
    probe.set_lapic(0x380, 1_000_000)?;
    std::thread::sleep(std::time::Duration::from_millis(10));
    let counts = u128::from(1_000_000 - probe.lapic(0x390)?);
    let elapsed = began.elapsed().as_micros();
    check!(
        counts >= 10_000 && counts <= elapsed,
        "{counts} counts in {elapsed} microseconds"
    );
    Ok(())
}
