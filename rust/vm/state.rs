// SPDX-License-Identifier: GPL-2.0

//! A virtual CPU's registers for userspace: KVM_GET/SET_REGS, SREGS, FPU, DEBUGREGS, MP_STATE, XCRS,
//! XSAVE, CPUID2, LAPIC.

use super::{
    shared::Request,
    vcpu::{Core, MpState, State, Vcpu},
};
use crate::{bindings as uapi, vmx::hardware::CurrentVmcs};
use kernel::prelude::*;
use rvisor_core::{
    cpu::{
        cpuid::{CpuidEntry, Index, Runtime},
        guest::{GuestCpu, Origin},
    },
    irqchip::{
        lapic::{Features, REGISTERS_SIZE},
        Clock,
    },
    x86::{
        address::Gva,
        control::{
            check_cr0, check_cr3, check_cr4, check_xcr0, dr6_written, dr7_written, Cr0, Cr3, Cr4,
            Efer, Rflags, Xcr0,
        },
        msr::MsrIndex,
        segment::{AccessRights, Segment},
        vector::Vector,
        vmcs::{Field32, FieldNatural, VmcsSegment},
    },
};

/// The order of the registers in `struct kvm_regs`, as instructions number them.
macro_rules! each_register {
    ($regs:ident, $core:ident, $apply:ident) => {
        $apply!($core.registers[0], $regs.rax);
        $apply!($core.registers[1], $regs.rcx);
        $apply!($core.registers[2], $regs.rdx);
        $apply!($core.registers[3], $regs.rbx);
        $apply!($core.registers[5], $regs.rbp);
        $apply!($core.registers[6], $regs.rsi);
        $apply!($core.registers[7], $regs.rdi);
        $apply!($core.registers[8], $regs.r8);
        $apply!($core.registers[9], $regs.r9);
        $apply!($core.registers[10], $regs.r10);
        $apply!($core.registers[11], $regs.r11);
        $apply!($core.registers[12], $regs.r12);
        $apply!($core.registers[13], $regs.r13);
        $apply!($core.registers[14], $regs.r14);
        $apply!($core.registers[15], $regs.r15);
    };
}

const SEGMENTS: [VmcsSegment; 8] = [
    VmcsSegment::Es,
    VmcsSegment::Cs,
    VmcsSegment::Ss,
    VmcsSegment::Ds,
    VmcsSegment::Fs,
    VmcsSegment::Gs,
    VmcsSegment::Ldtr,
    VmcsSegment::Tr,
];

fn to_kvm_segment(segment: &Segment) -> uapi::kvm_segment {
    let access = segment.access;
    uapi::kvm_segment {
        base: segment.base,
        limit: segment.limit,
        selector: segment.selector,
        type_: access.kind(),
        present: (access.is_present() && !access.is_unusable()).into(),
        dpl: access.privilege(),
        db: access.is_big().into(),
        s: access.is_code_or_data().into(),
        l: access.is_long().into(),
        g: access.is_granular().into(),
        avl: access.available().into(),
        unusable: access.is_unusable().into(),
        padding: 0,
    }
}

fn from_kvm_segment(segment: &uapi::kvm_segment) -> Segment {
    let bit = |value: u8, place: u32| u32::from(value & 1) << place;
    let access = if segment.unusable != 0 || segment.present == 0 {
        AccessRights::UNUSABLE
    } else {
        u32::from(segment.type_ & 0xf)
            | bit(segment.s, 4)
            | u32::from(segment.dpl & 3) << 5
            | bit(segment.present, 7)
            | bit(segment.avl, 12)
            | bit(segment.l, 13)
            | bit(segment.db, 14)
            | bit(segment.g, 15)
    };
    Segment {
        selector: segment.selector,
        base: segment.base,
        limit: segment.limit,
        access: AccessRights(access),
    }
}

