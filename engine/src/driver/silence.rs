//! How long nothing has been heard of the other side, by what its packets bring. It says so, and
//! ends nothing: that is for the link's own timeout and the session's patience.

use std::time::{Duration, Instant};

/// Looks at a link's counter of received bytes now and then.
#[derive(Debug)]
pub(super) struct Silence {
    received: u64,
    since: Instant,
    longest: Duration,
}

impl Silence {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            received: 0,
            since: now,
            longest: Duration::ZERO,
        }
    }

    /// Takes a look, where there is a link; how long it has been silent. A new link begins to count
    /// anew, which is a change as well.
    pub(super) fn look(&mut self, now: Instant, received: Option<u64>) -> Duration {
        let silent = now.saturating_duration_since(self.since);
        self.longest = self.longest.max(silent);
        match received {
            Some(received) if received != self.received => {
                self.received = received;
                self.since = now;
                Duration::ZERO
            }
            _ => silent,
        }
    }

    /// The longest silence so far.
    pub(super) fn longest(&self) -> Duration {
        self.longest
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn silence_ends_with_any_packet_and_outlasts_a_link() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut silence = Silence::new(start);
        assert_eq!(silence.look(at(1), Some(100)), Duration::ZERO);
        assert_eq!(silence.look(at(4), Some(100)), Duration::from_secs(3));
        assert_eq!(silence.look(at(9), None), Duration::from_secs(8));
        // Another link, which has received less.
        assert_eq!(silence.look(at(10), Some(40)), Duration::ZERO);
        assert_eq!(silence.look(at(11), Some(90)), Duration::ZERO);
        assert_eq!(silence.longest(), Duration::from_secs(9));
    }
}
