//! Between the pager's words and the engine's: faults, errors, blocked time, samples. Shared by all guests
//! whose memory is paged by userfaultfd.

use std::sync::Arc;

use hybridmig_pager::{FaultStats, PagerError, Tracker};

use super::{BlockedTime, FaultAnswer, FaultSink, GuestError};
use crate::blocks::RegionId;
use crate::profile::AccessSample;

/// Tells the engine of the pager's faults.
pub struct PagerSink(pub Arc<dyn FaultSink>);

impl hybridmig_pager::FaultSink for PagerSink {
    fn fault(&self, region: u16, block: u32) -> hybridmig_pager::FaultAnswer {
        match self.0.fault(RegionId(region), block) {
            FaultAnswer::Requested => hybridmig_pager::FaultAnswer::Requested,
            FaultAnswer::Zero => hybridmig_pager::FaultAnswer::Zero,
        }
    }

    fn removed(&self, region: u16, first: u32, count: u32) {
        self.0.removed(RegionId(region), first, count);
    }

    fn failed(&self, error: PagerError) {
        self.0.failed(error.into());
    }
}

/// What the tracker's sample of accesses has shown.
pub fn sampled(tracker: &Tracker) -> Vec<AccessSample> {
    let named = tracker.sample_accesses().into_iter();
    named
        .map(|sample| AccessSample {
            region: RegionId(sample.region),
            watched: sample.watched,
            accessed: sample.accessed,
            seconds: sample.seconds,
        })
        .collect()
}

impl From<PagerError> for GuestError {
    fn from(error: PagerError) -> Self {
        Self::caused("the guest's memory cannot be served", error)
    }
}

impl BlockedTime {
    /// From the pager's figures, for a guest with so many threads that run its code.
    pub fn from_pager(stats: FaultStats, parallelism: u32) -> Self {
        Self {
            total: stats.blocked,
            threads: stats
                .threads
                .into_iter()
                .map(|thread| match thread.name.as_str() {
                    "" => (format!("thread {}", thread.tid), thread.blocked),
                    _ => (thread.name, thread.blocked),
                })
                .collect(),
            parallelism,
        }
    }
}
