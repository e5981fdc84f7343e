// SPDX-License-Identifier: GPL-2.0
//! Guest memory: slots come, go and move; the guest's memory is the process's own, page by page.

use kvm_bindings as kb;
use rvisor_tests::guest::{self, Mode};
use rvisor_tests::layout::DONE_PORT;
use rvisor_tests::mapping::Mapping;
use rvisor_tests::raw::{expect_errno, ioctl_with};
use rvisor_tests::{
    check, check_eq, guest_code, ktap, tests, uapi, Cpu, Device, Exit, Fail, Machine, Outcome,
};

/// Where the tests' second slot lies: aligned for 2 MiB pages.
const PLACE: u64 = 0x1000_0000;
const PAGE: usize = 4096;

// Reads [RSI] into RAX or, with EDI = 1, writes RAX there; again and again.
guest_code!(
    access,
    code64,
    [
        "2: test edi, edi",
        "jnz 3f",
        "mov rax, [rsi]",
        "jmp 4f",
        "3: mov [rsi], rax",
        "4: out {done}, al",
        "jmp 2b",
    ],
    done = DONE_PORT
);

/// A guest whose accesses userspace chooses.
struct Guest {
    machine: Machine,
    cpu: Cpu,
}

impl Guest {
    fn new(device: &Device) -> Result<Self, Fail> {
        let machine = Machine::new(device)?;
        let cpu = machine.vcpu(0)?;
        guest::load(&machine, &cpu, Mode::Long, access())?;
        Ok(Self { machine, cpu })
    }

    fn prepare(&self, address: u64, write: Option<u64>) -> Outcome {
        let mut regs = self.cpu.regs()?;
        regs.rip = rvisor_tests::layout::CODE;
        (regs.rsi, regs.rdi) = (address, write.is_some().into());
        regs.rax = write.unwrap_or(0);
        self.cpu.set_regs(&regs)
    }

    fn read(&self, address: u64) -> Result<u64, Fail> {
        self.prepare(address, None)?;
        self.cpu.run_until_done()?;
        Ok(self.cpu.regs()?.rax)
    }

    fn write(&self, address: u64, value: u64) -> Outcome {
        self.prepare(address, Some(value))?;
        self.cpu.run_until_done()
    }

    /// Reads where there is no memory; userspace answers 0x77, 8 bytes.
    fn read_hole(&self, address: u64) -> Outcome {
        self.prepare(address, None)?;
        self.cpu
            .run_expecting(&Exit::MmioRead { address, length: 8 })?;
        self.cpu.answer_mmio(&[0x77; 8]);
        self.cpu.run_until_done()?;
        check_eq!(
            self.cpu.regs()?.rax,
            0x7777_7777_7777_7777,
            "what was answered"
        );
        Ok(())
    }
}

fn host_and_guest_share(device: &Device) -> Outcome {
    let guest = Guest::new(device)?;
    let memory = Mapping::anonymous(4 * PAGE)?;
    guest.machine.set_slot(1, 0, PLACE, &memory, 0, 4 * PAGE)?;
    memory.write_u64(0, 1);
    check_eq!(guest.read(PLACE)?, 1, "what the host wrote before");
    memory.write_u64(0, 2);
    check_eq!(guest.read(PLACE)?, 2, "what the host wrote between");
    guest.write(PLACE + 8, 3)?;
    check_eq!(memory.read_u64(8), 3, "what the guest wrote");
    // Read by the guest first, when the page is the shared zero page.
    check_eq!(guest.read(PLACE + 0x1000)?, 0, "a fresh page");
    memory.write_u64(0x1000, 4);
    check_eq!(
        guest.read(PLACE + 0x1000)?,
        4,
        "what the host wrote to it later"
    );
    guest.write(PLACE + 0x1000, 5)?;
    check_eq!(memory.read_u64(0x1000), 5, "what the guest wrote to it");
    Ok(())
}

