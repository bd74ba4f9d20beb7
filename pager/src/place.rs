//! The destination's memory while the guest runs: what is missing is trapped, what arrives is
//! placed, who waits is woken. It must never overwrite a page that is present, never place a
//! block that the guest has given back, and never clear a missing bit before the block is there.
//!
//! Two races decide the locking. The guest gives memory back (`MADV_REMOVE`): the kernel tells us,
//! and punches the hole once the event has been *read*. A stale block that is placed after that
//! would be a wrong byte. So events are read and missing bits cleared under the write half of
//! `layout`, and placing looks at the bits and copies under the read half. And a thread may begin
//! to wait while its block's bit is being cleared: whoever waits is booked before the bit is
//! looked at, the bit is cleared before the book is.

use std::fmt;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use roaring::RoaringBitmap;
use rustix::event::EventfdFlags;
use rustix::io::Errno;

use crate::layout::Layout;
use crate::process::Process;
use crate::serve;
use crate::stats::{FaultStats, Waiters};
use crate::uffd::RegisterMode;
use crate::{MissingMap, PAGE_SIZE, PagerError, Region, RegionMemory, Result, Uffd};

/// Blocks that are placed under one hold of the lock: what a fault has to wait for at most.
const CHUNK: usize = 32;
/// How long a layout change of the guest may hold up placing.
const PATIENCE: Duration = Duration::from_secs(30);

/// What a fault thread does with a fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultAnswer {
    /// The block has been asked for; who faulted waits.
    Requested,
    /// The block is zero: resolve it at once.
    Zero,
}

/// Told of faults, on the pager's own threads. Must not block, and must not place blocks itself:
/// that is for other threads.
pub trait FaultSink: Send + Sync {
    /// The guest waits for a missing block. May be told again for the same block (another thread,
    /// a wait that was interrupted).
    fn fault(&self, region: u16, block: u32) -> FaultAnswer;

    /// The guest gave these blocks back: they are zero, and no longer missing.
    fn removed(&self, region: u16, first: u32, count: u32);

    /// The pager cannot go on; the guest's threads wait until another pager takes over. Told once.
    fn failed(&self, error: PagerError);
}

/// How to serve faults.
#[derive(Clone, Copy, Debug)]
pub struct PlacerConfig {
    /// Threads that read faults; at least one.
    pub fault_threads: usize,
}

impl Default for PlacerConfig {
    fn default() -> Self {
        Self { fault_threads: 2 }
    }
}

/// Serves the faults of one guest process. Dropping it stops the threads and leaves the trap in
/// place: whoever faults then waits for the next pager.
#[derive(Debug)]
pub struct Placer {
    shared: Arc<Shared>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

impl Placer {
    /// Traps access to everything that is absent, then discards what is not current: every block
    /// in `missing` and every present block that is not in `written`. The guest must not run yet.
    /// `uffd` must have [`Features::PLACING`](crate::Features::PLACING).
    pub fn arm(
        uffd: Uffd,
        pid: u32,
        regions: Vec<Region>,
        missing: Arc<MissingMap>,
        written: &[(u16, RoaringBitmap)],
        sink: Arc<dyn FaultSink>,
        config: PlacerConfig,
    ) -> Result<Self> {
        let shared = Shared::new(uffd, pid, regions, missing, sink)?;
        shared.register()?;
        let none = RoaringBitmap::new();
        let discarded = shared.memories().try_for_each(|memory| {
            let written = written
                .iter()
                .find(|(region, _)| *region == memory.region())
                .map_or(&none, |(_, set)| set);
            memory.discard(&shared.missing.to_bitmap(memory.region()), written)
        });
        if let Err(error) = discarded {
            shared.unregister(&shared.layout())?;
            return Err(error);
        }
        shared.missing.set_armed();
        Self::start(shared, config)
    }

