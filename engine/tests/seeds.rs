//! Whole migrations over a real link to a destination that has files with much of what the guest
//! has: what is there is not sent, and whatever becomes of the files, no byte is wrong.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use hybridmig_engine::blocks::{Blocks, RegionId};
use hybridmig_engine::driver::destination::{self, DestinationJob, DestinationRun, Waiting};
use hybridmig_engine::driver::level::Level;
use hybridmig_engine::driver::source::{self, SourceJob, SourceRun};
use hybridmig_engine::guest::{
    BlockedTime, DestinationGuest, FaultAnswer, FaultSink, GuestError, GuestResult, SourceGuest,
};
use hybridmig_engine::report::Report;
use hybridmig_engine::seeds::Seeds;
use hybridmig_engine::session::destination::DestinationConfig;
use hybridmig_engine::session::io::{DestinationOutcome, SourceOutcome};
use hybridmig_engine::session::source::SourceConfig;
use hybridmig_transport::message::{
    Features, GuestDescription, Message, Mode, Offer, Refusal, RefusalCode, RegionInfo, RegionKind,
    SessionId,
};
use hybridmig_transport::{Endpoint, Identity, Lane, TransportConfig, Trust};
use rand::rngs::SmallRng;
use rand::seq::SliceRandom as _;
use rand::{RngCore as _, SeedableRng as _};
use tokio::sync::watch;

const LOCALHOST: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 0);
const RAM: RegionId = RegionId(0);
const SIZE: usize = 4096;
const BLOCKS: u32 = 16 << 10;
/// Slow enough that the names of the seeds are there before much has gone.
const RATE: u64 = 2_000_000;
/// For what takes a second.
const PATIENCE: Duration = Duration::from_secs(60);

/// Contents of a whole guest: noise, so that nothing but seeds saves anything.
fn noise(seed: u64) -> Vec<u8> {
    let mut memory = vec![0; BLOCKS as usize * SIZE];
    SmallRng::seed_from_u64(seed).fill_bytes(&mut memory);
    memory
}

fn place(block: u32) -> std::ops::Range<usize> {
    block as usize * SIZE..(block as usize + 1) * SIZE
}

/// A file with these contents in another order, but for every hundredth block, which is another.
fn seed_file(directory: &Path, memory: &[u8]) -> PathBuf {
    let mut order: Vec<u32> = (0..BLOCKS).collect();
    order.shuffle(&mut SmallRng::seed_from_u64(5));
    let mut file = Vec::with_capacity(memory.len());
    for block in order {
        let at = file.len();
        file.extend_from_slice(&memory[place(block)]);
        if block % 100 == 0 {
            file[at] ^= 1;
        }
    }
    let path = directory.join("seed");
    std::fs::write(&path, file).unwrap();
    path
}

/// A guest that stands still, and tells whether it was let go.
struct Still {
    description: GuestDescription,
    regions: Vec<RegionInfo>,
    memory: Vec<u8>,
    ended: Mutex<Option<&'static str>>,
}

impl Still {
    fn new(memory: Vec<u8>) -> Self {
        Self {
            description: GuestDescription {
                kind: "still".into(),
                name: "guest".into(),
                facts: BTreeMap::new(),
            },
            regions: vec![RegionInfo {
                id: RAM,
                kind: RegionKind::Memory,
                name: "ram".into(),
                blocks: BLOCKS,
                block_size: SIZE as u32,
            }],
            memory,
            ended: Mutex::new(None),
        }
    }
}

impl SourceGuest for Still {
    fn describe(&self) -> &GuestDescription {
        &self.description
    }

    fn regions(&self) -> &[RegionInfo] {
        &self.regions
    }

    fn start_tracking(&self) -> GuestResult<Blocks> {
        Ok(std::iter::once((RAM, (0..BLOCKS).collect())).collect())
    }

    fn take_dirty(&self) -> GuestResult<Blocks> {
        Ok(Blocks::new())
    }

    fn read(&self, _: RegionId, block: u32, buf: &mut [u8]) -> GuestResult<()> {
        buf.copy_from_slice(&self.memory[place(block)]);
        Ok(())
    }

    fn freeze(&self) -> GuestResult<()> {
        Ok(())
    }

    fn save_state(&self) -> GuestResult<Vec<u8>> {
        Ok(b"state".to_vec())
    }

    fn thaw(&self) -> GuestResult<()> {
        *self.ended.lock().unwrap() = Some("thawed");
        Ok(())
    }

    fn release(&self) -> GuestResult<()> {
        *self.ended.lock().unwrap() = Some("released");
        Ok(())
    }
}

/// What becomes of it. Blocks of which nothing has come are zero.
#[derive(Default)]
struct Arriving {
    memory: Mutex<Vec<u8>>,
    faults: Mutex<Option<Arc<dyn FaultSink>>>,
    missing: Mutex<Blocks>,
    written_files: Vec<PathBuf>,
}

