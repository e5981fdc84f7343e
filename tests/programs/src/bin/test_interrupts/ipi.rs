// SPDX-License-Identifier: GPL-2.0
//! Where IPIs and messages go, by what waits at each local APIC afterwards (SDM volume 3, 12.6.2 and
//! 12.12.10).

use crate::probe::{self, Probe};
use kvm_bindings as kb;
use rvisor_tests::{check, check_eq, Context, Cpu, Device, Fail, Machine, Outcome};

/// Vectors, then the ICR's bits.
const VECTOR: u32 = 0x55;
const LOWEST: u32 = 1 << 8;
const NMI: u32 = 4 << 8;
const INIT: u32 = 5 << 8;
const STARTUP: u32 = 6 << 8;
const LOGICAL: u32 = 1 << 11;
const ASSERT: u32 = 1 << 14;
const LEVEL: u32 = 1 << 15;
const ITSELF: u32 = 1 << 18;
const ALL: u32 = 2 << 18;
const OTHERS: u32 = 3 << 18;

/// Four vCPUs, of which the first runs the probe.
struct Group<'a> {
    probe: Probe<'a>,
    others: Vec<Cpu>,
    x2apic: bool,
}

impl<'a> Group<'a> {
    /// `logical` has the vCPUs' logical identifiers in xAPIC mode, `None` is x2APIC mode.
    fn new(machine: &'a Machine, dfr: u32, logical: Option<[u8; 4]>) -> Result<Self, Fail> {
        let probe = Probe::new(machine, 0)?;
        let others: Vec<Cpu> = (1..4)
            .map(|id| machine.vcpu(id))
            .collect::<Result<_, _>>()?;
        for (place, cpu) in std::iter::once(&probe.cpu).chain(&others).enumerate() {
            match logical {
                None => {
                    probe::enter_x2apic(cpu)?;
                    probe::set_registers(cpu, &[(0xf0, 0x1ff)])?;
                }
                Some(logical) => {
                    let ldr = u32::from(logical[place]) << 24;
                    probe::set_registers(cpu, &[(0xf0, 0x1ff), (0xd0, ldr), (0xe0, dfr)])?;
                }
            }
        }
        Ok(Self {
            probe,
            others,
            x2apic: logical.is_none(),
        })
    }

    fn cpus(&self) -> impl Iterator<Item = &Cpu> {
        std::iter::once(&self.probe.cpu).chain(&self.others)
    }

    fn send(&self, command: u32, destination: u32) -> Result<(), Fail> {
        if self.x2apic {
            let value = (u64::from(destination) << 32) | u64::from(command);
            check!(self.probe.wrmsr(0x830, value)?, "WRMSR of the ICR");
            return Ok(());
        }
        self.probe.set_lapic(0x310, destination << 24)?;
        self.probe.set_lapic(0x300, command)
    }

    /// The vCPUs where the vector has come.
    fn takers(&self, vector: u8) -> Result<Vec<usize>, Fail> {
        let mut takers = Vec::new();
        for (place, cpu) in self.cpus().enumerate() {
            match probe::take_requested(cpu)?.as_slice() {
                [] => {}
                [taken] if *taken == vector => takers.push(place),
                other => return Err(Fail::new(format!("vCPU {place} has {other:x?}"))),
            }
        }
        Ok(takers)
    }

    fn check(&self, cases: &[(u32, u32, &[usize])]) -> Outcome {
        for &(command, destination, expected) in cases {
            self.send(command | VECTOR, destination)?;
            check_eq!(
                self.takers(VECTOR as u8)?,
                expected,
                "ICR {command:#x}, destination {destination:#x}"
            );
        }
        Ok(())
    }
}

/// Physical and flat logical destinations, and shorthands.
pub(crate) fn ipi_flat(device: &Device) -> Outcome {
    let machine = Machine::with_irqchip(device)?;
    let group = Group::new(&machine, 0xffff_ffff, Some([1, 2, 4, 0x80]))?;
    group.check(&[
        (0, 0, &[0]),
        (0, 2, &[2]),
        (0, 4, &[]),
        (0, 0xff, &[0, 1, 2, 3]),
        (LOGICAL, 0x02, &[1]),
        (LOGICAL, 0x85, &[0, 2, 3]),
        (LOGICAL, 0x78, &[]),
        (LOGICAL, 0xff, &[0, 1, 2, 3]),
        (ITSELF, 3, &[0]),
        (ALL, 3, &[0, 1, 2, 3]),
        (OTHERS, 3, &[1, 2, 3]),
        (ASSERT | LEVEL, 1, &[1]),
        // De-asserted: nothing.
        (LEVEL, 1, &[]),
    ])
}

