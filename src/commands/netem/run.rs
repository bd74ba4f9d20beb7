//! `hybridmig netem run`: a command at the near end of an emulated link, its twin at the far end.

use std::io::IsTerminal;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Command, ExitCode, ExitStatus};
use std::time::Duration;

use anyhow::Context;
use hybridmig_netem::namespace::remove_stale;
use hybridmig_netem::{LinkStats, Namespace};
use nix::sys::prctl;
use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::Pid;
use tokio::process::Child;
use tokio::signal::unix::{SignalKind, signal};

use super::enter::command;
use super::{NetemLink, name_ends};
use crate::cli::NetemRunArgs;
use crate::commands::show_traffic;

/// Paths of the two namespaces, in the environment of the command.
pub const NEAR: &str = "HYBRIDMIG_NETEM_NEAR";
pub const FAR: &str = "HYBRIDMIG_NETEM_FAR";

/// How long the far command may take to end once it is told to.
const GRACE: Duration = Duration::from_secs(5);

/// Runs the command and removes everything afterwards.
pub fn run(args: NetemRunArgs) -> anyhow::Result<ExitCode> {
    // One thread: the kernel ties the children's lives to the thread that started them.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the async runtime")?;
    // Before there is anything that a signal could leave behind.
    let mut signals = runtime.block_on(async { Signals::new() })?;
    for name in remove_stale().context("what a killed run has left cannot be removed")? {
        eprintln!("removed {name}, which a killed run has left");
    }
    let link = NetemLink::start(&args.link, args.runner, args.seed)?;
    let names = match &args.name {
        Some(name) => Some(name_ends(&link, name)?),
        None => None,
    };
    if let Some(tcp) = &args.tcp {
        for (end, namespace) in [("near", link.near()), ("far", link.far())] {
            namespace
                .set_sysctl("net.ipv4.tcp_congestion_control", tcp)
                .with_context(|| {
                    format!(
                        "the {end} end cannot use '{tcp}' for TCP; the host must have it and allow it: \
                         modprobe tcp_{tcp}; sysctl -w \
                         net.ipv4.tcp_allowed_congestion_control=\"reno cubic {tcp}\""
                    )
                })?;
        }
    }
    eprintln!(
        "link: {}\nnear {}, far {}",
        args.link,
        link.near_address(),
        link.far_address()
    );
    if let Some([near, far]) = &names {
        eprintln!("namespaces {} and {}", near.name(), far.name());
    }
    let status = runtime.block_on(both(&args, &link, &mut signals))?;
    drop(names);
    let mut code = match (status.code(), status.signal()) {
        (Some(code), _) => u8::try_from(code).unwrap_or(1),
        // As shells say it.
        (None, Some(signal)) => 128u8.saturating_add(u8::try_from(signal).unwrap_or(0)),
        (None, None) => 1,
    };
    if let Some(stats) = link.stats() {
        show(&stats, args.link.rtt());
        if let Some(path) = &args.json {
            write(&stats, path)?;
        }
        if args.strict && code == 0 && stats.invalid(args.link.rtt()).is_some() {
            code = 1;
        }
    }
    Ok(code.into())
}

/// Runs both ends until the near one ends.
async fn both(
    args: &NetemRunArgs,
    link: &NetemLink,
    signals: &mut Signals,
) -> anyhow::Result<ExitStatus> {
    let mut far = match &args.far {
        Some(line) => {
            let mut words = Command::new("/bin/sh");
            // A group of its own, so that all of it can be ended.
            words.args(["-c", line]).process_group(0);
            Some(start(words, link.far(), link, "the far command")?)
        }
        None => None,
    };
    let mut near = start(
        command(&args.command),
        link.near(),
        link,
        "the near command",
    )?;
    let status = loop {
        let heard = tokio::select! {
            status = near.wait() => break status.context("the near command cannot be waited for"),
            signal = signals.next() => signal,
        };
        if let Some(pid) = near.id() {
            // It may have ended this very moment; then the next wait says so.
            let _ = kill(Pid::from_raw(pid.cast_signed()), heard);
        }
    };
    if let Some(far) = &mut far {
        end(far).await?;
    }
    status
}

/// The signals that the near command is to hear.
struct Signals {
    interrupt: tokio::signal::unix::Signal,
    quit: tokio::signal::unix::Signal,
    terminate: tokio::signal::unix::Signal,
    hangup: tokio::signal::unix::Signal,
    /// At a terminal the command hears the keys itself.
    keys: bool,
}

impl Signals {
    fn new() -> anyhow::Result<Self> {
        let listen = |kind| signal(kind).context("cannot listen for signals");
        Ok(Self {
            interrupt: listen(SignalKind::interrupt())?,
            quit: listen(SignalKind::quit())?,
            terminate: listen(SignalKind::terminate())?,
            hangup: listen(SignalKind::hangup())?,
            keys: std::io::stdin().is_terminal(),
        })
    }

    /// The next that has to be passed on.
    async fn next(&mut self) -> Signal {
        loop {
            tokio::select! {
                _ = self.interrupt.recv() => if !self.keys { return Signal::SIGINT },
                _ = self.quit.recv() => if !self.keys { return Signal::SIGQUIT },
                _ = self.terminate.recv() => return Signal::SIGTERM,
                _ = self.hangup.recv() => return Signal::SIGHUP,
            }
        }
    }
}

/// Starts a command at one end; the kernel ends it should this process be killed.
fn start(
    mut command: Command,
    namespace: &Namespace,
    link: &NetemLink,
    what: &str,
) -> anyhow::Result<Child> {
    command
        .env(NEAR, link.near().path())
        .env(FAR, link.far().path())
        .env("HYBRIDMIG_NEAR_ADDRESS", link.near_address().to_string())
        .env("HYBRIDMIG_FAR_ADDRESS", link.far_address().to_string());
    namespace.enter(&mut command);
    // SAFETY: prctl is async-signal-safe and the closure allocates nothing.
    unsafe {
        command.pre_exec(|| Ok(prctl::set_pdeathsig(Signal::SIGTERM)?));
    }
    let program = command.get_program().to_owned();
    tokio::process::Command::from(command)
        .spawn()
        .with_context(|| format!("cannot start {what}, {}", program.display()))
}

/// Ends the far command and all of its group.
async fn end(far: &mut Child) -> anyhow::Result<()> {
    let Some(pid) = far.id() else {
        return Ok(());
    };
    let group = Pid::from_raw(pid.cast_signed());
    // A group that is gone is what is wanted.
    let _ = killpg(group, Signal::SIGTERM);
    let waited = tokio::time::timeout(GRACE, far.wait()).await;
    let _ = killpg(group, Signal::SIGKILL);
    if waited.is_err() {
        far.wait()
            .await
            .context("the far command cannot be waited for")?;
    }
    Ok(())
}

fn show(stats: &LinkStats, rtt: Duration) {
    show_traffic(["near → far", "far → near"], stats);
    if let Some(why) = stats.invalid(rtt) {
        eprintln!("this run is not valid as a measurement: {why}");
    }
}

fn write(stats: &LinkStats, path: &Path) -> anyhow::Result<()> {
    let mut text = serde_json::to_string_pretty(stats)?;
    text.push('\n');
    std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}
