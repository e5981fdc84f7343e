// SPDX-License-Identifier: GPL-2.0
//! Guests at random: instructions that a hypervisor has to do with, in any order, and the state to run them in.

use crate::random::Random;
use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};

/// How much code there is.
pub(crate) const CODE_SIZE: usize = 0x1000;
/// Bytes from one instruction to the next.
const STEP: usize = 8;
/// Page tables for long mode: the first GiB, one to one, in pages of 2 MiB.
pub(crate) const TABLES: u64 = 0x8000;
/// A descriptor table: nothing, code of 64, 32 and 16 bits, data, a busy TSS.
pub(crate) const GDT: u64 = 0x7000;
const STACK: u64 = 0xf000;

/// A mode of the CPU. Each has places of its own: what is whole in one may jump in another.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mode {
    Real,
    Protected,
    Long,
}

impl Mode {
    /// Any.
    pub(crate) fn any(random: &mut Random) -> Self {
        random.of(&[Self::Real, Self::Protected, Self::Long])
    }

    /// Where the code lies in the guest's memory.
    pub(crate) const fn code(self) -> u64 {
        0x1000 * (self as u64 + 1)
    }

    /// Where exceptions end up.
    pub(crate) const fn handler(self) -> u64 {
        0x4000 + 0x1000 * self as u64
    }

    /// The table that says so.
    pub(crate) const fn idt(self) -> u64 {
        0xb000 + 0x1000 * self as u64
    }
}

