//! What a result needs to be compared with another: the machine and the versions of what ran.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use hybridmig_tests::{hybridmig_binary, profile_dir, source_root};
use serde::{Deserialize, Serialize};

/// The machine, and the software on it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Machine {
    /// The processor's name.
    pub cpu: String,
    /// Cores that this process may use.
    pub cores: usize,
    /// Memory in bytes.
    pub memory: u64,
    /// The kernel's release.
    pub kernel: String,
    /// Load average over the last minute, before the run.
    pub load: f64,
    /// Version of hybridmig.
    pub hybridmig: String,
    /// Version of the QEMU that runs the guest, with every engine.
    pub qemu: String,
}

impl Machine {
    /// This one, now.
    pub fn look(qemu: &Path) -> Result<Self> {
        let read =
            |path: &str| fs::read_to_string(path).with_context(|| format!("cannot read {path}"));
        let cpuinfo = read("/proc/cpuinfo")?;
        let model = cpuinfo
            .lines()
            .find_map(|line| line.strip_prefix("model name"));
        let meminfo = read("/proc/meminfo")?;
        let kib = meminfo.lines().find_map(|line| {
            line.strip_prefix("MemTotal:")?
                .split_whitespace()
                .next()?
                .parse::<u64>()
                .ok()
        });
        Ok(Self {
            cpu: model
                .unwrap_or_default()
                .trim_matches([' ', '\t', ':'])
                .to_owned(),
            cores: std::thread::available_parallelism()
                .context("how many cores?")?
                .get(),
            memory: kib.context("/proc/meminfo has no MemTotal")? * 1024,
            kernel: read("/proc/sys/kernel/osrelease")?.trim().to_owned(),
            load: load()?,
            hybridmig: version(&hybridmig_binary()?)?,
            qemu: version(qemu)?,
        })
    }
}

/// Load average over the last minute.
pub fn load() -> Result<f64> {
    let text = fs::read_to_string("/proc/loadavg").context("cannot read /proc/loadavg")?;
    let first = text.split(' ').next().unwrap_or_default();
    first
        .parse()
        .context("/proc/loadavg does not start with a number")
}

/// The first line of `PROGRAM --version`.
fn version(program: &Path) -> Result<String> {
    let output = Command::new(program)
        .arg("--version")
        .output()
        .with_context(|| format!("cannot run {}", program.display()))?;
    let text = String::from_utf8_lossy(&output.stdout);
    ensure!(
        output.status.success(),
        "{} --version: {}",
        program.display(),
        output.status
    );
    Ok(text.lines().next().unwrap_or_default().to_owned())
}

/// The QEMU of all engines, unpacked by `scripts/qemu10.sh` if need be.
pub fn qemu() -> Result<PathBuf> {
    let profile = profile_dir()?;
    let target = profile.parent().context("a profile is within a target")?;
    let directory = target.join("qemu10");
    let script = source_root().join("scripts/qemu10.sh");
    let status = Command::new(&script)
        .arg(&directory)
        .status()
        .with_context(|| format!("cannot run {}", script.display()))?;
    ensure!(status.success(), "{} failed ({status})", script.display());
    Ok(directory.join("qemu-system-x86_64"))
}
