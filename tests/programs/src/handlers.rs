// SPDX-License-Identifier: GPL-2.0
//! The guests' interrupt handlers, for each mode, and what they write down.
//!
//! An exception (vectors 0 to 31 but for the NMI) is recorded; the guest goes on where
//! [`Record::resume`] says, or ends with a write of the vector to
//! `UNEXPECTED_PORT`. An interrupt is counted,
//! acknowledged as [`Acknowledge`] says, and the guest goes on.

use crate::guest::Mode;
use crate::guest_code;
use crate::layout::{COMMON, COUNTS, RECORD, STUBS, UNEXPECTED_PORT};
use crate::mapping::Mapping;

/// Offset in the record: how many exceptions came.
const COUNT: u64 = 0;
const VECTOR: u64 = 8;
const ERROR: u64 = 16;
const RIP: u64 = 24;
const CR2: u64 = 32;
/// Offset in the record: where to go on after an exception; guests write it.
pub const RESUME: u64 = 40;
const END: u64 = 48;
const FLAGS: u64 = 56;
const STACK: u64 = 64;
const INTERRUPTED: u64 = 72;

/// How an interrupt's handler tells the controller that it is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Acknowledge {
    /// Not at all.
    None = 0,
    /// The local APIC's register, by MMIO. Not in real mode.
    LocalApic = 1,
    /// The first PIC.
    Pic = 2,
    /// Both PICs.
    Pics = 3,
    /// The local APIC's register, by MSR.
    X2apic = 4,
}

/// What the handlers wrote down.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record {
    /// Exceptions so far.
    pub count: u64,
    /// The last one's vector.
    pub vector: u64,
    /// Its error code, 0 where it has none.
    pub error: u64,
    /// Where it happened.
    pub rip: u64,
    /// CR2 then.
    pub cr2: u64,
    /// RFLAGS as pushed.
    pub rflags: u64,
    /// RSP as pushed; in 64-bit mode only.
    pub rsp: u64,
    /// Where the last interrupt came.
    pub interrupted: u64,
}

impl Record {
    /// Reads it from the guest's memory.
    pub fn read(memory: &Mapping) -> Self {
        let at = |offset| memory.read_u64(RECORD + offset);
        Self {
            count: at(COUNT),
            vector: at(VECTOR),
            error: at(ERROR),
            rip: at(RIP),
            cr2: at(CR2),
            rflags: at(FLAGS),
            rsp: at(STACK),
            interrupted: at(INTERRUPTED),
        }
    }
}

/// Sets where the guest goes on after an exception; 0: it ends there.
pub fn set_resume(memory: &Mapping, rip: u64) {
    memory.write_u64(RECORD + RESUME, rip);
}

/// Sets how interrupts are acknowledged.
pub fn set_acknowledge(memory: &Mapping, how: Acknowledge) {
    memory.write_u64(RECORD + END, how as u64);
}

/// How often the interrupt with this vector came.
pub fn count(memory: &Mapping, vector: u8) -> u64 {
    memory.read_u64(COUNTS + 8 * u64::from(vector))
}

/// The exceptions that push an error code (SDM volume 3, section 7.3 ff., table 7-1).
const WITH_ERROR_CODE: [u8; 8] = [8, 10, 11, 12, 13, 14, 17, 21];

/// Writes the stubs and what they jump to, and clears record and counts.
pub fn install(memory: &Mapping, mode: Mode) {
    for vector in 0..=255_u8 {
        let mut stub = Vec::new();
        // In real mode no exception pushes an error code.
        if mode == Mode::Real || !WITH_ERROR_CODE.contains(&vector) {
            stub.extend([0x6a, 0]);
        }
        let place = STUBS + 16 * u64::from(vector);
        // push imm, jmp rel: in 16-bit code both operands have 2 bytes.
        let width = if mode == Mode::Real { 2 } else { 4 };
        stub.push(0x68);
        stub.extend(&u32::from(vector).to_le_bytes()[..width]);
        stub.push(0xe9);
        let from = place + stub.len() as u64 + width as u64;
        stub.extend(&((COMMON - from) as u32).to_le_bytes()[..width]);
        memory.write(place, &stub);
    }
    memory.write(COMMON, common(mode));
    for offset in (0..0x800).step_by(8) {
        memory.write_u64(COUNTS + offset, 0);
    }
    for offset in (0..0x80).step_by(8) {
        memory.write_u64(RECORD + offset, 0);
    }
}

/// The code that the stubs of this mode jump to.
pub fn common(mode: Mode) -> &'static [u8] {
    match mode {
        Mode::Real => common16(),
        Mode::Protected | Mode::Paged => common32(),
        Mode::Long => common64(),
    }
}

