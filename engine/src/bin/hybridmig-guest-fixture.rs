//! For this crate's tests: the embedded guest alone (what `hybridmig guest` is in the program),
//! and a destination pager that stops half-way, to be killed.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};

use hybridmig_engine::blocks::{Blocks, RegionId};
use hybridmig_engine::guest::workload::{
    GuestOptions, Launch, WorkloadDestination, WorkloadSource, run,
};
use hybridmig_engine::guest::{DestinationGuest, FaultAnswer, FaultSink, GuestError, SourceGuest};
use hybridmig_pager::PlacerConfig;
use hybridmig_transport::message::{Mode, Offer};

fn main() -> ExitCode {
    let mut args = std::env::args_os().skip(1).peekable();
    if args.next_if(|first| first == "half-pager").is_some() {
        return match half_pager(args) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("half-pager: {}", error.chain());
                ExitCode::FAILURE
            }
        };
    }
    match GuestOptions::from_args(args).and_then(run) {
        Ok(_) => ExitCode::SUCCESS,
        Err(error) => {
            let cause = std::error::Error::source(&error).map(ToString::to_string);
            eprintln!("guest: {error}: {}", cause.unwrap_or_default());
            ExitCode::FAILURE
        }
    }
}

/// Moves a frozen guest (first argument: its control socket) to a waiting one (second) up to the
/// middle of its post-copy, says `stalled`, and waits to be killed.
fn half_pager(mut args: impl Iterator<Item = OsString>) -> Result<(), GuestError> {
    let mut path = || args.next().map(PathBuf::from).unwrap_or_default();
    let source = WorkloadSource::attach(&path())?;
    let destination =
        WorkloadDestination::new(Launch::Waiting { control: path() }, PlacerConfig::default());
    destination.prepare(&Offer {
        guest: source.describe().clone(),
        regions: source.regions().to_vec(),
        mode: Mode::Postcopy,
        check_only: false,
    })?;
    let read = |region: RegionId, block| {
        let mut data = vec![0; source.regions()[usize::from(region.0)].block_size as usize];
        source.read(region, block, &mut data)?;
        Ok::<_, GuestError>(data)
    };
    let (mut written, mut missing) = (Blocks::new(), Blocks::new());
    for region in source.regions() {
        let id = region.id;
        for block in 0..region.blocks {
            // The end of memory holds what belongs to the disk: the guest shall wait for the disk.
            if block % 4 == 0 || block > region.blocks - region.blocks / 64 {
                destination.write(id, block, &read(id, block)?)?;
                written.insert(id, block);
            } else {
                missing.insert(id, block);
            }
        }
    }
    let (sender, faults) = channel();
    destination.arm(&missing, &written, Arc::new(Faults(sender)))?;
    destination.load_state(&source.save_state()?)?;
    destination.resume()?;
    // Serves some faults, so that there are blocks of all kinds, and leaves one of each region
    // waiting.
    for (region, block) in faults.iter().take(200) {
        destination.place(region, block, &read(region, block)?)?;
    }
    let mut waiting = BTreeSet::new();
    while waiting.len() < source.regions().len() {
        let fault = faults.recv();
        waiting.extend(fault.map(|(region, _)| region));
    }
    println!("stalled with blocks of {waiting:?} waiting");
    loop {
        std::thread::park();
    }
}

struct Faults(Sender<(RegionId, u32)>);

impl FaultSink for Faults {
    fn fault(&self, region: RegionId, block: u32) -> FaultAnswer {
        // The receiver lives as long as the process.
        _ = self.0.send((region, block));
        FaultAnswer::Requested
    }

    fn removed(&self, _region: RegionId, _first: u32, _count: u32) {}

    fn failed(&self, error: GuestError) {
        eprintln!("half-pager: {}", error.chain());
    }
}
