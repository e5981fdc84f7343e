// SPDX-License-Identifier: GPL-2.0

//! The network card (virtio 1.3, 5.1), with one pair of queues, joined to a [`Link`].

use std::cell::Cell;
use std::io::{Read, Write};
use std::os::fd::{AsFd, BorrowedFd};

use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::{VIRTIO_NET_F_MAC, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_STATUS};

use super::{bit, broken, Counter, Device, Fault, Rings};
use crate::net::{Link, Mac, HEADER, LONGEST_FRAME, SHORTEST_FRAME};

const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
/// Where in the header the number of buffers stands that a frame lies in, 16 bits.
const NUMBER_OF_BUFFERS: std::ops::Range<usize> = 10..12;
/// The most buffers that a frame is put into, which one call can take: the longest one in buffers of 1,536 bytes
/// takes 43.
const MOST_BUFFERS: usize = 48;

/// The network card.
pub struct Net {
    number: usize,
    mac: Mac,
    link: Link,
    /// The driver takes a frame in several buffers.
    mergeable: bool,
    /// Whether somebody is at the other end, as the driver was told last.
    told: Option<bool>,
    /// The driver reads that.
    reads_status: bool,
    /// It has not read yet that who was there is gone.
    unread: Cell<bool>,
    /// The frame that is sent, behind its header.
    packet: Box<[u8]>,
    counters: Counters,
}

/// What a card counts: the frames that the guest was given and those that it has sent, lost ones too, and their bytes.
#[derive(Default)]
struct Counters {
    received: Counter,
    received_bytes: Counter,
    sent: Counter,
    sent_bytes: Counter,
}

/// What became of a frame that has come.
enum Placed {
    /// The guest has it.
    Given,
    /// The guest can't have it.
    Lost,
    /// There is no room now.
    Waits,
}

impl Net {
    /// Card `number` of the machine, with the address `mac`, joined to `link`.
    #[must_use]
    pub fn new(number: usize, mac: Mac, link: Link) -> Self {
        Self {
            number,
            mac,
            link,
            mergeable: false,
            told: None,
            reads_status: false,
            unread: Cell::new(false),
            packet: vec![0; HEADER + LONGEST_FRAME].into_boxed_slice(),
            counters: Counters::default(),
        }
    }

    /// Sends what the guest has made available, behind what is left of the frame before.
    fn transmit(&mut self, rings: &mut Rings<'_>) -> Result<(), Fault> {
        self.link.flush();
        while let Some(chain) = rings.pop(TRANSMIT)? {
            let mut reader = chain.clone().reader(rings.memory())?;
            // What is longer than any frame is lost.
            if let Some(packet) = self.packet.get_mut(..reader.available_bytes()) {
                reader.read_exact(packet).map_err(broken)?;
                let length = packet.len().checked_sub(HEADER);
                let length = length.filter(|length| *length >= SHORTEST_FRAME);
                if !self.link.send(packet) {
                    rings.put_back(TRANSMIT);
                    return Ok(());
                }
                if let Some(length) = length {
                    self.counters.sent.add(1);
                    self.counters.sent_bytes.add(length as u64);
                }
            }
            rings.push(TRANSMIT, &chain, 0)?;
        }
        Ok(())
    }

    /// Gives the guest what has come, as far as it has made room.
    fn receive(&mut self, rings: &mut Rings<'_>) -> Result<(), Fault> {
        while let Some((header, frame)) = self.link.front() {
            let length = frame.len() as u64;
            match place(rings, self.mergeable, header, frame)? {
                Placed::Given => {
                    self.counters.received.add(1);
                    self.counters.received_bytes.add(length);
                }
                Placed::Lost => {}
                Placed::Waits => break,
            }
            self.link.take();
        }
        Ok(())
    }
}

