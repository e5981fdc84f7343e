// SPDX-License-Identifier: GPL-2.0

//! 16-bit and 32-bit code, by way of segments in the local descriptor table.

use super::{Code, ARENA, ARENA_LENGTH, STATE};
use rvisor_core::{
    emulate::CodeSize,
    x86::segment::{AccessRights, Segment},
};

/// The table's entries for code of 32 and 16 bits; those for data follow.
const CODE_32: u16 = 0;
const CODE_16: u16 = 1;
const FIRST_DATA: u16 = 2;
/// 64 KiB.
const LIMIT: u32 = 0xffff;
/// Where the segments end that have an end or a beginning in the arena.
const MIDDLE: u32 = (ARENA + ARENA_LENGTH / 2) as u32;
/// Linux's selector of 64-bit code.
const LONG_CODE: u8 = 0x33;

/// Linux's `struct user_desc`.
#[repr(C)]
struct Descriptor {
    entry: u32,
    base: u32,
    limit: u32,
    /// Bit 0: 32 bits. Bits 2:1: 0 for data, 1 for data that expands down, 2 for code. Bit 3: read-only.
    /// Bit 6: available to software.
    flags: u32,
}

/// What DS, ES or SS may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Data {
    /// 64 KiB that can be written; as SS, with a stack pointer of 32 bits.
    Wide,
    /// The same with a stack pointer of 16 bits.
    Narrow,
    /// It ends in the middle of the arena.
    Short,
    /// It begins in the middle of the arena and goes to the end of the address space.
    Down,
    /// The same, to 64 KiB.
    DownNarrow,
    /// It can only be read.
    ReadOnly,
    /// The null selector.
    Null,
}

impl Data {
    /// Those that SS can be loaded with.
    pub(crate) const STACKS: [Self; 5] = [
        Self::Wide,
        Self::Narrow,
        Self::Short,
        Self::Down,
        Self::DownNarrow,
    ];
    /// Those for DS and ES.
    pub(crate) const ALL: [Self; 7] = [
        Self::Wide,
        Self::Narrow,
        Self::Short,
        Self::Down,
        Self::DownNarrow,
        Self::ReadOnly,
        Self::Null,
    ];

    /// The limit, and `user_desc`'s flags but for the common one.
    fn description(self) -> (u32, u32) {
        match self {
            Self::Wide | Self::Null => (LIMIT, 1),
            Self::Narrow => (LIMIT, 0),
            Self::Short => (MIDDLE, 1),
            Self::Down => (MIDDLE, 3),
            Self::DownNarrow => (MIDDLE, 2),
            Self::ReadOnly => (LIMIT, 9),
        }
    }

    /// What the CPU then holds of it, where it begins at `base`.
    pub(crate) fn segment(self, base: u64) -> Segment {
        let (limit, _) = self.description();
        let access = match self {
            // Writable, accessed, for CPL 3, present.
            Self::Wide | Self::Short => 0x40f3,
            Self::Narrow => 0xf3,
            Self::Down => 0x40f7,
            Self::DownNarrow => 0xf7,
            Self::ReadOnly => 0x40f1,
            Self::Null => AccessRights::UNUSABLE,
        };
        Segment {
            selector: self.selector(),
            base,
            limit,
            access: AccessRights(access),
        }
    }

    fn selector(self) -> u16 {
        let place = (0..).zip(Self::ALL).find(|(_, data)| *data == self);
        match (self, place) {
            (Self::Null, _) | (_, None) => 0,
            (_, Some((place, _))) => selector(FIRST_DATA + place),
        }
    }
}

/// The code segment's contents, as [`Data::segment`]: it can be read.
pub(crate) fn code_segment(code: CodeSize, base: u64) -> Segment {
    let (entry, big) = match code {
        CodeSize::Bits16 => (CODE_16, 0),
        _ => (CODE_32, 0x4000),
    };
    Segment {
        selector: selector(entry),
        base,
        limit: LIMIT,
        access: AccessRights(0xfb | big),
    }
}

/// The selector of an entry in the local descriptor table, for CPL 3.
fn selector(entry: u16) -> u16 {
    (entry << 3) | 7
}

/// Makes the segments, with their base at `base`.
pub(super) fn make_segments(base: u64) {
    let base = u32::try_from(base).unwrap();
    let data = Data::ALL.map(|data| {
        let (limit, flags) = data.description();
        (data.selector() >> 3, limit, flags)
    });
    let code = [(CODE_32, LIMIT, 5), (CODE_16, LIMIT, 4)];
    for (entry, limit, flags) in code.into_iter().chain(data) {
        if entry == 0 && flags == 1 {
            // The null selector has no entry.
            continue;
        }
        let descriptor = Descriptor {
            entry: entry.into(),
            base,
            limit,
            flags: flags | 0x40,
        };
        const WRITE: libc::c_int = 0x11;
        // SAFETY: the descriptor is one, and its size is what is told.
        let result = unsafe {
            libc::syscall(
                libc::SYS_modify_ldt,
                WRITE,
                &raw const descriptor,
                size_of::<Descriptor>(),
            )
        };
        assert_eq!(result, 0, "modify_ldt: {}", std::io::Error::last_os_error());
    }
}

