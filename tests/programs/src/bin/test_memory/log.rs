// SPDX-License-Identifier: GPL-2.0
//! The dirty log: KVM_MEM_LOG_DIRTY_PAGES, KVM_GET_DIRTY_LOG and KVM_CLEAR_DIRTY_LOG.

use crate::guests::{Guest, PAGE, PLACE};
use crate::large::Timed;
use crate::running::{beside, move_into, wait_for_change};
use kvm_bindings as kb;
use rvisor_tests::mapping::Mapping;
use rvisor_tests::raw::{expect_errno, ioctl, ioctl_with, Errno};
use rvisor_tests::{check, check_eq, uapi, Device, Outcome};

/// KVM_GET_DIRTY_LOG of this slot into these words.
fn fetch(guest: &Guest, slot: u32, words: &mut [u64]) -> Result<(), Errno> {
    fetch_to(guest, slot, words.as_mut_ptr())
}

fn fetch_to(guest: &Guest, slot: u32, words: *mut u64) -> Result<(), Errno> {
    let mut log = kb::kvm_dirty_log {
        slot,
        ..Default::default()
    };
    log.__bindgen_anon_1.dirty_bitmap = words.cast();
    ioctl_with(&guest.machine.vm, uapi::GET_DIRTY_LOG, &mut log).map(|_| ())
}

/// KVM_CLEAR_DIRTY_LOG of `count` pages from `first` on.
fn clear(guest: &Guest, slot: u32, first: u64, count: u32, words: &[u64]) -> Result<(), Errno> {
    clear_from(guest, slot, first, count, words.as_ptr())
}

fn clear_from(
    guest: &Guest,
    slot: u32,
    first: u64,
    count: u32,
    words: *const u64,
) -> Result<(), Errno> {
    let mut log = kb::kvm_clear_dirty_log {
        slot,
        num_pages: count,
        first_page: first,
        ..Default::default()
    };
    log.__bindgen_anon_1.dirty_bitmap = words.cast_mut().cast();
    ioctl_with(&guest.machine.vm, uapi::CLEAR_DIRTY_LOG, &mut log).map(|_| ())
}

/// The notes are userspace's to take: KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2.
const MANUAL: u64 = kb::KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE as u64;
const INITIALLY_SET: u64 = kb::KVM_DIRTY_LOG_INITIALLY_SET as u64;

fn set_options(guest: &Guest, options: u64) -> Result<(), Errno> {
    let mut request = kb::kvm_enable_cap {
        cap: kb::KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
        args: [options, 0, 0, 0],
        ..Default::default()
    };
    ioctl_with(&guest.machine.vm, uapi::ENABLE_CAP, &mut request).map(|_| ())
}

fn set(guest: &Guest, flags: u32, memory: &Mapping, length: usize) -> Outcome {
    guest.machine.set_slot(1, flags, PLACE, memory, 0, length)
}

/// What was written is in the log once; what was read is not.
pub(crate) fn dirty_log(device: &Device) -> Outcome {
    let guest = Guest::new(device)?;
    let memory = Mapping::anonymous(64 * PAGE)?;
    set(&guest, kb::KVM_MEM_LOG_DIRTY_PAGES, &memory, 64 * PAGE)?;
    let take = || -> Result<u64, Errno> {
        let mut word = [u64::MAX];
        fetch(&guest, 1, &mut word)?;
        Ok(word[0])
    };
    check_eq!(take()?, 0, "the log of a new slot");
    guest.read(PLACE + 5 * 4096)?;
    guest.write(PLACE + 4096, 1)?;
    guest.write(PLACE + 63 * 4096, 1)?;
    check_eq!(take()?, (1 << 63) | (1 << 1), "pages 1 and 63");
    check_eq!(take()?, 0, "once more");
    guest.read(PLACE + 4096)?;
    check_eq!(take()?, 0, "after reading page 1");
    guest.write(PLACE + 4096, 2)?;
    check_eq!(take()?, 1 << 1, "page 1 again");
    check!(memory.read_u64(4096) == 2, "the memory");
    // What the process itself writes is its own affair.
    memory.write_u64(7 * 4096, 1);
    check_eq!(take()?, 0, "after a write of the process's");
    Ok(())
}