/// Puts a frame into the buffers that the guest has made available.
fn place(
    rings: &mut Rings<'_>,
    mergeable: bool,
    mut header: [u8; HEADER],
    frame: &[u8],
) -> Result<Placed, Fault> {
    // A driver may be able to offer fewer: its chains may have several descriptors each. A frame that is too long for
    // all of those waits for ever, as do those behind it: that driver's own loss.
    let most = match mergeable {
        true => MOST_BUFFERS.min(rings.size(RECEIVE)),
        false => 1,
    };
    let wanted = HEADER + frame.len();
    let mut buffers = Vec::with_capacity(1);
    let mut room = 0_usize;
    let outcome = loop {
        if room >= wanted {
            break None;
        }
        if buffers.len() == most {
            break Some(Placed::Lost);
        }
        let Some(chain) = rings.pop(RECEIVE)? else {
            break Some(Placed::Waits);
        };
        let writer = chain.clone().writer(rings.memory())?;
        room = room.saturating_add(writer.available_bytes());
        buffers.push((chain, writer));
    };
    if let Some(outcome) = outcome {
        buffers.iter().for_each(|_| rings.put_back(RECEIVE));
        return Ok(outcome);
    }
    header[NUMBER_OF_BUFFERS].copy_from_slice(&(buffers.len() as u16).to_le_bytes());
    let mut parts = [&header[..], frame];
    let mut used = Vec::with_capacity(buffers.len());
    for (chain, mut writer) in buffers {
        for part in &mut parts {
            let (now, later) = part.split_at(part.len().min(writer.available_bytes()));
            writer.write_all(now).map_err(broken)?;
            *part = later;
        }
        used.push((chain, writer.bytes_written() as u32));
    }
    rings.push_all(RECEIVE, &used)?;
    Ok(Placed::Given)
}

impl Device for Net {
    fn id(&self) -> u32 {
        VIRTIO_ID_NET
    }

    fn name(&self) -> String {
        format!("network card {}", self.number)
    }

    fn features(&self) -> u64 {
        bit(VIRTIO_NET_F_MAC)
            | bit(VIRTIO_NET_F_MRG_RXBUF)
            | bit(VIRTIO_NET_F_STATUS)
            | self.link.features()
    }

    fn queue_sizes(&self) -> &[u16] {
        &[256, 256]
    }

    fn config(&self) -> Vec<u8> {
        // VIRTIO_NET_S_LINK_UP is bit 0.
        let status = u16::from(self.link.is_up());
        if self.unread.replace(false) {
            self.link.look_again();
        }
        [&self.mac.bytes()[..], &status.to_le_bytes()].concat()
    }

    fn activate(&mut self, features: u64) {
        self.mergeable = features & bit(VIRTIO_NET_F_MRG_RXBUF) != 0;
        self.reads_status = features & bit(VIRTIO_NET_F_STATUS) != 0;
        self.told = None;
        self.unread.set(false);
        self.link.accept_features(features);
    }

    fn reset(&mut self) {
        self.activate(0);
    }

    fn process(&mut self, queue: usize, rings: &mut Rings<'_>) -> Result<(), Fault> {
        // A driver that did not see the link go down would take another machine for the one that was there.
        if !self.unread.get() {
            self.link.accept();
        }
        match queue {
            TRANSMIT => self.transmit(rings)?,
            _ => self.receive(rings)?,
        }
        let up = self.link.is_up();
        let told = self.told.replace(up);
        if told != Some(up) {
            self.unread.set(self.reads_status && told == Some(true));
            rings.config_changed();
        }
        Ok(())
    }

    fn counters(&self) -> Vec<(&'static str, Counter)> {
        let counters = &self.counters;
        vec![
            ("received_frames", counters.received.clone()),
            ("received_bytes", counters.received_bytes.clone()),
            ("sent_frames", counters.sent.clone()),
            ("sent_bytes", counters.sent_bytes.clone()),
        ]
    }

    fn source(&self) -> Option<BorrowedFd<'_>> {
        Some(self.link.as_fd())
    }
}

#[cfg(test)]
mod tests;
