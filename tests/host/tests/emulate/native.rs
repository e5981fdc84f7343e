// SPDX-License-Identifier: GPL-2.0

//! One instruction at a time on this machine's CPU.

mod compat;

use rvisor_core::emulate::CodeSize;

/// CF, PF, AF, ZF, SF, DF, OF.
pub(crate) const FLAGS: u64 = 0xcd5;
/// Where the memory that instructions work on is, in `Native`'s mapping, and how long it is.
pub(crate) const ARENA: usize = 0x1000;
pub(crate) const ARENA_LENGTH: usize = 512;
/// Where registers and flags are kept, in `Native`'s mapping.
const STATE: usize = 0x3000;
/// Where vector registers are kept.
const VECTORS: usize = 0x3800;
const MAPPING: usize = 0x4000;
/// The distance from the GS base to the arena.
const GS_DISTANCE: u64 = 0x12_3456;

/// What an instruction starts from or comes to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct State {
    pub(crate) gprs: [u64; 16],
    pub(crate) flags: u64,
    /// XMM0 to XMM15, which 64-bit code only is given.
    pub(crate) vectors: [[u8; 16]; 16],
    pub(crate) arena: [u8; ARENA_LENGTH],
}

/// A page of code for the CPU with the memory that it works on, below 2 GiB.
pub(crate) struct Native {
    mapping: *mut u8,
}

impl Native {
    /// Maps it, and gives this process 16-bit and 32-bit segments that begin where it does.
    pub(crate) fn new() -> Self {
        // SAFETY: a new anonymous mapping, at a place that the kernel chooses.
        let mapping = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                MAPPING,
                libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_32BIT,
                -1,
                0,
            )
        };
        assert_ne!(mapping, libc::MAP_FAILED);
        let native = Self {
            mapping: mapping.cast(),
        };
        const ARCH_SET_GS: libc::c_int = 0x1001;
        // SAFETY: nothing in a 64-bit Linux process uses GS, which is this thread's own.
        let result = unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_SET_GS, native.gs_base()) };
        assert_eq!(result, 0);
        compat::make_segments(native.address());
        native
    }

    /// Where the mapping begins.
    pub(crate) fn address(&self) -> u64 {
        self.mapping as u64
    }

    pub(crate) fn arena(&self) -> u64 {
        self.address() + ARENA as u64
    }

    pub(crate) fn gs_base(&self) -> u64 {
        self.arena() - GS_DISTANCE
    }

    fn copy_in(&self, offset: usize, bytes: &[u8]) {
        assert!(offset + bytes.len() <= MAPPING);
        // SAFETY: it is inside of the mapping, of which no reference exists.
        unsafe {
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.mapping.add(offset), bytes.len());
        }
    }

    fn copy_out(&self, offset: usize, bytes: &mut [u8]) {
        assert!(offset + bytes.len() <= MAPPING);
        // SAFETY: as in `copy_in`.
        unsafe {
            std::ptr::copy_nonoverlapping(
                self.mapping.add(offset),
                bytes.as_mut_ptr(),
                bytes.len(),
            );
        }
    }

    /// What comes before an instruction of 64-bit code.
    fn prologue() -> Code {
        let mut code = Code(Vec::new());
        code.save_caller();
        code.load_flags();
        for register in 0..16 {
            code.move_register(0x8b, register, register);
            code.move_vector(0x10, register);
        }
        code
    }

    /// What comes after it.
    fn epilogue(code: &mut Code) {
        for register in 0..16 {
            code.move_register(0x89, register, register);
            code.move_vector(0x11, register);
        }
        code.restore_caller();
    }

    /// Where an instruction of 64-bit code will stand.
    pub(crate) fn instruction_at(&self) -> u64 {
        self.address() + Self::prologue().0.len() as u64
    }

    /// Has the CPU execute one instruction, which must touch the arena only and not jump. Outside
    /// of 64-bit mode the registers' upper halves do not count.
    pub(crate) fn run(&self, size: CodeSize, instruction: &[u8], state: &State) -> State {
        let code = match size {
            CodeSize::Bits64 => {
                let mut code = Self::prologue();
                code.add(instruction);
                Self::epilogue(&mut code);
                code
            }
            CodeSize::Bits16 | CodeSize::Bits32 => {
                compat::around(self.address(), size, instruction)
            }
        };
        self.run_code(&code, state)
    }

    fn run_code(&self, code: &Code, state: &State) -> State {
        self.copy_in(0, &code.0);
        let mut slots: Vec<u8> = state
            .gprs
            .iter()
            .flat_map(|gpr| gpr.to_le_bytes())
            .collect();
        slots.extend_from_slice(&(state.flags | 0x202).to_le_bytes());
        self.copy_in(STATE, &slots);
        self.copy_in(ARENA, &state.arena);
        for (number, vector) in state.vectors.iter().enumerate() {
            self.copy_in(VECTORS + 16 * number, vector);
        }
        // SAFETY: the code keeps to the calling convention: it saves and restores the stack pointer
        // and the registers that are the caller's, and clears DF.
        unsafe {
            let code: extern "sysv64" fn() = std::mem::transmute(self.mapping);
            code();
        }
        let mut after = state.clone();
        self.copy_out(STATE, &mut slots);
        let mut numbers = slots
            .chunks_exact(8)
            .map(|chunk| u64::from_le_bytes(chunk.try_into().unwrap()));
        for gpr in &mut after.gprs {
            *gpr = numbers.next().unwrap();
        }
        after.flags = numbers.next().unwrap() & FLAGS;
        self.copy_out(ARENA, &mut after.arena);
        for (number, vector) in after.vectors.iter_mut().enumerate() {
            self.copy_out(VECTORS + 16 * number, vector);
        }
        after
    }
}

