// SPDX-License-Identifier: GPL-2.0
//! Memory mappings with an owner.

use std::os::fd::RawFd;

/// A shared or private mapping, unmapped at its end.
///
/// # Invariants
///
/// `address` starts a mapping of `length` bytes that is readable and writable.
#[derive(Debug)]
pub struct Mapping {
    address: *mut u8,
    length: usize,
}

// SAFETY: The mapping belongs to the process and all accesses go through volatile copies.
unsafe impl Send for Mapping {}
// SAFETY: As above; concurrent accesses give mixed bytes at worst, as with any shared memory.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Private anonymous memory, zero, aligned to 2 MiB.
    ///
    /// # Errors
    ///
    /// What mmap(2) gives.
    pub fn anonymous(length: usize) -> Result<Self, std::io::Error> {
        const ALIGN: usize = 2 << 20;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        let whole = Self::make(length + ALIGN, flags, -1)?;
        let skip = whole.address.align_offset(ALIGN);
        let address = whole.address.wrapping_add(skip);
        let end = address.wrapping_add(length);
        // SAFETY: Both pieces lie within the mapping that was made above and nothing refers to them.
        unsafe {
            if skip != 0 {
                libc::munmap(whole.address.cast(), skip);
            }
            libc::munmap(end.cast(), ALIGN - skip);
        }
        std::mem::forget(whole);
        // INVARIANT: The middle of the mapping is left, readable and writable.
        Ok(Self { address, length })
    }

    /// A shared mapping of a descriptor from offset 0.
    ///
    /// # Errors
    ///
    /// What mmap(2) gives.
    pub fn shared(fd: RawFd, length: usize) -> Result<Self, std::io::Error> {
        Self::make(length, libc::MAP_SHARED, fd)
    }

    /// A private mapping of a descriptor from offset 0.
    ///
    /// # Errors
    ///
    /// What mmap(2) gives.
    pub fn private(fd: RawFd, length: usize) -> Result<Self, std::io::Error> {
        Self::make(length, libc::MAP_PRIVATE, fd)
    }

    /// Private anonymous memory of the kernel's stock of pages of 2^`shift` bytes.
    ///
    /// # Errors
    ///
    /// What mmap(2) gives: ENOMEM where the stock is too small.
    pub fn huge(length: usize, shift: i32) -> Result<Self, std::io::Error> {
        let size = shift << libc::MAP_HUGE_SHIFT;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_HUGETLB | size;
        Self::make(length, flags, -1)
    }

    fn make(length: usize, flags: i32, fd: RawFd) -> Result<Self, std::io::Error> {
        let access = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: A new mapping at an address of the kernel's choice touches nothing that exists.
        let address = unsafe { libc::mmap(std::ptr::null_mut(), length, access, flags, fd, 0) };
        if address == libc::MAP_FAILED {
            return Err(std::io::Error::last_os_error());
        }
        // INVARIANT: mmap(2) made it so.
        Ok(Self {
            address: address.cast(),
            length,
        })
    }

    /// Its first byte.
    pub fn address(&self) -> *mut u8 {
        self.address
    }

    /// Its first byte's address as a number.
    pub fn start(&self) -> u64 {
        self.address as u64
    }

    /// How many bytes it has.
    pub fn len(&self) -> usize {
        self.length
    }

    /// Whether it has none; it always has some.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Copies bytes in.
    ///
    /// # Panics
    ///
    /// Where they do not fit.
    pub fn write(&self, offset: u64, bytes: &[u8]) {
        let offset = self.place(offset, bytes.len());
        for (index, byte) in bytes.iter().enumerate() {
            // SAFETY: `place` checked that all of them lie within the mapping.
            unsafe { self.address.add(offset + index).write_volatile(*byte) };
        }
    }

    /// Copies bytes out.
    ///
    /// # Panics
    ///
    /// Where the mapping ends before them.
    pub fn read(&self, offset: u64, length: usize) -> Vec<u8> {
        let offset = self.place(offset, length);
        (0..length)
            // SAFETY: `place` checked that all of them lie within the mapping.
            .map(|index| unsafe { self.address.add(offset + index).read_volatile() })
            .collect()
    }

    /// Writes 8 bytes at once.
    ///
    /// # Panics
    ///
    /// Where they do not fit or `offset` is no multiple of 8.
    pub fn write_u64(&self, offset: u64, value: u64) {
        let offset = self.place(offset, 8);
        assert_eq!(offset % 8, 0);
        // SAFETY: `place` checked that they lie within the mapping, and they are aligned.
        unsafe { self.address.add(offset).cast::<u64>().write_volatile(value) };
    }

    /// Reads 8 bytes at once.
    ///
    /// # Panics
    ///
    /// Where the mapping ends before them or `offset` is no multiple of 8.
    pub fn read_u64(&self, offset: u64) -> u64 {
        let offset = self.place(offset, 8);
        assert_eq!(offset % 8, 0);
        // SAFETY: `place` checked that they lie within the mapping, and they are aligned.
        unsafe { self.address.add(offset).cast::<u64>().read_volatile() }
    }

    /// madvise(2) on a part.
    ///
    /// # Errors
    ///
    /// What madvise(2) gives.
    pub fn advise(&self, offset: u64, length: usize, advice: i32) -> Result<(), std::io::Error> {
        let offset = self.place(offset, length);
        // SAFETY: The part lies within the mapping; its bytes are only ever read and written volatile.
        let result = unsafe { libc::madvise(self.address.add(offset).cast(), length, advice) };
        if result != 0 {
            return Err(std::io::Error::last_os_error());
        }
        Ok(())
    }

    /// mprotect(2) on a part. Whoever takes a right away must not use it on the part from here on.
    ///
    /// # Errors
    ///
    /// What mprotect(2) gives.
    pub fn protect(&self, offset: u64, length: usize, access: i32) -> Result<(), std::io::Error> {
        let offset = self.place(offset, length);
        // SAFETY: The part lies within the mapping; an access that it does not permit ends the test.
        let result = unsafe { libc::mprotect(self.address.add(offset).cast(), length, access) };
        if result != 0 {
            return Err(std::io::Error::last_os_error());
        }
        Ok(())
    }

    /// Puts fresh anonymous memory in the place of a part.
    ///
    /// # Errors
    ///
    /// What mmap(2) gives.
    pub fn replace(&self, offset: u64, length: usize) -> Result<(), std::io::Error> {
        let offset = self.place(offset, length);
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
        let access = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: The part lies within the mapping; its bytes are only ever read and written volatile.
        let result = unsafe {
            let address = self.address.add(offset).cast();
            libc::mmap(address, length, access, flags, -1, 0)
        };
        if result == libc::MAP_FAILED {
            return Err(std::io::Error::last_os_error());
        }
        Ok(())
    }

    /// A number of /proc/self/smaps, in KiB, for the area of the process that holds the first byte.
    ///
    /// # Errors
    ///
    /// Where the file can't be read or has no such line.
    pub fn smaps_kib(&self, field: &str) -> Result<u64, std::io::Error> {
        let text = std::fs::read_to_string("/proc/self/smaps")?;
        let mut inside = false;
        for line in text.lines() {
            let first = line.split(' ').next().unwrap_or("");
            if let Some((from, to)) = first.split_once('-') {
                let number = |text| u64::from_str_radix(text, 16).unwrap_or(0);
                inside = (number(from)..number(to)).contains(&self.start());
            } else if inside && first.trim_end_matches(':') == field {
                let number = line
                    .split_whitespace()
                    .nth(1)
                    .and_then(|word| word.parse().ok());
                return number.ok_or(std::io::ErrorKind::InvalidData.into());
            }
        }
        Err(std::io::ErrorKind::NotFound.into())
    }

    fn place(&self, offset: u64, length: usize) -> usize {
        let offset = usize::try_from(offset).unwrap_or(usize::MAX);
        assert!(
            offset
                .checked_add(length)
                .is_some_and(|end| end <= self.length),
            "{length} bytes at {offset:#x} of a mapping of {:#x}",
            self.length
        );
        offset
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: The mapping is this object's own (type invariant).
        unsafe { libc::munmap(self.address.cast(), self.length) };
    }
}
