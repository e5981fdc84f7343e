// SPDX-License-Identifier: GPL-2.0

//! Control registers, EFER, RFLAGS, XCR0 and the debug registers: their bits and which values are
//! legal (SDM vol. 3, 2.5, 2.6, 2.2.1 and 19.2).
//!
//! Each register is a transparent wrapper of its raw value. The `check_*` functions decide what a
//! MOV, WRMSR or XSETBV of the guest may write; they know the architecture's rules only, and take
//! what depends on the CPU model as a mask.

macro_rules! register {
    ($(#[$doc:meta])* $name:ident { $($(#[$bit_doc:meta])* $bit:ident = $value:expr;)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        #[repr(transparent)]
        pub struct $name(pub u64);

        impl $name {
            $($(#[$bit_doc])* pub const $bit: u64 = $value;)*

            /// Whether every bit of `mask` is set.
            #[inline]
            pub const fn has(self, mask: u64) -> bool {
                self.0 & mask == mask
            }

            /// The value with the bits of `mask` set.
            #[inline]
            pub const fn with(self, mask: u64) -> Self {
                Self(self.0 | mask)
            }

            /// The value with the bits of `mask` clear.
            #[inline]
            pub const fn without(self, mask: u64) -> Self {
                Self(self.0 & !mask)
            }

            /// The bits in which two values differ.
            #[inline]
            pub const fn changed(self, other: Self) -> u64 {
                self.0 ^ other.0
            }
        }
    };
}

register! {
    /// Control register 0 (SDM vol. 3, 2.5).
    Cr0 {
        /// Protection enable: protected mode.
        PE = 1 << 0;
        /// Monitor coprocessor: WAIT heeds TS.
        MP = 1 << 1;
        /// Emulation: x87 instructions raise #NM.
        EM = 1 << 2;
        /// Task switched.
        TS = 1 << 3;
        /// Extension type; always 1.
        ET = 1 << 4;
        /// Numeric error: x87 errors raise #MF.
        NE = 1 << 5;
        /// Write protect: supervisor writes heed read-only pages.
        WP = 1 << 16;
        /// Alignment mask.
        AM = 1 << 18;
        /// Not write-through.
        NW = 1 << 29;
        /// Cache disable.
        CD = 1 << 30;
        /// Paging.
        PG = 1 << 31;
        /// Every bit that is defined.
        DEFINED = Self::PE | Self::MP | Self::EM | Self::TS | Self::ET | Self::NE | Self::WP
            | Self::AM | Self::NW | Self::CD | Self::PG;
        /// The value after INIT and reset (SDM vol. 3, table 11-1).
        RESET = Self::CD | Self::NW | Self::ET;
    }
}

register! {
    /// Control register 3: the root of the page tables (SDM vol. 3, 2.5).
    Cr3 {
        /// Page-level write-through of the root table; ignored with CR4.PCIDE.
        PWT = 1 << 3;
        /// Page-level cache disable of the root table; ignored with CR4.PCIDE.
        PCD = 1 << 4;
        /// The process-context identifier, with CR4.PCIDE.
        PCID = 0xfff;
        /// In the source operand of MOV to CR3 with CR4.PCIDE: keep the TLB. Never stored.
        NO_FLUSH = 1 << 63;
    }
}

register! {
    /// Control register 4 (SDM vol. 3, 2.5).
    Cr4 {
        /// Virtual-8086 mode extensions.
        VME = 1 << 0;
        /// Protected-mode virtual interrupts.
        PVI = 1 << 1;
        /// RDTSC and RDTSCP at CPL 0 only.
        TSD = 1 << 2;
        /// Debugging extensions.
        DE = 1 << 3;
        /// 4 MiB pages with 32-bit paging.
        PSE = 1 << 4;
        /// Physical-address extension.
        PAE = 1 << 5;
        /// Machine-check enable.
        MCE = 1 << 6;
        /// Global pages.
        PGE = 1 << 7;
        /// RDPMC at every CPL.
        PCE = 1 << 8;
        /// FXSAVE, FXRSTOR and SSE.
        OSFXSR = 1 << 9;
        /// SIMD errors raise #XM.
        OSXMMEXCPT = 1 << 10;
        /// User-mode instruction prevention.
        UMIP = 1 << 11;
        /// 57-bit linear addresses.
        LA57 = 1 << 12;
        /// VMX enable.
        VMXE = 1 << 13;
        /// SMX enable.
        SMXE = 1 << 14;
        /// RDFSBASE and its kin.
        FSGSBASE = 1 << 16;
        /// Process-context identifiers.
        PCIDE = 1 << 17;
        /// XSAVE and XCR0.
        OSXSAVE = 1 << 18;
        /// Key Locker.
        KL = 1 << 19;
        /// Supervisor-mode execution prevention.
        SMEP = 1 << 20;
        /// Supervisor-mode access prevention.
        SMAP = 1 << 21;
        /// Protection keys for user pages.
        PKE = 1 << 22;
        /// Control-flow enforcement.
        CET = 1 << 23;
        /// Protection keys for supervisor pages.
        PKS = 1 << 24;
        /// User interrupts.
        UINTR = 1 << 25;
    }
}

impl Cr4 {
    /// What the CPU's CR4 holds while it runs a guest whose CR4 is `self`. `host` is the host's own CR4,
    /// `(fixed, allowed)` are the bits that VMX operation demands and allows.
    ///
    /// MCE is the host's at all times: a machine check that comes while it is clear shuts the CPU down,
    /// and the host with it (SDM vol. 3, 2.5 and 7.15).
    #[inline]
    pub const fn in_guest(self, host: Self, (fixed, allowed): (u64, u64)) -> u64 {
        let value = (self.0 & !Self::MCE) | (host.0 & Self::MCE);
        (value | fixed) & allowed
    }
}

register! {
    /// The extended-feature-enable MSR (SDM vol. 3, 2.2.1).
    Efer {
        /// SYSCALL enable.
        SCE = 1 << 0;
        /// Long-mode enable.
        LME = 1 << 8;
        /// Long-mode active; set and cleared by the CPU with CR0.PG.
        LMA = 1 << 10;
        /// Execute-disable enable.
        NXE = 1 << 11;
    }
}

register! {
    /// The flags register (SDM vol. 1, 3.4.3).
    Rflags {
        /// Carry.
        CF = 1 << 0;
        /// Always 1.
        FIXED = 1 << 1;
        /// Parity.
        PF = 1 << 2;
        /// Auxiliary carry.
        AF = 1 << 4;
        /// Zero.
        ZF = 1 << 6;
        /// Sign.
        SF = 1 << 7;
        /// Trap: single step.
        TF = 1 << 8;
        /// Interrupts enabled.
        IF = 1 << 9;
        /// Direction.
        DF = 1 << 10;
        /// Overflow.
        OF = 1 << 11;
        /// I/O privilege level, two bits.
        IOPL = 3 << 12;
        /// Nested task.
        NT = 1 << 14;
        /// Resume.
        RF = 1 << 16;
        /// Virtual-8086 mode.
        VM = 1 << 17;
        /// Alignment check; with SMAP, lets a supervisor reach user pages.
        AC = 1 << 18;
        /// Virtual interrupt flag.
        VIF = 1 << 19;
        /// Virtual interrupt pending.
        VIP = 1 << 20;
        /// Whether CPUID is there.
        ID = 1 << 21;
        /// The status flags of arithmetic instructions.
        ARITHMETIC = Self::CF | Self::PF | Self::AF | Self::ZF | Self::SF | Self::OF;
        /// Every bit that is defined.
        DEFINED = Self::ARITHMETIC | Self::FIXED | Self::TF | Self::IF | Self::DF | Self::IOPL
            | Self::NT | Self::RF | Self::VM | Self::AC | Self::VIF | Self::VIP | Self::ID;
    }
}

register! {
    /// Extended control register 0: the state components that XSAVE handles (SDM vol. 1, 13.1).
    Xcr0 {
        /// x87; always 1.
        X87 = 1 << 0;
        /// SSE: XMM and MXCSR.
        SSE = 1 << 1;
        /// AVX: the upper halves of YMM.
        AVX = 1 << 2;
        /// MPX: BND0 to BND3.
        BNDREGS = 1 << 3;
        /// MPX: BNDCFGU and BNDSTATUS.
        BNDCSR = 1 << 4;
        /// AVX-512: the mask registers.
        OPMASK = 1 << 5;
        /// AVX-512: the upper halves of ZMM0 to ZMM15.
        ZMM_HI256 = 1 << 6;
        /// AVX-512: ZMM16 to ZMM31.
        HI16_ZMM = 1 << 7;
        /// Protection keys: PKRU.
        PKRU = 1 << 9;
        /// AMX: the tile configuration.
        TILECFG = 1 << 17;
        /// AMX: the tiles.
        TILEDATA = 1 << 18;
        /// The three components of AVX-512.
        AVX512 = Self::OPMASK | Self::ZMM_HI256 | Self::HI16_ZMM;
        /// The two components of MPX.
        MPX = Self::BNDREGS | Self::BNDCSR;
        /// The two components of AMX.
        AMX = Self::TILECFG | Self::TILEDATA;
    }
}

register! {
    /// Debug register 6: status (SDM vol. 3, 19.2.3).
    Dr6 {
        /// Breakpoint conditions met, four bits.
        B = 0xf;
        /// Bus lock; 0 says that one was met.
        BLD = 1 << 11;
        /// Debug-register access detected.
        BD = 1 << 13;
        /// Single step.
        BS = 1 << 14;
        /// Task switch.
        BT = 1 << 15;
        /// RTM; 0 says that the exception came inside a transaction.
        RTM = 1 << 16;
        /// The value after reset; these bits are 1 where their features are absent.
        RESET = 0xffff_0ff0;
        /// Bits that software can change on a CPU without bus-lock detection and RTM.
        WRITABLE = Self::B | Self::BD | Self::BS | Self::BT;
    }
}

register! {
    /// Debug register 7: control (SDM vol. 3, 19.2.4).
    Dr7 {
        /// The local and global enables of the four breakpoints.
        ENABLES = 0xff;
        /// What a task switch clears: the local enables and local exact.
        LOCAL = 0x155;
        /// Local exact.
        LE = 1 << 8;
        /// Global exact.
        GE = 1 << 9;
        /// RTM debugging.
        RTM = 1 << 11;
        /// General detect: MOV to or from a debug register raises #DB.
        GD = 1 << 13;
        /// The value after reset; bit 10 is always 1.
        RESET = 1 << 10;
        /// Bits that software can change on a CPU without RTM.
        WRITABLE = 0xffff_0000 | Self::ENABLES | Self::LE | Self::GE | Self::GD;
    }
}

/// The register's value does not fit the others: the guest's instruction gets #GP(0), an ioctl
/// EINVAL.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Illegal;

/// Bits 63:32 of CR0, DR6 and DR7 can't be set; MOV raises #GP(0) (SDM vol. 2, MOV).
#[inline]
const fn fits_32(value: u64) -> bool {
    value >> 32 == 0
}

/// Checks a value of CR0 by itself. Undefined bits of the lower half are ignored by the CPU, so
/// they are no fault: drop them with [`Cr0::DEFINED`] after the check.
#[inline]
pub const fn check_cr0(cr0: Cr0) -> Result<(), Illegal> {
    let paging_unprotected = cr0.has(Cr0::PG) && !cr0.has(Cr0::PE);
    let write_back_undefined = cr0.has(Cr0::NW) && !cr0.has(Cr0::CD);
    if !fits_32(cr0.0) || paging_unprotected || write_back_undefined {
        return Err(Illegal);
    }
    Ok(())
}

/// Checks MOV to CR0 from `old` to `new` in the surroundings given (SDM vol. 3, 5.4.1 and 11.8.5).
/// `cs_is_long` is CS.L. The load of the PDPTEs, for PAE paging, is the caller's.
#[inline]
pub const fn check_cr0_change(
    old: Cr0,
    new: Cr0,
    cr4: Cr4,
    efer: Efer,
    cs_is_long: bool,
) -> Result<(), Illegal> {
    if check_cr0(new).is_err() {
        return Err(Illegal);
    }
    let starts_paging = !old.has(Cr0::PG) && new.has(Cr0::PG);
    if starts_paging && efer.has(Efer::LME) && (!cr4.has(Cr4::PAE) || cs_is_long) {
        return Err(Illegal);
    }
    let ends_paging = old.has(Cr0::PG) && !new.has(Cr0::PG);
    if ends_paging && (cr4.has(Cr4::PCIDE) || cs_is_long) {
        return Err(Illegal);
    }
    // CET needs write protection (SDM vol. 3, 2.5).
    if cr4.has(Cr4::CET) && !new.has(Cr0::WP) {
        return Err(Illegal);
    }
    Ok(())
}

/// Checks a value of CR4 by itself and with EFER. `reserved` holds the bits that the guest's CPU
/// lacks.
#[inline]
pub const fn check_cr4(cr4: Cr4, reserved: u64, cr0: Cr0, efer: Efer) -> Result<(), Illegal> {
    if cr4.0 & reserved != 0 {
        return Err(Illegal);
    }
    if cr4.has(Cr4::PCIDE) && !efer.has(Efer::LMA) {
        return Err(Illegal);
    }
    if cr4.has(Cr4::CET) && !cr0.has(Cr0::WP) {
        return Err(Illegal);
    }
    if efer.has(Efer::LMA) && !cr4.has(Cr4::PAE) {
        return Err(Illegal);
    }
    Ok(())
}

/// Checks MOV to CR4 from `old` to `new` (SDM vol. 3, 2.5 and 5.10.1).
#[inline]
pub const fn check_cr4_change(
    old: Cr4,
    new: Cr4,
    reserved: u64,
    cr0: Cr0,
    cr3: Cr3,
    efer: Efer,
) -> Result<(), Illegal> {
    if check_cr4(new, reserved, cr0, efer).is_err() {
        return Err(Illegal);
    }
    let long = efer.has(Efer::LMA);
    if long && old.changed(new) & Cr4::LA57 != 0 {
        return Err(Illegal);
    }
    let starts_pcid = !old.has(Cr4::PCIDE) && new.has(Cr4::PCIDE);
    if starts_pcid && cr3.0 & Cr3::PCID != 0 {
        return Err(Illegal);
    }
    Ok(())
}

/// The bits of CR4 whose change makes the CPU flush the TLB (SDM vol. 3, 5.10.4.1).
pub const CR4_FLUSHES: u64 =
    Cr4::PGE | Cr4::PAE | Cr4::PSE | Cr4::SMEP | Cr4::SMAP | Cr4::PKE | Cr4::LA57;

/// Whether a change of CR0 or CR4 reloads the PDPTEs with PAE paging (SDM vol. 3, 5.4.1): CR0.CD,
/// NW or PG, or CR4.PAE, PGE, PSE or SMEP changed.
#[inline]
pub const fn reloads_pdptes(cr0_changed: u64, cr4_changed: u64) -> bool {
    cr0_changed & (Cr0::CD | Cr0::NW | Cr0::PG) != 0
        || cr4_changed & (Cr4::PAE | Cr4::PGE | Cr4::PSE | Cr4::SMEP) != 0
}

/// Checks the source operand of MOV to CR3, [`Cr3::NO_FLUSH`] included, for a guest with
/// `max_physical_bits` (SDM vol. 3, table 5-12 and vol. 2, MOV).
#[inline]
pub const fn check_cr3(
    cr3: Cr3,
    cr4: Cr4,
    efer: Efer,
    max_physical_bits: u32,
) -> Result<(), Illegal> {
    // Outside long mode only 32 bits are loaded, so nothing can be reserved.
    if !efer.has(Efer::LMA) {
        return Ok(());
    }
    let raw = if cr4.has(Cr4::PCIDE) {
        cr3.0 & !Cr3::NO_FLUSH
    } else {
        cr3.0
    };
    if raw & !physical_mask(max_physical_bits) != 0 {
        return Err(Illegal);
    }
    Ok(())
}

/// The mask of physical addresses of `bits` bits; 64 and more give all ones.
#[inline]
pub const fn physical_mask(bits: u32) -> u64 {
    match 1u64.checked_shl(bits) {
        Some(limit) => limit.wrapping_sub(1),
        None => u64::MAX,
    }
}

/// Checks WRMSR of EFER from `old` to `new` and gives the value to be stored: LMA is read-only and
/// keeps its value (SDM vol. 3, 2.2.1 and 11.8.5). `reserved` holds the bits that the guest's CPU
/// lacks.
#[inline]
pub const fn check_efer_change(
    old: Efer,
    new: Efer,
    reserved: u64,
    cr0: Cr0,
) -> Result<Efer, Illegal> {
    if new.0 & reserved & !Efer::LMA != 0 {
        return Err(Illegal);
    }
    if cr0.has(Cr0::PG) && old.changed(new) & Efer::LME != 0 {
        return Err(Illegal);
    }
    Ok(Efer((new.0 & !Efer::LMA) | (old.0 & Efer::LMA)))
}

/// Checks a value for XSETBV of XCR0 (SDM vol. 1, 13.3). `supported` holds the components that the
/// guest's CPUID offers.
#[inline]
pub const fn check_xcr0(xcr0: Xcr0, supported: u64) -> Result<(), Illegal> {
    let x = xcr0.0;
    let avx512 = x & Xcr0::AVX512;
    let mpx = x & Xcr0::MPX;
    let amx = x & Xcr0::AMX;
    let legal = x & !supported == 0
        && x & Xcr0::X87 != 0
        && (x & Xcr0::AVX == 0 || x & Xcr0::SSE != 0)
        && (avx512 == 0 || (avx512 == Xcr0::AVX512 && x & Xcr0::AVX != 0))
        && (mpx == 0 || mpx == Xcr0::MPX)
        && (amx == 0 || amx == Xcr0::AMX);
    if legal {
        Ok(())
    } else {
        Err(Illegal)
    }
}

/// What DR6 holds after `value` was written to it on a CPU whose DR6 has the writable bits
/// [`Dr6::WRITABLE`]; #GP(0) with any of bits 63:32.
#[inline]
pub const fn dr6_written(value: u64) -> Result<Dr6, Illegal> {
    if !fits_32(value) {
        return Err(Illegal);
    }
    Ok(Dr6((value & Dr6::WRITABLE) | Dr6::RESET))
}

/// What DR7 holds after `value` was written to it; #GP(0) with any of bits 63:32.
#[inline]
pub const fn dr7_written(value: u64) -> Result<Dr7, Illegal> {
    if !fits_32(value) {
        return Err(Illegal);
    }
    Ok(Dr7((value & Dr7::WRITABLE) | Dr7::RESET))
}

#[cfg(test)]
#[path = "control_tests.rs"]
mod tests;