impl Vcpu {
    /// Carries out KVM_GET_MP_STATE.
    ///
    /// # Errors
    ///
    /// `EIO` where VMX was switched off under us, `EINTR` where the thread is killed while another has the
    /// virtual CPU.
    pub(crate) fn mp_state(&self) -> Result<u32> {
        self.with_state(|state| {
            // An INIT or SIPI that waits is part of the state.
            state.with_vmcs(Core::accept_init_or_sipi)?;
            Ok(match state.core.mp_state {
                MpState::Runnable => uapi::KVM_MP_STATE_RUNNABLE,
                MpState::Uninitialized => uapi::KVM_MP_STATE_UNINITIALIZED,
                MpState::InitReceived => uapi::KVM_MP_STATE_INIT_RECEIVED,
                MpState::Halted => uapi::KVM_MP_STATE_HALTED,
            })
        })
    }

    /// Carries out KVM_SET_MP_STATE.
    ///
    /// # Errors
    ///
    /// `EINVAL` for a state that this virtual CPU can't be in.
    pub(crate) fn set_mp_state(&self, value: u32) -> Result {
        self.with_state(|state| {
            let has_lapic = state.core.lapic.is_some();
            let sipi_given = value == uapi::KVM_MP_STATE_SIPI_RECEIVED;
            state.core.mp_state = match value {
                uapi::KVM_MP_STATE_RUNNABLE => MpState::Runnable,
                uapi::KVM_MP_STATE_UNINITIALIZED if has_lapic => MpState::Uninitialized,
                // The latter is what older kernels give: it waits for SIPI, and one has come.
                uapi::KVM_MP_STATE_INIT_RECEIVED | uapi::KVM_MP_STATE_SIPI_RECEIVED
                    if has_lapic =>
                {
                    MpState::InitReceived
                }
                uapi::KVM_MP_STATE_HALTED if has_lapic => MpState::Halted,
                _ => return Err(EINVAL),
            };
            if sipi_given {
                state.core.sipi_given = true;
                state.core.shared.request_self(Request::INIT_OR_SIPI);
            }
            Ok(())
        })
    }
}

impl State {
    /// Carries out KVM_GET_REGS.
    pub(crate) fn regs(&mut self) -> Result<uapi::kvm_regs> {
        self.with_vmcs(|core, vmcs| {
            let mut regs = uapi::kvm_regs {
                rsp: vmcs.read(FieldNatural::GUEST_RSP),
                rip: vmcs.read(FieldNatural::GUEST_RIP),
                rflags: vmcs.read(FieldNatural::GUEST_RFLAGS),
                ..Default::default()
            };
            macro_rules! get {
                ($ours:expr, $theirs:expr) => {
                    $theirs = $ours
                };
            }
            each_register!(regs, core, get);
            regs
        })
    }

    /// Carries out KVM_SET_REGS.
    pub(crate) fn set_regs(&mut self, regs: &uapi::kvm_regs) -> Result {
        self.with_vmcs(|core, vmcs| {
            macro_rules! set {
                ($ours:expr, $theirs:expr) => {
                    $ours = $theirs
                };
            }
            each_register!(regs, core, set);
            vmcs.write(FieldNatural::GUEST_RSP, regs.rsp);
            vmcs.write(FieldNatural::GUEST_RIP, regs.rip);
            let flags = (regs.rflags & Rflags::DEFINED) | Rflags::FIXED;
            vmcs.write(FieldNatural::GUEST_RFLAGS, flags);
            core.events.exception = None;
        })
    }

    /// Carries out KVM_GET_SREGS.
    pub(crate) fn sregs(&mut self) -> Result<uapi::kvm_sregs> {
        self.with_vmcs(|core, vmcs| {
            core.settle_exception(vmcs);
            let [es, cs, ss, ds, fs, gs, ldt, tr] =
                SEGMENTS.map(|segment| to_kvm_segment(&vmcs.segment(segment)));
            let mut sregs = uapi::kvm_sregs {
                cs,
                ds,
                es,
                fs,
                gs,
                ss,
                tr,
                ldt,
                gdt: uapi::kvm_dtable {
                    base: vmcs.read(FieldNatural::GUEST_GDTR_BASE),
                    limit: vmcs.read32(Field32::GUEST_GDTR_LIMIT) as u16,
                    padding: [0; 3],
                },
                idt: uapi::kvm_dtable {
                    base: vmcs.read(FieldNatural::GUEST_IDTR_BASE),
                    limit: vmcs.read32(Field32::GUEST_IDTR_LIMIT) as u16,
                    padding: [0; 3],
                },
                cr0: core.read_cr0(vmcs).0,
                cr2: vmcs.hardware.cr2.raw(),
                cr3: vmcs.read(FieldNatural::GUEST_CR3),
                cr4: core.read_cr4(vmcs).0,
                cr8: match &core.lapic {
                    Some(lapic) => lapic.cr8().into(),
                    None => core.cr8,
                },
                efer: core.efer.0,
                apic_base: core.apic_base(),
                interrupt_bitmap: [0; 4],
            };
            if let Some(vector) = core.given_interrupt() {
                sregs.interrupt_bitmap[usize::from(vector.0 >> 6)] |= 1 << (vector.0 & 63);
            }
            sregs
        })
    }

