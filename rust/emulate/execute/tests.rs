// SPDX-License-Identifier: GPL-2.0

//! Execution on a machine made for it; results are compared with a CPU's in `tests/host`.

mod forms;

use super::*;
use crate::{
    emulate::{
        decode::decode,
        instruction::{Encoding, Gpr},
        machine::{Mode, Protection, Vector},
    },
    x86::{
        address::Gva,
        segment::{AccessRights, Segment, SegmentRegister},
        vector::{Exception, ExceptionVector},
    },
};

/// Device memory begins here: a read stops the first time and is answered the second time.
const DEVICE: u64 = 0xf000;
/// Writable data or stack, accessed, present.
const DATA: u32 = 0x93;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Why {
    /// Userspace has to answer a read here.
    DeviceRead(u64),
    /// Userspace has to answer an input from this port.
    PortRead(u16),
    /// Nothing is there.
    NotPresent,
}

/// 64 KiB of memory, of which the end is a device.
struct Fake {
    gprs: [u64; 16],
    rip: u64,
    rflags: u64,
    mode: Mode,
    segments: [Segment; 6],
    memory: Vec<u8>,
    /// What userspace answered for the next read of a device or port.
    answer: Option<Vec<u8>>,
    device_writes: Vec<(u64, Vec<u8>)>,
    outputs: Vec<(u16, Vec<u8>)>,
    vectors: Option<[Vector; 16]>,
    /// Whether they have more than 128 bits.
    has_avx: bool,
    /// Another CPU's write, done before the next compare-exchange.
    rival: Option<(u64, u8)>,
    continues: bool,
}

impl Fake {
    fn new(code: CodeSize, protection: Protection) -> Self {
        let big = if code == CodeSize::Bits16 { 0 } else { 1 << 14 };
        let segment = Segment {
            selector: 8,
            base: 0,
            limit: 0xffff,
            access: AccessRights(DATA | big),
        };
        Self {
            gprs: [0; 16],
            rip: 0x100,
            rflags: 2,
            mode: Mode {
                code,
                protection,
                linear_bits: 48,
                checks_alignment: false,
            },
            segments: [segment; 6],
            memory: vec![0; 0x10000],
            answer: None,
            device_writes: Vec::new(),
            outputs: Vec::new(),
            vectors: None,
            has_avx: true,
            rival: None,
            continues: false,
        }
    }

    fn long() -> Self {
        Self::new(CodeSize::Bits64, Protection::Protected)
    }

    fn segment_mut(&mut self, register: SegmentRegister) -> &mut Segment {
        &mut self.segments[register as usize]
    }

    fn run(&mut self, bytes: &[u8]) -> Outcome<Self> {
        let instruction = decode(bytes, self.mode.code).unwrap();
        assert_eq!(usize::from(instruction.length), bytes.len());
        execute(&instruction, self)
    }
}

impl Machine for Fake {
    type Stop = Why;

    fn gpr(&mut self, register: Gpr) -> u64 {
        self.gprs[register.index()]
    }

    fn set_gpr(&mut self, register: Gpr, value: u64) {
        self.gprs[register.index()] = value;
    }

    fn rip(&mut self) -> u64 {
        self.rip
    }

    fn set_rip(&mut self, value: u64) {
        self.rip = value;
    }

    fn rflags(&mut self) -> u64 {
        self.rflags
    }

    fn set_rflags(&mut self, value: u64) {
        self.rflags = value;
    }

    fn segment(&mut self, register: SegmentRegister) -> Segment {
        self.segments[register as usize]
    }

    fn mode(&mut self) -> Mode {
        self.mode
    }

    fn read(&mut self, linear: Gva, data: &mut [u8]) -> Result<(), Why> {
        let start = usize::try_from(linear.raw()).unwrap();
        let found = self.memory.get(start..start + data.len());
        data.copy_from_slice(found.ok_or(Why::NotPresent)?);
        if linear.raw() >= DEVICE {
            let answer = self.answer.take().ok_or(Why::DeviceRead(linear.raw()))?;
            data.copy_from_slice(&answer);
        }
        Ok(())
    }

