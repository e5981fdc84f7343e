// SPDX-License-Identifier: GPL-2.0

//! The block device as a driver sees it, on files of both formats.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::process::Command;

use std::sync::{Mutex, MutexGuard};

use rustix::io::Errno;
use tempfile::TempDir;

use super::super::tests::{self, Driver, Numbers};
use super::*;
use crate::devices::lock;
use crate::size::MIB;

const SIZE: u64 = 8 * MIB;
const CLUSTER: u64 = 64 << 10;

/// A folder for a test. One test at a time has one: a process that another test starts would hold the locks of
/// its files for a moment.
struct Files(TempDir, #[allow(dead_code)] MutexGuard<'static, ()>);

impl Files {
    fn new() -> Self {
        static ALONE: Mutex<()> = Mutex::new(());
        Self(tempfile::tempdir().unwrap(), lock(&ALONE))
    }

    fn path(&self) -> PathBuf {
        self.0.path().join("disk")
    }

    fn raw(&self) -> Disk {
        let path = self.0.path().join("raw");
        let file = fs::File::create(&path).unwrap();
        file.set_len(SIZE).unwrap();
        disk(&path)
    }

    fn qcow2(&self) -> Disk {
        fs::write(self.path(), empty_qcow2()).unwrap();
        disk(&self.path())
    }
}

fn disk(path: &std::path::Path) -> Disk {
    Disk::parse(path.to_str().unwrap()).unwrap()
}

/// An empty qcow2 image of version 3: header, refcount table, refcount block and L1 table, a cluster each.
fn empty_qcow2() -> Vec<u8> {
    let mut image = vec![0; 4 * CLUSTER as usize];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"QFI\xfb\x00\x00\x00\x03");
    put(20, &16_u32.to_be_bytes());
    put(24, &SIZE.to_be_bytes());
    put(36, &1_u32.to_be_bytes());
    put(40, &(3 * CLUSTER).to_be_bytes());
    put(48, &CLUSTER.to_be_bytes());
    put(56, &1_u32.to_be_bytes());
    put(96, &4_u32.to_be_bytes());
    put(100, &104_u32.to_be_bytes());
    put(CLUSTER as usize, &(2 * CLUSTER).to_be_bytes());
    for cluster in 0..4 {
        put(2 * CLUSTER as usize + 2 * cluster, &1_u16.to_be_bytes());
    }
    image
}

fn head(kind: u32, sector: u64) -> [u8; 16] {
    let mut head = [0; 16];
    head[..4].copy_from_slice(&kind.to_le_bytes());
    head[8..].copy_from_slice(&sector.to_le_bytes());
    head
}

fn range(sector: u64, count: u32, flags: u32) -> [u8; 16] {
    let mut range = [0; 16];
    range[..8].copy_from_slice(&sector.to_le_bytes());
    range[8..12].copy_from_slice(&count.to_le_bytes());
    range[12..].copy_from_slice(&flags.to_le_bytes());
    range
}

fn start(disk: &Disk) -> Driver {
    Driver::new(Box::new(Block::open(disk).unwrap()))
}

/// A request that gives nothing but its status.
fn tell(driver: &mut Driver, kind: u32, sector: u64, data: &[u8]) -> u32 {
    let head = head(kind, sector);
    let parts = [head.as_slice(), data];
    let parts = &parts[..1 + usize::from(!data.is_empty())];
    let (written, bytes) = driver.request(0, parts, 1);
    assert_eq!(written, 1);
    bytes[0].into()
}

/// Reads so many bytes; none where the status is not good.
fn read(driver: &mut Driver, sector: u64, length: u32) -> Option<Vec<u8>> {
    let head = head(blk::VIRTIO_BLK_T_IN, sector);
    let (written, mut bytes) = driver.request(0, &[&head], length + 1);
    let status = bytes.pop().unwrap();
    (u32::from(status) == blk::VIRTIO_BLK_S_OK).then(|| {
        assert_eq!(written, length + 1);
        bytes
    })
}

const OK: u32 = blk::VIRTIO_BLK_S_OK;
const IOERR: u32 = blk::VIRTIO_BLK_S_IOERR;
const UNSUPP: u32 = blk::VIRTIO_BLK_S_UNSUPP;
const OUT: u32 = blk::VIRTIO_BLK_T_OUT;
const FLUSH: u32 = blk::VIRTIO_BLK_T_FLUSH;
const DISCARD: u32 = blk::VIRTIO_BLK_T_DISCARD;
const ZERO: u32 = blk::VIRTIO_BLK_T_WRITE_ZEROES;

