// SPDX-License-Identifier: GPL-2.0

//! The file that describes machines, in TOML: a table `machine.NAME` for each, whose keys are the long options of
//! `rvisor run`. What an option takes is the command line's to say, so that there is one place for it: the keys
//! become words, and what is wrong with one is told with its place in the file.
//!
//! ```toml
//! [machine.web]
//! kernel = "bzImage"          # relative to this file's folder
//! memory = "512M"
//! cpus = 2
//! ```

use std::ffi::OsString;
use std::fs::File;
use std::io::Read;
use std::ops::Range;
use std::path::Path;

use clap::error::ContextKind;
use clap::{ArgAction, Command};
use toml::de::{DeTable, DeValue};
use toml::Spanned;

use crate::arguments;
use crate::error::{Error, Result};
use crate::registry::Name;

/// What no file may have, in bytes.
const LARGEST: u64 = 1 << 20;
/// Options that are `up`'s own to give.
const NOT_KEYS: [&str; 4] = ["name", "detach", "detached", "help"];

/// A machine of the file.
#[derive(Debug)]
pub(super) struct Machine {
    pub(super) name: Name,
    /// Its command line behind `rvisor`.
    pub(super) words: Vec<OsString>,
}

/// Reads the file.
///
/// # Errors
///
/// [`Error::Input`] with the line and the column of the first mistake.
pub(super) fn read(path: &Path) -> Result<Vec<Machine>> {
    let wrong = |why: String| {
        Error::input(
            format!("{}: {why}", path.display()),
            "give a file that describes machines; 'rvisor up --help' shows one",
        )
    };
    let mut text = Vec::new();
    let read = File::open(path).and_then(|file| file.take(LARGEST).read_to_end(&mut text));
    if read.map_err(|e| wrong(e.to_string()))? as u64 == LARGEST {
        return Err(wrong(format!("it has {LARGEST} bytes or more")));
    }
    let text = String::from_utf8(text).map_err(|e| wrong(e.to_string()))?;
    parse(&text).map_err(|Mistake(byte, cause, next)| {
        let (line, column) = position(&text, byte);
        let file = path.display();
        Error::input(format!("{file}:{line}:{column}: {cause}"), next)
    })
}

/// Which byte of the text is the first that is wrong, what is, and what to do.
#[derive(Debug)]
struct Mistake(usize, String, String);

fn mistake(place: Range<usize>, cause: impl Into<String>, next: impl Into<String>) -> Mistake {
    Mistake(place.start, cause.into(), next.into())
}

/// Line and column, from 1, of a byte of the text. Columns count characters.
fn position(text: &str, byte: usize) -> (usize, usize) {
    let before = text.get(..byte).unwrap_or(text);
    let line = before.rfind('\n').map_or(0, |end| end + 1);
    (
        before.matches('\n').count() + 1,
        before[line..].chars().count() + 1,
    )
}

fn parse(text: &str) -> std::result::Result<Vec<Machine>, Mistake> {
    let next = "write one table [machine.NAME] for each machine";
    let document = DeTable::parse(text).map_err(|error| {
        let place = error.span().unwrap_or(0..0);
        mistake(
            place,
            error.message().replace('\n', ", "),
            "see https://toml.io for how TOML is written",
        )
    })?;
    let mut machines = Vec::new();
    for (key, value) in document.get_ref() {
        let (DeValue::Table(table), "machine") = (value.get_ref(), key.get_ref().as_ref()) else {
            let cause = format!("'{}' is no table of machines", key.get_ref());
            return Err(mistake(key.span(), cause, next));
        };
        // In the file's order.
        let mut table: Vec<_> = table.iter().collect();
        table.sort_by_key(|(name, _)| name.span().start);
        for (name, value) in table {
            machines.push(machine(name, value)?);
        }
    }
    if machines.is_empty() {
        return Err(mistake(0..0, "it describes no machine", next));
    }
    Ok(machines)
}

fn machine(
    key: &Spanned<impl AsRef<str>>,
    value: &Spanned<DeValue<'_>>,
) -> std::result::Result<Machine, Mistake> {
    let place = || key.span();
    let name: Name = key
        .get_ref()
        .as_ref()
        .parse()
        .map_err(|why: String| mistake(place(), why, "rename it"))?;
    let DeValue::Table(table) = value.get_ref() else {
        let cause = format!("machine.{name} is no table");
        return Err(mistake(
            place(),
            cause,
            format!("write [machine.{name}] and its options below"),
        ));
    };
    let command = arguments::run_command();
    let mut words = vec!["run".to_owned(), format!("--name={name}")];
    for (key, value) in table {
        words.extend(option(&command, key, value)?);
    }
    let checked = command.try_get_matches_from(&words);
    checked.map_err(|error| {
        // The option that is wrong, where it is one: "--memory <SIZE>".
        let context = error.get(ContextKind::InvalidArg).map(ToString::to_string);
        let option = context.as_deref().and_then(|option| {
            let option = option.trim_start_matches("--").split([' ', '=']).next()?;
            table.iter().find(|(key, _)| key.get_ref() == option)
        });
        let place = option.map_or_else(place, |(_, value)| value.span());
        mistake(
            place,
            format!("machine {name}: {}", arguments::paragraph(&error)),
            OPTIONS,
        )
    })?;
    Ok(Machine {
        name,
        words: words.into_iter().map(OsString::from).collect(),
    })
}

