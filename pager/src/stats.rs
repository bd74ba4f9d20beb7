//! Who waits for which block, since when, and how long they waited in all. Accounting only: waking
//! is the kernel's and the placer's business.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;

use crate::process;

/// Longest latency that is told from longer ones: an hour, in microseconds.
const LONGEST_US: u64 = 3_600_000_000;

/// Faults of a guest so far.
#[derive(Clone, Debug)]
pub struct FaultStats {
    /// Faults that were read, repeated ones included.
    pub faults: u64,
    /// Of these, answered with a zero page at once.
    pub zero: u64,
    /// From reading the fault to waking who waited, in microseconds.
    pub latency_us: Histogram<u64>,
    /// Sum of the waits of all threads, waits under way included.
    pub blocked: Duration,
    /// Per thread, the most blocked first.
    pub threads: Vec<ThreadBlocked>,
}

/// One thread of the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ThreadBlocked {
    /// Thread id; 0 stands for all threads where the kernel did not tell.
    pub tid: u32,
    /// Its name when it was first seen; empty if unknown.
    pub name: String,
    /// How long it has waited.
    pub blocked: Duration,
    /// How often.
    pub faults: u64,
}

/// The threads that wait just now. At most one entry per thread, so as short as the guest has
/// threads.
#[derive(Debug)]
pub(crate) struct Waiters {
    /// Length of `Book::waiting`, to be read without the lock.
    waiting: AtomicUsize,
    book: Mutex<Book>,
    pid: u32,
}

#[derive(Debug)]
struct Book {
    waiting: Vec<Waiter>,
    threads: HashMap<u32, ThreadBlocked>,
    latency_us: Histogram<u64>,
    faults: u64,
    zero: u64,
}

#[derive(Clone, Copy, Debug)]
struct Waiter {
    thread: u32,
    region: u16,
    block: u32,
    since: Instant,
}

impl Waiters {
    pub(crate) fn new(pid: u32) -> Self {
        let latency_us = Histogram::new_with_bounds(1, LONGEST_US, 2)
            .expect("constant bounds that the histogram accepts");
        Self {
            waiting: AtomicUsize::new(0),
            book: Mutex::new(Book {
                waiting: Vec::with_capacity(64),
                threads: HashMap::new(),
                latency_us,
                faults: 0,
                zero: 0,
            }),
            pid,
        }
    }

    /// A thread waits for a block. Must come before the look at whether the block is missing:
    /// [`Self::woken`] after a change of that then finds the thread.
    pub(crate) fn waits(&self, thread: u32, region: u16, block: u32, since: Instant) {
        let mut book = self.lock();
        book.faults += 1;
        // A thread waits for one page at a time: an old entry of its own is one whose wait was
        // interrupted. The same page again is the same wait.
        if thread != 0
            && let Some(known) = book.waiting.iter_mut().find(|known| known.thread == thread)
        {
            if (known.region, known.block) != (region, block) {
                let ended = *known;
                *known = Waiter {
                    thread,
                    region,
                    block,
                    since,
                };
                book.ended(ended, since);
            }
            return;
        }
        book.waiting.push(Waiter {
            thread,
            region,
            block,
            since,
        });
        self.waiting.store(book.waiting.len(), Ordering::SeqCst);
    }

    /// Whether anyone waits at all; no lock.
    pub(crate) fn any(&self) -> bool {
        self.waiting.load(Ordering::SeqCst) != 0
    }

    /// Books the end of every wait for `count` blocks from `first` on.
    pub(crate) fn woken(&self, region: u16, first: u32, count: u32, now: Instant) {
        self.take(region, first, count, now, |_| {});
    }

    /// Like [`Self::woken`], and tells each block that was waited for.
    pub(crate) fn take(
        &self,
        region: u16,
        first: u32,
        count: u32,
        now: Instant,
        mut each: impl FnMut(u32),
    ) {
        if !self.any() {
            return;
        }
        let mut book = self.lock();
        let mut index = 0;
        while let Some(&waiter) = book.waiting.get(index) {
            if waiter.region == region && waiter.block.wrapping_sub(first) < count {
                book.waiting.swap_remove(index);
                book.ended(waiter, now);
                each(waiter.block);
            } else {
                index += 1;
            }
        }
        self.waiting.store(book.waiting.len(), Ordering::SeqCst);
    }

