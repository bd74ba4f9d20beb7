//! The program inside the test guest: pages whose every byte is known, dirtied and verified all the
//! time, so that a lost, stale, torn or misplaced page is seen and every stall shows on the console.
//!
//! `std` only, compiled by `scripts/guest-image.sh` with plain rustc and run as the guest's
//! init. It must never allocate, print or wait between ticks more than a tick allows: a gap on
//! the console has to mean that the guest did not run.
//!
//! Kernel command line, with defaults:
//! - `memcheck.mb=64`: MiB of checked pages.
//! - `memcheck.rate=8`: pages dirtied, in MB/s (10⁶ bytes).
//! - `memcheck.hot=100`: per cent of the pages that get nine of ten writes; 100 is uniform.
//! - `memcheck.sweep=32`: pages verified in turn, in MB/s.
//! - `memcheck.random=50`: per cent of each page that does not compress.
//! - `memcheck.seed=1`: which pages are written, and what with.
//! - `memcheck.tick=50`: time between two ticks in ms.
//!
//! Console, one line each:
//! - `READY <pages>` when every page has been written once.
//! - `TICK <monotonic ms> <page operations> <bad pages>` once a tick; all three only ever grow.
//! - `BAD …` what is wrong with a page (the first 32; the page is then written anew).
//! - `VERIFIED <pages> <bad pages>` answers the input line `verify` after a full sweep; bad pages are
//!   counted since the boot.
//! - `RATE <MB/s>` answers `rate <MB/s>`.
//! - `ERROR <what>` answers anything else.

use std::io::{BufRead, Write};
use std::sync::mpsc::{Receiver, sync_channel};
use std::time::{Duration, Instant};

use command_line::CommandLine;
use pattern::{Contents, PAGE, Page, WORDS, mix};

mod command_line;
mod pattern;

/// Page operations between two looks at the clock.
const CHUNK: u64 = 8;
/// `BAD` lines printed.
const DETAILS: u64 = 32;

fn main() {
    let options = Options::from_command_line();
    let commands = commands();
    let mut checker = Checker::new(&options);
    say(&format!("READY {}", checker.pages.len()));
    checker.run(&commands);
}

/// The kernel command line's `memcheck.*`.
struct Options {
    mib: usize,
    rate: f64,
    hot: u64,
    sweep: f64,
    random: usize,
    seed: u64,
    tick: Duration,
}

impl Options {
    fn from_command_line() -> Self {
        let line = CommandLine::of("memcheck");
        Self {
            mib: line.value("mb", 64),
            rate: line.value("rate", 8.0),
            hot: line.value("hot", 100),
            sweep: line.value("sweep", 32.0),
            random: line.value("random", 50),
            seed: line.value("seed", 1),
            tick: Duration::from_millis(line.value("tick", 50).max(1)),
        }
    }
}

/// Input lines of the console, read by a thread of their own.
fn commands() -> Receiver<String> {
    let (sender, receiver) = sync_channel(16);
    std::thread::spawn(move || {
        for line in std::io::stdin().lock().lines() {
            match line {
                Ok(line) => {
                    if sender.send(line).is_err() {
                        return;
                    }
                }
                Err(error) => return say(&format!("ERROR console input: {error}")),
            }
        }
    });
    receiver
}

/// One line on the console, in one write.
fn say(line: &str) {
    let mut out = std::io::stdout().lock();
    // Without a console there is nobody to tell.
    let _ = writeln!(out, "{line}").and_then(|()| out.flush());
}

struct Checker {
    pages: Vec<Page>,
    /// The generation that each page must have.
    generations: Vec<u32>,
    /// Words of a page that do not compress.
    random: usize,
    hot_pages: u64,
    rate: f64,
    sweep_rate: f64,
    draws: u64,
    seed: u64,
    tick: Duration,
    /// The next page to sweep.
    cursor: usize,
    operations: u64,
    bad: u64,
}

impl Checker {
    fn new(options: &Options) -> Self {
        let count = options.mib * (1 << 20) / PAGE;
        assert!(count > 0, "memcheck.mb must be at least 1");
        let mut checker = Self {
            pages: vec![Page([0; WORDS]); count],
            generations: vec![1; count],
            random: WORDS * options.random.min(100) / 100,
            hot_pages: (count as u64 * options.hot.min(100) / 100).max(1),
            rate: options.rate,
            sweep_rate: options.sweep,
            draws: 0,
            seed: options.seed,
            tick: options.tick,
            cursor: 0,
            operations: 0,
            bad: 0,
        };
        for page in 0..count {
            checker.write(page);
        }
        checker
    }

