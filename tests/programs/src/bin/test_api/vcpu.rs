// SPDX-License-Identifier: GPL-2.0
//! The vCPU descriptor.

use crate::system::BAD_POINTER;
use crate::vm::new_vm;
use kvm_bindings as kb;
use rvisor_tests::mapping::Mapping;
use rvisor_tests::raw::{expect_errno, ioctl, ioctl_with, ioctl_words, owned};
use rvisor_tests::{check, check_eq, uapi, Config, Context, Device, Fail, Machine, Outcome};
use std::os::fd::{AsRawFd, OwnedFd};

/// A VM with one vCPU.
fn new_vcpu(device: &Device, irqchip: bool) -> Result<(OwnedFd, OwnedFd), Fail> {
    let vm = new_vm(device)?;
    if irqchip {
        ioctl(&vm, uapi::CREATE_IRQCHIP, 0).during("KVM_CREATE_IRQCHIP")?;
    }
    let vcpu = owned(ioctl(&vm, uapi::CREATE_VCPU, 0)).during("KVM_CREATE_VCPU")?;
    Ok((vm, vcpu))
}

pub(crate) fn unknown_ioctls(device: &Device) -> Outcome {
    let (_vm, vcpu) = new_vcpu(device, false)?;
    for request in [
        uapi::io(0xff),
        uapi::CREATE_VM,
        uapi::CREATE_VCPU,
        uapi::CREATE_IRQCHIP,
        0x5401,
    ] {
        expect_errno(
            ioctl(&vcpu, request, 0),
            libc::EINVAL,
            &format!("{request:#x}"),
        )?;
    }
    Ok(())
}

pub(crate) fn run_argument(device: &Device) -> Outcome {
    let (_vm, vcpu) = new_vcpu(device, false)?;
    for argument in [1, 2, u64::MAX] {
        expect_errno(
            ioctl(&vcpu, uapi::RUN, argument),
            libc::EINVAL,
            &format!("KVM_RUN with {argument:#x}"),
        )?;
    }
    Ok(())
}

pub(crate) fn mapping(device: &Device) -> Outcome {
    let system = device.open()?;
    let size = ioctl(&system, uapi::GET_VCPU_MMAP_SIZE, 0)? as usize;
    let (_vm, vcpu) = new_vcpu(device, false)?;
    let first = Mapping::shared(vcpu.as_raw_fd(), size).during("all of it")?;
    let second = Mapping::shared(vcpu.as_raw_fd(), 4096).during("one page")?;
    // Byte 1 is immediate_exit; both mappings show the same page.
    first.write(1, &[1]);
    check_eq!(second.read(1, 1), vec![1], "the second mapping's byte");
    // The page behind the last has nothing: touching it must raise SIGBUS, in a child.
    let beyond = Mapping::shared(vcpu.as_raw_fd(), size + 4096);
    if let Ok(beyond) = beyond {
        // SAFETY: The child touches one byte and ends.
        let pid = unsafe { libc::fork() };
        if pid == 0 {
            beyond.read(size as u64, 1);
            // SAFETY: Ends the child at once.
            unsafe { libc::_exit(0) };
        }
        let mut status = 0;
        // SAFETY: Waits for the child that was made above.
        unsafe { libc::waitpid(pid, &raw mut status, 0) };
        check!(
            libc::WIFSIGNALED(status) && libc::WTERMSIG(status) == libc::SIGBUS,
            "the page behind the mapping: status {status:#x}"
        );
    }
    Ok(())
}

/// Words of a kvm_msrs with these entries.
fn msrs(entries: &[(u32, u64)]) -> Vec<u32> {
    let mut words = vec![entries.len() as u32, 0];
    for (index, data) in entries {
        words.extend([*index, 0, *data as u32, (data >> 32) as u32]);
    }
    words
}

