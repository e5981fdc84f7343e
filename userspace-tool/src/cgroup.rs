// SPDX-License-Identifier: GPL-2.0

//! A machine's cgroup: where it goes, its making and its end (Documentation/admin-guide/cgroup-v2.rst).
//!
//! Where this process was given a cgroup of its own to divide (by systemd's `Delegate=`, or by root with
//! `chown`), a machine's is made in that; else root's are in `rvisor` at the top of the hierarchy.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Component, Path, PathBuf};
use std::thread;
use std::time::Duration;

use rustix::fs::{access, getxattr, Access};
use rustix::process::geteuid;

use crate::error::{Error, Result};
use crate::registry::Name;
use crate::sharing::Setting;

/// Where the hierarchy is mounted.
const ROOT: &str = "/sys/fs/cgroup";
/// The cgroup for all machines that root starts.
const ROOTS_OWN: &str = "rvisor";
/// Where the processes go that are found in a cgroup that gets machines: with controllers handed down it can have
/// no processes itself.
const OTHERS: &str = "rvisor.others";
/// systemd's mark on a cgroup that it leaves to those in it.
const DELEGATED: &str = "user.delegate";
/// How often to look again whether other processes are gone, at most.
const ROUNDS: u32 = 100;
const ROUND: Duration = Duration::from_millis(10);

/// A machine's cgroup. Dropping it ends the processes that are left in it, and removes it.
#[derive(Debug)]
pub struct Cgroup(PathBuf);

impl Cgroup {
    /// Makes the cgroup of the machine `name`, with the limits that were asked for. One that a killed machine left
    /// is replaced.
    ///
    /// # Errors
    ///
    /// [`Error::Input`] where there is no place for it, the kernel lacks a controller, or a limit is refused. There
    /// is none then.
    pub fn new(name: &Name, settings: &[Setting]) -> Result<Self> {
        let place = Place::find(Path::new(ROOT), geteuid().is_root())?;
        let controllers = settings
            .iter()
            .flat_map(|(file, ..)| file.split('.').next());
        place.prepare(&controllers.collect())?;
        // No file of a cgroup's ends so, whatever the name.
        let path = place.parent.join(format!("{name}.machine"));
        match fs::remove_dir(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(Error::input(
                    format!(
                        "there are processes of another machine in {}: {error}",
                        path.display()
                    ),
                    "end that one first, or give this one another name",
                ))
            }
            _ => fs::create_dir(&path).map_err(|e| refused("making", &path, &e))?,
        }
        let group = Self(path);
        for (file, value, option) in settings {
            fs::write(group.0.join(file), value).map_err(|error| {
                Error::input(
                    format!("the kernel does not take {option}, \"{value}\" for {file}: {error}"),
                    "give another value, or leave the option out",
                )
            })?;
        }
        Ok(group)
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// How many processes the kernel has ended because the machine reached its limit of memory.
    #[must_use]
    pub fn out_of_memory(&self) -> u64 {
        let events = fs::read_to_string(self.0.join("memory.events")).unwrap_or_default();
        field(&events, "oom_kill").unwrap_or(0)
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        // Nothing is left of it in most cases; a kernel before 5.14 has no such file.
        let _ = fs::write(self.0.join("cgroup.kill"), "1");
        for _ in 0..ROUNDS {
            match fs::remove_dir(&self.0) {
                Err(error) if error.kind() == io::ErrorKind::ResourceBusy => thread::sleep(ROUND),
                // What can't be removed is replaced by the next machine of this name.
                _ => return,
            }
        }
    }
}

/// Puts this process into a cgroup.
///
/// # Errors
///
/// [`Error::Input`] where it may not go there.
pub fn enter(path: &Path) -> Result<()> {
    fs::write(path.join("cgroup.procs"), "0").map_err(|e| refused("entering", path, &e))
}

