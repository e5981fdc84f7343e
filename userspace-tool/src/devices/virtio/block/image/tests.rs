// SPDX-License-Identifier: GPL-2.0

//! Disks of both formats, from the driver to the file.

use std::os::unix::fs::MetadataExt;
use std::process::Command;

use super::super::super::tests::{Driver, Numbers};
use super::super::tests::*;
use super::super::{blk, Block};
use super::*;
use crate::size::MIB;

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
fn qemu_check(path: &Path) -> bool {
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
fn qemu_compare(path: &Path, expected: &[u8]) {
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

/// Whoever copies the file of a machine that is paused, or restores a snapshot behind a machine that was killed, has
/// what its guest was told is written.
#[test]
fn a_machine_that_rests_has_all_in_its_file() {
    let files = Files::new();
    let copy = files.0.path().join("copy");
    for original in [files.raw(), files.qcow2()] {
        let mut driver = start(&original);
        assert_eq!(tell(&mut driver, OUT, 9, &[7; 512]), OK);
        driver.transport.pause().unwrap();
        fs::copy(&original.path, &copy).unwrap();
        let mut copied = start(&disk(&copy));
        assert_eq!(read(&mut copied, 9, 512).unwrap(), [7; 512]);
    }
}

/// Where the rest can't be written, whoever would copy the file or make a snapshot is told.
#[test]
fn a_machine_that_rests_on_a_full_disk_says_so() {
    let files = Files::new();
    let mut driver = start(&files.qcow2());
    assert_eq!(tell(&mut driver, OUT, 9, &[7; 512]), OK);
    FULL.set(true);
    let error = driver.transport.pause().expect_err("there is no room");
    FULL.set(false);
    assert_eq!(error.status(), 1);
    assert!(error.to_string().contains("writing the rest of disk"));
    driver.transport.pause().unwrap();
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

/// A block device with sectors of 4 KiB makes holes of whole ones: the rest of a range is seen to otherwise.
#[test]
fn whole_sectors_of_the_host_are_given_back() {
    for (kind, flags, rest) in [(DISCARD, 0, 7), (ZERO, 1, 0)] {
        let files = Files::new();
        for disk in [files.raw(), files.qcow2()] {
            let blocks = || fs::metadata(&disk.path).unwrap().blocks();
            let mut driver = start(&disk);
            assert_eq!(tell(&mut driver, OUT, 0, &[7; 1 << 19]), OK);
            assert_eq!(tell(&mut driver, FLUSH, 0, &[]), OK);
            let before = blocks();
            WHOLE_HOLES.set(true);
            let range = range(3, 512, flags);
            assert_eq!(tell(&mut driver, kind, 0, &range), OK);
            WHOLE_HOLES.set(false);
            assert_eq!(tell(&mut driver, FLUSH, 0, &[]), OK);
            assert!(blocks() + 504 <= before, "{} of {before}", blocks());
            let parts = [(3, 7), (5, rest), (504, 0), (3, rest), (509, 7)];
            let parts = parts.map(|(sectors, byte)| vec![byte; sectors * 512]);
            assert!(read(&mut driver, 0, 1 << 19).unwrap() == parts.concat());
        }
    }
}

/// The host may take long over much.
#[test]
fn a_discard_of_much_is_left_for_later_too() {
    let files = Files::new();
    let raw = files.raw();
    let file = File::options().write(true).open(&raw.path).unwrap();
    file.set_len(1 << 30).unwrap();
    let mut driver = start(&raw);
    let calls = std::cell::Cell::new(0);
    let halt = || calls.replace(calls.get() + 1) > 5;
    driver.put_request(0, &[&head(DISCARD, 0), &range(0, 1 << 21, 0)], 1);
    let finished = driver.transport.serve(1, &halt).unwrap();
    assert_eq!((finished.again, driver.used(0)), (1, 0));
    driver.serve(0);
    assert_eq!(driver.used(0), 1);
}

/// A block device with sectors of 4 KiB refuses a hole that begins or ends within one.
#[test]
fn what_the_host_makes_no_hole_of_is_filled_with_zeroes() {
    let files = Files::new();
    for disk in [files.raw(), files.qcow2()] {
        let mut driver = start(&disk);
        for error in [Errno::INVAL, Errno::OPNOTSUPP] {
            assert_eq!(tell(&mut driver, OUT, 0, &[5; 4096]), OK);
            NO_HOLES.set(Some(error));
            assert_eq!(tell(&mut driver, DISCARD, 0, &range(1, 3, 0)), OK);
            assert_eq!(tell(&mut driver, ZERO, 0, &range(1, 3, 1)), OK);
            NO_HOLES.set(None);
            let expected = [&[5; 512][..], &[0; 3 * 512], &[5; 4 * 512]].concat();
            assert_eq!(read(&mut driver, 0, 4096).unwrap(), expected);
        }
    }
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

/// A host that is too full to make a hole: nothing waits for room before it gives room back. Zeroes are written, which
/// need none where data were.
#[test]
fn a_full_disk_holds_no_discard_up() {
    let files = Files::new();
    for disk in [files.raw(), files.qcow2()] {
        let mut driver = start(&disk);
        assert_eq!(tell(&mut driver, OUT, 0, &[5; 4096]), OK);
        NO_HOLES.set(Some(Errno::NOSPC));
        let finished = |driver: &mut Driver, kind, flags| {
            driver.put_request(0, &[&head(kind, 0), &range(0, 8, flags)], 1);
            driver.transport.serve(1, &|| false).unwrap()
        };
        assert!(finished(&mut driver, DISCARD, 0).stuck.is_none());
        assert_eq!(read(&mut driver, 0, 4096).unwrap(), [5; 4096]);
        assert!(finished(&mut driver, ZERO, 1).stuck.is_none());
        assert_eq!(read(&mut driver, 0, 4096).unwrap(), [0; 4096]);
        FULL.set(true);
        assert!(finished(&mut driver, ZERO, 1).stuck.is_some());
        FULL.set(false);
        NO_HOLES.set(None);
    }
}

/// What a quota or a limit of the process's files does not let in is in the guest's memory still.
#[test]
fn limits_are_a_full_disk() {
    for error in [Errno::NOSPC, Errno::DQUOT, Errno::FBIG] {
        assert!(is_full(&error.into()), "{error}");
    }
    assert!(!is_full(&Errno::IO.into()));
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
            assert_eq!(tell(&mut driver, ZERO, 0, &range(8, 1, 0)), status);
            assert_eq!(tell(&mut driver, FLUSH, 0, &[]), flush_status);
        };
        write(OK);
        SYNC_FULL.set(true);
        write(IOERR);
        SYNC_FULL.set(false);
        write(IOERR);
    }
}

mod qcow2;
