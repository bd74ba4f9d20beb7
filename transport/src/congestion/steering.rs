//! What a congestion controller and those around it tell each other while it works: QUIC owns the controller
//! and lends it to nobody, so that both look here.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Shared between an endpoint, its links and their controllers.
#[derive(Debug)]
pub struct Steering {
    origin: Instant,
    /// Bytes/s; 0 for none.
    rate_limit: AtomicU64,
    /// Microseconds from `origin` to the last sign of a guest that waits, and 1; 0 for never.
    urgent: AtomicU64,
    /// Packets that are lost together, times 256; 0 while nobody knows. Told by the controller.
    burst: AtomicU64,
}

impl Steering {
    /// With a hard cap in bytes/s, or none.
    pub fn new(rate_limit: Option<u64>) -> Self {
        Self {
            origin: Instant::now(),
            rate_limit: AtomicU64::new(rate_limit.unwrap_or(0)),
            urgent: AtomicU64::new(0),
            burst: AtomicU64::new(0),
        }
    }

    /// The hard cap in bytes/s, if there is one.
    pub fn rate_limit(&self) -> Option<u64> {
        match self.rate_limit.load(Ordering::Relaxed) {
            0 => None,
            limit => Some(limit),
        }
    }

    /// Another hard cap, or none. It counts from the next acknowledgement on.
    pub fn set_rate_limit(&self, limit: Option<u64>) {
        // A cap of nothing would be no cap.
        let limit = limit.map_or(0, |limit| limit.max(1));
        self.rate_limit.store(limit, Ordering::Relaxed);
    }

    /// Packets that are lost together, on average, if the controller knows.
    pub fn loss_burst(&self) -> Option<f64> {
        let burst = self.burst.load(Ordering::Relaxed);
        (burst > 0).then_some(burst as f64 / 256.0)
    }

    /// The controller says that so many packets are lost together, on average.
    pub fn set_loss_burst(&self, packets: f64) {
        self.burst
            .store((packets * 256.0) as u64, Ordering::Relaxed);
    }

    /// Something that a guest waits for is being sent, or was asked for.
    pub fn touch(&self) {
        let now = self.origin.elapsed().as_micros() as u64 + 1;
        self.urgent.fetch_max(now, Ordering::Relaxed);
    }

    /// Time since then, if there was any.
    pub fn since_urgent(&self, now: Instant) -> Option<Duration> {
        let at = self.urgent.load(Ordering::Relaxed).checked_sub(1)?;
        let urgent = self.origin + Duration::from_micros(at);
        Some(now.saturating_duration_since(urgent))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tells_what_was_told() {
        let steering = Steering::new(Some(5));
        assert_eq!(steering.rate_limit(), Some(5));
        steering.set_rate_limit(None);
        assert_eq!(steering.rate_limit(), None);
        steering.set_rate_limit(Some(0));
        assert_eq!(steering.rate_limit(), Some(1));
        let now = Instant::now();
        assert_eq!(steering.since_urgent(now), None);
        steering.touch();
        assert!(steering.since_urgent(now).is_some());
        let later = Instant::now() + Duration::from_secs(5);
        assert!(steering.since_urgent(later).unwrap() >= Duration::from_secs(4));
        assert_eq!(steering.loss_burst(), None);
        steering.set_loss_burst(1.5);
        assert_eq!(steering.loss_burst(), Some(1.5));
    }
}
