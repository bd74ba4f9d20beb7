//! `hybridmig demo`: the whole thing on one machine. An embedded guest is moved between two
//! processes over an emulated link, and proves at the end that no byte of it is wrong.

use std::io::{BufRead, BufReader};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, bail};
use hybridmig_engine::guest::workload::control::Control;
use hybridmig_engine::report::Report;
use hybridmig_netem::{Relay, RelayConfig};
use hybridmig_transport::identity::{Fingerprint, Identity};

use crate::cli::DemoArgs;
use crate::show;
use crate::units::{show_bytes, show_rate};

/// How long the guest may take to come up and do its first work.
const START: Duration = Duration::from_secs(60);

/// Work before the migration begins, so that there is something to lose.
const WARM_UP: Duration = Duration::from_secs(2);

/// Runs the demo.
pub fn run(args: DemoArgs) -> anyhow::Result<ExitCode> {
    let place = tempfile::tempdir().context("cannot make a temporary directory")?;
    let program = std::env::current_exe().context("cannot find this program's file")?;
    let demo = Demo {
        args,
        place: place.path().to_owned(),
        program,
    };
    demo.run()
}

struct Demo {
    args: DemoArgs,
    place: PathBuf,
    program: PathBuf,
}

impl Demo {
    fn run(&self) -> anyhow::Result<ExitCode> {
        let args = &self.args;
        let here = Identity::create(&self.file("a.pem"))?.fingerprint();
        let there = Identity::create(&self.file("b.pem"))?.fingerprint();
        println!(
            "guest:  {} of memory, {}, profile {}, seed {}\nlink:   {}\nmode:   {}\n",
            show_bytes(args.size),
            match args.disk_size {
                0 => "no disk".to_owned(),
                bytes => format!("a disk of {}", show_bytes(bytes)),
            },
            args.profile,
            args.seed,
            args.link,
            args.mode
        );
        let _guest = self.start_guest()?;
        let (mut recv, address) = self.start_recv(&here)?;
        let relay = Relay::start(RelayConfig {
            listen: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
            target: address,
            link: args.link.clone(),
            seed: args.seed,
        })?;
        let sent = self.send(&there, relay.local_addr());
        let received = if sent.as_ref().is_ok_and(|status| status.success()) {
            recv.wait_for_exit()
        } else {
            Err(anyhow!("the destination was not waited for"))
        };
        let traffic = relay.stop();
        let stopped = stop_guest(&self.file("b.sock"));
        let status = sent?;
        if !status.success() {
            bail!("hybridmig send ended with {status}");
        }
        let received = received?;
        stopped.context("the destination's guest could not be stopped")?;
        if let Some(directory) = &args.keep {
            self.keep(directory)?;
        }

        let report = self.report("send.json")?;
        let arrived = self.report("recv.json")?;
        println!("\nas the source saw it:\n{}", show::figures(&report));
        println!(
            "through the emulated link: {} there, {} back; {} packets lost at random, {} in its queue",
            show_bytes(traffic.forward.bytes),
            show_bytes(traffic.back.bytes),
            traffic.forward.dropped_loss + traffic.back.dropped_loss,
            traffic.forward.dropped_queue + traffic.back.dropped_queue,
        );
        let seconds = report.times.total.max(1e-9);
        println!(
            "mean rate: {}",
            show_rate(traffic.forward.bytes as f64 / seconds)
        );
        match arrived.verified {
            Some(verified) if verified.ok && received.success() => {
                let pages = args.size / 4096;
                let sectors = match verified.blocks.saturating_sub(pages) {
                    0 => String::new(),
                    sectors => format!(" and {sectors} sectors of disk"),
                };
                println!(
                    "proof: the guest checked all of its {pages} pages of memory{sectors} at the \
                     destination (checksum, generation, digest over all): no byte differs"
                );
                Ok(ExitCode::SUCCESS)
            }
            Some(verified) => bail!(
                "the guest's check of its contents failed at the destination: {}",
                verified
                    .error
                    .unwrap_or_else(|| format!("hybridmig recv ended with {received}"))
            ),
            None => bail!("the guest did not verify its contents"),
        }
    }

    fn file(&self, name: &str) -> PathBuf {
        self.place.join(name)
    }

