// SPDX-License-Identifier: GPL-2.0

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixDatagram, UnixStream};

use rustix::event::{poll, PollFd, PollFlags, Timespec};
use rustix::process::Uid;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::super::{LONGEST_FRAME, SHORTEST_FRAME};
use super::*;

fn options(text: &str) -> NetOptions {
    NetOptions::parse(text).expect("it is right")
}

fn open(text: &str) -> (Link, Mac) {
    Link::open(&options(text), "test", 0).expect("it opens")
}

fn at(folder: &tempfile::TempDir) -> String {
    format!("socket={}", folder.path().join("link").display())
}

fn packet(byte: u8, length: usize) -> Vec<u8> {
    let mut packet = vec![0; HEADER];
    packet.resize(HEADER + length, byte);
    packet
}

/// Whether the link has something to do, within so many milliseconds.
fn is_ready(link: &Link, milliseconds: i64) -> bool {
    let timeout = Timespec {
        tv_sec: milliseconds / 1000,
        tv_nsec: milliseconds % 1000 * 1_000_000,
    };
    poll(&mut [PollFd::new(link, PollFlags::IN)], Some(&timeout)).expect("poll") == 1
}

fn frame(link: &mut Link) -> Option<Vec<u8>> {
    link.accept();
    let frame = link.front().map(|(header, frame)| {
        assert_eq!(header, [0; HEADER]);
        frame.to_vec()
    });
    link.take();
    frame
}

#[test]
fn two_machines_meet_at_a_path() {
    let folder = tempfile::tempdir().expect("a folder");
    let (mut first, first_mac) = open(&at(&folder));
    assert!(!is_ready(&first, 0));
    assert!(first.send(&mut packet(1, 60)), "what nobody gets is lost");
    let (mut second, second_mac) = open(&at(&folder));
    assert_ne!(first_mac, second_mac);
    assert!(is_ready(&first, 1000));
    assert_eq!(frame(&mut first), None);
    assert!(!is_ready(&first, 0), "it is let in");

    for length in [SHORTEST_FRAME, 60, 1514, LONGEST_FRAME] {
        assert!(first.send(&mut packet(length as u8, length)));
        assert!(is_ready(&second, 1000));
        assert_eq!(frame(&mut second), Some(vec![length as u8; length]));
        assert!(second.send(&mut packet(7, length)));
        assert_eq!(frame(&mut first), Some(vec![7; length]));
    }
    assert_eq!(frame(&mut second), None);
    assert!(!is_ready(&second, 0));

    // The one that waits lets another in; the one that came has lost its place.
    drop(second);
    assert!(is_ready(&first, 1000));
    assert_eq!(frame(&mut first), None);
    let (mut third, _) = open(&at(&folder));
    assert!(is_ready(&first, 1000));
    first.accept();
    assert!(first.send(&mut packet(3, 60)));
    assert_eq!(frame(&mut third), Some(vec![3; 60]));
    drop(first);
    assert!(!folder.path().join("link").exists());
    assert_eq!(frame(&mut third), None);
    assert!(!is_ready(&third, 10), "an end is told once");
    assert!(third.send(&mut packet(3, 60)));
}

#[test]
fn a_full_link_says_so_and_loses_nothing() {
    let folder = tempfile::tempdir().expect("a folder");
    let (mut first, _) = open(&at(&folder));
    let (mut second, _) = open(&at(&folder));
    first.accept();
    let length = |number: usize| 1000 + number % 5000;
    let mut sent = 0;
    while first.send(&mut packet(sent as u8, length(sent))) {
        sent += 1;
        assert!(sent < 100_000, "it never fills up");
    }
    assert!(!is_ready(&first, 0));
    let mut got = 0;
    while got < sent {
        match frame(&mut second) {
            Some(frame) => {
                assert_eq!(frame, vec![got as u8; length(got)]);
                got += 1;
            }
            // Half of a frame is there.
            None => {
                assert!(is_ready(&first, 1000));
                first.flush();
            }
        }
    }
    assert!(first.send(&mut packet(9, 60)));
    assert_eq!(frame(&mut second), Some(vec![9; 60]));
}