impl Drop for Native {
    fn drop(&mut self) {
        // SAFETY: it was mapped by `new` and nothing refers to it any more.
        unsafe { libc::munmap(self.mapping.cast(), MAPPING) };
    }
}

/// Code at the start of the mapping.
struct Code(Vec<u8>);

impl Code {
    fn add(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
    }

    /// Saves the registers that are the caller's.
    fn save_caller(&mut self) {
        // push rbx, rbp, r12 to r15
        self.add(&[0x53, 0x55, 0x41, 0x54, 0x41, 0x55, 0x41, 0x56, 0x41, 0x57]);
        self.move_register(0x89, 4, 17);
    }

    fn load_flags(&mut self) {
        // push [flags]; popfq
        self.add(&[0xff, 0x35]);
        self.slot(16);
        self.add(&[0x9d]);
    }

    /// Keeps the flags, restores what is the caller's, and returns.
    fn restore_caller(&mut self) {
        self.move_register(0x8b, 4, 17);
        // pushfq; pop [flags]
        self.add(&[0x9c, 0x8f, 0x05]);
        self.slot(16);
        // cld; xor eax, eax; mov ds, eax; mov es, eax; mov eax, 0x2b (user's data); mov ss, eax
        self.add(&[0xfc, 0x31, 0xc0, 0x8e, 0xd8, 0x8e, 0xc0]);
        self.add(&[0xb8, 0x2b, 0, 0, 0, 0x8e, 0xd0]);
        // pop r15 to r12, rbp, rbx; ret
        self.add(&[
            0x41, 0x5f, 0x41, 0x5e, 0x41, 0x5d, 0x41, 0x5c, 0x5d, 0x5b, 0xc3,
        ]);
    }

    /// A RIP-relative displacement, the last part of an instruction, to the state's slot `number`.
    fn slot(&mut self, number: usize) {
        self.displacement_to(STATE + 8 * number);
    }

    /// A RIP-relative displacement, the last part of an instruction, to an offset in the mapping.
    fn displacement_to(&mut self, offset: usize) {
        let end = self.0.len() + 4;
        let displacement = i32::try_from(offset - end).unwrap();
        self.add(&displacement.to_le_bytes());
    }

    /// MOVUPS between a vector register and its place.
    fn move_vector(&mut self, opcode: u8, number: u8) {
        self.add(&[
            0x40 | ((number >> 3) << 2),
            0x0f,
            opcode,
            5 | ((number & 7) << 3),
        ]);
        self.displacement_to(VECTORS + 16 * usize::from(number));
    }

    /// MOV between a 64-bit register and a slot.
    fn move_register(&mut self, opcode: u8, register: u8, slot: u8) {
        self.add(&[
            0x48 | ((register >> 3) << 2),
            opcode,
            5 | ((register & 7) << 3),
        ]);
        self.slot(usize::from(slot));
    }
}
