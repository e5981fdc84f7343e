// SPDX-License-Identifier: GPL-2.0
//! Machines of the tool's, with guests that want all they can get.

use rvisor_tests::ktap::Context;
use rvisor_tests::{check, Device, Fail, Outcome};
use std::ffi::CString;
use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

/// The tool.
pub(crate) const TOOL: &str = "/bin/rvisor";
const ROOT: &str = "/sys/fs/cgroup";
/// Where root's machines have their cgroups.
pub(crate) const PARENT: &str = "/sys/fs/cgroup/rvisor";
/// How long to wait between two looks.
const PAUSE: Duration = Duration::from_millis(20);
/// CPU time by which a machine has got to its guest.
const STARTED: Duration = Duration::from_millis(60);

/// What runs in a guest.
pub(crate) enum Software {
    /// Firmware that jumps to itself.
    Spins,
    /// Firmware that writes to each page from 1 MiB to 120 MiB, and spins then.
    EatsMemory,
    /// Linux with a shell on its console.
    Shell,
}

/// Firmware of 64 KiB that is entered at its first byte. All of it takes interrupts: Bochs lets none out of a guest
/// that does not.
fn firmware(code: &[(usize, &[u8])]) -> Vec<u8> {
    let mut image = vec![0x90; 64 << 10];
    // The reset vector: jmp to offset 0.
    for (at, bytes) in [(0xfff0, [0xe9, 0x0d, 0x00].as_slice())].iter().chain(code) {
        image[*at..*at + bytes.len()].copy_from_slice(bytes);
    }
    image
}

/// Flat 32-bit segments, then the pages.
fn eater() -> Vec<u8> {
    let enter = [
        &[0xfb][..],                                       // sti
        &[0x2e, 0x66, 0x0f, 0x01, 0x16, 0x40, 0x00],       // lgdt cs:[0x40]
        &[0x0f, 0x20, 0xc0, 0x0c, 0x01, 0x0f, 0x22, 0xc0], // mov eax, cr0; or al, 1; mov cr0, eax
        &[0x66, 0xea, 0x80, 0x00, 0xff, 0xff, 0x08, 0x00], // jmp 8:0xffff0080
    ]
    .concat();
    let gdtr = [0x17, 0x00, 0x50, 0x00, 0xff, 0xff];
    let gdt = [
        [0; 8],
        [0xff, 0xff, 0, 0, 0, 0x9b, 0xcf, 0],
        [0xff, 0xff, 0, 0, 0, 0x93, 0xcf, 0],
    ]
    .concat();
    let eat = [
        &[0x66, 0xb8, 0x10, 0x00, 0x8e, 0xd8][..], // mov ax, 0x10; mov ds, ax
        &[0xbf, 0x00, 0x00, 0x10, 0x00],           // mov edi, 0x100000
        &[0x89, 0x3f],                             // mov [edi], edi
        &[0x81, 0xc7, 0x00, 0x10, 0x00, 0x00],     // add edi, 0x1000
        &[0x81, 0xff, 0x00, 0x00, 0x80, 0x07],     // cmp edi, 0x7800000
        &[0x72, 0xf0, 0xeb, 0xfe],                 // jb to the write; jmp $
    ]
    .concat();
    firmware(&[(0, &enter), (0x40, &gdtr), (0x50, &gdt), (0x80, &eat)])
}

/// `rvisor run` with that software, which dies with the test.
pub(crate) fn tool(device: &Device, software: &Software) -> Result<Command, Fail> {
    let mut command = Command::new(TOOL);
    command.args(["run", "--device", &device.path()]);
    match software {
        Software::Shell => command.args([
            "--kernel",
            "/guest/bzImage",
            "--initrd",
            "/guest/initramfs.cpio",
            "--memory",
            "96M",
            "--cmdline",
            "loglevel=4 guest.end=shell",
        ]),
        Software::Spins | Software::EatsMemory => {
            let (name, image) = match software {
                Software::EatsMemory => ("eats", eater()),
                _ => ("spins", firmware(&[(0, &[0xfb, 0xeb, 0xfe])])),
            };
            let path = format!("/tmp/{name}.rom");
            std::fs::write(&path, image).during(&path)?;
            command.args(["--firmware", &path, "--memory", "128M"])
        }
    };
    command
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    // SAFETY: prctl is all that runs between fork and exec.
    unsafe {
        command.pre_exec(|| {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            Ok(())
        });
    }
    Ok(command)
}

