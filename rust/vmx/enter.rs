// SPDX-License-Identifier: GPL-2.0

//! The world switch: general registers out, VM entry, VM exit, general registers back.
//!
//! There are two, of which a host uses one for ever: [`enter`] where speculation needs no care, and
//! [`enter_guarded`]. The exit lands in the one that was entered, so no branch that a guest could have
//! trained chooses between them.

use core::arch::{asm, global_asm};
use rvisor_core::x86::{speculation::switch, vmcs::FieldNatural};

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

impl Outcome {
    #[inline]
    const fn new(failed: u64) -> Self {
        if failed == 0 {
            Self::Exit
        } else {
            Self::Failed
        }
    }
}

/// IA32_SPEC_CTRL of guest and host.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(super) struct SpecCtrl {
    /// The guest's; taken up after an exit where the guest changes it by itself.
    pub(super) guest: u64,
    /// What the current thread has in the host.
    pub(super) host: u64,
}

/// The selector of a writable segment that VERW finds: the kernel's data segment.
static VERW_SELECTOR: u16 = 0x18;

/// Tells the VMCS where the exit shall land, at label 5, if the stack moved or this is the first time.
/// RSI points at the cached HOST_RSP. Changes RAX and RCX.
macro_rules! set_landing {
    () => {
        concat!(
            "cmp rsp, [rsi]\n",
            "je 2f\n",
            "mov [rsi], rsp\n",
            "mov ecx, {host_rsp_field}\n",
            "vmwrite rcx, rsp\n",
            "lea rax, [rip + 5f]\n",
            "mov ecx, {host_rip_field}\n",
            "vmwrite rcx, rax\n",
            "2:\n",
        )
    };
}

/// Loads the guest's registers from where RDI points. The flags stay.
macro_rules! load_guest {
    () => {
        concat!(
            "mov rax, [rdi]\n",
            "mov rcx, [rdi + 8]\n",
            "mov rdx, [rdi + 16]\n",
            "mov rbx, [rdi + 24]\n",
            "mov rbp, [rdi + 40]\n",
            "mov rsi, [rdi + 48]\n",
            "mov r8, [rdi + 64]\n",
            "mov r9, [rdi + 72]\n",
            "mov r10, [rdi + 80]\n",
            "mov r11, [rdi + 88]\n",
            "mov r12, [rdi + 96]\n",
            "mov r13, [rdi + 104]\n",
            "mov r14, [rdi + 112]\n",
            "mov r15, [rdi + 120]\n",
            "mov rdi, [rdi + 56]\n",
        )
    };
}

/// Stores the guest's registers; the stack has the pointer `$place` bytes up.
macro_rules! store_guest {
    ($place:literal) => {
        concat!(
            "push rdi\n",
            "mov rdi, [rsp + 8 + ",
            $place,
            "]\n",
            "mov [rdi], rax\n",
            "mov [rdi + 8], rcx\n",
            "mov [rdi + 16], rdx\n",
            "mov [rdi + 24], rbx\n",
            "mov [rdi + 40], rbp\n",
            "mov [rdi + 48], rsi\n",
            "pop qword ptr [rdi + 56]\n",
            "mov [rdi + 64], r8\n",
            "mov [rdi + 72], r9\n",
            "mov [rdi + 80], r10\n",
            "mov [rdi + 88], r11\n",
            "mov [rdi + 96], r12\n",
            "mov [rdi + 104], r13\n",
            "mov [rdi + 112], r14\n",
            "mov [rdi + 120], r15\n",
        )
    };
}

/// No value of the guest's stays for the host to speculate with. RAX and the registers that the stack
/// gives back (RBX, RBP, RDI) are left.
macro_rules! clear_guest {
    () => {
        concat!(
            "xor ecx, ecx\n",
            "xor edx, edx\n",
            "xor esi, esi\n",
            "xor r8d, r8d\n",
            "xor r9d, r9d\n",
            "xor r10d, r10d\n",
            "xor r11d, r11d\n",
            "xor r12d, r12d\n",
            "xor r13d, r13d\n",
            "xor r14d, r14d\n",
            "xor r15d, r15d\n",
        )
    };
}

/// Enters the guest and comes back at its next exit. `host_rsp` caches the VMCS's HOST_RSP.
///
/// # Safety
///
/// Interrupts are off. The current VMCS is set up whole, and `launched` says whether it has been
/// launched since it was cleared. It is entered by this function alone.
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
            set_landing!(),
            "test dl, dl",
            load_guest!(),
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
            // Where the host has indirect-branch tracking, an exit lands as an indirect branch does.
            "endbr64",
            store_guest!("0"),
            "xor eax, eax",
            "6:",
            clear_guest!(),
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
    Outcome::new(failed)
}