/// A slot of more than a word, whose last word is not whole; all of it written.
pub(crate) fn dirty_log_of_many_pages(device: &Device) -> Outcome {
    const PAGES: usize = 64 * 70 + 3;
    let guest = Guest::with(device, crate::guests::touch_all())?;
    let memory = Mapping::anonymous(PAGES * PAGE)?;
    memory.advise(0, memory.len(), libc::MADV_HUGEPAGE)?;
    set(&guest, kb::KVM_MEM_LOG_DIRTY_PAGES, &memory, PAGES * PAGE)?;
    let mut regs = guest.cpu.regs()?;
    // All pages but the first two.
    (regs.rsi, regs.rdi) = (PLACE + 2 * 4096, PLACE + (PAGES * PAGE) as u64);
    guest.cpu.set_regs(&regs)?;
    guest.cpu.run_until_done()?;
    let mut words = [u64::MAX; 72];
    fetch(&guest, 1, &mut words)?;
    check_eq!(words[0], u64::MAX << 2, "the first word");
    check!(
        words[1..70].iter().all(|word| *word == u64::MAX),
        "the words between"
    );
    check_eq!(words[70], 0b111, "the last word");
    check_eq!(words[71], u64::MAX, "what lies behind the bitmap");
    fetch(&guest, 1, &mut words)?;
    check!(words[..71].iter().all(|word| *word == 0), "taken twice");
    Ok(())
}

/// The answers to wrong questions.
pub(crate) fn dirty_log_errors(device: &Device) -> Outcome {
    let guest = Guest::new(device)?;
    let memory = Mapping::anonymous(PAGE)?;
    let mut word = [0];
    expect_errno(fetch(&guest, 1, &mut word), libc::ENOENT, "no slot")?;
    set(&guest, 0, &memory, PAGE)?;
    expect_errno(
        fetch(&guest, 1, &mut word),
        libc::ENOENT,
        "a slot without a log",
    )?;
    expect_errno(
        fetch(&guest, 0xffff, &mut word),
        libc::EINVAL,
        "no such number",
    )?;
    expect_errno(
        fetch(&guest, 0x5_0001, &mut word),
        libc::EINVAL,
        "no such space",
    )?;
    set(&guest, kb::KVM_MEM_LOG_DIRTY_PAGES, &memory, PAGE)?;
    guest.write(PLACE, 1)?;
    let nowhere = std::ptr::without_provenance_mut(8);
    expect_errno(
        fetch_to(&guest, 1, nowhere),
        libc::EFAULT,
        "no place for the bitmap",
    )?;
    // The log can be taken all the same; KVM has lost what was in it.
    guest.write(PLACE, 2)?;
    fetch(&guest, 1, &mut word)?;
    check_eq!(memory.read_u64(0), 2, "the memory");
    set(&guest, 0, &memory, PAGE)?;
    expect_errno(
        fetch(&guest, 1, &mut word),
        libc::ENOENT,
        "the log was switched off",
    )
}

/// A log that is switched on under memory that the guest has already, moved, and switched off.
pub(crate) fn dirty_log_switched(device: &Device) -> Outcome {
    const LATER: u64 = PLACE + 0x40_0000;
    let guest = Guest::new(device)?;
    let memory = Mapping::anonymous(8 * PAGE)?;
    set(&guest, 0, &memory, 8 * PAGE)?;
    for page in 0..8 {
        guest.write(PLACE + page * 4096, page)?;
    }
    let mut word = [u64::MAX];
    for round in 0..3 {
        let log = kb::KVM_MEM_LOG_DIRTY_PAGES;
        set(&guest, log, &memory, 8 * PAGE)?;
        guest.write(PLACE + 3 * 4096, 1)?;
        fetch(&guest, 1, &mut word)?;
        check_eq!(word[0], 1 << 3, "round {round}");
        guest.write(PLACE + 2 * 4096, 1)?;
        // It moves with its notes, which are by the page of the slot.
        guest
            .machine
            .set_slot(1, log, LATER, &memory, 0, 8 * PAGE)?;
        guest.write(LATER + 5 * 4096, 1)?;
        fetch(&guest, 1, &mut word)?;
        check_eq!(word[0], (1 << 5) | (1 << 2), "moved, round {round}");
        guest
            .machine
            .set_slot(1, log, PLACE, &memory, 0, 8 * PAGE)?;
        set(&guest, 0, &memory, 8 * PAGE)?;
        guest.write(PLACE + 3 * 4096, 2)?;
    }
    Ok(())
}