    /// Goes on where another pager of the same guest ended, however it ended. `uffd` is the
    /// guest's copy of the descriptor ([`crate::attach::recover`]) or was handed over; `missing` is
    /// the map that the other pager kept. Nothing is discarded.
    ///
    /// Works only if somebody else held the userfaultfd open all the time. If the ended pager
    /// held the only copy, the kernel has let the waiting threads go on with zero pages: that guest
    /// is lost, and this cannot tell.
    ///
    /// One window stays open: a pager killed within the microseconds between reading a removal and
    /// noting it in `missing` leaves these blocks marked missing, and they would come back with
    /// their old contents.
    pub fn take_over(
        uffd: Uffd,
        pid: u32,
        regions: Vec<Region>,
        missing: Arc<MissingMap>,
        sink: Arc<dyn FaultSink>,
        config: PlacerConfig,
    ) -> Result<Self> {
        if !missing.is_armed() {
            return Err(PagerError::NeverArmed);
        }
        let shared = Shared::new(uffd, pid, regions, missing, sink)?;
        shared.register()?;
        // A page that is present was placed: its bit was about to be cleared.
        for memory in shared.memories() {
            let region = memory.region();
            for block in memory.populated()? & shared.missing.to_bitmap(region) {
                shared.missing.clear(region, block);
            }
        }
        let placer = Self::start(shared, config)?;
        // Faults that the other pager had read are told again.
        let layout = placer.shared.layout();
        for map in &layout.maps {
            placer
                .shared
                .uffd
                .wake(map.mapping.address, map.mapping.len())
                .map_err(|error| placer.shared.uffd_error("UFFDIO_WAKE", error))?;
        }
        drop(layout);
        Ok(placer)
    }

    /// Places whole blocks and wakes who waits for them. A block that is present, or that the
    /// guest gave back, keeps its contents. May be called from several threads at once.
    pub fn place(&self, region: u16, first: u32, data: &[u8]) -> Result<()> {
        if data.is_empty() || !data.len().is_multiple_of(PAGE_SIZE) {
            return Err(PagerError::NotWholePages { len: data.len() });
        }
        let memory = self.shared.memory(region)?;
        memory.check(first, (data.len() / PAGE_SIZE) as u64)?;
        let mut block = first;
        for chunk in data.chunks(CHUNK * PAGE_SIZE) {
            self.shared.place_chunk(memory, block, chunk)?;
            block += (chunk.len() / PAGE_SIZE) as u32;
        }
        Ok(())
    }

    /// Like [`Self::place`], with zeroes. The blocks become holes that are no longer missing and
    /// take no memory; who waits gets a zero page.
    pub fn place_zero(&self, region: u16, first: u32, count: u32) -> Result<()> {
        let memory = self.shared.memory(region)?;
        memory.check(first, u64::from(count))?;
        self.shared.missing.clear_range(region, first, count);
        let mut waited = Vec::new();
        if self.shared.waiters.any() {
            self.shared
                .waiters
                .take(region, first, count, Instant::now(), |block| {
                    waited.push(block);
                });
        }
        for block in waited {
            let mut patience = Patience::new();
            while self.shared.zero(region, block)? == Step::HeldUp {
                patience.wait(region, block)?;
            }
        }
        Ok(())
    }

    /// Every block is here: stops trapping, lets the guest go and ends the threads. Refused as
    /// long as a block is missing.
    pub fn disarm(&self) -> Result<FaultStats> {
        let count = self.shared.missing.count();
        if count != 0 {
            return Err(PagerError::StillMissing { count });
        }
        self.shared.forget_all()?;
        // A thread of the guest that was giving memory back when the trap went still waits until its
        // event is read, and says nothing that could be waited for.
        let mut patience = Patience::new();
        while self.shared.uffd.layout_changes() {
            patience.wait(0, 0)?;
        }
        self.stop();
        Ok(self.stats())
    }

    /// Ends the threads; the trap stays. Who faults waits for another pager. Idempotent.
    pub fn stop(&self) {
        self.shared.stop.ring();
        let mut threads = self.threads.lock().unwrap_or_else(PoisonError::into_inner);
        for thread in threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a fault thread panicked");
            }
        }
    }

    /// Faults and waits so far.
    pub fn stats(&self) -> FaultStats {
        self.shared.waiters.stats(Instant::now())
    }

    /// The map of missing blocks.
    pub fn missing(&self) -> &Arc<MissingMap> {
        &self.shared.missing
    }

    fn start(shared: Shared, config: PlacerConfig) -> Result<Self> {
        let placer = Self {
            shared: Arc::new(shared),
            threads: Mutex::new(Vec::new()),
        };
        for index in 0..config.fault_threads.max(1) {
            let shared = Arc::clone(&placer.shared);
            let thread = std::thread::Builder::new()
                .name(format!("faults-{index}"))
                .spawn(move || serve::run(&shared))
                .map_err(|error| PagerError::os("starting a fault thread", error))?;
            placer
                .threads
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .push(thread);
        }
        Ok(placer)
    }
}

impl Drop for Placer {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Outcome of an attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    Done,
    /// The guest is changing its layout: an event must be read first.
    HeldUp,
}

