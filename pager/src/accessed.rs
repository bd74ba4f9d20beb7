//! Which pages of a guest are accessed, reads included: a sample of them is unmapped in the guest's
//! process (`MADV_DONTNEED` on the shared mapping, whose contents stay in the file), and those that are
//! mapped again some time later were touched. Never touches contents.
//!
//! The trap: a page that is unmapped while it is write-protected leaves a marker, so that the tracker
//! still knows it for clean; one that was written since the last scan leaves nothing, and that it was
//! written would be forgotten. Such a page is owed to the tracker's next report and protected anew. (Linux
//! 6.18 also shows a page without any entry as written, unless a whole table of entries went; this does
//! not rest on it.)
//!
//! What it costs the guest is bounded by construction: [`PAGES_PER_SECOND`] times the price of a minor fault
//! ([`FAULT`]), and a share of the time ([`HELD`]) in which one thread of the process, one that sleeps
//! if there is one, is borrowed for the calls. When that is over the sample is what it is. With KVM unmapping
//! also takes the page out of the hypervisor's tables (mmu notifier), so that the guest's next touch costs an
//! exit too.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use roaring::RoaringBitmap;

use crate::inject::{self, Syscall};
use crate::pagemap::Pagemap;
use crate::{Mapping, PAGE_SIZE, Ranges, Region, Result, Uffd};

/// Most pages of a sample, over all regions.
pub const MAX_PAGES: u64 = 2048;
/// Pages that lie together in a sample.
const RUN: u32 = 16;
/// What an unmapped page costs the guest at its next touch, at most: the fault, and with KVM the exit.
/// Measured: 1.0 to 1.2 µs without KVM (benchmark `pager`, `accesses`).
pub const FAULT: Duration = Duration::from_micros(4);
/// Pages unmapped per second: 1 % of one thread at the price of [`FAULT`].
pub const PAGES_PER_SECOND: f64 = 2500.0;
/// Share of the time that the borrowed thread may stand still: what it has not used it may use later, up to
/// [`HELD_AT_ONCE`]; what it has used too much it must wait for.
const HELD: f64 = 0.01;
/// Time that the borrowed thread may stand still for once.
const HELD_AT_ONCE: Duration = Duration::from_millis(20);
/// Time that a sample is begun with, at least.
const WORTH: Duration = Duration::from_millis(2);
/// Runs that tell something.
const FEW_RUNS: usize = 4;
/// Poor samples in a row after which nothing is tried any more: a loaded machine is slow for a while.
const FAILURES: u32 = 8;

/// What became of a sample of one region's pages.
#[derive(Clone, Debug)]
pub struct Accesses {
    /// The region's index.
    pub region: u16,
    /// The pages that were watched.
    pub watched: RoaringBitmap,
    /// Those of them that were touched.
    pub accessed: RoaringBitmap,
    /// For how long they were watched, in seconds.
    pub seconds: f64,
}

/// What sampling has done so far.
#[derive(Clone, Debug, Default)]
pub struct SamplingStats {
    /// Samples begun.
    pub samples: u64,
    /// Pages unmapped.
    pub pages: u64,
    /// Pages that were written at the moment they were unmapped, and so are reported once more.
    pub owed: u64,
    /// How long a thread of the guest's process stood still for it.
    pub held: Duration,
    /// Why nothing is sampled any more.
    pub off: Option<String>,
}

/// Chooses, unmaps and looks again. The tracker's book keeps it.
#[derive(Debug, Default)]
pub(crate) struct Sampler {
    /// Per region, what is watched.
    watched: Vec<RoaringBitmap>,
    since: Option<Instant>,
    /// Per region, the last report that named anything: half of the sample is taken from it.
    recent: Vec<RoaringBitmap>,
    /// How long a thread may be held now, in seconds; negative after it was held for too long.
    allowance: Option<f64>,
    accrued: Option<Instant>,
    failures: u32,
    random: u64,
    stats: SamplingStats,
}

