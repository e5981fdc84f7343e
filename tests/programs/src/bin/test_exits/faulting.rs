// SPDX-License-Identifier: GPL-2.0
//! CPUID faulting.

use crate::start;
use rvisor_tests::handlers::Record;
use rvisor_tests::layout::{CODE, DONE_PORT, PAGE_TABLES, STACK, TSS, UNEXPECTED_PORT};
use rvisor_tests::{check_eq, guest_code, Device, Exit, Fail, Outcome};

guest_code!(ask, code64, ["cpuid", "out {done}, al"], done = DONE_PORT);

const PLATFORM_INFO: u32 = 0xce;
const MISC_FEATURES_ENABLES: u32 = 0x140;
const USER: u64 = 1 << 2;

/// With bit 0 of MISC_FEATURES_ENABLES, CPUID raises #GP(0) outside CPL 0 and there alone.
pub(crate) fn cpuid_faulting(device: &Device) -> Outcome {
    for (enabled, privilege) in [(0, 3), (1, 0), (1, 3)] {
        let (machine, cpu) = start(device, ask())?;
        if !cpu.try_set_msr(PLATFORM_INFO, 1 << 31)? {
            return Err(Fail::skip("MSR_PLATFORM_INFO can't be set"));
        }
        cpu.set_msr(MISC_FEATURES_ENABLES, enabled)?;
        // The pages are the user's too; exceptions come on the TSS's stack.
        for entry in [PAGE_TABLES, PAGE_TABLES + 0x1000, PAGE_TABLES + 0x2000] {
            let value = machine.memory.read_u64(entry);
            machine.memory.write_u64(entry, value | USER);
        }
        machine
            .memory
            .write(TSS + 4, &(STACK - 0x800).to_le_bytes());
        let mut sregs = cpu.sregs()?;
        for segment in [&mut sregs.cs, &mut sregs.ss] {
            segment.dpl = privilege;
            segment.selector |= u16::from(privilege);
        }
        cpu.set_sregs(&sregs)?;
        let mut regs = cpu.regs()?;
        // IOPL 3, for the OUT.
        regs.rflags |= 3 << 12;
        cpu.set_regs(&regs)?;
        let exit = cpu.run()?;
        let faults = enabled == 1 && privilege == 3;
        let port = if faults { UNEXPECTED_PORT } else { DONE_PORT };
        if !matches!(exit, Exit::Out { port: p, .. } if p == port) {
            let what = format!("enabled {enabled}, CPL {privilege}");
            return Err(cpu.unexpected(&exit).during(&what));
        }
        let record = Record::read(&machine.memory);
        let expected = if faults { (13, CODE) } else { (0, 0) };
        check_eq!(
            (record.vector, record.rip),
            expected,
            "enabled {enabled}, CPL {privilege}: vector, RIP"
        );
    }
    Ok(())
}
