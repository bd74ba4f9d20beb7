//! What a transport makes of a link: bulk goodput, how soon it is reached, what it costs in packets, and how
//! long a page fault takes beside it. No guest and no disk: bytes without meaning, from one host to the
//! other, over the same emulated link for every transport.

mod figures;
mod quic;
mod table;
mod tcp;

use std::fs::OpenOptions;
use std::io::Write as _;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use hybridmig_netem::LinkSpec;
use hybridmig_transport::Congestion;
use serde::{Deserialize, Serialize};

use crate::congestion::Allowed;
use crate::interrupt::Interrupt;
use crate::link::{Link, LinkFacts};

pub use figures::{Figures, Latencies, Point};
pub use table::markdown;

/// Version of the lines of JSON.
pub const SCHEMA: u32 = 1;

/// How often the receiver's progress is looked at.
const SAMPLE: Duration = Duration::from_millis(20);

/// Page faults that wait at the same time, as with that many vCPUs.
const FAULTS_AT_ONCE: u64 = 4;

/// By how much one of two transfers is earlier.
const HEAD_START: Duration = Duration::from_secs(5);

/// Most bytes of a tuned TCP's buffers.
const TUNED_BUFFER: u32 = 64 << 20;

/// Length of a page in bytes.
const PAGE: usize = 4096;

/// Bytes handed to the transport at a time.
const PIECE: usize = 256 << 10;

/// A fault pauses between these before the next, in ms: faults do not come in step with anything.
const PAUSE_MS: std::ops::Range<u64> = 5..35;

/// What carries the bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Transport {
    /// hybridmig's own, with one of its congestion controls.
    Quic(Congestion),
    /// The kernel's TCP with BBR; faults on connections of their own.
    TcpBbr,
    /// The same with buffers of 64 MB, as an operator of long links sets them.
    TcpBbrTuned,
    /// The same with CUBIC.
    TcpCubic,
}

impl Transport {
    /// All, by name.
    pub const ALL: [(&'static str, Self); 6] = [
        ("hybridmig", Self::Quic(Congestion::Adaptive)),
        ("quinn-bbr", Self::Quic(Congestion::Bbr)),
        ("quinn-cubic", Self::Quic(Congestion::Cubic)),
        ("tcp-bbr", Self::TcpBbr),
        ("tcp-bbr-tuned", Self::TcpBbrTuned),
        ("tcp-cubic", Self::TcpCubic),
    ];

    /// The one of that name.
    pub fn by_name(name: &str) -> Result<Self> {
        let known = Self::ALL.iter().find(|(known, _)| *known == name);
        known.map(|(_, transport)| *transport).with_context(|| {
            let names = Self::ALL.map(|(name, _)| name);
            format!("no transport '{name}'; there are {}", names.join(", "))
        })
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        let named = Self::ALL.iter().find(|(_, transport)| *transport == self);
        named.map_or("quic", |(name, _)| name)
    }

    fn start(self, link: &Link, faults: bool) -> Result<Box<dyn Flow>> {
        Ok(match self {
            Self::Quic(congestion) => Box::new(quic::start(link, congestion, faults)?),
            Self::TcpBbr => Box::new(tcp::start(link, "bbr", faults)?),
            Self::TcpBbrTuned => {
                link.set_tcp_buffers(TUNED_BUFFER)?;
                Box::new(tcp::start(link, "bbr", faults)?)
            }
            Self::TcpCubic => Box::new(tcp::start(link, "cubic", faults)?),
        })
    }
}

/// A transfer that goes on until this is dropped.
trait Flow {
    /// Bytes that the receiving application has.
    fn received(&self) -> u64;

    /// How long the faults so far took, in seconds.
    fn latencies(&self) -> Vec<f64>;

    /// Why it does not go on, if it does not.
    fn broken(&self) -> Option<String>;
}

/// Another transfer over the same link.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Rival {
    /// What carries it.
    pub transport: Transport,
    /// Whether it has begun [`HEAD_START`] before the one that is measured; else after it.
    pub first: bool,
}

/// What is to be measured.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Links.
    pub links: Vec<LinkSpec>,
    /// Transports.
    pub transports: Vec<Transport>,
    /// Whether pages are asked for meanwhile.
    pub faults: bool,
    /// Who else uses the link, if somebody does.
    pub rival: Option<Rival>,
    /// Length of a run in seconds, once connected.
    pub seconds: f64,
    /// Rounds over everything.
    pub repetitions: u32,
    /// Of the emulator.
    pub seed: u64,
    /// How often a run whose emulator was late is tried again.
    pub retries: u32,
}

/// One run, a line of JSON.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Run {
    /// [`SCHEMA`].
    pub schema: u32,
    /// The link.
    pub link: String,
    /// Its main figures.
    pub facts: LinkFacts,
    /// The transport's name.
    pub transport: String,
    /// Whether pages were asked for meanwhile.
    pub faults: bool,
    /// Who else used the link, and what the receiver of that got of its rate in the second half.
    #[serde(default)]
    pub rival: Option<(Rival, f64)>,
    /// From 0.
    pub repetition: u32,
    /// Of the emulator.
    pub seed: u64,
    /// Length in seconds.
    pub seconds: f64,
    /// Why this is not a measurement of the link, if the emulator was late.
    pub invalid: Option<String>,
    /// Why there is no result, if there is none.
    pub failed: Option<String>,
    /// What was seen.
    pub figures: Option<Figures>,
}

/// The links that the transport's goals are set for.
pub fn default_links() -> Result<Vec<LinkSpec>> {
    let mut links = Vec::new();
    for rtt in [20, 100, 200, 300] {
        for loss in ["0%", "0.1%", "1%", "3%", "gemodel 0.2525% 25%"] {
            let delay = rtt / 2;
            let text = format!("delay {delay}ms rate 200mbit loss {loss} limit 50ms");
            links.push(text.parse()?);
        }
    }
    Ok(links)
}

