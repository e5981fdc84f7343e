// SPDX-License-Identifier: GPL-2.0

//! Task switches between TSSs that are written down by hand (SDM vol. 3, figures 8-2 and 8-10).

use super::*;

const GDT: usize = 0x100;
const OLD: usize = 0x200;
const NEW: usize = 0x300;
const LDT: usize = 0x400;
const OLD_SELECTOR: u16 = 0x08;
const NEW_SELECTOR: u16 = 0x10;
const CODE: u16 = 0x18;
const DATA: u16 = 0x20;
const LDT_SELECTOR: u16 = 0x28;
const ABSENT_DATA: u16 = 0x30;
const USER_CODE: u16 = 0x3b;
const USER_DATA: u16 = 0x43;
/// The new task's stack pointer.
const STACK: u32 = 0x800;

/// Bits of the busy TSS's access byte.
const BUSY: u8 = 2;

struct Cpu {
    memory: Vec<u8>,
    segments: [Segment; 6],
    ldtr: Segment,
    tr: Segment,
    registers: [u32; 8],
    address: u32,
    flags: u32,
    cr3: u32,
    task_switched: bool,
    /// Reads and writes above this address fail.
    limit: u64,
}

#[derive(Clone, Copy, Debug, PartialEq)]
struct Beyond;

impl TaskMachine for Cpu {
    type Stop = Beyond;

    fn read(&mut self, linear: Gva, data: &mut [u8]) -> Result<(), Beyond> {
        if linear.raw() >= self.limit {
            return Err(Beyond);
        }
        let at = linear.raw() as usize;
        data.copy_from_slice(&self.memory[at..at + data.len()]);
        Ok(())
    }

    fn write(&mut self, linear: Gva, data: &[u8]) -> Result<(), Beyond> {
        if linear.raw() >= self.limit {
            return Err(Beyond);
        }
        let at = linear.raw() as usize;
        self.memory[at..at + data.len()].copy_from_slice(data);
        Ok(())
    }

    fn global_table(&mut self) -> (u64, u32) {
        (GDT as u64, 0x47)
    }

    fn segment(&mut self, register: TaskSegment) -> Segment {
        match register {
            TaskSegment::Code(register) => self.segments[register as usize],
            TaskSegment::LocalTable => self.ldtr,
            TaskSegment::Task => self.tr,
        }
    }

    fn set_segment(&mut self, register: TaskSegment, value: &Segment) {
        match register {
            TaskSegment::Code(register) => self.segments[register as usize] = *value,
            TaskSegment::LocalTable => self.ldtr = *value,
            TaskSegment::Task => self.tr = *value,
        }
    }

    fn registers(&mut self) -> ([u32; 8], u32, u32) {
        (self.registers, self.address, self.flags)
    }

    fn set_registers(&mut self, registers: &[u32; 8], address: u32, flags: u32) {
        (self.registers, self.address, self.flags) = (*registers, address, flags);
    }

    fn load_cr3(&mut self, cr3: u32) -> Result<bool, Beyond> {
        self.cr3 = cr3;
        Ok(true)
    }

    fn note_switch(&mut self) {
        self.task_switched = true;
    }
}

impl Cpu {
    fn put16(&mut self, at: usize, value: u16) {
        self.memory[at..at + 2].copy_from_slice(&value.to_le_bytes());
    }

    fn put32(&mut self, at: usize, value: u32) {
        self.memory[at..at + 4].copy_from_slice(&value.to_le_bytes());
    }

    fn get16(&self, at: usize) -> u16 {
        u16::from_le_bytes([self.memory[at], self.memory[at + 1]])
    }

    fn get32(&self, at: usize) -> u32 {
        u32::from(self.get16(at)) | (u32::from(self.get16(at + 2)) << 16)
    }

    /// The access byte of a descriptor.
    fn access(&self, selector: u16) -> u8 {
        self.memory[GDT + usize::from(selector & !7) + 5]
    }

    fn descriptor(&mut self, selector: u16, value: u64) {
        let at = GDT + usize::from(selector & !7);
        self.memory[at..at + 8].copy_from_slice(&value.to_le_bytes());
    }