impl Arriving {
    fn put(&self, first: u32, data: &[u8]) {
        let at = first as usize * SIZE;
        self.memory.lock().unwrap()[at..at + data.len()].copy_from_slice(data);
    }
}

impl DestinationGuest for Arriving {
    fn check(&self, _: &Offer) -> Result<Vec<String>, Refusal> {
        Ok(Vec::new())
    }

    fn prepare(&self, offer: &Offer) -> GuestResult<()> {
        *self.memory.lock().unwrap() = vec![0; offer.regions[0].bytes() as usize];
        Ok(())
    }

    fn written_files(&self) -> Vec<PathBuf> {
        self.written_files.clone()
    }

    fn write(&self, _: RegionId, first: u32, data: &[u8]) -> GuestResult<()> {
        self.put(first, data);
        Ok(())
    }

    fn write_zero(&self, _: RegionId, first: u32, count: u32) -> GuestResult<()> {
        self.put(first, &vec![0; count as usize * SIZE]);
        Ok(())
    }

    fn read(&self, _: RegionId, block: u32, buf: &mut [u8]) -> GuestResult<()> {
        buf.copy_from_slice(&self.memory.lock().unwrap()[place(block)]);
        Ok(())
    }

    fn arm(&self, missing: &Blocks, _: &Blocks, faults: Arc<dyn FaultSink>) -> GuestResult<()> {
        *self.missing.lock().unwrap() = missing.clone();
        *self.faults.lock().unwrap() = Some(faults);
        Ok(())
    }

    fn load_state(&self, state: &[u8]) -> GuestResult<()> {
        assert_eq!(state, b"state");
        Ok(())
    }

    /// Touches some blocks at once, changed ones among them.
    fn resume(&self) -> GuestResult<()> {
        let missing = self.missing.lock().unwrap();
        let faults = self.faults.lock().unwrap().clone();
        let faults = faults.ok_or_else(|| GuestError::new("not armed"))?;
        for block in (0..BLOCKS).step_by(50) {
            if missing.contains(RAM, block) {
                // One that has come since is no fault any more; the others are answered.
                let (FaultAnswer::Requested | FaultAnswer::Zero) = faults.fault(RAM, block);
            }
        }
        Ok(())
    }

    fn place(&self, _: RegionId, first: u32, data: &[u8]) -> GuestResult<()> {
        self.put(first, data);
        Ok(())
    }

    fn place_zero(&self, _: RegionId, first: u32, count: u32) -> GuestResult<()> {
        self.put(first, &vec![0; count as usize * SIZE]);
        Ok(())
    }

    fn disarm(&self) -> GuestResult<BlockedTime> {
        Ok(BlockedTime::default())
    }

    fn abandon(&self) -> GuestResult<()> {
        Ok(())
    }
}

/// Two hosts that trust each other.
struct Hosts {
    source: Arc<Endpoint>,
    destination: Arc<Endpoint>,
    journals: tempfile::TempDir,
}

impl Hosts {
    fn new() -> Self {
        let (alice, bob) = (Identity::generate().unwrap(), Identity::generate().unwrap());
        let trust = |peer: &Identity| Trust::new().with_peer(peer.fingerprint());
        let config = TransportConfig {
            idle_timeout: Duration::from_secs(20),
            ..TransportConfig::default()
        };
        let slow = TransportConfig {
            rate_limit: Some(RATE),
            ..config.clone()
        };
        Self {
            source: Arc::new(Endpoint::client(&alice, trust(&bob), &slow).unwrap()),
            destination: Arc::new(
                Endpoint::server(LOCALHOST, &bob, trust(&alice), &config).unwrap(),
            ),
            journals: tempfile::tempdir().unwrap(),
        }
    }

    async fn send(&self, guest: Arc<Still>, mode: Mode) -> SourceRun {
        let (_cancel, cancelled) = watch::channel(None);
        let job = SourceJob {
            guest,
            endpoint: self.source.clone(),
            target: self.destination.local_addr().unwrap(),
            config: SourceConfig::new(SessionId([3; 8]), mode),
            state_dir: self.journals.path().join("source"),
            level: Level::Fixed(1),
        };
        let (progress, _shown) = watch::channel(None);
        source::run(job, cancelled, progress).await.unwrap()
    }

    async fn recv(&self, guest: Arc<Arriving>, seeds: Seeds, features: u64) -> DestinationRun {
        let (_cancel, cancelled) = watch::channel(None);
        let job = DestinationJob {
            keep_in: None,
            guest,
            endpoint: self.destination.clone(),
            config: DestinationConfig {
                features,
                ..DestinationConfig::default()
            },
            state_dir: self.journals.path().join("destination"),
            verify: false,
            seeds: Some(Arc::new(seeds)),
        };
        let (progress, _shown) = watch::channel(Waiting::Listening);
        destination::run(job, cancelled, progress).await.unwrap()
    }

