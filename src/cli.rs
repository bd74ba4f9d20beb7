//! The command line as clap sees it. Only words, defaults and help: what a subcommand does lies in
//! `commands/`.

mod netem;
mod plan;
mod profile;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum, ValueHint};
use hybridmig_engine::driver::level::Level;
use hybridmig_engine::guest::qemu::disk::{DiskChoice, DiskOption};
use hybridmig_engine::guest::workload::{ContentShares, Profile};
use hybridmig_netem::LinkSpec;
use hybridmig_transport::identity::Fingerprint;
use hybridmig_transport::message::{Mode, SessionId};

use crate::units;

pub use plan::PlanArgs;

pub use netem::{
    EndArg, NetemArgs, NetemCheckArgs, NetemCommand, NetemEnterArgs, NetemRunArgs, NetemShowArgs,
    RunnerArg,
};
pub use profile::ProfileArgs;

/// Exit codes, printed at the end of `--help` and in the man page.
pub const EXIT_CODES: &str = "\
Exit codes:
  0  done: the guest was moved (or the command did what it says)
  1  something failed before the guest was touched, or outside of a migration
  2  the command line was not understood
  3  refused by one of the two sides; the guest runs at the source
  4  cancelled, or the link was lost before the handover; the guest runs at the source
  5  pre-copy did not converge within its limits; the guest runs at the source
  6  in doubt: ownership was sent and no answer came; see `hybridmig resolve`
  7  incomplete: the destination owns the guest, some blocks are still at the source";

/// Moves a running virtual machine over a long and lossy network.
#[derive(Debug, Parser)]
#[command(name = "hybridmig", version, max_term_width = 100, after_long_help = EXIT_CODES)]
pub struct Cli {
    /// Say more: -v for what happens, -vv for details (or set `HYBRIDMIG_LOG` to a tracing filter).
    #[arg(short, long, action = clap::ArgAction::Count, global = true)]
    pub verbose: u8,

    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The subcommands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Move a guest of this host to a waiting `hybridmig recv`.
    #[command(after_long_help = EXIT_CODES)]
    Send(SendArgs),
    /// Wait for a guest and take it over.
    #[command(after_long_help = EXIT_CODES)]
    Recv(RecvArgs),
    /// Check whether a guest could be moved, without touching it.
    Check(CheckArgs),
    /// Tell how a guest would be moved and what it would come to, without moving it.
    Plan(Box<PlanArgs>),
    /// Watch how a guest uses its memory and its disks, without moving it.
    Profile(ProfileArgs),
    /// Make or show this host's identity.
    Keys(KeysArgs),
    /// Move an embedded guest between two processes of this machine over an emulated link.
    Demo(DemoArgs),
    /// Run the embedded guest (an access pattern over memory that it verifies) to try things on.
    Guest(GuestArgs),
    /// Emulate a long link: run commands over it, check how exact it is.
    Netem(NetemArgs),
    /// Relay UDP with the delay, rate and loss of a long link, to try things over.
    Relay(RelayArgs),
    /// Change how fast a running `send` may send.
    Limit(LimitArgs),
    /// Tell what the journals know of sessions that ended badly, and decide about them.
    Resolve(ResolveArgs),
    /// Print a completion script for a shell.
    Completions {
        /// The shell.
        shell: clap_complete::Shell,
    },
    /// Write the man pages into a directory.
    Man {
        /// The directory; made if it is missing.
        #[arg(value_hint = ValueHint::DirPath)]
        directory: PathBuf,
    },
}

/// Who this host is and whom it trusts.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Identity and trust")]
pub struct TrustArgs {
    /// This host's identity, made by `hybridmig keys new` [default: identity.pem in
    /// /etc/hybridmig for root, in ~/.config/hybridmig for others].
    #[arg(long, value_name = "FILE", env = "HYBRIDMIG_IDENTITY", value_hint = ValueHint::FilePath)]
    pub identity: Option<PathBuf>,
    /// Trust the peer with this SHA-256 fingerprint (`hybridmig keys show` on its host).
    #[arg(long, value_name = "FINGERPRINT")]
    pub peer: Vec<Fingerprint>,
    /// Trust the peers whose fingerprints this file lists, one a line [default: known-peers beside
    /// the identity, if it is there].
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub known_peers: Option<PathBuf>,
    /// Trust every peer whose certificate one of the CAs in this PEM file has signed.
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub ca: Vec<PathBuf>,
}

