// SPDX-License-Identifier: GPL-2.0

//! The CPUID feature bits that rvisor knows by name (SDM vol. 2, CPUID).

/// One of the four registers that CPUID fills.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Register {
    /// EAX.
    Eax,
    /// EBX.
    Ebx,
    /// ECX.
    Ecx,
    /// EDX.
    Edx,
}

/// The place of a feature bit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Feature {
    /// The leaf.
    pub function: u32,
    /// The subleaf.
    pub index: u32,
    /// The register.
    pub register: Register,
    /// The bit's mask in the register.
    pub mask: u32,
}

macro_rules! features {
    ($($function:literal $index:literal $register:ident { $($(#[$doc:meta])* $name:ident = $bit:literal;)* })*) => {
        impl Feature {
            $($(
                $(#[$doc])*
                pub const $name: Self = Self {
                    function: $function,
                    index: $index,
                    register: Register::$register,
                    mask: 1 << $bit,
                };
            )*)*
        }
    };
}

features! {
    0x1 0 Ecx {
        /// SSE3.
        SSE3 = 0;
        /// PCLMULQDQ.
        PCLMULQDQ = 1;
        /// MONITOR and MWAIT.
        MONITOR = 3;
        /// VMX.
        VMX = 5;
        /// SSSE3.
        SSSE3 = 9;
        /// FMA3.
        FMA = 12;
        /// CMPXCHG16B.
        CX16 = 13;
        /// IA32_PERF_CAPABILITIES.
        PDCM = 15;
        /// Process-context identifiers.
        PCID = 17;
        /// SSE4.1.
        SSE4_1 = 19;
        /// SSE4.2.
        SSE4_2 = 20;
        /// x2APIC.
        X2APIC = 21;
        /// MOVBE.
        MOVBE = 22;
        /// POPCNT.
        POPCNT = 23;
        /// The local APIC's timer can wait for a TSC value.
        TSC_DEADLINE = 24;
        /// AES instructions.
        AES = 25;
        /// XSAVE, XCR0.
        XSAVE = 26;
        /// CR4.OSXSAVE is set.
        OSXSAVE = 27;
        /// AVX.
        AVX = 28;
        /// Half-precision conversions.
        F16C = 29;
        /// RDRAND.
        RDRAND = 30;
        /// Always 0 on a real machine: a hypervisor is there.
        HYPERVISOR = 31;
    }
    0x1 0 Edx {
        /// The x87 FPU.
        FPU = 0;
        /// Virtual-8086 mode extensions.
        VME = 1;
        /// Debugging extensions.
        DE = 2;
        /// 4 MiB pages.
        PSE = 3;
        /// RDTSC.
        TSC = 4;
        /// RDMSR and WRMSR.
        MSR = 5;
        /// Physical-address extension.
        PAE = 6;
        /// Machine-check exception.
        MCE = 7;
        /// CMPXCHG8B.
        CX8 = 8;
        /// The local APIC is there and on.
        APIC = 9;
        /// SYSENTER and SYSEXIT.
        SEP = 11;
        /// Memory-type range registers.
        MTRR = 12;
        /// Global pages.
        PGE = 13;
        /// Machine-check architecture.
        MCA = 14;
        /// CMOV.
        CMOV = 15;
        /// The page attribute table.
        PAT = 16;
        /// 4 MiB pages above 4 GiB.
        PSE36 = 17;
        /// CLFLUSH.
        CLFLUSH = 19;
        /// MMX.
        MMX = 23;
        /// FXSAVE and FXRSTOR.
        FXSR = 24;
        /// SSE.
        SSE = 25;
        /// SSE2.
        SSE2 = 26;
        /// The CPU snoops its own caches.
        SELF_SNOOP = 27;
    }
    0x7 0 Ebx {
        /// RDFSBASE and its kin.
        FSGSBASE = 0;
        /// IA32_TSC_ADJUST.
        TSC_ADJUST = 1;
        /// BMI1.
        BMI1 = 3;
        /// Hardware lock elision.
        HLE = 4;
        /// AVX2.
        AVX2 = 5;
        /// The x87 data pointer changes on exceptions only.
        FDP_EXCEPTION_ONLY = 6;
        /// Supervisor-mode execution prevention.
        SMEP = 7;
        /// BMI2.
        BMI2 = 8;
        /// Fast REP MOVSB.
        ERMS = 9;
        /// INVPCID.
        INVPCID = 10;
        /// Restricted transactional memory.
        RTM = 11;
        /// The x87 selectors are zero.
        ZERO_FCS_FDS = 13;
        /// AVX-512 foundation.
        AVX512F = 16;
        /// AVX-512 doubleword and quadword.
        AVX512DQ = 17;
        /// RDSEED.
        RDSEED = 18;
        /// ADCX and ADOX.
        ADX = 19;
        /// Supervisor-mode access prevention.
        SMAP = 20;
        /// AVX-512 integer FMA.
        AVX512IFMA = 21;
        /// CLFLUSHOPT.
        CLFLUSHOPT = 23;
        /// CLWB.
        CLWB = 24;
        /// AVX-512 conflict detection.
        AVX512CD = 28;
        /// SHA instructions.
        SHA = 29;
        /// AVX-512 byte and word.
        AVX512BW = 30;
        /// AVX-512 for shorter vectors.
        AVX512VL = 31;
    }
    0x7 0 Ecx {
        /// AVX-512 byte manipulation.
        AVX512VBMI = 1;
        /// User-mode instruction prevention.
        UMIP = 2;
        /// Protection keys for user pages.
        PKU = 3;
        /// CR4.PKE is set.
        OSPKE = 4;
        /// AVX-512 byte manipulation 2.
        AVX512_VBMI2 = 6;
        /// Galois-field instructions.
        GFNI = 8;
        /// AES on vectors.
        VAES = 9;
        /// PCLMULQDQ on vectors.
        VPCLMULQDQ = 10;
        /// AVX-512 neural-network instructions.
        AVX512_VNNI = 11;
        /// AVX-512 bit algorithms.
        AVX512_BITALG = 12;
        /// AVX-512 population count.
        AVX512_VPOPCNTDQ = 14;
        /// 57-bit linear addresses.
        LA57 = 16;
        /// RDPID.
        RDPID = 22;
        /// CLDEMOTE.
        CLDEMOTE = 25;
        /// MOVDIRI.
        MOVDIRI = 27;
        /// MOVDIR64B.
        MOVDIR64B = 28;
    }
    0x7 0 Edx {
        /// Fast short REP MOV.
        FSRM = 4;
        /// AVX-512 intersection.
        AVX512_VP2INTERSECT = 8;
        /// VERW clears buffers.
        MD_CLEAR = 10;
        /// SERIALIZE.
        SERIALIZE = 14;
        /// Suspending load tracking in transactions.
        TSXLDTRK = 16;
        /// AVX-512 half precision.
        AVX512_FP16 = 23;
        /// IBRS in IA32_SPEC_CTRL, IBPB in IA32_PRED_CMD.
        SPEC_CTRL = 26;
        /// STIBP in IA32_SPEC_CTRL.
        STIBP = 27;
        /// IA32_FLUSH_CMD.
        FLUSH_L1D = 28;
        /// IA32_ARCH_CAPABILITIES.
        ARCH_CAPABILITIES = 29;
        /// SSBD in IA32_SPEC_CTRL.
        SSBD = 31;
    }
    0x7 1 Eax {
        /// SHA-512 instructions.
        SHA512 = 0;
        /// SM3 instructions.
        SM3 = 1;
        /// SM4 instructions.
        SM4 = 2;
        /// Neural-network instructions on AVX.
        AVX_VNNI = 4;
        /// AVX-512 with BF16.
        AVX512_BF16 = 5;
        /// CMPccXADD.
        CMPCCXADD = 7;
        /// Fast zero-length REP MOVSB.
        FZRM = 10;
        /// Fast short REP STOSB.
        FSRS = 11;
        /// Fast short REP CMPSB.
        FSRC = 12;
        /// Integer FMA on AVX.
        AVX_IFMA = 23;
    }
    0x7 1 Edx {
        /// 8-bit neural-network instructions on AVX.
        AVX_VNNI_INT8 = 4;
        /// Conversions without exceptions on AVX.
        AVX_NE_CONVERT = 5;
        /// 16-bit neural-network instructions on AVX.
        AVX_VNNI_INT16 = 10;
        /// PREFETCHIT.
        PREFETCHI = 14;
    }
    0x7 2 Edx {
        /// PSFD in IA32_SPEC_CTRL.
        PSFD = 0;
        /// IPRED_DIS_U and IPRED_DIS_S in IA32_SPEC_CTRL.
        IPRED_CTRL = 1;
        /// RRSBA_DIS_U and RRSBA_DIS_S in IA32_SPEC_CTRL.
        RRSBA_CTRL = 2;
        /// DDPD_U in IA32_SPEC_CTRL.
        DDPD_U = 3;
        /// BHI_DIS_S in IA32_SPEC_CTRL.
        BHI_CTRL = 4;
        /// Free of data-dependent timing through the prefetcher's MXCSR.
        MCDT_NO = 5;
    }
    0xd 1 Eax {
        /// XSAVEOPT.
        XSAVEOPT = 0;
        /// XSAVEC.
        XSAVEC = 1;
        /// XGETBV with ECX = 1.
        XGETBV1 = 2;
        /// XSAVES, XRSTORS and IA32_XSS.
        XSAVES = 3;
    }
    0x8000_0001 0 Ecx {
        /// LAHF and SAHF in 64-bit mode.
        LAHF_LM = 0;
        /// LZCNT.
        LZCNT = 5;
        /// PREFETCHW.
        PREFETCHW = 8;
    }
    0x8000_0001 0 Edx {
        /// SYSCALL and SYSRET.
        SYSCALL = 11;
        /// Execute disable.
        NX = 20;
        /// 1 GiB pages.
        GBPAGES = 26;
        /// RDTSCP.
        RDTSCP = 27;
        /// Long mode.
        LM = 29;
    }
    0x8000_0007 0 Edx {
        /// The TSC runs at one rate in every state.
        INVARIANT_TSC = 8;
    }
}

/// The masks of several features, which all stand in the same register, together.
pub(crate) const fn mask(features: &[Feature]) -> u32 {
    let mut rest = features;
    let mut mask = 0;
    while let [first, others @ ..] = rest {
        mask |= first.mask;
        rest = others;
    }
    mask
}
