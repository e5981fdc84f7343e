// SPDX-License-Identifier: GPL-2.0

//! The machines that run: their names, and the folder with what they have for others.
//!
//! The folder is `rvisor` in `$XDG_RUNTIME_DIR`; where that is no folder of root's or the user's own, `/run/rvisor` for
//! root, and `/tmp/rvisor-UID` for others. For root that is also in place of `/run/user/0`, which sessions have and
//! services don't. It is its user's alone. A machine has a folder of its name there, locked by flock(2) for as long as
//! its process lives: the name is taken while it is, and while its socket is listened at. In it are
//!
//! - `sock`, where it takes commands (see [`crate::control`]),
//! - `log`, what it said on standard error since it runs detached. The next start begins it anew.
//!
//! Beside it is `.NAME.json`: what the machine was made by (see [`Origin`]), as it said before it gave up its rights.
//! From then on it can't change that, so a snapshot has its command line from there.
//!
//! A process that was killed leaves files behind and no lock, so the next start takes them over. The folder is
//! the machine's user's, where root's machines become another one (see [`crate::confine`]).

use std::env;
use std::fmt;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, BufReader, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::thread;
use std::time::Duration;

use rustix::fs::{flock, unlinkat, AtFlags, FlockOperation};
use rustix::io::Errno;
use rustix::net::sockopt::{set_socket_timeout, Timeout};
use rustix::net::{socket_with, AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use rustix::process::{geteuid, Uid};
use serde::{Deserialize, Serialize};

use crate::arguments::Origin;
use crate::error::{failed, Error, Result};

/// The longest name. With the folder before it, it must fit into a socket's address of 108 bytes.
const LONGEST: usize = 32;
const SOCKET: &str = "sock";
/// What a detached machine says.
pub const LOG: &str = "log";
/// How often a folder is locked that goes away meanwhile, as its owner ends, or whose owner is no machine that
/// takes commands; and how long after a try of the latter kind.
const TRIES: usize = 16;
const TRY_AGAIN: Duration = Duration::from_millis(10);
/// How long a machine may take to let a client in.
const PATIENCE: Duration = Duration::from_secs(1);

/// The name of a machine: letters, digits, `.`, `_` and `-`, the first one a letter or digit.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String")]
pub struct Name(String);

impl Name {
    /// The name of the machine of that process: the one that it was given, or `machine-PID`.
    #[must_use]
    pub fn of(given: Option<&Self>, process: u32) -> Self {
        let own = || Self(format!("machine-{process}"));
        given.cloned().unwrap_or_else(own)
    }
}

impl FromStr for Name {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let plain = |c: char| c.is_ascii_alphanumeric();
        if text.starts_with(plain)
            && text.len() <= LONGEST
            && text.chars().all(|c| plain(c) || "._-".contains(c))
        {
            return Ok(Self(text.to_owned()));
        }
        Err(format!(
            "a name has up to {LONGEST} letters, digits, '.', '_' and '-', and begins with a letter or digit"
        ))
    }
}

impl TryFrom<String> for Name {
    type Error = String;

