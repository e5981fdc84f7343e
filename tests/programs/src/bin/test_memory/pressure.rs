// SPDX-License-Identifier: GPL-2.0
//! Memory that is short: swap, cgroups' limits, and what the page tables of guests cost.

use crate::guests::{Guest, PAGE, PLACE};
use crate::process::Child;
use rvisor_tests::cgroup::Cgroup;
use rvisor_tests::guest::{self, Mode};
use rvisor_tests::host::{guest_table_pages, QuietLog, Swap};
use rvisor_tests::layout::DONE_PORT;
use rvisor_tests::mapping::Mapping;
use rvisor_tests::raw::Errno;
use rvisor_tests::{check, check_eq, guest_code, Context, Device, Fail, Machine, Outcome};
use std::time::{Duration, Instant};

/// madvise(2): write to swap.
const MADV_PAGEOUT: i32 = 21;

/// Pages that went to swap come back as they were, to the guest and to the host, again and again.
pub(crate) fn swap(device: &Device) -> Outcome {
    const PAGES: u64 = 128;
    let guest = Guest::new(device)?;
    let _swap = Swap::on()?;
    let memory = Mapping::anonymous(PAGES as usize * PAGE)?;
    memory.advise(0, memory.len(), libc::MADV_NOHUGEPAGE)?;
    guest
        .machine
        .set_slot(1, 0, PLACE, &memory, 0, memory.len())?;
    for round in 1..4 {
        for page in 0..PAGES {
            guest.write(PLACE + page * 4096, round * 0x1000 + page)?;
        }
        memory.advise(0, memory.len(), MADV_PAGEOUT)?;
        let swapped = memory.smaps_kib("Swap")?;
        check!(
            swapped >= 2 * PAGES,
            "only {swapped} KiB of {PAGES} pages are in swap"
        );
        for page in 0..PAGES {
            let expected = round * 0x1000 + page;
            let found = if page % 4 == 0 {
                memory.read_u64(page * 4096)
            } else {
                guest.read(PLACE + page * 4096)?
            };
            check_eq!(found, expected, "page {page}, round {round}");
        }
    }
    Ok(())
}

// Writes its own address to each page from RSI to RDI, then counts in RAX the pages that hold it; ECX times.
guest_code!(
    write_and_count,
    code64,
    [
        "sti",
        "xor eax, eax",
        "2: mov rbx, rsi",
        "3: mov [rbx], rbx",
        "add rbx, 4096",
        "cmp rbx, rdi",
        "jb 3b",
        "mov rbx, rsi",
        "4: cmp [rbx], rbx",
        "jne 5f",
        "inc rax",
        "5: add rbx, 4096",
        "cmp rbx, rdi",
        "jb 4b",
        "dec ecx",
        "jnz 2b",
        "out {done}, al",
    ],
    done = DONE_PORT
);

/// A guest whose memory is twice what its process may have lives on with the help of swap.
pub(crate) fn cgroup_limit_and_swap(device: &Device) -> Outcome {
    const LENGTH: usize = 8 << 20;
    let _swap = Swap::on()?;
    let group = Cgroup::new()?;
    // Not memory.max: the kernel would sooner kill than look a second time at pages that were all used.
    group.set("memory.high", "5M")?;
    group.enter()?;
    let guest = Guest::with(device, write_and_count())?;
    let memory = Mapping::anonymous(LENGTH)?;
    memory.advise(0, LENGTH, libc::MADV_NOHUGEPAGE)?;
    guest.machine.set_slot(1, 0, PLACE, &memory, 0, LENGTH)?;
    let mut regs = guest.cpu.regs()?;
    (regs.rsi, regs.rdi, regs.rcx) = (PLACE, PLACE + LENGTH as u64, 2);
    guest.cpu.set_regs(&regs)?;
    guest.cpu.run_until_done()?;
    check_eq!(
        guest.cpu.regs()?.rax,
        2 * (LENGTH / PAGE) as u64,
        "pages that hold their address, in two rounds"
    );
    let swapped = group.number("memory.swap.current")?;
    check!(swapped > 1 << 20, "only {swapped} bytes went to swap");
    Ok(())
}

// Reads from RSI to RDI, RDX bytes apart.
guest_code!(
    sparse_reads,
    code64,
    [
        "2: mov rax, [rsi]",
        "add rsi, rdx",
        "cmp rsi, rdi",
        "jb 2b",
        "out {done}, al",
    ],
    done = DONE_PORT
);

const GIBS: u64 = 64;
const LENGTH: usize = (GIBS as usize) << 30;

/// A guest with 64 GiB of address space that costs nothing yet, and its second slot.
fn sparse_guest(device: &Device) -> Result<(Guest, Mapping, u64), Fail> {
    let guest = Guest::with(device, sparse_reads())?;
    let start = guest.map_gibs(GIBS)?;
    let memory = Mapping::anonymous(LENGTH).during("64 GiB of address space")?;
    memory.advise(0, LENGTH, libc::MADV_NOHUGEPAGE)?;
    guest.machine.set_slot(1, 0, start, &memory, 0, LENGTH)?;
    Ok((guest, memory, start))
}

