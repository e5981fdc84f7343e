// SPDX-License-Identifier: GPL-2.0
//! The local APIC (SDM volume 3, chapter 12) and the IOAPIC, in long mode.

use crate::start;
use kvm_bindings as kb;
use rvisor_tests::guest::Mode;
use rvisor_tests::handlers::{count, Acknowledge, Record};
use rvisor_tests::layout::{COUNTS, DONE_PORT, IOAPIC, LAPIC, STACK};
use rvisor_tests::{check, check_eq, guest_code, Device, Fail, Outcome};

/// Long-mode code with RBX at the local APIC, which it turns on first.
macro_rules! apic_guest {
    ($name:ident, [$($line:literal),+ $(,)?] $(, $key:ident = $value:expr)*) => {
        guest_code!($name, code64, [
            "mov ebx, {lapic}",
            "mov dword ptr [rbx + 0xf0], 0x1ff",
            $($line,)+
        ], lapic = LAPIC as i32 $(, $key = $value)*);
    };
}

const fn count_of(vector: u64) -> u64 {
    COUNTS + 8 * vector
}

apic_guest!(
    ioapic_edge_guest,
    [
        "mov esi, {ioapic}",
        // Line 10: vector 0x50, physical, to APIC 0, edge; its mask goes last.
        "mov dword ptr [rsi], 0x25",
        "mov dword ptr [rsi + 0x10], 0",
        "mov dword ptr [rsi], 0x24",
        "mov dword ptr [rsi + 0x10], 0x50",
        "out {done}, al",
        "2: sti",
        "hlt",
        "cli",
        "cmp qword ptr [{count}], 0",
        "je 2b",
        "out {done}, al",
        "jmp 2b",
    ],
    ioapic = IOAPIC as i32,
    count = count_of(0x50),
    done = DONE_PORT
);

pub(crate) fn ioapic_edge(device: &Device) -> Outcome {
    let (machine, cpu) = start(
        device,
        Mode::Long,
        ioapic_edge_guest(),
        Acknowledge::LocalApic,
    )?;
    cpu.run_until_done()?;
    // A masked line first; it must give nothing.
    for line in [11, 10] {
        machine.vm.set_irq_line(line, true)?;
        machine.vm.set_irq_line(line, false)?;
    }
    cpu.run_until_done()?;
    check_eq!(count(&machine.memory, 0x50), 1, "interrupts");
    machine.vm.set_irq_line(10, true)?;
    cpu.run_until_done()?;
    check_eq!(
        count(&machine.memory, 0x50),
        2,
        "interrupts after another edge"
    );
    Ok(())
}

apic_guest!(
    ioapic_level_guest,
    [
        "mov esi, {ioapic}",
        "mov dword ptr [rsi], 0x25",
        "mov dword ptr [rsi + 0x10], 0",
        "mov dword ptr [rsi], 0x24",
        "mov dword ptr [rsi + 0x10], 0x8050",
        "out {done}, al",
        "2: sti",
        "nop",
        "pause",
        "cli",
        "cmp qword ptr [{count}], 3",
        "jb 2b",
        "out {done}, al",
        "mov ecx, 1000",
        "sti",
        "3: pause",
        "dec ecx",
        "jnz 3b",
        "cli",
        "mov rdi, [{count}]",
        "mov dword ptr [rsi], 0x24",
        "mov eax, [rsi + 0x10]",
        "out {done}, al",
    ],
    ioapic = IOAPIC as i32,
    count = count_of(0x50),
    done = DONE_PORT
);

/// A level-triggered line interrupts again after each EOI for as long as it is high. The guest may come
/// no further meanwhile, so another thread lowers the line.
pub(crate) fn ioapic_level(device: &Device) -> Outcome {
    let (machine, cpu) = start(
        device,
        Mode::Long,
        ioapic_level_guest(),
        Acknowledge::LocalApic,
    )?;
    cpu.run_until_done()?;
    machine.vm.set_irq_line(10, true)?;
    let lowered = std::thread::scope(|scope| {
        let device = scope.spawn(|| {
            while count(&machine.memory, 0x50) < 3 {
                std::thread::sleep(std::time::Duration::from_millis(1));
            }
            machine.vm.set_irq_line(10, false)
        });
        cpu.run_until_done()?;
        device
            .join()
            .map_err(|_| Fail::new("the thread"))?
            .map_err(Fail::from)
    });
    lowered?;
    let high = count(&machine.memory, 0x50);
    cpu.run_until_done()?;
    let regs = cpu.regs()?;
    check!(
        regs.rdi >= high && regs.rdi <= high + 1,
        "{high} interrupts while high, {} at the end",
        regs.rdi
    );
    check_eq!(regs.rax & 0x4000, 0, "remote IRR at the end");
    Ok(())
}

