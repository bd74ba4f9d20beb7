//! How exactly a running link does what its description says: round-trip time, loss and rate,
//! measured with UDP from end to end, and judged. It measures; it never adjusts anything.

mod measure;

use std::io;
use std::net::{TcpStream, UdpSocket};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::model::{Path, UDP_OVERHEAD};
use crate::spec::{DirectionSpec, LinkSpec, Loss};

/// The two ends of a link: sockets with nothing else on them.
#[derive(Debug)]
pub struct Ends {
    /// Connected: what it sends arrives at `far`.
    pub near: UdpSocket,
    /// Answers to whoever sent to it.
    pub far: UdpSocket,
}

/// Whether a figure is what it should be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// It is.
    Pass,
    /// It is not.
    Fail,
    /// The emulator itself was late, or too little came through to tell.
    Invalid,
}

/// One figure.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Finding {
    /// `rtt`, `loss` or `rate`.
    pub what: String,
    /// The unit of the figures: `ms`, `%`, `Mbit/s`.
    pub unit: String,
    /// What the description asks for.
    pub expected: f64,
    /// How far off it may be.
    pub tolerance: f64,
    /// What was seen.
    pub seen: f64,
    /// What else there is to know.
    pub note: String,
    /// Whether that is good enough.
    pub verdict: Verdict,
}

impl Finding {
    fn new(what: &str, unit: &str, (expected, tolerance): (f64, f64), seen: f64) -> Self {
        let passes = (seen - expected).abs() <= tolerance;
        Self {
            what: what.to_owned(),
            unit: unit.to_owned(),
            expected,
            tolerance,
            seen,
            note: String::new(),
            verdict: if passes { Verdict::Pass } else { Verdict::Fail },
        }
    }
}

/// Pings for the round-trip time.
const PINGS: usize = 150;

/// Payload of a ping, in bytes.
const PING: usize = 64;

/// Packets for the loss, at most.
const LOSS_PACKETS: u64 = 20_000;

/// Payload of those, in bytes.
const LOSS_PAYLOAD: usize = 200;

/// Share of the rate that they take, so that no queue loses any.
const LOSS_LOAD: f64 = 0.25;

/// The fastest that they are sent, in packets per second.
const LOSS_PACE: f64 = 8_000.0;

/// How long the rate is measured for.
const RATE_TIME: Duration = Duration::from_secs(3);

/// Payload of a packet for the rate: a full one of an MTU of 1500 bytes.
const RATE_PAYLOAD: usize = 1472;

/// How much more is offered than the rate.
const RATE_OVERLOAD: f64 = 1.15;

/// The tolerance of a round-trip time: 1 % of it or this, whichever is more.
const RTT_TOLERANCE: Duration = Duration::from_micros(500);

/// Runs of the model from which the spread of a loss rate is taken.
const SPREAD_RUNS: u64 = 200;

/// What TCP must reach through an emulator that is not in its way, in Gbit/s.
const TCP_GOAL: f64 = 5.0;

/// Measures what `link` says of round-trip time, loss and rate (forward; the timeline is left out).
/// Takes about ten seconds.
pub fn check(ends: &Ends, link: &LinkSpec) -> io::Result<Vec<Finding>> {
    let mut findings = vec![rtt(ends, link)?];
    let direction = &link.forward;
    if direction.loss != Loss::None {
        findings.push(loss(ends, direction)?);
    }
    if let Some(rate) = direction.rate {
        findings.push(throughput(ends, direction, rate)?);
    }
    Ok(findings)
}

/// Throughput of TCP over a link without a rate: what the emulator can carry at all. `sender` and
/// `receiver` are the two ends of one connection.
pub fn tcp_throughput(
    sender: &TcpStream,
    receiver: &TcpStream,
    time: Duration,
) -> io::Result<Finding> {
    let seen = measure::tcp_throughput(sender, receiver, time)? / 1e9;
    let mut finding = Finding::new("tcp", "Gbit/s", (TCP_GOAL, 0.0), seen);
    finding.note.push_str("at least this, on an idle machine");
    if seen >= TCP_GOAL {
        finding.verdict = Verdict::Pass;
    }
    Ok(finding)
}

