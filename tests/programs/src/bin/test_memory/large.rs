// SPDX-License-Identifier: GPL-2.0
//! Large pages: one fault for all of one, and what becomes of it when the process's mapping changes.

use crate::guests::{touch_all, Guest, PAGE, PLACE};
use rvisor_tests::guest::{self, Mode};
use rvisor_tests::host::{guest_table_pages, Setting};
use rvisor_tests::layout::DONE_PORT;
use rvisor_tests::mapping::Mapping;
use rvisor_tests::{check, check_eq, guest_code, Device, Fail, Machine, Outcome};

const MIB2: usize = 2 << 20;
const GIB: usize = 1 << 30;
/// madvise(2): make a huge page of what is there.
const MADV_COLLAPSE: i32 = 25;

fn touch(device: &Device, length: usize, advice: i32) -> Outcome {
    let machine = Machine::new(device)?;
    let memory = Mapping::anonymous(length)?;
    memory.advise(0, length, advice)?;
    machine.set_slot(1, 0, PLACE, &memory, 0, length)?;
    let cpu = machine.vcpu(0)?;
    guest::load(&machine, &cpu, Mode::Long, touch_all())?;
    let mut regs = cpu.regs()?;
    (regs.rsi, regs.rdi) = (PLACE, PLACE + length as u64);
    cpu.set_regs(&regs)?;
    cpu.run_until_done()?;
    check_eq!(
        cpu.regs()?.rax,
        (length / PAGE) as u64,
        "pages that hold their address"
    );
    for page in (0..length).step_by(PAGE) {
        let found = memory.read_u64(page as u64 + 8);
        check_eq!(found, PLACE + page as u64, "page {page:#x} in the host");
    }
    Ok(())
}

pub(crate) fn demand_paging(device: &Device) -> Outcome {
    touch(device, 8 << 20, libc::MADV_NOHUGEPAGE)
}

pub(crate) fn huge_pages(device: &Device) -> Outcome {
    touch(device, 64 << 20, libc::MADV_HUGEPAGE)
}

// Writes to each page from RSI to RDI, RDX bytes apart. R9 is how many took R8 ticks of the TSC or more,
// R10 the least that one took.
guest_code!(
    timed,
    code64,
    [
        "mov rbp, rdx",
        "xor r9d, r9d",
        "mov r10, -1",
        "2: rdtsc",
        "shl rdx, 32",
        "lea r13, [rax + rdx]",
        "mov [rsi], rsi",
        "rdtsc",
        "shl rdx, 32",
        "add rax, rdx",
        "sub rax, r13",
        "cmp rax, r10",
        "cmovb r10, rax",
        "cmp rax, r8",
        "jb 3f",
        "inc r9",
        "3: add rsi, rbp",
        "cmp rsi, rdi",
        "jb 2b",
        "out {done}, al",
    ],
    done = DONE_PORT
);

// The same, but the pages hold code: each is called, then written to.
guest_code!(
    timed_calls,
    code64,
    [
        "mov rbp, rdx",
        "xor r9d, r9d",
        "mov r10, -1",
        "2: rdtsc",
        "shl rdx, 32",
        "lea r13, [rax + rdx]",
        "call rsi",
        "mov [rsi + 64], rsi",
        "rdtsc",
        "shl rdx, 32",
        "add rax, rdx",
        "sub rax, r13",
        "cmp rax, r10",
        "cmovb r10, rax",
        "cmp rax, r8",
        "jb 3f",
        "inc r9",
        "3: add rsi, rbp",
        "cmp rsi, rdi",
        "jb 2b",
        "out {done}, al",
    ],
    done = DONE_PORT
);

/// A guest that times its accesses, with one region of its own.
pub(crate) struct Timed {
    pub(crate) guest: Guest,
    /// What an access takes at least that the host has to see to.
    slow: u64,
}

/// Pages that are slow although they are mapped: those during which the host took an interrupt.
const INTERRUPTED: u64 = 16;

