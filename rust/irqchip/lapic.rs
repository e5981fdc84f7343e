// SPDX-License-Identifier: GPL-2.0

//! A local APIC, in xAPIC and x2APIC mode (SDM vol. 3, chapter 12).
//!
//! It belongs to the thread that runs its vCPU. Other threads never touch it: what they send waits
//! outside and comes in by [`LocalApic::merge_requests`], and what they need to know to address it
//! is in the [`ApicIdentity`] that its owner publishes.

mod lvt;
mod page;
mod registers;
mod timer;

pub use lvt::{LocalDelivery, LocalInput};
pub use page::{PageFormat, REGISTERS_SIZE};
pub use timer::Deadline;

use super::destination::{ApicIdentity, ApicMode, InterruptMessage, LogicalModel};
use super::vector_set::VectorSet;
use super::{Invalid, Now, TriggerMode};
use crate::x86::msr;
use crate::x86::vector::{ApicId, Vector};

/// What the guest's CPUID and the machine's owner decide about a local APIC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Features {
    /// x2APIC mode exists (CPUID.1:ECX[21]).
    pub x2apic: bool,
    /// The timer's TSC-deadline mode exists (CPUID.1:ECX[24]).
    pub tsc_deadline: bool,
    /// Software may suppress the broadcast of EOIs (version register, bit 24).
    pub suppress_eoi_broadcast: bool,
    /// There is an LVT entry for corrected machine checks (IA32_MCG_CAP[10]).
    pub cmci: bool,
    /// The number of physical address bits, 32 to 52, which bounds the registers' base.
    pub physical_bits: u8,
    /// The bootstrap processor's LINT0 takes the 8259's interrupts from reset on, as firmware would
    /// set it up (KVM_X86_QUIRK_LINT0_REENABLED).
    pub lint0_virtual_wire: bool,
}

impl Default for Features {
    /// What KVM gives a machine whose CPUID has not been set.
    fn default() -> Self {
        Self {
            x2apic: false,
            tsc_deadline: false,
            suppress_eoi_broadcast: false,
            cmci: false,
            physical_bits: 36,
            lint0_virtual_wire: true,
        }
    }
}

/// How long a cycle of the bus is, which the timer counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BusCycle(u64);

impl BusCycle {
    /// One nanosecond: what KVM gives a machine that asks for nothing else.
    pub const DEFAULT: Self = Self(1);

    /// The cycle of so many nanoseconds. Invalid is 0, and one with which the longest count does not fit
    /// into 64 bits.
    pub const fn new(nanoseconds: u64) -> Result<Self, Invalid> {
        const LONGEST: u64 = 0xffff_ffff << 7;
        match LONGEST.checked_mul(nanoseconds) {
            Some(1..) => Ok(Self(nanoseconds)),
            Some(0) | None => Err(Invalid),
        }
    }

    /// Its length.
    #[inline]
    pub const fn nanoseconds(self) -> u64 {
        self.0
    }
}

/// Who changes a register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// The guest, which is bound by the rules for transitions.
    Guest,
    /// The machine's owner, who may restore any consistent state.
    Host,
}

/// What a register access asks of the outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum LapicEffect {
    /// Nothing.
    None,
    /// This message is to be delivered.
    SendIpi(InterruptMessage),
    /// The end of this vector's interrupt is to be told to the IOAPIC.
    Eoi(Vector),
    /// [`LocalApic::deadline`] has changed.
    TimerChanged,
    /// [`LocalApic::identity`] or [`LocalApic::mode`] has changed; the identity is to be published.
    IdentityChanged,
    /// [`LocalApic::tpr`] may have changed.
    PriorityChanged,
}

/// The kinds of reset (SDM vol. 3, 12.4.7).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ResetKind {
    /// Power-up or RESET.
    PowerUp,
    /// INIT, which keeps the identifier and IA32_APIC_BASE.
    Init,
}

