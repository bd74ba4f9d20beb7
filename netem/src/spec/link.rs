//! Both directions of a link, and what changes on the way.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::parse::{self, SpecError, Words};
use super::show::write_all;
use super::units::{self, show_time};
use super::{DirectionSpec, Distribution, Limit, Setting};
use crate::ladder;

/// Timed changes in one description.
pub const MAX_CHANGES: usize = 10_000;

/// A link: two directions, each with settings of its own, and timed changes.
///
/// The text form is the grammar of this module's head; serde uses it too.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct LinkSpec {
    /// From the near to the far end (relay: from the clients to the target).
    pub forward: DirectionSpec,
    /// From the far to the near end.
    pub back: DirectionSpec,
    /// What changes, in the order of time.
    pub changes: Vec<Change>,
}

/// Which directions a change concerns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Directions {
    /// Both.
    Both,
    /// Near to far.
    Forward,
    /// Far to near.
    Back,
}

impl Directions {
    fn includes(self, back: bool) -> bool {
        match self {
            Self::Both => true,
            Self::Forward => !back,
            Self::Back => back,
        }
    }

    fn parse(words: &mut Words<'_>) -> Self {
        if words.take("forward") {
            Self::Forward
        } else if words.take("back") {
            Self::Back
        } else {
            Self::Both
        }
    }
}

/// One timed change.
#[derive(Clone, Debug, PartialEq)]
pub struct Change {
    /// When, since the link was started (or its timeline was).
    pub at: Duration,
    /// Where.
    pub directions: Directions,
    /// What.
    pub what: What,
}

/// What a timed change does.
#[derive(Clone, Debug, PartialEq)]
pub enum What {
    /// Cuts the link; everything under way is lost.
    Down,
    /// Joins it again.
    Up,
    /// Replaces these settings; the others stay.
    Set(Vec<Setting>),
}

/// What holds for one direction from a moment on.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Stage {
    /// Since the start.
    pub from: Duration,
    /// The settings.
    pub spec: DirectionSpec,
    /// Whether it is cut.
    pub down: bool,
}

impl LinkSpec {
    /// The same in both directions, without changes.
    pub fn symmetric(direction: DirectionSpec) -> Self {
        Self {
            forward: direction,
            back: direction,
            changes: Vec::new(),
        }
    }

    /// Round-trip time without any queue, before the first change.
    pub fn rtt(&self) -> Duration {
        self.forward.delay + self.back.delay
    }

    /// What holds when, for one direction: the first from the start, times ascending. Changes
    /// at the same time are one stage.
    pub fn stages(&self, back: bool) -> Vec<Stage> {
        let mut last = Stage {
            from: Duration::ZERO,
            spec: if back { self.back } else { self.forward },
            down: false,
        };
        let mut stages = vec![last];
        for change in &self.changes {
            if !change.directions.includes(back) {
                continue;
            }
            match &change.what {
                What::Down => last.down = true,
                What::Up => last.down = false,
                What::Set(settings) => {
                    for one in settings {
                        last.spec.set(*one);
                    }
                }
            }
            if change.at > last.from {
                last.from = change.at;
                stages.push(last);
            } else {
                *stages.last_mut().expect("the first was put there above") = last;
            }
        }
        stages
    }

    fn direction(&mut self, back: bool) -> &mut DirectionSpec {
        if back {
            &mut self.back
        } else {
            &mut self.forward
        }
    }

    fn apply(&mut self, directions: Directions, settings: &[Setting]) {
        for back in [false, true] {
            if directions.includes(back) {
                let direction = self.direction(back);
                for one in settings {
                    direction.set(*one);
                }
            }
        }
    }

    /// Adds one section of a description.
    fn section(&mut self, text: &str) -> Result<(), SpecError> {
        let mut words = Words::new(text);
        let empty = || SpecError::Empty(text.trim().to_owned());
        if words.take("at") {
            let at = words.value("at", parse::TIME, units::time)?;
            let directions = Directions::parse(&mut words);
            let what = if words.take("down") {
                What::Down
            } else if words.take("up") {
                What::Up
            } else {
                What::Set(parse::settings(&mut words)?)
            };
            if let Some(word) = words.next() {
                return Err(SpecError::UnknownWord(word.to_owned()));
            }
            if what == What::Set(Vec::new()) {
                return Err(empty());
            }
            if self.changes.len() == MAX_CHANGES {
                return Err(SpecError::TooManyChanges);
            }
            let change = Change {
                at,
                directions,
                what,
            };
            // Those at the same time stay in the order in which they are written.
            let place = self.changes.partition_point(|other| other.at <= at);
            self.changes.insert(place, change);
            return Ok(());
        }
        let directions = Directions::parse(&mut words);
        let settings = parse::settings(&mut words)?;
        if settings.is_empty() && directions != Directions::Both {
            return Err(empty());
        }
        self.apply(directions, &settings);
        Ok(())
    }

    fn check(&self) -> Result<(), SpecError> {
        for back in [false, true] {
            for Stage { spec, .. } in self.stages(back) {
                if spec.jitter.is_zero() && spec.distribution != Distribution::Uniform {
                    return Err(SpecError::Contradiction(
                        "'distribution' says how jitter is spread: give one, as in 'delay 25ms 2ms'",
                    ));
                }
                if spec.rate.is_none() && matches!(spec.limit, Limit::Bytes(_)) {
                    return Err(SpecError::Contradiction(
                        "'limit' in bytes is the queue of a bottleneck: give its 'rate' as well",
                    ));
                }
            }
        }
        Ok(())
    }
}

impl FromStr for LinkSpec {
    type Err = SpecError;

    fn from_str(text: &str) -> Result<Self, SpecError> {
        let text = text.trim();
        let (first, rest) = match text.find(|c: char| c.is_whitespace() || c == ';') {
            Some(end) => text.split_at(end),
            None => (text, ""),
        };
        let (mut spec, rest) = match ladder::find(first) {
            Some(rung) => (rung.spec(), rest),
            None => (Self::default(), text),
        };
        for section in rest.split(';') {
            spec.section(section)?;
        }
        spec.check()?;
        Ok(spec)
    }
}

impl fmt::Display for LinkSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.forward == self.back {
            write!(f, "{}", self.forward)?;
        } else {
            write!(f, "forward {}; back {}", self.forward, self.back)?;
        }
        for change in &self.changes {
            write!(f, "; at {}", show_time(change.at))?;
            match change.directions {
                Directions::Both => {}
                Directions::Forward => f.write_str(" forward")?,
                Directions::Back => f.write_str(" back")?,
            }
            f.write_str(" ")?;
            match &change.what {
                What::Down => f.write_str("down")?,
                What::Up => f.write_str("up")?,
                What::Set(settings) => write_all(f, settings)?,
            }
        }
        Ok(())
    }
}

impl TryFrom<String> for LinkSpec {
    type Error = SpecError;

    fn try_from(text: String) -> Result<Self, SpecError> {
        text.parse()
    }
}

impl From<LinkSpec> for String {
    fn from(spec: LinkSpec) -> Self {
        spec.to_string()
    }
}

#[cfg(test)]
mod tests;
