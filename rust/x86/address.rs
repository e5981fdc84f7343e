// SPDX-License-Identifier: GPL-2.0

//! Addresses and frame numbers, each address space a type of its own.

/// The number of address bits inside a 4 KiB page.
pub const PAGE_SHIFT: u32 = 12;
/// The size of the smallest page, in bytes.
pub const PAGE_SIZE: u64 = 1 << PAGE_SHIFT;

macro_rules! address {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[repr(transparent)]
        pub struct $name(u64);

        impl $name {
            /// Wraps a raw address in bytes.
            #[inline]
            pub const fn new(raw: u64) -> Self {
                Self(raw)
            }

            /// The raw address in bytes.
            #[inline]
            pub const fn raw(self) -> u64 {
                self.0
            }

            /// The offset into the 4 KiB page that holds this address.
            #[inline]
            pub const fn page_offset(self) -> u64 {
                self.0 & (PAGE_SIZE - 1)
            }

            /// The address of the start of its 4 KiB page.
            #[inline]
            pub const fn page_start(self) -> Self {
                Self(self.0 & !(PAGE_SIZE - 1))
            }

            /// `self + bytes`, or `None` past the end of the address space.
            #[inline]
            pub const fn checked_add(self, bytes: u64) -> Option<Self> {
                match self.0.checked_add(bytes) {
                    Some(raw) => Some(Self(raw)),
                    None => None,
                }
            }

            /// `self + bytes`, modulo 2^64.
            #[inline]
            pub const fn wrapping_add(self, bytes: u64) -> Self {
                Self(self.0.wrapping_add(bytes))
            }
        }
    };
}

macro_rules! frame {
    ($(#[$doc:meta])* $name:ident, $address:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[repr(transparent)]
        pub struct $name(u64);

        impl $name {
            /// Wraps a raw frame number.
            #[inline]
            pub const fn new(raw: u64) -> Self {
                Self(raw)
            }

            /// The raw frame number.
            #[inline]
            pub const fn raw(self) -> u64 {
                self.0
            }

            /// The address of the frame's first byte; bits shifted out at the top are lost.
            #[inline]
            pub const fn address(self) -> $address {
                $address::new(self.0 << PAGE_SHIFT)
            }

            /// `self + frames`, or `None` on overflow.
            #[inline]
            pub const fn checked_add(self, frames: u64) -> Option<Self> {
                match self.0.checked_add(frames) {
                    Some(raw) => Some(Self(raw)),
                    None => None,
                }
            }
        }

        impl $address {
            /// The 4 KiB frame that holds this address.
            #[inline]
            pub const fn frame(self) -> $name {
                $name(self.0 >> PAGE_SHIFT)
            }
        }
    };
}

address! {
    /// A guest-physical address (GPA): what EPT translates.
    Gpa
}
address! {
    /// A guest-virtual (linear) address (GVA): what the guest's own page tables translate.
    Gva
}
address! {
    /// A host-physical address (HPA).
    Hpa
}
address! {
    /// An address in the process that owns the virtual machine (HVA).
    Hva
}
frame! {
    /// A guest frame number (GFN): a guest-physical address in units of 4 KiB.
    Gfn, Gpa
}
frame! {
    /// A host page frame number (PFN): a host-physical address in units of 4 KiB.
    Pfn, Hpa
}

impl Gva {
    /// Whether the address is canonical for `bits` (48 or 57) of linear address (SDM vol. 1, 3.3.7.1).
    #[inline]
    pub const fn is_canonical(self, bits: u32) -> bool {
        let unused = 64u32.saturating_sub(bits);
        // An arithmetic shift copies the topmost used bit into the unused ones.
        ((self.raw().wrapping_shl(unused) as i64).wrapping_shr(unused) as u64) == self.raw()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_and_addresses_convert_both_ways() {
        let gpa = Gpa::new(0x1234_5678);
        assert_eq!(gpa.frame(), Gfn::new(0x12345));
        assert_eq!(gpa.frame().address(), Gpa::new(0x1234_5000));
        assert_eq!(gpa.page_offset(), 0x678);
        assert_eq!(Gpa::new(u64::MAX).checked_add(1), None);
    }

    #[test]
    fn canonical_addresses_end_where_the_sdm_says() {
        assert!(Gva::new(0x0000_7fff_ffff_ffff).is_canonical(48));
        assert!(!Gva::new(0x0000_8000_0000_0000).is_canonical(48));
        assert!(Gva::new(0xffff_8000_0000_0000).is_canonical(48));
        assert!(!Gva::new(0xffff_7fff_ffff_ffff).is_canonical(48));
        assert!(Gva::new(0x00ff_ffff_ffff_ffff).is_canonical(57));
        assert!(!Gva::new(0x0100_0000_0000_0000).is_canonical(57));
    }
}