    fn prepare_write(&mut self, linear: Gva, length: usize) -> Result<(), Why> {
        let start = usize::try_from(linear.raw()).unwrap();
        let found = self.memory.get(start..start + length);
        found.map(|_| ()).ok_or(Why::NotPresent)
    }

    fn vector(&mut self, number: u8, encoding: Encoding) -> Option<Vector> {
        if encoding == Encoding::Vex && !self.has_avx {
            return None;
        }
        self.vectors.map(|vectors| vectors[usize::from(number)])
    }

    fn set_vector(&mut self, number: u8, value: Vector, encoding: Encoding) {
        let vector = &mut self.vectors.as_mut().unwrap()[usize::from(number)];
        *vector = match encoding {
            Encoding::Legacy => [value[0], value[1], vector[2], vector[3]],
            Encoding::Vex => value,
        };
    }

    fn input(&mut self, port: u16, data: &mut [u8]) -> Result<(), Why> {
        let answer = self.answer.take().ok_or(Why::PortRead(port))?;
        data.copy_from_slice(&answer);
        Ok(())
    }

    fn output(&mut self, port: u16, data: &[u8]) -> Result<(), Why> {
        self.outputs.push((port, data.to_vec()));
        Ok(())
    }

    fn write(&mut self, linear: Gva, data: &[u8]) -> Result<(), Why> {
        let start = usize::try_from(linear.raw()).unwrap();
        let found = self.memory.get_mut(start..start + data.len());
        let found = found.ok_or(Why::NotPresent)?;
        if linear.raw() >= DEVICE {
            self.device_writes.push((linear.raw(), data.to_vec()));
        } else {
            found.copy_from_slice(data);
        }
        Ok(())
    }

    fn compare_exchange(&mut self, linear: Gva, old: &[u8], new: &[u8]) -> Result<bool, Why> {
        if let Some((address, value)) = self.rival.take() {
            self.memory[usize::try_from(address).unwrap()] = value;
        }
        let start = usize::try_from(linear.raw()).unwrap();
        if linear.raw() < DEVICE && self.memory[start..start + old.len()] != *old {
            return Ok(false);
        }
        self.write(linear, new).map(|()| true)
    }

    fn may_continue(&mut self) -> bool {
        self.continues
    }
}

fn fault(vector: ExceptionVector) -> Outcome<Fake> {
    Err(Stop::Fault(Exception::with_code(vector, 0)))
}

#[test]
fn a_device_read_stops_and_is_finished_by_the_answer() {
    let mut fake = Fake::long();
    fake.gprs[0] = DEVICE;
    fake.gprs[1] = u64::MAX;
    let before = fake.gprs;
    // add ecx, [rax]
    let bytes = [0x03, 0x08];
    assert_eq!(
        fake.run(&bytes),
        Err(Stop::Machine(Why::DeviceRead(DEVICE)))
    );
    assert_eq!((fake.gprs, fake.rip, fake.rflags), (before, 0x100, 2));
    fake.answer = Some(vec![1, 0, 0, 0]);
    assert_eq!(fake.run(&bytes), Ok(Progress::Retired));
    // The sum is 0 with carry: CF, PF, AF, ZF.
    assert_eq!((fake.gprs[1], fake.rip, fake.rflags), (0, 0x102, 0x57));
}

#[test]
fn nothing_is_committed_when_the_write_fails() {
    let mut fake = Fake::long();
    fake.gprs[6] = 0x20;
    fake.gprs[7] = 0x2_0000;
    let before = fake.gprs;
    assert_eq!(fake.run(&[0xa5]), Err(Stop::Machine(Why::NotPresent)));
    assert_eq!((fake.gprs, fake.rip), (before, 0x100));
}