/// Memory with a log has small pages; without it large ones again.
pub(crate) fn dirty_log_and_huge_pages(device: &Device) -> Outcome {
    const HUGE: usize = 2 << 20;
    let timed = Timed::new(device)?;
    let memory = crate::large::transparent(HUGE)?;
    let guest = &timed.guest;
    set(guest, 0, &memory, HUGE)?;
    timed.check_mapped(PLACE, HUGE, PAGE, 1)?;
    set(guest, kb::KVM_MEM_LOG_DIRTY_PAGES, &memory, HUGE)?;
    let (faults, _) = timed.count(PLACE + 4096, HUGE - PAGE, PAGE)?;
    // KVM has the CPU write the log where it can (page-modification logging, SDM volume 3, 30.3.6): no faults.
    check!(
        faults >= 511 || device.path().ends_with("kvm"),
        "only {faults} faults for 511 pages with a log"
    );
    let mut words = [0; 8];
    fetch(guest, 1, &mut words)?;
    check_eq!(words[0], u64::MAX << 1, "the first word");
    check!(
        words[1..].iter().all(|word| *word == u64::MAX),
        "{words:x?}"
    );
    set(guest, 0, &memory, HUGE)?;
    timed.check_mapped(PLACE, HUGE, PAGE, 1)
}

/// What an emulated instruction writes is in the log too.
pub(crate) fn dirty_log_of_emulation(device: &Device) -> Outcome {
    let guest = Guest::with(device, move_into())?;
    let memory = Mapping::anonymous(4 * PAGE)?;
    set(&guest, kb::KVM_MEM_LOG_DIRTY_PAGES, &memory, 4 * PAGE)?;
    guest.prepare(PLACE + 2 * 4096, None)?;
    beside(&guest, Vec::new(), || {
        wait_for_change(&memory, 2 * 4096)?;
        let mut word = [u64::MAX];
        fetch(&guest, 1, &mut word)?;
        check_eq!(word[0], 1 << 2, "the log");
        wait_for_change(&memory, 2 * 4096)?;
        fetch(&guest, 1, &mut word)?;
        check_eq!(word[0], 1 << 2, "the log, later");
        Ok(())
    })
}

/// A log that is taken under a guest that writes all the time: after each time the next write is in it.
pub(crate) fn dirty_log_of_a_running_guest(device: &Device) -> Outcome {
    let guest = Guest::with(device, crate::running::count_into())?;
    let memory = Mapping::anonymous(2 * PAGE)?;
    set(&guest, kb::KVM_MEM_LOG_DIRTY_PAGES, &memory, 2 * PAGE)?;
    guest.prepare(PLACE + 4096, None)?;
    beside(&guest, Vec::new(), || {
        let mut word = [u64::MAX];
        for round in 0..50 {
            wait_for_change(&memory, 4096)?;
            fetch(&guest, 1, &mut word)?;
            check_eq!(word[0], 0b10, "round {round}");
        }
        Ok(())
    })
}

/// Notes that userspace takes stay until then; those that it does not name stay for good.
pub(crate) fn clear_dirty_log(device: &Device) -> Outcome {
    let guest = Guest::new(device)?;
    let memory = Mapping::anonymous(64 * PAGE)?;
    set_options(&guest, MANUAL)?;
    set(&guest, kb::KVM_MEM_LOG_DIRTY_PAGES, &memory, 64 * PAGE)?;
    let get = || -> Result<u64, Errno> {
        let mut word = [u64::MAX];
        fetch(&guest, 1, &mut word)?;
        Ok(word[0])
    };
    check_eq!(get()?, 0, "the log of a new slot");
    for page in [1, 2, 3, 63] {
        guest.write(PLACE + page * 4096, page)?;
    }
    let all = (1 << 63) | 0b1110;
    check_eq!(get()?, all, "four pages");
    check_eq!(get()?, all, "once more");
    // Page 2 stays; page 5 was not noted.
    clear(&guest, 1, 0, 64, &[(1 << 63) | 0b10_1010])?;
    check_eq!(get()?, 0b100, "what was not cleared");
    guest.write(PLACE + 2 * 4096, 7)?;
    guest.write(PLACE + 3 * 4096, 8)?;
    guest.write(PLACE + 5 * 4096, 9)?;
    check_eq!(get()?, 0b10_1100, "what was written after");
    clear(&guest, 1, 0, 64, &[0])?;
    check_eq!(get()?, 0b10_1100, "after clearing nothing");
    clear(&guest, 1, 0, 64, &[u64::MAX])?;
    check_eq!(get()?, 0, "after clearing all");
    guest.write(PLACE + 2 * 4096, 1)?;
    check_eq!(get()?, 0b100, "page 2 again");
    // Without the option the log is taken whole, as ever; clearing is possible all the same.
    set_options(&guest, 0)?;
    check_eq!(get()?, 0b100, "the log is taken");
    check_eq!(get()?, 0, "and empty");
    guest.write(PLACE + 3 * 4096, 1)?;
    guest.write(PLACE + 4 * 4096, 1)?;
    clear(&guest, 1, 0, 64, &[0b1000])?;
    guest.write(PLACE + 2 * 4096, 1)?;
    check_eq!(get()?, 0b1_0100, "cleared before it is taken");
    Ok(())
}