/// The lowest vector that an APIC takes; those below are the CPU's own (SDM vol. 3, 12.5.2).
const FIRST_LEGAL_VECTOR: u8 = 16;

/// The ESR's bits (SDM vol. 3, 12.5.3).
mod error {
    /// An IPI with an illegal vector was to be sent.
    pub(super) const SEND_ILLEGAL_VECTOR: u8 = 1 << 5;
    /// An illegal vector was received, or stands in the LVT entry of an interrupt that occurred.
    pub(super) const RECEIVED_ILLEGAL_VECTOR: u8 = 1 << 6;
    /// A reserved register was accessed.
    pub(super) const ILLEGAL_REGISTER: u8 = 1 << 7;
}

/// The spurious-interrupt vector register's bits (SDM vol. 3, 12.9).
mod spurious {
    pub(super) const ENABLED: u32 = 1 << 8;
    pub(super) const SUPPRESS_EOI_BROADCAST: u32 = 1 << 12;
    /// The vector, the enable bit and the focus-processor bit.
    pub(super) const WRITABLE: u32 = 0x3ff;
    pub(super) const RESET: u32 = 0xff;
}

/// A local APIC.
#[derive(Clone, Debug)]
pub struct LocalApic {
    irr: VectorSet,
    isr: VectorSet,
    tmr: VectorSet,
    /// Invariant: the higher of `tpr` and the priority class in service, as SDM vol. 3, 12.8.3.1
    /// defines it. Whatever changes either calls `update_ppr`.
    ppr: u8,
    tpr: u8,
    /// The vectors whose EOI is reported although they are edge-triggered.
    watched: VectorSet,
    base: u64,
    id: ApicId,
    bootstrap: bool,
    features: Features,
    xapic_id: u8,
    logical_id: u8,
    dfr: u32,
    spurious: u32,
    /// The ESR as the guest reads it, and what has been detected since it was last written.
    esr: u8,
    detected: u8,
    icr: u64,
    lvt: lvt::Lvt,
    timer: timer::Timer,
}

impl LocalApic {
    /// The local APIC of the vCPU with the identifier `id`, as it is after power-up.
    pub fn new(id: ApicId, bootstrap: bool, features: Features, cycle: BusCycle) -> Self {
        let mut apic = Self {
            irr: VectorSet::EMPTY,
            isr: VectorSet::EMPTY,
            tmr: VectorSet::EMPTY,
            ppr: 0,
            tpr: 0,
            watched: VectorSet::EMPTY,
            base: 0,
            id,
            bootstrap,
            features,
            xapic_id: 0,
            logical_id: 0,
            dfr: 0,
            spurious: 0,
            esr: 0,
            detected: 0,
            icr: 0,
            lvt: lvt::Lvt::RESET,
            timer: timer::Timer::new(cycle),
        };
        apic.reset(ResetKind::PowerUp);
        apic
    }

    /// Resets the APIC. Its identity and deadline may have changed after that.
    pub fn reset(&mut self, kind: ResetKind) {
        if kind == ResetKind::PowerUp {
            self.base = msr::APIC_BASE_RESET_ADDRESS | msr::APIC_BASE_ENABLE;
            if self.bootstrap {
                self.base |= msr::APIC_BASE_BSP;
            }
            self.reset_xapic_id();
        }
        self.irr = VectorSet::EMPTY;
        self.isr = VectorSet::EMPTY;
        self.tmr = VectorSet::EMPTY;
        self.tpr = 0;
        self.logical_id = 0;
        self.dfr = 0xffff_ffff;
        self.spurious = spurious::RESET;
        self.esr = 0;
        self.detected = 0;
        self.icr = 0;
        self.lvt = lvt::Lvt::RESET;
        if self.bootstrap && self.features.lint0_virtual_wire {
            self.lvt.set_virtual_wire();
        }
        self.timer.reset();
        self.update_ppr();
    }

    /// Changes what the guest's CPUID decides. The version register follows at once; registers that
    /// hold what is no longer possible keep it until they are written.
    pub fn set_features(&mut self, features: Features) {
        self.features = features;
    }