impl Timed {
    /// Learns from 512 small pages, which the process has already, what a fault takes.
    pub(crate) fn new(device: &Device) -> Result<Self, Fail> {
        let guest = Guest::with(device, timed())?;
        let mut timed = Self { guest, slow: 0 };
        let memory = Mapping::anonymous(MIB2)?;
        memory.advise(0, MIB2, libc::MADV_NOHUGEPAGE)?;
        for page in (0..MIB2).step_by(PAGE) {
            memory.write_u64(page as u64, 1);
        }
        timed.show(&memory)?;
        let (_, least) = timed.count(PLACE, MIB2, PAGE)?;
        timed.slow = least / 2;
        // The measure itself: mapped pages are quick, and anew each is a fault of its own.
        timed.check_mapped(PLACE, MIB2, PAGE, 0)?;
        timed.hide(&memory)?;
        timed.show(&memory)?;
        let (faults, _) = timed.count(PLACE, MIB2, PAGE)?;
        check_eq!(faults, 512, "slow accesses to 512 small pages");
        timed.hide(&memory)?;
        Ok(timed)
    }

    /// No memory at [`PLACE`].
    fn hide(&self, memory: &Mapping) -> Outcome {
        self.guest.machine.set_slot(1, 0, PLACE, memory, 0, 0)
    }

    /// Memory at [`PLACE`], in slot 1.
    fn show(&self, memory: &Mapping) -> Outcome {
        self.guest
            .machine
            .set_slot(1, 0, PLACE, memory, 0, memory.len())
    }

    /// Touches `length` bytes from `start`: how many accesses were slow, and the quickest one.
    pub(crate) fn count(&self, start: u64, length: usize, step: usize) -> Result<(u64, u64), Fail> {
        let cpu = &self.guest.cpu;
        let mut regs = cpu.regs()?;
        regs.rip = rvisor_tests::layout::CODE;
        (regs.rsi, regs.rdi) = (start, start + length as u64);
        (regs.rdx, regs.r8) = (step as u64, self.slow);
        cpu.set_regs(&regs)?;
        cpu.run_until_done()?;
        let regs = cpu.regs()?;
        Ok((regs.r9, regs.r10))
    }

    /// At most `faults` of the accesses are faults.
    pub(crate) fn check_mapped(
        &self,
        start: u64,
        length: usize,
        step: usize,
        faults: u64,
    ) -> Outcome {
        let (slow, least) = self.count(start, length, step)?;
        check!(
            slow <= faults + INTERRUPTED,
            "{slow} of {} accesses were slow, {faults} faults expected; the quickest took {least} ticks, a fault takes {} at least",
            length / step,
            2 * self.slow
        );
        Ok(())
    }
}

/// Huge pages of the process's own accord, touched.
pub(crate) fn transparent(length: usize) -> Result<Mapping, Fail> {
    let memory = Mapping::anonymous(length)?;
    memory.advise(0, length, libc::MADV_HUGEPAGE)?;
    for offset in (0..length).step_by(MIB2) {
        memory.write_u64(offset as u64, 1);
    }
    if memory.smaps_kib("AnonHugePages")? < (length >> 10) as u64 {
        return Err(Fail::skip("the kernel gives no transparent huge pages"));
    }
    Ok(memory)
}

/// Each 2 MiB of transparent huge pages takes one fault.
pub(crate) fn one_fault_2m(device: &Device) -> Outcome {
    let timed = Timed::new(device)?;
    let memory = transparent(4 * MIB2)?;
    timed.show(&memory)?;
    let before = guest_table_pages()?;
    timed.check_mapped(PLACE, 4 * MIB2, PAGE, 4)?;
    let tables = guest_table_pages()?.saturating_sub(before);
    check!(tables < 4, "{tables} tables for 4 large pages");
    timed.check_mapped(PLACE, 4 * MIB2, PAGE, 0)
}