/// What was written is read, now and by the next guest, byte for byte against a copy in memory.
fn writes_are_read(disk: &Disk) {
    let mut copy = vec![0; SIZE as usize];
    let mut numbers = Numbers(1);
    let mut driver = start(disk);
    for _ in 0..60 {
        let length = 512 * numbers.of(&[1, 2, 7, 8, 129, 300_u64]);
        let sector = numbers.next() % ((SIZE - length) / 512);
        let data: Vec<u8> = (0..length).map(|_| numbers.next() as u8).collect();
        let place = 512 * sector as usize..512 * sector as usize + length as usize;
        copy[place.clone()].copy_from_slice(&data);
        assert_eq!(tell(&mut driver, OUT, sector, &data), OK);
        assert_eq!(
            read(&mut driver, sector, length as u32).unwrap(),
            copy[place]
        );
    }
    assert_eq!(tell(&mut driver, FLUSH, 0, &[]), OK);
    for (kind, flags) in [(ZERO, 0), (ZERO, 1)] {
        let sector = numbers.next() % (SIZE / 512 - 700);
        copy[512 * sector as usize..][..512 * 700].fill(0);
        assert_eq!(tell(&mut driver, kind, 0, &range(sector, 700, flags)), OK);
    }
    // As after a crash of the tool: nothing is closed.
    assert_eq!(tell(&mut driver, FLUSH, 0, &[]), OK);
    let mut disk = disk.clone();
    disk.readonly = true;
    std::mem::drop(driver);
    let mut driver = start(&disk);
    for sector in (0..SIZE / 512).step_by(256) {
        let place = 512 * sector as usize..512 * (sector as usize + 256);
        assert!(
            read(&mut driver, sector, 512 * 256).unwrap() == copy[place],
            "sector {sector}"
        );
    }
}

#[test]
fn raw_writes_are_read() {
    writes_are_read(&Files::new().raw());
}

/// Has QEMU look for what is wrong with an image, and repair it. Says whether there was anything.
#[allow(clippy::print_stderr)]
fn qemu_check(path: &std::path::Path) -> bool {
    let mut check = Command::new("qemu-img");
    match check.args(["check", "-r", "all"]).arg(path).output() {
        Ok(output) => {
            assert!(output.status.success(), "{output:?}");
            !output.stderr.is_empty()
        }
        Err(error) => {
            eprintln!("SKIP the check of the image: qemu-img: {error}");
            false
        }
    }
}

/// Has QEMU read an image.
#[allow(clippy::print_stderr)]
fn qemu_compare(path: &std::path::Path, expected: &[u8]) {
    let raw = path.with_extension("expected");
    fs::write(&raw, expected).unwrap();
    let mut compare = Command::new("qemu-img");
    let compare = compare.args(["compare", "-f", "raw", "-F", "qcow2"]);
    match compare.args([&raw, path]).output() {
        Ok(output) => assert!(output.status.success(), "{output:?}"),
        Err(error) => eprintln!("SKIP the comparison of the image: qemu-img: {error}"),
    }
}

#[test]
fn qcow2_writes_are_read() {
    let files = Files::new();
    let disk = files.qcow2();
    writes_are_read(&disk);
    assert!(!qemu_check(&disk.path));
}

/// A copy of the file while the tool runs is what is left when it is killed. Such an image is not opened for
/// writing before it was repaired, and has all that was flushed.
#[test]
fn what_a_killed_tool_has_flushed_is_there() {
    let files = Files::new();
    let disk = files.qcow2();
    let copy = Disk {
        path: files.0.path().join("copy"),
        ..disk.clone()
    };
    let mut driver = start(&disk);
    let mut numbers = Numbers(3);
    // Before the first flush the image has a table whose room nobody counts.
    assert_eq!(tell(&mut driver, OUT, 0, &[1; 512]), OK);
    fs::copy(&disk.path, &copy.path).unwrap();
    let repaired = || {
        let error = Block::open(&copy).err().unwrap().to_string();
        assert!(error.contains("qemu-img check -r all"), "{error}");
        assert!(qemu_check(&copy.path));
        start(&copy);
    };
    repaired();
    // So it is with a table of the counts themselves.
    let mut image = empty_qcow2();
    image[2 * CLUSTER as usize + 5] = 0;
    fs::write(&copy.path, image).unwrap();
    repaired();
    for round in 1..20_u8 {
        assert_eq!(tell(&mut driver, OUT, 0, &[round; 512]), OK);
        assert_eq!(tell(&mut driver, FLUSH, 0, &[]), OK);
        let sector = numbers.next() % (SIZE / 512 - 200) + 1;
        assert_eq!(tell(&mut driver, OUT, sector, &[9; 39_936]), OK);
        fs::copy(&disk.path, &copy.path).unwrap();
        let mut copied = start(&copy);
        assert_eq!(read(&mut copied, 0, 512).unwrap(), [round; 512]);
        drop(copied);
        qemu_check(&copy.path);
    }
}

