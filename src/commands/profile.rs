//! `hybridmig profile`: how a guest uses its memory and its disks.

use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use hybridmig_engine::guest::SourceGuest;
use hybridmig_engine::guest::qemu::{QemuSource, QemuSourceOptions};
use hybridmig_engine::guest::workload::WorkloadSource;
use hybridmig_engine::guest::workload::control::Standing;
use hybridmig_engine::profile::file::{self, Saved};
use hybridmig_engine::profile::{Profile, collect};

use super::{cancel_on_signals, runtime, write_text};
use crate::cli::ProfileArgs;
use crate::show_profile;

/// Watches the guest, or loads what was saved; shows it and saves it.
pub fn run(args: ProfileArgs) -> anyhow::Result<ExitCode> {
    let saved = match &args.of.load {
        Some(path) => file::load(path)?,
        None => watch_all(&*open(&args)?, args.seconds, false)?,
    };
    if let Some(path) = &args.json {
        write_text(&file::to_json(&saved)?, path)?;
    }
    if args.json.as_deref() != Some(Path::new("-")) {
        print!("{}", show_profile::profile(&saved));
    }
    Ok(ExitCode::SUCCESS)
}

/// A profile that was saved.
pub fn load(path: &Path) -> anyhow::Result<Profile> {
    Ok(file::load(path)?.profile)
}

/// Watches a running guest; `quiet` says nothing meanwhile.
pub fn watch(guest: &dyn SourceGuest, time: Duration, quiet: bool) -> anyhow::Result<Profile> {
    Ok(watch_all(guest, time, quiet)?.profile)
}

fn watch_all(guest: &dyn SourceGuest, time: Duration, quiet: bool) -> anyhow::Result<Saved> {
    let runtime = runtime()?;
    let _entered = runtime.enter();
    let cancel = cancel_on_signals("; what was seen so far has to do")?;
    if !quiet {
        let name = &guest.describe().name;
        eprintln!("watching {name} for {} s", time.as_secs_f64());
    }
    collect::collect(guest, time, &|| cancel.borrow().is_some())
        .context("the guest cannot be watched; it runs on as before")
}

/// The guest must run: a profile of one that stands still says nothing, and the end of tracking lets it run.
fn open(args: &ProfileArgs) -> anyhow::Result<Arc<dyn SourceGuest>> {
    match (&args.of.qmp, &args.of.workload) {
        (Some(qmp), _) => Ok(Arc::new(QemuSource::open(
            qmp,
            &QemuSourceOptions {
                disks: args.disks.choice(),
                ..QemuSourceOptions::default()
            },
        )?)),
        (_, Some(control)) => {
            let guest = WorkloadSource::attach(control)?;
            let standing = guest.describe_guest()?.standing;
            if standing != Standing::Running {
                bail!(
                    "the guest at {} does not run ({standing:?}): there is nothing to watch",
                    control.display()
                );
            }
            Ok(Arc::new(guest))
        }
        (None, None) => unreachable!("clap wants one of the three"),
    }
}