guest_code!(
    common64,
    code64,
    [
        "push rax",
        "push rbx",
        "mov rbx, {record}",
        "mov rax, [rsp + 16]",
        "cmp rax, 32",
        "jae 3f",
        "cmp rax, 2",
        "je 3f",
        "inc qword ptr [rbx + {count}]",
        "mov [rbx + {vector}], rax",
        "mov rax, [rsp + 24]",
        "mov [rbx + {error}], rax",
        "mov rax, [rsp + 32]",
        "mov [rbx + {rip}], rax",
        "mov rax, [rsp + 48]",
        "mov [rbx + {flags}], rax",
        "mov rax, [rsp + 56]",
        "mov [rbx + {stack}], rax",
        "mov rax, cr2",
        "mov [rbx + {cr2}], rax",
        "mov rax, [rbx + {resume}]",
        "test rax, rax",
        "jz 2f",
        "mov [rsp + 32], rax",
        "jmp 9f",
        "2: mov al, [rbx + {vector}]",
        "out {unexpected}, al",
        "jmp 2b",
        "3: lock inc qword ptr [{counts} + 8 * rax]",
        "cmp rax, 32",
        "mov rax, [rsp + 32]",
        "mov [rbx + {interrupted}], rax",
        "jb 9f",
        "mov al, [rbx + {end}]",
        "cmp al, 1",
        "je 4f",
        "cmp al, 2",
        "je 5f",
        "cmp al, 3",
        "je 6f",
        "cmp al, 4",
        "je 7f",
        "jmp 9f",
        "4: mov eax, 0xfee000b0",
        "mov dword ptr [rax], 0",
        "jmp 9f",
        "6: mov al, 0x20",
        "out 0xa0, al",
        "5: mov al, 0x20",
        "out 0x20, al",
        "jmp 9f",
        "7: push rcx",
        "push rdx",
        "mov ecx, 0x80b",
        "xor eax, eax",
        "xor edx, edx",
        "wrmsr",
        "pop rdx",
        "pop rcx",
        "9: pop rbx",
        "pop rax",
        "add rsp, 16",
        "iretq",
    ],
    record = RECORD,
    count = COUNT,
    vector = VECTOR,
    error = ERROR,
    rip = RIP,
    flags = FLAGS,
    stack = STACK,
    cr2 = CR2,
    resume = RESUME,
    counts = COUNTS,
    interrupted = INTERRUPTED,
    end = END,
    unexpected = UNEXPECTED_PORT
);

guest_code!(
    common32,
    code32,
    [
        "push eax",
        "push ebx",
        "mov ebx, {record}",
        "mov eax, [esp + 8]",
        "cmp eax, 32",
        "jae 3f",
        "cmp eax, 2",
        "je 3f",
        "inc dword ptr [ebx + {count}]",
        "mov [ebx + {vector}], eax",
        "mov eax, [esp + 12]",
        "mov [ebx + {error}], eax",
        "mov eax, [esp + 16]",
        "mov [ebx + {rip}], eax",
        "mov eax, [esp + 24]",
        "mov [ebx + {flags}], eax",
        "mov eax, cr2",
        "mov [ebx + {cr2}], eax",
        "mov eax, [ebx + {resume}]",
        "test eax, eax",
        "jz 2f",
        "mov [esp + 16], eax",
        "jmp 9f",
        "2: mov al, [ebx + {vector}]",
        "out {unexpected}, al",
        "jmp 2b",
        "3: lock inc dword ptr [{counts} + 8 * eax]",
        "cmp eax, 32",
        "mov eax, [esp + 16]",
        "mov [ebx + {interrupted}], eax",
        "jb 9f",
        "mov al, [ebx + {end}]",
        "cmp al, 1",
        "je 4f",
        "cmp al, 2",
        "je 5f",
        "cmp al, 3",
        "je 6f",
        "jmp 9f",
        "4: mov eax, 0xfee000b0",
        "mov dword ptr [eax], 0",
        "jmp 9f",
        "6: mov al, 0x20",
        "out 0xa0, al",
        "5: mov al, 0x20",
        "out 0x20, al",
        "9: pop ebx",
        "pop eax",
        "add esp, 8",
        "iretd",
    ],
    record = RECORD,
    count = COUNT,
    vector = VECTOR,
    error = ERROR,
    rip = RIP,
    flags = FLAGS,
    cr2 = CR2,
    resume = RESUME,
    counts = COUNTS,
    interrupted = INTERRUPTED,
    end = END,
    unexpected = UNEXPECTED_PORT
);

// Real mode: the frame is BP, BX, AX, DS, vector, 0, IP, CS, FLAGS from BP up.
guest_code!(
    common16,
    code16,
    [
        "push ds",
        "push ax",
        "push bx",
        "push bp",
        "mov bp, sp",
        "xor ax, ax",
        "mov ds, ax",
        "mov bx, [bp + 8]",
        "cmp bx, 32",
        "jae 3f",
        "cmp bx, 2",
        "je 3f",
        "inc word ptr ds:[{record} + {count}]",
        "mov ds:[{record} + {vector}], bx",
        "mov ax, [bp + 12]",
        "mov ds:[{record} + {rip}], ax",
        "mov ax, [bp + 16]",
        "mov ds:[{record} + {flags}], ax",
        "mov ax, ds:[{record} + {resume}]",
        "test ax, ax",
        "jz 2f",
        "mov [bp + 12], ax",
        "jmp 9f",
        "2: mov al, bl",
        "out {unexpected}, al",
        "jmp 2b",
        "3: mov ax, [bp + 12]",
        "mov ds:[{record} + {interrupted}], ax",
        "cmp bx, 32",
        "pushf",
        "shl bx, 3",
        "inc word ptr [bx + {counts}]",
        "popf",
        "jb 9f",
        "mov al, ds:[{record} + {end}]",
        "cmp al, 2",
        "je 5f",
        "cmp al, 3",
        "je 6f",
        "jmp 9f",
        "6: mov al, 0x20",
        "out 0xa0, al",
        "5: mov al, 0x20",
        "out 0x20, al",
        "9: pop bp",
        "pop bx",
        "pop ax",
        "pop ds",
        "add sp, 4",
        "iret",
    ],
    record = RECORD,
    count = COUNT,
    vector = VECTOR,
    rip = RIP,
    flags = FLAGS,
    resume = RESUME,
    counts = COUNTS,
    interrupted = INTERRUPTED,
    end = END,
    unexpected = UNEXPECTED_PORT
);
