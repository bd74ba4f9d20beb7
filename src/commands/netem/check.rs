//! `hybridmig netem check`: how exact the emulator is on this machine.

use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use hybridmig_netem::check::{Ends, Finding, Verdict, check, tcp_throughput};
use hybridmig_netem::runner::late;
use hybridmig_netem::{LinkSpec, LinkStats, Relay, RelayConfig};
use serde_json::json;

use super::NetemLink;
use crate::cli::{NetemCheckArgs, RunnerArg};
use crate::units::show_time;

/// What is checked when no link is named: each figure where it matters.
const LINKS: [&str; 6] = [
    "delay 10ms",
    "delay 50ms",
    "delay 25ms loss 1%",
    "delay 25ms loss gemodel 0.2525% 25%",
    "delay 25ms rate 100mbit",
    "delay 25ms rate 500mbit",
];

/// How often a link is checked anew when the machine was too busy to tell.
const ATTEMPTS: usize = 3;

/// How long TCP runs without a limit.
const TCP_TIME: Duration = Duration::from_secs(2);

/// Checks all links that are asked for.
pub fn run(args: &NetemCheckArgs) -> anyhow::Result<ExitCode> {
    let standard = args.link.is_empty();
    let links: Vec<LinkSpec> = if standard {
        let links = LINKS.iter().map(|link| link.parse());
        links.collect::<Result<_, _>>()?
    } else {
        args.link.clone()
    };
    let mut checked = Vec::new();
    for link in &links {
        show_head(args, &link.to_string());
        let (findings, stats) = until_valid(link.rtt(), || one(args, link))?;
        show(args, &findings, stats.as_ref(), link.rtt());
        checked.push((link.to_string(), findings, stats));
    }
    if standard && args.runner != RunnerArg::Relay {
        let link = LinkSpec::default();
        show_head(args, "no delay, no limit");
        let (findings, stats) = until_valid(link.rtt(), || tcp(args, &link))?;
        // Without a delay every packet is due at once: lateness says nothing here.
        show(args, &findings, None, link.rtt());
        checked.push((link.to_string(), findings, stats));
    }
    let passed = checked.iter().flat_map(|(_, findings, _)| findings);
    let passed = passed
        .clone()
        .all(|finding| finding.verdict == Verdict::Pass);
    if args.json {
        let links: Vec<_> = checked
            .iter()
            .map(|(link, findings, stats)| {
                json!({ "link": link, "findings": findings, "stats": stats })
            })
            .collect();
        let shown = json!({ "pass": passed, "links": links });
        println!("{}", serde_json::to_string_pretty(&shown)?);
    } else if passed {
        println!("pass: the emulator is exact on this machine");
    } else {
        println!("fail: see above; a machine with other work is the first suspect");
    }
    Ok(if passed {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

type Checked = (Vec<Finding>, Option<LinkStats>);

/// Checks again as long as the emulator, not the link, was measured.
fn until_valid(
    rtt: Duration,
    check: impl Fn() -> anyhow::Result<Checked>,
) -> anyhow::Result<Checked> {
    let mut attempt = 1;
    loop {
        let (mut findings, stats) = check()?;
        let late = stats.as_ref().and_then(|stats| stats.invalid(rtt));
        if let Some(why) = &late {
            for finding in &mut findings {
                finding.verdict = Verdict::Invalid;
                finding.note = format!("{}; {why}", finding.note);
            }
        }
        let invalid = findings
            .iter()
            .any(|finding| finding.verdict == Verdict::Invalid);
        if !invalid || attempt == ATTEMPTS {
            return Ok((findings, stats));
        }
        attempt += 1;
    }
}

fn one(args: &NetemCheckArgs, link: &LinkSpec) -> anyhow::Result<Checked> {
    // What holds at the start is checked; the timeline would change it meanwhile.
    let link = LinkSpec {
        changes: Vec::new(),
        ..link.clone()
    };
    if args.runner == RunnerArg::Relay {
        let far = UdpSocket::bind("127.0.0.1:0").context("no UDP socket")?;
        let relay = Relay::start(RelayConfig {
            listen: "127.0.0.1:0".parse()?,
            target: far.local_addr()?,
            link: link.clone(),
            seed: args.seed,
        })?;
        let near = UdpSocket::bind("127.0.0.1:0").context("no UDP socket")?;
        near.connect(relay.local_addr())?;
        let findings = check(&Ends { near, far }, &link).context("the link cannot be measured")?;
        return Ok((findings, Some(relay.stop())));
    }
    let running = NetemLink::start(&link, args.runner, args.seed)?;
    let far_address = SocketAddr::from((running.far_address(), 7));
    let far = running.far().run(|| UdpSocket::bind(far_address))?;
    let near_address = running.near_address();
    let near = running.near().run(|| UdpSocket::bind((near_address, 0)))?;
    let (near, far) = (near.context("no socket")?, far.context("no socket")?);
    near.connect(far_address)?;
    let findings = check(&Ends { near, far }, &link).context("the link cannot be measured")?;
    Ok((findings, running.stats()))
}

fn tcp(args: &NetemCheckArgs, link: &LinkSpec) -> anyhow::Result<Checked> {
    let running = NetemLink::start(link, args.runner, args.seed)?;
    let far_address = SocketAddr::from((running.far_address(), 7));
    let listener = running.far().run(|| TcpListener::bind(far_address))?;
    let listener = listener.context("no listening socket")?;
    let sender = running.near().run(|| TcpStream::connect(far_address))?;
    let sender = sender.context("no connection over the link")?;
    let (receiver, _) = listener.accept()?;
    let finding = tcp_throughput(&sender, &receiver, TCP_TIME)?;
    Ok((vec![finding], None))
}

fn show_head(args: &NetemCheckArgs, link: &str) {
    if !args.json {
        println!("{link}");
    }
}

fn show(args: &NetemCheckArgs, findings: &[Finding], stats: Option<&LinkStats>, rtt: Duration) {
    if args.json {
        return;
    }
    for finding in findings {
        let verdict = match finding.verdict {
            Verdict::Pass => "pass",
            Verdict::Fail => "FAIL",
            Verdict::Invalid => "invalid",
        };
        println!(
            "  {verdict:7} {:4} {:.3} {}, expected {:.3} ± {:.3}  ({})",
            finding.what,
            finding.seen,
            finding.unit,
            finding.expected,
            finding.tolerance,
            finding.note,
        );
    }
    if let Some(stats) = stats {
        let direction = &stats.forward;
        println!(
            "          emulator late by {} on average, {} at most; {:.2} % of the packets by more than {}",
            show_time(direction.lateness_mean()),
            show_time(direction.lateness_max),
            direction.late_share(rtt) * 100.0,
            show_time(late(rtt)),
        );
    }
}
