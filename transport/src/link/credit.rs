//! The credit stream of each side: first stream it opens, and its sign that it has accepted the
//! other. It begins with the windows of the lanes and goes on with larger limits as the application
//! takes what has arrived.
//!
//! ```text
//! stream := kind(1 byte) limit(8 bytes) for urgent, freeze, bulk; update*
//! update := lane(1 byte) limit(8 bytes)
//! ```
//! A limit is the number of bytes (of batches and messages, without kind bytes) that may have been
//! sent on the lane since the link began. Little endian; limits only grow.

use super::{Shared, kind};
use crate::codec::MAX_BATCH;
use crate::config::LaneWindows;
use crate::error::LinkError;
use crate::frame::MAX_MESSAGE;
use crate::lane::Lane;

/// Smallest window of a lane. Credit comes in steps of a sixteenth, and the largest batch or message
/// must fit what is left: with less the lane could stand still.
const LEAST_WINDOW: u64 = 2 << 20;
const _: () = assert!(LEAST_WINDOW as usize * 15 / 16 > MAX_MESSAGE && MAX_MESSAGE > MAX_BATCH);

/// Lanes with credit, in the order of the greeting.
pub(super) const LANES: [Lane; 3] = [Lane::Urgent, Lane::Freeze, Lane::Bulk];

/// Index of a lane among [`LANES`].
pub(super) fn index(lane: Lane) -> Option<usize> {
    LANES.iter().position(|other| *other == lane)
}

impl LaneWindows {
    pub(super) fn to_array(self) -> [u64; 3] {
        [self.urgent, self.freeze, self.bulk]
    }
}

/// Grants credit to the peer.
pub(crate) struct CreditSender {
    stream: quinn::SendStream,
}

/// Receives the peer's credit.
pub(crate) struct CreditReceiver {
    stream: quinn::RecvStream,
    pub(super) windows: LaneWindows,
}

impl CreditSender {
    /// Opens the stream: from here on the peer knows that it is accepted.
    pub(crate) async fn open(shared: &Shared, windows: LaneWindows) -> Result<Self, LinkError> {
        let greet = async {
            let mut stream = shared.connection.open_uni().await.ok()?;
            stream.set_priority(Lane::Control.priority()).ok()?;
            let mut greeting = vec![kind::CREDIT];
            for window in windows.to_array() {
                greeting.extend_from_slice(&window.to_le_bytes());
            }
            stream.write_all(&greeting).await.ok()?;
            Some(Self { stream })
        };
        greet.await.ok_or_else(|| shared.error())
    }

    pub(super) async fn grant(&mut self, lane: Lane, limit: u64) -> Result<(), quinn::WriteError> {
        let mut update = [lane.to_wire(); 9];
        update[1..].copy_from_slice(&limit.to_le_bytes());
        self.stream.write_all(&update).await
    }
}

impl CreditReceiver {
    /// Waits for the peer's greeting.
    pub(crate) async fn accept(shared: &Shared) -> Result<Self, LinkError> {
        let mut stream = shared
            .connection
            .accept_uni()
            .await
            .map_err(|error| shared.explain(error))?;
        let mut greeting = [0; 25];
        read_exact(shared, &mut stream, &mut greeting).await?;
        if greeting[0] != kind::CREDIT {
            return Err(shared.violation("its first stream is not the credit stream"));
        }
        let mut limits = greeting[1..].chunks_exact(8).map(le_u64);
        let mut next = || limits.next().unwrap_or(0);
        let windows = LaneWindows {
            urgent: next(),
            freeze: next(),
            bulk: next(),
        };
        if windows
            .to_array()
            .iter()
            .any(|window| *window < LEAST_WINDOW)
        {
            return Err(shared.violation("it grants a lane less than one message needs"));
        }
        Ok(Self { stream, windows })
    }

    /// The next limit. Not cancel-safe.
    pub(super) async fn update(&mut self, shared: &Shared) -> Result<(Lane, u64), LinkError> {
        let mut update = [0; 9];
        read_exact(shared, &mut self.stream, &mut update).await?;
        let lane = Lane::of_batch(update[0])
            .ok_or_else(|| shared.violation("credit for an unknown lane"))?;
        Ok((lane, le_u64(&update[1..])))
    }
}

fn le_u64(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .rev()
        .fold(0, |value, byte| (value << 8) | u64::from(*byte))
}

async fn read_exact(
    shared: &Shared,
    stream: &mut quinn::RecvStream,
    buf: &mut [u8],
) -> Result<(), LinkError> {
    use quinn::{ReadError, ReadExactError};
    stream.read_exact(buf).await.map_err(|error| match error {
        ReadExactError::FinishedEarly(_) | ReadExactError::ReadError(ReadError::Reset(_)) => {
            shared.violation("it ended the credit stream")
        }
        ReadExactError::ReadError(_) => shared.error(),
    })
}