fn read_only_slot(device: &Device) -> Outcome {
    let guest = Guest::new(device)?;
    if guest.machine.extension(kb::KVM_CAP_READONLY_MEM) == 0 {
        return Err(Fail::skip("READONLY_MEM is not offered"));
    }
    let memory = Mapping::anonymous(PAGE)?;
    memory.write_u64(0, 9);
    guest
        .machine
        .set_slot(1, kb::KVM_MEM_READONLY, PLACE, &memory, 0, PAGE)?;
    for round in 0..2 {
        check_eq!(guest.read(PLACE)?, 9, "reading, round {round}");
        guest.prepare(PLACE, Some(0x55))?;
        guest.cpu.run_expecting(&Exit::MmioWrite {
            address: PLACE,
            data: vec![0x55, 0, 0, 0, 0, 0, 0, 0],
        })?;
        guest.cpu.run_until_done()?;
        check_eq!(
            memory.read_u64(0),
            9,
            "the memory after a write, round {round}"
        );
    }
    Ok(())
}

fn delete_slot(device: &Device) -> Outcome {
    let guest = Guest::new(device)?;
    let memory = Mapping::anonymous(PAGE)?;
    guest.read_hole(PLACE)?;
    for round in 1..4 {
        memory.write_u64(0, round);
        guest.machine.set_slot(1, 0, PLACE, &memory, 0, PAGE)?;
        check_eq!(guest.read(PLACE)?, round, "with the slot");
        guest.machine.set_slot(1, 0, PLACE, &memory, 0, 0)?;
        guest.read_hole(PLACE)?;
    }
    Ok(())
}

fn move_slot(device: &Device) -> Outcome {
    const LATER: u64 = PLACE + 0x40_0000;
    let guest = Guest::new(device)?;
    let memory = Mapping::anonymous(PAGE)?;
    memory.write_u64(0, 6);
    guest.machine.set_slot(1, 0, PLACE, &memory, 0, PAGE)?;
    check_eq!(guest.read(PLACE)?, 6, "at the first place");
    guest.machine.set_slot(1, 0, LATER, &memory, 0, PAGE)?;
    check_eq!(guest.read(LATER)?, 6, "at the second place");
    guest.read_hole(PLACE)
}

fn two_slots_one_memory(device: &Device) -> Outcome {
    let guest = Guest::new(device)?;
    let memory = Mapping::anonymous(2 * PAGE)?;
    guest.machine.set_slot(1, 0, PLACE, &memory, 0, 2 * PAGE)?;
    guest
        .machine
        .set_slot(2, 0, PLACE + 0x10_0000, &memory, PAGE, PAGE)?;
    guest.write(PLACE + 0x1000, 8)?;
    check_eq!(guest.read(PLACE + 0x10_0000)?, 8, "by the second slot");
    guest.write(PLACE + 0x10_0000, 9)?;
    check_eq!(guest.read(PLACE + 0x1000)?, 9, "by the first slot");
    Ok(())
}

fn dontneed(device: &Device) -> Outcome {
    let guest = Guest::new(device)?;
    let memory = Mapping::anonymous(4 * PAGE)?;
    guest.machine.set_slot(1, 0, PLACE, &memory, 0, 4 * PAGE)?;
    for round in 1..4 {
        guest.write(PLACE + 0x1000, round)?;
        guest.write(PLACE + 0x2000, round)?;
        memory.advise(0x1000, PAGE, libc::MADV_DONTNEED)?;
        check_eq!(
            guest.read(PLACE + 0x1000)?,
            0,
            "the page that was given back"
        );
        check_eq!(guest.read(PLACE + 0x2000)?, round, "the page behind it");
    }
    Ok(())
}

fn unmapped(device: &Device) -> Outcome {
    let guest = Guest::new(device)?;
    let memory = Mapping::anonymous(PAGE)?;
    guest.machine.set_slot(1, 0, PLACE, &memory, 0, PAGE)?;
    guest.write(PLACE, 1)?;
    drop(memory);
    for write in [None, Some(2)] {
        guest.prepare(PLACE, write)?;
        expect_errno(
            guest.cpu.run_raw(),
            libc::EFAULT,
            "KVM_RUN of a guest that touches it",
        )?;
    }
    // The guest is none the worse for it elsewhere.
    check_eq!(guest.read(rvisor_tests::layout::DATA)?, 0, "other memory");
    Ok(())
}

