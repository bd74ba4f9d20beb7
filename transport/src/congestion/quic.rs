//! The seam between [`Adaptive`] and quinn: instants to durations, callbacks to inputs. No control
//! happens here.

use std::any::Any;
use std::sync::Arc;
use std::time::Instant;

use quinn::congestion::{Controller, ControllerFactory};
use quinn_proto::RttEstimator;

use super::adaptive::{Adaptive, Hints};

/// Builds an [`Adaptive`] for every path.
#[derive(Debug)]
pub(crate) struct AdaptiveFactory(pub(crate) Hints);

impl ControllerFactory for AdaptiveFactory {
    fn build(self: Arc<Self>, now: Instant, current_mtu: u16) -> Box<dyn Controller> {
        let core = Adaptive::new(self.0, current_mtu);
        Box::new(AdaptiveController {
            origin: now,
            initial_window: core.window(),
            core,
        })
    }
}

/// [`Adaptive`] as a controller of quinn.
#[derive(Clone, Debug)]
pub(crate) struct AdaptiveController {
    origin: Instant,
    initial_window: u64,
    pub(crate) core: Adaptive,
}

impl Controller for AdaptiveController {
    fn on_sent(&mut self, now: Instant, _bytes: u64, _last_packet_number: u64) {
        self.core
            .on_sent(now.saturating_duration_since(self.origin));
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
        _now: Instant,
        _in_flight: u64,
        _app_limited: bool,
        _largest_packet_num_acked: Option<u64>,
    ) {
        self.core.on_acks_done();
    }

    fn on_congestion_event(
        &mut self,
        _now: Instant,
        _sent: Instant,
        _is_persistent_congestion: bool,
        lost_bytes: u64,
    ) {
        self.core.on_loss(lost_bytes);
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
