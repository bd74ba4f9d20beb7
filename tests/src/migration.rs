//! Two hosts on one machine: identities that trust each other, state directories, an embedded guest,
//! `hybridmig recv` and `hybridmig send` between them, over a relayed link or none.

use std::ffi::OsString;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use hybridmig_engine::guest::workload::control::{Control, Standing};
use hybridmig_engine::report::Report;
use hybridmig_netem::{LinkSpec, Relay, RelayConfig, RelayHandle};
use hybridmig_transport::identity::{Fingerprint, Identity};
use tempfile::TempDir;

use crate::keeper::Kept;
use crate::process::{HybridmigProcess, hybridmig_binary};

/// The link of the whole-system tests: 50 ms RTT, 200 Mbit/s, 0.5 % loss each way.
pub const TEST_LINK: &str = "delay 25ms rate 200mbit loss 0.5% limit 50ms";

/// How long a process may take to say its first word, or to end after its last.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// A host: an identity, a state directory, a place for reports and sockets.
pub struct Host {
    directory: TempDir,
    fingerprint: Fingerprint,
}

impl Host {
    /// A host with a fresh identity.
    pub fn new() -> Result<Self> {
        let directory = tempfile::tempdir().context("a temporary directory for a host")?;
        let identity = Identity::create(&directory.path().join("identity.pem"))?;
        Ok(Self {
            directory,
            fingerprint: identity.fingerprint(),
        })
    }

    /// What others pin.
    pub fn fingerprint(&self) -> Fingerprint {
        self.fingerprint
    }

    /// A path on this host.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// `hybridmig SUBCOMMAND` with this host's identity and state, trusting `peer`.
    pub fn command(&self, subcommand: &str, peer: &Self) -> Result<Command> {
        let mut command = Command::new(hybridmig_binary()?);
        command
            .arg(subcommand)
            .arg("--identity")
            .arg(self.path("identity.pem"))
            .args(["--peer", &peer.fingerprint.to_string()]);
        if subcommand != "check" {
            command.arg("--state-dir").arg(self.path("state"));
        }
        Ok(command)
    }

    /// Starts `hybridmig recv` on a free port of loopback and waits until it listens.
    pub fn recv<S: Into<OsString>>(
        &self,
        peer: &Self,
        arguments: impl IntoIterator<Item = S>,
    ) -> Result<Recv> {
        self.recv_at(peer, SocketAddr::from((Ipv4Addr::LOCALHOST, 0)), arguments)
    }

    /// Like [`Self::recv`] at a certain address.
    pub fn recv_at<S: Into<OsString>>(
        &self,
        peer: &Self,
        address: SocketAddr,
        arguments: impl IntoIterator<Item = S>,
    ) -> Result<Recv> {
        let mut command = self.command("recv", peer)?;
        command
            .args(["--listen", &address.to_string()])
            .arg("--json")
            .arg(self.path("recv.json"))
            .args(arguments.into_iter().map(Into::into));
        let process = HybridmigProcess::spawn_command("recv", command)?;
        let line = process.wait_for_stderr("listening on ", PATIENCE)?;
        let address = line
            .text
            .split_whitespace()
            .nth(2)
            .context("no address behind 'listening on'")?;
        let address = address
            .parse()
            .with_context(|| format!("'{}' has no address", line.text))?;
        Ok(Recv {
            process,
            address,
            report: self.path("recv.json"),
        })
    }

    /// Starts `hybridmig send`.
    pub fn send<S: Into<OsString>>(
        &self,
        peer: &Self,
        to: SocketAddr,
        arguments: impl IntoIterator<Item = S>,
    ) -> Result<Send> {
        let mut command = self.command("send", peer)?;
        command
            .args(["--to", &to.to_string()])
            .arg("--json")
            .arg(self.path("send.json"))
            .args(arguments.into_iter().map(Into::into));
        let process = HybridmigProcess::spawn_command("send", command)?;
        Ok(Send {
            process,
            report: self.path("send.json"),
        })
    }
}

