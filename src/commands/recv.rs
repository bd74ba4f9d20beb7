//! `hybridmig recv`.

use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Context;
use hybridmig_engine::driver::destination::{self, DestinationJob, Waiting};
use hybridmig_engine::guest::DestinationGuest;
use hybridmig_engine::guest::qemu::{QemuDestination, QemuDestinationOptions, QemuOrigin};
use hybridmig_engine::guest::workload::{Launch, WorkloadDestination};
use hybridmig_engine::session::destination::DestinationConfig;
use hybridmig_engine::session::io::DestinationOutcome;
use hybridmig_pager::PlacerConfig;
use hybridmig_transport::endpoint::Endpoint;
use tokio::sync::watch;

use super::{
    ONCE_MORE, cancel_on_signals, destination_code, identity_and_trust, leave, runtime, state_dir,
    transport_config, write_report,
};
use crate::cli::{DestinationGuestArgs, RecvArgs};
use crate::progress::DestinationView;
use crate::show;

/// Waits for a guest and takes it.
pub fn run(args: RecvArgs) -> anyhow::Result<ExitCode> {
    let (identity, trust) = identity_and_trust(&args.trust)?;
    let fingerprint = identity.fingerprint();
    let state_dir = state_dir(args.output.state_dir.as_deref())?;
    // What another process would take the guest over by; goes away unless this one is killed.
    let kept = tempfile::Builder::new()
        .prefix("pager-")
        .tempdir_in(&state_dir)
        .with_context(|| format!("cannot write to {}", state_dir.display()))?;
    let guest = open(&args.guest, kept.path())?;
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
        let job = DestinationJob {
            guest,
            endpoint: endpoint.clone(),
            config,
            state_dir,
            verify: args.verify,
        };
        let run = destination::run(job, cancel, progress).await;
        view.finish().await;
        let known = matches!(&run, Ok(run) if matches!(run.outcome, DestinationOutcome::Moved));
        leave(&endpoint, known).await;
        run.context("no guest came")
    })?;
    write_report(&run.report, &args.output)?;
    if args.output.json.as_deref() != Some(Path::new("-")) {
        print!("{}", show::destination(&run.outcome, &run.report));
    }
    if matches!(run.outcome, DestinationOutcome::Incomplete { .. }) {
        let kept = kept.keep();
        eprintln!("{}: what a pager that takes over needs", kept.display());
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

fn open(args: &DestinationGuestArgs, kept: &Path) -> anyhow::Result<Arc<dyn DestinationGuest>> {
    let origin = match (&args.qmp, &args.exec, &args.workload) {
        (Some(qmp), _, _) => QemuOrigin::Waiting(qmp.clone()),
        (_, Some(command), _) => QemuOrigin::Exec(command.clone()),
        (_, _, Some(control)) => {
            let launch = Launch::Start {
                program: std::env::current_exe().context("cannot find this program's file")?,
                args: vec!["guest".into()],
                control: control.clone(),
            };
            return Ok(Arc::new(WorkloadDestination::new(
                launch,
                PlacerConfig::default(),
            )));
        }
        (None, None, None) => unreachable!("clap wants one of the three"),
    };
    let options = QemuDestinationOptions {
        origin,
        keep_in: Some(kept.to_owned()),
    };
    Ok(Arc::new(QemuDestination::new(options)))
}
