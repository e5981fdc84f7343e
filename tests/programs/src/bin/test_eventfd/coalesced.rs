// SPDX-License-Identifier: GPL-2.0
//! KVM_REGISTER_COALESCED_MMIO: writes that wait in a ring.

use kvm_bindings as kb;
use rvisor_tests::guest::{self, Mode};
use rvisor_tests::layout::{DONE_PORT, FREE_PORT, HOLE};
use rvisor_tests::raw::{expect_errno, ioctl_with, Errno};
use rvisor_tests::{check, check_eq, guest_code, uapi, Cpu, Device, Exit, Fail, Machine, Outcome};

/// Entries of the ring's page, one of which is always free.
const PLACES: u32 = (4096 - 8) / 24;

fn zone(machine: &Machine, request: u64, address: u64, size: u32, pio: u32) -> Result<i32, Errno> {
    let mut zone = kb::kvm_coalesced_mmio_zone {
        addr: address,
        size,
        ..Default::default()
    };
    zone.__bindgen_anon_1.pio = pio;
    ioctl_with(&machine.vm, request, &mut zone)
}

fn register(machine: &Machine, address: u64, size: u32, pio: u32) -> Result<i32, Errno> {
    zone(machine, uapi::REGISTER_COALESCED_MMIO, address, size, pio)
}

/// A machine with its vCPU, and where in the vCPU's mapping the ring is.
fn start(device: &Device, code: &[u8]) -> Result<(Machine, Cpu, u64), Fail> {
    let machine = Machine::new(device)?;
    let page = machine.extension(kb::KVM_CAP_COALESCED_MMIO);
    check!(page > 0, "COALESCED_MMIO is not offered");
    let cpu = machine.vcpu(0)?;
    guest::load(&machine, &cpu, Mode::Long, code)?;
    Ok((machine, cpu, 4096 * page as u64))
}

/// `first` and `last`.
fn ends(cpu: &Cpu, ring: u64) -> (u32, u32) {
    let word = cpu.run_page().read_u64(ring);
    (word as u32, (word >> 32) as u32)
}

/// An entry: address, length and whether it is a port, the first bytes of the data.
fn entry(cpu: &Cpu, ring: u64, place: u32, length: usize) -> (u64, u64, Vec<u8>) {
    let at = ring + 8 + 24 * u64::from(place);
    let page = cpu.run_page();
    (
        page.read_u64(at),
        page.read_u64(at + 8),
        page.read(at + 16, length),
    )
}

guest_code!(nothing, code64, ["out {done}, al"], done = DONE_PORT);

pub(crate) fn errors(device: &Device) -> Outcome {
    let (machine, _cpu, _) = start(device, nothing())?;
    for request in [
        uapi::REGISTER_COALESCED_MMIO,
        uapi::UNREGISTER_COALESCED_MMIO,
    ] {
        expect_errno(
            zone(&machine, request, HOLE, 16, 2),
            libc::EINVAL,
            "another kind than memory and ports",
        )?;
    }
    // What is not there can be removed.
    zone(&machine, uapi::UNREGISTER_COALESCED_MMIO, HOLE, 16, 0)?;
    Ok(())
}

guest_code!(
    memory_guest,
    code64,
    [
        "mov rbx, {hole}",
        "movabs rax, 0x8877665544332211",
        "mov [rbx], al",
        "mov [rbx + 8], rax",
        "mov [rbx + 12], eax",
        "mov [rbx + 14], eax",
        "mov [rbx + 2], ax",
        "mov ecx, [rbx]",
        "out {done}, al",
    ],
    hole = HOLE,
    done = DONE_PORT
);

pub(crate) fn memory(device: &Device) -> Outcome {
    let (machine, cpu, ring) = start(device, memory_guest())?;
    register(&machine, HOLE, 16, 0)?;
    // Partly outside.
    cpu.run_expecting(&Exit::MmioWrite {
        address: HOLE + 14,
        data: vec![0x11, 0x22, 0x33, 0x44],
    })?;
    check_eq!(ends(&cpu, ring), (0, 3), "first and last");
    check_eq!(entry(&cpu, ring, 0, 1), (HOLE, 1, vec![0x11]), "a byte");
    check_eq!(
        entry(&cpu, ring, 1, 8),
        (
            HOLE + 8,
            8,
            vec![0x11, 0x22, 0x33, 0x44, 0x55, 0x66, 0x77, 0x88]
        ),
        "8 bytes"
    );
    check_eq!(
        entry(&cpu, ring, 2, 4),
        (HOLE + 12, 4, vec![0x11, 0x22, 0x33, 0x44]),
        "4 bytes"
    );
    // Reads are userspace's, which sees the writes before them first.
    cpu.run_expecting(&Exit::MmioRead {
        address: HOLE,
        length: 4,
    })?;
    check_eq!(ends(&cpu, ring), (0, 4), "first and last at the read");
    cpu.answer_mmio(&[0; 4]);
    cpu.run_until_done()
}

