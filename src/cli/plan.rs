//! `hybridmig plan`, as clap sees it.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, ValueHint};

use super::{DiskArgs, TrustArgs};
use crate::units;

/// What may be named instead of a QEMU.
#[cfg(feature = "xen")]
const GUESTS: [&str; 3] = ["workload", "profile", "xen"];
#[cfg(not(feature = "xen"))]
const GUESTS: [&str; 2] = ["workload", "profile"];

/// `hybridmig plan`.
#[derive(Clone, Debug, Args)]
pub struct PlanArgs {
    /// QMP socket of a running QEMU, which is watched for a while.
    #[arg(
        long,
        value_name = "SOCKET",
        value_hint = ValueHint::FilePath,
        required_unless_present_any = GUESTS
    )]
    pub qmp: Option<PathBuf>,
    /// Control socket of a running `hybridmig guest`, which is watched for a while.
    #[arg(long, value_name = "SOCKET", value_hint = ValueHint::FilePath, conflicts_with = "qmp")]
    pub workload: Option<PathBuf>,
    /// A running Xen domain, by name or number.
    #[cfg(feature = "xen")]
    #[arg(long, value_name = "DOMAIN", conflicts_with_all = ["qmp", "workload", "profile"])]
    pub xen: Option<String>,
    /// A profile that `hybridmig profile --json` has saved, instead of watching.
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath, conflicts_with_all = ["qmp", "workload"])]
    pub profile: Option<PathBuf>,
    /// The disks of a QEMU.
    #[command(flatten)]
    pub disks: DiskArgs,
    /// How long the guest is watched.
    #[arg(long, value_name = "TIME", value_parser = units::time, default_value = "10s")]
    pub watch: Duration,
    /// The `hybridmig recv` that waits for the guest: asked for the round trip. What the link carried is remembered
    /// from the last migration to the same place.
    #[arg(long, value_name = "HOST:PORT", conflicts_with = "profile")]
    pub to: Option<String>,
    /// What the link carries, for example 200mbit.
    #[arg(long, value_name = "RATE", value_parser = units::rate)]
    pub bandwidth: Option<u64>,
    /// Round-trip time.
    #[arg(long, value_name = "TIME", value_parser = units::time)]
    pub rtt: Option<Duration>,
    /// Share of packets lost, 0 to 1.
    #[arg(long, value_name = "SHARE", value_parser = units::share)]
    pub loss: Option<f64>,
    /// The longest downtime that is acceptable.
    #[arg(long, value_name = "TIME", value_parser = units::time)]
    pub max_downtime: Option<Duration>,
    /// The longest that the migration may take.
    #[arg(long, value_name = "TIME", value_parser = units::time)]
    pub max_total: Option<Duration>,
    /// Write lost work over the fractions as a plot, SVG, to this file.
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub plot: Option<PathBuf>,
    /// Print the plan as JSON.
    #[arg(long)]
    pub json: bool,
    /// Where migrations from this host are remembered [default: /var/lib/hybridmig for root,
    /// ~/.local/state/hybridmig for others].
    #[arg(long, value_name = "DIR", env = "HYBRIDMIG_STATE", value_hint = ValueHint::DirPath)]
    pub state_dir: Option<PathBuf>,
    /// Identity and trust.
    #[command(flatten)]
    pub trust: TrustArgs,
}
