// SPDX-License-Identifier: GPL-2.0

//! The command line of `rvisor`.

mod run;

use std::env;
use std::path::PathBuf;

use clap::error::ErrorKind;
use clap::{Args, FromArgMatches, Parser, Subcommand};

use crate::error::{say, Error, STATUS_INPUT};
use crate::registry::Name;
use crate::size;
pub use run::{ConsoleKind, Disk, Origin, RunOptions};

/// The device that rvisor's module offers.
pub const DEFAULT_DEVICE: &str = "/dev/rvisor";

/// What stands before the user's words in the guest's command line, behind its console.
pub const DEFAULT_COMMAND_LINE: &str = "reboot=k panic=-1";

const RUN_AFTER_HELP: &str = "\
Keys, on the guest's console:
  Ctrl-A x       end the guest at once, as if its plug were pulled
  Ctrl-A h       show these keys
  Ctrl-A Ctrl-A  send one Ctrl-A to the guest
  Any other key after Ctrl-A is dropped. The keys work on a pipe too.

The guest's command line:
  Begins with \"console=ttyS0 reboot=k panic=-1\": the console on the serial port (hvc0 in its place with
  --console virtio), a reboot by the keyboard controller, and a reboot at once after a panic. What
  --cmdline gives follows. Linux takes the later one of two options that contradict each other.

Exit status:
  0    the guest powered off
  1    this host or the hypervisor failed
  2    wrong input: the message names it and the next step
  3    the guest asked for a reboot, or panicked (it reboots then): the run ends instead
  4    the guest crashed: a triple fault
  5    the hypervisor can't go on with the guest; its reason and the registers are shown
  6    the user ended it with Ctrl-A x
  7    the machine reached its --memory-max
  8    'rvisor kill' ended it, or 'rvisor stop' after its patience
  129  SIGHUP, 130 SIGINT, 131 SIGQUIT, 143 SIGTERM ended it

Examples:
  rvisor run --kernel bzImage --initrd initramfs.cpio.gz
  rvisor run --kernel vmlinux --memory 1G --cpus 2 --cmdline 'quiet init=/bin/sh'
  rvisor run --kernel bzImage --device /dev/kvm
  rvisor run --kernel bzImage --disk root.qcow2 --disk data.img,readonly --cmdline root=/dev/vda
  rvisor run --kernel bzImage --initrd initramfs.cpio.gz --net user,forward=2222:22
  rvisor run --firmware /usr/share/seabios/bios-microvm.bin --disk debian.qcow2";

const UP_AFTER_HELP: &str = "\
The file:
  Each machine is a table [machine.NAME]; its keys are the options of 'rvisor run' without the dashes.
  Options without a value are true or false; those that may be given several times take a list. Paths
  are relative to the file's folder.

    [machine.web]
    kernel = \"bzImage\"
    initrd = \"web.cpio.gz\"
    memory = \"512M\"
    cpus = 2

    [machine.probe]
    firmware = \"/usr/share/seabios/bios-256k.bin\"
    memory = \"64M\"";

/// Runs virtual machines on rvisor, a hypervisor in the Linux kernel
///
/// 'rvisor run' starts a kernel or firmware as a guest and joins this terminal to the guest's console. 'rvisor check'
/// tells whether this host can run guests, and what to do where it can't.
#[derive(Debug, Parser)]
#[command(name = "rvisor", version)]
pub(crate) struct Arguments {
    #[command(subcommand)]
    command: Command,
}

