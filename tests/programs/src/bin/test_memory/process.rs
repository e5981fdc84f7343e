// SPDX-License-Identifier: GPL-2.0
//! What the process does to its mappings: fork, mprotect, files, memory that others share.

use crate::guests::{Guest, PAGE, PLACE};
use kvm_bindings as kb;
use rvisor_tests::host::Swap;
use rvisor_tests::mapping::Mapping;
use rvisor_tests::userfault::Userfault;
use rvisor_tests::{check, check_eq, ktap, Context, Device, Exit, Fail, Outcome};
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::time::Duration;

/// A child process that waits until it is told to look.
pub(crate) struct Child {
    pid: libc::pid_t,
    go: Option<File>,
}

impl Child {
    /// Makes one; it will end with the status that `look` gives.
    pub(crate) fn fork(look: impl FnOnce() -> i32) -> Result<Self, Fail> {
        let (mut reader, writer) = ktap::pipe()?;
        // SAFETY: The child only waits for a pipe, looks at its own memory and ends.
        let pid = unsafe { libc::fork() };
        if pid == 0 {
            drop(writer);
            let waited = reader.read(&mut [0]).is_ok();
            let status = if waited { look() } else { 99 };
            // SAFETY: Ends the child at once.
            unsafe { libc::_exit(status) };
        }
        Ok(Self {
            pid,
            go: Some(writer),
        })
    }

    /// Lets it look.
    fn release(&mut self) {
        self.go = None;
    }

    /// Lets it look; its exit status, or the signal that ended it as a negative number.
    pub(crate) fn end(mut self) -> Result<i32, Fail> {
        self.release();
        let pid = self.pid;
        let mut status = 0;
        // SAFETY: Waits for the child that was made above.
        if unsafe { libc::waitpid(pid, &raw mut status, 0) } != pid {
            return Err(std::io::Error::last_os_error().into());
        }
        if libc::WIFSIGNALED(status) {
            return Ok(-libc::WTERMSIG(status));
        }
        Ok(libc::WEXITSTATUS(status))
    }
}

/// After fork the guest goes on seeing the parent's pages, whatever the child writes, and the child its own.
pub(crate) fn fork_and_child_writes(device: &Device) -> Outcome {
    const PAGES: u64 = 16;
    let guest = Guest::new(device)?;
    let memory = Mapping::anonymous(PAGES as usize * PAGE)?;
    guest
        .machine
        .set_slot(1, 0, PLACE, &memory, 0, memory.len())?;
    for page in 0..PAGES {
        guest.write(PLACE + page * 4096, page + 1)?;
    }
    let (mut reader, writer) = ktap::pipe()?;
    let mut child = Child::fork(|| {
        for page in 0..PAGES {
            memory.write_u64(page * 4096, 0xbad);
        }
        let mut writer = &writer;
        let told = writer.write_all(&[1]).is_ok();
        std::thread::sleep(Duration::from_millis(50));
        let own = (0..PAGES).all(|page| memory.read_u64(page * 4096) == 0xbad);
        i32::from(!(told && own))
    })?;
    // Half of the pages before the child has written: they are read-only for the guest, then its own.
    for page in 0..PAGES / 2 {
        check_eq!(guest.read(PLACE + page * 4096)?, page + 1, "page {page}");
    }
    child.release();
    check_eq!(reader.read(&mut [0])?, 1, "what the child says");
    for page in 0..PAGES {
        check_eq!(
            guest.read(PLACE + page * 4096)?,
            page + 1,
            "page {page} later"
        );
        guest.write(PLACE + page * 4096, 0x100 + page)?;
        check_eq!(
            memory.read_u64(page * 4096),
            0x100 + page,
            "page {page} in the host"
        );
    }
    check_eq!(child.end()?, 0, "whether the child's pages are its own");
    Ok(())
}