impl Host {
    /// Starts `hybridmig recv` for an embedded guest.
    pub fn recv_workload(&self, peer: &Self, arguments: &[&str]) -> Result<(Recv, Arrived)> {
        let arrived = Arrived {
            control: self.path("arrived.sock"),
        };
        let mut words = vec![
            "--workload".into(),
            arrived.control.clone().into_os_string(),
        ];
        words.extend(arguments.iter().map(OsString::from));
        Ok((self.recv(peer, words)?, arrived))
    }

    /// Starts `hybridmig send` of an embedded guest.
    pub fn send_workload(
        &self,
        guest: &Guest,
        peer: &Self,
        to: SocketAddr,
        arguments: &[&str],
    ) -> Result<Send> {
        let mut words = vec!["--workload".into(), guest.control.clone().into_os_string()];
        words.extend(arguments.iter().map(OsString::from));
        self.send(peer, to, words)
    }

    /// Runs `hybridmig resolve` and returns its exit code and all that it has said.
    pub fn resolve(&self, arguments: &[&str]) -> Result<(Option<i32>, String)> {
        self.about_sessions("resolve", arguments)
    }

    /// Runs `hybridmig limit` and returns its exit code and all that it has said.
    pub fn limit(&self, arguments: &[&str]) -> Result<(Option<i32>, String)> {
        self.about_sessions("limit", arguments)
    }

    fn about_sessions(
        &self,
        subcommand: &str,
        arguments: &[&str],
    ) -> Result<(Option<i32>, String)> {
        let mut command = Command::new(hybridmig_binary()?);
        command
            .args([subcommand, "--state-dir"])
            .arg(self.path("state"))
            .args(arguments);
        said(command)
    }

    /// Runs `hybridmig check` and returns its exit code and all that it has said.
    pub fn check(&self, peer: &Self, arguments: &[&str]) -> Result<(Option<i32>, String)> {
        let mut command = self.command("check", peer)?;
        command.args(arguments);
        said(command)
    }
}

/// Runs a command that ends soon by itself.
fn said(mut command: Command) -> Result<(Option<i32>, String)> {
    let output = command.output().context("hybridmig cannot be started")?;
    let mut text = String::from_utf8_lossy(&output.stdout).into_owned();
    text.push_str(&String::from_utf8_lossy(&output.stderr));
    Ok((output.status.code(), text))
}

/// The embedded guest at the source.
pub struct Guest {
    control: PathBuf,
    _process: Kept,
}

impl Guest {
    /// Starts it with the profile `web`.
    pub fn start(host: &Host, mebibytes: u64) -> Result<Self> {
        Self::start_with(host, mebibytes, &[])
    }

    /// The same with further arguments.
    pub fn start_with(host: &Host, mebibytes: u64, arguments: &[&str]) -> Result<Self> {
        let control = host.path("guest.sock");
        let mut command = Command::new(hybridmig_binary()?);
        let size = format!("{mebibytes}M");
        command
            .args(["guest", "--size", &size])
            .arg("--control")
            .arg(&control)
            .args(arguments);
        if !arguments.contains(&"--profile") {
            command.args(["--profile", "web"]);
        }
        let mut process = Kept::start("guest", command)?;
        let mut answers = Control::wait(&control, PATIENCE, || {
            matches!(process.has_ended(), Ok(None))
        })?;
        // It listens first and answers once it has made its memory and its disk.
        answers.describe()?;
        Ok(Self {
            control,
            _process: process,
        })
    }

    /// Its control socket.
    pub fn control(&self) -> &Path {
        &self.control
    }

    /// Its control socket, as a word of a command line.
    pub fn socket(&self) -> String {
        self.control.display().to_string()
    }

    /// It runs here, its work goes on, and every page of it is right.
    pub fn runs_here(&self) -> Result<()> {
        runs_and_is_right(&self.control)
    }

