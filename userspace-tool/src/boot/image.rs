// SPDX-License-Identifier: GPL-2.0

//! The files that a guest is made of, opened and looked at before anything is built for them.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// A file of the user's.
#[derive(Debug)]
pub(super) struct Image {
    pub(super) path: PathBuf,
    pub(super) file: File,
    /// In bytes.
    pub(super) size: u64,
}

impl Image {
    pub(super) fn open(path: &Path, option: &str) -> Result<Self> {
        let refused = |what: String| {
            let give = format!("give the path of a file that can be read with {option}");
            Error::input(what, give)
        };
        let name = path.display();
        let cannot = |error: io::Error| match error.kind() {
            io::ErrorKind::NotFound => refused(format!("there is no file {name}")),
            _ => refused(format!("{name} can't be opened: {error}")),
        };
        // Not opened before it is known to be a file: a FIFO would block.
        let metadata = path.metadata().map_err(cannot)?;
        if !metadata.is_file() {
            return Err(refused(format!("{name} is not a file")));
        }
        Ok(Self {
            file: File::open(path).map_err(cannot)?,
            path: path.to_owned(),
            size: metadata.len(),
        })
    }

    pub(super) fn unreadable(&self, error: &io::Error) -> Error {
        Error::input(
            format!("{} can't be read: {error}", self.path.display()),
            "check the file",
        )
    }
}