    /// A task that runs in protected mode without paging, and another with a 32-bit TSS.
    fn new() -> Self {
        let mut cpu = Self {
            memory: vec![0; 0x1000],
            segments: [Segment::default(); 6],
            ldtr: Segment::default(),
            tr: Segment {
                selector: OLD_SELECTOR,
                base: OLD as u64,
                limit: 103,
                access: AccessRights(0x8b),
            },
            registers: [0x10, 0x11, 0x12, 0x13, 0x14, 0x15, 0x16, 0x17],
            address: 0x1234,
            flags: 0x246,
            cr3: 0,
            task_switched: false,
            limit: 0x1000,
        };
        for (number, segment) in cpu.segments.iter_mut().enumerate() {
            segment.selector = 0x100 + number as u16;
        }
        cpu.descriptor(OLD_SELECTOR, 0x0000_8b00_0200_0067);
        cpu.descriptor(NEW_SELECTOR, 0x0000_8900_0300_0067);
        cpu.descriptor(CODE, 0x00cf_9a00_0000_ffff);
        cpu.descriptor(DATA, 0x00cf_9200_0000_ffff);
        cpu.descriptor(LDT_SELECTOR, 0x0000_8200_0400_000f);
        cpu.descriptor(ABSENT_DATA, 0x00cf_1200_0000_ffff);
        cpu.descriptor(USER_CODE, 0x00cf_fa00_0000_ffff);
        cpu.descriptor(USER_DATA, 0x00cf_f200_0000_ffff);
        cpu.put32(NEW + 0x1c, 0x5000);
        cpu.put32(NEW + 0x20, 0x8765_4321);
        cpu.put32(NEW + 0x24, 0x202);
        for number in 0..8 {
            cpu.put32(NEW + 0x28 + 4 * number, 0xa0 + number as u32);
        }
        cpu.put32(NEW + 0x38, STACK);
        for (offset, selector) in [
            (0x48, DATA),
            (0x4c, CODE),
            (0x50, DATA),
            (0x54, DATA),
            (0x58, 0),
            (0x5c, DATA),
        ] {
            cpu.put16(NEW + offset, selector);
        }
        cpu
    }

    fn switch(
        &mut self,
        source: TaskSwitchSource,
        error_code: Option<u32>,
    ) -> Result<bool, TaskStop<Beyond>> {
        switch_task(
            self,
            &TaskSwitch {
                source,
                selector: NEW_SELECTOR,
                return_address: 0x9999,
                error_code,
            },
        )
    }
}

fn exception(vector: ExceptionVector, code: u32) -> Result<bool, TaskStop<Beyond>> {
    Err(TaskStop::Fault(Exception::with_code(vector, code)))
}

#[test]
fn a_jump_saves_one_task_and_loads_the_other() {
    let mut cpu = Cpu::new();
    assert_eq!(cpu.switch(TaskSwitchSource::Jump, None), Ok(false));
    assert_eq!(cpu.get32(OLD + 0x20), 0x9999);
    assert_eq!(cpu.get32(OLD + 0x24), 0x246);
    assert_eq!(cpu.get32(OLD + 0x28), 0x10, "EAX");
    assert_eq!(cpu.get32(OLD + 0x44), 0x17, "EDI");
    assert_eq!(cpu.get16(OLD + 0x48), 0x100, "ES");
    assert_eq!(cpu.get16(OLD + 0x4c), 0x101, "CS");
    assert_eq!(cpu.get16(OLD + 0x5c), 0x105, "GS");
    assert_eq!(cpu.get16(OLD + 0x60), 0, "the LDT's selector is not saved");
    assert_eq!(cpu.address, 0x8765_4321);
    assert_eq!(cpu.flags, 0x202);
    assert_eq!(
        cpu.registers,
        [0xa0, 0xa1, 0xa2, 0xa3, STACK, 0xa5, 0xa6, 0xa7]
    );
    assert_eq!(cpu.cr3, 0x5000);
    assert!(cpu.task_switched);
    assert_eq!(cpu.access(OLD_SELECTOR) & BUSY, 0);
    assert_eq!(cpu.access(NEW_SELECTOR) & BUSY, BUSY);
    assert_eq!(cpu.get16(NEW), 0, "a jump leaves no link");
    assert_eq!((cpu.tr.selector, cpu.tr.base), (NEW_SELECTOR, NEW as u64));
    assert_eq!(cpu.tr.access.0, 0x8b);
    let [es, cs, ss, _, fs, _] = cpu.segments;
    assert_eq!(
        (cs.selector, cs.limit, cs.access.0),
        (CODE, u32::MAX, 0xc09b)
    );
    assert_eq!((ss.selector, ss.access.0), (DATA, 0xc093));
    assert_eq!(es.access.0, 0xc093);
    assert!(fs.access.is_unusable());
    assert_eq!(cpu.access(CODE), 0x9b, "loading a segment marks it as used");
}

