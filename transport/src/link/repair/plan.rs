//! How much parity a stream needs: from the loss of the path and from how it clusters. A pure function
//! of numbers.

use std::time::Duration;

use super::wire::{MAX_EXTRA, PIECE, data_pieces};
use crate::link::urgent::plan::{Chain, Path};

/// Chance that a stream has to wait for QUIC's repair, at most, where the bound below allows it. A freeze
/// set is some ten of them.
pub const TARGET: f64 = 0.000_5;
/// Most parity, as a share of the stream; a stream of few packets may have [`LEAST`] packets of it.
const SHARE: f64 = 0.2;
const LEAST: usize = 3;

/// Parity pieces for a stream of `len` bytes that goes in packets of `packet` bytes.
pub fn parity(len: usize, packet: usize, path: &Path) -> usize {
    let chain = Chain::new(path.loss, path.burst);
    let data = data_pieces(len).max(1);
    let packet = packet.max(PIECE);
    // Streams do not begin with a packet.
    let packets = len.div_ceil(packet) + 1;
    // A lost packet takes with it what it has of the pieces at its ends.
    let lacking = |lost: usize| {
        let unaligned = (lost as f64 * (packet as f64 / PIECE as f64 + 1.0)).ceil() as usize + 1;
        unaligned.min(lost * data)
    };
    let most = ((packets as f64 * SHARE) as usize).max(LEAST);
    let enough = |lost: &usize| {
        let all = packets + (lacking(*lost) * PIECE).div_ceil(packet);
        chain.more_lost_than(*lost, std::iter::repeat_n(1.0, all - 1)) <= TARGET
    };
    let lost = (1..most).find(enough).unwrap_or(most);
    lacking(lost).min(data + MAX_EXTRA)
}

/// What parity adds to the bytes of a freeze set, as a share, on a path that loses this share of its packets in
/// bursts of so many; 0 bursts count as independent losses. For whoever wants to know before sending.
pub fn share(loss: f64, burst: f64) -> f64 {
    const STREAM: usize = 128 << 10;
    const PACKET: usize = 1400;
    let path = Path {
        srtt: Duration::ZERO,
        loss: loss.clamp(0.0, 1.0),
        burst: burst.max(1.0),
        packet_gap: Duration::ZERO,
    };
    (parity(STREAM, PACKET, &path) * PIECE) as f64 / STREAM as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Parity of a stream of this length, as a share of it.
    fn share_of(len: usize, loss: f64, burst: f64) -> f64 {
        let path = Path {
            srtt: Duration::from_millis(100),
            loss,
            burst,
            packet_gap: Duration::from_micros(58),
        };
        (parity(len, 1400, &path) * PIECE) as f64 / len as f64
    }

    #[test]
    fn parity_follows_loss_and_is_bounded() {
        for (loss, burst, expected) in [
            (0.002, 1.0, 0.01..0.03),
            (0.012, 1.0, 0.03..0.065),
            (0.04, 1.0, 0.08..0.13),
            (0.012, 4.0, 0.1..0.25),
            (0.5, 1.0, 0.2..0.25),
        ] {
            let share = share_of(256 << 10, loss, burst);
            assert!(expected.contains(&share), "{share} at {loss}, {burst}");
        }
    }

    #[test]
    fn a_share_can_be_told_beforehand() {
        assert!(share(0.0, 0.0) < 0.03, "{}", share(0.0, 0.0));
        assert!((share(0.012, 1.0) - share_of(128 << 10, 0.012, 1.0)).abs() < 1e-9);
        assert!(share(0.02, 2.5) > 2.0 * share(0.02, 1.0));
        assert!(share(1.0, 100.0) < 0.3);
    }

    #[test]
    fn a_short_stream_is_repeated() {
        for (len, loss, expected) in [(1, 0.012, 1), (30, 0.04, 2), (300, 0.012, 2), (300, 0.5, 6)]
        {
            let pieces = share_of(len, loss, 1.0) * len as f64 / PIECE as f64;
            assert_eq!(pieces.round() as usize, expected, "{len} at {loss}");
        }
    }
}
