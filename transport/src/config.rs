//! What an operator can set, and what becomes of it in QUIC's terms.

use std::sync::Arc;
use std::time::Duration;

use quinn::VarInt;
use quinn::congestion::{BbrConfig, CubicConfig, NewRenoConfig};

use crate::congestion::Congestion;
use crate::congestion::adaptive::Hints;
use crate::congestion::quic::{AdaptiveFactory, GatedFactory};
use crate::congestion::steering::Steering;
use crate::frame::MAX_MESSAGE;

/// Rate and round trip that windows are made for where neither is known.
const UNKNOWN_BANDWIDTH: u64 = 125_000_000;
const UNKNOWN_RTT: Duration = Duration::from_millis(300);
/// Bounds of a bulk window, in bytes.
const WINDOW: std::ops::RangeInclusive<u64> = (8 << 20)..=(192 << 20);
/// What one stream may hold unread: a batch, or messages on the control lane.
const STREAM_WINDOW: u32 = 2 << 20;
/// Streams of the peer at once; more than all lanes of a sender use together.
pub(crate) const MAX_STREAMS: u32 = 4096;
/// Room in the connection's windows beside the lanes': control stream, messages, streams' ends.
pub(crate) const WINDOW_RESERVE: u64 = 16 << 20;
/// A packet is lost when one was acknowledged that was sent so many later, or so many round trips after it
/// was sent. RFC 9002's three take a path that reorders by less than a millisecond at 200 Mbit/s for one
/// that loses most of its packets; at that rate these cost 4 ms in finding a loss.
const REORDERED: u32 = 64;
const LATE: f32 = 1.125;
/// Bytes of datagrams that QUIC holds until they are read.
const DATAGRAMS_RECEIVED: usize = 4 << 20;
/// Bytes of datagrams that QUIC holds until they are sent. Few: the lane keeps the rest, and looks for
/// room, because QUIC drops the oldest where there is none.
const DATAGRAMS_SENT: usize = 64 << 10;
/// UDP payload of a 1500-byte path less IPv6 and UDP headers.
const FULL_MTU: u16 = 1452;

/// How connections behave.
#[derive(Clone, Debug)]
pub struct TransportConfig {
    /// Who decides how much is in flight.
    pub congestion: Congestion,
    /// Rate of the link in bytes/s, where it is known: a start for the congestion control and a
    /// size for the windows. Not a cap.
    pub bandwidth_hint: Option<u64>,
    /// Round-trip time, where it is known.
    pub rtt_hint: Option<Duration>,
    /// Bytes/s that are never exceeded, averaged over a round trip or 50 ms; can be changed while an
    /// endpoint is in use ([`crate::Endpoint::set_rate_limit`]).
    pub rate_limit: Option<u64>,
    /// Silence after which the link counts as lost.
    pub idle_timeout: Duration,
    /// Time in which a connection must be up and authorised.
    pub connect_timeout: Duration,
    /// Whether demand paging uses datagrams with redundancy. Without, or with a peer that has none,
    /// it uses streams.
    pub datagrams: bool,
}

impl Default for TransportConfig {
    fn default() -> Self {
        Self {
            congestion: Congestion::Adaptive,
            bandwidth_hint: None,
            rtt_hint: None,
            rate_limit: None,
            idle_timeout: Duration::from_secs(600),
            connect_timeout: Duration::from_secs(15),
            datagrams: true,
        }
    }
}

/// Bytes that may be under way on each lane, unread by the receiver's application.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct LaneWindows {
    pub(crate) urgent: u64,
    pub(crate) freeze: u64,
    pub(crate) bulk: u64,
}

impl LaneWindows {
    pub(crate) fn total(self) -> u64 {
        self.urgent
            .saturating_add(self.freeze)
            .saturating_add(self.bulk)
    }
}

impl TransportConfig {
    /// The windows of the lanes: four bandwidth-delay products. One is in flight, one is the
    /// credit on its way back, the rest is what waits for a lost packet to come again.
    pub(crate) fn lane_windows(&self) -> LaneWindows {
        let bandwidth = self.bandwidth_hint.unwrap_or(UNKNOWN_BANDWIDTH);
        let rtt = self
            .rtt_hint
            .unwrap_or(UNKNOWN_RTT)
            .max(Duration::from_millis(1));
        let product = bandwidth as f64 * rtt.as_secs_f64();
        let bulk = ((4.0 * product) as u64).clamp(*WINDOW.start(), *WINDOW.end());
        LaneWindows {
            urgent: (bulk / 4).max(4 << 20),
            freeze: bulk,
            bulk,
        }
    }

