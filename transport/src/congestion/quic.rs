//! The seam between congestion control and quinn: instants to durations, callbacks to inputs. No
//! control happens here, except that a connection that closes is let through.

use std::any::Any;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use quinn::congestion::{Controller, ControllerFactory, ControllerMetrics};
use quinn_proto::RttEstimator;

use super::adaptive::{Adaptive, Hints};
use super::steering::Steering;

/// A guest counts as waiting for this many of the smallest round trip, and this long, after the last sign.
const HOLD: (f64, Duration) = (2.0, Duration::from_millis(100));

/// Builds an [`Adaptive`] for every path.
#[derive(Debug)]
pub(crate) struct AdaptiveFactory {
    pub(crate) hints: Hints,
    pub(crate) steering: Arc<Steering>,
}

impl ControllerFactory for AdaptiveFactory {
    fn build(self: Arc<Self>, now: Instant, current_mtu: u16) -> Box<dyn Controller> {
        let hints = Hints {
            rate_limit: self.steering.rate_limit().map(|limit| limit as f64),
            ..self.hints
        };
        let core = Adaptive::new(hints, current_mtu);
        Box::new(AdaptiveController {
            steering: self.steering.clone(),
            origin: now,
            initial_window: core.window(),
            core,
        })
    }
}

/// [`Adaptive`] as a controller of quinn.
#[derive(Clone, Debug)]
struct AdaptiveController {
    origin: Instant,
    initial_window: u64,
    core: Adaptive,
    steering: Arc<Steering>,
}

impl AdaptiveController {
    fn follow_steering(&mut self, now: Instant) {
        let limit = self.steering.rate_limit();
        self.core.set_rate_limit(limit.map(|limit| limit as f64));
        let round_trips = Duration::from_secs_f64(HOLD.0 * self.core.min_rtt().unwrap_or(0.0));
        let since = self.steering.since_urgent(now);
        self.core
            .hold(since.is_some_and(|since| since < round_trips + HOLD.1));
    }
}

impl Controller for AdaptiveController {
    fn on_sent(&mut self, now: Instant, bytes: u64, _last_packet_number: u64) {
        self.core
            .on_sent(now.saturating_duration_since(self.origin), bytes);
    }

    fn on_ack(
        &mut self,
        now: Instant,
        sent: Instant,
        bytes: u64,
        app_limited: bool,
        _rtt: &RttEstimator,
    ) {
        // The estimator passed in has not seen this packet yet; its own times have.
        self.core.on_ack(
            now.saturating_duration_since(self.origin),
            sent.saturating_duration_since(self.origin),
            bytes,
            app_limited,
        );
    }

    fn on_end_acks(
        &mut self,
        now: Instant,
        in_flight: u64,
        _app_limited: bool,
        _largest_packet_num_acked: Option<u64>,
    ) {
        self.follow_steering(now);
        self.core
            .on_acks_done(now.saturating_duration_since(self.origin), in_flight);
    }

    fn on_congestion_event(
        &mut self,
        _now: Instant,
        _sent: Instant,
        _is_persistent_congestion: bool,
        lost_bytes: u64,
    ) {
        self.core.on_loss(lost_bytes);
        self.steering.set_loss_burst(self.core.burst());
    }

    fn on_mtu_update(&mut self, new_mtu: u16) {
        self.core.on_mtu(new_mtu);
    }

    fn window(&self) -> u64 {
        self.core.window()
    }

    fn clone_box(&self) -> Box<dyn Controller> {
        Box::new(self.clone())
    }

    fn initial_window(&self) -> u64 {
        self.initial_window
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any> {
        self
    }
}

/// Window of a connection that closes, in bytes: large enough that quinn neither waits for
/// acknowledgements nor paces (it gives up pacing above 32 bits).
const OPEN: u64 = 1 << 33;

/// Builds what another factory builds, wrapped in a [`Gated`].
pub(crate) struct GatedFactory(pub(crate) Arc<dyn ControllerFactory + Send + Sync>);

impl ControllerFactory for GatedFactory {
    fn build(self: Arc<Self>, now: Instant, current_mtu: u16) -> Box<dyn Controller> {
        Box::new(Gated {
            inner: self.0.clone().build(now, current_mtu),
            closing: Arc::default(),
        })
    }
}

/// A controller whose gate can be opened for good.
///
/// quinn holds back even the packet that closes a connection while the window is full and data
/// waits; acknowledgements no longer count by then, so that on a busy link the peer would never
/// learn that, and why, the link was closed.
struct Gated {
    inner: Box<dyn Controller>,
    closing: Arc<AtomicBool>,
}

/// Lets everything through from now on. To be called right before a connection is closed.
pub(crate) fn open_gate(connection: &quinn::Connection) {
    if let Ok(gated) = connection.congestion_state().into_any().downcast::<Gated>() {
        gated.closing.store(true, Ordering::Relaxed);
    }
}

/// The connection's own adaptive controller as it is now, if that is the one in use.
pub(crate) fn adaptive_of(connection: &quinn::Connection) -> Option<Adaptive> {
    let gated = connection.congestion_state().into_any().downcast::<Gated>();
    let inner = gated.ok()?.inner.into_any();
    Some(inner.downcast::<AdaptiveController>().ok()?.core)
}

impl Controller for Gated {
    fn on_sent(&mut self, now: Instant, bytes: u64, last_packet_number: u64) {
        self.inner.on_sent(now, bytes, last_packet_number);
    }

    fn on_ack(
        &mut self,
        now: Instant,
        sent: Instant,
        bytes: u64,
        app_limited: bool,
        rtt: &RttEstimator,
    ) {
        self.inner.on_ack(now, sent, bytes, app_limited, rtt);
    }

    fn on_end_acks(
        &mut self,
        now: Instant,
        in_flight: u64,
        app_limited: bool,
        largest_packet_num_acked: Option<u64>,
    ) {
        self.inner
            .on_end_acks(now, in_flight, app_limited, largest_packet_num_acked);
    }

    fn on_congestion_event(
        &mut self,
        now: Instant,
        sent: Instant,
        is_persistent_congestion: bool,
        lost_bytes: u64,
    ) {
        self.inner
            .on_congestion_event(now, sent, is_persistent_congestion, lost_bytes);
    }

    fn on_mtu_update(&mut self, new_mtu: u16) {
        self.inner.on_mtu_update(new_mtu);
    }

    fn window(&self) -> u64 {
        if self.closing.load(Ordering::Relaxed) {
            OPEN
        } else {
            self.inner.window()
        }
    }

    fn metrics(&self) -> ControllerMetrics {
        self.inner.metrics()
    }

    fn clone_box(&self) -> Box<dyn Controller> {
        Box::new(Self {
            inner: self.inner.clone_box(),
            closing: self.closing.clone(),
        })
    }

    fn initial_window(&self) -> u64 {
        self.inner.initial_window()
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any> {
        self
    }
}
