//! The planner judged: the embedded guest in every profile over several links, under the planner and under everything
//! that could have been chosen instead. Runs `hybridmig demo`, as a user would: real processes, a relay that emulates
//! the link. This file is what is run; [`run`] runs it, [`report`] makes tables and plots.

mod plot;
mod report;
mod run;
mod tables;

use std::fmt;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

pub use report::{median, write};
pub use run::series;

/// The grid that this program brings along.
const EMBEDDED: &str = include_str!("../../scenarios/plan.toml");

/// What is run.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Grid {
    /// Its name, which its results carry.
    pub name: String,
    /// How often everything is run.
    pub repetitions: u32,
    /// Seed of the first repetition; each further run of a variant has the next.
    pub seed: u64,
    /// A run that has not ended after so many seconds is ended.
    pub give_up_s: f64,
    /// The guest's profiles.
    pub profiles: Vec<String>,
    /// Fixed shares: of memory and of the disk.
    pub shares: Vec<(f64, f64)>,
    /// How often the planner runs in each repetition.
    pub planned_times: u32,
    /// Links, with the sizes of guests that take some seconds on them.
    pub links: Vec<GridLink>,
    /// See [`Self::keep`].
    #[serde(skip)]
    only: String,
}

/// A link and the guest's sizes on it.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GridLink {
    /// In the words of `hybridmig-netem`.
    pub link: String,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// Disk in MiB.
    pub disk_mib: u64,
}

impl Grid {
    /// The embedded grid (`default`), or that of a file.
    pub fn find(name: &str) -> Result<Self> {
        let text = match name {
            "default" => EMBEDDED.to_owned(),
            file => std::fs::read_to_string(file)
                .with_context(|| format!("'{file}' is no file, and not 'default'"))?,
        };
        let grid: Self = toml::from_str(&text).with_context(|| format!("{name} is not a grid"))?;
        for link in &grid.links {
            let spec = link.link.parse::<hybridmig_netem::LinkSpec>();
            spec.map_err(|error| anyhow::anyhow!("link '{}': {error}", link.link))?;
        }
        ensure!(
            grid.repetitions > 0 && grid.planned_times > 0 && !grid.profiles.is_empty(),
            "{name}: no repetitions or no profiles"
        );
        let sound = |share: &f64| (0.0..=1.0).contains(share);
        ensure!(
            grid.shares
                .iter()
                .all(|(memory, disk)| sound(memory) && sound(disk)),
            "{name}: a share is from 0 to 1"
        );
        Ok(grid)
    }

    /// Leaves only cells whose text contains this.
    pub fn keep(&mut self, cell: &str) {
        cell.clone_into(&mut self.only);
    }

    /// Every profile on every link.
    pub fn cells(&self) -> impl Iterator<Item = Cell> + '_ {
        let all = self.links.iter().flat_map(|link| {
            self.profiles.iter().map(|profile| Cell {
                link: link.link.clone(),
                profile: profile.clone(),
                memory_mib: link.memory_mib,
                disk_mib: link.disk_mib,
            })
        });
        all.filter(|cell| cell.to_string().contains(&self.only))
    }

    /// Every way to move a guest.
    pub fn variants(&self) -> Vec<Variant> {
        let shares = self.shares.iter().map(|(m, d)| Variant::Shares(*m, *d));
        [
            Variant::Planned,
            Variant::Observe,
            Variant::Precopy,
            Variant::Postcopy,
        ]
        .into_iter()
        .chain(shares)
        .collect()
    }
}

/// A guest on a link.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Cell {
    /// The link's name or words.
    pub link: String,
    /// The guest's profile.
    pub profile: String,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// Disk in MiB.
    pub disk_mib: u64,
}

impl fmt::Display for Cell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} | {}", self.link, self.profile)
    }
}

/// How a guest is moved.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Variant {
    /// Hybrid, as the planner says: the default.
    Planned,
    /// Hybrid by the simple rule, predicted all the same.
    Observe,
    /// Everything before the guest resumes.
    Precopy,
    /// Nothing.
    Postcopy,
    /// These shares of memory and of the disk.
    Shares(f64, f64),
}

