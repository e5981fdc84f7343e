// SPDX-License-Identifier: GPL-2.0

//! Waiting for files.

use std::io;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use rustix::event::{poll, PollFd, Timespec};
use rustix::io::Errno;

pub use rustix::event::PollFlags;

/// Waits until one of `files` is ready for what is asked of it, or has failed or ended, whatever signals come; no longer
/// than `timeout`, where there is one. Says of each file whether it is.
///
/// # Errors
///
/// What the kernel answers.
pub fn wait(files: &[(&dyn AsFd, PollFlags)], timeout: Option<Duration>) -> io::Result<Vec<bool>> {
    let until = timeout.map(|timeout| Instant::now() + timeout);
    let polled = files
        .iter()
        .map(|(file, what)| PollFd::from_borrowed_fd(file.as_fd(), *what));
    let mut polled: Vec<_> = polled.collect();
    loop {
        let left = until.map(|until| until.saturating_duration_since(Instant::now()));
        let left = left.and_then(|left| Timespec::try_from(left).ok());
        match poll(&mut polled, left.as_ref()) {
            Ok(_) => {
                return Ok(polled
                    .iter()
                    .map(|file| !file.revents().is_empty())
                    .collect())
            }
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// Whether this becomes true of the file within `timeout`.
pub fn within(timeout: Duration, file: &dyn AsFd, what: PollFlags) -> bool {
    wait(&[(file, what)], Some(timeout)).is_ok_and(|ready| ready == [true])
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread;
    use vmm_sys_util::signal::{register_signal_handler, Killable, SIGRTMIN};

    extern "C" fn nothing(_: i32, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

    #[test]
    fn it_ends_by_what_is_ready_and_by_the_time_whatever_signals_come() {
        let (reader, writer) = rustix::pipe::pipe().expect("a pipe");
        register_signal_handler(SIGRTMIN(), nothing).expect("a handler");
        let timeout = Duration::from_millis(200);
        let begin = Instant::now();
        let waits = thread::spawn(move || {
            let both: [(&dyn AsFd, _); 2] = [(&reader, PollFlags::IN), (&writer, PollFlags::IN)];
            assert_eq!(wait(&both, Some(timeout)).expect("no failure"), [false; 2]);
            let took = begin.elapsed();
            assert!(within(Duration::ZERO, &writer, PollFlags::OUT));
            drop(writer);
            assert!(within(timeout * 100, &reader, PollFlags::IN));
            took
        });
        while !waits.is_finished() {
            // It may have ended right now.
            let _ = waits.kill(SIGRTMIN());
            thread::sleep(timeout / 20);
        }
        let took = waits.join().expect("no panic");
        assert!((timeout..timeout * 3).contains(&took), "{took:?}");
    }
}
