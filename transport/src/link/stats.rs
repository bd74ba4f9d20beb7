//! Figures of a link: from our congestion control where it is in use, from QUIC's counters
//! otherwise.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::repair::RepairStats;
use super::urgent::UrgentStats;
use crate::congestion::quic::adaptive_of;

/// What is known of a link.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct LinkStats {
    /// Smoothed round-trip time.
    pub rtt: Duration,
    /// Smallest round-trip time seen.
    pub min_rtt: Duration,
    /// Estimated bottleneck rate in bytes/s of UDP payload, 0 while unknown. Without our own
    /// congestion control: what was delivered lately.
    pub bandwidth: f64,
    /// Bytes that may be in flight.
    pub cwnd: u64,
    /// UDP payload of a packet in bytes.
    pub mtu: u16,
    /// Packets sent.
    pub sent_packets: u64,
    /// Bytes sent as UDP payload, repeated ones among them.
    pub sent_bytes: u64,
    /// Packets that were taken for lost.
    pub lost_packets: u64,
    /// Their bytes.
    pub lost_bytes: u64,
    /// Bytes received as UDP payload.
    pub received_bytes: u64,
    /// Share of bytes lost lately, 0 to 1.
    pub loss: f64,
    /// Packets that are lost together, on average; 1 where losses are independent, 0 while nobody knows.
    #[serde(default)]
    pub loss_burst: f64,
    /// Round-trip time of the last fraction of one, as short as it got there; zero while nobody knows.
    #[serde(default)]
    pub current_rtt: Duration,
    /// Time that packets lately waited at the bottleneck.
    #[serde(default)]
    pub queue: Duration,
    /// Whether the congestion control thinks that others use the bottleneck as well.
    #[serde(default)]
    pub shared: bool,
    /// What the urgent lane's datagrams have done.
    #[serde(default)]
    pub urgent: UrgentStats,
    /// What parity of streams has done.
    #[serde(default)]
    pub repair: RepairStats,
}

/// What a controller, or the counters, know of the link; in bytes/s and seconds.
#[derive(Default)]
struct Known {
    bandwidth: f64,
    loss: f64,
    burst: f64,
    rtt: f64,
    queue: f64,
    shared: bool,
}

/// Turns counters into rates.
pub(super) struct Sampler {
    adaptive: bool,
    last: Mutex<Last>,
}

struct Last {
    at: Instant,
    sent: u64,
    lost: u64,
    bandwidth: f64,
    loss: f64,
}

/// Shortest time over which a rate means something.
const SPAN: Duration = Duration::from_millis(200);

impl Sampler {
    pub(super) fn new(adaptive: bool) -> Self {
        Self {
            adaptive,
            last: Mutex::new(Last {
                at: Instant::now(),
                sent: 0,
                lost: 0,
                bandwidth: 0.0,
                loss: 0.0,
            }),
        }
    }

    pub(super) fn sample(&self, connection: &quinn::Connection) -> LinkStats {
        let stats = connection.stats();
        let known = self.of_controller(connection).unwrap_or_else(|| {
            let (bandwidth, loss) = self.of_counters(stats.udp_tx.bytes, stats.path.lost_bytes);
            Known {
                bandwidth,
                loss,
                ..Known::default()
            }
        });
        LinkStats {
            rtt: stats.path.rtt,
            min_rtt: stats.path.min_rtt,
            bandwidth: known.bandwidth,
            cwnd: stats.path.cwnd,
            mtu: stats.path.current_mtu,
            sent_packets: stats.path.sent_packets,
            sent_bytes: stats.udp_tx.bytes,
            lost_packets: stats.path.lost_packets,
            lost_bytes: stats.path.lost_bytes,
            received_bytes: stats.udp_rx.bytes,
            loss: known.loss,
            loss_burst: known.burst,
            current_rtt: Duration::from_secs_f64(known.rtt),
            queue: Duration::from_secs_f64(known.queue),
            shared: known.shared,
            urgent: UrgentStats::default(),
            repair: RepairStats::default(),
        }
    }

    fn of_controller(&self, connection: &quinn::Connection) -> Option<Known> {
        if !self.adaptive {
            return None;
        }
        let controller = adaptive_of(connection)?;
        Some(Known {
            bandwidth: controller.bandwidth(),
            loss: controller.loss(),
            burst: controller.burst(),
            rtt: controller.rtt(),
            queue: controller.queue(),
            shared: controller.is_shared(),
        })
    }

    fn of_counters(&self, sent: u64, lost: u64) -> (f64, f64) {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        let elapsed = last.at.elapsed();
        if elapsed >= SPAN {
            let (sent_now, lost_now) = (sent - last.sent, lost.saturating_sub(last.lost));
            last.bandwidth = sent_now.saturating_sub(lost_now) as f64 / elapsed.as_secs_f64();
            last.loss = lost_now as f64 / sent_now.max(lost_now).max(1) as f64;
            last.at = Instant::now();
            last.sent = sent;
            last.lost = lost;
        }
        (last.bandwidth, last.loss)
    }
}
