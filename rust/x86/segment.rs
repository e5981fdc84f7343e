// SPDX-License-Identifier: GPL-2.0

//! Segment registers with their hidden parts.

/// A segment register's name, numbered as in instruction encodings (SDM vol. 2, table 2-1 ff.).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum SegmentRegister {
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
}

/// A segment register's contents, hidden part included.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Segment {
    /// The visible selector.
    pub selector: u16,
    /// The base address.
    pub base: u64,
    /// The limit in bytes, granularity applied.
    pub limit: u32,
    /// The access rights in the VMCS's format.
    pub access: AccessRights,
}

/// Segment access rights in the format of the VMCS (SDM vol. 3, table 26-2).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(transparent)]
pub struct AccessRights(pub u32);

impl AccessRights {
    /// Bit 16: the register is unusable (a null selector was loaded).
    pub const UNUSABLE: u32 = 1 << 16;

    /// Bits 3:0, the segment type.
    #[inline]
    pub const fn kind(self) -> u8 {
        (self.0 & 0xf) as u8
    }

    /// Bit 4: a code or data segment, not a system one.
    #[inline]
    pub const fn is_code_or_data(self) -> bool {
        self.0 & (1 << 4) != 0
    }

    /// Bits 6:5, the descriptor privilege level.
    #[inline]
    pub const fn privilege(self) -> u8 {
        ((self.0 >> 5) & 3) as u8
    }

    /// Bit 7: present.
    #[inline]
    pub const fn is_present(self) -> bool {
        self.0 & (1 << 7) != 0
    }

    /// Bit 12: available to software.
    #[inline]
    pub const fn available(self) -> bool {
        self.0 & (1 << 12) != 0
    }

    /// Bit 13: a 64-bit code segment (CS.L).
    #[inline]
    pub const fn is_long(self) -> bool {
        self.0 & (1 << 13) != 0
    }

    /// Bit 14: default operation size 32 bits (CS.D) or big stack (SS.B).
    #[inline]
    pub const fn is_big(self) -> bool {
        self.0 & (1 << 14) != 0
    }

    /// Bit 15: the limit is in units of 4 KiB.
    #[inline]
    pub const fn is_granular(self) -> bool {
        self.0 & (1 << 15) != 0
    }

    /// Bit 16: unusable.
    #[inline]
    pub const fn is_unusable(self) -> bool {
        self.0 & Self::UNUSABLE != 0
    }
}
