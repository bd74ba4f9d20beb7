//! The source's report: marks taken while it runs, and the figures made of them at the end.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use hybridmig_transport::codec::CodecStats;
use hybridmig_transport::link::Link;
use hybridmig_transport::message::{DestinationSummary, Message, ResumeTimings};

use super::link_report;
use super::sampler::Sampler;
use super::silence::Silence;
use super::source_data::DataPlane;
use crate::agility::{SpeedSample, agility};
use crate::guest::SourceGuest;
use crate::predict::Costs;
use crate::report::{
    CodecTraffic, Downtime, Faults, PhaseTraffic, Report, Round, Side, Times, Verified,
};
use crate::session::io::{SourceCommand, SourceInput, SourceOutcome};
use crate::session::source::SourceConfig;

/// How much of the time before the migration the guest's own speed is taken from.
const BASELINE: Duration = Duration::from_secs(5);
/// Less than this is too short to tell a speed from.
const SHORT: Duration = Duration::from_secs(2);

/// Points in time that only the driver sees.
#[derive(Debug, Default)]
pub struct Marks {
    inner: Mutex<Inner>,
}

#[derive(Clone, Debug, Default)]
struct Inner {
    tracking: Option<Instant>,
    freeze: Option<Instant>,
    frozen: Option<Instant>,
    scan: Duration,
    save_state: Duration,
    accepted: Option<(Instant, ResumeTimings)>,
    summary: Option<(Instant, DestinationSummary)>,
    welcome: Option<(u16, String)>,
}

impl Marks {
    /// A guest command has been executed.
    pub fn executed(&self, command: &SourceCommand, began: Instant, ended: Instant) {
        let mut marks = self.inner.lock().expect("not poisoned");
        match command {
            SourceCommand::StartTracking => marks.tracking = Some(began),
            SourceCommand::Freeze => (marks.freeze, marks.frozen) = (Some(began), Some(ended)),
            SourceCommand::Scan if marks.frozen.is_some() => marks.scan += ended - began,
            SourceCommand::SaveState => marks.save_state = ended - began,
            _ => {}
        }
    }

    /// An input is about to reach the machine.
    pub fn see(&self, input: &SourceInput) {
        let SourceInput::Message(message) = input else {
            return;
        };
        let mut marks = self.inner.lock().expect("not poisoned");
        match message {
            Message::Welcome {
                version, software, ..
            } => {
                marks.welcome = Some((*version, software.clone()));
            }
            Message::Accepted(timings) if marks.accepted.is_none() => {
                marks.accepted = Some((Instant::now(), *timings));
            }
            Message::AllPlaced(summary) if marks.summary.is_none() => {
                marks.summary = Some((Instant::now(), summary.clone()));
            }
            _ => {}
        }
    }
}

/// What the report is made of.
pub struct Facts<'a> {
    pub started: Instant,
    pub started_unix: f64,
    pub outcome: &'a SourceOutcome,
    pub config: &'a SourceConfig,
    pub guest: &'a dyn SourceGuest,
    pub plane: &'a DataPlane,
    pub marks: &'a Marks,
    pub link: Option<&'a Link>,
    pub reconnects: u32,
    pub silence: &'a Silence,
}

/// Makes the report.
pub fn build(facts: &Facts<'_>, sampler: &Sampler) -> Report {
    let marks = facts.marks.inner.lock().expect("not poisoned").clone();
    let mut report = Report::new(Side::Source, facts.config.session, facts.started_unix);
    report.outcome =
        serde_json::to_value(facts.outcome).expect("an outcome is plain data with string keys");
    report.guest = Some(facts.guest.describe().clone());
    report.regions = facts.guest.regions().to_vec();
    report.mode = Some(facts.config.mode);
    if let Some((version, software)) = &marks.welcome {
        report.protocol_version = Some(*version);
        report.peer_software = Some(software.clone());
    }
    let min_rtt = facts
        .link
        .map_or(Duration::ZERO, |link| link.stats().min_rtt);
    report.link = facts
        .link
        .map(|link| link_report(link, facts.reconnects, facts.silence));
    {
        let machine = facts.plane.machine();
        report.rounds = machine
            .figures()
            .rounds
            .iter()
            .map(|round| Round {
                blocks: round.blocks,
                bytes: round.bytes,
                dirty_after: round.dirty_after,
                seconds: round.seconds,
            })
            .collect();
        report.kinds = Some(machine.figures().kinds());
        let plan = machine.plan_report();
        report.prediction = Some(plan.into());
        report.plan = Some(plan.clone());
        report.notes = [machine.notes(), machine.warnings()].concat();
    }
    let traffic = facts.plane.traffic();
    report.traffic = vec![
        phase("pre-copy", &traffic.pre),
        phase("freeze-copy", &traffic.freeze),
        phase("post-copy", &traffic.post),
    ];
    report.compression = Some(facts.plane.levels());
    let running = marks
        .accepted
        .as_ref()
        .map(|(at, timings)| (running_since(*at, min_rtt), timings));
    report.times = times(facts, &marks, running.map(|(at, _)| at));
    if let (Some(freeze), Some((running, timings))) = (marks.freeze, running) {
        report.downtime = Some(downtime(&marks, freeze, running, timings));
        fill_speed(&mut report, &marks, sampler, facts.started, freeze, running);
    }
    if let Some((_, summary)) = &marks.summary {
        report.faults = Some(Faults {
            on_the_way: facts.plane.machine().figures().faults_on_the_way,
            ..Faults::from_summary(summary, min_rtt)
        });
        report.verified = summary.verified.clone().map(Verified::from);
    }
    report
}

