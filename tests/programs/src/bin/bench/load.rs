// SPDX-License-Identifier: GPL-2.0
//! What runs inside the tool's machine: the load on its disk and its network, by the guest's TSC, which counts the
//! host's instructions as well as the guest's. And what answers it on the host.

use crate::tsc;
use rvisor_tests::{check, Context, Fail, Outcome};
use std::fs::OpenOptions;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream, UdpSocket};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

/// Where the host answers, by its TAP.
const HOST: &str = "10.1.0.1";
/// Its ports: datagrams come back, a stream goes nowhere, a stream comes.
const ECHO: u16 = 7;
const DISCARD: u16 = 9;
const SOURCE: u16 = 19;

const MIB: usize = 1 << 20;
const BLOCK: usize = 4096;
/// Size of a page table's large page. Memory that is one has no gaps, so that the disk's requests are always the same.
const LARGE: usize = 2 << 20;
/// Batches that the least is taken of, after one more for first faults and empty caches. Whether the host's scheduler
/// lets the device's thread preempt the guest's makes a tenth, and differs from batch to batch.
const BATCHES: usize = 16;
/// Requests or datagrams of a batch, and MiB.
const REQUESTS: usize = 32;
const MIBS: usize = 4;
/// Bytes of the disk that are used.
const DISK: usize = 16 * MIB;

/// How many rows were printed: what gets lost on the way is missed.
static ROWS: AtomicUsize = AtomicUsize::new(0);

fn row(name: &str, figure: u64) {
    ROWS.fetch_add(1, Ordering::Relaxed);
    println!("row\t{name}\t{figure}");
}

/// Instructions for one of the `count` in a batch, in the best batch.
fn least(count: usize, mut work: impl FnMut(usize) -> Outcome) -> Result<u64, Fail> {
    let mut best = u64::MAX;
    for batch in 0..=BATCHES {
        let start = tsc();
        (batch * count..(batch + 1) * count).try_for_each(&mut work)?;
        let one = (tsc() - start) / count as u64;
        if batch > 0 {
            best = best.min(one);
        }
    }
    Ok(best)
}

/// Inside the guest: the rows of `kinds`, all where none is named.
pub(crate) fn run(kinds: &[String]) -> Outcome {
    let wanted = |kind: &str| kinds.is_empty() || kinds.iter().any(|other| other == kind);
    if wanted("disk") {
        disk().map_err(|fail| fail.during("/dev/vda"))?;
    }
    if wanted("udp") {
        datagrams().map_err(|fail| fail.during("UDP"))?;
    }
    if wanted("sent") {
        row("guest's TCP, a MiB sent", stream(DISCARD, send)?);
    }
    if wanted("received") {
        row("guest's TCP, a MiB received", stream(SOURCE, receive)?);
    }
    println!("rows\t{}", ROWS.load(Ordering::Relaxed));
    Ok(())
}

fn disk() -> Outcome {
    let disk = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_DIRECT)
        .open("/dev/vda")?;
    let mut memory = vec![0x5a; 2 * LARGE];
    let skip = memory.as_ptr().align_offset(LARGE);
    let buffer = &mut memory[skip..skip + MIB];
    // As good as at random: no two in sequence.
    let place = |round: usize| ((round * 2_654_435_761) % (DISK / BLOCK) * BLOCK) as u64;
    let one = least(REQUESTS, |round| {
        Ok(disk.read_exact_at(&mut buffer[..BLOCK], place(round))?)
    })?;
    row("guest's disk, a random read of 4 KiB", one);
    let one = least(REQUESTS, |round| {
        Ok(disk.write_all_at(&buffer[..BLOCK], place(round))?)
    })?;
    row("guest's disk, a random write of 4 KiB", one);
    let sequence = |round: usize| (round * MIB % DISK) as u64;
    let one = least(MIBS, |round| {
        Ok(disk.read_exact_at(buffer, sequence(round))?)
    })?;
    row("guest's disk, a MiB read in sequence", one);
    let one = least(
        MIBS,
        |round| Ok(disk.write_all_at(buffer, sequence(round))?),
    )?;
    row("guest's disk, a MiB written in sequence", one);
    let one = least(REQUESTS, |round| {
        disk.write_all_at(&buffer[..BLOCK], place(round))?;
        Ok(disk.sync_data()?)
    })?;
    row("guest's disk, a write of 4 KiB and a flush", one);
    Ok(())
}

fn datagrams() -> Outcome {
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    socket.connect((HOST, ECHO))?;
    let mut bytes = [0x5a; 64];
    let one = least(REQUESTS, |_| {
        socket.send(&bytes)?;
        let count = socket.recv(&mut bytes)?;
        check!(count == bytes.len(), "{count} bytes came back");
        Ok(())
    })?;
    row("guest's UDP, 64 bytes and the answer", one);
    Ok(())
}

/// Instructions for a MiB of streams that `work` has to their ends.
fn stream(port: u16, work: fn(TcpStream) -> Outcome) -> Result<u64, Fail> {
    let one = least(1, |_| work(TcpStream::connect((HOST, port)).during("TCP")?))?;
    Ok(one / MIBS as u64)
}

/// Sends [`MIBS`] and waits until the other side has them all.
fn send(mut stream: TcpStream) -> Outcome {
    let bytes = vec![0x5a; 64 << 10];
    for _ in 0..MIBS * MIB / bytes.len() {
        stream.write_all(&bytes)?;
    }
    stream.shutdown(Shutdown::Write)?;
    receive_to_end(stream, 0)
}

/// Receives [`MIBS`].
fn receive(stream: TcpStream) -> Outcome {
    receive_to_end(stream, MIBS * MIB)
}

fn receive_to_end(mut stream: TcpStream, wanted: usize) -> Outcome {
    let mut bytes = vec![0; 64 << 10];
    let mut sum = 0;
    loop {
        match stream.read(&mut bytes)? {
            0 => break,
            count => sum += count,
        }
    }
    check!(sum == wanted, "{sum} bytes came, not {wanted}");
    Ok(())
}

/// On the host: answers until it is killed.
pub(crate) fn serve() -> Outcome {
    let echo = UdpSocket::bind((HOST, ECHO)).during("the port for datagrams")?;
    let discard = TcpListener::bind((HOST, DISCARD)).during("the port that discards")?;
    let source = TcpListener::bind((HOST, SOURCE)).during("the port that sends")?;
    thread::spawn(move || accept(&discard, |stream| receive_to_end(stream, MIBS * MIB)));
    thread::spawn(move || accept(&source, send));
    let mut bytes = [0; 2048];
    loop {
        let (count, from) = echo.recv_from(&mut bytes)?;
        echo.send_to(&bytes[..count], from)?;
    }
}

/// Serves one stream after the other. One that fails is the guest's to tell.
fn accept(listener: &TcpListener, work: fn(TcpStream) -> Outcome) {
    for stream in listener.incoming().flatten() {
        let _told_by_the_guest = work(stream);
    }
}
