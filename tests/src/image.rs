//! The test guest's kernel and initramfs, built on first use by `scripts/guest-image.sh`.

use std::path::PathBuf;
use std::process::Command;
use std::sync::OnceLock;

use anyhow::{Context, Result, anyhow, ensure};

use crate::{profile_dir, source_root};

/// Files that QEMU boots the test guest from.
#[derive(Clone, Debug)]
pub struct Image {
    /// For `-kernel`.
    pub kernel: PathBuf,
    /// For `-initrd`.
    pub initramfs: PathBuf,
}

/// The test guest, built or brought up to date if need be; with real programs in it
/// (`scripts/guest-programs.sh`), or the checkers alone. The scripts lock their directory, so processes may
/// ask at the same time.
pub fn image(programs: bool) -> Result<Image> {
    static IMAGES: [OnceLock<Result<Image, String>>; 2] = [OnceLock::new(), OnceLock::new()];
    let (script, initramfs) = if programs {
        ("guest-programs.sh", "initramfs-programs")
    } else {
        ("guest-image.sh", "initramfs")
    };
    let image = IMAGES[usize::from(programs)]
        .get_or_init(|| build(script, initramfs).map_err(|error| format!("{error:#}")));
    image.clone().map_err(|error| anyhow!(error))
}

fn build(script: &str, initramfs: &str) -> Result<Image> {
    let profile = profile_dir()?;
    let target = profile.parent().context("a profile is within a target")?;
    let directory = target.join("guest-image");
    let script = source_root().join("scripts").join(script);
    let output = Command::new(&script)
        .arg(&directory)
        .output()
        .with_context(|| format!("cannot run {}", script.display()))?;
    ensure!(
        output.status.success(),
        "{} failed ({}):\n{}",
        script.display(),
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(Image {
        kernel: directory.join("vmlinuz"),
        initramfs: directory.join(initramfs),
    })
}
