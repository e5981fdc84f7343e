// SPDX-License-Identifier: GPL-2.0

//! What is done against speculative execution between guests and host: a function of what the host's kernel
//! has decided for itself and of what the CPU has. Nothing is done that the host has switched off.
//!
//! See the kernel's Documentation/admin-guide/hw-vuln, a page for each flaw.

/// `mitigation` of Documentation/admin-guide/hw-vuln/l1tf.rst, in the order of the kernel's own enumeration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum L1tf {
    /// `off`
    Off,
    /// The default.
    Auto,
    /// `flush,nowarn`
    FlushNoWarning,
    /// `flush`
    Flush,
    /// `flush,nosmt`
    FlushNoSmt,
    /// `full`
    Full,
    /// `full,force`
    FullForce,
}

impl L1tf {
    /// From the kernel's number; one that is not known gives the most cautious.
    pub const fn new(number: u32) -> Self {
        match number {
            0 => Self::Off,
            1 => Self::Auto,
            2 => Self::FlushNoWarning,
            3 => Self::Flush,
            4 => Self::FlushNoSmt,
            5 => Self::Full,
            _ => Self::FullForce,
        }
    }
}

/// What the host's kernel has found and decided when it booted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HostState {
    /// IA32_SPEC_CTRL is there and the kernel keeps its value.
    pub spec_ctrl: bool,
    /// The kernel sets IBRS at each of its entries.
    pub kernel_ibrs: bool,
    /// The return-stack buffer is filled after a VM exit.
    pub rsb_vmexit: bool,
    /// One CALL must retire between a VM exit and the first RET.
    pub rsb_vmexit_lite: bool,
    /// The branch history is cleared by a loop after a VM exit.
    pub clear_bhb_vmexit: bool,
    /// The CPU's buffers are cleared by VERW before a VM entry.
    pub clear_cpu_buffers: bool,
    /// IA32_PRED_CMD has IBPB.
    pub ibpb: bool,
    /// The kernel wants IBPB between virtual CPUs.
    pub ibpb_between_vcpus: bool,
    /// The kernel wants IBPB between a guest and the next return to userspace.
    pub ibpb_exit_to_user: bool,
    /// The CPU has the flaw L1TF.
    pub l1tf: bool,
    /// The CPU or a hypervisor below says that no flush of the L1 data cache is needed at VM entry.
    pub skip_l1d_flush: bool,
    /// IA32_FLUSH_CMD is there.
    pub flush_l1d: bool,
    /// The CPU stops with a machine check where a page's size changes under code.
    pub itlb_multihit: bool,
    /// `mitigations=off`, or a kernel built without any.
    pub mitigations_off: bool,
}

/// When the L1 data cache is flushed before a VM entry.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum L1dFlush {
    /// Never.
    #[default]
    Never,
    /// After anything of the host's ran but the short path from an exit to the next entry.
    Conditional,
    /// Before each.
    Always,
}

/// What the world switch does, as bits that its assembly tests.
pub mod switch {
    /// IA32_SPEC_CTRL is switched.
    pub const SPEC_CTRL: u32 = 1 << 8;
    /// It is written after each exit, even where it does not change.
    pub const IBRS: u32 = 1 << 9;
    /// The return-stack buffer is filled.
    pub const FILL_RSB: u32 = 1 << 10;
    /// One CALL retires.
    pub const ONE_CALL: u32 = 1 << 11;
    /// The branch history is cleared.
    pub const CLEAR_BHB: u32 = 1 << 12;
    /// VERW before entry.
    pub const VERW: u32 = 1 << 13;
    /// The guest changes IA32_SPEC_CTRL without an exit, so it is read after each.
    pub const SAVE_SPEC_CTRL: u32 = 1 << 14;
    /// Bit 0, and the only one that does not follow from the host: the VMCS was launched.
    pub const LAUNCHED: u32 = 1 << 0;
}

