// SPDX-License-Identifier: GPL-2.0

//! Properties of the interrupt controllers and timers that hold after any sequence of events.

mod ioapic;
mod lapic;
mod mailbox;
mod pic;
mod pit;
mod routing;

use proptest::test_runner::Config;

/// How often each property is tried. Nothing is written beside the sources.
fn config() -> Config {
    Config {
        cases: 256,
        failure_persistence: None,
        ..Config::default()
    }
}
