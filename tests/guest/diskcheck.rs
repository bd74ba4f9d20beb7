//! The program inside the test guest that does to disks what `memcheck` does to memory: blocks whose every
//! byte is known, rewritten and verified all the time, some with O_DIRECT and some through the page
//! cache, so that a lost, stale, torn or misplaced block, an I/O error and every stall show on the
//! console.
//!
//! `std` only, compiled by `scripts/guest-image.sh` with plain rustc and started by `init` when the
//! kernel command line names disks. Each disk has a thread of its own, so that one that waits
//! shows as that one.
//!
//! Kernel command line, with defaults:
//! - `diskcheck.dev=`: disks under `/dev`, separated by commas; without it there is nothing to do.
//! - `diskcheck.mb=8`: MiB of checked blocks on each, spread over all of it; the rest is never written.
//! - `diskcheck.run=1`: blocks in a row.
//! - `diskcheck.random=50`: per cent of each block that does not compress.
//! - `diskcheck.rate=2`: blocks rewritten, in MB/s (10⁶ bytes); as many again are verified in turn.
//! - `diskcheck.workers=0`: if not 0, so many threads for each disk, all of them with O_DIRECT; the blocks are there
//!   already, in their first generation.
//! - `diskcheck.reads=2`: what these read at random and verify, in MB/s, beside the writes.
//!
//! Console, one line each:
//! - `DISK <dev> <monotonic ms> <block operations> <sweeps> <bad blocks> <errors>` four times a second;
//!   a sweep is complete when every block has been read back from the disk once more. With workers ten
//!   times a second, and without sweeps.
//! - `DISKIO <dev> <monotonic ms> r <class>:<count> … w <class>:<count> …` with workers: reads and writes since the
//!   line before, by latency (`latency.rs`).
//! - `BADBLOCK …` and `DISKERROR …` what is wrong (the first 16 each).

