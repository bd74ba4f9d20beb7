//! `hybridmig recv`.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

use anyhow::Context;
use hybridmig_engine::blocks::Blocks;
use hybridmig_engine::driver::destination::{self, DestinationJob, Waiting};
use hybridmig_engine::driver::take_over::{self, TakeOverJob, TakenOver};
use hybridmig_engine::guest::qemu::{QemuDestination, QemuDestinationOptions, QemuOrigin};
use hybridmig_engine::guest::workload::{Launch, WorkloadDestination};
use hybridmig_engine::guest::{DestinationGuest, FaultSink, GuestResult};
use hybridmig_engine::seeds::{MAX_SEED_BLOCKS, SEED_BLOCK, Seeds};
use hybridmig_engine::session::destination::DestinationConfig;
use hybridmig_engine::session::io::DestinationOutcome;
use hybridmig_pager::PlacerConfig;
use hybridmig_transport::endpoint::Endpoint;
use tempfile::TempDir;
use tokio::sync::watch;

use super::{
    ONCE_MORE, cancel_on_signals, destination_code, identity_and_trust, leave, runtime, state_dir,
    transport_config, write_report,
};
use crate::cli::RecvArgs;
use crate::progress::{DestinationView, SeedView};
use crate::show;
use crate::units::{show_bytes, show_time};

/// Waits for a guest and takes it.
pub fn run(args: RecvArgs) -> anyhow::Result<ExitCode> {
    let (identity, trust) = identity_and_trust(&args.trust)?;
    let fingerprint = identity.fingerprint();
    let seeds = read_seeds(&args.seed, args.output.quiet)?;
    let state_dir = state_dir(args.output.state_dir.as_deref())?;
    let kept = Kept::new(args.guest.take_over.as_deref(), &state_dir)?;
    let config = DestinationConfig {
        patience: args.link.patience,
        linger: args.link.patience.min(DestinationConfig::default().linger),
        ..DestinationConfig::default()
    };
    let run = runtime()?.block_on(async {
        let cancel = cancel_on_signals(ONCE_MORE)?;
        let config_of_link = transport_config(&args.link);
        let endpoint = Arc::new(Endpoint::server(
            args.listen,
            &identity,
            trust,
            &config_of_link,
        )?);
        let address = endpoint.local_addr()?;
        // A line that scripts can wait for.
        eprintln!("listening on {address} as {fingerprint}");
        let (progress, shown) = watch::channel(Waiting::Listening);
        let view = DestinationView::start(shown, args.output.quiet);
        let run = if args.guest.take_over.is_some() {
            let job = TakeOverJob {
                endpoint: endpoint.clone(),
                config,
                state_dir,
                keep_in: kept.path().to_owned(),
                verify: args.verify,
            };
            let run = take_over::take_over(
                job,
                |faults, note| adopt(&kept, faults, note),
                cancel,
                progress,
            );
            run.await.context("the guest waits as before")
        } else {
            let job = DestinationJob {
                guest: open(&args, kept.path())?,
                endpoint: endpoint.clone(),
                config,
                state_dir,
                keep_in: Some(kept.path().to_owned()),
                verify: args.verify,
                seeds: seeds.map(Arc::new),
            };
            let run = destination::run(job, cancel, progress).await;
            run.context("no guest came")
        };
        view.finish().await;
        let known = matches!(&run, Ok(run) if matches!(run.outcome, DestinationOutcome::Moved));
        leave(&endpoint, known).await;
        run
    })?;
    write_report(&run.report, &args.output)?;
    if args.output.json.as_deref() != Some(Path::new("-")) {
        print!("{}", show::destination(&run.outcome, &run.report));
    }
    let done = !matches!(
        run.outcome,
        DestinationOutcome::Incomplete { .. } | DestinationOutcome::Failed { .. }
    );
    if done {
        kept.remove()?;
    } else if matches!(run.outcome, DestinationOutcome::Incomplete { .. }) {
        let kept = kept.keep();
        eprintln!(
            "the guest waits for what is missing; go on with: hybridmig recv --take-over {}",
            kept.display()
        );
    }
    let wrong = run
        .report
        .verified
        .as_ref()
        .is_some_and(|verified| !verified.ok);
    Ok(if wrong {
        ExitCode::FAILURE
    } else {
        destination_code(&run.outcome)
    })
}

/// The folder of what another process would take the guest over by.
enum Kept {
    /// Goes away unless this process is killed.
    Own(TempDir),
    /// Another process has left it; goes away when nothing is missing any more.
    Left(PathBuf),
}

