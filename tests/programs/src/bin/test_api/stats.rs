// SPDX-License-Identifier: GPL-2.0
//! KVM_GET_STATS_FD (Documentation/virt/kvm/api.rst, 4.133).

use kvm_bindings as kb;
use rvisor_tests::guest::{self, Mode};
use rvisor_tests::layout::{DONE_PORT, HOLE};
use rvisor_tests::raw::{expect_errno, ioctl, owned, Errno};
use rvisor_tests::{
    check, check_eq, guest_code, uapi, Config, Cpu, Device, Exit, Fail, Machine, Outcome,
};
use std::fs::File;
use std::io::Read;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

/// A file of statistics and what its immutable blocks say.
struct Statistics {
    file: File,
    id: String,
    data: u64,
    /// The name, the flags, and the place of the numbers with their count.
    descriptors: Vec<(String, u32, u64, u16)>,
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes[at..at + 4]
        .iter()
        .rev()
        .fold(0, |word, byte| (word << 8) | u32::from(*byte))
}

/// The text up to the first zero, where there is one.
fn text(bytes: &[u8]) -> Result<String, Fail> {
    let end = bytes.iter().position(|byte| *byte == 0);
    let end = end.ok_or_else(|| Fail::new("a name does not end"))?;
    Ok(String::from_utf8_lossy(&bytes[..end]).into_owned())
}

impl Statistics {
    fn of(fd: &impl AsRawFd) -> Result<Self, Fail> {
        let file = File::from(owned(ioctl(fd, uapi::GET_STATS_FD, 0))?);
        let mut header = [0; 24];
        file.read_exact_at(&mut header, 0)?;
        check_eq!(u32_at(&header, 0), 0, "the header's flags");
        let name = u32_at(&header, 4) as usize;
        let mut id = vec![0; name];
        file.read_exact_at(&mut id, u32_at(&header, 12).into())?;
        let size = 16 + name;
        let mut block = vec![0; size * u32_at(&header, 8) as usize];
        file.read_exact_at(&mut block, u32_at(&header, 16).into())?;
        let mut descriptors = Vec::new();
        for one in block.chunks(size) {
            let count = (u32_at(one, 4) >> 16) as u16;
            check!(count > 0, "a statistic without numbers");
            descriptors.push((
                text(&one[16..])?,
                u32_at(one, 0),
                u32_at(one, 8).into(),
                count,
            ));
        }
        Ok(Self {
            file,
            id: text(&id)?,
            data: u32_at(&header, 20).into(),
            descriptors,
        })
    }

    fn numbers(&self, name: &str) -> Result<Vec<u64>, Fail> {
        let found = self.descriptors.iter().find(|one| one.0 == name);
        let (_, _, offset, count) =
            found.ok_or_else(|| Fail::new(format!("there is no {name}")))?;
        let mut bytes = vec![0; usize::from(*count) * 8];
        self.file.read_exact_at(&mut bytes, self.data + offset)?;
        let number =
            |bytes: &[u8]| u64::from(u32_at(bytes, 0)) | (u64::from(u32_at(bytes, 4)) << 32);
        Ok(bytes.chunks(8).map(number).collect())
    }

    fn number(&self, name: &str) -> Result<u64, Fail> {
        Ok(self.numbers(name)?[0])
    }
}

fn machine(device: &Device, config: Config) -> Result<Machine, Fail> {
    let machine = Machine::with(device, config)?;
    if machine.extension(kb::KVM_CAP_BINARY_STATS_FD) == 0 {
        return Err(Fail::skip("KVM_CAP_BINARY_STATS_FD is not offered"));
    }
    Ok(machine)
}

