//! What `virsh migrate --copy-storage-all` has QEMU do: the destination serves its image over NBD, the
//! source mirrors the
//! disk into it, and when both are equal memory follows by pre-copy. As libvirt does it, the migration waits
//! before the switch-over until the mirror has brought over the last writes of the stopped guest.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use super::{Engine, Migration, Progress, Stage, qemu};
use crate::link::Side;
use crate::storage::NODE;

/// TCP port of the destination's NBD server, in a namespace of its own.
const PORT: u16 = 10_809;
/// The mirroring job, and the node that it writes to.
const JOB: &str = "mirror";
const TARGET: &str = "mirror-target";
/// How often QEMU is asked during the switch-over, when every millisecond counts for the guest.
const POLL: Duration = Duration::from_millis(1);

pub(super) fn engines() -> Vec<Box<dyn Engine>> {
    let mut engines: Vec<Box<dyn Engine>> = Vec::new();
    for synchronous in [false, true] {
        for congestion in qemu::CONTROLS {
            engines.push(Box::new(Mirror {
                synchronous,
                congestion,
            }));
        }
    }
    engines
}

/// QEMU calls a mirror ready when nothing is dirty and nothing under way. Behind a long link a guest
/// that writes all the
/// time never lets that happen, so libvirt has `--copy-storage-synchronous-writes`: a write of the guest is
/// complete when both sides have it.
#[derive(Clone, Copy)]
struct Mirror {
    synchronous: bool,
    congestion: &'static str,
}

impl Engine for Mirror {
    fn name(&self) -> String {
        let synchronous = if self.synchronous { "sync-" } else { "" };
        format!("qemu-mirror-{synchronous}{}", self.congestion)
    }

    fn about(&self) -> String {
        let synchronous = if self.synchronous {
            " --copy-storage-synchronous-writes"
        } else {
            ""
        };
        format!(
            "QEMU's blockdev-mirror over NBD, then its pre-copy, as virsh migrate --copy-storage-all{synchronous}; \
             plain TCP {}",
            self.congestion
        )
    }

    fn congestion(&self) -> Option<&'static str> {
        Some(self.congestion)
    }

    fn moves_disks(&self) -> bool {
        true
    }

    fn prepare(&self, stage: &mut Stage<'_>) -> Result<Box<dyn Migration>> {
        let capabilities = [
            "return-path",
            "pause-before-switchover",
            "late-block-activate",
        ];
        qemu::prepare(stage, &capabilities, &json!({}))?;
        let address = stage.link.address(Side::Destination).to_string();
        let destination = stage.destination.control();
        // It must not run before its image is its own.
        destination.execute("stop", json!({}))?;
        let address = inet(&address);
        destination.execute(
            "nbd-server-start",
            json!({ "addr": { "type": "inet", "data": address } }),
        )?;
        let export =
            json!({ "type": "nbd", "id": NODE, "node-name": NODE, "name": NODE, "writable": true });
        destination.execute("block-export-add", export)?;
        Ok(Box::new(Running {
            copy_mode: if self.synchronous {
                "write-blocking"
            } else {
                "background"
            },
            started: Instant::now(),
            mirrored: None,
            switched: false,
        }))
    }
}

fn inet(host: &str) -> Value {
    json!({ "host": host, "port": PORT.to_string() })
}

struct Running {
    copy_mode: &'static str,
    started: Instant,
    /// When the two images were equal for the first time, since the start.
    mirrored: Option<Duration>,
    switched: bool,
}

impl Migration for Running {
    fn start(&mut self, stage: &mut Stage<'_>) -> Result<()> {
        self.started = Instant::now();
        let mut server = inet(&stage.link.address(Side::Destination).to_string());
        server["type"] = "inet".into();
        let source = stage.source.control();
        let node =
            json!({ "driver": "nbd", "node-name": TARGET, "server": server, "export": NODE });
        source.execute("blockdev-add", node)?;
        let job = json!({
            "job-id": JOB, "device": NODE, "target": TARGET, "sync": "full", "copy-mode": self.copy_mode
        });
        source.execute("blockdev-mirror", job).map(|_| ())
    }

    fn poll(&mut self, stage: &mut Stage<'_>) -> Result<Progress> {
        if self.mirrored.is_none() {
            let Some(job) = job(stage)? else {
                bail!("the mirror has ended early: {}", last_word(stage));
            };
            if job["ready"] == true {
                self.mirrored = Some(self.started.elapsed());
                qemu::start(stage)?;
            }
            return Ok(Progress::Running);
        }
        let seen = qemu::look(stage)?;
        if !self.switched && seen["status"] == "pre-switchover" {
            self.switched = true;
            switch_over(stage)?;
            return Ok(Progress::Running);
        }
        qemu::progress(stage, &seen)
    }

    fn claimed(&mut self, stage: &mut Stage<'_>) -> Value {
        let mut said = qemu::claimed(stage);
        said["bench-mirrored-s"] = self.mirrored.map(|since| since.as_secs_f64()).into();
        said
    }
}

/// The guest has stopped at the source: ends the mirror, lets the migration go on, and runs the guest
/// at the destination
/// on its image.
fn switch_over(stage: &mut Stage<'_>) -> Result<()> {
    let give_up = stage.give_up;
    let deadline = Instant::now() + give_up;
    let in_time = |what: &str| {
        ensure!(
            Instant::now() < deadline,
            "{what} after {} s",
            give_up.as_secs_f64()
        );
        std::thread::sleep(POLL);
        Ok(())
    };
    // Of a mirror that has caught up this means: write the rest, and be done.
    let control = stage.source.control();
    control.execute("block-job-cancel", json!({ "device": JOB }))?;
    while job(stage)?.is_some() {
        in_time("the mirror has not ended")?;
    }
    let ended = last_word(stage);
    ensure!(
        ended["event"] == "BLOCK_JOB_COMPLETED" && ended["data"]["error"].is_null(),
        "the mirror has failed: {ended}"
    );
    let control = stage.source.control();
    control.execute("blockdev-del", json!({ "node-name": TARGET }))?;
    control.execute("migrate-continue", json!({ "state": "pre-switchover" }))?;
    while stage.destination.control().status()? == "inmigrate" {
        let seen = qemu::look(stage)?;
        if seen["status"] == "failed" {
            // The caller says why.
            return Ok(());
        }
        in_time("the destination has not loaded the guest")?;
    }
    let control = stage.destination.control();
    control.execute("nbd-server-stop", json!({}))?;
    control.execute("cont", json!({})).map(|_| ())
}

/// What the source says of the mirror, while there is one.
fn job(stage: &mut Stage<'_>) -> Result<Option<Value>> {
    let jobs = stage
        .source
        .control()
        .execute("query-block-jobs", json!({}))?;
    let jobs = jobs.as_array().context("query-block-jobs gives no list")?;
    Ok(jobs.iter().find(|job| job["device"] == JOB).cloned())
}

/// The last event about the mirror, but for those about its status.
fn last_word(stage: &mut Stage<'_>) -> Value {
    let events = stage.source.control().events();
    let of_job = |event: &&Value| event["data"]["device"] == JOB;
    events
        .iter()
        .rev()
        .find(of_job)
        .cloned()
        .unwrap_or_default()
}
