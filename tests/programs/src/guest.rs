// SPDX-License-Identifier: GPL-2.0
//! Tiny guests: their code, and a vCPU put into real, protected or long mode to run it.

use crate::fixture::Machine;
use crate::handlers;
use crate::ktap::Fail;
use crate::layout::{
    CODE, CODE_SELECTOR, COMMON, DATA_SELECTOR, GDT, IDT, PAGE_TABLES, STACK, STUBS, TSS,
    TSS_SELECTOR,
};
use crate::vcpu::Cpu;
use kvm_bindings::{kvm_regs, kvm_segment};

/// Makes a function that returns the bytes of position-independent guest code, in Intel syntax.
///
/// The first word is the mode: `code16`, `code32` or `code64`. `name = constant` pairs stand for
/// `{name}` in the code. Numeric labels work, but not ones of the digits 0 and 1 alone.
#[macro_export]
macro_rules! guest_code {
    ($(#[$doc:meta])* $vis:vis $name:ident, $mode:ident, [$($line:expr),+ $(,)?] $(, $key:ident = $value:expr)* $(,)?) => {
        $(#[$doc])*
        $vis fn $name() -> &'static [u8] {
            let (start, end): (*const u8, *const u8);
            // SAFETY: The code goes into a read-only section of its own and is not run here; only its
            // two addresses are taken.
            unsafe {
                core::arch::asm!(
                    ".pushsection .rodata.guest, \"a\", @progbits",
                    "77772:",
                    concat!(".", stringify!($mode)),
                    $($line,)+
                    ".code64",
                    "77773:",
                    ".popsection",
                    "lea {start_of_code}, [rip + 77772b]",
                    "lea {end_of_code}, [rip + 77773b]",
                    start_of_code = out(reg) start,
                    end_of_code = out(reg) end,
                    $($key = const $value,)*
                    options(nostack, nomem, pure),
                );
                std::slice::from_raw_parts(start, end as usize - start as usize)
            }
        }
    };
}

/// The instructions that set up both 8259s, for [`guest_code`]: vectors 0x20 and 0x28, the second one behind line 2 of
/// the first, with this ICW4 (1: 8086 mode; 3: with automatic end of interrupt) and these masks. They use AL.
#[macro_export]
macro_rules! set_up_8259s {
    ($icw4:literal, $master:literal, $slave:literal) => {
        concat!(
            "mov al, 0x11\n out 0x20, al\n out 0xa0, al\n",
            "mov al, 0x20\n out 0x21, al\n",
            "mov al, 0x28\n out 0xa1, al\n",
            "mov al, 4\n out 0x21, al\n",
            "mov al, 2\n out 0xa1, al\n",
            "mov al, ",
            $icw4,
            "\n out 0x21, al\n out 0xa1, al\n",
            "mov al, ",
            $master,
            "\n out 0x21, al\n",
            "mov al, ",
            $slave,
            "\n out 0xa1, al\n",
        )
    };
}

/// The modes that a guest can start in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// 16 bits, no protection; segments at 0.
    Real,
    /// 32 bits, flat segments, no paging.
    Protected,
    /// 32 bits with paging: two levels, 4 MiB pages for the first and the last GiB.
    Paged,
    /// 64 bits: 2 MiB pages, the first and the fourth GiB one to one.
    Long,
}

/// All of them.
pub const MODES: [Mode; 4] = [Mode::Real, Mode::Protected, Mode::Paged, Mode::Long];

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_NE: u64 = 1 << 5;
const CR0_PG: u64 = 1 << 31;
const CR4_PSE: u64 = 1 << 4;
const CR4_PAE: u64 = 1 << 5;
const CR4_OSFXSR: u64 = 1 << 9;
const CR4_OSXMMEXCPT: u64 = 1 << 10;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// Present, writable.
const PTE: u64 = 3;
/// A page and no table.
const PTE_LARGE: u64 = 1 << 7;

/// Copies the code to [`CODE`] and starts `cpu` there in this mode, with a stack and handlers for all
/// interrupts. Interrupts are off.
///
/// # Errors
///
/// The ioctl that failed and its errno.
pub fn load(machine: &Machine, cpu: &Cpu, mode: Mode, code: &[u8]) -> Result<(), Fail> {
    assert!(code.len() <= 0x1000, "the code is too long for its place");
    // What runs off its end meets INT3.
    machine.memory.write(CODE, &[0xcc; 0x1000]);
    machine.memory.write(CODE, code);
    write_tables(machine, mode);
    enter(cpu, mode, CODE, STACK)
}

