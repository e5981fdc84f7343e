// SPDX-License-Identifier: GPL-2.0
//! What a round has: some descriptors, some memory, and threads that do anything with them at the same time.

use crate::random::Random;
use crate::requests::{self, Kind};
use crate::soup;
use kvm_bindings as kb;
use rvisor_tests::mapping::Mapping;
use rvisor_tests::{uapi, Context, Device, Fail};
use std::mem::offset_of;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// The guests' memory in bytes.
const MEMORY: usize = 4 << 20;
/// What an argument may have, in bytes; a page that can't be touched lies behind it.
const ARGUMENT: usize = 64 << 10;
const PAGE: usize = 4096;

/// Descriptors that any thread may close or replace at any time; -1 where there is none.
type Descriptors<const N: usize> = [AtomicI32; N];

/// A round's.
pub(crate) struct World {
    system: OwnedFd,
    vms: Descriptors<2>,
    vcpus: Descriptors<4>,
    /// Where the vCPUs' shared pages are; they stay mapped.
    pages: [AtomicUsize; 4],
    events: Descriptors<4>,
    /// Traces and statistics.
    readers: Descriptors<4>,
    memory: Mapping,
    cpuid: Vec<u8>,
    page_size: usize,
    /// The threads that may be in KVM_RUN, by thread id.
    runners: Descriptors<3>,
    ended: AtomicBool,
}

fn none<const N: usize>() -> Descriptors<N> {
    std::array::from_fn(|_| AtomicI32::new(-1))
}

/// An ioctl with whatever argument.
fn ioctl(fd: i32, request: u64, argument: usize) -> i32 {
    // SAFETY: This process was made for this: what the kernel writes through addresses that are at random may break
    // it, which its parent takes for an end like another.
    unsafe { libc::ioctl(fd, request, argument) }
}

fn close(fd: i32) {
    // SAFETY: Only descriptors of the world come here.
    unsafe { libc::close(fd) };
}

impl World {
    pub(crate) fn new(device: &Device) -> Result<Self, Fail> {
        let system = device.open()?;
        let mut cpuid = vec![0; 8 + 256 * 40];
        cpuid[0] = 255;
        let place = cpuid.as_mut_ptr() as usize;
        if ioctl(system.as_raw_fd(), uapi::GET_SUPPORTED_CPUID, place) != 0 {
            return Err(std::io::Error::last_os_error()).during("KVM_GET_SUPPORTED_CPUID");
        }
        let entries = u32::from_le_bytes([cpuid[0], cpuid[1], cpuid[2], cpuid[3]]);
        cpuid.truncate(8 + 40 * entries as usize);
        let page_size = ioctl(system.as_raw_fd(), uapi::GET_VCPU_MMAP_SIZE, 0);
        let memory = Mapping::anonymous(MEMORY)?;
        for place in (0..MEMORY as u64).step_by(8) {
            memory.write_u64(place, soup::FILLER);
        }
        Ok(Self {
            system,
            vms: none(),
            vcpus: none(),
            pages: std::array::from_fn(|_| AtomicUsize::new(0)),
            events: none(),
            readers: none(),
            memory,
            cpuid,
            page_size: usize::try_from(page_size).unwrap_or(PAGE),
            runners: none(),
            ended: AtomicBool::new(false),
        })
    }

    /// What KVM_GET_SUPPORTED_CPUID gave, as KVM_SET_CPUID2 takes it.
    pub(crate) fn cpuid(&self) -> &[u8] {
        &self.cpuid
    }

    /// An eventfd, as a number of 32 bits.
    pub(crate) fn event(&self, random: &mut Random) -> u64 {
        let place = random.of(&[0, 1, 2, 3]);
        let event = self.events[place].load(Ordering::Relaxed);
        u64::from(event as u32)
    }

    /// An address of this process: in the guests' memory, mostly at a page.
    pub(crate) fn address(&self, random: &mut Random) -> u64 {
        let page = random.below((MEMORY / PAGE) as u64) * PAGE as u64;
        match random.below(16) {
            0 => random.word(),
            1 => self.memory.start() + page + random.below(PAGE as u64),
            2 | 3 => self.memory.start() + (page & !0x1f_ffff),
            _ => self.memory.start() + page,
        }
    }

