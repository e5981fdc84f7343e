// SPDX-License-Identifier: GPL-2.0

//! Hardware task switches (SDM vol. 3, chapter 8), none of which a guest's CPU makes by itself.
//!
//! The CPU has checked the gate and the new task's descriptor before it exits (SDM vol. 3, 27.4.2).

use super::descriptor::{self, Descriptor, SystemType};
use crate::x86::{
    address::Gva,
    control::Rflags,
    segment::{AccessRights, Segment, SegmentRegister},
    vector::{Exception, ExceptionVector},
};

/// What started a task switch, numbered as in the exit qualification (SDM vol. 3, table 29-2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum TaskSwitchSource {
    /// CALL.
    Call = 0,
    /// IRET.
    Iret = 1,
    /// JMP.
    Jump = 2,
    /// A task gate of the IDT.
    Gate = 3,
}

/// A task switch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TaskSwitch {
    /// What started it.
    pub source: TaskSwitchSource,
    /// The selector of the new task's TSS.
    pub selector: u16,
    /// Where the old task goes on.
    pub return_address: u32,
    /// The error code that the new task finds on its stack.
    pub error_code: Option<u32>,
}

impl TaskSwitch {
    /// Source and selector from the exit qualification; the rest follows from what was interrupted.
    pub const fn from_qualification(qualification: u64) -> Self {
        Self {
            source: match (qualification >> 30) & 3 {
                0 => TaskSwitchSource::Call,
                1 => TaskSwitchSource::Iret,
                2 => TaskSwitchSource::Jump,
                _ => TaskSwitchSource::Gate,
            },
            selector: (qualification & 0xffff) as u16,
            return_address: 0,
            error_code: None,
        }
    }
}

/// Why a task switch ended early.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TaskStop<S> {
    /// An exception: in the old task where nothing has changed yet, else before the first instruction of
    /// the new one.
    Fault(Exception),
    /// What [`TaskMachine::read`] or another method answered.
    Machine(S),
}

impl<S> From<S> for TaskStop<S> {
    fn from(stop: S) -> Self {
        Self::Machine(stop)
    }
}

/// A segment register, or one of the two that name a system segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TaskSegment {
    /// ES to GS.
    Code(SegmentRegister),
    /// LDTR.
    LocalTable,
    /// TR.
    Task,
}

/// The virtual CPU as a task switch sees it.
pub trait TaskMachine {
    /// Why an access can't be done now.
    type Stop;

    /// Reads at a linear address as the CPU itself does, whatever the privilege level.
    ///
    /// # Errors
    ///
    /// The implementor's reason, a page fault for one.
    fn read(&mut self, linear: Gva, data: &mut [u8]) -> Result<(), Self::Stop>;

    /// Writes likewise.
    ///
    /// # Errors
    ///
    /// As [`TaskMachine::read`].
    fn write(&mut self, linear: Gva, data: &[u8]) -> Result<(), Self::Stop>;

    /// GDTR: base and limit.
    fn global_table(&mut self) -> (u64, u32);

    /// A segment register with its hidden part.
    fn segment(&mut self, register: TaskSegment) -> Segment;

    /// Sets it.
    fn set_segment(&mut self, register: TaskSegment, value: &Segment);

    /// The general registers, numbered as in instructions, EIP and EFLAGS.
    fn registers(&mut self) -> ([u32; 8], u32, u32);

    /// Sets them.
    fn set_registers(&mut self, registers: &[u32; 8], address: u32, flags: u32);

    /// Loads CR3 where paging is on. `false` where the CPU would not take it.
    ///
    /// # Errors
    ///
    /// As [`TaskMachine::read`].
    fn load_cr3(&mut self, cr3: u32) -> Result<bool, Self::Stop>;

    /// Sets CR0.TS and clears the local breakpoints of DR7.
    fn note_switch(&mut self);
}

/// The two layouts of a TSS (SDM vol. 3, figures 8-2 and 8-10).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Layout {
    Bits16,
    Bits32,
}

