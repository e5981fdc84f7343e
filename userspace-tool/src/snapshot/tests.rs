// SPDX-License-Identifier: GPL-2.0

use super::*;
use crate::memory::allocate;
use vm_memory::GuestAddress;

const MIB: u64 = 1 << 20;

fn head() -> Head {
    let words = ["--kernel", "k", "--memory", "4M", "--cpus", "2"];
    Head {
        name: "web".parse().expect("a name"),
        origin: Origin {
            words: words.map(str::to_owned).to_vec(),
            folder: "/where/started".into(),
        },
    }
}

fn state() -> State {
    State {
        rom: 0,
        cpus: vec![saved::Cpu::default(), saved::Cpu::default()],
        vm: saved::Vm::default(),
        ports: devices::Saved::default(),
        virtio: Vec::new(),
    }
}

/// Memory with something in its first page, over a page's end, and in its last page.
fn memory() -> Memory {
    let memory = allocate(4 * MIB, 0).expect("memory");
    for (address, text) in [
        (0, "begin"),
        (MIB + PAGE_SIZE - 2, "border"),
        (4 * MIB - 3, "end"),
    ] {
        memory
            .write_slice(text.as_bytes(), GuestAddress(address))
            .expect("there is memory");
    }
    memory
}

/// What a machine writes.
fn machines(state: &State, memory: &Memory) -> Vec<u8> {
    let mut bytes = Vec::new();
    write(&mut bytes, state, memory).expect("a vector takes all");
    bytes
}

fn written() -> Vec<u8> {
    let mut bytes = Vec::new();
    write_head(&mut bytes, &head()).expect("a vector takes all");
    bytes.extend(machines(&state(), &memory()));
    bytes
}

/// Reads all of it into new memory.
fn read(bytes: &[u8]) -> io::Result<(Head, State, Memory)> {
    let memory = allocate(4 * MIB, 0).expect("memory");
    let (head, state, mut frames) = begin(bytes)?;
    fill(&mut frames, &memory)?;
    Ok((head, state, memory))
}

fn contents(memory: &Memory) -> Vec<u8> {
    let mut bytes = vec![0; 4 * MIB as usize];
    memory
        .read_slice(&mut bytes, GuestAddress(0))
        .expect("memory");
    bytes
}

#[test]
fn what_is_written_is_read() {
    let bytes = written();
    let (read_head, read_state, read_memory) = read(&bytes).expect("it is whole");
    assert_eq!(read_head, head());
    assert_eq!(
        serde_json::to_value(&read_state).expect("JSON"),
        serde_json::to_value(state()).expect("JSON")
    );
    assert!(contents(&read_memory) == contents(&memory()));
    // Zeros are nothing.
    assert!(bytes.len() < 32 << 10, "{} bytes", bytes.len());
}

#[test]
fn pages_of_zeros_take_no_memory() {
    let size = 32 * MIB;
    let [from, to] = [(); 2].map(|()| allocate(size, 0).expect("memory"));
    from.write_slice(b"begin", GuestAddress(0)).expect("memory");
    let mut bytes = Vec::new();
    write_head(&mut bytes, &head()).expect("a vector takes all");
    bytes.extend(machines(&state(), &from));
    let (_, _, mut frames) = begin(&*bytes).expect("it is whole");
    fill(&mut frames, &to).expect("it is whole");

    let address = to.get_host_address(GuestAddress(0)).expect("memory") as usize;
    let mappings = fs::read_to_string("/proc/self/smaps").expect("this process's memory");
    let is_its = |line: &str| {
        let (first, last) = line.split_once(' ')?.0.split_once('-')?;
        let address_of = |text| usize::from_str_radix(text, 16).ok();
        Some((address_of(first)?..address_of(last)?).contains(&address))
    };
    let mut lines = mappings.lines();
    lines.find(|line| is_its(line) == Some(true));
    let anonymous = lines.find_map(|line| line.strip_prefix("Anonymous:")?.strip_suffix(" kB"));
    let anonymous: u64 = anonymous.expect("it is told").trim().parse().expect("KiB");
    // One page, which may be a huge one, and what other tests have in a mapping that has become one with this.
    assert!(anonymous << 10 < size / 2, "{anonymous} KiB");
}

#[test]
fn damage_is_found_wherever_it_is() {
    let good = written();
    for at in (0..good.len())
        .step_by(397)
        .chain(0..64)
        .chain(good.len() - 64..good.len())
    {
        let mut bytes = good.clone();
        bytes[at] ^= if at % 2 == 0 { 0x10 } else { 0x80 };
        assert!(read(&bytes).is_err(), "byte {at}");
    }
    for length in (0..good.len())
        .step_by(401)
        .chain(good.len() - 64..good.len())
    {
        assert!(read(&good[..length]).is_err(), "the first {length} bytes");
    }
}

