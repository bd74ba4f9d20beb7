//! Results, sorted into cells and engines, and what is taken from them. It decides which runs count; how
//! figures look is decided elsewhere.

use serde_json::Value;

use crate::engine::REFERENCE;
use crate::record::{Outcome, Record};

/// All results.
pub struct Results<'a> {
    /// Cells by guest, rate, loss and round-trip time.
    pub cells: Vec<Cell<'a>>,
    /// Names of all engines: the reference first, the others as they were run.
    pub engines: Vec<&'a str>,
    /// Every record.
    pub records: &'a [Record],
}

/// A link and a guest.
pub struct Cell<'a> {
    /// Any of its runs: link and guest are those of all.
    pub any: &'a Record,
    /// Runs by engine, in the order of [`Results::engines`].
    pub rows: Vec<Row<'a>>,
}

/// What one engine did in one cell.
pub struct Row<'a> {
    /// The engine.
    pub engine: &'a str,
    /// Runs that count: the valid ones, or all where none is.
    pub runs: Vec<&'a Record>,
    /// Runs that the emulator spoilt.
    pub invalid: usize,
}

impl<'a> Results<'a> {
    /// Sorts them.
    pub fn new(records: &'a [Record]) -> Self {
        let mut engines: Vec<&str> = Vec::new();
        let mut guests: Vec<&str> = Vec::new();
        let mut keys: Vec<&Record> = Vec::new();
        for record in records {
            if !engines.contains(&record.engine.as_str()) {
                engines.push(&record.engine);
            }
            if !guests.contains(&record.guest.name.as_str()) {
                guests.push(&record.guest.name);
            }
            if !keys.iter().any(|key| same_cell(key, record)) {
                keys.push(record);
            }
        }
        engines.sort_by_key(|engine| *engine != REFERENCE);
        keys.sort_by(|a, b| {
            let guest = |record: &Record| guests.iter().position(|name| *name == record.guest.name);
            let (x, y) = (&a.link_facts, &b.link_facts);
            guest(a)
                .cmp(&guest(b))
                .then(x.rate.cmp(&y.rate))
                .then(x.rtt_ms.total_cmp(&y.rtt_ms))
                .then(x.loss_percent.total_cmp(&y.loss_percent))
                .then(a.link.cmp(&b.link))
        });
        let cells = keys
            .into_iter()
            .map(|any| {
                let rows = engines.iter().filter_map(|engine| {
                    let of_cell = records.iter().filter(|record| same_cell(record, any));
                    Row::new(
                        engine,
                        of_cell.filter(|record| record.engine == *engine).collect(),
                    )
                });
                Cell {
                    any,
                    rows: rows.collect(),
                }
            })
            .collect();
        Self {
            cells,
            engines,
            records,
        }
    }

    /// Names of the guests, in the order of the cells.
    pub fn guests(&self) -> Vec<&'a str> {
        let mut guests: Vec<&str> = Vec::new();
        for cell in &self.cells {
            if !guests.contains(&cell.any.guest.name.as_str()) {
                guests.push(&cell.any.guest.name);
            }
        }
        guests
    }
}

fn same_cell(a: &Record, b: &Record) -> bool {
    a.link == b.link && a.guest == b.guest && a.scenario == b.scenario
}

impl<'a> Cell<'a> {
    /// The row of the engine that others are compared with.
    pub fn reference(&self) -> Option<&Row<'a>> {
        self.rows.iter().find(|row| row.engine == REFERENCE)
    }

    /// What it is called.
    pub fn title(&self) -> String {
        format!("{}: {}", self.any.link_facts, self.any.guest.name)
    }

    /// The same, for the name of a file.
    pub fn slug(&self) -> String {
        slug(&self.title())
    }
}

/// Letters, digits and dashes only.
pub fn slug(text: &str) -> String {
    let text = text.replace('%', "percent");
    let words = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '.');
    let words = words.filter(|word| !word.is_empty());
    words.collect::<Vec<_>>().join("-").to_lowercase()
}

impl<'a> Row<'a> {
    fn new(engine: &'a str, all: Vec<&'a Record>) -> Option<Self> {
        if all.is_empty() {
            return None;
        }
        let valid: Vec<_> = all.iter().copied().filter(|record| record.valid).collect();
        let invalid = all.len() - valid.len();
        Some(Self {
            engine,
            runs: if valid.is_empty() { all } else { valid },
            invalid,
        })
    }

    /// Whether none of the runs was valid.
    pub fn is_spoilt(&self) -> bool {
        self.runs.iter().all(|record| !record.valid)
    }

    /// Runs that moved the guest.
    pub fn moved(&self) -> impl Iterator<Item = &'a Record> {
        let moved = |record: &&Record| record.outcome == Outcome::Moved;
        self.runs.iter().copied().filter(moved)
    }

    /// A figure over the runs that moved the guest.
    pub fn figure(&self, metric: Metric) -> Option<Figure> {
        Figure::of(
            self.moved()
                .filter_map(|record| metric.of(record))
                .collect(),
        )
    }

    /// The same over the others: what was seen until they were given up.
    pub fn seen(&self, metric: Metric) -> Option<Figure> {
        let stayed = self
            .runs
            .iter()
            .filter(|record| record.outcome != Outcome::Moved);
        Figure::of(stayed.filter_map(|record| metric.of(record)).collect())
    }

    /// The run to show a course of: the median one by lost work, of those that moved the guest if
    /// there are any.
    pub fn typical(&self) -> Option<&'a Record> {
        let mut runs: Vec<_> = self.moved().collect();
        if runs.is_empty() {
            runs.clone_from(&self.runs);
        }
        runs.retain(|record| record.measured.is_some());
        let lost = |record: &Record| record.measured.as_ref().map_or(0.0, |m| m.lost_work);
        runs.sort_by(|a, b| lost(a).total_cmp(&lost(b)));
        runs.get((runs.len().max(1) - 1) / 2).copied()
    }
}