    /// What the guest's CPUID decides.
    pub fn features(&self) -> Features {
        self.features
    }

    /// The identifier in x2APIC mode.
    #[inline]
    pub fn id(&self) -> ApicId {
        self.id
    }

    /// Whether this is the bootstrap processor's.
    #[inline]
    pub fn is_bootstrap(&self) -> bool {
        self.bootstrap
    }

    /// What others need to know to address this APIC.
    pub fn identity(&self) -> ApicIdentity {
        ApicIdentity {
            id: self.id,
            xapic_id: self.xapic_id,
            logical_id: self.logical_id,
            model: match self.dfr >> 28 {
                0xf => LogicalModel::Flat,
                0 => LogicalModel::Cluster,
                _ => LogicalModel::Reserved,
            },
            mode: self.mode(),
            software_enabled: self.is_software_enabled(),
            takes_pic: self.accepts_pic_interrupt(),
            is_watchdog: self.lint0_is_nmi(),
        }
    }

    /// The mode that IA32_APIC_BASE sets.
    #[inline]
    pub const fn mode(&self) -> ApicMode {
        if self.base & msr::APIC_BASE_ENABLE == 0 {
            ApicMode::Disabled
        } else if self.base & msr::APIC_BASE_X2APIC == 0 {
            ApicMode::XApic
        } else {
            ApicMode::X2Apic
        }
    }

    /// Whether the APIC takes messages that carry a vector.
    #[inline]
    pub const fn is_software_enabled(&self) -> bool {
        self.spurious & spurious::ENABLED != 0
    }

    /// IA32_APIC_BASE.
    #[inline]
    pub const fn base(&self) -> u64 {
        self.base
    }

    /// The guest-physical address of the register page. In other modes than xAPIC mode there are no
    /// registers in it, but it is nobody else's either (KVM_X86_QUIRK_LAPIC_MMIO_HOLE).
    #[inline]
    pub const fn mmio_base(&self) -> u64 {
        self.base & 0x000f_ffff_ffff_f000
    }

    /// Writes IA32_APIC_BASE. Invalid are reserved bits, x2APIC mode without the enable bit and,
    /// from the guest, the transitions that SDM vol. 3, 12.12.5 rules out.
    pub fn set_base(&mut self, value: u64, origin: Origin) -> Result<LapicEffect, Invalid> {
        if value == self.base {
            return Ok(LapicEffect::None);
        }
        let address_bits = u32::from(self.features.physical_bits).clamp(32, 52);
        let mut reserved = u64::MAX.wrapping_shl(address_bits) | 0x2ff;
        if !self.features.x2apic {
            reserved |= msr::APIC_BASE_X2APIC;
        }
        let enable = value & msr::APIC_BASE_ENABLE != 0;
        let x2apic = value & msr::APIC_BASE_X2APIC != 0;
        if value & reserved != 0 || (x2apic && !enable) {
            return Err(Invalid);
        }
        let before = self.mode();
        let allowed = match (before, enable, x2apic) {
            (ApicMode::X2Apic, true, false) => origin == Origin::Host,
            (ApicMode::Disabled, true, true) => origin == Origin::Host,
            _ => true,
        };
        if !allowed {
            return Err(Invalid);
        }
        self.base = value;
        let after = self.mode();
        if after == before {
            return Ok(LapicEffect::None);
        }
        if after == ApicMode::XApic {
            self.reset_xapic_id();
        }
        Ok(LapicEffect::IdentityChanged)
    }

    fn reset_xapic_id(&mut self) {
        self.xapic_id = (self.id.0 & 0xff) as u8;
    }

