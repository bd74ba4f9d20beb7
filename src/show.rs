//! Results for people: the outcome in a sentence, the figures in a table.

use std::fmt::Write;
use std::time::Duration;

use hybridmig_engine::driver::level::LevelsUsed;
use hybridmig_engine::report::{CodecTraffic, Kind, PhaseTraffic, Report};
use hybridmig_engine::session::io::{DestinationOutcome, SourceOutcome};

use crate::units::{show_bytes, show_rate, show_time};

/// The source's result.
pub fn source(outcome: &SourceOutcome, report: &Report) -> String {
    let mut text = match outcome {
        SourceOutcome::Moved => {
            "moved: the guest runs at the destination, every block is there\n".to_owned()
        }
        SourceOutcome::Checked { notes } => {
            let mut text = "checked: this guest can be moved there\n".to_owned();
            for note in notes {
                let _ = writeln!(text, "  {note}");
            }
            return text;
        }
        SourceOutcome::Refused(refusal) => {
            let mut text = "refused: the guest runs here, nothing was moved\n".to_owned();
            for reason in &refusal.reasons {
                let _ = writeln!(text, "  {reason}");
            }
            text
        }
        SourceOutcome::Cancelled { reason } => {
            format!("cancelled: the guest runs here ({reason})\n")
        }
        SourceOutcome::NotConverged { reason } => format!(
            "not converged: the guest runs here ({reason}); allow a longer --max-downtime, or use \
             --mode hybrid\n"
        ),
        SourceOutcome::InDoubt { reason } => format!(
            "IN DOUBT: the guest is frozen here and may run at the destination ({reason})\n  \
             ask both hosts: hybridmig resolve {}\n",
            report.session
        ),
        SourceOutcome::Incomplete { reason } => format!(
            "INCOMPLETE: the guest is the destination's, some of its blocks are only here \
             ({reason})\n  keep the frozen guest; see: hybridmig resolve {}\n",
            report.session
        ),
        SourceOutcome::Failed { reason } => {
            format!("FAILED: the guest is here and needs a person ({reason})\n")
        }
    };
    text.push_str(&figures(report));
    text
}

/// The destination's result.
pub fn destination(outcome: &DestinationOutcome, report: &Report) -> String {
    let mut text = match outcome {
        DestinationOutcome::Moved => "moved: the guest runs here, every block is here\n".to_owned(),
        DestinationOutcome::Checked => "checked\n".to_owned(),
        DestinationOutcome::Refused(refusal) => {
            let mut text = "refused: the guest stays at the source\n".to_owned();
            for reason in &refusal.reasons {
                let _ = writeln!(text, "  {reason}");
            }
            text
        }
        DestinationOutcome::Cancelled { reason } => {
            format!("cancelled: the guest stays at the source ({reason})\n")
        }
        DestinationOutcome::Incomplete { reason } => format!(
            "INCOMPLETE: the guest is ours, some of its blocks are only at the source ({reason})\n"
        ),
        DestinationOutcome::Failed { reason } => format!(
            "IN DOUBT: the guest was accepted and could not be started ({reason}); it is frozen at \
             the source\n  ask both hosts: hybridmig resolve {}\n",
            report.session
        ),
    };
    text.push_str(&figures(report));
    text
}

fn compression(levels: &LevelsUsed) -> String {
    let threads = match levels.threads {
        1 => "1 thread".to_owned(),
        more => format!("{more} threads"),
    };
    let LevelsUsed {
        auto,
        lowest,
        highest,
        last,
        ..
    } = *levels;
    let level = match (auto, lowest == highest) {
        (false, _) => format!("level {last}"),
        (true, true) => format!("auto, level {last}"),
        (true, false) => format!("auto, level {lowest} to {highest}, {last} at the end"),
    };
    format!("{level}; {threads}")
}