    fn run(&mut self, commands: &Receiver<String>) {
        let start = Instant::now();
        let mut next_tick = start;
        let mut writes = Budget::new(start, self.tick);
        let mut sweeps = Budget::new(start, self.tick);
        // Pages that a full sweep has still to see.
        let mut full_sweep: Option<usize> = None;
        loop {
            let now = Instant::now();
            if now >= next_tick {
                next_tick = now + self.tick;
                self.say_tick(now - start);
                if full_sweep.is_none() {
                    full_sweep = commands.try_recv().ok().and_then(|line| self.obey(&line));
                }
            }
            for _ in 0..writes.take(now, self.rate) {
                self.dirty_one();
            }
            if let Some(left) = full_sweep {
                let count = left.min(4 * CHUNK as usize);
                (0..count).for_each(|_| self.sweep_one());
                full_sweep = Some(left - count).filter(|left| *left > 0);
                if full_sweep.is_none() {
                    say(&format!("VERIFIED {} {}", self.pages.len(), self.bad));
                }
                continue;
            }
            let sweep = sweeps.take(now, self.sweep_rate);
            (0..sweep).for_each(|_| self.sweep_one());
            if !writes.is_behind() && !sweeps.is_behind() {
                let rest = next_tick.saturating_duration_since(Instant::now());
                std::thread::sleep(rest.min(Duration::from_millis(2)));
            }
        }
    }

    fn say_tick(&self, since_start: Duration) {
        let millis = since_start.as_millis();
        say(&format!("TICK {millis} {} {}", self.operations, self.bad));
    }

    /// Does what an input line says; pages to sweep, if it asks for that.
    fn obey(&mut self, line: &str) -> Option<usize> {
        let mut words = line.split_whitespace();
        match (words.next(), words.next()) {
            (None, _) => {}
            (Some("verify"), None) => return Some(self.pages.len()),
            (Some("rate"), Some(rate)) if rate.parse::<f64>().is_ok() => {
                self.rate = rate.parse().expect("parsed just before");
                say(&format!("RATE {}", self.rate));
            }
            _ => say(&format!("ERROR '{line}' is not a command")),
        }
        None
    }

    fn dirty_one(&mut self) {
        self.draws += 1;
        let draw = mix(self.seed ^ self.draws.wrapping_mul(0x2545_f491_4f6c_dd1d));
        let count = self.pages.len() as u64;
        let span = if draw.is_multiple_of(10) {
            count
        } else {
            self.hot_pages
        };
        // The hot pages are spread over all: consecutive numbers are far apart.
        let page = ((draw >> 8) % span).wrapping_mul(0x9e37_79b1) % count;
        let page = page as usize;
        self.verify(page);
        self.generations[page] = self.generations[page].wrapping_add(1);
        self.write(page);
        self.operations += 1;
    }

    fn sweep_one(&mut self) {
        self.verify(self.cursor);
        self.cursor = (self.cursor + 1) % self.pages.len();
        self.operations += 1;
    }

    fn contents(&self, page: usize) -> Contents {
        Contents {
            page: page as u64,
            generation: u64::from(self.generations[page]),
            random: self.random,
        }
    }

    fn write(&mut self, page: usize) {
        self.contents(page).write(&mut self.pages[page]);
    }

    fn verify(&mut self, page: usize) {
        let found = &self.pages[page];
        let Some(word) = self.contents(page).first_difference(found) else {
            return;
        };
        let found = &found.0;
        self.bad += 1;
        if self.bad <= DETAILS {
            let zero = if found.iter().all(|word| *word == 0) {
                ", all zero"
            } else {
                ""
            };
            say(&format!(
                "BAD page {page}: generation {} expected; it says page {} generation {}; \
                 first wrong word {word}: {:#018x}{zero}",
                self.generations[page], found[0], found[1], found[word],
            ));
        }
        // Written anew, it is counted once.
        self.write(page);
    }
}

/// Page operations that a rate allows. A stall is not made up for by more than one tick's worth.
struct Budget {
    since: Instant,
    /// Pages owed.
    owed: f64,
    /// The longest stall that is made up for.
    most: Duration,
}

impl Budget {
    fn new(now: Instant, most: Duration) -> Self {
        Self {
            since: now,
            owed: 0.0,
            most,
        }
    }

    /// Pages to do now, at most a chunk.
    fn take(&mut self, now: Instant, megabytes: f64) -> u64 {
        let pages_per_second = megabytes * 1e6 / PAGE as f64;
        self.owed += (now - self.since).as_secs_f64() * pages_per_second;
        self.owed = self.owed.min(pages_per_second * self.most.as_secs_f64());
        self.since = now;
        let pages = (self.owed as u64).min(CHUNK);
        self.owed -= pages as f64;
        pages
    }

    fn is_behind(&self) -> bool {
        self.owed >= 1.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stall_is_not_made_up_for() {
        let start = Instant::now();
        let mut budget = Budget::new(start, Duration::from_millis(50));
        let after = start + Duration::from_secs(60);
        let mut pages = 0;
        while budget.is_behind() || pages == 0 {
            pages += budget.take(after, 40.96);
        }
        // 10 000 pages a second, one tick's worth.
        assert_eq!(pages, 500);
    }
}
