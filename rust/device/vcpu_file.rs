// SPDX-License-Identifier: GPL-2.0

//! The ioctls of a virtual CPU.

use super::{
    chardev::{for_each_msr, write_cpuid},
    stats_file, trace_file,
    user::{self, element, LIST_HEADER},
    vm_file::set_tsc_khz,
};
use crate::{
    bindings as uapi,
    host::{anon_file::AnonFile, signal::SignalMask},
    vm::vcpu::{State, Vcpu},
    RvisorModule,
};
use kernel::{
    ioctl::_IOC_TYPE,
    mm::virt::VmaNew,
    prelude::*,
    sync::ArcBorrow,
    uaccess::{UserPtr, UserSlice},
};
use rvisor_core::{
    cpu::{
        cpuid::{CpuidEntry, MAX_ENTRIES},
        guest::Origin,
    },
    x86::msr::MsrIndex,
};

/// The size of `struct kvm_xsave`.
pub(super) const XSAVE_SIZE: usize = 4096;

impl AnonFile for Vcpu {
    const NAME: &'static CStr = c"rvisor-vcpu";
    type OwnerModule = RvisorModule;

    fn ioctl(this: ArcBorrow<'_, Self>, command: u32, argument: usize) -> Result<isize> {
        if !this.vm.is_owned_by_current() {
            return Err(EIO);
        }
        if _IOC_TYPE(command) != uapi::KVMIO {
            return match command {
                user::TRACE_OPEN => trace_file::open(this.into(), argument),
                _ => Err(EINVAL),
            };
        }
        vcpu_ioctl(this, command, argument)
    }

    fn mmap(this: ArcBorrow<'_, Self>, vma: &VmaNew) -> Result {
        this.run.map(vma, this.vm.registrations.ring()?)
    }
}

fn vcpu_ioctl(vcpu: ArcBorrow<'_, Vcpu>, command: u32, argument: usize) -> Result<isize> {
    match command {
        user::RUN if argument != 0 => Err(EINVAL),
        user::RUN => vcpu.run(),
        user::GET_MP_STATE => {
            let mp_state = vcpu.mp_state()?;
            user::write(argument, &uapi::kvm_mp_state { mp_state })?;
            Ok(0)
        }
        user::SET_MP_STATE => {
            let state: uapi::kvm_mp_state = user::read(argument)?;
            vcpu.set_mp_state(state.mp_state)?;
            Ok(0)
        }
        user::NMI => {
            vcpu.shared.post_nmi();
            Ok(0)
        }
        user::SET_TSC_KHZ => set_tsc_khz(&vcpu.vm.host, argument),
        user::ENABLE_CAP => {
            let _: uapi::kvm_enable_cap = user::read(argument)?;
            // None can be enabled.
            Err(EINVAL)
        }
        user::GET_TSC_KHZ => Ok(vcpu.vm.host.tsc_khz as isize),
        user::SET_SIGNAL_MASK => set_signal_mask(&vcpu, argument),
        user::SET_CPUID2 => set_cpuid(&vcpu, argument),
        user::GET_STATS_FD => stats_file::of_vcpu(vcpu.into()),
        _ => vcpu.with_state(|state| state_ioctl(state, command, argument)),
    }
}

