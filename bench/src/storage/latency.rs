//! From what the guest's disk checker says (`DISKIO`, `tests/guest/load.rs`) to percentiles by phase.

use hybridmig_tests::guest::latency::{CLASSES, STEPS};
use serde::{Deserialize, Serialize};

use crate::link::Side;

/// Latencies of one kind of operation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Latency {
    /// Operations.
    pub count: u64,
    /// Median in ms; this and the others are exact to 6 %.
    pub p50_ms: f64,
    /// 99 of 100 took no longer.
    pub p99_ms: f64,
    /// The longest.
    pub max_ms: f64,
}

/// Part of a migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// Before the migration.
    Before,
    /// From its start until the guest stops at the source.
    PreCopy,
    /// From the guest's first sign at the destination until the engine says it has ended.
    PostCopy,
    /// From then on.
    After,
}

impl Phase {
    /// All, in their order.
    pub const ALL: [Self; 4] = [Self::Before, Self::PreCopy, Self::PostCopy, Self::After];

    /// What tables call it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Before => "before",
            Self::PreCopy => "pre-copy",
            Self::PostCopy => "post-copy",
            Self::After => "after the end",
        }
    }
}

/// What the guest's I/O took in a phase.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct PhaseLatency {
    /// The phase.
    pub phase: Phase,
    /// How long it lasted (or was watched), in s.
    pub seconds: f64,
    /// Reads of 4 KiB.
    pub reads: Latency,
    /// Writes of 4 KiB.
    pub writes: Latency,
}

/// Moments of a migration, in seconds since its start.
#[derive(Clone, Copy, Debug)]
pub struct Moments {
    /// From when on the guest was watched; negative.
    pub from: f64,
    /// Its last sign at the source.
    pub freeze: Option<f64>,
    /// Its first at the destination.
    pub up: Option<f64>,
    /// When the engine had ended, or was given up.
    pub end: f64,
    /// Until when the guest was watched.
    pub until: f64,
}

impl Moments {
    fn seconds(&self, phase: Phase) -> f64 {
        let ended = self.end.max(self.up.unwrap_or(self.end));
        let (from, until) = match phase {
            Phase::Before => (self.from, 0.0),
            Phase::PreCopy => (0.0, self.freeze.unwrap_or(self.end)),
            Phase::PostCopy => (self.up.unwrap_or(ended), ended),
            Phase::After => (ended, self.until),
        };
        (until - from).max(0.0)
    }
}

/// How often each class was seen.
#[derive(Clone, Debug)]
struct Counts([u64; CLASSES]);

impl Counts {
    fn new() -> Self {
        Self([0; CLASSES])
    }

    fn add(&mut self, seen: &[(usize, u64)]) {
        for (class, count) in seen {
            self.0[*class] += count;
        }
    }

    fn summary(&self) -> Latency {
        let count = self.0.iter().sum();
        // The class that the nth operation in order of latency is in.
        let nth = |n: u64| {
            let mut seen = 0;
            let class = self.0.iter().position(|more| {
                seen += more;
                seen >= n
            });
            class.map_or(0.0, middle_ms)
        };
        if count == 0 {
            return Latency::default();
        }
        Latency {
            count,
            p50_ms: nth(count.div_ceil(2)),
            p99_ms: nth((count * 99).div_ceil(100)),
            max_ms: nth(count),
        }
    }
}

/// The middle of a class, in ms.
fn middle_ms(class: usize) -> f64 {
    let lower = |class: usize| -> f64 {
        match class.checked_sub(STEPS) {
            None => class as f64,
            Some(above) => ((STEPS + above % STEPS) as f64) * 2f64.powi((above / STEPS) as i32),
        }
    };
    if class < STEPS {
        return lower(class) / 1e3;
    }
    f64::midpoint(lower(class), lower(class + 1)) / 1e3
}

/// What one line of the checker says.
#[derive(Clone, Debug)]
pub struct Ticks {
    at: f64,
    side: Side,
    /// Classes, and how often each was seen.
    reads: Vec<(usize, u64)>,
    writes: Vec<(usize, u64)>,
}

impl Ticks {
    /// Reads a line that came `at` seconds after the start. `None` if it is another one, or torn.
    pub fn parse(line: &str, at: f64, side: Side) -> Option<Self> {
        let mut words = line.strip_prefix("DISKIO ")?.split(' ');
        let _name = words.next()?;
        words.next()?.parse::<u64>().ok()?;
        (words.next()? == "r").then_some(())?;
        let (mut reads, mut writes) = (Vec::new(), Vec::new());
        let mut writing = false;
        for word in words {
            if word == "w" && !writing {
                writing = true;
                continue;
            }
            let (class, count) = word.split_once(':')?;
            let class = class.parse().ok().filter(|class| *class < CLASSES)?;
            let seen = if writing { &mut writes } else { &mut reads };
            seen.push((class, count.parse().ok()?));
        }
        writing.then_some(Self {
            at,
            side,
            reads,
            writes,
        })
    }
}

