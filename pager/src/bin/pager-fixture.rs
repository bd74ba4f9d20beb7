//! A process under test, for this crate's tests and benchmarks: a guest that maps shared memory
//! and does what it is told on its standard input, or a pager that can be killed. Not for users.

#[path = "../../tests/common/pattern.rs"]
mod pattern;

use std::fs::File;
use std::io::{self, BufRead, Write};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use hybridmig_pager::{
    FaultAnswer, FaultSink, Features, MissingMap, PagerError, Placer, PlacerConfig, Region,
    RegionMemory, attach,
};

const PAGE: usize = 4096;
const WORDS: usize = PAGE / 8;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments[..] {
        ["guest", fd, pages, uid] => guest(number(fd), number(pages), number(uid)),
        ["pager", how, pid, fd, pages, seed, missing] => {
            pager(
                how,
                number(pid),
                number(fd),
                number(pages),
                number(seed),
                missing,
            );
        }
        _ => panic!(
            "usage: guest FD PAGES UID | pager arm|stall|take-over PID FD PAGES SEED MISSING"
        ),
    }
}

fn number<T: std::str::FromStr>(text: &str) -> T {
    text.parse()
        .unwrap_or_else(|_| panic!("not a number: {text:?}"))
}

fn say(line: &str) {
    println!("{line}");
    io::stdout().flush().expect("the test reads our output");
}

/// Of this thread.
fn processor_time() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// Memory that a pager changes under our feet: accessed by volatile words only.
#[derive(Clone, Copy)]
struct Memory {
    start: *mut u64,
    pages: u32,
}

// SAFETY: the mapping lives as long as the process, and is accessed by volatile words only.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl Memory {
    fn map(fd: i32, pages: u32) -> Self {
        // SAFETY: a new mapping at an address of the kernel's choice.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                pages as usize * PAGE,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                fd,
                0,
            )
        };
        assert!(start != libc::MAP_FAILED, "{}", io::Error::last_os_error());
        Self {
            start: start.cast(),
            pages,
        }
    }

    fn word(self, page: u32, index: usize) -> *mut u64 {
        assert!(page < self.pages && index < WORDS, "within the mapping");
        // SAFETY: within the mapping, as just checked.
        unsafe { self.start.add(page as usize * WORDS + index) }
    }

    fn read(self, page: u32, index: usize) -> u64 {
        // SAFETY: mapped and aligned; volatile, as others write to it.
        unsafe { self.word(page, index).read_volatile() }
    }

    fn write(self, page: u32, index: usize, value: u64) {
        // SAFETY: mapped and aligned; volatile, as others read it.
        unsafe { self.word(page, index).write_volatile(value) }
    }

    fn fill(self, seed: u64, page: u32) {
        for index in 0..WORDS {
            self.write(page, index, pattern::word(seed, page, index));
        }
    }

    fn advise_remove(self, first: u32, count: u32) {
        // SAFETY: whole pages of our mapping, to which nothing holds a reference.
        let result = unsafe {
            libc::madvise(
                self.word(first, 0).cast(),
                count as usize * PAGE,
                libc::MADV_REMOVE,
            )
        };
        assert_eq!(result, 0, "{}", io::Error::last_os_error());
    }

    fn unmap(self, first: u32, count: u32) {
        // SAFETY: whole pages of our mapping; the test tells us not to touch them again.
        let result = unsafe { libc::munmap(self.word(first, 0).cast(), count as usize * PAGE) };
        assert_eq!(result, 0, "{}", io::Error::last_os_error());
    }

    fn used(self, writes: u64, ms: u64) -> u64 {
        let until = Instant::now() + Duration::from_millis(ms);
        let (mut at, mut count) = (1, 0);
        while Instant::now() < until {
            for _ in 0..64 {
                at = pattern::mix(at);
                let page = (at % u64::from(self.pages)) as u32;
                let index = (at >> 40) as usize % WORDS;
                if (at >> 32) % 100 < writes {
                    self.write(page, index, at);
                } else {
                    std::hint::black_box(self.read(page, index));
                }
            }
            count += 64;
        }
        count
    }

    fn lock(self) -> String {
        // SAFETY: our whole mapping.
        let result = unsafe { libc::mlock(self.start.cast(), self.pages as usize * PAGE) };
        if result == 0 {
            "done".into()
        } else {
            io::Error::last_os_error().to_string()
        }
    }

    /// Compares every word of every page, each thread in an order of its own.
    fn verify(self, seed: u64, threads: u64, mut expected: impl FnMut(u32) -> bool) -> String {
        let zero: Vec<bool> = (0..self.pages).map(&mut expected).collect();
        let bad = std::thread::scope(|scope| {
            let handles: Vec<_> = (0..threads)
                .map(|thread| {
                    let zero = &zero;
                    std::thread::Builder::new()
                        .name(format!("reader-{thread}"))
                        .spawn_scoped(scope, move || self.first_bad(seed, thread, zero))
                        .expect("a thread for the test")
                })
                .collect();
            handles
                .into_iter()
                .find_map(|handle| handle.join().expect("readers do not panic"))
        });
        bad.map_or("ok".into(), |page| format!("bad {page}"))
    }

    fn first_bad(self, seed: u64, thread: u64, zero: &[bool]) -> Option<u32> {
        // An odd stride visits every page of a power of two.
        assert!(self.pages.is_power_of_two(), "for the stride");
        let stride = pattern::mix(thread) as u32 | 1;
        (0..self.pages)
            .map(|index| index.wrapping_mul(stride).wrapping_add(stride) % self.pages)
            .find(|&page| {
                (0..WORDS).any(|index| {
                    let want = if zero[page as usize] {
                        0
                    } else {
                        pattern::word(seed, page, index)
                    };
                    self.read(page, index) != want
                })
            })
    }
}

