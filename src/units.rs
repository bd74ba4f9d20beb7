//! Human units on the command line: sizes (`512M`), rates (`200mbit`), times (`50ms`), shares
//! (`0.5`, `50%`). Parsing is strict: what cannot be understood is refused with an example.

use std::time::Duration;

/// Parses a size in bytes: a number and one of `B K M G T` (powers of 1024; `KiB` … and `KB` …
/// mean the same as `K` …).
pub fn size(text: &str) -> Result<u64, String> {
    let (number, unit) = split(text)?;
    let unit = unit.to_ascii_lowercase();
    let shift = match unit.trim_end_matches("ib").trim_end_matches('b') {
        "" => 0,
        "k" => 10,
        "m" => 20,
        "g" => 30,
        "t" => 40,
        _ => {
            return Err(format!(
                "'{text}' is not a size; write for example 512M or 4G"
            ));
        }
    };
    whole(number * (1_u64 << shift) as f64, text)
}

/// Parses a rate and returns bytes per second. `bit`, `kbit`, `mbit`, `gbit` are powers of 1000 as
/// in tc(8), so are `bps`, `kbps` …, which are *bytes* per second there and here.
pub fn rate(text: &str) -> Result<u64, String> {
    let (number, unit) = split(text)?;
    let factor = match unit.to_ascii_lowercase().as_str() {
        "bit" => 1.0 / 8.0,
        "kbit" => 1e3 / 8.0,
        "mbit" => 1e6 / 8.0,
        "gbit" => 1e9 / 8.0,
        "bps" => 1.0,
        "kbps" => 1e3,
        "mbps" => 1e6,
        "gbps" => 1e9,
        _ => {
            return Err(format!(
                "'{text}' is not a rate; write for example 200mbit, or 25mbps for 25 megabytes/s"
            ));
        }
    };
    whole(number * factor, text)
}

/// A rate that is not to be exceeded, in bytes/s; nothing for `none`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cap(pub Option<u64>);

impl std::str::FromStr for Cap {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "none" => Ok(Self(None)),
            _ => match rate(text)? {
                0 => Err("a cap of nothing would stop the migration; cancel it instead".to_owned()),
                rate => Ok(Self(Some(rate))),
            },
        }
    }
}

/// Parses a duration: a number and one of `us ms s m h`.
pub fn time(text: &str) -> Result<Duration, String> {
    let (number, unit) = split(text)?;
    let seconds = match unit.to_ascii_lowercase().as_str() {
        "us" => 1e-6,
        "ms" => 1e-3,
        "s" | "sec" => 1.0,
        "m" | "min" => 60.0,
        "h" => 3600.0,
        _ => {
            return Err(format!(
                "'{text}' is not a time; write for example 50ms, 2s or 10m"
            ));
        }
    };
    Duration::try_from_secs_f64(number * seconds)
        .map_err(|_| format!("'{text}' is out of range for a time"))
}

/// Parses a share between 0 and 1, or a percentage.
pub fn share(text: &str) -> Result<f64, String> {
    let (number, unit) = split(text)?;
    let share = match unit {
        "" => number,
        "%" => number / 100.0,
        _ => {
            return Err(format!(
                "'{text}' is not a share; write for example 0.5 or 50%"
            ));
        }
    };
    if (0.0..=1.0).contains(&share) {
        Ok(share)
    } else {
        Err(format!(
            "'{text}' is not a share: it must lie between 0 and 1 (or 0% and 100%)"
        ))
    }
}

/// Bytes as a person reads them.
pub fn show_bytes(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 {
        format!("{bytes} B")
    } else {
        format!("{value:.1} {}", UNITS[unit])
    }
}

/// A rate in bytes per second as a person reads it, in bits per second.
pub fn show_rate(bytes_per_second: f64) -> String {
    let bits = bytes_per_second * 8.0;
    if bits >= 1e9 {
        format!("{:.2} Gbit/s", bits / 1e9)
    } else if bits >= 1e6 {
        format!("{:.1} Mbit/s", bits / 1e6)
    } else {
        format!("{:.0} kbit/s", bits / 1e3)
    }
}

/// A duration as a person reads it.
pub fn show_time(time: Duration) -> String {
    let seconds = time.as_secs_f64();
    if seconds >= 60.0 {
        format!("{}m{:02.0}s", (seconds / 60.0) as u64, seconds % 60.0)
    } else if seconds >= 1.0 {
        format!("{seconds:.2} s")
    } else if seconds >= 1e-3 {
        format!("{:.1} ms", seconds * 1e3)
    } else {
        format!("{:.0} µs", seconds * 1e6)
    }
}

fn split(text: &str) -> Result<(f64, &str), String> {
    let text = text.trim();
    let end = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    let number: f64 = text[..end]
        .parse()
        .map_err(|_| format!("'{text}' does not begin with a number"))?;
    Ok((number, text[end..].trim()))
}

fn whole(value: f64, text: &str) -> Result<u64, String> {
    // 2^63: beyond it nothing that is counted in bytes exists.
    if value.is_finite() && (0.0..9.2e18).contains(&value) {
        Ok(value.round() as u64)
    } else {
        Err(format!("'{text}' is out of range"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_powers_of_1024() {
        assert_eq!(size("512M"), Ok(512 << 20));
        assert_eq!(size("1.5 GiB"), Ok(3 << 29));
        assert_eq!(size("64kb"), Ok(64 << 10));
        assert_eq!(size("17"), Ok(17));
        assert!(size("12 parsecs").is_err());
        assert!(size("M").is_err());
        assert!(size("99999999999999T").is_err());
    }

    #[test]
    fn rates_are_those_of_tc() {
        assert_eq!(rate("200mbit"), Ok(25_000_000));
        assert_eq!(rate("1Gbit"), Ok(125_000_000));
        assert_eq!(rate("25mbps"), Ok(25_000_000));
        assert!(rate("200").is_err());
        assert!(rate("-1mbit").is_err());
    }

    #[test]
    fn times_and_shares() {
        assert_eq!(time("50ms"), Ok(Duration::from_millis(50)));
        assert_eq!(time("1.5s"), Ok(Duration::from_millis(1500)));
        assert_eq!(time("10m"), Ok(Duration::from_secs(600)));
        assert!(time("50").is_err());
        assert_eq!(share("50%"), Ok(0.5));
        assert_eq!(share("1"), Ok(1.0));
        assert!(share("1.01").is_err());
        assert!(share("101%").is_err());
    }

    #[test]
    fn people_read_them_back() {
        assert_eq!(show_bytes(1536), "1.5 KiB");
        assert_eq!(show_bytes(12), "12 B");
        assert_eq!(show_rate(25e6), "200.0 Mbit/s");
        assert_eq!(show_time(Duration::from_millis(1250)), "1.25 s");
        assert_eq!(show_time(Duration::from_micros(1250)), "1.2 ms");
        assert_eq!(show_time(Duration::from_secs(61)), "1m01s");
    }
}
