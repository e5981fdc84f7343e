// SPDX-License-Identifier: GPL-2.0

//! What this process gives up before the guest's first instruction: root's identity, new privileges, the file
//! system, the network, and all system calls that a running machine has no use for.
//!
//! A guest that finds a fault in a device gets no further than the files that are open by then. All of it is the
//! calling thread's and that of the threads it starts, so it comes before the first of them.

use std::collections::BTreeMap;
use std::fs::{self, File};

use landlock::{
    Access, AccessFs, AccessNet, CompatLevel, Compatible, PathBeneath, PathFd, Ruleset,
    RulesetAttr, RulesetCreatedAttr, Scope, ABI,
};
use rustix::process::{getppid, parent_process_death_signal, set_parent_process_death_signal};
use rustix::thread::{set_no_new_privs, set_thread_groups, set_thread_res_gid, set_thread_res_uid};
use rustix::thread::{Gid, Uid};
use seccompiler::{
    apply_filter, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition,
    SeccompFilter, SeccompRule, TargetArch,
};

use crate::error::{failed, Error, Result};

/// Whom root becomes: the first of these that there is. The package makes one for machines alone
/// (packaging/sysusers.conf); processes of other services may be nobody's.
const USERS: [&str; 2] = ["rvisor-machine", "nobody"];
/// The newest of Landlock's versions that is asked for; an older kernel does what it knows.
const LANDLOCK: ABI = ABI::V6;

/// The calls that a running machine makes, by what for.
const CALLS: &[libc::c_long] = &[
    // Files that are open: disks, consoles, eventfds, sockets.
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_readv,
    libc::SYS_writev,
    libc::SYS_pread64,
    libc::SYS_pwrite64,
    libc::SYS_preadv,
    libc::SYS_pwritev,
    libc::SYS_lseek,
    libc::SYS_fsync,
    libc::SYS_fdatasync,
    libc::SYS_fallocate,
    libc::SYS_ftruncate,
    libc::SYS_fstat,
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_fcntl,
    libc::SYS_close,
    libc::SYS_dup,
    libc::SYS_dup2,
    libc::SYS_dup3,
    libc::SYS_eventfd2,
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_wait,
    libc::SYS_epoll_pwait,
    // The control socket's clients, and a network's peer.
    libc::SYS_accept4,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_sendto,
    libc::SYS_sendmsg,
    libc::SYS_shutdown,
    libc::SYS_getsockopt,
    libc::SYS_setsockopt,
    // What Landlock leaves of the file system.
    libc::SYS_openat,
    libc::SYS_unlink,
    libc::SYS_unlinkat,
    // Memory, beside what [`filter`] says of its protection.
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_brk,
    // Threads, signals and time. What clone3 is told lies in memory, where no filter looks: see [`without_clone3`].
    libc::SYS_clone3,
    libc::SYS_set_robust_list,
    libc::SYS_rseq,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_yield,
    libc::SYS_futex,
    libc::SYS_gettid,
    libc::SYS_getpid,
    libc::SYS_getppid,
    libc::SYS_geteuid,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
    libc::SYS_restart_syscall,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_nanosleep,
    libc::SYS_wait4,
    libc::SYS_waitid,
    libc::SYS_getrandom,
    libc::SYS_exit,
    libc::SYS_exit_group,
];

/// The terminal's mode, how much waits on a socket, that waiting for it is not wanted, and what a TAP leaves to
/// the guest.
const OTHER_IOCTLS: [u64; 8] = [
    libc::TCGETS,
    libc::TCSETS,
    libc::TCSETSW,
    libc::TCGETS2,
    libc::TCSETS2,
    libc::FIONREAD,
    libc::FIONBIO,
    libc::TUNSETOFFLOAD,
];
/// Of prctl(2), names of threads alone.
const PR_SET_NAME: u64 = libc::PR_SET_NAME as u64;
/// Of clone(2), threads of this process alone: no processes, no namespaces.
const THREAD: u64 = libc::CLONE_THREAD as u64;
const THREAD_OR_NAMESPACES: u64 = THREAD
    | (libc::CLONE_NEWNS
        | libc::CLONE_NEWCGROUP
        | libc::CLONE_NEWUTS
        | libc::CLONE_NEWIPC
        | libc::CLONE_NEWUSER
        | libc::CLONE_NEWPID
        | libc::CLONE_NEWNET) as u64;
/// The kinds of ioctl numbers: KVM's (include/uapi/linux/kvm.h, `KVMIO`), and rvisor's own
/// (include/uapi/rvisor.h).
const HYPERVISOR_IOCTLS: [u64; 2] = [0xae00, 0xbd00];
const IOCTL_KIND: u64 = 0xff00;