    /// Moves the guest, and holds what came against what it was.
    async fn migrate(&self, memory: Vec<u8>, mode: Mode, seeds: Seeds, features: u64) -> Moved {
        let guest = Arc::new(Still::new(memory));
        let arriving = Arc::new(Arriving::default());
        let both = async {
            tokio::join!(
                self.send(guest.clone(), mode),
                self.recv(arriving.clone(), seeds, features)
            )
        };
        let (sent, received) = tokio::time::timeout(PATIENCE, both).await.unwrap();
        assert_eq!(sent.outcome, SourceOutcome::Moved);
        assert_eq!(received.outcome, DestinationOutcome::Moved);
        assert_eq!(*guest.ended.lock().unwrap(), Some("released"));
        let arrived = arriving.memory.lock().unwrap();
        for block in 0..BLOCKS {
            assert!(
                arrived[place(block)] == guest.memory[place(block)],
                "block {block} is wrong"
            );
        }
        Moved {
            source: sent.report,
            destination: received.report,
        }
    }
}

struct Moved {
    source: Report,
    destination: Report,
}

impl Moved {
    fn seeded(&self) -> u64 {
        let codecs = self.source.traffic.iter().flat_map(|phase| &phase.codecs);
        codecs
            .filter(|codec| codec.codec == "seeded")
            .map(|codec| codec.blocks)
            .sum()
    }

    /// Bytes that the source sent, beside those of the guest.
    fn share_sent(&self) -> f64 {
        let sent = self.source.link.as_ref().unwrap().sent_bytes;
        sent as f64 / (f64::from(BLOCKS) * SIZE as f64)
    }
}

fn read(path: &Path) -> Seeds {
    Seeds::read(&[path.to_owned()], SIZE as u32, &|_| {}).unwrap()
}

