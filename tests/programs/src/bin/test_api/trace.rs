// SPDX-License-Identifier: GPL-2.0
//! RVISOR_TRACE_OPEN (include/uapi/rvisor.h).

use rvisor_tests::guest::{self, Mode};
use rvisor_tests::layout::{CODE, DATA, DONE_PORT, HOLE};
use rvisor_tests::mapping::Mapping;
use rvisor_tests::raw::{expect_errno, ioctl, owned, Errno};
use rvisor_tests::{check, check_eq, guest_code, uapi, Cpu, Device, Exit, Fail, Machine, Outcome};
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;

/// Bytes of a record, and how many can wait.
const RECORD: usize = 48;
const RECORDS: usize = 4096;
const PAGE: usize = 4096;

/// Basic exit reasons.
const CPUID: u64 = 10;
const IO: u64 = 30;
const RDMSR: u64 = 31;
const EPT_VIOLATION: u64 = 48;

/// One record's words: TSC, handling, RIP, qualification, detail, and reason with losses.
type Record = [u64; 6];

struct Trace(File);

impl Trace {
    /// Opens the trace of a vCPU.
    fn of(cpu: &Cpu) -> Result<Self, Fail> {
        match owned(ioctl(&cpu.fd, uapi::RVISOR_TRACE_OPEN, 0)) {
            Err(Errno(libc::EINVAL)) => Err(Fail::skip("rvisor's alone")),
            result => Ok(Self(File::from(result?))),
        }
    }

    fn set_at_once(&self) {
        // SAFETY: Changes a flag of the open file.
        unsafe { libc::fcntl(self.0.as_raw_fd(), libc::F_SETFL, libc::O_NONBLOCK) };
    }

    fn read(&self, count: usize) -> Result<Vec<Record>, Errno> {
        let mut bytes = vec![0; count];
        let mut file = &self.0;
        let read = file.read(&mut bytes);
        let length = read.map_err(|error| Errno(error.raw_os_error().unwrap_or(0)))?;
        let word = |bytes: &[u8]| {
            bytes
                .iter()
                .rev()
                .fold(0, |word, byte| (word << 8) | u64::from(*byte))
        };
        let record = |bytes: &[u8]| {
            let mut record = [0; 6];
            for (to, from) in record.iter_mut().zip(bytes.chunks(8)) {
                *to = word(from);
            }
            record
        };
        Ok(bytes[..length].chunks(RECORD).map(record).collect())
    }