/// The decoder takes an end between two blocks for that of the frame.
#[test]
fn an_end_between_blocks_is_found() {
    let good = written();
    let end_mark = 4;
    let cut = read(&good[..good.len() - end_mark]);
    assert!(matches!(cut, Err(error) if error.to_string().contains("ends too early")));
}

#[test]
fn other_files_and_versions_are_told_from_damage() {
    let told = |bytes: &[u8]| {
        let error = read(bytes).err().expect("it is no snapshot");
        wrong(Path::new("file"), error).to_string()
    };
    let none = "file is no snapshot of a machine; give a file that 'rvisor snapshot' has made to \
                the rvisor that made it";
    assert_eq!(told(b"#!/bin/sh\n"), none);
    assert_eq!(told(b""), none);
    let mut bytes = written();
    bytes[8] = 2;
    let told_version = told(&bytes);
    assert!(told_version.starts_with("file has version 2 of the format, and this rvisor reads 5;"));
    assert!(told(&written()[..500]).starts_with("file is damaged: it ends too early;"));
    // Where a file gives less than is asked for.
    let whole = written();
    assert!(begin(whole[..3].chain(&whole[3..])).is_ok());
    bytes = written();
    *bytes.last_mut().expect("a byte") ^= 1;
    bytes[20..40].fill(0);
    let damaged = told(&bytes);
    assert!(
        damaged.starts_with("file is damaged: its checksums or blocks are wrong;"),
        "{damaged}"
    );
    let folder = File::open("/").expect("it is there");
    let error = begin(folder).err().expect("it is no file");
    let told = wrong(Path::new("/"), error).to_string();
    assert!(told.starts_with("/ is a folder;"), "{told}");
    let other = File::options().write(true).open("/dev/null");
    let error = begin(other.expect("it is there")).err();
    let told = wrong(Path::new("x"), error.expect("it can't be read")).to_string();
    assert!(told.starts_with("reading x: Bad file descr"), "{told}");
}

/// What a machine writes with one page, which has that address, and `more` behind it.
fn with_page(address: u64, more: &[u8]) -> Vec<u8> {
    let mut frame = frame(Vec::new(), &state()).expect("a vector takes all");
    let page = [&address.to_le_bytes(), &[1; PAGE][..], more].concat();
    frame.write_all(&page).expect("a vector takes all");
    frame.finish().expect("a vector takes all")
}

#[test]
fn pages_are_whole_and_where_the_machine_has_memory() {
    let last = 4 * MIB - PAGE_SIZE;
    for (address, behind, words) in [
        (last, [].as_slice(), None),
        (4 * MIB, &[], Some("more than its machine")),
        (last - 8, &[], Some("more than its machine")),
        (u64::MAX - 4095, &[], Some("more than its machine")),
        (0, &[0; 8 + PAGE], Some("more than its machine")),
        (last, &[1], Some("")),
    ] {
        let machines = with_page(address, behind);
        let mut bytes = Vec::new();
        write_head(&mut bytes, &head()).expect("a vector takes all");
        bytes.extend(&machines);
        let restored = read(&bytes).err();
        let restored = restored.map(|error| wrong(Path::new("file"), error).to_string());
        let taken = tempfile::tempfile().expect("a file");
        let taken = store(&*machines, &head(), &taken, Path::new("file")).err();
        for said in [restored, taken.map(|error| error.to_string())] {
            let as_expected = match (&said, words) {
                (Some(said), Some(words)) => said.contains(words),
                (said, words) => said.is_none() && words.is_none(),
            };
            assert!(as_expected, "{address:#x}: {said:?}");
        }
    }
}

/// Between pages, so that nothing else shows it.
#[test]
fn a_block_that_is_missing_is_found() {
    let mut frame = frame(Vec::new(), &state()).expect("a vector takes all");
    let ends = [0, PAGE_SIZE].map(|address: u64| {
        let page = [&address.to_le_bytes(), &[1; PAGE][..]].concat();
        let written = frame.write_all(&page).and_then(|()| frame.flush());
        written.expect("a vector takes all");
        frame.get_ref().len()
    });
    let machines = frame.finish().expect("a vector takes all");
    for whole in [true, false] {
        let mut bytes = Vec::new();
        write_head(&mut bytes, &head()).expect("a vector takes all");
        bytes.extend(&machines[..ends[0]]);
        bytes.extend(&machines[ends[usize::from(!whole)]..]);
        let error = read(&bytes)
            .err()
            .map(|error| wrong(Path::new("file"), error));
        assert_eq!(error.is_none(), whole, "{error:?}");
    }
}

/// Stores what `from` gives, and tells what is wrong.
fn error_of(from: impl Read, file: &File) -> String {
    let stored = store(from, &head(), file, Path::new("file"));
    stored.expect_err("it can't be stored").to_string()
}

