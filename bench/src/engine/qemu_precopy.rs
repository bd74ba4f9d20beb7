//! QEMU's pre-copy over TCP: one connection, or several with zstd (`multifd`).

use anyhow::Result;
use serde_json::{Value, json};

use super::{Engine, Migration, Progress, Stage, qemu};

/// Connections of `multifd`.
const CHANNELS: u32 = 4;

pub(super) fn engines() -> Vec<Box<dyn Engine>> {
    let mut engines: Vec<Box<dyn Engine>> = Vec::new();
    for multifd in [false, true] {
        for congestion in qemu::CONTROLS {
            engines.push(Box::new(Precopy {
                multifd,
                congestion,
            }));
        }
    }
    engines
}

#[derive(Clone, Copy)]
struct Precopy {
    multifd: bool,
    congestion: &'static str,
}

impl Engine for Precopy {
    fn name(&self) -> String {
        let multifd = if self.multifd { "multifd-zstd-" } else { "" };
        format!("qemu-precopy-{multifd}{}", self.congestion)
    }

    fn about(&self) -> String {
        let how = if self.multifd {
            format!("multifd with {CHANNELS} channels and zstd")
        } else {
            "one connection".to_owned()
        };
        format!("QEMU's pre-copy, {how}, plain TCP {}", self.congestion)
    }

    fn congestion(&self) -> Option<&'static str> {
        Some(self.congestion)
    }

    fn prepare(&self, stage: &mut Stage<'_>) -> Result<Box<dyn Migration>> {
        // With the return path "completed" means that the destination has loaded everything.
        if self.multifd {
            let parameters = json!({ "multifd-channels": CHANNELS, "multifd-compression": "zstd" });
            qemu::prepare(stage, &["return-path", "multifd"], &parameters)?;
        } else {
            qemu::prepare(stage, &["return-path"], &json!({}))?;
        }
        Ok(Box::new(Running))
    }
}

struct Running;

impl Migration for Running {
    fn start(&mut self, stage: &mut Stage<'_>) -> Result<()> {
        qemu::start(stage)
    }

    fn poll(&mut self, stage: &mut Stage<'_>) -> Result<Progress> {
        let seen = qemu::look(stage)?;
        qemu::progress(stage, &seen)
    }

    fn claimed(&mut self, stage: &mut Stage<'_>) -> Value {
        qemu::claimed(stage)
    }
}