    fn try_from(text: String) -> std::result::Result<Self, String> {
        text.parse()
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

/// The folder, made where it is not there.
///
/// # Errors
///
/// [`Error::Input`] where it can't be made, or is somebody else's.
pub fn directory() -> Result<PathBuf> {
    let uid = geteuid();
    let runtime = env::var_os("XDG_RUNTIME_DIR");
    let path = place(
        runtime.and_then(|runtime| own_folder(Path::new(&runtime), uid)),
        uid,
    );
    let refused = |why: String| {
        Error::input(
            format!("the machines' folder {}: {why}", path.display()),
            "have XDG_RUNTIME_DIR name a folder of this user's own",
        )
    };
    let made = DirBuilder::new().recursive(true).mode(0o700).create(&path);
    made.map_err(|error| refused(error.to_string()))?;
    let found = fs::symlink_metadata(&path).map_err(|e| refused(e.to_string()))?;
    if !found.is_dir() || found.uid() != uid.as_raw() || found.mode() & 0o077 != 0 {
        return Err(refused("it is no folder of this user's alone".to_owned()));
    }
    Ok(path)
}

/// Where that user's folder is, with `runtime` for such things.
fn place(runtime: Option<PathBuf>, uid: Uid) -> PathBuf {
    match runtime {
        Some(path) if !uid.is_root() || path != Path::new("/run/user/0") => path.join("rvisor"),
        _ if uid.is_root() => "/run/rvisor".into(),
        _ => format!("/tmp/rvisor-{}", uid.as_raw()).into(),
    }
}

/// That folder without links in its path, where it is root's or that user's. Whoever becomes root by su(1) still has the
/// variables of the user that he was before, who must not have a say in where root's files are.
fn own_folder(path: &Path, uid: Uid) -> Option<PathBuf> {
    let path = fs::canonicalize(path).ok()?;
    let owner = fs::metadata(&path).ok()?.uid();
    [Uid::ROOT.as_raw(), uid.as_raw()]
        .contains(&owner)
        .then_some(path)
}

/// The folder of the machine `name`.
///
/// # Errors
///
/// As with [`directory`].
pub fn folder(name: &Name) -> Result<PathBuf> {
    Ok(directory()?.join(&name.0))
}

/// A name that is this process's until this is dropped.
#[derive(Debug)]
pub struct Claim {
    /// The name.
    pub name: Name,
    folder: PathBuf,
    /// The folder with the machine's files: locked, and open for when this process may no longer go there by its path.
    pub opened: File,
}

impl Claim {
    /// Takes the name.
    ///
    /// # Errors
    ///
    /// [`Error::Input`] where a machine that runs has it, or the folder is of no use.
    pub fn new(name: Name) -> Result<Self> {
        Self::of(folder(&name)?, name)
    }

    fn of(folder: PathBuf, name: Name) -> Result<Self> {
        let refused =
            |error: io::Error| Error::call(format!("locking {}", folder.display()), error);
        let taken = || {
            Error::input(
                format!("a machine named {name} runs already"),
                format!("give another --name, or end that one by 'rvisor stop {name}'"),
            )
        };
        let mut opening = OpenOptions::new();
        opening.read(true).custom_flags(libc::O_DIRECTORY);
        for tries in 1..=TRIES {
            // Its owner may remove it between any two calls here: then there is none to open, or the lock is on none.
            match DirBuilder::new().mode(0o700).create(&folder) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                made => made.map_err(refused)?,
            }
            let opened = match opening.open(&folder) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                opened => opened.map_err(refused)?,
            };
            match flock(&opened, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => {}
                // Nobody is there: 'rvisor ps' looks after one that was killed, or another one starts.
                Err(Errno::WOULDBLOCK) if tries < TRIES && reach(&folder, &name)?.is_none() => {
                    thread::sleep(TRY_AGAIN);
                    continue;
                }
                Err(Errno::WOULDBLOCK) => return Err(taken()),
                Err(error) => return Err(refused(error.into())),
            }
            let locked = opened.metadata().map_err(refused)?.ino();
            if fs::symlink_metadata(&folder).is_ok_and(|found| found.ino() == locked) {
                // Those of an earlier version, which run on where this one is installed, lock a file in it instead.
                if reach(&folder, &name)?.is_some() {
                    return Err(taken());
                }
                return Ok(Self {
                    name,
                    folder,
                    opened,
                });
            }
        }
        Err(refused(io::Error::other("it keeps going away")))
    }

    /// Writes down what the machine was made by, for [`origin`].
    ///
    /// # Errors
    ///
    /// [`Error::Call`] where it can't be written.
    pub fn record(&self, origin: &Origin) -> Result<()> {
        let text = serde_json::to_vec(origin).map_err(failed("writing JSON"))?;
        create_new(&record_of(&self.folder))
            .and_then(|mut file| file.write_all(&text))
            .map_err(failed("writing down what the machine was made by"))
    }

    /// The socket on which the machine takes commands.
    ///
    /// # Errors
    ///
    /// [`Error::Input`] where the folder's path is too long for a socket, [`Error::Call`] where the kernel
    /// refuses for another reason.
    pub fn listen(&self) -> Result<UnixListener> {
        let path = self.folder.join(SOCKET);
        // One that a killed process left: nobody else can be at it while the lock is held.
        let _ = fs::remove_file(&path);
        UnixListener::bind(&path).map_err(|error| match error.kind() {
            io::ErrorKind::InvalidInput => Error::input(
                format!("{} is too long for a socket's address", path.display()),
                "give a shorter --name, or have XDG_RUNTIME_DIR name a shorter path",
            ),
            _ => Error::call(format!("making {}", path.display()), error),
        })
    }