/// The cgroup of this process, where it is not the whole host's.
#[must_use]
pub fn current() -> Option<PathBuf> {
    let path = own(&fs::read_to_string("/proc/self/cgroup").ok()?)?;
    (!path.as_os_str().is_empty()).then(|| Path::new(ROOT).join(path))
}

/// The number behind `name` in a file of `name number` lines.
#[must_use]
pub fn field(text: &str, name: &str) -> Option<u64> {
    text.lines().find_map(|line| {
        line.strip_prefix(name)?
            .strip_prefix(' ')?
            .trim()
            .parse()
            .ok()
    })
}

/// Where machines' cgroups go.
#[derive(Debug, PartialEq, Eq)]
struct Place {
    /// The cgroup that theirs are made in.
    parent: PathBuf,
    /// Whether it was given to this process: others' processes may be in the way there. Else it is below the top,
    /// which must hand controllers down to it.
    delegated: bool,
}

impl Place {
    fn find(root: &Path, is_root: bool) -> Result<Self> {
        if !root.join("cgroup.controllers").exists() {
            return Err(Error::input(
                format!("there is no cgroup2 at {}, which --cpu-share, --cpu-max, --memory-max and --io-max need", root.display()),
                "mount it as root, 'mount -t cgroup2 none /sys/fs/cgroup'; where the kernel has version 1 there, boot with 'systemd.unified_cgroup_hierarchy=1'",
            ));
        }
        let own = own(&fs::read_to_string("/proc/self/cgroup").unwrap_or_default());
        let own = own.map(|own| root.join(unmoved(&own)));
        if let Some(own) = own.filter(|own| is_delegated(own, is_root)) {
            return Ok(Self {
                parent: own,
                delegated: true,
            });
        }
        if !is_root {
            return Err(Error::input(
                "this user has no cgroup to make the machine's in",
                "run 'systemd-run --user --scope -p Delegate=yes rvisor run ...', or run rvisor as root",
            ));
        }
        Ok(Self {
            parent: root.join(ROOTS_OWN),
            delegated: false,
        })
    }

    /// Gets controllers down to where the machines are.
    fn prepare(&self, controllers: &BTreeSet<&str>) -> Result<()> {
        let mut chain = Vec::new();
        if self.delegated {
            self.clear()
                .map_err(|e| refused("moving the processes of", &self.parent, &e))?;
        } else {
            fs::create_dir_all(&self.parent).map_err(|e| refused("making", &self.parent, &e))?;
            chain.extend(self.parent.parent());
        }
        chain.push(&self.parent);
        for group in chain {
            let offered = fs::read_to_string(group.join("cgroup.controllers")).unwrap_or_default();
            for name in controllers {
                if !offered.split_whitespace().any(|word| word == *name) {
                    return Err(Error::input(
                        format!("there is no controller \"{name}\" in {}", group.display()),
                        "leave out the options for it, or have systemd delegate it (Delegate=) or the kernel offer it (not in use by cgroup version 1, nor off by 'cgroup_disable=')",
                    ));
                }
                fs::write(group.join("cgroup.subtree_control"), format!("+{name}"))
                    .map_err(|e| refused("dividing", group, &e))?;
            }
        }
        Ok(())
    }

    /// Moves the processes of the cgroup into one below it.
    fn clear(&self) -> io::Result<()> {
        let procs = self.parent.join("cgroup.procs");
        let others = self.parent.join(OTHERS);
        for _ in 0..ROUNDS {
            let processes = fs::read_to_string(&procs)?;
            if processes.is_empty() {
                break;
            }
            fs::create_dir_all(&others)?;
            for process in processes.lines() {
                match fs::write(others.join("cgroup.procs"), process) {
                    // It has ended meanwhile.
                    Err(error) if error.raw_os_error() == Some(libc::ESRCH) => {}
                    result => result?,
                }
            }
        }
        Ok(())
    }
}

