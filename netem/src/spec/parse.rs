//! Reads the settings of a direction from words. What a word means for packets is not its business.

use std::iter::Peekable;
use std::str::SplitWhitespace;

use super::{Chance, Distribution, Limit, Loss, Reorder, Setting, Slot, units};

/// Why a text does not describe a link.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SpecError {
    /// A word that no link knows.
    #[error(
        "link: '{0}' is not known here; known are delay, distribution, rate, loss, corrupt, \
         duplicate, reorder, slot, limit, sections 'forward …', 'back …' and 'at TIME …' behind \
         a ';', and the names that `hybridmig netem list` shows, as the first word"
    )]
    UnknownWord(String),
    /// The text ends where a value should be.
    #[error("link: '{word}' needs a value, such as '{example}'")]
    MissingValue {
        /// The word without a value.
        word: &'static str,
        /// A value that would do.
        example: &'static str,
    },
    /// A value that cannot be read or is out of range.
    #[error("link: '{value}' is no value for '{word}': {expected}")]
    BadValue {
        /// The word whose value it is.
        word: &'static str,
        /// What stands there.
        value: String,
        /// What would be right.
        expected: &'static str,
    },
    /// A word that stands there twice.
    #[error("link: '{0}' is given twice")]
    Duplicate(&'static str),
    /// Settings that make no sense together.
    #[error("link: {0}")]
    Contradiction(&'static str),
    /// A section without anything in it.
    #[error("link: nothing stands behind '{0}'")]
    Empty(String),
    /// More timed changes than any schedule needs.
    #[error("link: more than {max} timed changes", max = super::MAX_CHANGES)]
    TooManyChanges,
}

/// The words of one section.
pub struct Words<'a>(Peekable<SplitWhitespace<'a>>);

impl<'a> Words<'a> {
    pub fn new(text: &'a str) -> Self {
        Self(text.split_whitespace().peekable())
    }

    /// Takes the next word if it is this one.
    pub fn take(&mut self, word: &str) -> bool {
        self.0.next_if_eq(&word).is_some()
    }

    pub fn next(&mut self) -> Option<&'a str> {
        self.0.next()
    }

    pub fn peek(&mut self) -> Option<&'a str> {
        self.0.peek().copied()
    }

    /// The value that `word` cannot do without.
    pub fn value<T>(
        &mut self,
        word: &'static str,
        (example, expected): (&'static str, &'static str),
        parse: impl Fn(&str) -> Option<T>,
    ) -> Result<T, SpecError> {
        let Some(value) = self.next() else {
            return Err(SpecError::MissingValue { word, example });
        };
        parse(value).ok_or_else(|| SpecError::BadValue {
            word,
            value: value.to_owned(),
            expected,
        })
    }

    /// A further value of `word`, if one stands there: values begin with a digit, words do not.
    fn further<T>(
        &mut self,
        word: &'static str,
        expectation: (&'static str, &'static str),
        parse: impl Fn(&str) -> Option<T>,
    ) -> Result<Option<T>, SpecError> {
        match self.peek() {
            Some(next) if !next.starts_with(|c: char| c.is_ascii_alphabetic()) => {
                self.value(word, expectation, parse).map(Some)
            }
            _ => Ok(None),
        }
    }
}

pub const TIME: (&str, &str) = (
    "25ms",
    "a time of at most 1000 s with its unit, such as 25ms, 1.5s, 300us",
);
const RATE: (&str, &str) = (
    "200mbit",
    "a rate from 1 bit to 1000 gbit per second, such as 200mbit, 1.5gbit, 64kbit, or 'unlimited'",
);
const PERCENT: (&str, &str) = ("0.5%", "a share from 0% to 100%, such as 0.5%");
const DISTRIBUTION: (&str, &str) = ("normal", "uniform, normal, pareto or paretonormal");
const GAP: (&str, &str) = ("5", "a number of packets from 1 to 1000000");
const LIMIT: (&str, &str) = (
    "50ms",
    "a number of packets (1000), a size (64kb) or the time that the queue holds (50ms)",
);

/// All settings of a section, none twice.
pub fn settings(words: &mut Words<'_>) -> Result<Vec<Setting>, SpecError> {
    let mut settings = Vec::new();
    let mut seen = Vec::new();
    while let Some(word) = words.next() {
        let (name, setting) = setting(word, words)?;
        if seen.contains(&name) {
            return Err(SpecError::Duplicate(name));
        }
        seen.push(name);
        settings.push(setting);
    }
    Ok(settings)
}