/// Instructions that are whole, and the same in all modes but for their sizes. None jumps or switches interrupts off:
/// together with what is between them there is no way for a guest to stay inside. Bochs lets no interrupt out of one
/// that is entered with interrupts off, so a guest without a way to userspace would have its CPU for ever.
const INSTRUCTIONS: &[&[u8]] = &[
    // CPUID, RDMSR, WRMSR, RDTSC, RDPMC, RDTSCP, INVD, WBINVD, CLTS, XGETBV, XSETBV, SWAPGS
    b"\x0f\xa2",
    b"\x0f\x32",
    b"\x0f\x30",
    b"\x0f\x30",
    b"\x0f\x31",
    b"\x0f\x33",
    b"\x0f\x01\xf9",
    b"\x0f\x08",
    b"\x0f\x09",
    b"\x0f\x06",
    b"\x0f\x01\xd0",
    b"\x0f\x01\xd1",
    b"\x0f\x01\xf8",
    // VMCALL, VMLAUNCH, VMXOFF, VMREAD, INVEPT, MONITOR, MWAIT, HLT, PAUSE, STI, UD2
    b"\x0f\x01\xc1",
    b"\x0f\x01\xc2",
    b"\x0f\x01\xc4",
    b"\x0f\x78\xc1",
    b"\x66\x0f\x38\x80\x07",
    b"\x0f\x01\xc8",
    b"\x0f\x01\xc9",
    b"\xf4",
    b"\xf3\x90",
    b"\xfb",
    b"\x0f\x0b",
    // IN, OUT, INS and OUTS, also repeated
    b"\xe4\x21",
    b"\xe6\x20",
    b"\xe4\x71",
    b"\xec",
    b"\xed",
    b"\xee",
    b"\xef",
    b"\x6c",
    b"\xf3\x6d",
    b"\x6e",
    b"\xf3\x6f",
    // MOV from and to CR0, CR2, CR3, CR4, CR8, debug registers
    b"\x0f\x20\xc0",
    b"\x0f\x22\xc0",
    b"\x0f\x20\xda",
    b"\x0f\x22\xd9",
    b"\x0f\x22\xda",
    b"\x0f\x20\xe0",
    b"\x0f\x22\xe0",
    b"\x0f\x22\xe3",
    b"\xf0\x0f\x22\xc1",
    b"\x0f\x21\xf8",
    b"\x0f\x23\xf9",
    b"\x0f\x23\xc3",
    // SMSW, LMSW, SGDT, LGDT, LIDT, INVLPG, STR, SLDT, LTR, LLDT, MOV to ES, DS, FS and SS
    b"\x0f\x01\xe0",
    b"\x0f\x01\xf0",
    b"\x0f\x01\x07",
    b"\x0f\x01\x17",
    b"\x0f\x01\x1f",
    b"\x0f\x01\x3f",
    b"\x0f\x00\xc8",
    b"\x0f\x00\xc0",
    b"\x0f\x00\xd9",
    b"\x0f\x00\xd1",
    b"\x8e\xc0",
    b"\x8e\xda",
    b"\x8e\xe1",
    b"\x8e\xd3",
    // State: FXSAVE, FXRSTOR, XSAVE, XRSTOR, CLFLUSH, RDFSBASE, RDRAND, INVPCID, FNINIT
    b"\x0f\xae\x07",
    b"\x0f\xae\x0f",
    b"\x0f\xae\x27",
    b"\x0f\xae\x2f",
    b"\x0f\xae\x3f",
    b"\xf3\x0f\xae\xc0",
    b"\x0f\xc7\xf0",
    b"\x66\x0f\x38\x82\x0f",
    b"\xdb\xe3",
    // Memory: moves, arithmetic, bits, exchanges, strings, SSE and AVX, by RDI, RSI and RBX
    b"\x88\x07",
    b"\x89\x07",
    b"\x8a\x06",
    b"\x8b\x06",
    b"\x8b\x1f",
    b"\x01\x07",
    b"\x33\x0e",
    b"\x80\x0f\x55",
    b"\x83\x2f\x01",
    b"\xf6\x17",
    b"\xff\x07",
    b"\x0f\xab\x07",
    b"\x0f\xba\x37\x05",
    b"\xf0\x0f\xb1\x17",
    b"\xf0\x0f\xc1\x07",
    b"\x87\x07",
    b"\x0f\xc7\x0f",
    b"\x48\x0f\xc7\x0f",
    b"\xa4",
    b"\xf3\xa4",
    b"\xf3\xa5",
    b"\xf3\xaa",
    b"\xf3\xa7",
    b"\xac",
    b"\xab",
    b"\x8f\x07",
    b"\xff\x37",
    b"\x0f\xb6\x07",
    b"\x0f\xbe\x06",
    b"\x0f\x6f\x07",
    b"\x66\x0f\x7f\x07",
    b"\xf3\x0f\x6f\x06",
    b"\xc5\xf9\x7f\x07",
    b"\xc5\xfe\x6f\x06",
    b"\x0f\xc3\x07",
];

/// Prefixes: operand size, segments, REX, LOCK. Not the address size: Bochs 3.0 ends itself where a string instruction
/// with it is repeated in 64-bit mode.
const PREFIXES: &[u8] = b"\x66\x26\x64\x65\x48\x41\x44\xf0";

/// OUT to a port that nobody has: the instruction that goes to userspace.
const LEAVE: &[u8] = b"\xe6\x80";
/// What all memory has that nothing else is in: four of it.
pub(crate) const FILLER: u64 = u64::from_le_bytes(*b"\xe6\x80\xe6\x80\xe6\x80\xe6\x80");
const HLT: &[u8] = b"\xf4";
const NOP: u8 = 0x90;

