// SPDX-License-Identifier: GPL-2.0

//! `rvisor trace`: the exits of a machine as they happen, from rvisor's stream of each virtual CPU
//! (include/uapi/rvisor.h). It costs nothing while nobody looks.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use serde::{Deserialize, Serialize};

use crate::control::{self, Client, Nothing, Request};
use crate::error::{failed, Error, Result};
use crate::machine::Machine;
use crate::ready::{self, PollFlags};
use crate::registry::Name;
use crate::stat::counters::number;

/// Bytes of a record, and how many are read at once.
const RECORD: usize = 48;
const RECORDS: usize = 256;

/// The basic exit reasons, in the order of their numbers (SDM volume 3, appendix C).
const REASONS: &str = "
    EXCEPTION_NMI EXTERNAL_INTERRUPT TRIPLE_FAULT INIT SIPI IO_SMI OTHER_SMI INTERRUPT_WINDOW NMI_WINDOW
    TASK_SWITCH CPUID GETSEC HLT INVD INVLPG RDPMC RDTSC RSM VMCALL VMCLEAR VMLAUNCH VMPTRLD VMPTRST VMREAD
    VMRESUME VMWRITE VMXOFF VMXON CR_ACCESS DR_ACCESS IO_INSTRUCTION RDMSR WRMSR INVALID_GUEST_STATE MSR_LOADING
    35 MWAIT MONITOR_TRAP 38 MONITOR PAUSE MACHINE_CHECK 42 TPR_BELOW_THRESHOLD APIC_ACCESS VIRTUALIZED_EOI
    GDTR_IDTR LDTR_TR EPT_VIOLATION EPT_MISCONFIGURATION INVEPT RDTSCP PREEMPTION_TIMER INVVPID WBINVD XSETBV
    APIC_WRITE RDRAND INVPCID VMFUNC ENCLS RDSEED PML_FULL XSAVES XRSTORS
";

fn reasons() -> impl Iterator<Item = &'static str> {
    REASONS.split_whitespace()
}

/// The name of a basic exit reason, or its number.
#[must_use]
pub fn reason_name(reason: u32) -> String {
    let known = reasons().nth(reason as usize);
    known.map_or_else(|| reason.to_string(), str::to_owned)
}

/// The arguments of the command `trace`.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Wanted {
    /// Reasons by their names; all where there is none.
    #[serde(default)]
    pub reasons: Vec<String>,
    /// The CPU; all where none is given.
    #[serde(default)]
    pub cpu: Option<u32>,
}

/// One exit: a line of `trace`'s stream.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exit {
    /// The virtual CPU.
    pub cpu: u32,
    /// The host's TSC at the exit.
    pub tsc: u64,
    /// The reason's name.
    pub reason: String,
    /// The guest's RIP.
    pub rip: u64,
    /// TSC cycles until the guest was entered again, or its thread slept.
    pub handling: u64,
    /// The exit qualification.
    pub qualification: u64,
    /// The guest-physical address of an EPT violation, ECX of RDMSR and WRMSR, else RAX.
    pub detail: u64,
    /// Exits before this one for which there was no place.
    pub lost: u32,
}

impl Exit {
    fn new(cpu: u32, record: &[u8]) -> Self {
        let word = |place: usize| number(record, 8 * place, 8);
        Self {
            cpu,
            tsc: word(0),
            handling: word(1),
            rip: word(2),
            qualification: word(3),
            detail: word(4),
            reason: reason_name((word(5) & 0xffff) as u32),
            lost: (word(5) >> 32) as u32,
        }
    }
}

/// The command `trace`: a stream of [`Exit`]s, one JSON object a line.
///
/// # Errors
///
/// [`Error::Input`] where the hypervisor has no trace, or somebody else looks.
pub(crate) fn stream(machine: &Machine, wanted: &Wanted, mut client: &UnixStream) -> Result<()> {
    let mut traces = Vec::new();
    for vcpu in &machine.vcpus {
        if wanted.cpu.is_none_or(|cpu| cpu == vcpu.id) {
            traces.push((vcpu.id, vcpu.trace().map_err(refused)?));
        }
    }
    if let Some(cpu) = wanted.cpu
        && traces.is_empty()
    {
        let last = machine.vcpus.len() - 1;
        return Err(Error::input(
            format!("machine {} has no CPU {cpu}", machine.name),
            format!("give one from 0 to {last}"),
        ));
    }
    while !control::gone(client) {
        let mut files: Vec<(&dyn AsFd, _)> = vec![(&client, PollFlags::RDHUP)];
        files.extend(
            traces
                .iter()
                .map(|(_, file)| (file as &dyn AsFd, PollFlags::IN)),
        );
        let ready = ready::wait(&files, None).map_err(failed("waiting for exits"))?;
        for ((cpu, file), ready) in traces.iter().zip(&ready[1..]) {
            if *ready {
                let lines = read(*cpu, file, &wanted.reasons)?;
                client
                    .write_all(&lines)
                    .map_err(failed("writing the trace"))?;
            }
        }
    }
    Ok(())
}

