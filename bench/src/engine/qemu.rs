//! What QEMU's own kinds of migration share: capabilities, parameters, the listening side, and how its
//! progress is read. It never decides when something happens.

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use super::{Progress, Stage};
use crate::link::Side;

/// TCP port of the incoming QEMU, in a namespace of its own.
const PORT: u16 = 4444;

/// The TCP congestion controls that peers are run with.
pub(super) const CONTROLS: [&str; 2] = ["bbr", "cubic"];

/// Bytes a second that QEMU may use: more than any link here carries, so that TCP decides.
const BANDWIDTH: u64 = 1_250_000_000;

/// Downtime that QEMU aims at, in ms: its default.
const DOWNTIME_LIMIT_MS: u64 = 300;

/// Sets both sides up and has the destination listen.
pub(super) fn prepare(
    stage: &mut Stage<'_>,
    capabilities: &[&str],
    parameters: &Value,
) -> Result<()> {
    let list: Vec<_> = capabilities
        .iter()
        .map(|name| json!({ "capability": name, "state": true }))
        .collect();
    let mut all = json!({ "max-bandwidth": BANDWIDTH, "downtime-limit": DOWNTIME_LIMIT_MS });
    for (name, value) in parameters.as_object().into_iter().flatten() {
        all[name] = value.clone();
    }
    for qmp in [stage.source.control(), stage.destination.control()] {
        qmp.execute("migrate-set-capabilities", json!({ "capabilities": list }))?;
        qmp.execute("migrate-set-parameters", all.clone())?;
    }
    let uri = uri(stage);
    // Failed, it is to stay and say why.
    let listen = json!({ "uri": uri, "exit-on-error": false });
    let listening = stage
        .destination
        .control()
        .execute("migrate-incoming", listen);
    listening.map(|_| ())
}

/// Starts the migration.
pub(super) fn start(stage: &mut Stage<'_>) -> Result<()> {
    let uri = uri(stage);
    stage
        .source
        .control()
        .execute("migrate", json!({ "uri": uri }))
        .map(|_| ())
}

fn uri(stage: &Stage<'_>) -> String {
    format!("tcp:{}:{PORT}", stage.link.address(Side::Destination))
}

/// The source's word about the migration. Only the source is asked while it lasts: a destination that
/// waits for a page may not answer.
pub(super) fn look(stage: &mut Stage<'_>) -> Result<Value> {
    stage.source.control().execute("query-migrate", json!({}))
}

/// How far that is.
pub(super) fn progress(stage: &mut Stage<'_>, seen: &Value) -> Result<Progress> {
    let status = seen["status"]
        .as_str()
        .context("query-migrate says no status")?;
    match status {
        "completed" => match stage.destination.control().status()?.as_str() {
            "running" => Ok(Progress::Moved),
            // It loads the last of the state.
            "inmigrate" | "paused" | "finish-migrate" => Ok(Progress::Running),
            other => bail!("the source has completed, the destination is {other}"),
        },
        "failed" | "cancelled" | "postcopy-paused" | "postcopy-recover" => {
            let incoming = stage
                .destination
                .control()
                .execute("query-migrate", json!({}));
            let stderr = stage.destination.stderr().unwrap_or_default();
            bail!(
                "the source says {status} ({}); the destination says {}; {}",
                seen["error-desc"].as_str().unwrap_or("no reason"),
                incoming.map_or_else(|error| format!("{error:#}"), |said| said.to_string()),
                stderr.trim()
            )
        }
        _ => Ok(Progress::Running),
    }
}

/// What the source says at the end.
pub(super) fn claimed(stage: &mut Stage<'_>) -> Value {
    look(stage).unwrap_or_else(|error| json!({ "error": format!("{error:#}") }))
}