// The timer: divided by 1; what LVT and count are comes in EDI and ESI; until the count is EBP.
apic_guest!(
    timer_guest,
    [
        "mov dword ptr [rbx + 0x3e0], 0xb",
        "mov [rbx + 0x320], edi",
        "mov [rbx + 0x380], esi",
        "2: sti",
        "hlt",
        "cli",
        "cmp [{count}], rbp",
        "jb 2b",
        "mov r8d, [rbx + 0x390]",
        "out {done}, al",
        "sti",
        "mov ecx, 2000",
        "3: pause",
        "dec ecx",
        "jnz 3b",
        "out {done}, al",
    ],
    count = count_of(0x40),
    done = DONE_PORT
);

fn timer(
    device: &Device,
    lvt: u64,
    ticks: u64,
    wanted: u64,
) -> Result<(u64, u64, u64), rvisor_tests::Fail> {
    let (machine, cpu) = start(device, Mode::Long, timer_guest(), Acknowledge::LocalApic)?;
    let mut regs = cpu.regs()?;
    (regs.rdi, regs.rsi, regs.rbp) = (lvt, ticks, wanted);
    cpu.set_regs(&regs)?;
    cpu.run_until_done()?;
    let first = count(&machine.memory, 0x40);
    let left = cpu.regs()?.r8;
    cpu.run_until_done()?;
    Ok((first, left, count(&machine.memory, 0x40)))
}

pub(crate) fn timer_one_shot(device: &Device) -> Outcome {
    let (first, left, later) = timer(device, 0x40, 100_000, 1)?;
    check_eq!((first, later), (1, 1), "interrupts, then and later");
    check_eq!(left, 0, "the current count");
    Ok(())
}

pub(crate) fn timer_periodic(device: &Device) -> Outcome {
    const PERIOD: u64 = 2_000_000;
    let (first, left, later) = timer(device, 0x2_0040, PERIOD, 3)?;
    check!(
        first >= 3 && later >= first,
        "{first} interrupts, then {later}"
    );
    check!(left > 0 && left <= PERIOD, "the current count is {left}");
    Ok(())
}

apic_guest!(
    deadline_guest,
    [
        "mov dword ptr [rbx + 0x320], 0x40040",
        "mfence",
        "rdtsc",
        "shl rdx, 32",
        "lea rsi, [rax + rdx + 300000]",
        "mov ecx, 0x6e0",
        "mov rax, rsi",
        "mov rdx, rsi",
        "shr rdx, 32",
        "wrmsr",
        "2: sti",
        "hlt",
        "cli",
        "cmp qword ptr [{count}], 0",
        "je 2b",
        "rdtsc",
        "shl rdx, 32",
        "lea rdi, [rax + rdx]",
        "rdmsr",
        "out {done}, al",
    ],
    count = count_of(0x40),
    done = DONE_PORT
);

pub(crate) fn timer_tsc_deadline(device: &Device) -> Outcome {
    let (machine, cpu) = start(device, Mode::Long, deadline_guest(), Acknowledge::LocalApic)?;
    if machine.extension(kb::KVM_CAP_TSC_DEADLINE_TIMER) == 0 {
        return Err(rvisor_tests::Fail::skip(
            "TSC_DEADLINE_TIMER is not offered",
        ));
    }
    let mut cpuid = cpu.fd.get_cpuid2(kb::KVM_MAX_CPUID_ENTRIES)?;
    for entry in cpuid.as_mut_slice() {
        if entry.function == 1 {
            entry.ecx |= 1 << 24;
        }
    }
    cpu.fd.set_cpuid2(&cpuid)?;
    cpu.run_until_done()?;
    let regs = cpu.regs()?;
    check_eq!(count(&machine.memory, 0x40), 1, "interrupts");
    check!(
        regs.rdi >= regs.rsi,
        "the interrupt came at {}, before the deadline {}",
        regs.rdi,
        regs.rsi
    );
    check_eq!(
        (regs.rax, regs.rdx),
        (0, 0),
        "the deadline, once it was met"
    );
    Ok(())
}

apic_guest!(
    self_ipi_guest,
    [
        "mov dword ptr [rbx + 0x300], 0x40041",
        "nop",
        "mov rsi, [{count}]",
        "mov edi, [rbx + 0x220]",
        "sti",
        "nop",
        "nop",
        "cli",
        "mov rbp, [{count}]",
        "out {done}, al",
    ],
    count = count_of(0x41),
    done = DONE_PORT
);

pub(crate) fn self_ipi(device: &Device) -> Outcome {
    let (_machine, cpu) = start(device, Mode::Long, self_ipi_guest(), Acknowledge::LocalApic)?;
    cpu.run_until_done()?;
    let regs = cpu.regs()?;
    check_eq!(regs.rsi, 0, "interrupts while IF is clear");
    check_eq!(regs.rdi, 2, "IRR for vectors 0x40 to 0x5f");
    check_eq!(regs.rbp, 1, "interrupts after STI");
    Ok(())
}

