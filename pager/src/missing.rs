//! Which blocks are not here yet, in memory that outlives the pager: a file (or memfd) mapped
//! shared, one bit per block. After kill -9 the next pager opens it and goes on.
//!
//! The rule that makes that safe: **a bit is cleared only after the block's contents are in
//! place** (or its hole has become its contents). A bit that is set too long costs a transfer; a
//! bit cleared too early costs the guest its data.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use roaring::RoaringBitmap;
use rustix::fs::{FallocateFlags, MemfdFlags};

use crate::words::Words;
use crate::{PagerError, Result};

const MAGIC: u64 = u64::from_le_bytes(*b"hmigmiss");
const VERSION: u64 = 1;
/// Header words: magic, version, number of regions, whether a pager has armed the guest with it;
/// then one length in blocks per region.
const FIXED_WORDS: usize = 4;
const ARMED_WORD: usize = 3;
/// Bound on what a file may claim.
const MAX_REGIONS: usize = 1 << 16;

/// One bit per block that is still missing, per region.
#[derive(Debug)]
pub struct MissingMap {
    words: Words,
    file: File,
    regions: Vec<RegionBits>,
}

#[derive(Clone, Copy, Debug)]
struct RegionBits {
    first_word: usize,
    blocks: u32,
}

impl MissingMap {
    /// Creates the file (replacing one that is there) with every bit clear. `blocks` holds the
    /// length of each region, by index; a region that is not memory has length 0.
    pub fn create(path: &Path, blocks: &[u32]) -> Result<Self> {
        let file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(path)
            .map_err(|error| PagerError::os(format!("creating {}", path.display()), error))?;
        Self::init(file, path, blocks)
    }

    /// The same without a name: outlives the process only where its file ([`Self::file`]) is held
    /// by another.
    pub fn in_memory(blocks: &[u32]) -> Result<Self> {
        let file = rustix::fs::memfd_create("missing-blocks", MemfdFlags::CLOEXEC)
            .map_err(|error| PagerError::os("memfd_create for the missing blocks", error))?;
        Self::init(file.into(), Path::new("memfd"), blocks)
    }

