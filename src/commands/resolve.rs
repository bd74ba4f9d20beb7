//! `hybridmig resolve`: what the journals of this host know of sessions, and, at the source, an
//! operator's decision to run a frozen guest again.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, bail};
use hybridmig_engine::driver::kept::KeptSession;
use hybridmig_engine::guest::SourceGuest;
use hybridmig_engine::guest::qemu::disk::DiskChoice;
use hybridmig_engine::guest::qemu::{QemuSource, QemuSourceOptions};
use hybridmig_engine::guest::workload::WorkloadSource;
use hybridmig_engine::journal::{self, Journal, Owner, Record, Recorded, Side};
use hybridmig_engine::session::io::{DestinationRecord, SourceRecord};
use hybridmig_transport::message::SessionId;

use super::state_dir;
use crate::cli::ResolveArgs;
use crate::units::show_time;

/// Shows, or decides.
pub fn run(args: ResolveArgs) -> anyhow::Result<ExitCode> {
    let directory = state_dir(args.state_dir.as_deref())?;
    if args.run_here {
        return match args.session {
            Some(session) => run_here(&args, &directory, session),
            None => run_unoffered(&args, &directory),
        };
    }
    let mut shown = 0;
    for (session, side, path) in journal::list(&directory)? {
        if args.session.is_some_and(|wanted| wanted != session) {
            continue;
        }
        let settled = match side {
            Side::Source => show_source(&path, session, args.session.is_some())?,
            Side::Destination => show_destination(&path, session, args.session.is_some())?,
        };
        shown += u32::from(!settled || args.session.is_some());
    }
    match (shown, args.session) {
        (0, Some(session)) => println!(
            "{}: no journal of session {session}: this host never gave that guest away, and never \
             accepted it",
            directory.display()
        ),
        (0, None) => println!("{}: every session is settled", directory.display()),
        _ => {}
    }
    Ok(ExitCode::SUCCESS)
}

/// Prints what a source's journal says; true if nothing is left to decide.
fn show_source(path: &Path, session: SessionId, always: bool) -> anyhow::Result<bool> {
    let recorded = Journal::<SourceRecord>::read(path)?;
    let records: Vec<SourceRecord> = recorded
        .records
        .iter()
        .map(|(_, record)| record.clone())
        .collect();
    let settled = matches!(
        recorded.last(),
        None | Some(SourceRecord::Released | SourceRecord::Declined { .. })
    );
    if settled && !always {
        return Ok(true);
    }
    show_records(&recorded, session, "source");
    println!(
        "  {}",
        match (journal::owner(Some(&records), None), settled) {
            (Owner::Source, _) => "the guest is this host's; it may run here".to_owned(),
            (Owner::Destination, true) => "the guest is the destination's, whole".to_owned(),
            (Owner::Destination, false) =>
                "the guest is the destination's. Blocks may be only here: keep \
                 the frozen guest until the destination says that it is complete"
                    .to_owned(),
            (Owner::Undecided, _) => format!(
                "IN DOUBT: ownership was sent and no answer is recorded. Run `hybridmig resolve \
                 {session}` at the destination. If it says that it never accepted, or that host is \
                 off for good: hybridmig resolve {session} --run-here --it-does-not-run-there \
                 --qmp SOCKET (or --workload SOCKET, --xen DOMAIN). If the guest runs there, running it here \
                 too would corrupt what both write to"
            ),
        }
    );
    Ok(settled)
}

fn show_destination(path: &Path, session: SessionId, always: bool) -> anyhow::Result<bool> {
    let recorded = Journal::<DestinationRecord>::read(path)?;
    let last = recorded.last();
    let settled = !matches!(last, Some(DestinationRecord::Accepted { .. }));
    if settled && !always {
        return Ok(true);
    }
    show_records(&recorded, session, "destination");
    println!(
        "  {}",
        match last {
            None | Some(DestinationRecord::Declined { .. }) =>
                "the guest never ran here and never will in this session: the source may run it",
            Some(DestinationRecord::Accepted { .. }) =>
                "the guest is this host's. Some of its blocks may be only at the source: do not end \
                 the source's frozen guest, and do not run it",
            Some(DestinationRecord::Complete) => "the guest is this host's, whole",
        }
    );
    if !settled && let Some(kept) = kept_by(path, session) {
        println!(
            "  if its process has ended, the guest waits for what is missing; go on with: hybridmig \
             recv --take-over {} --listen ADDR:PORT (where it listened before: the source dials again)",
            kept.display()
        );
    }
    Ok(settled)
}

