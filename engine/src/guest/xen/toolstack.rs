//! `xl`, which stays in charge of domains: asked what a domain is, told to restore, rename and destroy it. Every call
//! has a limit.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use super::config::Config;
use crate::guest::{GuestError, GuestResult};

/// How long xl may take for what it does at once.
const LIMIT: Duration = Duration::from_secs(60);
/// How often a process that works is looked at.
const POLL: Duration = Duration::from_millis(2);
/// The longest answer that is read, in bytes.
const ANSWER_LIMIT: u64 = 1 << 20;

/// Runs `xl` and returns what it printed.
fn xl(arguments: &[&str]) -> GuestResult<String> {
    let said = arguments.join(" ");
    let failed = |error: io::Error| {
        GuestError::caused(
            format!("cannot run `xl {said}`: is Xen's toolstack installed?"),
            error,
        )
    };
    let (mut out, mut err) = (
        tempfile::tempfile().map_err(failed)?,
        tempfile::tempfile().map_err(failed)?,
    );
    let mut child = Command::new("xl")
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(out.try_clone().map_err(failed)?)
        .stderr(err.try_clone().map_err(failed)?)
        .spawn()
        .map_err(failed)?;
    let status = ended(&mut child, LIMIT).map_err(failed)?;
    let Some(status) = status else {
        end(&mut child);
        return Err(GuestError::new(format!(
            "`xl {said}` did not end within {} s",
            LIMIT.as_secs()
        )));
    };
    if !status.success() {
        return Err(GuestError::new(format!(
            "`xl {said}` failed ({status}): {}",
            contents(&mut err).map_err(failed)?.trim()
        )));
    }
    contents(&mut out).map_err(failed)
}

fn contents(file: &mut File) -> io::Result<String> {
    file.seek(SeekFrom::Start(0))?;
    let mut bytes = Vec::new();
    file.take(ANSWER_LIMIT).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

fn ended(child: &mut Child, limit: Duration) -> io::Result<Option<std::process::ExitStatus>> {
    let deadline = Instant::now() + limit;
    loop {
        match child.try_wait()? {
            None if Instant::now() < deadline => thread::sleep(POLL),
            status => return Ok(status),
        }
    }
}

fn end(child: &mut Child) {
    // One that has ended already is what is wanted.
    if let Err(error) = child.kill().and_then(|()| child.wait()) {
        tracing::warn!(%error, "cannot end xl");
    }
}

/// Number and configuration of a domain, by its name or number.
pub fn domain(name: &str) -> GuestResult<(u32, Config)> {
    Config::of_list(&xl(&["list", "-l", name])?).map_err(GuestError::new)
}

/// The number of the domain with that name, if there is one.
pub fn number(name: &str) -> Option<u32> {
    xl(&["domid", name]).ok()?.trim().parse().ok()
}

/// Gives a domain another name.
pub fn rename(domain: u32, name: &str) -> GuestResult<()> {
    xl(&["rename", &domain.to_string(), name]).map(drop)
}

/// Ends a domain and all that the toolstack has of it.
pub fn destroy(domain: u32) -> GuestResult<()> {
    xl(&["destroy", &domain.to_string()]).map(drop)
}

/// An `xl restore` that is given its stream little by little.
pub struct Restoring {
    child: Child,
    stream: Option<ChildStdin>,
    said: File,
}

impl Restoring {
    /// Starts it; the domain will stay paused.
    pub fn start() -> GuestResult<Self> {
        let failed = |error: io::Error| GuestError::caused("cannot run `xl restore`", error);
        let said = tempfile::tempfile().map_err(failed)?;
        let mut child = Command::new("xl")
            .args(["restore", "-p", "/proc/self/fd/0"])
            .stdin(Stdio::piped())
            .stdout(said.try_clone().map_err(failed)?)
            .stderr(said.try_clone().map_err(failed)?)
            .spawn()
            .map_err(failed)?;
        Ok(Self {
            stream: child.stdin.take(),
            child,
            said,
        })
    }

    /// Gives it a part of the stream.
    pub fn give(&mut self, bytes: &[u8]) -> GuestResult<()> {
        let Some(stream) = &mut self.stream else {
            return Err(GuestError::new("the stream of `xl restore` has ended"));
        };
        let given = stream.write_all(bytes).and_then(|()| stream.flush());
        given.map_err(|error| self.failed("took no more of the stream", Some(error)))
    }

    /// Waits until the domain is there and `ready`; its number.
    pub fn wait_for(
        &mut self,
        name: &str,
        ready: impl Fn(u32) -> GuestResult<bool>,
    ) -> GuestResult<u32> {
        let deadline = Instant::now() + LIMIT;
        let mut found = None;
        loop {
            found = found.or_else(|| number(name));
            if let Some(domain) = found
                && ready(domain)?
            {
                return Ok(domain);
            }
            match self.child.try_wait() {
                Ok(None) if Instant::now() < deadline => thread::sleep(POLL),
                Ok(None) => return Err(self.failed("made no domain in time", None)),
                Ok(Some(_)) => return Err(self.failed("ended", None)),
                Err(error) => return Err(self.failed("is lost", Some(error))),
            }
        }
    }

    /// Ends the stream and waits until the domain is complete.
    pub fn finish(mut self) -> GuestResult<()> {
        self.stream = None;
        match ended(&mut self.child, 2 * LIMIT) {
            Ok(Some(status)) if status.success() => Ok(()),
            Ok(Some(_)) => Err(self.failed("refused the state", None)),
            Ok(None) => Err(self.failed("did not end", None)),
            Err(error) => Err(self.failed("is lost", Some(error))),
        }
    }

    fn failed(&mut self, how: &str, error: Option<io::Error>) -> GuestError {
        let said = contents(&mut self.said).unwrap_or_default();
        let lines: Vec<&str> = said.lines().collect();
        let last = lines[lines.len().saturating_sub(6)..].join("; ");
        let text = format!("`xl restore` {how}; it said: {last}");
        match error {
            Some(error) => GuestError::caused(text, error),
            None => GuestError::new(text),
        }
    }
}

impl Drop for Restoring {
    fn drop(&mut self) {
        self.stream = None;
        if !matches!(self.child.try_wait(), Ok(Some(_))) {
            end(&mut self.child);
        }
    }
}
