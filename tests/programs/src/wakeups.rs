// SPDX-License-Identifier: GPL-2.0
//! Guests that halt and are woken again and again: a wake-up that is lost is their end.

use crate::guest::{self, Mode};
use crate::handlers::{self, count, Acknowledge};
use crate::ktap::{Context, Fail};
use crate::layout::{AP_STACK, CODE, COUNTS, DONE_PORT, LAPIC, RECORD};
use crate::{guest_code, Cpu, Device, Machine};
use kvm_bindings as kb;
use std::time::Duration;

const VECTOR: u8 = 0x51;
/// What the two processors wait at, in the first 64 KiB.
const FLAG: u64 = RECORD + 0x800;

// Halts RSI times for one interrupt each; the count of interrupts is at RBP.
guest_code!(
    halts,
    code64,
    [
        "mov ebx, {lapic}",
        "mov dword ptr [rbx + 0xf0], 0x1ff",
        "xor r12d, r12d",
        "out {done}, al",
        "2: inc r12",
        "3: cli",
        "cmp [rbp], r12",
        "jae 4f",
        "sti",
        "hlt",
        "jmp 3b",
        "4: cmp r12, rsi",
        "jb 2b",
        "out {done}, al",
    ],
    lapic = LAPIC as i32,
    done = DONE_PORT
);

fn vector_count() -> u64 {
    COUNTS + 8 * u64::from(VECTOR)
}

/// Another thread wakes the guest by MSIs, each as soon as the guest has taken the one before, which is
/// about when it halts.
///
/// # Errors
///
/// The ioctl that failed and its errno, or the count of interrupts where it is not `rounds`.
pub fn by_messages(device: &Device, rounds: u64) -> Result<(), Fail> {
    let machine = Machine::with_irqchip(device)?;
    let cpu = machine.vcpu(0)?;
    guest::load(&machine, &cpu, Mode::Long, halts())?;
    handlers::set_acknowledge(&machine.memory, Acknowledge::LocalApic);
    let mut regs = cpu.regs()?;
    (regs.rsi, regs.rbp) = (rounds, vector_count());
    cpu.set_regs(&regs)?;
    cpu.run_until_done()?;
    let message = kb::kvm_msi {
        address_lo: LAPIC as u32,
        data: VECTOR.into(),
        ..Default::default()
    };
    std::thread::scope(|scope| {
        let sender = scope.spawn(|| {
            for sent in 0..rounds {
                machine.vm.signal_msi(message).during("KVM_SIGNAL_MSI")?;
                while count(&machine.memory, VECTOR) == sent {
                    std::thread::yield_now();
                }
            }
            Ok::<(), Fail>(())
        });
        cpu.run_until_done()?;
        sender
            .join()
            .map_err(|_| Fail::new("the sender panicked"))?
    })?;
    match count(&machine.memory, VECTOR) {
        found if found == rounds => Ok(()),
        found => Err(Fail::new(format!("{found} interrupts of {rounds}"))),
    }
}

// Sets the TSC deadline between 0 and 8191 cycles ahead, each distance in turn, and halts for it.
guest_code!(
    deadlines,
    code64,
    [
        "mov ebx, {lapic}",
        "mov dword ptr [rbx + 0xf0], 0x1ff",
        "mov dword ptr [rbx + 0x320], 0x40051",
        "mfence",
        "xor r12d, r12d",
        "2: mov edi, r12d",
        "and edi, 0x1fff",
        "inc r12",
        "cli",
        "rdtsc",
        "shl rdx, 32",
        "or rax, rdx",
        "add rax, rdi",
        "mov rdx, rax",
        "shr rdx, 32",
        "mov ecx, 0x6e0",
        "wrmsr",
        "3: cli",
        "cmp [rbp], r12",
        "jae 4f",
        "sti",
        "hlt",
        "jmp 3b",
        "4: cmp r12, rsi",
        "jb 2b",
        "out {done}, al",
    ],
    lapic = LAPIC as i32,
    done = DONE_PORT
);