/// mprotect: what the process may not do, the guest may not; what it may again, the guest may.
pub(crate) fn mprotect(device: &Device) -> Outcome {
    let guest = Guest::new(device)?;
    let memory = Mapping::anonymous(4 * PAGE)?;
    guest
        .machine
        .set_slot(1, 0, PLACE, &memory, 0, memory.len())?;
    for round in 1..4 {
        guest.write(PLACE + 0x1000, round)?;
        memory.protect(0x1000, PAGE, libc::PROT_READ)?;
        check_eq!(
            guest.read(PLACE + 0x1000)?,
            round,
            "read-only, round {round}"
        );
        guest.expect_fault(PLACE + 0x1000, Some(0xbad))?;
        check_eq!(memory.read_u64(0x1000), round, "the memory, round {round}");
        memory.protect(0x1000, PAGE, libc::PROT_NONE)?;
        guest.expect_fault(PLACE + 0x1000, Some(0xbad))?;
        guest.expect_fault(PLACE + 0x1000, None)?;
        // The pages around it are as they were.
        guest.write(PLACE + 0x2000, round)?;
        memory.protect(0x1000, PAGE, libc::PROT_READ | libc::PROT_WRITE)?;
        check_eq!(
            guest.read(PLACE + 0x1000)?,
            round,
            "all rights, round {round}"
        );
        guest.write(PLACE + 0x1000, 0x99)?;
        check_eq!(memory.read_u64(0x1000), 0x99, "written, round {round}");
    }
    Ok(())
}

/// A slot that the guest can only read, on memory that the process can only read.
pub(crate) fn read_only_mapping(device: &Device) -> Outcome {
    let guest = Guest::new(device)?;
    let memory = Mapping::anonymous(2 * PAGE)?;
    memory.write_u64(0, 5);
    memory.protect(0, 2 * PAGE, libc::PROT_READ)?;
    let flags = kb::KVM_MEM_READONLY;
    guest
        .machine
        .set_slot(1, flags, PLACE, &memory, 0, 2 * PAGE)?;
    check_eq!(guest.read(PLACE)?, 5, "what is there");
    check_eq!(guest.read(PLACE + 0x1000)?, 0, "what was never touched");
    guest.prepare(PLACE, Some(0x55))?;
    guest.cpu.run_expecting(&Exit::MmioWrite {
        address: PLACE,
        data: vec![0x55, 0, 0, 0, 0, 0, 0, 0],
    })?;
    guest.cpu.run_until_done()?;
    // Made writable for the process, it stays read-only for the guest.
    memory.protect(0, 2 * PAGE, libc::PROT_READ | libc::PROT_WRITE)?;
    memory.write_u64(0, 6);
    check_eq!(guest.read(PLACE)?, 6, "what the process wrote");
    guest.prepare(PLACE, Some(0x55))?;
    guest.cpu.run_expecting(&Exit::MmioWrite {
        address: PLACE,
        data: vec![0x55, 0, 0, 0, 0, 0, 0, 0],
    })?;
    guest.cpu.run_until_done()?;
    check_eq!(memory.read_u64(0), 6, "the memory");
    Ok(())
}

fn memfd(length: u64, flags: u32) -> Result<File, Fail> {
    // SAFETY: The name is a C string; the descriptor is new.
    let fd = unsafe { libc::memfd_create(c"guest".as_ptr(), libc::MFD_CLOEXEC | flags) };
    if fd < 0 {
        let error = std::io::Error::last_os_error();
        return Err(Fail::skip(format!("no memfd: {error}")));
    }
    // SAFETY: As above.
    let file = File::from(unsafe { OwnedFd::from_raw_fd(fd) });
    file.set_len(length).during("the memfd's length")?;
    Ok(file)
}

fn punch(file: &File, offset: i64, length: i64) -> Outcome {
    let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    // SAFETY: An open file.
    if unsafe { libc::fallocate(file.as_raw_fd(), mode, offset, length) } != 0 {
        return Err(Fail::from(std::io::Error::last_os_error()).during("punching a hole"));
    }
    Ok(())
}

