// SPDX-License-Identifier: GPL-2.0
//! The dirty log.

use crate::guests::{Guest, PAGE, PLACE};
use kvm_bindings as kb;
use rvisor_tests::mapping::Mapping;
use rvisor_tests::raw::ioctl_with;
use rvisor_tests::{check, check_eq, uapi, Device, Fail, Outcome};

pub(crate) fn dirty_log(device: &Device) -> Outcome {
    let guest = Guest::new(device)?;
    let memory = Mapping::anonymous(64 * PAGE)?;
    let flags = kb::KVM_MEM_LOG_DIRTY_PAGES;
    if let Err(fail) = guest
        .machine
        .set_slot(1, flags, PLACE, &memory, 0, 64 * PAGE)
    {
        return Err(Fail::skip(format!(
            "no slot with KVM_MEM_LOG_DIRTY_PAGES: {fail:?}"
        )));
    }
    let mut bitmap = [u64::MAX];
    let mut fetch = || -> Result<u64, Fail> {
        let mut log = kb::kvm_dirty_log {
            slot: 1,
            ..Default::default()
        };
        log.__bindgen_anon_1.dirty_bitmap = bitmap.as_mut_ptr().cast();
        ioctl_with(&guest.machine.vm, uapi::GET_DIRTY_LOG, &mut log)?;
        Ok(bitmap[0])
    };
    fetch()?;
    guest.read(PLACE + 5 * 4096)?;
    guest.write(PLACE + 4096, 1)?;
    guest.write(PLACE + 63 * 4096, 1)?;
    check_eq!(fetch()?, (1 << 63) | (1 << 1), "pages 1 and 63");
    check_eq!(fetch()?, 0, "once more");
    guest.write(PLACE + 4096, 2)?;
    check_eq!(fetch()?, 1 << 1, "page 1 again");
    check!(memory.read_u64(4096) == 2, "the memory");
    Ok(())
}