/// Which congestion control drives the connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum CongestionArg {
    /// hybridmig's own: keeps bandwidth × delay in flight, does not mistake loss for congestion.
    Adaptive,
    /// RFC 9438.
    Cubic,
    /// RFC 9002.
    Newreno,
    /// quinn's BBR.
    Bbr,
}

/// The link.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Link")]
pub struct LinkArgs {
    /// Never send faster than this, for example 200mbit; `hybridmig limit` changes it while running.
    #[arg(long, value_name = "RATE", value_parser = units::rate)]
    pub rate_limit: Option<u64>,
    /// Congestion control.
    #[arg(long, value_enum, default_value = "adaptive")]
    pub cc: CongestionArg,
    /// How long a lost link is waited for once ownership of the guest has been sent.
    #[arg(long, value_name = "TIME", value_parser = units::time, default_value = "10m")]
    pub patience: Duration,
}

/// What comes out.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Output")]
pub struct OutputArgs {
    /// Write the report as JSON to this file, `-` for standard output (docs/report.md).
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub json: Option<PathBuf>,
    /// No progress, only the result.
    #[arg(short, long)]
    pub quiet: bool,
    /// Where the journals are kept [default: /var/lib/hybridmig for root,
    /// ~/.local/state/hybridmig for others].
    #[arg(long, value_name = "DIR", env = "HYBRIDMIG_STATE", value_hint = ValueHint::DirPath)]
    pub state_dir: Option<PathBuf>,
}

/// Which guest of this host.
#[derive(Clone, Debug, Args)]
#[group(required = true, multiple = false)]
pub struct SourceGuestArgs {
    /// QMP socket of a running QEMU.
    #[arg(long, value_name = "SOCKET", value_hint = ValueHint::FilePath)]
    pub qmp: Option<PathBuf>,
    /// Control socket of a running `hybridmig guest`.
    #[arg(long, value_name = "SOCKET", value_hint = ValueHint::FilePath)]
    pub workload: Option<PathBuf>,
    /// A running Xen domain, by name or number; root in dom0 (docs/xen.md).
    #[cfg(feature = "xen")]
    #[arg(long, value_name = "DOMAIN")]
    pub xen: Option<String>,
}

/// Which disks of a QEMU move; those of a Xen domain never do.
#[derive(Clone, Debug, Args)]
pub struct DiskArgs {
    /// What becomes of a disk, by the name that `hybridmig check` shows (or `all`): `skip` it (it lies on
    /// storage that both hosts reach), `copy` all of it before the guest resumes, or a share of it from 0
    /// to 1 [default: every disk moves, what was accessed lately before the guest resumes]. Disks of a Xen domain
    /// can only be skipped, and have to be.
    #[arg(long = "disk", value_name = "NAME=WHAT")]
    pub disks: Vec<DiskOption>,
}

impl DiskArgs {
    /// As one choice.
    pub fn choice(&self) -> DiskChoice {
        self.disks.iter().cloned().collect()
    }
}

/// `hybridmig send`.
#[derive(Clone, Debug, Args)]
pub struct SendArgs {
    /// The guest to move.
    #[command(flatten)]
    pub guest: SourceGuestArgs,
    /// Its disks.
    #[command(flatten)]
    pub disks: DiskArgs,
    /// Where a `hybridmig recv` waits.
    #[arg(long, value_name = "HOST:PORT")]
    pub to: String,
    /// How the three phases are used.
    #[arg(long, value_name = "MODE", default_value = "hybrid", value_parser = mode)]
    pub mode: Mode,
    /// Share of memory to move before the guest resumes, 0 to 1 [default: as much as pays].
    #[arg(long, value_name = "SHARE", value_parser = units::share)]
    pub mem_frac: Option<f64>,
    /// Share of the disks' content to move before the guest resumes, 0 to 1 [default: what the guest
    /// has accessed lately; the rest follows].
    #[arg(long, value_name = "SHARE", value_parser = units::share)]
    pub disk_frac: Option<f64>,
    /// The longest downtime that is acceptable. In hybrid mode it bounds the freeze set; in
    /// precopy mode the guest is not frozen until the rest fits it.
    #[arg(long, value_name = "TIME", value_parser = units::time)]
    pub max_downtime: Option<Duration>,
    /// A profile that `hybridmig profile --json` has saved: what is hot is then known from the start.
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub profile: Option<PathBuf>,
    /// The longest that the whole migration may take: rounds are made only as far as it allows.
    #[arg(long, value_name = "TIME", value_parser = units::time)]
    pub max_total: Option<Duration>,
    /// Predict and log, but decide by the simple rule (hybrid mode): freeze when what is left fits 150 ms or
    /// another round does not pay.
    #[arg(long)]
    pub observe: bool,
    /// The most pre-copy rounds.
    #[arg(long, value_name = "N", default_value_t = 30, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub max_rounds: u32,
    /// Blocks sent along with one that the guest waits for.
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = clap::value_parser!(u32).range(0..=512))]
    pub prefetch: u32,
    /// zstd level of the bulk data, -7 (fastest) to 19; `auto` follows spare CPU and link.
    #[arg(long, value_name = "N", default_value_t, allow_negative_numbers = true)]
    pub level: Level,
    /// Identity and trust.
    #[command(flatten)]
    pub trust: TrustArgs,
    /// Link.
    #[command(flatten)]
    pub link: LinkArgs,
    /// Output.
    #[command(flatten)]
    pub output: OutputArgs,
}

