//! Which granules are missing, twice in one file: the *live* map for the next process after a kill,
//! the *durable* one for the next start of the host.
//!
//! The rule that makes both safe: **a bit is cleared only after the granule's contents are where
//! the bit's map promises**: in the page cache for the live map, on the medium for the durable one.
//! After arming bits are only ever cleared, so any mixture of an older and a newer state is true.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use roaring::RoaringBitmap;
use rustix::fs::{FallocateFlags, FlockOperation};
use rustix::io::Errno;

use super::geometry::Geometry;
use super::header::{BootId, HEADER_BYTES, Header, Phase};
use super::{DiskError, Result};
use crate::words::Words;

/// Words that are made durable together: 4 KiB of the map.
const PAGE_WORDS: usize = 512;
/// Each map begins at a multiple of this, which is one of every page size.
const ALIGN: usize = 64 << 10;

/// The map of one disk.
#[derive(Debug)]
pub(super) struct GranuleMap {
    file: File,
    path: PathBuf,
    geometry: Geometry,
    header: Mutex<Header>,
    live: Words,
    /// Granules that are missing by the live map.
    missing: AtomicU64,
    /// Pages of the live map that may differ from the durable one.
    changed: Vec<AtomicBool>,
}

/// A page of the live map as it was at some moment.
#[derive(Debug)]
pub(super) struct PageCopy {
    page: usize,
    bytes: Vec<u8>,
}