/// The ioctls that read or write registers.
fn state_ioctl(state: &mut State, command: u32, argument: usize) -> Result<isize> {
    match command {
        user::GET_REGS => user::write(argument, &state.regs()?)?,
        user::SET_REGS => state.set_regs(&user::read(argument)?)?,
        user::GET_SREGS => user::write(argument, &state.sregs()?)?,
        user::SET_SREGS => state.set_sregs(&user::read(argument)?)?,
        user::GET_DEBUGREGS => user::write(argument, &state.debug_registers()?)?,
        user::SET_DEBUGREGS => state.set_debug_registers(&user::read(argument)?)?,
        user::GET_VCPU_EVENTS => user::write(argument, &state.events()?)?,
        user::SET_VCPU_EVENTS => state.set_events(&user::read(argument)?)?,
        user::GET_XCRS => user::write(argument, &state.xcrs()?)?,
        user::SET_XCRS => state.set_xcrs(&user::read(argument)?)?,
        user::GET_LAPIC => {
            let mut lapic = uapi::kvm_lapic_state::default();
            for (to, from) in lapic.regs.iter_mut().zip(state.lapic_page()?) {
                *to = from;
            }
            user::write(argument, &lapic)?;
        }
        user::SET_LAPIC => {
            let lapic: uapi::kvm_lapic_state = user::read(argument)?;
            state.set_lapic_page(&lapic.regs)?;
        }
        user::INTERRUPT => {
            let interrupt: uapi::kvm_interrupt = user::read(argument)?;
            state.queue_interrupt(interrupt.irq)?;
        }
        user::GET_MSRS => return get_msrs(state, argument),
        user::SET_MSRS => return set_msrs(state, argument),
        user::GET_FPU => user::write(argument, &get_fpu(state)?)?,
        user::SET_FPU => set_fpu(state, &user::read(argument)?)?,
        user::GET_XSAVE if state.fpu.uabi_size() > XSAVE_SIZE => return Err(EINVAL),
        user::GET_XSAVE | user::GET_XSAVE2 => {
            let buffer = export_xsave(state)?;
            UserSlice::new(UserPtr::from_addr(argument), buffer.len())
                .writer()
                .write_slice(&buffer)?;
        }
        user::SET_XSAVE => {
            let mut buffer = KVec::zeroed(xsave_size(state), GFP_KERNEL)?;
            UserSlice::new(UserPtr::from_addr(argument), buffer.len())
                .reader()
                .read_slice(&mut buffer)?;
            import_xsave(state, &buffer)?;
        }
        user::X86_SETUP_MCE => {
            let capabilities: u64 = user::read(argument)?;
            state
                .core
                .msrs
                .set_up_machine_check(capabilities)
                .map_err(|_| EINVAL)?;
        }
        user::X86_SET_MCE => state.report_machine_check(&user::read(argument)?)?,
        user::SET_VAPIC_ADDR if state.core.lapic.is_none() => return Err(EINVAL),
        user::SET_VAPIC_ADDR => {
            let vapic: uapi::kvm_vapic_addr = user::read(argument)?;
            // Without KVM_CAP_VAPIC there is only the way to have none.
            if vapic.vapic_addr != 0 {
                return Err(EINVAL);
            }
        }
        user::TPR_ACCESS_REPORTING => {
            let control: uapi::kvm_tpr_access_ctl = user::read(argument)?;
            // The same: it can be off.
            if control.flags != 0 || control.enabled != 0 {
                return Err(EINVAL);
            }
            user::write(argument, &control)?;
        }
        user::GET_CPUID2 => {
            let room: u32 = user::read(argument)?;
            let table = state.cpuid_table()?;
            if (room as usize) < table.len() {
                return Err(E2BIG);
            }
            write_cpuid(argument, &table)?;
        }
        _ => return Err(EINVAL),
    }
    Ok(0)
}

/// The signals that are blocked during RUN; no argument means those of the thread.
fn set_signal_mask(vcpu: &Vcpu, argument: usize) -> Result<isize> {
    let mask = if argument == 0 {
        None
    } else {
        let length: u32 = user::read(argument)?;
        if length as usize != size_of::<u64>() {
            return Err(EINVAL);
        }
        // The mask follows the length at once.
        Some(user::read(
            argument.checked_add(size_of::<u32>()).ok_or(EFAULT)?,
        )?)
    };
    vcpu.with_state(|state| {
        state.signal_mask = mask.map(SignalMask::new);
        Ok(0)
    })
}

fn set_cpuid(vcpu: &Vcpu, argument: usize) -> Result<isize> {
    let count: u32 = user::read(argument)?;
    if count as usize > MAX_ENTRIES {
        return Err(E2BIG);
    }
    let mut table = KVec::with_capacity(count as usize, GFP_KERNEL_ACCOUNT)?;
    for place in 0..count as usize {
        let address = element::<uapi::kvm_cpuid_entry2>(argument, LIST_HEADER, place)?;
        let entry: uapi::kvm_cpuid_entry2 = user::read(address)?;
        table.push_within_capacity(CpuidEntry {
            function: entry.function,
            index: entry.index,
            flags: entry.flags,
            eax: entry.eax,
            ebx: entry.ebx,
            ecx: entry.ecx,
            edx: entry.edx,
        })?;
    }
    vcpu.with_state(|state| state.set_cpuid(table))?;
    Ok(0)
}

fn get_msrs(state: &mut State, argument: usize) -> Result<isize> {
    for_each_msr(argument, true, |entry| {
        let index = MsrIndex(entry.index);
        state.with_vmcs(
            |core, vmcs| match core.read_msr(vmcs, index, Origin::Host) {
                Ok(value) => {
                    entry.data = value;
                    true
                }
                Err(_) => false,
            },
        )
    })
}

