// SPDX-License-Identifier: GPL-2.0

//! The world switch: general registers out, VM entry, VM exit, general registers back.

use core::arch::{asm, global_asm};
use rvisor_core::x86::vmcs::FieldNatural;

/// The guest's general registers, indexed as instructions number them: RAX, RCX, RDX, RBX, RSP, RBP,
/// RSI, RDI, R8 to R15. RSP (index 4) is not switched here; the VMCS holds it.
pub(crate) type Registers = [u64; 16];

/// What the VM-entry instruction did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// The guest ran, or entry failed with an exit reason: the exit fields are valid.
    Exit,
    /// VMLAUNCH or VMRESUME itself failed.
    Failed,
}

/// Enters the guest and comes back at its next exit. `host_rsp` caches the VMCS's HOST_RSP.
///
/// # Safety
///
/// Interrupts are off. The current VMCS is set up whole, and `launched` says whether it has been
/// launched since it was cleared.
#[inline(never)]
pub(super) unsafe fn enter(
    registers: *mut Registers,
    host_rsp: *mut u64,
    launched: bool,
) -> Outcome {
    let failed: u64;
    // SAFETY: HOST_RSP and HOST_RIP make the exit land at label 5 with this stack. All registers that
    // the guest may have changed are outputs, or saved on the stack where the compiler keeps them for
    // itself; flags are the ABI's after an exit (DF clear).
    unsafe {
        asm!(
            "push rbp",
            "push rbx",
            "push rdi",
            "cmp rsp, [rsi]",
            "je 2f",
            // The stack moved, or this is the first time: tell the VMCS where the exit shall land.
            "mov [rsi], rsp",
            "mov ecx, {host_rsp_field}",
            "vmwrite rcx, rsp",
            "lea rax, [rip + 5f]",
            "mov ecx, {host_rip_field}",
            "vmwrite rcx, rax",
            "2:",
            "test dl, dl",
            "mov rax, [rdi]",
            "mov rcx, [rdi + 8]",
            "mov rdx, [rdi + 16]",
            "mov rbx, [rdi + 24]",
            "mov rbp, [rdi + 40]",
            "mov rsi, [rdi + 48]",
            "mov r8, [rdi + 64]",
            "mov r9, [rdi + 72]",
            "mov r10, [rdi + 80]",
            "mov r11, [rdi + 88]",
            "mov r12, [rdi + 96]",
            "mov r13, [rdi + 104]",
            "mov r14, [rdi + 112]",
            "mov r15, [rdi + 120]",
            "mov rdi, [rdi + 56]",
            "jz 3f",
            "vmresume",
            "jmp 4f",
            "3:",
            "vmlaunch",
            // Only a failed instruction comes here; the registers are as they were.
            "4:",
            "mov eax, 1",
            "jmp 6f",
            "5:",
            "push rdi",
            "mov rdi, [rsp + 8]",
            "mov [rdi], rax",
            "mov [rdi + 8], rcx",
            "mov [rdi + 16], rdx",
            "mov [rdi + 24], rbx",
            "mov [rdi + 40], rbp",
            "mov [rdi + 48], rsi",
            "pop qword ptr [rdi + 56]",
            "mov [rdi + 64], r8",
            "mov [rdi + 72], r9",
            "mov [rdi + 80], r10",
            "mov [rdi + 88], r11",
            "mov [rdi + 96], r12",
            "mov [rdi + 104], r13",
            "mov [rdi + 112], r14",
            "mov [rdi + 120], r15",
            "xor eax, eax",
            "6:",
            // No value of the guest's stays for the host to speculate with.
            "xor ecx, ecx",
            "xor edx, edx",
            "xor esi, esi",
            "xor r8d, r8d",
            "xor r9d, r9d",
            "xor r10d, r10d",
            "xor r11d, r11d",
            "xor r12d, r12d",
            "xor r13d, r13d",
            "xor r14d, r14d",
            "xor r15d, r15d",
            "pop rdi",
            "pop rbx",
            "pop rbp",
            host_rsp_field = const FieldNatural::HOST_RSP.encoding() as u32,
            host_rip_field = const FieldNatural::HOST_RIP.encoding() as u32,
            inout("rdi") registers => _,
            inout("rsi") host_rsp => _,
            inout("rdx") u64::from(launched) => _,
            out("rax") failed,
            out("rcx") _,
            out("r8") _,
            out("r9") _,
            out("r10") _,
            out("r11") _,
            out("r12") _,
            out("r13") _,
            out("r14") _,
            out("r15") _,
        );
    }
    if failed == 0 {
        Outcome::Exit
    } else {
        Outcome::Failed
    }
}

// The guest's RBP passes through the function, which objtool takes for a broken frame.
global_asm!(
    ".pushsection .discard.func_stack_frame_non_standard, \"aw\"",
    ".quad {function}",
    ".popsection",
    function = sym enter,
);