/// What is done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// Bits of [`switch`].
    pub switch: u32,
    /// IBPB where another virtual CPU ran on this CPU before.
    pub ibpb_between_vcpus: bool,
    /// The kernel is told to use IBPB before this CPU runs userspace.
    pub ibpb_exit_to_user: bool,
    /// When the L1 data cache is flushed.
    pub l1d_flush: L1dFlush,
    /// IA32_FLUSH_CMD does it; else as much memory is read as fills it.
    pub l1d_by_msr: bool,
    /// Guests execute from pages of 4 KiB only.
    pub no_large_code: bool,
}

/// `bit` where `condition` holds.
const fn when(condition: bool, bit: u32) -> u32 {
    if condition {
        bit
    } else {
        0
    }
}

impl Plan {
    /// The plan for a host, whose policy against L1TF is `l1tf`.
    pub const fn new(host: &HostState, l1tf: L1tf) -> Self {
        let l1d_flush = if host.l1tf && !host.skip_l1d_flush && !host.mitigations_off {
            match l1tf {
                L1tf::Off => L1dFlush::Never,
                L1tf::Auto | L1tf::FlushNoWarning | L1tf::Flush | L1tf::FlushNoSmt => {
                    L1dFlush::Conditional
                }
                L1tf::Full | L1tf::FullForce => L1dFlush::Always,
            }
        } else {
            L1dFlush::Never
        };
        Self {
            switch: when(host.spec_ctrl, switch::SPEC_CTRL)
                | when(host.spec_ctrl && host.kernel_ibrs, switch::IBRS)
                | when(host.rsb_vmexit, switch::FILL_RSB)
                | when(host.rsb_vmexit_lite && !host.rsb_vmexit, switch::ONE_CALL)
                | when(host.clear_bhb_vmexit, switch::CLEAR_BHB)
                | when(host.clear_cpu_buffers, switch::VERW),
            ibpb_between_vcpus: host.ibpb && host.ibpb_between_vcpus,
            ibpb_exit_to_user: host.ibpb_exit_to_user,
            l1d_flush,
            l1d_by_msr: host.flush_l1d,
            no_large_code: host.itlb_multihit && !host.mitigations_off,
        }
    }

    /// Whether an entry and exit do anything more than switch registers.
    pub const fn is_guarded(&self) -> bool {
        self.switch != 0 || self.ibpb_exit_to_user || !matches!(self.l1d_flush, L1dFlush::Never)
    }

    /// The names of what is done, for the log.
    pub fn names(&self) -> impl Iterator<Item = &'static str> {
        let named = [
            (self.switch & switch::SPEC_CTRL != 0, "SPEC_CTRL"),
            (self.switch & switch::IBRS != 0, "IBRS"),
            (self.switch & switch::FILL_RSB != 0, "RSB filling"),
            (self.switch & switch::ONE_CALL != 0, "one CALL"),
            (self.switch & switch::CLEAR_BHB != 0, "BHB clearing"),
            (self.switch & switch::VERW != 0, "VERW"),
            (self.ibpb_between_vcpus, "IBPB between guests"),
            (self.ibpb_exit_to_user, "IBPB before userspace"),
            (
                matches!(self.l1d_flush, L1dFlush::Conditional),
                "L1D flush after the host ran",
            ),
            (
                matches!(self.l1d_flush, L1dFlush::Always),
                "L1D flush at each entry",
            ),
            (self.no_large_code, "no code in large pages"),
        ];
        named
            .into_iter()
            .filter_map(|(is_done, name)| is_done.then_some(name))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A CPU of 2014 with its microcode of then, on a kernel with its defaults: retpolines.
    const OLD: HostState = HostState {
        spec_ctrl: false,
        kernel_ibrs: false,
        rsb_vmexit: true,
        rsb_vmexit_lite: false,
        clear_bhb_vmexit: false,
        clear_cpu_buffers: true,
        ibpb: false,
        ibpb_between_vcpus: false,
        ibpb_exit_to_user: false,
        l1tf: true,
        skip_l1d_flush: false,
        flush_l1d: false,
        itlb_multihit: true,
        mitigations_off: false,
    };
    /// A CPU of 2019: enhanced IBRS.
    const NEW: HostState = HostState {
        spec_ctrl: true,
        kernel_ibrs: false,
        rsb_vmexit: false,
        rsb_vmexit_lite: true,
        clear_bhb_vmexit: true,
        clear_cpu_buffers: false,
        ibpb: true,
        ibpb_between_vcpus: true,
        ibpb_exit_to_user: true,
        l1tf: false,
        skip_l1d_flush: true,
        flush_l1d: true,
        itlb_multihit: false,
        mitigations_off: false,
    };

