//! A profile as a file: JSON, versioned. What is read may come from anywhere, so every number is held against
//! what it can be before anybody computes with it, and every text against what a terminal may be shown.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use hybridmig_transport::message::RegionKind;
use serde::{Deserialize, Serialize};

use super::map::MAX_RUNS;
use super::{PROFILE_VERSION, Profile, RegionProfile};
use crate::guest::DiskCounts;
use crate::regions::PAGE;

/// Longest file that is read.
pub const MAX_BYTES: u64 = 64 << 20;
const MAX_REGIONS: usize = 1024;
const MAX_POINTS: usize = 64;
const MAX_NOTES: usize = 64;
const MAX_TEXT: usize = 4096;
/// Per second, of one page.
const MAX_RATE: f64 = 1e6;
/// Some thirty thousand years.
const MAX_SECONDS: f64 = 1e12;
/// Slack for sums of rounded numbers.
const SLACK: f64 = 1e-6;

/// What the guest did with a disk, per second.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DiskRates {
    /// Index of the disk's region.
    pub region: u16,
    /// Reads.
    pub reads: f64,
    /// Writes.
    pub writes: f64,
    /// Bytes read, where that is counted.
    pub read_bytes: Option<f64>,
    /// Bytes written.
    pub written_bytes: Option<f64>,
}

impl DiskRates {
    /// From two looks at the counts.
    pub fn between(before: &[DiskCounts], after: &[DiskCounts], seconds: f64) -> Vec<Self> {
        let of = |after: &DiskCounts| {
            let before = before.iter().find(|b| b.region == after.region)?;
            let rate =
                |before: u64, after: u64| after.saturating_sub(before) as f64 / seconds.max(1e-3);
            let bytes = before.bytes.zip(after.bytes);
            Some(Self {
                region: after.region.0,
                reads: rate(before.reads, after.reads),
                writes: rate(before.writes, after.writes),
                read_bytes: bytes.map(|(before, after)| rate(before.0, after.0)),
                written_bytes: bytes.map(|(before, after)| rate(before.1, after.1)),
            })
        };
        after.iter().filter_map(of).collect()
    }
}

/// What a file holds: the profile, and beside it what only people look at.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Saved {
    /// The profile.
    #[serde(flatten)]
    pub profile: Profile,
    /// What the guest did with its disks, where it is counted.
    #[serde(default)]
    pub disk_rates: Vec<DiskRates>,
}

/// Why a profile cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ProfileError {
    /// It cannot be read.
    #[error("the profile {path} cannot be read")]
    Read {
        /// The file.
        path: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It is not JSON, or has no profile's fields.
    #[error("{what} is not a profile: {why}")]
    Format {
        /// The file.
        what: String,
        /// What the parser says.
        why: String,
    },
    /// Another hybridmig wrote it.
    #[error(
        "{what} is a profile of version {version}, and this is a hybridmig of version {PROFILE_VERSION}: \
         take a new one with `hybridmig profile`"
    )]
    Version {
        /// The file.
        what: String,
        /// Its version.
        version: u64,
    },
    /// A number that cannot be.
    #[error("{what} is not a usable profile: {why}")]
    Value {
        /// The file.
        what: String,
        /// Which.
        why: String,
    },
}

#[derive(Deserialize)]
struct Version {
    profile_version: u64,
}

/// Reads a profile from a file.
pub fn load(path: &Path) -> Result<Saved, ProfileError> {
    let name = path.display().to_string();
    let read = |source| ProfileError::Read {
        path: name.clone(),
        source,
    };
    let mut text = String::new();
    let file = File::open(path).map_err(read)?;
    file.take(MAX_BYTES + 1)
        .read_to_string(&mut text)
        .map_err(read)?;
    if text.len() as u64 > MAX_BYTES {
        return Err(ProfileError::Format {
            what: name,
            why: format!("it is longer than {} MiB", MAX_BYTES >> 20),
        });
    }
    parse(&text, &name)
}

/// Reads a profile; `what` is what errors call it.
pub fn parse(text: &str, what: &str) -> Result<Saved, ProfileError> {
    let format = |error: serde_json::Error| ProfileError::Format {
        what: what.to_owned(),
        why: error.to_string(),
    };
    let Version { profile_version } = serde_json::from_str(text).map_err(format)?;
    if profile_version != u64::from(PROFILE_VERSION) {
        return Err(ProfileError::Version {
            what: what.to_owned(),
            version: profile_version,
        });
    }
    let saved: Saved = serde_json::from_str(text).map_err(format)?;
    check(&saved).map_err(|why| ProfileError::Value {
        what: what.to_owned(),
        why,
    })?;
    Ok(saved)
}

/// The JSON of a profile. Fails where it would not be read again.
pub fn to_json(saved: &Saved) -> Result<String, ProfileError> {
    let what = "what was watched";
    check(saved).map_err(|why| ProfileError::Value {
        what: what.to_owned(),
        why,
    })?;
    let mut text = serde_json::to_string(saved).map_err(|error| ProfileError::Format {
        what: what.to_owned(),
        why: error.to_string(),
    })?;
    text.push('\n');
    Ok(text)
}

