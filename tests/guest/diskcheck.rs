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
//! - `diskcheck.rate=2`: blocks rewritten, in MB/s (10⁶ bytes); as many again are verified in turn.
//!
//! Console, one line each:
//! - `DISK <dev> <monotonic ms> <block operations> <sweeps> <bad blocks> <errors>` four times a second;
//!   a sweep is complete when every block has been read back from the disk once more.
//! - `BADBLOCK …` and `DISKERROR …` what is wrong (the first 16 each).

use std::fs::{File, OpenOptions};
use std::io::{Seek, SeekFrom, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::time::{Duration, Instant};

use pattern::{Contents, PAGE, Page, WORDS, mix};

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
    let line = std::fs::read_to_string("/proc/cmdline").expect("/proc is mounted");
    let mib: u64 = value(&line, "mb").map_or(8, |text| text.parse().expect("diskcheck.mb"));
    let rate: f64 = value(&line, "rate").map_or(2.0, |text| text.parse().expect("diskcheck.rate"));
    let start = Instant::now();
    let threads: Vec<_> = value(&line, "dev")
        .unwrap_or_default()
        .split(',')
        .filter(|name| !name.is_empty())
        .map(|name| {
            let name = name.to_owned();
            std::thread::spawn(move || Checker::open(&name, mib).run(start, rate))
        })
        .collect();
    for thread in threads {
        // A thread ends only by a panic, which the console has.
        let _ = thread.join();
    }
}

fn value<'a>(line: &'a str, name: &str) -> Option<&'a str> {
    let prefix = format!("diskcheck.{name}=");
    line.split_whitespace()
        .find_map(|word| word.strip_prefix(&prefix))
}

fn say(line: &str) {
    // Unlike stdout of std, one write for each line: another process writes to the console as well.
    let _ = std::io::stdout()
        .lock()
        .write_all(format!("{line}\n").as_bytes());
}

struct Checker {
    name: String,
    direct: File,
    buffered: File,
    /// The generation that each block must have.
    generations: Vec<u32>,
    /// Bytes from one block to the next.
    stride: u64,
    /// Tells this disk's blocks from another's.
    base: u64,
    operations: u64,
    sweeps: u64,
    bad: u64,
    errors: u64,
    unsynced: u64,
}

impl Checker {
    fn open(name: &str, mib: u64) -> Self {
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
        let count = (mib << 20) / PAGE as u64;
        let stride = size / count / PAGE as u64 * PAGE as u64;
        assert!(stride > 0, "{path} has only {size} bytes");
        let base = name.bytes().fold(0, |sum, byte| sum << 4 ^ u64::from(byte)) & 0xffff;
        Self {
            name: name.to_owned(),
            direct: open(O_DIRECT),
            buffered,
            generations: vec![0; count as usize],
            stride,
            base: base << 16,
            operations: 0,
            sweeps: 0,
            bad: 0,
            errors: 0,
            unsynced: 0,
        }
    }

    fn run(&mut self, start: Instant, rate: f64) {
        for block in 0..self.generations.len() {
            self.write(block);
        }
        self.sync();
        let per_tick = (rate * 1e6 / PAGE as f64 * TICK.as_secs_f64()).max(1.0) as u64;
        let mut draws = self.base;
        let mut cursor = 0;
        loop {
            let began = Instant::now();
            self.say(began - start);
            for step in 0..per_tick {
                draws += 1;
                let block = mix(draws) as usize % self.generations.len();
                self.verify(block);
                self.write(block);
                self.verify(cursor);
                cursor += 1;
                if cursor == self.generations.len() {
                    cursor = 0;
                    self.sweeps += 1;
                }
                // Spread over the tick rather than in one burst.
                let due = TICK.mul_f64(step as f64 / per_tick as f64);
                std::thread::sleep(due.saturating_sub(began.elapsed()));
            }
            std::thread::sleep(TICK.saturating_sub(began.elapsed()));
        }
    }

    fn say(&self, since_start: Duration) {
        say(&format!(
            "DISK {} {} {} {} {} {}",
            self.name,
            since_start.as_millis(),
            self.operations,
            self.sweeps,
            self.bad,
            self.errors
        ));
    }

    fn contents(&self, block: usize) -> Contents {
        Contents {
            page: self.base | block as u64,
            generation: u64::from(self.generations[block]),
            random: WORDS / 2,
        }
    }

    /// Every other block goes past the page cache.
    fn file(&self, block: usize) -> &File {
        if block.is_multiple_of(2) {
            &self.direct
        } else {
            &self.buffered
        }
    }

    fn write(&mut self, block: usize) {
        self.operations += 1;
        self.generations[block] += 1;
        let mut page = Page([0; WORDS]);
        self.contents(block).write(&mut page);
        let at = block as u64 * self.stride;
        if let Err(error) = self.file(block).write_all_at(bytes(&page), at) {
            self.failed("write", block, &error);
        }
        self.unsynced += 1;
        if self.unsynced >= SYNC_EVERY {
            self.sync();
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
        self.operations += 1;
        let mut page = Page([0; WORDS]);
        let at = block as u64 * self.stride;
        if let Err(error) = self.file(block).read_exact_at(bytes_mut(&mut page), at) {
            return self.failed("read", block, &error);
        }
        let Some(word) = self.contents(block).first_difference(&page) else {
            return;
        };
        self.bad += 1;
        if self.bad <= DETAILS {
            say(&format!(
                "BADBLOCK {} {block}: generation {} expected; it says block {} generation {}; first \
                 wrong word {word}",
                self.name,
                self.generations[block],
                page.0[0] & 0xffff,
                page.0[1],
            ));
        }
        // Written anew, it is counted once.
        self.write(block);
    }

    fn failed(&mut self, what: &str, block: usize, error: &std::io::Error) {
        self.errors += 1;
        if self.errors <= DETAILS {
            say(&format!("DISKERROR {} {what} {block}: {error}", self.name));
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