/// What the user wants done.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Start a kernel or firmware as a guest
    ///
    /// The command stays until the guest ends.
    ///
    /// The guest is a PC with the CPUs and the memory that were asked for, a serial port (ttyS0), a clock, ACPI for
    /// switching off, the disks that --disk names, the network cards of --net, a source of random bytes and a memory
    /// balloon, by which the host gets back what the guest has free. There is no screen. The console, a serial port
    /// or with --console virtio a virtio device, is joined to standard input and standard output; a terminal is put
    /// into raw mode meanwhile, so that every key goes to the guest. Of what the guest prints, a terminal gets text,
    /// colours and what moves the cursor and erases; what else a terminal obeys is dropped, for it could make the
    /// terminal type back. --raw-console lets all through; a file or a pipe gets all in any case.
    ///
    /// Firmware starts where a PC's does, at the reset vector in real mode, and finds the sizes of memory and the
    /// number of CPUs in the clock's memory and in QEMU's fw_cfg, which tells it of the disks too. With --disk the
    /// serial port is its screen, and the boot loader's; else what it prints on the debug port, 0x402, comes out
    /// here.
    #[command(after_long_help = RUN_AFTER_HELP)]
    Run(Box<RunOptions>),
    /// Tell whether this host can run guests
    ///
    /// Tells, line by line, what this host has of what guests need: the CPU, its firmware's settings, the kernel, the
    /// module, the device and the rights to it, and whether KVM is there beside it.
    ///
    /// Each line begins with 'ok', 'FAIL' or 'note'. A line that fails is followed by the next step. The exit status
    /// is 0 where guests can run and 1 where they can't.
    Check {
        /// The hypervisor's device
        #[arg(long, value_name = "PATH", default_value = DEFAULT_DEVICE)]
        device: PathBuf,
    },
    /// List the machines that run
    ///
    /// They are those that this user has started, on any device. The exit status is 1 where one does not answer.
    ///
    /// A machine is known by the folder rvisor/NAME, which it locks, with sock and, where it runs detached, log, in
    /// $XDG_RUNTIME_DIR; where that is no folder of root's or this user's own, in /run/rvisor/NAME for root and
    /// /tmp/rvisor-UID/NAME for others. Root's are in /run/rvisor/NAME too where it is /run/user/0.
    ///
    /// The socket takes JSON, one object a line: {"command":"status"} is answered by {"ok":{...}}, or by
    /// {"error":{"cause":"...","next":"...","status":2}}. Other commands: pause, resume, power-button, kill, balloon
    /// (with "bytes"), stats, wait (answers when the machine has ended), and console, snapshot and trace, whose bytes
    /// follow the answer.
    Ps {
        /// One JSON array instead of a table
        #[arg(long)]
        json: bool,
    },
    /// Join this terminal to the console of a machine
    ///
    /// It shows the last 64 KiB of its output first. Several terminals may be joined at a time: all see the same, and
    /// each may type.
    ///
    /// A terminal gets text, colours and what moves the cursor and erases, as with 'rvisor run'; --raw-console lets
    /// all through.
    ///
    /// Ctrl-A d leaves the console and lets the machine run, Ctrl-A x ends the machine, Ctrl-A h shows the keys. The
    /// exit status is 0 after Ctrl-A d, and that of the machine where it ends.
    Console {
        /// The machine
        name: Name,
        /// Let all of the guest's output through to a terminal
        #[arg(long)]
        raw_console: bool,
    },
    /// Ask a machine's guest to switch off, then insist
    ///
    /// Presses the machine's power button, to which most systems answer by shutting down, and waits for its end. A
    /// guest that has not switched itself off after some time is ended.
    ///
    /// The exit status is that of the machine: 0 where its guest switched itself off, 8 where it was ended.
    Stop {
        /// The machine
        name: Name,
        /// How long the guest may take, in seconds
        #[arg(long, value_name = "SECONDS", default_value_t = 30)]
        timeout: u32,
    },
    /// End a machine at once, as if its plug were pulled
    ///
    /// What its guest has not written to a disk is lost. A machine whose process does not answer within 5 seconds is
    /// ended by SIGKILL.
    Kill(Named),
    /// Have a machine stand still; its memory stays as it is
    ///
    /// Its disks' files have by then what its guest was told is written. Where one can't take that, as on a full file
    /// system, the machine is paused all the same, and the command says so and ends with 1.
    Pause(Named),
    /// Have a paused machine go on
    Resume(Named),
    /// Ask a machine's guest to leave memory to the host, by its balloon
    ///
    /// Asks a machine's guest to leave so much of its memory to the host, in place of what --balloon or an earlier
    /// call asked for. A guest with a driver for the balloon does so as far as it can, in its own time; 'rvisor ps
    /// --json' tells as balloon how many bytes it has left by now. Before it has to kill a process it takes memory
    /// back.
    Balloon {
        /// The machine
        name: Name,
        /// How much of its memory, in all, rounded up to 4 KiB; 0 gives it all back. K, M, G and T are powers of 1024
        #[arg(value_parser = size::parse)]
        size: u64,
    },
    /// Write a machine as it is to a file; it stands still meanwhile
    ///
    /// That is its memory but for pages of zeros, compressed by LZ4, its CPUs and its devices. The file is there when it
    /// is whole and on the disk; where that fails, nothing is left of it, nor after Ctrl-C where the file system has
    /// files without a name. This user alone may read it.
    ///
    /// What is on the machine's disks is not in the file: copy them while the machine is paused.
    Snapshot {
        /// The machine
        name: Name,
        /// The file; one that is there is replaced once the new one is whole
        file: PathBuf,
    },
    /// Start a machine as a snapshot has it
    ///
    /// It does not boot again. Its options are those that it was made with; their paths count from the folder in which
    /// it was made, and its disks must be as they were.
    ///
    /// A snapshot is restored on the kind of CPU and the hypervisor that it was made on, by the same version of
    /// rvisor. What is damaged is found before the guest runs. A snapshot holds a command line that is run with your
    /// rights, as a script does: restore only those that you or someone you trust has made. Exit status, keys and
    /// --detach are as with 'rvisor run'.
    Restore {
        /// The file
        file: PathBuf,
        /// The machine's name; the one that it had where none is given
        #[arg(long)]
        name: Option<Name>,
        /// Return when the guest runs, and print the machine's name
        #[arg(long)]
        detach: bool,
        /// This is the process that --detach made.
        #[arg(long, hide = true, conflicts_with = "detach")]
        detached: bool,
    },
    /// Write man pages and the shells' completions into a folder
    #[command(hide = true)]
    Generate {
        /// The folder
        directory: PathBuf,
    },
    /// Tell what a machine has done so far: times, exits, memory, disks, networks
    ///
    /// Tells what a machine has done since its start: for each CPU the time that it ran on the host's CPUs, the part
    /// of that in the guest, the time that it waited for a CPU, and its exits to the hypervisor by their reason; the
    /// time of the tool and the devices; the memory that it has; and what its disks and network cards have passed on,
    /// in bytes, and in requests and flushes or frames.
    ///
    /// Exits are counted by the hypervisor (KVM_GET_STATS_FD): on rvisor by the CPU's own reasons, on KVM by those
    /// that it counts. Times in the guest are the host kernel's, in steps of 10 ms. With --json all counters are
    /// there, by KVM's names; those of times are in nanoseconds.
    Stat {
        /// The machine
        name: Name,
        /// One JSON object instead of text
        #[arg(long)]
        json: bool,
    },
    /// Show the machines on a screen that is made anew each second
    ///
    /// Shows the machines that run, with what the disks and the network cards of each read and write, and receive and
    /// send, in KiB a second; and of the chosen one each CPU and the exits a second by their reason. %CPU is of one CPU of
    /// the host's, %GUEST the part in the guest, %WAIT the time that CPUs were ready and had to wait for others. The
    /// arrows choose a machine, q or Ctrl-C ends it.
    Top,
    /// Show a machine's exits as they happen
    ///
    /// Shows the exits of a machine to the hypervisor as they happen, each with the host's time stamp counter, its
    /// reason, the guest's RIP, the exit qualification, a detail (the guest-physical address of an EPT violation, ECX
    /// of RDMSR and WRMSR, else RAX) and the cycles until the guest was entered again. Exits that are too many to be
    /// read are left out and counted. It needs /dev/rvisor; a machine that nobody traces pays nothing.
    Trace {
        /// The machine
        name: Name,
        /// Only exits for this reason, such as IO_INSTRUCTION; may be given several times
        #[arg(long, value_name = "REASON")]
        reason: Vec<String>,
        /// Only this CPU of the machine
        #[arg(long, value_name = "N")]
        cpu: Option<u32>,
        /// One JSON object a line instead of text
        #[arg(long)]
        json: bool,
    },
    /// Start the machines that a file describes
    ///
    /// Starts the machines that a file describes, each in a process of its own, and shows what they print, with their
    /// names before each line, until all have ended. A terminal gets text and colours of it, a file or a pipe text
    /// alone; --raw-console lets all through. With --detach it returns when all run.
    ///
    /// Where one can't be started, those that were are ended. A mistake in the file is told with its line and column,
    /// and nothing starts. SIGINT or SIGTERM stops all machines as 'rvisor stop' does, a second signal ends them at
    /// once. The exit status is that of the first machine that ended otherwise than by switching itself off, else 0.
    #[command(after_long_help = UP_AFTER_HELP)]
    Up(UpOptions),
}

