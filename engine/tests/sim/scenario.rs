//! What a seed stands for: sizes, speeds, and what goes wrong.

use std::time::Duration;

use hybridmig_engine::blocks::RegionId;
use hybridmig_netem::DirectionSpec;
use hybridmig_netem::model::Path;
use hybridmig_netem::spec::{Chance, Loss};
use hybridmig_transport::message::Mode;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use super::net::Direction;

/// One end of the session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The host that the guest leaves.
    Source,
    /// The host that it comes to.
    Destination,
}

/// Where around a command a process dies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Around {
    /// It was not begun.
    Before,
    /// It took effect, the machine was not told.
    Within,
    /// The machine was told, and what it said then is lost.
    After,
}

/// One run.
#[derive(Clone, Debug)]
pub struct Scenario {
    pub seed: u64,
    pub mode: Mode,
    pub mem_frac: Option<f64>,
    pub max_downtime: Option<Duration>,
    pub disk_frac: Option<f64>,
    /// Blocks per region, memory before disks.
    pub regions: Vec<u32>,
    /// How many of the regions are memory.
    pub memory_regions: usize,
    /// Bytes per second.
    pub bandwidth: u64,
    pub delay: Duration,
    pub jitter: Duration,
    /// Batches and messages that are lost on the way and sent again.
    pub loss: Loss,
    pub vcpus: usize,
    /// Mean time between two accesses of all vCPUs together.
    pub access: Duration,
    /// Share of the accesses that write.
    pub writes: f64,
    pub state_len: u64,
    /// Time between two scans in a long round; random where it is not given.
    pub scan_interval: Option<Duration>,
    /// The planner only watches.
    pub observe: bool,
    /// Share of the records that the destination cannot decode, of those that refer to others.
    pub rejections: f64,
    /// When the link is cut, and for how long.
    pub cuts: Vec<(Duration, Duration)>,
    /// The link is cut around the n-th message of the session (before or after it arrives).
    pub cut_at_message: Option<(u64, bool)>,
    /// The n-th command of an end fails.
    pub failures: Vec<(End, u64)>,
    /// Share of all commands that fail.
    pub failure_rate: f64,
    pub cancels: Vec<(End, Duration)>,
    /// An end dies around its n-th command.
    pub crash: Option<(End, u64, Around)>,
    /// An end dies at a time.
    pub crash_at: Option<(End, Duration)>,
    /// A listener without a memory answers once the destination has ended.
    pub fresh_listener: bool,
}

impl Scenario {
    fn random(seed: u64, mode: Option<Mode>) -> (Self, SmallRng) {
        let mut rng = SmallRng::seed_from_u64(seed);
        let modes = [Mode::Hybrid, Mode::Hybrid, Mode::Precopy, Mode::Postcopy];
        let mode = mode.unwrap_or_else(|| modes[rng.random_range(0..modes.len())]);
        let memory_regions = rng.random_range(1..=3);
        let mut regions: Vec<u32> = (0..memory_regions)
            .map(|_| rng.random_range(32..=256))
            .collect();
        let disks = rng.random_range(0..=2);
        regions.extend((0..disks).map(|_| rng.random_range(8..=64)));
        let delay = Duration::from_micros(rng.random_range(200..40_000));
        let mut scenario = Self {
            seed,
            mode,
            mem_frac: rng
                .random_bool(0.3)
                .then(|| [0.0, 0.3, 0.8, 1.0][rng.random_range(0..4)]),
            disk_frac: rng
                .random_bool(0.4)
                .then(|| [0.0, 0.3, 0.8, 1.0][rng.random_range(0..4)]),
            memory_regions,
            max_downtime: rng
                .random_bool(0.2)
                .then(|| Duration::from_millis(rng.random_range(100..3000))),
            regions,
            bandwidth: (150_000.0 * 130f64.powf(rng.random_range(0.0..1.0))) as u64,
            delay,
            jitter: delay.mul_f64(rng.random_range(0.0..0.3)),
            loss: Loss::None,
            vcpus: rng.random_range(1..=4),
            access: Duration::from_micros(rng.random_range(300..5_000)),
            writes: rng.random_range(0.0..0.9),
            state_len: [0, 700, 70_000, 200_000][rng.random_range(0..4)],
            scan_interval: None,
            observe: rng.random_bool(0.3),
            rejections: [0.0, 0.02, 0.2][rng.random_range(0..3)],
            cuts: Vec::new(),
            cut_at_message: None,
            failures: Vec::new(),
            failure_rate: 0.0,
            cancels: Vec::new(),
            crash: None,
            crash_at: None,
            fresh_listener: false,
        };
        scenario.loss = match rng.random_range(0..3) {
            0 => Loss::None,
            1 => Loss::Random(Chance {
                probability: 0.03,
                correlation: 0.0,
            }),
            _ => Loss::Gemodel {
                p: 0.01,
                r: 0.25,
                bad: 0.9,
                good: 0.001,
            },
        };
        (scenario, rng)
    }

