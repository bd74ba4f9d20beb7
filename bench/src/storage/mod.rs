//! A guest's disk: what it holds before a migration, what the guest feels of it meanwhile, and whether every block of
//! it is right afterwards.

mod image;
mod latency;

use hybridmig_tests::{Console, disk};
use serde::{Deserialize, Serialize};

pub use image::{Compared, Images, NODE};
pub use latency::{Latency, Moments, Phase, PhaseLatency, Ticks, phases};

/// What a run shows of the guest's disk.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Storage {
    /// Blocks that the guest read and found wrong.
    pub bad_blocks: u64,
    /// I/O errors that the guest was given.
    pub errors: u64,
    /// The two images after the migration, seen from the hosts; only where the guest was moved.
    pub compared: Option<Compared>,
    /// Latencies of the guest's I/O, by phase.
    pub phases: Vec<PhaseLatency>,
}

impl Storage {
    /// What is wrong, if anything is.
    pub fn trouble(&self) -> Option<String> {
        let compared = self.compared.unwrap_or_default();
        let wrong = compared.differing + compared.broken;
        (self.bad_blocks + self.errors + wrong > 0).then(|| {
            format!(
                "the guest was given {} wrong blocks and {} I/O errors; in the destination's image \
                 {wrong} blocks are wrong",
                self.bad_blocks, self.errors
            )
        })
    }
}

/// Wrong blocks and I/O errors that the guest has seen, wherever it was.
pub fn seen_wrong(consoles: [&Console; 2]) -> (u64, u64) {
    let ticks = consoles.map(disk::ticks);
    let ticks = ticks.iter().flat_map(|ticks| ticks.values());
    ticks.fold((0, 0), |(bad, errors), tick| {
        (bad.max(tick.bad), errors.max(tick.errors))
    })
}
