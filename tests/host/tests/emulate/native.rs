// SPDX-License-Identifier: GPL-2.0

//! One instruction at a time on this machine's CPU.

mod compat;
mod fault;

pub(crate) use compat::{code_segment, Data};
pub(crate) use fault::Fault;

use rvisor_core::emulate::{CodeSize, Vector};

/// CF, PF, AF, ZF, SF, DF, OF.
pub(crate) const FLAGS: u64 = 0xcd5;
/// AC: at CPL 3, and Linux sets CR0.AM, accesses must be aligned.
pub(crate) const ALIGNMENT_CHECK: u64 = 1 << 18;
/// Where the memory that instructions work on is, in `Native`'s mapping, and how long it is.
pub(crate) const ARENA: usize = 0x1000;
pub(crate) const ARENA_LENGTH: usize = 512;
/// Where the code goes on after an exception, in `Native`'s mapping.
const RECOVERY: usize = 0x800;
/// Where registers and flags are kept.
const STATE: usize = 0x3000;
/// Where vector registers are kept, in 32 bytes each.
const VECTORS: usize = 0x3800;
const MAPPING: usize = 0x4000;
/// The distance from the GS base to the arena.
const GS_DISTANCE: u64 = 0x12_3456;

/// What an instruction starts from or comes to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct State {
    pub(crate) gprs: [u64; 16],
    pub(crate) flags: u64,
    /// YMM0 to YMM15. Without AVX the upper halves stay as they were; other code than 64-bit has 8.
    pub(crate) vectors: [Vector; 16],
    pub(crate) arena: [u8; ARENA_LENGTH],
}

/// What code an instruction is, and which segments it has outside of 64-bit mode.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Setting {
    pub(crate) code: CodeSize,
    pub(crate) ds: Data,
    pub(crate) es: Data,
    pub(crate) ss: Data,
}

/// A page of code for the CPU with the memory that it works on, below 2 GiB.
pub(crate) struct Native {
    mapping: *mut u8,
    pub(crate) has_avx: bool,
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
            has_avx: std::is_x86_feature_detected!("avx2"),
        };
        const ARCH_SET_GS: libc::c_int = 0x1001;
        // SAFETY: nothing in a 64-bit Linux process uses GS, which is this thread's own.
        let result = unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_SET_GS, native.gs_base()) };
        assert_eq!(result, 0);
        compat::make_segments(native.address());
        let mut recovery = Code::new(native.has_avx);
        recovery.bytes.resize(RECOVERY, 0xcc);
        recovery.epilogue();
        assert!(recovery.bytes.len() <= ARENA);
        native.copy_in(0, &recovery.bytes);
        fault::catch(native.address(), RECOVERY as u64);
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
    fn prologue(&self) -> Code {
        let mut code = Code::new(self.has_avx);
        code.save_caller();
        code.load_flags();
        for register in 0..16 {
            code.move_vector(0x10, register);
        }
        for register in 0..16 {
            code.move_register(0x8b, register, register);
        }
        code
    }

    /// Where an instruction of 64-bit code will stand.
    pub(crate) fn instruction_at(&self) -> u64 {
        self.address() + self.prologue().bytes.len() as u64
    }

    /// Has the CPU execute one instruction, which must touch the arena only and not jump, and says
    /// which exception it raised. Outside of 64-bit mode the registers' upper halves do not count.
    pub(crate) fn run(
        &self,
        setting: &Setting,
        instruction: &[u8],
        state: &State,
    ) -> (State, Option<Fault>) {
        let is_long = setting.code == CodeSize::Bits64;
        let code = if is_long {
            let mut code = self.prologue();
            code.add(instruction);
            code.epilogue();
            code
        } else {
            let Setting { ds, es, ss, .. } = *setting;
            let (place, selectors) = compat::selectors([ds, es, ss]);
            self.copy_in(place, &selectors);
            compat::around(self.address(), setting.code, self.has_avx, instruction)
        };
        assert!(code.bytes.len() <= RECOVERY);
        let mut after = self.run_code(&code, state);
        let fault = fault::take();
        if !is_long {
            after.gprs[8..].copy_from_slice(&state.gprs[8..]);
            after.vectors[8..].copy_from_slice(&state.vectors[8..]);
            for gpr in &mut after.gprs {
                *gpr &= 0xffff_ffff;
            }
        }
        (after, fault)
    }

    fn run_code(&self, code: &Code, state: &State) -> State {
        self.copy_in(0, &code.bytes);
        let mut slots: Vec<u8> = state
            .gprs
            .iter()
            .flat_map(|gpr| gpr.to_le_bytes())
            .collect();
        slots.extend_from_slice(&(state.flags | 0x202).to_le_bytes());
        self.copy_in(STATE, &slots);
        self.copy_in(ARENA, &state.arena);
        for (number, vector) in state.vectors.iter().enumerate() {
            let bytes: Vec<u8> = vector.iter().flat_map(|part| part.to_le_bytes()).collect();
            self.copy_in(VECTORS + 32 * number, &bytes);
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
            let mut bytes = [0; 32];
            self.copy_out(VECTORS + 32 * number, &mut bytes);
            for (part, bytes) in vector.iter_mut().zip(bytes.chunks_exact(8)) {
                *part = u64::from_le_bytes(bytes.try_into().unwrap());
            }
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
struct Code {
    bytes: Vec<u8>,
    has_avx: bool,
}

impl Code {
    fn new(has_avx: bool) -> Self {
        Self {
            bytes: Vec::new(),
            has_avx,
        }
    }

    fn add(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    /// What comes after an instruction of 64-bit code.
    fn epilogue(&mut self) {
        for register in 0..16 {
            self.move_register(0x89, register, register);
            self.move_vector(0x11, register);
        }
        self.restore_caller();
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
        // push 0x202; popfq: AC and DF are clear. xor eax, eax; mov ds, eax; mov es, eax;
        // mov eax, 0x2b (user's data); mov ss, eax
        self.add(&[0x68, 0x02, 0x02, 0, 0, 0x9d]);
        self.add(&[0x31, 0xc0, 0x8e, 0xd8, 0x8e, 0xc0]);
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
        let end = self.bytes.len() + 4;
        let displacement = i32::try_from(offset - end).unwrap();
        self.add(&displacement.to_le_bytes());
    }

    /// MOVUPS between a vector register and its place.
    fn move_vector(&mut self, opcode: u8, number: u8) {
        let place = self.vector_instruction(opcode, number);
        self.displacement_to(place);
    }

    /// MOVUPS or VMOVUPS of a whole register up to its displacement, and the place that is meant.
    fn vector_instruction(&mut self, opcode: u8, number: u8) -> usize {
        let modrm = 5 | ((number & 7) << 3);
        match (self.has_avx, number >> 3) {
            (true, high) => self.add(&[0xc5, 0xfc ^ (high << 7), opcode, modrm]),
            (false, 0) => self.add(&[0x0f, opcode, modrm]),
            (false, _) => self.add(&[0x44, 0x0f, opcode, modrm]),
        }
        VECTORS + 32 * usize::from(number)
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