/// The size of the larger layout in bytes.
const LARGEST: usize = 104;
/// EFLAGS: nested task, virtual-8086 mode, and the bit that is always set.
const NT: u32 = (Rflags::NT & 0xffff_ffff) as u32;
const VM: u32 = (Rflags::VM & 0xffff_ffff) as u32;
const FIXED: u32 = (Rflags::FIXED & 0xffff_ffff) as u32;
/// The previous task link, at the beginning of both.
const LINK_SIZE: usize = 2;
/// Selectors in a TSS, in its order.
const SELECTORS: [SegmentRegister; 6] = [
    SegmentRegister::Es,
    SegmentRegister::Cs,
    SegmentRegister::Ss,
    SegmentRegister::Ds,
    SegmentRegister::Fs,
    SegmentRegister::Gs,
];

impl Layout {
    const fn of(kind: u8) -> Self {
        // Bit 3 tells 32-bit system segments from 16-bit ones.
        if kind & 8 != 0 {
            Self::Bits32
        } else {
            Self::Bits16
        }
    }

    const fn size(self) -> usize {
        match self {
            Self::Bits16 => 44,
            Self::Bits32 => LARGEST,
        }
    }

    /// Bytes of a register.
    const fn width(self) -> usize {
        match self {
            Self::Bits16 => 2,
            Self::Bits32 => 4,
        }
    }

    /// Where the instruction pointer lies; flags, general registers and selectors follow it.
    const fn first(self) -> usize {
        match self {
            Self::Bits16 => 14,
            Self::Bits32 => 32,
        }
    }

    /// FS and GS have no place in a 16-bit TSS.
    fn selectors(self) -> impl Iterator<Item = SegmentRegister> {
        SELECTORS.into_iter().take(match self {
            Self::Bits16 => 4,
            Self::Bits32 => 6,
        })
    }

    /// The bytes between the instruction pointer and the LDT's selector, which a switch saves.
    const fn saved(self) -> usize {
        match self {
            Self::Bits16 => 14 * 2,
            Self::Bits32 => 16 * 4,
        }
    }
}

/// What a TSS tells of a task.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Task {
    cr3: Option<u32>,
    address: u32,
    flags: u32,
    registers: [u32; 8],
    selectors: [u16; 6],
    local_table: u16,
    trap: bool,
}

impl Task {
    fn parse(layout: Layout, bytes: &[u8; LARGEST]) -> Self {
        let width = layout.width();
        let word = |offset: usize| {
            bytes
                .iter()
                .skip(offset)
                .take(width)
                .rev()
                .fold(0u32, |value, byte| (value << 8) | u32::from(*byte))
        };
        let place = |number: usize| layout.first().saturating_add(number.saturating_mul(width));
        let mut task = Self {
            cr3: (layout == Layout::Bits32).then(|| word(28)),
            address: word(place(0)),
            flags: word(place(1)),
            trap: layout == Layout::Bits32 && word(100) & 1 != 0,
            ..Self::default()
        };
        for (number, register) in (2..).zip(&mut task.registers) {
            *register = word(place(number));
        }
        let count = layout.selectors().count();
        for (number, selector) in (10..).zip(task.selectors.iter_mut().take(count)) {
            *selector = (word(place(number)) & 0xffff) as u16;
        }
        task.local_table = (word(place(count.saturating_add(10))) & 0xffff) as u16;
        task
    }

    /// The part that a switch saves, from the instruction pointer on.
    fn image(&self, layout: Layout) -> [u8; 64] {
        let mut image = [0; 64];
        let words = [self.address, self.flags]
            .into_iter()
            .chain(self.registers)
            .chain(self.selectors.map(u32::from));
        for (place, word) in image.chunks_mut(layout.width()).zip(words) {
            for (to, from) in place.iter_mut().zip(word.to_le_bytes()) {
                *to = from;
            }
        }
        image
    }
}

