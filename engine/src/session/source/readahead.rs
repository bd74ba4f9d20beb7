//! Reading ahead on disks: which blocks follow the one that a guest waits for. Pure, like the machine.
//!
//! A guest that reads a file waits at the first block that is missing, and would wait one round trip
//! at every further one. So the blocks behind it are sent along: few where nothing is known, twice as
//! many each time that the guest has gone on where the last ones ended (as the readahead of Linux
//! does, `mm/readahead.c`).

use crate::blocks::RegionId;

/// Blocks sent along with the first one of a stream.
const FIRST: u32 = 2;
/// Most blocks sent along: 4 MiB of a disk.
const LARGEST: u32 = 64;
/// Streams that are told apart; guests read few files at a time.
const STREAMS: usize = 16;

/// See the module's text.
#[derive(Debug, Default)]
pub(super) struct Readahead {
    /// The newest last.
    streams: Vec<Stream>,
}

#[derive(Clone, Copy, Debug)]
struct Stream {
    region: RegionId,
    /// What was sent along last: `first..=last`, and how many these were.
    first: u32,
    last: u32,
    window: u32,
}

impl Readahead {
    /// The guest waits for `block`: the first and the last block to send along.
    pub(super) fn after(&mut self, region: RegionId, block: u32) -> (u32, u32) {
        let known = self.streams.iter().position(|stream| {
            // It waits for one that is on its way, or goes on behind them.
            stream.region == region
                && block >= stream.first
                && block <= stream.last.saturating_add(1)
        });
        let stream = match known.map(|index| self.streams.remove(index)) {
            Some(stream) if block <= stream.last => stream,
            Some(stream) => Stream::behind(region, block, (2 * stream.window).min(LARGEST)),
            None => Stream::behind(region, block, FIRST),
        };
        if self.streams.len() == STREAMS {
            self.streams.remove(0);
        }
        self.streams.push(stream);
        (stream.first, stream.last)
    }
}

impl Stream {
    fn behind(region: RegionId, block: u32, window: u32) -> Self {
        Self {
            region,
            first: block.saturating_add(1),
            last: block.saturating_add(window),
            window,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DISK: RegionId = RegionId(1);

    #[test]
    fn a_reader_that_goes_on_gets_more_each_time() {
        let mut readahead = Readahead::default();
        let (mut block, mut waits) = (1000, 0);
        while block < 2000 {
            waits += 1;
            block = readahead.after(DISK, block).1 + 1;
        }
        assert!(waits <= 20, "{waits}");
    }

    #[test]
    fn random_reads_bring_little_along() {
        let mut readahead = Readahead::default();
        for block in [7, 5000, 900, 3, 77_000] {
            assert_eq!(readahead.after(DISK, block), (block + 1, block + FIRST));
        }
    }

    #[test]
    fn readers_do_not_disturb_each_other_and_what_is_on_its_way_is_not_asked_for_twice() {
        let mut readahead = Readahead::default();
        assert_eq!(readahead.after(DISK, 10), (11, 12));
        assert_eq!(readahead.after(DISK, 500), (501, 502));
        assert_eq!(readahead.after(DISK, 12), (11, 12), "on its way");
        assert_eq!(readahead.after(DISK, 13), (14, 17));
        assert_eq!(readahead.after(DISK, 503), (504, 507));
        assert_eq!(readahead.after(RegionId(2), 18), (19, 20), "another disk");
        for stream in 0..100 {
            readahead.after(DISK, 10_000 * stream);
        }
        assert!(readahead.streams.len() <= STREAMS);
        assert_eq!(readahead.after(DISK, u32::MAX), (u32::MAX, u32::MAX));
    }
}
