// SPDX-License-Identifier: GPL-2.0

//! The options of `rvisor run`: what a machine is made by.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Args, ValueEnum};
use serde::{Deserialize, Serialize};

use super::{DEFAULT_COMMAND_LINE, DEFAULT_DEVICE};
use crate::devices::virtio::block::Format;
use crate::net::NetOptions;
use crate::registry::Name;
use crate::sharing::Sharing;
use crate::size;

/// The options of `rvisor run`.
#[derive(Args, Clone, Debug)]
pub struct RunOptions {
    /// The machine's name, for 'rvisor console' and the like; 'machine-' and a number where none is given
    #[arg(long, value_name = "NAME")]
    pub name: Option<Name>,

    /// The guest's kernel: a bzImage of 64 or 32 bits, or an ELF vmlinux for x86-64
    #[arg(long, value_name = "FILE", required_unless_present = "firmware")]
    pub kernel: Option<PathBuf>,

    /// Firmware for the guest instead of a kernel: a PC's, such as SeaBIOS
    #[arg(long, value_name = "FILE", conflicts_with_all = ["kernel", "initrd", "cmdline"])]
    pub firmware: Option<PathBuf>,

    /// The guest's initial RAM disk
    #[arg(long, value_name = "FILE")]
    pub initrd: Option<PathBuf>,

    /// Words for the guest's command line, behind the default ones
    #[arg(
        long,
        value_name = "WORDS",
        default_value = "",
        hide_default_value = true
    )]
    pub cmdline: String,

    /// A disk for the guest, from a file or a block device; can be given several times
    ///
    /// The first is /dev/vda in a Linux guest, the next /dev/vdb, and so on. Behind the name, each after a comma:
    ///   format=raw     the file holds the disk byte for byte
    ///   format=qcow2   it is a qcow2 image, without a backing file
    ///   readonly       the guest can't write; several guests can share the disk
    ///   serial=TEXT    what the disk calls itself, at most 20 characters
    /// Without a format the file's first bytes tell. As a guest can write these, one whose
    /// disk was taken for raw can't make a qcow2 image of it; format=raw lets it. A name can't
    /// have a comma.
    ///
    /// What the guest has flushed has reached the host's disk. Where the host's file system is
    /// full, the machine is paused and nothing of what it wrote is lost; 'rvisor resume NAME'
    /// has it go on once there is room.
    #[arg(long = "disk", value_name = "FILE[,OPTION...]", value_parser = Disk::parse, verbatim_doc_comment)]
    pub disks: Vec<Disk>,

    /// The guest's memory; K, M, G and T are powers of 1024
    #[arg(long, value_name = "SIZE", default_value = "256M", value_parser = size::parse)]
    pub memory: u64,

    /// Of that memory, how much the guest is asked to leave to the host by its balloon
    #[arg(long, value_name = "SIZE", default_value = "0", value_parser = size::parse)]
    pub balloon: u64,

    /// The number of the guest's CPUs
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub cpus: u32,

    /// A network card, joined to a TAP interface, the user's networks or another machine; can be given several times
    ///
    /// It is joined to:
    ///   tap=NAME       the TAP interface NAME of this host. Root makes one for a user, and joins it to a bridge:
    ///                    ip tuntap add NAME mode tap user USER; ip link set NAME up
    ///                    ip link add BRIDGE type bridge; ip link set NAME master BRIDGE
    ///                  Where there is none, root gets one for as long as the guest runs.
    ///   user           without root: what this user reaches, through a passt of the machine's own. Addresses come
    ///                  by DHCP. What listens on this host's loopback addresses alone is not reached.
    ///   socket=PATH    without root: a cable to another machine of this user or root that is given the same PATH. The
    ///                  one that starts first waits there for another, also when the other has ended; its guest sees the
    ///                  cable unplugged meanwhile. The other's guest sees it plugged in until the first ends, also
    ///                  before it is let in, which is when the first's guest runs and nobody else is at the other end.
    ///                  PATH is best in a folder of this user's alone.
    /// Behind it, each after a comma:
    ///   forward=HOSTPORT:GUESTPORT
    ///                  with user: TCP connections to the port HOSTPORT of this host, on all its addresses, go to the
    ///                  guest's; can be given several times
    ///   mac=ADDRESS    the card's address. Without it the card has one that is made of this host, the machine's
    ///                  name, the network and the card's number, and is the same each time.
    #[arg(long, value_name = "NETWORK[,OPTION...]", value_parser = NetOptions::parse, verbatim_doc_comment)]
    pub net: Vec<NetOptions>,

    /// What the guest's console is: its serial port (ttyS0), or a virtio console (hvc0)
    #[arg(long, value_name = "KIND", default_value = "serial")]
    pub console: ConsoleKind,

    /// Let all of the guest's output through to a terminal, escape sequences that make it answer too
    #[arg(long)]
    pub raw_console: bool,

    /// The hypervisor's device; /dev/kvm runs the guest on KVM
    #[arg(long, value_name = "PATH", default_value = DEFAULT_DEVICE)]
    pub device: PathBuf,

    /// Return when the guest runs, and print the machine's name
    ///
    /// The machine runs on after the user's logout. For 'rvisor ps' and the like to find it then, the folder
    /// /run/user/UID must stay: 'loginctl enable-linger' sees to that.
    #[arg(long)]
    pub detach: bool,

    /// This is the process that --detach made.
    #[arg(long, hide = true, conflicts_with = "detach")]
    pub detached: bool,

    /// Write what the machine does to FILE, one JSON object a second and line: what 'rvisor stat --json' prints
    #[arg(long, value_name = "FILE")]
    pub metrics: Option<PathBuf>,

    /// What it may take of the host.
    #[command(flatten)]
    pub sharing: Sharing,

    /// Where these options come from.
    #[arg(skip)]
    pub origin: Origin,
}