/// The folder beside the journal that a destination of this session has left.
fn kept_by(journal: &Path, session: SessionId) -> Option<PathBuf> {
    let folders = std::fs::read_dir(journal.parent()?).ok()?;
    folders
        .filter_map(|entry| Some(entry.ok()?.path()))
        .find(|folder| KeptSession::read(folder).is_ok_and(|kept| kept.session() == Ok(session)))
}

fn show_records<R: Record + std::fmt::Debug>(
    recorded: &Recorded<R>,
    session: SessionId,
    side: &str,
) {
    println!("session {session}, {side} ({})", recorded.path.display());
    if let Some(context) = &recorded.context {
        println!(
            "  guest {}, other side {}, written by {}",
            context.guest, context.peer, context.software
        );
    }
    for (at_ms, record) in &recorded.records {
        let age = UNIX_EPOCH
            .checked_add(Duration::from_millis(*at_ms))
            .and_then(|at| SystemTime::now().duration_since(at).ok())
            .unwrap_or_default();
        println!("  {} ago: {record:?}", show_time(age));
    }
    if recorded.torn {
        println!("  its last line was torn by a crash and counts for nothing");
    }
}

/// Runs a guest that was left frozen at its source.
fn run_here(args: &ResolveArgs, directory: &Path, session: SessionId) -> anyhow::Result<ExitCode> {
    let path = journal::path(directory, session, Side::Source);
    let (mut journal, recorded) = Journal::<SourceRecord>::open(&path)?;
    let records: Vec<SourceRecord> = recorded
        .records
        .iter()
        .map(|(_, record)| record.clone())
        .collect();
    match journal::owner(Some(&records), None) {
        Owner::Destination => bail!(
            "the destination has accepted the guest of session {session}: it must not run here"
        ),
        Owner::Source => {}
        Owner::Undecided if !args.it_does_not_run_there => bail!(
            "it is not known whether the guest of session {session} runs at the destination: ask \
             `hybridmig resolve {session}` there, then add --it-does-not-run-there"
        ),
        Owner::Undecided => {
            // Durable before the guest runs, like every decision about it.
            journal.append(&SourceRecord::Declined {
                reason: "an operator has decided that the guest runs at the source".to_owned(),
            })?;
        }
    }
    frozen_guest(args)?
        .thaw()
        .context("the guest could not be started; the decision is recorded")?;
    println!("the guest of session {session} runs here");
    Ok(ExitCode::SUCCESS)
}

/// Runs a guest that a sender left frozen which ended before it offered the guest to anybody, and so left no journal.
/// For Xen domains: a process that holds a QEMU or an embedded guest frozen is asked by other means.
fn run_unoffered(args: &ResolveArgs, directory: &Path) -> anyhow::Result<ExitCode> {
    if args.guest.qmp.is_some() || args.guest.workload.is_some() {
        bail!("--run-here needs the session: `hybridmig resolve` lists those that are not settled");
    }
    // It holds the domain: no sender is at work on it any more.
    let guest = frozen_guest(args)?;
    let name = &guest.describe().name;
    for (session, side, path) in journal::list(directory)? {
        if side != Side::Source {
            continue;
        }
        let recorded = Journal::<SourceRecord>::read(&path)?;
        let open = matches!(
            recorded.last(),
            Some(SourceRecord::HandoverOffered { .. } | SourceRecord::Accepted)
        );
        if open
            && recorded
                .context
                .is_none_or(|context| context.guest == *name)
        {
            bail!(
                "session {session} has offered '{name}' to another host: see `hybridmig resolve {session}`"
            );
        }
    }
    if !args.it_does_not_run_there {
        bail!(
            "no session in {} has offered '{name}' to another host. If that is the state directory of the `send` that \
             was killed, and '{name}' runs nowhere else, add --it-does-not-run-there",
            directory.display()
        );
    }
    guest.thaw()?;
    println!("'{name}' runs here");
    Ok(ExitCode::SUCCESS)
}

/// The guest that was left frozen.
fn frozen_guest(args: &ResolveArgs) -> anyhow::Result<Box<dyn SourceGuest>> {
    #[cfg(feature = "xen")]
    if let Some(domain) = &args.guest.xen {
        use hybridmig_engine::guest::xen::XenSource;
        return Ok(Box::new(XenSource::left_suspended(domain)?));
    }
    Ok(match (&args.guest.qmp, &args.guest.workload) {
        (Some(socket), _) => {
            // Nothing is to move any more, and nothing about disks may stand in the way.
            let options = QemuSourceOptions {
                disks: DiskChoice::none(),
                ..QemuSourceOptions::default()
            };
            Box::new(QemuSource::open(socket, &options)?)
        }
        (_, Some(control)) => Box::new(WorkloadSource::attach(control)?),
        (None, None) => unreachable!("clap wants one of them with --run-here"),
    })
}