/// Gives up what a running machine does not need. Files in its own folder, `folder`, can still be removed, and those
/// of /proc on this process be read.
///
/// # Errors
///
/// [`Error::Call`] where the kernel refuses. A kernel without Landlock refuses nothing.
pub fn seal(folder: &File) -> Result<()> {
    set_no_new_privs(true).map_err(failed("giving up new privileges"))?;
    // Each step takes away what an earlier one needs.
    let user = user_to_become();
    restrict_files(folder)?;
    if let Some((uid, gid)) = user {
        // By what is open: the path may lead elsewhere by now.
        rustix::fs::fchown(folder, Some(Uid::from_raw(uid)), None)
            .map_err(failed("giving the machine's folder away"))?;
        become_user(Uid::from_raw(uid), Gid::from_raw(gid))?;
    }
    restrict_calls()
}

/// Whom root is to become. Nobody where this is not root, or where there are none of [`USERS`].
fn user_to_become() -> Option<(u32, u32)> {
    if !rustix::process::geteuid().is_root() {
        return None;
    }
    let passwd = fs::read_to_string("/etc/passwd").ok()?;
    USERS.iter().find_map(|name| find_user(&passwd, name))
}

/// Capabilities go with root's identity. The signal at the parent's end would go too, so it is asked for anew.
fn become_user(uid: Uid, gid: Gid) -> Result<()> {
    let what = "giving up root's identity";
    let signal = parent_process_death_signal().map_err(failed(what))?;
    let parent = getppid();
    set_thread_groups(&[])
        .and_then(|()| set_thread_res_gid(gid, gid, gid))
        .and_then(|()| set_thread_res_uid(uid, uid, uid))
        .and_then(|()| set_parent_process_death_signal(signal))
        .map_err(failed(what))?;
    if signal.is_some() && getppid() != parent {
        return Err(Error::call(what, "the parent has ended"));
    }
    Ok(())
}

/// The user and group numbers of `name` in a password file's text (passwd(5)).
fn find_user(passwd: &str, name: &str) -> Option<(u32, u32)> {
    passwd.lines().find_map(|line| {
        let mut fields = line.split(':');
        let found = fields.next() == Some(name);
        let uid = fields.nth(1)?.parse().ok()?;
        let gid = fields.next()?.parse().ok()?;
        // Never root under another name.
        (found && uid != 0 && gid != 0).then_some((uid, gid))
    })
}

/// Forbids the file system but for what [`seal`] leaves, TCP, and signals to processes outside.
fn restrict_files(folder: &File) -> Result<()> {
    let restrict = || -> anyhow::Result<()> {
        let process = PathFd::new("/proc/self")?;
        Ruleset::default()
            .set_compatibility(CompatLevel::BestEffort)
            .handle_access(AccessFs::from_all(LANDLOCK))?
            .handle_access(AccessNet::from_all(LANDLOCK))?
            .scope(Scope::from_all(LANDLOCK))?
            .create()?
            .add_rule(PathBeneath::new(folder, AccessFs::RemoveFile))?
            .add_rule(PathBeneath::new(process, AccessFs::ReadFile))?
            .restrict_self()?;
        Ok(())
    };
    restrict().map_err(failed("restricting files by Landlock"))
}

/// Answers every system call with EPERM but those of [`CALLS`], KVM's and the terminal's ioctls, mmap and mprotect of
/// what can't be executed, and what makes and wakes this process's own threads.
fn restrict_calls() -> Result<()> {
    let restrict = || -> std::result::Result<(), seccompiler::Error> {
        // Of two answers the stricter one counts. The second filter leaves no call by which to have another.
        apply_filter(&without_clone3()?)?;
        apply_filter(&filter()?)
    };
    restrict().map_err(failed("restricting system calls by seccomp"))
}

/// Has clone3 answer ENOSYS: then the C library makes its threads by clone, whose arguments [`filter`] sees.
fn without_clone3() -> std::result::Result<BpfProgram, seccompiler::BackendError> {
    SeccompFilter::new(
        BTreeMap::from([(libc::SYS_clone3, Vec::new())]),
        SeccompAction::Allow,
        SeccompAction::Errno(libc::ENOSYS as u32),
        TargetArch::x86_64,
    )
    .and_then(BpfProgram::try_from)
}

