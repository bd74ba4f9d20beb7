//! The `hybridmig` program as a process of its own: started, listened to, signalled, killed.

use std::ffi::OsStr;
use std::path::PathBuf;
use std::process::{Command, ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;

use crate::keeper::Kept;
use crate::profile_dir;
use crate::transcript::{Line, Mark, Transcript};

/// The program under test: where the environment says (`CARGO_BIN_EXE_hybridmig`), else what cargo
/// has built beside this test. Workspace-wide test runs build it; after `-p hybridmig-tests`
/// alone it may be old.
pub fn hybridmig_binary() -> Result<PathBuf> {
    let binary = match std::env::var_os("CARGO_BIN_EXE_hybridmig") {
        Some(path) => PathBuf::from(path),
        None => profile_dir()?.join("hybridmig"),
    };
    ensure!(
        binary.is_file(),
        "{} does not exist: build it with 'cargo build' first, or test the whole workspace",
        binary.display()
    );
    Ok(binary)
}

/// A running `hybridmig`. Dropping it kills it.
#[derive(Debug)]
pub struct HybridmigProcess {
    process: Kept,
    stdout: Transcript,
    stderr: Transcript,
}

impl HybridmigProcess {
    /// Starts `hybridmig` with `arguments`, called `name` in messages.
    pub fn spawn<A: AsRef<OsStr>>(
        name: &str,
        arguments: impl IntoIterator<Item = A>,
    ) -> Result<Self> {
        let mut command = Command::new(hybridmig_binary()?);
        command.args(arguments);
        Self::spawn_command(name, command)
    }

    /// Like [`Self::spawn`], with a command of the caller's making (environment, directory).
    pub fn spawn_command(name: &str, mut command: Command) -> Result<Self> {
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut process = Kept::start(name, command)?;
        let pipes = process.child();
        let (stdout, stderr) = (pipes.stdout.take(), pipes.stderr.take());
        let this = Self {
            process,
            stdout: Transcript::new(&format!("stdout of {name}")),
            stderr: Transcript::new(&format!("stderr of {name}")),
        };
        this.stdout.follow(stdout.context("stdout is piped")?)?;
        this.stderr.follow(stderr.context("stderr is piped")?)?;
        Ok(this)
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// What it has written to standard output.
    pub fn stdout(&self) -> &Transcript {
        &self.stdout
    }

    /// What it has written to standard error.
    pub fn stderr(&self) -> &Transcript {
        &self.stderr
    }

    /// Waits for a line on standard output that contains `pattern`.
    pub fn wait_for_stdout(&self, pattern: &str, patience: Duration) -> Result<Line> {
        self.wait_for(&self.stdout, pattern, patience)
    }

    /// Waits for a line on standard error that contains `pattern`.
    pub fn wait_for_stderr(&self, pattern: &str, patience: Duration) -> Result<Line> {
        self.wait_for(&self.stderr, pattern, patience)
    }

    fn wait_for(&self, stream: &Transcript, pattern: &str, patience: Duration) -> Result<Line> {
        let what = format!("line with '{pattern}'");
        let matches = |line: &str| line.contains(pattern);
        let line = stream.wait(Mark::default(), &what, matches, &[], patience);
        line.with_context(|| self.said())
    }

    /// Sends a signal.
    pub fn signal(&mut self, signal: Signal) -> Result<()> {
        self.process.signal(signal)
    }

    /// Kills it with SIGKILL and waits until it is gone.
    pub fn kill(&mut self) -> Result<()> {
        self.process.kill()?;
        self.settle()
    }

    /// How it has ended, if it has.
    pub fn has_ended(&mut self) -> Result<Option<ExitStatus>> {
        let ended = self.process.has_ended()?;
        if ended.is_some() {
            self.settle()?;
        }
        Ok(ended)
    }

    /// Waits until it ends by itself. All that it has said is written down then.
    pub fn wait(&mut self, patience: Duration) -> Result<ExitStatus> {
        let status = self.process.wait(patience);
        let status = status.with_context(|| self.said())?;
        self.settle()?;
        Ok(status)
    }

    /// Waits until it ends and fails unless it ends well.
    pub fn succeed(&mut self, patience: Duration) -> Result<()> {
        let status = self.wait(patience)?;
        ensure!(status.success(), "{status}; {}", self.said());
        Ok(())
    }

    fn settle(&self) -> Result<()> {
        self.stdout.settle()?;
        self.stderr.settle()
    }

    fn said(&self) -> String {
        let (stdout, stderr) = (self.stdout.tail(40), self.stderr.tail(40));
        format!("it has said:\n{stdout}\n--- and on stderr:\n{stderr}\n---")
    }
}