#[test]
fn a_machine_that_fails_is_told_from_a_file_that_does() {
    let (mut ours, theirs) = std::os::unix::net::UnixStream::pair().expect("sockets");
    let silent = theirs.set_read_timeout(Some(std::time::Duration::from_millis(1)));
    silent.expect("a timeout");
    ours.write_all(&written()[..100]).expect("it is taken");
    let said = error_of(theirs, &tempfile::tempfile().expect("a file"));
    let begin = "storing machine web as file: ";
    assert!(
        said.starts_with(&format!("{begin}Resource temporarily")),
        "{said}"
    );
    let full = File::options().write(true).open("/dev/full");
    let said = error_of(&*written(), &full.expect("it is there"));
    assert!(said.starts_with(&format!("{begin}No space left")), "{said}");
    let said = error_of(&written()[..100], &tempfile::tempfile().expect("a file"));
    assert!(said.starts_with("the machine did not write all"), "{said}");
    let unreadable = tempfile::NamedTempFile::new().expect("a file");
    let unreadable = File::options().write(true).open(unreadable.path());
    let said = error_of(&*written(), &unreadable.expect("it is there"));
    assert!(
        said.starts_with("reading file: Bad file descriptor"),
        "{said}"
    );
}

#[test]
fn the_file_has_its_name_when_it_is_whole_and_is_its_users_alone() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("é".repeat(127));
    let names = || {
        let entries = fs::read_dir(folder.path()).expect("the folder");
        let names: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
        names
    };
    let new = || New::create(&path).expect("it is made");
    // As where the file system has no files without a name.
    let named = || {
        let mut new = new();
        new.file = File::create_new(&new.hidden).expect("it is made");
        new
    };
    drop([new(), named()]);
    assert!(names().is_empty(), "{:?}", names());
    let mut mode = 0;
    for (mut new, text) in [(named(), "first"), (new(), "second")] {
        new.file.write_all(text.as_bytes()).expect("it takes it");
        new.publish(&path).expect("it is named");
        assert_eq!(names(), [&*path]);
        assert_eq!(fs::read_to_string(&path).expect("the file"), text);
        mode = fs::metadata(&path).expect("it is there").mode();
    }
    assert_eq!(mode & 0o777, 0o600);

    let (new, missing) = (new(), folder.path().join("missing/file"));
    let hidden = new.hidden.clone();
    fs::write(&hidden, "another's").expect("it is made");
    let said = new.publish(&path).expect_err("it is there").to_string();
    assert!(said.starts_with(&format!("naming {}: File exists", hidden.display())));
    assert!(hidden.exists());
    let said = New::create(&missing).err().expect("no folder").to_string();
    assert!(
        said.contains("file can't be made, at first as ") && said.contains("/missing/.file."),
        "{said}"
    );
}

/// Renaming would put the snapshot in its place.
#[test]
fn what_is_no_file_is_not_replaced() {
    let folder = tempfile::tempdir().expect("a folder");
    let link = folder.path().join("link");
    std::os::unix::fs::symlink("/dev/null", &link).expect("a link");
    for path in [folder.path(), &link, &folder.path().join("missing/")] {
        let said = New::create(path).err().expect("it is no file").to_string();
        assert!(said.ends_with("give the name of a file"), "{said}");
    }
}

#[test]
fn a_machine_has_no_more_memory_than_it_was_made_with() {
    let most = 4 * MIB + 4 * MIB / 256 + FIRMWARE_SIZE.end() + LARGEST;
    let large = with_page(4 * MIB, b"");
    let of_another = State {
        rom: FIRMWARE_SIZE.end() + PAGE_SIZE,
        ..state()
    };
    let other = machines(&of_another, &memory());
    let whole = machines(&state(), &memory());
    for (frame, words) in [
        (large, "more than"),
        (other, "less than"),
        (whole, "more than"),
    ] {
        let file = tempfile::NamedTempFile::new().expect("a file");
        let endless = frame.as_slice().chain(io::repeat(7));
        let said = error_of(endless, file.as_file());
        assert!(said.contains(words), "{said}");
        assert_eq!(said.lines().count(), 1, "{said}");
        let stored = file.as_file().metadata().expect("it is there").len();
        assert!(stored <= most + PAGE_SIZE, "{stored} bytes");
    }
}

/// A machine that its guest has taken over may write what it likes; words would be run by 'rvisor restore'.
#[test]
fn a_machine_has_no_say_in_its_command_line() {
    let mut file = tempfile::tempfile().expect("a file");
    let said = error_of(&*written(), &file);
    assert!(said.contains("did not write all"), "{said}");
    file.set_len(0).and_then(|()| file.rewind()).expect("empty");
    let machine = machines(&state(), &memory());
    store(&*machine, &head(), &file, Path::new("file")).expect("it is stored");
    let mut bytes = Vec::new();
    file.rewind().expect("from its beginning");
    file.read_to_end(&mut bytes).expect("the file");
    let (kept, _, kept_memory) = read(&bytes).expect("it is whole");
    assert_eq!(kept, head());
    assert!(contents(&kept_memory) == contents(&memory()));
}
