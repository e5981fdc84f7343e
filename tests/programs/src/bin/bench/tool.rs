// SPDX-License-Identifier: GPL-2.0
//! The tool's way from its start to its guest's first instruction.

use crate::tsc;
use rvisor_tests::{check, Context, Device, Fail, Outcome};
use std::io::Read;
use std::process::{Command, Stdio};

const TOOL: &str = "/bin/rvisor";
/// Starts of which the middle one counts.
const ROUNDS: usize = 5;
/// What the guest's first instructions write to the serial port: a whole line, which the console shows at once.
const SIGN: u8 = b'\n';

/// They do, in 16-bit and in 64-bit code, and halt for good.
const CODE16: [u8; 9] = [0xba, 0xf8, 0x03, 0xb0, SIGN, 0xee, 0xf4, 0xeb, 0xfd];
const CODE64: [u8; 10] = [0x66, 0xba, 0xf8, 0x03, 0xb0, SIGN, 0xee, 0xf4, 0xeb, 0xfd];

/// Linux as it comes, but for its first instructions: a bzImage has its 64-bit entry 0x200 behind its setup code
/// (Documentation/arch/x86/boot.rst).
fn kernel() -> Result<Vec<u8>, Fail> {
    let mut image = std::fs::read("/guest/bzImage").during("/guest/bzImage")?;
    let entry = (usize::from(image[0x1f1]) + 1) * 512 + 0x200;
    image[entry..entry + CODE64.len()].copy_from_slice(&CODE64);
    Ok(image)
}

/// 64 KiB, of which the reset vector is the last 16 bytes.
fn firmware() -> Vec<u8> {
    let mut image = vec![0x90; 64 << 10];
    image[0xfff0..0xfff0 + CODE16.len()].copy_from_slice(&CODE16);
    image
}

/// From before the process is made until its guest's output has come.
fn start(device: &Device, words: &[&str]) -> Result<u64, Fail> {
    let start = tsc();
    let mut tool = Command::new(TOOL)
        .args(["run", "--device", &device.path()])
        .args(words)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .during(TOOL)?;
    let mut byte = [0];
    let read = tool.stdout.take().map(|mut out| out.read_exact(&mut byte));
    let end = tsc();
    tool.kill()?;
    tool.wait()?;
    check!(
        matches!(read, Some(Ok(()))) && byte == [SIGN],
        "its guest did not run, or wrote {byte:?}"
    );
    Ok(end - start)
}

pub(crate) fn report(device: &Device) -> Outcome {
    std::fs::write("/tmp/kernel", kernel()?).during("/tmp/kernel")?;
    std::fs::write("/tmp/firmware", firmware()).during("/tmp/firmware")?;
    let linux = [
        "--kernel",
        "/tmp/kernel",
        "--initrd",
        "/guest/initramfs.cpio",
    ];
    for (software, words) in [
        ("Linux", &linux[..]),
        ("firmware", &["--firmware", "/tmp/firmware"]),
    ] {
        let mut counts = (0..ROUNDS)
            .map(|_| start(device, words))
            .collect::<Result<Vec<_>, _>>()?;
        counts.sort_unstable();
        println!(
            "rvisor run to the first instruction of {software}\t{}",
            counts[ROUNDS / 2]
        );
    }
    Ok(())
}
