//! `hybridmig plan`: what `send` would do and what that would come to, without moving anything.

use std::fmt::Write;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, bail};
use hybridmig_engine::guest::SourceGuest;
use hybridmig_engine::plan::dry::{Advice, DryRun, Point, SHARES};
use hybridmig_engine::plan::planner::Bounds;
use hybridmig_engine::predict::LinkState;
use hybridmig_engine::predict::costs::{LinkSeen, Remembered};
use hybridmig_engine::profile::Profile;
use hybridmig_engine::session::io::SourceOutcome;
use hybridmig_engine::session::source::{GuestUse, SourceConfig};
use hybridmig_transport::link::repair;
use hybridmig_transport::message::{Mode, SessionId};

use super::check::ask;
use super::send::open;
use super::{profile, state_dir};
use crate::cli::{PlanArgs, SourceGuestArgs};
use crate::foretold;
use crate::units::{show_rate, show_time};

/// Of what a link carries, what a migration gets: headers, acknowledgements, the rate that congestion control leaves.
const GOODPUT: f64 = 0.93;
/// How sure a rate is that the operator names, that was seen a day ago, or of which nothing is known, as relative
/// standard deviations.
const SURE: (f64, f64, f64) = (0.05, 0.15, 0.5);
/// Assumed of a link of which nothing is known, in bytes per second and in seconds.
const ASSUMED: (f64, f64) = (12.5e6, 0.05);
/// The same of the round trip.
const RTT_CV: f64 = 0.05;
/// Width of a plot's bars.
const BAR: f64 = 40.0;

/// Plans.
pub fn run(args: &PlanArgs) -> anyhow::Result<ExitCode> {
    let state_dir = state_dir(args.state_dir.as_deref())?;
    let (remembered, unread) = Remembered::read(&state_dir);
    if let Some(why) = unread {
        tracing::warn!("what earlier migrations cost is not known: {why}");
    }
    let (profile, guest, open) = guest(args)?;
    let (link, of_link) = link(args, &remembered, open)?;
    let defaults = SourceConfig::new(SessionId([0; 8]), Mode::Hybrid);
    let costs = remembered.of(&profile.guest_kind);
    let seconds = |time: Option<std::time::Duration>| time.map(|time| time.as_secs_f64());
    let dry = DryRun {
        guest,
        link,
        costs,
        bounds: Bounds {
            max_downtime: seconds(args.max_downtime),
            max_total: seconds(args.max_total),
            rounds: defaults.max_rounds,
        },
        prefetch: defaults.prefetch,
        profile,
    };
    let advice = dry.advise();
    if let Some(path) = &args.plot {
        std::fs::write(path, svg(&advice.points))
            .with_context(|| format!("cannot write the plot {}", path.display()))?;
    }
    if args.json {
        println!("{}", serde_json::to_string_pretty(&advice)?);
    } else {
        print!("{}", text(&dry, &advice, &of_link));
    }
    Ok(ExitCode::SUCCESS)
}

/// See [`guest`].
type Looked = (Profile, GuestUse, Option<Arc<dyn SourceGuest>>);

/// The guest's profile, how it waits, and the guest itself where it runs here.
fn guest(args: &PlanArgs) -> anyhow::Result<Looked> {
    if let Some(path) = &args.profile {
        let profile = profile::load(path)?;
        let guest = GuestUse {
            parallelism: profile.parallelism.max(1),
            watching_cost: profile
                .watching_cost
                .unwrap_or(GuestUse::default().watching_cost),
            ..GuestUse::default()
        };
        return Ok((profile, guest, None));
    }
    let named = SourceGuestArgs {
        qmp: args.qmp.clone(),
        workload: args.workload.clone(),
        #[cfg(feature = "xen")]
        xen: args.xen.clone(),
    };
    let guest = open(&named, args.disks.choice())?;
    let profile = profile::watch(guest.as_ref(), args.watch, args.json)?;
    let used = GuestUse {
        watching_cost: profile
            .watching_cost
            .unwrap_or(GuestUse::default().watching_cost),
        ..guest.guest_use()
    };
    Ok((profile, used, Some(guest)))
}

/// The link: as named, as measured now, as remembered, as assumed, and where each figure comes from.
fn link(
    args: &PlanArgs,
    remembered: &Remembered,
    guest: Option<Arc<dyn SourceGuest>>,
) -> anyhow::Result<(LinkState, Vec<String>)> {
    let known = args.to.as_deref().and_then(|to| remembered.link(to));
    let mut notes = Vec::new();
    let mut measured = None;
    if let Some((to, guest)) = args.to.as_deref().zip(guest) {
        let run = ask(guest, &args.trust, to)?;
        match run.outcome {
            SourceOutcome::Checked { .. } => {
                measured = run.report.link.map(|link| link.min_rtt_ms / 1e3);
            }
            other => bail!(
                "{to} would not take this guest: {other:?}; 'hybridmig check --to' tells more"
            ),
        }
    }
    let (bandwidth, bandwidth_cv) = match (args.bandwidth, known) {
        (Some(bytes), _) => {
            notes.push(format!("rate {}: as named", show_rate(bytes as f64)));
            (bytes as f64 * GOODPUT, SURE.0)
        }
        (None, Some(seen)) => {
            notes.push(format!(
                "rate {}: seen {}",
                show_rate(seen.bandwidth),
                ago(&seen)
            ));
            (seen.bandwidth * GOODPUT, SURE.1)
        }
        (None, None) => {
            notes.push(format!(
                "rate {}: ASSUMED, nothing is known of the link; name --bandwidth",
                show_rate(ASSUMED.0)
            ));
            (ASSUMED.0, SURE.2)
        }
    };
    let (rtt, whence) = match (args.rtt, measured, known) {
        (Some(rtt), ..) => (rtt.as_secs_f64(), "as named".to_owned()),
        (None, Some(rtt), _) => (rtt, "measured now".to_owned()),
        (None, None, Some(seen)) => (seen.rtt, format!("seen {}", ago(&seen))),
        (None, None, None) => (ASSUMED.1, "ASSUMED; name --rtt, or --to".to_owned()),
    };
    let shown = show_time(std::time::Duration::try_from_secs_f64(rtt).unwrap_or_default());
    notes.push(format!("round trip {shown}: {whence}"));
    let loss = args.loss.or(known.map(|seen| seen.loss)).unwrap_or(0.0);
    notes.push(format!("loss {:.2} %", 100.0 * loss));
    let link = LinkState {
        bandwidth,
        bandwidth_cv,
        rtt,
        rtt_cv: RTT_CV,
        parity: repair::plan::share(loss, 1.0),
    };
    Ok((link, notes))
}

