// SPDX-License-Identifier: GPL-2.0
//! The task priority (SDM volume 3, section 12.8.3.1), as CR8, as an MSR, in memory and in userspace's
//! structures. With a TPR shadow the guest changes it without an exit: most guests here make no exit
//! between what they do and what they look at.

use crate::probe::{self, register, Probe, APIC_BASE, ENABLE, X2APIC};
use crate::start;
use kvm_bindings as kb;
use rvisor_tests::guest::Mode;
use rvisor_tests::handlers::{count, Acknowledge};
use rvisor_tests::host::{bind_to_cpu, online_cpus};
use rvisor_tests::layout::{COUNTS, DATA, DONE_PORT, LAPIC};
use rvisor_tests::{check, check_eq, guest_code, Cpu, Device, Fail, Machine, Outcome};
use std::time::Duration;

/// The x2APIC's TPR.
const TPR: u32 = 0x808;
/// For each vector's class the TPR's class that let it through, as a byte.
const LET_THROUGH: u64 = DATA;
/// Guests end where they find this to be not 0.
const STOP: u64 = DATA + 0x100;
/// Where a guest says that its local APIC is on.
const READY: u64 = DATA + 0x108;

// Of each class from 2 up a vector sends itself to the CPU under the highest priority, which then falls by
// one at a time.
guest_code!(
    falling_cr8,
    code64,
    [
        "mov ebx, {lapic}",
        "mov dword ptr [rbx + 0xf0], 0x1ff",
        "sti",
        "mov esi, 2",
        "2: mov eax, 15",
        "mov cr8, rax",
        "mov eax, esi",
        "shl eax, 4",
        "lea edi, [rax + 1]",
        "or eax, 0x40001",
        "mov [rbx + 0x300], eax",
        "mov ecx, 15",
        "3: cmp qword ptr [{counts} + 8 * rdi], 0",
        "jne 4f",
        "dec ecx",
        "js 4f",
        "mov cr8, rcx",
        "mov r8, cr8",
        "cmp r8, rcx",
        "je 3b",
        "mov ecx, 0x80",
        "4: mov [{through} + rsi], cl",
        "inc esi",
        "cmp esi, 16",
        "jb 2b",
        "out {done}, al",
    ],
    lapic = LAPIC as i32,
    counts = COUNTS,
    through = LET_THROUGH,
    done = DONE_PORT
);

// The same by the x2APIC's registers. The TPR's lower half is all ones.
guest_code!(
    falling_x2apic,
    code64,
    [
        "xor edx, edx",
        "mov ecx, 0x80f",
        "mov eax, 0x1ff",
        "wrmsr",
        "sti",
        "mov esi, 2",
        "2: mov ecx, 0x808",
        "mov eax, 0xff",
        "wrmsr",
        "mov edi, esi",
        "shl edi, 4",
        "inc edi",
        "mov ecx, 0x83f",
        "mov eax, edi",
        "wrmsr",
        "mov ebx, 15",
        "3: cmp qword ptr [{counts} + 8 * rdi], 0",
        "jne 4f",
        "dec ebx",
        "js 4f",
        "mov ecx, 0x808",
        "mov eax, ebx",
        "shl eax, 4",
        "or eax, 15",
        "mov r8d, eax",
        "wrmsr",
        "mov edx, -1",
        "rdmsr",
        "cmp r8d, eax",
        "jne 5f",
        "mov rax, cr8",
        "cmp eax, ebx",
        "jne 5f",
        "test edx, edx",
        "jz 3b",
        "5: mov ebx, 0x80",
        "4: mov [{through} + rsi], bl",
        "inc esi",
        "cmp esi, 16",
        "jb 2b",
        "out {done}, al",
    ],
    counts = COUNTS,
    through = LET_THROUGH,
    done = DONE_PORT
);

fn check_let_through(machine: &Machine) -> Outcome {
    let seen = machine.memory.read(LET_THROUGH + 2, 14);
    let expected: Vec<u8> = (2..16).map(|class| class - 1).collect();
    check_eq!(
        seen,
        expected,
        "the TPR's class that let each class through"
    );
    for class in 2..16 {
        check_eq!(
            count(&machine.memory, (class << 4) | 1),
            1,
            "interrupts of class {class}"
        );
    }
    Ok(())
}