#[test]
fn a_posted_device_write_retires() {
    let mut fake = Fake::long();
    fake.gprs[0] = DEVICE + 8;
    // mov word ptr [rax], 0x1234
    let bytes = [0x66, 0xc7, 0x00, 0x34, 0x12];
    assert_eq!(fake.run(&bytes), Ok(Progress::Retired));
    assert_eq!(fake.device_writes, [(DEVICE + 8, vec![0x34, 0x12])]);
    assert_eq!(fake.rip, 0x105);
}

#[test]
fn a_locked_operation_that_lost_a_race_changes_nothing() {
    let mut fake = Fake::long();
    fake.gprs[0] = 0x40;
    fake.gprs[1] = 1;
    fake.memory[0x40] = 5;
    fake.rival = Some((0x40, 7));
    let before = fake.gprs;
    // lock xadd [rax], ecx
    let bytes = [0xf0, 0x0f, 0xc1, 0x08];
    assert_eq!(fake.run(&bytes), Ok(Progress::Again));
    assert_eq!((fake.gprs, fake.rip, fake.rflags), (before, 0x100, 2));
    assert_eq!(fake.run(&bytes), Ok(Progress::Retired));
    assert_eq!((fake.memory[0x40], fake.gprs[1], fake.rip), (8, 7, 0x104));
}

#[test]
fn xchg_with_memory_is_locked_without_the_prefix() {
    let mut fake = Fake::long();
    fake.gprs[0] = 0x40;
    fake.rival = Some((0x40, 7));
    assert_eq!(fake.run(&[0x87, 0x08]), Ok(Progress::Again));
    assert_eq!(fake.rip, 0x100);
}

#[test]
fn a_repeated_string_instruction_stops_between_iterations() {
    let mut fake = Fake::long();
    fake.gprs[1] = 3;
    fake.gprs[6] = DEVICE;
    fake.gprs[7] = 0x80;
    let bytes = [0xf3, 0xa4];
    for left in [2, 1] {
        assert!(matches!(
            fake.run(&bytes),
            Err(Stop::Machine(Why::DeviceRead(_)))
        ));
        fake.answer = Some(vec![0xa0 | left]);
        assert_eq!(fake.run(&bytes), Ok(Progress::Again));
        assert_eq!((fake.gprs[1], fake.rip), (u64::from(left), 0x100));
    }
    fake.answer = Some(vec![0xa0]);
    assert_eq!(fake.run(&bytes), Ok(Progress::Retired));
    assert_eq!(fake.memory[0x80..0x83], [0xa2, 0xa1, 0xa0]);
    assert_eq!(
        (fake.gprs[1], fake.gprs[6], fake.gprs[7], fake.rip),
        (0, DEVICE + 3, 0x83, 0x102)
    );
}

#[test]
fn a_repeated_string_instruction_ends_after_4_kib() {
    let mut fake = Fake::long();
    fake.continues = true;
    fake.gprs[0] = 0x1111_1111;
    fake.gprs[1] = 1025;
    // rep stosd
    assert_eq!(fake.run(&[0xf3, 0xab]), Ok(Progress::Again));
    assert_eq!((fake.gprs[1], fake.gprs[7], fake.rip), (1, 4096, 0x100));
    assert_eq!(fake.run(&[0xf3, 0xab]), Ok(Progress::Retired));
    assert_eq!((fake.gprs[1], fake.gprs[7], fake.rip), (0, 4100, 0x102));
    assert_eq!(fake.run(&[0xf3, 0xab]), Ok(Progress::Retired));
    assert_eq!((fake.gprs[7], fake.rip), (4100, 0x104));
}

#[test]
fn nothing_is_read_from_a_device_for_an_iteration_that_faults() {
    for bytes in [&[0xa4][..], &[0x6c]] {
        let mut fake = Fake::long();
        fake.gprs[6] = DEVICE;
        fake.gprs[7] = 0x2_0000;
        fake.answer = Some(vec![0x55]);
        // movsb, insb
        assert_eq!(fake.run(bytes), Err(Stop::Machine(Why::NotPresent)));
        assert_eq!(fake.answer, Some(vec![0x55]));
    }
}