/// A memfd that another process maps too: both see one memory, also after a hole was punched, and past
/// its end nothing is.
pub(crate) fn shared_memfd(device: &Device) -> Outcome {
    let guest = Guest::new(device)?;
    let file = memfd(4 * PAGE as u64, 0)?;
    let memory = Mapping::shared(file.as_raw_fd(), 4 * PAGE)?;
    guest
        .machine
        .set_slot(1, 0, PLACE, &memory, 0, memory.len())?;
    guest.write(PLACE, 1)?;
    guest.write(PLACE + 0x1000, 2)?;
    let child = Child::fork(|| {
        let own = Mapping::shared(file.as_raw_fd(), 4 * PAGE);
        let Ok(own) = own else { return 98 };
        let seen = own.read_u64(0) == 1 && own.read_u64(0x1000) == 2;
        own.write_u64(0x2000, 3);
        i32::from(!seen)
    })?;
    check_eq!(
        guest.read(PLACE + 0x2000)?,
        0,
        "before the other process writes"
    );
    check_eq!(
        child.end()?,
        0,
        "whether the other process sees the guest's writes"
    );
    check_eq!(
        guest.read(PLACE + 0x2000)?,
        3,
        "what the other process wrote"
    );
    file.write_at(&7_u64.to_le_bytes(), 0x3000)?;
    check_eq!(guest.read(PLACE + 0x3000)?, 7, "what write(2) wrote");
    punch(&file, 0x1000, PAGE as i64)?;
    check_eq!(guest.read(PLACE + 0x1000)?, 0, "the hole");
    guest.write(PLACE + 0x1000, 4)?;
    check_eq!(memory.read_u64(0x1000), 4, "what was written into the hole");
    // Past the end the process would get SIGBUS.
    file.set_len(0x3000)?;
    guest.expect_fault(PLACE + 0x3000, None)?;
    guest.expect_fault(PLACE + 0x3000, Some(1))?;
    file.set_len(0x4000)?;
    check_eq!(guest.read(PLACE + 0x3000)?, 0, "the end, made anew");
    check_eq!(guest.read(PLACE)?, 1, "the first page");
    Ok(())
}

/// Huge pages of a file that has no name any more: a hole gives the page back and makes room for another.
pub(crate) fn unlinked_hugetlb(device: &Device) -> Outcome {
    const HUGE: usize = 2 << 20;
    let guest = Guest::new(device)?;
    let _stock = rvisor_tests::host::Setting::new("/proc/sys/vm/nr_hugepages", 2)?;
    let file = memfd(2 * HUGE as u64, libc::MFD_HUGETLB)?;
    let memory = Mapping::shared(file.as_raw_fd(), 2 * HUGE)
        .map_err(|error| Fail::skip(format!("no stock of huge pages: {error}")))?;
    guest.machine.set_slot(1, 0, PLACE, &memory, 0, 2 * HUGE)?;
    for round in 1..4 {
        guest.write(PLACE + 0x5000, round)?;
        guest.write(PLACE + HUGE as u64, round)?;
        punch(&file, 0, HUGE as i64)?;
        check_eq!(guest.read(PLACE + 0x5000)?, 0, "the hole, round {round}");
        check_eq!(
            guest.read(PLACE + HUGE as u64)?,
            round,
            "the page behind it"
        );
    }
    drop(file);
    guest.write(PLACE, 8)?;
    check_eq!(memory.read_u64(0), 8, "without a descriptor");
    drop(memory);
    guest.expect_fault(PLACE, None)
}

/// A private mapping of a file: the guest reads the file's pages and writes to copies.
pub(crate) fn private_file(device: &Device) -> Outcome {
    let guest = Guest::new(device)?;
    let file = memfd(2 * PAGE as u64, 0)?;
    file.write_at(&1_u64.to_le_bytes(), 0)?;
    let memory = Mapping::private(file.as_raw_fd(), 2 * PAGE)?;
    guest.machine.set_slot(1, 0, PLACE, &memory, 0, 2 * PAGE)?;
    check_eq!(guest.read(PLACE)?, 1, "the file's page");
    file.write_at(&2_u64.to_le_bytes(), 0)?;
    check_eq!(guest.read(PLACE)?, 2, "the file's page, changed");
    guest.write(PLACE, 3)?;
    file.write_at(&4_u64.to_le_bytes(), 0)?;
    check_eq!(guest.read(PLACE)?, 3, "the guest's copy");
    check_eq!(memory.read_u64(0), 3, "the process's copy");
    let mut bytes = [0; 8];
    file.read_at(&mut bytes, 0)?;
    check_eq!(u64::from_le_bytes(bytes), 4, "the file");
    // Given back, the copy makes place for the file's page.
    memory.advise(0, PAGE, libc::MADV_DONTNEED)?;
    check_eq!(guest.read(PLACE)?, 4, "the file's page again");
    Ok(())
}

