// SPDX-License-Identifier: GPL-2.0

//! Interrupt and exception vectors, APIC identities and global system interrupts.

/// An interrupt or exception vector, 0 to 255 (SDM vol. 3, 7.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(transparent)]
pub struct Vector(pub u8);

impl Vector {
    /// The vector's priority class, its upper four bits (SDM vol. 3, 12.8.3).
    #[inline]
    pub const fn class(self) -> u8 {
        self.0 >> 4
    }
}

/// A local APIC identifier: 8 bits in xAPIC mode, 32 in x2APIC mode.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(transparent)]
pub struct ApicId(pub u32);

/// A global system interrupt: an index into a VM's interrupt routing (ACPI's term, and KVM's).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(transparent)]
pub struct Gsi(pub u32);

/// The exceptions that are raised for a guest (SDM vol. 3, table 7-1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum ExceptionVector {
    /// #DE, divide error.
    DivideError = 0,
    /// #DB, debug.
    Debug = 1,
    /// #BP, breakpoint (INT3).
    Breakpoint = 3,
    /// #OF, overflow (INTO).
    Overflow = 4,
    /// #BR, BOUND range exceeded.
    BoundRange = 5,
    /// #UD, invalid opcode.
    InvalidOpcode = 6,
    /// #NM, device not available.
    DeviceNotAvailable = 7,
    /// #DF, double fault.
    DoubleFault = 8,
    /// #TS, invalid TSS.
    InvalidTss = 10,
    /// #NP, segment not present.
    SegmentNotPresent = 11,
    /// #SS, stack-segment fault.
    StackFault = 12,
    /// #GP, general protection.
    GeneralProtection = 13,
    /// #PF, page fault.
    PageFault = 14,
    /// #MF, x87 floating-point error.
    FloatingPoint = 16,
    /// #AC, alignment check.
    AlignmentCheck = 17,
    /// #MC, machine check.
    MachineCheck = 18,
    /// #XM, SIMD floating-point exception.
    SimdFloatingPoint = 19,
}

impl ExceptionVector {
    /// The vector's number.
    #[inline]
    pub const fn number(self) -> u8 {
        self as u8
    }
}

/// An exception to be raised in a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exception {
    /// Which one.
    pub vector: ExceptionVector,
    /// The error code, for those that push one.
    pub error_code: Option<u32>,
    /// For #PF: the linear address that goes to CR2.
    pub address: Option<super::address::Gva>,
}

impl Exception {
    /// #UD.
    pub const INVALID_OPCODE: Self = Self::plain(ExceptionVector::InvalidOpcode);
    /// #GP(0).
    pub const GENERAL_PROTECTION: Self = Self::with_code(ExceptionVector::GeneralProtection, 0);

    /// An exception that pushes no error code.
    #[inline]
    pub const fn plain(vector: ExceptionVector) -> Self {
        Self {
            vector,
            error_code: None,
            address: None,
        }
    }

    /// An exception with an error code.
    #[inline]
    pub const fn with_code(vector: ExceptionVector, code: u32) -> Self {
        Self {
            vector,
            error_code: Some(code),
            address: None,
        }
    }

    /// A page fault at `address` (SDM vol. 3, 5.7 for the error code).
    #[inline]
    pub const fn page_fault(address: super::address::Gva, code: u32) -> Self {
        Self {
            vector: ExceptionVector::PageFault,
            error_code: Some(code),
            address: Some(address),
        }
    }
}
