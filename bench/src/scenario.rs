//! What is to be run: links × guests × engines × repetitions, read from a TOML file. Only description: the
//! files of `scenarios/` show every key.

use std::fmt;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use hybridmig_netem::LinkSpec;
use hybridmig_tests::console::Who;
use hybridmig_tests::guest::layout::Layout;
use serde::{Deserialize, Serialize};

use crate::engine;
use crate::link::LinkFacts;

/// Scenarios that this program brings along, by name.
pub const EMBEDDED: &[(&str, &str)] = &[
    ("smoke", include_str!("../scenarios/smoke.toml")),
    ("bench", include_str!("../scenarios/bench.toml")),
    ("writers", include_str!("../scenarios/writers.toml")),
    ("full", include_str!("../scenarios/full.toml")),
    ("storage", include_str!("../scenarios/storage.toml")),
    ("programs", include_str!("../scenarios/programs.toml")),
    (
        "programs-disk",
        include_str!("../scenarios/programs-disk.toml"),
    ),
    (
        "programs-shares",
        include_str!("../scenarios/programs-shares.toml"),
    ),
];

/// A scenario.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Scenario {
    /// Its name, which its results carry.
    pub name: String,
    /// How often every cell is run with every engine.
    pub repetitions: u32,
    /// Seed of the first repetition's link and guest; each further one has the next.
    pub seed: u64,
    /// How often a run is repeated that the emulator declares invalid.
    #[serde(default = "two")]
    pub invalid_retries: u32,
    /// Names of engines (`bench list`).
    pub engines: Vec<String>,
    /// Links in the words of `hybridmig-netem`.
    #[serde(default)]
    pub links: Vec<String>,
    /// More links, as a grid.
    pub grid: Option<Grid>,
    /// Guests.
    pub guests: Vec<Guest>,
    /// Times in seconds.
    pub times: Times,
}

fn two() -> u32 {
    2
}

/// Links of every combination.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Grid {
    /// Round-trip times in ms; half of each is the delay of one direction.
    pub rtt_ms: Vec<f64>,
    /// Losses in per cent, in each direction.
    pub loss_percent: Vec<f64>,
    /// Rates in Mbit/s.
    pub rate_mbit: Vec<u64>,
    /// Depth of the bottleneck's queue in ms.
    pub queue_ms: u64,
}

impl Grid {
    fn links(&self) -> Vec<String> {
        let mut links = Vec::new();
        for rate in &self.rate_mbit {
            for rtt in &self.rtt_ms {
                for loss in &self.loss_percent {
                    let (delay, queue) = (rtt / 2.0, self.queue_ms);
                    links.push(format!(
                        "delay {delay}ms rate {rate}mbit loss {loss}% limit {queue}ms"
                    ));
                }
            }
        }
        links
    }
}

/// A guest, and what it does.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Guest {
    /// What tables call it.
    pub name: String,
    /// RAM in MiB.
    pub memory_mib: u64,
    /// MiB of it that the memory checker fills and checks.
    pub checked_mib: u64,
    /// Per cent of each checked page that does not compress.
    pub random_percent: u32,
    /// How fast pages are dirtied.
    pub dirty: Dirty,
    /// Per cent of the checked pages that get nine of ten writes; 100 is uniform.
    #[serde(default = "uniform")]
    pub hot_percent: u32,
    /// How fast pages are read and verified in turn, in MB/s: what an idle guest's speed is taken from.
    pub sweep_mb_s: f64,
    /// Time between two ticks in ms: what a gap is measured with.
    pub tick_ms: u64,
    /// A disk that moves with it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk: Option<Disk>,
    /// A real program that works in it: its speed is the guest's, and the memory checker only checks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub work: Option<Work>,
}

impl Guest {
    /// Whether a disk moves with it.
    pub fn has_disk(&self) -> bool {
        let of_work = self.work.as_ref().and_then(|work| work.disk_mib);
        self.disk.is_some() || of_work.is_some()
    }

    /// Whose ticks its speed is taken from.
    pub fn who(&self) -> Who {
        match self.work {
            Some(_) => Who::Work,
            None => Who::Checker,
        }
    }
}

/// A real program, and what it does.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Work {
    /// Which.
    pub program: Program,
    /// MiB of values of 1 KiB that it keeps; a compiler keeps none.
    #[serde(default)]
    pub mib: u64,
    /// Per cent of its operations that write one; 80 % of all use a tenth of the values.
    #[serde(default)]
    pub writes_percent: u32,
    /// MiB of a disk with a file system for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk_mib: Option<u64>,
}

/// Programs that can be had from Debian (`scripts/guest-programs.sh`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Program {
    /// A redis server and one client.
    Redis,
    /// An sqlite database on the disk: every write is a transaction that reaches it.
    Sqlite,
    /// A C compiler (tcc): one process for each of 200 small files, again and again.
    Compile,
}

impl Program {
    /// What it is called.
    pub fn name(self) -> &'static str {
        match self {
            Self::Redis => "redis",
            Self::Sqlite => "sqlite",
            Self::Compile => "compile",
        }
    }
}

