//! Which pages of another process were written since the last look: userfaultfd write-protection
//! that the kernel resolves by itself (`WP_ASYNC`), read out by `PAGEMAP_SCAN`. The guest never
//! waits for us, and a tracker that dies only leaves memory unwatched, never a guest stuck.
//!
//! A report may name a page that was not written; it never misses one that was, through the
//! mappings it was given. Two things the scan cannot see are added:
//! - *holes*: `fallocate` and `MADV_REMOVE` change contents without a mark. At the freeze the
//!   populated pages are compared with those known so far. (Events would tell too, but a guest
//!   would hang in `madvise` when its pager dies.)
//! - *late DMA*: see [`grace`](crate::grace).
//!
//! Writes that bypass the mappings (`pwrite` to the file, a vhost-user backend's own mapping)
//! stay invisible where the page was present before: such guests must be refused beforehand.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use roaring::RoaringBitmap;
use rustix::io::Errno;

use crate::accessed::{Accesses, Sampler, SamplingStats, Watched};
use crate::grace::Grace;
use crate::pagemap::{Pagemap, Scan};
use crate::process::{self, Process};
use crate::uffd::RegisterMode;
use crate::{Mapping, PAGE_SIZE, PagerError, Ranges, Region, Result, Uffd};

/// Dirty runs closer than this are write-protected together: 64 KiB. With KVM each ioctl costs a
/// notification of the hypervisor for the range walked, which is why only dirty ranges are.
const GAP: u32 = 16;

/// How to track.
#[derive(Clone, Copy, Debug, Default)]
pub struct TrackerConfig {
    /// Report every dirty page once more after this time. Needed if devices write to guest memory
    /// by DMA (O_DIRECT disks); must exceed the longest latency of such an I/O. Starting to track
    /// takes this long too.
    pub grace: Option<Duration>,
}

/// Whether more will be written after this look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Settle {
    /// The guest runs.
    Running,
    /// The guest is frozen and its I/O drained: the report is complete.
    Final,
}

/// Dirty tracking of one guest process.
#[derive(Debug)]
pub struct Tracker {
    uffd: Uffd,
    process: Process,
    pagemap: Pagemap,
    regions: Vec<Region>,
    book: Mutex<Book>,
}

#[derive(Debug)]
struct Book {
    grace: Option<Grace>,
    /// Per region, the blocks that whoever keeps a copy takes for present: those of the start and
    /// those reported since.
    known: Vec<RoaringBitmap>,
    /// Per region, what sampling accesses made the next report name.
    owed: Vec<RoaringBitmap>,
    sampler: Sampler,
    /// What went wrong while accesses were sampled: the guest is not watched as it should be.
    broken: Option<PagerError>,
    stopped: bool,
}

impl Tracker {
    /// Begins to track. Returns, with the tracker, the blocks that are present: every other block
    /// reads as zero until it is reported. `uffd` must have
    /// [`Features::TRACKING`](crate::Features::TRACKING).
    ///
    /// With a grace time, this waits that long: DMA that was under way when the marks were first
    /// taken has then landed, and whatever is read from now on is current or will be reported.
    pub fn start(
        uffd: Uffd,
        pid: u32,
        regions: Vec<Region>,
        config: TrackerConfig,
    ) -> Result<(Self, Vec<(u16, RoaringBitmap)>)> {
        let tracker = Self {
            process: Process::open(pid)?,
            pagemap: Pagemap::open(pid)?,
            uffd,
            regions,
            book: Mutex::new(Book {
                grace: config.grace.map(Grace::new),
                known: Vec::new(),
                owed: Vec::new(),
                sampler: Sampler::default(),
                broken: None,
                stopped: false,
            }),
        };
        if let Err(error) = tracker.protect() {
            tracker.stop()?;
            return Err(error);
        }
        if let Some(grace) = config.grace {
            std::thread::sleep(grace);
        }
        let populated = tracker.populated()?;
        {
            let mut book = tracker.lock();
            book.owed = vec![RoaringBitmap::new(); populated.len()];
            book.known.clone_from(&populated);
        }
        let report = tracker.named(populated);
        Ok((tracker, report))
    }

    /// Blocks written or punched since the last look, by region; a region without any is left out.
    /// A page is reported before its mark is taken away, so reading it afterwards yields what the
    /// report is about, or something newer that will be reported again.
    pub fn take_dirty(&self, settle: Settle) -> Result<Vec<(u16, RoaringBitmap)>> {
        let mut book = self.lock();
        if let Some(error) = book.broken.take() {
            return Err(error);
        }
        let begun = Instant::now();
        let mut report = Vec::with_capacity(self.regions.len());
        for region in &self.regions {
            let mut dirty = RoaringBitmap::new();
            for mapping in &region.mappings {
                if let Err(error) = self.scan(mapping, &mut dirty) {
                    // An address space that is gone shows as a scan without progress.
                    self.process.check_alive()?;
                    return Err(error);
                }
            }
            report.push(dirty);
        }
        // Nothing is dirty in a process that has ended: that must not pass for a quiet guest.
        self.process.check_alive()?;
        // Only now: what is owed stays so if a scan fails.
        let none = vec![RoaringBitmap::new(); report.len()];
        let mut owed = std::mem::replace(&mut book.owed, none);
        for (report, owed) in report.iter_mut().zip(&owed) {
            // What a device writes there may be late as anywhere else.
            *report |= owed;
        }
        book.sampler.reported(&report);
        if let Some(grace) = &mut book.grace {
            match settle {
                Settle::Running => {
                    grace.due(begun, &mut owed);
                    grace.found(Instant::now(), &report);
                }
                Settle::Final => grace.settle(&mut owed),
            }
        }
        for (report, owed) in report.iter_mut().zip(&owed) {
            *report |= owed;
        }
        for (known, report) in book.known.iter_mut().zip(&report) {
            *known |= report;
        }
        if settle == Settle::Final {
            self.check_mappings()?;
            let populated = self.populated()?;
            for ((report, now), known) in report.iter_mut().zip(&populated).zip(&book.known) {
                // Punched, or filled by a way that leaves no mark.
                *report |= known ^ now;
            }
            book.known = populated;
        }
        Ok(self.named(report))
    }

