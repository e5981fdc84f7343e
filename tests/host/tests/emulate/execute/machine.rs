// SPDX-License-Identifier: GPL-2.0

//! The arena and the registers as the emulator sees them.

use crate::native::{code_segment, Native, Setting, State, ALIGNMENT_CHECK, ARENA};
use rvisor_core::{
    emulate::{CodeSize, Encoding, Gpr, Machine, Mode, Protection, Vector},
    x86::{
        address::Gva,
        segment::{AccessRights, Segment, SegmentRegister},
        vector::Exception,
    },
};

/// Why an access ends the instruction.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Why {
    /// It is outside of the arena.
    Outside,
    /// It is not aligned.
    Fault(Exception),
}

/// What [`Native`] has, for the emulator.
pub(crate) struct Emulated {
    pub(crate) state: State,
    pub(crate) rip: u64,
    setting: Setting,
    /// Where the mapping begins: the base of all segments outside of 64-bit mode.
    base: u64,
    gs_base: u64,
    has_avx: bool,
}

impl Emulated {
    pub(crate) fn new(native: &Native, setting: &Setting, state: &State) -> Self {
        Self {
            state: state.clone(),
            rip: match setting.code {
                CodeSize::Bits64 => native.instruction_at(),
                _ => 0x100,
            },
            setting: *setting,
            base: native.address(),
            gs_base: native.gs_base(),
            has_avx: native.has_avx,
        }
    }

    /// Memory: of an access that is outside, it is not known what the CPU does first.
    fn bytes(&mut self, linear: Gva, length: usize) -> Result<&mut [u8], Why> {
        let mode = self.mode();
        let start = linear
            .raw()
            .wrapping_sub(self.base)
            .wrapping_sub(ARENA as u64);
        let start = usize::try_from(start).map_err(|_| Why::Outside)?;
        let end = start.checked_add(length).ok_or(Why::Outside)?;
        let bytes = self.state.arena.get_mut(start..end).ok_or(Why::Outside)?;
        match mode.alignment_fault(linear, length) {
            Some(exception) => Err(Why::Fault(exception)),
            None => Ok(bytes),
        }
    }
}

impl Machine for Emulated {
    type Stop = Why;

    fn gpr(&mut self, register: Gpr) -> u64 {
        self.state.gprs[register.index()]
    }

    fn set_gpr(&mut self, register: Gpr, value: u64) {
        self.state.gprs[register.index()] = value;
    }

    fn rip(&mut self) -> u64 {
        self.rip
    }

    fn set_rip(&mut self, value: u64) {
        self.rip = value;
    }

    fn rflags(&mut self) -> u64 {
        self.state.flags
    }

    fn set_rflags(&mut self, value: u64) {
        self.state.flags = value;
    }

    fn segment(&mut self, register: SegmentRegister) -> Segment {
        if self.setting.code == CodeSize::Bits64 {
            return Segment {
                base: match register {
                    SegmentRegister::Gs => self.gs_base,
                    _ => 0,
                },
                access: AccessRights(AccessRights::UNUSABLE),
                ..Segment::default()
            };
        }
        match register {
            SegmentRegister::Cs => code_segment(self.setting.code, self.base),
            SegmentRegister::Ss => self.setting.ss.segment(self.base),
            SegmentRegister::Es => self.setting.es.segment(self.base),
            _ => self.setting.ds.segment(self.base),
        }
    }

    fn mode(&mut self) -> Mode {
        Mode {
            code: self.setting.code,
            protection: Protection::Protected,
            linear_bits: 48,
            checks_alignment: self.state.flags & ALIGNMENT_CHECK != 0,
        }
    }

    fn read(&mut self, linear: Gva, data: &mut [u8]) -> Result<(), Why> {
        data.copy_from_slice(self.bytes(linear, data.len())?);
        Ok(())
    }

    fn prepare_write(&mut self, linear: Gva, length: usize) -> Result<(), Why> {
        self.bytes(linear, length).map(|_| ())
    }

    fn vector(&mut self, number: u8, encoding: Encoding) -> Option<Vector> {
        let is_there = encoding == Encoding::Legacy || self.has_avx;
        is_there.then(|| self.state.vectors[usize::from(number)])
    }

    fn set_vector(&mut self, number: u8, value: Vector, encoding: Encoding) {
        let length = match encoding {
            Encoding::Legacy => 2,
            Encoding::Vex => 4,
        };
        self.state.vectors[usize::from(number)][..length].copy_from_slice(&value[..length]);
    }

    fn input(&mut self, _port: u16, _data: &mut [u8]) -> Result<(), Why> {
        Err(Why::Outside)
    }

    fn output(&mut self, _port: u16, _data: &[u8]) -> Result<(), Why> {
        Err(Why::Outside)
    }

    fn write(&mut self, linear: Gva, data: &[u8]) -> Result<(), Why> {
        self.bytes(linear, data.len())?.copy_from_slice(data);
        Ok(())
    }

    fn compare_exchange(&mut self, linear: Gva, old: &[u8], new: &[u8]) -> Result<bool, Why> {
        assert_eq!(self.bytes(linear, old.len())?, old);
        self.write(linear, new).map(|()| true)
    }

    fn may_continue(&mut self) -> bool {
        true
    }
}
