// SPDX-License-Identifier: GPL-2.0
//! Guests whose accesses the test chooses.

use rvisor_tests::guest::{self, Mode};
use rvisor_tests::layout::{DONE_PORT, PAGE_TABLES};
use rvisor_tests::raw::expect_errno;
use rvisor_tests::{check, check_eq, guest_code, Cpu, Device, Exit, Fail, Machine, Outcome};

/// Where the tests' second slot lies: aligned for 2 MiB pages.
pub(crate) const PLACE: u64 = 0x1000_0000;
pub(crate) const PAGE: usize = 4096;

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
pub(crate) struct Guest {
    pub(crate) machine: Machine,
    pub(crate) cpu: Cpu,
}

impl Guest {
    pub(crate) fn new(device: &Device) -> Result<Self, Fail> {
        Self::with(device, access())
    }

    pub(crate) fn prepare(&self, address: u64, write: Option<u64>) -> Outcome {
        let mut regs = self.cpu.regs()?;
        regs.rip = rvisor_tests::layout::CODE;
        (regs.rsi, regs.rdi) = (address, write.is_some().into());
        regs.rax = write.unwrap_or(0);
        self.cpu.set_regs(&regs)
    }

    pub(crate) fn read(&self, address: u64) -> Result<u64, Fail> {
        self.prepare(address, None)?;
        self.cpu.run_until_done()?;
        Ok(self.cpu.regs()?.rax)
    }

    pub(crate) fn write(&self, address: u64, value: u64) -> Outcome {
        self.prepare(address, Some(value))?;
        self.cpu.run_until_done()
    }

    /// Reads where there is no memory; userspace answers 0x77, 8 bytes.
    pub(crate) fn read_hole(&self, address: u64) -> Outcome {
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

// Writes its own address to each page from RSI to RDI, then counts in RAX the pages that hold it.
guest_code!(
    pub(crate) touch_all,
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

impl Guest {
    /// A guest with other code.
    pub(crate) fn with(device: &Device, code: &[u8]) -> Result<Self, Fail> {
        let machine = Machine::new(device)?;
        let cpu = machine.vcpu(0)?;
        guest::load(&machine, &cpu, Mode::Long, code)?;
        Ok(Self { machine, cpu })
    }

    /// KVM_RUN of a guest that touches what the process could not touch either.
    pub(crate) fn expect_fault(&self, address: u64, write: Option<u64>) -> Outcome {
        self.prepare(address, write)?;
        let what = format!("KVM_RUN of a guest that touches {address:#x}");
        expect_errno(self.cpu.run_raw(), libc::EFAULT, &what)
    }

    /// Lets the guest reach `gibs` GiB from 4 GiB on, one to one; where they start.
    pub(crate) fn map_gibs(&self, gibs: u64) -> Result<u64, Fail> {
        const FIRST: u64 = 4;
        /// Free memory of the guest's.
        const TABLES: u64 = 0x10_0000;
        const PRESENT_WRITABLE: u64 = 3;
        const LARGE: u64 = 1 << 7;
        let memory = &self.machine.memory;
        check!(TABLES + gibs * 4096 <= memory.len() as u64, "too many");
        for gib in 0..gibs {
            let table = TABLES + gib * 4096;
            let address = (FIRST + gib) << 30;
            let entry = PAGE_TABLES + 0x1000 + 8 * (FIRST + gib);
            memory.write_u64(entry, table | PRESENT_WRITABLE);
            for index in 0..512 {
                let page = address + (index << 21);
                memory.write_u64(table + 8 * index, page | PRESENT_WRITABLE | LARGE);
            }
        }
        Ok(FIRST << 30)
    }
}