/// What the steps of this migration cost, learned on top of what was known. Only of one that came to its end.
pub fn learned(facts: &Facts<'_>, report: &Report) -> Option<Costs> {
    let downtime = report.downtime?;
    let machine = facts.plane.machine();
    let figures = machine.figures();
    let complete = figures.milestones.complete?;
    let tracking = figures.milestones.tracking?;
    let link = machine.link_figures();
    let rate = machine.freeze_rate();
    // What its bytes and the way took: the blocks went out while the state was saved.
    let saving = downtime.save_state + downtime.scan / 2.0;
    let blocks = (figures.freeze.bytes as f64 / rate - saving).max(0.0);
    let bytes = blocks + figures.state.bytes as f64 / rate + link.rtt.as_secs_f64() / 2.0;
    let mut costs = facts.config.costs;
    costs.saw(&downtime, bytes, figures.state.bytes as f64);
    let total = report.times.total;
    costs.saw_ends(
        tracking.as_secs_f64(),
        (total - complete.as_secs_f64()).max(0.0),
    );
    Some(costs)
}

/// The destination's answer left when the guest ran, and took one way.
fn running_since(arrived: Instant, min_rtt: Duration) -> Instant {
    arrived.checked_sub(min_rtt / 2).unwrap_or(arrived)
}

fn times(facts: &Facts<'_>, marks: &Inner, running: Option<Instant>) -> Times {
    let since = |at: Instant| at.saturating_duration_since(facts.started).as_secs_f64();
    Times {
        total: facts.started.elapsed().as_secs_f64(),
        remote_up: running.map(since),
        pre_copy: marks
            .tracking
            .zip(marks.freeze)
            .map(|(from, to)| to.saturating_duration_since(from).as_secs_f64()),
        post_copy: marks
            .summary
            .as_ref()
            .map(|(_, summary)| Duration::from_micros(summary.postcopy_us).as_secs_f64()),
    }
}

fn downtime(marks: &Inner, freeze: Instant, running: Instant, timings: &ResumeTimings) -> Downtime {
    let total = running.saturating_duration_since(freeze).as_secs_f64();
    let stop = marks
        .frozen
        .map_or(0.0, |frozen| (frozen - freeze).as_secs_f64());
    let parts = Downtime {
        total,
        stop,
        scan: marks.scan.as_secs_f64(),
        save_state: marks.save_state.as_secs_f64(),
        ..Downtime::default()
    }
    .with_resume(timings);
    let known = parts.stop
        + parts.scan
        + parts.save_state
        + parts.discard
        + parts.load
        + parts.journal
        + parts.resume;
    Downtime {
        transit: (total - known).max(0.0),
        ..parts
    }
}

/// Speed before the freeze from this side's samples, after it from the destination's summary.
fn fill_speed(
    report: &mut Report,
    marks: &Inner,
    sampler: &Sampler,
    started: Instant,
    freeze: Instant,
    running: Instant,
) {
    let Some((_, summary)) = &marks.summary else {
        return;
    };
    let downtime = running.saturating_duration_since(freeze).as_secs_f64();
    let baseline = marks.tracking.unwrap_or(freeze);
    let v0 = match summary.speed_source.as_str() {
        "guest" => {
            let from = baseline
                .checked_sub(BASELINE)
                .unwrap_or(started)
                .max(started);
            // A short look before the migration says less than a long one in pre-copy, which costs the guest next to
            // nothing.
            let until = if baseline.saturating_duration_since(started) < SHORT {
                freeze
            } else {
                baseline
            };
            match sampler.mean_rate(from, until) {
                Some(v0) if v0 > 0.0 => v0,
                _ => return,
            }
        }
        // The samples are shares of full speed already.
        _ => 1.0,
    };
    report.speed_source = Some(summary.speed_source.clone());
    if summary.speed_source == "guest" {
        report.speed = sampler
            .rates()
            .into_iter()
            .filter(|(at, _)| *at < freeze)
            .map(|(at, rate)| (-(freeze - at).as_secs_f64(), rate / v0))
            .collect();
    }
    let mut samples = vec![SpeedSample {
        t: downtime,
        ratio: 0.0,
    }];
    for (us, rate) in &summary.speed {
        let t = downtime + Duration::from_micros(*us).as_secs_f64();
        samples.push(SpeedSample {
            t,
            ratio: f64::from(*rate) / v0,
        });
    }
    report
        .speed
        .extend(samples.iter().map(|sample| (sample.t, sample.ratio)));
    report.agility = agility(&samples);
}

/// The transport's counters of a phase in the report's form.
pub(super) fn phase(name: &str, stats: &CodecStats) -> PhaseTraffic {
    PhaseTraffic {
        phase: name.to_owned(),
        codecs: codecs(stats),
    }
}

fn codecs(stats: &CodecStats) -> Vec<CodecTraffic> {
    let named = [
        ("zero", stats.zero),
        ("named", stats.named),
        ("seeded", stats.seeded),
        ("delta", stats.xor_zstd),
        ("zstd", stats.zstd),
        ("raw", stats.raw),
        ("state", stats.state),
    ];
    named
        .into_iter()
        .map(|(codec, count)| CodecTraffic {
            codec: codec.to_owned(),
            blocks: count.blocks,
            plain_bytes: count.plain_bytes,
            wire_bytes: count.wire_bytes,
        })
        .collect()
}