/// The guest's own timer wakes it. Its distances sweep over the whole way into HLT, so that the timer
/// fires at each place of it.
///
/// # Errors
///
/// The ioctl that failed and its errno, or a skip where the deadline mode is not offered.
pub fn by_deadlines(device: &Device, rounds: u64) -> Result<(), Fail> {
    let machine = Machine::with_irqchip(device)?;
    if machine.extension(kb::KVM_CAP_TSC_DEADLINE_TIMER) == 0 {
        return Err(Fail::skip("TSC_DEADLINE_TIMER is not offered"));
    }
    let cpu = machine.vcpu(0)?;
    let mut cpuid = cpu.fd.get_cpuid2(kb::KVM_MAX_CPUID_ENTRIES)?;
    for entry in cpuid.as_mut_slice() {
        if entry.function == 1 {
            entry.ecx |= 1 << 24;
        }
    }
    cpu.fd.set_cpuid2(&cpuid)?;
    guest::load(&machine, &cpu, Mode::Long, deadlines())?;
    handlers::set_acknowledge(&machine.memory, Acknowledge::LocalApic);
    let mut regs = cpu.regs()?;
    (regs.rsi, regs.rbp) = (rounds, vector_count());
    cpu.set_regs(&regs)?;
    cpu.run_until_done()?;
    match count(&machine.memory, VECTOR) {
        found if found == rounds => Ok(()),
        found => Err(Fail::new(format!("{found} interrupts of {rounds}"))),
    }
}

// In x2APIC mode: each sends vector R8 to the other RSI times, by the ICR's value in R9, and halts for
// the answer, which it counts at RBP; who starts has EDI = 1.
guest_code!(
    ping_pong,
    code64,
    [
        "mov ecx, 0x80f",
        "mov eax, 0x1ff",
        "xor edx, edx",
        "wrmsr",
        // Nothing is sent before both local APICs are on.
        "lock inc qword ptr [{flag}]",
        "6: sti",
        "pause",
        "cmp qword ptr [{flag}], 2",
        "jb 6b",
        "mov r12d, 1",
        "mov ecx, 0x830",
        "2: test edi, edi",
        "jz 3f",
        "mov rax, r9",
        "mov rdx, r9",
        "shr rdx, 32",
        "wrmsr",
        "3: cli",
        "cmp [rbp], r12",
        "jae 4f",
        "sti",
        "hlt",
        "jmp 3b",
        "4: test edi, edi",
        "jnz 5f",
        "mov rax, r9",
        "mov rdx, r9",
        "shr rdx, 32",
        "wrmsr",
        "5: inc r12",
        "cmp r12, rsi",
        "jbe 2b",
        "out {done}, al",
    ],
    flag = FLAG,
    done = DONE_PORT
);

/// Two processors in x2APIC mode wake each other by IPIs, `rounds` times each.
///
/// # Errors
///
/// The ioctl that failed and its errno, or the count of interrupts where it is not `rounds`.
pub fn by_ipis(device: &Device, rounds: u64) -> Result<(), Fail> {
    let machine = Machine::with_irqchip(device)?;
    let first = machine.vcpu(0)?;
    let second = machine.vcpu(1)?;
    guest::load(&machine, &first, Mode::Long, ping_pong())?;
    guest::enter(&second, Mode::Long, CODE, AP_STACK)?;
    handlers::set_acknowledge(&machine.memory, Acknowledge::X2apic);
    for (cpu, starts, target, sends, receives) in
        [(&first, 1, 1, 0x42, 0x43), (&second, 0, 0, 0x43, 0x42)]
    {
        let mut sregs = cpu.sregs()?;
        sregs.apic_base |= 0xc00;
        cpu.set_sregs(&sregs)?;
        let mut regs = cpu.regs()?;
        (regs.rdi, regs.rsi) = (starts, rounds);
        regs.r9 = (target << 32) | sends;
        regs.rbp = COUNTS + 8 * receives;
        cpu.set_regs(&regs)?;
    }
    second.fd.set_mp_state(kb::kvm_mp_state {
        mp_state: kb::KVM_MP_STATE_RUNNABLE,
    })?;
    run_both(&first, second)?;
    for vector in [0x42, 0x43] {
        let found = count(&machine.memory, vector);
        if found != rounds {
            return Err(Fail::new(format!(
                "{found} interrupts of {rounds} with vector {vector:#x}"
            )));
        }
    }
    Ok(())
}

/// Runs both until each is done. Where the first fails, nobody waits for the other.
fn run_both(first: &Cpu, second: Cpu) -> Result<(), Fail> {
    let thread = std::thread::spawn(move || second.run_until_done());
    first.run_until_done().during("the first processor")?;
    thread
        .join()
        .map_err(|_| Fail::new("the second processor's thread panicked"))?
        .during("the second processor")
}

/// The CPU time that this thread has used.
///
/// # Errors
///
/// What clock_gettime(2) gives.
pub fn thread_time() -> Result<Duration, Fail> {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: `time` is a valid place for the result.
    if unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) } != 0 {
        return Err(std::io::Error::last_os_error().into());
    }
    Ok(Duration::new(
        u64::try_from(time.tv_sec).unwrap_or(0),
        u32::try_from(time.tv_nsec).unwrap_or(0),
    ))
}