fn guest(fd: i32, pages: u32, uid: u32) {
    if uid != 0 {
        nix::unistd::setgroups(&[]).expect("dropping groups");
        nix::unistd::setgid(uid.into()).expect("dropping the group");
        nix::unistd::setuid(uid.into()).expect("dropping the user");
    }
    let memory = Memory::map(fd, pages);
    let mut removed = vec![false; pages as usize];
    say("ready");
    for line in io::stdin().lock().lines() {
        let line = line.expect("the test writes to our input");
        let words: Vec<&str> = line.split(' ').collect();
        let answer = match words[..] {
            ["fill", seed] => {
                (0..pages).for_each(|page| memory.fill(number(seed), page));
                "done".into()
            }
            // One word each in `count` pages.
            ["write", seed, count] => {
                let seed: u64 = number(seed);
                for index in 0..number::<u64>(count) {
                    let at = pattern::mix(seed.wrapping_add(index));
                    let page = (at % u64::from(pages)) as u32;
                    memory.write(page, (at >> 40) as usize % WORDS, at);
                }
                "done".into()
            }
            // Writes everywhere for a while.
            ["churn", seed, ms] => {
                let until = Instant::now() + Duration::from_millis(number(ms));
                let mut at: u64 = number(seed);
                while Instant::now() < until {
                    for _ in 0..64 {
                        at = pattern::mix(at);
                        let page = (at % u64::from(pages)) as u32;
                        memory.write(page, (at >> 40) as usize % WORDS, at);
                    }
                }
                "done".into()
            }
            // The same, but 200 pages in a millisecond only: most are not written again.
            ["trickle", seed, ms] => {
                let begun = Instant::now();
                let mut at: u64 = number(seed);
                let mut written = 0;
                while begun.elapsed() < Duration::from_millis(number(ms)) {
                    while written < begun.elapsed().as_micros() / 5 {
                        at = pattern::mix(at);
                        let page = (at % u64::from(pages)) as u32;
                        memory.write(page, (at >> 40) as usize % WORDS, at);
                        written += 1;
                    }
                }
                "done".into()
            }
            // Reads everything in a range.
            ["read", first, count] => {
                let (first, count): (u32, u32) = (number(first), number(count));
                (first..first + count).for_each(|page| {
                    std::hint::black_box(memory.read(page, 0));
                });
                "done".into()
            }
            // Accesses everywhere for a while, `writes` of 100 write; how many there were, and the ns of processor
            // time that they took, page faults included.
            ["use", writes, ms] => {
                let begun = processor_time();
                let count = memory.used(number(writes), number(ms));
                let took = processor_time().saturating_sub(begun);
                format!("{count} {}", took.as_nanos())
            }
            ["lock"] => memory.lock(),
            ["verify", seed, threads] => {
                memory.verify(number(seed), number(threads), |page| removed[page as usize])
            }
            // Touches pages in order; median and 99th percentile of the time per touch, in ns.
            ["touch", count] => {
                let mut times: Vec<u128> = (0..number(count))
                    .map(|page| {
                        let begun = Instant::now();
                        std::hint::black_box(memory.read(page, 0));
                        begun.elapsed().as_nanos()
                    })
                    .collect();
                times.sort_unstable();
                let at = |share: usize| times[times.len() * share / 100];
                format!("{} {}", at(50), at(99))
            }
            ["remove", first, count] => {
                let (first, count) = (number(first), number(count));
                memory.advise_remove(first, count);
                removed[first as usize..][..count as usize].fill(true);
                "done".into()
            }
            ["unmap", first, count] => {
                memory.unmap(number(first), number(count));
                "done".into()
            }
            // A thread that never rests.
            ["spin"] => {
                std::thread::spawn(move || {
                    let mut at = 0_u64;
                    loop {
                        at = std::hint::black_box(pattern::mix(at));
                    }
                });
                "done".into()
            }
            // A thread that does nothing, as most processes have one.
            ["rest"] => {
                std::thread::spawn(|| {
                    loop {
                        std::thread::park();
                    }
                });
                "done".into()
            }
            ["quit"] => return,
            _ => panic!("unknown command {line:?}"),
        };
        say(&answer);
    }
}