/// A run that is to be unmapped.
struct Run {
    /// Index of its region.
    region: usize,
    first: u32,
    last: u32,
    /// Whether it was chosen for what was written lately.
    hot: bool,
}

/// The guest as the sampler needs it.
pub(crate) struct Watched<'a> {
    pub(crate) pid: u32,
    pub(crate) uffd: &'a Uffd,
    pub(crate) pagemap: &'a Pagemap,
    pub(crate) regions: &'a [Region],
    /// Per region, the blocks with content.
    pub(crate) content: &'a [RoaringBitmap],
}

impl Sampler {
    pub(crate) fn stats(&self) -> &SamplingStats {
        &self.stats
    }

    /// The tracker has reported these.
    pub(crate) fn reported(&mut self, report: &[RoaringBitmap]) {
        self.recent.resize(report.len(), RoaringBitmap::new());
        for (recent, report) in self.recent.iter_mut().zip(report) {
            if !report.is_empty() {
                recent.clone_from(report);
            }
        }
    }

    /// Ends the sample that is under way and begins the next. Adds to `owed`, per region, what the tracker has to
    /// report for it. After an error the guest must not be taken for watched any more.
    pub(crate) fn sample(
        &mut self,
        guest: &Watched<'_>,
        owed: &mut [RoaringBitmap],
    ) -> Result<Vec<Accesses>> {
        if self.stats.off.is_some() {
            return Ok(Vec::new());
        }
        let now = Instant::now();
        let elapsed = self.since.map(|since| now.saturating_duration_since(since));
        let patience = self.patience(now);
        let runs = affordable(elapsed);
        if runs < FEW_RUNS || patience.is_none() {
            // Too soon: what is watched goes on being watched.
            return Ok(Vec::new());
        }
        let seen = self.look(guest, elapsed.unwrap_or_default())?;
        self.watched = vec![RoaringBitmap::new(); guest.regions.len()];
        self.since = Some(now);
        let chosen = self.choose(guest, runs);
        if chosen.is_empty() {
            return Ok(seen);
        }
        let unmapped = self.unmap(guest, &chosen, patience.unwrap_or_default());
        // Before anything else is said: what is left of the marks must be known. The run behind the last may be
        // unmapped in one of its mappings; after an error nobody knows what was unmapped.
        let done = unmapped.as_ref().map_or(chosen.len(), |done| *done);
        let touched = sets(guest, &chosen[..chosen.len().min(done + 1)]);
        if let Err(error) = self.rescue(guest, &touched, owed) {
            for (owed, touched) in owed.iter_mut().zip(&touched) {
                *owed |= touched;
            }
            return Err(error);
        }
        match unmapped {
            Ok(done) => {
                self.watch(guest, &chosen[..done]);
                self.stats.samples += 1;
                self.stats.pages += touched.iter().map(RoaringBitmap::len).sum::<u64>();
                self.judge(done >= FEW_RUNS.min(chosen.len()), || {
                    format!(
                        "{done} of {} calls in its process took {patience:?}",
                        chosen.len()
                    )
                });
            }
            Err(why) => self.judge(false, || why),
        }
        Ok(seen)
    }

    /// How long a thread may be held now, if that is worth it.
    fn patience(&mut self, now: Instant) -> Option<Duration> {
        let most = HELD_AT_ONCE.as_secs_f64();
        let since = self.accrued.replace(now).unwrap_or(now);
        let earned = HELD * now.saturating_duration_since(since).as_secs_f64();
        let allowance = (self.allowance.unwrap_or(most) + earned).min(most);
        self.allowance = Some(allowance);
        // After a poor one, only with all that may be.
        let least = if self.failures == 0 {
            WORTH.as_secs_f64()
        } else {
            0.9 * most
        };
        (allowance >= least).then(|| Duration::from_secs_f64(allowance))
    }

    fn judge(&mut self, fair: bool, why: impl FnOnce() -> String) {
        if fair {
            self.failures = 0;
            return;
        }
        self.failures += 1;
        let why = why();
        tracing::debug!(%why, failures = self.failures, "accesses were hardly sampled");
        if self.failures >= FAILURES {
            self.stats.off = Some(why);
        }
    }