    /// Takes a vector into the IRR. Gives whether it was taken: a disabled APIC and an illegal
    /// vector (SDM vol. 3, 12.5.2) take none.
    #[inline]
    pub fn set_irr(&mut self, vector: Vector, trigger: TriggerMode) -> bool {
        if self.mode() == ApicMode::Disabled || !self.is_software_enabled() {
            return false;
        }
        if vector.0 < FIRST_LEGAL_VECTOR {
            self.detect(error::RECEIVED_ILLEGAL_VECTOR);
            return false;
        }
        if trigger.is_level() {
            self.tmr.insert(vector);
        } else {
            self.tmr.remove(vector);
        }
        self.irr.insert(vector);
        true
    }

    /// Takes edge-triggered vectors into the IRR: bit `v % 64` of word `v / 64` is vector `v`. What
    /// was sent counts as accepted when it was sent, so the software-enable bit is not asked again.
    #[inline]
    pub fn merge_requests(&mut self, requests: &[u64; 4]) {
        self.merge_requests_with_level(requests, &[0; 4]);
    }

    /// As [`LocalApic::merge_requests`], the vectors that are in `level` too being level-triggered.
    #[inline]
    pub fn merge_requests_with_level(&mut self, requests: &[u64; 4], level: &[u64; 4]) {
        let [first, rest @ ..] = *requests;
        if first & 0xffff != 0 {
            self.detect(error::RECEIVED_ILLEGAL_VECTOR);
        }
        let [a, b, c] = rest;
        let taken = VectorSet::from_words([first & !0xffff, a, b, c]);
        let [la, lb, lc, ld] = *level;
        let level = VectorSet::from_words([la & first & !0xffff, lb & a, lc & b, ld & c]);
        self.tmr.remove_all(&taken);
        self.tmr.insert_all(&level);
        self.irr.insert_all(&taken);
    }

    /// The vector to inject, if there is one: the highest in the IRR, where its class is above the
    /// processor priority (SDM vol. 3, 12.8.4). An APIC that software has disabled meanwhile still
    /// delivers what it has taken (12.4.7.2), one that IA32_APIC_BASE has disabled delivers nothing.
    #[inline]
    pub fn highest_pending(&self) -> Option<Vector> {
        let vector = self.irr.highest()?;
        if vector.class() > self.ppr >> 4 && self.mode() != ApicMode::Disabled {
            Some(vector)
        } else {
            None
        }
    }

    /// Whether any vector is in the IRR, whatever the priorities are.
    #[inline]
    pub const fn has_request(&self) -> bool {
        !self.irr.is_empty()
    }

    /// The highest vector in service.
    #[inline]
    pub fn highest_in_service(&self) -> Option<Vector> {
        self.isr.highest()
    }

    /// The lowest TPR class (the value of CR8) that holds back what is pending, for the VMCS's TPR
    /// threshold: 0 where a change of the TPR alone lets nothing through.
    #[inline]
    pub fn tpr_threshold(&self) -> u8 {
        let Some(vector) = self.irr.highest() else {
            return 0;
        };
        let held_by_tpr = vector.class() <= self.tpr >> 4;
        let in_service = self.isr.highest().map_or(0, Vector::class);
        if held_by_tpr && vector.class() > in_service {
            vector.class()
        } else {
            0
        }
    }

    /// Moves `vector` from the IRR to the ISR, because it is being injected.
    #[inline]
    pub fn acknowledge(&mut self, vector: Vector) {
        self.irr.remove(vector);
        self.isr.insert(vector);
        // Only a class above the present one changes the PPR, and then it is that class.
        if vector.class() > self.ppr >> 4 {
            self.ppr = vector.0 & 0xf0;
        }
    }

    /// Ends the highest interrupt in service. Gives its vector where the IOAPIC is to be told: it was
    /// level-triggered and software does not suppress that, or it is watched.
    #[inline]
    pub fn eoi(&mut self) -> Option<Vector> {
        let vector = self.isr.highest()?;
        self.isr.remove(vector);
        self.update_ppr();
        let told = if self.tmr.contains(vector) {
            !self.suppresses_eoi_broadcast()
        } else {
            self.watched.contains(vector)
        };
        told.then_some(vector)
    }

