// SPDX-License-Identifier: GPL-2.0

//! Wrong input, given to the program itself: one line that names the cause and the next step, and exit
//! status 2. None of it needs a hypervisor.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use tempfile::TempDir;

const MIB: usize = 1 << 20;

/// Where a bzImage keeps what the tool reads of it (Documentation/arch/x86/boot.rst).
mod header {
    pub(crate) const SETUP_SECTS: usize = 0x1f1;
    pub(crate) const MAGIC: usize = 0x202;
    pub(crate) const VERSION: usize = 0x206;
    pub(crate) const LOADFLAGS: usize = 0x211;
    pub(crate) const CODE32_START: usize = 0x214;
    pub(crate) const INITRD_ADDR_MAX: usize = 0x22c;
    pub(crate) const XLOADFLAGS: usize = 0x236;
    pub(crate) const CMDLINE_SIZE: usize = 0x238;
    pub(crate) const PREF_ADDRESS: usize = 0x258;
    pub(crate) const INIT_SIZE: usize = 0x260;
}

/// A folder with files for the tests.
struct Files(TempDir);

impl Files {
    fn new() -> Self {
        Self(tempfile::tempdir().expect("a folder for the test"))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn write(&self, name: &str, content: &[u8]) -> PathBuf {
        let path = self.path(name);
        fs::write(&path, content).expect("a file for the test");
        path
    }

    /// A bzImage with a 64-bit entry that runs at 16 MiB and needs `init_size` bytes there. There is no
    /// code in it.
    fn bzimage(&self, init_size: usize) -> PathBuf {
        let mut image = vec![0; 64 << 10];
        let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
        put(header::SETUP_SECTS, &[4]);
        put(header::MAGIC, b"HdrS");
        put(header::VERSION, &0x020f_u16.to_le_bytes());
        put(header::LOADFLAGS, &[1]);
        put(header::CODE32_START, &0x10_0000_u32.to_le_bytes());
        put(header::INITRD_ADDR_MAX, &0x7fff_ffff_u32.to_le_bytes());
        put(header::XLOADFLAGS, &1_u16.to_le_bytes());
        put(header::CMDLINE_SIZE, &2047_u32.to_le_bytes());
        put(header::PREF_ADDRESS, &(16 * MIB as u64).to_le_bytes());
        put(header::INIT_SIZE, &(init_size as u32).to_le_bytes());
        self.write("bzImage", &image)
    }
}

fn rvisor(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_rvisor"))
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .expect("the program was built")
}

/// Checks status 2, silence on standard output, and one line with all of `words`.
fn refused(arguments: &[&str], words: &[&str]) {
    let output = rvisor(arguments);
    let line = String::from_utf8(output.stderr).expect("messages are text");
    assert_eq!(output.status.code(), Some(2), "{arguments:?}: {line}");
    assert!(output.stdout.is_empty());
    assert_eq!(
        (line.lines().count(), line.ends_with('\n')),
        (1, true),
        "{line}"
    );
    assert!(line.starts_with("rvisor: "), "{line}");
    // The cause and the next step.
    assert!(line.contains("; "), "{line}");
    for word in words {
        assert!(line.contains(word), "{word:?} is not in {line:?}");
    }
}

fn run(kernel: &Path, more: &[&str], words: &[&str]) {
    let kernel = kernel.to_str().expect("its name is text");
    refused(&[&["run", "--kernel", kernel], more].concat(), words);
}

#[test]
fn a_kernel_is_needed() {
    refused(&["run"], &["--kernel", "--help"]);
    refused(&["run", "--initrd", "i"], &["--kernel", "--help"]);
}

#[test]
fn unknown_words_are_refused() {
    refused(&["start"], &["start", "--help"]);
    refused(
        &["run", "--kernel", "k", "--floppy", "d"],
        &["--floppy", "--help"],
    );
    refused(&["check", "now"], &["now", "--help"]);
}

#[test]
fn a_missing_kernel_is_named() {
    let files = Files::new();
    run(
        &files.path("nothing"),
        &[],
        &["there is no file", "nothing", "--kernel"],
    );
}

#[test]
fn a_missing_initrd_is_named() {
    let files = Files::new();
    let initrd = files.path("nothing");
    let more = ["--initrd", initrd.to_str().unwrap()];
    run(
        &files.bzimage(MIB),
        &more,
        &["there is no file", "nothing", "--initrd"],
    );
}

#[test]
fn a_program_is_no_kernel() {
    run(
        Path::new(env!("CARGO_BIN_EXE_rvisor")),
        &[],
        &["is a program, not a kernel", "bzImage"],
    );
}

#[test]
fn a_folder_is_no_kernel() {
    let files = Files::new();
    run(files.0.path(), &[], &["is not a file"]);
}

#[test]
fn what_is_no_kernel_is_refused() {
    let files = Files::new();
    for (name, content) in [
        ("empty", b"".as_slice()),
        ("script", b"#!/bin/sh\n"),
        ("zeros", &[0; 4096]),
        ("short-elf", b"\x7fELF"),
    ] {
        run(&files.write(name, content), &[], &[name, "bzImage"]);
    }
}

#[test]
fn a_program_of_another_machine_is_no_kernel() {
    let files = Files::new();
    let mut head = vec![0; 64];
    head[..5].copy_from_slice(b"\x7fELF\x02");
    // EM_AARCH64.
    head[18] = 0xb7;
    run(&files.write("arm64", &head), &[], &["x86-64"]);
}

#[test]
fn a_kernel_of_32_bits_is_one() {
    let files = Files::new();
    let path = files.bzimage(MIB);
    let mut image = fs::read(&path).unwrap();
    image[header::XLOADFLAGS] = 0;
    let device = files.path("no-device");
    // The device is the next thing that is looked at.
    run(
        &files.write("small", &image),
        &["--device", device.to_str().unwrap()],
        &["there is no", "no-device"],
    );
}

#[test]
fn a_kernel_of_an_old_protocol_is_refused() {
    let files = Files::new();
    let path = files.bzimage(MIB);
    let mut image = fs::read(&path).unwrap();
    image[header::VERSION..][..2].copy_from_slice(&0x0209_u16.to_le_bytes());
    run(&files.write("old", &image), &[], &["old", "2.9", "2.10"]);
}

/// `rvisor run --firmware`, which must be refused.
fn run_firmware(firmware: &Path, more: &[&str], words: &[&str]) {
    let firmware = firmware.to_str().expect("its name is text");
    refused(&[&["run", "--firmware", firmware], more].concat(), words);
}

#[test]
fn what_is_no_firmware_is_refused() {
    let files = Files::new();
    let mut image = vec![0x90; 64 << 10];
    run_firmware(
        &files.path("nothing"),
        &[],
        &["there is no file", "nothing", "--firmware"],
    );
    run_firmware(files.0.path(), &[], &["is not a file"]);
    // Too short, too long, no whole pages.
    for size in [0, 32 << 10, 17 * MIB, (64 << 10) + 1] {
        run_firmware(
            &files.write("size", &vec![0x90; size]),
            &[],
            &["size", "64 KiB", "16 MiB"],
        );
    }
    for empty in [0, 0xff] {
        let end = image.len() - 16;
        image[end..].fill(empty);
        run_firmware(
            &files.write("empty", &image),
            &[],
            &["empty", "reset vector"],
        );
    }
}

#[test]
fn firmware_is_a_guests_whole_software() {
    let files = Files::new();
    let firmware = files.write("firmware", &vec![0x90; 64 << 10]);
    let kernel = files.bzimage(MIB);
    for (option, value) in [
        ("--kernel", kernel.to_str().unwrap()),
        ("--initrd", "i"),
        ("--cmdline", "c"),
    ] {
        run_firmware(&firmware, &[option, value], &["--firmware", option]);
    }
    // Alone it is right: the device is the next thing that is looked at.
    let device = files.path("no-device");
    run_firmware(
        &firmware,
        &["--device", device.to_str().unwrap()],
        &["there is no", "no-device"],
    );
    run_firmware(&firmware, &["--memory", "1M"], &["too small"]);
}

#[test]
fn a_cut_elf_kernel_is_refused() {
    let files = Files::new();
    let whole = fs::read(env!("CARGO_BIN_EXE_rvisor")).unwrap();
    // The program itself is an ELF file whose parts would lie below 1 MiB or be missing.
    run(&files.write("cut", &whole[..4096]), &[], &["cut"]);
}

#[test]
fn memory_too_small_for_the_kernel_tells_how_much_is_needed() {
    let files = Files::new();
    // 16 MiB is where it runs, 24 MiB what it needs there.
    let kernel = files.bzimage(24 * MIB);
    run(
        &kernel,
        &["--memory", "39M"],
        &["--memory 39 MiB", "too small", "the kernel", "40 MiB"],
    );
    run(&kernel, &["--memory", "4K"], &["too small"]);
    run(&kernel, &["--memory", "0"], &["too small"]);
}

#[test]
fn a_kernel_that_wants_to_run_beyond_all_memory_is_refused() {
    let files = Files::new();
    let mut image = fs::read(files.bzimage(MIB)).unwrap();
    image[header::PREF_ADDRESS..][..8].fill(0xff);
    run(&files.write("far", &image), &[], &["the kernel", "3 GiB"]);
}

#[test]
fn memory_too_small_for_the_initrd_tells_how_much_is_needed() {
    let files = Files::new();
    let kernel = files.bzimage(24 * MIB);
    let initrd = files.write("initrd", &vec![1; 8 * MIB]);
    let more = ["--initrd", initrd.to_str().unwrap(), "--memory", "47M"];
    run(&kernel, &more, &["too small", "initrd", "48 MiB"]);
}

#[test]
fn memory_that_suffices_is_not_refused() {
    let files = Files::new();
    let kernel = files.bzimage(24 * MIB);
    let initrd = files.write("initrd", &vec![1; 8 * MIB]);
    let device = files.path("no-device");
    let more = [
        "--initrd",
        initrd.to_str().unwrap(),
        "--memory",
        "48M",
        "--device",
        device.to_str().unwrap(),
    ];
    // The device is the next thing that is looked at.
    run(&kernel, &more, &["there is no", "no-device"]);
}

#[test]
fn memory_larger_than_the_host_is_refused() {
    let files = Files::new();
    run(
        &files.bzimage(MIB),
        &["--memory", "900T"],
        &["--memory 921600 GiB", "more than this host"],
    );
}

#[test]
fn memory_that_is_no_size_is_refused() {
    let files = Files::new();
    let kernel = files.bzimage(MIB);
    for size in ["many", "256X", "-1", "99999999999G", "1.5G"] {
        run(&kernel, &[&format!("--memory={size}")], &["--memory", size]);
    }
    run(&kernel, &["--memory", "33554433"], &["4 KiB"]);
}

#[test]
fn cpus_out_of_range_are_refused() {
    let files = Files::new();
    let kernel = files.bzimage(MIB);
    run(&kernel, &["--cpus", "0"], &["--cpus 0", "1 or more"]);
    run(&kernel, &["--cpus", "255"], &["--cpus 255", "254"]);
    run(&kernel, &["--cpus", "two"], &["two"]);
    run(&kernel, &["--cpus=-1"], &["-1"]);
}

#[test]
fn a_long_command_line_is_refused() {
    let files = Files::new();
    let line = "x".repeat(2048);
    run(
        &files.bzimage(MIB),
        &["--cmdline", &line],
        &["command line", "2047"],
    );
}

#[test]
fn a_missing_device_tells_how_to_load_the_module() {
    if Path::new("/dev/rvisor").exists() {
        return;
    }
    let files = Files::new();
    run(
        &files.bzimage(MIB),
        &[],
        &["there is no /dev/rvisor", "insmod rvisor.ko"],
    );
}

#[test]
fn a_device_without_kvms_api_is_refused() {
    let files = Files::new();
    let kernel = files.bzimage(MIB);
    run(
        &kernel,
        &["--device", "/dev/null"],
        &["/dev/null", "KVM's API"],
    );
    // A FIFO must not be opened: that would wait for a writer.
    let fifo = files.path("fifo");
    assert!(Command::new("mkfifo")
        .arg(&fifo)
        .status()
        .unwrap()
        .success());
    run(
        &kernel,
        &["--device", fifo.to_str().unwrap()],
        &["no character device"],
    );
    run(
        &kernel,
        &["--device", files.0.path().to_str().unwrap()],
        &["no character device"],
    );
}

#[test]
fn help_is_no_error() {
    for arguments in [
        vec!["--help"],
        vec!["run", "--help"],
        vec!["check", "--help"],
        vec!["--version"],
    ] {
        let output = rvisor(&arguments);
        assert_eq!(output.status.code(), Some(0));
        assert!(output.stderr.is_empty() && !output.stdout.is_empty());
    }
}

#[test]
fn check_fails_where_the_device_is_missing_and_says_what_to_do() {
    let files = Files::new();
    let device = files.path("no-device");
    let output = rvisor(&["check", "--device", device.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(1));
    let text = String::from_utf8(output.stdout).unwrap();
    let mut lines = text.lines();
    assert!(
        lines.any(|line| line.starts_with("FAIL") && line.contains("no-device")),
        "{text}"
    );
    assert!(
        lines.next().is_some_and(|line| line.contains("next: ")),
        "{text}"
    );
}

/// `--disk` with `text` is refused with all of `words`.
fn disk(text: &str, words: &[&str]) {
    let files = Files::new();
    run(&files.bzimage(MIB), &["--disk", text], words);
}

#[test]
fn a_missing_disk_is_named() {
    disk(
        "/nowhere/d.img",
        &["/nowhere/d.img", "No such file", "truncate"],
    );
}

#[test]
fn what_is_no_disk_is_refused() {
    disk("/", &["--disk /", "neither a file nor a block device"]);
    disk("/dev/null", &["/dev/null", "neither a file nor"]);
    let files = Files::new();
    let empty = files.write("empty", b"");
    disk(empty.to_str().unwrap(), &["empty", "0 bytes", "truncate"]);
    let odd = files.write("odd", &[1; 1000]);
    disk(odd.to_str().unwrap(), &["odd", "1000 bytes"]);
}

#[test]
fn a_damaged_image_is_refused() {
    let files = Files::new();
    let mut image = vec![0; 1 << 18];
    image[..8].copy_from_slice(b"QFI\xfb\x00\x00\x00\x03");
    let path = files.write("d.qcow2", &image);
    let path = path.to_str().unwrap();
    disk(path, &["d.qcow2", "damaged", "qemu-img check"]);
    let text = files.write("text", &[b'x'; 4096]);
    let text = format!("{},format=qcow2", text.display());
    disk(&text, &["text", "is no qcow2 image"]);
}

#[test]
fn unknown_words_of_a_disk_are_refused() {
    disk("d,format=vmdk", &["format=vmdk", "format=qcow2"]);
    disk("d,serial=123456789012345678901", &["serial=1234", "20"]);
    disk("d,", &["format=raw"]);
}

#[test]
fn more_disks_than_interrupts_are_refused() {
    let files = Files::new();
    let path = files.write("d.img", &[0; 512]);
    let readonly = format!("{},readonly", path.display());
    let many: Vec<&str> = (0..30).flat_map(|_| ["--disk", &readonly]).collect();
    run(&files.bzimage(MIB), &many, &["virtio devices", "11"]);
}

#[test]
fn networks_have_to_be_right() {
    let files = Files::new();
    let kernel = files.bzimage(MIB);
    for (network, words) in [
        ("bridge=br0", "begins with tap=NAME"),
        ("tap=a/b", "names no interface"),
        ("user,mac=01:00:00:00:00:00", "not the address of one card"),
        ("user,forward=80", "no pair of ports"),
        ("socket=/nowhere/link", "No such file"),
    ] {
        run(&kernel, &["--net", network], &["--net", network, words]);
    }
    let file = files.write("file", b"precious");
    let network = format!("socket={}", file.display());
    run(&kernel, &["--net", &network], &["no socket", "nothing is"]);
    assert_eq!(fs::read(file).expect("the file"), b"precious");
}

#[test]
fn consoles_have_to_be_known() {
    let words = ["--console", "screen", "serial, virtio"];
    refused(&["run", "--kernel", "k", "--console", "screen"], &words);
}

/// Where nobody can be told, the exit status still tells.
#[test]
fn standard_error_may_be_full() {
    let full = || fs::File::create("/dev/full").expect("a device that every host has");
    let (reader, pipe) = rustix::pipe::pipe().expect("a pipe");
    // Its room is a multiple of that, and there is none left for the line.
    let flags = rustix::fs::OFlags::NONBLOCK;
    rustix::fs::fcntl_setfl(&pipe, flags).expect("a pipe");
    while rustix::io::write(&pipe, &[0; 4096]).is_ok() {}
    rustix::fs::fcntl_setfl(&pipe, rustix::fs::OFlags::empty()).expect("a pipe");
    for stderr in [Stdio::from(full()), Stdio::from(pipe)] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_rvisor"));
        let command = command.args(["console", "no/name"]).stderr(stderr);
        let status = command.status().expect("it starts");
        assert_eq!(status.code(), Some(2));
    }
    drop(reader);
}

#[test]
fn standard_output_may_be_closed() {
    for words in [
        &["check"][..],
        &["check", "--device", "/dev/null"],
        &["ps"],
        &["ps", "--json"],
    ] {
        let (reader, writer) = rustix::pipe::pipe().expect("a pipe");
        drop(reader);
        let output = Command::new(env!("CARGO_BIN_EXE_rvisor"))
            .args(words)
            .stdout(writer)
            .output()
            .expect("the program was built");
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(said, "", "{words:?}");
        assert!(matches!(output.status.code(), Some(0 | 1)), "{words:?}");
    }
}