async fn a_guest_costs_its_changes_only(mode: Mode) {
    let directory = tempfile::tempdir().unwrap();
    let memory = noise(1);
    let seeds = read(&seed_file(directory.path(), &memory));
    assert_eq!(seeds.len(), BLOCKS as usize);
    let moved = Hosts::new()
        .migrate(memory, mode, seeds, Features::ALL)
        .await;
    let share = moved.share_sent();
    assert!(share < 0.05, "{share} of the guest was sent");
    let used = moved.destination.seeds.as_ref().unwrap();
    assert_eq!((used.missed, &used.changed[..]), (0, &[][..]));
    assert!(used.blocks > u64::from(BLOCKS) * 95 / 100, "{used:?}");
    assert!(used.blocks <= u64::from(BLOCKS - BLOCKS.div_ceil(100)));
    assert_eq!(used.bytes, used.blocks * SIZE as u64);
    // One that was pushed while the guest asked for it came twice.
    assert!(used.blocks <= moved.seeded());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_costs_its_changes_only_before_the_handover() {
    a_guest_costs_its_changes_only(Mode::Precopy).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_costs_its_changes_only_after_the_handover() {
    a_guest_costs_its_changes_only(Mode::Postcopy).await;
}

async fn a_changed_seed_costs_its_blocks(mode: Mode) {
    let directory = tempfile::tempdir().unwrap();
    let memory = noise(2);
    let path = seed_file(directory.path(), &memory);
    let seeds = read(&path);
    // Every tenth block is written to, and the last are cut off.
    let file = std::fs::File::options().write(true).open(&path).unwrap();
    for block in (0..BLOCKS).step_by(10) {
        let at = place(block).start as u64 + 100;
        file.write_all_at(b"changed", at).unwrap();
    }
    file.set_len(u64::from(BLOCKS - 500) * SIZE as u64).unwrap();
    let moved = Hosts::new()
        .migrate(memory, mode, seeds, Features::ALL)
        .await;
    let used = moved.destination.seeds.as_ref().unwrap();
    assert_eq!(used.changed, [path.display().to_string()]);
    assert!(used.missed > u64::from(BLOCKS) / 12, "{used:?}");
    assert!(used.blocks > u64::from(BLOCKS) * 80 / 100, "{used:?}");
    let share = moved.share_sent();
    assert!(share < 0.25, "{share} of the guest was sent");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_changed_seed_costs_its_blocks_before_the_handover() {
    a_changed_seed_costs_its_blocks(Mode::Precopy).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_changed_seed_costs_its_blocks_after_the_handover() {
    a_changed_seed_costs_its_blocks(Mode::Postcopy).await;
}

/// All that was told is another by now: the source finds out, and leaves it alone.
#[tokio::test(flavor = "multi_thread")]
async fn a_seed_that_was_replaced_does_no_harm() {
    let directory = tempfile::tempdir().unwrap();
    let mut memory = noise(3);
    // Mostly empty, or it would take long at this rate.
    let some = memory.len() / 16;
    memory[some..].fill(0);
    let path = seed_file(directory.path(), &memory);
    let seeds = read(&path);
    std::fs::write(&path, noise(4)).unwrap();
    let moved = Hosts::new()
        .migrate(memory, Mode::Postcopy, seeds, Features::ALL)
        .await;
    let used = moved.destination.seeds.as_ref().unwrap();
    assert_eq!(used.blocks, 0);
    assert!(used.missed > 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_side_without_seeds_is_sent_everything() {
    let directory = tempfile::tempdir().unwrap();
    let mut memory = noise(6);
    let some = memory.len() / 16;
    memory[some..].fill(0);
    let seeds = read(&seed_file(directory.path(), &memory));
    let features = Features::ALL & !Features::SEEDS;
    let moved = Hosts::new()
        .migrate(memory, Mode::Hybrid, seeds, features)
        .await;
    assert_eq!(moved.seeded(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_seed_that_the_guest_is_written_to_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.img");
    std::fs::write(&path, [7; SIZE]).unwrap();
    let hosts = Hosts::new();
    let guest = Arc::new(Still::new(noise(7)));
    let arriving = Arc::new(Arriving {
        written_files: vec![path.clone()],
        ..Arriving::default()
    });
    let ended = async {
        tokio::select! {
            sent = hosts.send(guest, Mode::Hybrid) => sent.outcome,
            run = hosts.recv(arriving, read(&path), Features::ALL) => panic!("{:?}", run.outcome),
        }
    };
    let outcome = tokio::time::timeout(PATIENCE, ended).await.unwrap();
    let SourceOutcome::Refused(refusal) = outcome else {
        panic!("{outcome:?}");
    };
    assert_eq!(refusal.code, RefusalCode::Guest);
    let text = refusal.to_string();
    assert!(text.contains("disk.img") && text.contains("mv "), "{text}");
}

/// Seeds of another length than that of the guest's blocks are told to nobody.
#[tokio::test(flavor = "multi_thread")]
async fn seeds_that_fit_no_region_are_of_no_use() {
    let directory = tempfile::tempdir().unwrap();
    let mut memory = noise(9);
    let some = memory.len() / 16;
    memory[some..].fill(0);
    let path = directory.path().join("seed");
    std::fs::write(&path, &memory).unwrap();
    let seeds = Seeds::read(&[path], 2 * SIZE as u32, &|_| {}).unwrap();
    assert!(!seeds.is_empty());
    let moved = Hosts::new()
        .migrate(memory, Mode::Hybrid, seeds, Features::ALL)
        .await;
    assert_eq!(moved.seeded(), 0);
    let told = |note: &String| note.contains("no use");
    assert!(
        moved.source.notes.iter().any(told),
        "{:?}",
        moved.source.notes
    );
}

/// A destination that tells of seeds what cannot be: the link goes, the guest stays and runs.
#[tokio::test(flavor = "multi_thread")]
async fn names_that_make_no_sense_end_the_link() {
    let piece = |block_size, names: &[u64]| Message::Seeds {
        block_size,
        names: names.to_vec(),
    };
    let (no, yes) = (Features::NAMED, Features::ALL);
    for (features, pieces) in [
        (yes, vec![piece(4096, &[1, 5]), piece(4096, &[3, 4])]),
        (yes, vec![piece(4096, &[1]), piece(8192, &[2])]),
        (no, vec![piece(4096, &[1])]),
    ] {
        let hosts = Hosts::new();
        let guest = Arc::new(Still::new(noise(8)));
        let peer = async {
            let link = hosts.destination.accept().await.unwrap();
            let (mut sender, mut receiver) = link.accept_control().await.unwrap();
            let hello = receiver.recv().await.unwrap();
            assert!(matches!(hello, Message::Hello { .. }));
            let welcome = Message::Welcome {
                version: 1,
                features,
                software: "peer".into(),
            };
            sender.send(&welcome).await.unwrap();
            let ready = Message::Ready { notes: Vec::new() };
            sender.send(&ready).await.unwrap();
            // The first batch shows that the welcome was read.
            link.next_incoming().await.unwrap();
            for piece in &pieces {
                // The link may be gone before the last.
                _ = link.send_message(Lane::Bulk, piece).await;
            }
            link.closed().await
        };
        let both = async { tokio::join!(hosts.send(guest.clone(), Mode::Hybrid), peer) };
        let (run, end) = tokio::time::timeout(PATIENCE, both).await.unwrap();
        assert!(
            matches!(run.outcome, SourceOutcome::Cancelled { .. }),
            "{:?}",
            run.outcome
        );
        assert!(end.to_string().contains("seeds"), "{end}");
        assert_eq!(*guest.ended.lock().unwrap(), Some("thawed"));
    }
}