impl Work {
    /// Words for the guest's kernel command line.
    pub fn kernel_arguments(&self, tick_ms: u64, seed: u64) -> String {
        format!(
            "realwork.program={} realwork.mb={} realwork.writes={} realwork.tick={tick_ms} realwork.seed={seed}",
            self.program.name(),
            self.mib,
            self.writes_percent
        )
    }
}

/// A guest's disk, full of contents that do not compress well, of which the guest uses a part.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Disk {
    /// Its size in MiB.
    pub mib: u64,
    /// MiB of it that the guest uses, all with the same probability.
    pub hot_mib: u64,
    /// These lie in runs of so many KiB, evenly spread over the disk.
    pub run_kib: u64,
    /// Per cent of each 4 KiB, used or not, that does not compress.
    pub random_percent: u32,
    /// Blocks of 4 KiB read at random, and verified, in MB/s.
    pub read_mb_s: f64,
    /// Blocks of 4 KiB rewritten at random, in MB/s.
    pub write_mb_s: f64,
    /// Threads of the guest that do so, each with one operation at a time.
    pub threads: u32,
}

impl Disk {
    /// Length in bytes.
    pub fn bytes(&self) -> u64 {
        self.mib << 20
    }

    /// Where the blocks lie that the guest uses, if they have room.
    pub fn layout(&self) -> Option<Layout> {
        let layout = Layout::new(self.bytes(), self.hot_mib << 20, self.run_kib / 4)?;
        // Their numbers have 16 bits.
        (layout.blocks <= 1 << 16).then_some(layout)
    }
}

fn uniform() -> u32 {
    100
}

/// How fast a guest dirties its memory.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Dirty {
    /// Not at all.
    Idle,
    /// So many times what the link carries.
    OfLink(f64),
    /// So many MB/s (10⁶ bytes).
    MbPerS(f64),
}

impl Dirty {
    /// In MB/s, on a link of that many bits a second.
    pub fn mb_per_s(self, link_rate: Option<u64>) -> Result<f64> {
        match self {
            Self::Idle => Ok(0.0),
            Self::MbPerS(rate) => Ok(rate),
            Self::OfLink(times) => {
                let rate = link_rate.context("'of_link' needs a link with a rate")?;
                Ok(times * rate as f64 / 8e6)
            }
        }
    }
}

impl fmt::Display for Dirty {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Idle => f.write_str("idle"),
            Self::OfLink(times) => write!(f, "{times} × the link's rate"),
            Self::MbPerS(rate) => write!(f, "{rate} MB/s"),
        }
    }
}

/// Times in seconds.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Times {
    /// How long the guest is watched before the migration starts.
    pub before_s: f64,
    /// A migration that has not ended after so long is not waited for any longer.
    pub give_up_s: f64,
    /// How long the guest is watched after the end.
    pub after_s: f64,
}

impl Times {
    /// See [`Self::give_up_s`].
    pub fn give_up(&self) -> Duration {
        Duration::from_secs_f64(self.give_up_s)
    }
}

/// A link and a guest.
#[derive(Clone, Debug)]
pub struct Cell {
    /// The link.
    pub link: LinkSpec,
    /// The guest.
    pub guest: Guest,
    /// How fast it dirties its memory, in MB/s.
    pub dirty_mb_s: f64,
}

impl fmt::Display for Cell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} | {}", LinkFacts::of(&self.link), self.guest.name)
    }
}

impl Scenario {
    /// Reads one. What it names must exist.
    pub fn parse(text: &str) -> Result<Self> {
        let scenario: Self = toml::from_str(text).context("this is not a scenario")?;
        scenario.check_engines()?;
        scenario.cells()?;
        ensure!(scenario.repetitions > 0, "no repetitions");
        let Times {
            before_s,
            give_up_s,
            after_s,
        } = scenario.times;
        for (what, seconds, least) in [
            ("before_s", before_s, 1.0),
            ("give_up_s", give_up_s, 1.0),
            ("after_s", after_s, 1.5),
        ] {
            ensure!(
                (least..=86_400.0).contains(&seconds),
                "{what} = {seconds} must be {least} to 86400"
            );
        }
        for guest in &scenario.guests {
            ensure!(
                guest.sweep_mb_s > 0.0 && guest.tick_ms > 0 && guest.checked_mib > 0,
                "guest '{}': without sweep, ticks or pages nothing can be measured",
                guest.name
            );
            let work = guest.work.as_ref();
            ensure!(
                work.is_none_or(|work| (work.program == Program::Sqlite)
                    == work.disk_mib.is_some_and(|mib| mib >= work.mib * 4)
                    && (work.mib > 0 || work.program == Program::Compile)),
                "guest '{}': redis and sqlite keep some MiB of values, and sqlite, only that, a disk of four times \
                 as many",
                guest.name
            );
            ensure!(
                guest.disk.is_none() || work.is_none(),
                "guest '{}': one disk, either checked or a program's",
                guest.name
            );
            if let Some(disk) = &guest.disk {
                ensure!(
                    disk.layout().is_some_and(|layout| layout.blocks > 0)
                        && disk.threads > 0
                        && disk.random_percent <= 100,
                    "guest '{}': its disk has no threads, more than 100 % that does not compress, or no room for \
                     what is used (256 MiB at the most, in runs of 4 KiB or more)",
                    guest.name
                );
            }
        }
        Ok(scenario)
    }

