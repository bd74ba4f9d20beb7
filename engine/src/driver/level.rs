//! How hard the bulk lane compresses: harder while encoded batches wait for the link, faster while
//! the link waits for the encoders or the cores are wanted by others. A pure rule over measured
//! times; it knows no clock and no compressor.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Levels of zstd that are worth their time on blocks of 4 KiB, from the fastest. Each takes about
/// one and a half times as long as the one before it.
const LADDER: [i32; 9] = [-7, -3, -1, 1, 2, 3, 4, 6, 9];

/// Where it begins, before anything is known: fast enough for any link but the fastest.
const START: i32 = 1;

/// Encoding threads' time over which it is judged, and the batches that this needs at least.
const WINDOW: Duration = Duration::from_millis(200);
const BATCHES: u32 = 8;

/// Above this share of time spent waiting for the link the next level fits even where it takes
/// twice as long.
const IDLE_ENOUGH: f64 = 0.6;

/// Below this share the link is likely to wait for the encoders.
const TOO_BUSY: f64 = 0.15;

/// Encoding takes this many times its time on a core where others want the cores too.
const CROWDED: f64 = 1.5;

/// Windows for which a level that proved too slow is not tried again.
const HOLD: u32 = 25;

/// The operator's choice.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Level {
    /// Follows spare CPU and link.
    #[default]
    Auto,
    /// This one, always.
    Fixed(i32),
}

impl Level {
    /// The level to begin with, and of what must not take time.
    pub fn first(self) -> i32 {
        match self {
            Self::Auto => START,
            Self::Fixed(level) => level,
        }
    }
}

impl FromStr for Level {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "auto" {
            return Ok(Self::Auto);
        }
        text.parse()
            .ok()
            .filter(|level| (-7..=19).contains(level))
            .map(Self::Fixed)
            .ok_or_else(|| format!("'{text}' is neither 'auto' nor a number from -7 to 19"))
    }
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Fixed(level) => level.fmt(f),
        }
    }
}

/// What one batch took.
#[derive(Clone, Copy, Debug, Default)]
pub struct Effort {
    /// Encoding it, by the clock on the wall.
    pub encoding: Duration,
    /// Of that, on a core.
    pub on_core: Duration,
    /// Waiting for the link: to take the batch, or to have room for another.
    pub waiting: Duration,
}

/// What level was used, for the report.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LevelsUsed {
    /// Whether it followed CPU and link.
    pub auto: bool,
    /// Lowest.
    pub lowest: i32,
    /// Highest.
    pub highest: i32,
    /// At the end.
    pub last: i32,
    /// Threads that encoded the bulk lane.
    pub threads: usize,
}

/// The rule.
#[derive(Clone, Debug)]
pub struct LevelControl {
    auto: bool,
    step: usize,
    /// A step that was too slow, and windows for which it is not tried again.
    barred: Option<(usize, u32)>,
    sum: Effort,
    batches: u32,
    used: LevelsUsed,
}

impl LevelControl {
    /// For that many threads.
    pub fn new(level: Level, threads: usize) -> Self {
        let first = level.first();
        Self {
            auto: level == Level::Auto,
            step: LADDER.iter().position(|step| *step == START).unwrap_or(0),
            barred: None,
            sum: Effort::default(),
            batches: 0,
            used: LevelsUsed {
                auto: level == Level::Auto,
                lowest: first,
                highest: first,
                last: first,
                threads,
            },
        }
    }

    /// Takes in what a batch took; returns the level for those to come.
    pub fn note(&mut self, effort: Effort) -> i32 {
        if !self.auto {
            return self.used.last;
        }
        self.sum.encoding += effort.encoding;
        self.sum.on_core += effort.on_core;
        self.sum.waiting += effort.waiting;
        self.batches += 1;
        if self.batches >= BATCHES && self.sum.encoding + self.sum.waiting >= WINDOW {
            self.judge();
        }
        self.used.last
    }

    /// What was used so far.
    pub fn used(&self) -> LevelsUsed {
        self.used
    }

    fn judge(&mut self) {
        let Effort {
            encoding,
            on_core,
            waiting,
        } = std::mem::take(&mut self.sum);
        self.batches = 0;
        self.barred = self
            .barred
            .and_then(|(step, left)| Some((step, left.checked_sub(1)?)));
        let idle = waiting.as_secs_f64() / (encoding + waiting).as_secs_f64().max(1e-9);
        let crowded = encoding.as_secs_f64() > CROWDED * on_core.as_secs_f64();
        if idle < TOO_BUSY {
            self.fall();
        } else if crowded {
            // The link is not the loser, so that there is no hurry below the level of the start.
            if LADDER[self.step] > START {
                self.fall();
            }
        } else if idle > IDLE_ENOUGH {
            let next = self.step + 1;
            let barred = self.barred.is_some_and(|(step, _)| next >= step);
            if next < LADDER.len() && !barred {
                self.set(next);
            }
        }
    }

