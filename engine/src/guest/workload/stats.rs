//! The page in which the guest publishes its figures: work done, writes, wrong pages. It lies in a
//! memfd of its own beside the guest's memory, so that whoever has its descriptor samples v(t)
//! without asking the guest. It is never migrated: what must survive is in the workers' state.
//!
//! Layout, in 64-bit words: 0 magic, 1 number of workers, 2 wrong pages and sectors found by
//! verification, 3 operations on the disk that failed, 4 number of disk threads; worker w at 8·(w+1):
//! page accesses, page writes, wrong pages found, thread id, and of disk thread w: disk operations,
//! sectors, disk writes, thread id. The second 4096 bytes count how long operations on the disk took:
//! 64 words each of reads, writes and flushes; word n counts those of less than 2^(n/2) µs that
//! word n-1 does not count, the last one all others.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::memory::SharedMemory;
use super::pages::PAGE;

/// Most workers that a guest can have.
pub const MAX_THREADS: u32 = 32;

const MAGIC: u64 = u64::from_le_bytes(*b"hmstats2");

/// Words of one histogram.
const BUCKETS: usize = 64;

/// What took its time on the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Timed {
    Read,
    Write,
    Flush,
}

/// How long operations on the disk took.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Latencies {
    /// Of reads: upper bound in µs, number; only where there are any.
    pub reads: Vec<(u64, u64)>,
    /// Of writes.
    pub writes: Vec<(u64, u64)>,
    /// Of flushes.
    pub flushes: Vec<(u64, u64)>,
}

/// The figures page, mapped.
pub struct StatsPage(SharedMemory);

/// What the page says at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stats {
    /// Page accesses, and sectors of the disk read or written, since the guest was first started,
    /// on whatever host.
    pub operations: u64,
    /// How many of the page accesses wrote.
    pub writes: u64,
    /// Operations on the disk since the guest was first started.
    pub disk_operations: u64,
    /// How many of them wrote.
    pub disk_writes: u64,
    /// Operations on the disk that failed, on this host.
    pub disk_errors: u64,
    /// Times that a page or a sector was found to be wrong, on this host.
    pub wrong: u64,
    /// Number of workers; 0 before an incoming guest has its state.
    pub threads: u32,
    /// Number of threads that use the disk.
    pub disk_threads: u32,
}

impl StatsPage {
    /// A new page, all figures zero.
    pub fn create() -> io::Result<Self> {
        let page = Self(SharedMemory::create(c"hybridmig-guest-stats", 2 * PAGE)?);
        page.word(0).store(MAGIC, Release);
        Ok(page)
    }

    /// The page of another process.
    pub fn attach(fd: OwnedFd) -> io::Result<Self> {
        let page = Self(SharedMemory::attach(fd)?);
        if page.0.len() != 2 * PAGE || page.word(0).load(Acquire) != MAGIC {
            return Err(io::Error::other("not the figures page of a guest"));
        }
        Ok(page)
    }

    /// Sets the number of workers, and of threads that use the disk.
    pub fn set_threads(&self, threads: u32, disk: u32) {
        self.word(4).store(u64::from(disk), Relaxed);
        self.word(1).store(u64::from(threads), Release);
    }

    /// Publishes a worker's counters.
    pub fn publish(&self, worker: u32, operations: u64, writes: u64) {
        self.worker_word(worker, 0).store(operations, Relaxed);
        self.worker_word(worker, 1).store(writes, Relaxed);
    }

    /// Publishes a disk thread's counters.
    pub fn publish_disk(&self, worker: u32, operations: u64, sectors: u64, writes: u64) {
        self.worker_word(worker, 4).store(operations, Relaxed);
        self.worker_word(worker, 5).store(sectors, Relaxed);
        self.worker_word(worker, 6).store(writes, Relaxed);
    }

    /// Publishes which thread a worker is.
    pub fn set_thread_id(&self, worker: u32, id: u32) {
        self.worker_word(worker, 3).store(u64::from(id), Relaxed);
    }

    /// Publishes which thread a disk thread is.
    pub fn set_disk_thread_id(&self, worker: u32, id: u32) {
        self.worker_word(worker, 7).store(u64::from(id), Relaxed);
    }

    /// Counts an operation on the disk that took so long.
    pub fn time(&self, what: Timed, took: Duration) {
        let micros = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        let bucket = (0..BUCKETS - 1).find(|bucket| micros < bound(*bucket));
        self.bucket(what, bucket.unwrap_or(BUCKETS - 1))
            .fetch_add(1, Relaxed);
    }

    /// How long operations on the disk took, on this host.
    pub fn latencies(&self) -> Latencies {
        let of = |what| {
            let counts = (0..BUCKETS).map(|bucket| {
                let count = self.bucket(what, bucket).load(Relaxed);
                (bound(bucket), count)
            });
            counts.filter(|(_, count)| *count > 0).collect()
        };
        Latencies {
            reads: of(Timed::Read),
            writes: of(Timed::Write),
            flushes: of(Timed::Flush),
        }
    }