/// Code and data in one huge page. Where the host must not let code be in a large page it is split, once:
/// the two do not take turns in driving each other out.
pub(crate) fn code_in_a_huge_page(device: &Device) -> Outcome {
    let timed = Timed::new(device)?;
    let memory = transparent(MIB2)?;
    for page in (0..MIB2).step_by(PAGE) {
        // RET.
        memory.write(page as u64, &[0xc3]);
    }
    timed.show(&memory)?;
    // Data alone takes one fault.
    timed.check_mapped(PLACE + 8, MIB2 - PAGE, PAGE, 1)?;
    for page in (0..MIB2).step_by(PAGE) {
        memory.write_u64(page as u64 + 8, 0);
    }
    timed
        .guest
        .machine
        .memory
        .write(rvisor_tests::layout::CODE, timed_calls());
    let first = timed.count(PLACE, MIB2, PAGE)?.0;
    check!(
        first <= 512 + INTERRUPTED,
        "{first} pages were slow when they were called first"
    );
    timed.check_mapped(PLACE, MIB2, PAGE, 0)?;
    for page in (0..MIB2).step_by(PAGE) {
        let found = memory.read_u64(page as u64 + 64);
        check_eq!(found, PLACE + page as u64, "page {page:#x} in the host");
    }
    Ok(())
}

/// Memory that is not congruent modulo 2 MiB can't have large pages, and works.
pub(crate) fn not_congruent(device: &Device) -> Outcome {
    let timed = Timed::new(device)?;
    let memory = transparent(2 * MIB2)?;
    timed
        .guest
        .machine
        .set_slot(1, 0, PLACE, &memory, PAGE, MIB2)?;
    let (faults, _) = timed.count(PLACE, MIB2, PAGE)?;
    check_eq!(faults, 512, "faults");
    for page in (0..MIB2).step_by(PAGE) {
        let found = memory.read_u64((page + PAGE) as u64);
        check_eq!(found, PLACE + page as u64, "page {page:#x} in the host");
    }
    Ok(())
}

/// Pages of hugetlbfs.
pub(crate) fn one_fault_2m_hugetlb(device: &Device) -> Outcome {
    let timed = Timed::new(device)?;
    let _stock = Setting::new("/proc/sys/vm/nr_hugepages", 4)?;
    let memory = match Mapping::huge(4 * MIB2, 21) {
        Ok(memory) => memory,
        Err(error) => return Err(Fail::skip(format!("no stock of huge pages: {error}"))),
    };
    timed.show(&memory)?;
    timed.check_mapped(PLACE, 4 * MIB2, PAGE, 4)?;
    for page in (0..4 * MIB2).step_by(PAGE) {
        let found = memory.read_u64(page as u64);
        check_eq!(found, PLACE + page as u64, "page {page:#x} in the host");
    }
    Ok(())
}

/// A page of 1 GiB, where the host was given one when it was booted.
pub(crate) fn one_fault_1g_hugetlb(device: &Device) -> Outcome {
    let memory = match Mapping::huge(GIB, 30) {
        Ok(memory) => memory,
        Err(error) => {
            return Err(Fail::skip(format!(
                "no page of 1 GiB: {error}; boot with hugepagesz=1G hugepages=1"
            )))
        }
    };
    let timed = Timed::new(device)?;
    let start = timed.guest.map_gibs(1)?;
    timed.guest.machine.set_slot(2, 0, start, &memory, 0, GIB)?;
    let before = guest_table_pages()?;
    // 512 pages, each in another 2 MiB.
    timed.check_mapped(start, GIB, MIB2, 1)?;
    let tables = guest_table_pages()?.saturating_sub(before);
    check!(tables <= 4, "{tables} tables for one page of 1 GiB");
    check_eq!(
        memory.read_u64((GIB - MIB2) as u64),
        start + (GIB - MIB2) as u64,
        "the last page"
    );
    Ok(())
}

