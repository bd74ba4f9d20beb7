//! `hybridmig send`.

use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context, bail};
use hybridmig_engine::blocks::RegionId;
use hybridmig_engine::driver::source::{self, SourceJob};
use hybridmig_engine::guest::SourceGuest;
use hybridmig_engine::guest::qemu::disk::DiskChoice;
use hybridmig_engine::guest::qemu::{QemuSource, QemuSourceOptions};
use hybridmig_engine::guest::workload::WorkloadSource;
use hybridmig_engine::guest::workload::control::Standing;
use hybridmig_engine::predict::costs::{LinkSeen, Remembered};
use hybridmig_engine::profile::{HeatRun, Profile, RegionProfile, file};
use hybridmig_engine::session::io::SourceOutcome;
use hybridmig_engine::session::source::SourceConfig;
use hybridmig_transport::endpoint::Endpoint;
use hybridmig_transport::message::SessionId;
use tokio::sync::watch;

use super::{
    ONCE_MORE, cancel_on_signals, identity_and_trust, leave, resolve_host, runtime, source_code,
    state_dir, transport_config, write_report,
};
use crate::cli::{SendArgs, SourceGuestArgs};
use crate::control::Control;
use crate::progress::SourceView;
use crate::show;

/// Moves the guest.
pub fn run(args: SendArgs) -> anyhow::Result<ExitCode> {
    let (identity, trust) = identity_and_trust(&args.trust)?;
    let state_dir = state_dir(args.output.state_dir.as_deref())?;
    let disks = args.disks.choice();
    let (disk_fracs, others) = disks.fractions();
    let guest = open(&args.guest, disks)?;
    let kind = guest.describe().kind.clone();
    let (mut remembered, unread) = Remembered::read(&state_dir);
    if let Some(why) = unread {
        tracing::warn!("what earlier migrations cost is not known: {why}");
    }
    let known_heat = match &args.profile {
        Some(path) => known_heat(&file::load(path)?.profile, guest.as_ref(), path)?,
        None => Vec::new(),
    };
    let costs_in = state_dir.clone();
    let config = SourceConfig {
        mem_frac: args.mem_frac,
        disk_frac: others.or(args.disk_frac),
        disk_fracs,
        max_downtime: args.max_downtime,
        max_total: args.max_total,
        observe: args.observe,
        costs: remembered.of(&kind),
        known_heat,
        max_rounds: args.max_rounds,
        prefetch: args.prefetch,
        patience: args.link.patience,
        ..SourceConfig::new(new_session()?, args.mode)
    };
    let session = config.session;
    let run = runtime()?.block_on(async {
        let cancel = cancel_on_signals(ONCE_MORE)?;
        let target = resolve_host(&args.to).await?;
        let endpoint = Arc::new(Endpoint::client(
            &identity,
            trust,
            &transport_config(&args.link),
        )?);
        let _control = Control::start(&state_dir, session, endpoint.clone())?;
        let (progress, shown) = watch::channel(None);
        let view = SourceView::start(shown, args.output.quiet, args.mode);
        let job = SourceJob {
            guest,
            endpoint: endpoint.clone(),
            target,
            config,
            state_dir,
            level: args.level,
        };
        let run = source::run(job, cancel, progress).await;
        view.finish().await;
        let known = matches!(&run, Ok(run) if matches!(run.outcome, SourceOutcome::Moved));
        leave(&endpoint, known).await;
        run.context("nothing was moved; the guest was not touched")
    })?;
    if let Some(costs) = run.learned {
        if let Some(link) = &run.report.link {
            let seen = LinkSeen {
                bandwidth: link.bandwidth,
                rtt: link.min_rtt_ms / 1e3,
                loss: link.loss,
                unix: run.report.started_unix,
            };
            remembered.learn(&kind, costs, &args.to, seen);
        }
        if let Err(error) = remembered.keep(&costs_in) {
            tracing::warn!("what this migration cost cannot be kept: {error}");
        }
    }
    write_report(&run.report, &args.output)?;
    if args.output.json.as_deref() != Some(Path::new("-")) {
        print!("{}", show::source(&run.outcome, &run.report));
    }
    Ok(source_code(&run.outcome))
}

/// Attaches to the guest that the operator means. It must run: what stands still may have been handed over already,
/// and the end of tracking lets a guest run. (Of a QEMU the preflight sees to that.)
pub fn open(args: &SourceGuestArgs, disks: DiskChoice) -> anyhow::Result<Arc<dyn SourceGuest>> {
    #[cfg(feature = "xen")]
    if let Some(domain) = &args.xen {
        return Ok(Arc::new(hybridmig_engine::guest::xen::XenSource::open(
            domain, &disks,
        )?));
    }
    match (&args.qmp, &args.workload) {
        (Some(qmp), _) => Ok(Arc::new(QemuSource::open(
            qmp,
            &QemuSourceOptions {
                disks,
                ..QemuSourceOptions::default()
            },
        )?)),
        (_, Some(control)) => {
            let guest = WorkloadSource::attach(control)?;
            let standing = guest.describe_guest()?.standing;
            if standing != Standing::Running {
                bail!(
                    "the guest at {} does not run ({standing:?}); `hybridmig resolve` tells whether it was handed over",
                    control.display()
                );
            }
            Ok(Arc::new(guest))
        }
        (None, None) => unreachable!("clap wants one of them"),
    }
}

/// Which blocks a profile says are hot, by this guest's regions.
fn known_heat(
    profile: &Profile,
    guest: &dyn SourceGuest,
    path: &Path,
) -> anyhow::Result<Vec<(RegionId, Vec<HeatRun>)>> {
    let mut known = Vec::new();
    for info in guest.regions() {
        let of = |region: &&RegionProfile| region.name == info.name && region.kind == info.kind;
        let Some(region) = profile.regions.iter().find(of) else {
            continue;
        };
        if (region.blocks, region.block_size) != (info.blocks, info.block_size) {
            bail!(
                "{}: its region {} has {} blocks of {} bytes, the guest's has {} of {}: it is of another guest",
                path.display(),
                region.name,
                region.blocks,
                region.block_size,
                info.blocks,
                info.block_size
            );
        }
        known.push((info.id, region.heat.clone()));
    }
    if known.is_empty() {
        bail!("{}: none of its regions is this guest's", path.display());
    }
    Ok(known)
}

/// A new random session.
pub fn new_session() -> anyhow::Result<SessionId> {
    let mut id = [0; 8];
    let mut random = std::fs::File::open("/dev/urandom").context("cannot open /dev/urandom")?;
    std::io::Read::read_exact(&mut random, &mut id).context("cannot read /dev/urandom")?;
    Ok(SessionId(id))
}
