//! How fast blocks arrive: the estimates behind the freeze decision, the bound on what is in
//! flight, and the ETA. It only estimates; what to do with a figure is decided elsewhere.

use std::time::Duration;

use hybridmig_transport::link::repair::plan::share;

use super::io::LinkFigures;

/// Assumed before anything was measured, in bytes/s.
const ASSUMED_BANDWIDTH: f64 = 10e6;
/// Assumed before anything was measured: a page and its header, uncompressed.
const ASSUMED_PAGE: f64 = 4112.0;
/// Shortest interval that makes a sample.
const SAMPLE: Duration = Duration::from_millis(100);
/// Weight of a new sample in the smoothed rate.
const RATE_WEIGHT: f64 = 0.3;
/// Seconds after which a sample weighs a third of a new one in the mean.
const FADING: f64 = 10.0;
/// Seconds of samples that the transport's estimate weighs as much as.
const TRUSTED: f64 = 0.5;
/// Of what the transport takes the link to carry, what batches get: the rest are headers and acknowledgements.
const GOODPUT: f64 = 0.95;
/// Weight of a chunk in the smoothed size of a page, per 64 pages.
const PAGE_WEIGHT: f64 = 0.05;

/// Smoothed figures of a session.
#[derive(Debug)]
pub(crate) struct Estimator {
    link: LinkFigures,
    /// See [`Self::parity`].
    parity: f64,
    rate: Option<f64>,
    /// What the samples of the rate come to, older ones fading: bytes and seconds.
    carried: (f64, f64),
    /// Of memory, and of disks.
    bytes_per_page: [f64; 2],
    /// Of memory and of disks: sent in full, and sent again as a difference to what was sent before. Assumed until
    /// something was sent.
    full: [Option<f64>; 2],
    sampled: [Option<f64>; 2],
    again: [Option<f64>; 2],
    window: Option<Window>,
}

#[derive(Debug)]
struct Window {
    since: Duration,
    bytes: u64,
}

impl Estimator {
    pub(crate) fn new() -> Self {
        Self {
            link: LinkFigures::default(),
            parity: share(0.0, 1.0),
            rate: None,
            carried: (0.0, 0.0),
            bytes_per_page: [ASSUMED_PAGE; 2],
            full: [None; 2],
            sampled: [None; 2],
            again: [None; 2],
            window: None,
        }
    }

    pub(crate) fn link(&mut self, figures: LinkFigures) {
        let of = |figures: &LinkFigures| (figures.loss, figures.loss_burst);
        if of(&figures) != of(&self.link) {
            self.parity = share(figures.loss, figures.loss_burst);
        }
        self.link = figures;
    }

    /// What parity adds to the bytes of a freeze, as a share.
    pub(crate) fn parity(&self) -> f64 {
        self.parity
    }

    pub(crate) fn link_figures(&self) -> LinkFigures {
        self.link
    }

    /// A chunk of `pages` pages, of a disk or of memory, took `bytes` on the wire.
    pub(crate) fn sent(&mut self, disk: bool, pages: u64, bytes: u64) {
        if pages == 0 {
            return;
        }
        let weight = (PAGE_WEIGHT * pages as f64 / 64.0).clamp(0.001, 0.2);
        let sample = bytes as f64 / pages as f64;
        let smoothed = &mut self.bytes_per_page[usize::from(disk)];
        *smoothed += weight * (sample - *smoothed);
    }

    /// The same, by whether the destination had an older version of the pages.
    pub(crate) fn sized(&mut self, disk: bool, again: bool, pages: u64, bytes: u64) {
        if pages == 0 {
            return;
        }
        let weight = (PAGE_WEIGHT * pages as f64 / 64.0).clamp(0.001, 0.2);
        let sample = bytes as f64 / pages as f64;
        let of = if again {
            &mut self.again
        } else {
            &mut self.full
        };
        let smoothed = &mut of[usize::from(disk)];
        *smoothed = Some(smoothed.map_or(sample, |size| size + weight * (sample - size)));
    }

