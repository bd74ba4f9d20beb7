//! The destination's summary for the source, and its own report.

use std::path::Path;
use std::time::{Duration, Instant};

use hybridmig_transport::link::Link;
use hybridmig_transport::message::{DestinationSummary, Offer, SessionId};

use super::destination_data::ApplyPlane;
use super::link_report;
use super::sampler::Sampler;
use super::silence::Silence;
use super::source_report::phase;
use crate::guest::DestinationGuest;
use crate::report::{Faults, Report, SeedsUsed, Side, Times, Verified};
use crate::session::io::DestinationOutcome;

/// Speed samples in a summary.
const MOST_SAMPLES: usize = 4096;

/// Threads named in a summary.
const MOST_THREADS: usize = 64;

/// What is told to the source when every block is in place.
pub fn summary(
    plane: &ApplyPlane,
    guest: &dyn DestinationGuest,
    sampler: &Sampler,
) -> DestinationSummary {
    let (faults, local_faults) = plane.desk().map_or((0, 0), |desk| desk.counts());
    let blocked = plane.blocked();
    let resumed = plane.resumed();
    let postcopy = resumed.map_or(Duration::ZERO, |at| at.elapsed());
    let counts_work = guest.work_done().is_some();
    let speed = match resumed {
        Some(resumed) if counts_work => work_rates(sampler, resumed),
        _ => {
            // One figure for the whole phase: the share of the guest's threads that did not wait.
            let span = postcopy.as_secs_f64() * f64::from(blocked.parallelism.max(1));
            let waiting = if span > 0.0 {
                blocked.total.as_secs_f64() / span
            } else {
                0.0
            };
            let share = (1.0 - waiting).clamp(0.0, 1.0) as f32;
            vec![(0, share), (postcopy.as_micros() as u64, share)]
        }
    };
    DestinationSummary {
        faults,
        local_faults,
        fault_latency_us: plane
            .desk()
            .map(|desk| desk.latencies())
            .unwrap_or_default(),
        blocked_us: blocked.total.as_micros() as u64,
        blocked_threads: blocked
            .threads
            .iter()
            .take(MOST_THREADS)
            .map(|(name, time)| (name.clone(), time.as_micros() as u64))
            .collect(),
        speed,
        speed_source: if counts_work { "guest" } else { "blocked-time" }.to_owned(),
        postcopy_us: postcopy.as_micros() as u64,
        verified: None,
    }
}

/// Work per second since the resume, thinned to what a summary takes.
fn work_rates(sampler: &Sampler, resumed: Instant) -> Vec<(u64, f32)> {
    let rates = sampler.rates_since(resumed);
    let step = rates.len().div_ceil(MOST_SAMPLES).max(1);
    rates
        .chunks(step)
        .map(|chunk| {
            let rate = chunk.iter().map(|(_, rate)| rate).sum::<f64>() / chunk.len() as f64;
            (
                (chunk[chunk.len() - 1].0 - resumed).as_micros() as u64,
                rate as f32,
            )
        })
        .collect()
}

/// What the report is made of.
pub struct Facts<'a> {
    pub session: SessionId,
    pub started: Instant,
    pub started_unix: f64,
    pub outcome: &'a DestinationOutcome,
    pub offer: Option<&'a Offer>,
    pub version: Option<u16>,
    pub notes: Vec<String>,
    pub plane: &'a ApplyPlane,
    pub link: Option<&'a Link>,
    pub reconnects: u32,
    pub silence: &'a Silence,
    pub peer_software: Option<String>,
    pub verified: Option<Verified>,
    pub sampler: &'a Sampler,
    pub guest: &'a dyn DestinationGuest,
}

fn shown(path: &Path) -> String {
    path.display().to_string()
}

/// Makes the report.
pub fn build(facts: Facts<'_>) -> Report {
    let mut report = Report::new(Side::Destination, facts.session, facts.started_unix);
    report.outcome =
        serde_json::to_value(facts.outcome).expect("an outcome is plain data with string keys");
    report.peer_software = facts.peer_software;
    report.regions = facts.plane.regions().to_vec();
    report.verified = facts.verified;
    report.notes = facts.notes;
    if let Some(offer) = facts.offer {
        report.guest = Some(offer.guest.clone());
        report.mode = Some(offer.mode);
    }
    report.protocol_version = facts.version;
    let resumed = facts.plane.resumed();
    report.times = Times {
        total: facts.started.elapsed().as_secs_f64(),
        remote_up: resumed.map(|at| at.saturating_duration_since(facts.started).as_secs_f64()),
        pre_copy: None,
        post_copy: None,
    };
    let traffic = facts.plane.traffic();
    report.traffic = vec![
        phase("pre-copy", &traffic.before),
        phase("post-copy", &traffic.after),
    ];
    report.seeds = facts.plane.seeds().map(|seeds| SeedsUsed {
        files: seeds.paths().map(shown).collect(),
        contents: seeds.len() as u64,
        block_size: seeds.block_size(),
        blocks: traffic.seeded,
        bytes: traffic.seeded_bytes,
        missed: traffic.unseeded,
        changed: seeds.changed().into_iter().map(shown).collect(),
    });
    let min_rtt = facts
        .link
        .map_or(Duration::ZERO, |link| link.stats().min_rtt);
    report.link = facts
        .link
        .map(|link| link_report(link, facts.reconnects, facts.silence));
    if resumed.is_some() {
        let summary = summary(facts.plane, facts.guest, facts.sampler);
        report.faults = Some(Faults::from_summary(&summary, min_rtt));
        report.disk_io = facts.guest.disk_io();
    }
    report
}
