// SPDX-License-Identifier: GPL-2.0

//! Device memory: the local APIC and the IOAPIC in the kernel, and what userspace reads and writes for
//! an instruction that is emulated.

use super::{
    completion::Completion,
    emulation::Kept,
    irqchip::IrqChip,
    run_page::UserExit,
    vcpu::{Core, State},
};
use rvisor_core::x86::address::{Gpa, PAGE_SIZE};

/// One access of at most 8 bytes that does not cross a page.
#[derive(Clone, Copy)]
pub(crate) struct Access {
    pub(crate) gpa: Gpa,
    pub(crate) length: u8,
    pub(crate) data: [u8; 8],
}

/// The most bytes of one access of userspace's, as KVM has it.
pub(super) const MAX_BYTES: usize = 8;
/// The most accesses of a kind that one instruction makes: 32 bytes across a page, each part in pieces of
/// [`MAX_BYTES`]. Two operands of 8 bytes across a page make 4.
const MAX_ACCESSES: usize = 5;

/// What userspace has read for the instruction that is executed again, and what it has yet to write
/// for one that has retired.
#[derive(Default)]
pub(crate) struct Replay {
    reads: [Option<Access>; MAX_ACCESSES],
    /// The RIP of the instruction that they are for.
    rip: u64,
    /// The next read to be given out.
    cursor: usize,
    /// The access that userspace was asked to read.
    pending: Option<Access>,
    writes: [Option<Access>; MAX_ACCESSES],
    /// The instruction at this RIP that waits for userspace, so that it is not fetched again.
    instruction: Option<(u64, Kept)>,
}

impl Replay {
    /// Begins the instruction at `rip`, from its first read on. What was read for one elsewhere is void:
    /// an interrupt or userspace came between.
    pub(super) fn restart(&mut self, rip: u64) {
        if self.rip != rip {
            self.rip = rip;
            self.reads = [None; MAX_ACCESSES];
        }
        self.cursor = 0;
        self.writes = [None; MAX_ACCESSES];
    }

    /// Keeps the instruction at `rip` until userspace comes back.
    pub(super) fn keep(&mut self, rip: u64, instruction: Kept) {
        self.instruction = Some((rip, instruction));
    }

    /// Whether the instruction at `rip` waits for userspace.
    pub(super) fn is_kept_for(&self, rip: u64) -> bool {
        self.instruction.as_ref().is_some_and(|(at, _)| *at == rip)
    }

    /// The instruction that was kept, where it is the one at `rip`.
    pub(super) fn instruction(&mut self, rip: u64) -> Option<Kept> {
        let (at, instruction) = self.instruction.take()?;
        (at == rip).then_some(instruction)
    }

    /// The instruction is over: what was read for it is void.
    pub(super) fn forget(&mut self) {
        self.reads = [None; MAX_ACCESSES];
        self.cursor = 0;
        self.pending = None;
    }

    /// Gives out the next read, of at most [`MAX_BYTES`], or says that userspace has to make it.
    pub(super) fn read(&mut self, gpa: Gpa, data: &mut [u8]) -> bool {
        if let Some(Some(access)) = self.reads.get(self.cursor) {
            if access.gpa == gpa && usize::from(access.length) == data.len() {
                for (to, from) in data.iter_mut().zip(access.data) {
                    *to = from;
                }
                self.cursor += 1;
                return true;
            }
        }
        self.pending = Some(Access {
            gpa,
            length: data.len() as u8,
            data: [0; 8],
        });
        false
    }

    /// Takes what userspace has read.
    pub(super) fn supply(&mut self, data: [u8; 8]) {
        if let (Some(access), Some(place)) = (
            self.pending.take(),
            self.reads.iter_mut().find(|place| place.is_none()),
        ) {
            *place = Some(Access { data, ..access });
        }
    }

    /// Keeps a write for userspace. `false` where there is no room, which no instruction reaches.
    pub(super) fn write(&mut self, gpa: Gpa, data: &[u8]) -> bool {
        let mut bytes = [0; 8];
        match bytes.get_mut(..data.len()) {
            Some(to) => to.copy_from_slice(data),
            None => return false,
        }
        match self.writes.iter_mut().find(|place| place.is_none()) {
            Some(place) => {
                *place = Some(Access {
                    gpa,
                    length: data.len() as u8,
                    data: bytes,
                });
                true
            }
            None => false,
        }
    }

