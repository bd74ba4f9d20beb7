//! Two hosts on one machine: identities that trust each other, state directories, `hybridmig recv`
//! and `hybridmig send` between them, over a relayed link or none.

use std::ffi::OsString;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use hybridmig_engine::report::Report;
use hybridmig_netem::{LinkSpec, Relay, RelayConfig, RelayHandle};
use hybridmig_transport::identity::{Fingerprint, Identity};
use tempfile::TempDir;

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
        let mut command = self.command("recv", peer)?;
        command
            .args(["--listen", "127.0.0.1:0"])
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

/// A running `hybridmig recv`.
pub struct Recv {
    /// The process.
    pub process: HybridmigProcess,
    /// Where it listens.
    pub address: SocketAddr,
    report: PathBuf,
}

impl Recv {
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
        let status = self.process.wait(patience)?;
        ensure!(
            status.code() == Some(code),
            "send ended with {status} instead of {code}; it has said:\n{}\n{}",
            self.process.stdout().tail(30),
            self.process.stderr().tail(30)
        );
        Ok(())
    }
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
