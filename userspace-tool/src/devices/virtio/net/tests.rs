// SPDX-License-Identifier: GPL-2.0

use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;

use super::super::tests::{self, Driver, BUFFERS};
use super::*;
use crate::net::NetOptions;
use virtio_bindings::virtio_mmio as register;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

const WRITE: u16 = 2;

/// A card with its driver, and the other end of its link, which sends and gets frames behind their length.
fn card() -> (Driver, UnixStream) {
    let (driver, [peer], _) = card_with();
    (driver, peer)
}

/// The same with several that want to be the other end, and the link's file.
fn card_with<const N: usize>() -> (Driver, [UnixStream; N], OwnedFd) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("link");
    let options = NetOptions::parse(&format!("socket={}", path.display())).unwrap();
    let (link, mac) = Link::open(&options, "test", 0).unwrap();
    let peers = [(); N].map(|()| {
        let peer = UnixStream::connect(&path).unwrap();
        // A frame that does not come fails the test.
        let patience = std::time::Duration::from_secs(10);
        peer.set_read_timeout(Some(patience)).unwrap();
        peer
    });
    let file = link.as_fd().try_clone_to_owned().unwrap();
    (Driver::new(Box::new(Net::new(0, mac, link))), peers, file)
}

fn send(peer: &mut UnixStream, frame: &[u8]) {
    peer.write_all(&(frame.len() as u32).to_be_bytes()).unwrap();
    peer.write_all(frame).unwrap();
}

fn get(peer: &mut UnixStream) -> Vec<u8> {
    let mut length = [0; 4];
    peer.read_exact(&mut length).unwrap();
    let mut frame = vec![0; u32::from_be_bytes(length) as usize];
    peer.read_exact(&mut frame).unwrap();
    frame
}

fn frame(length: usize) -> Vec<u8> {
    (0..length)
        .map(|number| number as u8 ^ (number >> 8) as u8)
        .collect()
}

/// Offers so many buffers of `length` bytes, one behind the other, from descriptor 0 on.
fn offer(driver: &mut Driver, count: u16, length: u32) {
    for index in 0..count {
        let address = BUFFERS + u64::from(index) * u64::from(length);
        driver.put_descriptor(RECEIVE, index, address, length, WRITE, 0);
        driver.offer(RECEIVE, index);
    }
}

fn received(driver: &Driver, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    driver
        .memory
        .read_slice(&mut bytes, GuestAddress(BUFFERS))
        .unwrap();
    bytes
}

#[test]
fn frames_go_out_whole_and_without_their_header() {
    let (mut driver, mut peer) = card();
    for length in [14, 60, 1514, LONGEST_FRAME] {
        let frame = frame(length);
        let (head, tail) = frame.split_at(length / 2);
        let used = driver.request(TRANSMIT, &[&[0; HEADER], head, tail], 0);
        assert_eq!(used.0, 0);
        assert_eq!(get(&mut peer), frame);
    }
    // What is no frame is lost, and the next one is not.
    for wrong in [0, 5, HEADER, HEADER + 13, HEADER + LONGEST_FRAME + 1] {
        driver.request(TRANSMIT, &[&vec![0; wrong]], 0);
    }
    driver.request(TRANSMIT, &[&[0; HEADER], &frame(20)], 0);
    assert_eq!(get(&mut peer), frame(20));
    assert!(!driver.needs_reset());
    let bytes = (14 + 60 + 1514 + LONGEST_FRAME + 20) as u64;
    assert_eq!(
        driver.counted(),
        [("sent_frames", 5), ("sent_bytes", bytes)]
    );
}

/// Serves what has come from the link. The link's state, and the interrupt about it where the driver
/// has got one since.
fn status(driver: &Driver) -> (u32, u32) {
    driver.serve_source();
    let interrupts = driver.read(register::VIRTIO_MMIO_INTERRUPT_STATUS);
    driver.write(register::VIRTIO_MMIO_INTERRUPT_ACK, interrupts);
    let mut status = [0; 2];
    let at = register::VIRTIO_MMIO_CONFIG + 6;
    driver.transport.read(at.into(), &mut status);
    let interrupts = interrupts & register::VIRTIO_MMIO_INT_CONFIG;
    (u16::from_le_bytes(status).into(), interrupts)
}

