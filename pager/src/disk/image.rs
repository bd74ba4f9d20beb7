//! The image: created, filled by the migration, armed, completed, finished.

use std::fmt;
use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, OnceLock};

use roaring::RoaringBitmap;
use rustix::fs::{FallocateFlags, SeekFrom};
use rustix::io::Errno;

use super::flush::Flusher;
use super::geometry::Geometry;
use super::header::{BootId, Header, Phase, boot_id};
use super::map::{GranuleMap, open_locked, sync_directory};
use super::pending::{LOCKED_TOGETHER, Shards, go_on};
use super::stats::Stats;
use super::{DiskError, DiskStats, Result};
use crate::FaultSink;

const FILLING: u8 = 0;
const ARMED: u8 = 1;
const FINISHED: u8 = 2;

/// What disk, and where it is kept.
#[derive(Clone, Debug)]
pub struct DiskOptions {
    /// Index of the region, for the [`FaultSink`].
    pub region: u16,
    /// The image: a raw, sparse file, `bytes` long.
    pub image: PathBuf,
    /// The map of what is missing; it goes when the disk is finished.
    pub map: PathBuf,
    /// Size of the disk.
    pub bytes: u64,
    /// Bytes of a block: a power of two from 4 KiB to 256 KiB.
    pub block_size: u32,
    /// Replace an image or a map that is there already.
    pub overwrite: bool,
}

impl DiskOptions {
    /// 64 KiB: a block, unless told otherwise.
    pub const BLOCK_SIZE: u32 = 64 << 10;
}

/// A disk of the guest. All of it can be used from any thread.
pub struct DiskImage {
    pub(super) path: PathBuf,
    pub(super) file: File,
    pub(super) geometry: Geometry,
    pub(super) map: GranuleMap,
    pub(super) shards: Shards,
    pub(super) stats: Arc<Stats>,
    pub(super) flusher: Flusher,
    pub(super) faults: OnceLock<Arc<dyn FaultSink>>,
    region: u16,
    state: AtomicU8,
}

impl DiskImage {
    /// Creates the image, all zeroes, and its map, and locks both against other processes.
    pub fn create(options: &DiskOptions) -> Result<Arc<Self>> {
        let geometry = Geometry::new(options.bytes, options.block_size)?;
        let path = &options.image;
        let file = open_locked(path, true)?;
        let metadata = file.metadata().map_err(DiskError::io("fstat of", path))?;
        if !metadata.is_file() {
            return Err(DiskError::BadOptions {
                reason: format!("{} is not a regular file", path.display()),
            });
        }
        if metadata.size() > 0 && !options.overwrite {
            return Err(DiskError::Exists { path: path.clone() });
        }
        let absolute = path
            .canonicalize()
            .map_err(DiskError::io("resolving", path))?;
        if !Header::fits(&absolute) {
            return Err(DiskError::BadOptions {
                reason: format!("the path {} is too long", absolute.display()),
            });
        }
        let header = Header {
            phase: Phase::Filling,
            region: options.region,
            block_size: options.block_size,
            bytes: options.bytes,
            inode: metadata.ino(),
            boot: this_boot()?,
            image: absolute.clone(),
        };
        // First the map: one that was left by an earlier image must not promise anything of this.
        let map = GranuleMap::create(&options.map, header, options.overwrite)?;
        file.set_len(0)
            .and_then(|()| file.set_len(options.bytes))
            .map_err(DiskError::io("making", path))?;
        match punch(&file, 0, options.bytes) {
            Ok(()) => {}
            Err(Errno::OPNOTSUPP) => return Err(DiskError::NoHoles { path: path.clone() }),
            Err(error) => return Err(DiskError::io("punching a hole into", path)(error)),
        }
        file.sync_all().map_err(DiskError::io("fsync of", path))?;
        sync_directory(path)?;
        sync_directory(&options.map)?;
        Ok(Self::new(absolute, file, geometry, map, FILLING))
    }