/// What the fault threads and the placing threads share.
pub(crate) struct Shared {
    pub(crate) uffd: Uffd,
    pub(crate) process: Process,
    pub(crate) missing: Arc<MissingMap>,
    pub(crate) waiters: Waiters,
    pub(crate) sink: Arc<dyn FaultSink>,
    pub(crate) stop: Bell,
    pub(crate) failed: AtomicBool,
    pub(crate) layout: RwLock<Layout>,
    /// By index; none for a region that is not memory.
    memories: Vec<Option<Arc<RegionMemory>>>,
}

impl Shared {
    fn new(
        uffd: Uffd,
        pid: u32,
        regions: Vec<Region>,
        missing: Arc<MissingMap>,
        sink: Arc<dyn FaultSink>,
    ) -> Result<Self> {
        let mut memories: Vec<Option<Arc<RegionMemory>>> = Vec::new();
        let mut layout = Layout::default();
        for region in regions {
            let index = region.index();
            if missing.blocks(index) != region.memory.blocks() {
                return Err(PagerError::OutOfRange {
                    region: index,
                    first: 0,
                    count: u64::from(missing.blocks(index)),
                    blocks: region.memory.blocks(),
                });
            }
            if memories.len() <= usize::from(index) {
                memories.resize(usize::from(index) + 1, None);
            }
            memories[usize::from(index)] = Some(region.memory);
            layout.add(index, &region.mappings);
        }
        Ok(Self {
            uffd,
            process: Process::open(pid)?,
            missing,
            waiters: Waiters::new(pid),
            sink,
            stop: Bell::new()?,
            failed: AtomicBool::new(false),
            layout: RwLock::new(layout),
            memories,
        })
    }

    /// One attempt at a zero page for one block.
    pub(crate) fn zero(&self, region: u16, block: u32) -> Result<Step> {
        let layout = self.layout();
        if let Some((address, _)) = layout.find(region, block) {
            let progress = self.uffd.zeropage(address, PAGE_SIZE as u64);
            match progress.stopped {
                None => layout.wake_aliases(&self.uffd, region, block, 1, address),
                Some(Errno::EXIST) => layout.wake(&self.uffd, region, block),
                Some(Errno::AGAIN) => return Ok(Step::HeldUp),
                Some(error) => return Err(self.placing_error(region, block, error)),
            }
        }
        self.missing.clear(region, block);
        self.waiters.woken(region, block, 1, Instant::now());
        Ok(Step::Done)
    }

    /// Tells the sink, once, and ends the fault threads.
    pub(crate) fn fail(&self, error: PagerError) {
        self.stop.ring();
        if !self.failed.swap(true, Ordering::SeqCst) {
            self.sink.failed(error);
        }
    }

    pub(crate) fn layout(&self) -> RwLockReadGuard<'_, Layout> {
        // Changed by single assignments only: usable whatever a panicking thread was doing.
        self.layout.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn uffd_error(&self, what: &str, error: Errno) -> PagerError {
        match (self.process.check_alive(), error) {
            (Err(gone), _) => gone,
            (Ok(()), Errno::SRCH) => PagerError::GuestGone {
                pid: self.process.pid(),
            },
            (Ok(()), error) => {
                PagerError::os(format!("{what} for process {}", self.process.pid()), error)
            }
        }
    }

    fn place_chunk(&self, memory: &RegionMemory, first: u32, data: &[u8]) -> Result<()> {
        let mut patience = Patience::new();
        let mut at = 0;
        while self.place_some(memory, first, data, &mut at)? == Step::HeldUp {
            patience.wait(memory.region(), first + at as u32)?;
        }
        Ok(())
    }

    /// Places from page `at` on, under one hold of the lock.
    fn place_some(
        &self,
        memory: &RegionMemory,
        first: u32,
        data: &[u8],
        at: &mut usize,
    ) -> Result<Step> {
        let region = memory.region();
        let pages = data.len() / PAGE_SIZE;
        let layout = self.layout();
        while *at < pages {
            let block = first + *at as u32;
            let run = (*at..pages)
                .take_while(|page| self.missing.contains(region, first + *page as u32))
                .count();
            if run == 0 {
                *at += 1;
                continue;
            }
            let Some((address, mapped)) = layout.find(region, block) else {
                // The guest unmapped it, its file lives on: nobody can fault here.
                memory.write(block, &data[*at * PAGE_SIZE..][..PAGE_SIZE])?;
                self.missing.clear(region, block);
                *at += 1;
                continue;
            };
            let run = run.min(mapped as usize);
            let bytes = &data[*at * PAGE_SIZE..][..run * PAGE_SIZE];
            let progress = self.uffd.copy(address, bytes);
            let done = progress.done as usize / PAGE_SIZE;
            if done > 0 {
                self.missing.clear_range(region, block, done as u32);
                layout.wake_aliases(&self.uffd, region, block, done as u32, address);
                self.waiters
                    .woken(region, block, done as u32, Instant::now());
                *at += done;
            }
            match progress.stopped {
                None => {}
                // The next attempt tells why it stopped half way.
                Some(_) if done > 0 => {}
                Some(Errno::AGAIN) => return Ok(Step::HeldUp),
                Some(Errno::EXIST) => {
                    self.missing.clear(region, block);
                    layout.wake(&self.uffd, region, block);
                    self.waiters.woken(region, block, 1, Instant::now());
                    *at += 1;
                }
                Some(error) => return Err(self.placing_error(region, block, error)),
            }
        }
        Ok(Step::Done)
    }

