// SPDX-License-Identifier: GPL-2.0

//! KVM_GET/SET_IRQCHIP and PIT2: the controllers' state, field by field.

use super::user;
use crate::{
    bindings as uapi,
    vm::{irqchip::now, machine::Vm},
};
use kernel::prelude::*;
use rvisor_core::irqchip::{
    ioapic::IoApicState,
    pic::{PicChip, PicState},
    pit::{ChannelState, PitState},
};

macro_rules! copy {
    ($from:expr => $to:ty { $($field:ident),* $(,)? }) => {
        {
            type To = $to;
            To { $($field: $from.$field,)* }
        }
    };
}

macro_rules! pic_fields {
    ($from:expr => $to:ty) => {
        copy!($from => $to {
            last_irr, irr, imr, isr, priority_add, irq_base, read_reg_select, poll, special_mask,
            init_state, auto_eoi, rotate_on_auto_eoi, special_fully_nested_mode, init4, elcr,
            elcr_mask,
        })
    };
}

macro_rules! channel_fields {
    ($from:expr => $to:ty) => {
        copy!($from => $to {
            count, latched_count, count_latched, status_latched, status, read_state, write_state,
            write_latch, rw_mode, mode, bcd, gate, count_load_time,
        })
    };
}

fn pic_of(chip_id: u32) -> Option<PicChip> {
    match chip_id {
        uapi::KVM_IRQCHIP_PIC_MASTER => Some(PicChip::Master),
        uapi::KVM_IRQCHIP_PIC_SLAVE => Some(PicChip::Slave),
        _ => None,
    }
}

/// Carries out KVM_GET_IRQCHIP.
pub(super) fn get_irqchip(vm: &Vm, argument: usize) -> Result<isize> {
    let mut state: uapi::kvm_irqchip = user::read(argument)?;
    let chip = vm.irqchip().ok_or(ENXIO)?;
    let chips = chip.chips.lock();
    if let Some(pic) = pic_of(state.chip_id) {
        let from = chips.pic.state(pic);
        state.chip.pic = pic_fields!(from => uapi::kvm_pic_state);
    } else if state.chip_id == uapi::KVM_IRQCHIP_IOAPIC {
        let from = chips.ioapic.state();
        let mut to = uapi::kvm_ioapic_state {
            base_address: from.base_address,
            ioregsel: from.select,
            id: from.id,
            irr: from.irr,
            ..Default::default()
        };
        for (entry, bits) in to.redirtbl.iter_mut().zip(from.redirection) {
            entry.bits = bits;
        }
        state.chip.ioapic = to;
    } else {
        return Err(EINVAL);
    }
    drop(chips);
    user::write(argument, &state)?;
    Ok(0)
}

/// Carries out KVM_SET_IRQCHIP.
pub(super) fn set_irqchip(vm: &Vm, argument: usize) -> Result<isize> {
    let state: uapi::kvm_irqchip = user::read(argument)?;
    let chip = vm.irqchip().ok_or(ENXIO)?;
    chip.with_chips(vm, |chips, deliver| {
        if let Some(pic) = pic_of(state.chip_id) {
            // SAFETY: All members of the union are integers and arrays of them.
            let from = unsafe { state.chip.pic };
            chips.pic.set_state(pic, &pic_fields!(from => PicState));
        } else if state.chip_id == uapi::KVM_IRQCHIP_IOAPIC {
            // SAFETY: As above.
            let from = unsafe { state.chip.ioapic };
            let mut to = IoApicState {
                base_address: from.base_address,
                select: from.ioregsel,
                id: from.id,
                irr: from.irr,
                redirection: [0; _],
            };
            for (bits, entry) in to.redirection.iter_mut().zip(from.redirtbl) {
                // SAFETY: As above.
                *bits = unsafe { entry.bits };
            }
            chips.ioapic.set_state(&to, |_, message| deliver(message));
        } else {
            return Err(EINVAL);
        }
        Ok(0)
    })
}

/// Carries out KVM_GET_PIT2.
pub(super) fn get_pit(vm: &Vm, argument: usize) -> Result<isize> {
    let chip = vm.irqchip().ok_or(ENXIO)?;
    let from = match &chip.chips.lock().pit {
        Some(pit) => pit.state(now()),
        None => return Err(ENXIO),
    };
    let mut to = uapi::kvm_pit_state2 {
        flags: from.flags,
        ..Default::default()
    };
    for (to, from) in to.channels.iter_mut().zip(from.channels) {
        *to = channel_fields!(from => uapi::kvm_pit_channel_state);
    }
    user::write(argument, &to)?;
    Ok(0)
}

/// Carries out KVM_SET_PIT2.
pub(super) fn set_pit(vm: &Vm, argument: usize) -> Result<isize> {
    let from: uapi::kvm_pit_state2 = user::read(argument)?;
    let chip = vm.irqchip().ok_or(ENXIO)?;
    let mut to = PitState {
        flags: from.flags,
        ..Default::default()
    };
    for (to, from) in to.channels.iter_mut().zip(from.channels) {
        *to = channel_fields!(from => ChannelState);
    }
    chip.with_chips(vm, |chips, _| match &mut chips.pit {
        Some(pit) => {
            pit.set_state(&to, now());
            Ok(0)
        }
        None => Err(ENXIO),
    })
}
