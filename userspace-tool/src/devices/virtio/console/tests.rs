// SPDX-License-Identifier: GPL-2.0

use std::os::unix::net::UnixStream;

use super::super::tests::{self, Driver, BUFFERS};
use super::*;
use vm_memory::{Bytes, GuestAddress};

fn keyboard() -> Keyboard {
    Keyboard::new(Wake::new().unwrap()).unwrap()
}

fn output(file: std::fs::File) -> Output {
    let wake = Wake::new().unwrap();
    let control = crate::machine::Control::new().0;
    let output = Output::new(wake, Some(file), false, control);
    output.start().unwrap();
    output
}

fn console() -> (Driver, Keyboard, UnixStream) {
    let keyboard = keyboard();
    let (screen, file) = UnixStream::pair().unwrap();
    let output = output(std::os::fd::OwnedFd::from(file).into());
    let console = Console::new(keyboard.clone(), output);
    (Driver::new(Box::new(console)), keyboard, screen)
}

#[test]
fn what_the_guest_writes_is_shown() {
    let (mut driver, _, mut screen) = console();
    let long = [&[b'x'; 10_000][..], b"\n"].concat();
    driver.request(1, &[b"hello, ", b"world\n"], 0);
    driver.request(1, &[&long], 0);
    let mut shown = vec![0; 13 + long.len()];
    screen.read_exact(&mut shown).unwrap();
    assert_eq!(shown, [b"hello, world\n", &long[..]].concat());
}

#[test]
fn what_is_typed_waits_for_the_guest() {
    let (mut driver, keyboard, _screen) = console();
    let mut typed: VecDeque<u8> = b"one two".iter().copied().collect();
    keyboard.take(&mut typed);
    assert!(typed.is_empty());
    driver.serve_source();
    // More is taken when the guest has what was typed before.
    typed.extend(b"three");
    keyboard.take(&mut typed);
    assert_eq!(typed.len(), 5);
    assert_eq!(driver.request(0, &[], 4), (4, b"one ".to_vec()));
    assert_eq!(driver.request(0, &[], 64).0, 3);
    keyboard.take(&mut typed);
    driver.put_descriptor(0, 0, BUFFERS, 64, 2, 0);
    driver.offer(0, 0);
    driver.serve_source();
    assert_eq!(driver.used(0), 3);
    let mut bytes = [0; 5];
    driver
        .memory
        .read_slice(&mut bytes, GuestAddress(BUFFERS))
        .unwrap();
    assert_eq!(&bytes, b"three");
}

#[test]
fn hostile_rings_do_no_harm() {
    tests::torture(|| {
        let null = std::fs::OpenOptions::new()
            .write(true)
            .open("/dev/null")
            .unwrap();
        let keyboard = keyboard();
        keyboard.take(&mut b"typed".iter().copied().collect());
        Box::new(Console::new(keyboard, output(null)))
    });
}