/// The figures of a report as a table.
pub fn figures(report: &Report) -> String {
    let mut table = Table::default();
    let times = &report.times;
    table.row("session", report.session.clone());
    if let Some(mode) = report.mode {
        table.row("mode", mode.to_string());
    }
    table.row("total time", seconds(times.total));
    if let Some(remote_up) = times.remote_up {
        table.row("remote up time", seconds(remote_up));
    }
    if let Some(down) = &report.downtime {
        table.row("downtime", seconds(down.total));
        let parts = [
            ("stop", down.stop),
            ("scan", down.scan),
            ("save", down.save_state),
            ("transit", down.transit),
            ("discard", down.discard),
            ("load", down.load),
            ("journal", down.journal),
            ("resume", down.resume),
        ];
        let parts: Vec<String> = parts
            .iter()
            .map(|(name, part)| format!("{name} {}", seconds(*part)))
            .collect();
        table.row("  of which", parts[..4].join(", "));
        table.row("", parts[4..].join(", "));
    }
    if let Some(agility) = &report.agility {
        let pra = agility
            .pra
            .map_or("–".to_owned(), |pra| format!("{pra:.2} /s"));
        table.row(
            "lost work L",
            format!("{} (PRA {pra})", seconds(agility.lost_work)),
        );
        let t95 = agility.t95.map_or(
            "not seen before the last block was in place".to_owned(),
            seconds,
        );
        table.row("speed ≥ 95 % after", t95);
    }
    if !report.rounds.is_empty() {
        table.row("pre-copy rounds", report.rounds.len().to_string());
    }
    for phase in &report.traffic {
        traffic(&mut table, phase);
    }
    if let Some(kinds) = report
        .kinds
        .filter(|kinds| kinds.storage != Kind::default())
    {
        table.row("memory", kind(&kinds.memory));
        table.row("storage", kind(&kinds.storage));
    }
    if let Some(text) = from_seeds(report) {
        table.row("from seeds", text);
    }
    if let Some(faults) = &report.faults {
        let mut text = format!(
            "{} over the network, {} answered at the destination",
            faults.network, faults.local
        );
        if faults.network > 0 {
            text.push_str(&format!(
                "; latency p50 {:.1} ms, p99 {:.1} ms",
                faults.p50_ms, faults.p99_ms
            ));
        }
        table.row("demand faults", text);
        table.row("threads waited", seconds(faults.blocked));
    }
    for io in &report.disk_io {
        let name = report.regions.get(usize::from(io.region));
        table.row(
            &format!("disk {}", name.map_or("", |region| &region.name)),
            format!(
                "{} reads (p50 {:.1} ms, p99 {:.1} ms), {} writes (p50 {:.1} ms, p99 {:.1} ms) while it \
                 arrived; {} waited for the source",
                io.reads,
                io.read_p50_ms,
                io.read_p99_ms,
                io.writes,
                io.write_p50_ms,
                io.write_p99_ms,
                io.waited
            ),
        );
    }
    if let Some(levels) = &report.compression {
        table.row("compression", compression(levels));
    }
    if let Some(link) = &report.link {
        table.row(
            "link",
            format!(
                "min RTT {:.1} ms, {}, {:.2} % lost; {} sent, {} received",
                link.min_rtt_ms,
                show_rate(link.bandwidth),
                link.loss * 100.0,
                show_bytes(link.sent_bytes),
                show_bytes(link.received_bytes)
            ),
        );
        if link.reconnects > 0 {
            table.row("link lost and back", format!("{} times", link.reconnects));
        }
    }
    if let Some(verified) = &report.verified {
        let text = match &verified.error {
            None => format!("every byte of {} blocks is right", verified.blocks),
            Some(error) => format!("WRONG: {error}"),
        };
        table.row("guest's own check", text);
    }
    for note in &report.notes {
        table.row("note", note.clone());
    }
    let mut text = table.text();
    text.push_str(&crate::foretold::beside_outcome(report));
    text
}

/// What was not sent because the destination had it in files.
fn from_seeds(report: &Report) -> Option<String> {
    let blocks = |blocks, bytes| format!("{blocks} blocks ({})", show_bytes(bytes));
    if let Some(used) = &report.seeds {
        let mut text = blocks(used.blocks, used.bytes);
        if used.missed > 0 {
            let _ = write!(text, "; {} more were no longer there", used.missed);
        }
        for file in &used.changed {
            let _ = write!(text, "; {file} was written to meanwhile");
        }
        return Some(text);
    }
    let codecs = report.traffic.iter().flat_map(|phase| &phase.codecs);
    let seeded: Vec<_> = codecs.filter(|codec| codec.codec == "seeded").collect();
    let sum = |field: fn(&CodecTraffic) -> u64| seeded.iter().map(|codec| field(codec)).sum();
    let count: u64 = sum(|codec| codec.blocks);
    (count > 0).then(|| {
        format!(
            "{}, named in {}",
            blocks(count, sum(|codec| codec.plain_bytes)),
            show_bytes(sum(|codec| codec.wire_bytes))
        )
    })
}

fn traffic(table: &mut Table, phase: &PhaseTraffic) {
    let wire: u64 = phase.codecs.iter().map(|codec| codec.wire_bytes).sum();
    if phase.codecs.iter().all(|codec| codec.blocks == 0) {
        return;
    }
    let parts: Vec<String> = phase
        .codecs
        .iter()
        .filter(|codec| codec.blocks > 0)
        .map(|codec| format!("{} {}", codec.blocks, codec.codec))
        .collect();
    table.row(
        &phase.phase,
        format!("{} ({})", show_bytes(wire), parts.join(", ")),
    );
}

fn kind(kind: &Kind) -> String {
    format!(
        "{} ({} before, {} in, {} after the freeze); {} of {} blocks stayed behind, {} asked for",
        show_bytes(kind.bytes()),
        show_bytes(kind.pre_copy_bytes),
        show_bytes(kind.freeze_copy_bytes),
        show_bytes(kind.post_copy_bytes),
        kind.behind_blocks,
        kind.content_blocks,
        kind.faults
    )
}

fn seconds(value: f64) -> String {
    show_time(Duration::try_from_secs_f64(value).unwrap_or_default())
}

/// Two columns.
#[derive(Default)]
struct Table {
    rows: Vec<(String, String)>,
}

impl Table {
    fn row(&mut self, name: &str, value: impl Into<String>) {
        self.rows.push((name.to_owned(), value.into()));
    }

    fn text(&self) -> String {
        let width = self
            .rows
            .iter()
            .map(|(name, _)| name.chars().count())
            .max()
            .unwrap_or(0);
        let mut text = String::new();
        for (name, value) in &self.rows {
            let pad = width - name.chars().count();
            let _ = writeln!(text, "  {name}{}  {value}", " ".repeat(pad));
        }
        text
    }
}
