//! How a link is described: [`LinkSpec`], and its text form in the words of `tc netem`. Only
//! description: it must never know how packets travel.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// What a link does to the packets of one direction.
///
/// The text form is a subset of `tc netem`, in any order, every word optional:
/// `delay 25ms rate 200mbit loss 0.5% limit 50ms`. One word differs from tc: `limit` is the time
/// that the queue holds at the link's rate, not a number of packets, so that a slower link
/// does not get a longer queue.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct LinkSpec {
    /// One-way propagation delay; half of the round trip of a symmetric link.
    pub delay: Duration,
    /// IP-level rate of the bottleneck in bits per second; `None` is not limited.
    pub rate: Option<u64>,
    /// Probability that a packet is lost, independently of all others, 0 to 1.
    pub loss: f64,
    /// Depth of the drop-tail queue before the bottleneck, as time at `rate`.
    pub queue: Duration,
}

/// The queue when a spec names none.
pub const DEFAULT_QUEUE: Duration = Duration::from_millis(50);

/// Losses are kept to this many parts of one, so that their text form is exact.
const LOSS_PARTS: f64 = 1e8;

impl Default for LinkSpec {
    /// A link that does nothing: no delay, no limit, no loss.
    fn default() -> Self {
        Self {
            delay: Duration::ZERO,
            rate: None,
            loss: 0.0,
            queue: DEFAULT_QUEUE,
        }
    }
}

/// Why a text is not a [`LinkSpec`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SpecError {
    /// A word that no link knows.
    #[error("link: '{0}' is not known here; known are delay, rate, loss, limit")]
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
}

impl FromStr for LinkSpec {
    type Err = SpecError;

    fn from_str(text: &str) -> Result<Self, SpecError> {
        let mut spec = Self::default();
        let mut seen = Vec::new();
        let mut words = text.split_whitespace();
        while let Some(word) = words.next() {
            let (word, example) = match word {
                "delay" => ("delay", "25ms"),
                "rate" => ("rate", "200mbit"),
                "loss" => ("loss", "0.5%"),
                "limit" => ("limit", "50ms"),
                other => return Err(SpecError::UnknownWord(other.to_owned())),
            };
            if seen.contains(&word) {
                return Err(SpecError::Duplicate(word));
            }
            seen.push(word);
            let value = words
                .next()
                .ok_or(SpecError::MissingValue { word, example })?;
            match word {
                "delay" => spec.delay = parse_time(word, value)?,
                "rate" => spec.rate = Some(parse_rate(word, value)?),
                "loss" => spec.loss = parse_loss(word, value)?,
                _ => spec.queue = parse_time(word, value)?,
            }
        }
        Ok(spec)
    }
}

impl fmt::Display for LinkSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "delay {}", Scaled(self.delay.as_nanos(), TIME_UNITS))?;
        if let Some(rate) = self.rate {
            write!(f, " rate {}", Scaled(u128::from(rate), RATE_UNITS))?;
        }
        if self.loss > 0.0 {
            let percent = (self.loss * LOSS_PARTS).round() / (LOSS_PARTS / 100.0);
            write!(f, " loss {percent}%")?;
        }
        write!(f, " limit {}", Scaled(self.queue.as_nanos(), TIME_UNITS))
    }
}

/// Nanoseconds per unit, the largest first.
const TIME_UNITS: &[(&str, u64)] = &[
    ("s", 1_000_000_000),
    ("ms", 1_000_000),
    ("us", 1_000),
    ("ns", 1),
];

/// Bits per second per unit, the largest first. tc's `bps` (bytes per second) is left out: it
/// reads like bits to everybody else.
const RATE_UNITS: &[(&str, u64)] = &[
    ("gbit", 1_000_000_000),
    ("mbit", 1_000_000),
    ("kbit", 1_000),
    ("bit", 1),
];

/// A number shown in the largest unit that divides it.
struct Scaled(u128, &'static [(&'static str, u64)]);

impl fmt::Display for Scaled {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(value, units) = self;
        let (name, unit) = units
            .iter()
            .find(|(_, unit)| value % u128::from(*unit) == 0)
            .expect("the last unit is 1, which divides everything");
        write!(f, "{}{name}", value / u128::from(*unit))
    }
}

fn parse_time(word: &'static str, value: &str) -> Result<Duration, SpecError> {
    let expected = "a time of at most 1000 s with its unit, such as 25ms, 1.5s, 300us";
    scaled(value, TIME_UNITS)
        .filter(|nanos| *nanos <= 1_000_000_000_000)
        .map(Duration::from_nanos)
        .ok_or_else(|| bad(word, value, expected))
}

