//! The kernel's own emulator, driven by ip(8) and tc(8), for systems whose kernel has `sch_netem`: the
//! same two namespaces and addresses as a [`tun`](crate::tun) link, joined by a veth pair with a
//! netem queue at each end. Settings that the kernel cannot do are refused, not approximated
//! in silence ([`netem_words`] says what becomes of a queue's depth).

mod words;

use std::io;
use std::net::Ipv4Addr;
use std::process::Command;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::Instant;

pub use words::{TcWordsError, netem_words};

use crate::namespace::{Namespace, NamespaceError};
use crate::spec::{LinkSpec, Stage};
use crate::tun::{DEVICE, FAR_ADDRESS, NEAR_ADDRESS};

/// Why the kernel's emulator cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TcError {
    /// No namespace.
    #[error("tc link: no namespace")]
    Namespace(#[from] NamespaceError),
    /// A setting that tc refuses.
    #[error("tc link")]
    Words(#[from] TcWordsError),
    /// The kernel lacks the queueing discipline.
    #[error(
        "this kernel has no sch_netem ('modprobe sch_netem' may bring it); the TUN runner needs none"
    )]
    NoNetem,
    /// A program is missing or cannot be started.
    #[error("tc link: cannot run '{command}'; is iproute2 installed?")]
    Start {
        /// The command line.
        command: String,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// A command failed.
    #[error("tc link: '{command}' failed: {said}")]
    Failed {
        /// The command line.
        command: String,
        /// What it wrote to its standard error.
        said: String,
    },
    /// Something that every link needs cannot be had.
    #[error("tc link: cannot start the thread that follows the timeline")]
    Thread(#[source] io::Error),
}

/// The commands that make `device` do, at its egress, what a stage says. A cut also loses what is
/// queued, so the queue is made anew around it.
pub fn stage_commands(
    device: &str,
    stage: &Stage,
    first: bool,
) -> Result<Vec<Vec<String>>, TcWordsError> {
    let command = |verb: &str, netem: Vec<String>| {
        let words = ["tc", "qdisc", verb, "dev", device, "root"];
        let mut words: Vec<String> = words.into_iter().map(str::to_owned).collect();
        words.extend(netem);
        words
    };
    let netem = |words: Vec<String>| {
        let mut all = vec!["netem".to_owned()];
        all.extend(words);
        all
    };
    if stage.down {
        let cut = ["loss", "random", "100%", "limit", "1"].map(str::to_owned);
        let mut commands = vec![command("add", netem(cut.to_vec()))];
        if !first {
            commands.insert(0, command("del", Vec::new()));
        }
        return Ok(commands);
    }
    let verb = if first { "add" } else { "replace" };
    Ok(vec![command(verb, netem(netem_words(&stage.spec)?))])
}

/// The link; [`TcLink::start`] is all of it.
#[derive(Debug)]
pub struct TcLink;

impl TcLink {
    /// Makes both namespaces, joins them, and follows the link's timed changes until the handle is
    /// dropped.
    pub fn start(link: &LinkSpec) -> Result<TcHandle, TcError> {
        // All that tc would refuse on the way is refused before anything is made.
        for back in [false, true] {
            for stage in link.stages(back) {
                stage_commands(DEVICE, &stage, false)?;
            }
        }
        let (near, far) = (Namespace::new()?, Namespace::new()?);
        let far_path = far.path().display().to_string();
        let add = ["ip", "link", "add", DEVICE, "type", "veth", "peer"];
        run(
            &near,
            &[&add[..], &["name", DEVICE, "netns", &far_path]].concat(),
        )?;
        for (namespace, address) in [(&near, NEAR_ADDRESS), (&far, FAR_ADDRESS)] {
            let address = format!("{address}/30");
            run(
                namespace,
                &["ip", "address", "add", &address, "dev", DEVICE],
            )?;
            run(namespace, &["ip", "link", "set", DEVICE, "up"])?;
        }
        let mut handle = TcHandle {
            near,
            far,
            stop: None,
            thread: None,
        };
        let mut later = Vec::new();
        for back in [false, true] {
            let mut stages = link.stages(back).into_iter();
            let first = stages.next().expect("a link has a first stage");
            handle.apply(back, &first, true)?;
            later.extend(stages.map(|stage| (stage, back)));
        }
        later.sort_by_key(|(stage, _)| stage.from);
        if !later.is_empty() {
            handle.follow(later)?;
        }
        Ok(handle)
    }
}

/// A running link; it ends when this is dropped (a namespace not before the last process in it).
#[derive(Debug)]
pub struct TcHandle {
    near: Namespace,
    far: Namespace,
    /// Dropping it ends the thread.
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl TcHandle {
    /// The near namespace.
    pub fn near(&self) -> &Namespace {
        &self.near
    }

    /// The far namespace.
    pub fn far(&self) -> &Namespace {
        &self.far
    }

    /// The address of the near end of the link.
    pub fn near_address(&self) -> Ipv4Addr {
        NEAR_ADDRESS
    }

    /// The address of the far end of the link.
    pub fn far_address(&self) -> Ipv4Addr {
        FAR_ADDRESS
    }

    fn apply(&self, back: bool, stage: &Stage, first: bool) -> Result<(), TcError> {
        let namespace = if back { &self.far } else { &self.near };
        apply(namespace, stage, first)
    }

    /// Starts the thread that follows the timeline.
    fn follow(&mut self, stages: Vec<(Stage, bool)>) -> Result<(), TcError> {
        let start = Instant::now();
        let (stop, stopped) = channel();
        let namespaces = [self.near.share(), self.far.share()];
        let follow = move || {
            for (stage, back) in stages {
                let left = (start + stage.from).saturating_duration_since(Instant::now());
                if stopped.recv_timeout(left) != Err(RecvTimeoutError::Timeout) {
                    return;
                }
                if let Err(error) = apply(&namespaces[usize::from(back)], &stage, false) {
                    tracing::error!(%error, "a timed change of the link has failed");
                }
            }
        };
        let thread = std::thread::Builder::new().name("tc-timeline".to_owned());
        self.thread = Some(thread.spawn(follow).map_err(TcError::Thread)?);
        self.stop = Some(stop);
        Ok(())
    }
}

impl Drop for TcHandle {
    fn drop(&mut self) {
        self.stop = None;
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread that follows the link's timeline panicked");
        }
    }
}

fn apply(namespace: &Namespace, stage: &Stage, first: bool) -> Result<(), TcError> {
    for words in stage_commands(DEVICE, stage, first)? {
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        run(namespace, &words)?;
    }
    Ok(())
}

/// Runs a command inside a namespace.
fn run(namespace: &Namespace, words: &[&str]) -> Result<(), TcError> {
    let line = || words.join(" ");
    let mut command = Command::new(words[0]);
    command.args(&words[1..]);
    namespace.enter(&mut command);
    let output = command.output().map_err(|source| TcError::Start {
        command: line(),
        source,
    })?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    // What the kernel answers to a discipline that it does not know.
    if said.contains("qdisc kind is unknown") {
        return Err(TcError::NoNetem);
    }
    Err(TcError::Failed {
        command: line(),
        said,
    })
}