    /// Goes on where another process ended, however it ended, with the map that it left. Blocks
    /// that had been asked for are asked for again when the guest needs them.
    pub fn adopt(map: &Path, faults: Arc<dyn FaultSink>) -> Result<Arc<Self>> {
        Self::adopt_after(map, faults, this_boot()?)
    }

    pub(super) fn adopt_after(
        map: &Path,
        faults: Arc<dyn FaultSink>,
        boot: BootId,
    ) -> Result<Arc<Self>> {
        let map = GranuleMap::open(map, boot)?;
        let header = map.header().clone();
        let file = open_locked(&header.image, false)?;
        let metadata = file
            .metadata()
            .map_err(DiskError::io("fstat of", &header.image))?;
        let bad = |what: String| DiskError::BadMap {
            path: map.path().into(),
            reason: format!("{} {what}", header.image.display()),
        };
        if metadata.ino() != header.inode {
            return Err(bad("is another file than the one that it is for".into()));
        }
        if metadata.size() != header.bytes {
            let size = metadata.size();
            return Err(bad(format!("has {size} bytes, not {}", header.bytes)));
        }
        let geometry = Geometry::new(header.bytes, header.block_size)?;
        let image = Self::new(header.image, file, geometry, map, ARMED);
        image.faults.get_or_init(|| faults);
        Ok(image)
    }

    fn new(path: PathBuf, file: File, geometry: Geometry, map: GranuleMap, state: u8) -> Arc<Self> {
        let region = map.header().region;
        Arc::new(Self {
            path,
            file,
            geometry,
            map,
            shards: Shards::new(),
            stats: Arc::new(Stats::new()),
            flusher: Flusher::default(),
            faults: OnceLock::new(),
            region,
            state: AtomicU8::new(state),
        })
    }

    /// Index of the region.
    pub fn region(&self) -> u16 {
        self.region
    }

    /// Size of the disk in bytes.
    pub fn bytes(&self) -> u64 {
        self.geometry.bytes
    }

    /// Bytes of a block.
    pub fn block_size(&self) -> u32 {
        self.geometry.block_size
    }

    /// Number of blocks; the last may be shorter.
    pub fn blocks(&self) -> u32 {
        self.geometry.blocks()
    }

    /// Absolute path of the image.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The map's path.
    pub fn map_path(&self) -> &Path {
        self.map.path()
    }

    /// Whether the guest may write to it: armed, or finished.
    pub fn is_armed(&self) -> bool {
        self.state.load(Ordering::SeqCst) != FILLING
    }

    /// Writes whole blocks, before the disk is armed. What the last block of `data` has beyond
    /// the end of the disk is dropped.
    pub fn write(&self, first: u32, data: &[u8]) -> Result<()> {
        self.needs(FILLING, "write")?;
        let count = self.whole_blocks(first, data)?;
        let bytes = self
            .geometry
            .bytes_of(&self.geometry.granules_of(first, count));
        self.file
            .write_all_at(&data[..(bytes.end - bytes.start) as usize], bytes.start)
            .map_err(DiskError::io("writing to", &self.path))
    }

    /// Makes blocks zero, before the disk is armed.
    pub fn write_zero(&self, first: u32, count: u32) -> Result<()> {
        self.needs(FILLING, "write_zero")?;
        self.geometry.check(self.region, first, u64::from(count))?;
        let bytes = self
            .geometry
            .bytes_of(&self.geometry.granules_of(first, count));
        if bytes.is_empty() {
            return Ok(());
        }
        punch(&self.file, bytes.start, bytes.end - bytes.start)
            .map_err(DiskError::io("punching a hole into", &self.path))
    }

