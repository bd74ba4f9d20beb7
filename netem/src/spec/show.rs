//! Prints settings in the words that they are read from.

use std::fmt;

use super::units::{Percent, RATE_UNITS, SIZE_UNITS, Scaled, show_time};
use super::{Chance, DirectionSpec, Distribution, Limit, Loss, Setting};

impl fmt::Display for DirectionSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_all(f, &self.settings())
    }
}

/// Settings with a space between them.
pub fn write_all(f: &mut fmt::Formatter<'_>, settings: &[Setting]) -> fmt::Result {
    for (index, setting) in settings.iter().enumerate() {
        if index > 0 {
            f.write_str(" ")?;
        }
        write!(f, "{setting}")?;
    }
    Ok(())
}

impl fmt::Display for Setting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Delay(delay, jitter, correlation) => {
                write!(f, "delay {}", show_time(*delay))?;
                if !jitter.is_zero() || *correlation > 0.0 {
                    write!(f, " {}", show_time(*jitter))?;
                }
                write_correlation(f, *correlation)
            }
            Self::Distribution(distribution) => write!(f, "distribution {distribution}"),
            Self::Rate(None) => f.write_str("rate unlimited"),
            Self::Rate(Some(rate)) => write!(f, "rate {}", Scaled(u128::from(*rate), RATE_UNITS)),
            Self::Loss(loss) => write!(f, "loss {loss}"),
            Self::Corrupt(chance) => write!(f, "corrupt {chance}"),
            Self::Duplicate(chance) => write!(f, "duplicate {chance}"),
            Self::Reorder(reorder) => {
                write!(f, "reorder {}", reorder.chance)?;
                if reorder.gap != 1 {
                    write!(f, " gap {}", reorder.gap)?;
                }
                Ok(())
            }
            Self::Slot(slot) => {
                write!(f, "slot {}", show_time(slot.min))?;
                if slot.max != slot.min {
                    write!(f, " {}", show_time(slot.max))?;
                }
                Ok(())
            }
            Self::Limit(limit) => write!(f, "limit {limit}"),
        }
    }
}

impl fmt::Display for Distribution {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Uniform => "uniform",
            Self::Normal => "normal",
            Self::Pareto => "pareto",
            Self::ParetoNormal => "paretonormal",
        })
    }
}

impl fmt::Display for Chance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", Percent(self.probability))?;
        write_correlation(f, self.correlation)
    }
}

fn write_correlation(f: &mut fmt::Formatter<'_>, correlation: f64) -> fmt::Result {
    if correlation > 0.0 {
        write!(f, " {}", Percent(correlation))?;
    }
    Ok(())
}

impl fmt::Display for Loss {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let percents = |f: &mut fmt::Formatter<'_>, name: &str, values: &[f64]| {
            f.write_str(name)?;
            values
                .iter()
                .try_for_each(|value| write!(f, " {}", Percent(*value)))
        };
        match *self {
            Self::None => f.write_str("0%"),
            Self::Random(chance) => write!(f, "{chance}"),
            Self::State {
                p13,
                p31,
                p32,
                p23,
                p14,
            } => percents(f, "state", &[p13, p31, p32, p23, p14]),
            Self::Gemodel { p, r, bad, good } => percents(f, "gemodel", &[p, r, bad, good]),
        }
    }
}

impl fmt::Display for Limit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Packets(packets) => write!(f, "{packets}"),
            Self::Bytes(bytes) => write!(f, "{}", Scaled(u128::from(bytes), SIZE_UNITS)),
            Self::Time(time) => write!(f, "{}", show_time(time)),
        }
    }
}