/// What is compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Metric {
    /// Longest gap between ticks, in s.
    Downtime,
    /// Lost work from the start of the migration, in s.
    LostWork,
    /// Lost work from the freeze, in s.
    LostWorkFromFreeze,
    /// First tick at the destination, in s.
    DestinationUp,
    /// End of the migration, in s.
    Total,
    /// Speed back to 95 %, from the freeze, in s.
    T95FromFreeze,
    /// Speed back to 95 %, from the start, in s.
    T95FromStart,
    /// Megabytes in both directions, as the emulator counts them.
    Wire,
    /// Downtime by the engine's own word, in s.
    ClaimedDowntime,
}

impl Metric {
    /// Its value in a run.
    pub fn of(self, record: &Record) -> Option<f64> {
        let measured = record.measured.as_ref();
        let traffic = record.traffic.as_ref();
        match self {
            Self::Downtime => measured.map(|m| m.downtime),
            Self::LostWork => measured.map(|m| m.lost_work),
            Self::LostWorkFromFreeze => measured?.lost_work_from_freeze,
            Self::DestinationUp => measured?.destination_up,
            Self::Total => measured?.total,
            Self::T95FromFreeze => measured?.t95_from_freeze,
            Self::T95FromStart => measured?.t95_from_start,
            Self::Wire => traffic.map(|traffic| traffic.bytes() as f64 / 1e6),
            Self::ClaimedDowntime => claimed_downtime(&record.claimed),
        }
    }
}

fn claimed_downtime(claimed: &Value) -> Option<f64> {
    let hybridmig = claimed["send"]["downtime"]["total"].as_f64();
    hybridmig.or_else(|| claimed["downtime"].as_f64().map(|ms| ms / 1e3))
}

/// Bytes of pre-copy, freeze-copy and post-copy, in MB, by the engine's own word.
pub fn claimed_phases(claimed: &Value) -> Option<[f64; 3]> {
    if let Some(traffic) = claimed["send"]["traffic"].as_array() {
        let phase = |name: &str| -> f64 {
            let of_phase = traffic.iter().filter(|phase| phase["phase"] == name);
            let codecs = of_phase
                .filter_map(|phase| phase["codecs"].as_array())
                .flatten();
            codecs
                .filter_map(|codec| codec["wire_bytes"].as_f64())
                .sum::<f64>()
                / 1e6
        };
        return Some(["pre-copy", "freeze-copy", "post-copy"].map(phase));
    }
    let ram = claimed["ram"].as_object()?;
    let megabytes = |name: &str| {
        ram.get(name)
            .and_then(Value::as_f64)
            .map(|bytes| bytes / 1e6)
    };
    let (freeze, post) = (megabytes("downtime-bytes")?, megabytes("postcopy-bytes")?);
    Some([
        (megabytes("transferred")? - freeze - post).max(0.0),
        freeze,
        post,
    ])
}

/// Median and spread.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Figure {
    /// Median; of an even number, the mean of the two in the middle.
    pub median: f64,
    /// Least.
    pub min: f64,
    /// Most.
    pub max: f64,
    /// How many.
    pub n: usize,
}

impl Figure {
    /// `None` of nothing.
    pub fn of(mut values: Vec<f64>) -> Option<Self> {
        values.sort_by(f64::total_cmp);
        let n = values.len();
        let (min, max) = (*values.first()?, *values.last()?);
        let median = f64::midpoint(values[(n - 1) / 2], values[n / 2]);
        Some(Self {
            median,
            min,
            max,
            n,
        })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn medians() {
        assert_eq!(Figure::of(vec![]), None);
        let figure = Figure::of(vec![3.0, 1.0, 2.0, 9.0]).unwrap();
        assert!((figure.median - 2.5).abs() < 1e-9);
        assert!((figure.min - 1.0).abs() < 1e-9 && (figure.max - 9.0).abs() < 1e-9);
    }

    #[test]
    fn slugs_are_plain() {
        assert_eq!(
            slug("50 ms, 0.1 %, 200 Mbit/s: twice the link"),
            "50-ms-0.1-percent-200-mbit-s-twice-the-link"
        );
    }

    #[test]
    fn phases_by_the_engines_own_words() {
        let qemu = json!({ "ram": { "transferred": 90e6, "downtime-bytes": 1e6, "postcopy-bytes": 20e6 } });
        assert_eq!(claimed_phases(&qemu), Some([69.0, 1.0, 20.0]));
        let codec = |bytes: u64| json!([{ "codec": "raw", "wire_bytes": bytes }]);
        let ours = json!({ "send": { "traffic": [
            { "phase": "pre-copy", "codecs": codec(5_000_000) },
            { "phase": "post-copy", "codecs": codec(7_000_000) },
        ] } });
        assert_eq!(claimed_phases(&ours), Some([5.0, 0.0, 7.0]));
        assert_eq!(claimed_phases(&Value::Null), None);
        assert_eq!(claimed_downtime(&json!({ "downtime": 250 })), Some(0.25));
    }
}