pub(crate) fn msr_lists(device: &Device) -> Outcome {
    const KERNEL_GS_BASE: u32 = 0xc000_0102;
    const NOBODYS: u32 = 0x4b4b_0000;
    let (_vm, vcpu) = new_vcpu(device, false)?;
    let mut words = msrs(&[(KERNEL_GS_BASE, 0x1122_3344_5566), (0x174, 0x10)]);
    check_eq!(
        ioctl_words(&vcpu, uapi::SET_MSRS, &mut words)?,
        2,
        "KVM_SET_MSRS of two"
    );
    let mut words = msrs(&[(0x174, 0), (NOBODYS, 7), (KERNEL_GS_BASE, 0)]);
    check_eq!(
        ioctl_words(&vcpu, uapi::GET_MSRS, &mut words)?,
        1,
        "KVM_GET_MSRS stops at the unknown one"
    );
    check_eq!(words[4], 0x10, "what was read before it");
    check_eq!(words[12], 0, "what stands behind it is untouched");
    let mut words = msrs(&[(NOBODYS, 7)]);
    check_eq!(
        ioctl_words(&vcpu, uapi::SET_MSRS, &mut words)?,
        0,
        "KVM_SET_MSRS of an unknown one"
    );
    // A non-canonical address is refused (SDM volume 4, table 2-2).
    let mut words = msrs(&[(KERNEL_GS_BASE, 0x8000_0000_0000_0000)]);
    check_eq!(
        ioctl_words(&vcpu, uapi::SET_MSRS, &mut words)?,
        0,
        "KVM_SET_MSRS of a bad value"
    );
    check_eq!(
        ioctl_words(&vcpu, uapi::GET_MSRS, &mut msrs(&[]))?,
        0,
        "an empty list"
    );
    let mut many = msrs(&[(0x174, 0x10); 255]);
    check_eq!(
        ioctl_words(&vcpu, uapi::SET_MSRS, &mut many)?,
        255,
        "255 entries"
    );
    for (request, name) in [(uapi::SET_MSRS, "SET"), (uapi::GET_MSRS, "GET")] {
        expect_errno(
            ioctl_words(&vcpu, request, &mut msrs(&[(0x174, 0x10); 256])),
            libc::E2BIG,
            &format!("KVM_{name}_MSRS of 256"),
        )?;
        expect_errno(
            ioctl(&vcpu, request, BAD_POINTER),
            libc::EFAULT,
            &format!("KVM_{name}_MSRS with a bad pointer"),
        )?;
    }
    Ok(())
}

/// A list that can't be read to its end changes nothing.
pub(crate) fn msr_list_out_of_memory(device: &Device) -> Outcome {
    let (_vm, vcpu) = new_vcpu(device, false)?;
    ioctl_words(&vcpu, uapi::SET_MSRS, &mut msrs(&[(0x174, 0x10)]))?;
    let pages = Mapping::anonymous(2 * 4096).during("two pages")?;
    // The header and the first entry end with the first page.
    let at = 4096 - 24;
    let bytes: Vec<u8> = msrs(&[(0x174, 0x77), (0x175, 0x1000)])
        .into_iter()
        .flat_map(u32::to_le_bytes)
        .collect();
    pages.write(at, &bytes);
    // SAFETY: The second page is the mapping's own, which is not looked at again.
    let result = unsafe { libc::mprotect(pages.address().add(4096).cast(), 4096, libc::PROT_NONE) };
    check_eq!(result, 0, "mprotect");
    // SAFETY: The words up to the end of the first page, in which nothing else is.
    let words = unsafe {
        let first = pages.address().add(at as usize).cast::<u32>();
        std::slice::from_raw_parts_mut(first, 6)
    };
    for (request, name) in [(uapi::SET_MSRS, "SET"), (uapi::GET_MSRS, "GET")] {
        expect_errno(
            ioctl_words(&vcpu, request, words),
            libc::EFAULT,
            &format!("KVM_{name}_MSRS of half a list"),
        )?;
    }
    let mut words = msrs(&[(0x174, 0)]);
    ioctl_words(&vcpu, uapi::GET_MSRS, &mut words)?;
    check_eq!(words[4], 0x10, "what the first entry would have set");
    Ok(())
}