#[test]
fn a_call_links_the_tasks_and_iret_goes_back() {
    let mut cpu = Cpu::new();
    assert_eq!(cpu.switch(TaskSwitchSource::Call, None), Ok(false));
    assert_eq!(cpu.get16(NEW), OLD_SELECTOR);
    assert_eq!(cpu.flags, 0x4202, "NT");
    assert_eq!(cpu.access(OLD_SELECTOR) & BUSY, BUSY, "it stays busy");
    // The first task needs selectors that can be loaded.
    for (offset, selector) in [
        (0x48, 0),
        (0x4c, CODE),
        (0x50, DATA),
        (0x54, 0),
        (0x58, 0),
        (0x5c, 0),
    ] {
        cpu.put16(OLD + offset, selector);
    }
    let back = TaskSwitch {
        source: TaskSwitchSource::Iret,
        selector: OLD_SELECTOR,
        return_address: 0x77,
        error_code: None,
    };
    assert_eq!(switch_task(&mut cpu, &back), Ok(false));
    assert_eq!(
        cpu.get32(NEW + 0x24),
        0x202,
        "the nested task's NT is cleared"
    );
    assert_eq!(cpu.access(NEW_SELECTOR) & BUSY, 0);
    assert_eq!(cpu.access(OLD_SELECTOR) & BUSY, BUSY);
    assert_eq!((cpu.address, cpu.flags), (0x9999, 0x246));
    assert_eq!(cpu.registers[0], 0x10);
}

#[test]
fn an_exception_brings_its_error_code() {
    let mut cpu = Cpu::new();
    assert_eq!(
        cpu.switch(TaskSwitchSource::Gate, Some(0x1234_5678)),
        Ok(false)
    );
    assert_eq!(cpu.registers[4], STACK - 4);
    assert_eq!(cpu.get32(STACK as usize - 4), 0x1234_5678);
    assert_eq!(cpu.get16(NEW), OLD_SELECTOR);
}

#[test]
fn an_error_code_needs_a_stack() {
    let mut cpu = Cpu::new();
    cpu.put32(NEW + 0x38, 2);
    // Byte granularity, 4 KiB: what is below address 0 is outside.
    cpu.descriptor(DATA, 0x0040_9200_0000_0fff);
    assert_eq!(
        cpu.switch(TaskSwitchSource::Gate, Some(0)),
        exception(ExceptionVector::StackFault, 0)
    );
    // One that grows down may reach from its limit up, and no lower.
    for (esp, fits) in [(0x804, true), (0x803, false)] {
        cpu = Cpu::new();
        cpu.put32(NEW + 0x38, esp);
        cpu.descriptor(DATA, 0x0040_9600_0000_07ff);
        let found = cpu.switch(TaskSwitchSource::Gate, Some(0));
        assert_eq!(found.is_ok(), fits, "{esp:#x}");
    }
}

#[test]
fn a_16_bit_task_has_its_own_layout() {
    let mut cpu = Cpu::new();
    cpu.memory[NEW..NEW + 0x80].fill(0);
    cpu.descriptor(NEW_SELECTOR, 0x0000_8100_0300_002b);
    cpu.put16(NEW + 14, 0x4321);
    cpu.put16(NEW + 16, 0x202);
    cpu.put16(NEW + 18, 0xa0);
    cpu.put16(NEW + 26, STACK as u16);
    cpu.put16(NEW + 32, 0xa7);
    for (offset, selector) in [(34, DATA), (36, CODE), (38, DATA), (40, 0)] {
        cpu.put16(NEW + offset, selector);
    }
    assert_eq!(
        cpu.switch(TaskSwitchSource::Gate, Some(0x1_0002)),
        Ok(false)
    );
    assert_eq!((cpu.address, cpu.flags), (0x4321, 0x4202));
    assert_eq!((cpu.registers[0], cpu.registers[7]), (0xa0, 0xa7));
    assert_eq!(cpu.cr3, 0, "there is none in it");
    assert_eq!(cpu.registers[4], STACK - 2);
    assert_eq!(cpu.get32(STACK as usize - 4), 0x0002_0000);
    assert_eq!(cpu.segments[SegmentRegister::Cs as usize].selector, CODE);
    // And back, saved in that layout.
    let back = TaskSwitch {
        source: TaskSwitchSource::Jump,
        selector: OLD_SELECTOR,
        return_address: 0x5555,
        error_code: None,
    };
    cpu.descriptor(OLD_SELECTOR, 0x0000_8900_0200_0067);
    let _ = switch_task(&mut cpu, &back);
    assert_eq!(cpu.get16(NEW + 14), 0x5555);
    assert_eq!(cpu.get16(NEW + 18), 0xa0);
    assert_eq!(cpu.get16(NEW + 36), CODE);
    assert_eq!(cpu.get16(NEW + 42), 0, "the LDT's selector is not saved");
}

#[test]
fn a_task_in_user_mode() {
    let mut cpu = Cpu::new();
    for (offset, selector) in [
        (0x48, USER_DATA),
        (0x4c, USER_CODE),
        (0x50, USER_DATA),
        (0x54, 0),
        (0x5c, 0),
    ] {
        cpu.put16(NEW + offset, selector);
    }
    assert_eq!(cpu.switch(TaskSwitchSource::Jump, None), Ok(false));
    assert_eq!(
        cpu.segments[SegmentRegister::Ss as usize]
            .access
            .privilege(),
        3
    );
    // It can't have the kernel's data.
    cpu = Cpu::new();
    for (offset, selector) in [(0x48, DATA), (0x4c, USER_CODE), (0x50, USER_DATA)] {
        cpu.put16(NEW + offset, selector);
    }
    assert_eq!(
        cpu.switch(TaskSwitchSource::Jump, None),
        exception(ExceptionVector::InvalidTss, DATA.into())
    );
}