/// Memory that the kernel may drop, until it is written to again: what the guest writes later stays.
pub(crate) fn madv_free(device: &Device) -> Outcome {
    const PAGES: u64 = 32;
    const MADV_PAGEOUT: i32 = 21;
    let guest = Guest::new(device)?;
    let _swap = Swap::on()?;
    let memory = Mapping::anonymous(PAGES as usize * PAGE)?;
    memory.advise(0, memory.len(), libc::MADV_NOHUGEPAGE)?;
    guest
        .machine
        .set_slot(1, 0, PLACE, &memory, 0, memory.len())?;
    for page in 0..PAGES {
        guest.write(PLACE + page * 4096, page + 1)?;
    }
    memory.advise(0, memory.len(), libc::MADV_FREE)?;
    for page in 0..PAGES / 2 {
        guest.write(PLACE + page * 4096, 0x100 + page)?;
    }
    memory.advise(0, memory.len(), MADV_PAGEOUT)?;
    for page in 0..PAGES {
        let found = guest.read(PLACE + page * 4096)?;
        if page < PAGES / 2 {
            check_eq!(found, 0x100 + page, "page {page}, written after MADV_FREE");
        } else {
            check!(found == 0 || found == page + 1, "page {page}: {found:#x}");
        }
    }
    Ok(())
}

/// Pages that userspace supplies when they are missed: the vCPU's thread waits for them.
pub(crate) fn userfault(device: &Device) -> Outcome {
    const LIMIT: Duration = Duration::from_secs(2);
    let guest = Guest::new(device)?;
    let memory = Mapping::anonymous(4 * PAGE)?;
    let fault = Userfault::new(&memory)?;
    guest
        .machine
        .set_slot(1, 0, PLACE, &memory, 0, memory.len())?;
    std::thread::scope(|scope| {
        let handler = scope.spawn(|| -> Outcome {
            for expected in [0x1000, 0x3000] {
                let address = fault
                    .wait(LIMIT)?
                    .ok_or_else(|| Fail::new("no page is missed"))?;
                check_eq!(
                    address & !4095,
                    memory.start() + expected,
                    "the page that is missed"
                );
                // The guest must wait for it.
                std::thread::sleep(Duration::from_millis(20));
                fault.supply(address, 0x5500 + expected)?;
            }
            Ok(())
        });
        check_eq!(
            guest.read(PLACE + 0x1000)?,
            0x6500,
            "the page that was supplied"
        );
        guest.write(PLACE + 0x3008, 9)?;
        check_eq!(
            memory.read_u64(0x3000),
            0x8500,
            "the page around what was written"
        );
        check_eq!(memory.read_u64(0x3008), 9, "what was written");
        handler
            .join()
            .map_err(|_| Fail::new("the handler panicked"))?
    })
}

extern "C" fn nothing(_signal: libc::c_int) {}

/// A signal ends the wait for a page that is missed, with EINTR; the guest can go on later.
pub(crate) fn userfault_and_signal(device: &Device) -> Outcome {
    const LIMIT: Duration = Duration::from_secs(2);
    let guest = Guest::new(device)?;
    let memory = Mapping::anonymous(PAGE)?;
    let fault = Userfault::new(&memory)?;
    guest.machine.set_slot(1, 0, PLACE, &memory, 0, PAGE)?;
    let handler: extern "C" fn(libc::c_int) = nothing;
    // SAFETY: The handler does nothing, and the structure is whole.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = handler as usize;
        libc::sigaction(libc::SIGUSR1, &raw const action, std::ptr::null_mut());
    }
    // SAFETY: Names the calling thread.
    let runner = unsafe { libc::pthread_self() };
    guest.prepare(PLACE, None)?;
    std::thread::scope(|scope| {
        let signaller = scope.spawn(|| -> Outcome {
            let missed = fault.wait(LIMIT)?;
            std::thread::sleep(Duration::from_millis(20));
            // SAFETY: The thread waits for this one.
            unsafe { libc::pthread_kill(runner, libc::SIGUSR1) };
            check!(missed.is_some(), "no page is missed");
            Ok(())
        });
        let exit = guest.cpu.run()?;
        check_eq!(exit, Exit::Interrupted(kb::KVM_EXIT_INTR), "KVM_RUN");
        signaller
            .join()
            .map_err(|_| Fail::new("the signaller panicked"))?
    })?;
    fault.supply(memory.start(), 0x42)?;
    guest.cpu.run_until_done()?;
    check_eq!(guest.cpu.regs()?.rax, 0x42, "what was supplied");
    Ok(())
}