impl GranuleMap {
    /// A map without a missing granule.
    pub(super) fn create(path: &Path, header: Header, overwrite: bool) -> Result<Self> {
        let geometry = Geometry::new(header.bytes, header.block_size)?;
        let file = open_locked(path, true)?;
        let old = file
            .metadata()
            .map_err(DiskError::io("fstat of", path))?
            .size();
        if old > 0 && !overwrite {
            return Err(DiskError::Exists { path: path.into() });
        }
        let total = (HEADER_BYTES + 2 * section(geometry)) as u64;
        file.set_len(0).map_err(DiskError::io("truncating", path))?;
        // Allocated now: a full file system is an error here, and not a SIGBUS later.
        rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, total)
            .map_err(DiskError::io("making room for", path))?;
        let map = Self::new(file, path, geometry, header)?;
        map.write_header(|_| {})?;
        Ok(map)
    }

    /// What another process left, which must have armed it. `boot` is this start of the host.
    pub(super) fn open(path: &Path, boot: BootId) -> Result<Self> {
        let bad = |reason: String| DiskError::BadMap {
            path: path.into(),
            reason,
        };
        let file = open_locked(path, false)?;
        let len = file
            .metadata()
            .map_err(DiskError::io("fstat of", path))?
            .size();
        let mut bytes = vec![0; HEADER_BYTES];
        if len < HEADER_BYTES as u64 {
            return Err(bad("it is too short".into()));
        }
        file.read_exact_at(&mut bytes, 0)
            .map_err(DiskError::io("reading", path))?;
        let header = Header::decode(&bytes).map_err(bad)?;
        let geometry = Geometry::new(header.bytes, header.block_size)
            .map_err(|error| bad(error.to_string()))?;
        if len != (HEADER_BYTES + 2 * section(geometry)) as u64 {
            return Err(bad(format!(
                "its length of {len} bytes does not fit a disk of {} bytes",
                header.bytes
            )));
        }
        let same_boot = header.boot == boot;
        match header.phase {
            Phase::Durable => {}
            Phase::Armed if same_boot => {}
            Phase::Armed | Phase::Filling => {
                return Err(DiskError::NeverArmed { path: path.into() });
            }
        }
        let map = Self::new(file, path, geometry, header)?;
        map.recover(same_boot)?;
        if !same_boot {
            // Only now: a process that is killed before takes the durable map as well.
            map.write_header(|header| header.boot = boot)?;
        }
        Ok(map)
    }

    fn new(file: File, path: &Path, geometry: Geometry, header: Header) -> Result<Self> {
        let words = word_count(geometry);
        Ok(Self {
            live: Words::map(&file, HEADER_BYTES as u64, words)?,
            file,
            path: path.into(),
            geometry,
            header: Mutex::new(header),
            missing: AtomicU64::new(0),
            changed: (0..words.div_ceil(PAGE_WORDS))
                .map(|_| AtomicBool::new(false))
                .collect(),
        })
    }

    /// Brings the live map, the count and the marks of change in line with the durable map.
    fn recover(&self, keep_live: bool) -> Result<()> {
        let mut missing = 0;
        for page in 0..self.changed.len() {
            let words = self.page(page);
            let mut durable = vec![0; words.len() * 8];
            self.file
                .read_exact_at(&mut durable, self.durable_at(page))
                .map_err(DiskError::io("reading", &self.path))?;
            let (durable, _) = durable.as_chunks::<8>();
            for (index, (word, durable)) in words.iter().zip(durable).enumerate() {
                let durable = u64::from_le_bytes(*durable);
                let wanted = if keep_live {
                    u64::from_le(word.load(Ordering::Relaxed))
                } else {
                    durable
                } & self.existing(page * PAGE_WORDS + index);
                word.store(wanted.to_le(), Ordering::Relaxed);
                missing += u64::from(wanted.count_ones());
                if wanted != durable {
                    self.changed[page].store(true, Ordering::Relaxed);
                }
            }
        }
        self.missing.store(missing, Ordering::SeqCst);
        Ok(())
    }

    /// The bits of a word that stand for granules of the disk.
    fn existing(&self, word: usize) -> u64 {
        mask(0..(self.geometry.granules() - word as u64 * 64).min(64))
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn header(&self) -> MutexGuard<'_, Header> {
        // Fields are only ever replaced as a whole.
        self.header.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the header, durably.
    pub(super) fn write_header(&self, change: impl FnOnce(&mut Header)) -> Result<()> {
        self.put_header(change)
            .and_then(|()| self.file.sync_data())
            .map_err(DiskError::io("writing the header of", &self.path))
    }

    /// Notes how far the disk has come, for the next process only.
    pub(super) fn note_phase(&self, phase: Phase) -> Result<()> {
        self.put_header(|header| header.phase = phase)
            .map_err(DiskError::io("writing the header of", &self.path))
    }

    fn put_header(&self, change: impl FnOnce(&mut Header)) -> std::io::Result<()> {
        let mut header = self.header();
        change(&mut header);
        self.file.write_all_at(&header.encode(), 0)
    }

    /// Number of missing granules.
    pub(super) fn missing(&self) -> u64 {
        self.missing.load(Ordering::SeqCst)
    }

    /// Whether one of these granules is missing.
    pub(super) fn any_missing(&self, granules: &Range<u64>) -> bool {
        self.missing() != 0 && self.next_missing(granules).is_some()
    }

    /// The first run of missing granules.
    pub(super) fn next_missing(&self, granules: &Range<u64>) -> Option<Range<u64>> {
        let start = self.find(granules, |word| word)?;
        let end = self.find(&(start..granules.end), |word| !word);
        Some(start..end.unwrap_or(granules.end))
    }

    /// Missing granules among those of a block that `granules` touches, by their place in their
    /// word. 0 stands for none.
    pub(super) fn missing_of(&self, block: u32, granules: &Range<u64>) -> u64 {
        let of = self.geometry.granules_of(block, 1);
        let wanted = of.start.max(granules.start)..of.end.min(granules.end);
        if wanted.is_empty() {
            return 0;
        }
        let first = wanted.start / 64 * 64;
        self.word(first) & mask(wanted.start - first..wanted.end - first)
    }

    /// These granules are here. Returns how many had been missing.
    pub(super) fn clear(&self, granules: &Range<u64>) -> u64 {
        let mut cleared = 0;
        for (index, mask) in words_of(granules) {
            let before = self.live.slice()[index].fetch_and(!mask.to_le(), Ordering::SeqCst);
            let bits = u64::from((u64::from_le(before) & mask).count_ones());
            if bits != 0 {
                self.changed[index / PAGE_WORDS].store(true, Ordering::SeqCst);
                cleared += bits;
            }
        }
        if cleared != 0 {
            self.missing.fetch_sub(cleared, Ordering::SeqCst);
        }
        cleared
    }

    /// These granules are missing. Only before the guest runs.
    pub(super) fn set(&self, granules: &Range<u64>) {
        for (index, mask) in words_of(granules) {
            let before = self.live.slice()[index].fetch_or(mask.to_le(), Ordering::SeqCst);
            self.changed[index / PAGE_WORDS].store(true, Ordering::SeqCst);
            let bits = (mask & !u64::from_le(before)).count_ones();
            self.missing.fetch_add(u64::from(bits), Ordering::SeqCst);
        }
    }

    /// Blocks with a missing granule.
    pub(super) fn blocks(&self) -> RoaringBitmap {
        let mut set = RoaringBitmap::new();
        let mut rest = 0..self.geometry.granules();
        while let Some(run) = self.next_missing(&rest) {
            set.insert_range(
                self.geometry.block_of(run.start)..=self.geometry.block_of(run.end - 1),
            );
            rest.start = run.end;
        }
        set
    }

    /// What the durable map lacks, as it is now.
    pub(super) fn take_changed(&self) -> Vec<PageCopy> {
        let mut copies = Vec::new();
        for (page, changed) in self.changed.iter().enumerate() {
            if changed.load(Ordering::SeqCst) && changed.swap(false, Ordering::SeqCst) {
                let words = self.page(page).iter();
                let bytes = words
                    .flat_map(|word| word.load(Ordering::SeqCst).to_ne_bytes())
                    .collect();
                copies.push(PageCopy { page, bytes });
            }
        }
        copies
    }

    /// Makes copies durable. To be called when the contents that they promise are durable. From the
    /// first time on the durable map holds.
    pub(super) fn make_durable(&self, copies: &[PageCopy]) -> std::io::Result<()> {
        for copy in copies {
            self.file
                .write_all_at(&copy.bytes, self.durable_at(copy.page))?;
        }
        if !copies.is_empty() {
            self.file.sync_data()?;
        }
        if self.header().phase == Phase::Armed {
            self.put_header(|header| header.phase = Phase::Durable)?;
            self.file.sync_data()?;
        }
        Ok(())
    }

    fn page(&self, page: usize) -> &[AtomicU64] {
        let words = self.live.slice();
        let first = page * PAGE_WORDS;
        &words[first..(first + PAGE_WORDS).min(words.len())]
    }

    fn durable_at(&self, page: usize) -> u64 {
        (HEADER_BYTES + section(self.geometry) + page * PAGE_WORDS * 8) as u64
    }

    fn word(&self, granule: u64) -> u64 {
        u64::from_le(self.live.slice()[(granule / 64) as usize].load(Ordering::SeqCst))
    }

    /// The first granule whose bit is set in what `view` makes of its word.
    fn find(&self, granules: &Range<u64>, view: impl Fn(u64) -> u64) -> Option<u64> {
        words_of(granules).find_map(|(index, mask)| {
            let first = index as u64 * 64;
            let bits = view(self.word(first)) & mask;
            (bits != 0).then(|| first + u64::from(bits.trailing_zeros()))
        })
    }
}