/// Latencies by phase. A line counts for the phase in which it was said: the first at the destination tells of up to
/// 100 ms before the freeze, too.
pub fn phases(lines: &[Ticks], moments: &Moments) -> Vec<PhaseLatency> {
    let phase_of = |line: &Ticks| match line.side {
        Side::Source if line.at <= 0.0 => Phase::Before,
        // Given up, the guest stays.
        Side::Source if line.at > moments.end => Phase::After,
        Side::Source => Phase::PreCopy,
        Side::Destination if line.at <= moments.end => Phase::PostCopy,
        Side::Destination => Phase::After,
    };
    Phase::ALL
        .into_iter()
        .map(|phase| {
            let (mut reads, mut writes) = (Counts::new(), Counts::new());
            let of_phase = lines
                .iter()
                .filter(|line| line.at >= moments.from && phase_of(line) == phase);
            for line in of_phase {
                reads.add(&line.reads);
                writes.add(&line.writes);
            }
            PhaseLatency {
                phase,
                seconds: moments.seconds(phase),
                reads: reads.summary(),
                writes: writes.summary(),
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use hybridmig_tests::guest::latency::class;

    use super::*;

    fn tick(at: f64, side: Side, reads_us: &[u64], writes_us: &[u64]) -> Ticks {
        let words = |all: &[u64]| -> String {
            let words = all.iter().map(|us| format!("{}:1", class(*us)));
            words.fold(String::new(), |line, word| line + " " + &word)
        };
        let line = format!("DISKIO vda 17 r{} w{}", words(reads_us), words(writes_us));
        Ticks::parse(&line, at, side).unwrap()
    }

    #[test]
    fn the_middle_of_a_class_is_near_all_that_is_in_it() {
        for us in 1..2_000_000_u64 {
            let middle = middle_ms(class(us)) * 1e3;
            assert!(
                (middle - us as f64).abs() <= us as f64 / 16.0,
                "{us}: {middle}"
            );
        }
    }

    #[test]
    fn torn_lines_are_none() {
        for line in [
            "DISK vda 1 2 3 4 5",
            "DISKIO vda 17 r 5:1",
            "DISKIO vda 17 r 5: w",
            "DISKIO vda 17 r 5:1 w 100000:1",
            "DISKIO vda 17 r 5:1 w 6:1 TICK 20 30 0",
            "DISKIO vda r 5:1 w 6:1",
        ] {
            assert!(Ticks::parse(line, 0.0, Side::Source).is_none(), "{line}");
        }
        assert!(Ticks::parse("DISKIO vda 17 r w", 0.0, Side::Source).is_some());
    }

    #[test]
    fn percentiles_by_phase() {
        let fast: Vec<u64> = vec![1000; 98];
        let slow = [20_000, 300_000];
        let lines = [
            // Before the guest was watched.
            tick(-9.0, Side::Source, &slow, &[]),
            tick(-1.0, Side::Source, &fast, &[500]),
            tick(1.0, Side::Source, &fast, &[]),
            tick(3.0, Side::Destination, &fast, &[]),
            tick(4.0, Side::Destination, &slow, &[]),
            tick(6.0, Side::Destination, &[2000], &[70]),
        ];
        let moments = Moments {
            from: -2.0,
            freeze: Some(1.5),
            up: Some(2.5),
            end: 5.0,
            until: 8.0,
        };
        let phases = phases(&lines, &moments);
        let seconds: Vec<_> = phases.iter().map(|phase| phase.seconds).collect();
        assert_eq!(seconds, [2.0, 1.5, 2.5, 3.0]);
        let counts: Vec<_> = phases.iter().map(|phase| phase.reads.count).collect();
        assert_eq!(counts, [98, 98, 100, 1]);
        let post = phases[2].reads;
        assert!((post.p50_ms - 1.0).abs() < 0.07, "{post:?}");
        assert!((post.p99_ms - 20.0).abs() < 1.3, "{post:?}");
        assert!((post.max_ms - 300.0).abs() < 19.0, "{post:?}");
        assert_eq!(phases[2].writes, Latency::default());
        assert!((phases[0].writes.p50_ms - 0.5).abs() < 0.04);
    }

    #[test]
    fn a_guest_that_stays_has_a_time_after_the_end_as_well() {
        let lines = [
            tick(1.0, Side::Source, &[1000], &[]),
            tick(6.0, Side::Source, &[1000, 1000], &[]),
        ];
        let moments = Moments {
            from: -2.0,
            freeze: None,
            up: None,
            end: 5.0,
            until: 8.0,
        };
        let phases = phases(&lines, &moments);
        let counts: Vec<_> = phases.iter().map(|phase| phase.reads.count).collect();
        assert_eq!(counts, [0, 1, 0, 2]);
        assert!(phases[2].seconds.abs() < 1e-9 && (phases[3].seconds - 3.0).abs() < 1e-9);
    }
}