/// Logical destinations in the cluster model.
pub(crate) fn ipi_cluster(device: &Device) -> Outcome {
    let machine = Machine::with_irqchip(device)?;
    let group = Group::new(&machine, 0x0fff_ffff, Some([0x11, 0x12, 0x21, 0x28]))?;
    group.check(&[
        (LOGICAL, 0x11, &[0]),
        (LOGICAL, 0x13, &[0, 1]),
        (LOGICAL, 0x2f, &[2, 3]),
        (LOGICAL, 0x31, &[]),
        (LOGICAL, 0xff, &[0, 1, 2, 3]),
        (0, 0x11, &[]),
    ])
}

/// Physical and logical destinations in x2APIC mode.
pub(crate) fn ipi_x2apic(device: &Device) -> Outcome {
    let machine = Machine::with_irqchip(device)?;
    let group = Group::new(&machine, 0xffff_ffff, None)?;
    group.check(&[
        (0, 0, &[0]),
        (0, 3, &[3]),
        (0, 0xff, &[]),
        (0, 0xffff_ffff, &[0, 1, 2, 3]),
        (LOGICAL, 0x0000_000a, &[1, 3]),
        (LOGICAL, 0x0001_000a, &[]),
        (LOGICAL, 0xffff_ffff, &[0, 1, 2, 3]),
        (ITSELF, 3, &[0]),
        (ALL, 3, &[0, 1, 2, 3]),
        (OTHERS, 0, &[1, 2, 3]),
    ])
}

/// A message of lowest priority goes to one of those that it is for.
pub(crate) fn ipi_lowest_priority(device: &Device) -> Outcome {
    let machine = Machine::with_irqchip(device)?;
    let group = Group::new(&machine, 0xffff_ffff, Some([1, 2, 4, 8]))?;
    for destination in [0x0a, 0x0e, 0x04] {
        for _ in 0..4 {
            group.send(LOWEST | LOGICAL | VECTOR, destination)?;
            let takers = group.takers(VECTOR as u8)?;
            check!(
                takers.len() == 1 && destination & (1 << takers[0]) != 0,
                "{takers:?} took what was for one of {destination:#x}"
            );
        }
    }
    // An APIC that software has disabled takes no vector.
    probe::set_registers(&group.others[0], &[(0xf0, 0xff)])?;
    group.send(LOWEST | LOGICAL | VECTOR, 0x0a)?;
    check_eq!(group.takers(VECTOR as u8)?, [3], "the one that is enabled");
    group.send(LOGICAL | VECTOR, 0x02)?;
    check_eq!(group.takers(VECTOR as u8)?, [], "the one that is disabled");
    Ok(())
}

