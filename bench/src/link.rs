//! The link of a run. The only file that knows which of `hybridmig-netem`'s runners carries the packets.

use std::fmt;
use std::net::Ipv4Addr;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use hybridmig_netem::namespace::Namespace;
use hybridmig_netem::tun::{TunConfig, TunHandle, TunLink};
use hybridmig_netem::{DirectionStats, LinkSpec};
use serde::{Deserialize, Serialize};

/// What tables and plots say of a link.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct LinkFacts {
    /// Round-trip time in ms, without what queues add.
    pub rtt_ms: f64,
    /// Loss towards the destination, in per cent.
    pub loss_percent: f64,
    /// Rate in bits a second.
    pub rate: Option<u64>,
}

impl LinkFacts {
    /// Those at the link's beginning: loss and rate on the way from the source to the destination.
    pub fn of(link: &LinkSpec) -> Self {
        Self {
            rtt_ms: rounded(link.rtt().as_secs_f64() * 1e3),
            loss_percent: rounded(link.forward.loss.mean() * 100.0),
            rate: link.forward.rate,
        }
    }
}

impl fmt::Display for LinkFacts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ms, {} %", self.rtt_ms, self.loss_percent)?;
        match self.rate {
            Some(rate) => write!(f, ", {} Mbit/s", rounded(rate as f64 / 1e6)),
            None => Ok(()),
        }
    }
}

/// Without the last digits that a multiplication leaves.
fn rounded(value: f64) -> f64 {
    (value * 1e6).round() / 1e6
}

/// One of the two hosts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Side {
    /// Where the guest is first.
    Source,
    /// Where it goes.
    Destination,
}

/// A link in operation: two hosts as network namespaces. Dropping it ends the link; the namespaces go with
/// the last process in them.
pub struct Link {
    tun: TunHandle,
    rtt: Duration,
}

impl Link {
    /// Sets up both hosts' namespaces and the link between them.
    pub fn start(spec: &LinkSpec, seed: u64) -> Result<Self> {
        let tun = TunLink::start(TunConfig::new(spec.clone(), seed))?;
        Ok(Self {
            tun,
            rtt: spec.rtt(),
        })
    }

    fn namespace(&self, side: Side) -> &Namespace {
        match side {
            Side::Source => self.tun.near(),
            Side::Destination => self.tun.far(),
        }
    }

    /// Has `command` run on that host.
    pub fn place(&self, side: Side, command: &mut Command) {
        self.namespace(side).enter(command);
    }

    /// Runs `job` on a thread of that host. Sockets and threads that it makes stay of that host.
    pub fn run<T: Send>(&self, side: Side, job: impl FnOnce() -> T + Send) -> Result<T> {
        let ran = self.namespace(side).run(job);
        ran.context("a thread cannot enter a host's namespace")
    }

    /// That host's address.
    pub fn address(&self, side: Side) -> Ipv4Addr {
        match side {
            Side::Source => self.tun.near_address(),
            Side::Destination => self.tun.far_address(),
        }
    }

    /// Sets TCP's congestion control on both hosts.
    pub fn set_congestion(&self, control: &str) -> Result<()> {
        for side in [Side::Source, Side::Destination] {
            self.namespace(side)
                .set_sysctl(CONGESTION, control)
                .with_context(|| format!("{CONGESTION} cannot be {control}"))?;
        }
        Ok(())
    }

    /// Lets TCP's buffers grow to so many bytes on both sides.
    pub fn set_tcp_buffers(&self, most: u32) -> Result<()> {
        for side in [Side::Source, Side::Destination] {
            for name in ["net.ipv4.tcp_rmem", "net.ipv4.tcp_wmem"] {
                self.namespace(side)
                    .set_sysctl(name, &format!("4096 262144 {most}"))
                    .with_context(|| format!("{name} cannot be set"))?;
            }
        }
        Ok(())
    }