    /// What became of the sample under way.
    fn look(&self, guest: &Watched<'_>, elapsed: Duration) -> Result<Vec<Accesses>> {
        let mut seen = Vec::new();
        for (region, watched) in guest.regions.iter().zip(&self.watched) {
            if watched.is_empty() {
                continue;
            }
            let mut accessed = RoaringBitmap::new();
            for_runs(region, watched, |mapping, first, count| {
                let start = address(mapping, first);
                let states = guest.pagemap.states(start, start + bytes(count))?;
                let touched = (first..)
                    .zip(states)
                    .filter(|(_, state)| state.is_present());
                accessed.extend(touched.map(|(block, _)| block));
                Ok(())
            })?;
            seen.push(Accesses {
                region: region.index(),
                watched: watched.clone(),
                accessed,
                seconds: elapsed.as_secs_f64(),
            });
        }
        Ok(seen)
    }

    /// Half of the runs where the guest has written lately, half anywhere that has content; in random order, as
    /// time may run out. No run twice.
    fn choose(&mut self, guest: &Watched<'_>, runs: usize) -> Vec<Run> {
        self.recent
            .resize(guest.regions.len(), RoaringBitmap::new());
        let recent = std::mem::take(&mut self.recent);
        let totals = [&recent[..], guest.content].map(|among| {
            let all: u64 = among.iter().map(RoaringBitmap::len).sum();
            all
        });
        let mut chosen: Vec<Run> = Vec::with_capacity(runs);
        let mut taken = HashSet::with_capacity(runs);
        for number in 0..runs {
            let hot = number % 2 == 0;
            let (among, total) = if hot {
                (&recent[..], totals[0])
            } else {
                (guest.content, totals[1])
            };
            let rank = self.random().checked_rem(total);
            let Some((region, block)) = rank.and_then(|rank| select(among, rank)) else {
                continue;
            };
            let first = block - block % RUN;
            if taken.insert((region, first)) {
                let last = (first | (RUN - 1)).min(guest.regions[region].memory.blocks() - 1);
                chosen.push(Run {
                    region,
                    first,
                    last,
                    hot,
                });
            }
        }
        self.recent = recent;
        chosen
    }

    /// These were unmapped. Of those that were chosen for what was written lately only that is watched:
    /// neighbours of what is hot are no fair sample of what is not.
    fn watch(&mut self, guest: &Watched<'_>, unmapped: &[Run]) {
        for run in unmapped {
            let among = if run.hot {
                &self.recent[run.region]
            } else {
                &guest.content[run.region]
            };
            let blocks: RoaringBitmap = (run.first..=run.last).collect();
            self.watched[run.region] |= blocks & among;
        }
    }

    /// Unmaps in the guest's process, as many runs as there is time for. After an error, any of them.
    fn unmap(
        &mut self,
        guest: &Watched<'_>,
        chosen: &[Run],
        patience: Duration,
    ) -> std::result::Result<usize, String> {
        let mut calls = Vec::with_capacity(chosen.len());
        // Number of calls after which a run is unmapped wherever it is mapped.
        let mut ends = Vec::with_capacity(chosen.len());
        for run in chosen {
            let region = &guest.regions[run.region];
            let set: RoaringBitmap = (run.first..=run.last).collect();
            let collected = for_runs(region, &set, |mapping, first, count| {
                calls.push(Syscall {
                    number: libc::SYS_madvise,
                    arguments: [
                        address(mapping, first),
                        bytes(count),
                        libc::MADV_DONTNEED as u64,
                    ],
                });
                Ok(())
            });
            collected.map_err(|error| error.to_string())?;
            ends.push(calls.len());
        }
        let done =
            inject::call_all(guest.pid, &calls, patience).map_err(|error| error.to_string())?;
        self.stats.held += done.held;
        self.allowance = self.allowance.map(|left| left - done.held.as_secs_f64());
        if let Some(error) = done.results.iter().find(|result| **result < 0) {
            let error = std::io::Error::from_raw_os_error(-*error as i32);
            // It will be so again.
            self.failures = FAILURES - 1;
            return Err(format!(
                "its memory cannot be unmapped for a moment ({error}): is it locked (mlock)?"
            ));
        }
        let made = done.results.len();
        let runs = ends.iter().filter(|end| **end <= made).count();
        Ok(runs)
    }

