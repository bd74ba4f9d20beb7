//! The console of a test guest: what its memory checker says (`tests/guest/memcheck.rs`), with the
//! host's time, so that stalls and wrong bytes show from outside.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::transcript::{Line, Mark, Transcript};

/// What a guest says when it is beyond help.
const FATAL: &[&str] = &["Kernel panic", "Oops:", "BUG:", "panicked at", "WORKFAIL"];

/// Who in the guest ticks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Who {
    /// The memory checker.
    Checker,
    /// What has a real program work (`tests/guest/realwork.rs`): its operations are the program's, wrong answers
    /// count as bad.
    Work,
}

impl Who {
    fn prefix(self) -> &'static str {
        match self {
            Self::Checker => "TICK ",
            Self::Work => "WORK ",
        }
    }
}

/// One tick of the checker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tick {
    /// When the host had read it.
    pub at: Instant,
    /// The guest's own clock, milliseconds since the checker started.
    pub guest_ms: u64,
    /// Pages written or verified since the checker started.
    pub operations: u64,
    /// Pages found wrong since the checker started.
    pub bad: u64,
}

impl Tick {
    fn parse(line: &Line, of: Who) -> Option<Self> {
        // A line that was torn between the consoles of two hosts, or by a kernel message, is none.
        let mut words = line.text.strip_prefix(of.prefix())?.split(' ');
        let tick = Self {
            at: line.at,
            guest_ms: words.next()?.parse().ok()?,
            operations: words.next()?.parse().ok()?,
            bad: words.next()?.parse().ok()?,
        };
        words.next().is_none().then_some(tick)
    }
}

/// The answer to a full sweep.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Verified {
    /// Pages of the checker.
    pub pages: u64,
    /// Pages found wrong since the checker started.
    pub bad: u64,
}

/// A serial console.
#[derive(Debug)]
pub struct Console {
    transcript: Transcript,
    input: Mutex<UnixStream>,
}

impl Console {
    /// Connects to the socket that QEMU serves a console on, as soon as it is there.
    pub fn connect(name: &str, socket: &Path, patience: Duration) -> Result<Self> {
        let input = connect(socket, patience)
            .with_context(|| format!("{name}: no console at {}", socket.display()))?;
        let transcript = Transcript::new(&format!("console of {name}"));
        transcript.follow(input.try_clone().context("a socket can be cloned")?)?;
        Ok(Self {
            transcript,
            input: Mutex::new(input),
        })
    }

    /// All that was said.
    pub fn transcript(&self) -> &Transcript {
        &self.transcript
    }

    /// Types a line.
    pub fn send(&self, line: &str) -> Result<()> {
        let mut input = self.input.lock().expect("nobody panics while typing");
        writeln!(input, "{line}").context("the console takes no input")
    }

    /// Waits for a line, said already or not, that contains `pattern`. Fails early when the guest
    /// panics or its console ends.
    pub fn wait_for(&self, pattern: &str, patience: Duration) -> Result<Line> {
        self.wait_after(Mark::default(), pattern, patience)
    }

    /// Like [`Self::wait_for`], for a line behind `mark`.
    pub fn wait_after(&self, mark: Mark, pattern: &str, patience: Duration) -> Result<Line> {
        let what = format!("line with '{pattern}'");
        let matches = |line: &str| line.contains(pattern);
        self.transcript.wait(mark, &what, matches, FATAL, patience)
    }

    /// Waits until `count` more ticks have come: the guest runs.
    pub fn wait_ticks(&self, count: usize, patience: Duration) -> Result<()> {
        let deadline = Instant::now() + patience;
        for _ in 0..count {
            let left = deadline.saturating_duration_since(Instant::now());
            self.wait_after(self.transcript.end(), "TICK ", left)?;
        }
        Ok(())
    }

    /// Has the checker verify every page.
    pub fn verify(&self, patience: Duration) -> Result<Verified> {
        let mark = self.transcript.end();
        self.send("verify")?;
        let line = self.wait_after(mark, "VERIFIED ", patience)?;
        let mut numbers = line.text.split(' ').skip(1).map(str::parse::<u64>);
        match (numbers.next(), numbers.next()) {
            (Some(Ok(pages)), Some(Ok(bad))) => Ok(Verified { pages, bad }),
            _ => bail!("the checker answers '{}'", line.text),
        }
    }