#[test]
fn string_input_waits_for_the_answer_and_output_is_posted() {
    let mut fake = Fake::new(CodeSize::Bits16, Protection::Real);
    fake.gprs[1] = 2;
    fake.gprs[2] = 0xffff_01f0;
    fake.gprs[7] = 0x80;
    // rep insw
    let bytes = [0xf3, 0x6d];
    assert_eq!(fake.run(&bytes), Err(Stop::Machine(Why::PortRead(0x1f0))));
    assert_eq!((fake.gprs[1], fake.gprs[7]), (2, 0x80));
    fake.answer = Some(vec![0x34, 0x12]);
    assert_eq!(fake.run(&bytes), Ok(Progress::Again));
    fake.answer = Some(vec![0x78, 0x56]);
    assert_eq!(fake.run(&bytes), Ok(Progress::Retired));
    assert_eq!(fake.memory[0x80..0x84], [0x34, 0x12, 0x78, 0x56]);
    assert_eq!((fake.gprs[1], fake.gprs[7], fake.rip), (0, 0x84, 0x102));
    fake.gprs[6] = 0x82;
    // outsw
    assert_eq!(fake.run(&[0x6f]), Ok(Progress::Retired));
    assert_eq!(fake.outputs, [(0x1f0, vec![0x78, 0x56])]);
    assert_eq!((fake.gprs[6], fake.rip), (0x84, 0x103));
}

#[test]
fn a_scan_ends_where_it_finds() {
    let mut fake = Fake::long();
    fake.continues = true;
    fake.memory[0x80..0x84].copy_from_slice(b"abcd");
    fake.gprs[0] = u64::from(b'c');
    fake.gprs[1] = 10;
    fake.gprs[7] = 0x80;
    // repne scasb: 'c' is the third, ZF and PF are set.
    assert_eq!(fake.run(&[0xf2, 0xae]), Ok(Progress::Retired));
    assert_eq!((fake.gprs[1], fake.gprs[7], fake.rip), (7, 0x83, 0x102));
    assert_eq!(fake.rflags, 0x46);
    // repe scasb: 'd' differs at once, and no more is read.
    assert_eq!(fake.run(&[0xf3, 0xae]), Ok(Progress::Retired));
    assert_eq!((fake.gprs[1], fake.gprs[7]), (6, 0x84));
}

#[test]
fn string_registers_wrap_at_the_address_size_and_go_down_with_df() {
    let mut fake = Fake::new(CodeSize::Bits16, Protection::Real);
    fake.rflags |= 1 << 10;
    fake.gprs[6] = 0xabcd_0001;
    fake.memory[1..3].copy_from_slice(&[0x34, 0x12]);
    // lodsw
    assert_eq!(fake.run(&[0xad]), Ok(Progress::Retired));
    assert_eq!((fake.gprs[0], fake.gprs[6]), (0x1234, 0xabcd_ffff));
}

#[test]
fn limits_are_checked_to_the_last_byte() {
    let mut fake = Fake::new(CodeSize::Bits32, Protection::Protected);
    fake.segment_mut(SegmentRegister::Ds).limit = 0x102;
    fake.gprs[0] = 0x100;
    // mov eax, [eax]; mov ax, [eax]
    assert_eq!(
        fake.run(&[0x8b, 0x00]),
        fault(ExceptionVector::GeneralProtection)
    );
    assert_eq!(fake.run(&[0x66, 0x8b, 0x00]), Ok(Progress::Retired));
    // mov eax, [ebp] is by SS.
    fake.segment_mut(SegmentRegister::Ss).limit = 2;
    assert_eq!(
        fake.run(&[0x8b, 0x45, 0x00]),
        fault(ExceptionVector::StackFault)
    );
}

