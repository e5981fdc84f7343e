// SPDX-License-Identifier: GPL-2.0

use super::*;
use crate::memory::allocate;

const MIB: u64 = 1 << 20;

fn state() -> State {
    State {
        words: vec!["--kernel".to_owned(), "k".to_owned()],
        folder: "/tmp".into(),
        name: "test".parse().expect("a name"),
        rom: 0,
        cpus: vec![saved::Cpu::default(), saved::Cpu::default()],
        vm: saved::Vm::default(),
        ports: devices::Saved::default(),
        virtio: Vec::new(),
    }
}

/// Memory with something in its first page, over a record's end, and in its last page.
fn memory() -> Memory {
    let memory = allocate(4 * MIB, 0).expect("memory");
    for (address, text) in [
        (0, "begin"),
        (RECORD as u64 - 2, "border"),
        (4 * MIB - 3, "end"),
    ] {
        memory
            .write_slice(text.as_bytes(), GuestAddress(address))
            .expect("there is memory");
    }
    memory
}

fn written() -> Vec<u8> {
    let mut bytes = Vec::new();
    write(&mut bytes, &state(), &memory()).expect("a vector takes all");
    bytes
}

/// Reads all of it into new memory.
fn read(bytes: &[u8]) -> Read1<(State, Memory)> {
    let memory = allocate(4 * MIB, 0).expect("memory");
    let mut input = bytes;
    let state = read_head(&mut input)?;
    fill(&mut input, &memory)?;
    Ok((state, memory))
}

#[test]
fn what_is_written_is_read() {
    let bytes = written();
    let (read_state, read_memory) = read(&bytes).expect("it is whole");
    assert_eq!(
        serde_json::to_value(&read_state).expect("JSON"),
        serde_json::to_value(state()).expect("JSON")
    );
    let contents = |memory: &Memory| {
        let mut bytes = vec![0; 4 * MIB as usize];
        memory
            .read_slice(&mut bytes, GuestAddress(0))
            .expect("memory");
        bytes
    };
    assert!(contents(&read_memory) == contents(&memory()));
    // Four pages have something.
    assert!(bytes.len() < serde_json::to_vec(&state()).expect("JSON").len() + 5 * PAGE);
}

#[test]
fn damage_is_found_wherever_it_is() {
    let good = written();
    for at in (0..good.len())
        .step_by(97)
        .chain(0..64)
        .chain(good.len() - 64..good.len())
    {
        let mut bytes = good.clone();
        bytes[at] ^= 0x10;
        assert!(read(&bytes).is_err(), "byte {at}");
    }
    for length in (0..good.len())
        .step_by(101)
        .chain(good.len() - 64..good.len())
    {
        assert!(read(&good[..length]).is_err(), "the first {length} bytes");
    }
}

#[test]
fn other_files_and_versions_are_told_from_damage() {
    assert!(matches!(read(b"#!/bin/sh\n"), Err(Wrong::Foreign)));
    assert!(matches!(read(b""), Err(Wrong::Foreign)));
    let mut bytes = written();
    bytes[8] = VERSION as u8 + 1;
    assert!(matches!(read(&bytes), Err(Wrong::Version(version)) if version == VERSION + 1));
}

#[test]
fn no_length_is_believed() {
    let mut bytes = written();
    bytes[12..16].copy_from_slice(&u32::MAX.to_le_bytes());
    assert!(matches!(read(&bytes), Err(Wrong::Damaged(_))));
    let json = serde_json::to_vec(&state()).expect("JSON").len();
    let mut bytes = written();
    bytes[24 + json + 8..][..8].copy_from_slice(&u64::MAX.to_le_bytes());
    assert!(matches!(read(&bytes), Err(Wrong::Damaged(_))));
    // Bytes in place of pages would make a large file of little memory.
    bytes.truncate(24 + json);
    write_record(&mut bytes, 0, &[1]).expect("a vector takes all");
    assert!(matches!(read(&bytes), Err(Wrong::Damaged(what)) if what.contains("1 bytes")));
}