    /// Reads the scenario of that name, or of that file.
    pub fn find(name: &str) -> Result<Self> {
        if let Some((_, text)) = EMBEDDED.iter().find(|(embedded, _)| *embedded == name) {
            return Self::parse(text);
        }
        let text = std::fs::read_to_string(name)
            .with_context(|| format!("'{name}' is no scenario of this program, and no file"))?;
        Self::parse(&text).with_context(|| name.to_owned())
    }

    /// Fails unless every engine exists, and moves disks where a guest has one.
    pub fn check_engines(&self) -> Result<()> {
        let disks = self.guests.iter().any(Guest::has_disk);
        for name in &self.engines {
            ensure!(
                engine::by_name(name)?.moves_disks() || !disks,
                "engine '{name}' does not move disks, and a guest has one"
            );
        }
        Ok(())
    }

    /// Every link with every guest.
    pub fn cells(&self) -> Result<Vec<Cell>> {
        let mut links = self.links.clone();
        links.extend(self.grid.iter().flat_map(Grid::links));
        ensure!(!links.is_empty(), "no links");
        ensure!(!self.guests.is_empty(), "no guests");
        let mut cells = Vec::new();
        for text in &links {
            let link: LinkSpec = text.parse().with_context(|| format!("link '{text}'"))?;
            for guest in &self.guests {
                let rate = LinkFacts::of(&link).rate;
                cells.push(Cell {
                    link: link.clone(),
                    guest: guest.clone(),
                    dirty_mb_s: guest.dirty.mb_per_s(rate)?,
                });
            }
        }
        Ok(cells)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_brought_along_can_be_read() {
        let cells = |name| Scenario::find(name).unwrap().cells().unwrap();
        assert_eq!(cells("bench").len(), 6);
        assert_eq!(cells("full").len(), 7 * 4 * 3 * 3);
        let full = Scenario::find("full").unwrap();
        assert!(full.engines.iter().any(|name| name.ends_with("cubic")));
        for (name, _) in EMBEDDED {
            assert_eq!(Scenario::find(name).unwrap().name, *name);
        }
    }

    #[test]
    fn a_grid_has_half_the_round_trip_each_way() {
        let grid = Grid {
            rtt_ms: vec![1.0, 50.0],
            loss_percent: vec![0.0, 0.1],
            rate_mbit: vec![200],
            queue_ms: 50,
        };
        let links = grid.links();
        assert_eq!(links[3], "delay 25ms rate 200mbit loss 0.1% limit 50ms");
        assert_eq!(links[0], "delay 0.5ms rate 200mbit loss 0% limit 50ms");
        let facts = LinkFacts::of(&links[3].parse().unwrap());
        assert!((facts.rtt_ms - 50.0).abs() < 1e-9);
        assert!((facts.loss_percent - 0.1).abs() < 1e-9);
    }

    #[test]
    fn a_share_of_the_link_needs_a_rate() {
        assert!((Dirty::OfLink(2.0).mb_per_s(Some(200_000_000)).unwrap() - 50.0).abs() < 1e-9);
        assert!(Dirty::OfLink(2.0).mb_per_s(None).is_err());
        assert!(Dirty::Idle.mb_per_s(None).unwrap().abs() < 1e-9);
    }

    #[test]
    fn what_does_not_exist_is_refused() {
        let smoke = EMBEDDED[0].1;
        let error = |text: &str| format!("{:#}", Scenario::parse(text).unwrap_err());
        assert!(error(&smoke.replace("qemu-precopy", "qemu-perhaps")).contains("qemu-perhaps"));
        assert!(error(&smoke.replace("delay", "dealy")).contains("dealy"));
        assert!(error(&smoke.replace("sweep_mb_s", "swept")).contains("swept"));
        assert!(Scenario::find("nowhere").is_err());
    }

    #[test]
    fn a_disk_must_have_room_for_what_is_used() {
        let storage = EMBEDDED
            .iter()
            .find(|(name, _)| *name == "storage")
            .unwrap()
            .1;
        let parsed = Scenario::parse(storage).unwrap();
        let disk = parsed.guests[0].disk.as_ref().unwrap();
        assert_eq!(disk.layout().unwrap().blocks * 4096, disk.hot_mib << 20);
        let hot = format!("hot_mib = {}", disk.hot_mib);
        for (from, to) in [
            (hot.as_str(), "hot_mib = 257"),
            ("threads = 4", "threads = 0"),
            ("run_kib = 1024", "run_kib = 2"),
            ("random_percent = 50", "random_percent = 101"),
        ] {
            assert!(storage.contains(from), "{from}");
            assert!(Scenario::parse(&storage.replace(from, to)).is_err(), "{to}");
        }
        let other = storage.replace("qemu-mirror-bbr", "qemu-precopy-bbr");
        let error = format!("{:#}", Scenario::parse(&other).unwrap_err());
        assert!(error.contains("does not move disks"), "{error}");
    }
}
