//! `hybridmig profile`: how a guest uses its memory and its disks.

use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use hybridmig_engine::guest::SourceGuest;
use hybridmig_engine::profile::file::{self, Saved};
use hybridmig_engine::profile::{Profile, collect};

use super::send::open;
use super::{cancel_on_signals, runtime, write_text};
use crate::cli::{ProfileArgs, SourceGuestArgs};
use crate::show_profile;

/// Watches the guest, or loads what was saved; shows it and saves it.
pub fn run(args: ProfileArgs) -> anyhow::Result<ExitCode> {
    let saved = if let Some(path) = &args.of.load {
        file::load(path)?
    } else {
        let named = SourceGuestArgs {
            qmp: args.of.qmp.clone(),
            workload: args.of.workload.clone(),
            #[cfg(feature = "xen")]
            xen: args.of.xen.clone(),
        };
        let guest = open(&named, args.disks.choice())?;
        watch_all(&*guest, args.seconds, false)?
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