    /// TCP's settings, as the source has them; the destination has the same.
    pub fn tcp(&self) -> Result<Tcp> {
        let read = |name| {
            let value = self.namespace(Side::Source).sysctl(name);
            value
                .map(|value| value.split_whitespace().collect::<Vec<_>>().join(" "))
                .with_context(|| format!("{name} cannot be read"))
        };
        Ok(Tcp {
            congestion: read(CONGESTION)?,
            rmem: read("net.ipv4.tcp_rmem")?,
            wmem: read("net.ipv4.tcp_wmem")?,
        })
    }

    /// Timed changes of the link count from now on.
    pub fn restart_timeline(&self) {
        self.tun.restart_timeline();
    }

    /// What it has carried so far, and how well.
    pub fn traffic(&self) -> Traffic {
        let stats = self.tun.stats();
        Traffic {
            forward: Direction::from(&stats.forward),
            back: Direction::from(&stats.back),
            invalid: stats.invalid(self.rtt),
        }
    }
}

const CONGESTION: &str = "net.ipv4.tcp_congestion_control";

/// TCP's settings on both hosts.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tcp {
    /// Congestion control.
    pub congestion: String,
    /// Receive buffer: least, default, most, in bytes.
    pub rmem: String,
    /// Send buffer.
    pub wmem: String,
}

/// What the emulator has counted.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Traffic {
    /// Source to destination.
    pub forward: Direction,
    /// Destination to source.
    pub back: Direction,
    /// Why this is not a measurement of the link, if the emulator itself was late or failed.
    pub invalid: Option<String>,
}

/// One direction. Packets and bytes are the IP packets that a host sent, lost ones too.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Direction {
    /// Packets sent into the link.
    pub packets: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Packets delivered.
    pub delivered_packets: u64,
    /// Their bytes.
    pub delivered_bytes: u64,
    /// Lost at random, as the link was told to.
    pub dropped_loss: u64,
    /// Dropped because the bottleneck's queue was full.
    pub dropped_queue: u64,
    /// Lost by the emulator itself.
    pub dropped_relay: u64,
    /// How much later than due packets were delivered on average, in µs.
    pub lateness_mean_us: f64,
    /// The same at worst.
    pub lateness_max_us: f64,
}

impl Traffic {
    /// What was added since `earlier`. Lateness is that of the whole time.
    #[must_use]
    pub fn since(&self, earlier: &Self) -> Self {
        Self {
            forward: self.forward.since(&earlier.forward),
            back: self.back.since(&earlier.back),
            invalid: self.invalid.clone(),
        }
    }

    /// Bytes of both directions.
    pub fn bytes(&self) -> u64 {
        self.forward.bytes + self.back.bytes
    }

    /// Packets of both directions.
    pub fn packets(&self) -> u64 {
        self.forward.packets + self.back.packets
    }
}

impl From<&DirectionStats> for Direction {
    fn from(stats: &DirectionStats) -> Self {
        Self {
            packets: stats.packets,
            bytes: stats.bytes,
            delivered_packets: stats.delivered_packets,
            delivered_bytes: stats.delivered_bytes,
            dropped_loss: stats.dropped_loss,
            dropped_queue: stats.dropped_queue,
            dropped_relay: stats.dropped_relay,
            lateness_mean_us: stats.lateness_mean().as_secs_f64() * 1e6,
            lateness_max_us: stats.lateness_max.as_secs_f64() * 1e6,
        }
    }
}

impl Direction {
    fn since(&self, earlier: &Self) -> Self {
        Self {
            packets: self.packets - earlier.packets,
            bytes: self.bytes - earlier.bytes,
            delivered_packets: self.delivered_packets - earlier.delivered_packets,
            dropped_loss: self.dropped_loss - earlier.dropped_loss,
            delivered_bytes: self.delivered_bytes - earlier.delivered_bytes,
            dropped_relay: self.dropped_relay - earlier.dropped_relay,
            dropped_queue: self.dropped_queue - earlier.dropped_queue,
            ..*self
        }
    }
}
