//! `hybridmig netem`: the emulated WAN as a tool of its own.

mod check;
mod enter;
mod run;

use std::net::Ipv4Addr;
use std::process::ExitCode;

use anyhow::{Context, bail};
use hybridmig_netem::ladder::LADDER;
use hybridmig_netem::namespace::NamedNamespace;
use hybridmig_netem::spec::Stage;
use hybridmig_netem::tc::{TcHandle, TcLink, stage_commands};
use hybridmig_netem::{LinkSpec, LinkStats, Namespace, TunConfig, TunHandle, TunLink};
use serde_json::json;

use crate::cli::{NetemCommand, NetemShowArgs, RunnerArg};
use crate::units::show_time;

/// Runs one of its subcommands.
pub fn run(command: NetemCommand) -> anyhow::Result<ExitCode> {
    match command {
        NetemCommand::List { json } => list(json),
        NetemCommand::Show(args) => show(&args),
        NetemCommand::Check(args) => check::run(&args),
        NetemCommand::Run(args) => run::run(args),
        NetemCommand::Enter(args) => enter::run(&args),
    }
}

/// A link between two namespaces, whatever carries it.
enum NetemLink {
    Tun(TunHandle),
    Tc(TcHandle),
}

impl NetemLink {
    fn start(link: &LinkSpec, runner: RunnerArg, seed: u64) -> anyhow::Result<Self> {
        Ok(match runner {
            RunnerArg::Tun => Self::Tun(TunLink::start(TunConfig::new(link.clone(), seed))?),
            RunnerArg::Tc => Self::Tc(TcLink::start(link)?),
            RunnerArg::Relay => bail!(
                "the relay has no namespaces; start it with `hybridmig relay`, or use --runner tun"
            ),
        })
    }

    fn near(&self) -> &Namespace {
        match self {
            Self::Tun(handle) => handle.near(),
            Self::Tc(handle) => handle.near(),
        }
    }

    fn far(&self) -> &Namespace {
        match self {
            Self::Tun(handle) => handle.far(),
            Self::Tc(handle) => handle.far(),
        }
    }

    fn near_address(&self) -> Ipv4Addr {
        match self {
            Self::Tun(handle) => handle.near_address(),
            Self::Tc(handle) => handle.near_address(),
        }
    }

    fn far_address(&self) -> Ipv4Addr {
        match self {
            Self::Tun(handle) => handle.far_address(),
            Self::Tc(handle) => handle.far_address(),
        }
    }

    /// What has happened; the kernel's netem does not say.
    fn stats(&self) -> Option<LinkStats> {
        match self {
            Self::Tun(handle) => Some(handle.stats()),
            Self::Tc(_) => None,
        }
    }
}

fn list(json: bool) -> anyhow::Result<ExitCode> {
    if json {
        let rungs: Vec<_> = LADDER
            .iter()
            .map(|rung| json!({ "name": rung.name, "link": rung.link, "about": rung.about }))
            .collect();
        println!("{}", serde_json::to_string_pretty(&rungs)?);
        return Ok(ExitCode::SUCCESS);
    }
    for rung in LADDER {
        println!("{:14} {}", rung.name, rung.link);
        println!("{:14} {}\n", "", rung.about);
    }
    Ok(ExitCode::SUCCESS)
}

fn show(args: &NetemShowArgs) -> anyhow::Result<ExitCode> {
    let link = &args.link;
    let tc = |back| -> anyhow::Result<Vec<(Stage, Vec<String>)>> {
        let stages = link.stages(back).into_iter().enumerate();
        let commands = stages.map(|(index, stage)| {
            let commands = stage_commands(&args.device, &stage, index == 0)?;
            let lines = commands.iter().map(|words| words.join(" ")).collect();
            Ok((stage, lines))
        });
        commands.collect()
    };
    let (forward, back) = (tc(false), tc(true));
    if args.json {
        let direction = |back: bool, tc: &anyhow::Result<Vec<(Stage, Vec<String>)>>| {
            let spec = if back { &link.back } else { &link.forward };
            json!({
                "settings": spec.to_string(),
                "delay_s": spec.delay.as_secs_f64(),
                "rate_bits": spec.rate,
                "mean_loss": spec.loss.mean(),
                "queue_s": spec.queue().map(|queue| queue.as_secs_f64()),
                "tc": tc.as_ref().ok().map(|stages| stages
                    .iter()
                    .map(|(stage, lines)| json!({
                        "at_s": stage.from.as_secs_f64(),
                        "commands": lines,
                    }))
                    .collect::<Vec<_>>()),
            })
        };
        let shown = json!({
            "link": link,
            "rtt_s": link.rtt().as_secs_f64(),
            "forward": direction(false, &forward),
            "back": direction(true, &back),
        });
        println!("{}", serde_json::to_string_pretty(&shown)?);
        return Ok(ExitCode::SUCCESS);
    }
    println!("{link}\nRTT without a queue: {}", show_time(link.rtt()));
    for (name, spec, tc) in [
        ("forward", &link.forward, forward),
        ("back", &link.back, back),
    ] {
        println!(
            "\n{name}: mean loss {:.4} %, queue {}",
            spec.loss.mean() * 100.0,
            spec.queue().map_or("in packets".to_owned(), show_time)
        );
        let tc = match tc {
            Ok(tc) => tc,
            Err(error) => {
                println!("  the kernel's netem cannot do it: {error:#}");
                continue;
            }
        };
        for (stage, lines) in tc {
            if !stage.from.is_zero() {
                println!("  # {} later", show_time(stage.from));
            }
            for line in lines {
                println!("  {line}");
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Names for both ends, which go with the value.
fn name_ends(link: &NetemLink, name: &str) -> anyhow::Result<[NamedNamespace; 2]> {
    let near = link.near().name(&format!("{name}-near"));
    let far = link.far().name(&format!("{name}-far"));
    Ok([
        near.context("cannot name the near end")?,
        far.context("cannot name the far end")?,
    ])
}
