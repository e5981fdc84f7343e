// SPDX-License-Identifier: GPL-2.0

//! 16-bit and 32-bit code, by way of segments in the local descriptor table.

use super::{Code, STATE};
use rvisor_core::emulate::CodeSize;

/// The table's entries: code of 32 and 16 bits, and data.
const CODE_32: u32 = 0;
const CODE_16: u32 = 1;
const DATA: u32 = 2;
/// All three segments have 64 KiB.
pub(crate) const LIMIT: u32 = 0xffff;
/// Linux's selector of 64-bit code.
const LONG_CODE: u8 = 0x33;

/// Linux's `struct user_desc`.
#[repr(C)]
struct Descriptor {
    entry: u32,
    base: u32,
    limit: u32,
    /// Bit 0: 32 bits. Bits 2:1: 0 for data, 2 for code. Bit 6: available to software.
    flags: u32,
}

/// The selector of an entry in the local descriptor table, for CPL 3.
fn selector(entry: u32) -> u32 {
    (entry << 3) | 7
}

/// Makes the three segments, with their base at `base`.
pub(super) fn make_segments(base: u64) {
    let base = u32::try_from(base).unwrap();
    for (entry, flags) in [(CODE_32, 0x45), (CODE_16, 0x44), (DATA, 0x41)] {
        let descriptor = Descriptor {
            entry,
            base,
            limit: LIMIT,
            flags,
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

/// The code that executes an instruction in the 16-bit or 32-bit segment. It is to stand at `base`.
pub(super) fn around(base: u64, size: CodeSize, instruction: &[u8]) -> Code {
    let is_narrow = size == CodeSize::Bits16;
    let entry = if is_narrow { CODE_16 } else { CODE_32 };
    let mut code = Code(Vec::new());
    code.save_caller();
    // mov eax, data; mov ds, eax; mov es, eax; mov ss, eax
    code.add(&[0xb8]);
    code.add(&selector(DATA).to_le_bytes());
    code.add(&[0x8e, 0xd8, 0x8e, 0xc0, 0x8e, 0xd0]);
    code.load_flags();
    // push selector; push offset; retf, to right behind it
    code.add(&[0x68]);
    code.add(&selector(entry).to_le_bytes());
    let target = u32::try_from(code.0.len() + 7).unwrap();
    code.add(&[0x68]);
    code.add(&target.to_le_bytes());
    code.add(&[0x48, 0xcb]);
    for register in 0..8 {
        move_register(&mut code, is_narrow, 0x8b, register);
    }
    code.add(instruction);
    for register in 0..8 {
        move_register(&mut code, is_narrow, 0x89, register);
    }
    if is_narrow {
        code.add(&[0x66]);
    }
    // jmp to 64-bit code, right behind it
    let target = u32::try_from(base).unwrap() + u32::try_from(code.0.len() + 7).unwrap();
    code.add(&[0xea]);
    code.add(&target.to_le_bytes());
    code.add(&[LONG_CODE, 0]);
    code.restore_caller();
    code
}

/// MOV between a 32-bit register and its slot.
fn move_register(code: &mut Code, is_narrow: bool, opcode: u8, register: u8) {
    if is_narrow {
        code.add(&[0x66, 0x67]);
    }
    code.add(&[opcode, 5 | (register << 3)]);
    let slot = STATE + 8 * usize::from(register);
    code.add(&u32::try_from(slot).unwrap().to_le_bytes());
}