#[test]
fn memory_that_the_machine_lacks_is_refused() {
    let mut bytes = written();
    bytes.truncate(bytes.len() - 24);
    write_record(&mut bytes, 4 * MIB - 1, &[1; PAGE]).expect("a vector takes all");
    assert!(matches!(read(&bytes), Err(Wrong::Damaged(_))));
}

#[test]
fn a_record_that_is_left_out_is_missed() {
    let good = written();
    let json = serde_json::to_vec(&state()).expect("JSON").len();
    let mut bytes = good.clone();
    bytes.drain(24 + json..24 + json + 24 + PAGE);
    assert!(matches!(read(&bytes), Err(Wrong::Damaged(what)) if what.contains("missing")));
}

/// Stores what `from` gives as the file of a machine with 4 MiB, and tells what is wrong.
fn error_of(from: impl Read, file: File) -> String {
    let words = ["--kernel", "k", "--memory", "4M"]
        .map(str::to_owned)
        .to_vec();
    let folder = "/".into();
    let name = "web".parse().expect("a name");
    let stored = store(
        from,
        (&name, Origin { words, folder }),
        file,
        Path::new("file"),
    );
    stored.expect_err("it can't be stored").to_string()
}

#[test]
fn a_machine_that_fails_is_told_from_a_file_that_does() {
    let (mut ours, theirs) = std::os::unix::net::UnixStream::pair().expect("sockets");
    let silent = theirs.set_read_timeout(Some(std::time::Duration::from_millis(1)));
    silent.expect("a timeout");
    ours.write_all(&written()[..100]).expect("it is taken");
    let said = error_of(theirs, tempfile::tempfile().expect("a file"));
    assert!(
        said.starts_with("reading what machine web writes: "),
        "{said}"
    );
    let full = File::options().write(true).open("/dev/full");
    let said = error_of(&*written(), full.expect("it is there"));
    assert!(said.starts_with("writing file: "), "{said}");
}

#[test]
fn the_file_is_its_users_alone() {
    use std::os::unix::fs::PermissionsExt;
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("file");
    let found = create(&path).and_then(|file| file.metadata());
    assert_eq!(
        found.expect("it is made").permissions().mode() & 0o777,
        0o600
    );
    assert!(create(&path).is_err());
}

#[test]
fn a_machine_has_no_more_memory_than_it_was_made_with() {
    let mut bytes = Vec::new();
    write_head(&mut bytes, &state()).expect("a vector takes all");
    let mut record = Vec::new();
    write_record(&mut record, 0, &[1; RECORD]).expect("a vector takes all");
    // With its firmware it may have 20 MiB.
    let endless = bytes.into_iter().chain(record.into_iter().cycle());
    let file = tempfile::NamedTempFile::new().expect("a file");
    let said = error_of(Endless(endless), file.reopen().expect("the file"));
    assert!(said.contains("more memory than the machine"), "{said}");
    assert_eq!(said.lines().count(), 1, "{said}");
    assert!(file.as_file().metadata().expect("it is there").len() <= 21 * MIB);
}

/// The bytes of an iterator.
struct Endless<I>(I);

impl<I: Iterator<Item = u8>> Read for Endless<I> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let pairs = buffer.iter_mut().zip(&mut self.0);
        Ok(pairs.map(|(byte, next)| *byte = next).count())
    }
}

/// A machine that its guest has taken over may write any words; they would be run by 'rvisor restore'.
#[test]
fn a_machine_has_no_say_in_its_command_line() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("file");
    let origin = Origin {
        words: vec!["--kernel".to_owned(), "as started".to_owned()],
        folder: "/where/started".into(),
    };
    let name: Name = "known".parse().expect("a name");
    let file = File::create(&path).expect("a file");
    store(&*written(), (&name, origin.clone()), file, &path).expect("it is stored");
    let (kept, memory_kept) = read(&fs::read(&path).expect("the file")).expect("it is whole");
    assert_eq!((&kept.words, &kept.folder), (&origin.words, &origin.folder));
    assert_eq!(kept.name, name);
    assert_eq!(kept.cpus.len(), state().cpus.len());
    let mut end = [0; 3];
    memory_kept
        .read_slice(&mut end, GuestAddress(4 * MIB - 3))
        .expect("there is memory");
    assert_eq!(&end, b"end");
}
