// SPDX-License-Identifier: GPL-2.0

//! The entropy device (virtio 1.3, 5.4): random bytes from the host's kernel.

use std::io::Write;

use rustix::rand::{getrandom, GetRandomFlags};
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;

use super::{Device, Fault, Rings};
use crate::error::Error;

/// The most bytes that one buffer gets.
const MOST: usize = 256;

/// The entropy device.
pub struct Rng;

impl Device for Rng {
    fn id(&self) -> u32 {
        VIRTIO_ID_RNG
    }

    fn name(&self) -> String {
        "rng".into()
    }

    fn queue_sizes(&self) -> &[u16] {
        &[64]
    }

    fn process(&mut self, queue: usize, rings: &mut Rings<'_>) -> Result<(), Fault> {
        while let Some(chain) = rings.pop(queue)? {
            let mut bytes = [0; MOST];
            let count = getrandom(&mut bytes, GetRandomFlags::empty())
                .map_err(|error| Error::call("getting random bytes", error))?;
            let mut writer = chain.clone().writer(rings.memory())?;
            let written = writer.write(&bytes[..count]).unwrap_or(0);
            rings.push(queue, &chain, written as u32)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{self, Driver};
    use super::*;

    #[test]
    fn buffers_come_back_filled() {
        let mut driver = Driver::new(Box::new(Rng));
        let first = driver.request(0, &[], 64);
        assert_eq!((first.0, first.1.len()), (64, 64));
        let second = driver.request(0, &[], 1000);
        assert_eq!(second.0, MOST as u32);
        assert_ne!(first.1[..64], second.1[..64]);
    }

    #[test]
    fn hostile_rings_do_no_harm() {
        tests::torture(|| Box::new(Rng));
    }
}