fn ago(seen: &LinkSeen) -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let hours = now.map_or(0.0, |now| (now.as_secs_f64() - seen.unix) / 3600.0);
    if hours < 1.0 {
        "less than an hour ago".to_owned()
    } else {
        format!("{hours:.0} h ago")
    }
}

fn text(dry: &DryRun, advice: &Advice, of_link: &[String]) -> String {
    let mut text = format!(
        "guest: {}\nlink:  {}\n",
        dry.profile.guest,
        of_link.join("; ")
    );
    let costs = if dry.costs.load.seen > 0 {
        "learned"
    } else {
        "assumed"
    };
    let _ = writeln!(text, "costs of stopping, saving and loading: {costs}\n");
    let _ = write!(text, "plan: {}", foretold::plan(&advice.chosen));
    for why in &advice.why {
        let _ = writeln!(text, "  because {why}");
    }
    for other in &advice.alternatives {
        let _ = write!(text, "\nor: {}", foretold::plan(other));
    }
    text.push_str(&bars(&advice.points));
    text
}

/// Lost work over the fractions, as bars: the best share of the disks for each share of memory.
fn bars(points: &[Point]) -> String {
    let mut text =
        "\npredicted lost work, by what moves before the guest resumes\n  memory  disks   \n"
            .to_owned();
    let most = points
        .iter()
        .map(|point| point.lost_work)
        .fold(1e-3, f64::max);
    for share in SHARES {
        let of_share = points
            .iter()
            .filter(|point| (point.mem_frac - share).abs() < 1e-9);
        let Some(best) = of_share.min_by(|a, b| a.lost_work.total_cmp(&b.lost_work)) else {
            continue;
        };
        let bar = "█".repeat(((best.lost_work / most * BAR).round() as usize).max(1));
        let _ = writeln!(
            text,
            "  {:>5.0} %  {:>4.0} %  {:>8.3} s  {bar}",
            100.0 * best.mem_frac,
            100.0 * best.disk_frac,
            best.lost_work
        );
    }
    text
}

/// The same as a plot: a line for each share of the disks.
fn svg(points: &[Point]) -> String {
    const SIZE: (f64, f64) = (640.0, 400.0);
    const MARGIN: f64 = 56.0;
    let most = points
        .iter()
        .map(|point| point.lost_work)
        .fold(1e-3, f64::max);
    let x = |share: f64| MARGIN + share * (SIZE.0 - 2.0 * MARGIN);
    let y = |lost: f64| SIZE.1 - MARGIN - lost / most * (SIZE.1 - 2.0 * MARGIN);
    let mut text = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {} {}\" font-family=\"sans-serif\" font-size=\"13\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n\
         <text x=\"{MARGIN}\" y=\"24\">predicted lost work in seconds, over the share of memory that moves before \
         the resume; a line for \
         each share of the disks</text>\n",
        SIZE.0, SIZE.1
    );
    for tick in 0..=5 {
        let (share, lost) = (f64::from(tick) / 5.0, f64::from(tick) / 5.0 * most);
        let _ = writeln!(
            text,
            "<text x=\"{:.0}\" y=\"{:.0}\" text-anchor=\"middle\">{share:.1}</text>\
             <text x=\"{:.0}\" y=\"{:.0}\" text-anchor=\"end\">{lost:.2}</text>",
            x(share),
            SIZE.1 - MARGIN + 20.0,
            MARGIN - 6.0,
            y(lost) + 4.0
        );
    }
    let mut shares: Vec<f64> = points.iter().map(|point| point.disk_frac).collect();
    shares.sort_by(f64::total_cmp);
    shares.dedup();
    for share in shares {
        let of_share = points
            .iter()
            .filter(|point| point.disk_frac.total_cmp(&share).is_eq());
        let line: Vec<String> = of_share
            .map(|point| format!("{:.1},{:.1}", x(point.mem_frac), y(point.lost_work)))
            .collect();
        let shade = (200.0 - 170.0 * share) as u8;
        let _ = writeln!(
            text,
            "<polyline fill=\"none\" stroke=\"rgb({shade},{shade},200)\" stroke-width=\"2\" \
             points=\"{}\"><title>disks {:.0} \
             %</title></polyline>",
            line.join(" "),
            100.0 * share
        );
    }
    text.push_str("</svg>\n");
    text
}