/// KVM_SET_SREGS for PAE paging takes root entries that are not there, or not to be read.
pub(crate) fn sregs_without_root_entries(device: &Device) -> Outcome {
    const SLOT: u64 = 0x4000_0000;
    let machine = Machine::new(device)?;
    let cpu = machine.vcpu(0)?;
    let gone = Mapping::anonymous(4096)?;
    machine.set_slot(1, 0, SLOT, &gone, 0, 4096)?;
    // SAFETY: The mapping is only the guest's, and is not looked at again.
    let result = unsafe { libc::mprotect(gone.address().cast(), 4096, libc::PROT_NONE) };
    check_eq!(result, 0, "mprotect");
    for cr3 in [SLOT, SLOT + 0x1000] {
        let mut sregs = cpu.sregs()?;
        (sregs.cr0, sregs.cr3, sregs.cr4) = (0x8000_0011, cr3, 0x20);
        cpu.set_sregs(&sregs)?;
        check_eq!(cpu.sregs()?, sregs, "the registers that were set");
    }
    Ok(())
}

pub(crate) fn cpuid_rules(device: &Device) -> Outcome {
    let machine = Machine::new(device)?;
    let cpu = machine.vcpu(0)?;
    let set = machine.kvm.get_supported_cpuid(kb::KVM_MAX_CPUID_ENTRIES)?;
    let count = set.as_slice().len() as u32;
    let mut words = vec![0_u32; 2 + 10 * 256];
    words[0] = 256;
    ioctl_words(&cpu.fd, uapi::GET_CPUID2, &mut words)?;
    check_eq!(words[0], count, "nent after KVM_GET_CPUID2");
    words[0] = 1;
    expect_errno(
        ioctl_words(&cpu.fd, uapi::GET_CPUID2, &mut words),
        libc::E2BIG,
        "KVM_GET_CPUID2 with one place",
    )?;
    words[0] = 257;
    words.resize(2 + 10 * 257, 0);
    expect_errno(
        ioctl_words(&cpu.fd, uapi::SET_CPUID2, &mut words),
        libc::E2BIG,
        "KVM_SET_CPUID2 of 257",
    )?;
    expect_errno(
        ioctl(&cpu.fd, uapi::SET_CPUID2, BAD_POINTER),
        libc::EFAULT,
        "KVM_SET_CPUID2 with a bad pointer",
    )?;
    // A linear address width that no CPU has.
    let mut odd = set;
    for entry in odd.as_mut_slice() {
        if entry.function == 0x8000_0008 {
            entry.eax = entry.eax & !0xff00 | (40 << 8);
        }
    }
    match cpu.fd.set_cpuid2(&odd) {
        Err(error) => check_eq!(error.errno(), libc::EINVAL, "a width of 40 bits"),
        Ok(()) => return Err(Fail::new("a linear address width of 40 bits is taken")),
    }
    Ok(())
}