/// `rvisor up` with a machine, `eater`, that reaches its `memory-max`.
pub(crate) fn up_eater(device: &Device) -> Result<Output, Fail> {
    let firmware = "/tmp/up-eats.rom";
    std::fs::write(firmware, eater()).during(firmware)?;
    let file = "/tmp/eater.toml";
    let text = format!(
        "[machine.eater]\nfirmware = {firmware:?}\nmemory = '128M'\nmemory-max = '32M'\ndevice = {:?}\n",
        device.path()
    );
    std::fs::write(file, text).during(file)?;
    let mut command = Command::new(TOOL);
    command.args(["up", file]).stdin(Stdio::null());
    command.output().during(TOOL)
}

/// A machine that runs.
pub(crate) struct Machine {
    name: String,
    child: Child,
    parent: PathBuf,
    screen: PathBuf,
}

impl Machine {
    pub(crate) fn start(device: &Device, software: Software, words: &[&str]) -> Result<Self, Fail> {
        Self::start_in(device, None, software, words)
    }

    /// Starts the tool in the cgroup `inside`.
    pub(crate) fn start_in(
        device: &Device,
        inside: Option<&Path>,
        software: Software,
        words: &[&str],
    ) -> Result<Self, Fail> {
        static NEXT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let number = NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        Self::start_named(
            device,
            &format!("sharing-{number}"),
            inside,
            software,
            words,
        )
    }