    /// What the contents of a sample take in batches. It is of all of the guest, and so better than what the first
    /// chunks have shown.
    pub(crate) fn assume(&mut self, disk: bool, bytes: f64) {
        if bytes.is_finite() {
            self.sampled[usize::from(disk)] = Some(bytes.max(1.0));
        }
    }

    /// Bytes of a page that goes in full.
    pub(crate) fn full_page(&self, disk: bool) -> f64 {
        let known = self.sampled[usize::from(disk)].or(self.full[usize::from(disk)]);
        known.unwrap_or(ASSUMED_PAGE).max(1.0)
    }

    /// Bytes of a page of which the destination has an older version. Until some were sent, as those that went in
    /// full did: what a difference saves is not to be counted on before it was seen.
    pub(crate) fn page_again(&self, disk: bool) -> f64 {
        let disk = usize::from(disk);
        let known = self.again[disk].or(self.full[disk]);
        known.unwrap_or_else(|| self.full_page(disk == 1)).max(1.0)
    }

    /// `bytes` were acknowledged as applied. A sample spans only time in which something was in
    /// flight throughout, from acknowledgement to acknowledgement: an idle sender says nothing about
    /// the link.
    pub(crate) fn applied(&mut self, now: Duration, bytes: u64, more_in_flight: bool) {
        match &mut self.window {
            None => {}
            Some(window) => {
                window.bytes += bytes;
                let elapsed = now.saturating_sub(window.since);
                if elapsed >= SAMPLE.max(self.link.min_rtt) {
                    let sample = window.bytes as f64 / elapsed.as_secs_f64();
                    self.rate = Some(match self.rate {
                        None => sample,
                        Some(rate) => rate + RATE_WEIGHT * (sample - rate),
                    });
                    let fading = (-elapsed.as_secs_f64() / FADING).exp();
                    self.carried.0 = fading * self.carried.0 + window.bytes as f64;
                    self.carried.1 = fading * self.carried.1 + elapsed.as_secs_f64();
                    self.window = None;
                }
            }
        }
        if !more_in_flight {
            self.window = None;
        } else if self.window.is_none() {
            self.window = Some(Window {
                since: now,
                bytes: 0,
            });
        }
    }

    /// The link was lost: a sample must not span the gap.
    pub(crate) fn interrupted(&mut self) {
        self.window = None;
    }

    /// Bytes per second that arrive and are applied: measured, else the transport's estimate.
    pub(crate) fn bandwidth(&self) -> f64 {
        match self.rate {
            Some(rate) if rate > 0.0 => rate,
            _ if self.link.bandwidth > 0.0 => self.link.bandwidth,
            _ => ASSUMED_BANDWIDTH,
        }
    }

    /// What the link will carry over seconds to come, in bytes per second of batches: the mean of what it carried
    /// lately, and where that was little, the transport's estimate.
    pub(crate) fn steady(&self) -> f64 {
        let (bytes, seconds) = self.carried;
        if self.link.bandwidth <= 0.0 {
            return if seconds > 0.0 {
                bytes / seconds
            } else {
                ASSUMED_BANDWIDTH
            };
        }
        (bytes + GOODPUT * self.link.bandwidth * TRUSTED) / (seconds + TRUSTED)
    }

    /// Seconds of sending that [`Self::steady`] is the mean of.
    pub(crate) fn measured_for(&self) -> f64 {
        self.carried.1
    }

    /// The most that the link may carry: what the bound on bytes in flight is made from, so that a
    /// bound that was too small does not confirm itself.
    pub(crate) fn ceiling(&self) -> f64 {
        self.rate.unwrap_or(0.0).max(self.link.bandwidth)
    }

    pub(crate) fn bytes_per_page(&self, disk: bool) -> f64 {
        self.bytes_per_page[usize::from(disk)].max(1.0)
    }

    /// Pages of memory per second that arrive.
    pub(crate) fn pages_per_second(&self) -> f64 {
        self.bandwidth() / self.bytes_per_page(false)
    }

