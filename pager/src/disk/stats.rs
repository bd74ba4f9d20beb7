//! What a disk has done so far.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;

/// Longest latency that is told from longer ones: an hour, in microseconds.
const LONGEST_US: u64 = 3_600_000_000;

/// Counts since the image was created or adopted. Latencies are in microseconds.
#[derive(Clone, Debug)]
pub struct DiskStats {
    /// Reads of the guest that were answered.
    pub reads: u64,
    /// Bytes of these.
    pub read_bytes: u64,
    /// Writes of the guest that were answered.
    pub writes: u64,
    /// Bytes of these.
    pub written_bytes: u64,
    /// Trims and write-zeroes.
    pub zeroes: u64,
    /// Flushes and writes with FUA.
    pub flushes: u64,
    /// Requests that were answered with an error.
    pub errors: u64,
    /// Requests that had to wait for a missing block; see also `wait_us`.
    pub waited: u64,
    /// Sum of these waits. Those under way do not count yet.
    pub waited_time: Duration,
    /// Requests that wait now.
    pub waiting: u64,
    /// Blocks that were asked for because the guest needed them.
    pub faults: u64,
    /// Granules that came from the source after the disk was armed.
    pub placed_granules: u64,
    /// Missing blocks that the guest has overwritten or trimmed completely.
    pub removed_blocks: u64,
    /// From the request to the answer.
    pub read_us: Histogram<u64>,
    /// The same of writes.
    pub write_us: Histogram<u64>,
    /// The same of flushes.
    pub flush_us: Histogram<u64>,
    /// From the wish for a missing block to its arrival.
    pub wait_us: Histogram<u64>,
}

/// Which latency.
#[derive(Clone, Copy, Debug)]
pub(super) enum Operation {
    Read,
    Write,
    Zero,
    Flush,
}

#[derive(Debug)]
pub(super) struct Stats {
    pub(super) faults: AtomicU64,
    pub(super) waiting: AtomicU64,
    pub(super) placed: AtomicU64,
    pub(super) removed: AtomicU64,
    pub(super) errors: AtomicU64,
    zeroes: AtomicU64,
    waited_ns: AtomicU64,
    read: Latency,
    write: Latency,
    flush: Latency,
    wait: Latency,
}

#[derive(Debug)]
struct Latency {
    bytes: AtomicU64,
    us: Mutex<Histogram<u64>>,
}

impl Latency {
    fn new() -> Self {
        let histogram = Histogram::new_with_bounds(1, LONGEST_US, 2)
            .expect("constant bounds that the histogram accepts");
        Self {
            bytes: AtomicU64::new(0),
            us: Mutex::new(histogram),
        }
    }

    fn record(&self, bytes: u64, took: Duration) {
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
        self.us
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .saturating_record(took.as_micros() as u64);
    }

    fn snapshot(&self) -> Histogram<u64> {
        self.us
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
}

impl Stats {
    pub(super) fn new() -> Self {
        let zero = || AtomicU64::new(0);
        Self {
            faults: zero(),
            waiting: zero(),
            placed: zero(),
            removed: zero(),
            errors: zero(),
            zeroes: zero(),
            waited_ns: zero(),
            read: Latency::new(),
            write: Latency::new(),
            flush: Latency::new(),
            wait: Latency::new(),
        }
    }

    /// A request was answered that came at `since`.
    pub(super) fn done(&self, operation: Operation, bytes: u64, since: Instant) {
        let took = since.elapsed();
        match operation {
            Operation::Read => self.read.record(bytes, took),
            Operation::Write => self.write.record(bytes, took),
            Operation::Flush => self.flush.record(0, took),
            Operation::Zero => {
                self.zeroes.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    /// What a request waited for has come.
    pub(super) fn waited(&self, since: Instant) {
        let took = since.elapsed();
        self.waited_ns
            .fetch_add(took.as_nanos() as u64, Ordering::Relaxed);
        self.wait.record(0, took);
    }

    pub(super) fn snapshot(&self) -> DiskStats {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let (read_us, write_us) = (self.read.snapshot(), self.write.snapshot());
        let (flush_us, wait_us) = (self.flush.snapshot(), self.wait.snapshot());
        DiskStats {
            reads: read_us.len(),
            read_bytes: get(&self.read.bytes),
            writes: write_us.len(),
            written_bytes: get(&self.write.bytes),
            zeroes: get(&self.zeroes),
            flushes: flush_us.len(),
            errors: get(&self.errors),
            waited: wait_us.len(),
            waited_time: Duration::from_nanos(get(&self.waited_ns)),
            waiting: get(&self.waiting),
            faults: get(&self.faults),
            placed_granules: get(&self.placed),
            removed_blocks: get(&self.removed),
            read_us,
            write_us,
            flush_us,
            wait_us,
        }
    }
}