/// This process's cgroup below the root, by /proc/self/cgroup. None for version 1 alone, or for one outside of this
/// process's cgroup namespace.
fn own(text: &str) -> Option<PathBuf> {
    let path = Path::new(text.lines().find_map(|line| line.strip_prefix("0::/"))?);
    let inside = path
        .components()
        .all(|part| matches!(part, Component::Normal(_)));
    inside.then(|| path.to_owned())
}

/// The cgroup that a process of this one was given: the one above where [`Place::clear`] has moved it.
fn unmoved(own: &Path) -> &Path {
    let moved = own.file_name().is_some_and(|name| name == OTHERS);
    own.parent().filter(|_| moved).unwrap_or(own)
}

/// Whether this process may divide that cgroup. Root may write to each, and so divides only what is marked.
fn is_delegated(group: &Path, is_root: bool) -> bool {
    let mut mark = [0_u8; 1];
    let marked = getxattr(group, DELEGATED, &mut mark[..]).is_ok() && mark == *b"1";
    let mine = |file: &str| access(group.join(file), Access::WRITE_OK).is_ok();
    marked || (!is_root && mine("") && mine("cgroup.procs") && mine("cgroup.subtree_control"))
}

fn refused(doing: &str, path: &Path, error: &io::Error) -> Error {
    let next = match error.kind() {
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
            "run rvisor as root, or where the cgroup is this user's: 'systemd-run --user --scope -p Delegate=yes rvisor run ...'"
        }
        io::ErrorKind::ResourceBusy => "move its own processes into a cgroup below it first",
        _ => "see the kernel's log, and leave out the options for sharing meanwhile",
    };
    Error::input(
        format!("{doing} the cgroup {}: {error}", path.display()),
        next,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_own_cgroup_is_that_of_version_2() {
        let of = |text: &str| own(text).map(|path| path.display().to_string());
        assert_eq!(of("0::/\n").as_deref(), Some(""));
        assert_eq!(
            of("1:cpu:/a\n0::/user.slice/b c.scope\n").as_deref(),
            Some("user.slice/b c.scope")
        );
        let moved = "b.scope/rvisor.others";
        assert_eq!(of(&format!("0::/{moved}\n")).as_deref(), Some(moved));
        for (own, given) in [(moved, "b.scope"), ("a/b.scope", "a/b.scope"), ("", "")] {
            assert_eq!(unmoved(Path::new(own)), Path::new(given));
        }
        assert_eq!(of("0::/../x\n"), None);
        assert_eq!(of("1:cpu:/a\n"), None);
        assert_eq!(of(""), None);
    }

    #[test]
    fn fields_are_whole_words() {
        let text = "low 0\noom 3\noom_kill 2\noom_group_kill 1\n";
        assert_eq!(field(text, "oom_kill"), Some(2));
        assert_eq!(field(text, "oom"), Some(3));
        assert_eq!(field(text, "kill"), None);
    }

    #[test]
    fn a_host_without_cgroup2_is_told_so() {
        let root = tempfile::tempdir().expect("a folder for the test");
        let error = Place::find(root.path(), true)
            .expect_err("there is none")
            .to_string();
        assert!(
            error.contains("no cgroup2") && error.contains("mount -t cgroup2"),
            "{error}"
        );
    }

    #[test]
    fn root_has_a_place_at_the_top_and_others_need_one_given() {
        let root = tempfile::tempdir().expect("a folder for the test");
        fs::write(root.path().join("cgroup.controllers"), "cpu io").expect("the file");
        let place = Place::find(root.path(), true).expect("root has one");
        assert_eq!(place.parent, root.path().join("rvisor"));
        let error = Place::find(root.path(), false).map(|place| place.delegated);
        // Where the test runs as a user with a cgroup of its own name below the folder there is none either.
        assert!(error.is_err());
        let error = place
            .prepare(&["cpu", "memory"].into())
            .expect_err("it has no memory")
            .to_string();
        assert!(error.contains("no controller \"memory\""), "{error}");
    }
}