    /// Whether KVM_SET_SREGS may have these control registers.
    fn sregs_are_legal(&self, sregs: &uapi::kvm_sregs) -> bool {
        let core = &self.core;
        let (cr0, cr4, efer) = (Cr0(sregs.cr0), Cr4(sregs.cr4), Efer(sregs.efer));
        let long = efer.has(Efer::LME) && cr0.has(Cr0::PG);
        // Unlike KVM_SET_MSRS this asks what the guest's CPUID has.
        let efer_is_legal = efer.0 & core.cpu.efer_reserved(Origin::Guest) == 0;
        let mode_is_legal = if long {
            // 64-bit mode and 32-bit code are told by CS; paging needs PAE.
            cr4.has(Cr4::PAE)
                && efer.has(Efer::LMA)
                && check_cr3(Cr3(sregs.cr3), Cr4(0), efer, core.cpu.physical_bits).is_ok()
        } else {
            !efer.has(Efer::LMA) && sregs.cs.l == 0
        };
        efer_is_legal
            && mode_is_legal
            && check_cr0(cr0).is_ok()
            && check_cr4(cr4, core.cpu.cr4_reserved, cr0, efer).is_ok()
    }

    /// Carries out KVM_SET_SREGS.
    ///
    /// # Errors
    ///
    /// `EINVAL` for control registers that contradict each other or that the guest's CPU lacks.
    pub(crate) fn set_sregs(&mut self, sregs: &uapi::kvm_sregs) -> Result {
        if !self.sregs_are_legal(sregs) {
            return Err(EINVAL);
        }
        let (cr0, cr4) = (Cr0(sregs.cr0), Cr4(sregs.cr4));
        self.core
            .set_apic_base(sregs.apic_base, Origin::Host)
            .map_err(|_| EINVAL)?;
        let pae = cr0.has(Cr0::PG) && cr4.has(Cr4::PAE) && sregs.efer & Efer::LMA == 0;
        let pdptes = if pae {
            // Where there is nothing to read, or nothing legal, the old ones stay, as on KVM.
            self.read_pdptes(sregs.cr3).unwrap_or(None)
        } else {
            None
        };
        self.with_vmcs(|core, vmcs| {
            let values = [
                &sregs.es, &sregs.cs, &sregs.ss, &sregs.ds, &sregs.fs, &sregs.gs, &sregs.ldt,
                &sregs.tr,
            ];
            for (segment, value) in SEGMENTS.into_iter().zip(values) {
                vmcs.set_segment(segment, &from_kvm_segment(value));
            }
            vmcs.write(FieldNatural::GUEST_GDTR_BASE, sregs.gdt.base);
            vmcs.write32(Field32::GUEST_GDTR_LIMIT, sregs.gdt.limit.into());
            vmcs.write(FieldNatural::GUEST_IDTR_BASE, sregs.idt.base);
            vmcs.write32(Field32::GUEST_IDTR_LIMIT, sregs.idt.limit.into());
            vmcs.hardware.cr2 = Gva::new(sregs.cr2);
            vmcs.write(FieldNatural::GUEST_CR3, sregs.cr3);
            // EFER goes last: it is given whole, and CR0.PG must not change it.
            core.efer = Efer(0);
            core.set_cr4(vmcs, cr4);
            core.set_cr0(vmcs, Cr0((cr0.0 & Cr0::DEFINED) | Cr0::ET));
            core.set_efer(vmcs, Efer(sregs.efer));
            if let Some(pdptes) = &pdptes {
                Core::load_pdptes(vmcs, pdptes);
            }
            // One that no MOV to CR8 would take leaves it as it is.
            if sregs.cr8 <= 0xf {
                match &mut core.lapic {
                    Some(lapic) => lapic.set_cr8(sregs.cr8 as u8),
                    None => core.cr8 = sregs.cr8,
                }
            }
            if let Some(vector) = lowest_bit(&sregs.interrupt_bitmap) {
                core.give_interrupt(vector);
            }
            core.flush_guest = true;
            core.start_bootstrap_at_reset(vmcs);
        })
    }