#[test]
fn what_lies_outside_is_refused() {
    let files = Files::new();
    for disk in [files.raw(), files.qcow2()] {
        let mut driver = start(&disk);
        let end = SIZE / 512;
        assert_eq!(tell(&mut driver, OUT, end, &[0; 512]), IOERR);
        assert_eq!(tell(&mut driver, OUT, end - 1, &[0; 1024]), IOERR);
        assert_eq!(tell(&mut driver, OUT, u64::MAX, &[0; 512]), IOERR);
        assert_eq!(tell(&mut driver, OUT, u64::MAX / 512 + 1, &[0; 512]), IOERR);
        assert_eq!(tell(&mut driver, OUT, 0, &[0; 100]), IOERR);
        assert_eq!(read(&mut driver, end, 512), None);
        assert_eq!(tell(&mut driver, DISCARD, 0, &range(end - 1, 2, 0)), IOERR);
        assert_eq!(tell(&mut driver, DISCARD, 0, &range(0, 1, 1)), UNSUPP);
        assert_eq!(tell(&mut driver, ZERO, 0, &range(0, 1, 2)), UNSUPP);
        assert_eq!(tell(&mut driver, ZERO, 0, &[0; 15]), IOERR);
        assert_eq!(tell(&mut driver, 99, 0, &[]), UNSUPP);
        assert_eq!(tell(&mut driver, OUT, end - 1, &[1; 512]), OK);
    }
}

#[test]
fn a_readonly_disk_takes_no_writes() {
    let files = Files::new();
    for mut disk in [files.raw(), files.qcow2()] {
        disk.readonly = true;
        let mut driver = start(&disk);
        let before = fs::read(&disk.path).unwrap();
        assert_eq!(tell(&mut driver, OUT, 0, &[1; 512]), IOERR);
        assert_eq!(tell(&mut driver, DISCARD, 0, &range(0, 8, 0)), IOERR);
        assert_eq!(tell(&mut driver, ZERO, 0, &range(0, 8, 0)), IOERR);
        assert_eq!(tell(&mut driver, FLUSH, 0, &[]), OK);
        assert_eq!(read(&mut driver, 0, 512).unwrap(), [0; 512]);
        assert!(fs::read(&disk.path).unwrap() == before);
    }
}

/// A disk full of data, of which all but a sector is discarded or filled with zeroes: the host gets the room, the
/// sector stays as it was, and what is written again takes no more room than at first.
fn room_is_given_back(disk: &Disk, kind: u32, flags: u32) {
    let blocks = || fs::metadata(&disk.path).unwrap().blocks();
    let mut driver = start(disk);
    let fill = |driver: &mut Driver| {
        for sector in (0..SIZE / 512).step_by(256) {
            assert_eq!(tell(driver, OUT, sector, &[7; 256 * 512]), OK);
        }
        assert_eq!(tell(driver, FLUSH, 0, &[]), OK);
        fs::metadata(&disk.path).unwrap().len()
    };
    let length = fill(&mut driver);
    let full = blocks();
    // The ranges begin and end within a cluster.
    let end = SIZE / 512;
    for (from, to) in [(0, 1001), (1002, end)] {
        let range = range(from, (to - from) as u32, flags);
        assert_eq!(tell(&mut driver, kind, 0, &range), OK);
    }
    assert_eq!(tell(&mut driver, FLUSH, 0, &[]), OK);
    assert!(blocks() < full / 4, "{} blocks of {full}", blocks());
    assert_eq!(read(&mut driver, 1001, 512).unwrap(), [7; 512]);
    let zeroes = read(&mut driver, 1002, 512 * 256).unwrap();
    assert!(zeroes.iter().all(|byte| *byte == 0));
    drop(driver);
    if disk.format == Some(Format::Qcow2) {
        let mut expected = vec![0; SIZE as usize];
        expected[1001 * 512..][..512].fill(7);
        assert!(!qemu_check(&disk.path));
        qemu_compare(&disk.path, &expected);
    }
    let mut driver = start(disk);
    assert_eq!(fill(&mut driver), length);
    assert!(blocks() <= full, "{} blocks of {full}", blocks());
}