guest_code!(
    port_guest,
    code64,
    [
        "mov dx, {port}",
        "mov eax, 0x44332211",
        "out dx, al",
        "out dx, eax",
        "inc dx",
        "out dx, eax",
        "out {done}, al",
    ],
    port = FREE_PORT,
    done = DONE_PORT
);

pub(crate) fn ports(device: &Device) -> Outcome {
    let (machine, cpu, ring) = start(device, port_guest())?;
    if machine.extension(kb::KVM_CAP_COALESCED_PIO) == 0 {
        return Err(Fail::skip("COALESCED_PIO is not offered"));
    }
    register(&machine, FREE_PORT.into(), 4, 1)?;
    cpu.run_expecting(&Exit::Out {
        port: FREE_PORT + 1,
        size: 4,
        data: vec![0x11, 0x22, 0x33, 0x44],
    })?;
    check_eq!(ends(&cpu, ring), (0, 2), "first and last");
    let port = u64::from(FREE_PORT);
    let is_port = 1 << 32;
    check_eq!(
        entry(&cpu, ring, 0, 1),
        (port, 1 | is_port, vec![0x11]),
        "a byte"
    );
    check_eq!(
        entry(&cpu, ring, 1, 4),
        (port, 4 | is_port, vec![0x11, 0x22, 0x33, 0x44]),
        "4 bytes"
    );
    cpu.run_until_done()
}

guest_code!(
    fill_guest,
    code64,
    [
        "mov rbx, {hole}",
        "xor eax, eax",
        "2: mov [rbx], eax",
        "inc eax",
        "jmp 2b",
    ],
    hole = HOLE
);

/// One place stays free; the write that finds no room is an exit, and userspace makes room.
pub(crate) fn full_ring(device: &Device) -> Outcome {
    let (machine, cpu, ring) = start(device, fill_guest())?;
    register(&machine, HOLE, 4, 0)?;
    let write = |value: u32| Exit::MmioWrite {
        address: HOLE,
        data: value.to_le_bytes().to_vec(),
    };
    cpu.run_expecting(&write(PLACES - 1))?;
    check_eq!(ends(&cpu, ring), (0, PLACES - 1), "first and last");
    // Two places: the last of the page, then the first.
    cpu.run_page().write(ring, &2_u32.to_le_bytes());
    cpu.run_expecting(&write(PLACES + 2))?;
    check_eq!(ends(&cpu, ring), (2, 1), "first and last behind the end");
    check_eq!(
        entry(&cpu, ring, 0, 4),
        (HOLE, 4, (PLACES + 1).to_le_bytes().to_vec()),
        "the entry behind the end"
    );
    Ok(())
}

/// Ends that userspace has spoilt make each write an exit.
pub(crate) fn spoilt_ring(device: &Device) -> Outcome {
    let (machine, cpu, ring) = start(device, fill_guest())?;
    register(&machine, HOLE, 4, 0)?;
    for (value, last) in [PLACES, PLACES + 1, 0x8000_0000, u32::MAX]
        .into_iter()
        .enumerate()
    {
        cpu.run_page().write(ring + 4, &last.to_le_bytes());
        cpu.run_expecting(&Exit::MmioWrite {
            address: HOLE,
            data: (value as u32).to_le_bytes().to_vec(),
        })?;
        check_eq!(ends(&cpu, ring).1, last, "last");
    }
    Ok(())
}

pub(crate) fn removed(device: &Device) -> Outcome {
    let (machine, cpu, ring) = start(device, fill_guest())?;
    register(&machine, HOLE, 16, 0)?;
    // Naming a part removes the whole; naming more does not.
    zone(&machine, uapi::UNREGISTER_COALESCED_MMIO, HOLE, 17, 0)?;
    zone(&machine, uapi::UNREGISTER_COALESCED_MMIO, HOLE + 4, 4, 0)?;
    cpu.run_expecting(&Exit::MmioWrite {
        address: HOLE,
        data: vec![0; 4],
    })?;
    check_eq!(ends(&cpu, ring), (0, 0), "first and last");
    Ok(())
}
