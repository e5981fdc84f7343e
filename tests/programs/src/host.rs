// SPDX-License-Identifier: GPL-2.0
//! What the host's kernel says of itself.

use crate::ktap::{Context, Fail};

/// KiB of the host's memory that nobody has: free pages, and those that wait in each CPU's list, which
/// MemFree of /proc/meminfo leaves out.
///
/// # Errors
///
/// Where /proc/zoneinfo can't be read.
pub fn free_kib() -> Result<u64, Fail> {
    // Reading it folds each CPU's counts into the sums; a kernel without it is only less exact.
    let _folded = std::fs::read("/proc/sys/vm/stat_refresh");
    let text = std::fs::read_to_string("/proc/zoneinfo").during("/proc/zoneinfo")?;
    let pages: u64 = text
        .lines()
        .filter_map(|line| {
            let mut words = line.split_whitespace();
            let number = match (words.next()?, words.next()?) {
                ("pages", "free") => words.next()?,
                ("count:", number) => number,
                _ => return None,
            };
            number.parse::<u64>().ok()
        })
        .sum();
    if pages == 0 {
        return Err(Fail::new("/proc/zoneinfo names no free pages"));
    }
    Ok(pages * 4)
}

/// Pages that are page tables of guests, of all that there are.
///
/// # Errors
///
/// Where /proc/meminfo does not tell.
pub fn guest_table_pages() -> Result<u64, Fail> {
    // As in `free_kib`.
    let _folded = std::fs::read("/proc/sys/vm/stat_refresh");
    let text = std::fs::read_to_string("/proc/meminfo").during("/proc/meminfo")?;
    text.lines()
        .find_map(|line| line.strip_prefix("SecPageTables:"))
        .and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok())
        .map(|kib| kib / 4)
        .ok_or_else(|| Fail::new("/proc/meminfo has no SecPageTables"))
}

/// A file of the kernel's that holds a number, put back to what it was at the end.
#[derive(Debug)]
pub struct Setting {
    path: &'static str,
    old: String,
}

impl Setting {
    /// Writes a number.
    ///
    /// # Errors
    ///
    /// Where there is no such file or it does not take the number.
    pub fn new(path: &'static str, value: u64) -> Result<Self, Fail> {
        let old = std::fs::read_to_string(path).during(path)?;
        let setting = Self { path, old };
        std::fs::write(path, value.to_string()).during(path)?;
        Ok(setting)
    }
}

impl Drop for Setting {
    fn drop(&mut self) {
        let _best_effort = std::fs::write(self.path, self.old.trim());
    }
}

/// Swap space in the RAM disk.
#[derive(Debug)]
pub struct Swap(());

const SWAP_DEVICE: &std::ffi::CStr = c"/dev/ram0";

impl Swap {
    /// Switches it on.
    ///
    /// # Errors
    ///
    /// A skip where there is no RAM disk; what mkswap(8) and swapon(2) give.
    pub fn on() -> Result<Self, Fail> {
        if !std::path::Path::new("/dev/ram0").exists() {
            return Err(Fail::skip("there is no /dev/ram0 to swap to"));
        }
        // A test that was killed may have left it on.
        drop(Self(()));
        let made = std::process::Command::new("mkswap")
            .arg("/dev/ram0")
            .output()
            .during("mkswap")?;
        if !made.status.success() {
            return Err(Fail::new(String::from_utf8_lossy(&made.stderr)).during("mkswap"));
        }
        // SAFETY: The path is a C string.
        if unsafe { libc::swapon(SWAP_DEVICE.as_ptr(), 0) } != 0 {
            return Err(Fail::from(std::io::Error::last_os_error()).during("swapon"));
        }
        Ok(Self(()))
    }
}

impl Drop for Swap {
    fn drop(&mut self) {
        // SAFETY: The path is a C string.
        unsafe { libc::swapoff(SWAP_DEVICE.as_ptr()) };
    }
}

/// The CPUs that threads may run on.
///
/// # Errors
///
/// What the kernel says.
pub fn online_cpus() -> Result<usize, Fail> {
    Ok(std::thread::available_parallelism()?.get())
}

/// Lets the thread `thread` run on this CPU alone.
///
/// # Errors
///
/// What the kernel says.
pub fn bind_to_cpu(thread: libc::pid_t, cpu: usize) -> Result<(), Fail> {
    // SAFETY: A set of CPUs is plain data, for which zeros are the empty set.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    // SAFETY: The set is whole; CPUs past its end are ignored.
    unsafe { libc::CPU_SET(cpu, &mut set) };
    // SAFETY: The set is as long as said.
    if unsafe { libc::sched_setaffinity(thread, size_of_val(&set), &raw const set) } != 0 {
        return Err(std::io::Error::last_os_error().into());
    }
    Ok(())
}

/// Lets this thread run before all ordinary ones, the kernel's workers too, or no more.
///
/// # Errors
///
/// What the kernel says.
pub fn real_time(on: bool) -> Result<(), Fail> {
    let policy = if on {
        libc::SCHED_FIFO
    } else {
        libc::SCHED_OTHER
    };
    let parameters = libc::sched_param {
        sched_priority: on.into(),
    };
    // SAFETY: Reads the structure.
    if unsafe { libc::sched_setscheduler(0, policy, &raw const parameters) } != 0 {
        return Err(std::io::Error::last_os_error().into());
    }
    Ok(())
}

/// The kernel's messages of a kill are meant: they go to no console, and the log says that they are.
pub struct QuietLog(());

const CONSOLE: &str = "/proc/sys/kernel/printk";
const LOG: &str = "/dev/kmsg";

impl QuietLog {
    /// tests/lib/ktap.sh leaves out what is between the two marks.
    ///
    /// # Errors
    ///
    /// Where the log or the setting of the console can't be written.
    pub fn new() -> Result<Self, Fail> {
        std::fs::write(LOG, "rvisor-test: what follows is meant").during(LOG)?;
        std::fs::write(CONSOLE, "1").during(CONSOLE)?;
        Ok(Self(()))
    }
}

impl Drop for QuietLog {
    fn drop(&mut self) {
        let _best_effort = std::fs::write(CONSOLE, "5");
        let _best_effort = std::fs::write(LOG, "rvisor-test: what follows is not meant");
    }
}