use std::fs::{File, OpenOptions};
use std::io::{Seek, SeekFrom, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use command_line::CommandLine;
use layout::{Layout, base};
use pattern::{Contents, PAGE, Page, WORDS, mix};

mod command_line;
mod latency;
mod layout;
mod load;
mod pattern;

const O_DIRECT: i32 = 0o40_000;
/// `POSIX_FADV_DONTNEED`: forgets what is cached and clean.
const DONTNEED: i32 = 4;
/// Lines of each kind of trouble printed.
const DETAILS: u64 = 16;
/// Time between two lines of a disk.
const TICK: Duration = Duration::from_millis(250);
/// Buffered blocks rewritten between two times that they are brought to the disk.
const SYNC_EVERY: u64 = 64;

unsafe extern "C" {
    fn posix_fadvise(fd: i32, offset: i64, len: i64, advice: i32) -> i32;
}

fn main() {
    let line = CommandLine::of("diskcheck");
    let options = Options::read(&line);
    let start = Instant::now();
    let threads: Vec<_> = line
        .find("dev")
        .unwrap_or_default()
        .split(',')
        .filter(|name| !name.is_empty())
        .map(|name| {
            let (name, options) = (name.to_owned(), options.clone());
            std::thread::spawn(move || {
                if options.workers > 0 {
                    load::run(&name, &options, start);
                } else {
                    Checker::open(&name, &options).run(start, options.rate);
                }
            })
        })
        .collect();
    for thread in threads {
        // A thread ends only by a panic, which the console has.
        let _ = thread.join();
    }
}

/// The kernel command line's `diskcheck.*`.
#[derive(Clone)]
struct Options {
    mib: u64,
    run: u64,
    random: usize,
    rate: f64,
    workers: usize,
    reads: f64,
}

impl Options {
    fn read(line: &CommandLine) -> Self {
        Self {
            mib: line.value("mb", 8),
            run: line.value("run", 1),
            random: WORDS * line.value("random", 50) / 100,
            rate: line.value("rate", 2.0),
            workers: line.value("workers", 0),
            reads: line.value("reads", 2.0),
        }
    }
}

fn say(line: &str) {
    // Unlike stdout of std, one write for each line: another process writes to the console as well.
    let _ = std::io::stdout()
        .lock()
        .write_all(format!("{line}\n").as_bytes());
}

/// What was done to a disk, by all of its threads.
#[derive(Default)]
struct Counters {
    operations: AtomicU64,
    sweeps: AtomicU64,
    bad: AtomicU64,
    errors: AtomicU64,
}

impl Counters {
    fn say(&self, name: &str, since_start: Duration) {
        let Self {
            operations,
            sweeps,
            bad,
            errors,
        } = self;
        let [operations, sweeps, bad, errors] =
            [operations, sweeps, bad, errors].map(|counter| counter.load(Relaxed));
        say(&format!(
            "DISK {name} {} {operations} {sweeps} {bad} {errors}",
            since_start.as_millis()
        ));
    }
}

/// A disk, or a part of its blocks: each belongs to one thread.
struct Checker {
    name: String,
    direct: Arc<File>,
    buffered: Arc<File>,
    layout: Layout,
    /// The generation that each block must have.
    generations: Vec<u32>,
    /// The number of the first of these blocks, and from one to the next.
    first: usize,
    step: usize,
    /// Words of a block that do not compress.
    random: usize,
    /// Whether all goes past the page cache, or every other block.
    all_direct: bool,
    counters: Arc<Counters>,
    unsynced: u64,
}

impl Checker {
    fn open(name: &str, options: &Options) -> Self {
        let path = format!("/dev/{name}");
        let open = |flags| {
            OpenOptions::new()
                .read(true)
                .write(true)
                .custom_flags(flags)
                .open(&path)
                .unwrap_or_else(|error| panic!("{path}: {error}"))
        };
        let mut buffered = open(0);
        let size = buffered.seek(SeekFrom::End(0)).expect("a disk has a size");
        let layout = Layout::new(size, options.mib << 20, options.run)
            .unwrap_or_else(|| panic!("{path} has only {size} bytes"));
        assert!(layout.blocks <= 1 << 16, "{path}: more blocks than numbers");
        Self {
            name: name.to_owned(),
            direct: Arc::new(open(O_DIRECT)),
            buffered: Arc::new(buffered),
            generations: vec![0; layout.blocks as usize],
            layout,
            first: 0,
            step: 1,
            random: options.random,
            all_direct: false,
            counters: Arc::default(),
            unsynced: 0,
        }
    }

    /// Every `of`th block, from number `index` on, as they were filled beforehand.
    fn share(&self, index: usize, of: usize) -> Self {
        let blocks = self.generations.len().saturating_sub(index).div_ceil(of);
        Self {
            name: self.name.clone(),
            direct: Arc::clone(&self.direct),
            buffered: Arc::clone(&self.buffered),
            layout: self.layout,
            generations: vec![1; blocks],
            first: index,
            step: of,
            random: self.random,
            all_direct: true,
            counters: Arc::clone(&self.counters),
            unsynced: 0,
        }
    }

    fn blocks(&self) -> usize {
        self.generations.len()
    }

    /// Where its random numbers begin.
    fn draws(&self) -> u64 {
        (base(&self.name) >> 16) + ((self.first as u64) << 32)
    }

    fn run(&mut self, start: Instant, rate: f64) {
        for block in 0..self.blocks() {
            self.write(block);
        }
        self.sync();
        let per_tick = (rate * 1e6 / PAGE as f64 * TICK.as_secs_f64()).max(1.0) as u64;
        let mut draws = self.draws();
        let mut cursor = 0;
        loop {
            let began = Instant::now();
            self.counters.say(&self.name, began - start);
            for step in 0..per_tick {
                draws += 1;
                let block = mix(draws) as usize % self.blocks();
                self.verify(block);
                self.write(block);
                self.verify(cursor);
                cursor += 1;
                if cursor == self.blocks() {
                    cursor = 0;
                    self.counters.sweeps.fetch_add(1, Relaxed);
                }
                // Spread over the tick rather than in one burst.
                let due = TICK.mul_f64(step as f64 / per_tick as f64);
                std::thread::sleep(due.saturating_sub(began.elapsed()));
            }
            std::thread::sleep(TICK.saturating_sub(began.elapsed()));
        }
    }

    /// The number that a block has on the disk.
    fn number(&self, block: usize) -> u64 {
        (self.first + block * self.step) as u64
    }

    fn offset(&self, block: usize) -> u64 {
        self.layout.offset(self.number(block))
    }

    fn contents(&self, block: usize) -> Contents {
        Contents {
            page: base(&self.name) | self.number(block),
            generation: u64::from(self.generations[block]),
            random: self.random,
        }
    }

    /// Every other block goes past the page cache, or all do.
    fn file(&self, block: usize) -> &File {
        if self.all_direct || block.is_multiple_of(2) {
            &self.direct
        } else {
            &self.buffered
        }
    }

    fn write(&mut self, block: usize) {
        let page = self.renewed(block);
        self.put(block, &page);
        self.unsynced += 1;
        if self.unsynced >= SYNC_EVERY {
            self.sync();
        }
    }

    /// The block's next generation.
    fn renewed(&mut self, block: usize) -> Page {
        self.generations[block] += 1;
        let mut page = Page([0; WORDS]);
        self.contents(block).write(&mut page);
        page
    }

    fn put(&mut self, block: usize, page: &Page) {
        self.counters.operations.fetch_add(1, Relaxed);
        let at = self.offset(block);
        if let Err(error) = self.file(block).write_all_at(bytes(page), at) {
            self.failed("write", block, &error);
        }
    }

    /// Brings what is buffered to the disk and forgets it, so that it is read from there.
    fn sync(&mut self) {
        self.unsynced = 0;
        if let Err(error) = self.buffered.sync_data() {
            self.failed("flush", 0, &error);
        }
        // SAFETY: an advice on a descriptor that is open; it touches no memory of ours.
        let result = unsafe { posix_fadvise(self.buffered.as_raw_fd(), 0, 0, DONTNEED) };
        assert_eq!(result, 0, "posix_fadvise");
    }

    fn verify(&mut self, block: usize) {
        if let Some(page) = self.read(block) {
            self.judge(block, &page);
        }
    }

    /// Nothing if it cannot be read, which is counted.
    fn read(&mut self, block: usize) -> Option<Page> {
        self.counters.operations.fetch_add(1, Relaxed);
        let mut page = Page([0; WORDS]);
        let at = self.offset(block);
        if let Err(error) = self.file(block).read_exact_at(bytes_mut(&mut page), at) {
            self.failed("read", block, &error);
            return None;
        }
        Some(page)
    }

    /// Whether that is what the block must hold.
    fn judge(&mut self, block: usize, page: &Page) {
        let Some(word) = self.contents(block).first_difference(page) else {
            return;
        };
        if self.counters.bad.fetch_add(1, Relaxed) < DETAILS {
            say(&format!(
                "BADBLOCK {} {}: generation {} expected; it says block {} generation {}; first \
                 wrong word {word}",
                self.name,
                self.number(block),
                self.generations[block],
                page.0[0] & 0xffff,
                page.0[1],
            ));
        }
        // Written anew, it is counted once.
        self.write(block);
    }

    fn failed(&self, what: &str, block: usize, error: &std::io::Error) {
        if self.counters.errors.fetch_add(1, Relaxed) < DETAILS {
            let number = self.number(block);
            say(&format!("DISKERROR {} {what} {number}: {error}", self.name));
        }
    }
}

fn bytes(page: &Page) -> &[u8] {
    // SAFETY: a page is PAGE bytes of plain words, and any byte may be read.
    unsafe { std::slice::from_raw_parts(page.0.as_ptr().cast(), PAGE) }
}

fn bytes_mut(page: &mut Page) -> &mut [u8] {
    // SAFETY: a page is PAGE bytes of plain words, and any byte may be written.
    unsafe { std::slice::from_raw_parts_mut(page.0.as_mut_ptr().cast(), PAGE) }
}
