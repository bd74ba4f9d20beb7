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
//! if there is one, is borrowed for the calls. With KVM unmapping also takes the page out of the
//! hypervisor's tables (mmu notifier), so that the guest's next touch costs an exit too.

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
/// Share of the time that the borrowed thread may stand still.
const HELD: f64 = 0.005;
/// Time that the borrowed thread may stand still for once.
const HELD_AT_ONCE: Duration = Duration::from_millis(20);
/// Runs that are not worth a stop.
const FEW_RUNS: usize = 4;
/// A call that takes longer than this, stop and all, costs more than the sample is worth.
const SLOW_CALL: Duration = Duration::from_millis(5);
/// Failures in a row after which nothing is tried any more. A thread may be late once.
const FAILURES: u32 = 3;

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
    /// Time of one call, smoothed.
    call: Option<Duration>,
    failures: u32,
    random: u64,
    stats: SamplingStats,
}

/// A sample that is about to be unmapped.
struct Choice {
    watched: Vec<RoaringBitmap>,
    unmapped: Vec<RoaringBitmap>,
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
        let runs = self.affordable(elapsed);
        if runs < FEW_RUNS {
            // Too soon: what is watched goes on being watched.
            return Ok(Vec::new());
        }
        let seen = self.look(guest, elapsed.unwrap_or_default())?;
        let choice = self.choose(guest, runs);
        self.since = Some(now);
        self.watched = vec![RoaringBitmap::new(); guest.regions.len()];
        if choice.unmapped.iter().all(RoaringBitmap::is_empty) {
            return Ok(seen);
        }
        let unmapped = self.unmap(guest, &choice);
        // Before anything else is said: what is left of the marks must be known.
        if let Err(error) = self.rescue(guest, &choice.unmapped, owed) {
            for (owed, unmapped) in owed.iter_mut().zip(&choice.unmapped) {
                *owed |= unmapped;
            }
            return Err(error);
        }
        match unmapped {
            Ok(()) => {
                self.failures = 0;
                self.watched = choice.watched;
                self.stats.samples += 1;
            }
            Err(why) => {
                self.failures += 1;
                tracing::debug!(%why, failures = self.failures, "accesses were not sampled");
                if self.failures >= FAILURES {
                    self.stats.off = Some(why);
                }
            }
        }
        Ok(seen)
    }

    /// Runs that a sample may have now.
    fn affordable(&self, elapsed: Option<Duration>) -> usize {
        let most = (MAX_PAGES / u64::from(RUN)) as f64;
        let Some(elapsed) = elapsed else {
            return most as usize;
        };
        let seconds = elapsed.as_secs_f64();
        let by_faults = PAGES_PER_SECOND * seconds / f64::from(RUN);
        let held = (HELD * seconds).min(HELD_AT_ONCE.as_secs_f64());
        let by_stop = self
            .call
            .map_or(most, |call| held / call.as_secs_f64().max(1e-7));
        by_faults.min(by_stop).min(most) as usize
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

    /// Half of the runs where the guest has written lately, half anywhere that has content. Of the first only what was
    /// written is watched: neighbours of what is hot are no fair sample of what is not.
    fn choose(&mut self, guest: &Watched<'_>, runs: usize) -> Choice {
        let mut choice = Choice {
            watched: vec![RoaringBitmap::new(); guest.regions.len()],
            unmapped: vec![RoaringBitmap::new(); guest.regions.len()],
        };
        self.recent
            .resize(guest.regions.len(), RoaringBitmap::new());
        let recent = std::mem::take(&mut self.recent);
        for (among, times) in [(&recent[..], runs / 2), (guest.content, runs - runs / 2)] {
            let total: u64 = among.iter().map(RoaringBitmap::len).sum();
            for _ in 0..times {
                let Some(rank) = self.random().checked_rem(total) else {
                    break;
                };
                let Some((region, block)) = select(among, rank) else {
                    break;
                };
                let first = block - block % RUN;
                let last = (first | (RUN - 1)).min(guest.regions[region].memory.blocks() - 1);
                let run: RoaringBitmap = (first..=last).collect();
                choice.watched[region] |= &run & &among[region];
                // All of it: one call.
                choice.unmapped[region] |= run;
            }
        }
        self.recent = recent;
        choice
    }

    /// Unmaps in the guest's process.
    fn unmap(&mut self, guest: &Watched<'_>, choice: &Choice) -> std::result::Result<(), String> {
        let mut calls = Vec::new();
        for (region, unmapped) in guest.regions.iter().zip(&choice.unmapped) {
            // Cannot fail: it only collects.
            let _ = for_runs(region, unmapped, |mapping, first, count| {
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
        }
        let done =
            inject::call_all(guest.pid, &calls, HELD_AT_ONCE).map_err(|error| error.to_string())?;
        self.stats.held += done.held;
        self.stats.pages += choice.unmapped.iter().map(RoaringBitmap::len).sum::<u64>();
        if let Some(error) = done.results.iter().find(|result| **result < 0) {
            let error = std::io::Error::from_raw_os_error(-*error as i32);
            return Err(format!(
                "its memory cannot be unmapped for a moment ({error}): is it locked (mlock)?"
            ));
        }
        let one = done.held / done.results.len().max(1) as u32;
        let mean = self.call.map_or(one, |before| (before * 3 + one) / 4);
        self.call = Some(mean);
        if mean > SLOW_CALL {
            return Err(format!("one call in the process takes {mean:?}"));
        }
        if done.results.len() < calls.len() {
            return Err(format!(
                "{} of {} calls were made within {HELD_AT_ONCE:?}",
                done.results.len(),
                calls.len()
            ));
        }
        Ok(())
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