/// Asks a queue; the blocks come from the pattern.
struct Sink {
    queue: mpsc::Sender<u32>,
}

impl FaultSink for Sink {
    fn fault(&self, _region: u16, block: u32) -> FaultAnswer {
        // Once everything is placed nobody listens, and nobody waits either.
        let _ = self.queue.send(block);
        FaultAnswer::Requested
    }

    fn removed(&self, _region: u16, _first: u32, _count: u32) {}

    fn failed(&self, error: PagerError) {
        say(&format!("failed {error}"));
    }
}

/// Pages a guest in: by faults and, if told to `arm`, on another thread everything in order.
/// Says how far it is.
fn pager(how: &str, pid: u32, fd: i32, pages: u32, seed: u64, missing: &str) {
    let file = File::options()
        .read(true)
        .write(true)
        .open(format!("/proc/{pid}/fd/{fd}"))
        .expect("the guest's RAM file");
    let memory = RegionMemory::open(file, 0, 0, u64::from(pages) * PAGE as u64).expect("RAM");
    let region = Region::find(pid, Arc::new(memory)).expect("mappings");
    let (queue, faults) = mpsc::channel();
    let sink = Arc::new(Sink { queue });
    let config = PlacerConfig::default();
    let placer = if how == "take-over" {
        let map = MissingMap::open(Path::new(missing)).expect("missing map");
        let uffd = attach::recover(pid).expect("recover").uffd;
        Placer::take_over(uffd, pid, vec![region], Arc::new(map), sink, config)
    } else {
        let map = MissingMap::create(Path::new(missing), &[pages]).expect("missing map");
        map.insert(0, &(0..pages).collect()).expect("in range");
        let uffd = attach::attach(pid, attach::Method::Syscall)
            .expect("attach")
            .uffd;
        uffd.handshake(Features::PLACING).expect("handshake");
        Placer::arm(uffd, pid, vec![region], Arc::new(map), &[], sink, config)
    };
    let placer = Arc::new(placer.expect("placer"));
    say("serving");
    let placed = AtomicU64::new(0);
    let place = |block: u32, data: &mut [u8]| {
        pattern::fill(seed, block, data);
        placer.place(0, block, data).expect("place");
        if placed.fetch_add(1, Ordering::Relaxed) % 32 == 31 {
            say("progress");
        }
    };
    std::thread::scope(|scope| {
        let push = &place;
        let placer = &placer;
        let pushed = if how == "arm" {
            placer.missing().to_bitmap(0)
        } else {
            // By faults alone.
            roaring::RoaringBitmap::new()
        };
        scope.spawn(move || {
            let mut data = [0; PAGE];
            for block in pushed {
                push(block, &mut data);
                // The pace of a link, so that the guest's faults find something to wait for.
                std::thread::sleep(Duration::from_micros(300));
            }
        });
        let mut data = [0; PAGE];
        while !placer.missing().is_empty() {
            match faults.recv_timeout(Duration::from_millis(5)) {
                // Read, and never answered.
                Ok(_) if how == "stall" && placed.load(Ordering::Relaxed) >= 100 => {
                    say("stalled");
                    std::thread::sleep(Duration::from_secs(3600));
                }
                Ok(block) => place(block, &mut data),
                Err(mpsc::RecvTimeoutError::Timeout) => {}
                Err(error) => panic!("{error}"),
            }
        }
    });
    let stats = placer.disarm().expect("disarm");
    say(&format!("disarmed {}", stats.faults));
}
