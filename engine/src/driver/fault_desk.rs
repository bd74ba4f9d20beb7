//! Where the pager's fault threads come with a fault: it is answered from the map of missing
//! blocks, told to the machine when it must cross the network, and timed.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use hdrhistogram::Histogram;
use hybridmig_pager::MissingMap;
use tokio::sync::mpsc;

use crate::blocks::{BlockSet, Blocks, RegionId};
use crate::guest::{FaultAnswer, FaultSink, GuestError};
use crate::session::io::DestinationInput;

/// Faults timed at once; a guest has at most as many as it has threads.
const TIMED: usize = 1 << 16;

/// See the module.
pub struct FaultDesk {
    missing: Arc<MissingMap>,
    inputs: mpsc::Sender<DestinationInput>,
    waiting: Mutex<HashMap<(RegionId, u32), Instant>>,
    latency_us: Mutex<Histogram<u64>>,
    network: AtomicU64,
    local: AtomicU64,
}

impl FaultDesk {
    /// A desk over this map.
    pub fn new(missing: Arc<MissingMap>, inputs: mpsc::Sender<DestinationInput>) -> Self {
        Self {
            missing,
            inputs,
            waiting: Mutex::new(HashMap::new()),
            // One hour in µs, two significant digits: 40 KiB.
            latency_us: Mutex::new(
                Histogram::new_with_bounds(1, 3_600_000_000, 2).expect("constant bounds"),
            ),
            network: AtomicU64::new(0),
            local: AtomicU64::new(0),
        }
    }

    /// Blocks have come: whoever waited for them has its latency noted.
    pub fn settle(&self, placed: &Blocks) {
        let mut waiting = self.waiting.lock().expect("not poisoned");
        if waiting.is_empty() {
            return;
        }
        let now = Instant::now();
        let mut latency = self.latency_us.lock().expect("not poisoned");
        for key in placed.iter_blocks() {
            if let Some(since) = waiting.remove(&key) {
                latency.saturating_record((now - since).as_micros() as u64);
            }
        }
    }

    /// Faults that crossed the network, and faults that did not need to.
    pub fn counts(&self) -> (u64, u64) {
        (
            self.network.load(Ordering::Relaxed),
            self.local.load(Ordering::Relaxed),
        )
    }

    /// Latencies of the former in µs: (upper bound, count), ascending.
    pub fn latencies(&self) -> Vec<(u64, u64)> {
        let latency = self.latency_us.lock().expect("not poisoned");
        latency
            .iter_recorded()
            .map(|step| (step.value_iterated_to(), step.count_since_last_iteration()))
            .collect()
    }
}

impl FaultSink for FaultDesk {
    fn fault(&self, region: RegionId, block: u32) -> FaultAnswer {
        if !self.missing.contains(region.0, block) {
            self.local.fetch_add(1, Ordering::Relaxed);
            return FaultAnswer::Zero;
        }
        let mut waiting = self.waiting.lock().expect("not poisoned");
        if waiting.len() < TIMED && waiting.insert((region, block), Instant::now()).is_none() {
            self.network.fetch_add(1, Ordering::Relaxed);
        }
        drop(waiting);
        // Blocks only when thousands of inputs wait; the receiver is gone only at the end.
        let _ = self
            .inputs
            .blocking_send(DestinationInput::Fault { region, block });
        FaultAnswer::Requested
    }

    fn removed(&self, region: RegionId, first: u32, count: u32) {
        let mut gone = BlockSet::new();
        for block in first..first.saturating_add(count) {
            if self.missing.clear(region.0, block) {
                gone.insert(block);
            }
        }
        if !gone.is_empty() {
            let gone = std::iter::once((region, gone)).collect();
            let _ = self.inputs.blocking_send(DestinationInput::Removed(gone));
        }
    }

    fn failed(&self, error: GuestError) {
        let _ = self
            .inputs
            .blocking_send(DestinationInput::PlacementFailed {
                error: format!("the pager: {}", error.chain()),
            });
    }
}