    /// Which pages of a sample were accessed since the last call, by region; begins the next sample. To be called
    /// right after [`Self::take_dirty`], while the guest runs: what it writes in between is then reported twice.
    /// Empty while there is nothing to tell, and for good once [`SamplingStats::off`] says why. If it could not be made
    /// sure that no write is missed, the next [`Self::take_dirty`] fails.
    pub fn sample_accesses(&self) -> Vec<Accesses> {
        let mut guard = self.lock();
        let book = &mut *guard;
        if book.stopped || book.broken.is_some() {
            return Vec::new();
        }
        let guest = Watched {
            pid: self.process.pid(),
            uffd: &self.uffd,
            pagemap: &self.pagemap,
            regions: &self.regions,
            content: &book.known,
        };
        book.sampler
            .sample(&guest, &mut book.owed)
            .unwrap_or_else(|error| {
                book.broken = Some(error);
                Vec::new()
            })
    }

    /// What sampling accesses has done so far.
    pub fn sampling(&self) -> SamplingStats {
        self.lock().sampler.stats().clone()
    }

    /// Ends tracking: the guest runs as if it had never been watched. Idempotent; also done on
    /// drop.
    pub fn stop(&self) -> Result<()> {
        let mut book = self.lock();
        if std::mem::replace(&mut book.stopped, true) {
            return Ok(());
        }
        for mapping in self.mappings() {
            match self.uffd.unregister(mapping.address, mapping.len()) {
                // The range may never have been registered, or the guest has gone.
                Ok(()) | Err(Errno::SRCH | Errno::INVAL | Errno::NOENT) => {}
                Err(error) => return Err(PagerError::os("ending dirty tracking", error)),
            }
        }
        Ok(())
    }

    fn protect(&self) -> Result<()> {
        for mapping in self.mappings() {
            let fail = |what: &str, error: Errno| match (self.process.check_alive(), error) {
                (Err(gone), _) => gone,
                (Ok(()), Errno::BUSY) => PagerError::UnsuitableMemory {
                    reason:
                        "another userfaultfd watches it already: is another migration under way?"
                            .into(),
                },
                (Ok(()), error) => PagerError::os(
                    format!(
                        "{what} for process {} at {:#x}",
                        self.process.pid(),
                        mapping.address
                    ),
                    error,
                ),
            };
            self.uffd
                .register(mapping.address, mapping.len(), RegisterMode::WriteProtect)
                .map_err(|error| fail("UFFDIO_REGISTER", error))?;
            // Also splits huge pages: from here on tracking is by 4 KiB.
            self.uffd
                .write_protect(mapping.address, mapping.len())
                .map_err(|error| fail("UFFDIO_WRITEPROTECT", error))?;
        }
        Ok(())
    }

    /// Looks first and takes marks only in and between dirty ranges; what the second scan takes is
    /// what counts, as pages may be written between the two.
    fn scan(&self, mapping: &Mapping, dirty: &mut RoaringBitmap) -> Result<()> {
        const PAGE: u64 = PAGE_SIZE as u64;
        // Page numbers within the mapping.
        let page = |address: u64| ((address - mapping.address) / PAGE) as u32;
        let mut seen = RoaringBitmap::new();
        self.pagemap
            .written(mapping.address, mapping.end(), Scan::Look, |start, end| {
                seen.insert_range(page(start)..page(end));
            })?;
        for (first, count) in Ranges::coalesced(&seen, GAP) {
            let start = mapping.address + u64::from(first) * PAGE;
            self.pagemap
                .written(start, start + count * PAGE, Scan::Take, |start, end| {
                    dirty.insert_range(mapping.first + page(start)..mapping.first + page(end));
                })?;
        }
        Ok(())
    }

    /// A guest that maps its memory anew, or no longer, was not watched there.
    fn check_mappings(&self) -> Result<()> {
        let pid = self.process.pid();
        for region in &self.regions {
            if process::find_mappings(pid, &region.memory)? != region.mappings {
                return Err(PagerError::MappingsChanged {
                    pid,
                    region: region.index(),
                });
            }
        }
        Ok(())
    }

    fn populated(&self) -> Result<Vec<RoaringBitmap>> {
        self.regions
            .iter()
            .map(|region| region.memory.populated())
            .collect()
    }

    fn mappings(&self) -> impl Iterator<Item = &Mapping> {
        self.regions.iter().flat_map(|region| &region.mappings)
    }

    fn named(&self, sets: Vec<RoaringBitmap>) -> Vec<(u16, RoaringBitmap)> {
        self.regions
            .iter()
            .map(Region::index)
            .zip(sets)
            .filter(|(_, set)| !set.is_empty())
            .collect()
    }

    fn lock(&self) -> MutexGuard<'_, Book> {
        // A panic in between leaves at worst a page reported twice.
        self.book.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Tracker {
    fn drop(&mut self) {
        if let Err(error) = self.stop() {
            tracing::warn!(%error, "dirty tracking was not ended");
        }
    }
}