    fn fall(&mut self) {
        self.barred = Some((self.step, HOLD));
        self.set(self.step.saturating_sub(1));
    }

    fn set(&mut self, step: usize) {
        self.step = step;
        let level = LADDER[step];
        self.used.last = level;
        self.used.lowest = self.used.lowest.min(level);
        self.used.highest = self.used.highest.max(level);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A thread and a link: batches take `cost` at the fastest level and half as much again with
    /// each step; the link takes one every `period`.
    fn settle(
        control: &mut LevelControl,
        cost: Duration,
        period: Duration,
        crowd: f64,
    ) -> Vec<i32> {
        let mut levels = Vec::new();
        let mut level = control.used().last;
        for _ in 0..5000 {
            let step = LADDER.iter().position(|step| *step == level).unwrap();
            let on_core = cost.mul_f64(1.5_f64.powi(step as i32));
            let encoding = on_core.mul_f64(crowd);
            level = control.note(Effort {
                encoding,
                on_core,
                waiting: period.saturating_sub(encoding),
            });
            levels.push(level);
        }
        levels
    }

    fn auto() -> LevelControl {
        LevelControl::new(Level::Auto, 1)
    }

    const COST: Duration = Duration::from_micros(200);

    #[test]
    fn a_slow_link_is_compressed_for_as_hard_as_the_ladder_goes() {
        let mut control = auto();
        let levels = settle(&mut control, COST, 100 * COST, 1.0);
        assert_eq!(levels.last(), Some(&9));
        assert_eq!(control.used().lowest, START);
        assert_eq!(control.used().highest, 9);
    }

    #[test]
    fn a_link_faster_than_the_core_gets_the_fastest_level() {
        let mut control = auto();
        let levels = settle(&mut control, COST, COST / 2, 1.0);
        assert_eq!(levels.last(), Some(&-7));
        assert_eq!(control.used().highest, START);
    }

    #[test]
    fn in_between_it_stays_where_the_link_never_waits() {
        // At level 2 (five steps up the ladder from the fastest) encoding takes just half the time.
        let period = COST.mul_f64(1.5_f64.powi(4) * 2.0);
        let mut control = auto();
        let levels = settle(&mut control, COST, period, 1.0);
        let late = &levels[1000..];
        let changes = late.windows(2).filter(|pair| pair[0] != pair[1]).count();
        assert!(changes <= 4, "{changes} changes");
        for level in late {
            let step = LADDER.iter().position(|step| step == level).unwrap();
            let encoding = COST.mul_f64(1.5_f64.powi(step as i32));
            assert!(encoding <= period, "level {level} keeps the link waiting");
        }
    }

    #[test]
    fn cores_that_others_want_are_left_to_them() {
        let mut control = auto();
        assert_eq!(settle(&mut control, COST, 100 * COST, 1.0).last(), Some(&9));
        let levels = settle(&mut control, COST, 100 * COST, 3.0);
        // A slow link gains nothing from less than the level of the start.
        assert_eq!(levels.last(), Some(&START));
    }

    #[test]
    fn a_rate_that_drops_and_rises_is_followed() {
        let mut control = auto();
        assert_eq!(settle(&mut control, COST, COST, 1.0).last(), Some(&-7));
        assert_eq!(settle(&mut control, COST, 100 * COST, 1.0).last(), Some(&9));
        assert_eq!(settle(&mut control, COST, COST, 1.0).last(), Some(&-7));
    }

    #[test]
    fn a_number_is_kept() {
        let mut control = LevelControl::new(Level::Fixed(5), 2);
        for _ in 0..1000 {
            let effort = Effort {
                waiting: Duration::from_millis(10),
                ..Effort::default()
            };
            assert_eq!(control.note(effort), 5);
        }
        let used = control.used();
        assert_eq!((used.lowest, used.highest, used.auto), (5, 5, false));
    }

    #[test]
    fn choices_are_read() {
        assert_eq!("auto".parse(), Ok(Level::Auto));
        assert_eq!("-7".parse(), Ok(Level::Fixed(-7)));
        assert_eq!("19".parse(), Ok(Level::Fixed(19)));
        for wrong in ["20", "-8", "fast", ""] {
            assert!(wrong.parse::<Level>().is_err(), "{wrong}");
        }
        assert_eq!(Level::Auto.to_string(), "auto");
    }
}
