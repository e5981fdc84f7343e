// SPDX-License-Identifier: GPL-2.0

//! Man pages and the shells' completions, from the command line's own description.

use std::fs;
use std::path::Path;

use clap::{CommandFactory, ValueEnum};
use clap_complete::Shell;

use crate::arguments::Arguments;
use crate::error::{Error, Result};

/// Writes `man/*.1` and `completions/*` into `directory`, which is made.
///
/// # Errors
///
/// [`Error::Input`] where it can't be written.
pub fn run(directory: &Path) -> Result<()> {
    let (man, completions) = (directory.join("man"), directory.join("completions"));
    let write = || {
        fs::create_dir_all(&man)?;
        fs::create_dir_all(&completions)?;
        clap_mangen::generate_to(Arguments::command(), &man)?;
        for shell in Shell::value_variants() {
            clap_complete::generate_to(*shell, &mut Arguments::command(), "rvisor", &completions)?;
        }
        Ok(())
    };
    write().map_err(|error: std::io::Error| {
        Error::input(
            format!("{}: {error}", directory.display()),
            "give a folder that this user can write to",
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_command_has_a_page_and_each_shell_its_words() {
        let root = tempfile::tempdir().expect("a folder for the test");
        run(root.path()).expect("it can be written");
        for command in Arguments::command()
            .get_subcommands()
            .filter(|command| !command.is_hide_set())
        {
            let page = root
                .path()
                .join(format!("man/rvisor-{}.1", command.get_name()));
            let text = fs::read_to_string(&page).unwrap_or_default();
            assert!(text.contains(".SH SYNOPSIS"), "{}: {text}", page.display());
        }
        for file in ["rvisor.bash", "_rvisor", "rvisor.fish"] {
            let text = fs::read_to_string(root.path().join("completions").join(file))
                .expect("it is there");
            assert!(text.contains("cpu-share"), "{file}");
        }
        assert!(run(Path::new("/dev/null/x")).is_err());
    }
}