    /// Whether poll(2) says that there is something to read.
    fn is_ready(&self) -> bool {
        let mut request = libc::pollfd {
            fd: self.0.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        // SAFETY: One request.
        let count = unsafe { libc::poll(&mut request, 1, 0) };
        count == 1 && request.revents == libc::POLLIN
    }
}

fn reason(record: &Record) -> u64 {
    record[5] & 0xffff_ffff
}

fn start(device: &Device, code: &[u8]) -> Result<(Machine, Cpu), Fail> {
    let machine = Machine::new(device)?;
    let cpu = machine.vcpu(0)?;
    guest::load(&machine, &cpu, Mode::Long, code)?;
    Ok((machine, cpu))
}

guest_code!(
    traced_guest,
    code64,
    [
        "out {done}, al",
        // At CODE + 2.
        "xor eax, eax",
        "cpuid",
        // At CODE + 6.
        "mov ecx, 0x1b",
        "rdmsr",
        // At CODE + 13.
        "mov ebx, {hole}",
        "mov [rbx + 8], eax",
        "out {done}, al",
        "out {done}, al",
    ],
    done = DONE_PORT,
    hole = HOLE as i32
);

/// Each exit is a record: what, where, when and for how long.
pub(crate) fn records(device: &Device) -> Outcome {
    let (_machine, cpu) = start(device, traced_guest())?;
    cpu.run_until_done()?;
    let trace = Trace::of(&cpu)?;
    trace.set_at_once();
    expect_errno(trace.read(RECORD), libc::EAGAIN, "before any exit")?;
    check!(!trace.is_ready(), "ready before any exit");
    let exit = cpu.run()?;
    check!(
        matches!(exit, Exit::MmioWrite { .. }),
        "{exit:?} instead of a write"
    );
    check!(trace.is_ready(), "not ready behind exits");
    // The last exit is there though no entry follows.
    cpu.run_until_done()?;
    // A buffer that has no place for half a record.
    let first = trace.read(RECORD + RECORD / 2)?;
    check_eq!(first.len(), 1, "records in a short buffer");
    let records = [first, trace.read(20 * RECORD)?].concat();
    expect_errno(trace.read(RECORD), libc::EAGAIN, "behind all of them")?;
    // Host interrupts and first touches of pages come between.
    let seen: Vec<&Record> = records
        .iter()
        .filter(|record| match reason(record) {
            EPT_VIOLATION => record[4] >= HOLE,
            reason => [CPUID, RDMSR, IO].contains(&reason),
        })
        .collect();
    let reasons: Vec<u64> = seen.iter().map(|record| reason(record)).collect();
    check_eq!(reasons, [CPUID, RDMSR, EPT_VIOLATION, IO], "the exits");
    let places: Vec<u64> = seen.iter().map(|record| record[2] - CODE).collect();
    check_eq!(places, [4, 11, 18, 21], "where they are");
    let details: Vec<u64> = seen[..3].iter().map(|record| record[4]).collect();
    check_eq!(details, [0, 0x1b, HOLE + 8], "RAX, the MSR and the address");
    check_eq!(
        seen[3][3],
        (u64::from(DONE_PORT) << 16) | (1 << 6),
        "OUT's qualification"
    );
    for pair in records.windows(2) {
        check!(
            pair[0][0] + pair[0][1] < pair[1][0],
            "{:?} is over before {:?}",
            pair[0],
            pair[1]
        );
    }
    check!(
        records
            .iter()
            .all(|record| record[1] > 0 && record[5] >> 32 == 0),
        "{records:?}"
    );
    Ok(())
}

/// What can go wrong, and that the trace ends with its file.
pub(crate) fn rules(device: &Device) -> Outcome {
    let (machine, cpu) = start(device, traced_guest())?;
    let trace = Trace::of(&cpu)?;
    let open = |argument| owned(ioctl(&cpu.fd, uapi::RVISOR_TRACE_OPEN, argument));
    expect_errno(open(0), libc::EBUSY, "a second one")?;
    expect_errno(open(1), libc::EINVAL, "with an argument")?;
    expect_errno(
        trace.read(RECORD - 1),
        libc::EINVAL,
        "a buffer that is too short",
    )?;
    check!((&trace.0).write(&[0; RECORD]).is_err(), "it can be written");
    cpu.run_until_done()?;
    let exit = cpu.run()?;
    check!(
        matches!(exit, Exit::MmioWrite { .. }),
        "{exit:?} instead of a write"
    );
    // SAFETY: An address that is nobody's: the kernel is to say so.
    let read = unsafe {
        libc::read(
            trace.0.as_raw_fd(),
            std::ptr::without_provenance_mut(8),
            RECORD,
        )
    };
    check_eq!(read, -1, "a read to no memory");
    check!(trace.is_ready(), "the record is lost with it");
    drop(trace);
    let trace = Trace::of(&cpu)?;
    check!(!trace.is_ready(), "records of another trace");
    drop(cpu);
    drop(machine);
    trace.set_at_once();
    expect_errno(trace.read(RECORD), libc::EAGAIN, "without its vCPU")
}

// With interrupts on: Bochs 3.0 gives no exit for the host's interrupts while a guest that was entered
// with IF clear leaves it so.
guest_code!(
    busy_guest,
    code64,
    [
        "sti",
        "mov ebx, {data}",
        "2: xor eax, eax",
        "push rbx",
        "cpuid",
        "pop rbx",
        "cmp byte ptr [rbx], 0",
        "je 2b",
        "out {done}, al",
        "mov esi, {loops}",
        "3: xor eax, eax",
        "cpuid",
        "dec esi",
        "jnz 3b",
        "out {done}, al",
        "xor eax, eax",
        "cpuid",
        "out {done}, al",
    ],
    data = DATA as i32,
    done = DONE_PORT,
    loops = RECORDS as i32 + 1000
);

/// A trace begins while the guest runs, and its reader waits for what comes.
pub(crate) fn live(device: &Device) -> Outcome {
    let (machine, cpu) = start(device, busy_guest())?;
    let records = std::thread::scope(|scope| {
        let guest = scope.spawn(|| cpu.run_until_done());
        let records = (|| {
            let trace = Trace::of(&cpu)?;
            let mut records = Vec::new();
            while records.len() < 500 {
                records.extend(trace.read(64 * RECORD)?);
            }
            Ok::<_, Fail>(records)
        })();
        machine.memory.write(DATA, &[1]);
        guest
            .join()
            .map_err(|_| Fail::new("the guest's thread"))??;
        records
    })?;
    let count = records
        .iter()
        .filter(|record| reason(record) == CPUID)
        .count();
    check!(count > 400, "{count} of {} are CPUID", records.len());
    Ok(())
}

/// Where the reader's memory ends, records that it did not get are there for the next read.
pub(crate) fn fault(device: &Device) -> Outcome {
    let (machine, cpu) = start(device, busy_guest())?;
    machine.memory.write(DATA, &[1]);
    let trace = Trace::of(&cpu)?;
    trace.set_at_once();
    cpu.run_until_done()?;
    cpu.run_until_done()?;
    let memory = Mapping::anonymous(2 * PAGE)?;
    // SAFETY: The second page of this mapping, of which nobody has a reference.
    let hidden = unsafe {
        let page = memory.address().add(PAGE);
        libc::mprotect(page.cast(), PAGE, libc::PROT_NONE)
    };
    check_eq!(hidden, 0, "mprotect");
    // SAFETY: The kernel is to write no further than it can.
    let read = unsafe { libc::read(trace.0.as_raw_fd(), memory.address().cast(), 2 * PAGE) };
    let before = PAGE / RECORD;
    check_eq!(
        usize::try_from(read),
        Ok(before * RECORD),
        "bytes up to the page's end"
    );
    let rest = trace.read(2 * RECORDS * RECORD)?;
    check_eq!(before + rest.len(), RECORDS, "records in both reads");
    Ok(())
}

/// What finds no place is counted.
pub(crate) fn losses(device: &Device) -> Outcome {
    let (machine, cpu) = start(device, busy_guest())?;
    machine.memory.write(DATA, &[1]);
    cpu.run_until_done()?;
    let trace = Trace::of(&cpu)?;
    trace.set_at_once();
    cpu.run_until_done()?;
    let records = trace.read(2 * RECORDS * RECORD)?;
    check_eq!(records.len(), RECORDS, "records that waited");
    check!(
        records.iter().all(|record| record[5] >> 32 == 0),
        "losses before them"
    );
    cpu.run_until_done()?;
    let records = trace.read(2 * RECORDS * RECORD)?;
    let lost = records[0][5] >> 32;
    check!((1000..3000).contains(&lost), "{lost} were lost");
    check!(
        records[1..].iter().all(|record| record[5] >> 32 == 0),
        "more losses"
    );
    Ok(())
}