const OPTIONS: &str = "'rvisor run --help' lists the options";

/// The words for a key and its value.
fn option(
    command: &Command,
    key: &Spanned<impl AsRef<str>>,
    value: &Spanned<DeValue<'_>>,
) -> std::result::Result<Vec<String>, Mistake> {
    let name = key.get_ref().as_ref();
    let known = command
        .get_arguments()
        .find(|arg| arg.get_long() == Some(name));
    let Some(known) = known.filter(|_| !NOT_KEYS.contains(&name)) else {
        return Err(mistake(
            key.span(),
            format!("there is no option '{name}'"),
            OPTIONS,
        ));
    };
    let wants = |what: &str| {
        mistake(
            value.span(),
            format!("'{name}' is {what}"),
            format!("correct it; {OPTIONS}"),
        )
    };
    let word = |value: &Spanned<DeValue<'_>>, wanted: &str| match scalar(value.get_ref()) {
        Some(value) => Ok(format!("--{name}={value}")),
        None => Err(wants(wanted)),
    };
    match (known.get_action(), value.get_ref()) {
        (ArgAction::SetTrue, DeValue::Boolean(true)) => Ok(vec![format!("--{name}")]),
        (ArgAction::SetTrue, DeValue::Boolean(false)) => Ok(Vec::new()),
        (ArgAction::SetTrue, _) => Err(wants("true or false")),
        (ArgAction::Append, DeValue::Array(values)) => values
            .iter()
            .map(|value| word(value, "a list of strings or numbers"))
            .collect(),
        _ => Ok(vec![word(value, "a string or a number")?]),
    }
}

fn scalar(value: &DeValue<'_>) -> Option<String> {
    match value {
        DeValue::String(text) => Some(text.to_string()),
        DeValue::Integer(number) if number.radix() == 10 => Some(number.to_string()),
        DeValue::Float(number) => Some(number.to_string()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn keys_are_the_options_of_run() {
        let text = "[machine.web]\nkernel = \"k\"\ncpus = 2\nmemory = '1G'\n[machine.db]\nfirmware = \"f\"\n";
        let machines = parse(text).expect("it is right");
        let words: Vec<_> = machines
            .iter()
            .map(|machine| (machine.name.to_string(), machine.words.join(" ".as_ref())))
            .collect();
        assert!(
            words.contains(&("db".to_owned(), "run --name=db --firmware=f".into())),
            "{words:?}"
        );
        let web = words
            .iter()
            .find(|(name, _)| name == "web")
            .expect("it is there");
        for word in ["--kernel=k", "--cpus=2", "--memory=1G"] {
            assert!(
                web.1.to_str().is_some_and(|words| words.contains(word)),
                "{web:?}"
            );
        }
    }

    #[test]
    fn mistakes_have_their_place() {
        let good = "[machine.a]\nkernel = 'k'\n";
        for (text, at, words) in [
            ("", (1, 1), "no machine"),
            ("[machine", (1, 9), "unclosed"),
            ("machine = 1", (1, 1), "no table"),
            ("[machines.a]", (1, 2), "'machines' is no table"),
            ("[machine]\n 'a b' = {}", (2, 2), "a name has"),
            ("[machine]\na = 1", (2, 1), "no table"),
            ("[machine.a]\n", (1, 10), "--kernel"),
            (
                "[machine.a]\nkernel = 'k'\nmemroy = '1G'",
                (3, 1),
                "no option 'memroy'",
            ),
            (
                "[machine.a]\nkernel = 'k'\n  memory = '1X'",
                (3, 12),
                "suffix",
            ),
            (
                "[machine.a]\nkernel = 'k'\ncpus = 'é' # two\n",
                (3, 8),
                "invalid",
            ),
            (
                "[machine.a]\nkernel = 'k'\ncpus = 0x2\n",
                (3, 8),
                "a string or a number",
            ),
            (
                "[machine.a]\nkernel = 'k'\nname = 'b'",
                (3, 1),
                "no option 'name'",
            ),
            (
                "[machine.a]\nkernel = ['k']\n",
                (2, 10),
                "a string or a number",
            ),
            (
                "[machine.a]\nkernel = 'k'\nfirmware = 'f'",
                (3, 12),
                "cannot be used with",
            ),
            (&format!("{good}{good}"), (3, 10), "duplicate"),
        ] {
            let mistake = parse(text).expect_err(text);
            assert_eq!(position(text, mistake.0), at, "{text}: {mistake:?}");
            assert!(mistake.1.contains(words), "{text}: {mistake:?}");
            assert!(!mistake.1.contains('\n') && !mistake.2.is_empty());
        }
    }

    #[test]
    fn a_file_without_end_is_refused() {
        let said = read(Path::new("/dev/zero")).map_err(|error| error.to_string());
        assert!(said.expect_err("it is too long").contains("bytes or more"));
        // The last character does not end there.
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("long");
        fs::write(&path, format!("x{}", "é".repeat(LARGEST as usize / 2))).expect("it fits");
        let said = read(&path).map_err(|error| error.to_string());
        assert!(said.expect_err("it is too long").contains("bytes or more"));
    }

    #[test]
    fn columns_count_characters() {
        assert_eq!(position("é = 1\nüü x", 9), (2, 2));
        assert_eq!(position("", 7), (1, 1));
    }
}