pub(crate) fn bad_pointers(device: &Device) -> Outcome {
    let (_vm, vcpu) = new_vcpu(device, true)?;
    for (request, name) in [
        (uapi::GET_REGS, "GET_REGS"),
        (uapi::SET_REGS, "SET_REGS"),
        (uapi::GET_SREGS, "GET_SREGS"),
        (uapi::SET_SREGS, "SET_SREGS"),
        (uapi::GET_FPU, "GET_FPU"),
        (uapi::SET_FPU, "SET_FPU"),
        (uapi::GET_LAPIC, "GET_LAPIC"),
        (uapi::SET_LAPIC, "SET_LAPIC"),
        (uapi::GET_MP_STATE, "GET_MP_STATE"),
        (uapi::SET_MP_STATE, "SET_MP_STATE"),
        (uapi::GET_VCPU_EVENTS, "GET_VCPU_EVENTS"),
        (uapi::SET_VCPU_EVENTS, "SET_VCPU_EVENTS"),
        (uapi::GET_DEBUGREGS, "GET_DEBUGREGS"),
        (uapi::SET_DEBUGREGS, "SET_DEBUGREGS"),
        (uapi::GET_XCRS, "GET_XCRS"),
        (uapi::SET_XCRS, "SET_XCRS"),
        (uapi::INTERRUPT, "INTERRUPT"),
    ] {
        expect_errno(
            ioctl(&vcpu, request, BAD_POINTER),
            libc::EFAULT,
            &format!("KVM_{name}"),
        )?;
    }
    Ok(())
}

pub(crate) fn signal_mask_length(device: &Device) -> Outcome {
    let (_vm, vcpu) = new_vcpu(device, false)?;
    // A length of 8 and the mask, without any signal.
    ioctl_words(&vcpu, uapi::SET_SIGNAL_MASK, &mut [8, 0, 0])?;
    for length in [0, 4, 16] {
        expect_errno(
            ioctl_words(&vcpu, uapi::SET_SIGNAL_MASK, &mut [length, 0, 0, 0, 0]),
            libc::EINVAL,
            &format!("a mask of {length} bytes"),
        )?;
    }
    ioctl(&vcpu, uapi::SET_SIGNAL_MASK, 0).during("no mask")?;
    expect_errno(
        ioctl(&vcpu, uapi::SET_SIGNAL_MASK, BAD_POINTER),
        libc::EFAULT,
        "a bad pointer",
    )
}

pub(crate) fn interrupt_errors(device: &Device) -> Outcome {
    let (_vm, vcpu) = new_vcpu(device, false)?;
    expect_errno(
        ioctl_with(&vcpu, uapi::INTERRUPT, &mut 256_u32),
        libc::EINVAL,
        "vector 256",
    )?;
    ioctl_with(&vcpu, uapi::INTERRUPT, &mut 0x40_u32)?;
    let (_vm, vcpu) = new_vcpu(device, true)?;
    expect_errno(
        ioctl_with(&vcpu, uapi::INTERRUPT, &mut 0x40_u32),
        libc::ENXIO,
        "KVM_INTERRUPT with a PIC in the kernel",
    )
}

pub(crate) fn lapic_errors(device: &Device) -> Outcome {
    let (_vm, vcpu) = new_vcpu(device, false)?;
    let mut page = [0_u8; 1024];
    for (request, name) in [(uapi::GET_LAPIC, "GET"), (uapi::SET_LAPIC, "SET")] {
        expect_errno(
            ioctl_with(&vcpu, request, &mut page),
            libc::EINVAL,
            &format!("KVM_{name}_LAPIC without irqchip"),
        )?;
    }
    let (_vm, vcpu) = new_vcpu(device, true)?;
    ioctl_with(&vcpu, uapi::GET_LAPIC, &mut page)?;
    // The version register at 0x30: an integrated APIC (SDM volume 3, section 12.4.8).
    check_eq!(page[0x30] & 0xf0, 0x10, "the local APIC's version");
    Ok(())
}

pub(crate) fn sregs_refused(device: &Device) -> Outcome {
    let machine = Machine::with(device, Config::default())?;
    let cpu = machine.vcpu(0)?;
    let good = cpu.sregs()?;
    let mut wrong = Vec::new();
    let mut sregs = good;
    sregs.cr0 = 0x8000_0010;
    wrong.push(("paging without protection", sregs));
    sregs = good;
    sregs.cr4 = 1 << 40;
    wrong.push(("a reserved bit of CR4", sregs));
    sregs = good;
    sregs.efer = 1 << 20;
    wrong.push(("a reserved bit of EFER", sregs));
    sregs = good;
    (sregs.cr0, sregs.cr4, sregs.efer) = (0x8000_0011, 0, 0x500);
    wrong.push(("long mode without PAE", sregs));
    for (what, sregs) in wrong {
        match cpu.fd.set_sregs(&sregs) {
            Err(error) => check_eq!(error.errno(), libc::EINVAL, "{what}"),
            Ok(()) => return Err(Fail::new(format!("{what} is taken"))),
        }
    }
    cpu.set_sregs(&good).during("what was there before")
}