#[test]
fn the_driver_is_told_who_comes_and_goes() {
    let (mut driver, peer) = card();
    assert_eq!(status(&driver), (1, register::VIRTIO_MMIO_INT_CONFIG));
    assert_eq!(status(&driver), (1, 0));
    drop(peer);
    assert_eq!(status(&driver), (0, register::VIRTIO_MMIO_INT_CONFIG));
    assert_eq!(status(&driver), (0, 0));
    // A driver that is new, or was restored with another link, is told in any case.
    driver.set_up(u64::MAX);
    assert_eq!(status(&driver), (0, register::VIRTIO_MMIO_INT_CONFIG));
}

/// A driver that reads "up" again has seen nothing: whoever waits for the place takes it when the driver has read "down".
#[test]
fn the_driver_is_told_of_one_that_takes_anothers_place() {
    // As a device's worker looks at it.
    let events = Epoll::new().unwrap();
    let edges = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, 0);
    let is_told = || events.wait(0, &mut [EpollEvent::default()]).unwrap() == 1;
    let watch = |file: &OwnedFd| events.ctl(ControlOperation::Add, file.as_raw_fd(), edges);
    let (mut driver, [peer, mut next], file) = card_with();
    watch(&file).unwrap();
    assert_eq!(status(&driver), (1, register::VIRTIO_MMIO_INT_CONFIG));
    drop(peer);
    while is_told() {
        driver.serve_source();
    }
    driver.serve_source();
    driver.request(TRANSMIT, &[&[0; HEADER], &frame(60)], 0);
    assert_eq!(status(&driver), (0, register::VIRTIO_MMIO_INT_CONFIG));
    assert!(is_told());
    assert_eq!(status(&driver), (1, register::VIRTIO_MMIO_INT_CONFIG));
    driver.request(TRANSMIT, &[&[0; HEADER], &frame(61)], 0);
    assert_eq!(get(&mut next), frame(61), "what nobody gets is lost");

    // A driver that does not read it is waited for by nobody.
    let (mut driver, [peer, mut next], file) = card_with();
    watch(&file).unwrap();
    driver.set_up(!(1 << VIRTIO_NET_F_STATUS));
    driver.serve_source();
    drop(peer);
    assert!(is_told());
    driver.request(TRANSMIT, &[&[0; HEADER], &frame(60)], 0);
    assert!(is_told());
    driver.serve_source();
    driver.request(TRANSMIT, &[&[0; HEADER], &frame(61)], 0);
    assert_eq!(get(&mut next), frame(61));
}

