// SPDX-License-Identifier: GPL-2.0

//! Instruction decoder and emulator: what the CPU could not do by itself on device memory.
//!
//! [`decode`] turns instruction bytes into an [`Instruction`] and [`execute`] carries it out on a
//! [`Machine`], which is the emulator's whole world. A form that is not in the list of
//! [`Operation`] ends in [`DecodeError::Unsupported`]: there is no guessing.
//!
//! # Restarting
//!
//! A read of device memory may have to be answered by userspace. Then [`Machine::read`] fails with
//! the machine's own [`Machine::Stop`], and the same instruction is executed again, from its start,
//! once the answer is there. So an instruction first checks its addresses, then makes all of its
//! reads, then at most one write, and only then changes registers, RFLAGS and RIP: up to there it
//! can be given up without a trace. A string instruction does so iteration by iteration.

mod decode;
mod descriptor;
mod execute;
mod instruction;
mod machine;
mod task;

pub use decode::{decode, DecodeError, MAX_LENGTH};
pub use execute::execute;
pub use instruction::{
    Arithmetic, Base, BitOperation, CodeSize, Encoding, Gpr, Index, Instruction, Memory, Operand,
    Operation, Repeat, Size, StringOperation, Unary, VectorMove,
};
pub use machine::{Machine, Mode, Progress, Protection, Stop, Vector};
pub use task::{switch_task, TaskMachine, TaskSegment, TaskStop, TaskSwitch, TaskSwitchSource};