/// Makes the switch. `true` where the new task wants a debug exception first (its TSS's T flag).
///
/// # Errors
///
/// [`TaskStop`].
pub fn switch_task<M: TaskMachine>(
    machine: &mut M,
    switch: &TaskSwitch,
) -> Result<bool, TaskStop<M::Stop>> {
    let invalid =
        Exception::with_code(ExceptionVector::InvalidTss, u32::from(switch.selector & !3));
    let table = machine.global_table();
    let new = descriptor::read(machine, table, switch.selector)?.ok_or(TaskStop::Fault(invalid))?;
    let new_segment = new.segment(switch.selector);
    let layout = Layout::of(new_segment.access.kind());
    // Another CPU may have changed it since it was checked.
    if !new.is_task() || (new_segment.limit as usize) < layout.size().saturating_sub(1) {
        return Err(TaskStop::Fault(invalid));
    }
    let mut bytes = [0; LARGEST];
    if let Some(image) = bytes.get_mut(..layout.size()) {
        machine.read(Gva::new(new_segment.base), image)?;
    }
    let task = Task::parse(layout, &bytes);

    let old = machine.segment(TaskSegment::Task);
    save(machine, &old, switch)?;
    let mut flags = task.flags;
    if matches!(
        switch.source,
        TaskSwitchSource::Call | TaskSwitchSource::Gate
    ) {
        let link: [u8; LINK_SIZE] = old.selector.to_le_bytes();
        machine.write(Gva::new(new_segment.base), &link)?;
        flags |= NT;
    }
    if matches!(
        switch.source,
        TaskSwitchSource::Jump | TaskSwitchSource::Iret
    ) {
        set_busy(machine, table, old.selector, false)?;
    }
    if switch.source != TaskSwitchSource::Iret {
        set_busy(machine, table, switch.selector, true)?;
    }
    enter(machine, &new_segment, &task, flags, invalid)?;
    if let Some(code) = switch.error_code {
        push(
            machine,
            code.to_le_bytes().get(..layout.width()).unwrap_or_default(),
        )?;
    }
    Ok(task.trap)
}

/// Takes an error code onto the new task's stack.
fn push<M: TaskMachine>(machine: &mut M, bytes: &[u8]) -> Result<(), TaskStop<M::Stop>> {
    let stack = machine.segment(TaskSegment::Code(SegmentRegister::Ss));
    let (mut registers, address, flags) = machine.registers();
    let [_, _, _, _, esp, ..] = &mut registers;
    let mask = if stack.access.is_big() {
        u32::MAX
    } else {
        0xffff
    };
    let length = bytes.len() as u64;
    let top = u64::from(*esp).wrapping_sub(length) & u64::from(mask);
    let last = top.saturating_add(length).saturating_sub(1);
    let limit = u64::from(stack.limit);
    // Bit 2 of a data segment's type: it grows down, from the top to above its limit.
    let is_inside = if stack.access.kind() & 4 != 0 {
        top > limit && last <= mask.into()
    } else {
        last <= limit
    };
    if !is_inside {
        return Err(fault(ExceptionVector::StackFault, 0));
    }
    machine.write(Gva::new(stack.base.wrapping_add(top) & 0xffff_ffff), bytes)?;
    *esp = (*esp & !mask) | (top & 0xffff_ffff) as u32;
    machine.set_registers(&registers, address, flags);
    Ok(())
}

/// Writes the old task's state into its TSS.
fn save<M: TaskMachine>(
    machine: &mut M,
    old: &Segment,
    switch: &TaskSwitch,
) -> Result<(), M::Stop> {
    let layout = Layout::of(old.access.kind());
    let (registers, _, mut flags) = machine.registers();
    if switch.source == TaskSwitchSource::Iret {
        flags &= !NT;
    }
    let mut task = Task {
        address: switch.return_address,
        flags,
        registers,
        ..Task::default()
    };
    for (selector, register) in task.selectors.iter_mut().zip(SELECTORS) {
        *selector = machine.segment(TaskSegment::Code(register)).selector;
    }
    let image = task.image(layout);
    let address = Gva::new(old.base).wrapping_add(layout.first() as u64);
    machine.write(address, image.get(..layout.saved()).unwrap_or(&image))
}

/// Sets or clears the busy flag of a TSS's descriptor.
fn set_busy<M: TaskMachine>(
    machine: &mut M,
    table: (u64, u32),
    selector: u16,
    busy: bool,
) -> Result<(), M::Stop> {
    let Some(found) = descriptor::read(machine, table, selector)? else {
        return Ok(());
    };
    descriptor::write(machine, table, selector, found.with_busy(busy))
}