#[test]
fn discarded_room_is_given_back() {
    for (kind, flags) in [(DISCARD, 0), (ZERO, 1)] {
        let files = Files::new();
        for (mut disk, format) in [(files.raw(), Format::Raw), (files.qcow2(), Format::Qcow2)] {
            disk.format = Some(format);
            room_is_given_back(&disk, kind, flags);
        }
    }
}

/// Where an image has data compressed, or shares it with a snapshot, zeroes are written over it.
#[test]
#[allow(clippy::print_stderr)]
fn room_without_a_hole_is_filled_with_zeroes() {
    let files = Files::new();
    let raw = files.raw();
    fs::write(&raw.path, vec![7; SIZE as usize]).unwrap();
    for (compress, snapshot) in [("-c", false), ("-q", true)] {
        let disk = disk(&files.path());
        let run = |arguments: &[&str]| {
            let mut command = Command::new("qemu-img");
            command.args(arguments).arg(&disk.path).output()
        };
        let from = raw.path.to_str().unwrap();
        let convert = ["convert", "-q", compress, "-f", "raw", "-O", "qcow2", from];
        if let Err(error) = run(&convert) {
            eprintln!("SKIP: qemu-img: {error}");
            return;
        }
        if snapshot {
            run(&["snapshot", "-c", "before"]).unwrap();
        }
        let mut driver = start(&disk);
        let (from, to) = (100, SIZE / 512 - 300);
        let range = range(from, (to - from) as u32, 1);
        assert_eq!(tell(&mut driver, ZERO, 0, &range), OK);
        drop(driver);
        let mut expected = vec![7; SIZE as usize];
        expected[512 * from as usize..512 * to as usize].fill(0);
        assert!(!qemu_check(&disk.path));
        qemu_compare(&disk.path, &expected);
        if snapshot {
            run(&["snapshot", "-a", "before"]).unwrap();
            qemu_compare(&disk.path, &[7; SIZE as usize]);
        }
    }
}

/// A block device with sectors of 4 KiB refuses a hole that begins or ends within one.
#[test]
fn what_the_host_makes_no_hole_of_is_filled_with_zeroes() {
    let files = Files::new();
    for disk in [files.raw(), files.qcow2()] {
        let mut driver = start(&disk);
        for error in [Errno::INVAL, Errno::OPNOTSUPP] {
            assert_eq!(tell(&mut driver, OUT, 0, &[5; 4096]), OK);
            image::NO_HOLES.set(Some(error));
            assert_eq!(tell(&mut driver, DISCARD, 0, &range(1, 3, 0)), OK);
            assert_eq!(tell(&mut driver, ZERO, 0, &range(1, 3, 1)), OK);
            image::NO_HOLES.set(None);
            let expected = [&[5; 512][..], &[0; 3 * 512], &[5; 4 * 512]].concat();
            assert_eq!(read(&mut driver, 0, 4096).unwrap(), expected);
        }
    }
}

/// The fields of 5.2.4, which a driver keeps to.
#[test]
fn a_discard_is_told_to_be_short() {
    let driver = start(&Files::new().raw());
    let config = |at| driver.read(virtio_bindings::virtio_mmio::VIRTIO_MMIO_CONFIG + at);
    assert_eq!(config(36), 128 * 2048);
    assert_eq!((config(40), config(44)), (RANGES, 1));
}

#[test]
fn the_serial_number_is_told() {
    let files = Files::new();
    let mut disk = files.raw();
    disk.serial = Some("rvisor-0001".into());
    let mut driver = start(&disk);
    let (written, bytes) = driver.request(0, &[&head(blk::VIRTIO_BLK_T_GET_ID, 0)], 21);
    assert_eq!((written, bytes[20]), (21, 0));
    assert_eq!(&bytes[..12], b"rvisor-0001\0");
}

#[test]
fn a_guessed_raw_disk_never_becomes_a_qcow2_image() {
    let files = Files::new();
    let mut disk = files.raw();
    let image = empty_qcow2();
    let mut driver = start(&disk);
    assert_eq!(tell(&mut driver, OUT, 0, &image[..512]), IOERR);
    assert_eq!(tell(&mut driver, OUT, 1, &image[..512]), OK);
    drop(driver);
    disk.format = Some(Format::Raw);
    let mut driver = start(&disk);
    assert_eq!(tell(&mut driver, OUT, 0, &image[..512]), OK);
    assert_eq!(read(&mut driver, 0, 512).unwrap(), image[..512]);
}