    /// Reads a block as it is now, guest's writes included. `buf` holds one whole block; beyond
    /// the end of the disk it becomes zero. A block with a missing granule is an error.
    pub fn read(&self, block: u32, buf: &mut [u8]) -> Result<()> {
        self.geometry.check(self.region, block, 1)?;
        if buf.len() != self.geometry.block_size as usize {
            return Err(self.not_whole(buf.len()));
        }
        let granules = self.geometry.granules_of(block, 1);
        if self.map.any_missing(&granules) {
            let region = self.region;
            return Err(DiskError::Missing { region, block });
        }
        let bytes = self.geometry.bytes_of(&granules);
        let (here, beyond) = buf.split_at_mut((bytes.end - bytes.start) as usize);
        beyond.fill(0);
        self.file
            .read_exact_at(here, bytes.start)
            .map_err(DiskError::io("reading", &self.path))
    }

    /// The blocks in `missing` are not current: they become holes and count as missing. All others
    /// are here. No write may be under way.
    ///
    /// The guest stands still meanwhile, so nothing is waited for: what survives is the end of this
    /// process, and from the guest's first flush on a loss of power, too.
    pub fn arm(&self, missing: &RoaringBitmap, faults: Arc<dyn FaultSink>) -> Result<()> {
        self.needs(FILLING, "arm")?;
        if let Some(last) = missing.max() {
            self.geometry.check(self.region, last, 1)?;
        }
        let mut blocks = missing.iter();
        let mut data = 0;
        while let Some(run) = blocks.next_range() {
            let granules = self
                .geometry
                .granules_of(*run.start(), run.end() - run.start() + 1);
            self.map.set(&granules);
            let bytes = self.geometry.bytes_of(&granules);
            // Most are holes already: one look at where data is next passes many runs.
            if data < bytes.end {
                data = next_data(&self.file, data.max(bytes.start))
                    .map_err(DiskError::io("SEEK_DATA in", &self.path))?
                    .unwrap_or(self.geometry.bytes);
            }
            if data < bytes.end {
                punch(&self.file, bytes.start, bytes.end - bytes.start)
                    .map_err(DiskError::io("punching a hole into", &self.path))?;
            }
        }
        self.map.note_phase(Phase::Armed)?;
        self.faults.get_or_init(|| faults);
        self.state.store(ARMED, Ordering::SeqCst);
        Ok(())
    }

    /// Blocks that came from the source: fills those granules of them that are still missing, and
    /// wakes who waits. A block that is here already is left alone. Padded like [`Self::write`].
    pub fn place(&self, first: u32, data: &[u8]) -> Result<()> {
        self.needs_armed("place")?;
        let count = self.whole_blocks(first, data)?;
        let start = u64::from(first) * u64::from(self.geometry.block_size);
        self.fill(first, count, |bytes| {
            let from = (bytes.start - start) as usize;
            let len = (bytes.end - bytes.start) as usize;
            self.file.write_all_at(&data[from..from + len], bytes.start)
        })
        .map_err(DiskError::io("placing blocks in", &self.path))
    }

    /// Like [`Self::place`] with zeroes.
    pub fn place_zero(&self, first: u32, count: u32) -> Result<()> {
        self.needs_armed("place_zero")?;
        self.geometry.check(self.region, first, u64::from(count))?;
        self.fill(first, count, |bytes| {
            // Not always a hole already: a process may have been killed while it placed data here.
            punch(&self.file, bytes.start, bytes.end - bytes.start).map_err(Into::into)
        })
        .map_err(DiskError::io("punching a hole into", &self.path))
    }

    /// Blocks with a granule that is missing.
    pub fn missing(&self) -> RoaringBitmap {
        self.map.blocks()
    }

    /// Number of granules of 4 KiB that are missing; cheap.
    pub fn missing_granules(&self) -> u64 {
        self.map.missing()
    }