fn copy_on_write(device: &Device) -> Outcome {
    let guest = Guest::new(device)?;
    let memory = Mapping::anonymous(PAGE)?;
    guest.machine.set_slot(1, 0, PLACE, &memory, 0, PAGE)?;
    guest.write(PLACE, 1)?;
    // A child that holds the same pages: the guest's next write must not be seen there.
    let (mut reader, writer) = ktap::pipe()?;
    // SAFETY: The child only reads a pipe and its own copy of the memory, and ends.
    let pid = unsafe { libc::fork() };
    if pid == 0 {
        drop(writer);
        let mut nothing = [0];
        let waited = std::io::Read::read(&mut reader, &mut nothing).is_ok();
        let seen = memory.read_u64(0);
        // SAFETY: Ends the child at once.
        unsafe { libc::_exit(if waited { seen as i32 } else { 99 }) };
    }
    guest.write(PLACE, 2)?;
    drop(writer);
    let mut status = 0;
    // SAFETY: Waits for the child that was made above.
    unsafe { libc::waitpid(pid, &raw mut status, 0) };
    check_eq!(libc::WEXITSTATUS(status), 1, "what the child has");
    check_eq!(memory.read_u64(0), 2, "what the parent has");
    check_eq!(guest.read(PLACE)?, 2, "what the guest has");
    Ok(())
}

// Writes its own address to each page from RSI to RDI, then counts in RAX the pages that hold it.
guest_code!(
    touch_all,
    code64,
    [
        "mov rbx, rsi",
        "2: mov [rbx + 8], rbx",
        "add rbx, 4096",
        "cmp rbx, rdi",
        "jb 2b",
        "xor eax, eax",
        "mov rbx, rsi",
        "3: cmp [rbx + 8], rbx",
        "jne 4f",
        "inc rax",
        "4: add rbx, 4096",
        "cmp rbx, rdi",
        "jb 3b",
        "out {done}, al",
    ],
    done = DONE_PORT
);

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

fn demand_paging(device: &Device) -> Outcome {
    touch(device, 8 << 20, libc::MADV_NOHUGEPAGE)
}

fn huge_pages(device: &Device) -> Outcome {
    touch(device, 64 << 20, libc::MADV_HUGEPAGE)
}

/// A part of a huge page that the guest has whole is given back.
fn huge_page_split(device: &Device) -> Outcome {
    const LENGTH: usize = 2 << 20;
    let guest = Guest::new(device)?;
    let memory = Mapping::anonymous(LENGTH)?;
    memory.advise(0, LENGTH, libc::MADV_HUGEPAGE)?;
    guest.machine.set_slot(1, 0, PLACE, &memory, 0, LENGTH)?;
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

fn dirty_log(device: &Device) -> Outcome {
    let guest = Guest::new(device)?;
    let memory = Mapping::anonymous(64 * PAGE)?;
    let flags = kb::KVM_MEM_LOG_DIRTY_PAGES;
    if let Err(fail) = guest
        .machine
        .set_slot(1, flags, PLACE, &memory, 0, 64 * PAGE)
    {
        return Err(Fail::skip(format!(
            "no slot with KVM_MEM_LOG_DIRTY_PAGES: {fail:?}"
        )));
    }
    let mut bitmap = [u64::MAX];
    let mut fetch = || -> Result<u64, Fail> {
        let mut log = kb::kvm_dirty_log {
            slot: 1,
            ..Default::default()
        };
        log.__bindgen_anon_1.dirty_bitmap = bitmap.as_mut_ptr().cast();
        ioctl_with(&guest.machine.vm, uapi::GET_DIRTY_LOG, &mut log)?;
        Ok(bitmap[0])
    };
    fetch()?;
    guest.read(PLACE + 5 * 4096)?;
    guest.write(PLACE + 4096, 1)?;
    guest.write(PLACE + 63 * 4096, 1)?;
    check_eq!(fetch()?, (1 << 63) | (1 << 1), "pages 1 and 63");
    check_eq!(fetch()?, 0, "once more");
    guest.write(PLACE + 4096, 2)?;
    check_eq!(fetch()?, 1 << 1, "page 1 again");
    check!(memory.read_u64(4096) == 2, "the memory");
    Ok(())
}

fn main() -> std::process::ExitCode {
    ktap::main(tests![
        host_and_guest_share,
        read_only_slot,
        delete_slot,
        move_slot,
        two_slots_one_memory,
        dontneed,
        unmapped,
        copy_on_write,
        demand_paging,
        huge_pages,
        huge_page_split,
        dirty_log,
    ])
}