#[test]
fn an_expand_down_segment_begins_after_its_limit() {
    let mut fake = Fake::new(CodeSize::Bits32, Protection::Protected);
    let segment = fake.segment_mut(SegmentRegister::Ds);
    segment.limit = 0xfff;
    // Type 7: writable, expand-down; its end is at 64 KiB.
    segment.access = AccessRights(0x97);
    let refused = fault(ExceptionVector::GeneralProtection);
    // The first byte is inside; the last is 0xffff; the first is the limit; the last is outside.
    for (first, expected) in [
        (0x1000, Ok(Progress::Retired)),
        (0xfffc, Ok(Progress::Retired)),
        (0xfff, refused),
        (0xfffd, refused),
    ] {
        fake.answer = Some(vec![0; 4]);
        fake.gprs[1] = first;
        // mov edx, [ecx]
        assert_eq!(fake.run(&[0x8b, 0x11]), expected, "{first:#x}");
    }
}

#[test]
fn segment_types_count_in_protected_mode_only() {
    // Read-only data, execute-only code, readable code: may they be read, written?
    for (kind, reads, writes) in [
        (0x91, true, false),
        (0x99, false, false),
        (0x9b, true, false),
        (0x93, true, true),
    ] {
        for protection in [Protection::Protected, Protection::Real] {
            let mut fake = Fake::new(CodeSize::Bits16, protection);
            fake.segment_mut(SegmentRegister::Ds).access = AccessRights(kind);
            let real = protection == Protection::Real;
            // mov ax, [si]; mov [si], ax
            assert_eq!(fake.run(&[0x8b, 0x04]).is_ok(), reads || real);
            assert_eq!(fake.run(&[0x89, 0x04]).is_ok(), writes || real);
        }
    }
}

#[test]
fn an_unusable_segment_faults_and_real_mode_has_no_error_code() {
    let mut fake = Fake::new(CodeSize::Bits32, Protection::Protected);
    fake.segment_mut(SegmentRegister::Es).access = AccessRights(AccessRights::UNUSABLE);
    // mov eax, es:[eax]
    assert_eq!(
        fake.run(&[0x26, 0x8b, 0x00]),
        fault(ExceptionVector::GeneralProtection)
    );
    let mut fake = Fake::new(CodeSize::Bits16, Protection::Real);
    fake.gprs[6] = 0xffff;
    assert_eq!(
        fake.run(&[0x8b, 0x04]),
        Err(Stop::Fault(Exception::plain(
            ExceptionVector::GeneralProtection
        )))
    );
}

#[test]
fn long_mode_knows_no_limits_but_canonical_addresses() {
    let mut fake = Fake::long();
    *fake.segment_mut(SegmentRegister::Ds) = Segment {
        access: AccessRights(AccessRights::UNUSABLE),
        base: 0x5000,
        ..Segment::default()
    };
    fake.segment_mut(SegmentRegister::Gs).base = 0x300;
    fake.memory[0x340] = 9;
    fake.memory[0x40] = 8;
    fake.gprs[0] = 0x40;
    // mov cl, [rax]; mov cl, gs:[rax]
    assert_eq!(fake.run(&[0x8a, 0x08]), Ok(Progress::Retired));
    assert_eq!(fake.gprs[1], 8);
    assert_eq!(fake.run(&[0x65, 0x8a, 0x08]), Ok(Progress::Retired));
    assert_eq!(fake.gprs[1], 9);
    // The last byte is not canonical.
    fake.gprs[0] = 0x7fff_ffff_fffd;
    fake.gprs[5] = 0x7fff_ffff_fffd;
    assert_eq!(
        fake.run(&[0x8b, 0x08]),
        fault(ExceptionVector::GeneralProtection)
    );
    assert_eq!(
        fake.run(&[0x8b, 0x4d, 0x00]),
        fault(ExceptionVector::StackFault)
    );
}

#[test]
fn an_access_around_the_end_of_the_address_space_is_refused() {
    let mut fake = Fake::long();
    fake.gprs[0] = u64::MAX - 1;
    assert_eq!(fake.run(&[0x8b, 0x08]), Err(Stop::Unsupported));
    let mut fake = Fake::new(CodeSize::Bits32, Protection::Protected);
    fake.segment_mut(SegmentRegister::Ds).base = 0xffff_fffe;
    assert_eq!(fake.run(&[0x8b, 0x08]), Err(Stop::Unsupported));
    // Segment and offset together do wrap.
    fake.gprs[0] = 2;
    fake.memory[0] = 0x77;
    assert_eq!(fake.run(&[0x8b, 0x08]), Ok(Progress::Retired));
    assert_eq!(fake.gprs[1], 0x77);
}

