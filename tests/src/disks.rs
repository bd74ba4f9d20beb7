//! What the disk checker inside the test guest (`tests/guest/diskcheck.rs`) says of each disk.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::console::Console;

/// How long a disk may take to be checked twice; a guest that waits for the network takes its time.
const PATIENCE: Duration = Duration::from_secs(120);

/// What the checker of one disk last said.
#[derive(Clone, Copy, Debug, Default)]
pub struct DiskTick {
    /// Blocks written or verified so far.
    pub operations: u64,
    /// Times that every block has been read back from the disk.
    pub sweeps: u64,
    /// Blocks that were not what they had to be.
    pub bad: u64,
    /// I/O errors.
    pub errors: u64,
}

/// By disk, as the guest calls it: what its checker last said on this console.
pub fn ticks(console: &Console) -> BTreeMap<String, DiskTick> {
    let mut ticks = BTreeMap::new();
    for line in console.transcript().lines() {
        let mut words = line.text.split(' ');
        if words.next() != Some("DISK") {
            continue;
        }
        let Some(name) = words.next() else { continue };
        // A line torn between two programs is none.
        let numbers: Vec<u64> = words.filter_map(|word| word.parse().ok()).collect();
        if let [_, operations, sweeps, bad, errors] = numbers[..] {
            let tick = DiskTick {
                operations,
                sweeps,
                bad,
                errors,
            };
            ticks.insert(name.to_owned(), tick);
        }
    }
    ticks
}

/// Waits until the checker has read every block of `disks` back from the disk twice more, and makes
/// sure that it never found anything wrong.
pub fn wait_sweeps(console: &Console, disks: &[&str]) -> Result<()> {
    let before = ticks(console);
    let sweeps = |name: &str, ticks: &BTreeMap<String, DiskTick>| {
        ticks.get(name).map_or(0, |tick| tick.sweeps)
    };
    let deadline = Instant::now() + PATIENCE;
    loop {
        let now = ticks(console);
        for (name, tick) in &now {
            ensure!(
                tick.bad == 0 && tick.errors == 0,
                "{name}: {tick:?}\n{}",
                console.transcript().tail(20)
            );
        }
        if disks
            .iter()
            .all(|name| sweeps(name, &now) >= sweeps(name, &before) + 2)
        {
            return Ok(());
        }
        ensure!(
            Instant::now() < deadline,
            "the disk checker is slow: {before:?} {now:?}\n{}",
            console.transcript().tail(20)
        );
        console.wait_after(console.transcript().end(), "DISK ", PATIENCE)?;
    }
}

/// A sparse image of so many bytes.
pub fn image(folder: &Path, name: &str, bytes: u64) -> Result<PathBuf> {
    let path = folder.join(name);
    File::create(&path)
        .and_then(|file| file.set_len(bytes))
        .with_context(|| format!("no image at {}", path.display()))?;
    Ok(path)
}
