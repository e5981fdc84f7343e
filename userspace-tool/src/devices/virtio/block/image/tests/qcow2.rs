// SPDX-License-Identifier: GPL-2.0

//! What qcow2 images are opened, and what is said of the others.

use super::*;

/// Why the image can't be opened.
fn refused(image: &[u8]) -> String {
    let files = Files::new();
    fs::write(files.path(), image).unwrap();
    let error = Block::open(&disk(&files.path())).err().expect("a refusal");
    assert_eq!(error.status(), 2);
    let text = error.to_string();
    assert_eq!(text.lines().count(), 1, "{text}");
    assert!(fs::read(files.path()).unwrap() == image, "it was changed");
    text
}

/// What the features of an image ask of who opens it, and what the user can do about it.
#[test]
fn features_of_an_image_are_told_in_words() {
    for (features, words) in [
        (1_u64, "was not closed, as its writer was killed; repair"),
        (5, "was not closed, as its writer was killed; repair"),
        (2, "is damaged: "),
        (8, "has features that are not known here (0x8); make one"),
        (16, "has features that are not known here (0x10); make one"),
        (1 << 40, "qemu-img convert -O qcow2"),
    ] {
        let mut image = empty_qcow2();
        image[72..80].copy_from_slice(&features.to_be_bytes());
        // Features that who does not know them has to clear where it writes.
        image[88..96].copy_from_slice(&1_u64.to_be_bytes());
        let text = refused(&image);
        assert!(text.contains(words), "{text}");
    }
}

/// Tables that would have the tool look at the same over and over, or make larger ones as the header says.
#[test]
fn tables_are_bounded_by_the_file() {
    // Two entries of the L1 table, and two of the refcount table, name the same table.
    for (table, at) in [(3, 3), (1, 2)] {
        let mut image = empty_qcow2();
        image[36..40].copy_from_slice(&8_u32.to_be_bytes());
        for entry in [0, 5] {
            let place = table * CLUSTER as usize + 8 * entry;
            image[place..place + 8].copy_from_slice(&(at * CLUSTER).to_be_bytes());
        }
        let text = refused(&image);
        assert!(text.contains("two tables lie in the same place"), "{text}");
    }
    let mut image = empty_qcow2();
    image[36..40].copy_from_slice(&(TABLE as u32 / 8 + 1).to_be_bytes());
    let text = refused(&image);
    assert!(text.contains("is too large"), "{text}");
    // The one entry of the L1 table is for 512 MiB.
    for (size, right) in [
        (512 * MIB, true),
        (512 * MIB + 512, false),
        (1 << 62, false),
    ] {
        let mut image = empty_qcow2();
        image[24..32].copy_from_slice(&size.to_be_bytes());
        if right {
            let files = Files::new();
            fs::write(files.path(), image).unwrap();
            start(&disk(&files.path()));
        } else {
            let text = refused(&image);
            assert!(text.contains("too small"), "{text}");
        }
    }
}

/// Images as QEMU makes them with other options than its own.
#[test]
#[allow(clippy::print_stderr)]
fn all_kinds_of_qcow2_images_are_read_and_written() {
    let files = Files::new();
    for options in [
        "compat=0.10",
        "refcount_bits=1",
        "refcount_bits=4",
        "refcount_bits=64",
        "cluster_size=512",
        "cluster_size=2M",
        "lazy_refcounts=on",
        "preallocation=metadata",
    ] {
        let path = files.path();
        let mut command = Command::new("qemu-img");
        let command = command.args(["create", "-q", "-f", "qcow2", "-o", options]);
        if let Err(error) = command.arg(&path).arg(SIZE.to_string()).output() {
            eprintln!("SKIP: qemu-img: {error}");
            return;
        }
        writes_are_read(&disk(&path));
        assert!(!qemu_check(&path), "{options}");
    }
}

/// Has QEMU make images; says whether it is there.
#[allow(clippy::print_stderr)]
fn qemu_img(commands: &[&[&str]]) -> bool {
    for arguments in commands {
        match Command::new("qemu-img").args(*arguments).output() {
            Ok(output) => assert!(output.status.success(), "{output:?}"),
            Err(error) => {
                eprintln!("SKIP: qemu-img: {error}");
                return false;
            }
        }
    }
    true
}