fn setting(word: &str, words: &mut Words<'_>) -> Result<(&'static str, Setting), SpecError> {
    Ok(match word {
        "delay" => {
            let delay = words.value("delay", TIME, units::time)?;
            let jitter = words.further("delay", TIME, units::time)?;
            let correlation = match jitter {
                Some(_) => words.further("delay", PERCENT, units::percent)?,
                None => None,
            };
            let setting = Setting::Delay(
                delay,
                jitter.unwrap_or_default(),
                correlation.unwrap_or_default(),
            );
            ("delay", setting)
        }
        "distribution" => {
            let parse = |name: &str| match name {
                "uniform" => Some(Distribution::Uniform),
                "normal" => Some(Distribution::Normal),
                "pareto" => Some(Distribution::Pareto),
                "paretonormal" => Some(Distribution::ParetoNormal),
                _ => None,
            };
            let distribution = words.value("distribution", DISTRIBUTION, parse)?;
            ("distribution", Setting::Distribution(distribution))
        }
        "rate" if words.take("unlimited") => ("rate", Setting::Rate(None)),
        "rate" => (
            "rate",
            Setting::Rate(Some(words.value("rate", RATE, units::rate)?)),
        ),
        "loss" => ("loss", Setting::Loss(loss(words)?)),
        "corrupt" => ("corrupt", Setting::Corrupt(chance("corrupt", words)?)),
        "duplicate" => ("duplicate", Setting::Duplicate(chance("duplicate", words)?)),
        "reorder" => {
            let chance = chance("reorder", words)?;
            let gap = |text: &str| {
                text.parse()
                    .ok()
                    .filter(|gap| (1..=1_000_000).contains(gap))
            };
            let gap = if words.take("gap") {
                words.value("gap", GAP, gap)?
            } else {
                1
            };
            ("reorder", Setting::Reorder(Reorder { chance, gap }))
        }
        "slot" => {
            let min = words.value("slot", TIME, |text| {
                units::time(text).filter(|time| !time.is_zero())
            })?;
            let max = words.further("slot", TIME, |text| {
                units::time(text).filter(|max| *max >= min)
            })?;
            let max = max.unwrap_or(min);
            ("slot", Setting::Slot(Slot { min, max }))
        }
        "limit" => ("limit", Setting::Limit(words.value("limit", LIMIT, limit)?)),
        other => return Err(SpecError::UnknownWord(other.to_owned())),
    })
}

fn chance(word: &'static str, words: &mut Words<'_>) -> Result<Chance, SpecError> {
    Ok(Chance {
        probability: words.value(word, PERCENT, units::percent)?,
        correlation: words
            .further(word, PERCENT, units::percent)?
            .unwrap_or_default(),
    })
}

fn loss(words: &mut Words<'_>) -> Result<Loss, SpecError> {
    // What is left out has tc's default (iproute2, tc/q_netem.c).
    if words.take("state") {
        let p13 = words.value("loss", PERCENT, units::percent)?;
        let mut further = || words.further("loss", PERCENT, units::percent);
        let p31 = further()?.unwrap_or_else(|| complement(p13));
        let p32 = further()?.unwrap_or(0.0);
        let p23 = further()?.unwrap_or(1.0);
        let p14 = further()?.unwrap_or(0.0);
        if p13 + p14 > 1.0 || p31 + p32 > 1.0 {
            return Err(SpecError::Contradiction(
                "of 'loss state', P13 + P14 and P31 + P32 must not exceed 100%: they leave one state",
            ));
        }
        return Ok(Loss::State {
            p13,
            p31,
            p32,
            p23,
            p14,
        });
    }
    if words.take("gemodel") {
        let p = words.value("loss", PERCENT, units::percent)?;
        let mut further = || words.further("loss", PERCENT, units::percent);
        return Ok(Loss::Gemodel {
            p,
            r: further()?.unwrap_or_else(|| complement(p)),
            bad: further()?.unwrap_or(1.0),
            good: further()?.unwrap_or(0.0),
        });
    }
    words.take("random");
    let chance = chance("loss", words)?;
    Ok(match chance {
        Chance::NEVER => Loss::None,
        chance => Loss::Random(chance),
    })
}

/// 1 − p in whole parts.
fn complement(p: f64) -> f64 {
    ((1.0 - p) * units::PARTS).round() / units::PARTS
}

fn limit(text: &str) -> Option<Limit> {
    if text.bytes().all(|byte| byte.is_ascii_digit()) {
        let packets = text.parse().ok().filter(|packets| *packets > 0)?;
        return Some(Limit::Packets(packets));
    }
    units::size(text)
        .map(Limit::Bytes)
        .or_else(|| units::time(text).map(Limit::Time))
}