    /// Changes how fast pages are dirtied, in MB/s.
    pub fn set_rate(&self, megabytes: f64, patience: Duration) -> Result<()> {
        let mark = self.transcript.end();
        self.send(&format!("rate {megabytes}"))?;
        self.wait_after(mark, "RATE ", patience).map(|_| ())
    }

    /// What the guest said when it was beyond help, if it has said so.
    pub fn died(&self) -> Option<String> {
        let lines = self.transcript.lines();
        let fatal = |line: &Line| FATAL.iter().any(|word| line.text.contains(word));
        lines.into_iter().find(fatal).map(|line| line.text)
    }

    /// All ticks of the checker so far.
    pub fn ticks(&self) -> Vec<Tick> {
        self.ticks_of(Who::Checker)
    }

    /// All ticks so far.
    pub fn ticks_of(&self, who: Who) -> Vec<Tick> {
        let lines = self.transcript.lines();
        let ticks = lines.iter().filter_map(|line| Tick::parse(line, who));
        ticks.collect()
    }
}

/// The ticks of one guest over the consoles of all hosts that it has been on, in the host's order.
pub fn ticks(consoles: &[&Console]) -> Vec<Tick> {
    let mut ticks: Vec<_> = consoles
        .iter()
        .flat_map(|console| console.ticks())
        .collect();
    ticks.sort_by_key(|tick| tick.at);
    ticks
}

/// The longest time, by the host's clock, between two ticks of one guest: what its user would have
/// noticed of a migration. Includes the tick's own time (50 ms unless `memcheck.tick` says otherwise).
pub fn longest_gap(consoles: &[&Console]) -> Duration {
    let ticks = ticks(consoles);
    let gaps = ticks.windows(2).map(|pair| pair[1].at - pair[0].at);
    gaps.max().unwrap_or_default()
}

/// Pages that the checker has found wrong, on any host.
pub fn bad_pages(consoles: &[&Console]) -> u64 {
    bad(consoles, Who::Checker)
}

/// What this one has found wrong, on any host.
pub fn bad(consoles: &[&Console], who: Who) -> u64 {
    let ticks = consoles.iter().flat_map(|console| console.ticks_of(who));
    ticks.map(|tick| tick.bad).max().unwrap_or_default()
}

/// Fails unless the guest has lived one life: in the host's order its clock and its work only ever
/// grow. Two running copies, or one that was set back, do not pass.
pub fn one_life(consoles: &[&Console]) -> Result<()> {
    let ticks = ticks(consoles);
    ensure!(!ticks.is_empty(), "the guest has never ticked");
    for pair in ticks.windows(2) {
        let [before, after] = pair else { continue };
        ensure!(
            after.guest_ms > before.guest_ms && after.operations >= before.operations,
            "the guest has run twice, or back in time: after {before:?} came {after:?}"
        );
    }
    Ok(())
}

/// Connects to a Unix socket as soon as somebody listens there.
pub fn connect(socket: &Path, patience: Duration) -> Result<UnixStream> {
    let deadline = Instant::now() + patience;
    loop {
        match UnixStream::connect(socket) {
            Ok(stream) => return Ok(stream),
            Err(error) if Instant::now() >= deadline => {
                return Err(error).context(format!("nobody listens after {patience:?}"));
            }
            Err(_) => std::thread::sleep(Duration::from_millis(5)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tick(text: &str) -> Option<(u64, u64, u64)> {
        let line = Line {
            at: Instant::now(),
            text: text.to_owned(),
        };
        Tick::parse(&line, Who::Checker).map(|tick| (tick.guest_ms, tick.operations, tick.bad))
    }

    #[test]
    fn reads_whole_ticks_only() {
        assert_eq!(tick("TICK 50 1234 0"), Some((50, 1234, 0)));
        assert_eq!(tick("TICK 50 1234"), None);
        assert_eq!(tick("K 50 1234 0"), None);
        assert_eq!(tick("TICK 50 12[ 3.4] usb: hello"), None);
        assert_eq!(tick("TICK 50 1234 0 7"), None);
    }
}