/// Reads lines of JSON.
pub fn read(path: &Path) -> Result<Vec<Run>> {
    let text =
        std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    let lines = text.lines().filter(|line| !line.trim().is_empty());
    lines
        .map(|line| serde_json::from_str(line).with_context(|| format!("not a run: {line}")))
        .collect()
}

/// Runs all of a plan, transports in turn within a link, and appends every run to `out`.
pub fn run_all(plan: &Plan, out: &Path, interrupt: &Interrupt) -> Result<()> {
    let _allowed = Allowed::extend(&["bbr", "cubic"])?;
    let mut file = OpenOptions::new()
        .create(true)
        .append(true)
        .open(out)
        .with_context(|| format!("cannot write {}", out.display()))?;
    for repetition in 0..plan.repetitions {
        for spec in &plan.links {
            for transport in &plan.transports {
                let mut attempt = 0;
                loop {
                    let run = run_one(plan, spec, *transport, repetition, interrupt)?;
                    let line = serde_json::to_string(&run)?;
                    writeln!(file, "{line}")
                        .with_context(|| format!("cannot write {}", out.display()))?;
                    eprintln!("{}", describe(&run));
                    attempt += 1;
                    if run.invalid.is_none() || attempt > plan.retries {
                        break;
                    }
                }
            }
        }
    }
    Ok(())
}

fn describe(run: &Run) -> String {
    let mut text = format!("{:30} {:12}", run.facts.to_string(), run.transport);
    if let Some(figures) = &run.figures {
        text += &format!(
            " {:.3} steady, {:.3} whole, {} to 80 %",
            figures.steady,
            figures.whole,
            figures
                .startup_rtts
                .map_or("never".to_owned(), |rtts| format!("{rtts:.1} RTT"))
        );
        if let Some(latencies) = &figures.latencies {
            text += &format!(
                "; fault {:.2} RTT, p99 {:.2}",
                latencies.p50_rtts, latencies.p99_rtts
            );
        }
    }
    if let Some((rival, share)) = run.rival {
        let first = if rival.first { ", first" } else { "" };
        text += &format!("; {}{first}: {share:.3}", rival.transport.name());
    }
    for why in [&run.failed, &run.invalid].into_iter().flatten() {
        text += &format!(" ({why})");
    }
    text
}

fn run_one(
    plan: &Plan,
    spec: &LinkSpec,
    transport: Transport,
    repetition: u32,
    interrupt: &Interrupt,
) -> Result<Run> {
    let seed = plan.seed + u64::from(repetition);
    let link = Link::start(spec, seed)?;
    let seen = watch(plan, spec, transport, &link, interrupt);
    if interrupt.is_set() {
        bail!("interrupted");
    }
    let (seen, failed) = match seen {
        Ok(seen) => (Some(seen), None),
        Err(error) => (None, Some(format!("{error:#}"))),
    };
    let (figures, share) = seen.unzip();
    Ok(Run {
        schema: SCHEMA,
        link: spec.to_string(),
        facts: LinkFacts::of(spec),
        transport: transport.name().to_owned(),
        faults: plan.faults,
        rival: plan
            .rival
            .map(|rival| (rival, share.flatten().unwrap_or(0.0))),
        repetition,
        seed,
        seconds: plan.seconds,
        invalid: link.traffic().invalid,
        failed,
        figures,
    })
}

fn watch(
    plan: &Plan,
    spec: &LinkSpec,
    transport: Transport,
    link: &Link,
    interrupt: &Interrupt,
) -> Result<(Figures, Option<f64>)> {
    let ours = || transport.start(link, plan.faults);
    let theirs = |rival: Rival| rival.transport.start(link, false);
    // What is measured is what becomes of a head start.
    let pause = || std::thread::sleep(HEAD_START);
    let (flow, rival) = match plan.rival {
        None => (ours()?, None),
        Some(rival) if rival.first => {
            let rival = theirs(rival)?;
            pause();
            (ours()?, Some(rival))
        }
        Some(rival) => {
            let flow = ours()?;
            pause();
            (flow, Some(theirs(rival)?))
        }
    };
    link.restart_timeline();
    let start = Instant::now();
    let mut points = Vec::new();
    // Faults of the first half are not counted, as its goodput is not.
    let mut middle = None;
    loop {
        let sent = link.traffic().forward;
        let at = start.elapsed().as_secs_f64();
        points.push(Point {
            at,
            received: flow.received(),
            sent_bytes: sent.bytes,
            sent_packets: sent.packets,
        });
        if at >= plan.seconds / 2.0 && middle.is_none() {
            let theirs = rival.as_ref().map_or(0, |rival| rival.received());
            middle = Some((flow.latencies().len(), at, theirs));
        }
        if at >= plan.seconds {
            break;
        }
        if let Some(why) = flow.broken() {
            bail!("it broke after {at:.1} s: {why}");
        }
        interrupt.check()?;
        // A sampling period; nothing is waited for.
        std::thread::sleep(SAMPLE);
    }
    let rate = spec.forward.rate.context("a link with a rate is needed")?;
    let rate = rate as f64 / 8.0;
    let (counted, from, theirs) = middle.unwrap_or_default();
    let share = rival.as_ref().map(|rival| {
        let seconds = (start.elapsed().as_secs_f64() - from).max(1e-6);
        rival.received().saturating_sub(theirs) as f64 / seconds / rate
    });
    let latencies = flow.latencies().split_off(counted);
    drop((flow, rival));
    let figures = figures::of(&points, rate, spec.rtt().as_secs_f64(), latencies);
    Ok((figures.context("too short to say anything")?, share))
}