    /// Does things at random until `end`, as runner `number` of the round.
    pub(crate) fn act(&self, number: usize, mut random: Random, end: Instant) -> Result<(), Fail> {
        // SAFETY: It has no preconditions.
        self.runners[number].store(unsafe { libc::gettid() }, Ordering::Relaxed);
        let argument = Mapping::anonymous(ARGUMENT + PAGE)?;
        argument.protect(ARGUMENT as u64, PAGE, libc::PROT_NONE)?;
        while Instant::now() < end {
            self.step(&mut random, &argument);
        }
        self.runners[number].store(-1, Ordering::Relaxed);
        Ok(())
    }

    /// Ends KVM_RUN of all runners again and again, until the round has ended.
    pub(crate) fn kick(&self) {
        while !self.ended.load(Ordering::Relaxed) {
            std::thread::sleep(Duration::from_micros(300));
            for runner in &self.runners {
                let thread = runner.load(Ordering::Relaxed);
                if thread > 0 {
                    // SAFETY: A signal with a handler that does nothing.
                    unsafe { libc::tgkill(libc::getpid(), thread, libc::SIGUSR1) };
                }
            }
        }
    }

    /// The round has ended.
    pub(crate) fn end(&self) {
        self.ended.store(true, Ordering::Relaxed);
    }

    fn step(&self, random: &mut Random, argument: &Mapping) {
        let vm = random.of(&[0, 0, 0, 1]);
        let cpu = random.of(&[0, 0, 1, 2, 3]);
        match random.below(40) {
            0 => self.new_vm(random, vm),
            1 | 2 => self.new_vcpu(random, vm, cpu),
            3 => self.new_event(random),
            4 => self.new_reader(random, vm, cpu),
            5 => self.read(random, argument),
            6 => self.change_memory(random),
            7 => self.change_page(random, cpu),
            8 if random.once_in(4) => self.fork(),
            9 => self.ask(random, argument, Kind::System, self.system.as_raw_fd()),
            10..=14 => self.ask(random, argument, Kind::Vm, get(&self.vms[vm])),
            15..=19 => self.ask(random, argument, Kind::Vcpu, get(&self.vcpus[cpu])),
            20 | 21 => change(random, argument, get(&self.vms[vm]), requests::VM_STATE),
            22..=25 => change(
                random,
                argument,
                get(&self.vcpus[cpu]),
                requests::VCPU_STATE,
            ),
            26 | 27 => self.reload(random, cpu),
            _ => self.run(random, cpu),
        }
    }

    fn new_vm(&self, random: &mut Random, place: usize) {
        let vm = ioctl(self.system.as_raw_fd(), uapi::CREATE_VM, 0);
        if vm < 0 {
            return;
        }
        let region = [0, 0, 2 << 20, self.memory.start()];
        ioctl(vm, uapi::SET_USER_MEMORY_REGION, region.as_ptr() as usize);
        match random.below(4) {
            0 => {}
            1 => {
                let mut split = [0_u64; 13];
                split[0] = u64::from(kb::KVM_CAP_SPLIT_IRQCHIP);
                split[1] = 24;
                ioctl(vm, uapi::ENABLE_CAP, split.as_ptr() as usize);
            }
            _ => {
                ioctl(vm, uapi::CREATE_IRQCHIP, 0);
                ioctl(vm, uapi::CREATE_PIT2, [0_u32; 16].as_ptr() as usize);
            }
        }
        replace(&self.vms[place], vm);
    }

    fn new_vcpu(&self, random: &mut Random, vm: usize, place: usize) {
        let id = match random.below(8) {
            0 => random.word(),
            _ => random.below(5),
        };
        let vcpu = ioctl(get(&self.vms[vm]), uapi::CREATE_VCPU, id as usize);
        if vcpu < 0 {
            return;
        }
        ioctl(vcpu, uapi::SET_CPUID2, self.cpuid.as_ptr() as usize);
        if let Ok(page) = Mapping::shared(vcpu, self.page_size) {
            self.pages[place].store(page.address() as usize, Ordering::Relaxed);
            std::mem::forget(page);
        }
        replace(&self.vcpus[place], vcpu);
        self.reload(random, place);
    }

