//! Disks of a test guest: what its disk checker says (`tests/guest/diskcheck.rs`), images, and a
//! `qemu-storage-daemon` that makes and serves them.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use serde_json::json;

use crate::console::{self, Console};
use crate::keeper::Kept;
use crate::qmp::Qmp;

/// How long anything may take; a busy machine is slow.
const PATIENCE: Duration = Duration::from_secs(120);

/// Splits arguments at white space.
pub fn words(text: &str) -> Vec<String> {
    text.split_whitespace().map(str::to_owned).collect()
}

/// An empty sparse file.
pub fn image(folder: &Path, name: &str, bytes: u64) -> Result<PathBuf> {
    let path = folder.join(name);
    File::create(&path)?.set_len(bytes)?;
    Ok(path)
}

/// What the checker of one disk last said.
#[derive(Clone, Copy, Debug, Default)]
pub struct DiskTick {
    /// Blocks read or written since it started.
    pub operations: u64,
    /// How often every block has been read back.
    pub sweeps: u64,
    /// Blocks found wrong.
    pub bad: u64,
    /// I/O errors.
    pub errors: u64,
}

/// What the checkers last said, by disk.
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

/// Blocks read or written on all disks.
pub fn operations(console: &Console) -> u64 {
    ticks(console).values().map(|tick| tick.operations).sum()
}

/// A `qemu-storage-daemon`, by which tests make and serve images.
pub struct StorageDaemon {
    /// The process.
    pub daemon: Kept,
    /// Its QMP monitor.
    pub monitor: PathBuf,
}

impl StorageDaemon {
    /// Starts one with these arguments besides.
    pub fn start(folder: &Path, arguments: &[String]) -> Result<Self> {
        let monitor = folder.join("qsd");
        // Left by one that was killed.
        if monitor.exists() {
            std::fs::remove_file(&monitor)?;
        }
        let mut command = Command::new("qemu-storage-daemon");
        command
            .arg("--chardev")
            .arg(format!(
                "socket,id=m,path={},server=on,wait=off",
                monitor.display()
            ))
            .args(["--monitor", "chardev=m"])
            .args(arguments)
            .stdin(Stdio::null());
        let daemon = Kept::start("qemu-storage-daemon", command)?;
        console::connect(&monitor, PATIENCE)?;
        Ok(Self { daemon, monitor })
    }
}

/// An empty qcow2 image.
pub fn make_qcow2(folder: &Path, name: &str, bytes: u64) -> Result<PathBuf> {
    let path = image(folder, name, 0)?;
    let node = format!("driver=file,node-name=f,filename={}", path.display());
    let daemon = StorageDaemon::start(folder, &["--blockdev".to_owned(), node])?;
    let mut qmp = Qmp::connect(&daemon.monitor, PATIENCE)?;
    let options = json!({ "driver": "qcow2", "file": "f", "size": bytes });
    qmp.execute(
        "blockdev-create",
        json!({ "job-id": "make", "options": options }),
    )?;
    let deadline = Instant::now() + PATIENCE;
    loop {
        let jobs = qmp.execute("query-jobs", json!({}))?;
        if jobs[0]["status"] == "concluded" {
            ensure!(jobs[0].get("error").is_none(), "{jobs}");
            return Ok(path);
        }
        ensure!(Instant::now() < deadline, "no qcow2 image: {jobs}");
        std::thread::yield_now();
    }
}

/// Serves the local images of the destination, as our own server does: through files that another
/// QEMU has open.
pub fn serve(folder: &Path, images: &[PathBuf]) -> Result<(StorageDaemon, PathBuf)> {
    let socket = folder.join("served");
    if socket.exists() {
        std::fs::remove_file(&socket)?;
    }
    let mut arguments = Vec::new();
    for (index, image) in images.iter().enumerate() {
        arguments.extend(words(&format!(
            "--blockdev driver=file,node-name=f{index},locking=off,discard=unmap,filename={} \
             --blockdev driver=raw,node-name=r{index},file=f{index},discard=unmap",
            image.display()
        )));
    }
    arguments.extend(words(&format!(
        "--nbd-server addr.type=unix,addr.path={}",
        socket.display()
    )));
    for index in 0..images.len() {
        arguments.extend(words(&format!(
            "--export type=nbd,id=e{index},node-name=r{index},name=disk{index},writable=on"
        )));
    }
    let daemon = StorageDaemon::start(folder, &arguments)?;
    console::connect(&socket, PATIENCE)?;
    Ok((daemon, socket))
}