/// The exits that wait, those that are wanted, as lines.
fn read(cpu: u32, mut file: &File, reasons: &[String]) -> Result<Vec<u8>> {
    let mut bytes = [0; RECORD * RECORDS];
    let count = file.read(&mut bytes).map_err(failed("reading the trace"))?;
    let mut lines = Vec::new();
    for record in bytes[..count].chunks_exact(RECORD) {
        let exit = Exit::new(cpu, record);
        if reasons.is_empty() || reasons.contains(&exit.reason) {
            serde_json::to_writer(&mut lines, &exit).map_err(failed("writing the trace"))?;
            lines.push(b'\n');
        }
    }
    Ok(lines)
}

fn refused(error: io::Error) -> Error {
    match error.raw_os_error() {
        Some(libc::ENOTTY | libc::EINVAL) => Error::input(
            "this hypervisor has no trace of a machine's exits",
            "run the machine on /dev/rvisor; for KVM there is the tracepoint kvm:kvm_exit ('perf trace')",
        ),
        Some(libc::EBUSY) => Error::input("the machine is being traced already", "end the other 'rvisor trace' first"),
        _ => Error::call("opening the trace", error),
    }
}

/// Prints the exits of a machine until it ends or nobody reads them any more.
///
/// # Errors
///
/// [`Error::Input`] where no such machine runs, a reason is none, or the hypervisor has no trace.
pub fn run(name: &Name, mut wanted: Wanted, json: bool) -> Result<()> {
    for reason in &mut wanted.reasons {
        reason.make_ascii_uppercase();
        if !reasons().any(|known| known == *reason) {
            return Err(Error::input(
                format!("{reason} is no exit reason"),
                format!("give one of {}", reasons().collect::<Vec<_>>().join(", ")),
            ));
        }
    }
    let mut client = Client::connect(name)?;
    let Nothing {} = client.call(&Request::Trace(wanted))?;
    let mut stdout = io::stdout().lock();
    while let Some(exit) = client.next_object::<Exit>()? {
        let line = match json {
            true => serde_json::to_string(&exit).map_err(failed("writing JSON"))?,
            false => text(&exit),
        };
        match writeln!(stdout, "{line}") {
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(()),
            result => result.map_err(failed("writing standard output"))?,
        }
    }
    Ok(())
}

fn text(exit: &Exit) -> String {
    let lost = match exit.lost {
        0 => String::new(),
        lost => format!("  ({lost} before it were lost)"),
    };
    format!(
        "{:>20} CPU {:<3} {:<20} rip {:#018x} qualification {:#x} detail {:#x} handled in {} cycles{lost}",
        exit.tsc, exit.cpu, exit.reason, exit.rip, exit.qualification, exit.detail, exit.handling
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons_have_the_numbers_of_the_sdm() {
        for (number, name) in [
            (0, "EXCEPTION_NMI"),
            (12, "HLT"),
            (30, "IO_INSTRUCTION"),
            (48, "EPT_VIOLATION"),
            (55, "XSETBV"),
            (64, "XRSTORS"),
            (65, "65"),
            (u32::MAX, "4294967295"),
        ] {
            assert_eq!(reason_name(number), name);
        }
    }

    #[test]
    fn a_record_becomes_a_line() {
        let mut record = [0; RECORD];
        for (place, value) in [1_u64, 2, 0xfff0, 4, 5, (3 << 32) | 0x8000_0030]
            .iter()
            .enumerate()
        {
            record[8 * place..][..8].copy_from_slice(&value.to_le_bytes());
        }
        let exit = Exit::new(1, &record);
        assert_eq!(
            (exit.tsc, exit.handling, exit.rip, exit.lost),
            (1, 2, 0xfff0, 3)
        );
        let line = text(&exit);
        assert!(
            line.contains("CPU 1   EPT_VIOLATION") && line.contains("(3 before it were lost)"),
            "{line}"
        );
    }

    #[test]
    fn what_the_machine_refuses_is_told() {
        assert_eq!(
            refused(io::Error::from_raw_os_error(libc::ENOTTY)).status(),
            2
        );
    }
}
