//! Numbers with units in link descriptions: times, rates, percentages, sizes. Strict: what cannot be
//! understood is `None`, and what is printed is read back exactly.

use std::fmt;
use std::time::Duration;

/// Probabilities are kept to this many parts of one, so that their text form is exact.
pub const PARTS: f64 = 1e8;

/// Nanoseconds per unit, the largest first.
pub const TIME_UNITS: &[(&str, u64)] = &[
    ("s", 1_000_000_000),
    ("ms", 1_000_000),
    ("us", 1_000),
    ("ns", 1),
];

/// Bits per second per unit, the largest first. tc's `bps` (bytes per second) is left out: it
/// reads like bits to everybody else.
pub const RATE_UNITS: &[(&str, u64)] = &[
    ("gbit", 1_000_000_000),
    ("mbit", 1_000_000),
    ("kbit", 1_000),
    ("bit", 1),
];

/// Bytes per unit as in tc(8), the largest first.
pub const SIZE_UNITS: &[(&str, u64)] =
    &[("gb", 1 << 30), ("mb", 1 << 20), ("kb", 1 << 10), ("b", 1)];

/// The longest time in a description.
pub const MAX_TIME: Duration = Duration::from_secs(1000);

/// A number shown in the largest unit that divides it.
pub struct Scaled(pub u128, pub &'static [(&'static str, u64)]);

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

/// A time in the largest unit that divides it.
pub fn show_time(time: Duration) -> Scaled {
    // Zero is divided by every unit; seconds would be an odd choice.
    if time.is_zero() {
        return Scaled(0, &TIME_UNITS[1..]);
    }
    Scaled(time.as_nanos(), TIME_UNITS)
}

/// A probability as a percentage.
pub struct Percent(pub f64);

impl fmt::Display for Percent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}%", (self.0 * PARTS).round() / (PARTS / 100.0))
    }
}

/// `25ms`, at most [`MAX_TIME`].
pub fn time(text: &str) -> Option<Duration> {
    let time = scaled(text, TIME_UNITS).map(Duration::from_nanos)?;
    (time <= MAX_TIME).then_some(time)
}

/// `200mbit`, 1 bit/s to 1 Tbit/s.
pub fn rate(text: &str) -> Option<u64> {
    scaled(text, RATE_UNITS).filter(|rate| (1..=1_000_000_000_000).contains(rate))
}

/// `64kb`, at most 1 TiB.
pub fn size(text: &str) -> Option<u64> {
    scaled(text, SIZE_UNITS).filter(|size| *size <= 1 << 40)
}

/// `0.5%` → 0.005.
pub fn percent(text: &str) -> Option<f64> {
    let number = text.strip_suffix('%').filter(|number| is_decimal(number))?;
    let percent: f64 = number.parse().ok()?;
    (0.0..=100.0)
        .contains(&percent)
        .then(|| (percent * (PARTS / 100.0)).round() / PARTS)
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