    fn placing_error(&self, region: u16, block: u32, error: Errno) -> PagerError {
        let general = self.uffd_error("placing a block", error);
        match (general, error) {
            (PagerError::Os { .. }, Errno::NOMEM | Errno::NOSPC) => {
                PagerError::OutOfMemory { region, block }
            }
            (PagerError::Os { .. }, Errno::NOENT) => PagerError::NotMapped {
                pid: self.process.pid(),
                what: format!("block {block} of region {region} any more"),
            },
            (general, _) => general,
        }
    }

    fn register(&self) -> Result<()> {
        for map in &self.layout().maps {
            self.uffd
                .register(
                    map.mapping.address,
                    map.mapping.len(),
                    RegisterMode::Missing,
                )
                .map_err(|error| match error {
                    Errno::INVAL => PagerError::UnsuitableMemory {
                        reason: format!(
                            "the kernel cannot trap region {} (is the RAM file on a disk \
                             file system?); use a memfd or a tmpfs file",
                            map.region
                        ),
                    },
                    Errno::BUSY => PagerError::UnsuitableMemory {
                        reason: "another userfaultfd traps it already".into(),
                    },
                    error => self.uffd_error("UFFDIO_REGISTER", error),
                })?;
        }
        Ok(())
    }

    fn unregister(&self, layout: &Layout) -> Result<()> {
        for map in &layout.maps {
            self.uffd
                .unregister(map.mapping.address, map.mapping.len())
                .map_err(|error| self.uffd_error("UFFDIO_UNREGISTER", error))?;
        }
        Ok(())
    }

    /// Stops trapping and forgets the mappings, as one step for the fault threads: a fault that was read
    /// before finds nothing to place, and the kernel has woken who waited.
    fn forget_all(&self) -> Result<()> {
        let mut layout = self.layout.write().unwrap_or_else(PoisonError::into_inner);
        self.unregister(&layout)?;
        layout.maps.clear();
        Ok(())
    }

    fn memories(&self) -> impl Iterator<Item = &Arc<RegionMemory>> {
        self.memories.iter().flatten()
    }

    fn memory(&self, region: u16) -> Result<&RegionMemory> {
        self.memories
            .get(usize::from(region))
            .and_then(|memory| memory.as_deref())
            .ok_or(PagerError::NoSuchRegion { region })
    }
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared")
            .field("uffd", &self.uffd)
            .field("process", &self.process)
            .finish_non_exhaustive()
    }
}

/// An eventfd that, once rung, stays readable.
#[derive(Debug)]
pub(crate) struct Bell(pub(crate) OwnedFd);

impl Bell {
    pub(crate) fn new() -> Result<Self> {
        rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map(Self)
            .map_err(|error| PagerError::os("eventfd", error))
    }

    pub(crate) fn ring(&self) {
        // Fails only when the counter is full, and then it has been rung.
        let _ = rustix::io::write(&self.0, &1_u64.to_ne_bytes());
    }
}

/// Waiting for the guest to finish a layout change: the kernel offers no event for that.
struct Patience {
    since: Instant,
    pause: Duration,
}

impl Patience {
    fn new() -> Self {
        Self {
            since: Instant::now(),
            pause: Duration::from_micros(20),
        }
    }

    fn wait(&mut self, region: u16, block: u32) -> Result<()> {
        if self.since.elapsed() > PATIENCE {
            return Err(PagerError::HeldUp {
                region,
                block,
                seconds: PATIENCE.as_secs(),
            });
        }
        std::thread::sleep(self.pause);
        self.pause = (self.pause * 2).min(Duration::from_millis(2));
        Ok(())
    }
}
