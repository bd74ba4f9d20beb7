//! What moves a guest: the seam to every engine, and the list of all. An engine is one file beside this one
//! and one line in [`all`].
//!
//! An engine sets itself up, starts, and says when it believes to have ended. It measures nothing: that
//! is done for all engines alike, from outside.

mod hybridmig;
mod qemu;
mod qemu_mirror;
mod qemu_postcopy;
mod qemu_precopy;

use std::time::Duration;

use anyhow::{Context, Result};
use hybridmig_tests::Vm;
use serde_json::Value;

use crate::link::Link;

/// Every engine. Each file gives its variants.
pub fn all() -> Vec<Box<dyn Engine>> {
    let mut engines = hybridmig::engines();
    engines.extend(qemu_precopy::engines());
    engines.extend(qemu_postcopy::engines());
    engines.extend(qemu_mirror::engines());
    engines
}

/// The engine that all others are compared with in tables.
pub const REFERENCE: &str = "hybridmig-hybrid";

/// The engine of that name.
pub fn by_name(name: &str) -> Result<Box<dyn Engine>> {
    let engine = all().into_iter().find(|engine| engine.name() == name);
    engine.with_context(|| format!("there is no engine '{name}'; 'bench list' shows all"))
}

/// Something that moves guests.
pub trait Engine {
    /// Its name in scenarios and results.
    fn name(&self) -> String;

    /// What it is and does, in a sentence.
    fn about(&self) -> String;

    /// The TCP congestion control that both hosts are to have, if that matters to it.
    fn congestion(&self) -> Option<&'static str> {
        None
    }

    /// Whether it moves disks as well. The others expect storage that both hosts reach.
    fn moves_disks(&self) -> bool {
        false
    }

    /// Does all that a user would have done before the migration: has the destination listen, sets
    /// options. The guest runs, the destination waits with `-incoming defer`.
    fn prepare(&self, stage: &mut Stage<'_>) -> Result<Box<dyn Migration>>;
}

/// What a run gives an engine.
pub struct Stage<'a> {
    /// The guest, running.
    pub source: &'a mut Vm,
    /// Its twin, waiting.
    pub destination: &'a mut Vm,
    /// The link between the two hosts.
    pub link: &'a Link,
    /// After this time nobody waits for the end any more.
    pub give_up: Duration,
}

/// A migration that can be started. Dropping it ends whatever it has started.
pub trait Migration {
    /// Starts it and returns at once.
    fn start(&mut self, stage: &mut Stage<'_>) -> Result<()>;

    /// How far it is, by its own word; called some fifty times a second. An error is the engine's
    /// failure.
    fn poll(&mut self, stage: &mut Stage<'_>) -> Result<Progress>;

    /// What it says of itself when it has ended or was given up. Must not fail: what cannot be
    /// had is said in the value.
    fn claimed(&mut self, stage: &mut Stage<'_>) -> Value;
}

/// How far a migration is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Progress {
    /// It goes on.
    Running,
    /// The guest runs at the destination and no longer depends on the source.
    Moved,
    /// The engine has ended, and has left the guest at the source.
    GaveUp(String),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_plain() {
        let names: Vec<_> = all().iter().map(|engine| engine.name()).collect();
        assert!(names.iter().any(|name| name == REFERENCE));
        for name in &names {
            assert_eq!(
                names.iter().filter(|other| *other == name).count(),
                1,
                "{name}"
            );
            assert!(
                name.chars()
                    .all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-'),
                "{name}"
            );
            assert_eq!(by_name(name).unwrap().name(), *name);
        }
    }
}