    /// How long so many pages of memory and of disks take, in seconds.
    pub(crate) fn seconds(&self, memory: u64, disks: u64) -> f64 {
        let bytes =
            memory as f64 * self.bytes_per_page(false) + disks as f64 * self.bytes_per_page(true);
        bytes / self.bandwidth()
    }

    pub(crate) fn rtt(&self) -> Duration {
        self.link.rtt
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_steady_stream_of_acknowledgements_gives_its_rate() {
        let mut estimator = Estimator::new();
        for tick in 0..1000u64 {
            estimator.applied(Duration::from_millis(10 * tick), 50_000, true);
        }
        let rate = estimator.bandwidth();
        assert!((4.5e6..5.5e6).contains(&rate), "{rate}");
    }

    #[test]
    fn idle_time_says_nothing_about_the_link() {
        let mut estimator = Estimator::new();
        for burst in 0..50u64 {
            let start = 10_000 * burst;
            for tick in 0..30u64 {
                let now = Duration::from_millis(start + 10 * tick);
                estimator.applied(now, 50_000, tick != 29);
            }
        }
        let rate = estimator.bandwidth();
        assert!((4.5e6..5.5e6).contains(&rate), "{rate}");
    }

    #[test]
    fn the_transport_is_believed_until_something_was_measured() {
        let mut estimator = Estimator::new();
        assert!((estimator.bandwidth() - ASSUMED_BANDWIDTH).abs() < 1.0);
        estimator.link(LinkFigures {
            bandwidth: 25e6,
            ..LinkFigures::default()
        });
        assert!((estimator.bandwidth() - 25e6).abs() < 1.0);
    }

    #[test]
    fn what_is_steady_outlives_a_lucky_sample() {
        let mut estimator = Estimator::new();
        assert!((estimator.steady() - ASSUMED_BANDWIDTH).abs() < 1.0);
        estimator.link(LinkFigures {
            bandwidth: 2e6,
            ..LinkFigures::default()
        });
        let told = estimator.steady();
        assert!((told - GOODPUT * 2e6).abs() < 1.0, "{told}");
        for tick in 0..500u64 {
            estimator.applied(Duration::from_millis(10 * tick), 10_000, true);
        }
        let before = estimator.steady();
        assert!((0.9e6..1.15e6).contains(&before), "{before}");
        // A burst of what had waited at the destination.
        for tick in 500..512u64 {
            estimator.applied(Duration::from_millis(10 * tick), 50_000, true);
        }
        assert!(estimator.bandwidth() > 1.5 * before);
        assert!(estimator.steady() < 1.2 * before);
        assert!(estimator.measured_for() > 4.0);
    }

    #[test]
    fn bursts_of_loss_take_more_parity() {
        let mut estimator = Estimator::new();
        let mut parity = |loss, loss_burst| {
            estimator.link(LinkFigures {
                loss,
                loss_burst,
                ..LinkFigures::default()
            });
            estimator.parity()
        };
        assert!(parity(0.0, 0.0) < 0.03);
        assert!(parity(0.02, 2.5) > 2.0 * parity(0.02, 1.0));
    }

    #[test]
    fn a_difference_saves_nothing_until_it_was_seen_to() {
        let mut estimator = Estimator::new();
        estimator.sized(false, false, 64, 64 * 3000);
        estimator.assume(false, 2000.0);
        assert!((estimator.page_again(false) - 3000.0).abs() < 1.0);
        estimator.sized(false, true, 64, 64 * 500);
        assert!((estimator.page_again(false) - 500.0).abs() < 1.0);
    }

    #[test]
    fn the_size_of_a_page_follows_what_was_sent() {
        let mut estimator = Estimator::new();
        for _ in 0..500 {
            estimator.sent(false, 64, 64 * 1000);
            estimator.sent(true, 64, 64 * 10);
        }
        assert!((estimator.bytes_per_page(false) - 1000.0).abs() < 20.0);
        assert!((estimator.bytes_per_page(true) - 10.0).abs() < 1.0);
    }
}