pub(crate) fn mp_state(device: &Device) -> Outcome {
    let vm = new_vm(device)?;
    ioctl(&vm, uapi::CREATE_IRQCHIP, 0)?;
    let first = owned(ioctl(&vm, uapi::CREATE_VCPU, 0))?;
    let second = owned(ioctl(&vm, uapi::CREATE_VCPU, 1))?;
    let state = |vcpu: &OwnedFd| -> Result<u32, Fail> {
        let mut state = u32::MAX;
        ioctl_with(vcpu, uapi::GET_MP_STATE, &mut state)?;
        Ok(state)
    };
    check_eq!(
        state(&first)?,
        kb::KVM_MP_STATE_RUNNABLE,
        "the boot processor"
    );
    check_eq!(
        state(&second)?,
        kb::KVM_MP_STATE_UNINITIALIZED,
        "the second processor"
    );
    for wanted in [kb::KVM_MP_STATE_HALTED, kb::KVM_MP_STATE_RUNNABLE] {
        ioctl_with(&second, uapi::SET_MP_STATE, &mut { wanted })?;
        check_eq!(state(&second)?, wanted, "the state that was set");
    }
    expect_errno(
        ioctl_with(&second, uapi::SET_MP_STATE, &mut 77_u32),
        libc::EINVAL,
        "a state that there is not",
    )
}

/// The banks and flags of IA32_MCG_CAP that can be asked for.
pub(crate) fn machine_check_setup(device: &Device) -> Outcome {
    let system = device.open()?;
    let banks = ioctl(&system, uapi::CHECK_EXTENSION, kb::KVM_CAP_MCE.into())? as u64;
    if banks == 0 {
        return Err(Fail::skip("MCE is not offered"));
    }
    let mut supported = 0_u64;
    ioctl_with(&system, uapi::X86_GET_MCE_CAP_SUPPORTED, &mut supported)?;
    check!(banks >= 10, "{banks} banks; programs want 10");
    check!(
        supported & (1 << 8) != 0,
        "MCG_CTL_P is not offered: {supported:#x}"
    );
    let machine = Machine::with(device, Config::default())?;
    let cpu = machine.vcpu(0)?;
    let set_up =
        |mut capabilities: u64| ioctl_with(&cpu.fd, uapi::X86_SETUP_MCE, &mut capabilities);
    for wrong in [0, banks + 1, 0xff, 10 | (1 << 40)] {
        expect_errno(set_up(wrong), libc::EINVAL, &format!("{wrong:#x}"))?;
    }
    set_up(10 | supported)?;
    check_eq!(cpu.msr(0x179)?, 10 | supported, "IA32_MCG_CAP");
    check_eq!(cpu.msr(0x17b)?, u64::MAX, "IA32_MCG_CTL");
    check_eq!(cpu.msr(0x400)?, u64::MAX, "IA32_MC0_CTL");
    check_eq!(cpu.msr(0x424)?, u64::MAX, "IA32_MC9_CTL");
    check!(cpu.msr(0x428).is_err(), "IA32_MC10_CTL is there");
    expect_errno(
        ioctl(&cpu.fd, uapi::X86_SETUP_MCE, BAD_POINTER),
        libc::EFAULT,
        "a bad pointer",
    )
}

