//! The page in which the guest publishes its figures: work done, writes, wrong pages. It lies in a
//! memfd of its own beside the guest's memory, so that whoever has its descriptor samples v(t)
//! without asking the guest. It is never migrated: what must survive is in the workers' state.
//!
//! Layout, in 64-bit words: 0 magic, 1 number of workers, 2 wrong pages found by verification;
//! worker w at 8·(w+1): operations, writes, wrong pages found, thread id.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};

use serde::{Deserialize, Serialize};

use super::memory::SharedMemory;
use super::pages::PAGE;

/// Most workers that a guest can have.
pub const MAX_THREADS: u32 = 32;

const MAGIC: u64 = u64::from_le_bytes(*b"hmstats1");

/// The figures page, mapped.
pub struct StatsPage(SharedMemory);

/// What the page says at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stats {
    /// Page accesses done since the guest was first started, on whatever host.
    pub operations: u64,
    /// How many of them wrote.
    pub writes: u64,
    /// Times that a page was found to be wrong, on this host.
    pub wrong: u64,
    /// Number of workers; 0 before an incoming guest has its state.
    pub threads: u32,
}

impl StatsPage {
    /// A new page, all figures zero.
    pub fn create() -> io::Result<Self> {
        let page = Self(SharedMemory::create(c"hybridmig-guest-stats", PAGE)?);
        page.word(0).store(MAGIC, Release);
        Ok(page)
    }

    /// The page of another process.
    pub fn attach(fd: OwnedFd) -> io::Result<Self> {
        let page = Self(SharedMemory::attach(fd)?);
        if page.word(0).load(Acquire) != MAGIC {
            return Err(io::Error::other("not the figures page of a guest"));
        }
        Ok(page)
    }

    /// Sets the number of workers.
    pub fn set_threads(&self, threads: u32) {
        self.word(1).store(u64::from(threads), Release);
    }

    /// Publishes a worker's counters.
    pub fn publish(&self, worker: u32, operations: u64, writes: u64) {
        self.worker_word(worker, 0).store(operations, Relaxed);
        self.worker_word(worker, 1).store(writes, Relaxed);
    }

    /// Publishes which thread a worker is.
    pub fn set_thread_id(&self, worker: u32, id: u32) {
        self.worker_word(worker, 3).store(u64::from(id), Relaxed);
    }

    /// Counts a wrong page that a worker came across.
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
            operations: sum(0),
            writes: sum(1),
            wrong: sum(2).wrapping_add(self.word(2).load(Relaxed)),
            threads,
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

    fn worker_word(&self, worker: u32, field: usize) -> &std::sync::atomic::AtomicU64 {
        assert!(worker < MAX_THREADS);
        self.word(8 * (worker as usize + 1) + field)
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
        page.set_threads(2);
        page.publish(0, 10, 3);
        page.publish(1, 5, 1);
        page.count_wrong(1);
        page.count_wrong_verified(2);
        page.set_thread_id(1, 77);
        let other = StatsPage::attach(page.as_fd().try_clone_to_owned().unwrap()).unwrap();
        let stats = Stats {
            operations: 15,
            writes: 4,
            wrong: 3,
            threads: 2,
        };
        assert_eq!(other.sample(), stats);
        assert_eq!(other.thread_ids(), [(0, 0), (1, 77)]);
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