fn parse_rate(word: &'static str, value: &str) -> Result<u64, SpecError> {
    let expected = "a rate from 1 bit to 1000 gbit per second, such as 200mbit, 1.5gbit, 64kbit";
    scaled(value, RATE_UNITS)
        .filter(|rate| (1..=1_000_000_000_000).contains(rate))
        .ok_or_else(|| bad(word, value, expected))
}

fn parse_loss(word: &'static str, value: &str) -> Result<f64, SpecError> {
    let expected = "a share of packets from 0% to 100%, such as 0.5%";
    value
        .strip_suffix('%')
        .filter(|number| is_decimal(number))
        .and_then(|number| number.parse::<f64>().ok())
        .filter(|percent| (0.0..=100.0).contains(percent))
        .map(|percent| (percent * (LOSS_PARTS / 100.0)).round() / LOSS_PARTS)
        .ok_or_else(|| bad(word, value, expected))
}

/// `1.5ms` → 1 500 000; `None` if it is not a decimal number with one of the units.
fn scaled(value: &str, units: &[(&str, u64)]) -> Option<u64> {
    let split = value.find(|c: char| c.is_ascii_alphabetic())?;
    let (number, unit) = value.split_at(split);
    let (_, unit) = units.iter().find(|(name, _)| *name == unit)?;
    if !is_decimal(number) {
        return None;
    }
    match number.parse::<u64>() {
        Ok(whole) => whole.checked_mul(*unit),
        Err(_) => Some((number.parse::<f64>().ok()? * *unit as f64).round() as u64),
    }
}

/// Digits with at most one point: no sign, no exponent, no `inf`.
fn is_decimal(number: &str) -> bool {
    number.starts_with(|c: char| c.is_ascii_digit())
        && number.bytes().all(|b| b.is_ascii_digit() || b == b'.')
}

fn bad(word: &'static str, value: &str, expected: &'static str) -> SpecError {
    SpecError::BadValue {
        word,
        value: value.to_owned(),
        expected,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn reads_the_words_of_tc() {
        let spec: LinkSpec = "delay 25ms rate 200mbit loss 0.5% limit 40ms"
            .parse()
            .unwrap();
        let expected = LinkSpec {
            delay: Duration::from_millis(25),
            rate: Some(200_000_000),
            loss: 0.005,
            queue: Duration::from_millis(40),
        };
        assert_eq!(spec, expected);
        assert_eq!(
            spec.to_string(),
            "delay 25ms rate 200mbit loss 0.5% limit 40ms"
        );
        assert_eq!("".parse(), Ok(LinkSpec::default()));
        let fraction: LinkSpec = "rate 1.5gbit delay 0.25ms".parse().unwrap();
        assert_eq!(fraction.rate, Some(1_500_000_000));
        assert_eq!(fraction.delay, Duration::from_micros(250));
    }

    #[test]
    fn refuses_what_it_cannot_mean() {
        let refusal = |text: &str| text.parse::<LinkSpec>().unwrap_err().to_string();
        assert!(refusal("dealy 5ms").contains("'dealy' is not known"));
        assert!(refusal("delay").contains("needs a value"));
        assert!(refusal("delay 5ms delay 6ms").contains("given twice"));
        for text in [
            "delay 5",
            "delay -5ms",
            "delay 5min",
            "delay 1e3ms",
            "delay 1.2.3ms",
            "delay 2000s",
            "rate 0bit",
            "rate 10mbps",
            "rate 99999999999999999999gbit",
            "loss 101%",
            "loss 0.5",
            "loss nan%",
        ] {
            assert!(refusal(text).contains("is no value for"), "{text}");
        }
    }

    proptest! {
        #[test]
        fn text_form_is_exact(
            delay in 0..1_000_000_000_000u64,
            rate in prop::option::of(1..=1_000_000_000_000u64),
            loss in 0..=100_000_000u32,
            queue in 0..1_000_000_000_000u64,
        ) {
            let spec = LinkSpec {
                delay: Duration::from_nanos(delay),
                rate,
                loss: f64::from(loss) / LOSS_PARTS,
                queue: Duration::from_nanos(queue),
            };
            prop_assert_eq!(spec.to_string().parse::<LinkSpec>().unwrap(), spec);
        }

        #[test]
        fn never_panics(text in "((delay|rate|loss|limit|[a-z]{1,4}|[0-9.]{1,25}[a-z%]{0,4}) ?){0,8}") {
            if let Ok(spec) = text.parse::<LinkSpec>() {
                prop_assert!((0.0..=1.0).contains(&spec.loss));
                prop_assert!(spec.rate != Some(0));
                prop_assert_eq!(spec.to_string().parse::<LinkSpec>().unwrap(), spec);
            }
        }
    }
}