    /// A fault was answered with a zero page.
    pub(crate) fn zeroed(&self) {
        self.lock().zero += 1;
    }

    /// Learns the name of a thread that is new. Reads a file: to be called with the guest served.
    pub(crate) fn name(&self, thread: u32) {
        let known = |book: &Book| {
            book.threads
                .get(&thread)
                .is_some_and(|t| !t.name.is_empty())
        };
        if thread == 0 || known(&self.lock()) {
            return;
        }
        let name =
            process::thread_name(self.pid, thread).unwrap_or_else(|| format!("thread {thread}"));
        self.lock().thread(thread).name = name;
    }

    pub(crate) fn stats(&self, now: Instant) -> FaultStats {
        let book = self.lock();
        let mut threads = book.threads.clone();
        for waiter in &book.waiting {
            threads
                .entry(waiter.thread)
                .or_insert_with(|| unnamed(waiter.thread))
                .blocked += now.saturating_duration_since(waiter.since);
        }
        let mut threads: Vec<_> = threads.into_values().collect();
        threads.sort_by_key(|thread| (std::cmp::Reverse(thread.blocked), thread.tid));
        FaultStats {
            faults: book.faults,
            zero: book.zero,
            latency_us: book.latency_us.clone(),
            blocked: threads.iter().map(|thread| thread.blocked).sum(),
            threads,
        }
    }

    fn lock(&self) -> MutexGuard<'_, Book> {
        // Counters stay usable whatever a panicking thread was doing.
        self.book.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Book {
    fn thread(&mut self, tid: u32) -> &mut ThreadBlocked {
        self.threads.entry(tid).or_insert_with(|| unnamed(tid))
    }

    fn ended(&mut self, waiter: Waiter, now: Instant) {
        let waited = now.saturating_duration_since(waiter.since);
        self.latency_us.saturating_record(waited.as_micros() as u64);
        let thread = self.thread(waiter.thread);
        thread.blocked += waited;
        thread.faults += 1;
    }
}

fn unnamed(tid: u32) -> ThreadBlocked {
    ThreadBlocked {
        tid,
        name: String::new(),
        blocked: Duration::ZERO,
        faults: 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_are_booked_per_thread() {
        let waiters = Waiters::new(std::process::id());
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        waiters.waits(7, 0, 10, at(0));
        waiters.waits(8, 0, 11, at(0));
        waiters.waits(9, 1, 10, at(0));
        waiters.waits(7, 0, 10, at(5)); // interrupted, faults on the same page again
        assert!(waiters.any());
        waiters.woken(0, 10, 1, at(20));
        let mut taken = Vec::new();
        waiters.take(0, 0, 100, at(30), |block| taken.push(block));
        assert_eq!(taken, [11]);
        waiters.waits(7, 0, 12, at(30));
        waiters.waits(7, 0, 13, at(31)); // its wait for 12 ended unseen
        waiters.woken(0, 13, 1, at(41));

        let stats = waiters.stats(at(50));
        let blocked: HashMap<_, _> = stats
            .threads
            .iter()
            .map(|thread| (thread.tid, (thread.blocked.as_millis(), thread.faults)))
            .collect();
        assert_eq!(blocked[&7], (20 + 1 + 10, 3));
        assert_eq!(blocked[&8], (30, 1));
        assert_eq!(blocked[&9], (50, 0)); // still waiting
        assert_eq!(stats.threads[0].tid, 9);
        assert_eq!(stats.blocked.as_millis(), 111);
        assert_eq!((stats.faults, stats.latency_us.len()), (6, 4));
        waiters.woken(1, 10, 1, at(60));
        assert!(!waiters.any());
    }
}