    pub(crate) fn quinn(&self, steering: &Arc<Steering>) -> Arc<quinn::TransportConfig> {
        let mut config = quinn::TransportConfig::default();
        let receive = self.lane_windows().total() + WINDOW_RESERVE;
        config
            .max_concurrent_bidi_streams(VarInt::from_u32(1))
            .max_concurrent_uni_streams(VarInt::from_u32(MAX_STREAMS))
            .stream_receive_window(VarInt::from_u32(STREAM_WINDOW))
            .receive_window(clamped(receive))
            // Until the peer has said how large its lanes are.
            .send_window(receive)
            .send_fairness(false)
            // More than one wake-up of the process brings; what is lost here is repaired like any loss.
            .datagram_receive_buffer_size(self.datagrams.then_some(DATAGRAMS_RECEIVED))
            .datagram_send_buffer_size(DATAGRAMS_SENT)
            .max_idle_timeout(Some(idle(self.idle_timeout)))
            .keep_alive_interval(Some(
                (self.idle_timeout / 4).clamp(Duration::from_millis(200), Duration::from_secs(5)),
            ))
            // Where the path is narrower, probes after a timeout go out at 1200 bytes, and after
            // a few lost full packets the detector of black holes falls back and searches anew.
            .initial_mtu(FULL_MTU)
            .mtu_discovery_config(Some(mtu_discovery()))
            .ack_frequency_config(Some(ack_frequency()))
            .packet_threshold(REORDERED)
            .time_threshold(LATE)
            .congestion_controller_factory(Arc::new(GatedFactory(self.factory(steering))));
        if let Some(rtt) = self.rtt_hint {
            // RFC 9002's timers start at three times this; half again covers a hint a bit low.
            config.initial_rtt((rtt * 3 / 2).max(Duration::from_millis(20)));
        }
        Arc::new(config)
    }

    fn factory(
        &self,
        steering: &Arc<Steering>,
    ) -> Arc<dyn quinn::congestion::ControllerFactory + Send + Sync> {
        // Loss-based controllers need a first window too; a hint replaces the default of ten
        // packets.
        let initial = self
            .bandwidth_hint
            .zip(self.rtt_hint)
            .map(|(rate, rtt)| ((rate as f64 * rtt.as_secs_f64() / 2.0) as u64).max(14_520));
        match self.congestion {
            Congestion::Adaptive => Arc::new(AdaptiveFactory {
                hints: Hints {
                    bandwidth: self.bandwidth_hint.map(|rate| rate as f64),
                    rtt: self.rtt_hint.map(|rtt| rtt.as_secs_f64()),
                    rate_limit: None,
                },
                steering: steering.clone(),
            }),
            Congestion::Cubic => {
                let mut config = CubicConfig::default();
                initial.map(|window| config.initial_window(window));
                Arc::new(config)
            }
            Congestion::NewReno => {
                let mut config = NewRenoConfig::default();
                initial.map(|window| config.initial_window(window));
                Arc::new(config)
            }
            Congestion::Bbr => {
                let mut config = BbrConfig::default();
                initial.map(|window| config.initial_window(window));
                Arc::new(config)
            }
        }
    }
}

fn mtu_discovery() -> quinn::MtuDiscoveryConfig {
    let mut config = quinn::MtuDiscoveryConfig::default();
    config.upper_bound(FULL_MTU);
    config
}

/// Fewer acknowledgements: they cost the sender's CPU a third of its time otherwise.
fn ack_frequency() -> quinn::AckFrequencyConfig {
    let mut config = quinn::AckFrequencyConfig::default();
    config
        .ack_eliciting_threshold(VarInt::from_u32(10))
        .max_ack_delay(Some(Duration::from_millis(5)));
    config
}

fn idle(timeout: Duration) -> quinn::IdleTimeout {
    // QUIC counts idle time in milliseconds with 62 bits.
    timeout.try_into().unwrap_or_else(|_| VarInt::MAX.into())
}

fn clamped(value: u64) -> VarInt {
    VarInt::from_u64(value).unwrap_or(VarInt::MAX)
}

const _: () = assert!(MAX_MESSAGE < STREAM_WINDOW as usize);
