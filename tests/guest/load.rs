//! `diskcheck.workers`: a disk that was filled beforehand is read and rewritten at given rates, by several threads
//! since one that waits must not hold up all, and how long each operation took is said.
//!
//! Clocks of a guest stand still while it does: what a freeze takes is in no latency here.

use std::array;
use std::fmt::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::time::{Duration, Instant};

use crate::latency::{CLASSES, class};
use crate::pattern::{PAGE, mix};
use crate::{Checker, Options, say};

/// Time between two lines.
const TICK: Duration = Duration::from_millis(100);
/// A worker that is later than that does not catch up.
const LATE: Duration = Duration::from_secs(1);

/// How often each class of latency was seen since the last line.
struct Latencies([AtomicU32; CLASSES]);

impl Latencies {
    fn new() -> Self {
        Self(array::from_fn(|_| AtomicU32::new(0)))
    }

    fn note(&self, since: Instant) {
        self.0[class(since.elapsed().as_micros() as u64)].fetch_add(1, Relaxed);
    }

    /// Appends ` class:count` for each that was seen, and forgets them.
    fn take(&self, line: &mut String) {
        for (class, count) in self.0.iter().enumerate() {
            let count = count.swap(0, Relaxed);
            if count > 0 {
                // Writing to a String does not fail.
                let _ = write!(line, " {class}:{count}");
            }
        }
    }
}

/// Runs the workers of a disk, and says what they see, for ever.
pub fn run(name: &str, options: &Options, start: Instant) {
    let first = Checker::open(name, options);
    let counters = Arc::clone(&first.counters);
    let latencies = Arc::new((Latencies::new(), Latencies::new()));
    for worker in 0..options.workers {
        let mut checker = first.share(worker, options.workers);
        let latencies = Arc::clone(&latencies);
        let per_second = |rate: f64| rate * 1e6 / PAGE as f64 / options.workers as f64;
        let (reads, writes) = (per_second(options.reads), per_second(options.rate));
        std::thread::spawn(move || work(&mut checker, &latencies, reads, writes));
    }
    for tick in 1.. {
        std::thread::sleep((start + TICK * tick).saturating_duration_since(Instant::now()));
        let since_start = start.elapsed();
        let mut line = format!("DISKIO {name} {} r", since_start.as_millis());
        latencies.0.take(&mut line);
        line.push_str(" w");
        latencies.1.take(&mut line);
        say(&line);
        counters.say(name, since_start);
    }
}

/// Reads and writes blocks at random, each kind so many times a second.
fn work(checker: &mut Checker, latencies: &(Latencies, Latencies), reads: f64, writes: f64) {
    let period = |rate: f64| Duration::from_secs_f64(1.0 / rate.max(1e-3));
    let (read_period, write_period) = (period(reads), period(writes));
    let mut draws = checker.draws();
    let mut due = (Instant::now() + read_period, Instant::now() + write_period);
    loop {
        let reading = due.0 <= due.1;
        let next = due.0.min(due.1);
        std::thread::sleep(next.saturating_duration_since(Instant::now()));
        draws += 1;
        let block = mix(draws) as usize % checker.blocks();
        let began = Instant::now();
        if reading {
            let page = checker.read(block);
            latencies.0.note(began);
            if let Some(page) = page {
                checker.judge(block, &page);
            }
        } else {
            let page = checker.renewed(block);
            let began = Instant::now();
            checker.put(block, &page);
            latencies.1.note(began);
        }
        let (due, period) = if reading {
            (&mut due.0, read_period)
        } else {
            (&mut due.1, write_period)
        };
        *due += period;
        if due.elapsed() > LATE {
            *due = Instant::now();
        }
    }
}