    /// Whether writes wait for userspace.
    pub(super) fn has_writes(&self) -> bool {
        self.writes.iter().any(Option::is_some)
    }

    fn take_write(&mut self) -> Option<Access> {
        self.writes.iter_mut().find_map(Option::take)
    }
}

impl State {
    /// The exit for the read that userspace has to make.
    pub(super) fn mmio_read_exit(&mut self) -> Option<UserExit> {
        let access = self.core.replay.pending?;
        self.core.completion = Some(Completion::MmioRead);
        Some(UserExit::Mmio {
            gpa: access.gpa,
            length: access.length,
            is_write: false,
            data: [0; 8],
        })
    }

    /// The exit for the next write that waits, or none.
    pub(super) fn next_mmio_write(&mut self) -> Option<UserExit> {
        let Some(access) = self.core.replay.take_write() else {
            self.core.completion = None;
            return None;
        };
        self.core.completion = Some(Completion::MmioWrite);
        Some(UserExit::Mmio {
            gpa: access.gpa,
            length: access.length,
            is_write: true,
            data: access.data,
        })
    }
}

impl Core {
    /// The offset of `gpa` in the local APIC's page, where it lies there.
    #[inline]
    fn lapic_offset(&self, gpa: Gpa) -> Option<u16> {
        let base = self.lapic.as_ref()?.mmio_base();
        let offset = gpa.raw().wrapping_sub(base);
        (offset < PAGE_SIZE).then_some(offset as u16)
    }

    /// Whether the local APIC's registers are at `gpa`.
    #[inline]
    pub(super) fn is_lapic(&self, gpa: Gpa) -> bool {
        self.lapic_offset(gpa).is_some()
    }

    /// Reads device memory in the kernel. `false` where it is userspace's.
    pub(super) fn read_device(&mut self, gpa: Gpa, data: &mut [u8]) -> bool {
        if let Some(offset) = self.lapic_offset(gpa) {
            let clock = self.clock();
            if let Some(lapic) = &mut self.lapic {
                // Registers are 4 bytes wide; of wider accesses the rest reads as zero.
                let inside = usize::from(offset & 3);
                let value = lapic.read(offset & !3, clock);
                let bytes = value.to_le_bytes();
                data.fill(0);
                for (to, from) in data.iter_mut().zip(bytes.iter().skip(inside)) {
                    *to = *from;
                }
                // A register that does not exist reads as 0 and raises the error interrupt.
                if value == 0 {
                    self.note_interrupts();
                }
                return true;
            }
        }
        match (self.vm.irqchip(), IrqChip::ioapic_offset(gpa)) {
            (Some(chip), Some(offset)) => {
                let bytes = chip.read_ioapic(offset).to_le_bytes();
                data.fill(0);
                for (to, from) in data.iter_mut().zip(bytes) {
                    *to = from;
                }
                true
            }
            _ => false,
        }
    }

    /// Writes device memory in the kernel. `false` where it is userspace's.
    pub(super) fn write_device(&mut self, gpa: Gpa, data: &[u8]) -> bool {
        let mut bytes = [0; 4];
        for (to, from) in bytes.iter_mut().zip(data) {
            *to = *from;
        }
        let value = u32::from_le_bytes(bytes);
        if let Some(offset) = self.lapic_offset(gpa) {
            let clock = self.clock();
            if let Some(lapic) = &mut self.lapic {
                // Only whole registers can be written (SDM vol. 3, 12.4.1).
                if data.len() >= 4 {
                    let effect = lapic.write(offset, value, clock);
                    self.apply(effect);
                }
                return true;
            }
        }
        match (self.vm.irqchip(), IrqChip::ioapic_offset(gpa)) {
            (Some(chip), Some(offset)) => {
                chip.write_ioapic(&self.vm, offset, value);
                true
            }
            _ => false,
        }
    }
}