/// What is worth having in a register: addresses of memory and of devices, MSRs, ports.
const VALUES: &[u32] = &[
    0x7000,
    0x1_0000,
    0x2_0000,
    0x1f_fffe,
    0x20_0000,
    0x00d0_0000,
    0xfee0_0000,
    0xfee0_0300,
    0xfec0_0000,
    0xfec0_0010,
    // MSRs: TSC, APIC base, SPEC_CTRL, PRED_CMD, TSC_ADJUST, MTRRs, machine checks, VMX, PAT, TSC deadline
    0x10,
    0x1b,
    0x48,
    0x49,
    0x3b,
    0xfe,
    0x200,
    0x2ff,
    0x17a,
    0x400,
    0x402,
    0x480,
    0x48b,
    0x277,
    0x6e0,
    // The x2APIC's: TPR, EOI, ICR, SELF IPI
    0x808,
    0x80b,
    0x830,
    0x83f,
    0xda0,
    0xc000_0080,
    0xc000_0081,
    0xc000_0084,
    0xc000_0100,
    0xc000_0102,
    0xc000_0103,
    0x174,
    0x176,
    // Ports: PICs, PIT, CMOS, PCI
    0x20,
    0x21,
    0xa1,
    0x40,
    0x43,
    0x61,
    0x70,
    0xcf8,
    0x4d0,
];

/// Code at random, which ends with a jump to its start: instructions at each multiple of [`STEP`] bytes.
pub(crate) fn code(random: &mut Random, mode: Mode) -> Vec<u8> {
    let mut code = Vec::with_capacity(CODE_SIZE);
    let halts = random.once_in(4);
    while code.len() < CODE_SIZE - STEP {
        let end = code.len() + STEP;
        match random.below(8) {
            // MOV of a value to RAX, RCX, RDX, RBX, RSI or RDI, of 32 bits in all modes.
            0..=2 => {
                code.extend(&b"\x66"[..usize::from(mode == Mode::Real)]);
                code.push(0xb8 + random.of(&[0, 1, 2, 3, 6, 7]));
                code.extend(random.of(VALUES).to_le_bytes());
            }
            3 => code.extend(LEAVE),
            _ => {
                if random.once_in(5) {
                    code.push(random.of(PREFIXES));
                }
                match random.of(INSTRUCTIONS) {
                    HLT if !halts => code.extend(LEAVE),
                    instruction => code.extend(instruction),
                }
            }
        }
        code.resize(end, NOP);
    }
    code.extend(jump(mode.code() + code.len() as u64, mode.code(), mode));
    code
}

/// JMP at one address to another.
fn jump(from: u64, to: u64, mode: Mode) -> Vec<u8> {
    let length = if mode == Mode::Real { 3 } else { 5 };
    let distance = (to as i32) - (from as i32) - length;
    let mut code = vec![0xe9];
    code.extend(distance.to_le_bytes());
    code.truncate(length as usize);
    code
}

/// What an exception comes to, at [`Mode::handler`]: interrupts come on, and it goes on a step behind where it did the last
/// time.
pub(crate) fn handler(mode: Mode) -> Vec<u8> {
    // Where it goes on stands behind it.
    let (handler, start) = (mode.handler(), mode.code());
    let place = handler + 0x80;
    let mut code = vec![0xfb];
    code.extend(LEAVE);
    let mut with_place = |opcode: &[u8], modrm: u8, immediate: &[u8]| {
        code.extend(opcode);
        // [displacement]: of 16 bits, of 32, and in 64-bit mode from the instruction's end on.
        code.push(modrm | if mode == Mode::Real { 6 } else { 5 });
        let end = handler + (code.len() + 4 + immediate.len()) as u64;
        match mode {
            Mode::Real => code.extend((place as u16).to_le_bytes()),
            Mode::Protected => code.extend((place as u32).to_le_bytes()),
            Mode::Long => code.extend(((place - end) as u32).to_le_bytes()),
        }
        code.extend(immediate);
    };
    // ADD, AND and OR of a byte, then the next: the place goes through the code and begins anew.
    let word: &[u8] = if mode == Mode::Real {
        b"\x81"
    } else {
        b"\x66\x81"
    };
    with_place(word, 0, &(STEP as u16).to_le_bytes());
    with_place(
        word,
        4 << 3,
        &(CODE_SIZE as u16 - STEP as u16).to_le_bytes(),
    );
    with_place(word, 1 << 3, &(start as u16).to_le_bytes());
    with_place(b"\xff", 4 << 3, &[]);
    code.resize((place - handler) as usize, NOP);
    code.extend(start.to_le_bytes());
    code
}