    fn start_guest(&self) -> anyhow::Result<Running> {
        let control = self.file("a.sock");
        let mut command = Command::new(&self.program);
        command
            .arg("guest")
            .arg("--control")
            .arg(&control)
            .args(["--size", &self.args.size.to_string()])
            .args(["--disk-size", &self.args.disk_size.to_string()])
            .args(["--profile", &self.args.profile.to_string()])
            .args(["--seed", &self.args.seed.to_string()])
            .args(["--die-with", &std::process::id().to_string()]);
        let mut guest = Running::start(command, "the guest")?;
        let deadline = Instant::now() + START;
        let mut client = Control::wait(&control, START, || guest.still_runs().is_ok())?;
        while client.describe()?.stats.operations == 0 {
            guest.still_runs()?;
            if Instant::now() > deadline {
                bail!("the guest did no work within {START:?}");
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        std::thread::sleep(WARM_UP);
        Ok(guest)
    }

    fn start_recv(&self, peer: &Fingerprint) -> anyhow::Result<(Running, SocketAddr)> {
        let mut command = self.hybridmig("recv", "b.pem", peer);
        command
            .args(["--listen", "127.0.0.1:0", "--verify", "--quiet"])
            .arg("--workload")
            .arg(self.file("b.sock"))
            .arg("--json")
            .arg(self.file("recv.json"))
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        let mut recv = Running::start(command, "hybridmig recv")?;
        let stderr = recv.child.stderr.take().expect("piped above");
        let mut lines = BufReader::new(stderr).lines();
        let mut said = String::new();
        let address = loop {
            let Some(line) = lines.next() else {
                bail!("hybridmig recv ended before it listened: {said}");
            };
            let line = line.context("hybridmig recv cannot be read")?;
            if let Some(rest) = line.strip_prefix("listening on ") {
                let address = rest.split(' ').next().unwrap_or(rest);
                break address
                    .parse()
                    .with_context(|| format!("'{line}' has no address"))?;
            }
            said.push_str(&line);
        };
        // What it says later is shown, so that its pipe never fills.
        std::thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                eprintln!("recv: {line}");
            }
        });
        Ok((recv, address))
    }

    fn send(&self, peer: &Fingerprint, to: SocketAddr) -> anyhow::Result<std::process::ExitStatus> {
        let mut command = self.hybridmig("send", "a.pem", peer);
        if let Some(directory) = &self.args.state_dir {
            command.arg("--state-dir").arg(directory);
        }
        for (name, share) in [
            ("--mem-frac", self.args.mem_frac),
            ("--disk-frac", self.args.disk_frac),
        ] {
            if let Some(share) = share {
                command.args([name, &share.to_string()]);
            }
        }
        if self.args.observe {
            command.arg("--observe");
        }
        command
            .arg("--workload")
            .arg(self.file("a.sock"))
            .args([
                "--to",
                &to.to_string(),
                "--mode",
                &self.args.mode.to_string(),
            ])
            .arg("--json")
            .arg(self.file("send.json"))
            // Shown once, at the end, from the report.
            .stdout(Stdio::null());
        Running::start(command, "hybridmig send")?.wait_for_exit()
    }

    fn hybridmig(&self, subcommand: &str, identity: &str, peer: &Fingerprint) -> Command {
        let mut command = Command::new(&self.program);
        command
            .arg(subcommand)
            .arg("--identity")
            .arg(self.file(identity))
            .args(["--peer", &peer.to_string()]);
        if subcommand == "recv" || self.args.state_dir.is_none() {
            let own = self.place.join(identity).with_extension("state");
            command.arg("--state-dir").arg(own);
        }
        command
    }

    fn report(&self, name: &str) -> anyhow::Result<Report> {
        let text = std::fs::read_to_string(self.file(name))
            .with_context(|| format!("the report {name} is missing"))?;
        serde_json::from_str(&text).with_context(|| format!("the report {name} is not readable"))
    }

    fn keep(&self, directory: &Path) -> anyhow::Result<()> {
        std::fs::create_dir_all(directory)
            .with_context(|| format!("cannot make {}", directory.display()))?;
        for name in ["send.json", "recv.json"] {
            std::fs::copy(self.file(name), directory.join(name))
                .with_context(|| format!("cannot keep {name} in {}", directory.display()))?;
        }
        Ok(())
    }
}

/// Ends the guest behind a control socket.
fn stop_guest(control: &Path) -> anyhow::Result<()> {
    Control::connect(control)?.stop()?;
    Ok(())
}

/// A process that ends with the demo, however that ends.
struct Running {
    child: Child,
    name: &'static str,
}

impl Running {
    fn start(mut command: Command, name: &'static str) -> anyhow::Result<Self> {
        let child = command
            .spawn()
            .with_context(|| format!("cannot start {name}"))?;
        Ok(Self { child, name })
    }

    /// Fails once the process has ended.
    fn still_runs(&mut self) -> anyhow::Result<()> {
        match self
            .child
            .try_wait()
            .with_context(|| format!("cannot ask for {}", self.name))?
        {
            None => Ok(()),
            Some(status) => bail!("{} ended early with {status}", self.name),
        }
    }

    fn wait_for_exit(&mut self) -> anyhow::Result<std::process::ExitStatus> {
        self.child
            .wait()
            .with_context(|| format!("cannot wait for {}", self.name))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            // Already gone is what is wanted.
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}