    /// Opens what another pager left.
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::options()
            .read(true)
            .write(true)
            .open(path)
            .map_err(|error| PagerError::os(format!("opening {}", path.display()), error))?;
        Self::from_file(file, path)
    }

    /// Like [`Self::open`] for a file that is open already; `name` is for errors.
    pub fn from_file(file: File, name: &Path) -> Result<Self> {
        let bad = |reason: &str| PagerError::BadMissingMap {
            path: PathBuf::from(name),
            reason: reason.to_owned(),
        };
        let len = file
            .metadata()
            .map_err(|error| PagerError::os(format!("fstat of {}", name.display()), error))?
            .len() as usize;
        if len < FIXED_WORDS * 8 || !len.is_multiple_of(8) {
            return Err(bad("it is too short"));
        }
        let words = Words::map(&file, 0, len / 8)?;
        let header = |index: usize| words.slice()[index].load(Ordering::Relaxed);
        if header(0) != MAGIC {
            return Err(bad("it is something else"));
        }
        if header(1) != VERSION {
            return Err(bad("it is of another version"));
        }
        let count = usize::try_from(header(2)).unwrap_or(usize::MAX);
        if count > MAX_REGIONS || FIXED_WORDS + count > len / 8 {
            return Err(bad("its header is damaged"));
        }
        let lens: Option<Vec<u32>> = (0..count)
            .map(|region| u32::try_from(header(FIXED_WORDS + region)).ok())
            .collect();
        let lens = lens.ok_or_else(|| bad("its header is damaged"))?;
        let (regions, total) = layout(&lens);
        if total != len / 8 {
            return Err(bad("its length does not fit its header"));
        }
        Ok(Self {
            words,
            file,
            regions,
        })
    }

    /// The file, to hand it to another process.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Whether a pager has discarded everything that is missing, so that a present page is a page
    /// that was placed. Only then can another pager go on.
    pub fn is_armed(&self) -> bool {
        self.words.slice()[ARMED_WORD].load(Ordering::SeqCst) == 1
    }

    pub(crate) fn set_armed(&self) {
        self.words.slice()[ARMED_WORD].store(1, Ordering::SeqCst);
    }

    /// Number of regions.
    pub fn regions(&self) -> usize {
        self.regions.len()
    }

    /// Length of a region in blocks, 0 if there is none.
    pub fn blocks(&self, region: u16) -> u32 {
        self.regions
            .get(usize::from(region))
            .map_or(0, |bits| bits.blocks)
    }

    /// Marks every block of `blocks` as missing. Blocks outside the region are an error.
    pub fn insert(&self, region: u16, blocks: &RoaringBitmap) -> Result<()> {
        if let Some(last) = blocks.max()
            && last >= self.blocks(region)
        {
            return Err(PagerError::OutOfRange {
                region,
                first: last,
                count: 1,
                blocks: self.blocks(region),
            });
        }
        for block in blocks {
            if let Some((word, bit)) = self.locate(region, block) {
                word.fetch_or(bit, Ordering::SeqCst);
            }
        }
        Ok(())
    }

    /// Whether a block is missing. A block that does not exist is not missing.
    pub fn contains(&self, region: u16, block: u32) -> bool {
        self.locate(region, block)
            .is_some_and(|(word, bit)| word.load(Ordering::SeqCst) & bit != 0)
    }

    /// The block is in place. True if it was missing.
    pub fn clear(&self, region: u16, block: u32) -> bool {
        self.locate(region, block)
            .is_some_and(|(word, bit)| word.fetch_and(!bit, Ordering::SeqCst) & bit != 0)
    }

    /// Clears `count` blocks from `first` on; returns how many were missing.
    pub fn clear_range(&self, region: u16, first: u32, count: u32) -> u32 {
        let end = first.saturating_add(count).min(self.blocks(region));
        let mut cleared = 0;
        let mut block = first;
        while block < end {
            // Whole words at once where possible.
            let stop = ((block | 63).saturating_add(1)).min(end);
            let width = stop - block;
            let mask = if width == 64 {
                u64::MAX
            } else {
                ((1_u64 << width) - 1) << (block % 64)
            };
            if let Some((word, _)) = self.locate(region, block) {
                cleared += (word.fetch_and(!mask, Ordering::SeqCst) & mask).count_ones();
            }
            block = stop;
        }
        cleared
    }

    /// Number of missing blocks over all regions.
    pub fn count(&self) -> u64 {
        self.bits()
            .iter()
            .map(|word| u64::from(word.load(Ordering::Acquire).count_ones()))
            .sum()
    }

    /// Whether nothing is missing.
    pub fn is_empty(&self) -> bool {
        self.bits()
            .iter()
            .all(|word| word.load(Ordering::Acquire) == 0)
    }

    /// The missing blocks of a region.
    pub fn to_bitmap(&self, region: u16) -> RoaringBitmap {
        let Some(bits) = self.regions.get(usize::from(region)) else {
            return RoaringBitmap::new();
        };
        let words = &self.words.slice()[bits.first_word..][..words_for(bits.blocks)];
        let mut set = RoaringBitmap::new();
        for (index, word) in words.iter().enumerate() {
            let mut rest = word.load(Ordering::Acquire);
            while rest != 0 {
                set.insert(index as u32 * 64 + rest.trailing_zeros());
                rest &= rest - 1;
            }
        }
        set
    }

    fn init(file: File, name: &Path, blocks: &[u32]) -> Result<Self> {
        assert!(
            blocks.len() <= MAX_REGIONS,
            "region indices have 16 bits: there cannot be {}",
            blocks.len()
        );
        let (regions, total) = layout(blocks);
        let what = || format!("making room for {}", name.display());
        // Allocated now: a full file system is an error here, and not a SIGBUS later.
        rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, total as u64 * 8)
            .map_err(|error| PagerError::os(what(), error))?;
        let words = Words::map(&file, 0, total)?;
        for (region, len) in blocks.iter().enumerate() {
            words.slice()[FIXED_WORDS + region].store(u64::from(*len), Ordering::Relaxed);
        }
        words.slice()[2].store(blocks.len() as u64, Ordering::Relaxed);
        words.slice()[1].store(VERSION, Ordering::Relaxed);
        words.slice()[0].store(MAGIC, Ordering::Release);
        Ok(Self {
            words,
            file,
            regions,
        })
    }

    fn bits(&self) -> &[AtomicU64] {
        &self.words.slice()[FIXED_WORDS + self.regions.len()..]
    }

    fn locate(&self, region: u16, block: u32) -> Option<(&AtomicU64, u64)> {
        let bits = self.regions.get(usize::from(region))?;
        (block < bits.blocks).then(|| {
            (
                &self.words.slice()[bits.first_word + block as usize / 64],
                1 << (block % 64),
            )
        })
    }
}

