// SPDX-License-Identifier: GPL-2.0

//! KVM's binary statistics: a header, descriptors and data in one file (Documentation/virt/kvm/api.rst, 4.134).

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use crate::ioctls;
use crate::trace::reason_name;

/// Counters by their names.
pub type Counts = BTreeMap<String, u64>;

/// Bounds of what is believed of a header.
const MOST: usize = 1024;
const LONGEST_NAME: usize = 256;
/// Bytes of a header, and of a descriptor without its name.
const HEADER: usize = 24;
const DESCRIPTOR: usize = 16;
/// rvisor's histogram of exits by their basic reason.
const REASONS: &str = "exit_reasons";
/// How the names of KVM's counters of exits end.
const EXITS: &str = "_exits";

/// The statistics of a VM or a virtual CPU.
#[derive(Debug)]
pub struct Counters {
    file: File,
    /// Where the data begins.
    data: u64,
    /// Bytes of the data.
    size: usize,
    found: Vec<Statistic>,
}

#[derive(Debug, PartialEq, Eq)]
struct Statistic {
    name: String,
    /// In the data, in bytes.
    offset: usize,
    /// 1, or that of a histogram's values.
    values: usize,
}

impl Counters {
    /// Of that VM or virtual CPU; none where the hypervisor has none.
    #[must_use]
    pub fn open(of: &impl AsRawFd) -> Option<Self> {
        Self::from_file(ioctls::statistics(of).ok()?)
    }

    fn from_file(file: File) -> Option<Self> {
        let mut header = [0; HEADER];
        file.read_exact_at(&mut header, 0).ok()?;
        let [_, name_size, count, _, descriptors, data] =
            [0, 1, 2, 3, 4, 5].map(|field| number(&header, 4 * field, 4));
        let (name_size, count) = (name_size as usize, count as usize);
        if name_size > LONGEST_NAME || count > MOST {
            return None;
        }
        let mut block = vec![0; count * (DESCRIPTOR + name_size)];
        file.read_exact_at(&mut block, descriptors).ok()?;
        let found: Vec<_> = block
            .chunks_exact(DESCRIPTOR + name_size)
            .filter_map(statistic)
            .collect();
        let size = found
            .iter()
            .map(|one| one.offset + 8 * one.values)
            .max()
            .unwrap_or(0);
        Some(Self {
            file,
            data,
            size,
            found,
        })
    }

    /// The counters, and those of exits by their reason.
    #[must_use]
    pub fn read(&self) -> (Counts, Counts) {
        let mut data = vec![0; self.size];
        if self.file.read_exact_at(&mut data, self.data).is_err() {
            return Default::default();
        }
        let (mut counts, mut exits) = (Counts::new(), Counts::new());
        for one in &self.found {
            if one.values == 1 {
                counts.insert(one.name.clone(), number(&data, one.offset, 8));
            } else if one.name == REASONS {
                for reason in 0..one.values {
                    let count = number(&data, one.offset + 8 * reason, 8);
                    if count > 0 {
                        exits.insert(reason_name(reason as u32), count);
                    }
                }
            }
        }
        if exits.is_empty() {
            let reasons = counts
                .iter()
                .filter_map(|(name, count)| Some((name.strip_suffix(EXITS)?.to_owned(), *count)));
            exits = reasons.filter(|(_, count)| *count > 0).collect();
        }
        (counts, exits)
    }
}

/// The little-endian number of `size` bytes there; 0 where there are none.
pub(crate) fn number(bytes: &[u8], at: usize, size: usize) -> u64 {
    let found = bytes.get(at..at.saturating_add(size)).unwrap_or_default();
    found
        .iter()
        .rev()
        .fold(0, |sum, byte| (sum << 8) | u64::from(*byte))
}

fn statistic(descriptor: &[u8]) -> Option<Statistic> {
    let (numbers, name) = descriptor.split_at_checked(DESCRIPTOR)?;
    let name = name.split(|byte| *byte == 0).next()?;
    let values = number(numbers, 6, 2) as usize;
    let offset = number(numbers, 8, 4) as usize;
    (values > 0 && values <= MOST && offset <= 8 * MOST * MOST).then(|| Statistic {
        name: String::from_utf8_lossy(name).into_owned(),
        offset,
        values,
    })
}

/// The counters that are not 0, the largest first.
#[must_use]
pub fn largest(counts: &Counts) -> Vec<(&str, u64)> {
    let mut sorted: Vec<_> = counts
        .iter()
        .map(|(name, count)| (name.as_str(), *count))
        .collect();
    sorted.retain(|(_, count)| *count > 0);
    sorted.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
    sorted
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    const NAME: usize = 16;

    /// A file with those statistics: name and values.
    fn file(statistics: &[(&str, &[u64])]) -> File {
        let data_offset = HEADER + statistics.len() * (DESCRIPTOR + NAME);
        let mut bytes = Vec::new();
        for field in [0, NAME, statistics.len(), 0, HEADER, data_offset] {
            bytes.extend((field as u32).to_le_bytes());
        }
        let mut data = Vec::new();
        for (name, values) in statistics {
            bytes.extend([0; 6]);
            bytes.extend((values.len() as u16).to_le_bytes());
            bytes.extend((data.len() as u32).to_le_bytes());
            bytes.extend([0; 4]);
            let mut padded = name.as_bytes().to_vec();
            padded.resize(NAME, 0);
            bytes.extend(padded);
            data.extend(values.iter().flat_map(|value| value.to_le_bytes()));
        }
        bytes.extend(data);
        let mut file = tempfile::tempfile().expect("a file for the test");
        file.write_all(&bytes).expect("it takes them");
        file
    }

    #[test]
    fn exits_come_from_the_histogram_or_else_by_kvms_names() {
        let mut reasons = [0; 65];
        (reasons[12], reasons[30]) = (5, 7);
        let found = Counters::from_file(file(&[
            ("exits", &[12]),
            (REASONS, &reasons),
            ("io_exits", &[7]),
        ]));
        let (counts, exits) = found.expect("it is whole").read();
        assert_eq!(counts.get("exits"), Some(&12));
        assert_eq!(largest(&exits), [("IO_INSTRUCTION", 7), ("HLT", 5)]);

        let found = Counters::from_file(file(&[
            ("exits", &[9]),
            ("io_exits", &[8]),
            ("halt_exits", &[0]),
        ]));
        let (_, exits) = found.expect("it is whole").read();
        assert_eq!(largest(&exits), [("io", 8)]);
    }

    #[test]
    fn what_is_broken_or_short_counts_nothing() {
        let empty = tempfile::tempfile().expect("a file for the test");
        assert!(Counters::from_file(empty).is_none());
        let whole = file(&[("exits", &[12])]);
        for length in (0..HEADER + DESCRIPTOR + NAME).rev() {
            whole.set_len(length as u64).expect("it can be cut");
            let copy = whole.try_clone().expect("a descriptor");
            assert!(Counters::from_file(copy).is_none(), "{length} bytes");
        }
        let mut huge = tempfile::tempfile().expect("a file for the test");
        huge.write_all(&[0xff; 4096]).expect("it takes them");
        assert!(Counters::from_file(huge).is_none());
    }
}