/// Reads all 64 GiB, this many bytes apart.
fn read_sparsely(guest: &Guest, start: u64, step: u64) -> Result<(), Errno> {
    let prepared = guest.cpu.regs().and_then(|mut regs| {
        regs.rip = rvisor_tests::layout::CODE;
        (regs.rsi, regs.rdi, regs.rdx) = (start, start + LENGTH as u64, step);
        guest.cpu.set_regs(&regs)
    });
    if prepared.is_err() {
        return Err(Errno(libc::EIO));
    }
    guest.cpu.run_raw().map(|_| ())
}

/// Waits until no more than `pages` are page tables of guests.
fn wait_for_tables(pages: u64) -> Outcome {
    let end = Instant::now() + Duration::from_secs(2);
    loop {
        let now = guest_table_pages()?;
        if now <= pages {
            return Ok(());
        }
        check!(
            Instant::now() < end,
            "{now} tables are left, {pages} expected"
        );
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// 64 GiB of which 256 pages are touched cost a table for each of them and few more, and the slot's end
/// gives them back.
pub(crate) fn sparse_64g(device: &Device) -> Outcome {
    const STEP: u64 = 256 << 20;
    const TOUCHED: u64 = LENGTH as u64 / STEP;
    let (guest, memory, start) = sparse_guest(device)?;
    guest.read(rvisor_tests::layout::DATA).ok();
    let before = guest_table_pages()?;
    read_sparsely(&guest, start, STEP)?;
    let tables = guest_table_pages()?.saturating_sub(before);
    // One of each GiB's as well, and those above; what the guest's own code needs.
    check!(
        (TOUCHED..=TOUCHED + GIBS + 8).contains(&tables),
        "{tables} tables for {TOUCHED} pages"
    );
    guest.machine.set_slot(1, 0, start, &memory, 0, 0)?;
    wait_for_tables(before + 8)
}

/// Page tables count as the process's own memory.
pub(crate) fn tables_are_accounted(device: &Device) -> Outcome {
    const STEP: u64 = 64 << 20;
    const TOUCHED: u64 = LENGTH as u64 / STEP;
    let group = Cgroup::new()?;
    group.enter()?;
    let (guest, memory, start) = sparse_guest(device)?;
    let read = || group.line("memory.stat", "sec_pagetables");
    let (before, all_before) = (read()?, group.number("memory.current")?);
    read_sparsely(&guest, start, STEP)?;
    let grown = read()?.saturating_sub(before) / 4096;
    // The kernel adds its figures up in lots of 64.
    check!(
        (TOUCHED - 64..=TOUCHED + GIBS + 72).contains(&grown),
        "{grown} tables in the cgroup for {TOUCHED} pages"
    );
    // The host's own tables for the same pages are as many.
    let current = group.number("memory.current")?.saturating_sub(all_before) / 4096;
    check!(
        current >= 2 * TOUCHED - 128,
        "the cgroup has grown by {current} pages, {TOUCHED} tables of the guest and as many of the host's"
    );
    drop((guest, memory));
    Ok(())
}

/// A guest whose page tables are more than its process may have ends that process, or its KVM_RUN, and
/// nothing else.
pub(crate) fn cgroup_limit_on_tables(device: &Device) -> Outcome {
    let bystander = Guest::new(device)?;
    bystander.read(rvisor_tests::layout::DATA)?;
    let before = guest_table_pages()?;
    let group = Cgroup::new()?;
    group.set("memory.max", "16M")?;
    group.set("memory.swap.max", "0").ok();
    let quiet = QuietLog::new()?;
    let child = Child::fork(|| {
        let run = || -> Result<Result<(), Errno>, Fail> {
            group.enter()?;
            let (guest, _memory, start) = sparse_guest(device)?;
            Ok(read_sparsely(&guest, start, 2 << 20))
        };
        match run() {
            Ok(Ok(())) => 1,
            Ok(Err(Errno(libc::ENOMEM))) => 0,
            Ok(Err(Errno(errno))) => 100 + errno,
            Err(_) => 2,
        }
    })?;
    let status = child.end()?;
    drop(quiet);
    check!(
        status == 0 || status == -libc::SIGKILL || status == 100 + libc::EFAULT,
        "the child's end: {status}; 1 is that its guest reached 64 GiB"
    );
    // The host and the guest beside it are none the worse.
    check_eq!(
        bystander.read(rvisor_tests::layout::DATA)?,
        0,
        "the guest beside it"
    );
    wait_for_tables(before + 8)?;
    let machine = Machine::new(device)?;
    let cpu = machine.vcpu(0)?;
    guest::load(&machine, &cpu, Mode::Long, sparse_reads())?;
    cpu.run_until_done()
}