    /// Carries out KVM_GET_DEBUGREGS.
    pub(crate) fn debug_registers(&mut self) -> Result<uapi::kvm_debugregs> {
        self.with_vmcs(|core, vmcs| uapi::kvm_debugregs {
            db: vmcs.hardware.debug.address,
            dr6: core.dr6,
            dr7: vmcs.read(FieldNatural::GUEST_DR7),
            ..Default::default()
        })
    }

    /// Carries out KVM_SET_DEBUGREGS.
    ///
    /// # Errors
    ///
    /// `EINVAL` for flags, and for bits 63:32 of DR6 and DR7.
    pub(crate) fn set_debug_registers(&mut self, regs: &uapi::kvm_debugregs) -> Result {
        if regs.flags != 0 || dr6_written(regs.dr6).is_err() || dr7_written(regs.dr7).is_err() {
            return Err(EINVAL);
        }
        self.with_vmcs(|core, vmcs| {
            vmcs.hardware.debug.address = regs.db;
            let _ = core.set_debug_register(vmcs, 6, regs.dr6);
            let _ = core.set_debug_register(vmcs, 7, regs.dr7);
        })
    }

    /// Carries out KVM_GET_XCRS.
    pub(crate) fn xcrs(&mut self) -> Result<uapi::kvm_xcrs> {
        self.with_vmcs(|_, vmcs| {
            let mut xcrs = uapi::kvm_xcrs {
                nr_xcrs: 1,
                ..Default::default()
            };
            xcrs.xcrs[0].value = vmcs.hardware.xcr0;
            xcrs
        })
    }

    /// Carries out KVM_SET_XCRS.
    ///
    /// # Errors
    ///
    /// `EINVAL` for flags, too many registers, and a value that the guest's CPU does not take.
    pub(crate) fn set_xcrs(&mut self, xcrs: &uapi::kvm_xcrs) -> Result {
        let count = xcrs.nr_xcrs as usize;
        if count > xcrs.xcrs.len() || xcrs.flags != 0 {
            return Err(EINVAL);
        }
        // Other registers than XCR0 are ignored, as KVM does.
        let Some(entry) = xcrs.xcrs.iter().take(count).find(|entry| entry.xcr == 0) else {
            return Ok(());
        };
        check_xcr0(Xcr0(entry.value), self.core.cpu.xcr0).map_err(|_| EINVAL)?;
        self.with_vmcs(|_, vmcs| vmcs.hardware.xcr0 = entry.value)
    }

    /// Carries out KVM_GET_LAPIC.
    ///
    /// # Errors
    ///
    /// `EINVAL` without a local APIC in the kernel.
    pub(crate) fn lapic_page(&mut self) -> Result<[u8; REGISTERS_SIZE]> {
        self.core.take_posted();
        let now = self.core.clock().now();
        let lapic = self.core.lapic.as_mut().ok_or(EINVAL)?;
        // A timer that is due shows in the IRR; on another machine it would be lost.
        lapic.timer_fired(now);
        Ok(lapic.registers(self.core.vm.apics.page_format(), now))
    }

    /// Carries out KVM_SET_LAPIC.
    ///
    /// # Errors
    ///
    /// `EINVAL` without a local APIC in the kernel and for an identifier that is not this one's.
    pub(crate) fn set_lapic_page(&mut self, page: &[u8; REGISTERS_SIZE]) -> Result {
        let now = self.core.clock().now();
        let core = &mut self.core;
        let format = core.vm.apics.page_format();
        let lapic = core.lapic.as_mut().ok_or(EINVAL)?;
        lapic.set_registers(page, format, now).map_err(|_| EINVAL)?;
        core.shared.mailbox.publish_identity(lapic.identity());
        core.watch_eois();
        core.shared.request_self(Request::ARM_TIMER);
        core.events.attention = true;
        Ok(())
    }

