//! `hybridmig netem` as clap sees it.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum, ValueHint};
use hybridmig_netem::LinkSpec;

/// `hybridmig netem`.
#[derive(Clone, Debug, Args)]
pub struct NetemArgs {
    /// List, show, check, run or enter.
    #[command(subcommand)]
    pub command: NetemCommand,
}

/// How a LINK is written, shown where one is asked for.
const LINKS: &str = "\
A LINK is a name that `hybridmig netem list` shows, words of tc-netem(8), or a name and words that change it:
  transatlantic
  'delay 50ms rate 200mbit loss 1% limit 50ms'
  'transpacific loss 2%; at 10s rate 50mbit; at 20s down; at 25s up'
  'delay 20ms; forward rate 10mbit; back rate 50mbit'
`delay` is one way, for each direction. `limit` is a time or a size (the bottleneck's queue), or a number
of packets as tc counts them.";

/// `hybridmig netem …`.
#[derive(Clone, Debug, Subcommand)]
pub enum NetemCommand {
    /// List the named links.
    List {
        /// As JSON.
        #[arg(long)]
        json: bool,
    },
    /// Show what a link does, and the commands with which the kernel's own netem does the same.
    #[command(after_help = LINKS)]
    Show(NetemShowArgs),
    /// Measure how exact the emulator is on this machine: round-trip time, loss, rate.
    ///
    /// Exits with 0 when every figure is within its tolerance, with 1 otherwise.
    #[command(after_help = LINKS)]
    Check(NetemCheckArgs),
    /// Run a command in a network namespace at the near end of a link, with a twin at the far end.
    ///
    /// The command sees HYBRIDMIG_NEAR_ADDRESS and HYBRIDMIG_FAR_ADDRESS, and reaches the far end's
    /// namespace with `hybridmig netem enter far CMD`. All that was made is removed when it ends.
    #[command(after_help = LINKS)]
    Run(NetemRunArgs),
    /// Run a command at the other end, from within `hybridmig netem run`.
    Enter(NetemEnterArgs),
}

/// `hybridmig netem show`.
#[derive(Clone, Debug, Args)]
pub struct NetemShowArgs {
    /// The link.
    pub link: LinkSpec,
    /// The device in the commands for tc.
    #[arg(long, value_name = "DEVICE", default_value = "eth0")]
    pub device: String,
    /// As JSON.
    #[arg(long)]
    pub json: bool,
}

/// What carries the packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum RunnerArg {
    /// Two namespaces joined in user space: any protocol. Takes root.
    Tun,
    /// The kernel's netem between two namespaces: any protocol. Takes root and sch_netem.
    Tc,
    /// A relay on loopback: UDP only, takes no rights.
    Relay,
}

/// `hybridmig netem check`.
#[derive(Clone, Debug, Args)]
pub struct NetemCheckArgs {
    /// Links to check [default: six that show RTT, loss, bursts, 100 and 500 Mbit/s, and TCP without a limit].
    pub link: Vec<LinkSpec>,
    /// The emulator.
    #[arg(long, value_enum, default_value = "tun")]
    pub runner: RunnerArg,
    /// Seed of what is random.
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// The findings as JSON.
    #[arg(long)]
    pub json: bool,
}

/// `hybridmig netem run`.
#[derive(Clone, Debug, Args)]
pub struct NetemRunArgs {
    /// The link.
    pub link: LinkSpec,
    /// A shell command to run at the far end meanwhile; it is ended afterwards.
    #[arg(long, value_name = "COMMAND")]
    pub far: Option<String>,
    /// Also name the namespaces `hybridmig-NAME-near` and `hybridmig-NAME-far`, for
    /// `ip netns exec` in other terminals.
    #[arg(long)]
    pub name: Option<String>,
    /// The emulator: tun or tc.
    #[arg(long, value_enum, default_value = "tun")]
    pub runner: RunnerArg,
    /// Seed of what is random.
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// TCP congestion control of both ends, cubic or bbr for example [default: the system's].
    #[arg(long, value_name = "NAME")]
    pub tcp: Option<String>,
    /// Fail (exit code 1) when the emulator itself was too late for the run to be valid.
    #[arg(long)]
    pub strict: bool,
    /// Write what happened on the link to this file, as JSON.
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub json: Option<PathBuf>,
    /// The command [default: a shell].
    #[arg(last = true, value_name = "CMD", value_hint = ValueHint::CommandWithArguments)]
    pub command: Vec<OsString>,
}

/// Which end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum EndArg {
    /// Where `run` has started its command.
    Near,
    /// The other one.
    Far,
}

/// `hybridmig netem enter`.
#[derive(Clone, Debug, Args)]
pub struct NetemEnterArgs {
    /// Which end.
    #[arg(value_enum)]
    pub end: EndArg,
    /// The command [default: a shell].
    #[arg(
        trailing_var_arg = true,
        allow_hyphen_values = true,
        value_name = "CMD",
        value_hint = ValueHint::CommandWithArguments
    )]
    pub command: Vec<OsString>,
}