    pub fn is_disk(&self, region: RegionId) -> bool {
        usize::from(region.0) >= self.memory_regions
    }

    /// Length of the region's blocks.
    pub fn block_bytes(&self, region: RegionId) -> u32 {
        if self.is_disk(region) { 16_384 } else { 4096 }
    }

    /// One direction of the link.
    pub fn direction(&self, way: u64) -> Direction {
        let half = self.jitter / 2;
        let spec = DirectionSpec {
            delay: self.delay + half,
            jitter: half,
            loss: self.loss,
            ..DirectionSpec::default()
        };
        let path = Path::new(&spec, self.seed.wrapping_mul(2).wrapping_add(way));
        // Found lost by what was sent later, an eighth of a round trip after the round trip.
        let recovery = (self.delay + half) * 9 / 4;
        Direction::new(path, self.bandwidth * 8, recovery)
    }

    /// Nothing goes wrong but that records cannot be decoded.
    pub fn quiet(seed: u64, mode: Mode) -> Self {
        Self::random(seed, Some(mode)).0
    }

    /// A guest of 3000 blocks over a link that carries 1000 in a second. Of its writes, one each `access`,
    /// three in ten go anywhere and the others to a few blocks.
    pub fn writer(seed: u64, access: Duration, scan_interval: Duration) -> Self {
        Self {
            regions: vec![3000],
            bandwidth: 4_120_000,
            delay: Duration::from_millis(20),
            jitter: Duration::ZERO,
            loss: Loss::None,
            mem_frac: None,
            max_downtime: None,
            writes: 1.0,
            access,
            scan_interval: Some(scan_interval),
            observe: true,
            rejections: 0.0,
            ..Self::quiet(seed, Mode::Hybrid)
        }
    }

    /// The link dies up to four times and comes back.
    pub fn cuts(seed: u64) -> Self {
        let (mut scenario, mut rng) = Self::random(seed, None);
        scenario.add_cuts(&mut rng, 2_500);
        scenario
    }

    /// The link dies around one certain message.
    pub fn cut_at_message(seed: u64) -> Self {
        let (mut scenario, mut rng) = Self::random(seed, None);
        scenario.cut_at_message = Some((rng.random_range(0..40), rng.random_bool(0.5)));
        scenario
    }

    /// One command, or some of them, fail.
    pub fn failing_commands(seed: u64) -> Self {
        let (mut scenario, mut rng) = Self::random(seed, None);
        scenario.add_failures(&mut rng);
        scenario
    }

    /// One or both sides are told to stop.
    pub fn cancels(seed: u64) -> Self {
        let (mut scenario, mut rng) = Self::random(seed, None);
        scenario.add_cancels(&mut rng);
        scenario
    }

    /// One side dies.
    pub fn crashes(seed: u64) -> Self {
        let (mut scenario, mut rng) = Self::random(seed, None);
        scenario.add_crash(&mut rng);
        scenario
    }

    /// All of it.
    pub fn chaos(seed: u64) -> Self {
        let (mut scenario, mut rng) = Self::random(seed, None);
        if rng.random_bool(0.6) {
            scenario.add_cuts(&mut rng, 90_000);
        }
        if rng.random_bool(0.4) {
            scenario.cut_at_message = Some((rng.random_range(0..40), rng.random_bool(0.5)));
        }
        if rng.random_bool(0.4) {
            scenario.add_failures(&mut rng);
        }
        if rng.random_bool(0.3) {
            scenario.add_cancels(&mut rng);
        }
        if rng.random_bool(0.3) {
            scenario.add_crash(&mut rng);
        }
        scenario
    }

    fn add_cuts(&mut self, rng: &mut SmallRng, longest_ms: u64) {
        for _ in 0..rng.random_range(1..=4) {
            let at = Duration::from_micros(rng.random_range(0..3_000_000));
            let outage = Duration::from_millis(rng.random_range(1..longest_ms));
            self.cuts.push((at, outage));
        }
    }

    fn add_failures(&mut self, rng: &mut SmallRng) {
        if rng.random_bool(0.3) {
            self.failure_rate = rng.random_range(0.0..0.2);
        } else {
            self.failures.push((end(rng), rng.random_range(0..14)));
        }
    }

    fn add_cancels(&mut self, rng: &mut SmallRng) {
        for _ in 0..rng.random_range(1..=2) {
            let at = Duration::from_micros(rng.random_range(0..3_000_000));
            self.cancels.push((end(rng), at));
        }
    }

    fn add_crash(&mut self, rng: &mut SmallRng) {
        if rng.random_bool(0.6) {
            let around = [Around::Before, Around::Within, Around::After][rng.random_range(0..3)];
            self.crash = Some((end(rng), rng.random_range(0..14), around));
        } else {
            let at = Duration::from_micros(rng.random_range(0..3_000_000));
            self.crash_at = Some((end(rng), at));
        }
        self.fresh_listener = rng.random_bool(0.5);
    }
}

fn end(rng: &mut SmallRng) -> End {
    if rng.random_bool(0.5) {
        End::Source
    } else {
        End::Destination
    }
}
