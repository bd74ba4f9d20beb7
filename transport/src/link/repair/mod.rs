//! Repair of streams without a round trip: parity of a stream goes beside it in datagrams, and stands in
//! at the receiver for packets that were lost. It only hurries: QUIC repairs the stream all the same, and
//! whatever comes second is dropped.
//!
//! [`wire`], [`plan`] and [`assembly`] know no clock and no connection. What a peer sends is held within
//! bounds: parity for streams that it may have open, and no more than [`MAX_HELD`] bytes of it.

pub mod assembly;
pub mod plan;
pub mod wire;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use tokio::sync::Notify;

use super::urgent::wire::Malformed;
use crate::config::MAX_STREAMS;
use assembly::Assembly;
use wire::Parity;

/// Bytes of parity that are held at most; what comes beyond is dropped.
pub const MAX_HELD: usize = 4 << 20;

/// What parity of streams has done, both directions of this side.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RepairStats {
    /// Streams sent with parity.
    pub streams: u64,
    /// Their bytes.
    pub stream_bytes: u64,
    /// Bytes of the parity's datagrams.
    pub parity_bytes: u64,
    /// Datagrams of parity that were not sent: too many waited.
    pub dropped: u64,
    /// Streams received that were restored with it.
    pub restored: u64,
}

/// A stream on its way in.
#[derive(Debug, Default)]
pub(super) struct Arriving {
    assembly: Mutex<Assembly>,
    /// Parity has come.
    pub(super) helped: Notify,
}

impl Arriving {
    pub(super) fn lock(&self) -> MutexGuard<'_, Assembly> {
        // What a panic elsewhere left incomplete is noticed by its checksum.
        self.assembly.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The peer's streams by number, as long as they are on their way.
#[derive(Debug)]
pub(super) struct Register {
    /// Every stream below has been seen to begin.
    floor: u64,
    arriving: HashMap<u64, Arc<Arriving>>,
    held: usize,
}

impl Default for Register {
    fn default() -> Self {
        Self {
            // The first is the credit stream, which is not one of these.
            floor: 1,
            arriving: HashMap::new(),
            held: 0,
        }
    }
}

impl Register {
    /// A stream begins; parity of it may have come before.
    pub(super) fn begin(&mut self, number: u64) -> Arc<Arriving> {
        self.floor = self.floor.max(number + 1);
        self.arriving.entry(number).or_default().clone()
    }

    /// The stream has ended.
    pub(super) fn end(&mut self, number: u64) {
        if let Some(arriving) = self.arriving.remove(&number) {
            self.held -= arriving.lock().parity_held();
        }
    }

    /// Keeps parity with the stream that it is for; none if that has ended, or if there is no room.
    ///
    /// # Errors
    /// If the peer cannot have opened the stream, or contradicts itself.
    pub(super) fn parity(&mut self, parity: &Parity) -> Result<Option<Arc<Arriving>>, Malformed> {
        let number = parity.stream;
        if number >= self.floor.saturating_add(u64::from(MAX_STREAMS)) {
            return Err(Malformed(format!(
                "parity of stream {number} while {} has not begun",
                self.floor
            )));
        }
        let known = number >= self.floor || self.arriving.contains_key(&number);
        if !known || self.held + parity.pieces.len() > MAX_HELD {
            return Ok(None);
        }
        let arriving = self.arriving.entry(number).or_default().clone();
        self.held += arriving.lock().parity(parity)?;
        Ok(Some(arriving))
    }

    /// Parity that was kept is not any more.
    pub(super) fn released(&mut self, bytes: usize) {
        self.held -= bytes;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parity(stream: u64) -> Parity {
        let mut parity = wire::parity_of(stream, &[&[1; 1000]], 3, 1400).unwrap();
        parity.remove(0)
    }

    #[test]
    fn only_streams_that_may_be_open_have_parity() {
        let mut register = Register::default();
        assert!(register.parity(&parity(0)).unwrap().is_none());
        assert!(register.parity(&parity(4096)).unwrap().is_some());
        assert!(register.parity(&parity(4097)).is_err());
        assert!(register.parity(&parity(u64::MAX)).is_err());
        register.begin(2);
        assert!(register.parity(&parity(2)).unwrap().is_some());
        register.end(2);
        assert!(register.parity(&parity(2)).unwrap().is_none());
        assert_eq!(register.arriving.len(), 1);
        assert_eq!(register.held, 3 * wire::PIECE);
    }

    #[test]
    fn parity_is_held_within_a_bound() {
        let mut register = Register::default();
        for stream in 1..4000 {
            register.parity(&parity(stream)).unwrap();
        }
        for stream in 1..4000 {
            register.parity(&parity(stream)).unwrap();
        }
        assert_eq!(register.held, 3999 * 3 * wire::PIECE);
        register.held = MAX_HELD;
        assert!(register.parity(&parity(1)).unwrap().is_none());
    }
}