/// MOV to CR8 lets a pending vector through as soon as the priority is below its class.
pub(crate) fn cr8_lets_through(device: &Device) -> Outcome {
    let (machine, cpu) = start(device, Mode::Long, falling_cr8(), Acknowledge::LocalApic)?;
    cpu.run_until_done()?;
    check_let_through(&machine)
}

/// So does WRMSR of the x2APIC's TPR, which reads as written.
pub(crate) fn x2apic_lets_through(device: &Device) -> Outcome {
    let (machine, cpu) = start(device, Mode::Long, falling_x2apic(), Acknowledge::X2apic)?;
    probe::enter_x2apic(&cpu)?;
    cpu.run_until_done()?;
    check_let_through(&machine)
}

// 0x51 waits for the end of 0x71, and after that for the TPR.
guest_code!(
    behind_in_service,
    code64,
    [
        "mov ebx, {lapic}",
        "mov dword ptr [rbx + 0xf0], 0x1ff",
        "mov eax, 5",
        "mov cr8, rax",
        "sti",
        "mov dword ptr [rbx + 0x300], 0x40071",
        "mov dword ptr [rbx + 0x300], 0x40051",
        "nop",
        "mov r8, [{low}]",
        // Under 0x71 in service the TPR lets nothing through.
        "xor eax, eax",
        "mov cr8, rax",
        "nop",
        "mov r9, [{low}]",
        "mov eax, 5",
        "mov cr8, rax",
        "mov dword ptr [rbx + 0xb0], 0",
        "nop",
        "mov r10, [{low}]",
        "mov eax, 4",
        "mov cr8, rax",
        "nop",
        "mov r11, [{low}]",
        "mov r12, [{high}]",
        "out {done}, al",
    ],
    lapic = LAPIC as i32,
    low = COUNTS + 8 * 0x51,
    high = COUNTS + 8 * 0x71,
    done = DONE_PORT
);

/// What an EOI leaves to the task priority alone comes when that falls.
pub(crate) fn priority_behind_in_service(device: &Device) -> Outcome {
    let (_machine, cpu) = start(device, Mode::Long, behind_in_service(), Acknowledge::None)?;
    cpu.run_until_done()?;
    let regs = cpu.regs()?;
    check_eq!(regs.r12, 1, "vector 0x71");
    check_eq!(
        [regs.r8, regs.r9, regs.r10, regs.r11],
        [0, 0, 0, 1],
        "vector 0x51: under both, under 0x71, under the TPR, under neither"
    );
    Ok(())
}

// The priority goes up and down without end. Under the high one no interrupt comes: RSI counts those that do.
guest_code!(
    up_and_down,
    code64,
    [
        "mov ebx, {lapic}",
        "mov dword ptr [rbx + 0xf0], 0x1ff",
        "mov r12d, 9",
        "mov r13d, 3",
        "sti",
        "xor esi, esi",
        "mov qword ptr [{ready}], 1",
        "2: mov cr8, r12",
        "mov rax, [{count}]",
        "mov ecx, 50",
        "3: dec ecx",
        "jnz 3b",
        "mov rdx, [{count}]",
        "sub rdx, rax",
        "add rsi, rdx",
        "mov cr8, r13",
        "nop",
        "mov rdx, cr8",
        "cmp rdx, r13",
        "jne 4f",
        "cmp qword ptr [{stop}], 0",
        "je 2b",
        "4: out {done}, al",
    ],
    lapic = LAPIC as i32,
    count = COUNTS + 8 * 0x61,
    ready = READY,
    stop = STOP,
    done = DONE_PORT
);

/// Waits for a word of the guest's memory to be at least `least`.
fn wait_for_word(machine: &Machine, place: u64, least: u64, what: &str) -> Outcome {
    let end = std::time::Instant::now() + Duration::from_secs(2);
    while machine.memory.read_u64(place) < least {
        check!(std::time::Instant::now() < end, "{what}");
        std::thread::sleep(Duration::from_micros(200));
    }
    Ok(())
}