/// The answers to wrong questions; the log stays as it is.
pub(crate) fn clear_dirty_log_errors(device: &Device) -> Outcome {
    const PAGES: usize = 130;
    let guest = Guest::new(device)?;
    let memory = Mapping::anonymous(PAGES * PAGE)?;
    let words = [u64::MAX; 3];
    set_options(&guest, MANUAL)?;
    expect_errno(clear(&guest, 1, 0, 64, &words), libc::ENOENT, "no slot")?;
    set(&guest, 0, &memory, PAGES * PAGE)?;
    expect_errno(
        clear(&guest, 1, 0, 64, &words),
        libc::ENOENT,
        "a slot without a log",
    )?;
    set(&guest, kb::KVM_MEM_LOG_DIRTY_PAGES, &memory, PAGES * PAGE)?;
    for page in [0, 64, 129] {
        guest.write(PLACE + page * 4096, 1)?;
    }
    for (slot, first, count, what) in [
        (0xffff, 0, 64, "no such number"),
        (0x5_0001, 0, 64, "no such space"),
        (1, 1, 64, "not from a word's beginning"),
        (1, 0, 65, "not to a word's end"),
        (1, 64, 67, "behind the end"),
        (1, 64, 128, "words behind the end"),
        (1, 192, 0, "begins behind the end"),
        (1, u64::MAX - 63, 64, "round the end of the numbers"),
        (1, 0, u32::MAX, "more than there can be"),
    ] {
        expect_errno(
            clear(&guest, slot, first, count, &words),
            libc::EINVAL,
            what,
        )?;
    }
    let nowhere = std::ptr::without_provenance(8);
    expect_errno(
        clear_from(&guest, 1, 0, PAGES as u32, nowhere),
        libc::EFAULT,
        "no bitmap",
    )?;
    // A bitmap whose last word is not there.
    let bitmap = Mapping::anonymous(2 * PAGE)?;
    bitmap.write_u64(4096 - 16, u64::MAX);
    bitmap.write_u64(4096 - 8, u64::MAX);
    bitmap.protect(4096, PAGE, libc::PROT_NONE)?;
    let cut = bitmap.address().wrapping_add(PAGE - 16);
    expect_errno(
        clear_from(&guest, 1, 0, PAGES as u32, cut.cast_const().cast()),
        libc::EFAULT,
        "half a bitmap",
    )?;
    expect_errno(
        ioctl(&guest.machine.vm, uapi::CLEAR_DIRTY_LOG, 8),
        libc::EFAULT,
        "no request",
    )?;
    let mut log = [0; 3];
    fetch(&guest, 1, &mut log)?;
    check_eq!(log, [1, 1, 0b10], "the log after all that");
    clear(&guest, 1, 64, 0, &words)?;
    clear(&guest, 1, 0, PAGES as u32, &words)?;
    fetch(&guest, 1, &mut log)?;
    check_eq!(log, [0; 3], "cleared");
    Ok(())
}