#[test]
fn a_peer_that_sends_no_frames_is_gone() {
    for nonsense in [&[0; 4][..], &[0, 0, 0, 13], &[0xff; 4], &[0, 1, 0, 19]] {
        let folder = tempfile::tempdir().expect("a folder");
        let (mut link, _) = open(&at(&folder));
        let mut peer = UnixStream::connect(folder.path().join("link")).expect("a connection");
        assert_eq!(frame(&mut link), None);
        peer.write_all(&[0, 0, 0, 14]).expect("a frame");
        peer.write_all(&[5; 14]).expect("a frame");
        peer.write_all(nonsense).expect("nonsense");
        assert_eq!(frame(&mut link), Some(vec![5; 14]));
        assert_eq!(frame(&mut link), None);
        assert_eq!(peer.read(&mut [0]).expect("an end"), 0, "{nonsense:x?}");
    }
}

#[test]
fn frames_come_in_pieces() {
    let folder = tempfile::tempdir().expect("a folder");
    let (mut link, _) = open(&at(&folder));
    let mut peer = UnixStream::connect(folder.path().join("link")).expect("a connection");
    let mut bytes = Vec::new();
    for number in 0..40_u8 {
        let length = 14 + usize::from(number) * 37;
        bytes.extend_from_slice(&(length as u32).to_be_bytes());
        bytes.resize(bytes.len() + length, number);
    }
    let mut got = 0;
    for piece in bytes.chunks(7) {
        peer.write_all(piece).expect("a piece");
        while let Some(frame) = frame(&mut link) {
            assert_eq!(frame, vec![got; 14 + usize::from(got) * 37]);
            got += 1;
        }
    }
    assert_eq!(got, 40);
}

#[test]
fn what_is_at_the_path_is_looked_at() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("link");
    let refused = || match Link::open(&options(&at(&folder)), "test", 0) {
        Ok(_) => panic!("it opened"),
        Err(error) => error.to_string(),
    };
    fs::write(&path, "precious").expect("a file");
    assert!(refused().contains("that file is no socket; give a path"));
    assert_eq!(fs::read(&path).expect("the file"), b"precious");
    fs::remove_file(&path).expect("the file");
    // Another kind of socket is nobody's to take.
    let other = UnixDatagram::bind(&path).expect("a socket");
    assert!(refused().contains("give a path"));
    drop(other);
    // One that a killed machine left is.
    drop(open(&at(&folder)));
    let folder = tempfile::tempdir().expect("a folder");
    drop(UnixListener::bind(folder.path().join("link")).expect("a socket"));
    assert!(folder.path().join("link").exists());
    drop(open(&at(&folder)));
    let missing = options("socket=/nowhere/link");
    let error = Link::open(&missing, "test", 0)
        .err()
        .expect("no folder")
        .to_string();
    assert!(error.contains("/nowhere/link: No such file"), "{error}");
}

#[test]
fn of_machines_that_start_at_once_one_waits_and_the_others_come() {
    for _ in 0..20 {
        let folder = tempfile::tempdir().expect("a folder");
        // All of them find one that a killed machine left.
        drop(UnixListener::bind(folder.path().join("link")).expect("a socket"));
        let text = at(&folder);
        let links: Vec<Link> = thread::scope(|scope| {
            let starts = [(); 8].map(|()| scope.spawn(|| open(&text).0));
            let ends = starts.map(|start| start.join().expect("a machine"));
            ends.into()
        });
        let waiting = links.iter().filter(|link| link.listener.is_some()).count();
        assert_eq!(waiting, 1);
    }
}

/// The lock is the folder's own: it is the same for all who may meet there, whoever and wherever they are.
#[test]
fn one_at_a_time_looks_who_is_there() {
    let folder = tempfile::tempdir().expect("a folder");
    let turn = File::open(folder.path()).expect("the folder");
    flock(&turn, FlockOperation::LockExclusive).expect("a lock");
    let text = at(&folder);
    thread::scope(|scope| {
        let start = scope.spawn(|| open(&text).0);
        thread::sleep(TURN / 4);
        assert!(!folder.path().join("link").exists());
        drop(turn);
        assert!(start.join().expect("a machine").listener.is_some());
    });
}