/// The options of `rvisor up`.
#[derive(Args, Debug)]
pub struct UpOptions {
    /// The file, in TOML
    #[arg(value_name = "FILE", default_value = "machines.toml")]
    pub file: PathBuf,
    /// Return when all guests run
    #[arg(long)]
    pub detach: bool,
    /// With --detach: one JSON array of the machines that were started
    #[arg(long, requires = "detach")]
    pub json: bool,
    /// Let all of the guests' output through, not text and colours alone
    #[arg(long, conflicts_with = "detach")]
    pub raw_console: bool,
    /// How long each guest may take to switch off after a signal, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    pub timeout: u32,
}

/// A command about one machine.
#[derive(Args, Debug)]
pub struct Named {
    /// The machine
    pub name: Name,
}

/// The options of a machine that was made so.
///
/// # Errors
///
/// [`Error::Input`] where this version does not know one of them.
pub fn run_options(
    origin: &Origin,
    name: Option<Name>,
    detached: bool,
) -> Result<RunOptions, Error> {
    let matches = run_command()
        .no_binary_name(true)
        .try_get_matches_from(&origin.words);
    let options = matches.and_then(|matches| RunOptions::from_arg_matches(&matches));
    let options = options.map_err(|error| {
        Error::input(
            format!("the snapshot's options: {}", paragraph(&error)),
            "restore it with the rvisor that made it",
        )
    })?;
    Ok(RunOptions {
        name,
        detached,
        origin: origin.clone(),
        ..options
    })
}