    /// Sets the edge-triggered vectors whose EOI is to be reported: those that a device waits for.
    pub fn watch_eoi(&mut self, vectors: &VectorSet) {
        self.watched = *vectors;
    }

    /// Whether `vector` is level-triggered: its bit in the TMR.
    #[inline]
    pub fn is_level_triggered(&self, vector: Vector) -> bool {
        self.tmr.contains(vector)
    }

    /// Whether `vector` waits or is in service.
    #[inline]
    pub fn is_active(&self, vector: Vector) -> bool {
        self.irr.contains(vector) || self.isr.contains(vector)
    }

    fn suppresses_eoi_broadcast(&self) -> bool {
        self.features.suppress_eoi_broadcast
            && self.spurious & spurious::SUPPRESS_EOI_BROADCAST != 0
    }

    /// The processor-priority register.
    #[inline]
    pub const fn ppr(&self) -> u8 {
        self.ppr
    }

    /// The task-priority register. CR8 is its upper four bits.
    #[inline]
    pub const fn tpr(&self) -> u8 {
        self.tpr
    }

    /// Sets the task-priority register.
    #[inline]
    pub fn set_tpr(&mut self, tpr: u8) {
        self.tpr = tpr;
        self.update_ppr();
    }

    /// CR8: the task priority's class, 0 to 15.
    #[inline]
    pub const fn cr8(&self) -> u8 {
        self.tpr >> 4
    }

    /// Sets CR8; only the low four bits count.
    #[inline]
    pub fn set_cr8(&mut self, class: u8) {
        self.set_tpr((class & 0xf) << 4);
    }

    #[inline]
    fn update_ppr(&mut self) {
        let in_service = self.isr.highest().map_or(0, |vector| vector.0 & 0xf0);
        self.ppr = if self.tpr & 0xf0 >= in_service {
            self.tpr
        } else {
            in_service
        };
    }

    /// Notes an error and raises the LVT's error interrupt (SDM vol. 3, 12.5.3).
    fn detect(&mut self, error: u8) {
        if self.detected & error != 0 {
            return;
        }
        self.detected |= error;
        let entry = self.lvt.get(lvt::Entry::Error);
        let vector = Vector((entry & 0xff) as u8);
        if entry & lvt::MASKED != 0 || self.mode() == ApicMode::Disabled {
            return;
        }
        if vector.0 < FIRST_LEGAL_VECTOR {
            self.detected |= error::RECEIVED_ILLEGAL_VECTOR;
        } else {
            self.tmr.remove(vector);
            self.irr.insert(vector);
        }
    }

    /// When the timer is to fire next, if it is armed. The owner then calls
    /// [`LocalApic::timer_fired`].
    #[inline]
    pub fn deadline(&self) -> Option<Deadline> {
        self.timer.deadline()
    }

    /// Lets the timer fire, if its moment has come: delivers the LVT's vector unless it is masked,
    /// and arms a periodic timer for its next moment that lies in the future; those missed are lost,
    /// as they would be while the vector waits in the IRR. Gives whether a vector was delivered.
    pub fn timer_fired(&mut self, now: Now) -> bool {
        self.timer.fire(now) && self.local_interrupt(LocalInput::Timer) == LocalDelivery::Pending
    }

    /// IA32_TSC_DEADLINE: 0 where the timer is in another mode or not armed, or the APIC is disabled.
    #[inline]
    pub fn tsc_deadline(&self) -> u64 {
        if self.mode() == ApicMode::Disabled {
            return 0;
        }
        self.timer.tsc_deadline()
    }

    /// Writes IA32_TSC_DEADLINE; 0 disarms. Ignored in the other modes (SDM vol. 3, 12.5.4.1).
    #[inline]
    pub fn set_tsc_deadline(&mut self, tsc: u64) -> LapicEffect {
        if self.mode() != ApicMode::Disabled && self.timer.set_tsc_deadline(tsc) {
            LapicEffect::TimerChanged
        } else {
            LapicEffect::None
        }
    }
}

#[cfg(test)]
mod tests;
