//! `hybridmig check`: the preflight, without touching the guest.

use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Context;
use hybridmig_engine::driver;
use hybridmig_engine::driver::source::{self, SourceJob, SourceRun};
use hybridmig_engine::guest::SourceGuest;
use hybridmig_engine::guest::qemu::inspect;
use hybridmig_engine::guest::qemu::preflight::{Finding, Level, Side};
use hybridmig_engine::session::io::SourceOutcome;
use hybridmig_engine::session::source::SourceConfig;
use hybridmig_transport::TransportConfig;
use hybridmig_transport::endpoint::Endpoint;
use hybridmig_transport::message::Mode;
use tokio::sync::watch;

use super::send::{new_session, open};
use super::{ONCE_MORE, cancel_on_signals, exit, identity_and_trust, leave, resolve_host, runtime};
use crate::cli::{CheckArgs, TrustArgs};

/// Checks this side, and the other where one is named.
pub fn run(args: CheckArgs) -> anyhow::Result<ExitCode> {
    let mut findings = local(&args)?;
    let mut refused = findings
        .iter()
        .any(|finding| finding.level == Level::Refuse);
    if let Some(to) = &args.to
        && !refused
    {
        let there = remote(&args, to)?;
        refused = there.iter().any(|finding| finding.level == Level::Refuse);
        findings.extend(there);
    }
    if args.json {
        println!("{}", serde_json::to_string_pretty(&findings)?);
    } else {
        for finding in &findings {
            let word = match finding.level {
                Level::Ok => "ok",
                Level::Note => "note",
                Level::Refuse => "REFUSED",
            };
            println!("{word:>8}  {}", finding.text);
        }
        println!(
            "{}",
            if refused {
                "this guest cannot be moved like this"
            } else {
                "this guest can be moved"
            }
        );
    }
    Ok(if refused {
        exit::REFUSED.into()
    } else {
        ExitCode::SUCCESS
    })
}

fn local(args: &CheckArgs) -> anyhow::Result<Vec<Finding>> {
    if let Some(socket) = &args.guest.qmp {
        return Ok(inspect(socket, Side::Source, &args.disks.choice())?.findings);
    }
    #[cfg(feature = "xen")]
    if let Some(domain) = &args.guest.xen {
        let guest = hybridmig_engine::guest::xen::XenSource::open(domain, &args.disks.choice())?;
        return Ok(guest.findings().to_vec());
    }
    let guest = open(&args.guest, args.disks.choice())?;
    let facts = guest.describe();
    let text = format!(
        "{} guest {} answers on its control socket",
        facts.kind, facts.name
    );
    Ok(vec![Finding {
        level: Level::Ok,
        text,
    }])
}

/// Asks the destination, in its own words.
fn remote(args: &CheckArgs, to: &str) -> anyhow::Result<Vec<Finding>> {
    let guest = open(&args.guest, args.disks.choice())?;
    let outcome = ask(guest, &args.trust, to)?.outcome;
    let finding = |level, text: String| Finding { level, text };
    Ok(match outcome {
        SourceOutcome::Checked { notes } => std::iter::once(format!("{to} is reached and trusted"))
            .chain(notes)
            .map(|text| finding(Level::Ok, text))
            .collect(),
        SourceOutcome::Refused(refusal) => refusal
            .reasons
            .into_iter()
            .map(|text| finding(Level::Refuse, text))
            .collect(),
        other => vec![finding(
            Level::Refuse,
            format!("{to} did not finish the check: {other:?}"),
        )],
    })
}

/// Lets the `recv` that waits at `to` check a guest; nothing moves.
pub fn ask(guest: Arc<dyn SourceGuest>, trust: &TrustArgs, to: &str) -> anyhow::Result<SourceRun> {
    let (identity, trust) = identity_and_trust(trust)?;
    let config = SourceConfig {
        check_only: true,
        ..SourceConfig::new(new_session()?, Mode::Hybrid)
    };
    runtime()?.block_on(async {
        let cancel = cancel_on_signals(ONCE_MORE)?;
        let target = resolve_host(to).await?;
        let endpoint = Arc::new(Endpoint::client(
            &identity,
            trust,
            &TransportConfig::default(),
        )?);
        let job = SourceJob {
            guest,
            endpoint: endpoint.clone(),
            target,
            config,
            // A check writes no journal.
            state_dir: std::env::temp_dir(),
            level: driver::level::Level::default(),
        };
        let (progress, _) = watch::channel(None);
        let run = source::run(job, cancel, progress).await;
        let known = matches!(&run, Ok(run) if matches!(run.outcome, SourceOutcome::Checked { .. }));
        leave(&endpoint, known).await;
        run.with_context(|| format!("cannot ask {to}"))
    })
}