#[test]
fn nobody_waits_for_a_turn_for_ever() {
    let folder = tempfile::tempdir().expect("a folder");
    let turn = File::open(folder.path()).expect("the folder");
    flock(&turn, FlockOperation::LockShared).expect("a lock");
    let error = Link::open(&options(&at(&folder)), "test", 0).err();
    let error = error.expect("it is locked").to_string();
    assert!(error.contains("is locked by another process; "), "{error}");
    assert!(!folder.path().join("link").exists());
}

/// Its path was removed, and another one waits there.
#[test]
fn one_that_ends_removes_nobody_elses_place() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("link");
    let (first, _) = open(&at(&folder));
    fs::remove_file(&path).expect("its path");
    let (other, _) = open(&at(&folder));
    drop(first);
    assert!(path.exists());
    drop(other);
    assert!(!path.exists());
}

#[test]
fn a_place_that_is_full_holds_nobody_up() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("link");
    let listener = UnixListener::bind(&path).expect("a socket");
    rustix::net::listen(&listener, 0).expect("room for one");
    let _waits = UnixStream::connect(&path).expect("a connection");
    let error = Link::open(&options(&at(&folder)), "test", 0).err();
    let error = error.expect("there is no room").to_string();
    assert!(
        error.contains("others wait there already; give another PATH"),
        "{error}"
    );
}

#[test]
fn another_users_machine_is_not_joined() {
    if !geteuid().is_root() {
        println!("SKIP: becoming another user takes root");
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("link");
    std::os::unix::fs::chown(folder.path(), Some(4321), None).expect("giving it away");
    let listening = path.clone();
    // The identity is the thread's own.
    let listener = thread::spawn(move || {
        rustix::thread::set_thread_res_uid(Uid::ROOT, Uid::from_raw(4321), Uid::ROOT)
            .expect("another identity");
        UnixListener::bind(listening).expect("a socket")
    })
    .join()
    .expect("the other user");
    let error = Link::open(&options(&at(&folder)), "test", 0).err();
    let error = error.expect("it is another user's").to_string();
    assert!(error.contains("another user waits there"), "{error}");
    drop(listener);
    // Nor is it let in.
    fs::remove_file(&path).expect("the socket");
    let (mut link, _) = open(&at(&folder));
    std::os::unix::fs::chown(&path, Some(4321), None).expect("giving it away");
    // As a device's worker looks at it.
    let events = Epoll::new().expect("an epoll instance");
    let edges = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, 0);
    events
        .ctl(ControlOperation::Add, link.as_fd().as_raw_fd(), edges)
        .expect("it can be watched");
    let there = path.clone();
    let mut strangers = thread::spawn(move || {
        rustix::thread::set_thread_res_uid(Uid::ROOT, Uid::from_raw(4321), Uid::ROOT)
            .expect("another identity");
        let comers = (0..3 * COMERS).map(|_| UnixStream::connect(&there).expect("a connection"));
        comers.collect::<Vec<_>>()
    })
    .join()
    .expect("the other user");
    // Who comes behind is.
    let mut peer = UnixStream::connect(path).expect("a connection");
    peer.write_all(&[0, 0, 0, 14]).expect("a frame");
    peer.write_all(&[5; 14]).expect("a frame");
    let looks = std::iter::from_fn(|| {
        let told = events.wait(1000, &mut [EpollEvent::default()]);
        (told.expect("a wait") == 1).then(|| frame(&mut link))
    });
    assert_eq!(looks.flatten().next(), Some(vec![5; 14]));
    for stranger in &mut strangers {
        assert_eq!(stranger.read(&mut [0]).expect("an end"), 0);
    }
}

#[test]
fn a_port_that_is_taken_is_named() {
    let taken = std::net::TcpListener::bind("0.0.0.0:0").expect("a port");
    let port = taken.local_addr().expect("its number").port();
    let error = Link::open(&options(&format!("user,forward={port}:80")), "test", 0).err();
    let error = error.expect("the port is taken").to_string();
    assert!(error.contains(&format!("port {port}: Address")), "{error}");
}