/// What is wrong with it, if anything.
fn check(saved: &Saved) -> Result<(), String> {
    let profile = &saved.profile;
    words("guest", &profile.guest)?;
    words("guest_kind", &profile.guest_kind)?;
    within("taken_unix", profile.taken_unix, MAX_SECONDS)?;
    within("seconds", profile.seconds, MAX_SECONDS)?;
    if !(1..=4096).contains(&profile.parallelism) {
        return Err(format!("parallelism is {}", profile.parallelism));
    }
    optional("work_per_second", profile.work_per_second, 1e15)?;
    optional("watching_cost", profile.watching_cost, 1.0)?;
    few("regions", profile.regions.len(), MAX_REGIONS)?;
    few("notes", profile.notes.len(), MAX_NOTES)?;
    for note in &profile.notes {
        words("a note", note)?;
    }
    for (index, region) in profile.regions.iter().enumerate() {
        check_region(region).map_err(|why| format!("region {index}: {why}"))?;
    }
    few("disk_rates", saved.disk_rates.len(), profile.regions.len())?;
    for disk in &saved.disk_rates {
        let region = profile.regions.get(usize::from(disk.region));
        if region.is_none_or(|region| region.kind != RegionKind::Disk) {
            return Err(format!("disk_rates: region {} is no disk", disk.region));
        }
        within("disk_rates: reads", disk.reads, 1e12)?;
        within("disk_rates: writes", disk.writes, 1e12)?;
        optional("disk_rates: read_bytes", disk.read_bytes, 1e15)?;
        optional("disk_rates: written_bytes", disk.written_bytes, 1e15)?;
    }
    Ok(())
}

fn check_region(region: &RegionProfile) -> Result<(), String> {
    words("name", &region.name)?;
    let size = region.block_size;
    if !size.is_power_of_two() || !(PAGE..=1 << 20).contains(&size) || region.blocks == 0 {
        return Err(format!("{} blocks of {size} bytes", region.blocks));
    }
    let pages = u64::from(region.blocks) * u64::from(size / PAGE);
    if region.content_pages > pages {
        return Err(format!(
            "content_pages is {} of {pages}",
            region.content_pages
        ));
    }
    let contents = &region.contents;
    within("contents.zero", contents.zero, 1.0)?;
    within("contents.duplicate", contents.duplicate, 1.0)?;
    within(
        "contents, both shares",
        contents.zero + contents.duplicate,
        1.0 + SLACK,
    )?;
    within(
        "contents.bytes_per_page",
        contents.bytes_per_page,
        4.0 * f64::from(PAGE),
    )?;
    if contents.sampled > u64::from(region.blocks) {
        return Err(format!("contents.sampled is {}", contents.sampled));
    }
    few("classes", region.classes.len(), 256)?;
    let mut seen = [false; 256];
    for class in &region.classes {
        if std::mem::replace(&mut seen[usize::from(class.level)], true) {
            return Err(format!("level {} has two classes", class.level));
        }
        within("a class's pages", class.pages, pages as f64)?;
        within("a class's writes", class.writes, MAX_RATE)?;
        within("a class's accesses", class.accesses, MAX_RATE)?;
    }
    let in_classes: f64 = region.classes.iter().map(|class| class.pages).sum();
    within(
        "all classes' pages",
        in_classes,
        region.content_pages as f64 + 0.5,
    )?;
    few("distinct", region.distinct.len(), MAX_POINTS)?;
    let mut before = 0.0;
    for point in &region.distinct {
        within("an interval of distinct", point.seconds, MAX_SECONDS)?;
        if point.seconds <= before {
            return Err("the intervals of distinct do not ascend".into());
        }
        before = point.seconds;
        within("distinct.written", point.written, pages as f64)?;
        optional("distinct.accessed", point.accessed, pages as f64)?;
    }
    within("spread.near", region.spread.near, 4096.0)?;
    within("spread.walk", region.spread.walk, 1.0)?;
    few("heat", region.heat.len(), MAX_RUNS)?;
    let mut end = 0;
    for (first, count, _) in &region.heat {
        let next = first
            .checked_add(*count)
            .filter(|next| *next <= region.blocks);
        match next {
            Some(next) if *count > 0 && *first >= end => end = next,
            _ => return Err(format!("heat: blocks {first}+{count} of {}", region.blocks)),
        }
    }
    Ok(())
}

/// A number that is one, from 0 to `most`.
fn within(name: &str, value: f64, most: f64) -> Result<(), String> {
    if (0.0..=most).contains(&value) {
        Ok(())
    } else {
        Err(format!("{name} is {value}, not 0 to {most}"))
    }
}

fn optional(name: &str, value: Option<f64>, most: f64) -> Result<(), String> {
    value.map_or(Ok(()), |value| within(name, value, most))
}

fn few(name: &str, count: usize, most: usize) -> Result<(), String> {
    if count <= most {
        Ok(())
    } else {
        Err(format!(
            "{name} has {count} entries, {most} at most are read"
        ))
    }
}

/// A text that may be shown.
fn words(name: &str, text: &str) -> Result<(), String> {
    if text.len() > MAX_TEXT {
        return Err(format!("{name} is {} bytes long", text.len()));
    }
    if text.chars().any(char::is_control) {
        return Err(format!("{name} has control characters: {text:?}"));
    }
    Ok(())
}

#[cfg(test)]
mod tests;