#[test]
fn a_frame_waits_for_a_buffer() {
    let (mut driver, mut peer) = card();
    driver.serve(RECEIVE);
    send(&mut peer, &frame(60));
    send(&mut peer, &frame(61));
    driver.serve(RECEIVE);
    assert_eq!(driver.used(RECEIVE), 0);
    offer(&mut driver, 1, 2048);
    driver.serve(RECEIVE);
    assert_eq!(driver.used(RECEIVE), 1);
    assert_eq!(driver.used_element(RECEIVE, 0), (0, (HEADER + 60) as u32));
    let bytes = received(&driver, HEADER + 60);
    assert_eq!(bytes[..HEADER], [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
    assert_eq!(bytes[HEADER..], frame(60));
    offer(&mut driver, 1, 2048);
    driver.serve(RECEIVE);
    assert_eq!(driver.used_element(RECEIVE, 1), (0, (HEADER + 61) as u32));
    assert_eq!(
        driver.counted(),
        [("received_frames", 2), ("received_bytes", 121)]
    );
}

#[test]
fn a_long_frame_takes_several_buffers() {
    let (mut driver, mut peer) = card();
    driver.serve(RECEIVE);
    let frame = frame(LONGEST_FRAME);
    let sent = frame.clone();
    let sender = std::thread::spawn(move || {
        send(&mut peer, &sent);
        peer
    });
    // All but one of the 43 that it takes: it waits for the last.
    offer(&mut driver, 42, 1536);
    let peer = loop {
        driver.serve(RECEIVE);
        if sender.is_finished() {
            break sender.join().unwrap();
        }
    };
    driver.serve(RECEIVE);
    assert_eq!(driver.used(RECEIVE), 0);
    driver.put_descriptor(RECEIVE, 42, BUFFERS + 42 * 1536, 1536, WRITE, 0);
    driver.offer(RECEIVE, 42);
    driver.serve(RECEIVE);
    assert_eq!(driver.used(RECEIVE), 43);
    let total = HEADER + LONGEST_FRAME;
    for index in 0..43_u16 {
        let length = (total - 1536 * usize::from(index)).min(1536);
        assert_eq!(
            driver.used_element(RECEIVE, index),
            (index.into(), length as u32)
        );
    }
    let bytes = received(&driver, total);
    assert_eq!(bytes[NUMBER_OF_BUFFERS], [43, 0]);
    assert!(bytes[HEADER..] == frame);
    drop(peer);
}

/// A queue that has all its buffers available gets no more: a frame that they have no room for does not hold up others.
#[test]
fn a_frame_longer_than_all_buffers_is_lost() {
    let (mut driver, mut peer) = card();
    driver.set_up_short(u64::MAX, 4);
    driver.serve(RECEIVE);
    offer(&mut driver, 4, 100);
    send(&mut peer, &frame(400));
    send(&mut peer, &frame(60));
    driver.serve(RECEIVE);
    assert_eq!(driver.used_element(RECEIVE, 0), (0, (HEADER + 60) as u32));
}

#[test]
fn a_driver_that_polls_is_not_interrupted_by_several_buffers_either() {
    let (mut driver, mut peer) = card();
    driver.set_up(!(1 << 29));
    driver.serve(RECEIVE);
    for flags in [1, 0] {
        driver.set_flags(RECEIVE, flags);
        while driver.transport.interrupted() {}
        send(&mut peer, &frame(300));
        let before = driver.used(RECEIVE);
        offer(&mut driver, 4, 100);
        driver.serve(RECEIVE);
        assert_eq!(driver.used(RECEIVE) - before, 4);
        assert_eq!(driver.transport.interrupted(), flags == 0);
    }
}

#[test]
fn who_takes_no_several_buffers_gets_frames_that_fit() {
    let (mut driver, mut peer) = card();
    driver.set_up(!(1 << VIRTIO_NET_F_MRG_RXBUF));
    driver.serve(RECEIVE);
    offer(&mut driver, 2, 100);
    send(&mut peer, &frame(100 - HEADER + 1));
    send(&mut peer, &frame(100 - HEADER));
    driver.serve(RECEIVE);
    assert_eq!(driver.used(RECEIVE), 1);
    assert_eq!(driver.used_element(RECEIVE, 0), (0, 100));
    assert_eq!(received(&driver, 100)[HEADER..], frame(100 - HEADER));
}

#[test]
fn buffers_that_are_too_small_end_no_worker() {
    let (mut driver, mut peer) = card();
    driver.serve(RECEIVE);
    offer(&mut driver, 256, 1);
    send(&mut peer, &frame(60));
    send(&mut peer, &frame(MOST_BUFFERS - HEADER));
    driver.serve(RECEIVE);
    assert_eq!(usize::from(driver.used(RECEIVE)), MOST_BUFFERS);
    assert!(!driver.needs_reset());
}

#[test]
fn a_frame_that_has_no_room_on_the_link_is_sent_later() {
    let (mut driver, mut peer) = card();
    let number = |round: usize| frame(1000 + round);
    let mut rounds = 0;
    // Until one is not given back.
    loop {
        let before = driver.used(TRANSMIT);
        let packet = [vec![0; HEADER], number(rounds)].concat();
        driver
            .memory
            .write_slice(&packet, GuestAddress(BUFFERS))
            .unwrap();
        driver.put_descriptor(TRANSMIT, 0, BUFFERS, packet.len() as u32, 0, 0);
        driver.offer(TRANSMIT, 0);
        driver.serve(TRANSMIT);
        rounds += 1;
        assert!(rounds < 10_000);
        if driver.used(TRANSMIT) == before {
            break;
        }
    }
    for round in 0..rounds {
        assert_eq!(get(&mut peer), number(round), "frame {round} of {rounds}");
        driver.serve_source();
    }
    assert_eq!(usize::from(driver.used(TRANSMIT)), rounds);
}

#[test]
fn hostile_rings_do_no_harm() {
    let peers = std::cell::RefCell::new(Vec::new());
    tests::torture(|| {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("link");
        let options = NetOptions::parse(&format!("socket={}", path.display())).unwrap();
        let (link, mac) = Link::open(&options, "test", 0).unwrap();
        let mut peer = UnixStream::connect(path).unwrap();
        for length in [14, 60, 1514, 30_000] {
            send(&mut peer, &frame(length));
        }
        peers.borrow_mut().push(peer);
        Box::new(Net::new(0, mac, link))
    });
}