fn rtt(ends: &Ends, link: &LinkSpec) -> io::Result<Finding> {
    let patience = link.rtt() + Duration::from_millis(500);
    let mut times = measure::round_trips(ends, PINGS, PING, patience)?;
    let transmission = |direction: &DirectionSpec| {
        let rate = direction.rate?;
        Some(crate::model::transmission_time(PING + UDP_OVERHEAD, rate))
    };
    let both = [&link.forward, &link.back];
    let sending: Duration = both.into_iter().filter_map(transmission).sum();
    let expected = millis(link.rtt() + sending);
    let tolerance = (expected * 0.01).max(millis(RTT_TOLERANCE));
    if times.len() < PINGS / 2 {
        let mut finding = Finding::new("rtt", "ms", (expected, tolerance), f64::NAN);
        finding.note = format!("{} of {PINGS} pings came back", times.len());
        finding.verdict = Verdict::Invalid;
        return Ok(finding);
    }
    times.sort_unstable();
    // Jitter, slots and reordering move the median away from the delay: then it is only shown.
    let constant = |direction: &&DirectionSpec| {
        direction.jitter.is_zero() && direction.slot.is_none() && direction.reorder.is_none()
    };
    let median = millis(times[times.len() / 2]);
    let mut finding = Finding::new("rtt", "ms", (expected, tolerance), median);
    finding.note = format!(
        "{} pings, {:.2} to {:.2} ms",
        times.len(),
        millis(times[0]),
        millis(times[times.len() - 1])
    );
    if !both.iter().all(constant) {
        let spread = both.map(|direction| {
            let slot = direction.slot.map_or(Duration::ZERO, |slot| slot.max);
            4 * direction.jitter + slot
        });
        finding.tolerance += millis(spread[0] + spread[1]);
        finding.verdict = if (median - expected).abs() <= finding.tolerance {
            Verdict::Pass
        } else {
            Verdict::Fail
        };
        finding.note.push_str("; jitter widens what is tolerated");
    }
    Ok(finding)
}

fn loss(ends: &Ends, direction: &DirectionSpec) -> io::Result<Finding> {
    let packet = (LOSS_PAYLOAD + UDP_OVERHEAD) as f64 * 8.0;
    let pace = direction.rate.map_or(LOSS_PACE, |rate| {
        (rate as f64 * LOSS_LOAD / packet).min(LOSS_PACE)
    });
    // What fits into a few seconds.
    let packets = LOSS_PACKETS.min((pace * 4.0) as u64).max(100);
    let patience = direction.delay * 2 + direction.jitter * 4 + Duration::from_millis(300);
    let arrived = measure::arrivals(ends, packets, LOSS_PAYLOAD, pace, patience)?;
    let seen = 1.0 - arrived as f64 / packets as f64;
    let spread = spread_of_loss(direction, packets);
    let expected = direction.loss.mean();
    let figures = (expected * 100.0, 3.0 * spread * 100.0);
    let mut finding = Finding::new("loss", "%", figures, seen * 100.0);
    finding.note = format!("{arrived} of {packets} packets arrived; 3 σ are tolerated");
    Ok(finding)
}

/// Standard deviation of the share lost among `packets`, from the model: bursts widen it.
fn spread_of_loss(direction: &DirectionSpec, packets: u64) -> f64 {
    let spec = DirectionSpec {
        loss: direction.loss,
        ..DirectionSpec::default()
    };
    let shares: Vec<f64> = (0..SPREAD_RUNS)
        .map(|seed| {
            let mut path = Path::new(&spec, seed);
            let lost = (0..packets).filter(|_| path.admit(Duration::ZERO, 1, 0).is_err());
            lost.count() as f64 / packets as f64
        })
        .collect();
    let mean = shares.iter().sum::<f64>() / shares.len() as f64;
    let squares = shares.iter().map(|share| (share - mean).powi(2));
    (squares.sum::<f64>() / (shares.len() - 1) as f64).sqrt()
}

fn throughput(ends: &Ends, direction: &DirectionSpec, rate: u64) -> io::Result<Finding> {
    // What is lost on the way never reaches the bottleneck.
    let offered = rate as f64 * RATE_OVERLOAD / (1.0 - direction.loss.mean()).max(0.1);
    let patience = direction.delay * 2 + Duration::from_millis(800);
    let seen = measure::throughput(ends, RATE_PAYLOAD, offered, RATE_TIME, patience)?;
    let expected = rate as f64 / 1e6;
    let figures = (expected, expected * 0.01);
    let mut finding = Finding::new("rate", "Mbit/s", figures, seen.bits_per_second / 1e6);
    finding.note = format!("{} packets over {:.2} s", seen.packets, seen.seconds);
    if seen.offered < rate as f64 * 1.02 {
        finding.verdict = Verdict::Invalid;
        finding.note = format!(
            "only {:.0} Mbit/s could be offered on this machine",
            seen.offered / 1e6
        );
    }
    Ok(finding)
}

fn millis(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_judged_by_their_tolerance() {
        let verdict = |seen| Finding::new("rtt", "ms", (100.0, 1.0), seen).verdict;
        assert_eq!(verdict(100.9), Verdict::Pass);
        assert_eq!(verdict(99.1), Verdict::Pass);
        assert_eq!(verdict(101.1), Verdict::Fail);
        assert_eq!(verdict(f64::NAN), Verdict::Fail);
    }

    #[test]
    fn the_spread_of_a_loss_is_that_of_its_model() {
        let spread = |text: &str| {
            let link: LinkSpec = text.parse().unwrap();
            spread_of_loss(&link.forward, 10_000)
        };
        // Binomial: √(0.01 · 0.99 / 10 000).
        let independent = spread("loss 1%");
        assert!((independent - 0.000_995).abs() < 0.000_2, "{independent}");
        assert!(spread("loss gemodel 0.2525% 25%") > 1.8 * independent);
    }
}
