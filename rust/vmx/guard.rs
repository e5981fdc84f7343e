// SPDX-License-Identifier: GPL-2.0

//! Care against speculation around each guest: what the host's plan asks for, and the guest's own
//! IA32_SPEC_CTRL.

use super::enter::{self, Outcome, Registers, SpecCtrl};
use crate::host::{
    irq::IrqsOff,
    speculation::{self, Displacer},
};
use core::{
    fmt,
    sync::atomic::{AtomicU64, Ordering},
};
use kernel::{prelude::*, sync::Arc};
use rvisor_core::x86::speculation::{switch, L1dFlush, Plan};

/// The plan for this host, with what it needs.
#[derive(Clone)]
pub(crate) struct Mitigations {
    plan: Plan,
    /// Where the L1 data cache is to be flushed and the CPU has no command for it.
    displacer: Option<Arc<Displacer>>,
}

/// The names of a plan, one after the other.
struct Names<'a>(&'a Plan);

impl fmt::Display for Names<'_> {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut separator = "";
        for name in self.0.names() {
            write!(out, "{separator}{name}")?;
            separator = ", ";
        }
        if separator.is_empty() {
            out.write_str("none: this host does without")?;
        }
        Ok(())
    }
}

impl Mitigations {
    /// Asks the host's kernel, and says in the log what follows.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(crate) fn new() -> Result<Self> {
        let (plan, is_shared) = speculation::plan();
        let flushes = !matches!(plan.l1d_flush, L1dFlush::Never);
        let displacer = if flushes && !plan.l1d_by_msr {
            Some(Arc::new(Displacer::new()?, GFP_KERNEL)?)
        } else {
            None
        };
        pr_info!("mitigations: {}\n", format_args!("{}", Names(&plan)));
        if is_shared {
            pr_warn!("this CPU has the flaw L1TF and runs two threads on a core: a guest can read what the other thread uses; see the kernel's hw-vuln/l1tf\n");
        }
        Ok(Self { plan, displacer })
    }

    /// Whether pages of a guest's that are larger than 4 KiB may hold code.
    pub(crate) fn large_pages_execute(&self) -> bool {
        !self.plan.no_large_code
    }

    /// Whether IA32_SPEC_CTRL is switched, so that guests can have it.
    pub(crate) fn switches_spec_ctrl(&self) -> bool {
        self.plan.switch & switch::SPEC_CTRL != 0
    }
}

/// Names of virtual CPUs that are never used again.
static NEXT_GUEST: AtomicU64 = AtomicU64::new(1);

/// The care for one virtual CPU.
pub(crate) struct Guard {
    mitigations: Mitigations,
    /// Which virtual CPU this is, for the barrier between them.
    guest: u64,
    spec_ctrl: SpecCtrl,
    /// Bits of [`switch`] but for LAUNCHED.
    flags: u32,
    /// The guest's entries and exits need care; never changes.
    is_needed: bool,
}

impl Guard {
    /// For a new virtual CPU.
    pub(crate) fn new(mitigations: &Mitigations) -> Self {
        Self {
            flags: mitigations.plan.switch,
            is_needed: mitigations.plan.is_guarded(),
            mitigations: mitigations.clone(),
            guest: NEXT_GUEST.fetch_add(1, Ordering::Relaxed),
            spec_ctrl: SpecCtrl::default(),
        }
    }

    /// Whether the guest's entries and exits need any care; never changes.
    #[inline]
    pub(super) fn is_needed(&self) -> bool {
        self.is_needed
    }

    /// The guest is about to have this CPU after another thread had it; `beside` says that another
    /// hypervisor, KVM, has a guest here.
    pub(super) fn take_cpu(&self, beside: bool, irqs: &IrqsOff) {
        if self.mitigations.plan.ibpb_between_vcpus {
            speculation::separate_guests(self.guest, beside, irqs);
        }
    }

    /// The guest leaves this CPU. KVM does not know of it, and has no barrier where its own guest is the last
    /// that it ran here.
    pub(super) fn leave_cpu(&self, beside: bool) {
        if beside && self.mitigations.plan.ibpb_between_vcpus {
            speculation::barrier();
        }
    }

    /// Enters the guest. `host_ran` says whether more of the host ran on this CPU since its last exit than
    /// the short path back here.
    ///
    /// # Safety
    ///
    /// As [`enter::enter`].
    #[inline(never)]
    pub(super) unsafe fn enter(
        &mut self,
        registers: *mut Registers,
        host_rsp: *mut u64,
        launched: bool,
        host_ran: bool,
        irqs: &IrqsOff,
    ) -> Outcome {
        let plan = &self.mitigations.plan;
        match plan.l1d_flush {
            L1dFlush::Always => self.flush_l1d(),
            L1dFlush::Conditional if host_ran => self.flush_l1d(),
            L1dFlush::Conditional | L1dFlush::Never => {}
        }
        if plan.switch & switch::SPEC_CTRL != 0 {
            self.spec_ctrl.host = speculation::host_spec_ctrl(irqs);
        }
        let flags = self.flags | u32::from(launched) * switch::LAUNCHED;
        let before_user = plan.ibpb_exit_to_user;
        // SAFETY: By the caller's promise; the kernel keeps the host's value of IA32_SPEC_CTRL.
        let outcome =
            unsafe { enter::enter_guarded(registers, host_rsp, &mut self.spec_ctrl, flags) };
        if before_user {
            speculation::barrier_before_user(irqs);
        }
        outcome
    }

    fn flush_l1d(&self) {
        match &self.mitigations.displacer {
            Some(displacer) => displacer.displace(),
            None => speculation::flush_l1d_by_msr(),
        }
    }

    /// The guest's IA32_SPEC_CTRL, while it does not run.
    pub(crate) fn spec_ctrl(&self) -> u64 {
        self.spec_ctrl.guest
    }

    /// Sets the guest's IA32_SPEC_CTRL to a value that the CPU takes; `true` where the guest may access the
    /// MSR by itself from now on.
    ///
    /// Reading the MSR after each exit costs much, so a guest that never sets it is spared that.
    pub(crate) fn set_spec_ctrl(&mut self, value: u64) -> bool {
        self.spec_ctrl.guest = value;
        if value == 0 || self.flags & switch::SPEC_CTRL == 0 {
            return false;
        }
        self.flags |= switch::SAVE_SPEC_CTRL;
        true
    }
}