/// Where each region's words begin, and the number of words of the whole file.
fn layout(blocks: &[u32]) -> (Vec<RegionBits>, usize) {
    let mut next = FIXED_WORDS + blocks.len();
    let regions = blocks
        .iter()
        .map(|&blocks| {
            let first_word = next;
            next += words_for(blocks);
            RegionBits { first_word, blocks }
        })
        .collect();
    (regions, next)
}

fn words_for(blocks: u32) -> usize {
    (blocks as usize).div_ceil(64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::os::unix::fs::FileExt;

    #[test]
    fn what_was_marked_is_there_after_reopening() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("missing");
        let sets: [RoaringBitmap; 2] = [[0, 63, 64, 99].into_iter().collect(), (5..200).collect()];
        let map = MissingMap::create(&path, &[100, 0, 300]).unwrap();
        map.insert(0, &sets[0]).unwrap();
        map.insert(2, &sets[1]).unwrap();
        assert!(map.insert(0, &[100].into_iter().collect()).is_err());
        assert!(map.insert(1, &[0].into_iter().collect()).is_err());
        drop(map);

        let map = MissingMap::open(&path).unwrap();
        assert_eq!(map.regions(), 3);
        assert_eq!(map.to_bitmap(0), sets[0]);
        assert_eq!(map.to_bitmap(2), sets[1]);
        assert_eq!(map.count(), 4 + 195);
        assert!(map.clear(0, 63) && !map.clear(0, 63));
        assert!(!map.contains(0, 63) && map.contains(0, 64));
        assert!(!map.contains(0, 100) && !map.contains(7, 0));
        assert_eq!(map.clear_range(2, 0, u32::MAX), 195);
        assert_eq!(map.clear_range(0, 0, 100), 3);
        assert!(map.is_empty());
    }

    #[test]
    fn damaged_files_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("missing");
        let refused = || {
            matches!(
                MissingMap::open(&path),
                Err(PagerError::BadMissingMap { .. })
            )
        };
        std::fs::write(&path, b"short").unwrap();
        assert!(refused());
        std::fs::write(&path, [0; 64]).unwrap();
        assert!(refused());
        drop(MissingMap::create(&path, &[1000]).unwrap());
        let file = File::options().write(true).open(&path).unwrap();
        for (at, value) in [(8, 9_u64), (16, u64::MAX), (32, 2000)] {
            let mut before = [0; 8];
            File::open(&path)
                .unwrap()
                .read_exact_at(&mut before, at)
                .unwrap();
            file.write_all_at(&value.to_le_bytes(), at).unwrap();
            assert!(refused(), "word at {at}");
            file.write_all_at(&before, at).unwrap();
        }
        assert!(!refused());
    }

    proptest! {
        #[test]
        fn clearing_ranges_matches_a_set(
            blocks in proptest::collection::btree_set(0_u32..500, 0..200),
            ranges in proptest::collection::vec((0_u32..600, 0_u32..200), 0..8),
        ) {
            let map = MissingMap::in_memory(&[500]).unwrap();
            let mut model: RoaringBitmap = blocks.into_iter().collect();
            map.insert(0, &model).unwrap();
            for (first, count) in ranges {
                let before = model.len();
                model.remove_range(first..first + count);
                prop_assert_eq!(u64::from(map.clear_range(0, first, count)), before - model.len());
                prop_assert_eq!(&map.to_bitmap(0), &model);
                prop_assert_eq!(map.count(), model.len());
            }
        }
    }
}
