// SPDX-License-Identifier: GPL-2.0

//! VMCS field encodings, by width (SDM vol. 3, appendix B), and what the event fields hold.

macro_rules! fields {
    ($(#[$doc:meta])* $type:ident { $($(#[$field_doc:meta])* $name:ident = $encoding:expr,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr(transparent)]
        pub struct $type(u32);

        impl $type {
            /// The encoding that VMREAD and VMWRITE take.
            #[inline]
            pub const fn encoding(self) -> u64 {
                self.0 as u64
            }

            $($(#[$field_doc])* pub const $name: Self = Self($encoding);)*
        }
    };
}

fields! {
    /// A 16-bit field.
    Field16 {
        /// Virtual-processor identifier.
        VPID = 0x0000,
        /// Guest ES selector; CS, SS, DS, FS, GS, LDTR and TR follow in steps of 2.
        GUEST_ES_SELECTOR = 0x0800,
        /// Guest LDTR selector.
        GUEST_LDTR_SELECTOR = 0x080c,
        /// Guest TR selector.
        GUEST_TR_SELECTOR = 0x080e,
        /// Host ES selector.
        HOST_ES_SELECTOR = 0x0c00,
        /// Host CS selector.
        HOST_CS_SELECTOR = 0x0c02,
        /// Host SS selector.
        HOST_SS_SELECTOR = 0x0c04,
        /// Host DS selector.
        HOST_DS_SELECTOR = 0x0c06,
        /// Host FS selector.
        HOST_FS_SELECTOR = 0x0c08,
        /// Host GS selector.
        HOST_GS_SELECTOR = 0x0c0a,
        /// Host TR selector.
        HOST_TR_SELECTOR = 0x0c0c,
    }
}

fields! {
    /// A 32-bit field.
    Field32 {
        /// Pin-based VM-execution controls.
        PIN_BASED_CONTROLS = 0x4000,
        /// Primary processor-based VM-execution controls.
        PRIMARY_CONTROLS = 0x4002,
        /// Exception bitmap.
        EXCEPTION_BITMAP = 0x4004,
        /// Page-fault error-code mask.
        PAGE_FAULT_ERROR_CODE_MASK = 0x4006,
        /// Page-fault error-code match.
        PAGE_FAULT_ERROR_CODE_MATCH = 0x4008,
        /// CR3-target count.
        CR3_TARGET_COUNT = 0x400a,
        /// Primary VM-exit controls.
        EXIT_CONTROLS = 0x400c,
        /// VM-exit MSR-store count.
        EXIT_MSR_STORE_COUNT = 0x400e,
        /// VM-exit MSR-load count.
        EXIT_MSR_LOAD_COUNT = 0x4010,
        /// VM-entry controls.
        ENTRY_CONTROLS = 0x4012,
        /// VM-entry MSR-load count.
        ENTRY_MSR_LOAD_COUNT = 0x4014,
        /// VM-entry interruption information.
        ENTRY_INTERRUPTION_INFO = 0x4016,
        /// VM-entry exception error code.
        ENTRY_EXCEPTION_ERROR_CODE = 0x4018,
        /// VM-entry instruction length.
        ENTRY_INSTRUCTION_LENGTH = 0x401a,
        /// TPR threshold.
        TPR_THRESHOLD = 0x401c,
        /// Secondary processor-based VM-execution controls.
        SECONDARY_CONTROLS = 0x401e,
        /// PLE_Gap: PAUSEs no further apart than this, in TSC cycles, are one loop.
        PLE_GAP = 0x4020,
        /// PLE_Window: a loop that lasts longer than this, in TSC cycles, exits.
        PLE_WINDOW = 0x4022,
        /// VM-instruction error.
        INSTRUCTION_ERROR = 0x4400,
        /// Exit reason.
        EXIT_REASON = 0x4402,
        /// VM-exit interruption information.
        EXIT_INTERRUPTION_INFO = 0x4404,
        /// VM-exit interruption error code.
        EXIT_INTERRUPTION_ERROR_CODE = 0x4406,
        /// IDT-vectoring information.
        IDT_VECTORING_INFO = 0x4408,
        /// IDT-vectoring error code.
        IDT_VECTORING_ERROR_CODE = 0x440a,
        /// VM-exit instruction length.
        EXIT_INSTRUCTION_LENGTH = 0x440c,
        /// VM-exit instruction information.
        EXIT_INSTRUCTION_INFO = 0x440e,
        /// Guest ES limit; CS, SS, DS, FS, GS, LDTR and TR follow in steps of 2.
        GUEST_ES_LIMIT = 0x4800,
        /// Guest LDTR limit.
        GUEST_LDTR_LIMIT = 0x480c,
        /// Guest TR limit.
        GUEST_TR_LIMIT = 0x480e,
        /// Guest GDTR limit.
        GUEST_GDTR_LIMIT = 0x4810,
        /// Guest IDTR limit.
        GUEST_IDTR_LIMIT = 0x4812,
        /// Guest ES access rights; CS, SS, DS, FS, GS, LDTR and TR follow in steps of 2.
        GUEST_ES_ACCESS_RIGHTS = 0x4814,
        /// Guest LDTR access rights.
        GUEST_LDTR_ACCESS_RIGHTS = 0x4820,
        /// Guest TR access rights.
        GUEST_TR_ACCESS_RIGHTS = 0x4822,
        /// Guest interruptibility state.
        GUEST_INTERRUPTIBILITY = 0x4824,
        /// Guest activity state.
        GUEST_ACTIVITY_STATE = 0x4826,
        /// Guest IA32_SYSENTER_CS.
        GUEST_SYSENTER_CS = 0x482a,
        /// Host IA32_SYSENTER_CS.
        HOST_SYSENTER_CS = 0x4c00,
    }
}

fields! {
    /// A 64-bit field.
    Field64 {
        /// Address of the MSR bitmap.
        MSR_BITMAP = 0x2004,
        /// TSC offset.
        TSC_OFFSET = 0x2010,
        /// Address of the virtual-APIC page.
        VIRTUAL_APIC_PAGE = 0x2012,
        /// EPT pointer.
        EPT_POINTER = 0x201a,
        /// XSS-exiting bitmap.
        XSS_EXITING_BITMAP = 0x202c,
        /// ENCLS-exiting bitmap.
        ENCLS_EXITING_BITMAP = 0x202e,
        /// ENCLV-exiting bitmap.
        ENCLV_EXITING_BITMAP = 0x2036,
        /// Guest-physical address of an EPT violation or misconfiguration.
        GUEST_PHYSICAL_ADDRESS = 0x2400,
        /// VMCS link pointer.
        VMCS_LINK_POINTER = 0x2800,
        /// Guest IA32_DEBUGCTL.
        GUEST_DEBUGCTL = 0x2802,
        /// Guest IA32_PAT.
        GUEST_PAT = 0x2804,
        /// Guest IA32_EFER.
        GUEST_EFER = 0x2806,
        /// Guest PDPTE 0; 1, 2 and 3 follow in steps of 2.
        GUEST_PDPTE0 = 0x280a,
        /// Host IA32_PAT.
        HOST_PAT = 0x2c00,
        /// Host IA32_EFER.
        HOST_EFER = 0x2c02,
    }
}

fields! {
    /// A natural-width field.
    FieldNatural {
        /// CR0 guest/host mask.
        CR0_MASK = 0x6000,
        /// CR4 guest/host mask.
        CR4_MASK = 0x6002,
        /// CR0 read shadow.
        CR0_READ_SHADOW = 0x6004,
        /// CR4 read shadow.
        CR4_READ_SHADOW = 0x6006,
        /// Exit qualification.
        EXIT_QUALIFICATION = 0x6400,
        /// Guest-linear address.
        GUEST_LINEAR_ADDRESS = 0x640a,
        /// Guest CR0.
        GUEST_CR0 = 0x6800,
        /// Guest CR3.
        GUEST_CR3 = 0x6802,
        /// Guest CR4.
        GUEST_CR4 = 0x6804,
        /// Guest ES base; CS, SS, DS, FS, GS, LDTR and TR follow in steps of 2.
        GUEST_ES_BASE = 0x6806,
        /// Guest FS base.
        GUEST_FS_BASE = 0x680e,
        /// Guest GS base.
        GUEST_GS_BASE = 0x6810,
        /// Guest LDTR base.
        GUEST_LDTR_BASE = 0x6812,
        /// Guest TR base.
        GUEST_TR_BASE = 0x6814,
        /// Guest GDTR base.
        GUEST_GDTR_BASE = 0x6816,
        /// Guest IDTR base.
        GUEST_IDTR_BASE = 0x6818,
        /// Guest DR7.
        GUEST_DR7 = 0x681a,
        /// Guest RSP.
        GUEST_RSP = 0x681c,
        /// Guest RIP.
        GUEST_RIP = 0x681e,
        /// Guest RFLAGS.
        GUEST_RFLAGS = 0x6820,
        /// Guest pending debug exceptions.
        GUEST_PENDING_DEBUG = 0x6822,
        /// Guest IA32_SYSENTER_ESP.
        GUEST_SYSENTER_ESP = 0x6824,
        /// Guest IA32_SYSENTER_EIP.
        GUEST_SYSENTER_EIP = 0x6826,
        /// Host CR0.
        HOST_CR0 = 0x6c00,
        /// Host CR3.
        HOST_CR3 = 0x6c02,
        /// Host CR4.
        HOST_CR4 = 0x6c04,
        /// Host FS base.
        HOST_FS_BASE = 0x6c06,
        /// Host GS base.
        HOST_GS_BASE = 0x6c08,
        /// Host TR base.
        HOST_TR_BASE = 0x6c0a,
        /// Host GDTR base.
        HOST_GDTR_BASE = 0x6c0c,
        /// Host IDTR base.
        HOST_IDTR_BASE = 0x6c0e,
        /// Host IA32_SYSENTER_ESP.
        HOST_SYSENTER_ESP = 0x6c10,
        /// Host IA32_SYSENTER_EIP.
        HOST_SYSENTER_EIP = 0x6c12,
        /// Host RSP.
        HOST_RSP = 0x6c14,
        /// Host RIP.
        HOST_RIP = 0x6c16,
    }
}

impl Field64 {
    /// Guest PDPTE `number`, 0 to 3.
    #[inline]
    pub const fn guest_pdpte(number: u32) -> Self {
        Self(Self::GUEST_PDPTE0.0.wrapping_add((number & 3) << 1))
    }
}

/// The guest's segment registers as the VMCS numbers them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum VmcsSegment {
    /// ES.
    Es = 0,
    /// CS.
    Cs = 1,
    /// SS.
    Ss = 2,
    /// DS.
    Ds = 3,
    /// FS.
    Fs = 4,
    /// GS.
    Gs = 5,
    /// LDTR.
    Ldtr = 6,
    /// TR.
    Tr = 7,
}

impl VmcsSegment {
    const fn step(self) -> u32 {
        (self as u32) << 1
    }

    /// The selector field.
    #[inline]
    pub const fn selector(self) -> Field16 {
        Field16(Field16::GUEST_ES_SELECTOR.0 | self.step())
    }

    /// The limit field.
    #[inline]
    pub const fn limit(self) -> Field32 {
        Field32(Field32::GUEST_ES_LIMIT.0 | self.step())
    }

    /// The access-rights field.
    #[inline]
    pub const fn access_rights(self) -> Field32 {
        Field32(Field32::GUEST_ES_ACCESS_RIGHTS.0.wrapping_add(self.step()))
    }

    /// The base field.
    #[inline]
    pub const fn base(self) -> FieldNatural {
        FieldNatural(FieldNatural::GUEST_ES_BASE.0.wrapping_add(self.step()))
    }
}

impl From<super::segment::SegmentRegister> for VmcsSegment {
    #[inline]
    fn from(register: super::segment::SegmentRegister) -> Self {
        use super::segment::SegmentRegister as R;
        match register {
            R::Es => Self::Es,
            R::Cs => Self::Cs,
            R::Ss => Self::Ss,
            R::Ds => Self::Ds,
            R::Fs => Self::Fs,
            R::Gs => Self::Gs,
        }
    }
}

/// An event as VM-entry injects it and VM-exit reports it (SDM vol. 3, tables 26-17 and 26-18).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(transparent)]
pub struct InterruptionInfo(pub u32);

impl InterruptionInfo {
    /// Bit 31: the rest is valid.
    pub const VALID: u32 = 1 << 31;
    /// Bit 11: an error code goes with it.
    pub const HAS_ERROR_CODE: u32 = 1 << 11;
    /// Bit 12 of the VM-exit field: NMIs had been unblocked by IRET.
    pub const NMI_UNBLOCKING: u32 = 1 << 12;
    /// Type 0: external interrupt.
    pub const EXTERNAL_INTERRUPT: u32 = 0;
    /// Type 2: NMI.
    pub const NMI: u32 = 2;
    /// Type 3: hardware exception.
    pub const HARDWARE_EXCEPTION: u32 = 3;
    /// Type 4: software interrupt (INT n).
    pub const SOFTWARE_INTERRUPT: u32 = 4;
    /// Type 5: privileged software exception (INT1).
    pub const PRIVILEGED_SOFTWARE_EXCEPTION: u32 = 5;
    /// Type 6: software exception (INT3, INTO).
    pub const SOFTWARE_EXCEPTION: u32 = 6;

    /// A valid event of `kind` (bits 10:8) at `vector`.
    #[inline]
    pub const fn new(kind: u32, vector: u8, has_error_code: bool) -> Self {
        let code = if has_error_code {
            Self::HAS_ERROR_CODE
        } else {
            0
        };
        Self(Self::VALID | code | ((kind & 7) << 8) | vector as u32)
    }

    /// Bit 31.
    #[inline]
    pub const fn is_valid(self) -> bool {
        self.0 & Self::VALID != 0
    }

    /// Bits 10:8, the type.
    #[inline]
    pub const fn kind(self) -> u32 {
        (self.0 >> 8) & 7
    }

    /// Bits 7:0, the vector.
    #[inline]
    pub const fn vector(self) -> u8 {
        (self.0 & 0xff) as u8
    }

    /// Bit 11.
    #[inline]
    pub const fn has_error_code(self) -> bool {
        self.0 & Self::HAS_ERROR_CODE != 0
    }

    /// What VM-entry may be given to deliver the same event again: the reserved bits cleared.
    #[inline]
    pub const fn for_reinjection(self) -> Self {
        Self(self.0 & (Self::VALID | Self::HAS_ERROR_CODE | 0x7ff))
    }

    /// The same event, which pushes no error code.
    #[inline]
    pub const fn without_error_code(self) -> Self {
        Self(self.0 & !Self::HAS_ERROR_CODE)
    }

    /// Whether delivery pushes the address behind the instruction, so that its length is needed.
    #[inline]
    pub const fn needs_instruction_length(self) -> bool {
        matches!(
            self.kind(),
            Self::SOFTWARE_INTERRUPT
                | Self::PRIVILEGED_SOFTWARE_EXCEPTION
                | Self::SOFTWARE_EXCEPTION
        )
    }
}

/// Guest interruptibility state (SDM vol. 3, table 26-3).
pub mod interruptibility {
    /// Blocking by STI.
    pub const STI: u32 = 1 << 0;
    /// Blocking by MOV SS.
    pub const MOV_SS: u32 = 1 << 1;
    /// Blocking by NMI.
    pub const NMI: u32 = 1 << 3;
}

/// Guest activity states (SDM vol. 3, 26.4.2).
pub mod activity {
    /// Executing instructions.
    pub const ACTIVE: u32 = 0;
}