/// Words and the bits in them that stand for `granules`.
fn words_of(granules: &Range<u64>) -> impl Iterator<Item = (usize, u64)> + use<> {
    let Range { start, end } = *granules;
    let words = if start < end {
        start / 64..end.div_ceil(64)
    } else {
        0..0
    };
    words.map(move |word| {
        let first = word * 64;
        let bits = start.saturating_sub(first)..(end - first).min(64);
        (word as usize, mask(bits))
    })
}

/// A word with these bits set; at least one, at most 64.
fn mask(bits: Range<u64>) -> u64 {
    (u64::MAX >> (64 - (bits.end - bits.start))) << bits.start
}

fn word_count(geometry: Geometry) -> usize {
    geometry.granules().div_ceil(64) as usize
}

fn section(geometry: Geometry) -> usize {
    (word_count(geometry) * 8).next_multiple_of(ALIGN)
}

/// Opens a file of the disk's that no other process may use meanwhile. One that is created is for
/// this user only: it holds what the guest holds.
pub(super) fn open_locked(path: &Path, create: bool) -> Result<File> {
    let file = File::options()
        .read(true)
        .write(true)
        .create(create)
        .truncate(false)
        .mode(0o600)
        .open(path)
        .map_err(DiskError::io("opening", path))?;
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(Errno::WOULDBLOCK) => Err(DiskError::InUse { path: path.into() }),
        Err(error) => Err(DiskError::io("locking", path)(error)),
    }
}

/// Makes the creation or removal of a file durable.
pub(super) fn sync_directory(of: &Path) -> Result<()> {
    let parent = match of.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    File::open(parent)
        .and_then(|directory| directory.sync_all())
        .map_err(DiskError::io("fsync of", parent))
}