/// Loads the new task's state, the registers first, then the segments, which may fault.
fn enter<M: TaskMachine>(
    machine: &mut M,
    tss: &Segment,
    task: &Task,
    flags: u32,
    invalid: Exception,
) -> Result<(), TaskStop<M::Stop>> {
    const DEFINED: u32 = 0x003f_7fd5;
    let busy = Segment {
        access: AccessRights(tss.access.0 | 2),
        ..*tss
    };
    machine.set_segment(TaskSegment::Task, &busy);
    machine.note_switch();
    let has_cr3 = match task.cr3 {
        Some(cr3) => machine.load_cr3(cr3)?,
        None => true,
    };
    let flags = (flags & DEFINED) | FIXED;
    machine.set_registers(&task.registers, task.address, flags);
    let virtual_8086 = flags & VM != 0;
    // Until they are loaded, the registers have the selectors and can't be used.
    for (register, selector) in SELECTORS.into_iter().zip(task.selectors) {
        let segment = if virtual_8086 {
            descriptor::virtual_8086_segment(selector)
        } else {
            descriptor::unusable(selector)
        };
        machine.set_segment(TaskSegment::Code(register), &segment);
    }
    let unusable = descriptor::unusable(task.local_table);
    machine.set_segment(TaskSegment::LocalTable, &unusable);
    if !has_cr3 {
        return Err(TaskStop::Fault(invalid));
    }
    load_local_table(machine, task.local_table)?;
    if virtual_8086 {
        return Ok(());
    }
    let level = (task.selectors[1] & 3) as u8;
    // CS and SS first: what the others may be depends on the privilege level.
    for register in [SegmentRegister::Cs, SegmentRegister::Ss]
        .into_iter()
        .chain([
            SegmentRegister::Es,
            SegmentRegister::Ds,
            SegmentRegister::Fs,
            SegmentRegister::Gs,
        ])
    {
        let selector = machine.segment(TaskSegment::Code(register)).selector;
        load_segment(machine, register, selector, level)?;
    }
    Ok(())
}

fn fault<S>(vector: ExceptionVector, selector: u16) -> TaskStop<S> {
    TaskStop::Fault(Exception::with_code(vector, u32::from(selector & !3)))
}

fn load_local_table<M: TaskMachine>(
    machine: &mut M,
    selector: u16,
) -> Result<(), TaskStop<M::Stop>> {
    if descriptor::is_null(selector) {
        return Ok(());
    }
    let invalid = fault(ExceptionVector::InvalidTss, selector);
    if descriptor::is_local(selector) {
        return Err(invalid);
    }
    let table = machine.global_table();
    match descriptor::read(machine, table, selector)? {
        Some(found) if found.system_type() == Some(SystemType::LocalTable) => {
            if !found.is_present() {
                return Err(invalid);
            }
            machine.set_segment(TaskSegment::LocalTable, &found.segment(selector));
            Ok(())
        }
        _ => Err(invalid),
    }
}

/// Loads a segment register in the new task, at its privilege level (SDM vol. 3, table 8-1).
fn load_segment<M: TaskMachine>(
    machine: &mut M,
    register: SegmentRegister,
    selector: u16,
    level: u8,
) -> Result<(), TaskStop<M::Stop>> {
    let invalid = fault(ExceptionVector::InvalidTss, selector);
    let is_code = register == SegmentRegister::Cs;
    let is_stack = register == SegmentRegister::Ss;
    if descriptor::is_null(selector) {
        return if is_code || is_stack {
            Err(invalid)
        } else {
            Ok(())
        };
    }
    let table = if descriptor::is_local(selector) {
        let local = machine.segment(TaskSegment::LocalTable);
        if local.access.is_unusable() {
            return Err(invalid);
        }
        (local.base, local.limit)
    } else {
        machine.global_table()
    };
    let Some(found) = descriptor::read(machine, table, selector)? else {
        return Err(invalid);
    };
    let fits = if is_code {
        found.may_be_code(selector, level)
    } else if is_stack {
        found.may_be_stack(selector, level)
    } else {
        found.may_be_data(selector, level)
    };
    if !fits {
        return Err(invalid);
    }
    if !found.is_present() {
        return Err(fault(
            if is_stack {
                ExceptionVector::StackFault
            } else {
                ExceptionVector::SegmentNotPresent
            },
            selector,
        ));
    }
    let used = found.accessed();
    if used != found {
        descriptor::write(machine, table, selector, used)?;
    }
    machine.set_segment(TaskSegment::Code(register), &used.segment(selector));
    Ok(())
}

impl Descriptor {
    /// A TSS, busy or not.
    fn is_task(self) -> bool {
        matches!(
            self.system_type(),
            Some(SystemType::Task16 | SystemType::Task32)
        )
    }
}

#[cfg(test)]
#[path = "task_tests.rs"]
mod tests;