#[test]
fn a_task_in_virtual_8086_mode() {
    let mut cpu = Cpu::new();
    cpu.put32(NEW + 0x24, 0x0002_0202);
    cpu.put16(NEW + 0x4c, 0xf000);
    assert_eq!(cpu.switch(TaskSwitchSource::Jump, None), Ok(false));
    let cs = cpu.segments[SegmentRegister::Cs as usize];
    assert_eq!((cs.selector, cs.base, cs.limit), (0xf000, 0xf_0000, 0xffff));
    assert_eq!(cs.access.0, 0xf3);
}

#[test]
fn segments_from_the_local_table() {
    let mut cpu = Cpu::new();
    cpu.put16(NEW + 0x60, LDT_SELECTOR);
    cpu.put16(NEW + 0x48, 0x0c);
    let data = 0x00cf_9200_0000_ffff_u64;
    cpu.memory[LDT + 8..LDT + 16].copy_from_slice(&data.to_le_bytes());
    assert_eq!(cpu.switch(TaskSwitchSource::Jump, None), Ok(false));
    assert_eq!((cpu.ldtr.base, cpu.ldtr.limit), (LDT as u64, 15));
    assert_eq!(cpu.segments[SegmentRegister::Es as usize].selector, 0x0c);
    // Past its limit, and without one.
    cpu = Cpu::new();
    cpu.put16(NEW + 0x60, LDT_SELECTOR);
    cpu.put16(NEW + 0x48, 0x14);
    assert_eq!(
        cpu.switch(TaskSwitchSource::Jump, None),
        exception(ExceptionVector::InvalidTss, 0x14)
    );
    cpu = Cpu::new();
    cpu.put16(NEW + 0x48, 0x0c);
    assert_eq!(
        cpu.switch(TaskSwitchSource::Jump, None),
        exception(ExceptionVector::InvalidTss, 0x0c)
    );
}

#[test]
fn each_fault_is_the_new_tasks() {
    let cases = [
        (0x4c, 0, ExceptionVector::InvalidTss, 0),
        (0x4c, DATA, ExceptionVector::InvalidTss, DATA),
        (0x4c, CODE | 1, ExceptionVector::InvalidTss, CODE),
        (0x50, 0, ExceptionVector::InvalidTss, 0),
        (0x50, CODE, ExceptionVector::InvalidTss, CODE),
        (0x50, ABSENT_DATA, ExceptionVector::StackFault, ABSENT_DATA),
        (
            0x54,
            ABSENT_DATA,
            ExceptionVector::SegmentNotPresent,
            ABSENT_DATA,
        ),
        (0x54, 0x48, ExceptionVector::InvalidTss, 0x48),
        (0x60, DATA, ExceptionVector::InvalidTss, DATA),
        (0x60, 0x0c, ExceptionVector::InvalidTss, 0x0c),
    ];
    for (offset, selector, vector, code) in cases {
        let mut cpu = Cpu::new();
        cpu.put16(NEW + offset, selector);
        assert_eq!(
            cpu.switch(TaskSwitchSource::Jump, None),
            exception(vector, code.into()),
            "{selector:#x} at {offset:#x}"
        );
        assert_eq!(cpu.tr.selector, NEW_SELECTOR);
        assert_eq!(cpu.address, 0x8765_4321);
    }
}

#[test]
fn what_cannot_be_read_changes_nothing() {
    let mut cpu = Cpu::new();
    cpu.limit = NEW as u64;
    assert_eq!(
        cpu.switch(TaskSwitchSource::Jump, None),
        Err(TaskStop::Machine(Beyond))
    );
    assert_eq!(cpu.tr.selector, OLD_SELECTOR);
    assert_eq!(cpu.get32(OLD + 0x20), 0);
    // A TSS that shrank since the CPU looked at it.
    cpu = Cpu::new();
    cpu.descriptor(NEW_SELECTOR, 0x0000_8900_0300_0066);
    assert_eq!(
        cpu.switch(TaskSwitchSource::Jump, None),
        exception(ExceptionVector::InvalidTss, NEW_SELECTOR.into())
    );
    assert_eq!(cpu.tr.selector, OLD_SELECTOR);
}

#[test]
fn the_trap_flag_is_told() {
    let mut cpu = Cpu::new();
    cpu.put32(NEW + 0x64, 1);
    assert_eq!(cpu.switch(TaskSwitchSource::Jump, None), Ok(true));
}
