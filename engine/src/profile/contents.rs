//! What the blocks of a region hold, found in a bounded sample: zero, the same as another one, or so many bytes
//! on the wire. Contents are made into batches by the transport's own codec, at the level with which the bulk
//! lane begins, so that the figure is what would be sent.

use std::collections::HashSet;

use hybridmig_transport::Lane;
use hybridmig_transport::codec::{BatchHeader, BlockEncoder, EncoderConfig, Refer};
use hybridmig_transport::message::RegionInfo;
use xxhash_rust::xxh3::xxh3_128;

use super::Contents;
use crate::blocks::BlockSet;
use crate::driver::level::Level;
use crate::guest::{GuestError, GuestResult, SourceGuest};
use crate::regions::PAGE;

/// Pages looked at in a region of memory.
const SAMPLE_PAGES: u64 = 2048;
/// The same of a disk: a look costs the guest's storage a read.
const SAMPLE_DISK_PAGES: u64 = 4096;
/// Pages that lie together in the sample.
const RUN_PAGES: u64 = 16;
/// Pages of a batch.
const BATCH_PAGES: u64 = 64;

/// Looks at a sample of the blocks of a region that have content. The guest may write them meanwhile: a torn
/// block is as good as any.
pub fn look(
    guest: &dyn SourceGuest,
    info: &RegionInfo,
    content: &BlockSet,
    disk: bool,
) -> GuestResult<Contents> {
    let size = info.block_size as usize;
    let pages_per_block = u64::from((info.block_size / PAGE).max(1));
    let pages = if disk {
        SAMPLE_DISK_PAGES
    } else {
        SAMPLE_PAGES
    };
    let chosen = choose(
        content,
        (pages / pages_per_block).max(1),
        (RUN_PAGES / pages_per_block).max(1),
    );
    let mut encoder = encoder()?;
    let mut seen = HashSet::new();
    let mut counts = Counts::default();
    let mut batch = Batch::default();
    let mut block_bytes = vec![0; size];
    for block in &chosen {
        guest.read(info.id, block, &mut block_bytes)?;
        counts.sampled += 1;
        if block_bytes.iter().all(|byte| *byte == 0) {
            counts.zero += 1;
        } else if seen.insert(xxh3_128(&block_bytes)) {
            batch.blocks.push(block);
            batch.bytes.extend_from_slice(&block_bytes);
            if batch.blocks.len() as u64 * pages_per_block >= BATCH_PAGES {
                counts.encode(&mut encoder, info, &mut batch)?;
            }
        } else {
            counts.duplicate += 1;
        }
    }
    counts.encode(&mut encoder, info, &mut batch)?;
    Ok(counts.contents(pages_per_block))
}

/// Runs spread evenly over the content.
fn choose(content: &BlockSet, most: u64, run: u64) -> BlockSet {
    let len = content.len();
    if len <= most {
        return content.clone();
    }
    let runs = most.div_ceil(run);
    let mut chosen = BlockSet::new();
    for number in 0..runs {
        // Below 2³² × 2¹².
        let rank = (number * len / runs) as u32;
        let last = (u64::from(rank) + run).min(len) as u32;
        chosen.extend((rank..last).filter_map(|rank| content.select(rank)));
    }
    chosen
}

fn encoder() -> GuestResult<BlockEncoder> {
    BlockEncoder::new(EncoderConfig {
        level: Level::default().first(),
        // Nothing has been sent that could be referred to.
        features: 0,
        delta_cache_bytes: 0,
        index_entries: 1,
    })
    .map_err(|error| GuestError::caused("contents cannot be compressed", error))
}

#[derive(Default)]
struct Batch {
    blocks: Vec<u32>,
    bytes: Vec<u8>,
}

#[derive(Default)]
struct Counts {
    sampled: u64,
    zero: u64,
    duplicate: u64,
    encoded: u64,
    wire: u64,
    batches: u64,
}