/// Sends 0x61 to the guest again and again once its local APIC is on; each must have come before the next goes.
fn send_and_wait(
    machine: &Machine,
    rounds: u64,
    mut between: impl FnMut(u64) -> Outcome,
) -> Outcome {
    wait_for_word(machine, READY, 1, "the guest does not begin")?;
    for round in 1..=rounds {
        machine.vm.signal_msi(kb::kvm_msi {
            address_lo: LAPIC as u32,
            data: 0x61,
            ..Default::default()
        })?;
        between(round)?;
        let lost = format!("interrupt {round} of {rounds} is lost");
        wait_for_word(machine, COUNTS + 8 * 0x61, round, &lost)?;
    }
    Ok(())
}

fn beside_up_and_down(
    device: &Device,
    change: impl FnOnce(&Machine) -> Outcome,
) -> Result<(), Fail> {
    let (machine, cpu) = start(device, Mode::Long, up_and_down(), Acknowledge::LocalApic)?;
    std::thread::scope(|scope| {
        let running = scope.spawn(|| cpu.run_until_done());
        let changed = change(&machine);
        machine.memory.write_u64(STOP, 1);
        let ended = running
            .join()
            .map_err(|_| Fail::new("the vCPU's thread panicked"))?;
        changed.and(ended)
    })?;
    let regs = cpu.regs()?;
    check_eq!(regs.rdx, 3, "CR8 as last read");
    check_eq!(regs.rsi, 0, "interrupts under the higher priority");
    Ok(())
}

/// A vector that another thread sends under a priority that holds it back comes when that falls.
pub(crate) fn priority_falls_by_itself(device: &Device) -> Outcome {
    beside_up_and_down(device, |machine| send_and_wait(machine, 300, |_| Ok(())))
}

/// The same while the vCPU's thread moves from one CPU of the host to another.
pub(crate) fn priority_moves(device: &Device) -> Outcome {
    if online_cpus()? < 2 {
        return Err(Fail::skip("the host has one CPU"));
    }
    let (machine, cpu) = start(device, Mode::Long, up_and_down(), Acknowledge::LocalApic)?;
    let (sender, receiver) = std::sync::mpsc::channel();
    std::thread::scope(|scope| {
        let running = scope.spawn(|| {
            // SAFETY: Asks for the thread's own number.
            sender.send(unsafe { libc::gettid() }).ok();
            cpu.run_until_done()
        });
        let thread = receiver
            .recv()
            .map_err(|_| Fail::new("the vCPU's thread ended"))?;
        let changed = send_and_wait(&machine, 100, |round| {
            bind_to_cpu(thread, (round & 1) as usize)
        });
        machine.memory.write_u64(STOP, 1);
        let ended = running
            .join()
            .map_err(|_| Fail::new("the vCPU's thread panicked"))?;
        changed.and(ended)
    })?;
    check_eq!(cpu.regs()?.rsi, 0, "interrupts under the higher priority");
    Ok(())
}

// Writes RDI to CR8 and reads it into RSI.
guest_code!(
    exchange_cr8,
    code64,
    [
        "2: mov rsi, cr8",
        "mov cr8, rdi",
        "out {done}, al",
        "jmp 2b",
    ],
    done = DONE_PORT
);

/// Lets the guest read CR8 and then set it; what it read.
fn exchange(cpu: &Cpu, value: u64) -> Result<u64, Fail> {
    let mut regs = cpu.regs()?;
    regs.rdi = value;
    cpu.set_regs(&regs)?;
    cpu.run_until_done()?;
    Ok(cpu.regs()?.rsi)
}