/// The words behind `rvisor run`, without the name, and the folder in which they were given.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Origin {
    /// The words.
    pub words: Vec<String>,
    /// The folder.
    pub folder: PathBuf,
}

/// What the guest's console is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ConsoleKind {
    /// The serial port.
    Serial,
    /// The virtio console.
    Virtio,
}

impl RunOptions {
    /// The guest's whole command line.
    #[must_use]
    pub fn guest_command_line(&self) -> String {
        let console = match self.console {
            ConsoleKind::Serial => "ttyS0",
            ConsoleKind::Virtio => "hvc0",
        };
        format!("console={console} {DEFAULT_COMMAND_LINE} {}", self.cmdline)
            .trim_end()
            .to_owned()
    }
}

/// A disk of the guest's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Disk {
    /// Its file.
    pub path: PathBuf,
    /// How the file holds it; none where the file is to tell.
    pub format: Option<Format>,
    /// The guest can't write to it.
    pub readonly: bool,
    /// What it calls itself, at most 20 bytes.
    pub serial: Option<String>,
}

impl Disk {
    /// Reads `FILE[,format=raw|qcow2][,readonly][,serial=TEXT]`.
    ///
    /// # Errors
    ///
    /// The word that is wrong, and those that there are.
    pub fn parse(text: &str) -> Result<Self, String> {
        let mut words = text.split(',');
        let mut disk = Self {
            path: words.next().unwrap_or_default().into(),
            format: None,
            readonly: false,
            serial: None,
        };
        for word in words {
            match word.split_once('=').unwrap_or((word, "")) {
                ("format", "raw") => disk.format = Some(Format::Raw),
                ("format", "qcow2") => disk.format = Some(Format::Qcow2),
                ("readonly", "") => disk.readonly = true,
                ("serial", serial) if (1..=20).contains(&serial.len()) && serial.is_ascii() => {
                    disk.serial = Some(serial.to_owned());
                }
                _ => {
                    return Err(format!(
                        "{word:?} is none of format=raw, format=qcow2, readonly and serial=TEXT \
                         (at most 20 characters)"
                    ))
                }
            }
        }
        Ok(disk)
    }
}

impl Origin {
    /// Takes out what is about this process and not about the machine. Words that are no text become such.
    pub(super) fn of(words: impl Iterator<Item = OsString>, folder: PathBuf) -> Self {
        let mut words = words.map(|word| word.to_string_lossy().into_owned());
        let mut kept = Vec::new();
        while let Some(word) = words.next() {
            match word.as_str() {
                "--name" => drop(words.next()),
                "--detach" | "--detached" => {}
                word if word.starts_with("--name=") => {}
                _ => kept.push(word),
            }
        }
        Self {
            words: kept,
            folder,
        }
    }
}
