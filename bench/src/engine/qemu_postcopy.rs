//! QEMU's post-copy over TCP, with and without a connection of its own for demanded pages
//! (`postcopy-preempt`). As libvirt's `--postcopy-after-precopy` does it, the guest is switched over after
//! the first pass over memory; `at-once` switches as soon as the migration is under way.

use anyhow::Result;
use serde_json::{Value, json};

use super::{Engine, Migration, Progress, Stage, qemu};

pub(super) fn engines() -> Vec<Box<dyn Engine>> {
    let mut engines: Vec<Box<dyn Engine>> = Vec::new();
    for (preempt, at_once) in [(false, false), (true, false), (false, true), (true, true)] {
        for congestion in qemu::CONTROLS {
            engines.push(Box::new(Postcopy {
                preempt,
                at_once,
                congestion,
            }));
        }
    }
    engines
}

#[derive(Clone, Copy)]
struct Postcopy {
    preempt: bool,
    at_once: bool,
    congestion: &'static str,
}

impl Engine for Postcopy {
    fn name(&self) -> String {
        let preempt = if self.preempt { "preempt-" } else { "" };
        let at_once = if self.at_once { "at-once-" } else { "" };
        format!("qemu-postcopy-{preempt}{at_once}{}", self.congestion)
    }

    fn about(&self) -> String {
        let preempt = if self.preempt {
            " with postcopy-preempt"
        } else {
            ""
        };
        let when = if self.at_once {
            "at once"
        } else {
            "after the first pass"
        };
        format!(
            "QEMU's post-copy{preempt}, switched over {when}, plain TCP {}",
            self.congestion
        )
    }

    fn congestion(&self) -> Option<&'static str> {
        Some(self.congestion)
    }

    fn prepare(&self, stage: &mut Stage<'_>) -> Result<Box<dyn Migration>> {
        let mut capabilities = vec!["return-path", "postcopy-ram"];
        if self.preempt {
            capabilities.push("postcopy-preempt");
        }
        qemu::prepare(stage, &capabilities, &json!({}))?;
        Ok(Box::new(Running {
            // Passes are counted from the one that is under way.
            passes: if self.at_once { 1 } else { 2 },
            switched: false,
        }))
    }
}

struct Running {
    passes: u64,
    switched: bool,
}

impl Migration for Running {
    fn start(&mut self, stage: &mut Stage<'_>) -> Result<()> {
        qemu::start(stage)
    }

    fn poll(&mut self, stage: &mut Stage<'_>) -> Result<Progress> {
        let seen = qemu::look(stage)?;
        let pass = seen["ram"]["dirty-sync-count"].as_u64().unwrap_or(0);
        if !self.switched && seen["status"] == "active" && pass >= self.passes {
            stage
                .source
                .control()
                .execute("migrate-start-postcopy", json!({}))?;
            self.switched = true;
        }
        qemu::progress(stage, &seen)
    }

    fn claimed(&mut self, stage: &mut Stage<'_>) -> Value {
        let mut said = qemu::claimed(stage);
        said["bench-switched"] = self.switched.into();
        said
    }
}