/// `hybridmig limit`.
#[derive(Clone, Debug, Args)]
pub struct LimitArgs {
    /// The new cap, for example 50mbit, or `none`.
    #[arg(value_name = "RATE")]
    pub rate: units::Cap,
    /// Which session, where several are under way.
    #[arg(long, value_name = "SESSION")]
    pub session: Option<SessionId>,
    /// Where the running `send` keeps its journals [default: /var/lib/hybridmig for root,
    /// ~/.local/state/hybridmig for others].
    #[arg(long, value_name = "DIR", env = "HYBRIDMIG_STATE", value_hint = ValueHint::DirPath)]
    pub state_dir: Option<PathBuf>,
}

/// Which guest takes the arriving one's place.
#[derive(Clone, Debug, Args)]
#[group(required = true, multiple = false)]
pub struct DestinationGuestArgs {
    /// QMP socket of a QEMU that waits with `-incoming defer`.
    #[arg(long, value_name = "SOCKET", value_hint = ValueHint::FilePath)]
    pub qmp: Option<PathBuf>,
    /// Start this QEMU; what it needs for the migration is added.
    #[arg(long, value_name = "COMMAND")]
    pub exec: Option<String>,
    /// Start an embedded guest whose control socket is this path.
    #[arg(long, value_name = "SOCKET", value_hint = ValueHint::FilePath)]
    pub workload: Option<PathBuf>,
    /// Let Xen's toolstack make the domain that comes; root in dom0 (docs/xen.md).
    #[cfg(feature = "xen")]
    #[arg(long)]
    pub xen: bool,
    /// Go on for a `recv` that was killed while blocks were missing: the folder that it left in its
    /// state directory (`hybridmig resolve` names it). Listen where it did: the source dials again.
    #[arg(long, value_name = "DIR", conflicts_with = "seed", value_hint = ValueHint::DirPath)]
    pub take_over: Option<PathBuf>,
}

/// `hybridmig recv`.
#[derive(Clone, Debug, Args)]
pub struct RecvArgs {
    /// What waits here for the guest.
    #[command(flatten)]
    pub guest: DestinationGuestArgs,
    /// UDP address to listen on.
    #[arg(long, value_name = "ADDR:PORT", default_value = "[::]:4433")]
    pub listen: SocketAddr,
    /// Let the disks that come replace images that have contents.
    #[arg(long)]
    pub overwrite_disks: bool,
    /// Folder for the disk of an embedded guest [default: beside its control socket].
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath, requires = "workload")]
    pub disk_dir: Option<PathBuf>,
    /// Files or block devices with contents that the guest's disks may have too: an old copy, the
    /// image that a disk was made from, what an earlier migration left. They are read before it
    /// listens, and blocks that are in them are named instead of sent (docs/seeds.md). Never written.
    #[arg(long, value_name = "FILE", num_args = 1.., value_hint = ValueHint::FilePath)]
    pub seed: Vec<PathBuf>,
    /// After the last block has arrived, let the guest verify all of its contents, where it can.
    #[arg(long)]
    pub verify: bool,
    /// Identity and trust.
    #[command(flatten)]
    pub trust: TrustArgs,
    /// Link.
    #[command(flatten)]
    pub link: LinkArgs,
    /// Output.
    #[command(flatten)]
    pub output: OutputArgs,
}