    /// A new file for what a detached machine says on standard error.
    ///
    /// # Errors
    ///
    /// [`Error::Call`] where it can't be made.
    pub fn log(&self) -> Result<File> {
        create_new(&self.folder.join(LOG)).map_err(failed("making the machine's log"))
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        // What can't be removed is taken over by the next one of the name.
        let _ = fs::remove_file(record_of(&self.folder));
        let _ = unlinkat(&self.opened, SOCKET, AtFlags::empty());
        // Where there is no log.
        let _ = fs::remove_dir(&self.folder);
    }
}

/// A new file there, for this user, which is written behind its end.
fn create_new(path: &Path) -> io::Result<File> {
    let _ = fs::remove_file(path);
    let mut new = OpenOptions::new();
    new.append(true).create_new(true).mode(0o600).open(path)
}

/// Where it stands what the machine with that folder was made by: not in the folder, which is the machine's user's. No
/// machine has a name that begins so.
fn record_of(folder: &Path) -> PathBuf {
    let name = folder.file_name().unwrap_or_default().to_string_lossy();
    folder.with_file_name(format!(".{name}.json"))
}

/// What the machine of that name was made by.
///
/// # Errors
///
/// [`Error::Call`] where that can't be read.
pub fn origin(name: &Name) -> Result<Origin> {
    let path = record_of(&folder(name)?);
    File::open(&path)
        .and_then(|file| Ok(serde_json::from_reader(BufReader::new(file))?))
        .map_err(|error| Error::call(format!("reading {}", path.display()), error))
}

/// The names of machines that run, or were killed, in their order.
///
/// # Errors
///
/// [`Error::Call`] where the folder can't be read.
pub fn names() -> Result<Vec<Name>> {
    let directory = directory()?;
    let unreadable = |error| Error::call(format!("reading {}", directory.display()), error);
    let mut names = Vec::new();
    for entry in fs::read_dir(&directory).map_err(unreadable)? {
        let entry = entry.map_err(unreadable)?;
        if entry.file_type().is_ok_and(|kind| kind.is_dir())
            && let Some(Ok(name)) = entry.file_name().to_str().map(str::parse)
        {
            names.push(name);
        }
    }
    names.sort();
    Ok(names)
}

/// Removes what the machine of that name has left, where none runs: one that was killed, or that was root's and
/// had given up the right to (see [`crate::confine`]).
pub fn sweep(name: &Name) {
    // It is in use where the name can't be had.
    drop(Claim::new(name.clone()));
}

/// Connects to the machine of that name; `None` where none runs.
///
/// # Errors
///
/// [`Error::Call`] where its socket can't be reached for another reason.
pub fn connect(name: &Name) -> Result<Option<UnixStream>> {
    reach(&folder(name)?, name)
}