/// CR8, KVM_SET_SREGS, KVM_SET_LAPIC, KVM_SET_MSRS and what `kvm_run` tells are one, in both modes.
pub(crate) fn priority_for_userspace(device: &Device) -> Outcome {
    let (_machine, cpu) = start(device, Mode::Long, exchange_cr8(), Acknowledge::None)?;
    check_eq!(exchange(&cpu, 7)?, 0, "CR8 at first");
    for x2apic in [false, true] {
        if x2apic {
            probe::enter_x2apic(&cpu)?;
        }
        check_eq!(cpu.cr8(), 7, "cr8 in kvm_run");
        check_eq!(cpu.sregs()?.cr8, 7, "KVM_GET_SREGS");
        let state = cpu.fd.get_lapic()?;
        check_eq!(register(&state, 0x80), 0x70, "KVM_GET_LAPIC");
        let mut sregs = cpu.sregs()?;
        sregs.cr8 = 4;
        cpu.set_sregs(&sregs)?;
        check_eq!(exchange(&cpu, 9)?, 4, "CR8 after KVM_SET_SREGS");
        check_eq!(cpu.cr8(), 9, "cr8 in kvm_run");
        probe::set_registers(&cpu, &[(0x80, 0x3a)])?;
        check_eq!(cpu.sregs()?.cr8, 3, "KVM_GET_SREGS after KVM_SET_LAPIC");
        check_eq!(exchange(&cpu, 3)?, 3, "CR8 after KVM_SET_LAPIC");
        let state = cpu.fd.get_lapic()?;
        check_eq!(register(&state, 0x80), 0x30, "KVM_GET_LAPIC after CR8");
        if x2apic {
            check_eq!(cpu.msr(TPR)?, 0x30, "KVM_GET_MSRS");
            cpu.set_msr(TPR, 0xb5)?;
            check_eq!(exchange(&cpu, 7)?, 0xb, "CR8 after KVM_SET_MSRS");
        }
        check_eq!(exchange(&cpu, 7).map(|_| ())?, (), "CR8");
    }
    Ok(())
}

/// The TPR's MSR is there in x2APIC mode alone, and keeps its value over the other modes.
pub(crate) fn x2apic_comes_and_goes(device: &Device) -> Outcome {
    let machine = Machine::with_irqchip(device)?;
    let probe = Probe::new(&machine, 0)?;
    probe.set_lapic(0x80, 0x25)?;
    check_eq!(probe.rdmsr(TPR)?, None, "RDMSR in xAPIC mode");
    for round in 0..2 {
        check!(
            probe.wrmsr(APIC_BASE, LAPIC | 0x100 | ENABLE | X2APIC)?,
            "x2APIC mode"
        );
        check_eq!(probe.rdmsr(TPR)?, Some(0x25), "RDMSR, round {round}");
        check!(!probe.wrmsr(TPR, 0x1_0000_0000)?, "WRMSR past bit 31");
        check!(probe.wrmsr(TPR, 0x47)?, "WRMSR, round {round}");
        // Off, and on again as an xAPIC: by the guest and by userspace.
        if round == 0 {
            check!(probe.wrmsr(APIC_BASE, LAPIC | 0x100)?, "switching off");
            check_eq!(probe.rdmsr(TPR)?, None, "RDMSR while off");
            check!(!probe.wrmsr(TPR, 0)?, "WRMSR while off");
            check_eq!(probe.cpu.sregs()?.cr8, 4, "CR8 while off");
            check!(
                probe.wrmsr(APIC_BASE, LAPIC | 0x100 | ENABLE)?,
                "switching on"
            );
        } else {
            let mut sregs = probe.cpu.sregs()?;
            sregs.apic_base = LAPIC | 0x100 | ENABLE;
            probe.cpu.set_sregs(&sregs)?;
        }
        // CR8, which KVM_SET_SREGS sets too, is its upper half.
        let kept = if round == 0 { 0x47 } else { 0x40 };
        check_eq!(probe.rdmsr(TPR)?, None, "RDMSR back in xAPIC mode");
        check!(!probe.wrmsr(TPR, 0)?, "WRMSR back in xAPIC mode");
        check_eq!(probe.lapic(0x80)?, kept, "the TPR back in xAPIC mode");
        probe.set_lapic(0x80, 0x25)?;
    }
    Ok(())
}