impl Kept {
    fn new(left: Option<&Path>, state_dir: &Path) -> anyhow::Result<Self> {
        if let Some(left) = left {
            return Ok(Self::Left(left.to_owned()));
        }
        let own = tempfile::Builder::new()
            .prefix("pager-")
            .tempdir_in(state_dir)
            .with_context(|| format!("cannot write to {}", state_dir.display()))?;
        Ok(Self::Own(own))
    }

    fn path(&self) -> &Path {
        match self {
            Self::Own(folder) => folder.path(),
            Self::Left(folder) => folder,
        }
    }

    fn keep(self) -> PathBuf {
        match self {
            Self::Own(folder) => folder.keep(),
            Self::Left(folder) => folder,
        }
    }

    fn remove(self) -> anyhow::Result<()> {
        let path = self.path().to_owned();
        match self {
            Self::Own(folder) => folder.close(),
            Self::Left(folder) => std::fs::remove_dir_all(folder),
        }
        .with_context(|| format!("cannot remove {}", path.display()))
    }
}

/// Replaces the pager of a guest whose process was killed.
fn adopt(
    kept: &Kept,
    faults: Arc<dyn FaultSink>,
    note: &dyn Fn(&Blocks) -> GuestResult<()>,
) -> GuestResult<TakenOver> {
    let folder = kept.path();
    if WorkloadDestination::is_kept_in(folder) {
        let config = PlacerConfig::default();
        let (guest, missing) = WorkloadDestination::adopt_kept(folder, config, faults, note)?;
        return Ok(TakenOver {
            guest: Arc::new(guest),
            missing,
        });
    }
    #[cfg(feature = "xen")]
    if hybridmig_engine::guest::xen::XenDestination::is_kept_in(folder) {
        use hybridmig_engine::guest::xen::XenDestination;
        let (guest, missing) = XenDestination::adopt(folder, faults, note)?;
        return Ok(TakenOver {
            guest: Arc::new(guest),
            missing,
        });
    }
    let (guest, missing) = QemuDestination::adopt(folder, faults, note)?;
    Ok(TakenOver {
        guest: Arc::new(guest),
        missing,
    })
}

/// Reads the seeds, where there are any; what came of it is said on standard error.
fn read_seeds(files: &[PathBuf], quiet: bool) -> anyhow::Result<Option<Seeds>> {
    if files.is_empty() {
        return Ok(None);
    }
    let began = Instant::now();
    let view = SeedView::start(quiet);
    let seeds = Seeds::read(files, SEED_BLOCK, &|progress| view.show(progress))?;
    view.finish();
    let size = show_bytes(u64::from(SEED_BLOCK));
    if seeds.cut_off() {
        eprintln!(
            "warning: the seeds have more than {MAX_SEED_BLOCKS} blocks of {size}; those beyond are \
             not used: name the files that matter most first"
        );
    }
    if !quiet {
        let held = show_bytes(seeds.len() as u64 * u64::from(SEED_BLOCK));
        eprintln!(
            "seeds: {} blocks of {size} ({held}) that need not be sent, read in {}",
            seeds.len(),
            show_time(began.elapsed())
        );
    }
    Ok(Some(seeds))
}

fn open(args: &RecvArgs, kept: &Path) -> anyhow::Result<Arc<dyn DestinationGuest>> {
    let guest = &args.guest;
    #[cfg(feature = "xen")]
    if guest.xen {
        let kept = Some(kept.to_owned());
        return Ok(Arc::new(hybridmig_engine::guest::xen::XenDestination::new(
            kept,
        )));
    }
    let origin = match (&guest.qmp, &guest.exec, &guest.workload) {
        (Some(qmp), _, _) => QemuOrigin::Waiting(qmp.clone()),
        (_, Some(command), _) => QemuOrigin::Exec(command.clone()),
        (_, _, Some(control)) => {
            let launch = Launch::Start {
                program: std::env::current_exe().context("cannot find this program's file")?,
                args: vec!["guest".into()],
                control: control.clone(),
                disk_dir: args.disk_dir.clone(),
            };
            let guest = WorkloadDestination::new(launch, PlacerConfig::default());
            return Ok(Arc::new(guest.keep_in(kept)));
        }
        (None, None, None) => {
            unreachable!("clap wants one of them, and one is taken over elsewhere")
        }
    };
    let options = QemuDestinationOptions {
        origin,
        keep_in: Some(kept.to_owned()),
        overwrite_disks: args.overwrite_disks,
    };
    Ok(Arc::new(QemuDestination::new(options)))
}
