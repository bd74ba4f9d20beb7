//! One file per subcommand, and what they share: identity and trust, the endpoint, signals, exit
//! codes.

pub mod check;
pub mod demo;
pub mod generate;
pub mod guest;
pub mod keys;
pub mod limit;
pub mod netem;
pub mod plan;
pub mod profile;
pub mod recv;
pub mod relay;
pub mod resolve;
pub mod send;

use std::io::Write;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use hybridmig_engine::report::Report;
use hybridmig_engine::session::io::{DestinationOutcome, SourceOutcome};
use hybridmig_netem::LinkStats;
use hybridmig_transport::endpoint::Endpoint;
use hybridmig_transport::error::CloseCode;
use hybridmig_transport::identity::Identity;
use hybridmig_transport::trust::Trust;
use hybridmig_transport::{Congestion, TransportConfig};
use nix::unistd::geteuid;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

use crate::cli::{CongestionArg, LinkArgs, OutputArgs, TrustArgs};
use crate::units::{show_bytes, show_time};

/// Exit codes; `cli::EXIT_CODES` explains them.
pub mod exit {
    pub const REFUSED: u8 = 3;
    pub const CANCELLED: u8 = 4;
    pub const NOT_CONVERGED: u8 = 5;
    pub const IN_DOUBT: u8 = 6;
    pub const INCOMPLETE: u8 = 7;
}

/// The code that says how it ended at the source.
pub fn source_code(outcome: &SourceOutcome) -> ExitCode {
    match outcome {
        SourceOutcome::Moved | SourceOutcome::Checked { .. } => ExitCode::SUCCESS,
        SourceOutcome::Refused(_) => exit::REFUSED.into(),
        SourceOutcome::Cancelled { .. } => exit::CANCELLED.into(),
        SourceOutcome::NotConverged { .. } => exit::NOT_CONVERGED.into(),
        SourceOutcome::InDoubt { .. } => exit::IN_DOUBT.into(),
        SourceOutcome::Incomplete { .. } => exit::INCOMPLETE.into(),
        SourceOutcome::Failed { .. } => ExitCode::FAILURE,
    }
}

/// The code that says how it ended at the destination.
pub fn destination_code(outcome: &DestinationOutcome) -> ExitCode {
    match outcome {
        DestinationOutcome::Moved | DestinationOutcome::Checked => ExitCode::SUCCESS,
        DestinationOutcome::Refused(_) => exit::REFUSED.into(),
        DestinationOutcome::Cancelled { .. } => exit::CANCELLED.into(),
        DestinationOutcome::Incomplete { .. } => exit::INCOMPLETE.into(),
        DestinationOutcome::Failed { .. } => exit::IN_DOUBT.into(),
    }
}

/// Where this host's identity lies unless the operator says otherwise.
pub fn identity_path(given: Option<&Path>) -> anyhow::Result<PathBuf> {
    if let Some(path) = given {
        return Ok(path.to_owned());
    }
    if geteuid().is_root() {
        return Ok(PathBuf::from("/etc/hybridmig/identity.pem"));
    }
    Ok(home("XDG_CONFIG_HOME", ".config")?.join("hybridmig/identity.pem"))
}

/// Where the journals lie unless the operator says otherwise; made if it is missing.
pub fn state_dir(given: Option<&Path>) -> anyhow::Result<PathBuf> {
    let directory = match given {
        Some(path) => path.to_owned(),
        None if geteuid().is_root() => PathBuf::from("/var/lib/hybridmig"),
        None => home("XDG_STATE_HOME", ".local/state")?.join("hybridmig"),
    };
    std::fs::create_dir_all(&directory).with_context(|| {
        format!(
            "cannot make {} for the journals; name another with --state-dir",
            directory.display()
        )
    })?;
    Ok(directory)
}

fn home(variable: &str, below: &str) -> anyhow::Result<PathBuf> {
    if let Some(path) = std::env::var_os(variable).filter(|path| !path.is_empty()) {
        return Ok(path.into());
    }
    let home = std::env::var_os("HOME")
        .filter(|path| !path.is_empty())
        .ok_or_else(|| {
            anyhow!("HOME is not set: name the files with --identity and --state-dir")
        })?;
    Ok(Path::new(&home).join(below))
}

/// Loads who this host is and whom it trusts.
pub fn identity_and_trust(args: &TrustArgs) -> anyhow::Result<(Identity, Trust)> {
    let path = identity_path(args.identity.as_deref())?;
    if !path.exists() {
        bail!(
            "there is no identity at {}: make one with `hybridmig keys new`",
            path.display()
        );
    }
    let identity = Identity::load(&path)?;
    let mut trust = Trust::new();
    for fingerprint in &args.peer {
        trust = trust.with_peer(*fingerprint);
    }
    for file in &args.ca {
        trust.add_authorities(file)?;
    }
    let beside = path.with_file_name("known-peers");
    match &args.known_peers {
        Some(file) => trust.add_known_peers(file)?,
        None if beside.exists() => trust.add_known_peers(&beside)?,
        None => {}
    }
    if trust.is_empty() {
        bail!(
            "nobody is trusted: give the other host's fingerprint (`hybridmig keys show` there) \
             with --peer, or list it in {}, or name a CA with --ca",
            beside.display()
        );
    }
    Ok((identity, trust))
}