/// The same with what the host's CPU needs against speculation: `flags` are bits of [`switch`].
///
/// Between the exit and the LFENCE behind the write of IA32_SPEC_CTRL there is no RET and no indirect
/// branch but such whose target was pushed just before, and none that the guest could have trained
/// leads anywhere else: a branch that is guessed wrong ends at the LFENCE. In the same way nothing of
/// that kind stands between the write of the guest's value and the entry, which serialises.
///
/// # Safety
///
/// As [`enter`], and `spec_ctrl.host` is what IA32_SPEC_CTRL holds, where the flags say that there is one.
#[inline(never)]
pub(super) unsafe fn enter_guarded(
    registers: *mut Registers,
    host_rsp: *mut u64,
    spec_ctrl: *mut SpecCtrl,
    flags: u32,
) -> Outcome {
    let failed: u64;
    // SAFETY: As in `enter`. Below the registers' pointer the stack holds `spec_ctrl` and, on top, the flags.
    unsafe {
        asm!(
            "push rbp",
            "push rbx",
            "push rdi",
            "push r8",
            "push rdx",
            set_landing!(),
            // The guest's IA32_SPEC_CTRL, where it differs.
            "test edx, {SPEC_CTRL}",
            "jz 20f",
            "mov rdx, [r8]",
            "cmp rdx, [r8 + 8]",
            "je 20f",
            "mov eax, edx",
            "shr rdx, 32",
            "mov ecx, {spec_ctrl}",
            "wrmsr",
            "20:",
            load_guest!(),
            // Nothing of the host's stays in the CPU's buffers; what is loaded from here on is the flags.
            "test dword ptr [rsp], {VERW}",
            "jz 21f",
            "verw word ptr [rip + {verw_selector}]",
            "21:",
            "test dword ptr [rsp], {LAUNCHED}",
            "jz 3f",
            "vmresume",
            "jmp 4f",
            "3:",
            "vmlaunch",
            "4:",
            "mov ebx, 1",
            "jmp 6f",
            "5:",
            "endbr64",
            store_guest!("16"),
            "xor ebx, ebx",
            "6:",
            "xor eax, eax",
            "xor ebp, ebp",
            "xor edi, edi",
            clear_guest!(),
            // The return-stack buffer: 32 entries whose targets hold no gadget.
            "test dword ptr [rsp], {FILL_RSB}",
            "jz 63f",
            "mov ecx, 16",
            "60:",
            "call 61f",
            "int3",
            "61:",
            "call 62f",
            "int3",
            "62:",
            "add rsp, 16",
            "dec ecx",
            "jnz 60b",
            "lfence",
            "63:",
            // Or one CALL that retires before the first RET (post-barrier RSB predictions).
            "test dword ptr [rsp], {ONE_CALL}",
            "jz 65f",
            "call 64f",
            "int3",
            "64:",
            "add rsp, 8",
            "lfence",
            "65:",
            // The host's IA32_SPEC_CTRL. IBRS has its effect only when it is written after the exit.
            "test dword ptr [rsp], {SPEC_CTRL}",
            "jz 68f",
            "mov rdi, [rsp + 8]",
            "mov ecx, {spec_ctrl}",
            "test dword ptr [rsp], {SAVE_SPEC_CTRL}",
            "jz 66f",
            "rdmsr",
            "mov [rdi], eax",
            "mov [rdi + 4], edx",
            "66:",
            "mov rdx, [rdi + 8]",
            "test dword ptr [rsp], {IBRS}",
            "jnz 67f",
            "cmp rdx, [rdi]",
            "je 68f",
            "67:",
            "mov eax, edx",
            "shr rdx, 32",
            "wrmsr",
            "68:",
            "lfence",
            // The branch history: 5 calls deep, with 5 taken branches in each, which is more than CPUs
            // before Alder Lake remember. Each RET stands in the upper half of a cache line, where
            // indirect target selection does not reach it.
            "test dword ptr [rsp], {CLEAR_BHB}",
            "jz 79f",
            "mov ecx, 5",
            "call 70f",
            "jmp 78f",
            ".balign 64, 0xcc",
            ".skip 27, 0xcc",
            "70:",
            "call 72f",
            "71:",
            "ret",
            ".balign 64, 0xcc",
            ".skip 14, 0xcc",
            "72:",
            "mov eax, 5",
            "73:",
            "jmp 74f",
            "nop",
            "74:",
            "sub eax, 1",
            "jnz 73b",
            "sub ecx, 1",
            "jnz 70b",
            "75:",
            "ret",
            "int3",
            // To objtool: these two are meant (ANNOTATE_UNRET_SAFE).
            ".pushsection .discard.annotate_insn, \"M\", @progbits, 8",
            ".long 71b - .",
            ".long 2",
            ".long 75b - .",
            ".long 2",
            ".popsection",
            // Whichever way was guessed ends here.
            "78:",
            "79:",
            "lfence",
            "mov eax, ebx",
            "xor edx, edx",
            "add rsp, 16",
            "pop rdi",
            "pop rbx",
            "pop rbp",
            host_rsp_field = const FieldNatural::HOST_RSP.encoding() as u32,
            host_rip_field = const FieldNatural::HOST_RIP.encoding() as u32,
            spec_ctrl = const crate::bindings::MSR_IA32_SPEC_CTRL,
            verw_selector = sym VERW_SELECTOR,
            LAUNCHED = const switch::LAUNCHED,
            SPEC_CTRL = const switch::SPEC_CTRL,
            SAVE_SPEC_CTRL = const switch::SAVE_SPEC_CTRL,
            IBRS = const switch::IBRS,
            FILL_RSB = const switch::FILL_RSB,
            ONE_CALL = const switch::ONE_CALL,
            CLEAR_BHB = const switch::CLEAR_BHB,
            VERW = const switch::VERW,
            inout("rdi") registers => _,
            inout("rsi") host_rsp => _,
            inout("rdx") u64::from(flags) => _,
            inout("r8") spec_ctrl => _,
            out("rax") failed,
            out("rcx") _,
            out("r9") _,
            out("r10") _,
            out("r11") _,
            out("r12") _,
            out("r13") _,
            out("r14") _,
            out("r15") _,
        );
    }
    Outcome::new(failed)
}

// The guest's RBP passes through the functions, which objtool takes for a broken frame.
global_asm!(
    ".pushsection .discard.func_stack_frame_non_standard, \"aw\"",
    ".quad {plain}",
    ".quad {guarded}",
    ".popsection",
    plain = sym enter,
    guarded = sym enter_guarded,
);
