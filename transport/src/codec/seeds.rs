//! What a source knows of contents that the destination has in files of its own: their names, as far
//! as the destination told them, and the blocks for which that did not hold. Shared by all threads
//! that encode for one session. A name here is eight bytes, so that it may be another content's: the
//! record carries all of the name, and the destination checks what it has against that.

use std::collections::BTreeMap;
use std::sync::RwLock;
use std::sync::atomic::{AtomicU64, Ordering};

use roaring::RoaringBitmap;

use super::wire::NAME_LEN;
use crate::message::{MAX_SEED_NAMES, RegionId};

/// Most pieces ([`crate::message::Message::Seeds`]) of a session: with [`MAX_SEED_NAMES`] each
/// 2^24 names, or 1 TiB of blocks of 64 KiB, in 128 MiB of memory.
pub const MAX_SEED_PIECES: usize = (1 << 24) / MAX_SEED_NAMES;

/// Refusals from which on seeds are held to be others than was told, if they are every second one.
const DISTRUST: u64 = 256;

/// A piece of names that breaks the protocol.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SeedNamesError {
    /// Another length than the pieces before.
    #[error("seeds of {0} bytes after others of {1}")]
    BlockSize(u32, u32),
    /// More than [`MAX_SEED_PIECES`].
    #[error("more than {MAX_SEED_PIECES} pieces of names of seeds")]
    TooMany,
    /// It overlaps another one and is not the same.
    #[error("names of seeds that overlap")]
    Overlap,
}

/// The first eight bytes of a BLAKE3, by which contents are told of.
pub fn seed_name(name: &[u8; NAME_LEN]) -> u64 {
    let (first, _) = name.split_first_chunk().expect("longer than eight bytes");
    u64::from_le_bytes(*first)
}

/// See the module's text. Empty to begin with.
#[derive(Debug, Default)]
pub struct SeedNames {
    inner: RwLock<Inner>,
    /// Blocks that were named, and that the destination could not use, over the session.
    named: AtomicU64,
    refused: AtomicU64,
}

#[derive(Debug, Default)]
struct Inner {
    /// 0 while nothing is known.
    block_size: u32,
    /// Ascending names by the first of each piece; pieces do not overlap.
    pieces: BTreeMap<u64, Box<[u64]>>,
    /// Blocks that go in other forms from now on.
    refused: BTreeMap<RegionId, RoaringBitmap>,
}

impl SeedNames {
    /// Learns a piece of names: ascending, as decoding has checked. A piece that is known already
    /// may come again (after a lost link).
    pub fn learn(&self, block_size: u32, names: Vec<u64>) -> Result<(), SeedNamesError> {
        let (Some(&first), Some(&last)) = (names.first(), names.last()) else {
            return Ok(());
        };
        let mut inner = self.inner.write().expect("not poisoned");
        if inner.block_size != 0 && inner.block_size != block_size {
            return Err(SeedNamesError::BlockSize(block_size, inner.block_size));
        }
        if let Some((_, before)) = inner.pieces.range(..=last).next_back()
            && before.last().is_some_and(|end| *end >= first)
        {
            let same = **before == *names;
            return same.then_some(()).ok_or(SeedNamesError::Overlap);
        }
        if inner.pieces.len() == MAX_SEED_PIECES {
            return Err(SeedNamesError::TooMany);
        }
        inner.block_size = block_size;
        inner.pieces.insert(first, names.into());
        Ok(())
    }

