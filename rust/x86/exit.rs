// SPDX-License-Identifier: GPL-2.0

//! VM-exit reasons and the exit qualifications that go with them (SDM vol. 3, appendix C and 29.2).

use super::address::{Gpa, Gva};

/// A basic exit reason; a newtype, since a CPU may report one that is not named here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(transparent)]
pub struct ExitReason(pub u32);

macro_rules! reasons {
    ($($(#[$doc:meta])* $name:ident = $value:expr,)*) => {
        impl ExitReason {
            $($(#[$doc])* pub const $name: Self = Self($value);)*
        }
    };
}

reasons! {
    /// Exception or NMI.
    EXCEPTION_OR_NMI = 0,
    /// External interrupt.
    EXTERNAL_INTERRUPT = 1,
    /// Triple fault.
    TRIPLE_FAULT = 2,
    /// INIT signal.
    INIT_SIGNAL = 3,
    /// Interrupt window.
    INTERRUPT_WINDOW = 7,
    /// NMI window.
    NMI_WINDOW = 8,
    /// Task switch.
    TASK_SWITCH = 9,
    /// CPUID.
    CPUID = 10,
    /// GETSEC.
    GETSEC = 11,
    /// HLT.
    HLT = 12,
    /// INVD.
    INVD = 13,
    /// INVLPG.
    INVLPG = 14,
    /// RDPMC.
    RDPMC = 15,
    /// RSM.
    RSM = 17,
    /// VMCALL.
    VMCALL = 18,
    /// VMCLEAR, the first of the VMX instructions.
    VMCLEAR = 19,
    /// VMXON, the last of the VMX instructions 19 to 27.
    VMXON = 27,
    /// Control-register access.
    CR_ACCESS = 28,
    /// MOV DR.
    DR_ACCESS = 29,
    /// I/O instruction.
    IO_INSTRUCTION = 30,
    /// RDMSR.
    RDMSR = 31,
    /// WRMSR.
    WRMSR = 32,
    /// VM-entry failure: invalid guest state.
    ENTRY_FAILURE_GUEST_STATE = 33,
    /// VM-entry failure: MSR loading.
    ENTRY_FAILURE_MSR_LOADING = 34,
    /// MWAIT.
    MWAIT = 36,
    /// MONITOR.
    MONITOR = 39,
    /// PAUSE.
    PAUSE = 40,
    /// VM-entry failure: machine check.
    ENTRY_FAILURE_MACHINE_CHECK = 41,
    /// The guest's TPR fell below the TPR threshold.
    TPR_BELOW_THRESHOLD = 43,
    /// EPT violation.
    EPT_VIOLATION = 48,
    /// EPT misconfiguration.
    EPT_MISCONFIGURATION = 49,
    /// INVEPT.
    INVEPT = 50,
    /// INVVPID.
    INVVPID = 53,
    /// WBINVD.
    WBINVD = 54,
    /// XSETBV.
    XSETBV = 55,
    /// INVPCID.
    INVPCID = 58,
    /// VMFUNC.
    VMFUNC = 59,
    /// ENCLS.
    ENCLS = 60,
    /// XSAVES.
    XSAVES = 63,
    /// XRSTORS.
    XRSTORS = 64,
    /// PCONFIG.
    PCONFIG = 65,
    /// UMWAIT.
    UMWAIT = 67,
    /// TPAUSE.
    TPAUSE = 68,
    /// LOADIWKEY.
    LOADIWKEY = 69,
    /// ENCLV.
    ENCLV = 70,
    /// SEAMCALL.
    SEAMCALL = 76,
    /// TDCALL.
    TDCALL = 77,
    /// RDMSRLIST.
    RDMSRLIST = 78,
    /// WRMSRLIST.
    WRMSRLIST = 79,
    /// RDMSR with the MSR's number in the instruction.
    RDMSR_IMMEDIATE = 84,
    /// WRMSRNS with the MSR's number in the instruction.
    WRMSRNS_IMMEDIATE = 85,
}

impl ExitReason {
    /// Whether the exit is an instruction that no guest of rvisor's is offered, and which therefore
    /// raises #UD: those of VMX, SMX, SMM, SGX and TDX, and of features that CPUID does not show. Some of
    /// them fault before they can exit; none may ever count as an error of the hypervisor.
    pub const fn is_never_offered(self) -> bool {
        matches!(
            self,
            Self::GETSEC
                | Self::RSM
                | Self(19..=27)
                | Self::MWAIT
                | Self::MONITOR
                | Self::INVEPT
                | Self::INVVPID
                | Self::INVPCID
                | Self::VMFUNC
                | Self::ENCLS
                | Self::XSAVES
                | Self::XRSTORS
                | Self::PCONFIG
                | Self::UMWAIT
                | Self::TPAUSE
                | Self::LOADIWKEY
                | Self::ENCLV
                | Self::SEAMCALL
                | Self::TDCALL
                | Self::RDMSRLIST
                | Self::WRMSRLIST
                | Self::RDMSR_IMMEDIATE
                | Self::WRMSRNS_IMMEDIATE
        )
    }
}

/// The exit-reason field whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(transparent)]
pub struct ExitReasonField(pub u32);

impl ExitReasonField {
    /// Bits 15:0.
    #[inline]
    pub const fn basic(self) -> ExitReason {
        ExitReason(self.0 & 0xffff)
    }

    /// Bit 31: the VM entry failed.
    #[inline]
    pub const fn is_entry_failure(self) -> bool {
        self.0 & (1 << 31) != 0
    }
}

/// What a control-register access does (SDM vol. 3, table 29-3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CrAccess {
    /// MOV to the control register from the general register numbered `source`.
    MovTo {
        /// The control register's number.
        register: u8,
        /// The general register's number.
        source: u8,
    },
    /// MOV from the control register to a general register.
    MovFrom {
        /// The control register's number.
        register: u8,
        /// The general register's number.
        destination: u8,
    },
    /// CLTS.
    Clts,
    /// LMSW.
    Lmsw {
        /// The 16-bit source operand.
        source: u16,
    },
}

impl CrAccess {
    /// Decodes the exit qualification.
    #[inline]
    pub const fn from_qualification(qualification: u64) -> Self {
        let register = (qualification & 0xf) as u8;
        let general = ((qualification >> 8) & 0xf) as u8;
        match (qualification >> 4) & 3 {
            0 => Self::MovTo {
                register,
                source: general,
            },
            1 => Self::MovFrom {
                register,
                destination: general,
            },
            2 => Self::Clts,
            _ => Self::Lmsw {
                source: ((qualification >> 16) & 0xffff) as u16,
            },
        }
    }
}

/// A MOV to or from a debug register (SDM vol. 3, table 29-4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DrAccess {
    /// The debug register's number, 0 to 7.
    pub register: u8,
    /// A move from the debug register.
    pub is_read: bool,
    /// The general register's number.
    pub general: u8,
}

impl DrAccess {
    /// Decodes the exit qualification.
    #[inline]
    pub const fn from_qualification(qualification: u64) -> Self {
        Self {
            register: (qualification & 7) as u8,
            is_read: qualification & (1 << 4) != 0,
            general: ((qualification >> 8) & 0xf) as u8,
        }
    }
}

/// An I/O instruction (SDM vol. 3, table 29-5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IoAccess {
    /// 1, 2 or 4 bytes.
    pub size: u8,
    /// IN or INS.
    pub is_in: bool,
    /// INS or OUTS.
    pub is_string: bool,
    /// REP prefix.
    pub is_rep: bool,
    /// The port.
    pub port: u16,
}

impl IoAccess {
    /// Decodes the exit qualification.
    #[inline]
    pub const fn from_qualification(qualification: u64) -> Self {
        Self {
            size: match qualification & 7 {
                0 => 1,
                1 => 2,
                _ => 4,
            },
            is_in: qualification & (1 << 3) != 0,
            is_string: qualification & (1 << 4) != 0,
            is_rep: qualification & (1 << 5) != 0,
            port: ((qualification >> 16) & 0xffff) as u16,
        }
    }
}

/// An EPT violation (SDM vol. 3, table 29-7).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EptViolation {
    /// The guest-physical address.
    pub gpa: Gpa,
    /// The linear address, where the CPU gives one.
    pub gva: Option<Gva>,
    /// A data read.
    pub is_read: bool,
    /// A data write.
    pub is_write: bool,
    /// An instruction fetch.
    pub is_fetch: bool,
    /// The access was to the translated address itself, not to a paging structure on the way.
    pub is_translated: bool,
    /// It happened while IRET had unblocked NMIs.
    pub nmi_unblocking: bool,
}