    /// Starts the tool with that name in the cgroup `inside`.
    pub(crate) fn start_named(
        device: &Device,
        name: &str,
        inside: Option<&Path>,
        software: Software,
        words: &[&str],
    ) -> Result<Self, Fail> {
        let screen = PathBuf::from(format!("/tmp/{name}.screen"));
        let mut command = tool(device, &software)?;
        command
            .args(["--name", name])
            .args(words)
            .stdout(std::fs::File::create(&screen)?);
        if let Some(inside) = inside {
            let procs = inside.join("cgroup.procs");
            // SAFETY: Between fork and exec it makes three system calls and allocates nothing that another
            // thread could hold, there being none.
            unsafe { command.pre_exec(move || std::fs::write(&procs, "0")) };
        }
        Ok(Self {
            name: name.to_owned(),
            child: command.spawn().during(TOOL)?,
            parent: inside.unwrap_or(Path::new(PARENT)).to_owned(),
            screen,
        })
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Its cgroup.
    pub(crate) fn group(&self) -> PathBuf {
        self.parent.join(format!("{}.machine", self.name()))
    }

    /// What its cgroup has had of CPUs.
    pub(crate) fn cpu_time(&self) -> Result<Duration, Fail> {
        let path = self.group().join("cpu.stat");
        let text = std::fs::read_to_string(&path).during(&path.display().to_string())?;
        text.lines()
            .find_map(|line| line.strip_prefix("usage_usec ")?.parse().ok())
            .map(Duration::from_micros)
            .ok_or_else(|| Fail::new(format!("cpu.stat says {text}")))
    }

    /// Waits until it has got to its guest.
    pub(crate) fn await_cpu_time(&self, patience: Duration) -> Outcome {
        let end = Instant::now() + patience;
        while !self.cpu_time().is_ok_and(|time| time > STARTED) {
            check!(Instant::now() < end, "{} does not start", self.name());
            std::thread::sleep(PAUSE);
        }
        Ok(())
    }

    /// Waits for `text` on its console.
    pub(crate) fn await_text(&self, text: &str, patience: Duration) -> Outcome {
        let end = Instant::now() + patience;
        loop {
            let screen = std::fs::read(&self.screen)?;
            let screen = String::from_utf8_lossy(&screen);
            if screen.contains(text) {
                return Ok(());
            }
            check!(Instant::now() < end, "no {text:?} on the console: {screen}");
            std::thread::sleep(PAUSE);
        }
    }

    pub(crate) fn type_keys(&mut self, keys: &[u8]) -> Outcome {
        let stdin = self
            .child
            .stdin
            .as_mut()
            .ok_or_else(|| Fail::new("its input is closed"))?;
        Ok(stdin.write_all(keys)?)
    }

    /// The CPUs that each of its threads may run on, as the kernel lists them.
    pub(crate) fn allowed_cpus(&self) -> Result<Vec<String>, Fail> {
        let mut found = Vec::new();
        for thread in std::fs::read_dir(format!("/proc/{}/task", self.child.id()))? {
            let text = std::fs::read_to_string(thread?.path().join("status"))?;
            let line = text
                .lines()
                .find_map(|line| line.strip_prefix("Cpus_allowed_list:"));
            found.push(line.unwrap_or_default().trim().to_owned());
        }
        Ok(found)
    }

    pub(crate) fn signal(&self, number: i32) -> Outcome {
        let pid = libc::pid_t::try_from(self.child.id()).map_err(|_| Fail::new("its pid"))?;
        // SAFETY: Our own child, not reaped yet.
        unsafe { libc::kill(pid, number) };
        Ok(())
    }

    pub(crate) fn kill(&mut self) -> Outcome {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    /// Waits for its end; its exit status and what it said.
    pub(crate) fn end(&mut self, patience: Duration) -> Result<(Option<i32>, String), Fail> {
        let end = Instant::now() + patience;
        let status = loop {
            if let Some(status) = self.child.try_wait()? {
                break status;
            }
            check!(Instant::now() < end, "{} does not end", self.name());
            std::thread::sleep(PAUSE);
        };
        let mut text = String::new();
        if let Some(stderr) = self.child.stderr.as_mut() {
            std::io::Read::read_to_string(stderr, &mut text)?;
        }
        Ok((status.code(), text))
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // It removes its cgroup where it ends by itself.
        let _gone_is_fine = self.signal(libc::SIGTERM);
        if self.end(Duration::from_secs(2)).is_err() {
            let _ = self.kill();
        }
        let _ = std::fs::remove_file(&self.screen);
    }
}

/// The hierarchy of cgroups, where it belongs.
pub(crate) struct Hierarchy(());

impl Hierarchy {
    pub(crate) fn mounted() -> Result<Self, Fail> {
        let (target, kind) = (mount_point()?, c"cgroup2".as_ptr());
        // SAFETY: All are C strings, and the type takes no data.
        if unsafe { libc::mount(kind, target.as_ptr(), kind, 0, std::ptr::null()) } != 0 {
            let error = std::io::Error::last_os_error();
            return Err(Fail::skip(format!("no cgroup2 can be mounted: {error}")));
        }
        Ok(Self(()))
    }
}

impl Drop for Hierarchy {
    fn drop(&mut self) {
        unmount();
    }
}

fn mount_point() -> Result<CString, Fail> {
    CString::new(ROOT).map_err(|error| Fail::new(error.to_string()))
}

pub(crate) fn unmount() {
    if let Ok(target) = mount_point() {
        // SAFETY: A C string.
        while unsafe { libc::umount2(target.as_ptr(), libc::MNT_DETACH) } == 0 {}
    }
}

/// Makes a cgroup with systemd's mark of one that it has given away.
pub(crate) fn delegate(name: &str) -> Result<PathBuf, Fail> {
    let root = Path::new(ROOT);
    let path = root.join(name);
    std::fs::create_dir_all(&path).during("a cgroup")?;
    std::fs::write(root.join("cgroup.subtree_control"), "+cpu").during("+cpu")?;
    let target = CString::new(path.as_os_str().as_encoded_bytes())
        .map_err(|error| Fail::new(error.to_string()))?;
    // SAFETY: C strings, and one byte at the value's address.
    let failed = unsafe {
        libc::setxattr(
            target.as_ptr(),
            c"user.delegate".as_ptr(),
            c"1".as_ptr().cast(),
            1,
            0,
        )
    };
    if failed != 0 {
        return Err(Fail::from(std::io::Error::last_os_error()).during("user.delegate"));
    }
    Ok(path)
}
