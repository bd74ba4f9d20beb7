//! What was sent when, and what had been delivered and was in flight by then: turns an acknowledgement into
//! a sample of the path. Decides nothing.

use std::collections::VecDeque;
use std::time::Duration;

/// Records of what was sent when; bounds memory at a few hundred thousand packets in flight.
const MAX_RECORDS: usize = 1 << 18;
/// Acknowledgements come at least this often while data flows.
const ACK_GAP: Duration = Duration::from_millis(10);
/// Records that are kept behind the newest acknowledged one, for packets that arrive out of order.
const REORDERED: usize = 256;

/// The state at the time at which packets were sent.
#[derive(Clone, Copy, Debug)]
struct Record {
    at: Duration,
    delivered: u64,
    delivered_at: Duration,
    flight: u64,
    window: f64,
}

/// What an acknowledgement tells.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sample {
    /// Seconds from sending to the acknowledgement.
    pub(super) rtt: f64,
    /// Bytes in flight right after sending.
    pub(super) flight: f64,
    /// The window then.
    pub(super) window: f64,
    /// Bytes that had been delivered when it was sent.
    pub(super) delivered_before: u64,
    /// Bytes/s delivered since.
    pub(super) rate: f64,
    /// Seconds over which that was.
    pub(super) span: f64,
}

/// See the module's text.
#[derive(Clone, Debug, Default)]
pub(super) struct History {
    records: VecDeque<Record>,
    /// Bytes acknowledged so far, and when the last were.
    delivered: u64,
    delivered_at: Duration,
    flight: u64,
}

impl History {
    /// Bytes acknowledged since the beginning.
    pub(super) fn delivered(&self) -> u64 {
        self.delivered
    }

    /// A packet of `bytes` was sent under a window of `window` bytes.
    pub(super) fn sent(&mut self, now: Duration, bytes: u64, window: f64) {
        self.flight += bytes;
        if let Some(last) = self.records.back_mut()
            && last.at >= now
        {
            last.flight = self.flight;
            return;
        }
        if self.records.len() == MAX_RECORDS {
            self.records.pop_front();
        }
        self.records.push_back(Record {
            at: now,
            delivered: self.delivered,
            delivered_at: self.delivered_at,
            flight: self.flight,
            window,
        });
    }

    /// `bytes` that were sent at `sent` have been acknowledged. `None` if that is long forgotten.
    pub(super) fn acknowledged(
        &mut self,
        now: Duration,
        sent: Duration,
        bytes: u64,
    ) -> Option<Sample> {
        self.delivered += bytes;
        self.delivered_at = now;
        self.flight = self.flight.saturating_sub(bytes);
        let index = self.records.partition_point(|record| record.at <= sent);
        let record = *self.records.get(index.checked_sub(1)?)?;
        self.records.drain(..index.saturating_sub(REORDERED));
        // From the acknowledgement before the packet was sent: a burst of acknowledgements must not look
        // like a fast link. After a pause that acknowledgement is long past and says nothing.
        let gap = record.at.saturating_sub(record.delivered_at).min(ACK_GAP);
        let start = record.at.saturating_sub(gap);
        let span = now.saturating_sub(start).as_secs_f64().max(1e-6);
        Some(Sample {
            rtt: now.saturating_sub(sent).as_secs_f64().max(1e-6),
            flight: record.flight as f64,
            window: record.window,
            delivered_before: record.delivered,
            rate: (self.delivered - record.delivered) as f64 / span,
            span,
        })
    }

    /// `bytes` were lost.
    pub(super) fn lost(&mut self, bytes: u64) {
        self.flight = self.flight.saturating_sub(bytes);
    }

    /// What is in flight by a better count.
    pub(super) fn set_flight(&mut self, bytes: u64) {
        self.flight = bytes;
    }
}

/// The rate of a link that has just become full is that of the acknowledgements of this share of a round
/// trip, at least two [`ACK_GAP`]s: over a whole one the slower beginning would count as well.
const SHORT: f64 = 0.25;

/// What was delivered by when, over the last [`SHORT`] of a round trip.
#[derive(Clone, Debug, Default)]
pub(super) struct Lately {
    marks: VecDeque<(Duration, u64)>,
    span: Duration,
}

impl Lately {
    /// By `now`, `delivered` bytes have been delivered since the beginning; `rtt` is the smallest round trip
    /// in seconds, or infinite.
    pub(super) fn note(&mut self, now: Duration, delivered: u64, rtt: f64) {
        let rtt = if rtt.is_finite() { rtt } else { 0.0 };
        self.span = Duration::from_secs_f64(SHORT * rtt).max(2 * ACK_GAP);
        if self.marks.back().is_none_or(|(at, _)| *at < now) {
            self.marks.push_back((now, delivered));
        }
        // One mark that is old enough stays.
        let old = |(at, _): &(Duration, u64)| now.saturating_sub(*at) >= self.span;
        while self.marks.get(1).is_some_and(old) {
            self.marks.pop_front();
        }
    }

    /// Whether that much time is known about.
    pub(super) fn is_full(&self, now: Duration) -> bool {
        let first = self.marks.front();
        first.is_some_and(|(at, _)| now.saturating_sub(*at) >= self.span)
    }

    /// Bytes/s.
    pub(super) fn rate(&self, now: Duration, delivered: u64) -> Option<f64> {
        let (at, before) = self.marks.front()?;
        let elapsed = now.saturating_sub(*at).as_secs_f64().max(1e-6);
        Some((delivered - before) as f64 / elapsed)
    }

    /// Forgets what was.
    pub(super) fn clear(&mut self) {
        self.marks.clear();
    }
}