    /// New code and registers for a vCPU.
    fn reload(&self, random: &mut Random, place: usize) {
        let vcpu = get(&self.vcpus[place]);
        let mode = soup::Mode::any(random);
        self.memory.write(mode.code(), &soup::code(random, mode));
        self.memory.write(soup::TABLES, &soup::tables());
        self.memory.write(soup::GDT, &soup::gdt());
        self.memory.write(mode.handler(), &soup::handler(mode));
        self.memory.write(mode.idt(), &soup::idt(mode));
        let mut sregs = kb::kvm_sregs::default();
        let sregs_at = (&raw mut sregs) as usize;
        ioctl(vcpu, uapi::GET_SREGS, sregs_at);
        soup::enter(&mut sregs, mode);
        ioctl(vcpu, uapi::SET_SREGS, sregs_at);
        let regs = soup::registers(random, mode);
        ioctl(vcpu, uapi::SET_REGS, (&raw const regs) as usize);
        if random.once_in(4) {
            ioctl(vcpu, uapi::SET_MP_STATE, [0_u32].as_ptr() as usize);
        }
    }

    fn new_event(&self, random: &mut Random) {
        let place = random.of(&[0, 1, 2, 3]);
        match random.below(3) {
            0 => {
                // SAFETY: Makes a descriptor.
                let event = unsafe { libc::eventfd(0, libc::EFD_NONBLOCK | libc::EFD_CLOEXEC) };
                replace(&self.events[place], event);
            }
            _ => {
                let one = 1_u64;
                let event = get(&self.events[place]);
                // SAFETY: Reads 8 bytes.
                unsafe { libc::write(event, (&raw const one).cast(), 8) };
            }
        }
    }

    fn new_reader(&self, random: &mut Random, vm: usize, cpu: usize) {
        let (fd, request) = match random.below(3) {
            0 => (get(&self.vms[vm]), uapi::GET_STATS_FD),
            1 => (get(&self.vcpus[cpu]), uapi::GET_STATS_FD),
            _ => (get(&self.vcpus[cpu]), uapi::RVISOR_TRACE_OPEN),
        };
        let reader = ioctl(fd, request, 0);
        if reader >= 0 {
            // SAFETY: Sets a flag, so that a read does not wait.
            unsafe { libc::fcntl(reader, libc::F_SETFL, libc::O_NONBLOCK) };
            replace(&self.readers[random.of(&[0, 1, 2, 3])], reader);
        }
    }

    fn read(&self, random: &mut Random, argument: &Mapping) {
        let reader = get(&self.readers[random.of(&[0, 1, 2, 3])]);
        let length = random.of(&[0, 1, 24, 48, 4096, ARGUMENT, usize::MAX >> 1]);
        let place = argument.address().cast();
        // SAFETY: Up to `ARGUMENT` bytes are the mapping's; behind it lies a page that can't be written.
        unsafe {
            match random.below(2) {
                0 => libc::read(reader, place, length),
                _ => libc::pread(reader, place, length, random.word() as i64),
            };
        }
    }

    /// Takes the guests' memory away under them, in one way or another.
    fn change_memory(&self, random: &mut Random) {
        let pages = random.below(513);
        let page = random.below((MEMORY / PAGE) as u64 - pages);
        let (from, length) = (page * PAGE as u64, pages as usize * PAGE);
        // The code stays what can be read, for this process writes there.
        if from < 0x1_0000 {
            return;
        }
        let _ = match random.below(5) {
            0 => self.memory.advise(from, length, libc::MADV_DONTNEED),
            1 => self.memory.replace(from, length),
            2 => self.memory.protect(from, length, libc::PROT_READ),
            3 => self.memory.protect(from, length, libc::PROT_NONE),
            _ => {
                let all = libc::PROT_READ | libc::PROT_WRITE;
                self.memory.protect(from, length, all)
            }
        };
    }

