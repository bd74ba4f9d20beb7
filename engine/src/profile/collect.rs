//! Watches a running guest for a while without migrating it, and tells how it uses its memory and its disks.
//! The guest is left as it was: tracking ends on every way out, errors and the operator's impatience included.

use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use hybridmig_transport::message::{RegionInfo, RegionKind};

use super::file::{DiskRates, Saved};
use super::spread::{Seen, Spread, spread};
use super::windows::Windows;
use super::{PROFILE_VERSION, Profile, RegionProfile, contents, map};
use crate::blocks::{BlockSet, Blocks};
use crate::guest::{DiskCounts, GuestError, GuestResult, SourceGuest};
use crate::plan::heat::Heat;
use crate::regions::Regions;

/// Shortest time between two scans.
const INTERVAL: Duration = Duration::from_millis(500);
/// Longest time between two scans, however much they cost.
const RAREST: Duration = Duration::from_secs(10);
/// A scan and the faults that it brings may take this share of the time.
const COST: f64 = 0.01;
/// What the first write of a page after a scan costs the guest.
const WRITE_FAULT: f64 = 1.5e-6;
/// Levels are a history of eight steps: of these lengths in seconds, as the time allows.
const STEP: (f64, f64) = (0.5, 2.0);
/// Share of the time that the guest's own speed is measured before it is watched, and again after; and how
/// long that takes at most.
const BASELINE: (f64, Duration) = (0.15, Duration::from_secs(5));
/// Time between two looks at whether to stop.
const PATIENCE: Duration = Duration::from_millis(50);

/// How long a guest is watched if nobody says otherwise.
pub const USUAL: Duration = Duration::from_secs(20);
/// The shortest and the longest that a guest is watched.
pub const LIMITS: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(3600));

/// Watches the guest for so long. `stop` is asked often: once it says so what was seen so far is the result.
pub fn collect(
    guest: &dyn SourceGuest,
    time: Duration,
    stop: &dyn Fn() -> bool,
) -> GuestResult<Saved> {
    let time = time.clamp(LIMITS.0, LIMITS.1);
    let before = speed(guest, time, stop);
    let watched = guest
        .start_tracking()
        .and_then(|content| Watch::new(guest, content, time)?.run(time, stop));
    let thawed = guest.thaw();
    let watched = watched?;
    thawed?;
    let after = speed(guest, time, stop);
    Ok(watched.profile(guest, before, after))
}

/// What the guest does per second, where it counts.
fn speed(guest: &dyn SourceGuest, time: Duration, stop: &dyn Fn() -> bool) -> Option<f64> {
    let begun = Instant::now();
    let first = guest.work_done()?;
    wait(time.mul_f64(BASELINE.0).min(BASELINE.1), stop);
    let work = guest.work_done()?.saturating_sub(first);
    Some(work as f64 / begun.elapsed().as_secs_f64().max(1e-3))
}

fn wait(time: Duration, stop: &dyn Fn() -> bool) {
    let until = Instant::now() + time;
    loop {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() || stop() {
            return;
        }
        thread::sleep(left.min(PATIENCE));
    }
}

/// What has been seen so far.
struct Watch<'a> {
    guest: &'a dyn SourceGuest,
    regions: Vec<RegionInfo>,
    shapes: Regions,
    content: Blocks,
    heat: Heat,
    /// Written since the levels were moved on, and for how long.
    step: (Blocks, f64),
    step_length: f64,
    /// Per region.
    windows: Vec<Windows>,
    spreads: Vec<Vec<Seen>>,
    /// What the last scan has found.
    last: Blocks,
    begun: Instant,
    scans: u32,
    /// Seconds that scans took.
    scanning: f64,
    disks: Vec<DiskCounts>,
    work: Option<u64>,
}

/// What was seen in all.
struct Watched<'a> {
    watch: Watch<'a>,
    seconds: f64,
    contents: Vec<super::Contents>,
    disks: Vec<DiskRates>,
    speed: Option<f64>,
    sampling_off: Option<String>,
}

impl<'a> Watch<'a> {
    fn new(guest: &'a dyn SourceGuest, content: Blocks, time: Duration) -> GuestResult<Self> {
        let regions = guest.regions().to_vec();
        Ok(Self {
            shapes: Regions::new(regions.clone()),
            heat: Heat::new(&regions),
            windows: vec![Windows::new(); regions.len()],
            spreads: vec![Vec::new(); regions.len()],
            last: Blocks::new(),
            step: (Blocks::new(), 0.0),
            step_length: (time.as_secs_f64() / 8.0).clamp(STEP.0, STEP.1),
            begun: Instant::now(),
            scans: 0,
            scanning: 0.0,
            disks: guest.disk_counts()?,
            work: guest.work_done(),
            regions,
            content,
            guest,
        })
    }