#[test]
fn rip_wraps_as_wide_as_the_code() {
    for (code, rip, next) in [
        (CodeSize::Bits16, 0xffff, 0x1),
        (CodeSize::Bits32, 0xffff_ffff, 0x1),
        (CodeSize::Bits64, 0xffff_ffff, 0x1_0000_0001),
    ] {
        let mut fake = Fake::new(code, Protection::Protected);
        fake.rip = rip;
        // mov cl, [bx + si], or [rax]
        assert_eq!(fake.run(&[0x8a, 0x08]), Ok(Progress::Retired));
        assert_eq!(fake.rip, next);
    }
}

#[test]
fn a_rip_relative_address_is_that_of_the_next_instruction() {
    let mut fake = Fake::long();
    fake.memory[0x117] = 0x5a;
    // mov cl, [rip + 0x11]; then with a 32-bit address, from beyond 4 GiB: mov cl, [eip + 0x10]
    assert_eq!(
        fake.run(&[0x8a, 0x0d, 0x11, 0, 0, 0]),
        Ok(Progress::Retired)
    );
    assert_eq!(fake.gprs[1], 0x5a);
    fake.rip = 0x1_0000_0100;
    fake.gprs[1] = 0;
    assert_eq!(
        fake.run(&[0x67, 0x8a, 0x0d, 0x10, 0, 0, 0]),
        Ok(Progress::Retired)
    );
    assert_eq!(fake.gprs[1], 0x5a);
}

#[test]
fn a_bit_offset_in_a_register_reaches_beyond_the_operand() {
    let mut fake = Fake::long();
    fake.gprs[0] = 0x40;
    // Bit -1 is the topmost of the doubleword before.
    fake.gprs[1] = 0xffff_ffff;
    // bts [rax], ecx
    assert_eq!(fake.run(&[0x0f, 0xab, 0x08]), Ok(Progress::Retired));
    assert_eq!(fake.memory[0x3c..0x41], [0, 0, 0, 0x80, 0]);
    assert_eq!(fake.rflags & 1, 0);
    // An immediate stays inside: bit 33 is bit 1. bts dword ptr [rax], 33
    assert_eq!(fake.run(&[0x0f, 0xba, 0x28, 33]), Ok(Progress::Retired));
    assert_eq!(fake.memory[0x40], 2);
}

#[test]
fn results_keep_or_clear_the_rest_of_a_register() {
    let mut fake = Fake::long();
    fake.memory[0x40..0x48].copy_from_slice(&[0x80, 0x81, 0x82, 0x83, 0x84, 0x85, 0x86, 0x87]);
    for (bytes, expected) in [
        // mov ch, [rax]; mov cx, [rax]; mov ecx, [rax]; movzx cx, byte [rax]
        (&[0x8a, 0x28][..], 0x1111_1111_1111_8011),
        (&[0x66, 0x8b, 0x08], 0x1111_1111_1111_8180),
        (&[0x8b, 0x08], 0x8382_8180),
        (&[0x66, 0x0f, 0xb6, 0x08], 0x1111_1111_1111_0080),
        // movsx ecx, byte [rax]; movsxd rcx, [rax]; movbe cx, [rax]
        (&[0x0f, 0xbe, 0x08], 0xffff_ff80),
        (&[0x48, 0x63, 0x08], 0xffff_ffff_8382_8180),
        (&[0x66, 0x0f, 0x38, 0xf0, 0x08], 0x1111_1111_1111_8081),
    ] {
        fake.gprs[0] = 0x40;
        fake.gprs[1] = 0x1111_1111_1111_1111;
        assert_eq!(fake.run(bytes), Ok(Progress::Retired));
        assert_eq!(fake.gprs[1], expected, "{bytes:02x?}");
    }
}