    /// Writes to the pages that a vCPU shares with this process.
    fn change_page(&self, random: &mut Random, cpu: usize) {
        let page = self.pages[cpu].load(Ordering::Relaxed) as *mut u8;
        if page.is_null() {
            return;
        }
        // The head, all of `struct kvm_run`, the indices of the ring two pages behind it, or anything.
        let (from, length) = random.of(&[
            (0, 32),
            (0, size_of::<kb::kvm_run>()),
            (kb::KVM_COALESCED_MMIO_PAGE_OFFSET as usize * PAGE, 8),
            (0, self.page_size),
        ]);
        for _ in 0..=random.below(4) {
            let place = page.wrapping_add(from + random.below(length as u64) as usize);
            // SAFETY: It lies in the mapping, which stays; the kernel and other threads write there too.
            unsafe { place.write_volatile(random.next() as u8) };
        }
        // So that it runs again some time: `immediate_exit`.
        if random.once_in(2) {
            // SAFETY: As above.
            unsafe { page.wrapping_add(1).write_volatile(0) };
        }
    }

    fn fork(&self) {
        // SAFETY: The child does nothing but end.
        match unsafe { libc::fork() } {
            // SAFETY: It ends at once.
            0 => unsafe { libc::_exit(0) },
            child => {
                // SAFETY: Waits for it, wherever the status may be written.
                unsafe { libc::waitpid(child, std::ptr::null_mut(), 0) };
            }
        }
    }

    fn ask(&self, random: &mut Random, argument: &Mapping, kind: Kind, fd: i32) {
        let request = match random.below(32) {
            0 => 0xae00 | random.below(256) | (random.below(4) << 30) | (random.below(64) << 16),
            _ => requests::any(random, kind),
        };
        let length = match request {
            uapi::SET_CPUID2 => self.cpuid.len(),
            _ => uapi::size_of_request(request).max(512),
        };
        let mut bytes = vec![0; length.next_multiple_of(8)];
        requests::fill(random, self, request, &mut bytes);
        // Numbers are in the place of an address.
        if uapi::size_of_request(request) == 0 {
            let number = u64::from_le_bytes(bytes[..8].try_into().unwrap_or_default());
            // An address would be that of anything.
            ioctl(fd, request, (number & 0xffff_0000_0000_0fff) as usize);
            return;
        }
        ioctl(fd, request, put(random, argument, &bytes));
    }

    fn run(&self, random: &mut Random, cpu: usize) {
        for _ in 0..random.below(8) {
            if ioctl(get(&self.vcpus[cpu]), uapi::RUN, 0) != 0 {
                break;
            }
            match self.exit_reason(cpu) {
                kb::KVM_EXIT_SHUTDOWN | kb::KVM_EXIT_FAIL_ENTRY | kb::KVM_EXIT_INTERNAL_ERROR => {
                    self.reload(random, cpu);
                }
                _ if random.once_in(6) => self.change_page(random, cpu),
                _ => {}
            }
        }
    }

    fn exit_reason(&self, cpu: usize) -> u32 {
        let page = self.pages[cpu].load(Ordering::Relaxed) as *const u8;
        if page.is_null() {
            return 0;
        }
        let place = page
            .wrapping_add(offset_of!(kb::kvm_run, exit_reason))
            .cast::<u32>();
        // SAFETY: It lies in the mapping, which stays; the kernel and other threads write there too.
        unsafe { place.read_volatile() }
    }
}

/// Reads a state, changes it and writes it, or writes anything.
fn change(random: &mut Random, argument: &Mapping, fd: i32, pairs: &[(u64, u64)]) {
    let (get, set) = random.of(pairs);
    let size = uapi::size_of_request(set);
    if get == uapi::GET_IRQCHIP {
        argument.write(0, &(random.below(4) as u32).to_le_bytes());
    }
    ioctl(fd, get, argument.start() as usize);
    let mut bytes = argument.read(0, size);
    if !random.once_in(4) {
        random.disturb(&mut bytes);
    }
    ioctl(fd, set, put(random, argument, &bytes));
}

/// Puts an argument where the kernel shall find it: sometimes so that its end is not there.
fn put(random: &mut Random, argument: &Mapping, bytes: &[u8]) -> usize {
    if random.once_in(12) {
        let there = random.below(64) as usize;
        let place = (ARGUMENT - there) as u64;
        argument.write(place, &bytes[..there.min(bytes.len())]);
        return (argument.start() + place) as usize;
    }
    argument.write(0, bytes);
    argument.start() as usize
}

fn get(place: &AtomicI32) -> i32 {
    place.load(Ordering::Relaxed)
}

fn replace(place: &AtomicI32, with: i32) {
    let old = place.swap(with, Ordering::Relaxed);
    if old >= 0 {
        close(old);
    }
}