/// The transport's settings from the command line.
pub fn transport_config(args: &LinkArgs) -> TransportConfig {
    TransportConfig {
        congestion: match args.cc {
            CongestionArg::Adaptive => Congestion::Adaptive,
            CongestionArg::Cubic => Congestion::Cubic,
            CongestionArg::Newreno => Congestion::NewReno,
            CongestionArg::Bbr => Congestion::Bbr,
        },
        rate_limit: args.rate_limit,
        idle_timeout: link_timeout(args.patience),
        ..TransportConfig::default()
    }
}

/// When a link that carries nothing counts as lost: soon, so that before the handover the operator
/// is told that the guest stays, and after it a new link is dialed while there is patience left.
fn link_timeout(patience: Duration) -> Duration {
    const SOON: Duration = Duration::from_secs(30);
    const LEAST: Duration = Duration::from_secs(1);
    (patience / 4).clamp(LEAST, SOON)
}

/// Closes what is open before the process ends. Where both sides know how it ended (`known`) the
/// link's own end says nothing new, so that nobody waits until the other side is sure to have it.
pub async fn leave(endpoint: &Endpoint, known: bool) {
    endpoint.close(CloseCode::DONE, "the process ends");
    if known {
        endpoint.wait_sent().await;
    } else {
        endpoint.wait_idle().await;
    }
}

/// Resolves `HOST:PORT`.
pub async fn resolve_host(target: &str) -> anyhow::Result<SocketAddr> {
    let mut addresses = tokio::net::lookup_host(target)
        .await
        .with_context(|| format!("cannot resolve '{target}'; write HOST:PORT"))?;
    addresses
        .next()
        .ok_or_else(|| anyhow!("'{target}' has no address"))
}

/// A receiver that changes to a reason with every SIGINT, SIGTERM or SIGHUP. `more` is said behind the reason.
pub fn cancel_on_signals(more: &'static str) -> anyhow::Result<watch::Receiver<Option<String>>> {
    let (sender, receiver) = watch::channel(None);
    for (kind, name) in [
        (SignalKind::interrupt(), "interrupted by the operator"),
        (SignalKind::terminate(), "ended by SIGTERM"),
        (SignalKind::hangup(), "ended by SIGHUP"),
    ] {
        let mut signals = signal(kind).context("cannot listen for signals")?;
        let sender = sender.clone();
        tokio::spawn(async move {
            while signals.recv().await.is_some() {
                eprintln!("{name}{more}");
                sender.send_replace(Some(name.to_owned()));
            }
        });
    }
    Ok(receiver)
}

/// For a command that talks to the other side before it ends.
pub const ONCE_MORE: &str = "; once more to stop waiting for the other side";

/// Says on standard error what an emulated link has carried; `names` are those of its two directions.
pub fn show_traffic(names: [&str; 2], stats: &LinkStats) {
    for (name, way) in names.into_iter().zip([&stats.forward, &stats.back]) {
        eprintln!(
            "{name}: {} packets, {}; lost at random {}, in the queue {}, while down {}, in the \
             emulator {}; late by {} on average, {} at most",
            way.packets,
            show_bytes(way.bytes),
            way.dropped_loss,
            way.dropped_queue,
            way.dropped_down,
            way.dropped_relay,
            show_time(way.lateness_mean()),
            show_time(way.lateness_max),
        );
    }
}

/// An async runtime for one command.
pub fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("cannot start the async runtime")
}

/// Writes the report where `--json` wants it.
pub fn write_report(report: &Report, output: &OutputArgs) -> anyhow::Result<()> {
    let Some(path) = &output.json else {
        return Ok(());
    };
    let mut text = serde_json::to_string_pretty(report).context("the report has no JSON form")?;
    text.push('\n');
    write_text(&text, path)
}

/// Writes a text to a file, or where it is `-` to standard output.
pub fn write_text(text: &str, path: &Path) -> anyhow::Result<()> {
    if path.as_os_str() == "-" {
        return std::io::stdout()
            .write_all(text.as_bytes())
            .context("cannot write to stdout");
    }
    // Whole or not at all: a reader never sees half a report.
    let directory = path
        .parent()
        .filter(|parent| !parent.as_os_str().is_empty());
    let mut file = tempfile::NamedTempFile::new_in(directory.unwrap_or(Path::new(".")))
        .with_context(|| format!("cannot write beside {}", path.display()))?;
    file.write_all(text.as_bytes())
        .and_then(|()| file.as_file().sync_all())
        .with_context(|| format!("cannot write {}", path.display()))?;
    file.persist(path)
        .with_context(|| format!("cannot write {}", path.display()))?;
    Ok(())
}
