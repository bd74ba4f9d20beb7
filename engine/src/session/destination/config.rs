//! What the operator and the driver set for a destination.

use std::time::Duration;

use hybridmig_transport::message::Features;

/// What the operator and the driver set.
#[derive(Clone, Debug)]
pub struct DestinationConfig {
    /// How long to wait for the source before the session ends without it.
    pub patience: Duration,
    /// How long to stay reachable after the session has been decided, for a source that has lost
    /// the link and comes back to ask.
    pub linger: Duration,
    /// Longest time that an acknowledgement waits for others.
    pub ack_interval: Duration,
    /// Acknowledgements sent at once.
    pub ack_batches: u32,
    /// Bits of [`Features`] that this side has.
    pub features: u64,
    /// What the source is told of this software.
    pub software: String,
}

impl Default for DestinationConfig {
    fn default() -> Self {
        Self {
            patience: Duration::from_secs(600),
            linger: Duration::from_secs(30),
            ack_interval: Duration::from_millis(5),
            ack_batches: 64,
            features: Features::ALL,
            software: concat!("hybridmig ", env!("CARGO_PKG_VERSION")).into(),
        }
    }
}