/// Tables of more than a few MiB, as QEMU makes them too.
#[test]
fn large_disks_are_opened() {
    let files = Files::new();
    let path = files.path();
    let name = path.to_str().unwrap();
    for (options, size) in [
        ("cluster_size=512", "32G"),
        ("cluster_size=4k", "2T"),
        ("cluster_size=64k", "300T"),
    ] {
        let create = ["create", "-q", "-f", "qcow2", "-o", options, name, size];
        if qemu_img(&[&create]) {
            let mut driver = start(&disk(&path));
            assert_eq!(tell(&mut driver, OUT, 1 << 25, &[7; 512]), OK);
            assert_eq!(tell(&mut driver, FLUSH, 0, &[]), OK);
            drop(driver);
            assert!(!qemu_check(&path), "{options}");
        }
    }
}

/// A disk without sectors is none, and its image is not damaged.
#[test]
fn an_image_of_no_size_wants_one() {
    let files = Files::new();
    let path = files.path();
    if qemu_img(&[&["create", "-q", "-f", "qcow2", path.to_str().unwrap(), "0"]]) {
        let image = fs::read(path).unwrap();
        drop(files);
        let text = refused(&image);
        assert!(text.contains("has 0 bytes"), "{text}");
        assert!(text.contains("qemu-img resize"), "{text}");
    }
}

/// What names its tables costs no more to look through than its file is large: whether the tables' clusters are counted
/// in two places by turns, or most tables lie in holes.
#[test]
fn hostile_tables_take_no_time() {
    const LARGE: u64 = 2 << 20;
    let files = Files::new();
    let begin = std::time::Instant::now();
    for (tables, clusters) in [(1, 6), (8192, 8200)] {
        // Header, refcount table, two refcount blocks, L1 table, and what it names.
        let file = File::create(files.path()).unwrap();
        file.set_len(clusters * LARGE).unwrap();
        let mut header = empty_qcow2();
        header[20..24].copy_from_slice(&21_u32.to_be_bytes());
        header[36..40].copy_from_slice(&(tables as u32).to_be_bytes());
        header[40..48].copy_from_slice(&(4 * LARGE).to_be_bytes());
        header[48..56].copy_from_slice(&LARGE.to_be_bytes());
        let write = |at: u64, entries: Vec<u64>| {
            let bytes: Vec<u8> = entries.iter().flat_map(|it| it.to_be_bytes()).collect();
            file.write_all_at(&bytes, at).unwrap();
        };
        file.write_all_at(&header[..104], 0).unwrap();
        write(LARGE, vec![2 * LARGE, 3 * LARGE]);
        file.write_all_at(&[1; 2 * 8200], 2 * LARGE).unwrap();
        file.write_all_at(&[1; 16], 3 * LARGE).unwrap();
        write(
            4 * LARGE,
            (0..tables).map(|table| (5 + table) * LARGE).collect(),
        );
        if tables == 1 {
            // The second block counts from 2 TiB on.
            let entries = (0..LARGE / 8).map(|entry| (entry % 2) << 41 | (4 * LARGE));
            write(5 * LARGE, entries.collect());
        }
        drop(start(&disk(&files.path())));
    }
    assert!(begin.elapsed().as_secs() < 30, "{:?}", begin.elapsed());
}

/// An image whose data are elsewhere is one of two parts, whatever it counts. It is left as it was, with what whoever
/// writes to it has to clear.
#[test]
fn a_part_of_a_disk_is_refused() {
    let files = Files::new();
    let (raw, path) = (files.raw().path, files.path());
    fs::write(&raw, vec![7; SIZE as usize]).unwrap();
    let [from, name] = [&raw, &path].map(|path| path.to_str().unwrap());
    let data = format!("data_file={name}.data,data_file_raw=on");
    let convert = ["convert", "-f", "raw", "-O", "qcow2", "-o"];
    let overlay = ["create", "-f", "qcow2", "-F", "raw", "-b", from, name];
    let images: [&[&[&str]]; 2] = [
        &[&[&convert[..], &[&data, from, name]].concat()],
        &[&overlay, &["bitmap", "--add", name, "changes"]],
    ];
    let made = images.map(|commands| qemu_img(commands).then(|| fs::read(&path).unwrap()));
    drop(files);
    for image in made.into_iter().flatten() {
        let text = refused(&image);
        assert!(text.contains("is only a part of a disk"), "{text}");
    }
}
