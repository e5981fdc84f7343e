// SPDX-License-Identifier: GPL-2.0
//! A memory cgroup for a test.

use crate::ktap::{Context, Fail};
use std::ffi::CString;
use std::path::PathBuf;

/// A cgroup with the memory controller, in a hierarchy that is mounted for it. It is removed at the end;
/// processes that are left in it go to the root before.
#[derive(Debug)]
pub struct Cgroup {
    mount: PathBuf,
    path: PathBuf,
}

impl Cgroup {
    /// Makes one.
    ///
    /// # Errors
    ///
    /// A skip where the kernel has no memory cgroups; else what mount(2) and the files give.
    pub fn new() -> Result<Self, Fail> {
        let mount = PathBuf::from(format!("/tmp/cgroup-{}", std::process::id()));
        std::fs::create_dir_all(&mount).during("a folder for cgroups")?;
        let target = CString::new(mount.as_os_str().as_encoded_bytes())
            .map_err(|error| Fail::new(error.to_string()))?;
        let kind = c"cgroup2".as_ptr();
        // SAFETY: All are C strings, and the type takes no data.
        if unsafe { libc::mount(kind, target.as_ptr(), kind, 0, std::ptr::null()) } != 0 {
            let error = std::io::Error::last_os_error();
            return Err(Fail::skip(format!("no cgroup2 can be mounted: {error}")));
        }
        let group = Self {
            // All mounts show one hierarchy.
            path: mount.join(format!("test-{}", std::process::id())),
            mount,
        };
        let root = |file: &str| group.mount.join(file);
        let controllers = std::fs::read_to_string(root("cgroup.controllers"))?;
        if !controllers.split_whitespace().any(|name| name == "memory") {
            return Err(Fail::skip("the kernel has no memory cgroups"));
        }
        std::fs::write(root("cgroup.subtree_control"), "+memory").during("+memory")?;
        std::fs::create_dir(&group.path).during("a cgroup")?;
        Ok(group)
    }

    /// Writes one of its files.
    ///
    /// # Errors
    ///
    /// What the file gives.
    pub fn set(&self, file: &str, value: &str) -> Result<(), Fail> {
        std::fs::write(self.path.join(file), value).during(file)
    }

    /// Puts this process into it.
    ///
    /// # Errors
    ///
    /// What the file gives.
    pub fn enter(&self) -> Result<(), Fail> {
        self.set("cgroup.procs", "0")
    }

    /// A number that is a file of its own.
    ///
    /// # Errors
    ///
    /// Where there is none.
    pub fn number(&self, file: &str) -> Result<u64, Fail> {
        let text = std::fs::read_to_string(self.path.join(file)).during(file)?;
        text.trim()
            .parse()
            .map_err(|_| Fail::new(format!("{file} says {text}")))
    }

    /// A line of a file of `name number` lines.
    ///
    /// # Errors
    ///
    /// Where there is none.
    pub fn line(&self, file: &str, name: &str) -> Result<u64, Fail> {
        let text = std::fs::read_to_string(self.path.join(file)).during(file)?;
        text.lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.parse().ok())
            .ok_or_else(|| Fail::new(format!("{file} has no {name}")))
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        let left = std::fs::read_to_string(self.path.join("cgroup.procs")).unwrap_or_default();
        for process in left.lines() {
            let _gone_is_fine = std::fs::write(self.mount.join("cgroup.procs"), process);
        }
        let _best_effort = std::fs::remove_dir(&self.path);
        if let Ok(target) = CString::new(self.mount.as_os_str().as_encoded_bytes()) {
            // SAFETY: A C string.
            unsafe { libc::umount2(target.as_ptr(), libc::MNT_DETACH) };
        }
        let _best_effort = std::fs::remove_dir(&self.mount);
    }
}