fn filter() -> std::result::Result<BpfProgram, seccompiler::BackendError> {
    let argument = |which, operation, value| {
        SeccompCondition::new(which, SeccompCmpArgLen::Dword, operation, value)
            .and_then(|condition| SeccompRule::new(vec![condition]))
    };
    let mut ioctls = Vec::new();
    for kind in HYPERVISOR_IOCTLS {
        ioctls.push(argument(1, SeccompCmpOp::MaskedEq(IOCTL_KIND), kind)?);
    }
    for value in OTHER_IOCTLS {
        ioctls.push(argument(1, SeccompCmpOp::Eq, value)?);
    }
    let mut rules: BTreeMap<_, _> = CALLS.iter().map(|call| (*call, Vec::new())).collect();
    rules.insert(libc::SYS_ioctl, ioctls);
    let thread_name = argument(0, SeccompCmpOp::Eq, PR_SET_NAME)?;
    rules.insert(libc::SYS_prctl, vec![thread_name]);
    let thread = argument(0, SeccompCmpOp::MaskedEq(THREAD_OR_NAMESPACES), THREAD)?;
    rules.insert(libc::SYS_clone, vec![thread]);
    // All code is there by now, and what a guest puts into memory never is any.
    let no_code = argument(2, SeccompCmpOp::MaskedEq(libc::PROT_EXEC as u64), 0)?;
    rules.insert(libc::SYS_mmap, vec![no_code.clone()]);
    rules.insert(libc::SYS_mprotect, vec![no_code]);
    let own_process = argument(0, SeccompCmpOp::Eq, std::process::id().into())?;
    rules.insert(libc::SYS_tgkill, vec![own_process]);
    SeccompFilter::new(
        rules,
        SeccompAction::Errno(libc::EPERM as u32),
        SeccompAction::Allow,
        TargetArch::x86_64,
    )
    .and_then(BpfProgram::try_from)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io;
    use std::net::TcpListener;
    use std::process::Command;
    use std::thread;

    use vmm_sys_util::signal::Killable;

    #[test]
    fn users_are_found_by_name_and_never_root() {
        let passwd =
            "root:x:0:0::/root:/bin/sh\ntoor:x:0:7::/:/bin/sh\nrvisor:x:107:115::/:/bin/false\n";
        assert_eq!(find_user(passwd, "rvisor"), Some((107, 115)));
        assert_eq!(find_user(passwd, "root"), None);
        assert_eq!(find_user(passwd, "toor"), None);
        assert_eq!(find_user("rvisor:x:broken", "rvisor"), None);
        assert_eq!(find_user(passwd, "rvis"), None);
    }

    /// What is given up is the thread's own, so a thread of the test can try it.
    #[test]
    fn what_is_given_up_is_gone_and_what_is_kept_works() {
        let kept = tempfile::tempdir().expect("a folder");
        let path = kept.path().join("file");
        fs::write(&path, "kept").expect("writing");
        let open = File::open("/etc/passwd").expect("any file");
        thread::spawn(move || {
            seal(&File::open(kept.path()).expect("the folder")).expect("giving up");
            // Files that were open before.
            open.metadata().expect("a file that is open");
            // Memory and threads.
            thread::spawn(|| vec![1_u8; 1 << 22].len())
                .join()
                .expect("a thread");
            let forbidden = |error: io::Error| error.kind() == io::ErrorKind::PermissionDenied;
            assert!(forbidden(
                Command::new("/bin/true").spawn().expect_err("a program")
            ));
            let code = |executable| {
                let protection = libc::PROT_READ | executable;
                let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
                vm_memory::MmapRegion::<()>::build(None, 4096, protection, flags).is_ok()
            };
            assert_eq!([0, libc::PROT_EXEC].map(code), [true, false]);
            #[allow(unsafe_code)]
            // SAFETY: No page lies in a range without length.
            let protect = |code| unsafe { libc::mprotect(std::ptr::null_mut(), 0, code) };
            assert_eq!([0, libc::PROT_EXEC].map(protect), [0, -1]);
            // A process that is made says that there is no such program.
            assert!(forbidden(Command::new("").spawn().expect_err("a process")));
            let asleep = thread::spawn(thread::park);
            asleep.kill(libc::SIGCHLD).expect("a signal to a thread");
            asleep.thread().unpark();
            asleep.join().expect("a thread");
            assert!(forbidden(
                TcpListener::bind("127.0.0.1:0").expect_err("a socket")
            ));
            // An ioctl of another kind than KVM's: the first of those of a terminal that is not on the list.
            let size = rustix::termios::tcgetwinsize(&open).expect_err("an ioctl");
            assert_eq!(size, rustix::io::Errno::PERM);
            if landlock_is_there() {
                assert!(forbidden(File::open("/etc/passwd").expect_err("a file")));
                assert!(forbidden(
                    File::open(&path).expect_err("a file of the folder")
                ));
            }
            assert!(!rustix::process::geteuid().is_root());
        })
        .join()
        .expect("the confined thread");
    }

    fn landlock_is_there() -> bool {
        fs::read_to_string("/sys/kernel/security/lsm").is_ok_and(|names| names.contains("landlock"))
    }
}