    /// The destination could not use what was sent of the block: it is never named by a seed again.
    /// The caller bounds the blocks to those of the guest.
    pub fn refuse(&self, region: RegionId, block: u32) {
        let mut inner = self.inner.write().expect("not poisoned");
        if inner.block_size != 0 {
            inner.refused.entry(region).or_default().insert(block);
            self.refused.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Number of names.
    pub fn len(&self) -> usize {
        let inner = self.inner.read().expect("not poisoned");
        inner.pieces.values().map(|piece| piece.len()).sum()
    }

    /// Whether nothing is known.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether a look is worth its time: something is known of contents of this length, and it has
    /// mostly proved true (files may have been changed since they were read).
    pub(super) fn serve(&self, size: usize) -> bool {
        let refused = self.refused.load(Ordering::Relaxed);
        let distrusted = refused >= DISTRUST && refused * 2 > self.named.load(Ordering::Relaxed);
        !distrusted && self.inner.read().expect("not poisoned").block_size as usize == size
    }

    /// Whether the destination should have this content, for that block.
    pub(super) fn has(&self, region: RegionId, block: u32, name: &[u8; NAME_LEN]) -> bool {
        let name = seed_name(name);
        let inner = self.inner.read().expect("not poisoned");
        let piece = inner.pieces.range(..=name).next_back();
        let has = piece.is_some_and(|(_, names)| names.binary_search(&name).is_ok())
            && inner
                .refused
                .get(&region)
                .is_none_or(|set| !set.contains(block));
        if has {
            self.named.fetch_add(1, Ordering::Relaxed);
        }
        has
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DISK: RegionId = RegionId(1);

    fn name(number: u64) -> [u8; NAME_LEN] {
        let mut name = [7; NAME_LEN];
        name[..8].copy_from_slice(&number.to_le_bytes());
        name
    }

    #[test]
    fn pieces_are_found_whatever_order_they_come_in() {
        let seeds = SeedNames::default();
        assert!(seeds.is_empty() && !seeds.serve(512));
        for piece in [[50, 60], [1, 2], [70, 80], [10, 40]] {
            seeds.learn(512, piece.to_vec()).unwrap();
        }
        assert!(seeds.serve(512) && !seeds.serve(4096));
        assert_eq!(seeds.len(), 8);
        let known: Vec<u64> = (0..100)
            .filter(|number| seeds.has(DISK, 0, &name(*number)))
            .collect();
        assert_eq!(known, [1, 2, 10, 40, 50, 60, 70, 80]);
    }

    #[test]
    fn a_piece_may_come_again_but_not_lie_over_another() {
        let seeds = SeedNames::default();
        seeds.learn(512, vec![10, 20]).unwrap();
        seeds.learn(512, vec![30, 40]).unwrap();
        seeds.learn(512, vec![10, 20]).unwrap();
        for bad in [&[20, 25][..], &[5, 10], &[12, 13], &[5, 50], &[10, 20, 21]] {
            let overlap = Err(SeedNamesError::Overlap);
            assert_eq!(seeds.learn(512, bad.to_vec()), overlap, "{bad:?}");
        }
        let size = Err(SeedNamesError::BlockSize(4096, 512));
        assert_eq!(seeds.learn(4096, vec![90]), size);
        assert_eq!(seeds.len(), 4);
    }

    #[test]
    fn a_peer_cannot_fill_the_memory() {
        let seeds = SeedNames::default();
        for number in 0..MAX_SEED_PIECES as u64 {
            seeds.learn(512, vec![number]).unwrap();
        }
        let more = MAX_SEED_PIECES as u64;
        assert_eq!(seeds.learn(512, vec![more]), Err(SeedNamesError::TooMany));
    }

    #[test]
    fn what_was_refused_is_not_named_again() {
        let seeds = SeedNames::default();
        seeds.refuse(DISK, 3);
        assert_eq!(seeds.refused.load(Ordering::Relaxed), 0, "nobody named it");
        seeds.learn(512, vec![10]).unwrap();
        seeds.refuse(DISK, 3);
        assert!(!seeds.has(DISK, 3, &name(10)));
        assert!(seeds.has(DISK, 4, &name(10)));
        assert!(seeds.has(RegionId(0), 3, &name(10)));
    }

    #[test]
    fn seeds_that_mostly_prove_false_are_left_alone() {
        let seeds = SeedNames::default();
        seeds.learn(512, vec![10]).unwrap();
        for block in 0..1000 {
            assert!(seeds.has(DISK, block, &name(10)));
        }
        for block in 0..500 {
            seeds.refuse(DISK, block);
        }
        assert!(seeds.serve(512));
        seeds.refuse(DISK, 500);
        assert!(!seeds.serve(512));
    }
}