fn set_msrs(state: &mut State, argument: usize) -> Result<isize> {
    for_each_msr(argument, false, |entry| {
        let (index, value) = (MsrIndex(entry.index), entry.data);
        state.with_vmcs(|core, vmcs| core.write_msr(vmcs, index, value, Origin::Host).is_ok())
    })
}

/// The size of the XSAVE area, KVM_CAP_XSAVE2: 4 KiB, or more where the CPU's is larger.
fn xsave_size(state: &State) -> usize {
    state.fpu.uabi_size().max(XSAVE_SIZE)
}

/// The XSAVE area in standard format.
fn export_xsave(state: &mut State) -> Result<KVec<u8>> {
    let mut buffer = KVec::zeroed(xsave_size(state), GFP_KERNEL)?;
    let features = state.core.vm.host.xcr0;
    state.fpu.export(&mut buffer, features, 0);
    Ok(buffer)
}

fn import_xsave(state: &mut State, buffer: &[u8]) -> Result {
    let features = state.core.vm.host.xcr0;
    let mut pkru = 0;
    state.fpu.import(buffer, features, &mut pkru)
}

/// The places in the FXSAVE area (SDM vol. 1, table 10-2).
mod fxsave {
    pub(super) const FCW: usize = 0;
    pub(super) const FSW: usize = 2;
    pub(super) const FTW: usize = 4;
    pub(super) const FOP: usize = 6;
    pub(super) const RIP: usize = 8;
    pub(super) const RDP: usize = 16;
    pub(super) const MXCSR: usize = 24;
    pub(super) const ST: usize = 32;
    pub(super) const XMM: usize = 160;
    /// XSTATE_BV, in the header behind the area.
    pub(super) const XSTATE_BV: usize = 512;
}

fn get<const N: usize>(buffer: &[u8], place: usize) -> [u8; N] {
    let mut bytes = [0; N];
    if let Some(from) = buffer.get(place..place + N) {
        bytes.copy_from_slice(from);
    }
    bytes
}

fn put(buffer: &mut [u8], place: usize, bytes: &[u8]) {
    if let Some(to) = buffer.get_mut(place..place + bytes.len()) {
        to.copy_from_slice(bytes);
    }
}

fn get_fpu(state: &mut State) -> Result<uapi::kvm_fpu> {
    let area = export_xsave(state)?;
    let mut fpu = uapi::kvm_fpu {
        fcw: u16::from_le_bytes(get(&area, fxsave::FCW)),
        fsw: u16::from_le_bytes(get(&area, fxsave::FSW)),
        ftwx: get::<1>(&area, fxsave::FTW)[0],
        last_opcode: u16::from_le_bytes(get(&area, fxsave::FOP)),
        last_ip: u64::from_le_bytes(get(&area, fxsave::RIP)),
        last_dp: u64::from_le_bytes(get(&area, fxsave::RDP)),
        mxcsr: u32::from_le_bytes(get(&area, fxsave::MXCSR)),
        ..Default::default()
    };
    for (place, register) in fpu.fpr.iter_mut().enumerate() {
        *register = get(&area, fxsave::ST + 16 * place);
    }
    for (place, register) in fpu.xmm.iter_mut().enumerate() {
        *register = get(&area, fxsave::XMM + 16 * place);
    }
    Ok(fpu)
}

fn set_fpu(state: &mut State, fpu: &uapi::kvm_fpu) -> Result {
    let mut area = export_xsave(state)?;
    put(&mut area, fxsave::FCW, &fpu.fcw.to_le_bytes());
    put(&mut area, fxsave::FSW, &fpu.fsw.to_le_bytes());
    put(&mut area, fxsave::FTW, &[fpu.ftwx]);
    put(&mut area, fxsave::FOP, &fpu.last_opcode.to_le_bytes());
    put(&mut area, fxsave::RIP, &fpu.last_ip.to_le_bytes());
    put(&mut area, fxsave::RDP, &fpu.last_dp.to_le_bytes());
    put(&mut area, fxsave::MXCSR, &fpu.mxcsr.to_le_bytes());
    for (place, register) in fpu.fpr.iter().enumerate() {
        put(&mut area, fxsave::ST + 16 * place, register);
    }
    for (place, register) in fpu.xmm.iter().enumerate() {
        put(&mut area, fxsave::XMM + 16 * place, register);
    }
    // The x87 and SSE components are no longer in their initial state.
    let present = u64::from_le_bytes(get(&area, fxsave::XSTATE_BV)) | 3;
    put(&mut area, fxsave::XSTATE_BV, &present.to_le_bytes());
    import_xsave(state, &area)
}