    /// Everything that has no mark after it was unmapped was written, or may have been: it is owed, and
    /// what is not mapped is protected, so that the next write to it is seen whatever the kernel makes of a
    /// page without an entry.
    fn rescue(
        &mut self,
        guest: &Watched<'_>,
        unmapped: &[RoaringBitmap],
        owed: &mut [RoaringBitmap],
    ) -> Result<()> {
        for ((region, unmapped), owed) in guest.regions.iter().zip(unmapped).zip(owed) {
            let before = owed.len();
            for_runs(region, unmapped, |mapping, first, count| {
                let start = address(mapping, first);
                let states = guest.pagemap.states(start, start + bytes(count))?;
                let unmarked = (first..)
                    .zip(states)
                    .filter(|(_, state)| !state.is_protected());
                let unmarked: Vec<(u32, bool)> = unmarked
                    .map(|(block, state)| (block, state.is_present()))
                    .collect();
                owed.extend(unmarked.iter().map(|(block, _)| *block));
                let gone: RoaringBitmap = unmarked
                    .iter()
                    .filter(|(_, present)| !present)
                    .map(|(block, _)| *block)
                    .collect();
                for (block, count) in Ranges::exact(&gone) {
                    guest
                        .uffd
                        .write_protect(address(mapping, block), count * PAGE_SIZE as u64)
                        .map_err(|error| {
                            crate::PagerError::os("protecting a page that was sampled", error)
                        })?;
                }
                Ok(())
            })?;
            self.stats.owed += owed.len() - before;
        }
        Ok(())
    }

    /// SplitMix64.
    fn random(&mut self) -> u64 {
        self.random = self.random.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = self.random;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ (mixed >> 31)
    }
}

/// Runs that a sample may have, by the faults that they cost.
fn affordable(elapsed: Option<Duration>) -> usize {
    let most = MAX_PAGES as f64;
    let pages = elapsed.map_or(most, |elapsed| PAGES_PER_SECOND * elapsed.as_secs_f64());
    (pages.min(most) / f64::from(RUN)) as usize
}

/// The blocks of these runs, by region.
fn sets(guest: &Watched<'_>, runs: &[Run]) -> Vec<RoaringBitmap> {
    let mut sets = vec![RoaringBitmap::new(); guest.regions.len()];
    for run in runs {
        sets[run.region].insert_range(run.first..=run.last);
    }
    sets
}

/// The block of this rank over all regions.
fn select(among: &[RoaringBitmap], mut rank: u64) -> Option<(usize, u32)> {
    for (region, set) in among.iter().enumerate() {
        if rank < set.len() {
            return set.select(rank as u32).map(|block| (region, block));
        }
        rank -= set.len();
    }
    None
}

/// Calls `each` with every run of the set in every mapping that shows it: mapping, first block, number.
fn for_runs(
    region: &Region,
    set: &RoaringBitmap,
    mut each: impl FnMut(&Mapping, u32, u32) -> Result<()>,
) -> Result<()> {
    for (first, count) in Ranges::exact(set) {
        let end = u64::from(first) + count;
        for mapping in &region.mappings {
            let from = u64::from(first.max(mapping.first));
            let to = end.min(u64::from(mapping.first) + u64::from(mapping.count));
            if from < to {
                each(mapping, from as u32, (to - from) as u32)?;
            }
        }
    }
    Ok(())
}

fn address(mapping: &Mapping, block: u32) -> u64 {
    mapping.address + u64::from(block - mapping.first) * PAGE_SIZE as u64
}

fn bytes(count: u32) -> u64 {
    u64::from(count) * PAGE_SIZE as u64
}