/// Errors that userspace reports fill a bank.
pub(crate) fn machine_check_errors(device: &Device) -> Outcome {
    const VALID: u64 = 1 << 63;
    let machine = Machine::with(device, Config::default())?;
    if machine.extension(kb::KVM_CAP_MCE) == 0 {
        return Err(Fail::skip("MCE is not offered"));
    }
    let cpu = machine.vcpu(0)?;
    let mut capabilities = 10 | (1_u64 << 8);
    ioctl_with(&cpu.fd, uapi::X86_SETUP_MCE, &mut capabilities)?;
    // Status, address, miscellaneous, IA32_MCG_STATUS, bank.
    let report = |status: u64, bank: u64| {
        let mut mce = [status, 0x1234, 0x56, 0, bank, 0, 0, 0];
        ioctl_with(&cpu.fd, uapi::X86_SET_MCE, &mut mce)
    };
    expect_errno(report(VALID, 10), libc::EINVAL, "a bank that is not there")?;
    expect_errno(report(1, 3), libc::EINVAL, "a status that is not valid")?;
    report(VALID | 0x9f, 3)?;
    check_eq!(cpu.msr(0x40d)?, VALID | 0x9f, "IA32_MC3_STATUS");
    check_eq!(cpu.msr(0x40e)?, 0x1234, "IA32_MC3_ADDR");
    check_eq!(cpu.msr(0x40f)?, 0x56, "IA32_MC3_MISC");
    report(VALID | 0x9e, 3)?;
    check_eq!(cpu.msr(0x40d)?, (3 << 62) | 0x9e, "the second overflows");
    Ok(())
}

/// KVM_GET_XSAVE2 writes as much as its capability says, and begins as KVM_GET_XSAVE does.
pub(crate) fn extended_state_size(device: &Device) -> Outcome {
    let (vm, vcpu) = new_vcpu(device, false)?;
    let size = ioctl(&vm, uapi::CHECK_EXTENSION, kb::KVM_CAP_XSAVE2.into())? as usize;
    if size == 0 {
        return Err(Fail::skip("XSAVE2 is not offered"));
    }
    check!((4096..16384).contains(&size), "the area has {size} bytes");
    let mut old = [0xa5_u8; 4096];
    let mut new = [0xa5_u8; 20480];
    ioctl_with(&vcpu, uapi::GET_XSAVE, &mut old)?;
    ioctl_with(&vcpu, uapi::GET_XSAVE2, &mut new)?;
    check!(old[..] == new[..4096], "the two areas differ");
    check!(
        new[size..].iter().all(|byte| *byte == 0xa5),
        "it wrote past {size} bytes"
    );
    ioctl_with(&vcpu, uapi::SET_XSAVE, &mut new)?;
    expect_errno(
        ioctl(&vcpu, uapi::GET_XSAVE2, BAD_POINTER),
        libc::EFAULT,
        "a bad pointer",
    )
}

/// What old 32-bit guests' task priority wants is off, and can be switched off.
pub(crate) fn task_priority_helpers(device: &Device) -> Outcome {
    let mut none = 0_u64;
    let (_vm, bare) = new_vcpu(device, false)?;
    expect_errno(
        ioctl_with(&bare, uapi::SET_VAPIC_ADDR, &mut none),
        libc::EINVAL,
        "KVM_SET_VAPIC_ADDR without a local APIC",
    )?;
    let (_vm, vcpu) = new_vcpu(device, true)?;
    ioctl_with(&vcpu, uapi::SET_VAPIC_ADDR, &mut none)?;
    let mut control = kb::kvm_tpr_access_ctl::default();
    ioctl_with(&vcpu, uapi::TPR_ACCESS_REPORTING, &mut control)?;
    control.flags = 1;
    expect_errno(
        ioctl_with(&vcpu, uapi::TPR_ACCESS_REPORTING, &mut control),
        libc::EINVAL,
        "KVM_TPR_ACCESS_REPORTING with flags",
    )
}
