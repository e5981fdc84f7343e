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
