// SPDX-License-Identifier: GPL-2.0

//! The block device as a driver sees it.

use std::fs;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard};

use tempfile::TempDir;

use super::super::tests::{self, Driver};
use super::*;
use crate::devices::lock;
use crate::size::MIB;

pub(super) const SIZE: u64 = 8 * MIB;
pub(super) const CLUSTER: u64 = 64 << 10;

/// A folder for a test. One test at a time has one: a process that another test starts would hold the locks of
/// its files for a moment.
pub(super) struct Files(
    pub(super) TempDir,
    #[allow(dead_code)] MutexGuard<'static, ()>,
);

impl Files {
    pub(super) fn new() -> Self {
        static ALONE: Mutex<()> = Mutex::new(());
        Self(tempfile::tempdir().unwrap(), lock(&ALONE))
    }

    pub(super) fn path(&self) -> PathBuf {
        self.0.path().join("disk")
    }

    pub(super) fn raw(&self) -> Disk {
        let path = self.0.path().join("raw");
        let file = fs::File::create(&path).unwrap();
        file.set_len(SIZE).unwrap();
        disk(&path)
    }

    pub(super) fn qcow2(&self) -> Disk {
        fs::write(self.path(), empty_qcow2()).unwrap();
        disk(&self.path())
    }
}

pub(super) fn disk(path: &std::path::Path) -> Disk {
    Disk::parse(path.to_str().unwrap()).unwrap()
}

/// An empty qcow2 image of version 3: header, refcount table, refcount block and L1 table, a cluster each.
pub(super) fn empty_qcow2() -> Vec<u8> {
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

pub(super) fn head(kind: u32, sector: u64) -> [u8; 16] {
    let mut head = [0; 16];
    head[..4].copy_from_slice(&kind.to_le_bytes());
    head[8..].copy_from_slice(&sector.to_le_bytes());
    head
}

pub(super) fn range(sector: u64, count: u32, flags: u32) -> [u8; 16] {
    let mut range = [0; 16];
    range[..8].copy_from_slice(&sector.to_le_bytes());
    range[8..12].copy_from_slice(&count.to_le_bytes());
    range[12..].copy_from_slice(&flags.to_le_bytes());
    range
}

pub(super) fn start(disk: &Disk) -> Driver {
    Driver::new(Box::new(Block::open(disk).unwrap()))
}

/// A request that gives nothing but its status.
pub(super) fn tell(driver: &mut Driver, kind: u32, sector: u64, data: &[u8]) -> u32 {
    let head = head(kind, sector);
    let parts = [head.as_slice(), data];
    let parts = &parts[..1 + usize::from(!data.is_empty())];
    let (written, bytes) = driver.request(0, parts, 1);
    assert_eq!(written, 1);
    bytes[0].into()
}

/// Reads so many bytes; none where the status is not good.
pub(super) fn read(driver: &mut Driver, sector: u64, length: u32) -> Option<Vec<u8>> {
    let head = head(blk::VIRTIO_BLK_T_IN, sector);
    let (written, mut bytes) = driver.request(0, &[&head], length + 1);
    let status = bytes.pop().unwrap();
    let is_read = u32::from(status) == blk::VIRTIO_BLK_S_OK;
    // What is told to be written is all that is in front too.
    assert_eq!(written, if is_read { length + 1 } else { 0 });
    is_read.then_some(bytes)
}

pub(super) const OK: u32 = blk::VIRTIO_BLK_S_OK;
pub(super) const IOERR: u32 = blk::VIRTIO_BLK_S_IOERR;
pub(super) const UNSUPP: u32 = blk::VIRTIO_BLK_S_UNSUPP;
pub(super) const OUT: u32 = blk::VIRTIO_BLK_T_OUT;
pub(super) const FLUSH: u32 = blk::VIRTIO_BLK_T_FLUSH;
pub(super) const DISCARD: u32 = blk::VIRTIO_BLK_T_DISCARD;
pub(super) const ZERO: u32 = blk::VIRTIO_BLK_T_WRITE_ZEROES;

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
        assert_eq!(tell(&mut driver, ZERO, 0, &range(0, ZEROES + 1, 2)), UNSUPP);
        assert_eq!(tell(&mut driver, DISCARD, 0, &range(end, 1, 1)), UNSUPP);
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
    let (written, bytes) = driver.request(0, &[&head(blk::VIRTIO_BLK_T_GET_ID, 0)], 31);
    assert_eq!((written, bytes[30]), (20, 0));
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