    /// Nothing is missing: makes everything durable. From now on the image is an ordinary raw file, which this value
    /// goes on serving. Only after this may the source forget the disk: what was placed or written but not flushed
    /// would be gone with the host. The map stays for as long as another process may have to serve the disk in
    /// this one's place; it is to be removed, with what else that process would need, when the guest uses the
    /// image itself.
    pub fn finish(&self) -> Result<()> {
        self.needs(ARMED, "finish")?;
        if self.map.missing() > 0 {
            return Err(DiskError::StillMissing {
                count: self.map.blocks().len(),
                image: self.path.clone(),
            });
        }
        self.flush()
            .map_err(DiskError::io("fdatasync of", &self.path))?;
        self.state.store(FINISHED, Ordering::SeqCst);
        Ok(())
    }

    /// What the disk has done so far.
    pub fn stats(&self) -> DiskStats {
        self.stats.snapshot()
    }

    /// Fills the missing runs of blocks by `put`, which is told their bytes.
    fn fill(
        &self,
        first: u32,
        count: u32,
        put: impl Fn(&std::ops::Range<u64>) -> std::io::Result<()>,
    ) -> std::io::Result<()> {
        let end = first + count;
        let mut block = first;
        while block < end {
            let together = LOCKED_TOGETHER.min(end - block);
            let granules = self.geometry.granules_of(block, together);
            let mut locked = self.shards.lock(block, together);
            let mut rest = granules.clone();
            let mut result = Ok(());
            while let Some(run) = self.map.next_missing(&rest) {
                result = put(&self.geometry.bytes_of(&run));
                if result.is_err() {
                    break;
                }
                let placed = self.map.clear(&run);
                self.stats.placed.fetch_add(placed, Ordering::Relaxed);
                rest.start = run.end;
            }
            // After an error too: some may have come before it.
            let ready = locked.arrived(&self.map);
            drop(locked);
            go_on(&ready);
            result?;
            block += together;
        }
        Ok(())
    }

    /// What comes late, after the disk was finished, is no error: its blocks are here.
    fn needs_armed(&self, operation: &'static str) -> Result<()> {
        if self.is_armed() {
            return Ok(());
        }
        self.needs(ARMED, operation)
    }

    fn needs(&self, state: u8, operation: &'static str) -> Result<()> {
        if self.state.load(Ordering::SeqCst) == state {
            return Ok(());
        }
        Err(DiskError::WrongState {
            operation,
            needed: match state {
                FILLING => "is not armed yet",
                _ => "is armed and not finished",
            },
            image: self.path.clone(),
        })
    }

    fn whole_blocks(&self, first: u32, data: &[u8]) -> Result<u32> {
        let block = self.geometry.block_size as usize;
        if data.is_empty() || !data.len().is_multiple_of(block) {
            return Err(self.not_whole(data.len()));
        }
        let count = (data.len() / block) as u64;
        self.geometry.check(self.region, first, count)?;
        Ok(count as u32)
    }

    fn not_whole(&self, len: usize) -> DiskError {
        DiskError::NotWholeBlocks {
            len,
            block_size: self.geometry.block_size,
        }
    }
}

impl fmt::Debug for DiskImage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DiskImage")
            .field("path", &self.path)
            .field("geometry", &self.geometry)
            .field("state", &self.state)
            .field("missing_granules", &self.map.missing())
            .finish_non_exhaustive()
    }
}

/// Makes bytes zero by giving their room back. `len` must not be 0.
pub(super) fn punch(file: &File, offset: u64, len: u64) -> rustix::io::Result<()> {
    let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    rustix::fs::fallocate(file, mode, offset, len)
}

/// Where the next data begins at or after `offset`, if any does.
pub(super) fn next_data(file: &File, offset: u64) -> rustix::io::Result<Option<u64>> {
    match rustix::fs::seek(file, SeekFrom::Data(offset)) {
        Ok(data) => Ok(Some(data)),
        Err(Errno::NXIO) => Ok(None),
        Err(error) => Err(error),
    }
}

fn this_boot() -> Result<BootId> {
    boot_id().map_err(DiskError::io(
        "reading",
        Path::new("/proc/sys/kernel/random/boot_id"),
    ))
}