/// NMI, INIT and SIPI, to APICs that software has disabled too.
pub(crate) fn ipi_nmi_init_startup(device: &Device) -> Outcome {
    let machine = Machine::with_irqchip(device)?;
    let group = Group::new(&machine, 0xffff_ffff, Some([1, 2, 4, 8]))?;
    probe::set_registers(&group.others[1], &[(0xf0, 0xff)])?;
    let nmis = || {
        group
            .cpus()
            .map(|cpu| Ok(cpu.fd.get_vcpu_events()?.nmi.pending))
            .collect::<Result<Vec<u8>, Fail>>()
            .during("KVM_GET_VCPU_EVENTS")
    };
    let states = || {
        group
            .cpus()
            .map(|cpu| Ok(cpu.fd.get_mp_state()?.mp_state))
            .collect::<Result<Vec<u32>, Fail>>()
            .during("KVM_GET_MP_STATE")
    };
    const RUNS: u32 = kb::KVM_MP_STATE_RUNNABLE;
    const NEW: u32 = kb::KVM_MP_STATE_UNINITIALIZED;
    const WAITS: u32 = kb::KVM_MP_STATE_INIT_RECEIVED;
    group.send(NMI, 2)?;
    check_eq!(nmis()?, [0, 0, 1, 0], "NMIs");
    check_eq!(states()?, [RUNS, NEW, NEW, NEW], "states at first");
    // Nobody waits for this one.
    group.send(STARTUP | 0x10, 2)?;
    check_eq!(states()?, [RUNS, NEW, NEW, NEW], "states after a SIPI");
    group.send(INIT | ASSERT, 2)?;
    check_eq!(states()?, [RUNS, NEW, WAITS, NEW], "states after INIT");
    check_eq!(nmis()?, [0, 0, 0, 0], "NMIs after INIT");
    group.send(INIT | LEVEL, 0xff)?;
    check_eq!(
        states()?,
        [RUNS, NEW, WAITS, NEW],
        "after a de-asserted INIT"
    );
    group.send(STARTUP | 0x10, 2)?;
    check_eq!(states()?, [RUNS, NEW, RUNS, NEW], "states after SIPI");
    let sregs = group.others[1].sregs()?;
    check_eq!(
        (sregs.cs.selector, sregs.cs.base),
        (0x1000, 0x1_0000),
        "CS of the started one"
    );
    // All but the sender, INIT and SIPI at once.
    group.send(OTHERS | INIT | ASSERT, 0)?;
    group.send(OTHERS | STARTUP | 0x9f, 0)?;
    check_eq!(states()?, [RUNS; 4], "states after both to all others");
    for cpu in &group.others {
        check_eq!(cpu.sregs()?.cs.base, 0x9_f000, "CS");
        check_eq!(cpu.regs()?.rip, 0, "RIP");
    }
    // The bootstrap processor begins at the reset vector.
    let mut regs = group.others[0].regs()?;
    regs.rax = 0x1234;
    group.others[0].set_regs(&regs)?;
    probe::set_registers(&group.others[0], &[(0x80, 0x20)])?;
    group.send(INIT | ASSERT, 1)?;
    check_eq!(states()?, [RUNS, WAITS, RUNS, RUNS], "states at the end");
    check_eq!(group.others[0].regs()?.rax, 0, "RAX after INIT");
    let lapic = group.others[0].fd.get_lapic()?;
    check_eq!(probe::register(&lapic, 0x80), 0, "TPR after INIT");
    check_eq!(probe::register(&lapic, 0x20), 1 << 24, "the identifier");
    check_eq!(probe::register(&lapic, 0xf0), 0xff, "SVR after INIT");
    Ok(())
}

/// KVM_SIGNAL_MSI goes where the address and data say.
pub(crate) fn msi_destinations(device: &Device) -> Outcome {
    let machine = Machine::with_irqchip(device)?;
    let group = Group::new(&machine, 0xffff_ffff, Some([1, 2, 4, 8]))?;
    for (address, data, expected) in [
        (0xfee0_0000_u32, VECTOR, &[0][..]),
        (0xfee0_3000, VECTOR, &[3]),
        (0xfeef_f000, VECTOR, &[0, 1, 2, 3]),
        // Logical.
        (0xfee0_6004, VECTOR, &[1, 2]),
        (0xfee0_6004, ASSERT | LEVEL | VECTOR, &[1, 2]),
    ] {
        let msi = kb::kvm_msi {
            address_lo: address,
            data,
            ..Default::default()
        };
        machine.vm.signal_msi(msi).during("KVM_SIGNAL_MSI")?;
        check_eq!(
            group.takers(VECTOR as u8)?,
            expected,
            "MSI {address:#x}, {data:#x}"
        );
    }
    // The redirection hint, and lowest priority.
    for (address, data) in [(0xfee0_600c, VECTOR), (0xfee0_6004, LOWEST | VECTOR)] {
        let msi = kb::kvm_msi {
            address_lo: address,
            data,
            ..Default::default()
        };
        machine.vm.signal_msi(msi).during("KVM_SIGNAL_MSI")?;
        let takers = group.takers(VECTOR as u8)?;
        check!(
            takers == [1] || takers == [2],
            "{takers:?} took MSI {address:#x}, {data:#x}"
        );
    }
    Ok(())
}