/// Bit 0 stands for the first page of the part; more than the words that are seen to at once.
pub(crate) fn clear_dirty_log_of_part(device: &Device) -> Outcome {
    const PAGES: usize = 64 * 70 + 3;
    let guest = Guest::with(device, crate::guests::touch_all())?;
    let memory = Mapping::anonymous(PAGES * PAGE)?;
    set_options(&guest, MANUAL)?;
    set(&guest, kb::KVM_MEM_LOG_DIRTY_PAGES, &memory, PAGES * PAGE)?;
    let mut start = guest.cpu.regs()?;
    (start.rsi, start.rdi) = (PLACE, PLACE + (PAGES * PAGE) as u64);
    let touch = || -> Outcome {
        guest.cpu.set_regs(&start)?;
        guest.cpu.run_until_done()?;
        Ok(())
    };
    touch()?;
    let mut full = [u64::MAX; 71];
    full[70] = 0b111;
    let mut words = [0; 71];
    fetch(&guest, 1, &mut words)?;
    check!(words == full, "all pages: {words:x?}");
    // What lies behind the slot may be named, and means nothing.
    clear(&guest, 1, 64, PAGES as u32 - 64, &[u64::MAX; 70])?;
    fetch(&guest, 1, &mut words)?;
    check_eq!(words[0], u64::MAX, "the word before the part");
    check!(words[1..].iter().all(|word| *word == 0), "{words:x?}");
    clear(&guest, 1, 0, 64, &[1])?;
    touch()?;
    fetch(&guest, 1, &mut words)?;
    check!(words == full, "all pages again: {words:x?}");
    // One word in the middle.
    clear(&guest, 1, 64 * 68, 64, &[0xff00])?;
    fetch(&guest, 1, &mut words)?;
    full[68] = !0xff00;
    check!(words == full, "without eight pages: {words:x?}");
    Ok(())
}

/// Notes that are cleared under a guest that writes all the time: the next write is in the log.
pub(crate) fn clear_dirty_log_of_a_running_guest(device: &Device) -> Outcome {
    let guest = Guest::with(device, crate::running::count_into())?;
    let memory = Mapping::anonymous(2 * PAGE)?;
    set_options(&guest, MANUAL)?;
    set(&guest, kb::KVM_MEM_LOG_DIRTY_PAGES, &memory, 2 * PAGE)?;
    guest.prepare(PLACE + 4096, None)?;
    beside(&guest, Vec::new(), || {
        let mut word = [u64::MAX];
        for round in 0..50 {
            wait_for_change(&memory, 4096)?;
            fetch(&guest, 1, &mut word)?;
            check_eq!(word[0], 0b10, "round {round}");
            clear(&guest, 1, 0, 2, &word)?;
        }
        Ok(())
    })
}

/// A new log with a note of each page.
pub(crate) fn dirty_log_initially_set(device: &Device) -> Outcome {
    const PAGES: usize = 67;
    let guest = Guest::new(device)?;
    let memory = Mapping::anonymous(PAGES * PAGE)?;
    set_options(&guest, MANUAL | INITIALLY_SET)?;
    set(&guest, 0, &memory, PAGES * PAGE)?;
    guest.write(PLACE + 65 * 4096, 1)?;
    set(&guest, kb::KVM_MEM_LOG_DIRTY_PAGES, &memory, PAGES * PAGE)?;
    let mut words = [0; 2];
    fetch(&guest, 1, &mut words)?;
    check_eq!(words, [u64::MAX, 0b111], "the log of a new slot");
    guest.write(PLACE + 4096, 1)?;
    clear(&guest, 1, 0, PAGES as u32, &[u64::MAX; 2])?;
    fetch(&guest, 1, &mut words)?;
    check_eq!(words, [0, 0], "cleared");
    for page in [1, 2, 65] {
        guest.write(PLACE + page * 4096, 2)?;
    }
    fetch(&guest, 1, &mut words)?;
    check_eq!(words, [0b110, 0b10], "written after");
    Ok(())
}

/// What KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 takes.
pub(crate) fn dirty_log_options(device: &Device) -> Outcome {
    let guest = Guest::new(device)?;
    let vm = &guest.machine.vm;
    let offered = ioctl(
        vm,
        uapi::CHECK_EXTENSION,
        kb::KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2.into(),
    )?;
    check_eq!(offered as u64, MANUAL | INITIALLY_SET, "what is offered");
    for options in [INITIALLY_SET, 4, MANUAL | 4, u64::MAX] {
        expect_errno(
            set_options(&guest, options),
            libc::EINVAL,
            &format!("options {options:#x}"),
        )?;
    }
    for options in [MANUAL, MANUAL | INITIALLY_SET, 0] {
        set_options(&guest, options)?;
    }
    Ok(())
}
