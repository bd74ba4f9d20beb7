//! What the tests of the embedded guest share: guests as real processes that end with the test, and
//! the two halves of a migration without a network between them.

#![allow(dead_code, reason = "not every test uses all of it")]

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use hybridmig_engine::blocks::{Blocks, RegionId};
use hybridmig_engine::guest::workload::control::Control;
use hybridmig_engine::guest::workload::{
    GuestOptions, Launch, Profile, WorkloadDestination, WorkloadSource,
};
use hybridmig_engine::guest::{
    DestinationGuest, FaultAnswer, FaultSink, GuestError, GuestResult, SourceGuest,
};
use hybridmig_transport::message::{Mode, Offer};

/// Names another place of the fixture, for a test that runs where its own is out of reach.
pub const FIXTURE_VARIABLE: &str = "HYBRIDMIG_GUEST_FIXTURE";
pub const REGION: RegionId = RegionId(0);
pub const BYTES: u64 = 32 << 20;
pub const PAGES: u32 = (BYTES / 4096) as u32;

pub fn fixture() -> PathBuf {
    std::env::var_os(FIXTURE_VARIABLE).map_or_else(
        || env!("CARGO_BIN_EXE_hybridmig-guest-fixture").into(),
        PathBuf::from,
    )
}

/// A guest process that ends with this test at the latest.
pub struct Guest {
    pub child: Child,
    pub control: PathBuf,
}

impl Guest {
    pub fn start(directory: &Path, name: &str, change: impl FnOnce(&mut GuestOptions)) -> Self {
        let control = directory.join(name);
        let mut options = GuestOptions {
            profile: Profile::Db,
            die_with: Some(std::process::id()),
            ..GuestOptions::new(&control, BYTES)
        };
        change(&mut options);
        let child = Command::new(fixture())
            .args(options.to_args())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let mut guest = Self { child, control };
        let alive = || guest.child.try_wait().unwrap().is_none();
        let mut control = Control::wait(&guest.control, Duration::from_secs(30), alive).unwrap();
        // It listens first and answers once it has made its memory and its disk.
        control.describe().unwrap();
        guest
    }

    pub fn control(&self) -> Control {
        Control::connect(&self.control).unwrap()
    }

    /// Waits until the process has ended by itself.
    pub fn ended(&mut self) -> bool {
        let deadline = Instant::now() + Duration::from_secs(30);
        while Instant::now() < deadline {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status.success();
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        false
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        // Most have ended by then; then there is nothing to kill.
        _ = self.child.kill();
        _ = self.child.wait();
    }
}

/// How a destination starts its guest: it must not outlive this test.
pub fn start_at(control: PathBuf) -> Launch {
    Launch::Start {
        program: fixture(),
        args: ["--die-with".into(), std::process::id().to_string().into()].into(),
        control,
        disk_dir: None,
    }
}

pub fn offer(source: &WorkloadSource) -> Offer {
    Offer {
        guest: source.describe().clone(),
        regions: source.regions().to_vec(),
        mode: Mode::Hybrid,
        check_only: false,
    }
}

pub struct Faults(Sender<(RegionId, u32)>);

impl FaultSink for Faults {
    fn fault(&self, region: RegionId, block: u32) -> FaultAnswer {
        // Fails only when the test is over.
        _ = self.0.send((region, block));
        FaultAnswer::Requested
    }

    fn removed(&self, region: RegionId, _first: u32, _count: u32) {
        // Of memory it gives nothing back; blocks of the disk it may overwrite as a whole.
        assert_ne!(region, REGION);
    }

    fn failed(&self, error: GuestError) {
        eprintln!("the pager failed: {}", error.chain());
    }
}

pub fn faults() -> (Arc<Faults>, Receiver<(RegionId, u32)>) {
    let (sender, receiver) = channel();
    (Arc::new(Faults(sender)), receiver)
}

/// A block of the source.
pub fn read(source: &WorkloadSource, region: RegionId, block: u32) -> Vec<u8> {
    let size = source.regions()[usize::from(region.0)].block_size;
    let mut data = vec![0; size as usize];
    source.read(region, block, &mut data).unwrap();
    data
}

/// Copies blocks from the source to the destination before the handover.
pub fn copy(source: &WorkloadSource, destination: &WorkloadDestination, blocks: &Blocks) {
    for (region, block) in blocks.iter_blocks() {
        let data = read(source, region, block);
        if data.iter().all(|byte| *byte == 0) {
            destination.write_zero(region, block, 1).unwrap();
        } else {
            destination.write(region, block, &data).unwrap();
        }
    }
}

/// Brings a block of the source to a guest that runs at the destination.
pub fn place(
    source: &WorkloadSource,
    destination: &WorkloadDestination,
    region: RegionId,
    block: u32,
) {
    let data = read(source, region, block);
    if data.iter().all(|byte| *byte == 0) {
        destination.place_zero(region, block, 1).unwrap();
    } else {
        destination.place(region, block, &data).unwrap();
    }
}

/// Post-copy: faults first, the rest in the background, until nothing is missing. Returns how many
/// blocks the guest asked for.
pub fn push(
    source: &WorkloadSource,
    destination: &WorkloadDestination,
    mut missing: Blocks,
    faults: &Receiver<(RegionId, u32)>,
) -> usize {
    let mut asked = BTreeSet::new();
    while !missing.is_empty() {
        let (region, block) = if let Ok(fault) = faults.try_recv() {
            asked.insert(fault);
            fault
        } else {
            let (region, blocks) = missing.pop_front(1).unwrap();
            place(source, destination, region, blocks[0]);
            continue;
        };
        if !missing.remove(region, block) {
            continue;
        }
        place(source, destination, region, block);
    }
    asked.len()
}

/// For those who need not know in advance what may be missing.
#[expect(
    clippy::unnecessary_wraps,
    reason = "the type is that of a note which can fail"
)]
pub fn no_note(_missing: &Blocks) -> GuestResult<()> {
    Ok(())
}

pub fn work_goes_on(done: impl Fn() -> Option<u64>) {
    let before = done().unwrap();
    let deadline = Instant::now() + Duration::from_secs(30);
    while done().unwrap() < before + 1000 {
        assert!(Instant::now() < deadline, "the guest makes no progress");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Lets another process move the frozen guest, up to where it waits for what is missing, and kills that
/// process there.
pub fn half_page(guest: &Guest, arrived: &Guest) {
    let mut pager = Command::new(fixture())
        .arg("half-pager")
        .args([&guest.control, &arrived.control])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut said = String::new();
    let output = pager.stdout.take().unwrap();
    BufReader::new(output).read_line(&mut said).unwrap();
    pager.kill().unwrap(); // SIGKILL
    pager.wait().unwrap();
    assert!(said.starts_with("stalled"), "{said:?}");
}