/// Where the selectors are that DS, ES and SS get, among the state's slots.
const SELECTORS: usize = 18;
/// MOV's ModRM.reg for them.
const DS_ES_SS: [u8; 3] = [3, 0, 2];

/// The selectors for [`around`]'s code, as they are to stand in the mapping, and where.
pub(super) fn selectors([ds, es, ss]: [Data; 3]) -> (usize, [u8; 24]) {
    let mut bytes = [0; 24];
    for (slot, data) in bytes.chunks_exact_mut(8).zip([ds, es, ss]) {
        slot[..2].copy_from_slice(&data.selector().to_le_bytes());
    }
    (STATE + 8 * SELECTORS, bytes)
}

/// The code that executes an instruction in the 16-bit or 32-bit segment. It is to stand at `base`.
pub(super) fn around(base: u64, size: CodeSize, has_avx: bool, instruction: &[u8]) -> Code {
    let is_narrow = size == CodeSize::Bits16;
    let entry = if is_narrow { CODE_16 } else { CODE_32 };
    let mut code = Code::new(has_avx);
    code.save_caller();
    load_wide(&mut code);
    code.load_flags();
    // push selector; push offset; retf, to right behind it
    code.add(&[0x68]);
    code.add(&u32::from(selector(entry)).to_le_bytes());
    let target = u32::try_from(code.bytes.len() + 7).unwrap();
    code.add(&[0x68]);
    code.add(&target.to_le_bytes());
    code.add(&[0x48, 0xcb]);
    move_registers(&mut code, is_narrow, true);
    // mov sreg, cs:[slot]
    for (slot, register) in (SELECTORS..).zip(DS_ES_SS) {
        move_slot(&mut code, is_narrow, &[0x2e], 0x8e, register, slot);
    }
    code.add(instruction);
    // The slots are reached by DS, which is restored with no register at hand.
    move_slot(
        &mut code,
        is_narrow,
        &[0x2e],
        0x8e,
        DS_ES_SS[0],
        SELECTORS + 3,
    );
    move_registers(&mut code, is_narrow, false);
    if is_narrow {
        code.add(&[0x66]);
    }
    // jmp to 64-bit code, right behind it
    let target = u32::try_from(base).unwrap() + u32::try_from(code.bytes.len() + 7).unwrap();
    code.add(&[0xea]);
    code.add(&target.to_le_bytes());
    code.add(&[LONG_CODE, 0]);
    code.restore_caller();
    code
}

/// DS, ES and SS that all is in, and DS's selector in the slot behind the others.
fn load_wide(code: &mut Code) {
    // mov eax, data; mov ds, eax; mov es, eax; mov ss, eax; mov [slot], rax
    code.add(&[0xb8]);
    code.add(&u32::from(Data::Wide.selector()).to_le_bytes());
    code.add(&[0x8e, 0xd8, 0x8e, 0xc0, 0x8e, 0xd0]);
    code.move_register(0x89, 0, u8::try_from(SELECTORS + 3).unwrap());
}

/// The registers that such code has, vectors first, from their slots or to them.
fn move_registers(code: &mut Code, is_narrow: bool, is_load: bool) {
    for number in 0..8 {
        if is_narrow {
            code.add(&[0x67]);
        }
        let opcode = if is_load { 0x10 } else { 0x11 };
        let place = code.vector_instruction(opcode, number);
        code.add(&u32::try_from(place).unwrap().to_le_bytes());
    }
    for register in 0..8 {
        let opcode = if is_load { 0x8b } else { 0x89 };
        let prefixes: &[u8] = if is_narrow { &[0x66] } else { &[] };
        move_slot(
            code,
            is_narrow,
            prefixes,
            opcode,
            register,
            usize::from(register),
        );
    }
}

/// A move between a register and a slot, with a 32-bit address.
fn move_slot(
    code: &mut Code,
    is_narrow: bool,
    prefixes: &[u8],
    opcode: u8,
    register: u8,
    slot: usize,
) {
    code.add(prefixes);
    if is_narrow {
        code.add(&[0x67]);
    }
    code.add(&[opcode, 5 | (register << 3)]);
    let slot = STATE + 8 * slot;
    code.add(&u32::try_from(slot).unwrap().to_le_bytes());
}