apic_guest!(
    priority_guest,
    [
        "mov eax, 5",
        "mov cr8, rax",
        "sti",
        "mov dword ptr [rbx + 0x300], 0x40041",
        "nop",
        "nop",
        "mov rsi, [{low}]",
        "mov dword ptr [rbx + 0x300], 0x40071",
        "nop",
        "nop",
        "mov rdi, [{high}]",
        "mov r8d, [rbx + 0x80]",
        "mov eax, 3",
        "mov cr8, rax",
        "nop",
        "nop",
        "mov rbp, [{low}]",
        "mov dword ptr [rbx + 0x80], 0x70",
        "mov r9, cr8",
        "cli",
        "out {done}, al",
    ],
    low = count_of(0x41),
    high = count_of(0x71),
    done = DONE_PORT
);

/// CR8 holds back vectors of its class and below; it and the TPR register are one.
pub(crate) fn task_priority(device: &Device) -> Outcome {
    let (_machine, cpu) = start(device, Mode::Long, priority_guest(), Acknowledge::LocalApic)?;
    cpu.run_until_done()?;
    let regs = cpu.regs()?;
    check_eq!(regs.rsi, 0, "vector 0x41 under CR8 = 5");
    check_eq!(regs.rdi, 1, "vector 0x71 under CR8 = 5");
    check_eq!(regs.r8, 0x50, "TPR");
    check_eq!(regs.rbp, 1, "vector 0x41 under CR8 = 3");
    check_eq!(regs.r9, 7, "CR8 after TPR = 0x70");
    Ok(())
}

/// HLT blocks until another thread raises a line.
pub(crate) fn hlt_wakes(device: &Device) -> Outcome {
    let (machine, cpu) = start(
        device,
        Mode::Long,
        ioapic_edge_guest(),
        Acknowledge::LocalApic,
    )?;
    cpu.run_until_done()?;
    let begin = std::time::Instant::now();
    let sent = std::thread::scope(|scope| {
        let sender = scope.spawn(|| {
            std::thread::sleep(std::time::Duration::from_millis(20));
            machine.vm.set_irq_line(10, true)
        });
        cpu.run_until_done()?;
        Ok::<_, rvisor_tests::Fail>(sender.join())
    })?;
    check!(matches!(sent, Ok(Ok(()))), "KVM_IRQ_LINE: {sent:?}");
    check!(
        begin.elapsed().as_millis() >= 20,
        "the guest woke after {} ms",
        begin.elapsed().as_millis()
    );
    check_eq!(count(&machine.memory, 0x50), 1, "interrupts");
    Ok(())
}

apic_guest!(
    halt_masked,
    [
        "mov esi, {ioapic}",
        "mov dword ptr [rsi], 0x25",
        "mov dword ptr [rsi + 0x10], 0",
        "mov dword ptr [rsi], 0x24",
        // Delivery mode NMI.
        "mov dword ptr [rsi + 0x10], 0x400",
        "out {done}, al",
        "cli",
        "hlt",
        "out {done}, al",
    ],
    ioapic = IOAPIC as i32,
    done = DONE_PORT
);

/// An NMI, here from the IOAPIC, ends HLT with interrupts off too.
pub(crate) fn nmi_wakes_hlt(device: &Device) -> Outcome {
    let (machine, cpu) = start(device, Mode::Long, halt_masked(), Acknowledge::None)?;
    cpu.run_until_done()?;
    std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(std::time::Duration::from_millis(20));
            machine.vm.set_irq_line(10, true)
        });
        cpu.run_until_done()
    })?;
    check_eq!(count(&machine.memory, 2), 1, "NMIs");
    check_eq!(cpu.regs()?.rsp, STACK, "RSP");
    Ok(())
}

apic_guest!(
    shadow_guest,
    [
        "mov dword ptr [rbx + 0x300], 0x40041",
        "xor esi, esi",
        "sti",
        "inc esi",
        "nop",
        "cli",
        "out {done}, al",
    ],
    done = DONE_PORT
);

/// The instruction behind STI runs before an interrupt that is waiting (SDM volume 2, STI).
pub(crate) fn sti_shadow(device: &Device) -> Outcome {
    let (machine, cpu) = start(device, Mode::Long, shadow_guest(), Acknowledge::LocalApic)?;
    cpu.run_until_done()?;
    check_eq!(count(&machine.memory, 0x41), 1, "interrupts");
    let at = Record::read(&machine.memory).interrupted;
    // INC ESI has two bytes, "ff c6", and the interrupt comes behind it.
    check_eq!(
        machine.memory.read(at - 2, 2),
        [0xff, 0xc6],
        "the instruction before RIP {at:#x}"
    );
    Ok(())
}