    /// It stands still here.
    pub fn is_frozen(&self) -> Result<()> {
        let standing = Control::connect(&self.control)?.describe()?.standing;
        ensure!(
            standing == Standing::Frozen,
            "the guest at the source is {standing:?}"
        );
        Ok(())
    }
}

/// The embedded guest at the destination, which outlives `hybridmig recv`. Dropping this ends it.
pub struct Arrived {
    control: PathBuf,
}

impl Arrived {
    /// Its control socket.
    pub fn control(&self) -> &Path {
        &self.control
    }

    /// It runs here, its work goes on, and every page of it is right.
    pub fn runs_here(&self) -> Result<()> {
        runs_and_is_right(&self.control)
    }

    /// No guest is here, or none for long: one that was prepared in vain ends by itself.
    pub fn is_nowhere(&self) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        while Control::connect(&self.control).is_ok() {
            ensure!(
                Instant::now() < deadline,
                "a guest was left at the destination"
            );
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }
}

impl Drop for Arrived {
    fn drop(&mut self) {
        if let Ok(mut control) = Control::connect(&self.control)
            && let Err(error) = control.stop()
        {
            eprintln!("the guest at {} goes on: {error}", self.control.display());
        }
    }
}

fn runs_and_is_right(control: &Path) -> Result<()> {
    let mut control = Control::connect(control)?;
    let before = control.describe()?;
    ensure!(
        before.standing == Standing::Running,
        "the guest is {:?}",
        before.standing
    );
    let deadline = Instant::now() + PATIENCE;
    while control.describe()?.stats.operations <= before.stats.operations {
        ensure!(Instant::now() < deadline, "the guest does no more work");
        std::thread::sleep(Duration::from_millis(10));
    }
    control.freeze(PATIENCE)?;
    control.verify().context("the guest found wrong contents")?;
    control.thaw()?;
    Ok(())
}

/// A running `hybridmig recv`.
pub struct Recv {
    /// The process.
    pub process: HybridmigProcess,
    /// Where it listens.
    pub address: SocketAddr,
    report: PathBuf,
}

impl Recv {
    /// Waits for the end and fails unless it is `code`.
    pub fn ends_with(&mut self, code: i32, patience: Duration) -> Result<()> {
        ends_with("recv", &mut self.process, code, patience)
    }

    /// Its report, once it has ended.
    pub fn report(&self) -> Result<Report> {
        read_report(&self.report)
    }
}

/// A running `hybridmig send`.
pub struct Send {
    /// The process.
    pub process: HybridmigProcess,
    report: PathBuf,
}

impl Send {
    /// Its report, once it has ended.
    pub fn report(&self) -> Result<Report> {
        read_report(&self.report)
    }

    /// Waits for the end and fails unless it is `code`.
    pub fn ends_with(&mut self, code: i32, patience: Duration) -> Result<()> {
        ends_with("send", &mut self.process, code, patience)
    }
}

fn ends_with(
    name: &str,
    process: &mut HybridmigProcess,
    code: i32,
    patience: Duration,
) -> Result<()> {
    let status = process.wait(patience)?;
    ensure!(
        status.code() == Some(code),
        "{name} ended with {status} instead of {code}; it has said:\n{}\n{}",
        process.stdout().tail(30),
        process.stderr().tail(30)
    );
    Ok(())
}

fn read_report(path: &Path) -> Result<Report> {
    let text = std::fs::read_to_string(path)
        .with_context(|| format!("no report at {}", path.display()))?;
    serde_json::from_str(&text).with_context(|| format!("{} is not a report", path.display()))
}

/// A relay on a free port of loopback before `target`.
pub fn relay(target: SocketAddr, link: &str, seed: u64) -> Result<RelayHandle> {
    let link: LinkSpec = link.parse().context("the test's link")?;
    let listen = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    Ok(Relay::start(RelayConfig {
        listen,
        target,
        link,
        seed,
    })?)
}