/// Reads the command line of this process.
///
/// # Errors
///
/// The exit status, after the help text, the version or one line about what is wrong were printed.
pub fn parse() -> Result<Command, u8> {
    match Arguments::try_parse() {
        Ok(Arguments {
            command: Command::Run(mut options),
        }) => {
            options.origin = Origin::of(
                env::args_os().skip(2),
                env::current_dir().unwrap_or_default(),
            );
            Ok(Command::Run(options))
        }
        Ok(arguments) => Ok(arguments.command),
        Err(error) => match error.kind() {
            ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => {
                // Nobody is left to tell where even this can't be written.
                let _ = error.print();
                Err(0)
            }
            _ => {
                let wrong = paragraph(&error);
                say(format_args!(
                    "{wrong}; 'rvisor --help' and 'rvisor run --help' list what there is"
                ));
                Err(STATUS_INPUT)
            }
        },
    }
}

/// The options of `rvisor run` as clap knows them, for words that do not come from the command line.
#[must_use]
pub fn run_command() -> clap::Command {
    RunOptions::augment_args(clap::Command::new("run"))
}

/// What is wrong with such words, on one line: the first paragraph of what clap says.
#[must_use]
pub fn paragraph(error: &clap::Error) -> String {
    let message = error.to_string();
    let message = message.strip_prefix("error: ").unwrap_or(&message);
    let lines = message.lines().map(str::trim);
    let lines: Vec<&str> = lines.take_while(|line| !line.is_empty()).collect();
    lines.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(words: &[&str]) -> RunOptions {
        let words = ["rvisor", "run"].iter().chain(words);
        match Arguments::try_parse_from(words)
            .expect("these are right")
            .command
        {
            Command::Run(options) => *options,
            other => unreachable!("the word was run: {other:?}"),
        }
    }

    #[test]
    fn defaults_are_those_of_the_help_text() {
        let options = run(&["--kernel", "k"]);
        assert_eq!((options.memory, options.cpus), (256 * size::MIB, 1));
        assert_eq!(options.device, PathBuf::from("/dev/rvisor"));
        assert!(RUN_AFTER_HELP.contains(&options.guest_command_line()));
    }

    #[test]
    fn the_users_words_follow_the_default_ones() {
        let line = |words: &[&str]| run(&[&["--kernel", "k"], words].concat()).guest_command_line();
        let serial = format!("console=ttyS0 {DEFAULT_COMMAND_LINE}");
        assert_eq!(line(&[]), serial);
        assert_eq!(line(&["--cmdline", "a=b c"]), format!("{serial} a=b c"));
        let virtio = format!("console=hvc0 {DEFAULT_COMMAND_LINE}");
        assert_eq!(line(&["--console", "virtio"]), virtio);
    }

    #[test]
    fn messages_become_one_line() {
        let error = Arguments::try_parse_from(["rvisor", "run"]).expect_err("it has no kernel");
        let line = paragraph(&error);
        assert!(
            line.starts_with("the following required arguments were not provided: --kernel <FILE>"),
            "{line}"
        );
        assert!(!line.contains('\n'));
    }

    #[test]
    fn the_command_is_consistent() {
        use clap::CommandFactory;
        Arguments::command().debug_assert();
    }
}