/// The file's form: what it is called, that it is read alone, at any place and piece by piece.
pub(crate) fn form(device: &Device) -> Outcome {
    let machine = machine(device, Config::default())?;
    let cpu = machine.vcpu(3)?;
    let of_vm = Statistics::of(&machine.vm)?;
    let of_vcpu = Statistics::of(&cpu.fd)?;
    check!(
        of_vm.id.starts_with("kvm-"),
        "the VM is called {}",
        of_vm.id
    );
    check_eq!(
        of_vcpu.id,
        format!("{}/vcpu-3", of_vm.id),
        "the vCPU's name"
    );
    of_vm.number("remote_tlb_flush")?;
    for Statistics {
        file,
        data,
        descriptors,
        ..
    } in [&of_vm, &of_vcpu]
    {
        let numbers: u64 = descriptors.iter().map(|one| u64::from(one.3)).sum();
        let size = data + 8 * numbers;
        let mut whole = Vec::new();
        let mut file = file;
        file.read_to_end(&mut whole)?;
        check_eq!(whole.len() as u64, size, "what read(2) gives");
        check_eq!(file.read(&mut [0; 8])?, 0, "at its end");
        let mut piece = [0; 11];
        check_eq!(file.read_at(&mut piece, 21)?, 11, "a piece");
        check!(
            piece[..] == whole[21..32],
            "the piece is another than before"
        );
        check_eq!(file.read_at(&mut piece, size - 3)?, 3, "the last bytes");
        check_eq!(file.read_at(&mut piece, size + 1)?, 0, "behind the end");
        check!(file.write_at(&[0], 0).is_err(), "it can be written");
        expect_errno(ioctl(file, uapi::GET_STATS_FD, 0), libc::ENOTTY, "an ioctl")?;
        // SAFETY: An address that is nobody's: the kernel is to say so.
        let read = unsafe { libc::read(file.as_raw_fd(), std::ptr::without_provenance_mut(8), 8) };
        check_eq!(read, 0, "at the end nothing is written");
        // SAFETY: As above.
        let read =
            unsafe { libc::pread(file.as_raw_fd(), std::ptr::without_provenance_mut(8), 8, 0) };
        let error = std::io::Error::last_os_error().raw_os_error().unwrap_or(0);
        check_eq!(
            (read, Errno(error)),
            (-1, Errno(libc::EFAULT)),
            "no memory there"
        );
    }
    Ok(())
}

guest_code!(
    counted_guest,
    code64,
    [
        "out {done}, al",
        "mov ecx, 5",
        "2: out {done}, al",
        "loop 2b",
        "vmcall",
        "vmcall",
        "vmcall",
        "mov ebx, {hole}",
        "mov [rbx], eax",
        "mov [rbx], eax",
        "out {done}, al",
        "hlt",
    ],
    done = DONE_PORT,
    hole = HOLE as i32
);

/// What the guest did is counted under KVM's names.
pub(crate) fn counted(device: &Device) -> Outcome {
    let machine = machine(device, Config::default())?;
    let cpu = machine.vcpu(0)?;
    guest::load(&machine, &cpu, Mode::Long, counted_guest())?;
    cpu.run_until_done()?;
    let statistics = Statistics::of(&cpu.fd)?;
    let names = [
        "io_exits",
        "hypercalls",
        "mmio_exits",
        "insn_emulation",
        "exits",
    ];
    let read = || {
        names
            .iter()
            .map(|name| statistics.number(name))
            .collect::<Result<Vec<_>, _>>()
    };
    let before = read()?;
    for _ in 0..5 {
        cpu.run_until_done()?;
    }
    for _ in 0..2 {
        let exit = cpu.run()?;
        check!(
            matches!(exit, Exit::MmioWrite { .. }),
            "{exit:?} instead of a write"
        );
    }
    cpu.run_until_done()?;
    check_eq!(cpu.run()?, Exit::Hlt, "the last exit");
    let counts: Vec<u64> = read()?
        .iter()
        .zip(&before)
        .map(|(after, before)| after - before)
        .collect();
    check_eq!(
        counts[..3],
        [6, 3, 2],
        "port I/O, hypercalls and device memory"
    );
    check!(counts[3] >= 2, "{} instructions were emulated", counts[3]);
    check!(counts[4] >= 12, "{} exits in all", counts[4]);
    if let Ok(reasons) = statistics.numbers("exit_reasons") {
        check_eq!(
            reasons.iter().sum::<u64>(),
            statistics.number("exits")?,
            "exits"
        );
        check_eq!(reasons[30], statistics.number("io_exits")?, "reason 30");
        check_eq!(reasons[12], 1, "HLT");
    }
    Ok(())
}

/// The file keeps what it tells of, when all other descriptors are closed.
pub(crate) fn outlives(device: &Device) -> Outcome {
    let (of_vm, of_vcpu, exits) = {
        let machine = machine(device, Config::default())?;
        let cpu: Cpu = machine.vcpu(0)?;
        guest::load(&machine, &cpu, Mode::Long, counted_guest())?;
        cpu.run_until_done()?;
        let of_vcpu = Statistics::of(&cpu.fd)?;
        let exits = of_vcpu.number("exits")?;
        (Statistics::of(&machine.vm)?, of_vcpu, exits)
    };
    check_eq!(of_vcpu.number("exits")?, exits, "exits");
    of_vm.number("remote_tlb_flush").map(drop)
}