/// Writes descriptor tables, page tables and handlers for this mode.
pub fn write_tables(machine: &Machine, mode: Mode) {
    let memory = &machine.memory;
    handlers::install(memory, mode);
    if mode == Mode::Real {
        for vector in 0..256_u64 {
            memory.write(
                4 * vector,
                &(STUBS as u32 + 16 * vector as u32).to_le_bytes(),
            );
        }
        return;
    }
    const CODE32: u64 = 0x00cf_9b00_0000_ffff;
    let code = if mode == Mode::Long {
        0x00af_9b00_0000_ffff
    } else {
        CODE32
    };
    let tss = 0x0000_8b00_0000_0067 | (TSS << 16);
    let table = [0, code, 0x00cf_9300_0000_ffff, tss, 0, CODE32];
    for (index, descriptor) in (0..).zip(table) {
        memory.write_u64(GDT + 8 * index, descriptor);
    }
    for vector in 0..256 {
        let handler = STUBS + 16 * vector;
        let gate = handler & 0xffff | (u64::from(CODE_SELECTOR) << 16) | (0x8e00 << 32);
        if mode == Mode::Long {
            memory.write_u64(IDT + 16 * vector, gate);
            memory.write_u64(IDT + 16 * vector + 8, 0);
        } else {
            memory.write_u64(IDT + 8 * vector, gate);
        }
    }
    match mode {
        Mode::Paged => write_two_levels(machine),
        Mode::Long => write_four_levels(machine),
        Mode::Real | Mode::Protected => {}
    }
    debug_assert!(handlers::common(mode).len() <= 0x1000 && COMMON == STUBS + 0x1000);
}

fn write_two_levels(machine: &Machine) {
    for index in (0..256_u32).chain(768..1024) {
        let entry = (index << 22) | (PTE | PTE_LARGE) as u32;
        machine
            .memory
            .write(PAGE_TABLES + 4 * u64::from(index), &entry.to_le_bytes());
    }
}

fn write_four_levels(machine: &Machine) {
    let memory = &machine.memory;
    let (level3, low, high) = (
        PAGE_TABLES + 0x1000,
        PAGE_TABLES + 0x2000,
        PAGE_TABLES + 0x3000,
    );
    memory.write_u64(PAGE_TABLES, level3 | PTE);
    memory.write_u64(level3, low | PTE);
    memory.write_u64(level3 + 3 * 8, high | PTE);
    for index in 0..512 {
        memory.write_u64(low + 8 * index, (index << 21) | PTE | PTE_LARGE);
        memory.write_u64(
            high + 8 * index,
            (3 << 30) | (index << 21) | PTE | PTE_LARGE,
        );
    }
}

/// Puts `cpu` into this mode at `rip` with the stack at `rsp`; [`write_tables`] went before.
///
/// # Errors
///
/// The ioctl that failed and its errno.
pub fn enter(cpu: &Cpu, mode: Mode, rip: u64, rsp: u64) -> Result<(), Fail> {
    let mut sregs = cpu.sregs()?;
    if mode == Mode::Real {
        for segment in [
            &mut sregs.cs,
            &mut sregs.ds,
            &mut sregs.es,
            &mut sregs.fs,
            &mut sregs.gs,
            &mut sregs.ss,
        ] {
            segment.base = 0;
            segment.selector = 0;
        }
    } else {
        let long = mode == Mode::Long;
        sregs.cs = segment(CODE_SELECTOR, 0xb, long);
        let data = segment(DATA_SELECTOR, 3, false);
        (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
        sregs.tr = kvm_segment {
            base: TSS,
            limit: 0x67,
            selector: TSS_SELECTOR,
            type_: 0xb,
            present: 1,
            ..Default::default()
        };
        sregs.gdt.base = GDT;
        sregs.gdt.limit = 47;
        sregs.idt.base = IDT;
        sregs.idt.limit = if long { 0xfff } else { 0x7ff };
        sregs.cr0 = CR0_PE | CR0_ET | CR0_NE;
        sregs.cr4 = CR4_OSFXSR | CR4_OSXMMEXCPT;
        sregs.efer = 0;
        if mode != Mode::Protected {
            sregs.cr0 |= CR0_PG;
            sregs.cr3 = PAGE_TABLES;
            sregs.cr4 |= if long { CR4_PAE } else { CR4_PSE };
        }
        if long {
            sregs.efer = EFER_LME | EFER_LMA;
        }
    }
    cpu.set_sregs(&sregs)?;
    cpu.set_regs(&kvm_regs {
        rip,
        rsp,
        rflags: 2,
        ..Default::default()
    })
}

fn segment(selector: u16, type_: u8, long: bool) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_,
        present: 1,
        db: u8::from(!long),
        s: 1,
        l: u8::from(long),
        g: 1,
        ..Default::default()
    }
}