#[test]
fn two_guests_share_a_disk_for_reading_alone() {
    let files = Files::new();
    let writable = files.raw();
    let mut readonly = writable.clone();
    readonly.readonly = true;
    let in_use = |disk: &Disk| match Block::open(disk) {
        Ok(_) => None,
        Err(error) => Some(error.to_string()),
    };
    let first = Block::open(&writable).unwrap();
    for disk in [&writable, &readonly] {
        assert!(in_use(disk).unwrap().contains("in use by another guest"));
    }
    drop(first);
    let _first = Block::open(&readonly).unwrap();
    assert_eq!(in_use(&readonly), None);
    assert!(in_use(&writable).is_some());
}

#[test]
fn a_driver_that_does_not_flush_has_its_writes_flushed() {
    let files = Files::new();
    let mut driver = start(&files.raw());
    driver.set_up(!(1 << blk::VIRTIO_BLK_F_FLUSH));
    assert_eq!(tell(&mut driver, OUT, 3, &[1; 512]), OK);
    assert_eq!(read(&mut driver, 3, 512).unwrap(), [1; 512]);
}

#[test]
fn damaged_images_are_refused_or_do_no_harm() {
    let files = Files::new();
    let mut numbers = Numbers(7);
    let disk_with_data = files.qcow2();
    let mut driver = start(&disk_with_data);
    for sector in [0, 500, 5000] {
        assert_eq!(tell(&mut driver, OUT, sector, &[3; 4096]), OK);
    }
    drop(driver);
    let good = fs::read(files.path()).unwrap();
    let (mut refused, mut opened) = (0, 0);
    for _ in 0..300 {
        let mut image = good.clone();
        for _ in 0..numbers.of(&[1, 1, 2, 4]) {
            let cluster = numbers.of(&[0, 0, 0, 1, 2, 3, 4, 4, 5]);
            let at = cluster * CLUSTER as usize;
            let at = at + 4 + (numbers.next() % 100) as usize;
            image[at] = numbers.of(&[0, 1, 0x7f, 0x80, 0xff]);
        }
        image.truncate(numbers.of(&[image.len(), image.len(), 104, 70_000]));
        fs::write(files.path(), &image).unwrap();
        match Block::open(&disk(&files.path())) {
            Err(error) => {
                assert_eq!(error.status(), 2, "{error}");
                assert_eq!(error.to_string().lines().count(), 1, "{error}");
                refused += 1;
            }
            Ok(block) => {
                opened += 1;
                let mut driver = Driver::new(Box::new(block));
                for sector in [0, 1000, 5000] {
                    let _ = tell(&mut driver, OUT, sector, &[1; 4096]);
                    let _ = read(&mut driver, sector, 4096);
                    let _ = tell(&mut driver, FLUSH, 0, &[]);
                }
            }
        }
    }
    assert!(refused > 50 && opened > 50, "{refused} {opened}");
}

/// What the library would read and write as it is.
#[test]
fn an_encrypted_image_is_refused() {
    let files = Files::new();
    let disk = files.qcow2();
    for method in [1, 2] {
        let mut image = empty_qcow2();
        image[35] = method;
        fs::write(&disk.path, image).unwrap();
        let error = Block::open(&disk).err().unwrap();
        assert_eq!(error.status(), 2);
        let error = error.to_string();
        assert!(error.contains("is encrypted; "), "{error}");
        assert_eq!(error.lines().count(), 1, "{error}");
    }
}

#[test]
fn hostile_rings_do_no_harm() {
    let files = Files::new();
    let raw = files.raw();
    tests::torture(|| Box::new(Block::open(&raw).unwrap()));
    let qcow2 = files.qcow2();
    tests::torture(|| Box::new(Block::open(&qcow2).unwrap()));
}

/// A full host: the write is not answered, and done when there is room.
#[test]
fn a_full_disk_loses_nothing() {
    let files = Files::new();
    let disk = files.raw();
    let mut driver = start(&disk);
    image::FULL.set(true);
    driver.put_request(0, &[&head(OUT, 4), &[5; 512][..]], 1);
    let finished = driver.transport.serve(1, &|| false).unwrap();
    let (delay, reason) = finished.stuck.unwrap();
    assert!(reason.contains("no room"));
    assert_eq!((driver.used(0), delay), (0, RETRY));
    image::FULL.set(false);
    driver.serve(0);
    assert_eq!(driver.used(0), 1);
    assert_eq!(read(&mut driver, 4, 512).unwrap(), [5; 512]);
}