    #[test]
    fn a_host_that_does_nothing_has_nothing_done() {
        let plan = Plan::new(&HostState::default(), L1tf::Auto);
        assert_eq!(plan, Plan::default());
        assert!(!plan.is_guarded());
        assert_eq!(plan.names().count(), 0);
    }

    #[test]
    fn an_old_cpu_fills_and_flushes() {
        let plan = Plan::new(&OLD, L1tf::Auto);
        assert_eq!(plan.switch, switch::FILL_RSB | switch::VERW);
        assert_eq!(plan.l1d_flush, L1dFlush::Conditional);
        assert!(!plan.l1d_by_msr && plan.no_large_code && plan.is_guarded());
        assert!(!plan.ibpb_between_vcpus);
    }

    #[test]
    fn a_newer_cpu_switches_spec_ctrl() {
        let plan = Plan::new(&NEW, L1tf::Auto);
        assert_eq!(
            plan.switch,
            switch::SPEC_CTRL | switch::ONE_CALL | switch::CLEAR_BHB
        );
        assert!(plan.ibpb_between_vcpus && plan.ibpb_exit_to_user);
        assert_eq!(plan.l1d_flush, L1dFlush::Never);
        assert!(!plan.no_large_code);
    }

    #[test]
    fn filling_makes_the_one_call_needless() {
        let both = HostState {
            rsb_vmexit: true,
            ..NEW
        };
        let switch = Plan::new(&both, L1tf::Auto).switch;
        assert_eq!(
            switch & (switch::FILL_RSB | switch::ONE_CALL),
            switch::FILL_RSB
        );
    }

    #[test]
    fn ibrs_of_the_kernel_is_written_at_each_exit() {
        let ibrs = HostState {
            kernel_ibrs: true,
            ..NEW
        };
        assert_ne!(Plan::new(&ibrs, L1tf::Auto).switch & switch::IBRS, 0);
        assert_eq!(Plan::new(&NEW, L1tf::Auto).switch & switch::IBRS, 0);
    }

    #[test]
    fn the_policy_on_l1tf_is_the_hosts() {
        for (number, wanted) in [
            (0, L1dFlush::Never),
            (1, L1dFlush::Conditional),
            (2, L1dFlush::Conditional),
            (3, L1dFlush::Conditional),
            (4, L1dFlush::Conditional),
            (5, L1dFlush::Always),
            (6, L1dFlush::Always),
            (99, L1dFlush::Always),
        ] {
            assert_eq!(
                Plan::new(&OLD, L1tf::new(number)).l1d_flush,
                wanted,
                "{number}"
            );
        }
        let skipping = HostState {
            skip_l1d_flush: true,
            ..OLD
        };
        assert_eq!(
            Plan::new(&skipping, L1tf::FullForce).l1d_flush,
            L1dFlush::Never
        );
    }

    #[test]
    fn mitigations_off_is_off() {
        let off = HostState {
            mitigations_off: true,
            l1tf: true,
            itlb_multihit: true,
            ..HostState::default()
        };
        assert_eq!(Plan::new(&off, L1tf::Auto), Plan::default());
    }

    /// A kernel without mitigations still has IA32_SPEC_CTRL, which guests use.
    #[test]
    fn spec_ctrl_is_switched_wherever_it_is() {
        let host = HostState {
            spec_ctrl: true,
            mitigations_off: true,
            ..HostState::default()
        };
        let plan = Plan::new(&host, L1tf::Auto);
        assert_eq!(plan.switch, switch::SPEC_CTRL);
        assert!(plan.is_guarded());
    }

    #[test]
    fn no_barrier_where_the_cpu_has_none() {
        let none = HostState { ibpb: false, ..NEW };
        assert!(!Plan::new(&none, L1tf::Auto).ibpb_between_vcpus);
    }
}
