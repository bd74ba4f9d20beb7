//! hybridmig in each of its modes, as a user runs it: `hybridmig recv` on one host, `hybridmig send` on the
//! other, identities made for the run. Nothing of it is linked in.

use std::net::SocketAddr;

use anyhow::{Context, Result, bail};
use hybridmig_tests::migration::{Host, PATIENCE};
use hybridmig_tests::process::HybridmigProcess;
use serde_json::{Value, json};

use super::{Engine, Migration, Progress, Stage};
use crate::link::Side;

/// UDP port of `recv`, in a namespace of its own.
const PORT: u16 = 4433;
/// Exit code of a pre-copy that did not converge: the guest runs at the source.
const NOT_CONVERGED: i32 = 5;

/// The shares of memory and of disks, in percent, that move before the guest resumes in the engines that do not plan.
const SHARES: [u32; 3] = [25, 60, 90];

pub(super) fn engines() -> Vec<Box<dyn Engine>> {
    let planned = ["hybrid", "precopy", "postcopy"].map(|mode| Hybridmig { mode, share: None });
    let fixed = SHARES.map(|percent| Hybridmig {
        mode: "hybrid",
        share: Some(percent),
    });
    let engines = planned.into_iter().chain(fixed);
    engines
        .map(|engine| Box::new(engine) as Box<dyn Engine>)
        .collect()
}

struct Hybridmig {
    mode: &'static str,
    /// Percent of memory and of disks before the resume; nothing if hybridmig is to choose.
    share: Option<u32>,
}

impl Hybridmig {
    /// What `send` is given for it.
    fn arguments(&self) -> Vec<String> {
        let mut arguments = vec!["--mode".to_owned(), self.mode.to_owned()];
        if let Some(percent) = self.share {
            let fraction = format!("{:.2}", f64::from(percent) / 100.0);
            arguments
                .extend(["--mem-frac", &fraction, "--disk-frac", &fraction].map(str::to_owned));
        }
        arguments
    }
}

impl Engine for Hybridmig {
    fn name(&self) -> String {
        match self.share {
            Some(percent) => format!("hybridmig-share-{percent}"),
            None => format!("hybridmig-{}", self.mode),
        }
    }

    fn about(&self) -> String {
        format!(
            "hybridmig send {}, everything else by default (QUIC, encrypted)",
            self.arguments().join(" ")
        )
    }

    fn moves_disks(&self) -> bool {
        true
    }

    fn prepare(&self, stage: &mut Stage<'_>) -> Result<Box<dyn Migration>> {
        let (near, far) = (Host::new()?, Host::new()?);
        let address = SocketAddr::from((stage.link.address(Side::Destination), PORT));
        let mut recv = far.command("recv", &near)?;
        recv.args(["--listen", &address.to_string()])
            .arg("--qmp")
            .arg(stage.destination.qmp_socket())
            .arg("--json")
            .arg(far.path("report.json"));
        stage.link.place(Side::Destination, &mut recv);
        let recv = HybridmigProcess::spawn_command("recv", recv)?;
        recv.wait_for_stderr("listening on ", PATIENCE)?;
        let mut arguments = self.arguments();
        arguments.extend(["--quiet", "--to", &address.to_string()].map(str::to_owned));
        Ok(Box::new(Running {
            arguments,
            recv,
            send: None,
            near,
            far,
        }))
    }
}

struct Running {
    // In the order of dropping: processes before their directories.
    send: Option<HybridmigProcess>,
    recv: HybridmigProcess,
    arguments: Vec<String>,
    near: Host,
    far: Host,
}

impl Migration for Running {
    fn start(&mut self, stage: &mut Stage<'_>) -> Result<()> {
        let mut send = self.near.command("send", &self.far)?;
        send.args(&self.arguments)
            .arg("--qmp")
            .arg(stage.source.qmp_socket())
            .arg("--json")
            .arg(self.near.path("report.json"));
        stage.link.place(Side::Source, &mut send);
        self.send = Some(HybridmigProcess::spawn_command("send", send)?);
        Ok(())
    }

    fn poll(&mut self, _: &mut Stage<'_>) -> Result<Progress> {
        let send = self.send.as_mut().context("send has not been started")?;
        let Some(status) = send.has_ended()? else {
            return Ok(Progress::Running);
        };
        match status.code() {
            Some(0) => Ok(Progress::Moved),
            Some(NOT_CONVERGED) => Ok(Progress::GaveUp("pre-copy did not converge".to_owned())),
            _ => bail!(
                "send ended with {status}: {}; recv says: {}",
                send.stderr().tail(5),
                self.recv.stderr().tail(5)
            ),
        }
    }

    fn claimed(&mut self, _: &mut Stage<'_>) -> Value {
        // The destination's own report comes after the source's end.
        let mut wait = || self.recv.wait(PATIENCE / 6);
        let recv = match self.send.as_mut().map(HybridmigProcess::has_ended) {
            Some(Ok(Some(_))) => wait().map_or_else(
                |error| json!({ "error": format!("{error:#}") }),
                |_| report(&self.far),
            ),
            _ => Value::Null,
        };
        json!({ "send": report(&self.near), "recv": recv })
    }
}

/// The report of a host, or why there is none.
fn report(host: &Host) -> Value {
    let path = host.path("report.json");
    let read = std::fs::read_to_string(&path).context("no report");
    let parsed =
        read.and_then(|text| serde_json::from_str(&text).context("the report is not JSON"));
    parsed.unwrap_or_else(|error| json!({ "error": format!("{error:#}") }))
}
