// SPDX-License-Identifier: GPL-2.0

//! Exceptions of the code that is tried: as signals, after which the code goes on where its state is kept.

use std::sync::atomic::{AtomicU64, Ordering};

/// An exception's vector and error code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Fault {
    pub(crate) vector: u8,
    pub(crate) code: u32,
}

/// Where the mapping with the code begins.
static MAPPING: AtomicU64 = AtomicU64::new(0);
/// Where in it execution goes on.
static RECOVERY: AtomicU64 = AtomicU64::new(0);
/// The vector, plus 1, and the error code of what happened.
static VECTOR: AtomicU64 = AtomicU64::new(0);
static CODE: AtomicU64 = AtomicU64::new(0);

/// 64-bit code and data, as CS, GS, FS and SS stand in a signal's frame.
const LONG_SELECTORS: i64 = 0x002b_0000_0000_0033;

/// Has this thread's exceptions in the first page at `mapping` go on at `recovery` bytes into it.
pub(super) fn catch(mapping: u64, recovery: u64) {
    MAPPING.store(mapping, Ordering::SeqCst);
    RECOVERY.store(mapping + recovery, Ordering::SeqCst);
    // The stack pointer may be anything when a signal comes. It is used for as long as the process lives.
    let stack = Vec::leak(vec![0_u8; 64 << 10]);
    let stack = libc::stack_t {
        ss_sp: stack.as_mut_ptr().cast(),
        ss_flags: 0,
        ss_size: stack.len(),
    };
    // SAFETY: the stack is memory that nothing else uses.
    let result = unsafe { libc::sigaltstack(&stack, std::ptr::null_mut()) };
    assert_eq!(result, 0);
    for signal in [libc::SIGSEGV, libc::SIGBUS, libc::SIGILL] {
        // SAFETY: all zero is a valid `sigaction`, and the handler has SA_SIGINFO's prototype.
        let result = unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            let handler: extern "C" fn(_, _, _) = handle;
            action.sa_sigaction = handler as usize;
            action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
            libc::sigaction(signal, &action, std::ptr::null_mut())
        };
        assert_eq!(result, 0);
    }
}

/// The exception since the last call.
pub(super) fn take() -> Option<Fault> {
    let vector = VECTOR.swap(0, Ordering::SeqCst).checked_sub(1)?;
    Some(Fault {
        vector: u8::try_from(vector).unwrap(),
        code: u32::try_from(CODE.load(Ordering::SeqCst)).unwrap(),
    })
}

extern "C" fn handle(signal: libc::c_int, _: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: RFLAGS.AC, which the kernel leaves as it was, is cleared: what follows need not be aligned.
    unsafe { std::arch::asm!("pushfq", "and dword ptr [rsp], 0xfffbffff", "popfq") };
    // SAFETY: the kernel gives a context that is this handler's until it returns.
    let registers = unsafe { &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs };
    let get = |index: libc::c_int, registers: &[i64; 23]| registers[index as usize];
    let rip = get(libc::REG_RIP, registers) as u64;
    let is_long = get(libc::REG_CSGSFS, registers) & 0xffff == LONG_SELECTORS & 0xffff;
    let mapping = MAPPING.load(Ordering::SeqCst);
    if is_long && !(mapping..mapping + 0x1000).contains(&rip) {
        // A fault of the test's own: it happens again, and ends the process.
        // SAFETY: sets the default action.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
        return;
    }
    CODE.store(get(libc::REG_ERR, registers) as u64, Ordering::SeqCst);
    let vector = get(libc::REG_TRAPNO, registers) as u64;
    VECTOR.store(vector + 1, Ordering::SeqCst);
    registers[libc::REG_RIP as usize] = RECOVERY.load(Ordering::SeqCst) as i64;
    let others = get(libc::REG_CSGSFS, registers) & 0x0000_ffff_ffff_0000;
    registers[libc::REG_CSGSFS as usize] = others | LONG_SELECTORS;
}