/// A host that is too full to make a hole: nothing waits for room before it gives room back. Zeroes are written, which
/// need none where data were.
#[test]
fn a_full_disk_holds_no_discard_up() {
    let files = Files::new();
    for disk in [files.raw(), files.qcow2()] {
        let mut driver = start(&disk);
        assert_eq!(tell(&mut driver, OUT, 0, &[5; 4096]), OK);
        image::NO_HOLES.set(Some(Errno::NOSPC));
        let finished = |driver: &mut Driver, kind, flags| {
            driver.put_request(0, &[&head(kind, 0), &range(0, 8, flags)], 1);
            driver.transport.serve(1, &|| false).unwrap()
        };
        assert!(finished(&mut driver, DISCARD, 0).stuck.is_none());
        assert_eq!(read(&mut driver, 0, 4096).unwrap(), [5; 4096]);
        assert!(finished(&mut driver, ZERO, 1).stuck.is_none());
        assert_eq!(read(&mut driver, 0, 4096).unwrap(), [0; 4096]);
        image::FULL.set(true);
        assert!(finished(&mut driver, ZERO, 1).stuck.is_some());
        image::FULL.set(false);
        image::NO_HOLES.set(None);
    }
}

/// A host that finds no room when it is to make writes durable has lost them: no flush says otherwise any more.
#[test]
fn a_failed_flush_is_told_and_stays_one() {
    let files = Files::new();
    for (disk, flush) in [
        (files.raw(), true),
        (files.qcow2(), true),
        (files.raw(), false),
    ] {
        let mut driver = start(&disk);
        if !flush {
            driver.set_up(!(1 << blk::VIRTIO_BLK_F_FLUSH));
        }
        let mut write = |flush_status| {
            let status = if flush { OK } else { flush_status };
            assert_eq!(tell(&mut driver, OUT, 4, &[5; 512]), status);
            assert_eq!(tell(&mut driver, FLUSH, 0, &[]), flush_status);
        };
        write(OK);
        image::SYNC_FULL.set(true);
        write(IOERR);
        image::SYNC_FULL.set(false);
        write(IOERR);
    }
}

/// A machine that is to pause or to end waits neither for the next request nor for the rest of a long one, which is
/// done from its beginning when the machine goes on.
#[test]
fn a_long_request_is_left_for_later() {
    let files = Files::new();
    for disk in [files.raw(), files.qcow2()] {
        let mut driver = start(&disk);
        let calls = std::cell::Cell::new(0);
        for (kind, data) in [
            (OUT, vec![5; 4 * BUFFER]),
            (ZERO, range(0, 4 * BUFFER as u32 / 512, 0).to_vec()),
        ] {
            let used = driver.used(0);
            driver.put_request(0, &[&head(kind, 0), &data], 1);
            for patience in [0, 1, 3] {
                calls.set(0);
                let halt = || calls.replace(calls.get() + 1) >= patience;
                let finished = driver.transport.serve(1, &halt).unwrap();
                assert_eq!((finished.again, driver.used(0)), (1, used));
                assert_eq!(calls.get(), patience + 1);
            }
            driver.serve(0);
            assert_eq!(driver.used(0), used + 1);
        }
        assert_eq!(read(&mut driver, 0, 512).unwrap(), [0; 512]);
    }
}

#[test]
fn what_was_done_is_counted() {
    let files = Files::new();
    let mut driver = start(&files.raw());
    assert_eq!(driver.counted(), []);
    assert_eq!(tell(&mut driver, OUT, 8, &[7; 3 * 512]), OK);
    assert!(read(&mut driver, 8, 512).is_some());
    assert_eq!(tell(&mut driver, FLUSH, 0, &[]), OK);
    // What fails is a request, and nothing that was done.
    assert!(read(&mut driver, SIZE / 512, 512).is_none());
    assert_eq!(tell(&mut driver, OUT, SIZE / 512, &[7; 512]), IOERR);
    let done = [
        ("requests", 5),
        ("read_bytes", 512),
        ("written_bytes", 1536),
        ("flushes", 1),
    ];
    assert_eq!(driver.counted(), done);
}