/// As [`connect`], to the machine with that folder.
fn reach(folder: &Path, name: &Name) -> Result<Option<UnixStream>> {
    use io::ErrorKind::{ConnectionRefused, InvalidFilename, NotFound};
    // One that stands still and has many clients waiting would have this one wait without end.
    let connect = || -> io::Result<_> {
        let socket = socket_with(
            AddressFamily::UNIX,
            SocketType::STREAM,
            SocketFlags::CLOEXEC,
            None,
        )?;
        set_socket_timeout(&socket, Timeout::Send, Some(PATIENCE))?;
        rustix::net::connect(&socket, &SocketAddrUnix::new(folder.join(SOCKET))?)?;
        Ok(socket.into())
    };
    match connect() {
        Ok(stream) => Ok(Some(stream)),
        // Where its path is too long for a socket there never was one.
        Err(error) => match error.kind() {
            NotFound | ConnectionRefused | InvalidFilename => Ok(None),
            _ => Err(Error::call(format!("reaching machine {name}"), error)),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, Ordering};

    #[test]
    fn a_folder_of_another_user_is_not_taken() {
        let folder = tempfile::tempdir().expect("a folder");
        let uid = geteuid();
        let real = fs::canonicalize(folder.path()).expect("it is there");
        assert_eq!(own_folder(folder.path(), uid), Some(real));
        assert_eq!(own_folder(&folder.path().join("missing"), uid), None);
        assert_eq!(own_folder(Path::new(""), uid), None);
        // Without root, another user looks at this one's folder.
        let (owner, looks) = match uid.is_root() {
            true => (Some(4321), uid),
            false => (None, Uid::from_raw(uid.as_raw() + 1)),
        };
        std::os::unix::fs::chown(folder.path(), owner, None).expect("giving it away");
        assert_eq!(own_folder(folder.path(), looks), None);
        let link = tempfile::tempdir().expect("a folder");
        let link = link.path().join("link");
        std::os::unix::fs::symlink(folder.path(), &link).expect("a link");
        assert_eq!(own_folder(&link, looks), None);
    }

    #[test]
    fn roots_machines_are_in_one_place() {
        let user = Uid::from_raw(1000);
        for (runtime, uid, found) in [
            (Some("/run/user/0"), Uid::ROOT, "/run/rvisor"),
            (None, Uid::ROOT, "/run/rvisor"),
            (Some("/tmp/own"), Uid::ROOT, "/tmp/own/rvisor"),
            (Some("/run/user/1000"), user, "/run/user/1000/rvisor"),
            (None, user, "/tmp/rvisor-1000"),
        ] {
            assert_eq!(place(runtime.map(PathBuf::from), uid), Path::new(found));
        }
    }

    fn web() -> Name {
        "web".parse().expect("a name")
    }

    #[test]
    fn a_machine_that_takes_commands_keeps_its_name_without_a_lock() {
        let parent = tempfile::tempdir().expect("a folder");
        let folder = parent.path().join("web");
        fs::create_dir(&folder).expect("it is made");
        let listener = UnixListener::bind(folder.join(SOCKET)).expect("a socket");
        let error = Claim::of(folder.clone(), web()).expect_err("it runs");
        assert!(error.to_string().contains("web runs already"), "{error}");
        assert!(folder.join(SOCKET).exists());
        drop(listener);
        drop(Claim::of(folder.clone(), web()).expect("it has gone"));
        assert!(!folder.exists());
        fs::write(&folder, "no folder").expect("a file");
        assert!(Claim::of(folder, web()).is_err());
    }

    #[test]
    fn a_machine_that_lets_nobody_in_holds_nobody_up() {
        let folder = tempfile::tempdir().expect("a folder");
        let listener = UnixListener::bind(folder.path().join(SOCKET)).expect("a socket");
        // Fewer clients may wait there from now on.
        rustix::net::listen(&listener, 0).expect("it is listened at");
        let reach = || reach(folder.path(), &web());
        let _first = reach().expect("there is a place").expect("it is there");
        let error = reach().expect_err("there is no place").to_string();
        assert!(error.starts_with("reaching machine web: "), "{error}");
    }

    #[test]
    fn a_path_that_is_too_long_for_a_socket_is_told_and_left() {
        let parent = tempfile::tempdir().expect("a folder");
        let folder = parent.path().join("l".repeat(120));
        let claim = Claim::of(folder.clone(), web()).expect("nobody has it");
        let error = claim.listen().expect_err("it is too long").to_string();
        assert!(error.ends_with("name a shorter path"), "{error}");
        drop(claim);
        assert!(!folder.exists());
    }

    #[test]
    fn a_folder_that_goes_away_at_any_time_is_made_again() {
        let parent = tempfile::tempdir().expect("a folder");
        let folder = parent.path().join("web");
        let done = AtomicBool::new(false);
        thread::scope(|scope| {
            scope.spawn(|| {
                while !done.load(Ordering::SeqCst) {
                    // As one that looks after what is left, and takes and leaves the name for that.
                    let _ = fs::create_dir(&folder);
                    let _ = fs::remove_dir(&folder);
                }
            });
            let claims = (0..10_000).map(|_| Claim::of(folder.clone(), web()));
            let failed = claims.filter_map(std::result::Result::err);
            let failed: Vec<_> = failed.map(|error| error.to_string()).collect();
            done.store(true, Ordering::SeqCst);
            let other = |error: &&String| !error.ends_with("it keeps going away");
            assert_eq!(failed.iter().find(other), None);
        });
    }

    #[test]
    fn names_are_files_names() {
        for good in ["a", "7", "web-1.example_x", &"x".repeat(LONGEST)] {
            assert_eq!(good.parse().map(|Name(text)| text), Ok(good.to_owned()));
        }
        for bad in [
            "",
            ".",
            "-a",
            "a/b",
            "a b",
            "é",
            "a\n",
            &"x".repeat(LONGEST + 1),
        ] {
            assert!(bad.parse::<Name>().is_err(), "{bad:?}");
        }
    }
}