    fn run(mut self, time: Duration, stop: &dyn Fn() -> bool) -> GuestResult<Watched<'a>> {
        self.look(0.0);
        let mut last = self.begun;
        let mut interval = INTERVAL;
        while self.begun.elapsed() < time && !stop() {
            let left = time.saturating_sub(self.begun.elapsed());
            // A last interval much shorter than the others would tell little.
            let wanted = if left < interval * 3 / 2 {
                left
            } else {
                interval
            };
            wait(wanted, stop);
            let began = Instant::now();
            let dirty = self.guest.take_dirty()?;
            let took = began.elapsed().as_secs_f64();
            let seconds = began.saturating_duration_since(last).as_secs_f64();
            last = began;
            let faults = WRITE_FAULT * self.shapes.pages_of_kind(&dirty, RegionKind::Memory) as f64;
            let parallelism = f64::from(self.guest.guest_use().parallelism.max(1));
            let cost = took + faults / parallelism;
            interval = Duration::from_secs_f64((cost / COST).min(RAREST.as_secs_f64()));
            interval = interval.max(INTERVAL);
            self.scanning += took;
            self.scanned(&dirty, seconds);
            self.look(self.begun.elapsed().as_secs_f64());
        }
        if self.scans == 0 {
            return Err(GuestError::new(
                "stopped before the guest was looked at even once: nothing is known of it",
            ));
        }
        self.finish()
    }

    /// A scan.
    fn scanned(&mut self, dirty: &Blocks, seconds: f64) {
        self.scans += 1;
        for (index, info) in self.regions.iter().enumerate() {
            let none = BlockSet::new();
            let written = dirty.get(info.id).unwrap_or(&none);
            self.windows[index].scanned(written, seconds);
            self.spreads[index].extend(spread(written, self.last.get(info.id), info.blocks));
        }
        self.last.clone_from(dirty);
        self.content.union_with(dirty);
        self.step.0.union_with(dirty);
        self.step.1 += seconds;
        if self.step.1 >= 0.9 * self.step_length {
            self.step_over();
        }
    }

    fn step_over(&mut self) {
        let (written, seconds) = std::mem::take(&mut self.step);
        if seconds > 0.0 {
            self.heat.scanned(&written, &self.content, seconds);
        }
    }

    /// What the guest tells of its accesses, `now` in seconds.
    fn look(&mut self, now: f64) {
        for sample in self.guest.access_samples() {
            self.heat.sampled(&sample);
        }
        let accessed = self.guest.accessed();
        if !accessed.is_empty() {
            self.heat.accessed(&accessed, &self.content, now);
        }
    }

    /// The last things that need the guest to be watched, the guest's speed first: they take our time.
    fn finish(mut self) -> GuestResult<Watched<'a>> {
        self.step_over();
        let seconds = self.begun.elapsed().as_secs_f64();
        let speed = self.work.zip(self.guest.work_done());
        let speed = speed.map(|(before, now)| now.saturating_sub(before) as f64 / seconds);
        let counts = self.guest.disk_counts()?;
        let disks = DiskRates::between(&self.disks, &counts, seconds);
        let mut contents = Vec::new();
        for info in &self.regions {
            let none = BlockSet::new();
            let content = self.content.get(info.id).unwrap_or(&none);
            let disk = info.kind == RegionKind::Disk;
            contents.push(contents::look(self.guest, info, content, disk)?);
        }
        Ok(Watched {
            sampling_off: self.guest.access_samples_off(),
            seconds,
            contents,
            disks,
            speed,
            watch: self,
        })
    }
}

impl Watched<'_> {
    fn profile(self, guest: &dyn SourceGuest, before: Option<f64>, after: Option<f64>) -> Saved {
        let described = guest.describe();
        let alone = before
            .zip(after)
            .map(|(before, after)| f64::midpoint(before, after))
            .filter(|speed| *speed > 0.0);
        let reads_seen = self.watch.heat.rates(RegionKind::Memory).reads_seen();
        let cost = alone
            .zip(self.speed)
            .map(|(alone, watched)| 1.0 - watched / alone);
        let regions = (0..self.watch.regions.len()).map(|index| self.region(index, reads_seen));
        let profile = Profile {
            profile_version: PROFILE_VERSION,
            guest: described.name.clone(),
            guest_kind: described.kind.clone(),
            taken_unix: SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .unwrap_or_default()
                .as_secs_f64(),
            seconds: self.seconds,
            parallelism: guest.guest_use().parallelism,
            work_per_second: alone,
            // A guest is not faster for being watched: then it is the noise that was measured.
            watching_cost: cost.map(|cost| cost.clamp(0.0, 1.0)),
            reads_seen,
            regions: regions.collect(),
            notes: self.notes(reads_seen),
        };
        Saved {
            profile,
            disk_rates: self.disks,
        }
    }

    fn region(&self, index: usize, reads_seen: bool) -> RegionProfile {
        let watch = &self.watch;
        let info = &watch.regions[index];
        let content = watch.content.get(info.id).cloned().unwrap_or_default();
        let pages_per_block = watch.shapes.pages_per_block(info.id);
        let own: Blocks = std::iter::once((info.id, content.clone())).collect();
        let classes = watch.heat.classes(info.kind, &watch.heat.tally(&own));
        let mut distinct = watch.windows[index].curve(pages_per_block);
        if reads_seen || info.kind == RegionKind::Disk {
            for point in &mut distinct {
                let touched = |class: &super::HotnessClass| {
                    class.pages * -(-class.accesses * point.seconds).exp_m1()
                };
                let accessed: f64 = classes.iter().map(touched).sum();
                point.accessed = Some(accessed.max(point.written));
            }
        }
        let levels = content
            .iter()
            .map(|block| (block, watch.heat.of(info.id, block)));
        RegionProfile {
            name: info.name.clone(),
            kind: info.kind,
            block_size: info.block_size,
            blocks: info.blocks,
            content_pages: content.len() * pages_per_block,
            contents: self.contents[index],
            heat: map::runs(levels, info.blocks),
            classes,
            distinct,
            spread: Spread::mean(&watch.spreads[index]),
        }
    }

    fn notes(&self, reads_seen: bool) -> Vec<String> {
        let watch = &self.watch;
        let mut notes = vec![format!(
            "{} scans took {:.2} % of the time",
            watch.scans,
            100.0 * watch.scanning / self.seconds.max(1e-3)
        )];
        match &self.sampling_off {
            Some(why) => notes.push(format!("what it reads is not sampled: {why}")),
            None if !reads_seen => {
                notes.push("watched for too short a time to see what it reads".into());
            }
            None => {}
        }
        notes
    }
}