impl Counts {
    fn encode(
        &mut self,
        encoder: &mut BlockEncoder,
        info: &RegionInfo,
        batch: &mut Batch,
    ) -> GuestResult<()> {
        if batch.blocks.is_empty() {
            return Ok(());
        }
        let header = BatchHeader {
            id: self.batches,
            pass: 0,
            lane: Lane::Bulk,
        };
        let encoded = encoder
            .encode_blocks(
                header,
                info.id,
                info.block_size,
                &batch.blocks,
                &batch.bytes,
                Refer::Nothing,
            )
            .map_err(|error| GuestError::caused("contents cannot be compressed", error))?;
        self.batches += 1;
        self.encoded += batch.blocks.len() as u64;
        self.wire += encoded.bytes.len() as u64;
        batch.blocks.clear();
        batch.bytes.clear();
        Ok(())
    }

    fn contents(&self, pages_per_block: u64) -> Contents {
        let share = |count: u64| count as f64 / self.sampled.max(1) as f64;
        let pages = self.encoded * pages_per_block;
        Contents {
            sampled: self.sampled,
            zero: share(self.zero),
            duplicate: share(self.duplicate),
            bytes_per_page: if pages == 0 {
                0.0
            } else {
                self.wire as f64 / pages as f64
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::blocks::{Blocks, RegionId};
    use hybridmig_transport::message::{GuestDescription, RegionKind};
    use rand::rngs::SmallRng;
    use rand::{RngCore, SeedableRng};

    /// A guest whose page is what its number says.
    struct Made;

    impl SourceGuest for Made {
        fn describe(&self) -> &GuestDescription {
            unreachable!()
        }
        fn regions(&self) -> &[RegionInfo] {
            unreachable!()
        }
        fn start_tracking(&self) -> GuestResult<Blocks> {
            unreachable!()
        }
        fn take_dirty(&self) -> GuestResult<Blocks> {
            unreachable!()
        }
        fn read(&self, _: RegionId, block: u32, buf: &mut [u8]) -> GuestResult<()> {
            match block % 10 {
                0..3 => buf.fill(0),
                3..5 => buf.fill(7),
                5..7 => SmallRng::seed_from_u64(u64::from(block)).fill_bytes(buf),
                _ => {
                    for (index, word) in buf.chunks_mut(8).enumerate() {
                        let value = u64::from(block) * 7919 + index as u64 / 16;
                        word.copy_from_slice(&value.to_ne_bytes());
                    }
                }
            }
            Ok(())
        }
        fn freeze(&self) -> GuestResult<()> {
            unreachable!()
        }
        fn save_state(&self) -> GuestResult<Vec<u8>> {
            unreachable!()
        }
        fn thaw(&self) -> GuestResult<()> {
            unreachable!()
        }
        fn release(&self) -> GuestResult<()> {
            unreachable!()
        }
    }

    fn info(block_size: u32) -> RegionInfo {
        RegionInfo {
            id: RegionId(0),
            kind: RegionKind::Memory,
            name: "ram".into(),
            blocks: 1 << 20,
            block_size,
        }
    }

    #[test]
    fn shares_are_those_of_the_content() {
        let content: BlockSet = (0..100_000).collect();
        let contents = look(&Made, &info(4096), &content, false).unwrap();
        assert_eq!(contents.sampled, SAMPLE_PAGES);
        assert!((contents.zero - 0.3).abs() < 0.03, "{contents:?}");
        assert!((contents.duplicate - 0.2).abs() < 0.03, "{contents:?}");
        // Two in five of the rest do not compress at all, three do very well.
        assert!(
            (1600.0..1900.0).contains(&contents.bytes_per_page),
            "{contents:?}"
        );
    }

    #[test]
    fn a_disk_is_looked_at_in_its_own_blocks() {
        let content: BlockSet = (0..10).map(|number| number * 10 + 5).collect();
        let contents = look(&Made, &info(65_536), &content, true).unwrap();
        assert_eq!((contents.sampled, contents.zero), (10, 0.0));
        assert!(
            (4096.0..4160.0).contains(&contents.bytes_per_page),
            "{contents:?}"
        );
        let nothing = look(&Made, &info(4096), &BlockSet::new(), false).unwrap();
        assert_eq!(nothing, Contents::default());
    }
}
