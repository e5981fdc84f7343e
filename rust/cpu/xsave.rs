// SPDX-License-Identifier: GPL-2.0

//! The layout of the XSAVE area (SDM vol. 1, 13.4).

use super::supported::HostCpuid;

/// The legacy area of 512 bytes and the header of 64.
const BASE_BYTES: u32 = 576;
/// Components are numbered below this; x87 and SSE, 0 and 1, lie in the legacy area.
const COMPONENTS: u32 = 19;

/// Where a component lies.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Component {
    /// Its size in bytes; 0 where the host lacks it.
    size: u32,
    /// Its offset in the standard format.
    offset: u32,
    /// Whether the compacted format aligns it to 64 bytes.
    is_aligned: bool,
}

/// The places of all state components of the host's CPU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct XsaveLayout {
    components: [Component; COMPONENTS as usize],
}

impl XsaveLayout {
    /// Asks the host's CPU.
    pub fn of_host(host: &impl HostCpuid) -> Self {
        let mut layout = Self::default();
        if host.cpuid(0, 0)[0] < 0xd {
            return layout;
        }
        for (number, component) in (0..COMPONENTS).zip(layout.components.iter_mut()).skip(2) {
            let [size, offset, flags, _] = host.cpuid(0xd, number);
            *component = Component {
                size,
                offset,
                is_aligned: flags & 2 != 0,
            };
        }
        layout
    }

    /// The extended components that `mask` names.
    fn extended(&self, mask: u64) -> impl Iterator<Item = &Component> {
        (0..COMPONENTS)
            .zip(self.components.iter())
            .skip(2)
            .filter(move |(number, _)| mask.wrapping_shr(*number) & 1 != 0)
            .map(|(_, component)| component)
    }

    /// The size in bytes of an area in standard format for the components of `xcr0`.
    pub fn standard_size(&self, xcr0: u64) -> u32 {
        self.extended(xcr0).fold(BASE_BYTES, |size, component| {
            size.max(component.offset.saturating_add(component.size))
        })
    }

    /// The size in bytes of an area in compacted format for the components of `mask`, which is
    /// XCR0 with IA32_XSS.
    pub fn compacted_size(&self, mask: u64) -> u32 {
        self.extended(mask).fold(BASE_BYTES, |size, component| {
            let start = if component.is_aligned {
                size.saturating_add(63) & !63
            } else {
                size
            };
            start.saturating_add(component.size)
        })
    }
}