impl EptViolation {
    /// Decodes the exit qualification.
    #[inline]
    pub const fn from_qualification(qualification: u64, gpa: Gpa, gva: Gva) -> Self {
        Self {
            gpa,
            gva: if qualification & (1 << 7) != 0 {
                Some(gva)
            } else {
                None
            },
            is_read: qualification & (1 << 0) != 0,
            is_write: qualification & (1 << 1) != 0,
            is_fetch: qualification & (1 << 2) != 0,
            is_translated: qualification & (1 << 8) != 0,
            nmi_unblocking: qualification & (1 << 12) != 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn qualifications_decode_as_the_sdm_lays_them_out() {
        // OUT DX, AX to port 0x3f8: size 2 bytes, out, not string.
        let io = IoAccess::from_qualification(0x03f8_0001);
        assert_eq!((io.size, io.is_in, io.port), (2, false, 0x3f8));
        assert_eq!(
            CrAccess::from_qualification(0x0000_0304),
            CrAccess::MovTo {
                register: 4,
                source: 3
            }
        );
        assert_eq!(
            CrAccess::from_qualification(0x0012_0030),
            CrAccess::Lmsw { source: 0x12 }
        );
        let dr = DrAccess::from_qualification(0x217);
        assert_eq!((dr.register, dr.is_read, dr.general), (7, true, 2));
    }
}
