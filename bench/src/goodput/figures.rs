//! From a receiver's progress to the figures of a transport. Pure.

use serde::{Deserialize, Serialize};

/// The progress at a moment.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Point {
    /// Seconds since the transfer could start.
    pub at: f64,
    /// Bytes that the receiving application has.
    pub received: u64,
    /// Bytes of IP packets that the sender has put onto the link.
    pub sent_bytes: u64,
    /// Their number.
    pub sent_packets: u64,
}

/// What a transport made of a link.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Figures {
    /// Goodput ÷ the link's rate over the whole transfer, its start included.
    pub whole: f64,
    /// The same over its second half.
    pub steady: f64,
    /// Until the first 0.1 s began whose goodput was 80 % of the rate, in round trips; the first half of one
    /// is the way there.
    pub startup_rtts: Option<f64>,
    /// Bytes of IP packets sent for every byte received, over the second half.
    pub sent_per_received: f64,
    /// Mean length of the packets sent, over the second half.
    pub mean_packet: f64,
    /// The faults that were answered in the second half.
    pub latencies: Option<Latencies>,
}

/// How long page faults took, in units of the round trip.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Latencies {
    /// How many.
    pub count: usize,
    /// Median.
    pub p50_rtts: f64,
    /// 99th percentile.
    pub p99_rtts: f64,
    /// The longest.
    pub max_rtts: f64,
}

/// Stretch over which 80 % of the rate must be reached, in seconds.
const STRETCH: f64 = 0.1;

/// What counts as having started.
const STARTED: f64 = 0.8;

/// Figures of a transfer over a link of `rate` bytes/s; `None` if there is too little to go by.
pub fn of(points: &[Point], rate: f64, rtt: f64, latencies: Vec<f64>) -> Option<Figures> {
    let (first, last) = (points.first()?, points.last()?);
    let middle = points.iter().find(|point| point.at >= last.at / 2.0)?;
    let goodput = |from: &Point, to: &Point| {
        let seconds = to.at - from.at;
        (seconds > 0.0).then(|| (to.received - from.received) as f64 / seconds / rate)
    };
    let received = (last.received - middle.received) as f64;
    let sent = (last.sent_bytes - middle.sent_bytes) as f64;
    let packets = (last.sent_packets - middle.sent_packets) as f64;
    Some(Figures {
        whole: goodput(first, last)?,
        steady: goodput(middle, last)?,
        startup_rtts: startup(points, rate).map(|at| at / rtt.max(1e-6)),
        sent_per_received: sent / received.max(1.0),
        mean_packet: sent / packets.max(1.0),
        latencies: percentiles(latencies, rtt),
    })
}

/// When the stretch began in which 80 % of the rate came for the first time.
fn startup(points: &[Point], rate: f64) -> Option<f64> {
    let mut from = 0;
    for (index, point) in points.iter().enumerate() {
        while point.at - points[from + 1..].first().map_or(point.at, |next| next.at) >= STRETCH
            && from + 1 < index
        {
            from += 1;
        }
        let seconds = point.at - points[from].at;
        let bytes = (point.received - points[from].received) as f64;
        if seconds >= STRETCH && bytes / seconds >= STARTED * rate {
            return Some(points[from].at);
        }
    }
    None
}

fn percentiles(mut latencies: Vec<f64>, rtt: f64) -> Option<Latencies> {
    latencies.sort_by(f64::total_cmp);
    let at = |share: f64| {
        let rank = (latencies.len() as f64 * share).ceil() as usize;
        latencies.get(rank.max(1) - 1).map(|seconds| seconds / rtt)
    };
    Some(Latencies {
        count: latencies.len(),
        p50_rtts: at(0.5)?,
        p99_rtts: at(0.99)?,
        max_rtts: at(1.0)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Points every 10 ms for 10 s; `rate` gives bytes/s at a time.
    fn points(rate: impl Fn(f64) -> f64) -> Vec<Point> {
        let (mut received, mut points) = (0.0, Vec::new());
        for step in 0..=1000 {
            let at = f64::from(step) / 100.0;
            points.push(Point {
                at,
                received: received as u64,
                sent_bytes: (received * 1.1) as u64,
                sent_packets: (received / 1000.0) as u64,
            });
            received += rate(at) / 100.0;
        }
        points
    }

    #[test]
    fn a_start_that_takes_a_second() {
        let points = points(|at| if at < 1.0 { 1e5 } else { 9e5 });
        let figures = of(&points, 1e6, 0.1, Vec::new()).unwrap();
        assert!((figures.steady - 0.9).abs() < 1e-3);
        assert!((figures.whole - 0.82).abs() < 1e-3);
        let startup = figures.startup_rtts.unwrap();
        assert!((9.0..10.2).contains(&startup), "{startup}");
        assert!((figures.sent_per_received - 1.1).abs() < 1e-3);
        assert!((figures.mean_packet - 1100.0).abs() < 1.0);
        assert_eq!(figures.latencies, None);
    }

    #[test]
    fn one_that_never_starts() {
        let figures = of(&points(|_| 5e5), 1e6, 0.1, Vec::new()).unwrap();
        assert_eq!(figures.startup_rtts, None);
        assert_eq!(of(&[], 1e6, 0.1, Vec::new()), None);
    }

    #[test]
    fn percentiles_are_ranks() {
        let latencies = percentiles((1..=200).map(f64::from).collect(), 2.0).unwrap();
        assert_eq!(latencies.count, 200);
        assert!((latencies.p50_rtts - 50.0).abs() < 1e-9);
        assert!((latencies.p99_rtts - 99.0).abs() < 1e-9);
        assert!((latencies.max_rtts - 100.0).abs() < 1e-9);
    }
}