/// `hybridmig check`.
#[derive(Clone, Debug, Args)]
pub struct CheckArgs {
    /// The guest to check.
    #[command(flatten)]
    pub guest: SourceGuestArgs,
    /// Its disks.
    #[command(flatten)]
    pub disks: DiskArgs,
    /// Also ask the `hybridmig recv` that waits there.
    #[arg(long, value_name = "HOST:PORT")]
    pub to: Option<String>,
    /// Print the findings as JSON.
    #[arg(long)]
    pub json: bool,
    /// Identity and trust.
    #[command(flatten)]
    pub trust: TrustArgs,
}

/// `hybridmig keys`.
#[derive(Clone, Debug, Args)]
pub struct KeysArgs {
    /// New or show.
    #[command(subcommand)]
    pub command: KeysCommand,
}

/// `hybridmig keys …`.
#[derive(Clone, Debug, Subcommand)]
pub enum KeysCommand {
    /// Make an identity (a self-signed certificate and its key, mode 0600) and print its
    /// fingerprint.
    New {
        /// Where [default: see `hybridmig send --help`].
        #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
        identity: Option<PathBuf>,
    },
    /// Print the fingerprint that the other host is to be given as `--peer`.
    Show {
        /// Which [default: see `hybridmig send --help`].
        #[arg(long, value_name = "FILE", env = "HYBRIDMIG_IDENTITY", value_hint = ValueHint::FilePath)]
        identity: Option<PathBuf>,
    },
}

/// `hybridmig demo`.
#[derive(Clone, Debug, Args)]
pub struct DemoArgs {
    /// Memory of the guest.
    #[arg(long, value_name = "SIZE", default_value = "256M", value_parser = units::size)]
    pub size: u64,
    /// Disk of the guest; 0: none.
    #[arg(long, value_name = "SIZE", default_value = "32M", value_parser = units::size)]
    pub disk_size: u64,
    /// What the guest does (`hybridmig guest --help`).
    #[arg(long, default_value = "web")]
    pub profile: Profile,
    /// How the three phases are used.
    #[arg(long, value_name = "MODE", default_value = "hybrid", value_parser = mode)]
    pub mode: Mode,
    /// The emulated link: a name that `hybridmig netem list` shows, or words of tc-netem(8).
    #[arg(
        long,
        value_name = "LINK",
        default_value = "delay 25ms rate 200mbit loss 0.5% limit 50ms"
    )]
    pub link: LinkSpec,
    /// Seed of the guest and of the link.
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// As with `send`: share of memory to move before the guest resumes.
    #[arg(long, value_name = "SHARE", value_parser = units::share)]
    pub mem_frac: Option<f64>,
    /// As with `send`: share of the disk's content to move before the guest resumes.
    #[arg(long, value_name = "SHARE", value_parser = units::share)]
    pub disk_frac: Option<f64>,
    /// As with `send`: predict and log, decide by the simple rule.
    #[arg(long)]
    pub observe: bool,
    /// Where the source keeps its journals and remembers what migrations cost [default: nowhere].
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub state_dir: Option<PathBuf>,
    /// Keep the reports of both sides in this directory.
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub keep: Option<PathBuf>,
}

/// `hybridmig guest`.
#[derive(Clone, Debug, Args)]
pub struct GuestArgs {
    /// Control socket to make.
    #[arg(long, value_name = "SOCKET", value_hint = ValueHint::FilePath)]
    pub control: PathBuf,
    /// Memory, 16M to 8G.
    #[arg(long, value_name = "SIZE", default_value = "256M", value_parser = units::size)]
    pub size: u64,
    /// Disk, 4M to 64G; 0: none.
    #[arg(long, value_name = "SIZE", default_value = "0", value_parser = units::size)]
    pub disk_size: u64,
    /// File that is the disk, made at the start and removed at the end [default: the control socket's
    /// path with .disk behind it].
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub disk: Option<PathBuf>,
    /// Access pattern: idle, web, db, build or scan (docs/workload.md).
    #[arg(long, default_value = "web")]
    pub profile: Profile,
    /// Seed of contents and accesses.
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Threads that access memory.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=32))]
    pub threads: u32,
    /// Speed relative to the profile's own; 0 means as fast as possible.
    #[arg(long, value_name = "FACTOR", default_value_t = 1.0)]
    pub rate_factor: f64,
    /// What the pages are filled with, instead of the profile's mix.
    #[arg(long, value_name = "SHARES")]
    pub contents: Option<ContentShares>,
    /// Each thread rests for good after this many accesses.
    #[arg(long, value_name = "N")]
    pub max_accesses: Option<u64>,
    /// Wait for a migration instead of running.
    #[arg(long)]
    pub incoming: bool,
    /// Lead a session of its own, so that the starter's signals do not reach the guest.
    #[arg(long)]
    pub detach: bool,
    /// End when this process has ended.
    #[arg(long, value_name = "PID")]
    pub die_with: Option<u32>,
    /// End when it is incoming, has never been given a state, and nobody is connected any more.
    #[arg(long)]
    pub end_when_abandoned: bool,
}