    /// Counts an operation on the disk that failed.
    pub fn count_disk_error(&self) {
        self.word(3).fetch_add(1, Relaxed);
    }

    /// Counts a wrong page or sector that a worker came across.
    pub fn count_wrong(&self, worker: u32) {
        self.worker_word(worker, 2).fetch_add(1, Relaxed);
    }

    /// Counts wrong pages that a verification found.
    pub fn count_wrong_verified(&self, count: u64) {
        self.word(2).fetch_add(count, Relaxed);
    }

    /// All figures now.
    pub fn sample(&self) -> Stats {
        let threads = self.threads();
        let sum = |field| {
            (0..threads)
                .map(|worker| self.worker_word(worker, field).load(Relaxed))
                .fold(0, u64::wrapping_add)
        };
        Stats {
            operations: sum(0).wrapping_add(sum(5)),
            writes: sum(1),
            disk_operations: sum(4),
            disk_writes: sum(6),
            disk_errors: self.word(3).load(Relaxed),
            wrong: sum(2).wrapping_add(self.word(2).load(Relaxed)),
            threads,
            // Written by another process, too.
            disk_threads: self.word(4).load(Relaxed).min(u64::from(MAX_THREADS)) as u32,
        }
    }

    /// Share of the work that was done on the disk, 0 to 1.
    pub fn disk_share(&self) -> f64 {
        let threads = 0..self.threads();
        let sectors: u64 = threads
            .map(|worker| self.worker_word(worker, 5).load(Relaxed))
            .fold(0, u64::wrapping_add);
        let all = self.sample().operations;
        if all == 0 {
            0.0
        } else {
            (sectors as f64 / all as f64).min(1.0)
        }
    }

    /// The worker that runs in this thread, as (number, thread id) pairs.
    pub fn thread_ids(&self) -> Vec<(u32, u32)> {
        (0..self.threads())
            .map(|worker| (worker, self.worker_word(worker, 3).load(Relaxed) as u32))
            .collect()
    }

    fn threads(&self) -> u32 {
        // Written by another process: bounded before it is used.
        self.word(1).load(Acquire).min(u64::from(MAX_THREADS)) as u32
    }

    fn word(&self, index: usize) -> &std::sync::atomic::AtomicU64 {
        self.0.word64(index * 8)
    }

    fn bucket(&self, what: Timed, bucket: usize) -> &std::sync::atomic::AtomicU64 {
        assert!(bucket < BUCKETS);
        self.word(PAGE / 8 + what as usize * BUCKETS + bucket)
    }

    fn worker_word(&self, worker: u32, field: usize) -> &std::sync::atomic::AtomicU64 {
        assert!(worker < MAX_THREADS);
        self.word(8 * (worker as usize + 1) + field)
    }
}

/// What a bucket of a histogram counts is less than this, in µs.
fn bound(bucket: usize) -> u64 {
    if bucket + 1 == BUCKETS {
        return u64::MAX;
    }
    let octave = 1_u64 << (bucket / 2);
    // √2 as 1.414 is near enough for the odd ones.
    if bucket.is_multiple_of(2) {
        octave
    } else {
        octave + octave * 414 / 1000
    }
}

impl AsFd for StatsPage {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_cross_the_descriptor() {
        let page = StatsPage::create().unwrap();
        page.set_threads(2, 1);
        page.publish(0, 10, 3);
        page.publish(1, 5, 1);
        page.count_wrong(1);
        page.count_wrong_verified(2);
        page.set_thread_id(1, 77);
        let other = StatsPage::attach(page.as_fd().try_clone_to_owned().unwrap()).unwrap();
        page.publish_disk(0, 3, 7, 2);
        page.count_disk_error();
        let stats = Stats {
            operations: 22,
            writes: 4,
            disk_operations: 3,
            disk_writes: 2,
            disk_errors: 1,
            wrong: 3,
            threads: 2,
            disk_threads: 1,
        };
        assert_eq!(other.sample(), stats);
        assert_eq!(other.thread_ids(), [(0, 0), (1, 77)]);
    }

    #[test]
    fn latencies_fall_into_their_buckets() {
        let page = StatsPage::create().unwrap();
        for micros in [0, 3, 1000, 1_000_000] {
            page.time(Timed::Write, Duration::from_micros(micros));
        }
        page.time(Timed::Flush, Duration::MAX);
        let Latencies {
            reads,
            writes,
            flushes,
        } = page.latencies();
        assert_eq!(reads, []);
        assert_eq!(writes, [(1, 1), (4, 1), (1024, 1), (1_048_576, 1)]);
        assert_eq!(flushes, [(u64::MAX, 1)]);
    }

    #[test]
    fn another_file_is_refused() {
        let memory = SharedMemory::create(c"other", PAGE).unwrap();
        let fd = memory.as_fd().try_clone_to_owned().unwrap();
        assert!(StatsPage::attach(fd).is_err());
        let null = std::fs::File::open("/dev/null").unwrap();
        assert!(StatsPage::attach(null.into()).is_err());
    }
}
