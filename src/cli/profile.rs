//! `hybridmig profile` as clap sees it.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, ValueHint};

use super::DiskArgs;
use crate::units;

/// `hybridmig profile`.
#[derive(Clone, Debug, Args)]
pub struct ProfileArgs {
    /// Whose profile.
    #[command(flatten)]
    pub of: ProfileOfArgs,
    /// Its disks.
    #[command(flatten)]
    pub disks: DiskArgs,
    /// How long the guest is watched, in seconds or as `1m`, 1 s to 1 h.
    #[arg(long, value_name = "TIME", default_value = "20", value_parser = seconds)]
    pub seconds: Duration,
    /// Save the profile as JSON in this file, `-` for standard output (docs/profile.md).
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub json: Option<PathBuf>,
}

/// Where a profile comes from.
#[derive(Clone, Debug, Args)]
#[group(required = true, multiple = false)]
pub struct ProfileOfArgs {
    /// QMP socket of a running QEMU.
    #[arg(long, value_name = "SOCKET", value_hint = ValueHint::FilePath)]
    pub qmp: Option<PathBuf>,
    /// Control socket of a running `hybridmig guest`.
    #[arg(long, value_name = "SOCKET", value_hint = ValueHint::FilePath)]
    pub workload: Option<PathBuf>,
    /// A running Xen domain, by name or number.
    #[cfg(feature = "xen")]
    #[arg(long, value_name = "DOMAIN")]
    pub xen: Option<String>,
    /// Show the profile that was saved in this file.
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub load: Option<PathBuf>,
}

fn seconds(text: &str) -> Result<Duration, String> {
    let (least, most) = hybridmig_engine::profile::collect::LIMITS;
    let time = match text.parse::<f64>() {
        Ok(seconds) => Duration::try_from_secs_f64(seconds)
            .map_err(|_| format!("'{text}' is not a time; write for example 20 or 2m"))?,
        Err(_) => units::time(text)?,
    };
    if (least..=most).contains(&time) {
        Ok(time)
    } else {
        Err(format!(
            "a guest is watched for {} s to {} s",
            least.as_secs(),
            most.as_secs()
        ))
    }
}