    /// The guest's CPUID table, run-time bits up to date.
    pub(crate) fn cpuid_table(&mut self) -> Result<KVec<CpuidEntry>> {
        let mut table = KVec::with_capacity(self.core.cpuid.len(), GFP_KERNEL)?;
        table.extend_from_slice(&self.core.cpuid, GFP_KERNEL)?;
        self.with_vmcs(|core, vmcs| core.cpuid_runtime(vmcs).apply_all(&mut table))?;
        Ok(table)
    }

    /// Carries out KVM_SET_CPUID2.
    ///
    /// # Errors
    ///
    /// `EINVAL` for a table that makes no sense, or that differs once RUN was called; `ENOMEM`.
    pub(crate) fn set_cpuid(&mut self, mut table: KVec<CpuidEntry>) -> Result {
        if self.core.has_run {
            let old = self.cpuid_table()?;
            self.with_vmcs(|core, vmcs| core.cpuid_runtime(vmcs).apply_all(&mut table))?;
            return if *old == *table { Ok(()) } else { Err(EINVAL) };
        }
        let host = self.core.vm.host.clone();
        let cpu = GuestCpu::new(&table, &host.offered).map_err(|_| EINVAL)?;
        let core = &mut self.core;
        if let Some(lapic) = &mut core.lapic {
            let features = Features {
                x2apic: cpu.x2apic,
                tsc_deadline: cpu.tsc_deadline,
                physical_bits: cpu.physical_bits.min(52) as u8,
                ..lapic.features()
            };
            lapic.set_features(features);
        }
        core.cpuid_index = Index::new(&table);
        core.cpuid = table;
        core.cpu = cpu;
        self.with_vmcs(|core, vmcs| core.offer_instructions(vmcs))
    }
}

impl Core {
    /// Takes the instructions away that the guest's CPUID does not show and that VMX can withhold.
    fn offer_instructions(&self, vmcs: &mut CurrentVmcs<'_>) {
        let is_x2apic = vmcs.hardware.virtual_apic.is_x2apic();
        vmcs.write32(
            Field32::SECONDARY_CONTROLS,
            self.secondary_controls(is_x2apic),
        );
        // Commands that can harm nobody but the guest itself need no exit.
        let bitmap = &mut vmcs.hardware.msr_bitmap;
        bitmap.set_write_exits(MsrIndex::PRED_CMD, !self.cpu.ibpb);
        bitmap.set_write_exits(MsrIndex::FLUSH_CMD, !self.cpu.flush_l1d);
    }

    /// What of the guest's registers CPUID shows.
    fn cpuid_runtime(&self, vmcs: &CurrentVmcs<'_>) -> Runtime<'_> {
        Runtime {
            cr4: self.read_cr4(vmcs),
            apic_enabled: self.apic_enabled(),
            xcr0: vmcs.hardware.xcr0,
            xss: 0,
            layout: &self.vm.host.xsave,
        }
    }

    /// Older userspace wakes the bootstrap processor by putting it at the reset vector.
    fn start_bootstrap_at_reset(&mut self, vmcs: &CurrentVmcs<'_>) {
        let is_bootstrap = self
            .lapic
            .as_ref()
            .is_some_and(|lapic| lapic.is_bootstrap());
        if is_bootstrap
            && vmcs.read(FieldNatural::GUEST_RIP) == 0xfff0
            && vmcs.read16(VmcsSegment::Cs.selector()) == 0xf000
            && !self.is_protected()
        {
            self.mp_state = MpState::Runnable;
        }
    }
}

/// The lowest set bit of KVM_SET_SREGS's interrupt bitmap.
fn lowest_bit(bitmap: &[u64; 4]) -> Option<Vector> {
    bitmap
        .iter()
        .zip(0u8..)
        .find(|(word, _)| **word != 0)
        .map(|(word, place)| Vector(place * 64 + word.trailing_zeros() as u8))
}
