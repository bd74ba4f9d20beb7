//! Starts child processes so that none outlives the test, whatever ends it: a panic, a time limit, a
//! kill -9. It knows nothing of what the children are.

use std::io;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus};
use std::sync::OnceLock;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::prctl;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

type Request = (Command, SyncSender<io::Result<Child>>);

/// Starts `command`; the kernel kills it when this process ends.
///
/// The kernel ties a child's life to the *thread* that started it, so all are started by one
/// thread that never ends.
fn spawn(mut command: Command) -> io::Result<Child> {
    static KEEPER: OnceLock<SyncSender<Request>> = OnceLock::new();
    let keeper = KEEPER.get_or_init(|| {
        let (sender, requests) = sync_channel::<Request>(1);
        std::thread::spawn(move || {
            for (mut command, answer) in requests {
                // Whoever asked waits for the answer.
                let _ = answer.send(command.spawn());
            }
        });
        sender
    });
    // SAFETY: prctl is async-signal-safe and the closure allocates nothing.
    unsafe {
        command.pre_exec(|| prctl::set_pdeathsig(Signal::SIGKILL).map_err(io::Error::from));
    }
    let (sender, answer) = sync_channel(1);
    keeper
        .send((command, sender))
        .map_err(|_| io::Error::other("the thread that starts processes is gone"))?;
    answer
        .recv()
        .map_err(|_| io::Error::other("the thread that starts processes is gone"))?
}

/// A child process that is killed when this is dropped.
#[derive(Debug)]
pub struct Kept {
    child: Child,
    name: String,
}

impl Kept {
    /// Starts `command`, called `name` in messages.
    pub fn start(name: &str, command: Command) -> Result<Self> {
        let program = command.get_program().to_string_lossy().into_owned();
        let child = spawn(command).with_context(|| format!("{name}: cannot start {program}"))?;
        Ok(Self {
            child,
            name: name.to_owned(),
        })
    }

    /// The child, for its pipes.
    pub fn child(&mut self) -> &mut Child {
        &mut self.child
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends a signal. The child has not been waited for before it is known to be dead, so the id
    /// cannot be another process's.
    pub fn signal(&mut self, signal: Signal) -> Result<()> {
        if self.has_ended()?.is_some() {
            bail!("{}: cannot send {signal}: it has ended", self.name);
        }
        let pid = Pid::from_raw(self.child.id().cast_signed());
        kill(pid, signal).with_context(|| format!("{}: cannot send {signal}", self.name))
    }

    /// How it has ended, if it has.
    pub fn has_ended(&mut self) -> Result<Option<ExitStatus>> {
        let status = self.child.try_wait();
        status.with_context(|| format!("{}: cannot be waited for", self.name))
    }

    /// Waits until it ends by itself.
    pub fn wait(&mut self, patience: Duration) -> Result<ExitStatus> {
        let deadline = Instant::now() + patience;
        loop {
            if let Some(status) = self.has_ended()? {
                return Ok(status);
            }
            if Instant::now() >= deadline {
                bail!("{}: still runs after {patience:?}", self.name);
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Kills it with SIGKILL, if it has not ended, and waits until it is gone.
    pub fn kill(&mut self) -> Result<ExitStatus> {
        let killed = self.child.kill().and_then(|()| self.child.wait());
        killed.with_context(|| format!("{}: cannot be killed", self.name))
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        if let Err(error) = self.kill() {
            eprintln!("{error:#}");
        }
    }
}