/// The interrupt table at [`Mode::idt`]: all vectors are trap gates to [`Mode::handler`].
pub(crate) fn idt(mode: Mode) -> Vec<u8> {
    let handler = mode.handler();
    let gate: &[u8] = match mode {
        Mode::Real => &(handler as u32).to_le_bytes(),
        Mode::Protected => &(handler | (0x10 << 16) | (0x8f00 << 32)).to_le_bytes(),
        Mode::Long => &u128::from(handler | (8 << 16) | (0x8f00 << 32)).to_le_bytes(),
    };
    gate.repeat(256)
}

/// The page tables from [`TABLES`] on.
pub(crate) fn tables() -> Vec<u8> {
    let mut tables = vec![0_u64; 3 * 512];
    tables[0] = (TABLES + 0x1000) | 7;
    tables[512] = (TABLES + 0x2000) | 7;
    for (page, entry) in (0_u64..).zip(&mut tables[1024..]) {
        *entry = (page << 21) | 0x87;
    }
    tables.into_iter().flat_map(u64::to_le_bytes).collect()
}

/// The descriptors at [`GDT`].
pub(crate) fn gdt() -> Vec<u8> {
    [
        0,
        0x00af_9b00_0000_ffff_u64,
        0x00cf_9b00_0000_ffff,
        0x0000_9b00_0000_ffff,
        0x00cf_9300_0000_ffff,
        0x0000_8b00_6000_0067,
        0x00cf_f300_0000_ffff,
        0x0000_8500_0008_0000,
    ]
    .into_iter()
    .flat_map(u64::to_le_bytes)
    .collect()
}

fn segment(selector: u16, kind: u8, l: u8, db: u8) -> kvm_segment {
    kvm_segment {
        limit: if l + db == 0 { 0xffff } else { u32::MAX },
        selector,
        type_: kind,
        present: 1,
        s: 1,
        l,
        db,
        g: u8::from(l + db != 0),
        ..Default::default()
    }
}

/// Puts the registers into a mode.
pub(crate) fn enter(sregs: &mut kvm_sregs, mode: Mode) {
    let (code, data) = match mode {
        Mode::Real => (segment(0, 0xb, 0, 0), segment(0, 3, 0, 0)),
        Mode::Protected => (segment(0x10, 0xb, 0, 1), segment(0x20, 3, 0, 1)),
        Mode::Long => (segment(8, 0xb, 1, 0), segment(0x20, 3, 0, 1)),
    };
    sregs.cs = code;
    (sregs.ds, sregs.es, sregs.fs) = (data, data, data);
    (sregs.gs, sregs.ss) = (data, data);
    (sregs.gdt.base, sregs.gdt.limit) = (GDT, 63);
    (sregs.idt.base, sregs.idt.limit) = (mode.idt(), 0xfff);
    sregs.cr0 = 0x10 | u64::from(mode != Mode::Real);
    (sregs.cr3, sregs.cr4, sregs.efer) = (TABLES, 0, 0);
    if mode == Mode::Long {
        (sregs.cr0, sregs.cr4, sregs.efer) = (0x8000_0011, 0x620, 0x500);
    }
}

/// General registers with such values; the instruction pointer is in the code.
pub(crate) fn registers(random: &mut Random, mode: Mode) -> kvm_regs {
    let mut value = || u64::from(random.of(VALUES));
    let mut regs = kvm_regs {
        rax: value(),
        rbx: value(),
        rcx: value(),
        rdx: value(),
        rsi: value(),
        rdi: value(),
        rbp: value(),
        r8: value(),
        rsp: STACK - 8,
        ..Default::default()
    };
    regs.rip = mode.code();
    regs.rflags = 0x202;
    if random.once_in(8) {
        regs.rflags |= random.word() & 0x3f_7fd5;
    }
    regs
}