impl Variant {
    /// What `hybridmig` is told.
    pub fn arguments(self) -> Vec<String> {
        let words = match self {
            Self::Planned => String::new(),
            Self::Observe => "--observe".to_owned(),
            Self::Precopy => "--mode precopy".to_owned(),
            Self::Postcopy => "--mode postcopy".to_owned(),
            Self::Shares(memory, disk) => format!("--mem-frac {memory} --disk-frac {disk}"),
        };
        words.split_whitespace().map(str::to_owned).collect()
    }
}

impl fmt::Display for Variant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Planned => f.write_str("planned"),
            Self::Observe => f.write_str("observe"),
            Self::Precopy => f.write_str("precopy"),
            Self::Postcopy => f.write_str("postcopy"),
            Self::Shares(memory, disk) => write!(f, "{memory} × {disk}"),
        }
    }
}

/// A quantity that was predicted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Foretold {
    /// Median, and the ends of the 80 % interval.
    pub p50: f64,
    /// See `p50`.
    pub p10: f64,
    /// See `p50`.
    pub p90: f64,
}

/// Figures of one run, predicted or seen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Figures<T> {
    /// Seconds from the session's beginning to its end.
    pub total: T,
    /// Seconds.
    pub downtime: T,
    /// Lost work from the freeze on, seconds.
    pub lost_work: T,
    /// Demand faults over the network.
    pub faults: T,
}

/// One run, a line of JSON.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Run {
    /// The grid's name.
    pub grid: String,
    /// Guest and link.
    pub cell: Cell,
    /// How it was moved.
    pub variant: Variant,
    /// Seed of guest and link.
    pub seed: u64,
    /// `moved`, or what else became of it.
    pub outcome: String,
    /// What came, where it was moved.
    pub seen: Option<Figures<f64>>,
    /// Seconds until the guest ran at the destination.
    pub remote_up: Option<f64>,
    /// Seconds from the freeze until its speed was back.
    pub t95: Option<f64>,
    /// UDP payload that the source sent.
    pub bytes: Option<u64>,
    /// Pages that the guest was estimated to use within 10 s.
    pub working_set: Option<f64>,
    /// Predicted when the first scans had shown what the guest writes.
    pub at_start: Option<Figures<Foretold>>,
    /// Predicted from what was known at the freeze.
    pub at_freeze: Option<Figures<Foretold>>,
    /// Rounds of pre-copy.
    pub rounds: usize,
    /// Shares of memory and of the disk that were there when the guest resumed.
    pub fractions: Option<(f64, f64)>,
    /// Load of the machine over the last minute when it began.
    pub load: f64,
}

/// Reads lines of runs.
pub fn read(path: &Path) -> Result<Vec<Run>> {
    let text =
        std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    let lines = text
        .lines()
        .enumerate()
        .filter(|(_, line)| !line.trim().is_empty());
    lines
        .map(|(number, line)| {
            serde_json::from_str(line)
                .with_context(|| format!("{}, line {}", path.display(), number + 1))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_grid_has_every_cell_and_at_least_thirty_runs_of_fixed_shares() {
        let grid = Grid::find("default").unwrap();
        assert_eq!(grid.cells().count(), 15);
        assert!(grid.cells().count() * grid.shares.len() >= 30);
        let names: Vec<String> = grid.variants().iter().map(ToString::to_string).collect();
        assert_eq!(names[..4], ["planned", "observe", "precopy", "postcopy"]);
        let last = grid.variants().pop().unwrap();
        assert_eq!(last.arguments(), ["--mem-frac", "1", "--disk-frac", "0"]);
    }

    #[test]
    fn what_does_not_exist_is_refused() {
        assert!(Grid::find("nowhere").is_err());
        let place = tempfile::tempdir().unwrap();
        let file = place.path().join("grid.toml");
        std::fs::write(&file, EMBEDDED.replace("continental", "continents")).unwrap();
        let error = format!("{:#}", Grid::find(file.to_str().unwrap()).unwrap_err());
        assert!(error.contains("continents"), "{error}");
    }
}