/// Small pages that the kernel makes a huge one of are one for the guest too.
pub(crate) fn collapse_merges(device: &Device) -> Outcome {
    let timed = Timed::new(device)?;
    let memory = Mapping::anonymous(MIB2)?;
    memory.advise(0, MIB2, libc::MADV_NOHUGEPAGE)?;
    timed.show(&memory)?;
    let (faults, _) = timed.count(PLACE, MIB2, PAGE)?;
    check_eq!(faults, 512, "faults before");
    memory.advise(0, MIB2, libc::MADV_HUGEPAGE)?;
    if let Err(error) = memory.advise(0, MIB2, MADV_COLLAPSE) {
        return Err(Fail::skip(format!("no MADV_COLLAPSE: {error}")));
    }
    check_eq!(
        memory.smaps_kib("AnonHugePages")?,
        2048,
        "KiB in huge pages"
    );
    for page in (0..MIB2).step_by(PAGE) {
        let found = memory.read_u64(page as u64);
        check_eq!(
            found,
            PLACE + page as u64,
            "page {page:#x} after the collapse"
        );
    }
    timed.check_mapped(PLACE, MIB2, PAGE, 1)
}

/// A part of a huge page that the guest has whole is given back.
pub(crate) fn huge_page_split(device: &Device) -> Outcome {
    let guest = Guest::new(device)?;
    let memory = Mapping::anonymous(MIB2)?;
    memory.advise(0, MIB2, libc::MADV_HUGEPAGE)?;
    guest.machine.set_slot(1, 0, PLACE, &memory, 0, MIB2)?;
    for page in [0, 0x5000, 0x6000, 0x1f_f000] {
        guest.write(PLACE + page, page + 1)?;
    }
    memory.advise(0x5000, PAGE, libc::MADV_DONTNEED)?;
    check_eq!(
        guest.read(PLACE + 0x5000)?,
        0,
        "the page that was given back"
    );
    for page in [0, 0x6000, 0x1f_f000] {
        check_eq!(guest.read(PLACE + page)?, page + 1, "the page at {page:#x}");
    }
    Ok(())
}

/// One page in the middle of a huge one loses its rights, and then is another's.
pub(crate) fn split_by_rights(device: &Device) -> Outcome {
    const MIDDLE: u64 = 0x8_0000;
    let guest = Guest::new(device)?;
    let memory = transparent(MIB2)?;
    guest.machine.set_slot(1, 0, PLACE, &memory, 0, MIB2)?;
    let pages = [0, MIDDLE - 0x1000, MIDDLE, MIDDLE + 0x1000];
    for page in pages {
        guest.write(PLACE + page, page + 1)?;
    }
    memory.protect(MIDDLE, PAGE, libc::PROT_NONE)?;
    guest.expect_fault(PLACE + MIDDLE, None)?;
    for page in [0, MIDDLE - 0x1000, MIDDLE + 0x1000] {
        check_eq!(guest.read(PLACE + page)?, page + 1, "the page at {page:#x}");
        guest.write(PLACE + page, page + 2)?;
    }
    memory.replace(MIDDLE, PAGE)?;
    check_eq!(guest.read(PLACE + MIDDLE)?, 0, "the page that was replaced");
    guest.write(PLACE + MIDDLE, 7)?;
    check_eq!(memory.read_u64(MIDDLE), 7, "the host's view of it");
    for page in [0, MIDDLE - 0x1000, MIDDLE + 0x1000] {
        check_eq!(memory.read_u64(page), page + 2, "the host's page {page:#x}");
    }
    Ok(())
}

/// A huge page that a child shares is copied before the guest writes to it, and the child keeps its own.
pub(crate) fn fork_of_a_huge_page(device: &Device) -> Outcome {
    let guest = Guest::new(device)?;
    let memory = transparent(MIB2)?;
    guest.machine.set_slot(1, 0, PLACE, &memory, 0, MIB2)?;
    for page in (0..MIB2).step_by(16 * PAGE) {
        guest.write(PLACE + page as u64, 1)?;
    }
    let child = crate::process::Child::fork(|| {
        let old = (0..MIB2)
            .step_by(16 * PAGE)
            .all(|page| memory.read_u64(page as u64) == 1);
        i32::from(!old)
    })?;
    for page in (0..MIB2).step_by(16 * PAGE) {
        guest.write(PLACE + page as u64, 2)?;
    }
    for page in (0..MIB2).step_by(16 * PAGE) {
        check_eq!(
            memory.read_u64(page as u64),
            2,
            "page {page:#x} of the parent"
        );
    }
    check_eq!(child.end()?, 0, "whether the child's pages changed");
    Ok(())
}