/// `hybridmig relay`.
#[derive(Clone, Debug, Args)]
pub struct RelayArgs {
    /// Where clients send to.
    #[arg(long, value_name = "ADDR:PORT")]
    pub listen: SocketAddr,
    /// Where it goes on to.
    #[arg(long, value_name = "ADDR:PORT")]
    pub target: SocketAddr,
    /// The emulated link: a name that `hybridmig netem list` shows, or words of tc-netem(8).
    #[arg(
        long,
        value_name = "LINK",
        default_value = "delay 25ms rate 200mbit loss 0.5% limit 50ms"
    )]
    pub link: LinkSpec,
    /// Seed of the losses.
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
}

/// `hybridmig resolve`.
#[derive(Clone, Debug, Args)]
pub struct ResolveArgs {
    /// The session to look at [default: all that are not settled].
    pub session: Option<SessionId>,
    /// Run the guest on this host (source only). Legal only when it runs nowhere else: the
    /// destination's `hybridmig resolve` must say that it never accepted, or the host must be off.
    /// A Xen domain whose sender was killed before it offered the domain to anybody has no session.
    #[arg(long, requires = "guest")]
    pub run_here: bool,
    /// Confirms `--run-here`: nobody can undo a guest that has run twice.
    #[arg(long)]
    pub it_does_not_run_there: bool,
    /// The guest, for `--run-here`.
    #[command(flatten)]
    pub guest: ResolveGuestArgs,
    /// Where the journals are kept.
    #[arg(long, value_name = "DIR", env = "HYBRIDMIG_STATE", value_hint = ValueHint::DirPath)]
    pub state_dir: Option<PathBuf>,
}

/// The guest of `hybridmig resolve`.
#[derive(Clone, Debug, Args)]
#[group(id = "guest", required = false, multiple = false)]
pub struct ResolveGuestArgs {
    /// QMP socket of the frozen QEMU.
    #[arg(long, value_name = "SOCKET", value_hint = ValueHint::FilePath)]
    pub qmp: Option<PathBuf>,
    /// Control socket of the frozen embedded guest.
    #[arg(long, value_name = "SOCKET", value_hint = ValueHint::FilePath)]
    pub workload: Option<PathBuf>,
    /// The suspended Xen domain, by name or number.
    #[cfg(feature = "xen")]
    #[arg(long, value_name = "DOMAIN")]
    pub xen: Option<String>,
}

fn mode(text: &str) -> Result<Mode, String> {
    match text {
        "hybrid" => Ok(Mode::Hybrid),
        "precopy" | "pre-copy" => Ok(Mode::Precopy),
        "postcopy" | "post-copy" => Ok(Mode::Postcopy),
        _ => Err(format!(
            "'{text}' is not a mode; write hybrid, precopy or postcopy"
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_guest_and_a_target_are_needed() {
        assert!(Cli::try_parse_from(["hybridmig", "send", "--to", "a:1"]).is_err());
        assert!(Cli::try_parse_from(["hybridmig", "send", "--qmp", "s"]).is_err());
        assert!(
            Cli::try_parse_from([
                "hybridmig",
                "send",
                "--qmp",
                "s",
                "--workload",
                "w",
                "--to",
                "a:1"
            ])
            .is_err()
        );
        assert!(Cli::try_parse_from(["hybridmig", "send", "--qmp", "s", "--to", "a:1"]).is_ok());
    }
}
